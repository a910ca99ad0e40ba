"""The scalar heads of the preference losses: from a pair's logit to its loss and its slope.

This table is the single source for every backend. A head is written in arithmetic alone (+, -, *),
so the same function body runs on PyTorch tensors and is compiled by Triton into the error kernel.
It is given quantities that are already stable in floating point:

    p   = sigmoid(z)          q = 1 - p = sigmoid(-z), not computed by subtraction
    nll = -log p = softplus(-z)

and returns `(loss, dloss/dz)`. Every loss of the family has the gradient `coefficient * (pred - target)`,
so a new objective is a new head and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["OBJECTIVES", "Objective", "poly_dpo"]


@dataclass(frozen=True)
class Objective:
    """One preference loss: its head, and what the documentation says of it."""

    head: Callable[..., Any]
    formula: str
    slope: str
    source: str


def poly_dpo(nll, p, q, alpha):  # type: ignore[no-untyped-def]  # compiled by Triton: annotations would be read as types
    loss = nll + alpha * q
    slope = -q * (1.0 + alpha * p)
    return loss, slope


OBJECTIVES: dict[str, Objective] = {
    "poly_dpo": Objective(
        head=poly_dpo,
        formula="L = -log p + alpha (1 - p)",
        slope="dL/dz = -(1 - p) (1 + alpha p)",
        source="Li et al. 2026 (ViPO, arXiv 2604.24953), Eq. 9-10; alpha = 0 is Diffusion-DPO, "
        "Wallace et al. 2023 (arXiv 2311.12908), Eq. 14",
    ),
}
