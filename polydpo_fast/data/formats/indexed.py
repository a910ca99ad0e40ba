"""The base of sources that go through their files once, and then read pairs by an index, which is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...cache import Arrays, load_or_build
from ..source import Pair, PairError, Source, SourceError, fingerprint_of, worked_out_once
from .columns import check_options
from .files import File, names

__all__ = ["COMMON", "IndexedSource", "Notes", "key_hash"]

COMMON = [("key", "<u8"), ("category", "<u4"), ("tie", "?")]
"""What a row of any index begins with: the hash of the pair's key, or 0; its category's number; whether it is a tie."""

# To be raised when other records than before are refused or left out, so that indexes are built again. It is no part of
# fingerprints: trainings on pairs that stay the same are resumed.
_RULES = 2

_READERS = 8
_PART = 1 << 15


@dataclass
class Notes:
    """What is found in a file beside its pairs.

    counts: as of `Source.counts`. categories, fields: names, numbered in the order in which they come. form: of the
    file. content: a digest of what the file says of its pairs, where rows do not hold it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    categories: dict[str, int] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)
    form: str = ""
    content: str = ""

    def category(self, name: str) -> int:
        return self.categories.setdefault(name, len(self.categories))

    def see(self, record: Mapping[str, Any]) -> None:
        if record.keys() <= self.fields.keys():  # as a rule
            return
        for name in record:
            self.fields.setdefault(name, len(self.fields))

    def pack(self) -> np.ndarray:
        parts = [self.counts, list(self.categories), list(self.fields), self.form, self.content]
        return np.frombuffer(json.dumps(parts).encode(), dtype=np.uint8)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> Notes:
        """Raises ValueError or TypeError for what `pack` did not make."""
        counts, categories, fields, form, content = json.loads(packed.tobytes())
        found = Counter({str(name): int(number) for name, number in counts.items()})
        return cls(found, _numbered(categories), _numbered(fields), str(form), str(content))


