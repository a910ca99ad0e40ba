"""The losses written once more, from the papers, in NumPy's extended precision. Shares no code with the library.

Unlike the library it subtracts the mean squared errors as the papers write them; in extended precision (64 bits of
mantissa) that loses less than float64 has.
"""

from dataclasses import dataclass

import numpy as np
import torch

WIDE = np.longdouble


@dataclass
class Expected:
    loss: np.ndarray  # (B,)
    logit: np.ndarray  # (B,)
    gradient: np.ndarray  # (2B, ...) of the sum over pairs
    model_error: np.ndarray  # (2, B)
    ref_error: np.ndarray  # (2, B)


def poly_dpo(pred, ref, target, beta=5000.0, alpha=0.0) -> Expected:
    """Halves layout; a target with half the rows is shared."""
    pred, ref, target = (wide(x) for x in (pred, ref, target))
    pairs = len(pred) // 2
    if len(target) == pairs:
        target = np.concatenate((target, target))
    axes = tuple(range(1, pred.ndim))
    m = np.square(pred - target).mean(axis=axes).reshape(2, pairs)
    r = np.square(ref - target).mean(axis=axes).reshape(2, pairs)
    z = -WIDE(beta) / 2 * ((m[0] - r[0]) - (m[1] - r[1]))
    with np.errstate(over="ignore"):
        p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    loss = np.logaddexp(WIDE(0), -z) + WIDE(alpha) * q
    slope = -q * (1 + WIDE(alpha) * p)
    size = pred[0].size
    # dz/dpred_w = -beta/2 * 2/D (pred_w - target), the loser's with the other sign.
    per_sample = np.concatenate((-slope, slope)) * WIDE(beta) / size
    gradient = per_sample.reshape(-1, *(1,) * len(axes)) * (pred - target)
    return Expected(loss, z, gradient, m, r)


def wide(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy().astype(WIDE)


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at each value; subnormal spacing near zero."""
    info = torch.finfo(dtype)
    magnitude = np.maximum(np.abs(values.astype(np.float64)), info.tiny)
    return 2.0 ** np.floor(np.log2(magnitude)) * info.eps


def full(
    pred_w,
    pred_l,
    target_w,
    target_l,
    *,
    ref=None,
    ref_error=None,
    beta=5000.0,
    alpha=(0.0,),
    objective="poly_dpo",
    smoothing=0.0,
    margin=0.0,
    sft_weight=0.0,
    weight=1.0,
    mask=None,
):
    """Every option, arms apart. ref: (win, lose); ref_error: (win, lose) of (B,); both None: reference-free.

    beta, alpha[j] and weight may be arrays of (B,). Returns losses (B,), logits (B,), gradients (win, lose).
    """
    pred, target = [wide(pred_w), wide(pred_l)], [wide(target_w), wide(target_l)]
    pairs = len(pred[0])
    keep = np.ones_like(pred[0], dtype=bool) if mask is None else np.broadcast_to(mask, pred[0].shape)
    size = keep.reshape(pairs, -1).sum(axis=1)

    def error(x, t):
        return (np.where(keep, x - t, 0) ** 2).reshape(pairs, -1).sum(axis=1) / size

    m = [error(x, t) for x, t in zip(pred, target, strict=True)]
    if ref is not None:
        r = [error(wide(x), t) for x, t in zip(ref, target, strict=True)]
    elif ref_error is not None:
        r = [wide(x) for x in ref_error]
    else:
        r = [np.zeros(pairs, WIDE)] * 2
    z = -WIDE(0.5) * beta * ((m[0] - r[0]) - (m[1] - r[1]))
    loss, slope = _smoothed(objective, z - margin, beta, alpha, WIDE(smoothing))
    shape = (-1, *(1,) * (pred[0].ndim - 1))
    win = weight * (slope * -beta + 2 * sft_weight) / size
    lose = weight * slope * beta / size
    gradient = [
        np.where(keep, c.reshape(shape) * (x - t), 0) for c, x, t in zip((win, lose), pred, target, strict=True)
    ]
    return weight * (loss + sft_weight * m[0]), z, gradient


def _smoothed(objective, z, beta, alpha, e):
    (kept, kept_slope), (flipped, flipped_slope) = _plain(objective, z, beta, alpha), _plain(objective, -z, beta, alpha)
    keep, flip = ((1 - e) / (1 - 2 * e), -e / (1 - 2 * e)) if objective == "robust" else (1 - e, e)
    return keep * kept + flip * flipped, keep * kept_slope - flip * flipped_slope


def _plain(objective, z, beta, alpha):
    with np.errstate(over="ignore"):
        p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    if objective in ("poly_dpo", "robust"):
        alpha = alpha if objective == "poly_dpo" else ()
        loss = np.logaddexp(WIDE(0), -z) + sum(a * q ** (j + 1) for j, a in enumerate(alpha))
        return loss, -q - sum((j + 1) * a * p * q ** (j + 1) for j, a in enumerate(alpha))
    if objective == "ipo":
        return (z / beta - 1 / (2 * WIDE(1) * beta)) ** 2, 2 * (z - 0.5) / beta**2
    if objective == "hinge":
        return np.maximum(0, 1 - z), np.where(z < 1, WIDE(-1), WIDE(0))
    return -z, np.full_like(z, -1)
