"""The worst of each kind of check, against its gate: for people as a table, for programs as JSON."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Finding", "Report", "must"]

_BROKEN_SHOWN = 8
_TABLE = 90  # columns of a terminal


class Finding(NamedTuple):
    """One comparison: how far apart, where it came nearest to its gate.

    check: what was compared: "gradient".
    share: of the gate; above 1 the gate is broken. Infinite where something is not as it must be bit for bit.
    ulps: in units in the last place of the result, in levels of 255 for pixels.
    relative: to the exact value.
    note: what happened, if that is not a number.
    """

    check: str
    share: float
    ulps: float = 0.0
    relative: float = 0.0
    note: str = ""


def must(check: str, right: bool, note: object = "") -> Finding:
    """Of something that is right or wrong, without a measure. note: what is wrong, if it is."""
    return Finding(check, 0.0) if right else Finding(check, math.inf, note=str(note))


@dataclass
class _Group:
    gate: str
    count: int = 0
    broken: int = 0
    worst: Finding | None = None
    case: int | None = None
    what: str = ""


@dataclass
class Report:
    """What a run of the checks found.

    seed: that the cases were drawn from; the same seed and number draw the same case.
    skipped: what could not run, and why.
    """

    seed: int
    thorough: bool
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    _groups: dict[tuple[str, str, str], _Group] = field(default_factory=dict)
    _broken: list[str] = field(default_factory=list)
    _unfinished: list[str] = field(default_factory=list)

    def add(
        self, subject: str, device: str, finding: Finding, gate: str, *, case: int | None = None, what: str = ""
    ) -> None:
        """subject: the backend or the decoder. case, what: the number of the case, and what was tried."""
        group = self._groups.setdefault((subject, device, finding.check), _Group(gate))
        group.count += 1
        if not finding.share <= 1:
            group.broken += 1
            number = "" if case is None else f", case {case}"
            reason = finding.note or f"{_number(finding.ulps)} ulp, {_number(finding.relative)} relative"
            self._broken.append(f"{subject} on {device}: {finding.check}{number} ({what}): {reason}; gate: {gate}")
        if group.worst is None or _rank(finding) > _rank(group.worst):
            group.worst, group.case, group.what = finding, case, what

    def out_of_time(self, what: str, at: str, done: int, least: int) -> None:
        """what: a part that ended early. With fewer than `least` cases it was not checked, and that is a failure."""
        self.skipped[f"{what} from {at} on"] = "no time was left"
        if done < least:
            self._unfinished.append(f"{what}: {done} cases, of {least} at least: no time was left")

    @property
    def passed(self) -> bool:
        """Whether all that is there was checked, if only in a few cases, and no gate is broken."""
        return bool(self._groups) and not self._broken and not self._unfinished

    def as_json(self) -> str:
        """All of it, in one JSON object. Numbers that are not finite are null."""
        return json.dumps(
            {
                "passed": self.passed,
                "seed": self.seed,
                "thorough": self.thorough,
                "seconds": round(self.seconds, 1),
                "versions": {
                    "polydpo-fast": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "machine": platform.machine(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "groups": [_as_row(key, group) for key, group in self._groups.items()],
                "broken": self._broken,
                "unfinished": self._unfinished,
                "skipped": self.skipped,
            },
            indent=1,
            allow_nan=False,
        )

    def print(self, console: Console) -> None:
        """The table, what was left out and why, and what is broken."""
        from rich import box  # here: a machine that was lent for its GPU may lack it, and take the JSON
        from rich.table import Table

        title = f"Worst errors, seed {self.seed}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        numbers = ("cases", "ulp", "relative", "of tolerance", "worst case")
        for column in ("what", "check", "tolerance"):
            table.add_column(column, overflow="fold")
        for column in numbers:
            table.add_column(column, justify="right")
        lines = [title]  # where there is no room for a table
        before: tuple[str, str] | None = None
        subjects = list(dict.fromkeys(key[:2] for key in self._groups))  # some are checked in turns
        for key in sorted(self._groups, key=lambda key: subjects.index(key[:2])):
            (subject, device, name), group = key, self._groups[key]
            if before not in (None, (subject, device)):
                table.add_section()
            assert group.worst is not None
            first = f"{subject} on {device}" if (subject, device) != before else ""
            before = subject, device
            broken = f"[bold red]{group.broken} broken[/bold red]" if group.broken else ""
            row = (
                str(group.count),
                _number(group.worst.ulps),
                _number(group.worst.relative),
                broken or f"{group.worst.share:.0%}",
                "" if group.case is None else str(group.case),
            )
            table.add_row(first, name, group.gate, *row)
            told = ", ".join(f"{column} {text}" for column, text in zip(numbers, row, strict=True) if text)
            lines.append(f"{subject} on {device}: {name} ({group.gate}): {told}")
        if console.width < _TABLE:
            console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
        else:
            console.print(table)
        for what, why in self.skipped.items():
            console.print(f"not run: {what}: {why}", markup=False, highlight=False, soft_wrap=True)
        for line in self._broken[:_BROKEN_SHOWN]:
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if len(self._broken) > _BROKEN_SHOWN:
            console.print(f"and {len(self._broken) - _BROKEN_SHOWN} more", style="red")
        for line in self._unfinished:
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        count = sum(group.count for group in self._groups.values())
        text = f"{len(self._broken)} broken" if self._broken else "all within tolerance"
        parts = f", {len(self._unfinished)} parts not finished (time limit)" if self._unfinished else ""
        console.print(f"{count} comparisons, {text}{parts}; {self.seconds:.0f} s, seed {self.seed}", highlight=False)


def _as_row(key: tuple[str, str, str], group: _Group) -> dict[str, Any]:
    assert group.worst is not None
    return {
        **dict(zip(("subject", "device", "check"), key, strict=True)),
        "gate": group.gate,
        "cases": group.count,
        "broken": group.broken,
        "worst": {
            name: value if math.isfinite(value) else None
            for name, value in zip(("share_of_gate", "ulps", "relative"), group.worst[1:4], strict=True)
        },
        "note": group.worst.note,
        "case": group.case,
        "what": group.what,
    }


def _rank(finding: Finding) -> float:
    return math.inf if math.isnan(finding.share) else finding.share


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.0e}"
