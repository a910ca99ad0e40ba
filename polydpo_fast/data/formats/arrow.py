"""Parquet files through pyarrow: opening them, the types of their columns, and bytes without a copy."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..reading import was_given_up
from ..source import SourceError
from .files import File

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

_LEAST_FETCHED = 1 << 17  # bytes: labels of small row groups come together
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
        pa.OSFile(file.path) if file.is_local else pa.PythonFile(_Remote(file), mode="r") as handle,
        pa.parquet.ParquetFile(handle, **options) as parquet,
    ):
        schema = parquet.schema_arrow
        found = [name for name in coded if schema.get_field_index(name) >= 0 and is_text(schema.field(name).type)]
        if found:
            facts = parquet.metadata
            parquet = pa.parquet.ParquetFile(handle, metadata=facts, read_dictionary=found, **options)
        yield parquet


class _Remote(io.RawIOBase):
    """A remote file for pyarrow. What it asks for is fetched by another thread, because at the end of the process one
    that waits for a network within pyarrow would abort it: where the thread that opened the file is given up, reading
    is an error at once."""

    def __init__(self, file: File) -> None:
        self._file, self._owner = file, threading.current_thread()
        self._at, self._begin, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, length: int = -1) -> bytes:
        rest = self._file.size - self._at
        length = rest if length < 0 else min(length, rest)
        if not self._begin <= self._at <= self._at + length <= self._begin + len(self._data):
            self._begin, self._data = self._at, self._fetched(self._at, min(max(length, _LEAST_FETCHED), rest))
        found = self._data[self._at - self._begin :][:length]
        self._at += len(found)
        return found

    def _fetched(self, begin: int, length: int) -> bytes:
        done: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                done.put(self._file.read(begin, length))
            except BaseException as error:  # a panic of Rust's, asyncio's CancelledError: else it would be waited for
                done.put(error)

        threading.Thread(target=fetch, name="polydpo-fetch", daemon=True).start()
        while True:
            try:
                found = done.get(timeout=0.05)
            except queue.Empty:
                if was_given_up(self._owner):
                    raise OSError("nobody waits for it any more") from None
                continue
            if isinstance(found, BaseException):
                raise found
            return found


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
