"""The specification of the losses in plain PyTorch. Written to be read; every backend is held against it.

With B pairs and D elements per sample, arms w (winner) and l (loser):

    m_a   = mean_D (pred_a - target_a)^2        policy error of arm a
    r_a   = mean_D (ref_a  - target_a)^2        reference error of arm a
    delta = (m_w - r_w) - (m_l - r_l)
    z     = -beta/2 delta                       p = sigmoid(z)
    loss  = weight (head(z - margin) + sft_weight m_w), see polydpo_fast.objectives

Sources: Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908), Li et al. 2026 (ViPO, arXiv 2604.24953).

Inputs may have any floating dtype, also mixed; the arithmetic is done in float64 if one of them is float64
and in float32 otherwise. Gradients come from autograd. Arguments are those of `polydpo_fast.loss`, which
checks them; these functions do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .layout import Arms
from .metrics import pair_metrics
from .objectives import MAX_ALPHAS, OBJECTIVES

__all__ = ["PairErrors", "loss", "pair_errors"]


class PairErrors(NamedTuple):
    """What the objectives are made of, for B pairs, each of shape (B,).

    model_win, model_lose: the policy's mean squared errors m.
    excess_win, excess_lose: m - r, by how much they exceed the reference's. Not computed as that difference, so
        precise while the policy is close to the reference.
    """

    model_win: Tensor
    model_lose: Tensor
    excess_win: Tensor
    excess_lose: Tensor

    def logit(self, beta: float | Tensor) -> Tensor:
        """z = -beta/2 ((m_w - r_w) - (m_l - r_l)), (B,). beta: a float, or a (B,) tensor."""
        if isinstance(beta, Tensor) and beta.dim() and beta.shape != self.excess_win.shape:
            raise ValueError(f"beta has shape {tuple(beta.shape)}; expected {tuple(self.excess_win.shape)}")
        return -0.5 * beta * (self.excess_win - self.excess_lose)


def pair_errors(
    model_pred: Arms,
    ref_pred: Arms | None,
    target: Arms,
    *,
    reference_free: bool = False,
    ref_error: Arms | None = None,
    mask: Tensor | None = None,
    layout: str = "halves",
) -> PairErrors:
    """As `polydpo_fast.pair_errors`, in plain PyTorch.

    The excess is not computed by subtracting two nearly equal means, which would lose all digits while the
    policy is close to the reference, but from a^2 - b^2 = (a - b)(a + b), element by element. Its gradient is that
    of m, since r is a constant, and is taken from there: through the product it would be a sum that cancels.
    """
    preds = _arms(model_pred, layout)
    refs: Sequence[Tensor | None] = (None, None) if ref_pred is None else _arms(ref_pred, layout)
    pairs = len(preds[0])
    shared = isinstance(target, Tensor) and len(target) == pairs
    targets = _arms((target, target) if shared else target, layout)  # type: ignore[arg-type]
    known: Sequence[Tensor | None] = (None, None) if ref_error is None else _arms(ref_error, layout)
    dtype = torch.float32
    for x in (*preds, *refs, *targets):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    keep = None if mask is None else mask.expand(torch.broadcast_shapes(mask.shape, preds[0].shape)).flatten(1)

    def mean(x: Tensor) -> Tensor:
        return x.mean(dim=1) if keep is None else x.where(keep, 0).sum(dim=1) / keep.sum(dim=1)

    model, excess = [], []
    for pred, ref, tgt, r in zip(preds, refs, targets, known, strict=True):
        pred, tgt = (x.to(dtype).flatten(start_dim=1) for x in (pred, tgt.detach()))
        if keep is not None:
            pred, tgt = pred.where(keep, 0), tgt.where(keep, 0)
        residual = pred - tgt
        m = mean(residual.square())
        model.append(m)
        if reference_free:
            excess.append(m)
        elif r is not None:
            excess.append(m - r.detach().to(dtype))
        else:
            assert ref is not None
            ref = ref.detach().to(dtype).flatten(start_dim=1)
            difference = mean(((pred - ref) * (residual + (ref - tgt))).detach())
            excess.append(difference + (m - m.detach()))
    return PairErrors(*model, *excess)


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """As `polydpo_fast.loss`, in plain PyTorch."""
    errors = pair_errors(
        model_pred, ref_pred, target, reference_free=reference_free, ref_error=ref_error, mask=mask, layout=layout
    )
    logit = errors.logit(beta)
    logit = logit * (1 + 0 * logit)  # Inf becomes NaN, in the slope too: it is no evidence of a preference
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
    alphas += [0.0] * (MAX_ALPHAS - len(alphas))

    def head(z: Tensor) -> Tensor:
        value, _slope = OBJECTIVES[objective].head(
            z, torch.sigmoid(z), torch.sigmoid(-z), -logsigmoid(z), -logsigmoid(-z), beta, *alphas
        )
        result: Tensor = value
        return result

    keep, flip = OBJECTIVES[objective].smoothing(label_smoothing)
    per_pair = keep * head(logit - margin)
    if flip:
        per_pair = per_pair + flip * head(margin - logit)
    if sft_weight:
        per_pair = per_pair + sft_weight * errors.model_win
    if pair_weight is not None:
        per_pair = per_pair * pair_weight.to(per_pair.dtype)
    per_pair = per_pair.to(errors.model_win.dtype)
    value = per_pair.mean() if reduction == "mean" else per_pair.sum() if reduction == "sum" else per_pair
    if return_metrics:
        return value, pair_metrics(errors, logit, beta)
    return value


def _arms(x: Arms, layout: str) -> tuple[Tensor, Tensor]:
    """(win, lose) of a tuple, of halves [w0; w1; ...; l0; l1; ...] or of [w0; l0; w1; l1; ...]."""
    if not isinstance(x, Tensor):
        win, lose = x
    elif layout == "interleaved":
        win, lose = x[0::2], x[1::2]
    else:
        win, lose = x.chunk(2)
    return win, lose
