"""The arguments of the losses: all of their checks, made before anything is computed, and their canonical form."""

from __future__ import annotations

import numbers
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Arms, pairs_in
from .objectives import MAX_ALPHAS, OBJECTIVES

__all__ = ["Head", "Inputs", "check_head", "check_inputs", "check_number", "is_lazy"]

_REDUCTIONS = ("mean", "sum", "none")
_LAYOUTS = ("halves", "interleaved")
_LARGEST = sys.float_info.max
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Inputs(NamedTuple):
    """The tensors that the errors are computed from. Lists hold one tensor of both arms, or one for each.

    These are the operator's first arguments, and those of `Head` are the next, in its order.
    """

    pred: list[Tensor]
    ref: list[Tensor]  # empty without ref_pred
    target: list[Tensor]  # one of (B, ...) is shared by the arms
    ref_error: Tensor | None  # (2, B)
    mask: Tensor | None  # (1 or B, ...), bool, expanded to the shape of a sample


class Head(NamedTuple):
    """What the objective needs. Tensors are (B,); those of beta and alpha replace their numbers in `parameters`."""

    beta: Tensor | None
    alpha: Tensor | None
    weight: Tensor | None
    parameters: list[float]  # beta, four alphas, keep, flip, margin, sft_weight


# ------------------------------------------------------------------------------------------------ tensors


def check_inputs(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    reference_free: bool,
    ref_error: Arms | None,
    mask: Tensor | None,
    layout: str,
) -> Inputs:
    """The tensors among the arguments of `loss`, checked: TypeError or ValueError as it says."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected {_one_of(_LAYOUTS)}")
    pred = _tensors("model_pred", model_pred)
    shape, device = pred[0].shape, pred[0].device
    if len(shape) < 2:
        raise ValueError(f"model_pred has shape {tuple(shape)}; expected (2B, ...) with at least 2 dimensions")
    both = len(pred) == 1
    if both and shape[0] % 2:
        raise ValueError(
            f"model_pred has {shape[0]} rows (shape {tuple(shape)}); expected an even number, "
            f"a winner and a loser of each pair"
        )
    pairs = shape[0] // 2 if both else shape[0]
    sample = shape[1:]
    if pairs == 0 or 0 in sample:
        raise ValueError(f"model_pred has shape {tuple(shape)}; expected at least one pair and one element")
    if not both and pred[1].shape != shape:
        raise ValueError(f"model_pred[1] has shape {tuple(pred[1].shape)}; expected {tuple(shape)} like model_pred[0]")

    if not isinstance(reference_free, bool):
        raise TypeError(f"reference_free is {_show(reference_free)}; expected True or False")
    if reference_free + (ref_pred is not None) + (ref_error is not None) != 1:
        raise ValueError(
            f"ref_pred is {'given' if ref_pred is not None else 'None'}, ref_error is "
            f"{'given' if ref_error is not None else 'None'} and reference_free is {reference_free}; "
            "expected exactly one of the three"
        )
    ref: list[Tensor] = []
    if ref_pred is not None:
        ref = _tensors("ref_pred", ref_pred)
        for x, y in (pred[0], ref[0]), (pred[-1], ref[-1]):
            if x is y and x.requires_grad:
                raise ValueError("ref_pred is model_pred itself; expected the output of the frozen reference")
        _on_device("ref_pred", ref[0], device)
        _same_rows("ref_pred", ref, pairs, sample)

    tgt = _tensors("target", target)
    _on_device("target", tgt[0], device)
    if len(tgt) == 2 or tuple(tgt[0].shape) != (pairs, *sample):
        _same_rows("target", tgt, pairs, sample, or_shared=True)
    return Inputs(
        pred,
        ref,
        tgt,
        None if ref_error is None else _check_ref_error(ref_error, pairs, device, layout),
        None if mask is None else _check_mask(mask, pairs, sample, device),
    )


def _tensors(name: str, x: Arms) -> list[Tensor]:
    if isinstance(x, Tensor):
        tensors = [x]
    elif isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(arm, Tensor) for arm in x):
        tensors = list(x)
    else:
        hint = ""  # for an output of Diffusers', or of return_dict=False
        if isinstance(getattr(x, "sample", None), Tensor):
            hint = f": {name}.sample"
        elif isinstance(x, (tuple, list)) and len(x) == 1 and isinstance(x[0], Tensor):
            hint = f": {name}[0]"
        raise TypeError(f"{name} is {_show(x)}; expected a torch.Tensor{hint} or a tuple (win, lose) of two")
    for place, tensor in _places(name, tensors):
        _dense(place, tensor)
        _floating(place, tensor)
    first, last = tensors[0], tensors[-1]
    if last.dtype != first.dtype:
        raise TypeError(f"{name}[1] has dtype {last.dtype}; expected {first.dtype} like {name}[0]")
    if last.device != first.device:
        raise ValueError(f"{name}[1] is on {last.device}; expected {first.device} like {name}[0]")
    return tensors


def _places(name: str, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors as messages name them."""
    return [(name, tensors[0])] if len(tensors) == 1 else [(f"{name}[{i}]", x) for i, x in enumerate(tensors)]


