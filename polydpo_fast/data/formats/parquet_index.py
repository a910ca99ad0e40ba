"""What is kept of a Parquet file: who wins in each row, its row groups, its columns and its categories."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...cache import load_or_build
from ..source import SourceError
from .arrow import check_unchanged, import_pyarrow, is_category, is_number, open_parquet
from .columns import HAS_LABEL, TIE, WINS, IfThere, Layout, layout_of, verdicts
from .files import File

__all__ = ["index_of", "merged_categories"]

_FORMAT = 2  # of the kept index; to be raised when what it holds changes, or what is refused


def index_of(file: File, category: str | None, folder: str | os.PathLike[str] | None) -> Mapping[str, np.ndarray]:
    if not file.stamp:  # nothing would tell that it has changed
        return _build_index(file, category)
    place = os.path.abspath(file.path) if file.is_local else file.path
    asked = not isinstance(category, IfThere)
    stamp = json.dumps(["parquet", _FORMAT, category, asked, place, file.size, file.stamp])
    return load_or_build(stamp, partial(_build_index, file, category), folder, partial(_is_index, category=category))


def _build_index(file: File, category: str | None) -> dict[str, np.ndarray]:
    """Arrays of one file.

    verdict: (rows,) uint8, of `columns.verdicts`. groups: (row groups,) int64, their rows. schema: Arrow's, serialised.
    digest: of the footer, which says where each column begins and how long it is, and so changes with the content.
    With a category: codes, (rows,) int32, and texts, a list in JSON; both empty in a file without that column.
    """
    try:
        return _read_index(file, category)
    except (SourceError, ImportError):
        raise
    except Exception as error:  # pyarrow's, and those of the storages' clients
        raise SourceError(f"{file.path}: {error or type(error).__name__}") from error


def _read_index(file: File, category: str | None) -> dict[str, np.ndarray]:
    pa = import_pyarrow()
    with open_parquet(file, () if category is None else (category,)) as parquet:
        facts, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
        layout = layout_of(schema.names, file.path)
        if facts.num_rows >= min(2**32, 64 * file.size):  # so many rows of images cannot be in there
            raise SourceError(f"{file.path} says that it has {facts.num_rows} rows in {file.size} bytes")
        labels = [name for name in (layout.label, HAS_LABEL) if name in schema.names and layout.label is not None]
        has_category = category in schema.names
        if category is not None and not isinstance(category, IfThere) and not has_category:
            raise SourceError(f"{file.path} has no column {category}; its columns are {', '.join(schema.names)}")
        if has_category and isinstance(category, IfThere) and not is_category(schema.field(category).type):
            has_category = False  # nobody asked for it; opening says that it is not used
        if has_category and pa.types.is_nested(kind := schema.field(category).type):
            raise SourceError(f"{file.path}: {category} is {kind}; expected text or integers, or category=None")
        wanted = labels + ([category] if has_category else [])
        table = parquet.read(columns=wanted, use_threads=False)  # without any, no rows either
        groups = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    length = int.from_bytes(file.read(file.size - 8, 4), "little")
    footer = file.read(file.size - 8 - length, length)
    check_unchanged(file)
    if min(groups, default=0) < 0 or sum(groups) != facts.num_rows or (wanted and len(table) != facts.num_rows):
        raise SourceError(f"{file.path}: its row groups do not add up to its {facts.num_rows} rows")
    index = {
        "verdict": _verdicts(table, layout, facts.num_rows, file),
        "groups": np.array(groups, dtype=np.int64),
        "schema": np.frombuffer(schema.serialize(), np.uint8),
        "digest": np.frombuffer(hashlib.sha256(footer).digest(), np.uint8),
    }
    if category is not None:
        try:
            codes, texts = _coded(table.column(category)) if has_category else (np.zeros(0, np.int32), [])
        except Exception as error:  # bytes that are not UTF-8, whatever a conversion raises
            raise SourceError(f"{file.path}: {category} is no text: {error}; expected text or integers") from error
        index["codes"] = codes
        index["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    return index


def _is_index(arrays: Mapping[str, np.ndarray], category: str | None) -> bool:
    """Whether they hang together as those of `_build_index` do."""
    verdict, groups = arrays["verdict"], arrays["groups"]
    rows = int(groups.sum())
    fits = verdict.dtype == np.uint8 and verdict.shape == (rows,) and groups.ndim == 1 and bool((groups >= 0).all())
    if fits and category is not None:
        codes, texts = arrays["codes"], json.loads(arrays["texts"].tobytes())
        fits = codes.shape == (rows if len(texts) else 0,) and bool(((codes >= 0) & (codes < len(texts))).all())
    return fits and bool((verdict <= TIE).all()) and {"schema", "digest"} <= arrays.keys()


def _verdicts(table: Any, layout: Layout, rows: int, file: File) -> np.ndarray:
    pa = import_pyarrow()
    if layout.label is None:
        return np.full(rows, WINS, dtype=np.uint8)
    column = table.column(layout.label)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if not is_number(column.type):
        raise SourceError(f"{file.path}: {layout.label} is {column.type}; expected numbers")
    labels = column.cast(pa.float64(), safe=False).to_numpy()  # NaN for null
    labelled = None
    if HAS_LABEL in table.column_names:
        # Where it is null, the label decides.
        labelled = table.column(HAS_LABEL).cast(pa.bool_()).fill_null(True).to_numpy()
    return verdicts(labels, labelled, layout.label, file.path)


def _coded(column: Any) -> tuple[np.ndarray, list[str]]:
    """The number of each row's text, (rows,) int32, and the texts; "" for null. Equal texts may have two numbers."""
    pa = import_pyarrow()
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string()).dictionary_encode()
    coded = column.unify_dictionaries().combine_chunks()
    texts = [text or "" for text in coded.dictionary.cast(pa.large_string()).to_pylist()]
    codes = coded.indices.cast(pa.int64())
    if codes.null_count:
        codes, texts = codes.fill_null(len(texts)), [*texts, ""]
    return codes.to_numpy(zero_copy_only=False).astype(np.int32), texts


def merged_categories(
    indexes: Sequence[Mapping[str, np.ndarray]], rows: Sequence[np.ndarray]
) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts that pairs have, sorted, and the number of each pair's."""
    texts = [json.loads(index["texts"].tobytes()) or [""] for index in indexes]
    codes = [
        index["codes"][kept] if len(index["codes"]) else np.zeros(len(kept), np.int32)
        for index, kept in zip(indexes, rows, strict=True)
    ]
    used = [[text[code] for code in np.unique(code_of_pair)] for text, code_of_pair in zip(texts, codes, strict=True)]
    merged = sorted({text for file in used for text in file})
    number = {text: n for n, text in enumerate(merged)}
    kind = np.min_scalar_type(len(merged))
    parts = [
        np.array([number.get(text, 0) for text in file], dtype=kind)[code_of_pair]
        for file, code_of_pair in zip(texts, codes, strict=True)
        if len(code_of_pair)
    ]
    return tuple(merged), np.concatenate(parts)
