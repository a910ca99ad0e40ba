"""What a source holds, and whether it can be decoded: the command `polydpo-fast inspect`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .ledger import options_of_json, read_ledger
from .loader_arguments import decode_function
from .media import CLIP_SUFFIXES, suffix_of
from .reading import checked, read_ahead
from .source import Pair, PairError, Source, SourceError

__all__ = ["Problem", "Replayed", "Sample", "check", "replay", "report", "safe", "sample", "sampled_indices"]

_BATCH = 16  # pairs decoded together
# How images, and clips, are decoded: for what it costs; and for damage, which is found outside of a small crop too.
_COSTS = dict(size=1024, threads=1), dict(frames=16, size=(480, 832), short="repeat", threads=1)
_DAMAGE = (
    dict(size=1, resize=None, dtype=torch.uint8),
    dict(frames=16, size=16, short="repeat", dtype=torch.uint8),
)
_SHOWN = 20  # categories; the rest is summed up
_BLOCKS = 4  # a sample's, where reading one pair means reading its neighbours
_NAMES = {"jpg": "JPEG", "tif": "TIFF", "webp": "WebP", "webm": "WebM", "mkv": "Matroska", "jp2": "JPEG 2000"}


@dataclass(frozen=True)
class Problem:
    """A pair that cannot be read or decoded. arm: "win", "lose", or None for both or neither."""

    index: int
    key: str
    position: str
    arm: str | None
    reason: str


@dataclass
class Sample:
    """Of some pairs: for each format its files' sizes in bytes, their (height, width) in pixels, and the CPU
    milliseconds that decoding one takes with one thread; and what could not be read or decoded."""

    sizes: dict[str, list[int]] = field(default_factory=dict)
    pixels: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def sampled_indices(source: Source, count: int) -> list[int]:
    """Up to so many pairs, spread over the source; over a few blocks of it where one pair costs a whole block."""
    size = len(source)
    if source.random_access or count >= size:
        return [*map(int, np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64)))]
    blocks = source.blocks
    ends = np.cumsum(blocks)
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(_BLOCKS, count, len(blocks))).astype(np.int64)).tolist()
    shares = [count // len(chosen) + (number < count % len(chosen)) for number in range(len(chosen))]
    return [
        index
        for block, share in zip(chosen, shares, strict=True)
        for index in range(
            int(ends[block] - blocks[block]), int(ends[block] - blocks[block] + min(share, blocks[block]))
        )
    ]


def sample(source: Source, indices: Iterable[int]) -> Sample:
    """Decodes the images to 1024 x 1024, and of clips 16 frames to 480 x 832, each pair by itself."""
    found = Sample()
    for index in indices:
        pair, problems = _read(source, index)
        found.problems += problems
        if pair is None:
            continue
        began = time.process_time()
        decoded = _decoded([pair], _COSTS[_is_clip(pair)])
        cpu_ms = (time.process_time() - began) * 1000 / 2
        bad = {error.arm: error.reason for error in decoded.errors}
        found.problems += [_problem(source, index, pair.key, arm, reason) for arm, reason in bad.items()]
        for data, shape in zip((pair.win, pair.lose), decoded.original_size.tolist(), strict=True):
            name = _format(data)
            found.sizes.setdefault(name, []).append(_size(data))
            if not bad:
                found.pixels.setdefault(name, []).append((shape[0], shape[1]))
                found.cpu_ms.setdefault(name, []).append(cpu_ms)
    return found


def check(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, list[Problem]]]:
    """Reads and decodes these pairs whole, of clips 16 frames. Yields, time and again, how many more are done, and what
    is wrong with them."""
    batch: list[tuple[int, Pair]] = []
    for index, pair in read_ahead(source, indices):
        if isinstance(pair, PairError):
            yield 1, [_problem(source, index, "", pair.arm, pair.reason)]
            continue
        batch.append((index, pair))
        if len(batch) == _BATCH:
            yield len(batch), _undecodable(source, batch)
            batch = []
    if batch:
        yield len(batch), _undecodable(source, batch)


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
    _check_ledger(ledger)
    seen = set()
    for line in filter(_has_index, read_ledger(ledger)):
        index, options = line.get("index"), line.get("decode")
        this = index, json.dumps({**options, "seed": None}) if isinstance(options, dict) else ""
        if this in seen:  # by another epoch or rank
            continue
        seen.add(this)
        yield _replayed(source, line)


def _check_ledger(path: str | os.PathLike[str]) -> None:
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
        pair, problems = _read(source, index)
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
        return _undecodable(source, [(index, pair)])
    try:
        checked(pair, index, "frames" in options)
    except PairError as error:
        return [_problem(source, index, pair.key, error.arm, error.reason)]
    seed = options.pop("seed", 0)
    decoded = _decoded([pair], {**options, "seeds": [seed]})
    return [_problem(source, index, pair.key, error.arm, error.reason) for error in decoded.errors]


def report(source: Source, *, every: bool, count: int, ledger: Path | None, console: Console) -> bool:
    """Writes all of it. Whether no pair was found that cannot be decoded, or that its ledger calls bad for good."""
    if ledger is not None:
        _check_ledger(ledger)
    facts = Table(show_header=False, box=None)
    facts.add_row("source", source.kind)
    for name, number in source.counts.items():
        facts.add_row(safe(name), f"{number:,}")
    console.print(facts)
    _report_categories(source, console)
    fine, found = True, Sample()
    if count:
        found = sample(source, sampled_indices(source, count))
        _report_sample(found, console)
        fine = not found.problems
    if every:
        fine = _report_check(source, console, told=found.problems) and fine
    if ledger is not None:
        fine = _report_replay(source, ledger, console) and fine
    return fine


# -------------------------------------------------------------------------------------------------------- pairs


def _read(source: Source, index: int) -> tuple[Pair | None, list[Problem]]:
    try:
        return source[index], []
    except PairError as error:
        return None, [_problem(source, index, "", error.arm, error.reason)]


def _problem(source: Source, index: int, key: str, arm: str | None, reason: str) -> Problem:
    position = source.position(index)
    return Problem(index, key, position, arm, reason.removeprefix(f"{position}: "))


def _undecodable(source: Source, batch: list[tuple[int, Pair]]) -> list[Problem]:
    problems = []
    for clips in (False, True):
        some = [(index, pair) for index, pair in batch if _is_clip(pair) == clips]
        if not some:
            continue
        decoded = _decoded([pair for _, pair in some], _DAMAGE[clips])
        problems += [
            _problem(source, some[error.index][0], some[error.index][1].key, error.arm, error.reason)
            for error in decoded.errors
        ]
    return sorted(problems, key=lambda problem: problem.index)


def _decoded(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Any:
    """As `decode_pairs` or `decode_clips` returns them."""
    wins, loses = [pair.win for pair in pairs], [pair.lose for pair in pairs]
    return decode_function(options)(wins, loses, on_error="mask", **options)


def _is_clip(pair: Pair) -> bool:
    return any(isinstance(arm, os.PathLike) or _suffix(arm) in CLIP_SUFFIXES for arm in (pair.win, pair.lose))


def _suffix(data: Any) -> str:
    if isinstance(data, os.PathLike):
        return str(os.fspath(data)).rpartition(".")[2].lower()
    try:
        return suffix_of(data)
    except ValueError:
        return "unknown"


def _format(data: Any) -> str:
    suffix = _suffix(data)
    return _NAMES.get(suffix, suffix.upper() if suffix != "unknown" else suffix)


def _size(data: Any) -> int:
    if isinstance(data, os.PathLike):
        try:
            return os.stat(data).st_size
        except OSError:
            return 0
    return memoryview(data).nbytes


# ------------------------------------------------------------------------------------------------------- tables


def _report_categories(source: Source, console: Console) -> None:
    names, codes = source.categories
    if not any(names):
        return
    numbers = Counter(dict(enumerate(np.bincount(codes, minlength=len(names)).tolist())))
    table = Table("category", "pairs", "share", box=None)
    for code, number in numbers.most_common(_SHOWN):
        table.add_row(safe(names[code] or "(none)"), f"{number:,}", f"{number / len(source):.1%}")
    if len(names) > _SHOWN:
        rest = sum(number for _, number in numbers.most_common()[_SHOWN:])
        table.add_row(f"{len(names) - _SHOWN:,} others", f"{rest:,}", f"{rest / len(source):.1%}")
    console.print(table)


def _report_sample(found: Sample, console: Console) -> None:
    table = Table("sample", "files", "kB (median)", "kB (largest)", "pixels (most common)", "CPU ms", box=None)
    for name, sizes in sorted(found.sizes.items(), key=lambda item: -len(item[1])):
        shapes = Counter(found.pixels.get(name, [])).most_common(3)
        table.add_row(
            name,
            f"{len(sizes):,}",
            f"{np.median(sizes) / 1000:,.0f}",
            f"{max(sizes) / 1000:,.0f}",
            ", ".join(f"{width} x {height} ({number})" for (height, width), number in shapes),
            f"{np.median(found.cpu_ms[name]):.1f}" if name in found.cpu_ms else "",
        )
    console.print(table)
    console.print("CPU ms: median, one thread; images to 1024 x 1024, clips 16 frames to 832 x 480")
    _report_problems(found.problems, console)


def _report_check(source: Source, console: Console, told: Sequence[Problem]) -> bool:
    """told: what the sample found, which is not said twice."""
    bad = set()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(source))
        for done, problems in check(source, range(len(source))):
            _report_problems((problem for problem in problems if problem not in told), console)
            bad |= {problem.index for problem in problems}
            progress.advance(task, done)
    console.print(f"{len(bad):,} of {len(source):,} pairs cannot be decoded")
    return not bad


def _report_replay(source: Source, ledger: Path, console: Console) -> bool:
    pairs = bad = foreign = 0
    for one in replay(source, ledger):
        pairs, bad, foreign = pairs + 1, bad + one.bad, foreign + one.foreign
        console.print(safe(f"{one.line.get('position') or one.line.get('key')}: {one.outcome}"), soft_wrap=True)
    console.print(f"{bad:,} of {pairs - foreign:,} pairs of the ledger are still bad")
    if foreign:
        console.print(
            f"{foreign:,} of its lines are of another source, or of one that was opened with other options (ties, "
            "root, columns, the files and their order)",
            soft_wrap=True,
        )
    return not bad and not foreign


def _report_problems(problems: Iterable[Problem], console: Console) -> None:
    for problem in problems:
        arm = f"{problem.arm}: " if problem.arm else ""
        console.print(safe(f"{problem.position}: {arm}{problem.reason}"), soft_wrap=True)


def safe(text: str) -> Text:
    """Names in files are anybody's: no markup, and no control sequences for the terminal."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
