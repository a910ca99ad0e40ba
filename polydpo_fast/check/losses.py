"""One case of a loss on one backend, against the closed forms of `exact`, in float64.

How far a result may be from the exact one, with eps the spacing of the backend's arithmetic at 1 (float32, or float64
for float64 inputs):

    logit       1e-5 |z|, and 4 eps of the terms that cancel in it; 0 where the policy is the reference
    gradient    half an ulp of its dtype, which is its rounding, and 1e-6 of its terms, at the logit that came out:
                float32 rounds the coefficient, the residual and their product
    bias        in 16 bits, 0.02 ulp away from 0 in the mean, of what is nearest
    value       1e-6 of its terms, at the logit that came out
    metrics     as logit and value; shares are exact, unless a logit is as near to their threshold as its error
    pair_errors as value, logit and gradient, under any upstream gradients

For float64 inputs 1e-5 and 1e-6 are 1e-12. Terms are of one sign: the parts of a sum by their size. Below the smallest
normal number digits are lost, and may be flushed to 0. The reference backend computes all of it in the backends'
arithmetic, others the sums above a few hundred elements and the objectives in float64.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .. import functional
from .cases import Arms, Case, arranged
from .exact import Errors, Exact, double, errors_of, exact_of, kept_of, metrics_of, residual_of, upstream_of
from .report import Finding, must

__all__ = ["GATES", "examine", "examine_compiled", "examine_errors", "examine_operators", "quiet", "ulp_at"]

GATES = {
    "logit": "1e-5, 4 eps of terms",
    "value": "1e-6",
    "gradient": "0.5 ulp + 1e-6",
    "bias": "0.02 ulp in the mean",
    "metrics": "1e-6, as logit",
    "pair_errors": "as logit, gradient",
    "NaN and Inf": "their pair alone",
    "determinism": "bit for bit",
    "one pair alone": "bit for bit, but GPU's fp64",
    "torch.compile": "bit for bit",
    "opcheck": "no failure",
    "runs": "no exception",
}

# Of the loss. Options that equal them are left out of the call, so that the defaults are checked too.
_DEFAULTS = {"beta": 5000.0, "alpha": 0.0, "objective": "poly_dpo", "reduction": "mean"}

_BIAS = 0.02  # ulp; truncation makes 0.5, a bfloat16 gradient that is 0.15% too small about 0.3


class _Result(NamedTuple):
    value: Tensor  # () or (B,)
    gradient: Arms
    metrics: dict[str, Tensor]


class _Arithmetic(NamedTuple):
    """What the backend computes a case with, and how far off it may be by that.

    dtype, eps, tiny: of values and metrics. relative: of a result, to its terms.
    ulps: of a gradient's rounding to its dtype. sums: how far, relative to it, the model's errors may be off where no
    reference's prediction is given and these cancel with a number.
    autograd: whether slopes are what autograd adds up.
    """

    dtype: torch.dtype
    eps: float
    tiny: float
    relative: float
    ulps: float
    sums: float
    autograd: bool

    @classmethod
    def of(cls, case: Case, backend: str, device: str) -> _Arithmetic:
        dtype = torch.float64 if case.double else torch.float32
        eps, relative = torch.finfo(dtype).eps, 1e-12 if case.double else 1e-6
        # Triton's interpreter truncates float32 to bfloat16 where a GPU rounds.
        truncated = backend == "triton" and device == "cpu" and case.pred[0].dtype == torch.bfloat16
        sums = relative if backend == "reference" else 4 * eps
        tiny = torch.finfo(dtype).tiny
        return cls(dtype, eps, tiny, relative, 1.0 if truncated else 0.5, sums, backend == "reference")


def examine(case: Case, errors: Errors, backend: str, device: str) -> Iterator[Finding]:
    """All checks of one case, whose errors these are, as far as they apply to it."""
    by = _Arithmetic.of(case, backend, device)
    exact = exact_of(case, errors)
    beta = double(case.options["beta"])

    # The objective "linear" is -z, which shows the logit.
    linear = {"objective": "linear", "reduction": "none", "alpha": 0.0, "label_smoothing": 0.0, "margin": 0.0}
    logit = -_value(case, backend, device, **linear, sft_weight=0.0, pair_weight=None).double()
    underflow = 0.5 * beta * (1e-300 if case.double else 1e-37) * (errors.terms.sum(dim=0) > 0)
    noise = 0.5 * beta * _noise(case, errors, by).sum(dim=0) + underflow
    off = (10 * by.relative) * exact.logit.abs() + noise
    yield _compared("logit", logit, exact.logit, off, by.dtype)

    # All else has to be right at the logit that came out, or next to it, since it was rounded on the way.
    came_out = logit.where(logit.isfinite() & exact.logit.isfinite(), exact.logit)
    exact = exact_of(case, errors, came_out)
    rounding = (by.eps * came_out.abs() + underflow).nan_to_num(0.0)
    nearby = [exact_of(case, errors, came_out + sign * rounding) for sign in (-1, 1)]
    given = _arguments(case, device)
    result = _run(case, backend, given)
    value_off = by.relative * exact.value_terms + by.tiny
    value_off = value_off + torch.stack([(n.value - exact.value).abs() for n in nearby]).amax(dim=0)
    reduction = case.options["reduction"]
    yield _compared("value", result.value, _reduced(exact.value, reduction), _reduced(value_off, reduction), by.dtype)

    poisoned = exact.value.isnan()
    yield from _gradient(case, exact, nearby, result.gradient, by)
    if poisoned.any():
        yield _poison_stays(case, backend, device, result, poisoned)
    else:
        yield _metrics(case, came_out, errors, result, off, by)
        yield examine_errors(case, errors, backend, device)
    if backend != "reference":
        with _other_threads():
            again = _run(case, backend, given, again=True)
        yield _same("determinism", _bits(result), _bits(again))
        if case.pairs > 1 and reduction == "none":
            pair = case.number % case.pairs
            only = case.only(pair)
            if case.double and backend == "triton" and device != "cpu":
                # There the order of float64's sums depends on how the memory is aligned: within the gates is all.
                found = itertools.islice(examine(only, errors_of(only), backend, device), 3)
                yield max(found, key=lambda finding: finding.share)._replace(check="one pair alone")
                return
            alone = _run(only, backend, _arguments(only, device))
            whole = [result.value[pair : pair + 1], *(x[pair : pair + 1] for x in result.gradient)]
            yield _same("one pair alone", whole, [alone.value, *alone.gradient])


def examine_errors(case: Case, exact: Errors, backend: str, device: str, gradient: bool = True) -> Finding:
    """The errors of `pair_errors`, and their gradient under random upstream gradients of all four."""
    by = _Arithmetic.of(case, backend, device)
    (pred, ref, target), options = _arguments(case, device)
    few = {name: options[name] for name in ("reference_free", "ref_error", "mask", "layout") if name in options}
    leaves = _leaves(pred)
    given = tuple(leaves) if isinstance(pred, tuple) else leaves[0]
    errors = torch.stack(functional.pair_errors(given, ref, target, **few, backend=backend))
    allowed = torch.cat((by.relative * exact.model, _excess_off(case, exact, by))) + by.tiny
    expected = torch.cat((exact.model, exact.excess))
    found = [_compared("pair_errors", errors.detach().cpu(), expected, allowed, by.dtype)]
    if gradient:
        upstream = case.of_errors.to(errors.device, errors.dtype)
        given_back = _by_arms(torch.autograd.grad(errors, leaves, upstream), case.layout)
        for arm in (0, 1):
            of_model, of_excess = case.of_errors[arm], case.of_errors[2 + arm]
            scale, terms = 2 * (of_model + of_excess), 2 * (of_model.abs() + of_excess.abs())
            found += _elements(
                case, arm, given_back[arm], scale / exact.size[arm], by.relative * terms / exact.size[arm], by
            )[:1]
    return max(found, key=lambda finding: finding.share)._replace(check="pair_errors")


def examine_compiled(case: Case, backend: str, device: str, compiler: str) -> Finding:
    """One graph, forward and backward, bit for bit what eager mode gives; also where beta and alpha have changed."""
    inputs, options = _arguments(case, device)

    def step(pred: Any, ref: Any, target: Any, numbers: dict[str, float]) -> Tensor:
        value: Tensor = functional.loss(pred, ref, target, **{**options, **numbers}, backend=backend)
        return value.sum() * 2.0

    torch._dynamo.reset()
    numbers = {name: x for name, x in case.options.items() if name in ("beta", "alpha") and isinstance(x, float)}
    changed = {name: abs(x) + 0.25 for name, x in numbers.items()}
    results: list[list[Tensor]] = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        results.append([])
        for given in (numbers, changed) if numbers else (numbers,):
            leaves = _leaves(inputs[0])
            value = function(leaves if isinstance(inputs[0], tuple) else leaves[0], *inputs[1:], given)
            results[-1] += [value.detach(), *torch.autograd.grad(value, leaves)]
    return _same("torch.compile", *results)


def examine_operators(case: Case, backend: str, device: str) -> Finding:
    """What PyTorch asks of operators, of the two that the loss consists of."""
    (pred, ref, target), _ = _arguments(replace(case, layout="halves", kind="own"), device)
    ours = torch.ops.polydpo_fast
    parameters = [10.0, 1.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.0, 0.5]  # beta, four alphas, keep, flip, margin, sft_weight
    given = [pred], [] if ref is None else [ref], [target], *[None] * 5, parameters
    name = case.options["objective"]
    library.opcheck(ours.pair_loss.default, (*given, name, "halves", "none", backend))
    coefficients = torch.ones(case.pairs, 2, dtype=torch.float64, device=device)
    one = torch.ones((), device=device)
    library.opcheck(ours.pair_gradient.default, ([pred], [target], None, coefficients, one, "halves", backend))
    return must("opcheck", True)


@contextmanager
def quiet() -> Iterator[None]:
    """Triton's interpreter computes in NumPy, which warns of what the kernels do on purpose: NaN and Inf go through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# ------------------------------------------------------------------------------------------------ running


