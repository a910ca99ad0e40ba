"""Pairs of files that are listed in a manifest: JSON lines, CSV, or a JSON list such as HPDv2's."""

from __future__ import annotations

import io
import itertools
import math
import os
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from typing_extensions import Buffer

from ..source import Arm, Pair, PairError, SourceError, warn
from .columns import HAS_LABEL, TIE_WEIGHT, is_labelled
from .fields import Fields, parse_json, text_of
from .files import File, Location, contents
from .indexed import COMMON, IndexedSource, Notes, key_hash
from .manifest_records import RecordError, place_of, read_row, records_of
from .splits import find_one_split

__all__ = ["ManifestPairs"]

_MAX_RANKED = 256
_BAD = "bad records"  # in counts
_NO_PAIR = 0, 0  # in an index, the numbers of the two files of a bad record


class ManifestPairs(IndexedSource):
    """Records that name the files of a winner and a loser: exports of ViPO-Image-1M and ViPO-Video-300K, HPDv2, HPDv3.

    where: paths, globs, folders or addresses of manifests. One that begins with "[" is a JSON list of records, one that
    begins with "{" has a JSON object in each line, one that ends in .csv is a table with a header. In UTF-8.
    A record has one of
        win, lose                   files
        path1, path2 (HPDv3); chosen, rejected  the same, the better first; the latter only in a record that has none
                                    of the others
        jpg_0, jpg_1, label_0       files, and 1 where the first wins, 0 where the second does, 0.5 for a tie
        file_path or image_path     a list of up to 256 files, and `human_preference`, greater for better, or `rank`,
                                    less for better: HPDv2. Every file is paired with every one that is worse; two that
                                    are equal are a tie
    and optionally prompt or caption, weight, category, key, and the `columns`.
    root: the folder, or its address, in which the files are; names that lead out of it, by .. or as absolute paths or
    addresses, are PairErrors (links are followed). None for the folder of the manifest, and then files may be anywhere:
    whoever wrote the manifest decides what is read.
    ties: of labelled or ranked files: "drop", "keep" (as listed, half the weight), or "error".
    columns: further fields for `Pair.extra`; None in records that do not have them.
    cache: the folder of the kept index; `cache_folder()` if None.

    Local clips (by their suffix: mp4, m4v, mov, mkv, webm) are handed out as paths, all else as bytes. A pair's key is
    its record's or else MANIFEST:RECORD, in lines and tables MANIFEST:LINE, with #WINNER-LOSER behind it for ranked
    files. A record is read again for each of its pairs; of remote manifests too, so that those are better kept locally.
    Takes 35 bytes of memory per pair; JSON lists are read as a whole, once.

    A bad record (no JSON, no files, a weight below 0) is a pair that cannot be read, a PairError, and a warning counts
    them; so is a file that is missing, or a manifest that has changed since. Raises SourceError, with the place, if all
    records are bad; for a label of another value, and for a key that comes twice, because these say that something else
    is meant; and if the next record cannot be found, as in a list or a table after a wrong comma or quote.
    """

    kind: ClassVar[str] = "manifest"
    version: ClassVar[int] = 1
    row: ClassVar[np.dtype[Any]] = np.dtype(
        [
            *COMMON,
            ("offset", "<i8"),
            ("length", "<u4"),
            ("record", "<u4"),
            ("crc", "<u4"),
            ("first", "u1"),
            ("second", "u1"),
        ]
    )

    def __init__(
        self,
        where: Location | Sequence[Location],
        *,
        root: Location | None = None,
        ties: str = "drop",
        columns: Sequence[str] = (),
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._root = None if root is None else os.path.expanduser(os.fspath(root))
        if self._root is not None and "://" not in self._root:
            self._root = os.path.abspath(self._root)  # a program may go to another folder while it is being read
        files = find_one_split(where, (".jsonl", ".csv", ".json"))
        super().__init__(files, ties=ties, columns=columns, cache=cache)
        if (repeated := self._repeated()) is not None:
            first, second = map(self.position, repeated)
            raise SourceError(f"{second}: its key is that of {first}; expected keys that are all different")
        self._warn_of_bad_records()

    def _warn_of_bad_records(self) -> None:
        if not (bad := self._counts.get(_BAD, 0)):
            return
        first = int((self._rows["first"] == self._rows["second"]).argmax())
        try:
            self[first]
        except PairError as error:
            warn(f"{bad} of {self._counts['records']} records are no pairs; the first is {error}")

    def _scan(self, file: File, notes: Notes) -> Iterator[tuple[Any, ...]]:
        with io.BufferedReader(file.open(), 1 << 20) as opened:
            notes.form, records = records_of(opened, file.name)
            first_bad: RecordError | None = None
            try:
                for number, offset, data, record in records:
                    try:
                        yield from _rows(number, offset, data, record, notes)
                    except _LabelError as error:
                        raise RecordError(number, error) from error
                    except ValueError as error:
                        notes.counts[_BAD] += 1
                        first_bad = first_bad or RecordError(number, error)
                        # In the first category: one of its own would get a share under categories="balanced".
                        yield 0, 0, False, offset, len(data), number, zlib.crc32(data), *_NO_PAIR
                if first_bad is not None and notes.counts[_BAD] == notes.counts["records"]:
                    raise first_bad
            except RecordError as error:
                raise SourceError(f"{file.path}{place_of(notes.form, error.number)}: {error}") from error

    def _within(self, rows: np.ndarray, size: int) -> bool:
        offsets, lengths = rows["offset"], rows["length"].astype(np.int64)
        return bool(((offsets >= 0) & (offsets <= size - lengths)).all())

    def _read(self, number: int, row: np.void) -> Pair:
        file, notes = self._files[number], self._notes[number]
        data = file.read(int(row["offset"]), int(row["length"]))
        if zlib.crc32(data) != row["crc"]:
            raise ValueError("the manifest has changed")
        record = read_row(data, list(notes.fields)) if notes.form == "csv" else parse_json(data)
        fields, listed = Fields.of(record, self._columns), _listed(record)
        pair = _Ranked(int(row["first"]), int(row["second"]), bool(row["tie"]))
        if pair.first == pair.second:
            raise ValueError("the manifest has changed")
        win = self._arm(file, listed.files[pair.first], "win")
        lose = self._arm(file, listed.files[pair.second], "lose")
        return Pair(
            (fields.key or f"{self._names[number]}:{row['record']}") + listed.suffix(pair),
            win,
            lose,
            prompt=fields.prompt or "",
            weight=fields.weight * (TIE_WEIGHT if pair.tie else 1.0),
            category=fields.category,
            extra=fields.extra,
        )

    def _where(self, file: File, row: np.void, notes: Notes) -> str:
        return f"{file.path}{place_of(notes.form, row['record'])}"

    def _arm(self, manifest: File, name: str, arm: Arm) -> Buffer | Path:
        try:
            return contents(_resolved(name, manifest, self._root))
        except (OSError, ValueError) as error:
            raise PairError(f"{name}: {error}", arm) from error


def _resolved(name: str, manifest: File, root: str | None) -> str:
    is_whole = "://" in name or os.path.isabs(name)
    if root is not None and (is_whole or os.path.normpath(name).split("/", 1)[0] == ".."):
        raise ValueError(f"it is not within root, {root}")
    if is_whole:
        return name
    folder = manifest.folder if root is None else root
    if "://" not in folder:
        return os.path.join(folder, name)
    protocol, _, folder = folder.partition("://")
    if protocol in ("http", "https"):  # where #, ? and % would not be part of the name
        name = urllib.parse.quote(name)
    parts = folder.rstrip("/").split("/") if folder.rstrip("/") else []
    for part in name.split("/"):  # storages take dots as parts of names
        if part == "..":
            parts = parts[:-1] or parts  # never the host or the bucket
        elif part != ".":
            parts.append(part)
    return f"{protocol}://{'/'.join(parts)}"


# ------------------------------------------------------------------------------------------------ records


def _rows(
    number: int, offset: int, data: bytes, record: dict[str, Any] | ValueError, notes: Notes
) -> Iterator[tuple[Any, ...]]:
    """The index's rows of a record. Raises ValueError for a bad one."""
    notes.counts["records"] += 1
    if isinstance(record, ValueError):
        raise record
    fields, listed = Fields.of(record), _listed(record)
    notes.see(record)
    crc, category = zlib.crc32(data), notes.category(fields.category)
    for pair in listed.pairs:
        key = 0 if fields.key is None else key_hash(fields.key + listed.suffix(pair))
        yield key, category, pair.tie, offset, len(data), number, crc, pair.first, pair.second


class _LabelError(ValueError):
    """A label of unknown meaning: the trouble of all records, not of one."""


class _Ranked(NamedTuple):
    """Two files of a record, by number, the better first."""

    first: int
    second: int
    tie: bool


_PLAIN = (("win", "lose"), ("path1", "path2"))
_CHOSEN = ("chosen", "rejected")  # last: beside other columns of files these may only say which one is better
_EXPECTED = (
    "win and lose, chosen and rejected, path1 and path2 (the better first), jpg_0, jpg_1 and label_0, or a list "
    "file_path"
)
_IMAGES, _LISTS = ("jpg_0", "jpg_1"), ("file_path", "image_path")
_ONE_PAIR = [_Ranked(0, 1, False)]


class _Listed(NamedTuple):
    files: list[str]
    pairs: Iterable[_Ranked]  # lazy: where one pair is read, the others are not worked out
    ranked: bool

    def suffix(self, pair: _Ranked) -> str:
        return f"#{pair.first}-{pair.second}" if self.ranked else ""


def _listed(record: dict[str, Any]) -> _Listed:
    """The files of a record, and its pairs. Raises ValueError."""
    for names in _PLAIN:
        if _has(record, names):
            return _Listed(_files(record, names), _ONE_PAIR, False)
    for name in _LISTS:
        if isinstance(record.get(name), list):
            return _ranked(name, record)
    is_chosen = _has(record, _CHOSEN)
    if _has(record, _IMAGES) and ("label_0" in record or not is_chosen):
        return _labelled(record)
    if is_chosen:
        return _Listed(_files(record, _CHOSEN), _ONE_PAIR, False)
    # None is complete: what does the first that is begun lack?
    for name in _LISTS:
        if record.get(name) is not None:
            return _ranked(name, record)
    for names in (*_PLAIN, _IMAGES, _CHOSEN):
        if names[0] in record or names[1] in record:
            raise ValueError(f"it has no {names[1] if _has(record, names[:1]) else names[0]}")
    raise ValueError(f"it has {', '.join(record) or 'no fields'}; expected {_EXPECTED}")


def _has(record: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether all of these have a value. A table's empty field has none."""
    missing = [name for name in names if record.get(name) in (None, "")]  # faster than all() of a generator
    return not missing


def _files(record: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [text_of(record, name) or "" for name in names]


def _labelled(record: dict[str, Any]) -> _Listed:
    """Pick-a-Pic's columns."""
    files = _files(record, _IMAGES)
    label = record.get("label_0")
    if label in (None, "") or not is_labelled(record.get(HAS_LABEL)):
        return _Listed(files, [], False)
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.inf
    if math.isnan(number):
        return _Listed(files, [], False)
    if number not in (0, 0.5, 1):
        raise _LabelError(f"label_0 is {label!r}; expected 1, 0, or 0.5 for a tie")
    return _Listed(files, [_Ranked(1, 0, False) if number == 0 else _Ranked(0, 1, number == 0.5)], False)


def _ranked(name: str, record: dict[str, Any]) -> _Listed:
    by = "human_preference" if "human_preference" in record else "rank"
    files, scores = record[name], record.get(by)
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise ValueError(f"{name} is not a list of files")
    if not isinstance(scores, list) or len(scores) != len(files) or not all(map(_is_number, scores)):
        raise ValueError(f"{by} is not a list of {len(files)} numbers, one for each file of {name}")
    if not 2 <= len(files) <= _MAX_RANKED:
        raise ValueError(f"{name} has {len(files)} files; expected 2 to {_MAX_RANKED}")
    values = scores if by == "human_preference" else [-rank for rank in scores]
    return _Listed(files, _ranked_pairs(values), len(files) > 2)


def _ranked_pairs(values: list[Any]) -> Iterator[_Ranked]:
    for a, b in itertools.combinations(range(len(values)), 2):
        first, second = (b, a) if values[b] > values[a] else (a, b)
        yield _Ranked(first, second, values[a] == values[b])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
