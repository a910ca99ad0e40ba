"""`polydpo_fast.loss`: validation, choice of backend, operator registration and autograd."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import reference
from .metrics import METRICS
from .objectives import OBJECTIVES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["available_backends", "loss"]

REDUCTIONS = ("mean", "sum", "none")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@overload
def loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    beta: float = ...,
    alpha: float = ...,
    objective: str = ...,
    reduction: str = ...,
    return_metrics: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    beta: float = ...,
    alpha: float = ...,
    objective: str = ...,
    reduction: str = ...,
    return_metrics: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    beta: float = 5000.0,
    alpha: float = 0.0,
    objective: str = "poly_dpo",
    reduction: str = "mean",
    return_metrics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The Poly-DPO loss of a batch of B preference pairs.

    With m and r the mean squared errors of the policy and of the reference against the target, per sample,

        delta = (m_w - r_w) - (m_l - r_l)        z = -beta/2 delta        p = sigmoid(z)
        loss  = -log p + alpha (1 - p)

    (Wallace et al. 2023, arXiv 2311.12908, Eq. 14; Li et al. 2026, arXiv 2604.24953, Eq. 9-10.)

    Args:
        model_pred: the policy's output, (2B, ...), winners in the first half and losers in the second, the same
            pairs in the same order. At least one dimension besides the batch: tokens (2B, N, C), images
            (2B, C, H, W), video (2B, C, T, H, W). float64, float32, bfloat16 or float16, also unlike the others.
            The only argument that receives a gradient.
        ref_pred: the frozen reference's output on the same noised inputs; same shape. A constant.
        target: what both should have predicted (noise, velocity, noise - x0, ...); same shape, or (B, ...) where
            winner and loser of a pair share it. A constant.
        beta: strength of the pull to the reference, > 0. The convention is Diffusion-DPO's, with the factor 1/2
            and errors averaged, not summed, over a sample: 5000 for SD1.5 and SDXL. Scripts without the 1/2 use
            2500 for the same loss.
        alpha: Poly-DPO's coefficient. 0 is Diffusion-DPO; > 0 for noisy or conflicting labels (8 was the paper's
            best for SD1.5 on Pick-a-Pic V2); < 0 for trivially easy pairs. Below -1 the loss is no longer
            monotone in z, which warns.
        objective: a name in `polydpo_fast.objectives.OBJECTIVES`.
        reduction: "mean", "sum", or "none" for a (B,) result.
        return_metrics: also return `polydpo_fast.metrics.METRICS`, a dict of detached 0-dim tensors on the device.
        backend: "triton", "reference", or None: Triton on a CUDA or ROCm device where it is installed, the
            reference elsewhere.

    Returns:
        The loss, float32 (float64 if an input is float64); with `return_metrics`, (loss, metrics).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message says
            which. NaN and Inf in the tensors are no error: they make that pair's loss NaN or Inf.
    """
    _check_tensors(model_pred, ref_pred, target)
    beta = _check_beta(beta)
    alpha = _check_alpha(alpha)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; expected one of {', '.join(map(repr, OBJECTIVES))}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
    backend = _choose_backend(backend, model_pred.device)

    if backend == "reference":
        return reference.loss(
            model_pred,
            ref_pred,
            target,
            beta=beta,
            alpha=alpha,
            objective=objective,
            reduction=reduction,
            return_metrics=return_metrics,
        )
    value, metrics = _FusedLoss.apply(model_pred, ref_pred, target, beta, alpha, objective, reduction)  # type: ignore[no-untyped-call]
    if return_metrics:
        return value, dict(zip(METRICS, metrics.unbind(), strict=True))
    return value  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- validation


def _check_tensors(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> None:
    for name, x in (("model_pred", model_pred), ("ref_pred", ref_pred), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; expected float64, float32, bfloat16 or float16")
        if x.device != model_pred.device:
            raise ValueError(f"{name} is on {x.device}; expected {model_pred.device} like model_pred")
    shape = model_pred.shape
    if len(shape) < 2:
        raise ValueError(f"model_pred has shape {tuple(shape)}; expected (2B, ...) with at least 2 dimensions")
    if shape[0] % 2:
        raise ValueError(
            f"model_pred has {shape[0]} rows (shape {tuple(shape)}); expected an even number: winners, then losers"
        )
    if model_pred.numel() == 0:
        raise ValueError(f"model_pred has shape {tuple(shape)}; expected at least one pair and one element")
    if ref_pred.shape != shape:
        raise ValueError(f"ref_pred has shape {tuple(ref_pred.shape)}; expected {tuple(shape)} like model_pred")
    shared = (shape[0] // 2, *shape[1:])
    if target.shape != shape and target.shape != shared:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; expected {tuple(shape)} like model_pred, "
            f"or {shared} when both arms share it"
        )


def _check_beta(beta: float) -> float:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta is {_show(beta)}; expected a number")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; expected a finite number > 0")
    return float(beta)


def _check_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is {_show(alpha)}; expected a number")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; expected a finite number")
    if alpha < -1:
        _warn_not_monotone()
    return float(alpha)


@cache  # once per process, whatever the warning filters say
def _warn_not_monotone() -> None:
    warnings.warn(
        "alpha < -1: the loss is not monotone in the logit, pairs with p > -1/alpha are pushed the wrong way",
        stacklevel=4,
    )


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


