"""FSDP, DeepSpeed and torch.compile: what cannot be had with them, and what they must be told.

All of it serves one end: that the reference is computed, and rounded, as the policy is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .config import Settings

__all__ = ["check_sharding", "set_sharding", "sharded_and_compiled", "sums_in_float32"]


def check_sharding(settings: Settings, accelerator: Any) -> None:
    """Raises ValueError for what cannot be had where FSDP or DeepSpeed shard the model.

    Of all weights, a reference that could not be computed as the policy is: they compute in half precision alone, and
    the others by autocast: the difference of their rounding would be a preference. FSDP2 may shard the reference as it
    does the policy.
    """
    from accelerate.utils import DistributedType

    kind, fsdp2 = accelerator.distributed_type, getattr(accelerator, "is_fsdp2", False)
    if fsdp2 and settings.optimizer != "adamw":  # bitsandbytes and Transformers mix DTensors with others
        raise ValueError(
            f"optimizer is {settings.optimizer!r}, which takes no weights that FSDP2 has sharded; expected 'adamw'"
        )
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED) or (fsdp2 and settings.reference_errors is None):
        return
    fsdp1 = kind == DistributedType.FSDP and not fsdp2
    other = f"under {kind.name}; expected FSDP's version 2, or"
    if settings.ema and not fsdp2:  # DeepSpeed's weights may be in half precision, whose averages would not move
        raise ValueError(f"ema is {settings.ema}, {other} 0")
    if settings.validation_prompts and fsdp1:
        raise ValueError(f"validation_prompts are given, {other} none")
    if accelerator.mixed_precision == "no":
        return
    if settings.lora_rank and fsdp1:
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}, in which adapters are of another dtype than the "
            "rest, and FSDP's version 1 takes one alone; expected its version 2, or mixed_precision 'no'"
        )
    if settings.lora_rank or settings.loss.get("reference_free"):
        return
    if settings.reference_errors is not None:
        raise ValueError(
            f"reference_errors is {settings.reference_errors!r}; of all weights, with mixed_precision "
            f"{accelerator.mixed_precision!r} and under {kind.name}, they are rounded otherwise than the policy: "
            "expected none, mixed_precision 'no', or lora_rank above 0"
        )
    raise ValueError(
        f"mixed_precision is {accelerator.mixed_precision!r}, and all weights are trained under {kind.name}, whose "
        "rounding the reference would not have; expected FSDP's version 2, or mixed_precision 'no'"
    )


def set_sharding(settings: Settings, accelerator: Any) -> None:
    """What FSDP and DeepSpeed do not learn from `accelerate launch`."""
    fsdp, deepspeed = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        fsdp.mixed_precision_policy = sums_in_float32(fsdp.mixed_precision_policy)
    if deepspeed is not None:  # it accumulates and clips on its own
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else Transformers shards the text encoders too, and waits for all processes
        deepspeed.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": settings.max_grad_norm,
        }


def sums_in_float32(policy: Any) -> Any:
    """FSDP's policy of half precision, as exact as DDP and autocast are where that costs next to nothing.

    Accelerate's sums gradients over forwards and processes in half precision, in which 256 and 1 are 256, and rounds
    the timesteps to it, by up to 2 of 1000.
    """
    casts = {name: False for name in ("cast_forward_inputs", "cast_root_forward_inputs") if hasattr(policy, name)}
    return dataclasses.replace(policy, reduce_dtype=torch.float32, **casts)


def sharded_and_compiled(model: torch.nn.Module, accelerator: Any) -> Any:
    """A model that is not trained, as Accelerate prepares the one that is: compiled, and sharded by FSDP2.

    Accelerate itself takes no second model under FSDP2, and would write it into checkpoints.
    """
    from accelerate.utils import DynamoBackend

    compiling, fsdp2 = accelerator.state.dynamo_plugin, getattr(accelerator, "is_fsdp2", False)
    if compiling.backend != DynamoBackend.NO:
        if getattr(compiling, "use_regional_compilation", False):
            from accelerate.utils import other

            within_fsdp2 = getattr(other, "compile_regions_fsdp2", other.compile_regions)
            model = (within_fsdp2 if fsdp2 else other.compile_regions)(model, **compiling.to_kwargs())
        else:
            model = torch.compile(model, **compiling.to_kwargs())  # type: ignore[assignment]
    if fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = fsdp2_prepare_model(accelerator, model)
    return model
