"""The truth that losses are held against: errors, objectives, slopes and metrics, written once more, in float64.

From the papers that `polydpo_fast.objectives` names, and on purpose without that module, `metrics` or `reference`, so
that what is wrong there shows. Gradients are closed forms. Beside each sum stand its terms, the absolute values of its
parts added up, by which rounding in float32 is measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case

__all__ = ["Errors", "Exact", "double", "errors_of", "exact_of", "kept_of", "metrics_of", "residual_of", "upstream_of"]


class Errors(NamedTuple):
    """(2, B) each, winners first.

    model: mean squared errors. excess: by how much they exceed the reference's.
    terms: the mean size of what is added up in the excess. size: elements that count.
    """

    model: Tensor
    excess: Tensor
    terms: Tensor
    size: Tensor


class Exact(NamedTuple):
    """Of B pairs, at a logit.

    logit, value, value_terms: (B,). coefficient, coefficient_terms: (2, B), the factor of pred - target in the gradient
    of the reduced loss. autograd_terms: the terms where autograd adds up the slope, instead of one formula.
    """

    logit: Tensor
    value: Tensor
    value_terms: Tensor
    coefficient: Tensor
    coefficient_terms: Tensor
    autograd_terms: Tensor


def errors_of(case: Case) -> Errors:
    kept = kept_of(case)
    size = (torch.ones_like(case.pred[0]).flatten(1) if kept is None else kept).double().sum(dim=1)

    def mean(x: Tensor) -> Tensor:
        return (x if kept is None else x.where(kept, 0.0)).sum(dim=1) / size

    found = []
    for arm in (0, 1):
        pred, target = case.pred[arm].double().flatten(1), case.target[arm].double().flatten(1)
        model = mean((pred - target) ** 2)
        if case.ref is not None:
            ref = case.ref[arm].double().flatten(1)
            # a^2 - b^2 = (a - b) (a + b): float64 has no digits left of the difference of the means either.
            product = (pred - ref) * ((pred - target) + (ref - target))
            excess, terms = mean(product), mean(product.abs())
        elif case.ref_error is not None:
            known = case.ref_error[arm].double()
            excess, terms = model - known, model + known
        else:
            excess, terms = model, model
        found.append(Errors(model, excess, terms, size))
    return Errors(*(torch.stack(x) for x in zip(*found, strict=True)))


def exact_of(case: Case, errors: Errors, logit: Tensor | None = None) -> Exact:
    """At the logits (B,), or at those of the errors."""
    options = case.options
    beta = double(options["beta"])
    if logit is None:
        logit = -beta / 2 * (errors.excess[0] - errors.excess[1])
        logit = logit.where(logit.isfinite(), torch.nan)  # infinite errors say nothing of a preference
    name, e = options["objective"], options.get("label_smoothing", 0.0)
    keep, flip = ((1 - e) / (1 - 2 * e), -e / (1 - 2 * e)) if name == "robust" else (1 - e, e)
    z = logit - options.get("margin", 0.0)
    kept, flipped = _head(name, z, beta, options), _head(name, -z, beta, options)
    sft, weight = options.get("sft_weight", 0.0), double(options.get("pair_weight", 1.0))
    value = weight * (keep * kept.value + flip * flipped.value + sft * errors.model[0])
    value_terms = keep * kept.value_terms + abs(flip) * flipped.value_terms + sft * errors.model[0]
    # dm/dpred = 2/D (pred - target); dz/dpred is -beta/2 of that for the winner, and +beta/2 for the loser.
    scale = weight * upstream_of(case) / errors.size
    slope = keep * kept.slope - flip * flipped.slope
    coefficient = torch.stack((2 * sft - beta * slope, beta * slope)) * scale
    terms = [keep * a + abs(flip) * b for a, b in zip(kept[2:], flipped[2:], strict=True)]
    of_slope, of_autograd = (torch.stack((2 * sft + beta * x, beta * x)) * scale for x in terms[1:])
    return Exact(logit, value, weight * value_terms, coefficient, of_slope, of_autograd)


def metrics_of(errors: Errors, logit: Tensor, beta: Any) -> dict[str, Tensor]:
    """The means that a trainer logs, of B pairs without NaN; see docs/loss.md."""
    reward = -double(beta) / 2 * errors.excess
    per_pair = {
        "implicit_accuracy": (logit.sign() + 1) / 2,
        "reward_win": reward[0],
        "reward_lose": reward[1],
        "reward_margin": reward[0] - reward[1],
        "logit_mean": logit,
        "p_mean": 1 / (1 + (-logit).exp()),
        "saturated": (logit.abs() > 10).double(),
        "false_success": ((logit > 0) & (errors.excess[0] > 0)).double(),
        "ref_mse_win": errors.model[0] - errors.excess[0],
        "ref_mse_lose": errors.model[1] - errors.excess[1],
        "model_mse_win": errors.model[0],
        "model_mse_lose": errors.model[1],
    }
    return {name: x.mean() for name, x in per_pair.items()}


def residual_of(case: Case, arm: int) -> Tensor:
    """pred - target of an arm, (B, ...); 0 where masked."""
    residual = case.pred[arm].double() - case.target[arm].double()
    kept = kept_of(case)
    return residual if kept is None else residual.where(kept.view_as(residual), 0.0)


def upstream_of(case: Case) -> Tensor:
    """(B,): the gradient of each pair's loss."""
    if case.options["reduction"] == "none":
        return case.upstream
    return case.upstream[0].expand(case.pairs) / (case.pairs if case.options["reduction"] == "mean" else 1)


