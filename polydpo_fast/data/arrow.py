"""Parquet files through pyarrow: opening them, the types of their columns, and bytes without a copy."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from .files import File
from .source import SourceError

__all__ = [
    "Binary",
    "check_unchanged",
    "import_pyarrow",
    "is_category",
    "is_image",
    "is_number",
    "is_text",
    "open_parquet",
]

_READ_AHEAD = 1 << 20  # bytes; halves the memory of a read and is faster than whole column chunks at once


@cache
def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'polydpo-fast[data]'") from None
    return pyarrow


@contextlib.contextmanager
def open_parquet(file: File, coded: Sequence[str] = ()) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`, to be opened for each read: then no descriptor or lock is shared with a forked
    process, and none is held per shard.

    coded: columns to read as dictionaries, as far as they are there and hold text.
    """
    pa = import_pyarrow()
    # From a network, all that a row group needs is fetched at once.
    options = {"pre_buffer": not file.is_local, "buffer_size": _READ_AHEAD}
    with (
        pa.OSFile(file.path) if file.is_local else file.open() as handle,
        pa.parquet.ParquetFile(handle, **options) as parquet,
    ):
        schema = parquet.schema_arrow
        found = [name for name in coded if schema.get_field_index(name) >= 0 and is_text(schema.field(name).type)]
        if found:
            facts = parquet.metadata
            parquet = pa.parquet.ParquetFile(handle, metadata=facts, read_dictionary=found, **options)
        yield parquet


def check_unchanged(file: File) -> None:
    if file.changed():
        raise SourceError(f"{file.path} has been changed since it was opened")


class Binary:
    """A column of binary values as views; pyarrow's own scalars are copies."""

    def __init__(self, column: Any) -> None:
        pa = import_pyarrow()
        self._chunks = []
        self._ends: list[int] = []  # rows up to the end of each chunk
        for chunk in column.chunks:
            if pa.types.is_struct(chunk.type):
                chunk = pa.compute.struct_field(chunk, "bytes")  # null where the struct is
            if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
                chunk = chunk.cast(pa.large_binary())
            valid = None if chunk.null_count == 0 else chunk.is_valid().to_numpy(zero_copy_only=False)
            _, offsets, data = chunk.buffers()
            kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
            # An empty array may have no offsets at all.
            places = np.frombuffer(offsets, kind)[chunk.offset :] if len(chunk) else np.zeros(1, kind)
            begin = self._ends[-1] if self._ends else 0
            self._chunks.append((begin, places, memoryview(data or b"").cast("B").toreadonly(), valid))
            self._ends.append(begin + len(chunk))

    def get(self, row: int) -> memoryview | None:
        """The bytes, read-only; None for null. They keep the whole column alive."""
        begin, places, data, valid = self._chunks[bisect_right(self._ends, row)]
        row -= begin
        return None if valid is not None and not valid[row] else data[int(places[row]) : int(places[row + 1])]


def is_text(kind: Any) -> bool:
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def is_number(kind: Any) -> bool:
    types = import_pyarrow().types
    return any(test(kind) for test in (types.is_floating, types.is_integer, types.is_null))


def is_category(kind: Any) -> bool:
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        return is_category(kind.value_type)
    return is_text(kind) or types.is_integer(kind) or types.is_boolean(kind)


def is_image(kind: Any) -> bool:
    types = import_pyarrow().types
    if types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and is_image(kind.field(field).type) and not types.is_struct(kind.field(field).type)
    kinds = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in kinds)
