"""The gradients of the losses, around their operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import is_lazy
from ..layout import ERRORS, Column
from .operators import cheapest, pair_gradient, pair_loss

__all__ = ["FusedErrors", "FusedLoss", "checked", "refuse_transforms", "transforms_active"]

transforms_active = torch._C._are_functorch_transforms_active
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_NO_TRANSFORMS = (
    "polydpo_fast has no torch.func transforms (grad, vjp, jvp, jacrev, vmap, ...) and no is_grads_batched; "
    "backend='reference' of loss and pair_errors has"
)


def refuse_transforms() -> None:
    """In graphs too: torch.compile would trace torch.func.grad through the operator to a gradient of zeros."""
    if transforms_active():
        raise RuntimeError(_NO_TRANSFORMS)


def checked(grad: Tensor) -> Tensor:
    """What a backward is given, with its values in memory, where C++ and Triton look for them."""
    if torch.compiler.is_compiling():
        return grad
    # autograd.grad with is_grads_batched, or within vmap, runs backward on a tensor without memory of its own.
    if _is_batched(grad) or _is_transformed(grad):
        raise RuntimeError(_NO_TRANSFORMS)
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "polydpo_fast has no second derivative (create_graph=True); backend='reference' of loss and pair_errors has"
        )
    return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device) + grad if is_lazy(grad) else grad


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], *pred: Tensor) -> tuple[Tensor, Tensor]:
        value, metrics, _ = _forward(ctx, others, pred)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return value, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None, *[None] * ctx.arms)
        grad_loss = checked(grads[0])
        mask, table, *tensors = ctx.saved_tensors
        return _backward(ctx, mask, tensors, table, grad_loss)


class FusedErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], *pred: Tensor) -> Tensor:
        value, _, table = _forward(ctx, others, pred)
        errors: Tensor = table[:, ERRORS].t().to(value.dtype, copy=True)
        return errors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = checked(grads[0]).to(torch.float64)
        mask, table, *tensors = ctx.saved_tensors
        # The reference's error is a constant: model and excess have the same gradient, 2/D (pred - target).
        coefficients = ((grad[:2] + grad[2:]) * (2 / table[:, Column.ELEMENTS])).t()
        one = torch.ones((), dtype=grads[0].dtype, device=table.device)
        return _backward(ctx, mask, tensors, coefficients, one)


def _forward(ctx: Any, others: list[Any], pred: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the errors, and what the gradient will need. others: its arguments after the first, as they are;
    those of pred come one by one, because autograd sees no tensors in a list."""
    ref, target, ref_error, mask, beta, alpha, weight, *_, layout, _reduction, backend = others
    operator = cheapest(pair_loss, *pred, *ref, *target, ref_error, mask, beta, alpha, weight)
    value, metrics, table = operator(list(pred), *others)
    ctx.save_for_backward(mask, table, *pred, *target)
    ctx.arms, ctx.layout, ctx.backend = len(pred), layout, backend
    return value, metrics, table


def _backward(
    ctx: Any, mask: Tensor | None, tensors: list[Tensor], coefficients: Tensor, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The operator of the gradient, for each argument of `forward`."""
    pred, target = tensors[: ctx.arms], tensors[ctx.arms :]
    operator = cheapest(pair_gradient, *tensors, mask, coefficients, grad_loss)
    grad: list[Tensor] = operator(pred, target, mask, coefficients, grad_loss, ctx.layout, ctx.backend)
    return (None, *grad)
