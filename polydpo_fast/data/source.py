"""What a source of preference pairs is."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from typing_extensions import Buffer

from ..values import is_number

if TYPE_CHECKING:
    from .ready import Ready

__all__ = [
    "Arm",
    "Pair",
    "PairError",
    "Source",
    "SourceError",
    "fingerprint_of",
    "is_unicode",
    "warn",
    "weight_of",
    "worked_out_once",
]

Arm = Literal["win", "lose"]

_LEAST_WEIGHT, _MOST_WEIGHT = 2.0**-149, (2 - 2.0**-23) * 2.0**127  # of float32


class SourceError(ValueError):
    """A source that cannot be used: its files are missing, of another format, or contradict each other."""


class PairError(ValueError):
    """One pair that cannot be read; the others can. A loader replaces it and writes it down.

    arm: the one that is at fault, or None where it is both or neither.
    whole_block: whether no pair of the same block (`Source.blocks`) can be read.
    """

    def __init__(self, reason: str, arm: Arm | None = None, *, whole_block: bool = False) -> None:
        super().__init__(reason, arm)
        self.reason, self.arm, self.whole_block = reason, arm, whole_block

    def __str__(self) -> str:
        return self.reason if self.arm is None else f"{self.arm}: {self.reason}"


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: JSON and Python also hold lone surrogates."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def weight_of(value: Any, name: str = "weight") -> float:
    """A pair's weight. Raises ValueError for what is no number >= 0, or is so large or small that it would be infinite
    or 0 in float32, which batches have."""
    try:
        weight = float(value) if is_number(value) else math.nan
    except OverflowError:
        weight = math.inf
    if not weight >= 0:
        raise ValueError(f"{name} is {value!r}; expected a number >= 0")
    if weight and not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise ValueError(f"{name} is {weight:g}; expected 0, or a number that float32 can hold: 1.4e-45 to 3.4e38")
    return weight


@dataclass(frozen=True)
class Pair:
    """A prompt, a winner and a loser, encoded as they are stored.

    key: names the pair within its source, and is unique there.
    win, lose: the bytes of an image or a clip; for clips in local files also a path, which is then read in parts.
    weight: of the pair in the loss, >= 0 and as a batch holds it, in float32; 0.5 for a tie that was kept.
    category: "" where the source has none.
    extra: further columns that were asked for.
    """

    key: str
    win: Buffer | os.PathLike[str]
    lose: Buffer | os.PathLike[str]
    prompt: str = ""
    weight: float = 1.0
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


class Source(ABC):
    """Pairs by number, 0 to len - 1, always in the same order. Ties and rows without a label are gone already.

    Reading is safe from any number of threads, after a fork, and after pickling.
    """

    kind: ClassVar[str]  # for people: "Parquet"
    random_access: ClassVar[bool] = True  # whether a pair is cheap to read without its neighbours

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Raises PairError where this pair cannot be read, and IndexError outside of 0 to len - 1."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the pairs, or their order, may have changed. Says nothing of where the files are kept."""

    @abstractmethod
    def position(self, index: int) -> str:
        """Where a person finds the pair: file and row, without reading it."""

    @property
    def blocks(self) -> np.ndarray:
        """(blocks,) int64: the lengths of successive runs of pairs that are cheap to read one after the other, such
        as a Parquet file's row groups. They add up to len."""
        return np.array([len(self)], dtype=np.int64)

    def expect_window(self, blocks: int) -> None:
        """A loader says that pairs of this many blocks at a time will be read in any order."""
        return None

    @property
    def categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The names, and for each pair the number of its own, (len,) of an integer dtype."""
        return ("",), np.zeros(len(self), dtype=np.uint8)

    @property
    def ready(self) -> Ready | None:
        """What the pairs are, if they are tensors already (`ReadyPair`); None if they are to be decoded."""
        return None

    @property
    def counts(self) -> Mapping[str, int]:
        """What was found, for people: rows, ties, rows without a label, pairs."""
        return {"pairs": len(self)}


def warn(text: str) -> None:
    """A RuntimeWarning of the line that called this package, whichever way came here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("polydpo_fast."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def worked_out_once(make: Callable[[Any], str]) -> property:
    """A property that is worked out when it is first asked for. (functools.cached_property has a lock before Python
    3.12, which a fork may leave held.)"""
    name = f"_{make.__name__}"

    def get(self: Any) -> Any:
        if name not in self.__dict__:
            self.__dict__[name] = make(self)
        return self.__dict__[name]

    return property(get)


def fingerprint_of(kind: str, parts: Iterable[object]) -> str:
    """A digest of whatever the pairs and their order depend on."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        text = repr(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return f"{kind}:{digest.hexdigest()[:32]}"