_Arguments = tuple[tuple[Any, Any, Any], dict[str, Any]]


def _arguments(case: Case, device: str) -> _Arguments:
    """What the loss takes, on the device, in the case's layout and memory."""

    def moved(arms: Arms) -> Arms:
        return arms[0].to(device), arms[1].to(device)

    of_pred, of_ref, of_target = case.memory
    pred = arranged(moved(case.pred), case.layout, of_pred)
    ref = None if case.ref is None else arranged(moved(case.ref), case.layout, of_ref)
    target = moved(case.target)
    if case.kind == "expanded":
        one = target[0][:1]
        given: Any = one.expand(2 * case.pairs if case.layout != "tuple" else case.pairs, *one.shape[1:])
    else:
        given = arranged(target, case.layout, of_target, shared=case.kind == "shared")
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    if case.ref_error is not None:
        options["ref_error"] = arranged(moved(case.ref_error), case.layout, "contiguous")
    if case.number % 2:
        options = {name: x if name == "mask" else _spread(x) for name, x in options.items()}
    if case.layout == "interleaved":
        options["layout"] = "interleaved"
    said = {name: x for name, x in options.items() if isinstance(x, Tensor) or x != _DEFAULTS.get(name)}
    return (pred, ref, given), said


def _leaves(pred: Any) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in (pred if isinstance(pred, tuple) else (pred,))]


