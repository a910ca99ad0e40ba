"""`polydpo_fast.loss` and `pair_errors`: operator registration and autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, library
from typing_extensions import Unpack

from . import reference
from .arguments import Head, Inputs, check_head, check_inputs, is_lazy
from .backends import choose_backend
from .layout import ERRORS, PAIR_COLUMNS, Arms, Column, common_order, dense_mask, empty_dense_like, pairs_in
from .metrics import METRICS, unpacked
from .reference import PairErrors

__all__ = ["PairErrors", "loss", "pair_errors"]


class _Options(TypedDict, total=False):
    beta: float | Tensor
    alpha: float | Tensor | Sequence[float]
    objective: str
    label_smoothing: float
    margin: float
    reference_free: bool
    sft_weight: float
    ref_error: Arms | None
    pair_weight: Tensor | None
    mask: Tensor | None
    layout: str
    reduction: str
    backend: str | None


@overload
def loss(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    return_metrics: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def loss(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    return_metrics: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def loss(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    return_metrics: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...
def loss(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    beta: float | Tensor = 5000.0,
    alpha: float | Tensor | Sequence[float] = 0.0,
    objective: str = "poly_dpo",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    reference_free: bool = False,
    sft_weight: float = 0.0,
    ref_error: Arms | None = None,
    pair_weight: Tensor | None = None,
    mask: Tensor | None = None,
    layout: str = "halves",
    reduction: str = "mean",
    return_metrics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The Poly-DPO loss, or another of its family, of a batch of B preference pairs.

    With m and r the mean squared errors of the policy and of the reference against the target, per sample,

        delta = (m_w - r_w) - (m_l - r_l)        z = -beta/2 delta        p = sigmoid(z)
        loss  = -log p + alpha (1 - p)

    (Wallace et al. 2023, arXiv 2311.12908, Eq. 14; Li et al. 2026, arXiv 2604.24953, Eq. 9-10.)

    Args:
        model_pred: the policy's output: (2B, ...), see `layout`, or a tuple (win, lose) of (B, ...). At least one
            dimension besides the batch: tokens (2B, N, C), images (2B, C, H, W), video (2B, C, T, H, W). float64,
            float32, bfloat16 or float16, also unlike the others. The only argument that receives a gradient.
        ref_pred: the frozen reference's output on the same noised inputs, as model_pred. A constant. None with
            `ref_error` or `reference_free`.
        target: what both should have predicted (noise, velocity, noise - x0, ...), as model_pred; or (B, ...) where
            winner and loser of a pair share it: then it is read once. A constant.
        beta: strength of the pull to the reference, > 0; a float, or a (B,) tensor (whose values are not checked).
            The convention is Diffusion-DPO's, with the factor 1/2 and errors averaged, not summed, over a sample:
            5000 for SD1.5 and SDXL. Scripts without the 1/2 use 2500 for the same loss.
        alpha: Poly-DPO's coefficient: a float, or a (B,) tensor. 0 is Diffusion-DPO; > 0 for noisy or conflicting
            labels (8 was the paper's best for SD1.5 on Pick-a-Pic V2); < 0 for trivially easy pairs. Below -1 the
            loss is no longer monotone in z: a warning (none for a tensor: reading it would wait for the device). A
            sequence of up to 4 floats is Poly-N: -log p + sum_j alpha_j (1 - p)^j.
        objective: a name in `polydpo_fast.objectives.OBJECTIVES`: "poly_dpo", "robust", "ipo", "hinge", "linear".
        label_smoothing: the share of labels believed wrong, 0 to below 0.5. cDPO with "poly_dpo", and the
            expectation over the label with any objective but "robust", which corrects for it without bias.
        margin: subtracted from z in the loss (not in the metrics). With `reference_free` this is SimPO's gamma.
        reference_free: take r = 0: no reference at all.
        sft_weight: adds sft_weight * m_w, >= 0.
        ref_error: the reference's errors r computed before, in place of ref_pred: (2B,), or a tuple of (B,). The
            difference m - r is then one of two nearly equal numbers: keep them in float32 at least.
        pair_weight: (B,), factors of the pairs' losses. The mean still divides by B. A weight of 0 does not hide a NaN.
        mask: bool, True where an element counts; errors are means over those. With as many dimensions as a sample or
            fewer it broadcasts to a sample, and is that of all pairs: (C, H, W), (H, W). With one more it is that of
            each pair: (B, C, H, W), (B, 1, H, W). What is masked may be NaN. A pair with nothing left has a NaN loss.
        layout: of (2B, ...) tensors: "halves" [w0; w1; ...; l0; l1; ...] or "interleaved" [w0; l0; w1; l1; ...].
        reduction: "mean", "sum", or "none" for a (B,) result.
        return_metrics: also return `polydpo_fast.metrics.METRICS`, a dict of detached 0-dim tensors on the device.
        backend: "triton", "cpp", "reference", or None: Triton on a CUDA or ROCm device where it is installed, C++ on
            a CPU, the reference elsewhere.

    Returns:
        The loss, float32 (float64 if model_pred, ref_pred or target is); with `return_metrics`, (loss, metrics).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message says
            which. NaN and Inf in the tensors are no error: they make that pair's loss and gradient NaN.
        RuntimeError: under a transform of `torch.func`, which only backend="reference" takes.
    """
    # A call like an earlier one is not checked again.
    tensors = model_pred, ref_pred, target
    options = (beta, alpha, objective, label_smoothing, margin, reference_free, sft_weight, layout, reduction, backend)
    bound = None
    if ref_error is mask is pair_weight is None and _is_plain(tensors, options):
        bound = _bound_loss(*[fact for x in tensors for fact in (x.shape, x.stride(), x.dtype)], *options)  # type: ignore
        if bound:
            found: Any = _BoundLoss.apply(model_pred, (ref_pred, target, bound[0], return_metrics))  # type: ignore[no-untyped-call]
            return (found[0], unpacked(found[1])) if return_metrics else found
    if backend != "reference":
        _refuse_transforms()
    inputs = check_inputs(
        model_pred, ref_pred, target, reference_free=reference_free, ref_error=ref_error, mask=mask, layout=layout
    )
    head = check_head(beta, alpha, objective, label_smoothing, margin, sft_weight, pair_weight, reduction, inputs)
    backend = choose_backend(backend, inputs.pred[0].device)
    if backend == "reference":
        return reference.loss(
            model_pred,
            ref_pred,
            target,
            beta=beta,
            alpha=alpha,
            objective=objective,
            label_smoothing=label_smoothing,
            margin=margin,
            reference_free=reference_free,
            sft_weight=sft_weight,
            ref_error=ref_error,
            pair_weight=pair_weight,
            mask=inputs.mask,
            layout=layout,
            reduction=reduction,
            return_metrics=return_metrics,
        )
    if torch.compiler.is_compiling():
        head = _without_symbols(head, inputs)
    if bound is not None and backend == "cpp":
        _bind(bound, inputs, head, objective, layout, reduction)
    pred, *others = (*inputs, *head, objective, layout, reduction, backend)
    value, metrics = _FusedLoss.apply(others, *pred)  # type: ignore[no-untyped-call]
    return (value, unpacked(metrics)) if return_metrics else value


