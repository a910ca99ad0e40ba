"""The pairs of a ledger, tried again: what has become of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .ledger import options_of_json, read_ledger
from .reading import checked
from .source import Pair, PairError, Source, SourceError
from .trial import Problem, decoded, problem_of, read, undecodable

__all__ = ["Replayed", "check_ledger", "replay"]


@dataclass(frozen=True)
class Replayed:
    """What has become of a pair of a ledger. outcome: in words. bad: it still cannot be used. foreign: the line is not
    of this source as it is opened now, so that nothing was tried."""

    line: Mapping[str, Any]
    outcome: str
    bad: bool = False
    foreign: bool = False


def replay(source: Source, ledger: str | os.PathLike[str]) -> Iterator[Replayed]:
    """Each pair of a ledger, in the order of their first lines, decoded with the options and the seed of its line.

    Raises OSError where there is no such file, and SourceError where it is no ledger.
    """
    check_ledger(ledger)
    seen = set()
    for line in filter(_has_index, read_ledger(ledger)):
        index, options = line.get("index"), line.get("decode")
        this = index, json.dumps({**options, "seed": None}) if isinstance(options, dict) else ""
        if this in seen:  # by another epoch or rank
            continue
        seen.add(this)
        yield _replayed(source, line)


def check_ledger(path: str | os.PathLike[str]) -> None:
    """An empty file is one, and so is one whose last line was cut off."""
    wanted = ("index", "position", "reason")
    if os.path.getsize(path) and not any(line.keys() >= {*wanted} and _has_index(line) for line in read_ledger(path)):
        raise SourceError(f"{path} is no ledger: it has no line of JSON with {', '.join(wanted)}")


def _has_index(line: Mapping[str, Any]) -> bool:
    """Other programs have logs of JSON lines too."""
    return isinstance(line.get("index"), (int, type(None)))


def _replayed(source: Source, line: Mapping[str, Any]) -> Replayed:
    index = line.get("index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(source):
        return Replayed(line, f"index is {index!r}; the source has {len(source)} pairs", foreign=True)
    try:
        options = options_of_json(line["decode"]) if isinstance(line.get("decode"), dict) else None
        pair, problems = read(source, index)
        # A file that was repaired gives another fingerprint, and a folder that was moved another position. Of one that
        # was both, or has a line of before fingerprints were written, the key tells.
        known = line.get("source") == source.fingerprint or line.get("position") == source.position(index)
        if not known and (pair is None or line.get("key") != pair.key):
            return Replayed(
                line, f"another source, or opened with other options: pair {index} is another one", foreign=True
            )
        if pair is not None and line.get("key") not in ("", None, pair.key):  # "" where it could not be read
            return Replayed(line, f"another source: pair {index} is {pair.key} now", foreign=True)
        if pair is not None:
            problems = _tried(source, index, pair, options)
    except (TypeError, ValueError) as error:
        return Replayed(line, f"it cannot be tried again: {error}", bad=True)
    reasons = [problem.reason if problem.arm is None else f"{problem.arm}: {problem.reason}" for problem in problems]
    return Replayed(line, "; ".join(reasons) or "it can be decoded", bad=bool(problems))


def _tried(source: Source, index: int, pair: Pair, options: dict[str, Any] | None) -> list[Problem]:
    """As a loader would decode it; without its options, as `check` does."""
    if options is None:
        return undecodable(source, [(index, pair)])
    try:
        checked(pair, index, "frames" in options)
    except PairError as error:
        return [problem_of(source, index, pair.key, error.arm, error.reason)]
    seed = options.pop("seed", 0)
    result = decoded([pair], {**options, "seeds": [seed]})
    return [problem_of(source, index, pair.key, error.arm, error.reason) for error in result.errors]