def _spread(x: Any) -> Any:
    """Numbers of pairs, (B,), with others between them that must not be read; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(map(_spread, x))
    return torch.stack((x, torch.full_like(x, 77.0)), dim=1)[:, 0] if isinstance(x, Tensor) else x


def _value(case: Case, backend: str, device: str, **changes: Any) -> Tensor:
    """The loss alone, on the CPU, where no gradient is wanted."""
    inputs, options = _arguments(case, device)
    with torch.no_grad():
        value: Tensor = functional.loss(*inputs, **{**options, **changes}, backend=backend)
    return value.cpu()


def _run(case: Case, backend: str, given: _Arguments, again: bool = False) -> _Result:
    """Results on the CPU, gradients by arms. again: the gradient of a second backward pass through one graph."""
    (pred, ref, target), options = given
    leaves = _leaves(pred)
    value, metrics = functional.loss(
        tuple(leaves) if isinstance(pred, tuple) else leaves[0],
        ref,
        target,
        **options,
        return_metrics=True,
        backend=backend,
    )
    upstream = case.upstream.to(value.device, value.dtype)
    upstream = _spread(upstream) if case.upstream.stride(0) else upstream[:1].expand(case.pairs)
    upstream = upstream if value.dim() else upstream[0]
    if again:
        torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    grads = torch.autograd.grad(value, leaves, upstream)
    return _Result(value.detach().cpu(), _by_arms(grads, case.layout), {k: v.cpu() for k, v in metrics.items()})


def _by_arms(grads: tuple[Tensor, ...], layout: str) -> Arms:
    if len(grads) == 2:
        return grads[0].cpu(), grads[1].cpu()
    both = grads[0].cpu()
    if layout == "interleaved":
        return both[0::2], both[1::2]
    win, lose = both.chunk(2)
    return win, lose


@contextmanager
def _other_threads() -> Iterator[None]:
    """Another number of them for what runs on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _reduced(x: Tensor, reduction: str) -> Tensor:
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


