"""What is asked of each family of pipelines, against what the pipelines do themselves."""

import copy
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DConditionModel,
    WanPipeline,
)
from diffusion import pipelines, tiny
from peft import LoraConfig

from polydpo_fast.data import PairBatch
from polydpo_fast.diffusion import families, noise_pairs, predict
from polydpo_fast.diffusion import pipelines as loading
from polydpo_fast.diffusion import pixels as pixels_
from polydpo_fast.diffusion import result as files
from polydpo_fast.diffusion.families import FAMILIES
from polydpo_fast.diffusion.forward import both_arms

# Of a scheduler of Diffusers', not of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZES = {"wan": (32, 16)}
PROMPTS = ["ab c", "", "d" * 20]


@pytest.fixture(scope="module", params=pipelines.PIPELINES)
def loaded(request, tmp_path_factory):
    folder = pipelines.save(request.param, tmp_path_factory.mktemp(request.param))
    pipe = loading.load_pipeline(str(folder), policy=torch.float32, frozen=torch.float32)
    return request.param, pipe, FAMILIES[type(pipe).__name__]


def batch(size):
    count = len(PROMPTS)
    return PairBatch(
        pixels=torch.zeros(2 * count, 3, *size),
        prompts=PROMPTS,
        keys=PROMPTS,
        index=torch.arange(count),
        lap=torch.zeros(count, dtype=torch.int64),
        weight=torch.ones(count),
        category=[""] * count,
        ok=torch.ones(count, dtype=torch.bool),
        original_size=torch.arange(4 * count).view(-1, 2) + 100,
        crop_top_left=torch.arange(4 * count).view(-1, 2),
        flipped=torch.zeros(count, dtype=torch.bool),
    )


def own_call(pipe, family, prompt, size, **options):
    """What the pipeline gives its model at the first step, without guidance, and what it returns."""
    seen = []
    hook = getattr(pipe, family.model).register_forward_pre_hook(lambda _, a, k: seen.append(k), with_kwargs=True)
    frames = {"num_frames": 5} if family.video else {}
    out = pipe(
        prompt=prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        return_dict=False,
        **frames,
        **options,
    )
    hook.remove()
    return seen[0], out[0]


def test_prompts_are_encoded_as_the_pipeline_does(loaded):
    name, pipe, family = loaded
    size = SIZES.get(name, (16, 16))
    text = families.encode_prompts(pipe, family, PROMPTS, torch.device("cpu"))
    ours = families.conditioning(family, text, batch(size), size)
    own = families.conditioning(family, text, batch(size), size, "own")
    for row, prompt in enumerate(PROMPTS):
        theirs, _ = own_call(pipe, family, prompt, size, guidance_scale=1.0)
        pairs = [(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])]
        if "pooled_projections" in theirs:
            pairs.append((ours["pooled_projections"], theirs["pooled_projections"]))
        if name == "sdxl":
            added = [given["added_cond_kwargs"] for given in (ours, theirs)]
            pairs += [[given[part] for given in added] for part in ("text_embeds", "time_ids")]
        for many, one in pairs:  # a batch of another size is summed in another order
            assert many[row].shape == one[0].shape
            torch.testing.assert_close(many[row], one[0], rtol=1e-5, atol=1e-6)
    if name == "sdxl":
        for row, given in enumerate(own["added_cond_kwargs"]["time_ids"]):
            left, top = 2 * row, 2 * row + 1
            theirs = pipe._get_add_time_ids((100 + left, 100 + top), (left, top), size, torch.float32, 10)
            assert torch.equal(given, theirs[0])


def check_first_call(pipe, family, size):
    """That the model is called as the pipeline calls it at its first step. Returns the times that the pipeline gave."""
    calls = []
    hook = getattr(pipe, family.model).register_forward_hook(
        lambda _, positional, given, output: calls.append((positional, given, output[0])), with_kwargs=True
    )
    guidance = {} if "Flux" in type(pipe).__name__ else {"guidance_scale": 1.0}  # FLUX's is an input of the model
    own_call(pipe, family, "ab c", size, output_type="latent", **guidance)
    hook.remove()
    positional, given, output = calls[0]
    latents, times = positional or (given["hidden_states"], given["timestep"])
    if latents.dim() == 3:  # FLUX's tokens; it takes times from 0 to 1
        times = times * 1000
        latents, output = (pipe._unpack_latents(x, *size, pipe.vae_scale_factor) for x in (latents, output))
    text = families.encode_prompts(pipe, family, ["ab c"], torch.device("cpu"))
    conditioning = families.conditioning(family, text, None, size)
    with torch.no_grad():
        ours = predict(getattr(pipe, family.model), latents, times.flatten()[:1].float(), conditioning)
    torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-6)
    return times.flatten()


