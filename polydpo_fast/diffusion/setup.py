"""What a training and the making of its stores begin with: processes, pipeline, size, objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .config import Settings
from .extras import need
from .families import Family, check_geometry, family_of, load_pipeline, native_size, training_scheduler
from .objective import PairObjective

__all__ = ["Setup", "objective_of", "set_up"]


class Setup(NamedTuple):
    """size: height and width of the pixels. precision: of what is computed in half precision; float32 for nothing."""

    accelerator: Any
    pipe: Any
    family: Family
    size: tuple[int, int]
    precision: torch.dtype


def set_up(settings: Settings) -> Setup:
    """The pipeline is on the CPU yet. Raises ValueError for settings that do not fit the model, ImportError."""
    accelerator = _accelerator(settings)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    family = family_of(settings.model)
    with accelerator.main_process_first():  # it may download
        policy = half if settings.lora_rank else torch.float32
        pipe = load_pipeline(settings.model, policy=policy, frozen=half, scheduler=settings.scheduler)
    size = (settings.size, settings.size) if isinstance(settings.size, int) else settings.size
    height, width = size or native_size(pipe, family)
    check_geometry(pipe, family, (height, width), settings.loader.get("frames"))
    return Setup(accelerator, pipe, family, (height, width), half)


def objective_of(settings: Settings, pipe: Any, **options: Any) -> PairObjective:
    return PairObjective(
        training_scheduler(pipe),
        alpha=settings.alpha,
        beta=settings.beta,
        objective=settings.objective,
        reduction="none",
        **options,
        **settings.loss,
    )


def _accelerator(settings: Settings) -> Any:
    need("accelerate", "transformers", "diffusers", "safetensors", *(["peft"] if settings.lora_rank else []))
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
    from diffusers.utils import logging

    for name in settings.trackers:
        if name not in map(str, get_available_trackers()):  # members of an Enum, which equal no text
            raise ImportError(
                f"trackers has {name!r}, which is none of Accelerate's or is not installed: pip install {name}"
            )
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.accumulation,
        mixed_precision=settings.mixed_precision,
        log_with=settings.trackers or None,
        project_config=ProjectConfiguration(project_dir=settings.output, logging_dir=f"{settings.output}/logs"),
    )
    if accelerator.gradient_accumulation_steps != settings.accumulation:
        raise ValueError(
            f"accumulation is {settings.accumulation}, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment "
            f"makes it {accelerator.gradient_accumulation_steps}; expected the same, or the variable not to be set"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which Accelerate has on GPUs only; expected 'bf16' or 'no'")
    if accelerator.distributed_type == DistributedType.FSDP:
        if settings.validation_prompts:
            raise ValueError("validation_prompts are given; under FSDP no process has the model: expected none")
        if settings.ema:
            raise ValueError(f"ema is {settings.ema}; under FSDP no process has all weights to average: expected 0")
    set_seed(settings.seed % 2**32)  # NumPy takes no more
    logging.set_verbosity_error()  # else it tells of every prompt that is longer than 77 tokens
    return accelerator
