"""Diffusers' pipelines: loading one to be trained, and its schedulers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .families import family_of
from .noising import is_flow_matching

__all__ = ["change_scheduler", "load_pipeline", "load_scheduler", "scheduler_class", "training_scheduler"]


def load_pipeline(
    model: str,
    *,
    policy: torch.dtype | None,
    frozen: torch.dtype,
    scheduler: Mapping[str, Any] | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """The pipeline, its parts frozen and in evaluation mode; no image is hidden by a safety checker.

    policy: dtype of the part that is trained; None for that part without its weights, on the meta device.
    frozen: of the text encoders and the VAE, if that does not need float32.
    scheduler: values in place of those of the pipeline's, see `change_scheduler`.
    variant, revision: as Diffusers has them.

    Raises ValueError where the weights are there in another variant alone.
    """
    import diffusers

    family = family_of(model, revision)
    index = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    vae = torch.float32 if family.vae_float32 else frozen
    options = {"variant": variant, "revision": revision, **dict.fromkeys(family.left_out)}
    dtypes = {family.model: policy or frozen, "vae": vae, "default": frozen}
    if policy is None:
        kind = getattr(diffusers, index[family.model][1])
        with torch.device("meta"):
            options[family.model] = kind.from_config(kind.load_config(model, subfolder=family.model, revision=revision))
    try:  # of its own class: DiffusionPipeline itself would load a part that WanPipeline is given
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(model, dtype=dtypes, **options)
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
            wanted = dtypes.get(name, frozen)
            if part.dtype != wanted:  # else some layers may be in float32 on purpose
                part.to(wanted)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change_scheduler(pipe: Any, values: Mapping[str, Any]) -> None:
    """Other values of the pipeline's scheduler, by the names of scheduler_config.json; "_class_name" another class.

    Raises ValueError for a class that is none of Diffusers' schedulers, and for names that it does not know.
    """
    values = dict(values)
    kind = scheduler_class(values.pop("_class_name", type(pipe.scheduler).__name__))
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

    kind = scheduler_class(DiffusionPipeline.load_config(model, revision=revision)["scheduler"][1])
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


def _variants_in(folder: Path) -> list[str]:
    """Of the weights in the folder of a model, where there are none without a variant."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = [re.fullmatch(r"[^.]+?(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.safetensors", name) for name in names]
    variants = {one[1] for one in found if one}
    return sorted(variants) if None not in variants else []


def scheduler_class(name: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"scheduler has _class_name {name!r}; expected one of Diffusers' schedulers")
    return kind