def test_models_are_called_as_their_pipelines_call_them(loaded):
    name, pipe, family = loaded
    assert len(check_first_call(pipe, family, {"wan": (32, 16), "flux": (16, 24)}.get(name, (16, 16)))) == 1


def test_samples_are_the_pipelines_one_by_one(loaded):
    """Within a level of 255: the pipelines round down, and a batch of another size is summed in another order."""
    name, pipe, family = loaded
    size = SIZES.get(name, (16, 16))
    frames = 5 if family.video else None
    found = pixels_.sample(pipe, family, ["c", "ab"], size=size, frames=frames, steps=2, seeds=[8, 7])
    _, theirs = own_call(pipe, family, "ab", size, output_type="np")
    theirs = torch.from_numpy(np.moveaxis(theirs[0] * 255, -1, 0))
    assert found[1].shape == theirs.shape
    assert found.dtype == torch.uint8
    assert found[1].float().std() > 1  # there is something to compare
    assert (found[1].float() - theirs.float()).abs().max() <= 1
    assert (found[0].float() - theirs.float()).abs().max() > 1


class Echo:
    """A pipeline whose latents, and a VAE whose pixels, are what was given."""

    def __init__(self):
        self.vae, self.rounded = SimpleNamespace(dtype=torch.float32, config={}, decode=self.decode), []

    def __call__(self, **given):
        self.given, count = given, len(given["prompt"])
        return (torch.tensor([-2.0, -0.398, 0.0, 3.0]).view(1, 1, 2, 2).expand(count, 3, 2, 2),)

    def decode(self, latents, return_dict):
        self.rounded.append(torch.is_autocast_enabled("cpu"))
        return (latents,)


def test_images_are_rounded_and_have_the_noise_of_their_seeds():
    """Seeds are hashes of 64 bits, of which torch's generators take 63. What is beyond the ends is as at the ends."""
    pipe, images, clips = Echo(), FAMILIES["StableDiffusionPipeline"], FAMILIES["WanPipeline"]
    with torch.autocast("cpu", torch.bfloat16):  # in which the model is, but not the VAE
        found = pixels_.sample(pipe, images, ["a", "b", "c"], size=(2, 2), steps=4, seeds=[3, 2**62 + 3, 2**63 + 5])
    assert pipe.rounded == [False] * 3
    assert [one.initial_seed() for one in pipe.given["generator"]] == [3, 2**62 + 3, 5]
    assert "guidance_scale" not in pipe.given
    assert (found == torch.tensor([[0, 77], [128, 255]])).all()  # (1 - 0.398) 127.5 = 76.755
    pixels_.sample(pipe, clips, ["a"], seeds=[1], size=(2, 4), steps=4, guidance=2.5, frames=5)
    told = ("height", "width", "num_inference_steps", "guidance_scale", "num_frames")
    assert [pipe.given[name] for name in told] == [2, 4, 4, 2.5, 5]


def test_layers_that_get_adapters_are_those_of_the_scripts():
    """Of Diffusers: train_dreambooth_lora_sd3.py and _flux.py name the context's projections too."""
    own = {"to_q", "to_k", "to_v", "to_out.0"}
    context = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    for name, family in FAMILIES.items():
        both = name in ("StableDiffusion3Pipeline", "FluxPipeline")
        assert set(family.lora_targets) == (own | context if both else own), name


def test_sdxl_is_told_heights_before_widths():
    text = {"encoder_hidden_states": torch.zeros(2, 5, 12), "text_embeds": torch.zeros(2, 10)}
    told = families.conditioning(FAMILIES["StableDiffusionXLPipeline"], text, None, (16, 24))
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2


def test_models_that_were_made_for_another_height_than_width():
    pipe = SimpleNamespace(unet=SimpleNamespace(config={"sample_size": (64, 96)}), vae_scale_factor=8)
    assert families.native_size(pipe, FAMILIES["StableDiffusionPipeline"]) == (512, 768)


