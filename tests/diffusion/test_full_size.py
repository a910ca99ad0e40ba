"""A LoRA on models of the size and configuration that people train, with random weights: up to 6 GB each."""

import contextlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import transformers
from diffusion import pipelines
from diffusion.runs import lines, settings

from polydpo_fast.diffusion.train import train

pytestmark = pytest.mark.heavy

ENCODER = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
ENCODER |= dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
SIXTEEN = ENCODER | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True)


@contextlib.contextmanager
def cheap():
    """Models in bfloat16 whose weights nobody draws: `fill` does that in a hundredth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):
                patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
def fill(model):
    """Weights about as large as trained ones: a matrix keeps the size of what it multiplies, a norm does not scale."""
    random = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("gamma"):
            parameter.fill_(float(name.endswith("gamma") or ("norm" in name and name.endswith("weight"))))
            continue
        scaled = (random / math.sqrt(parameter[0].numel())).to(parameter.dtype)
        flat = parameter.view(-1)
        for begin in range(0, len(flat), len(scaled)):
            flat[begin : begin + len(scaled)] = scaled[: len(flat) - begin]
    return model


def clip(tokens, width, projected):
    """One layer, of the width that the model takes."""
    config = transformers.CLIPTextConfig(
        **dict(vocab_size=tokens, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1),
        **dict(num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=width),
        **dict(bos_token_id=tokens - 2, eos_token_id=tokens - 1),
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5(tokens, kind):
    config = getattr(transformers, f"{kind}Config")(
        **dict(vocab_size=tokens, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=1),
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def sd15(short, tokens, long, words):
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=diffusers.DDIMScheduler(**pipelines.SD_BETAS, clip_sample=False, steps_offset=1),
        vae=diffusers.AutoencoderKL(**ENCODER, latent_channels=4),
        text_encoder=clip(tokens, 768, False),
        tokenizer=short,
        **dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
    )


def sdxl(short, tokens, long, words):
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(
            **dict(sample_size=128, attention_head_dim=[5, 10, 20], block_out_channels=(320, 640, 1280)),
            **dict(cross_attention_dim=2048, transformer_layers_per_block=[1, 2, 10], use_linear_projection=True),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            **dict(addition_embed_type="text_time", addition_time_embed_dim=256),
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**pipelines.SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        vae=diffusers.AutoencoderKL(**ENCODER, latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        **dict(text_encoder=clip(tokens, 768, False), text_encoder_2=clip(tokens, 1280, True)),
        **dict(tokenizer=short, tokenizer_2=short),
    )


def sd3(short, tokens, long, words):
    """SD3.5 Medium."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            **dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24),
            **dict(attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096),
            **dict(caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384),
            **dict(dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**SIXTEEN, scaling_factor=1.5305, shift_factor=0.0609),
        **dict(text_encoder=clip(tokens, 768, True), text_encoder_2=clip(tokens, 1280, True)),
        **dict(tokenizer=short, tokenizer_2=short, text_encoder_3=t5(words, "T5"), tokenizer_3=long),
    )


def flux(short, tokens, long, words):
    """FLUX.1-dev with 2 of 19 and 4 of 38 layers."""
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            **dict(patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128),
            **dict(num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768),
            **dict(guidance_embeds=True, axes_dims_rope=(16, 56, 56)),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=diffusers.AutoencoderKL(**SIXTEEN, scaling_factor=0.3611, shift_factor=0.1159),
        **dict(text_encoder=clip(tokens, 768, False), tokenizer=short),
        **dict(text_encoder_2=t5(words, "T5"), tokenizer_2=long),
    )


def wan(short, tokens, long, words):
    """Wan2.1-T2V-1.3B."""
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            **dict(patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16),
            **dict(out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30),
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(),
        **dict(text_encoder=t5(words, "UMT5"), tokenizer=long),
    )


@pytest.mark.parametrize(
    ("family", "millions", "change"),
    [
        (sd15, 859.5, dict(size=128)),
        (sdxl, 2567.5, dict(size=[128, 192])),
        (sd3, 2243.2, dict(size=64)),
        (flux, 1310.2, dict(size=[64, 96])),
        (wan, 1419.0, dict(size=[64, 96], loader={"frames": 5})),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_lora_of_a_model_of_full_size_begins_at_its_reference(tmp_path, fresh_accelerate, family, millions, change):
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(memory["MemAvailable"].split()[0]) / 1e6
    if free < 16:
        pytest.skip(f"{free:.0f} GB of memory are free; expected 16, for the largest of these models")
    short, tokens = pipelines.clip_tokenizer(tmp_path / "words")
    long, words = pipelines.t5_tokenizer()
    short.model_max_length, long.model_max_length = 77, 512
    with cheap():
        pipe = family(short, tokens, long, words)
        trained = getattr(pipe, "unet", None) or pipe.transformer
        assert round(sum(parameter.numel() for parameter in trained.parameters()) / 1e6, 1) == millions
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                fill(part)
    pipe.save_pretrained(tmp_path / "pipeline")
    del pipe, trained, part
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if "loader" in change:
        data = pipelines.write_clips(tmp_path)
    else:
        data = pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    change |= dict(data=str(data), beta=1000.0, steps=2, batch_size=1, lora_rank=4, mixed_precision="bf16")
    run = settings(tmp_path, tmp_path / "run", **change)
    train(run)
    first, second = lines(tmp_path / "run")
    # The adapters begin at zero: policy and reference are one, whatever the precision.
    assert first["loss"] == np.float32(math.log(2))
    assert (first["implicit_accuracy"], first["reward_margin"]) == (0.5, 0.0)
    assert first["model_mse_win"] > 0
    assert math.isfinite(second["loss"])
    assert second["reward_margin"] != 0