class IndexedSource(Source):
    """A subclass says what a row of the index holds, how a file is scanned for rows, and how a row's pair is read."""

    row: ClassVar[np.dtype[Any]]
    version: ClassVar[int]  # of the index; to be raised when rows change, or how they are made
    # Of the fingerprint, if it differs: an index is just built again, but users' states and stores hold fingerprints.
    fingerprint_version: ClassVar[int | None] = None
    apart: ClassVar[tuple[str, ...]] = ()  # fields of a row that the fingerprint leaves to `Notes.content`

    def __init__(
        self, files: Sequence[File], *, ties: str, columns: Sequence[str], cache: str | os.PathLike[str] | None
    ) -> None:
        check_options(ties, columns)
        self._files, self._names, self._columns = list(files), names(files), tuple(columns)
        with ThreadPoolExecutor(_READERS) as readers:
            parts = list(readers.map(lambda file: self._load(file, cache), self._files))
        self._notes = [notes for _, notes in parts]
        self._category_names = tuple(sorted({name for notes in self._notes for name in notes.categories})) or ("",)
        self._check_columns()
        counts = Counter(files=len(self._files))
        number_of = {name: number for number, name in enumerate(self._category_names)}
        kept = []
        for file, (rows, notes) in zip(self._files, parts, strict=True):
            numbers = np.array([number_of[name] for name in notes.categories], dtype=np.uint32)
            for part in _parts(rows):
                part["category"] = numbers[part["category"]]
            tied = rows["tie"]
            counts.update({**notes.counts, "ties": int(tied.sum())})
            if ties == "error" and tied.any():
                raise SourceError(f"{self._where(file, rows[tied.argmax()], notes)}: a tie, and ties is 'error'")
            kept.append(rows[~tied] if ties == "drop" and tied.any() else rows)
        self._rows, self._counts = kept[0] if len(kept) == 1 else np.concatenate(kept), counts
        self._ends = list(itertools.accumulate(map(len, kept)))  # a list: bisect is quicker than NumPy for one number
        if not len(self._rows):
            found = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
            raise SourceError(f"{self._files[0].path}: no pairs found; {found}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        number, row = self._row(index)
        try:
            return self._read(number, row)
        except PairError:
            raise
        except (OSError, ValueError, LookupError) as error:  # LookupError for a stale row
            raise PairError(f"{self.position(index)}: {error}") from error

    def position(self, index: int) -> str:
        number, row = self._row(index)
        return self._where(self._files[number], row, self._notes[number])

    @worked_out_once
    def fingerprint(self) -> str:
        told = [name for name in self.row.names or () if name not in self.apart]
        packed = np.dtype([(name, self.row[name]) for name in told])
        digest = hashlib.sha256()
        for part in _parts(self._rows):
            digest.update(part[told].astype(packed).data)
        files = [
            (name, file.size, notes.content)
            for name, file, notes in zip(self._names, self._files, self._notes, strict=True)
        ]
        version = self.version if self.fingerprint_version is None else self.fingerprint_version
        return fingerprint_of(self.kind, [version, files, self._category_names, digest.hexdigest()])

    @property
    def categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        smallest = np.min_scalar_type(len(self._category_names) - 1)
        return self._category_names, self._rows["category"].astype(smallest)

    @property
    def counts(self) -> Mapping[str, int]:
        return {**self._counts, "pairs": len(self)}

    @abstractmethod
    def _scan(self, file: File, notes: Notes) -> Iterator[tuple[Any, ...]]:
        """The rows of a file. Raises ValueError if it is not what it should be, OSError if it cannot be read; neither
        has to say where. A SourceError does."""

    @abstractmethod
    def _within(self, rows: np.ndarray, size: int) -> bool:
        """Whether the rows of a kept index may be those of a file of that size."""

    @abstractmethod
    def _read(self, number: int, row: np.void) -> Pair:
        """The pair of a row of that file. Raises PairError, or ValueError or OSError, which need not say where."""

    @abstractmethod
    def _where(self, file: File, row: np.void, notes: Notes) -> str:
        """As `position`."""

    def _row(self, index: int) -> tuple[int, np.void]:
        """The number of the file, and the row."""
        index = operator.index(index)
        if not 0 <= index < len(self._rows):
            raise IndexError(f"pair {index} of {len(self._rows)}")
        return bisect_right(self._ends, index), self._rows[index]

    def _load(self, file: File, cache: str | os.PathLike[str] | None) -> tuple[np.ndarray, Notes]:
        def build() -> Arrays:
            notes = Notes()
            try:
                rows = np.fromiter(self._scan(file, notes), dtype=self.row)
                if len(rows) and not notes.categories:  # all records are bad, and name none
                    notes.category("")
            except (SourceError, ImportError):
                raise
            except Exception as error:  # the storages' clients have exceptions of their own
                raise SourceError(f"{file.path}: {error or type(error).__name__}") from error
            return {"rows": rows, "notes": notes.pack()}

        def sound(arrays: Arrays) -> bool:
            rows, notes = arrays["rows"], Notes.unpack(arrays["notes"])
            return (rows.dtype, rows.ndim) == (self.row, 1) and all(
                (part["category"] < len(notes.categories)).all() and self._within(part, file.size)
                for part in _parts(rows)
            )

        if file.stamp:
            path = os.path.abspath(file.path) if file.is_local else file.path
            stamp = f"{self.kind} {self.version}.{_RULES} {file.size} {file.stamp} {path}"
            arrays = load_or_build(stamp, build, cache, sound)
        else:  # nothing would tell that it has changed
            arrays = build()
        return arrays["rows"], Notes.unpack(arrays["notes"])

    def _check_columns(self) -> None:
        known = {name for notes in self._notes for name in notes.fields}
        unknown = [column for column in self._columns if column not in known]
        if unknown:
            some = ", ".join(sorted(known)[:20]) or "none"
            raise SourceError(f"columns has {unknown[0]!r}, which no record has; expected some of: {some}")

    def _repeated(self) -> tuple[int, int] | None:
        """Two pairs of the same key, as far as hashes tell. Pairs without a key do not count."""
        keys = np.sort(self._rows["key"])
        keys = keys[np.searchsorted(keys, 0, side="right") :]
        same = keys[1:][keys[1:] == keys[:-1]]
        if not len(same):
            return None
        first, second = np.flatnonzero(self._rows["key"] == same[0])[:2].tolist()
        return first, second


def key_hash(key: str) -> int:
    """64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") or 1


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Views of some rows at a time, so that what is computed from them takes little memory."""
    return (rows[at : at + _PART] for at in range(0, len(rows), _PART))


def _numbered(names: list[Any]) -> dict[str, int]:
    return {str(name): number for number, name in enumerate(names)}