# ----------------------------------------------------------------------------------------------- backends


# Looked up once: torch.compile cannot trace through either.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The backends that can run on a device, the automatic choice first."""
    return _backends_of(torch.device(device).type)


def _backends_of(device_type: str) -> tuple[str, ...]:
    if device_type == "cuda" and _HAS_TRITON:  # ROCm devices are called cuda too
        return ("triton", "reference")
    if device_type == "cpu" and _HAS_TRITON and _INTERPRETING:
        return ("reference", "triton")
    return ("reference",)


def _choose_backend(backend: str | None, device: torch.device) -> str:
    available = _backends_of(device.type)
    if backend is None:
        return available[0]
    if backend not in available:
        raise ValueError(
            f"backend is {backend!r}; expected one of {', '.join(map(repr, available))} for tensors on {device}"
        )
    return backend


# -------------------------------------------------------------------------------- operators and autograd

_library = torch.library.Library("polydpo_fast", "DEF")
_library.define(
    "pair_loss(Tensor pred, Tensor ref, Tensor target, float beta, float alpha, str objective, str reduction)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define("pair_gradient(Tensor pred, Tensor target, Tensor coefficients, Tensor grad_loss) -> Tensor")


def _pair_loss(
    pred: Tensor, ref: Tensor, target: Tensor, beta: float, alpha: float, objective: str, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient coefficients (B, 2), metrics."""
    from .kernels import pair_loss

    pred, ref, target = _common_order(pred, ref, target)
    result: tuple[Tensor, Tensor, Tensor] = pair_loss.launch_errors(
        _halves(pred),
        _halves(ref),
        _target_arms(target, pred),
        beta=beta,
        alpha=alpha,
        objective=objective,
        reduction=reduction,
    )
    return result


def _pair_gradient(pred: Tensor, target: Tensor, coefficients: Tensor, grad_loss: Tensor) -> Tensor:
    from .kernels import pair_loss

    pred, target = _common_order(pred, target)
    grad = _empty_dense_like(pred)
    pair_loss.launch_gradient(
        _halves(pred), _target_arms(target, pred), _halves(grad), coefficients, grad_loss.contiguous()
    )
    return grad


_library.impl("pair_loss", _pair_loss, "CompositeExplicitAutograd")
_library.impl("pair_gradient", _pair_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("polydpo_fast::pair_loss", lib=_library)
def _(
    pred: Tensor, ref: Tensor, target: Tensor, beta: float, alpha: float, objective: str, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = pred.shape[0] // 2
    dtype = torch.float64 if torch.float64 in (pred.dtype, ref.dtype, target.dtype) else torch.float32
    value = pred.new_empty((pairs,) if reduction == "none" else (), dtype=dtype)
    return value, pred.new_empty((pairs, 2), dtype=torch.float64), pred.new_empty(len(METRICS), dtype=dtype)


@torch.library.register_fake("polydpo_fast::pair_gradient", lib=_library)
def _(pred: Tensor, target: Tensor, coefficients: Tensor, grad_loss: Tensor) -> Tensor:
    return _empty_dense_like(pred if _dense_sample(pred) else pred.contiguous())


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        ref: Tensor,
        target: Tensor,
        beta: float,
        alpha: float,
        objective: str,
        reduction: str,
    ) -> tuple[Tensor, Tensor]:
        value, coefficients, metrics = torch.ops.polydpo_fast.pair_loss(
            pred, ref, target, beta, alpha, objective, reduction
        )
        ctx.save_for_backward(pred, target, coefficients)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return value, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 7
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "polydpo_fast.loss has no second derivative; use backend='reference' for create_graph=True"
            )
        pred, target, coefficients = ctx.saved_tensors
        grad = torch.ops.polydpo_fast.pair_gradient(pred, target, coefficients, grad_loss)
        return (grad, *(None,) * 6)


# ----------------------------------------------------------------------------------------- memory layout


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = x.shape[0] // 2
    return x[:pairs], x[pairs:]


def _target_arms(target: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(target) if target.shape[0] == pred.shape[0] else (target, target)


def _common_order(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors with one element order within a sample, each sample dense; copies only what does not fit.

    The losses do not care in which order a sample's elements are visited, as long as all tensors are visited in
    the same. So channels_last batches, batch slices and expanded samples are read where they are.
    """
    if not _dense_sample(first):
        first = first.contiguous()
    order = first.stride()[1:]
    sizes = first.shape[1:]
    return (first, *(x if _same_order(x.stride()[1:], order, sizes) else _reorder(x, first) for x in others))


def _same_order(a: Sequence[int], b: Sequence[int], sizes: Sequence[int]) -> bool:
    return all(s == t or n == 1 for s, t, n in zip(a, b, sizes, strict=True))


def _dense_sample(x: Tensor) -> bool:
    """Whether the elements of a sample fill one stretch of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _empty_dense_like(x: Tensor) -> Tensor:
    """Uninitialised, with the element order of x within a sample and no gaps between samples."""
    strides = (x[0].numel(), *x.stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _reorder(x: Tensor, like: Tensor) -> Tensor:
    strides = (like[0].numel(), *like.stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
