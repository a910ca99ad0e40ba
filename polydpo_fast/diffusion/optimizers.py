"""The optimizer of a training, its learning rate and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import Settings

__all__ = ["check_optimizer", "learning_rate", "new_optimizer", "new_schedule"]


def learning_rate(settings: Settings, processes: int) -> float:
    """Where none is given, what was published: Diffusion-DPO's 1e-8 per pair of a step; for LoRA Diffusers' 1e-5."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 1e-5 if settings.lora_rank else 1e-8 * processes * settings.batch_size * settings.accumulation


def check_optimizer(settings: Settings) -> None:
    """Raises ImportError where its package is missing."""
    if settings.optimizer.endswith("8bit"):
        try:
            import bitsandbytes.optim  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"optimizer is {settings.optimizer!r}, which needs bitsandbytes: pip install bitsandbytes"
            ) from error


def new_optimizer(parameters: list[Tensor], settings: Settings, rate: float) -> torch.optim.Optimizer:
    if settings.optimizer == "adafactor":
        from transformers import Adafactor

        fixed: torch.optim.Optimizer = Adafactor(
            parameters,
            lr=rate,
            weight_decay=settings.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
        return fixed
    kind: Any = torch.optim.AdamW
    if settings.optimizer.endswith("8bit"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        kind = PagedAdamW8bit if settings.optimizer.startswith("paged") else AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        parameters,
        lr=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def new_schedule(optimizer: Any, settings: Settings) -> Any:
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )
