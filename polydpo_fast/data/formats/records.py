"""Preference pairs from a `datasets.Dataset`, or from any sequence of mappings."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from typing_extensions import Buffer

from ...values import is_number
from ..source import Arm, Pair, PairError, SourceError, fingerprint_of, worked_out_once
from .columns import (
    CATEGORY,
    HAS_LABEL,
    WEIGHT,
    WINS,
    IfThere,
    TableSource,
    check_options,
    counted,
    is_labelled,
    keep,
    layout_of,
    row_weight,
    verdicts,
    warn_ignored,
)
from .files import contents

__all__ = ["RecordPairs"]

_SAMPLES = 16  # records that the fingerprint looks into


class RecordPairs(TableSource):
    """The labelled records of a `datasets.Dataset` (not a streaming one), or of a sequence of mappings.

    records: with jpg_0, jpg_1, label_0, caption and perhaps has_label (Pick-a-Pic: label_0 is 1 where jpg_0 wins, 0
        where jpg_1 wins, 0.5 for a tie); or with chosen, rejected, prompt; or with win, lose and perhaps prompt. All
        are like the first. An image or a clip is bytes-like, a path, or a mapping of `bytes` and `path`, of which the
        bytes count if they are there. Local clips (by their suffix) are handed out as paths, all else as bytes.
        Columns of a `datasets.Dataset` that would be decoded to PIL images are switched to bytes; other PIL images
        are refused. Reading from several threads must be safe, as it is for lists and datasets.
    ties, columns: as of `ParquetPairs`.
    category, weight: as of `ParquetPairs`; the first record says whether there are any, and of what kind. With a
        category, or with labels, each record is looked at once at opening.

    The key of a pair is the number of its record. Five bytes of memory per pair, six to nine with categories.

    The fingerprint is that of the number of records, their labels and categories, and the content of a few.

    Raises SourceError where there is no pair, for other columns and for a label of another value; PairError for a
    record that cannot be read, and for an image that is missing.
    """

    kind: ClassVar[str] = "records"

    def __init__(
        self,
        records: Any,
        *,
        ties: Literal["drop", "keep", "error"] = "drop",
        columns: Sequence[str] = (),
        category: str | None = CATEGORY,
        weight: str | None = WEIGHT,
    ) -> None:
        check_options(ties, columns)
        _check_sequence(records)
        self._records, self._columnar = _as_stored(records)
        first = _first(self._records)
        self._layout = layout_of([str(name) for name in first], "records[0]")
        category = _used(category, first, _is_category, "text or an integer")
        weight = _used(weight, first, _is_weight, "a number")
        self._extra, self._category, self._weight = tuple(columns), category, weight
        for name in (*self._extra, category, weight):
            if name is not None and name not in first:
                raise SourceError(f"records[0] does not have {name}; it has {', '.join(map(str, first))}")
        for name in (self._layout.first, self._layout.second):
            if name in self._extra:
                raise ValueError(f"columns has {name}, an image of the pair; expected others")
            self._check_kind(first[name], name)

        label = self._layout.label
        labelled = HAS_LABEL if label is not None and HAS_LABEL in first else None
        found = self._read_columns([name for name in (label, labelled, category) if name is not None])
        if label is None:
            verdict = np.full(len(self._records), WINS, dtype=np.uint8)
        else:
            has = None if labelled is None else np.array([is_labelled(value) for value in found[labelled]], dtype=bool)
            verdict = verdicts(_numbers(found[label], label), has, label, "records")
        rows = keep(verdict, ties, "records")
        self._counts = counted(np.bincount(verdict, minlength=4), len(rows), "records")
        self._rows, self._verdicts, self._ties = rows.astype(np.uint32), verdict[rows], ties
        if category is not None:
            kept = [_text(found[category][row], category, row) for row in rows.tolist()]
            number = {text: n for n, text in enumerate(sorted(set(kept)))}
            codes = np.array([number[text] for text in kept], dtype=np.min_scalar_type(len(number)))
            self._categories = (*number,), codes

    def __getitem__(self, index: int) -> Pair:
        row, verdict = self._row(index)
        record = self._record(row)
        win, lose = (self._image(record, column, arm) for arm, column in self._layout.arms(verdict))
        for name in (*self._extra, self._weight):
            if name is not None and not isinstance(name, IfThere) and name not in record:
                raise PairError(f"it does not have {name}")
        prompt = record.get(self._layout.prompt)
        prompt = "" if _is_nothing(prompt) else prompt
        if not isinstance(prompt, str):
            raise PairError(f"{self._layout.prompt} is a {type(prompt).__name__}; expected text")
        return Pair(
            key=str(row),
            win=win,
            lose=lose,
            prompt=prompt,
            weight=row_weight(None if self._weight is None else record.get(self._weight), str(self._weight), verdict),
            category=self._category_of(index),
            extra={name: record[name] for name in self._extra},
        )

    @worked_out_once
    def fingerprint(self) -> str:
        facts: list[object] = [1, len(self._records), self._layout, self._ties, self._category, self._weight]
        facts += [self._rows.tobytes(), self._verdicts.tobytes()]
        if self._categories is not None:
            facts += [self._categories[0], self._categories[1].tobytes()]
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLES).astype(int)).tolist():
            try:
                pair = self[index]
            except PairError as error:
                facts.append(error.arm)
            else:
                facts += [pair.prompt, *(_digest(arm) for arm in (pair.win, pair.lose))]
        return fingerprint_of("records", facts)

    def position(self, index: int) -> str:
        return f"records[{self._row(index)[0]}]"

    def _check_kind(self, value: Any, name: str) -> None:
        """What one record lacks is a matter of this record; what is no image at all is one of them all."""
        try:
            _stored(value)
        except TypeError as error:
            raise SourceError(f"records[0]: {name} {error}") from error
        except ValueError:
            pass

    def _read_columns(self, names: list[str]) -> dict[str, Sequence[Any]]:
        if not names:
            return {}
        if self._columnar:  # nothing else is read
            return {name: self._records[name][:] for name in names}
        found: dict[str, list[Any]] = {name: [] for name in names}
        for row in range(len(self._records)):
            try:
                record = self._record(row)
            except PairError as error:
                raise SourceError(f"records[{row}]: {error.reason}") from error
            for name in names:
                found[name].append(record.get(name))
        return {**found}

    def _record(self, row: int) -> Mapping[str, Any]:
        try:
            record = self._records[row]
        except Exception as error:  # of somebody else's code
            raise PairError(f"{type(error).__name__}: {error}") from error
        if not isinstance(record, Mapping):
            raise PairError(f"it is a {type(record).__name__}; expected a mapping")
        return record

    def _image(self, record: Mapping[str, Any], column: str, arm: Arm) -> Buffer | Path:
        try:
            value = _stored(record.get(column))
        except (TypeError, ValueError) as error:
            raise PairError(f"{column} {error}", arm) from error
        if not isinstance(value, (str, os.PathLike)):
            return value
        try:
            return contents(os.fspath(value))
        except (OSError, ValueError) as error:
            raise PairError(
                f"{column} is at {os.fspath(value)}: {getattr(error, 'strerror', None) or error}", arm
            ) from error


def _check_sequence(records: Any) -> None:
    if isinstance(records, Mapping):  # a DatasetDict too
        raise TypeError(
            f"records is a {type(records).__name__} of {', '.join(map(str, records))}; expected a sequence of mappings"
            f": if these are data sets, records[{next(iter(records), 'train')!r}]"
        )
    if isinstance(records, (str, bytes)) or not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise TypeError(
            f"records is a {type(records).__name__}; expected a sequence of mappings, with a length"
            + ("; a streaming dataset has none: load it with streaming=False" * hasattr(records, "take"))
        )
    if not len(records):
        raise SourceError("records is empty; expected at least one pair")


def _first(records: Any) -> Mapping[str, Any]:
    """Raises TypeError or SourceError if it cannot be had, or is no mapping."""
    try:
        first = records[0]
    except (KeyError, TypeError) as error:  # a data frame is a mapping of its columns
        raise TypeError(
            f"records is a {type(records).__name__}, which has no records[0]; expected a sequence of mappings, of "
            "a data frame frame.to_dict('records')"
        ) from error
    if not isinstance(first, Mapping):
        raise SourceError(f"records[0] is a {type(first).__name__}; expected a mapping")
    return first


def _used(name: str | None, first: Mapping[str, Any], is_kind: Callable[[Any], bool], expected: str) -> str | None:
    """The name; of a column that nobody asked for, None if the first record has none, or one of another kind."""
    if isinstance(name, IfThere) and name in first and not is_kind(first[name]):
        warn_ignored("records[0]", name, repr(first[name]), expected)
        return None
    return None if isinstance(name, IfThere) and name not in first else name


def _as_stored(records: Any) -> tuple[Any, bool]:
    """A `datasets.Dataset` that hands out what is stored, and True; anything else as it is, and False."""
    if not all(hasattr(records, name) for name in ("features", "cast_column", "with_format")):
        return records, False
    if (getattr(records, "format", None) or {}).get("type") == "custom":  # somebody's own transform makes the columns
        return records, False
    records = records.with_format(None)
    for name, feature in records.features.items():
        if getattr(feature, "decode", False) is True:  # an Image or a Video
            records = records.cast_column(name, type(feature)(decode=False))
    return records, True


def _stored(value: Any) -> Buffer | str | os.PathLike[str]:
    """The bytes, or the path. Raises TypeError for what is neither, and ValueError where there is nothing."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("is missing")
    if isinstance(value, (str, os.PathLike)):
        return value
    if type(value).__module__.split(".")[0] == "PIL":
        raise TypeError(
            "is a PIL image; expected the bytes of its file: dataset.cast_column(name, datasets.Image(decode=False))"
        )
    try:
        view = memoryview(value)
    except TypeError:
        raise TypeError(f"is a {type(value).__name__}; expected bytes, a path, or a mapping of them") from None
    if view.ndim != 1 or view.itemsize != 1 or not view.c_contiguous:
        raise TypeError(f"is an array of shape {view.shape} and format {view.format!r}; expected the bytes of a file")
    if not len(view):
        raise ValueError("has no bytes")
    return view