def _dense(place: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        what = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{place} {what}; expected a dense tensor (torch.strided)")
    if type(x) is not Tensor and hasattr(x, "to_local"):
        raise TypeError(f"{place} is a {type(x).__name__}; expected a plain tensor, such as {place}.to_local()")


def _floating(place: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{place} has dtype {x.dtype}; expected float64, float32, bfloat16 or float16")
    if is_lazy(x):
        raise TypeError(f"{place} is lazily negated or zero; expected its values in memory, such as {place} + 0")


def is_lazy(x: Tensor) -> bool:
    """Whether memory holds the negatives of the values, or nothing. Compiled graphs resolve that themselves."""
    return not torch.compiler.is_compiling() and (x.is_neg() or x._is_zerotensor())


def _on_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device} like model_pred")


def _same_rows(name: str, tensors: list[Tensor], pairs: int, sample: torch.Size, *, or_shared: bool = False) -> None:
    rows = 2 * pairs if len(tensors) == 1 else pairs
    for place, tensor in _places(name, tensors):
        if tuple(tensor.shape) != (rows, *sample):
            shared = f", or {(pairs, *sample)} when both arms share it" if or_shared and len(tensors) == 1 else ""
            raise ValueError(
                f"{place} has shape {tuple(tensor.shape)}; expected {(rows, *sample)} like model_pred{shared}"
            )


def _check_ref_error(ref_error: Arms, pairs: int, device: torch.device, layout: str) -> Tensor:
    errors = _tensors("ref_error", ref_error)
    _on_device("ref_error", errors[0], device)
    if errors[0].dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        _warn_rounded_reference(errors[0].dtype)
    rows = 2 * pairs if len(errors) == 1 else pairs
    for place, error in _places("ref_error", errors):
        if tuple(error.shape) != (rows,):
            raise ValueError(f"{place} has shape {tuple(error.shape)}; expected {(rows,)}")
    if len(errors) == 2:
        return torch.stack(errors).detach()
    if layout == "interleaved":
        return errors[0].detach().view(pairs, 2).t()
    return errors[0].detach().view(2, pairs)


def _check_mask(mask: Tensor, pairs: int, sample: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is {_show(mask)}; expected a torch.Tensor")
    _dense("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, True where an element counts")
    _on_device("mask", mask, device)
    per_pair = mask.dim() == len(sample) + 1
    rows = mask.shape[0] if per_pair else 1
    inner = mask.shape[1:] if per_pair else mask.shape
    # Of the same length: to torch.compile in PyTorch 2.6 every zip is strict.
    last = sample[len(sample) - len(inner) :]
    fits = len(inner) <= len(sample) and all(n in (1, m) for n, m in zip(inner, last, strict=True))
    if fits and _may_be_of_pairs(mask.shape, pairs, sample):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which could be for all pairs or one for each of {pairs}; "
            "expected a dimension more: mask[None] if for all, mask.unsqueeze(1) or mask.unsqueeze(-1) if for each"
        )
    if not fits or rows not in (1, pairs):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected one that broadcasts to a sample, {tuple(sample)}, "
            f"or to one for each pair, {(pairs, *sample)}"
        )
    return mask.expand(rows, *sample)


def _may_be_of_pairs(mask: torch.Size, pairs: int, sample: torch.Size) -> bool:
    """Whether a mask with as many dimensions as a sample may have been meant as one for each pair, without channels.

    Where B is not C, a (B, H, W) mask is refused; it must not be taken for (C, H, W) in a batch where B is C.
    """
    if len(mask) != len(sample) or mask[0] != pairs:
        return False
    if pairs == 1:  # images: (1, H, W) means the same either way; tokens: (1, N) would be over C
        return len(sample) == 2 and mask[1] == sample[0] > 1
    return mask[1:] == sample[1:]


