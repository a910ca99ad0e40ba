"""Comparing two files of results: `polydpo-fast bench --compare`. What is in a row says `results_file`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["Change", "Comparison", "compare"]

Row = dict[str, Any]

ALONE = 1.0  # taken for noise where no peer tells a slower way from a slower machine: worse is then above twice

# What else than the time is compared, and what its ratio may be off 1 by chance.
FACTS = {
    "gpu, warm L2": 0.1,
    "peak_bytes": 0.01,
    "peak MB": 0.1,
    "bytes of memory per pair": 0.2,
    "seconds to build the index": ALONE,
    "seconds to resume": ALONE,
    "seconds per pair": ALONE,
    "microseconds with noise given": ALONE,
    "mean error": ALONE,
    "win_rate": 0.02,
    "legible_after": 0.05,
}
MORE_IS_BETTER = ("win_rate", "legible_after")


class Change(NamedTuple):
    """What became of one of our ways between two runs."""

    suite: str
    case: str
    way: str
    what: str  # "time", on a machine as fast as before; or one of FACTS
    ratio: float  # above 1 is worse
    noise: float  # what the ratio may be off 1 by chance

    @property
    def worse(self) -> bool:
        return not self.ratio <= 1 + self.noise  # what is no number any more is worse

    @property
    def better(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)


class Comparison(NamedTuple):
    """Of two files of results: what both have of ours, what only the former has, and what else to know of the two."""

    changes: list[Change]
    vanished: list[str]
    warnings: list[str]

    @property
    def worse(self) -> bool:
        return bool(self.vanished) or any(change.worse for change in self.changes)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Our ways in two files of results.

    Times of one machine drift from hour to hour. So each of ours is held against the peers that were measured in turns
    with it, or in the same suite if its case has none: the median of their changes is the machine's, and is taken out.
    The noise is three standard errors of the medians that take part (of one over n rounds: 0.93 IQR / sqrt(n), as for
    a normal distribution) and of how far the peers' changes lie apart, and 5% at least.
    """
    changes, vanished = [], []
    for name, suite in before["suites"].items():
        if name not in after["suites"]:
            vanished.append(f"{name}: the whole suite")
            continue
        old, new = _by_case(suite["rows"]), _by_case(after["suites"][name]["rows"])
        vanished += [f"{name}: {case}: {way}" for case, way in sorted(old.keys() - new.keys())]
        common = [key for key in old if key in new]
        ours = [key for key in common if old[key].get("ours") or new[key].get("ours")]
        drifts = {key: _ratio(old[key], new[key]) for key in common if key not in ours}
        for key in ours:
            beside = [drift for (case, _), drift in drifts.items() if case == key[0]]
            drift, of_drift = _drift(beside or drifts.values())
            ratio, error = _ratio(old[key], new[key])
            changes.append(Change(name, *key, "time", ratio / drift, max(0.05, 3 * math.hypot(error, of_drift))))
            for fact, noise in FACTS.items():
                if fact in old[key] and fact in new[key]:
                    figures = new[key][fact], old[key][fact]
                    worse = _quotient(*(reversed(figures) if fact in MORE_IS_BETTER else figures))
                    changes.append(Change(name, *key, fact, worse, noise))
    changes.sort(key=lambda change: (not change.worse, -change.ratio / (1 + change.noise)))
    warnings = [] if changes else ["nothing was judged: the files have no row in common that is marked as ours"]
    return Comparison(changes, vanished, warnings + _differences(before, after))


def _by_case(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row["case"], row["way"]): row for row in rows}


def _quotient(new: float, old: float) -> float:
    return 1.0 if new == old else new / old if old else math.inf


def _ratio(old: Row, new: Row) -> tuple[float, float]:
    """Of two medians, and its relative standard error."""
    errors = (
        _quotient(0.93 * row["iqr"] / math.sqrt(row["rounds"]), row["median"]) for row in (old, new) if row["iqr"]
    )
    return _quotient(new["median"], old["median"]), math.hypot(*errors)


def _drift(peers: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """What the machine changed by, as peers show it, and its relative standard error; one odd peer changes little."""
    sound = [(ratio, error) for ratio, error in peers if 0 < ratio < math.inf and error < math.inf]
    if not sound:
        return 1.0, ALONE / 3
    drift = statistics.median(ratio for ratio, _ in sound)
    apart = 1.48 * statistics.median(abs(ratio / drift - 1) for ratio, _ in sound)  # a standard deviation
    return drift, math.hypot(apart, statistics.median(error for _, error in sound) / math.sqrt(len(sound)))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of machines, and of versions of what both were measured with."""
    found = _changed(before["machine"], after["machine"])
    for name in before["suites"].keys() & after["suites"].keys():
        found += _changed(*(results["suites"][name].get("versions", {}) for results in (before, after)))
    return list(dict.fromkeys(found))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    common = [what for what in before if what in after and before[what] != after[what]]
    return [f"{what}: {before[what]} before, {after[what]} after" for what in common]
