"""The scalar heads of the preference losses: from a pair's logit to its loss and its slope.

This table is the single source for every backend. A head is straight-line arithmetic (+, -, *, /, <, >), so the same
function body runs on PyTorch tensors, is compiled by Triton into the error kernel, and is recorded as a short program
for the C++ backend (`fused/programs.py`). It is given quantities that are already stable in floating point,

    z                       the logit, less the margin
    p = sigmoid(z)          q = sigmoid(-z) = 1 - p, not computed by subtraction
    nlp = -log p            nlq = -log q
    beta                    the strength of the pull to the reference
    a1 ... a4               Poly-DPO's coefficients

and returns `(loss, dloss/dz)`. Every loss of the family has the gradient `coefficient * (pred - target)`, so a new
objective is a new head here and nothing elsewhere.

Around the head, for every objective: with `label_smoothing` = e the loss is `keep L(z) + flip L(-z)`, the two weights
being the objective's `smoothing(e)`; a `margin` is subtracted from z first; `sft_weight` adds the winner's error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_ALPHAS", "OBJECTIVES", "Objective"]

MAX_ALPHAS = 4
"""How many coefficients Poly-N may have."""

# The heads are compiled by Triton, which would take annotations for types.
# mypy: disable-error-code="no-untyped-def"


def poly_dpo(z, p, q, nlp, nlq, beta, a1, a2, a3, a4):
    loss = nlp + q * (a1 + q * (a2 + q * (a3 + q * a4)))
    c = a1 + q * (2.0 * a2 + q * (3.0 * a3 + q * (4.0 * a4)))  # sum_j j a_j q^(j-1)
    # slope = -q (1 + p c). Near c = -1 and p = 1 that sum cancels; with p = 1 - q it is (1 + c) - q c, which keeps its
    # digits. Only the negative part of c needs it.
    below = (c < 0.0) * c
    slope = -q * ((1.0 + below) - q * below + p * (c - below))
    return loss, slope


def ipo(z, p, q, nlp, nlq, beta, a1, a2, a3, a4):
    distance = (z - 0.5) / beta
    return distance * distance, 2.0 * distance / beta


def hinge(z, p, q, nlp, nlq, beta, a1, a2, a3, a4):
    inside = (z < 1.0) * 1.0
    gap = 1.0 - z
    # gap - gap is 0, and NaN where z is: a comparison with NaN alone would hide it.
    return gap * inside + (gap - gap), (gap - gap) - inside


def linear(z, p, q, nlp, nlq, beta, a1, a2, a3, a4):
    return -z, z - z - 1.0  # -1, and NaN where z is


def conservative(label_smoothing: float) -> tuple[float, float]:
    """A share e of the labels is wrong: the expectation of the loss over the label."""
    return 1.0 - label_smoothing, label_smoothing


def unbiased(label_smoothing: float) -> tuple[float, float]:
    """A share e of the labels is wrong: the combination whose expectation is the loss of the true label."""
    scale = 1.0 / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * scale, -label_smoothing * scale


@dataclass(frozen=True)
class Objective:
    """One preference loss: its head, and what the documentation says of it.

    head: a function of (z, p, q, nlp, nlq, beta, a1, a2, a3, a4), in this order, that returns (loss, dloss/dz).
    formula, slope: the head's, for people.
    source: where it was published.
    takes_alpha: whether the head looks at a1 to a4; else an alpha is refused.
    smoothing: a function of label_smoothing that returns the weights (keep, flip).
    """

    head: Callable[..., Any]
    formula: str
    slope: str
    source: str
    takes_alpha: bool = False
    smoothing: Callable[[float], tuple[float, float]] = conservative


OBJECTIVES: dict[str, Objective] = {
    "poly_dpo": Objective(
        head=poly_dpo,
        formula="L = -log p + sum_j alpha_j (1 - p)^j",
        slope="dL/dz = -(1 - p) - p sum_j j alpha_j (1 - p)^j",
        source="Li et al. 2026 (ViPO, arXiv 2604.24953), Eq. 9-10; without alpha Diffusion-DPO, Wallace et al. 2023 "
        "(arXiv 2311.12908), Eq. 14; with label_smoothing cDPO, Mitchell 2023",
        takes_alpha=True,
    ),
    "robust": Objective(
        head=poly_dpo,
        formula="L = ((1 - e) (-log p) - e (-log (1 - p))) / (1 - 2 e), e = label_smoothing",
        slope="dL/dz = (-(1 - e) (1 - p) - e p) / (1 - 2 e)",
        source="Chowdhury et al. 2024 (Robust DPO, arXiv 2403.00409), Eq. 12",
        smoothing=unbiased,
    ),
    "ipo": Objective(
        head=ipo,
        formula="L = (z / beta - 1 / (2 beta))^2",
        slope="dL/dz = 2 (z - 1/2) / beta^2",
        source="Azar et al. 2023 (IPO, arXiv 2310.12036), Eq. 17",
    ),
    "hinge": Objective(
        head=hinge,
        formula="L = max(0, 1 - z)",
        slope="dL/dz = -1 where z < 1, else 0",
        source="Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425) on DPO's rewards",
    ),
    "linear": Objective(
        head=linear,
        formula="L = -z",
        slope="dL/dz = -1",
        source="Li et al. 2026 (Linear-DPO, arXiv 2605.21123)",
    ),
}
"""By the names that `polydpo_fast.loss` takes as `objective`."""
