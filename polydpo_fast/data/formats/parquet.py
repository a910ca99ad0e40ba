"""Preference pairs in Parquet files: Pick-a-Pic's columns, Open Image Preferences', or win and lose."""

from __future__ import annotations

import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from ...values import is_int
from ..source import Arm, Pair, PairError, SourceError, fingerprint_of
from .arrow import Binary, check_unchanged, import_pyarrow, is_category, is_image, is_number, is_text, open_parquet
from .columns import (
    CATEGORY,
    WEIGHT,
    IfThere,
    TableSource,
    check_options,
    counted,
    keep,
    layout_of,
    row_weight,
    warn_ignored,
)
from .files import File, Location, names
from .parquet_index import index_of, merged_categories
from .row_groups import RowGroup, RowGroups
from .splits import find_one_split

__all__ = ["ParquetPairs"]

_FORGET_S = 60.0  # after which a row group that could not be read is tried again
_LEAST_BOUND = 1 << 28  # bytes that any row group may take in memory
_MOST_EXPANSION = 64  # times its bytes in the file that a larger one may take
_MOST_ROWS = 1024  # decoded at once


class ParquetPairs(TableSource):
    """The labelled rows of Parquet files.

    Only the columns of the labels are read at opening, and kept in an index. Row groups are read when a pair of theirs
    is asked for, once for all threads, and the last of them stay in memory. The bytes of an image are a view into its
    row group, which it keeps alive: do not hold on to many pairs.

    The columns say which layout it is: jpg_0, jpg_1, label_0, caption, has_label (Pick-a-Pic V1 and V2: label_0 is 1
    where jpg_0 wins, 0 where jpg_1 wins, 0.5 for a tie); chosen, rejected, prompt (Open Image Preferences); or win,
    lose and perhaps prompt. Images are binary, or structs with a field `bytes`. Rows without a label are
    left out. Five bytes of memory per pair (six to nine with categories).

    where: a file, a glob, a folder, an address that fsspec knows, or a list of them. Files of several splits,
        train-00000-of-00645.parquet and test-..., or train/ and validation/, are refused unless a list gives them one
        by one.
    ties: "drop" leaves them out, "keep" gives them weight 0.5 and the arms in the order of the columns, "error" is a
        SourceError.
    columns: further ones, for `Pair.extra`.
    category, weight: columns of text or integers, and of numbers >= 0; None for none. If not given, `category` and
        `weight` are used if they are there; of another type they are not used, and a warning says so. Null means
        category "" and weight 1; a tie has half the weight.
    cache: folder for the index; the user's cache folder if None.
    memory_bytes: row groups of up to so many bytes in all are kept in memory; the latest is in any case. It should be
        enough for as many as a loader shuffles together, or they are read again and again.

    The key of a pair is "<file name>:<row>", with as many folders before the name as make the names of the files
    different.

    Raises SourceError where a file is no Parquet file, has other columns, or a label of another value; PairError for a
    pair whose image is missing, or whose row group is damaged.
    """

    kind: ClassVar[str] = "Parquet"
    random_access: ClassVar[bool] = False

    def __init__(
        self,
        where: Location | Sequence[Location],
        *,
        ties: Literal["drop", "keep", "error"] = "drop",
        columns: Sequence[str] = (),
        category: str | None = CATEGORY,
        weight: str | None = WEIGHT,
        cache: str | os.PathLike[str] | None = None,
        memory_bytes: int = 1 << 32,
    ) -> None:
        pa = import_pyarrow()
        check_options(ties, columns)
        if not is_int(memory_bytes) or memory_bytes < 0:
            raise ValueError(f"memory_bytes is {memory_bytes!r}; expected an int >= 0")
        self._files = find_one_split(where, [".parquet"])
        self._names = names(self._files)
        self._extra = tuple(columns)

        # Side by side: what takes time is waiting for the storage.
        with ThreadPoolExecutor(min(16, len(self._files))) as pool:
            indexes = list(pool.map(partial(index_of, category=category, folder=cache), self._files))
        schemas = [pa.ipc.read_schema(pa.py_buffer(index["schema"].tobytes())) for index in indexes]
        self._layout = layout_of(schemas[0].names, self._files[0].path)
        for name in (self._layout.first, self._layout.second):
            if name in self._extra:
                raise ValueError(f"columns has {name}, an image of the pair; expected others")
        self._weight = _used(weight, schemas, self._files, is_number, "numbers")
        category = _used(category, schemas, self._files, is_category, "text or integers")
        for file, schema in zip(self._files, schemas, strict=True):
            self._check_columns(schema, file)
        kinds = [schema.field(self._layout.first).type for schema in schemas]
        self._has_paths = any(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 for kind in kinds)

        rows = self._keep_rows(indexes, ties)
        found = np.sum([np.bincount(index["verdict"], minlength=4) for index in indexes], axis=0)
        self._counts = {"files": len(self._files), **counted(found, len(self._rows), self._files[0].path)}
        self._categories = merged_categories(indexes, rows) if category is not None else None
        facts = [
            (name, file.size, index["digest"].tobytes(), hashlib.sha256(index["verdict"].tobytes()).digest())
            for name, file, index in zip(self._names, self._files, indexes, strict=True)
        ]
        self._fingerprint = fingerprint_of("parquet", [1, ties, category, self._weight, *facts])
        self._groups = RowGroups(memory_bytes)

    def _keep_rows(self, indexes: Sequence[Mapping[str, np.ndarray]], ties: str) -> list[np.ndarray]:
        """Takes the rows that are pairs, and the row groups that have any. Returns the rows, file by file."""
        rows, flags, blocks = [], [], []
        for number, (file, index) in enumerate(zip(self._files, indexes, strict=True)):
            kept = keep(index["verdict"], ties, file.path)
            rows.append(kept.astype(np.uint32))
            flags.append(index["verdict"][kept])
            ends = np.cumsum(index["groups"])
            sizes = np.diff(np.searchsorted(kept, ends), prepend=0)
            blocks += [
                _Block(number, g, int(ends[g] - index["groups"][g]), int(index["groups"][g]), int(sizes[g]))
                for g in np.flatnonzero(sizes).tolist()
            ]
        self._rows, self._verdicts, self._blocks = np.concatenate(rows), np.concatenate(flags), blocks
        self._ends = list(itertools.accumulate(block.pairs for block in blocks))  # as in `IndexedSource`
        return rows

    def __getitem__(self, index: int) -> Pair:
        row, verdict = self._row(index)
        block = self._block_of(index)
        # What a network failed to give may come the next time; a damaged file most likely stays damaged.
        forget_s = _FORGET_S if self._files[block.file].is_local else 0.0
        group = self._groups.get((block.file, block.number), partial(self._read, block), forget_s)
        win, lose = (self._image(group, row - block.begin, column, arm) for arm, column in self._layout.arms(verdict))
        try:
            values = {name: column[row - block.begin].as_py() for name, column in group.others.items()}
        except Exception as error:  # text that is not UTF-8, times beyond Python's, whatever a conversion raises
            raise PairError(f"{error or type(error).__name__}") from error
        return Pair(
            key=f"{self._names[block.file]}:{row}",
            win=win,
            lose=lose,
            prompt=values.get(self._layout.prompt) or "",
            weight=row_weight(values.get(self._weight or ""), f"row {row}: {self._weight}", verdict),
            category=self._category_of(index),
            extra={name: values[name] for name in self._extra},
        )

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def position(self, index: int) -> str:
        row, _ = self._row(index)
        return f"{self._files[self._block_of(index).file].path}, row {row}"

    def expect_window(self, blocks: int) -> None:
        self._groups.window = max(self._groups.window, min(blocks, len(self._blocks)))

    @property
    def blocks(self) -> np.ndarray:
        """The pairs of each row group that has any."""
        return np.diff(self._ends, prepend=0)

    def _block_of(self, index: int) -> _Block:
        return self._blocks[bisect_right(self._ends, index)]

    def _image(self, group: RowGroup, row: int, column: str, arm: Arm) -> memoryview:
        data = group.images[column].get(row)
        if not data:
            paths = "; paths are not followed: embed the files, or write a .jsonl or .csv manifest of the paths"
            raise PairError(f"{column} has no bytes{paths if self._has_paths else ''}", arm)
        return data

    def _check_columns(self, schema: Any, file: File) -> None:
        """Raises SourceError for a column that is missing, or of a type that is not understood."""
        layout = self._layout
        if (other := layout_of(schema.names, file.path)) != layout:
            raise SourceError(
                f"{file.path} has {other.first} and {other.second}; the first file {layout.first} and {layout.second}"
            )
        has_weight = self._weight in schema.names
        weight = self._weight if has_weight or not isinstance(self._weight, IfThere) else None
        for name in [*layout.needed, *self._extra, weight]:
            if name is not None and schema.get_field_index(name) < 0:
                twice = " once" if name in schema.names else ""
                raise SourceError(f"{file.path} does not have {name}{twice}; its columns are {', '.join(schema.names)}")
        for name in (layout.first, layout.second):
            if not is_image(schema.field(name).type):
                raise SourceError(
                    f"{file.path}: {name} is {schema.field(name).type}; expected binary, or a struct with bytes"
                    + ("; for paths of files write a .jsonl or .csv manifest" * is_text(schema.field(name).type))
                )
        if layout.prompt in schema.names and not is_text(schema.field(layout.prompt).type):
            raise SourceError(f"{file.path}: {layout.prompt} is {schema.field(layout.prompt).type}; expected text")
        if has_weight:
            kind = schema.field(self._weight).type
            if not is_number(kind):
                raise SourceError(f"{file.path}: {self._weight} is {kind}; expected numbers, or weight=None")

    def _read(self, block: _Block) -> RowGroup:
        """A row group, with the columns that pairs are made of. Raises PairError."""
        pa = import_pyarrow()
        file = self._files[block.file]
        what = f"{file.path}, row group {block.number}"
        layout = self._layout
        images = dict.fromkeys((layout.first, layout.second))
        others = dict.fromkeys(name for name in (layout.prompt, self._weight, *self._extra) if name is not None)

        try:
            check_unchanged(file)
            with open_parquet(file) as parquet:
                schema = parquet.schema_arrow
                # Of a struct only its bytes: the path is of no use, and other fields may be large.
                wanted = [f"{n}.bytes" if pa.types.is_struct(schema.field(n).type) else n for n in images]
                wanted += [name for name in others if name in schema.names]
                table = pa.Table.from_batches(_batches(parquet, block.number, wanted, file.size))
            check_unchanged(file)  # it may have been replaced in between
            if table.num_rows != block.rows:
                raise ValueError(f"it has {table.num_rows} rows; expected {block.rows}")
            return RowGroup(
                {name: Binary(table.column(name)) for name in images},
                {name: table.column(name) for name in others if name in table.column_names},
                table.nbytes,
            )
        except Exception as error:  # pyarrow's, and those of the storages' clients
            raise PairError(f"{what}: {error or type(error).__name__}", whole_block=True) from error