def pair_errors(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    reference_free: bool = False,
    ref_error: Arms | None = None,
    mask: Tensor | None = None,
    layout: str = "halves",
    backend: str | None = None,
) -> PairErrors:
    """The errors that every objective is made of, differentiable: bring your own head.

        errors = polydpo_fast.pair_errors(model_pred, ref_pred, target)
        z = errors.logit(beta=5000.0)
        loss = torch.nn.functional.softplus(1 - z).square().mean()   # any function of z and the errors

    The kernels of `loss` compute the sums over the samples and the gradient, as precisely; around them are a few
    operators on (B,) tensors. The arguments are those of `loss`.

    Returns:
        PairErrors(model_win, model_lose, excess_win, excess_lose), each (B,), float32 (float64 if model_pred, ref_pred
        or target is). The excess is m - r; with `reference_free`, m.
    """
    if backend != "reference":
        _refuse_transforms()
    inputs = check_inputs(
        model_pred, ref_pred, target, reference_free=reference_free, ref_error=ref_error, mask=mask, layout=layout
    )
    backend = choose_backend(backend, inputs.pred[0].device)
    if backend == "reference":
        return reference.pair_errors(
            model_pred,
            ref_pred,
            target,
            reference_free=reference_free,
            ref_error=ref_error,
            mask=inputs.mask,
            layout=layout,
        )
    # Made here: numbers of a global would be inputs of the graph where torch.compile is told that all is dynamic.
    no_head = Head(None, None, None, [0.0] * 9)
    pred, *others = (*inputs, *no_head, None, layout, "mean", backend)
    errors = _FusedErrors.apply(others, *pred)  # type: ignore[no-untyped-call]
    return PairErrors(*errors.unbind())


