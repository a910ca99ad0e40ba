"""The reference policy: a frozen copy, or the policy itself for a moment without its adapters or with its EMA."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .extras import need

__all__ = ["adapters_off", "base_model", "ema_weights", "frozen_copy", "switched_off", "unwrapped"]

M = TypeVar("M", bound=torch.nn.Module)


def unwrapped(model: Any) -> Any:
    """The model within DistributedDataParallel, FSDP and torch.compile."""
    while True:
        if isinstance(model, torch.nn.Module) and isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel) or type(model).__name__ in (
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
        ):
            model = model.module
        else:
            return model


def base_model(model: Any) -> Any:
    """The model within all wrappers, PEFT's too; its adapters are in it."""
    inner = unwrapped(model)
    is_peft = type(inner).__name__.startswith("Peft") and hasattr(inner, "get_base_model")
    return inner.get_base_model() if is_peft else inner


def frozen_copy(model: M) -> M:
    """The model as it is now, apart, in evaluation mode and without gradients.

    Raises ValueError where FSDP has sharded it: no process has all of it then.
    """
    if any(_is_fsdp1(module) or _is_fsdp2(module) for module in model.modules()):
        raise ValueError("model is sharded by FSDP; expected the copy to be made before, and to be sharded itself")
    result = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
    return result  # type: ignore[no-any-return]  # of what the wrappers hold nothing is known


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model without its PEFT adapters (LoRA and the like): the reference of a policy that trains only those.

    They are as before afterwards, also those that were off already. Raises ValueError where the model has none, and
    where something else of it requires gradients: the reference would be trained with it.
    """
    inner = unwrapped(model)
    layers, trained = _adapted(inner)
    if trained is not None:
        name = next(name for name, one in inner.named_parameters() if one is trained)
        raise ValueError(
            f"model's {name} requires gradients and is of no adapter, so that the reference would be trained too; "
            "expected adapters alone to be trained (LoraConfig's bias='none'), or a frozen_copy"
        )
    with _off(layers):
        yield


@contextmanager
def switched_off(model: torch.nn.Module) -> Iterator[None]:
    """As `adapters_off`, whatever else of the model is trained."""
    layers, _ = _adapted(unwrapped(model))
    with _off(layers):
        yield


def _adapted(inner: torch.nn.Module) -> tuple[list[Any], torch.Tensor | None]:
    """The layers that have adapters, or copies that are trained in their place; and, if there is one, a parameter that
    is trained and is of neither.

    In each step: gone through once, and not through what the adapters consist of.
    """
    need("peft", what="adapters_off")
    from peft import tuners, utils

    # What it trains beside adapters (modules_to_save, tokens): copies, with the original at hand.
    copies = getattr(utils.other, "AuxiliaryTrainingWrapper", utils.ModulesToSaveWrapper)
    bases = tuners.tuners_utils.BaseTunerLayer, copies
    layers: list[Any] = []
    trained, left, kinds = None, [inner], dict[type, bool]()  # PEFT's class is an abstract one, slow to ask
    while left:
        module = left.pop()
        kind, parts = type(module), module._modules
        if kind not in kinds:
            kinds[kind] = issubclass(kind, bases)
        if kinds[kind]:
            layers.append(module)
            left.extend(parts[name] for name in ("base_layer", "original_module") if name in parts)  # type: ignore[misc]
            continue
        for parameter in module._parameters.values():
            if trained is None and parameter is not None and parameter.requires_grad:
                trained = parameter
        left.extend(part for part in parts.values() if part is not None)
    if not layers:
        raise ValueError(f"model is a {type(inner).__name__} without PEFT adapters; expected one that has some")
    return layers, trained


@contextmanager
def _off(layers: list[Any]) -> Iterator[None]:
    active = [layer for layer in layers if not layer.disable_adapters]
    # PEFT's own switch also stops the gradients of what it turns off, and FSDP2 takes for frozen what has none in the
    # first forward that it sees: the adapters would never be trained.
    try:
        for layer in active:
            layer._disable_adapters = True
        yield
    finally:
        for layer in active:
            layer._disable_adapters = False


@contextmanager
def ema_weights(model: torch.nn.Module, ema: Any) -> Iterator[None]:
    """The model with the averaged weights of a `diffusers.training_utils.EMAModel`; afterwards with its own again.

    The weights are overwritten in place: not between a forward and its backward. Meanwhile the averages hold those of
    the model, so that no third set is needed, unless they are of another dtype. They may be of the parameters that are
    trained alone, such as adapters. Where FSDP2 shards the model, they are to be made of its sharded parameters. Raises
    ValueError for a model within FSDP1, which keeps copies.
    """
    if any(map(_is_fsdp1, model.modules())):
        raise ValueError("model is within FullyShardedDataParallel; expected fully_shard (FSDP2), or a frozen_copy")
    parameters, averages = list(unwrapped(model).parameters()), list(ema.shadow_params)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if len(averages) not in (len(parameters), len(trained)):
        raise ValueError(
            f"ema has {len(averages)} averages; the model has {len(parameters)} parameters, of which {len(trained)} "
            "are trained: expected averages of all of either"
        )
    parameters = parameters if len(averages) == len(parameters) else trained
    kept: list[torch.Tensor | None] = []
    try:
        for parameter, average in zip(parameters, averages, strict=True):
            kept.append(_exchange(parameter, average))
        _forget_weights(model)
        yield
    finally:
        for parameter, average, own in zip(parameters, averages, kept, strict=False):
            if own is None:
                _exchange(parameter, average)
            else:
                parameter.data.copy_(own)
        _forget_weights(model)


@torch.no_grad()
def _exchange(parameter: torch.Tensor, average: torch.Tensor) -> torch.Tensor | None:
    """Gives each the other's values; where they are of other dtypes only the parameter, and returns its own."""
    own = parameter.detach().clone()
    parameter.data.copy_(average)
    if average.dtype != parameter.dtype:
        return own
    average.copy_(own)
    return None


def _forget_weights(model: torch.nn.Module) -> None:
    """What FSDP2 has gathered of the weights that were there before, or autocast converted, is not to be used again."""
    torch.clear_autocast_cache()
    for module in filter(_is_fsdp2, model.modules()):
        module.reshard()  # type: ignore[operator]


def _is_fsdp1(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"


def _is_fsdp2(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