@dataclass(frozen=True)
class _Block:
    """The pairs of a row group: its file and its number there, its first row, how many rows and pairs it has."""

    file: int
    number: int
    begin: int
    rows: int
    pairs: int


def _used(
    name: str | None, schemas: Sequence[Any], files: Sequence[File], is_kind: Callable[[Any], bool], expected: str
) -> str | None:
    """The name; of a column that nobody asked for, None where no file has it, or one has it with another type."""
    if not isinstance(name, IfThere):
        return name
    for schema, file in zip(schemas, files, strict=True):
        place = schema.get_field_index(name)
        if place >= 0 and not is_kind(schema.field(place).type):
            warn_ignored(file.path, name, str(schema.field(place).type), expected)
            return None
    return name if any(name in schema.names for schema in schemas) else None


def _batches(parquet: Any, group: int, columns: list[str], file_size: int) -> Iterator[Any]:
    """The rows of a row group, some at a time. Raises ValueError if they grow far beyond what the file holds: a value
    that is stored once may fill any number of rows, and zeros compress to nothing."""
    stored = parquet.metadata.row_group(group).total_byte_size  # of single columns, damaged ones would abort
    bound = max(_MOST_EXPANSION * min(stored, file_size), _LEAST_BOUND)
    # No value is larger than all that is stored, so this many rows stay within the bound even if all are the same one.
    rows = min(max(1, bound // max(1, stored)), _MOST_ROWS)
    size = 0
    # Without Arrow's own threads: the loader's readers run side by side already, and may be started after a fork.
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        size += batch.nbytes
        if size > bound:
            raise ValueError(f"it has {stored} bytes in the file of {file_size}, and more than {bound} as it is read")
        yield batch
