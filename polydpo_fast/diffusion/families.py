"""The pipelines that can be trained, and what differs between them: prompts, latents, schedulers, LoRA's layers."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import PairBatch
from .forward import time_ids
from .moving import moved
from .noising import draw_noise, is_flow_matching

__all__ = [
    "FAMILIES",
    "LORA_FILE",
    "Family",
    "change_scheduler",
    "check_geometry",
    "conditioning",
    "decode_latents",
    "encode_pixels",
    "encode_prompts",
    "family_of",
    "load_lora",
    "load_pipeline",
    "load_result",
    "native_size",
    "sample",
    "save_lora",
    "save_rest",
    "save_scheduler",
    "training_scheduler",
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
    """

    model: str
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    patch: int = 1
    video: bool = False
    vae_float32: bool = False
    told_sizes: bool = False
    lora_targets: tuple[str, ...] = _ATTENTION


def family_of(model: str, revision: str | None = None) -> Family:
    """Of the pipeline in a folder or on the hub. Raises ValueError where there is none, or one of another class."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(model, revision=revision)
        name = config["_class_name"]
    except (OSError, KeyError, ValueError) as error:
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


def load_pipeline(
    model: str,
    *,
    policy: torch.dtype,
    frozen: torch.dtype,
    scheduler: Mapping[str, Any] | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """The pipeline, its parts frozen and in evaluation mode; no image is hidden by a safety checker.

    policy: dtype of the part that is trained. frozen: of the text encoders and the VAE, if that does not need float32.
    scheduler: values in place of those of the pipeline's, see `change_scheduler`.
    variant, revision: as Diffusers has them.

    Raises ValueError where the weights are there in another variant alone.
    """
    from diffusers import DiffusionPipeline

    family = family_of(model, revision)
    vae = torch.float32 if family.vae_float32 else frozen
    options = {"variant": variant, "revision": revision, **_without(family)}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            model, dtype={family.model: policy, "vae": vae, "default": frozen}, **options
        )
    except (OSError, ValueError) as error:
        variants = _variants_in(Path(model) / family.model)
        if variants and variant not in variants:
            raise ValueError(
                f"model is {model!r}, whose weights are of variant {', '.join(map(repr, variants))}, and variant is "
                f"{variant!r}; expected that of the files"
            ) from error
        raise
    if scheduler:
        change_scheduler(pipe, scheduler)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
            wanted = {family.model: policy, "vae": vae}.get(name, frozen)
            if part.dtype != wanted:  # else some layers may be in float32 on purpose
                part.to(wanted)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change_scheduler(pipe: Any, values: Mapping[str, Any]) -> None:
    """Other values of the pipeline's scheduler, by the names of scheduler_config.json; "_class_name" another class.

    Raises ValueError for a class that is none of Diffusers' schedulers, and for names that it does not know.
    """
    values = dict(values)
    kind = _scheduler_class(values.pop("_class_name", type(pipe.scheduler).__name__))
    known = set(inspect.signature(kind).parameters)
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(
            f"scheduler has {', '.join(unknown)}; a {kind.__name__} knows {', '.join(sorted(known))}. Another class is "
            "_class_name"
        )
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **values)
    if "shift" in values and pipe.scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"scheduler has shift={values['shift']}, which does nothing where use_dynamic_shifting is true, as FLUX's "
            "is; expected use_dynamic_shifting: false with it, for training and pictures"
        )


def training_scheduler(pipe: Any) -> Any:
    """The scheduler of training that belongs to the pipeline's sampler, apart from it.

    Of a sampler that shifts by the resolution (use_dynamic_shifting: FLUX's) it has the sigmas without a shift, as
    Diffusers' training scripts do.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    config = pipe.scheduler.config
    if is_flow_matching(pipe.scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if config.get("prediction_type") == "flow_prediction":  # Wan's sampler is UniPC
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift", 1.0)
        )
    return DDPMScheduler.from_config(config)


def native_size(pipe: Any, family: Family) -> tuple[int, int]:
    """Height and width of the pixels that the model was made for."""
    if family.video:
        return 480, 832
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
            raise ValueError(f"loader has frames={frames}; expected a multiple of {stride}, and one more, for the VAE")


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


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, seeds: Sequence[int] | None = None, *, chunk: int = 8) -> Tensor:
    """Normalised latents, float32: the mode of the VAE's distribution, or, with a seed per row, a sample of it."""
    rows = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels.split(chunk)]
    latents = torch.cat([row.mode().float() for row in rows])
    if seeds is not None:
        noise = draw_noise(seeds, latents.shape[1:], device=latents.device)
        latents += torch.cat([row.std.float() for row in rows]) * noise
    shift, scale = _normalisation(vae, latents)
    normalised: Tensor = (latents - shift) * scale
    return normalised


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of normalised latents, in [-1, 1] but for what overshoots."""
    shift, scale = _normalisation(vae, latents)
    pixels: Tensor = vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0]
    return pixels.float()


@torch.no_grad()
def sample(
    pipe: Any,
    family: Family,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    frames: int | None = None,
    steps: int,
    seeds: Sequence[int],
    guidance: float | None = None,
) -> Tensor:
    """Of each prompt an image, (N, 3, H, W) uint8, or a clip, (N, 3, T, H, W), by the VAE's own dtype. On the CPU.

    seeds: one for each, of its noise alone, so that other images in the batch change no more of it than rounding.
    """
    height, width = size
    options: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    if family.video:
        options["num_frames"] = frames
    latents = pipe(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed % 2**63) for seed in seeds],
        output_type="latent",
        return_dict=False,
        **options,
    )[0]
    if latents.dim() == 3:  # FLUX's tokens
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    with torch.autocast(latents.device.type, enabled=False):  # one by one: the VAE's memory is the largest of all
        pixels = torch.cat([decode_latents(pipe.vae, one) for one in latents.split(1)])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_lora(
    pipe: Any, family: Family, model: Any, state: dict[str, Tensor], folder: Path, *, scale: float = 1.0
) -> None:
    """The adapters among a model's state, as `pipe.load_lora_weights(folder)` takes them.

    scale: lora_alpha / rank. It goes into the weights, because what reads them takes it to be 1.
    """
    from peft.utils import get_peft_model_state_dict

    # PEFT's own names, as Diffusers' scripts of SD3 and FLUX write them. Its older names exist for the attention's
    # projections alone, and of a file with both kinds it loads one.
    layers = get_peft_model_state_dict(model, state_dict=state)
    layers = {name: value * scale if ".lora_B." in name else value for name, value in layers.items()}
    pipe.save_lora_weights(folder, **{f"{family.model}_lora_layers": layers})


def load_lora(family: Family, model: Any, folder: Path, *, scale: float = 1.0) -> None:
    """Gives the model's adapters the values that `save_lora` left in a folder.

    Raises ValueError where they are others, of another rank or other layers.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / LORA_FILE
    if not file.is_file():
        raise ValueError(f"lora_weights is {str(folder)!r}; expected a folder with {LORA_FILE}")
    saved = {name.removeprefix(f"{family.model}."): value for name, value in load_file(file).items()}
    own = get_peft_model_state_dict(model)
    if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in own.items()}:
        raise ValueError(f"{file} has other adapters than this run; expected its lora_rank and lora_targets")
    saved = {name: value / scale if ".lora_B." in name else value for name, value in saved.items()}
    set_peft_model_state_dict(model, saved)


