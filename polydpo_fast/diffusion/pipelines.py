"""Diffusers' pipelines: loading one to be trained, its schedulers, and the files of a result."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES, LORA_FILE, Family, family_of
from .noising import is_flow_matching

__all__ = [
    "LORA_FILE",
    "change_scheduler",
    "load_lora",
    "load_pipeline",
    "load_result",
    "load_scheduler",
    "save_lora",
    "save_rest",
    "save_scheduler",
    "training_scheduler",
]


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
    options = {"variant": variant, "revision": revision, **dict.fromkeys(family.left_out)}
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


def load_scheduler(model: str, revision: str | None = None) -> Any:
    """That of a pipeline in a folder or on the hub, without the rest of it."""
    from diffusers import DiffusionPipeline

    kind = _scheduler_class(DiffusionPipeline.load_config(model, revision=revision)["scheduler"][1])
    return kind.from_pretrained(model, subfolder="scheduler", revision=revision)


def training_scheduler(pipe: Any) -> Any:
    """The scheduler of training that belongs to the pipeline's sampler, apart from it.

    Of a sampler that shifts by the resolution (use_dynamic_shifting: FLUX's) it has the sigmas without a shift, as
    Diffusers' training scripts do.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    config = pipe.scheduler.config
    if is_flow_matching(pipe.scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas"):  # Wan's sampler is UniPC
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift", 1.0)
        )
    return DDPMScheduler.from_config(config)


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
        options = {"variant": variant, "revision": revision, **dict.fromkeys(family.left_out)}
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
