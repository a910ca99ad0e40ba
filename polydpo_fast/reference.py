"""The specification of the losses in plain PyTorch. Written to be read; every backend is held against it.

With B pairs and D elements per sample, arms w (winner) and l (loser):

    m_a   = mean_D (pred_a - target_a)^2        policy error of arm a
    r_a   = mean_D (ref_a  - target_a)^2        reference error of arm a
    delta = (m_w - r_w) - (m_l - r_l)
    z     = -beta/2 delta                       p = sigmoid(z)
    loss  = head(z)                             see polydpo_fast.objectives

Sources: Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908), Li et al. 2026 (ViPO, arXiv 2604.24953).

Inputs may have any floating dtype, also mixed; the arithmetic is done in float64 if one of them is float64
and in float32 otherwise. Gradients come from autograd. Arguments are those of `polydpo_fast.loss`, which
checks them; these functions do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .metrics import pair_metrics
from .objectives import OBJECTIVES

__all__ = ["loss", "pair_errors"]


def pair_errors(
    model_pred: Tensor | Sequence[Tensor],
    ref_pred: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The policy's errors m and their excess m - r over the reference's, each of shape (2, B): [win; lose].

    The excess is not computed by subtracting two nearly equal means, which would lose all digits while the
    policy is close to the reference, but from a^2 - b^2 = (a - b)(a + b), element by element. Its gradient is that
    of m, since r is a constant, and is taken from there: through the product it would be a sum that cancels.
    """
    model_error, excess_error = [], []
    for pred, ref, tgt in zip(_arms(model_pred), _arms(ref_pred), _arms(target, model_pred), strict=True):
        dtype = torch.promote_types(
            torch.promote_types(pred.dtype, ref.dtype), torch.promote_types(tgt.dtype, torch.float32)
        )
        pred, ref, tgt = (x.to(dtype).flatten(start_dim=1) for x in (pred, ref.detach(), tgt.detach()))
        residual = pred - tgt
        error = residual.square().mean(dim=1)
        excess = ((pred - ref) * (residual + (ref - tgt))).mean(dim=1).detach()
        model_error.append(error)
        excess_error.append(excess + (error - error.detach()))
    return torch.stack(model_error), torch.stack(excess_error)


def loss(
    model_pred: Tensor | Sequence[Tensor],
    ref_pred: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    beta: float = 5000.0,
    alpha: float = 0.0,
    objective: str = "poly_dpo",
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """As `polydpo_fast.loss`, in plain PyTorch."""
    model_error, excess_error = pair_errors(model_pred, ref_pred, target)
    delta = excess_error[0] - excess_error[1]
    logit = -0.5 * beta * delta
    logit = logit + 0 * logit  # Inf becomes NaN: an infinite error is no evidence of a preference
    per_pair, _slope = OBJECTIVES[objective].head(
        nll=-logsigmoid(logit), p=torch.sigmoid(logit), q=torch.sigmoid(-logit), alpha=alpha
    )
    value: Tensor = {"mean": per_pair.mean, "sum": per_pair.sum, "none": lambda: per_pair}[reduction]()
    if return_metrics:
        return value, pair_metrics(model_error, excess_error, logit, 0.5 * beta)
    return value


def _arms(x: Tensor | Sequence[Tensor], like: Tensor | Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(win, lose) of a tuple or of halves; a target with half the rows of `like` is shared by both arms."""
    if not isinstance(x, Tensor):
        win, lose = x
        return win, lose
    if like is not None:
        pairs = like.shape[0] // 2 if isinstance(like, Tensor) else like[0].shape[0]
        if x.shape[0] == pairs:
            return x, x
    win, lose = x.chunk(2)
    return win, lose