def save_rest(
    pipe: Any, family: Family, model: str, folder: Path, *, variant: str | None = None, revision: str | None = None
) -> None:
    """Makes the folder, which has the trained part, a pipeline that Diffusers loads, without a variant.

    model: the pipeline that was trained, whose other files are copied, so that nothing of them is rounded.
    """
    from diffusers import DiffusionPipeline

    if Path(model).is_dir():
        origin = Path(model)
    else:
        options = {"variant": variant, "revision": revision, **_without(family)}
        origin = Path(DiffusionPipeline.download(model, **options))
    index = dict(DiffusionPipeline.load_config(origin))
    for name, part in index.items():
        if name == family.model or name == "scheduler" or not name.isidentifier() or not isinstance(part, list):
            continue
        if (origin / name).is_dir():
            _copy(origin / name, folder / name, variant)
        elif part[0] is not None:  # a safety checker that is not there
            index[name] = [None, None]
    save_scheduler(pipe, folder)
    index["scheduler"] = ["diffusers", type(pipe.scheduler).__name__]
    (folder / DiffusionPipeline.config_name).write_text(json.dumps(index, indent=2) + "\n")


def save_scheduler(pipe: Any, folder: Path) -> None:
    pipe.scheduler.save_pretrained(folder / "scheduler")