def _without_symbols(head: Head, inputs: Inputs) -> Head:
    """A beta or alpha that torch.compile has made symbolic, because it changes from call to call, as a tensor of its
    value: as a number in the operator's arguments it would compile a graph for each value."""
    import torch.fx.experimental.symbolic_shapes as symbolic_shapes

    # torch.compile, which traces this, cannot catch the error of an import that fails.
    if not hasattr(symbolic_shapes, "has_static_value"):  # PyTorch 2.6: a graph for each value
        return head
    beta, alpha = head.beta, head.alpha
    parameters = list(head.parameters)
    ones = torch.ones(pairs_in(inputs.pred), dtype=torch.float64, device=inputs.pred[0].device)
    if beta is None and not symbolic_shapes.has_static_value(parameters[0]):
        beta, parameters[0] = ones * parameters[0], 0.0
    if alpha is None and not symbolic_shapes.has_static_value(parameters[1]):
        alpha, parameters[1] = ones * parameters[1], 0.0
    return Head(beta, alpha, head.weight, parameters)


# ---------------------------------------------------------------------------------------------- operators


@cache
def _module_of(backend: str) -> Any:
    """Where a fused backend's launch_errors and launch_gradient are; imported when first used."""
    return importlib.import_module("polydpo_fast.cpu" if backend == "cpp" else "polydpo_fast.kernels.pair_loss")


