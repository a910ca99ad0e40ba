"""The columns in which tables keep preference pairs, and what their labels mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...values import check_choice
from ..source import Arm, PairError, Source, SourceError, warn, weight_of

__all__ = [
    "CATEGORY",
    "HAS_LABEL",
    "TIE",
    "TIE_WEIGHT",
    "WEIGHT",
    "WINS",
    "IfThere",
    "Layout",
    "TableSource",
    "check_options",
    "counted",
    "is_labelled",
    "keep",
    "layout_of",
    "row_weight",
    "verdicts",
    "warn_ignored",
]

NONE, WINS, LOSES, TIE = range(4)
"""What a row says of its first image; NONE where it has no label."""


class IfThere(str):
    """The name of a column, as a default: it counts where it is there. What a caller names has to be there."""


WEIGHT, CATEGORY = IfThere("weight"), IfThere("category")

TIES = ("drop", "keep", "error")
TIE_WEIGHT = 0.5


@dataclass(frozen=True)
class Layout:
    """Names of columns: of the first image, of the second, of the label of the first (None: the first always wins),
    and of the prompt."""

    first: str
    second: str
    label: str | None
    prompt: str
    prompt_needed: bool = True

    @property
    def needed(self) -> list[str]:
        names = (self.first, self.second, self.label, self.prompt if self.prompt_needed else None)
        return [name for name in names if name is not None]

    def arms(self, verdict: int) -> tuple[tuple[Arm, str], tuple[Arm, str]]:
        """The winner and its column, the loser and its column."""
        first, second = (self.second, self.first) if verdict == LOSES else (self.first, self.second)
        return ("win", first), ("lose", second)


LAYOUTS = (
    Layout("jpg_0", "jpg_1", "label_0", "caption"),  # Pick-a-Pic V1 and V2
    Layout("chosen", "rejected", None, "prompt"),  # Open Image Preferences
    Layout("win", "lose", None, "prompt", prompt_needed=False),
)
HAS_LABEL = "has_label"


def is_labelled(value: Any) -> bool:
    """Whether this value of `has_label`, a bool, a number, or in a table their text, says that there is a label. None
    does."""
    if not isinstance(value, str):
        return value is None or bool(value)
    try:
        return float(value) != 0
    except ValueError:
        return value.strip().lower() != "false"


def layout_of(columns: Collection[str], where: str) -> Layout:
    """The first layout whose columns are all there. Raises SourceError if there is none."""
    for layout in LAYOUTS:
        if set(layout.needed) <= set(columns):
            return layout
    expected = "; or ".join(", ".join(layout.needed) for layout in LAYOUTS)
    raise SourceError(f"{where} has the columns {', '.join(columns) or 'none'}; expected {expected}")


def check_options(ties: Any, columns: Any) -> None:
    """Those that all sources have. Raises ValueError or TypeError."""
    check_choice("ties", ties, TIES)
    if isinstance(columns, str):
        raise TypeError(f"columns is {columns!r}; expected a list of names")


def verdicts(labels: np.ndarray, labelled: np.ndarray | None, name: str, where: str) -> np.ndarray:
    """(rows,) uint8, of float64 labels of the first image: 1 it wins, 0 it loses, 0.5 a tie, NaN no label.

    labelled: (rows,) bool, False where there is no label whatever stands there; or None. Raises SourceError.
    """
    result = np.select([labels == 1, labels == 0, labels == 0.5], [WINS, LOSES, TIE], NONE).astype(np.uint8)
    wrong = (result == NONE) & ~np.isnan(labels)
    if labelled is not None:
        result[~labelled] = NONE
        wrong &= labelled
    if wrong.any():
        row = int(wrong.argmax())
        raise SourceError(f"{where}, row {row}: {name} is {labels[row]:g}; expected 1, 0, or 0.5 for a tie")
    return result


def warn_ignored(where: str, name: str, kind: str, expected: str) -> None:
    """Warns of a column that would count without being asked for, but holds something else."""
    warn(f"{where}: {name} is {kind}, and is not used; expected {expected}, or {name}=None")


def keep(verdict: np.ndarray, ties: str, where: str) -> np.ndarray:
    """The rows that are pairs under this policy, ascending. Raises SourceError for a tie under "error"."""
    if ties == "error" and (verdict == TIE).any():
        row = int((verdict == TIE).argmax())
        raise SourceError(f"{where}, row {row}: a tie; ties='drop' leaves them out, ties='keep' gives them weight 0.5")
    return np.flatnonzero(verdict != NONE if ties == "keep" else (verdict == WINS) | (verdict == LOSES))


def counted(found: np.ndarray, pairs: int, where: str) -> dict[str, int]:
    """The counts of a source, from the number of rows of each verdict. Raises SourceError if there are no pairs."""
    counts = {"rows": int(found.sum()), "rows without a label": int(found[NONE]), "ties": int(found[TIE])}
    if not pairs:
        listed = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise SourceError(f"{where}: {listed}, 0 pairs; expected at least one pair")
    return counts


class TableSource(Source):
    """What sources of rows have in common: which rows are pairs, what each says of its first image, and categories."""

    _rows: np.ndarray  # (len,) uint32
    _verdicts: np.ndarray  # (len,) uint8
    _counts: Mapping[str, int]
    _categories: tuple[tuple[str, ...], np.ndarray] | None = None  # as of `categories`; None where rows have none

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        return self._categories or super().categories

    @property
    def counts(self) -> Mapping[str, int]:
        return {**self._counts, "pairs": len(self)}

    def _row(self, index: int) -> tuple[int, int]:
        """The number of its row, and the verdict there. Raises IndexError."""
        if not 0 <= index < len(self._rows):
            raise IndexError(f"pair {index} of {len(self._rows)}")
        return int(self._rows[index]), int(self._verdicts[index])

    def _category_of(self, index: int) -> str:
        if self._categories is None:
            return ""
        names, codes = self._categories
        return names[int(codes[index])]


def row_weight(value: Any, name: str, verdict: int) -> float:
    """A pair's weight by the value in that column: 1 for None, and half of it for a tie. Raises PairError."""
    try:
        return weight_of(1.0 if value is None else value, name) * (TIE_WEIGHT if verdict == TIE else 1.0)
    except ValueError as error:
        raise PairError(str(error)) from None