def load_result(pipe: Any, folder: Path) -> None:
    """Puts what a training left in its folder into a pipeline: LoRA, or a whole model; and its scheduler.

    Raises ValueError where the folder has neither, or both, of which nobody knows which is the later one.
    """
    family = FAMILIES[type(pipe).__name__]
    if (folder / family.model).is_dir() and (folder / LORA_FILE).is_file():
        raise ValueError(f"{folder} has {family.model}/ and {LORA_FILE}, of two runs; expected the result of one")
    if (folder / "scheduler").is_dir():
        config, _ = pipe.scheduler.load_config(folder / "scheduler", return_unused_kwargs=True)
        pipe.scheduler = _scheduler_class(config.get("_class_name")).from_config(config)
    if (folder / family.model).is_dir():
        old = getattr(pipe, family.model)
        new = type(old).from_pretrained(folder / family.model)
        setattr(pipe, family.model, new.to(old.device, old.dtype).requires_grad_(False).eval())
    elif (folder / LORA_FILE).is_file():
        pipe.load_lora_weights(folder)
    else:
        raise ValueError(f"{folder} has neither {family.model}/ nor {LORA_FILE}; no result of train")


# ------------------------------------------------------------------------------------------------ families


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
    "StableDiffusionPipeline": Family("unet", _sd),
    "StableDiffusionXLPipeline": Family("unet", _sdxl, vae_float32=True, told_sizes=True),
    "StableDiffusion3Pipeline": Family("transformer", _sd3, patch=2, vae_float32=True, lora_targets=_JOINT_ATTENTION),
    "FluxPipeline": Family("transformer", _flux, patch=2, lora_targets=_JOINT_ATTENTION),
    "WanPipeline": Family("transformer", _wan, patch=2, video=True, vae_float32=True),
}


def _without(family: Family) -> dict[str, Any]:
    """Parts of the pipeline that nothing here needs."""
    return {"safety_checker": None} if family.encode is _sd else {}


def _variants_in(folder: Path) -> list[str]:
    """Of the weights in the folder of a model, where there are none without a variant."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = [re.fullmatch(r"[^.]+?(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.safetensors", name) for name in names]
    variants = {one[1] for one in found if one}
    return sorted(variants) if None not in variants else []


def _copy(origin: Path, folder: Path, variant: str | None) -> None:
    """The files of a part of a pipeline; those of the variant under names without it, in place of those without."""
    if variant is None or not any(origin.glob(f"*.{variant}[.-]*")):
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(origin.iterdir(), key=lambda one: f".{variant}" in one.name):  # those of the variant at last
        target = folder / file.name.replace(f".{variant}", "")
        if ".index." in file.name:
            target.write_text(file.read_text(encoding="utf-8").replace(f".{variant}", ""), encoding="utf-8")
        elif file.is_file():
            shutil.copyfile(file, target)


def _scheduler_class(name: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"scheduler has _class_name {name!r}; expected one of Diffusers' schedulers")
    return kind


def _normalisation(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """What is subtracted from a VAE's latents, and what they are multiplied by then."""
    config = vae.config

    def channels(values: Sequence[float]) -> Tensor:
        table = moved(torch.tensor(values, device="cpu"), latents.device)
        return table.view(-1, *[1] * (latents.dim() - 2))

    shift: Any = config.get("shift_factor") or 0.0
    scale: Any = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift, scale = channels(config["latents_mean"]), scale / channels(config["latents_std"])
    return shift, scale
