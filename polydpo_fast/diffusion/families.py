"""The pipelines that can be trained, and what differs between them.

Another one is an entry in FAMILIES here, with the function that encodes its prompts, and an entry in `forward.py` for
the call of its model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import PairBatch
from .forward import time_ids
from .moving import moved

__all__ = [
    "FAMILIES",
    "LORA_FILE",
    "Family",
    "check_geometry",
    "conditioning",
    "encode_prompts",
    "family_of",
    "native_size",
]

LORA_FILE = "pytorch_lora_weights.safetensors"

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT_ATTENTION = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Family:
    """One class of pipelines.

    model: the name of the part that is trained.
    encode: (pipeline, prompts, device) to tensors of a row per prompt.
    patch: latents per token and side: sides of the pixels are multiples of this many latents.
    video: whether it makes clips, (N, C, T, H, W).
    vae_float32: the VAE overflows in float16, and loses what shows in bfloat16: Diffusers' scripts keep it in float32.
    told_sizes: the model is told the sizes and the crop of its images, as SDXL.
    lora_targets: layers that get adapters where the user names none.
    left_out: parts of the pipeline that nothing here needs.
    """

    model: str
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    patch: int = 1
    video: bool = False
    vae_float32: bool = False
    told_sizes: bool = False
    lora_targets: tuple[str, ...] = _ATTENTION
    left_out: tuple[str, ...] = ()


def _sd(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    text, _ = pipe.encode_prompt(prompts, device, 1, False)
    return {"encoder_hidden_states": text}


def _sdxl(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


def _sd3(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _flux(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    text, pooled, _ = pipe.encode_prompt(prompts, None, device=device)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _wan(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    # Its pipeline calls itself with 512 tokens, which is what the model was trained with.
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512, device=device)
    return {"encoder_hidden_states": text}


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("unet", _sd, left_out=("safety_checker",)),
    "StableDiffusionXLPipeline": Family("unet", _sdxl, vae_float32=True, told_sizes=True),
    "StableDiffusion3Pipeline": Family("transformer", _sd3, patch=2, vae_float32=True, lora_targets=_JOINT_ATTENTION),
    "FluxPipeline": Family("transformer", _flux, patch=2, lora_targets=_JOINT_ATTENTION),
    "WanPipeline": Family("transformer", _wan, patch=2, video=True, vae_float32=True),
}


def family_of(model: str, revision: str | None = None) -> Family:
    """Of the pipeline in a folder or on the hub. Raises ValueError where there is none, or one of another class."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(model, revision=revision)
        name = str(config["_class_name"])  # a list where the hub's repository has its own code
    except (OSError, KeyError, ValueError) as error:
        if Path(model).is_file():
            raise ValueError(
                f"model is {model!r}, a file; expected a folder with a model_index.json, as Diffusers makes of it: "
                "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER), or its other pipelines"
            ) from error
        if (Path(model) / LORA_FILE).is_file():
            raise ValueError(
                f"model is {model!r}, which holds LoRA weights alone; expected the pipeline that they were trained on, "
                "with the folder as `train`'s setting lora_weights, or as `geneval`'s --result"
            ) from error
        raise ValueError(f"model is {model!r}, which is no pipeline with a model_index.json: {error}") from error
    if (config.get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"model is {model!r}, whose stages of noise have a transformer each; expected one of one stage"
        )
    if name not in FAMILIES:
        raise ValueError(
            f"model is a {name}; expected one of {', '.join(FAMILIES)}. For others write the loop, and give "
            "PairObjective a forward= for the model"
        )
    return FAMILIES[name]


def native_size(pipe: Any, family: Family) -> tuple[int, int]:
    """Height and width of the pixels that the model was made for."""
    if family.video:
        return (704, 1280) if pipe.config.get("expand_timesteps") else (480, 832)  # Wan2.2-TI2V-5B; Wan2.1
    sample = getattr(pipe, family.model).config.get("sample_size") or 128  # FLUX's has none: 1024 pixels
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def check_geometry(pipe: Any, family: Family, size: tuple[int, int], frames: int | None) -> None:
    """Raises ValueError for pixels that the model cannot take."""
    unit = family.patch * (pipe.vae_scale_factor_spatial if family.video else pipe.vae_scale_factor)
    if any(side % unit for side in size):
        raise ValueError(f"size is {size[0]} x {size[1]}; expected multiples of {unit}, as the model packs its latents")
    if not family.video and frames is not None:
        raise ValueError(f"loader has frames={frames}; {type(pipe).__name__} takes images, without frames")
    if family.video:
        stride = pipe.vae_scale_factor_temporal
        if frames is None or frames % stride != 1 % stride:
            raise ValueError(
                f"loader has frames={frames}; expected a multiple of {stride}, and one more, for the VAE, such as "
                f"loader: {{frames: {20 * stride + 1}, fps: 16}}"
            )


@torch.no_grad()
def encode_prompts(pipe: Any, family: Family, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Tensors of a row per prompt."""
    return family.encode(pipe, prompts, device)


def conditioning(
    family: Family,
    text: Mapping[str, Tensor],
    batch: PairBatch,
    size: tuple[int, int],
    size_conditioning: str = "fixed",
) -> dict[str, Any]:
    """The keyword arguments of the model for a batch: its encoded prompts, and for SDXL its geometry.

    size: of the pixels. size_conditioning: "fixed" tells SDXL of whole images of this size, as its pipeline does while
    it samples: the same for both arms, B rows. "own" tells it each image's own size and crop, 2B rows.
    """
    result: dict[str, Any] = dict(text)
    if family.told_sizes:
        pooled = result.pop("text_embeds")
        if size_conditioning == "own":
            ids = time_ids(batch.original_size, batch.crop_top_left, size)
        else:
            ids = torch.tensor([[*size, 0, 0, *size]] * len(pooled), device="cpu")
        geometry = moved(ids, pooled.device, torch.float32)
        result["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": geometry}
    return result