# By hand: the decorators that register an operator cost more at each call.
_library = torch.library.Library("polydpo_fast", "DEF")
_library.define(
    "pair_loss(Tensor[] pred, Tensor[] ref, Tensor[] target, Tensor? ref_error, Tensor? mask, Tensor? beta,"
    " Tensor? alpha, Tensor? weight, float[] parameters, str? objective, str layout, str reduction,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "pair_gradient(Tensor[] pred, Tensor[] target, Tensor? mask, Tensor coefficients, Tensor grad_loss,"
    " str layout, str backend) -> Tensor[]"
)


def _pair_loss(
    pred: list[Tensor],
    ref: list[Tensor],
    target: list[Tensor],
    ref_error: Tensor | None,
    mask: Tensor | None,
    beta: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor | None,
    parameters: list[float],
    objective: str | None,
    layout: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics (12,), and the table of pairs, (B, PAIR_COLUMNS).

    Without an objective only the columns of errors and sizes are written.
    """
    double = torch.float64 in (pred[0].dtype, target[0].dtype, ref[0].dtype if ref else None)
    pred, ref, target = common_order(pred, ref, target)
    if mask is not None:
        mask = dense_mask(mask, pred[0])
    result: tuple[Tensor, Tensor, Tensor] = _module_of(backend).launch_errors(
        pred, ref, target, ref_error, mask, beta, alpha, weight, parameters, objective, layout, reduction, double
    )
    return result


def _pair_gradient(
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
    launch = _module_of(backend).launch_gradient
    grad: list[Tensor] = launch(pred, target, mask, coefficients, grad_loss, layout, double)
    return grad


_library.impl("pair_loss", _pair_loss, "CompositeExplicitAutograd")
_library.impl("pair_gradient", _pair_gradient, "CompositeExplicitAutograd")


def _call(implementation: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """The operator, or its implementation itself where nothing would see the difference: it saves microseconds.

    torch.compile and dispatch modes need the operator; so do subclasses such as DTensor or FakeTensor, whose memory,
    if they have any, is not that of their values.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _OPERATORS[implementation]
    for x in tensors:
        if x is not None and type(x) not in _PLAIN:
            return _OPERATORS[implementation]
    return implementation


_PLAIN = (Tensor, torch.nn.Parameter)
_OPERATORS = {
    _pair_loss: torch.ops.polydpo_fast.pair_loss,
    _pair_gradient: torch.ops.polydpo_fast.pair_gradient,
}


@torch.library.register_fake("polydpo_fast::pair_loss", lib=_library)
def _fake_pair_loss(
    pred: list[Tensor], ref: list[Tensor], target: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, _backend = options
    first, pairs = pred[0], pairs_in(pred)
    double = any(x.dtype == torch.float64 for x in (first, *ref, target[0]))
    dtype = torch.float64 if double else torch.float32
    return (
        first.new_empty((pairs,) if reduction == "none" else (), dtype=dtype),
        first.new_empty(len(METRICS), dtype=dtype),
        first.new_empty((pairs, PAIR_COLUMNS), dtype=torch.float64),
    )


@torch.library.register_fake("polydpo_fast::pair_gradient", lib=_library)
def _fake_pair_gradient(pred: list[Tensor], target: list[Tensor], *_: Any) -> list[Tensor]:
    ordered, *_rest = common_order(pred, target)
    return [empty_dense_like(x) for x in ordered]


# ----------------------------------------------------------------------------------------------- autograd


def _refuse_graph(ctx: Any, *grads: Tensor) -> None:
    """torch.export and make_fx keep the operator without the functions below: gradients would be missing, silently."""
    raise RuntimeError(
        "the operator of polydpo_fast has no gradient in a graph of torch.export or make_fx; "
        "export the model, and call loss or pair_errors on what it returns"
    )


library.register_autograd("polydpo_fast::pair_loss", _refuse_graph, lib=_library)

_transforms_active = torch._C._are_functorch_transforms_active
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_NO_TRANSFORMS = (
    "polydpo_fast has no torch.func transforms (grad, vjp, jvp, jacrev, vmap, ...) and no is_grads_batched; "
    "backend='reference' of loss and pair_errors has"
)


def _refuse_transforms() -> None:
    """In graphs too: torch.compile would trace torch.func.grad through the operator to a gradient of zeros."""
    if _transforms_active():
        raise RuntimeError(_NO_TRANSFORMS)


def _refuse_batched(grad: Tensor) -> None:
    """autograd.grad with is_grads_batched, or within vmap, runs backward on a tensor without memory of its own."""
    if not torch.compiler.is_compiling() and (_is_batched(grad) or _is_transformed(grad)):
        raise RuntimeError(_NO_TRANSFORMS)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError(
            "polydpo_fast has no second derivative (create_graph=True); backend='reference' of loss and pair_errors has"
        )


def _materialised(grad: Tensor) -> Tensor:
    """The same with its values in memory, where C++ and Triton look for them."""
    return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device) + grad if is_lazy(grad) else grad


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], *pred: Tensor) -> tuple[Tensor, Tensor]:
        value, metrics, _ = _forward(ctx, others, pred)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return value, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return (None, *[None] * ctx.arms)
        _refuse_batched(grad_loss)
        _refuse_second_derivative()
        mask, table, *tensors = ctx.saved_tensors
        return _backward(ctx, mask, tensors, table, _materialised(grad_loss))