def _numbers(values: Sequence[Any], name: str) -> np.ndarray:
    """NaN for None. Raises SourceError."""
    for row, value in enumerate(values):
        if not isinstance(value, (int, float, np.number, type(None))):
            raise SourceError(f"records, row {row}: {name} is {value!r}; expected a number")
    return np.array(values, dtype=np.float64)


def _is_weight(value: Any) -> bool:
    return value is None or is_number(value)


def _is_nothing(value: Any) -> bool:
    """None, or the NaN that a data frame has in its place. (A weight of NaN is a mistake.)"""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_category(value: Any) -> bool:
    return _is_nothing(value) or isinstance(value, (str, int, np.integer, np.bool_))


def _text(value: Any, name: str, row: int) -> str:
    """Raises SourceError."""
    if isinstance(value, (Mapping, list, tuple, set, bytes, np.ndarray)):
        raise SourceError(
            f"records[{row}]: {name} is of type {type(value).__name__}; expected text or integers, or category=None"
        )
    return "" if _is_nothing(value) else str(value)


def _digest(data: Buffer | os.PathLike[str]) -> str:
    """Of a path its last part: where the files are kept says nothing of them."""
    if isinstance(data, os.PathLike):
        return os.path.basename(os.fspath(data))
    return hashlib.sha256(data).hexdigest()