# ------------------------------------------------------------------------------------------------ numbers


def check_head(
    beta: float | Tensor,
    alpha: float | Tensor | Sequence[float],
    objective: str,
    label_smoothing: float,
    margin: float,
    sft_weight: float,
    pair_weight: Tensor | None,
    reduction: str,
    inputs: Inputs,
) -> Head:
    """The other arguments of `loss`, checked likewise. Of inputs only the number of pairs and the device matter."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; expected {_one_of(OBJECTIVES)}")
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected {_one_of(_REDUCTIONS)}")
    beta_tensor = alpha_tensor = weight_tensor = None
    beta_value = 0.0
    if isinstance(beta, Tensor):
        beta_tensor = _per_pair("beta", beta, inputs)
    else:
        beta_value = check_number("beta", beta, "a finite number > 0")
        if beta_value <= 0:
            raise ValueError(f"beta is {beta}; expected a finite number > 0")
    alphas = [0.0]
    if isinstance(alpha, Tensor):
        alpha_tensor = _per_pair("alpha", alpha, inputs)
    elif isinstance(alpha, (tuple, list)):
        if not 1 <= len(alpha) <= MAX_ALPHAS:
            raise ValueError(f"alpha has {len(alpha)} coefficients; expected 1 to {MAX_ALPHAS}")
        alphas = [check_number(f"alpha[{i}]", a) for i, a in enumerate(alpha)]
    else:
        alphas = [check_number("alpha", alpha)]  # type: ignore[arg-type]  # checked there
    # Not of several coefficients, which decide together, nor of a tensor, which would have to be read.
    if alphas[0] < -1 and len(alphas) == 1 and not torch.compiler.is_compiling():
        _warn_not_monotone()
    if not OBJECTIVES[objective].takes_alpha and (alpha_tensor is not None or any(alphas)):
        raise ValueError(f"alpha is {_show(alpha)}; expected 0 for objective {objective!r}, which does not use it")
    smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number from 0 to below 0.5")
    sft = check_number("sft_weight", sft_weight)
    if sft < 0:
        raise ValueError(f"sft_weight is {sft_weight}; expected a number >= 0")
    if pair_weight is not None:
        if not isinstance(pair_weight, Tensor):
            raise TypeError(f"pair_weight is {_show(pair_weight)}; expected a torch.Tensor, one value per pair")
        weight_tensor = _per_pair("pair_weight", pair_weight, inputs)
    keep, flip = OBJECTIVES[objective].smoothing(smoothing)
    alphas += [0.0] * (MAX_ALPHAS - len(alphas))
    return Head(
        beta_tensor,
        alpha_tensor,
        weight_tensor,
        [beta_value, *alphas, keep, flip, check_number("margin", margin), sft],
    )


_ALSO = {
    "beta": ", or a torch.Tensor of one per pair",
    "alpha": ", a list of up to 4 numbers, or a torch.Tensor of one per pair",
}


def check_number(name: str, value: float, wanted: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} is {_show(value)}; expected a number{_ALSO.get(name, '')}")
    number = value if isinstance(value, int) else float(value)  # NumPy's float32 would be compared as one: a warning
    # Not math.isfinite: torch.compile makes the number symbolic when it changes from call to call.
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name} is {value}; expected {wanted}")
    return float(value)


def _per_pair(name: str, value: Tensor, inputs: Inputs) -> Tensor:
    _dense(name, value)
    _floating(name, value)
    pairs = pairs_in(inputs.pred)
    if tuple(value.shape) != (pairs,):
        hint = " (a float for all pairs)" if value.dim() == 0 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {(pairs,)}, one value per pair{hint}")
    _on_device(name, value, inputs.pred[0].device)
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient; expected a constant (detach it, or use pair_errors)")
    return value


@cache  # once per process, whatever the warning filters say
def _warn_not_monotone() -> None:
    warnings.warn(
        "alpha < -1: the loss is not monotone in the logit, pairs with p > -1/alpha are pushed the wrong way",
        stacklevel=4,
    )


@cache
def _warn_rounded_reference(dtype: torch.dtype) -> None:
    warnings.warn(
        f"ref_error is {dtype}: with beta = 5000 its rounding alone moves the logit by about 1; keep it in float32",
        stacklevel=5,
    )


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(map(repr, names))


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return f"{value!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"
