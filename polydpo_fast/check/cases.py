"""What the losses are tried on: tensors, options and memory layouts, drawn from a seed and a number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..objectives import OBJECTIVES

__all__ = ["LARGE", "SMALL", "SPECIAL", "Arms", "Case", "Draw", "arranged", "draw"]

T = TypeVar("T")
Arms = tuple[Tensor, Tensor]
"""(win, lose), (B, ...) each."""

_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Of prediction, reference and target, where they are not one. Those of autocast have code of their own in C++; "any"
# draws the three independently.
_AUTOCAST = "fp32/bf16/bf16"
_DTYPES = (*_FLOATS, _AUTOCAST, "fp32/bf16/fp32", "fp32/fp32/bf16", "any", "any")
_EDGES = ("one element", "one pair", "equal", "one ulp", "saturated", "nan", "inf", "tiny", "huge", "cancelling")
_LAYOUTS = ("halves", "interleaved", "tuple")
_MEMORY = ("contiguous", "channels_last", "channel slice", "batch slice", "transposed", "rows with gaps")
_SIZES = ((2, 64), (64, 1500), (1500, 9000))  # elements of a sample
# Objectives with the kinds of alpha they take.
_HEADS: list[tuple[str, Any]] = [
    (name, alpha)
    for name in OBJECTIVES
    for alpha in ((0.0, "number", "tensor", "poly") if name == "poly_dpo" else (None,) * 4)
]
_POLY = (4, 1, 4, 2, 4, 3)  # lengths of successive polynomials

_CYCLE = 40  # of so many successive cases, those at these places are special
_USUAL, _LONG, _MANY, _MASKED, _LARGE = 4, 9, 19, 29, 39
# Pairs, and elements of a sample, in numbers that it takes to reach: several splits of C++'s (32768) in each of several
# pairs; sums of pairs beyond Triton's first block (64); its gradient's second block (1024) under a mask; several of its
# blocks to a program (1.18 million), gradients that C++ writes past the caches (4 MB), slots beyond Triton's first 512.
_SPECIAL = {
    _USUAL: ((2, 6), (64, 1500)),
    _LONG: ((2, 3), (33_000, 100_000)),
    _MANY: ((65, 90), _SIZES[0]),
    _MASKED: ((2, 2), (1100, 3000)),
    _LARGE: ((1, 1), (1_200_000, 1_500_000)),
}
_SPECIAL_DTYPES = ("bf16", "fp16", "fp32", _AUTOCAST)
SPECIAL = {
    name: tuple(range(place, len(_SPECIAL_DTYPES) * _CYCLE, _CYCLE))
    for name, place in (("large", _LARGE), ("long", _LONG), ("many", _MANY), ("masked", _MASKED), ("usual", _USUAL))
}
"""The numbers of the first of these, one of each dtype."""
LARGE = SPECIAL["large"][0]
"""Under a mask; of the other large ones three are not."""
SMALL = SPECIAL["many"][0], SPECIAL["masked"][0], SPECIAL["usual"][0]
"""The first of the special ones that an interpreter has time for."""


@dataclass(frozen=True)
class Case:
    """One call of the loss, with the arms apart and on the CPU.

    ref: None where `ref_error`, (win, lose) of (B,), or `reference_free` takes its place.
    target: (B, ...) twice the same where `kind` is "shared"; all samples the same where it is "expanded".
    options: of the loss, but for the layout. memory: how prediction, reference and target lie there.
    upstream: (B,) float64, the gradient of the loss of each pair, under reduction="none"; its first otherwise. If it
        is one expanded number, so is what the loss is given.
    of_errors: (4, B) float64, the gradients of what `pair_errors` returns.
    """

    number: int
    edge: str
    dtypes: str
    pred: Arms
    ref: Arms | None
    target: Arms
    kind: str
    layout: str
    memory: tuple[str, str, str]
    options: dict[str, Any]
    upstream: Tensor
    of_errors: Tensor
    ref_error: Arms | None = None
    poisoned: str = ""

    @property
    def pairs(self) -> int:
        return len(self.pred[0])

    @property
    def elements(self) -> int:
        return 2 * self.pred[0].numel()

    @property
    def double(self) -> bool:
        """Whether the backends compute in float64."""
        return any(arms is not None and arms[0].dtype == torch.float64 for arms in (self.pred, self.ref, self.target))

    def only(self, pair: int) -> Case:
        """The same with one pair."""

        def cut(arms: Arms) -> Arms:
            return arms[0][pair : pair + 1], arms[1][pair : pair + 1]

        options = dict(self.options)
        for name in ("beta", "alpha", "pair_weight"):
            if isinstance(options.get(name), Tensor):
                options[name] = options[name][pair : pair + 1]
        mask = options.get("mask")
        if mask is not None and mask.dim() == self.pred[0].dim() and len(mask) > 1:
            options["mask"] = mask[pair : pair + 1]
        return replace(
            self,
            pred=cut(self.pred),
            ref=None if self.ref is None else cut(self.ref),
            target=cut(self.target),
            ref_error=None if self.ref_error is None else cut(self.ref_error),
            options=options,
            upstream=self.upstream[pair : pair + 1],
            of_errors=self.of_errors[:, pair : pair + 1],
        )

    def __str__(self) -> str:
        shown = {name: _shown(value) for name, value in self.options.items() if name not in ("objective", "reduction")}
        options = ", ".join(f"{name}={value}" for name, value in shown.items())
        source = "ref_pred" if self.ref else "ref_error" if self.ref_error else "no reference"
        shape = "x".join(map(str, (2 * self.pairs, *self.pred[0].shape[1:])))
        memory = self.memory[0] if len(set(self.memory)) == 1 else "/".join(self.memory)
        return (
            f"{self.options['objective']}, {self.dtypes}, {shape}, {self.layout}, {memory}, {self.kind} target, "
            f"{source}, {self.options['reduction']}, {self.edge or 'usual values'}{self.poisoned}, {options}"
        )


class Draw:
    """The choices of one case. `deal` gives each value equally often: once in as many successive cases."""

    def __init__(self, seed: int, number: int) -> None:
        self._seed, self._number = seed, number
        # Seeded with text: Python hashes it with SHA-512, the same everywhere.
        self._random = random.Random(f"polydpo_fast {seed} {number}")
        self._torch = torch.Generator().manual_seed(self._random.getrandbits(62))

    def deal(self, name: str, values: Sequence[T], every: int = 1) -> T:
        """every: the next value only after so many cases."""
        round_, place = divmod(self._number // every, len(values))
        order = random.Random(f"polydpo_fast {self._seed} {name} {round_}").sample(range(len(values)), len(values))
        return values[order[place]]

    def one_of(self, values: Sequence[T]) -> T:
        return self._random.choice(values)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def between(self, low: float, high: float) -> float:
        """A float32 number: kernels may take their parameters in float32."""
        return float(torch.tensor(self._random.uniform(low, high)))

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self._random.uniform(math.log(low), math.log(high)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._torch, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._torch, dtype=torch.float64)


def draw(seed: int, number: int) -> Case:
    """Case `number` of `seed`. Of 40 in a row some are as large as those of real models, or as usual."""
    d = Draw(seed, number)
    edge = d.deal("edge", (*_EDGES, *("",) * len(_EDGES)))
    objective, alpha = d.deal("objective", _HEADS)
    cycle, place = divmod(number, _CYCLE)
    if place in _SPECIAL:
        dtypes = d.deal("special", _SPECIAL_DTYPES, every=_CYCLE)
        edge = "" if edge in ("one element", "one pair") or place in (_USUAL, _MASKED) else edge
    else:
        dtypes = d.deal("dtypes", _DTYPES)
    if dtypes == "any":
        of_pred, of_ref, of_target = (d.one_of(list(_FLOATS)) for _ in range(3))
        dtypes = f"{of_pred}/{of_ref}/{of_target}"
    of_three = [_FLOATS[name] for name in dtypes.split("/")] * (1 if "/" in dtypes else 3)
    layout = d.deal("layout", _LAYOUTS)
    kind = d.deal("target", ("own", "own", "shared", "expanded"))
    needs_ref = edge in ("equal", "one ulp", "cancelling") or place == _USUAL
    source = "pred" if needs_ref else d.deal("ref", ("pred", "pred", "error", "free"))
    between, sizes = _SPECIAL[place] if place in _SPECIAL else ((1, 6), d.deal("size", _SIZES))
    pairs = 1 if edge == "one pair" else d.integer(*between)
    sample = (1,) * d.integer(1, 3) if edge == "one element" else _sample(d, *sizes)
    pred, ref, target = _tensors(d, edge, pairs, sample, of_three, kind)
    case = Case(
        number=number,
        edge=edge,
        dtypes=dtypes,
        pred=pred,
        ref=ref if source == "pred" else None,
        target=target,
        kind=kind,
        layout=layout,
        memory=_memory(d),
        options={"objective": objective, "reduction": d.deal("reduction", ("mean", "sum", "none"))},
        upstream=1 + d.uniform(pairs).float().double(),
        of_errors=d.normal(4, pairs).float().double(),
        ref_error=_known_errors(ref, target) if source == "error" else None,
    )
    options = case.options
    if source == "free":
        options["reference_free"] = True
    masked = {_LARGE: cycle % 4 == 0, _LONG: cycle % 2 == 1, _MASKED: True}
    if masked.get(place, d.chance(0.3)):
        options["mask"] = _mask(d, pairs, sample)
    if objective == "poly_dpo":
        if alpha == "number":
            alpha = d.one_of((8.0, -0.5, -1.0, d.between(-1, 10)))
        elif alpha == "tensor":
            alpha = (8 * d.uniform(pairs) - 0.5).float()
        elif alpha == "poly":
            alpha = tuple(d.between(-1, 4) for _ in range(_POLY[number // len(_HEADS) % len(_POLY)]))
        options["alpha"] = alpha
    for name, low, high in (("label_smoothing", 0.01, 0.4), ("margin", -1.0, 2.0), ("sft_weight", 0.01, 2.0)):
        if d.chance(0.3):
            options[name] = d.between(low, high)
    if d.chance(0.3):
        options["pair_weight"] = 2 * d.uniform(pairs).to(d.one_of((torch.float32, torch.float64, torch.bfloat16)))
    options["beta"] = _beta(d, case)
    if edge in ("nan", "inf"):
        return _poisoned(d, case)
    return _usual(case) if place == _USUAL else case


def arranged(arms: Sequence[Tensor], layout: str, memory: str, *, shared: bool = False) -> Any:
    """The tensor or tuple that the loss is given, of its own memory."""
    win, lose = arms
    if shared:
        return _in_memory(win, memory)
    if layout == "tuple":
        return _in_memory(win, memory), _in_memory(lose, memory)
    both = torch.stack((win, lose), dim=1).flatten(0, 1) if layout == "interleaved" else torch.cat((win, lose))
    return _in_memory(both, memory)


def _usual(case: Case) -> Case:
    """What most trainings pass, for which C++ has a fast lane from the second call on. `loss.sum()` gives all pairs
    their gradient in one element."""
    options = {name: x for name, x in case.options.items() if isinstance(x, (str, float))}
    return replace(
        case,
        layout="halves",
        memory=("contiguous",) * 3,
        options={"beta": 5000.0, **options, "reduction": "none"},
        upstream=case.upstream[:1].expand(case.pairs),
    )


# ---------------------------------------------------------------------------------------------- tensors


def _sample(d: Draw, low: int, high: int) -> tuple[int, ...]:
    """One to four sides, of about as many elements; no fewer than `low`."""
    numel = d.log_between(low, high)
    sides = []
    for left in range(d.integer(1, 4), 1, -1):
        sides.append(max(1, round(numel ** (1 / left) * d.between(0.5, 1.5))))
        numel /= sides[-1]
    sides.append(max(1, math.ceil(numel)))
    return tuple(sides)


def _tensors(
    d: Draw, edge: str, pairs: int, sample: tuple[int, ...], dtypes: Sequence[torch.dtype], kind: str
) -> tuple[Arms, Arms, Arms]:
    closeness = d.one_of((1e-3, 1e-2, 1e-1, 1.0))
    half = torch.float16 in dtypes
    scale = {"tiny": 1e-3 if half else 1e-15, "huge": 100.0 if half else 1e15}.get(edge, 1.0)
    target = scale * d.normal(2, pairs, *sample)
    if kind != "own":
        target[1] = target[0]
    if kind == "expanded":
        target[:] = target[0, :1].clone()
    pred = (scale * d.normal(2, pairs, *sample)).to(dtypes[0])
    if edge == "cancelling":
        pred[1], target[1] = pred[0], target[0]
    ref = pred.double()
    if edge == "one ulp":
        ref = ref + _ulps(pred) * (d.uniform(*ref.shape) - 0.5).sign()
    elif edge == "cancelling":  # winner and loser moved by the same, but for one element of the winner
        ref = 1.5 * ref
        ref[0].flatten(1)[:, 0] = pred[0].double().flatten(1)[:, 0]
    elif edge != "equal":
        ref = ref + closeness * scale * d.normal(*ref.shape)
    given = pred, ref.to(dtypes[0] if edge == "equal" else dtypes[1]), target.to(dtypes[2])
    return tuple((x[0], x[1]) for x in given)  # type: ignore[return-value]


def _ulps(x: Tensor) -> Tensor:
    info = torch.finfo(x.dtype)
    return 2.0 ** x.double().abs().clamp_min(info.tiny).log2().floor() * info.eps


def _known_errors(ref: Arms, target: Arms) -> Arms:
    win, lose = ((r.double() - t.double()).square().flatten(1).mean(dim=1) for r, t in zip(ref, target, strict=True))
    return win.float(), lose.float()


def _mask(d: Draw, pairs: int, sample: tuple[int, ...]) -> Tensor:
    """Of a sample, of each pair, or constant along the first dimension of a sample; something is left of each."""
    shapes = [(*sample,), (pairs, *sample), (pairs, 1, *sample[1:])]
    shape = d.one_of(shapes if len(sample) > 1 else shapes[:2])
    mask = d.uniform(*shape) < 0.7
    rows = mask[None] if shape == sample else mask
    rows.flatten(1)[:, 0] = True
    if shape == sample and sample[0] == pairs:  # it could be one for each pair without its channels
        return mask[None]
    return mask


def _beta(d: Draw, case: Case) -> float | Tensor:
    """5000, or such that the logits are of the size at which the loss decides something, or beyond all bounds."""
    if case.edge != "saturated" and d.chance(0.3):
        return 5000.0
    size = _excess_between_arms(case)
    wanted = d.log_between(30, 1e4) if case.edge == "saturated" else d.log_between(0.1, 6)
    beta = wanted / size if 1e-20 < size < 1e20 else 1.0
    beta = float(torch.tensor(2 * min(max(beta, 1e-12), 1e12)))
    return beta * (0.5 + d.uniform(case.pairs)).float() if d.chance(0.3) else beta


def _excess_between_arms(case: Case) -> float:
    """About the size of (m_w - r_w) - (m_l - r_l), by which beta is to be chosen; masks change it little."""
    pred, target = (torch.stack(arms).double().flatten(2) for arms in (case.pred, case.target))
    if case.ref is not None:
        ref = torch.stack(case.ref).double().flatten(2)
        excess = ((pred - ref) * (pred - target + ref - target)).mean(dim=2)
    else:
        excess = (pred - target).square().mean(dim=2)
        excess -= 0.0 if case.ref_error is None else torch.stack(case.ref_error).double()
    return float((excess[0] - excess[1]).abs().mean())


def _poisoned(d: Draw, case: Case) -> Case:
    """One element of one pair is NaN or infinite."""
    names = ["pred"]
    if case.kind == "own":
        names += ["target"] if case.ref is None else ["ref", "target"]
    name = d.one_of(names)
    arm, pair = d.integer(0, 1), d.integer(0, case.pairs - 1)
    arms = [x.clone() for x in getattr(case, name)]
    row = arms[arm][pair].view(-1)
    where = d.integer(0, len(row) - 1)
    row[where] = math.nan if case.edge == "nan" else d.one_of((math.inf, -math.inf))
    changed: dict[str, Any] = {name: tuple(arms)}
    return replace(case, **changed, poisoned=f" in {name} of pair {pair}")


# ----------------------------------------------------------------------------------------------- memory


def _memory(d: Draw) -> tuple[str, str, str]:
    first = d.deal("memory", _MEMORY)
    return (first, first, first) if d.chance(0.5) else (first, d.one_of(_MEMORY), d.one_of(_MEMORY))


def _in_memory(x: Tensor, memory: str) -> Tensor:
    """The same numbers in other memory, among others that must not be read."""
    strange = 77.0
    if memory == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if memory == "channel slice":
        wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), strange)
        wide[:, 2:-1] = x
        return wide[:, 2:-1]
    if memory == "batch slice":
        wide = x.new_full((x.shape[0] + 2, *x.shape[1:]), strange)
        wide[1:-1] = x
        return wide[1:-1]
    if memory == "transposed" and x.dim() > 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if memory == "rows with gaps":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1), strange)
        wide[..., :-1] = x
        return wide[..., :-1]
    return x.contiguous()


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"<{'x'.join(map(str, value.shape))}>"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
