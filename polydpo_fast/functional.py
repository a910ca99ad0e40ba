"""`polydpo_fast.loss` and `pair_errors`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import reference
from .backends import choose_backend
from .fused.arguments import check_inputs
from .fused.autograd import FusedErrors, FusedLoss, refuse_transforms
from .fused.fast_lane import FastLoss, bind, signature_of
from .fused.head_arguments import Head, check_head
from .layout import Arms, pairs_in
from .metrics import unpacked
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
    options = (beta, alpha, objective, label_smoothing, margin, reference_free, sft_weight, layout, reduction, backend)
    signature = None
    if ref_error is mask is pair_weight is None:
        signature = signature_of((model_pred, ref_pred, target), options)
        if signature is not None and signature.bound is not None:
            found: Any = FastLoss.apply(model_pred, (ref_pred, target, signature.bound, return_metrics))  # type: ignore[no-untyped-call]
            return (found[0], unpacked(found[1])) if return_metrics else found
    if backend != "reference":
        refuse_transforms()
    inputs = check_inputs(
        model_pred, ref_pred, target, reference_free=reference_free, ref_error=ref_error, mask=mask, layout=layout
    )
    pairs, device = pairs_in(inputs.pred), inputs.pred[0].device
    head = check_head(
        beta, alpha, objective, label_smoothing, margin, sft_weight, pair_weight, reduction, pairs=pairs, device=device
    )
    backend = choose_backend(backend, device)
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
        head = _without_symbols(head, pairs, device)
    if signature is not None and backend == "cpp":
        bind(signature, inputs, head, objective, layout, reduction)
    pred, *others = (*inputs, *head, objective, layout, reduction, backend)
    value, metrics = FusedLoss.apply(others, *pred)  # type: ignore[no-untyped-call]
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
        refuse_transforms()
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
    errors = FusedErrors.apply(others, *pred)  # type: ignore[no-untyped-call]
    return PairErrors(*errors.unbind())


def _without_symbols(head: Head, pairs: int, device: torch.device) -> Head:
    """A beta or alpha that torch.compile has made symbolic, because it changes from call to call, as a tensor of its
    value: as a number in the operator's arguments it would compile a graph for each value."""
    import torch.fx.experimental.symbolic_shapes as symbolic_shapes

    # torch.compile, which traces this, cannot catch the error of an import that fails.
    if not hasattr(symbolic_shapes, "has_static_value"):  # PyTorch 2.6: a graph for each value
        return head
    beta, alpha = head.beta, head.alpha
    parameters = list(head.parameters)
    ones = torch.ones(pairs, dtype=torch.float64, device=device)
    if beta is None and not symbolic_shapes.has_static_value(parameters[0]):
        beta, parameters[0] = ones * parameters[0], 0.0
    if alpha is None and not symbolic_shapes.has_static_value(parameters[1]):
        alpha, parameters[1] = ones * parameters[1], 0.0
    return Head(beta, alpha, head.weight, parameters)
