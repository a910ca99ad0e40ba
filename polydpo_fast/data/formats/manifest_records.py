"""How manifests hold their records: one in each line, as a table with a header, or in a JSON list."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from .fields import MAX_RECORD_BYTES, parse_json

__all__ = ["RecordError", "place_of", "read_row", "records_of"]

_BOM = b"\xef\xbb\xbf"
_TABLES = (("win", "lose"), ("chosen", "rejected"), ("path1", "path2"), ("jpg_0", "jpg_1", "label_0"))
_EXPECTED = "win, lose, or chosen, rejected, or path1, path2 (the better first), or jpg_0, jpg_1, label_0"
_SPACE = re.compile(r"[ \t\r\n]*")

Records = Iterator[tuple[int, int, bytes, dict[str, Any] | ValueError]]
"""Its number or that of its line, from 1; the offset of its bytes; its bytes; the record, or why it is none."""


class RecordError(ValueError):
    """Why a whole manifest is refused. number: of the record or line at fault."""

    def __init__(self, number: int, reason: object) -> None:
        super().__init__(reason)
        self.number = number


def place_of(form: str, number: int) -> str:
    """What follows the manifest's path in messages."""
    return f": record {number}" if form == "list" else f":{number}"


def records_of(file: io.BufferedReader, name: str) -> tuple[str, Records]:
    """The form ("lines", "csv" or "list"), and the records. Raises ValueError; RecordError while they are read."""
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
        raise RecordError(number, f"it has more than {MAX_RECORD_BYTES} bytes")
    return line


def _table(file: BinaryIO, offset: int) -> Records:
    """Notes which lines the csv module takes for each record: quoted fields may contain line breaks."""
    taken: list[bytes] = []
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        while line := _line(file, number + 1):
            number += 1
            taken.append(line)
            yield line.decode(errors="surrogateescape")  # its record says later what is not UTF-8

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
                if len(set(header)) < len(header) or not any({*names} <= {*header} for names in _TABLES):
                    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
                    raise ValueError(
                        f"the header is {header}; expected {_EXPECTED}; and others, all different"
                        + (f", and commas between them, not {other!r}" if other else "")
                    )
            elif row:
                assert header is not None
                yield first, offset, data, _tried(_named, row, header, data)
        except RecordError:
            raise
        except (csv.Error, ValueError) as error:
            raise RecordError(first, error) from error
        offset += len(data)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason}") from error


def read_row(data: bytes, header: list[str]) -> dict[str, Any]:
    """The record in these bytes of a table. Raises ValueError."""
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
        record["prompt"] = None  # missing rather than empty, which a table cannot tell apart
    return record


def _list(file: BinaryIO, offset: int) -> Records:
    """Finds where each record ends, and reads it by itself, as will be done again for its pairs."""
    data = file.read()
    text = data.decode("latin-1")  # one character per byte; UTF-8 within strings does no harm
    decoder = json.JSONDecoder()
    at = _after_space(text, _after_space(text, 0) + 1)
    if text[at : at + 1] == "]":
        return
    for number in itertools.count(1):
        try:
            _, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise RecordError(number, "it is too deeply nested") from None
        except json.JSONDecodeError as error:
            raise RecordError(number, f"it is not JSON: {error.msg}, in line {error.lineno}") from error
        except ValueError as error:
            raise RecordError(number, error) from error
        if end - at > MAX_RECORD_BYTES:
            raise RecordError(number, f"it has more than {MAX_RECORD_BYTES} bytes")
        part = data[at:end]
        yield number, offset + at, part, _tried(parse_json, part)
        at = _after_space(text, end)
        if text[at : at + 1] != ",":
            break
        at = _after_space(text, at + 1)
    if text[at : at + 1] != "]" or _after_space(text, at + 1) != len(text):
        raise RecordError(number, "it is followed by neither , nor a last ]")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