def test_vaes_with_means_and_a_factor():
    """As Diffusers' pipeline of SDXL decodes: latents * latents_std / scaling_factor + latents_mean."""
    config = dict(latents_mean=[0.5, -1.0], latents_std=[2.0, 4.0], scaling_factor=0.5)
    vae = SimpleNamespace(dtype=torch.float32, config=config, decode=lambda z, return_dict: (z,))
    latents = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert pixels_.decode_latents(vae, latents).flatten().tolist() == [1 * 2 / 0.5 + 0.5, 3 * 4 / 0.5 - 1]


def test_no_more_images_are_encoded_at_once_than_was_asked():
    """The VAE's memory is the largest of all."""
    seen = []

    def encode(pixels):
        seen.append(len(pixels))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

    vae, pixels = SimpleNamespace(dtype=torch.float32, config={}, encode=encode), torch.randn(5, 3, 2, 2)
    assert torch.equal(pixels_.encode_pixels(vae, pixels, chunk=2), pixels)
    assert seen == [2, 2, 1]


NORMALISED = {
    "sd15": lambda z: z * 0.18215,
    "sdxl": lambda z: z * 0.13,
    "sd3": lambda z: (z - 0.06) * 1.5,
    "flux": lambda z: (z - 0.11) * 0.36,
    "wan": lambda z: (
        (z - torch.tensor([0.1, -0.2, 0.3, 0.0])[None, :, None, None, None])
        / torch.tensor([1.5, 2.0, 0.5, 1.0])[None, :, None, None, None]
    ),
}


def test_latents_are_normalised_as_the_scripts_do(loaded):
    name, pipe, family = loaded
    pixels = torch.rand(3, 3, *((5,) if family.video else ()), *SIZES.get(name, (16, 16))) * 2 - 1
    with torch.no_grad():
        given = pipe.vae.encode(pixels).latent_dist
    mode = pixels_.encode_pixels(pipe.vae, pixels, chunk=2)
    torch.testing.assert_close(mode, NORMALISED[name](given.mean), rtol=1e-5, atol=1e-6)
    # Samples: of the distribution's mean and width, and each a function of its seed alone.
    few = 12 if family.video else 60
    many = pixels_.encode_pixels(pipe.vae, pixels[:1].expand(few, *pixels.shape[1:]), range(few))
    wide = NORMALISED[name](given.mean + given.std)[:1] - NORMALISED[name](given.mean)[:1]
    normal = (many - mode[:1]) / wide
    assert abs(normal.mean()) < 5 / normal.numel() ** 0.5
    assert abs(normal.square().mean() - 1) < 5 * (2 / normal.numel()) ** 0.5
    again = pixels_.encode_pixels(pipe.vae, pixels[[2, 0]], [9, 5])[1]
    torch.testing.assert_close(again, many[5], rtol=1e-4, atol=1e-5)


def test_the_scheduler_of_training(loaded):
    name, pipe, _ = loaded
    scheduler = loading.training_scheduler(pipe)
    if name in ("sd15", "sdxl"):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        expected = (1 - betas).cumprod(0).float()
        torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-4, atol=0)
        assert scheduler.config.prediction_type == "epsilon"
    else:
        t = torch.arange(1000, 0, -1) / 1000
        shift = 1.0 if name == "flux" else 3.0  # FLUX shifts while sampling only, as the size asks
        torch.testing.assert_close(scheduler.sigmas[:1000], shift * t / (1 + (shift - 1) * t))
    pipe.scheduler.set_timesteps(3, **({"mu": 1.0} if name == "flux" else {}))
    assert len(scheduler.timesteps) == 1000


