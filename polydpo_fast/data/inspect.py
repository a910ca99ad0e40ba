"""What a source holds, and whether it can be decoded: the command `polydpo-fast inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .replay import check_ledger, replay
from .source import Source
from .trial import Problem, Sample, check, sample, sampled_indices

__all__ = ["report", "safe"]

_SHOWN = 20  # categories; the rest is summed up


def report(source: Source, *, every: bool, count: int, ledger: Path | None, console: Console) -> bool:
    """Writes all of it. Whether no pair was found that cannot be decoded, or that its ledger calls bad for good."""
    if ledger is not None:
        check_ledger(ledger)
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
