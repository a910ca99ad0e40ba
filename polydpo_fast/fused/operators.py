"""The operators of the losses: what torch.compile and dispatch modes see of them, and how they reach a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from ..layout import PAIR_COLUMNS, common_order, dense_mask, empty_dense_like, pairs_in
from ..metrics import METRICS

__all__ = ["PLAIN", "cheapest", "module_of", "pair_gradient", "pair_loss"]

PLAIN = (Tensor, torch.nn.Parameter)
"""Types whose memory is that of their values; that of subclasses such as DTensor or FakeTensor need not be."""


@cache
def module_of(backend: str) -> Any:
    """Where a fused backend's launch_errors and launch_gradient are; imported when first used."""
    return importlib.import_module("polydpo_fast.fused.cpu" if backend == "cpp" else "polydpo_fast.kernels.pair_loss")


# By hand: the decorators that register an operator cost more at each call.
_defined = Library("polydpo_fast", "DEF")
_defined.define(
    "pair_loss(Tensor[] pred, Tensor[] ref, Tensor[] target, Tensor? ref_error, Tensor? mask, Tensor? beta,"
    " Tensor? alpha, Tensor? weight, float[] parameters, str? objective, str layout, str reduction,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
_defined.define(
    "pair_gradient(Tensor[] pred, Tensor[] target, Tensor? mask, Tensor coefficients, Tensor grad_loss,"
    " str layout, str backend) -> Tensor[]"
)


def pair_loss(
    pred: list[Tensor],
    ref: list[Tensor],
    target: list[Tensor],
    ref_error: Tensor | None,
    mask: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics (12,), and the table of pairs, (B, PAIR_COLUMNS).

    Without an objective only the columns of errors and sizes are written.
    """
    *head, backend = others
    double = torch.float64 in (pred[0].dtype, target[0].dtype, ref[0].dtype if ref else None)
    pred, ref, target = common_order(pred, ref, target)
    if mask is not None:
        mask = dense_mask(mask, pred[0])
    launch = module_of(backend).launch_errors
    result: tuple[Tensor, Tensor, Tensor] = launch(pred, ref, target, ref_error, mask, *head, double)
    return result


def pair_gradient(
    pred: list[Tensor],
    target: list[Tensor],
    mask: Tensor | None,
    coefficients: Tensor,
    grad_loss: Tensor,
    layout: str,
    backend: str,
) -> list[Tensor]:
    """grad_loss * coefficient * (pred - target); the coefficients of a pair are the last two of its columns."""
    # grad_loss too: the loss is float64 even where only the reference is.
    double = torch.float64 in (pred[0].dtype, target[0].dtype, grad_loss.dtype)
    pred, target = common_order(pred, target)
    # Hooks on saved tensors may have brought these back in another dtype, or with other strides.
    if mask is not None:
        mask = dense_mask(mask.to(torch.bool), pred[0])
    coefficients = coefficients.to(torch.float64).contiguous()
    launch = module_of(backend).launch_gradient
    grad: list[Tensor] = launch(pred, target, mask, coefficients, grad_loss, layout, double)
    return grad


_defined.impl("pair_loss", pair_loss, "CompositeExplicitAutograd")
_defined.impl("pair_gradient", pair_gradient, "CompositeExplicitAutograd")


@register_fake("polydpo_fast::pair_loss", lib=_defined)
def _fake_pair_loss(
    pred: list[Tensor], ref: list[Tensor], target: list[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, _backend = others
    first, pairs = pred[0], pairs_in(pred)
    double = any(x.dtype == torch.float64 for x in (first, *ref, target[0]))
    dtype = torch.float64 if double else torch.float32
    return (
        first.new_empty((pairs,) if reduction == "none" else (), dtype=dtype),
        first.new_empty(len(METRICS), dtype=dtype),
        first.new_empty((pairs, PAIR_COLUMNS), dtype=torch.float64),
    )


@register_fake("polydpo_fast::pair_gradient", lib=_defined)
def _fake_pair_gradient(pred: list[Tensor], target: list[Tensor], *_: Any) -> list[Tensor]:
    ordered, *_rest = common_order(pred, target)
    return [empty_dense_like(x) for x in ordered]


def _refuse_graph(ctx: Any, *grads: Tensor) -> None:
    """torch.export and make_fx keep the operator without what `autograd` puts around it: gradients would be missing,
    silently."""
    raise RuntimeError(
        "the operator of polydpo_fast has no gradient in a graph of torch.export or make_fx; "
        "export the model, and call loss or pair_errors on what it returns"
    )


register_autograd("polydpo_fast::pair_loss", _refuse_graph, lib=_defined)


def cheapest(implementation: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """The operator of these tensors, or its implementation itself where nothing would see the difference: it saves
    microseconds. torch.compile and dispatch modes need the operator, and so do subclasses.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _OPERATORS[implementation]
    for x in tensors:
        if x is not None and type(x) not in PLAIN:
            return _OPERATORS[implementation]
    return implementation


_OPERATORS = {
    pair_loss: torch.ops.polydpo_fast.pair_loss,
    pair_gradient: torch.ops.polydpo_fast.pair_gradient,
}