def test_other_samplers_of_the_same_schedules():
    heun = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler = loading.training_scheduler(SimpleNamespace(scheduler=heun))
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(scheduler.sigmas, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)
    solver = DPMSolverMultistepScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = loading.training_scheduler(SimpleNamespace(scheduler=solver))
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    # A sampler that does not sample by sigmas of flow matching cannot be of a model that was trained so.
    scheduler = loading.training_scheduler(SimpleNamespace(scheduler=DDIMScheduler(prediction_type="flow_prediction")))
    with pytest.raises(ValueError, match="DDPMScheduler that predicts 'flow_prediction'; expected 'epsilon', "):
        noise_pairs(scheduler, torch.zeros(2, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="scheduler is a EDMEulerScheduler; expected one with alphas_cumprod"):
        loading.training_scheduler(SimpleNamespace(scheduler=EDMEulerScheduler()))


def test_geometry(loaded):
    name, pipe, family = loaded
    unit = {"sd15": 2, "sdxl": 2, "sd3": 4, "flux": 4, "wan": 16}[name]  # two levels of the VAE; Wan's has four
    frames = 5 if family.video else None
    families.check_geometry(pipe, family, (unit, 3 * unit), frames)
    with pytest.raises(ValueError, match=f"expected multiples of {unit},"):
        families.check_geometry(pipe, family, (unit, 3 * unit - 1), frames)
    with pytest.raises(ValueError, match="loader has frames=6"):
        families.check_geometry(pipe, family, (unit, unit), 6)
    if family.video:
        with pytest.raises(ValueError, match=r"frames=None; .* such as loader: \{frames: 81, fps: 16\}"):
            families.check_geometry(pipe, family, (unit, unit), None)
    assert families.native_size(pipe, family) == {"wan": (480, 832), "flux": (256, 256)}.get(name, (16, 16))


WIDER = {
    "sd15": ["to_q", "to_out.0", "proj_in", "net.2", "conv1", "time_emb_proj"],
    "sdxl": ["to_q", "to_out.0", "proj_in", "net.2", "conv1", "time_emb_proj"],
    "sd3": ["to_q", "to_add_out", "net.2", "proj", "linear"],
    "flux": ["to_q", "to_out.0", "net.2", "proj_mlp", "proj_out", "linear"],
    "wan": ["to_q", "to_out.0", "net.0.proj", "ffn.net.2"],
}


@pytest.mark.parametrize("wider", [False, True], ids=["default", "wider"])
def test_lora_is_saved_so_that_diffusers_loads_all_of_it(loaded, tmp_path, wider):
    """As many tensors as were trained, and the outputs of the model that was; with the scale in the weights."""
    name, pipe, family = loaded
    live = copy.deepcopy(getattr(pipe, family.model))
    targets = WIDER[name] if wider else list(family.lora_targets)
    live.add_adapter(LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets))
    files.save_lora(pipe, family, live, live.state_dict(), tmp_path, scale=1.5)
    _, latents, conditioning = tiny.FAMILIES[name]()
    conditioning = both_arms(conditioning, tiny.PAIRS)
    with torch.no_grad():
        plain, trained = (
            predict(model, latents, torch.full((4,), 300), conditioning)
            for model in (getattr(pipe, family.model), live)
        )
        pipe.load_lora_weights(tmp_path)
        again = predict(getattr(pipe, family.model), latents, torch.full((4,), 300), conditioning)
    counts = [
        sum("lora_" in name for name, _ in model.named_parameters()) for model in (live, getattr(pipe, family.model))
    ]
    pipe.unload_lora_weights()
    assert counts[0] == counts[1] > 0
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-5)
    assert (trained - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan"])
def test_parts_are_frozen_and_of_their_dtypes(tmp_path, name):
    """The VAEs as in Diffusers' scripts: of these FLUX's alone in half precision."""
    folder = pipelines.save(name, tmp_path)
    pipe = loading.load_pipeline(str(folder), policy=torch.float32, frozen=torch.bfloat16)
    model = getattr(pipe, FAMILIES[type(pipe).__name__].model)
    assert model.dtype == torch.float32
    assert pipe.vae.dtype == (torch.bfloat16 if name == "flux" else torch.float32)
    texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    assert {part.dtype for part in texts} == {torch.bfloat16}
    assert not any(p.requires_grad for part in (model, pipe.vae, pipe.text_encoder) for p in part.parameters())
    if name == "flux":
        return
    if name == "wan":  # of which Diffusers keeps some layers as they are, also in half precision
        pipe = loading.load_pipeline(str(folder), policy=torch.bfloat16, frozen=torch.bfloat16)
        assert {part.dtype for part in pipe.transformer.parameters()} == {torch.bfloat16, torch.float32}
    exact = DiffusionPipeline.from_pretrained(folder).vae.state_dict()  # not rounded on the way
    assert all(torch.equal(value, exact[key]) for key, value in pipe.vae.state_dict().items())


def test_the_rest_of_a_pipeline_from_the_hub(tmp_path, monkeypatch):
    """Of what was downloaded; a safety checker was not, and is none then."""
    hub = pipelines.save("sd15", tmp_path)
    index = json.loads((hub / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (hub / "model_index.json").write_text(json.dumps(index))
    pipe = loading.load_pipeline(str(hub), policy=torch.float32, frozen=torch.bfloat16)
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: asked.append((name, options)) or hub)
    out = tmp_path / "out"
    pipe.unet.save_pretrained(out / "unet")
    files.save_rest(pipe, FAMILIES["StableDiffusionPipeline"], "someone/model", out)
    assert asked == [("someone/model", {"variant": None, "revision": None, "safety_checker": None})]
    again = DiffusionPipeline.from_pretrained(out)
    assert again.safety_checker is None
    before = DiffusionPipeline.from_pretrained(hub, safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):  # not in the bfloat16 that they were trained beside
        old, new = (getattr(one, name).state_dict() for one in (before, again))
        assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert (out / "vae" / "config.json").read_bytes() == (hub / "vae" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": ["pipeline", "KolorsPipeline"]}, "model is a .*KolorsPipeline.*; expected one of StableDiff"),
        (
            {"_class_name": "KolorsPipeline"},
            "model is a KolorsPipeline; expected one of StableDiffusionPipeline, .*forward=",
        ),
        ({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "X"]}, "have a transformer each"),
        ({}, "which is no pipeline with a model_index.json"),
        (None, "which is no pipeline with a model_index.json"),
    ],
)
def test_other_models_are_refused(tmp_path, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        families.family_of(str(tmp_path))


def test_a_checkpoint_in_one_file_is_told_from_a_pipeline(tmp_path):
    """As most of those that are shared for SDXL are."""
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    with pytest.raises(ValueError, match=r"a file; expected a folder .*from_single_file\(FILE\)\.save_pretrained"):
        families.family_of(str(tmp_path / "model.safetensors"))


def test_a_folder_of_lora_weights_is_told_from_a_pipeline(tmp_path):
    (tmp_path / families.LORA_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds LoRA weights alone; expected the pipeline .*lora_weights.*--result"):
        families.family_of(str(tmp_path))


def test_wan_with_a_time_for_each_token(tmp_path):
    """Wan2.2-TI2V-5B: its pipeline tells the model the same time for all tokens, and its VAE packs pixels, too."""
    made = pipelines.wan(tmp_path)
    vae = AutoencoderKLWan.from_config(
        made.vae.config,
        **dict(in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16),
    )
    parts = {name: part for name, part in made.components.items() if name not in ("vae", "transformer_2")}
    pipe, family = WanPipeline(**parts, vae=vae, expand_timesteps=True), FAMILIES["WanPipeline"]
    pipe.text_encoder.eval()
    pipe.set_progress_bar_config(disable=True)
    assert len(check_first_call(pipe, family, (64, 32))) == 4  # a time for each token: 2 frames of 4 x 2 latents
    assert families.native_size(pipe, family) == (704, 1280)
    families.check_geometry(pipe, family, (32, 64), 5)
    with pytest.raises(ValueError, match="expected multiples of 32,"):
        families.check_geometry(pipe, family, (48, 64), 5)


def test_a_folder_without_a_result_is_refused(loaded, tmp_path):
    _, pipe, family = loaded
    with pytest.raises(ValueError, match=f"neither {family.model}/ nor pytorch_lora_weights.safetensors"):
        files.load_result(pipe, tmp_path)


def test_weights_of_a_result_take_the_place_of_others(here, tmp_path, monkeypatch):
    """Which are gone before they are read: of the largest models a machine may hold one set alone."""
    pipe = loading.load_pipeline(str(here / "pipeline"), policy=torch.bfloat16, frozen=torch.bfloat16)
    trained = copy.deepcopy(pipe.unet).float()
    with torch.no_grad():
        trained.conv_in.weight += 1
    trained.save_pretrained(tmp_path / "unet")
    old, load, seen = weakref.ref(pipe.unet.conv_in.weight), UNet2DConditionModel.from_pretrained.__func__, []

    def watched(cls, *arguments, **options):
        seen.append(old() is None)
        return load(cls, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(watched))
    files.load_result(pipe, tmp_path)
    assert seen == [True]
    assert pipe.unet.dtype == torch.bfloat16
    assert torch.equal(pipe.unet.conv_in.weight, trained.conv_in.weight.bfloat16())
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
