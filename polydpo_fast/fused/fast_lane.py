"""The usual call of the loss in a training loop on a CPU: three plain tensors whose shapes, strides and options are
those of an earlier call. All that follows from those was worked out then, and this call looks it up."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import is_lazy
from ..layout import common_order, pairs_in
from .arguments import Inputs
from .autograd import checked, transforms_active
from .head_arguments import Head
from .operators import PLAIN, cheapest, module_of, pair_gradient

__all__ = ["FastLoss", "Signature", "bind", "signature_of"]

_HASHED = frozenset((float, int, str, bool, type(None)))


class Signature:
    """What calls have in common. bound: a `cpu.BoundLoss`, from when the first of them was checked and run."""

    bound: Any = None


@lru_cache(maxsize=1024, typed=True)
def _signature(*facts: object) -> Signature:
    return Signature()


def signature_of(tensors: tuple[Any, Any, Any], options: tuple[Any, ...]) -> Signature | None:
    """None where a call may not take the fast lane: torch.compile, a dispatch mode or torch.func is at work, or its
    arguments cannot be looked up."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transforms_active():
        return None
    if tensors[0] is tensors[1]:  # a forgotten reference, which the checks name
        return None
    for x in tensors:
        if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_nested or is_lazy(x):
            return None
    if not _HASHED.issuperset(map(type, options)):
        return None
    return _signature(*[fact for x in tensors for fact in (x.shape, x.stride(), x.dtype)], *options)


def bind(signature: Signature, inputs: Inputs, head: Head, objective: str, layout: str, reduction: str) -> None:
    tensors = (inputs.pred[0], inputs.ref[0], inputs.target[0])
    ordered = common_order(*([x] for x in tensors))
    if all(x is y for x, (y,) in zip(tensors, ordered, strict=True)):
        bound = module_of("cpp").BoundLoss
        signature.bound = bound(tensors, pairs_in(inputs.pred), head.parameters, objective, layout, reduction)


class FastLoss(torch.autograd.Function):
    """As `autograd.FusedLoss`."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, others: tuple[Tensor, Tensor, Any, bool]) -> Any:
        ref, target, bound, with_metrics = others  # as one: each argument of its own costs time
        value, metrics, table = bound.errors(pred, ref, target, with_metrics)
        # In the order of FusedLoss: checkpointing may record one and replay the other.
        ctx.save_for_backward(None, table, pred, target)
        ctx.set_materialize_grads(False)
        ctx.bound = bound
        if not with_metrics:  # an output costs microseconds, asked for or not
            return value
        ctx.mark_non_differentiable(metrics)
        return value, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None
        grad_loss, bound = checked(grads[0]), ctx.bound
        _, table, pred, target = ctx.saved_tensors
        call = cheapest(pair_gradient, pred, target, table, grad_loss)
        if call is pair_gradient and bound.knows(pred, target, table):
            return bound.gradient(pred, target, table, grad_loss), None
        (grad,) = call([pred], [target], None, table, grad_loss, bound.layout, "cpp")
        return grad, None
