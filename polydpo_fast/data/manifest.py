"""Pairs of files that are listed in a manifest: JSON lines, CSV, or a JSON list such as HPDv2's."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from typing_extensions import Buffer

from .columns import HAS_LABEL, TIE_WEIGHT, is_labelled
from .fields import MAX_RECORD_BYTES, Fields, parse_json, text_of
from .files import File, Location, contents
from .indexed import COMMON, IndexedSource, Notes, key_hash
from .source import Arm, Pair, PairError, SourceError
from .splits import find_one_split

__all__ = ["ManifestPairs"]

_BOM = b"\xef\xbb\xbf"
_MAX_RANKED = 256


class ManifestPairs(IndexedSource):
    """Records that name the files of a winner and a loser: exports of ViPO-Image-1M and ViPO-Video-300K, HPDv2, HPDv3.

    where: paths, globs, folders or addresses of manifests. One that begins with "[" is a JSON list of records, one that
    begins with "{" has a JSON object in each line, one that ends in .csv is a table with a header. In UTF-8.
    A record has one of
        win, lose                   files
        path1, path2 (HPDv3); chosen, rejected  the same; the latter only in a record that has none of the others
        jpg_0, jpg_1, label_0       files, and 1 where the first wins, 0 where the second does, 0.5 for a tie
        file_path or image_path     a list of up to 256 files, and `human_preference`, greater for better, or `rank`,
                                    less for better: HPDv2. Every file is paired with every one that is worse; two that
                                    are equal are a tie
    and further, if it likes, prompt or caption, weight, category, key, and the `columns`.
    root: the folder, or its address, that files are sought in; those that lead out of it, by .. or as absolute paths or
    addresses, are PairErrors then (links within it are followed). If None the folder of the manifest, and then files
    may be anywhere: who wrote the manifest decides what is read.
    ties: of labelled or ranked files: "drop", "keep" (as listed, half the weight), or "error".
    columns: further fields for `Pair.extra`; None in records that do not have them.
    cache: the folder of the kept index; `cache_folder()` if None.

    Local clips (by their suffix: mp4, m4v, mov, mkv, webm) are handed out as paths, all else as bytes. A pair's key is
    its record's or else MANIFEST:RECORD, in lines and tables MANIFEST:LINE, with #WINNER-LOSER behind it for ranked
    files. A record is read again for each of its pairs; of remote manifests too, so that those are better kept locally.
    Takes 35 bytes of memory per pair; JSON lists are read as a whole, once.

    A record that is none (no JSON, no files, a weight below 0) is a pair that cannot be read, a PairError, and a
    warning counts those of a manifest; so is a file that is missing, or a manifest that has changed since. Raises
    SourceError, with the place, where no record is one; for a label of another value, and for a key that comes twice,
    because these say that something else is meant; and where it cannot be told where the next record begins, as in a
    list or a table after a mistake in its commas or quotes.
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
            warnings.warn(
                f"{bad} of {self._counts['records']} records are no pairs; the first is {error}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _scan(self, file: File, notes: Notes) -> Iterator[tuple[Any, ...]]:
        with io.BufferedReader(file.open(), 1 << 20) as opened:
            notes.form, records = _records(opened, file.name)
            first_bad: _RecordError | None = None
            try:
                for number, offset, data, record in records:
                    try:
                        yield from _rows(number, offset, data, record, notes)
                    except _LabelError as error:
                        raise _RecordError(number, error) from error
                    except ValueError as error:
                        notes.counts[_BAD] += 1
                        first_bad = first_bad or _RecordError(number, error)
                        # Of the first category: one of its own would have a share where categories are balanced.
                        yield 0, 0, False, offset, len(data), number, zlib.crc32(data), *_NO_PAIR
                if first_bad is not None and notes.counts[_BAD] == notes.counts["records"]:
                    raise first_bad
            except _RecordError as error:
                raise SourceError(f"{file.path}{_place(notes.form, error.number)}: {error}") from error

    def _within(self, rows: np.ndarray, size: int) -> bool:
        offsets, lengths = rows["offset"], rows["length"].astype(np.int64)
        return bool(((offsets >= 0) & (offsets <= size - lengths)).all())

    def _read(self, number: int, row: np.void) -> Pair:
        file, notes = self._files[number], self._notes[number]
        data = file.read(int(row["offset"]), int(row["length"]))
        if zlib.crc32(data) != row["crc"]:
            raise ValueError("the manifest has changed")
        record = _row(data, list(notes.fields)) if notes.form == "csv" else parse_json(data)
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
        return f"{file.path}{_place(notes.form, row['record'])}"

    def _arm(self, manifest: File, name: str, arm: Arm) -> Buffer | Path:
        try:
            return contents(_resolved(name, manifest, self._root))
        except (OSError, ValueError) as error:
            raise PairError(f"{name}: {error}", arm) from error


def _resolved(name: str, manifest: File, root: str | None) -> str:
    free = "://" in name or os.path.isabs(name)  # given whole: taken as it is
    if root is not None and (free or os.path.normpath(name).split("/", 1)[0] == ".."):
        raise ValueError(f"it is not within root, {root}")
    if free:
        return name
    folder = manifest.folder if root is None else root
    if "://" not in folder:
        return os.path.join(folder, name)
    protocol, _, folder = folder.partition("://")
    if protocol in ("http", "https"):  # where # ? and % would mean something else than a part of the name
        name = urllib.parse.quote(name)
    return f"{protocol}://{'/'.join(part for part in (folder.rstrip('/'), name) if part)}"


# ------------------------------------------------------------------------------------------------ records


_BAD = "bad records"
_NO_PAIR = 0, 0
"""In an index, the numbers of the two files of a record that is none."""


def _rows(
    number: int, offset: int, data: bytes, record: dict[str, Any] | ValueError, notes: Notes
) -> Iterator[tuple[Any, ...]]:
    """Raises ValueError for a record that is none."""
    notes.counts["records"] += 1
    if isinstance(record, ValueError):
        raise record
    fields, listed = Fields.of(record), _listed(record)
    notes.see(record)
    crc, category = zlib.crc32(data), notes.category(fields.category)
    for pair in listed.pairs:
        key = 0 if fields.key is None else key_hash(fields.key + listed.suffix(pair))
        yield key, category, pair.tie, offset, len(data), number, crc, pair.first, pair.second


class _Ranked(NamedTuple):
    """Two files of a record, by number, the better first."""

    first: int
    second: int
    tie: bool


_PLAIN = (("win", "lose"), ("path1", "path2"))
_CHOSEN = ("chosen", "rejected")  # last: beside other files these may be words or numbers that say which is better
_ARMS = (*_PLAIN, _CHOSEN)
_EXPECTED = "win and lose, chosen and rejected, path1 and path2, jpg_0, jpg_1 and label_0, or a list file_path"
_IMAGES, _LISTS = ("jpg_0", "jpg_1"), ("file_path", "image_path")
_IN_TABLES = (*_ARMS, (*_IMAGES, "label_0"))
_EXPECTED_IN_TABLES = "win, lose, or chosen, rejected, or path1, path2, or jpg_0, jpg_1, label_0"
_ONE_PAIR = [_Ranked(0, 1, False)]


class _Listed(NamedTuple):
    files: list[str]
    pairs: Iterable[_Ranked]  # to be gone through once; not worked out where only one of them is read
    ranked: bool

    def suffix(self, pair: _Ranked) -> str:
        return f"#{pair.first}-{pair.second}" if self.ranked else ""


def _listed(record: dict[str, Any]) -> _Listed:
    """Raises ValueError."""
    for names in _PLAIN:
        if _has(record, names):
            return _Listed([text_of(record, names[0]) or "", text_of(record, names[1]) or ""], _ONE_PAIR, False)
    for name in _LISTS:
        if isinstance(record.get(name), list):
            return _ranked(name, record)
    is_chosen = _has(record, _CHOSEN)
    if _has(record, _IMAGES) and ("label_0" in record or not is_chosen):
        return _labelled(record)
    if is_chosen:
        return _Listed([text_of(record, name) or "" for name in _CHOSEN], _ONE_PAIR, False)
    # None is there as a whole: what is missing of the first that is there in part?
    for name in _LISTS:
        if record.get(name) is not None:
            return _ranked(name, record)
    for names in (*_PLAIN, _IMAGES, _CHOSEN):
        if names[0] in record or names[1] in record:
            raise ValueError(f"it has no {names[1] if _has(record, names[:1]) else names[0]}")
    raise ValueError(f"it has {', '.join(record) or 'no fields'}; expected {_EXPECTED}")


def _has(record: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether something stands in all of these; in a table nothing is an empty text."""
    missing = [name for name in names if record.get(name) in (None, "")]  # faster than all() of a generator
    return not missing


def _labelled(record: dict[str, Any]) -> _Listed:
    """Pick-a-Pic's columns."""
    files = [text_of(record, name) or "" for name in _IMAGES]
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


# ------------------------------------------------------------------------------------------------ forms

Records = Iterator[tuple[int, int, bytes, dict[str, Any] | ValueError]]
"""The number of the record or its line, from 1; where its bytes begin; its bytes; itself, or why it is none."""


class _LabelError(ValueError):
    """Labels mean something else than they are taken for: not the trouble of one record."""


class _RecordError(ValueError):
    """What refuses a whole manifest, and where."""

    def __init__(self, number: int, reason: object) -> None:
        super().__init__(reason)
        self.number = number


def _place(form: str, number: int) -> str:
    return f": record {number}" if form == "list" else f":{number}"


def _records(file: io.BufferedReader, name: str) -> tuple[str, Records]:
    """The form, and the records. Raises ValueError, and as they are read _RecordError."""
    begin = file.read(1 << 16)
    start = len(_BOM) if begin.startswith(_BOM) else 0
    first = begin[start:].lstrip()[:1]
    file.seek(start)
    if name.lower().endswith(".csv"):
        return "csv", _table(file, start)
    if first == b"{":
        return "lines", _lines(file, start)
    if first == b"[":
        return "list", _list(file, start)
    raise ValueError("it is no manifest: it begins neither with { nor with [, and does not end in .csv")


def _lines(file: BinaryIO, offset: int) -> Records:
    for number in itertools.count(1):
        line = _line(file, number)
        if not line:
            return
        if not line.isspace():
            yield number, offset, line, _tried(parse_json, line)
        offset += len(line)


def _tried(read: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any] | ValueError:
    try:
        return read(*given)
    except ValueError as error:
        return error


def _line(file: BinaryIO, number: int) -> bytes:
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        raise _RecordError(number, f"it has more than {MAX_RECORD_BYTES} bytes")
    return line


def _table(file: BinaryIO, offset: int) -> Records:
    """The lines that the csv module takes for a record are counted: fields in quotes may have ends of lines in them."""
    taken: list[bytes] = []
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        while line := _line(file, number + 1):
            number += 1
            taken.append(line)
            yield line.decode(errors="surrogateescape")  # what is not UTF-8 is found in its record

    rows = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        first = number + 1
        try:
            row = next(rows, None)
            if row is None:
                break
            data = b"".join(taken)
            taken.clear()
            if row and header is None:
                _text(data)
                header = row
                if len(set(header)) < len(header) or not any({*names} <= {*header} for names in _IN_TABLES):
                    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
                    raise ValueError(
                        f"the header is {header}; expected {_EXPECTED_IN_TABLES} and others, all different"
                        + (f", and commas between them, not {other!r}" if other else "")
                    )
            elif row:
                assert header is not None
                yield first, offset, data, _tried(_named, row, header, data)
        except _RecordError:
            raise
        except (csv.Error, ValueError) as error:
            raise _RecordError(first, error) from error
        offset += len(data)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason}") from error


def _row(data: bytes, header: list[str]) -> dict[str, Any]:
    try:
        row = next(csv.reader(io.StringIO(_text(data), newline=""), strict=True), [])
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return _named(row, header, data)


def _named(row: list[str], header: list[str], data: bytes) -> dict[str, Any]:
    _text(data)
    if len(row) != len(header):
        raise ValueError(f"it has {len(row)} fields; expected {len(header)} as in the header")
    record: dict[str, Any] = dict(zip(header, row, strict=True))
    if record.get("prompt") == "" and record.get("caption"):
        record["prompt"] = None  # nothing rather than an empty prompt: a table cannot tell the two apart
    return record


_SPACE = re.compile(r"[ \t\r\n]*")


def _list(file: BinaryIO, offset: int) -> Records:
    """Each record is found in the text, then read by itself, as it will be later."""
    data = file.read()
    text = data.decode("latin-1")  # so that characters are counted as bytes; UTF-8 within strings does no harm
    decoder = json.JSONDecoder()
    at = _after_space(text, _after_space(text, 0) + 1)
    if text[at : at + 1] == "]":
        return
    for number in itertools.count(1):
        try:
            _, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise _RecordError(number, "it is too deeply nested") from None
        except json.JSONDecodeError as error:
            raise _RecordError(number, f"it is not JSON: {error.msg}, in line {error.lineno}") from error
        except ValueError as error:
            raise _RecordError(number, error) from error
        if end - at > MAX_RECORD_BYTES:
            raise _RecordError(number, f"it has more than {MAX_RECORD_BYTES} bytes")
        part = data[at:end]
        yield number, offset + at, part, _tried(parse_json, part)
        at = _after_space(text, end)
        if text[at : at + 1] != ",":
            break
        at = _after_space(text, at + 1)
    if text[at : at + 1] != "]" or _after_space(text, at + 1) != len(text):
        raise _RecordError(number, "it is followed by neither , nor a last ]")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
