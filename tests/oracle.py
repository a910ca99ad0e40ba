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