class _FusedErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], *pred: Tensor) -> Tensor:
        value, _, table = _forward(ctx, others, pred)
        errors: Tensor = table[:, ERRORS].t().to(value.dtype, copy=True)
        return errors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_batched(grads[0])
        _refuse_second_derivative()
        mask, table, *tensors = ctx.saved_tensors
        grad = grads[0].to(torch.float64)
        # The reference's error is a constant: model and excess have the same gradient, 2/D (pred - target).
        coefficients = ((grad[:2] + grad[2:]) * (2 / table[:, Column.ELEMENTS])).t()
        one = torch.ones((), dtype=grads[0].dtype, device=table.device)
        return _backward(ctx, mask, tensors, coefficients, one)


def _forward(ctx: Any, others: list[Any], pred: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the errors, and what the gradient will need. others: its arguments after the first, as they are;
    those of pred come one by one, because autograd sees no tensors in a list."""
    ref, target, ref_error, mask, beta, alpha, weight, *_, layout, _reduction, backend = others
    operator = _call(_pair_loss, *pred, *ref, *target, ref_error, mask, beta, alpha, weight)
    value, metrics, table = operator(list(pred), *others)
    ctx.save_for_backward(mask, table, *pred, *target)
    ctx.arms, ctx.layout, ctx.backend = len(pred), layout, backend
    return value, metrics, table


def _backward(
    ctx: Any, mask: Tensor | None, tensors: list[Tensor], coefficients: Tensor, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The operator of the gradient, for each argument of `forward`."""
    pred, target = tensors[: ctx.arms], tensors[ctx.arms :]
    operator = _call(_pair_gradient, *tensors, mask, coefficients, grad_loss)
    grad: list[Tensor] = operator(pred, target, mask, coefficients, grad_loss, ctx.layout, ctx.backend)
    return (None, *grad)


# ---------------------------------------------------------------------------------------------- fast lane

# The usual call in a training loop on a CPU: three plain tensors whose shapes, strides and options are those of an
# earlier call. All that follows from those was worked out then, and this call looks it up.


def _is_plain(tensors: tuple[Any, ...], options: tuple[object, ...]) -> bool:
    """Whether a loss may take the fast lane: neither torch.compile, a dispatch mode nor torch.func is at work, and its
    arguments can be looked up."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _transforms_active():
        return False
    if tensors[0] is tensors[1]:  # a forgotten reference, which the checks name
        return False
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_nested or is_lazy(x):
            return False
    return all(type(option) in _HASHED for option in options)


_HASHED = (float, int, str, bool, type(None))


@lru_cache(maxsize=1024, typed=True)
def _bound_loss(*signature: object) -> list[Any]:
    """The BoundLoss of a signature, in a list; empty until the first call has been checked and has filled it."""
    return []


def _bind(bound: list[Any], inputs: Inputs, head: Head, objective: str, layout: str, reduction: str) -> None:
    tensors = (inputs.pred[0], inputs.ref[0], inputs.target[0])
    ordered = common_order(*([x] for x in tensors))
    if all(x is y for x, (y,) in zip(tensors, ordered, strict=True)):
        module = _module_of("cpp")
        bound.append(module.BoundLoss(tensors, pairs_in(inputs.pred), head.parameters, objective, layout, reduction))


class _BoundLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, others: tuple[Tensor, Tensor, Any, bool]) -> Any:
        ref, target, bound, with_metrics = others  # as one: each argument of its own costs time
        value, metrics, table = bound.errors(pred, ref, target, with_metrics)
        # In the order of _FusedLoss: checkpointing may record one and replay the other.
        ctx.save_for_backward(None, table, pred, target)
        ctx.set_materialize_grads(False)
        ctx.bound = bound
        if not with_metrics:  # an output costs microseconds, asked for or not
            return value
        ctx.mark_non_differentiable(metrics)
        return value, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return None, None
        _refuse_batched(grad_loss)
        _refuse_second_derivative()
        _, table, pred, target = ctx.saved_tensors
        grad_loss = _materialised(grad_loss)
        bound: Any = ctx.bound
        call = _call(_pair_gradient, pred, target, table, grad_loss)
        if call is _pair_gradient and bound.knows(pred, target, table):
            return bound.gradient(pred, target, table, grad_loss), None
        (grad,) = call([pred], [target], None, table, grad_loss, bound.layout, "cpp")
        return grad, None
