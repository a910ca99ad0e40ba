"""The arguments of the losses that say what is made of the errors: their checks, and their canonical form."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..argument_checks import check_dense, check_device, check_floating, check_number, show
from ..objectives import MAX_ALPHAS, OBJECTIVES
from ..values import check_choice

__all__ = ["Head", "check_head"]

_REDUCTIONS = ("mean", "sum", "none")
_PER_PAIR = ", or a torch.Tensor of one per pair"
_SEVERAL = f", a list of up to {MAX_ALPHAS} numbers{_PER_PAIR}"


class Head(NamedTuple):
    """What the objective needs. Tensors are (B,); those of beta and alpha replace their numbers in `parameters`."""

    beta: Tensor | None
    alpha: Tensor | None
    weight: Tensor | None
    parameters: list[float]  # beta, four alphas, keep, flip, margin, sft_weight


def check_head(
    beta: float | Tensor,
    alpha: float | Tensor | Sequence[float],
    objective: str,
    label_smoothing: float,
    margin: float,
    sft_weight: float,
    pair_weight: Tensor | None,
    reduction: str,
    *,
    pairs: int,
    device: torch.device,
) -> Head:
    """The other arguments of `loss`, checked likewise."""
    check_choice("objective", objective, tuple(OBJECTIVES))
    check_choice("reduction", reduction, _REDUCTIONS)
    beta_tensor = alpha_tensor = weight_tensor = None
    beta_value = 0.0
    if isinstance(beta, Tensor):
        beta_tensor = _per_pair("beta", beta, pairs, device)
    else:
        beta_value = check_number("beta", beta, "a finite number > 0", also=_PER_PAIR)
        if beta_value <= 0:
            raise ValueError(f"beta is {beta}; expected a finite number > 0")
    alphas = [0.0]
    if isinstance(alpha, Tensor):
        alpha_tensor = _per_pair("alpha", alpha, pairs, device)
    elif isinstance(alpha, (tuple, list)):
        if not 1 <= len(alpha) <= MAX_ALPHAS:
            raise ValueError(f"alpha has {len(alpha)} coefficients; expected 1 to {MAX_ALPHAS}")
        alphas = [check_number(f"alpha[{i}]", a) for i, a in enumerate(alpha)]
    else:
        alphas = [check_number("alpha", alpha, also=_SEVERAL)]  # type: ignore[arg-type]  # checked there
    # Not of several coefficients, which decide together, nor of a tensor, which would have to be read.
    if alphas[0] < -1 and len(alphas) == 1 and not torch.compiler.is_compiling():
        _warn_not_monotone()
    if not OBJECTIVES[objective].takes_alpha and (alpha_tensor is not None or any(alphas)):
        raise ValueError(f"alpha is {show(alpha)}; expected 0 for objective {objective!r}, which does not use it")
    smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number from 0 to below 0.5")
    sft = check_number("sft_weight", sft_weight)
    if sft < 0:
        raise ValueError(f"sft_weight is {sft_weight}; expected a number >= 0")
    if pair_weight is not None:
        if not isinstance(pair_weight, Tensor):
            raise TypeError(f"pair_weight is {show(pair_weight)}; expected a torch.Tensor, one value per pair")
        weight_tensor = _per_pair("pair_weight", pair_weight, pairs, device)
    keep, flip = OBJECTIVES[objective].smoothing(smoothing)
    alphas += [0.0] * (MAX_ALPHAS - len(alphas))
    return Head(
        beta_tensor,
        alpha_tensor,
        weight_tensor,
        [beta_value, *alphas, keep, flip, check_number("margin", margin), sft],
    )


def _per_pair(name: str, value: Tensor, pairs: int, device: torch.device) -> Tensor:
    check_dense(name, value)
    check_floating(name, value)
    if tuple(value.shape) != (pairs,):
        hint = " (a float for all pairs)" if value.dim() == 0 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {(pairs,)}, one value per pair{hint}")
    check_device(name, value, device)
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient; expected a constant (detach it, or use pair_errors)")
    return value


@cache  # once per process, whatever the warning filters say
def _warn_not_monotone() -> None:
    warnings.warn(
        "alpha < -1: the loss is not monotone in the logit, pairs with p > -1/alpha are pushed the wrong way",
        stacklevel=4,
    )
