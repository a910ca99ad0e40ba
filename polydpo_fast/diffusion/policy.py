"""The policy of a training, the reference that it is compared with, and the averages of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Settings
from .families import Family
from .reference import adapters_off, frozen_copy
from .result import load_lora
from .sharding import sharded_and_compiled

__all__ = ["averages_of", "make_trainable", "reference_of", "trained"]


def reference_of(model: Any, settings: Settings, accelerator: Any) -> Any:
    """Of the policy's own dtype, and computed as it is: other rounding would be a preference before the first step."""
    if settings.loss.get("reference_free"):
        return None
    if settings.lora_rank:
        return adapters_off
    return sharded_and_compiled(frozen_copy(model), accelerator)


def make_trainable(model: Any, family: Family, settings: Settings, has_checkpoint: bool) -> None:
    """All of the model, or adapters. has_checkpoint: which has the adapters, so that they need no beginning."""
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # As TRL does: the reference has none, and its noise would be taken for a preference.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if settings.lora_rank == 0:
        model.requires_grad_(True)
        return
    from peft import LoraConfig

    alpha = settings.lora_alpha or settings.lora_rank
    targets = settings.lora_targets or list(family.lora_targets)
    for target in targets:  # PEFT takes it if one of them is there
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ValueError(
                f"lora_targets has {target!r}, and no layer of the {type(model).__name__} has a name that ends so; "
                f"expected names such as {', '.join(family.lora_targets)}"
            )
    config = LoraConfig(r=settings.lora_rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    model.add_adapter(config)
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    if settings.lora_weights is not None and not has_checkpoint:  # after that: they are in float32
        load_lora(family, model, Path(settings.lora_weights), scale=alpha / settings.lora_rank)


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def averages_of(model: Any, settings: Settings) -> Any:
    """Where the weights are; under FSDP2 each process has the averages of its part."""
    if not settings.ema:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(trained(model), decay=settings.ema, foreach=True)