class _Head(NamedTuple):
    value: Tensor
    slope: Tensor  # dvalue/dz
    value_terms: Tensor
    slope_terms: Tensor
    autograd_terms: Tensor


def _head(name: str, z: Tensor, beta: Any, options: dict[str, Any]) -> _Head:
    one = z * 0 + 1  # NaN where z is
    if name in ("poly_dpo", "robust"):
        alpha = options.get("alpha", 0.0)
        alphas = [double(a) for a in (alpha if isinstance(alpha, tuple) else (alpha,))]
        p, q = 1 / (1 + (-z).exp()), 1 / (1 + z.exp())
        softplus = torch.logaddexp(0 * z, -z)  # -log p
        pull = sum((j * a * q ** (j - 1) for j, a in enumerate(alphas, 1)), 0 * z)
        size = sum((j * abs(a) * q ** (j - 1) for j, a in enumerate(alphas, 1)), 0 * z)
        # -q (1 + p pull); near pull = -1 that is q^2, of which 1 - p has no digits.
        slope = -q * torch.where(pull < 0, (1 + pull) - q * pull, 1 + p * pull)
        value = softplus + sum(a * q**j for j, a in enumerate(alphas, 1))
        terms = softplus + sum(abs(a) * q**j for j, a in enumerate(alphas, 1))
        return _Head(value, slope, terms, slope.abs() + q * p * (size - pull.abs()), q * (1 + p * size))
    if name == "ipo":
        slope = 2 * (z - 0.5) / beta**2
        terms = 2 * (z.abs() + 0.5) / beta**2
        return _Head(((z - 0.5) / beta) ** 2, slope, ((z.abs() + 0.5) / beta) ** 2, terms, terms)
    if name == "hinge":
        return _Head((1 - z).clamp_min(0), -one * (z < 1), 1 + z.abs(), one, one)
    if name == "linear":
        return _Head(-z, -one, z.abs(), one, one)
    raise ValueError(f"the check has no closed form of objective {name!r}")


def kept_of(case: Case) -> Tensor | None:
    """Whether an element counts, (B, D), under a mask."""
    mask = case.options.get("mask")
    return None if mask is None else mask.expand_as(case.pred[0]).flatten(1)


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x