# -------------------------------------------------------------------------------------------- comparisons


def _compared(check: str, actual: Tensor, expected: Tensor, allowed: Tensor, dtype: torch.dtype) -> Finding:
    """The element that is nearest to its gate. NaN must meet NaN; what rounds to the result is right.

    Beyond the range of the dtype anything will do that is not finite.
    """
    actual = actual.detach().double()
    error = (actual - expected).abs()
    beyond = (expected.abs() > torch.finfo(dtype).max) & ~actual.isfinite()
    error[(actual == expected.to(dtype).double()) | (actual.isnan() & expected.isnan()) | beyond] = 0.0
    share = (error / allowed).where(error != 0, 0.0).nan_to_num(torch.inf, torch.inf).flatten()
    if not len(share):
        return Finding(check, 0.0)
    worst = int(share.argmax())
    error, expected = error.flatten()[worst], expected.flatten()[worst]
    if not error.isfinite():
        return Finding(check, torch.inf, note=f"{float(actual.flatten()[worst])} instead of {float(expected):.6g}")
    return Finding(
        check,
        float(share[worst]),
        float(error / ulp_at(expected, dtype)),
        float(error / expected.abs()) if error > 0 else 0.0,
    )


def ulp_at(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of the dtype at each value."""
    info = torch.finfo(dtype)
    # frexp's mantissas are from 1/2 to 1.
    exponent = x.abs().clamp(info.tiny, info.max).frexp().exponent
    return torch.ldexp(torch.full_like(x, info.eps / 2), exponent)


def _same(check: str, expected: list[Tensor], actual: list[Tensor]) -> Finding:
    for a, b in zip(actual, expected, strict=True):
        if not torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) or not torch.equal(a.isnan(), b.isnan()):
            difference = (a.double() - b.double()).abs().nan_to_num(0.0).max()
            return must(check, False, f"not bit for bit: {float(difference):.3g} apart")
    return must(check, True)


def _bits(result: _Result) -> list[Tensor]:
    return [result.value, *result.gradient, *result.metrics.values()]


def _poison_stays(case: Case, backend: str, device: str, result: _Result, poisoned: Tensor) -> Finding:
    """A NaN makes its pair's value NaN and no other's, and reaches its gradient."""
    value = _value(case, backend, device, reduction="none")
    if not torch.equal(value.isnan(), poisoned):
        return must("NaN and Inf", False, f"NaN in {value.isnan().tolist()}, not in {poisoned.tolist()}")
    for pair in poisoned.nonzero().flatten().tolist():
        if not any(x[pair].isnan().any() for x in result.gradient):
            return must("NaN and Inf", False, f"the gradient of pair {pair} has no NaN")
    return must("NaN and Inf", True)


def _noise(case: Case, errors: Errors, by: _Arithmetic) -> Tensor:
    """How far what cancels in the excesses leaves them off, (2, B)."""
    share = 4 * by.eps if case.ref is not None else by.sums
    return (4 if case.double else 1) * share * errors.terms  # in float64 the exact one has noise of its own


def _excess_off(case: Case, errors: Errors, by: _Arithmetic) -> Tensor:
    return 10 * by.relative * errors.excess.abs() + _noise(case, errors, by) + (errors.terms > 0) * 1e-37


def _gradient(case: Case, exact: Exact, nearby: list[Exact], gradient: Arms, by: _Arithmetic) -> Iterator[Finding]:
    beyond = exact.value.abs() > torch.finfo(by.dtype).max
    if beyond.any():  # so may be the gradient
        return
    terms = exact.autograd_terms if by.autograd else exact.coefficient_terms
    off = torch.stack([(n.coefficient - exact.coefficient).abs() for n in nearby]).amax(dim=0)
    off = off + by.relative * terms + by.tiny * (1 + double(case.options["beta"]) * upstream_of(case))
    found = [x for arm in (0, 1) for x in _elements(case, arm, gradient[arm], exact.coefficient[arm], off[arm], by)]
    for check in ("gradient", "bias"):
        of_check = [finding for finding in found if finding.check == check]
        if of_check:
            yield max(of_check, key=lambda finding: finding.share)


def _elements(case: Case, arm: int, actual: Tensor, scale: Tensor, off: Tensor, by: _Arithmetic) -> list[Finding]:
    """An arm's gradient against scale (B,) times pred - target: each element, and their mean.

    off: (B,), by how much the scale may be off.
    """
    dtype = actual.dtype
    residual = residual_of(case, arm)
    shape = (-1, *(1,) * (residual.dim() - 1))
    expected = scale.view(shape) * residual
    kept = kept_of(case)
    if kept is not None:
        expected = expected.where(kept.view_as(residual), 0.0)  # also where the scale is NaN
    ulp = ulp_at(expected, dtype)
    allowed = off.view(shape) * residual.abs() + by.ulps * ulp + by.tiny
    if dtype != torch.float64:
        allowed += 1e-6 * expected.abs()  # from float64 it may be rounded to float32 on the way
    found = [_compared("gradient", actual, expected, allowed, dtype)]
    if dtype in (torch.bfloat16, torch.float16) and by.ulps == 0.5:
        seen = (expected != 0) & (off.view(shape) * residual.abs() < 0.01 * ulp)
        found += _bias(actual[seen], expected[seen], ulp[seen])
    return found


def _bias(actual: Tensor, expected: Tensor, ulp: Tensor) -> Iterator[Finding]:
    """The mean distance from the nearest number of the dtype, away from 0, if there are elements enough."""
    nearest = expected.to(actual.dtype).double()
    clear = (expected - nearest).abs() < 0.49 * ulp  # a tie may fall to either side
    away = ((actual.double() - nearest) * expected.sign() / ulp)[clear].nan_to_num(0.0, 0.0, 0.0)
    if len(away) > 1000:
        mean = abs(float(away.mean()))
        yield Finding("bias", mean / _BIAS, mean)


def _metrics(case: Case, z: Tensor, errors: Errors, result: _Result, off: Tensor, by: _Arithmetic) -> Finding:
    """At the logits that came out, off from the exact ones by so much at most."""
    half_beta = 0.5 * double(case.options["beta"])
    of_excess, of_model = _excess_off(case, errors, by), by.relative * errors.model
    allowed = {
        "implicit_accuracy": (z.abs() <= off) & (off > 0),
        "reward_win": half_beta * of_excess[0],
        "reward_lose": half_beta * of_excess[1],
        "reward_margin": half_beta * of_excess.sum(dim=0),
        "logit_mean": off,
        "p_mean": off,
        "model_mse_win": of_model[0],
        "model_mse_lose": of_model[1],
        "ref_mse_win": of_excess[0] + of_model[0],
        "ref_mse_lose": of_excess[1] + of_model[1],
        "saturated": (z.abs() - 10).abs() <= off,
        "false_success": (z.abs() <= off) | (errors.excess[0].abs() <= of_excess[0]),
    }
    expected = metrics_of(errors, z, case.options["beta"])
    if set(expected) != set(result.metrics):
        return must("metrics", False, f"they are {sorted(result.metrics)}")
    found = []
    for name, exact in expected.items():
        within = allowed[name].double().mean() + by.relative * exact.abs() + by.tiny
        finding = _compared("metrics", result.metrics[name], exact, within, by.dtype)
        note = f"{name} is {result.metrics[name]:.8g} instead of {exact:.8g}" if finding.share > 1 else ""
        found.append(finding._replace(note=note))
    return max(found, key=lambda finding: finding.share)
