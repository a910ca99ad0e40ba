"""The tensors that the errors of the losses are computed from: their checks, and their canonical form."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..argument_checks import check_dense, check_device, check_floating, show
from ..layout import Arms
from ..values import check_choice

__all__ = ["Inputs", "check_inputs"]

_LAYOUTS = ("halves", "interleaved")


class Inputs(NamedTuple):
    """The tensors that the errors are computed from. Lists hold one tensor of both arms, or one for each.

    These are the operator's first arguments, and those of `head_arguments.Head` are the next, in its order.
    """

    pred: list[Tensor]
    ref: list[Tensor]  # empty without ref_pred
    target: list[Tensor]  # one of (B, ...) is shared by the arms
    ref_error: Tensor | None  # (2, B)
    mask: Tensor | None  # (1 or B, ...), bool, expanded to the shape of a sample


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
    check_choice("layout", layout, _LAYOUTS)
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
        raise TypeError(f"reference_free is {show(reference_free)}; expected True or False")
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
        check_device("ref_pred", ref[0], device)
        _same_rows("ref_pred", ref, pairs, sample)

    tgt = _tensors("target", target)
    check_device("target", tgt[0], device)
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
        raise TypeError(f"{name} is {show(x)}; expected a torch.Tensor{hint} or a tuple (win, lose) of two")
    for place, tensor in _places(name, tensors):
        check_dense(place, tensor)
        check_floating(place, tensor)
    first, last = tensors[0], tensors[-1]
    if last.dtype != first.dtype:
        raise TypeError(f"{name}[1] has dtype {last.dtype}; expected {first.dtype} like {name}[0]")
    if last.device != first.device:
        raise ValueError(f"{name}[1] is on {last.device}; expected {first.device} like {name}[0]")
    return tensors


def _places(name: str, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors as messages name them."""
    return [(name, tensors[0])] if len(tensors) == 1 else [(f"{name}[{i}]", x) for i, x in enumerate(tensors)]


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
    check_device("ref_error", errors[0], device)
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
        raise TypeError(f"mask is {show(mask)}; expected a torch.Tensor")
    check_dense("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, True where an element counts")
    check_device("mask", mask, device)
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


@cache
def _warn_rounded_reference(dtype: torch.dtype) -> None:
    warnings.warn(
        f"ref_error is {dtype}: with beta = 5000 its rounding alone moves the logit by about 1; keep it in float32",
        stacklevel=5,
    )
