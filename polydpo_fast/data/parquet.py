"""Preference pairs in Parquet files: Pick-a-Pic's columns, Open Image Preferences', or win and lose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Literal

import numpy as np

from ..cache import load_or_build
from .columns import (
    CATEGORY,
    HAS_LABEL,
    TIE,
    WEIGHT,
    WINS,
    IfThere,
    Layout,
    check_options,
    counted,
    keep,
    layout_of,
    row_weight,
    verdicts,
    warn_ignored,
)
from .files import File, Location, names
from .reading import was_given_up
from .source import Arm, Pair, PairError, Source, SourceError, fingerprint_of
from .splits import find_one_split

__all__ = ["ParquetPairs"]

_FORMAT = 2  # of the kept index; to be raised when what it holds changes, or what is refused
_FORGET_S = 60.0
_MOST_READS = 3  # of one row group at a time
_LOOK_S = 0.05  # after which a thread that waits looks whether the one that reads was given up
_LEAST_BOUND, _MOST_EXPANSION = 1 << 28, 64  # bytes that a row group may have as it is read, and times those stored
_MOST_ROWS = 1024
_READ_AHEAD = 1 << 20  # bytes; halves the memory of a read and is faster than whole column chunks at once


class ParquetPairs(Source):
    """The labelled rows of Parquet files.

    Only the columns of the labels are read at opening, and kept in an index. Row groups are read when a pair of theirs
    is asked for, once for all threads, and the last of them stay in memory. The bytes of an image are a view into its
    row group, which it keeps alive: do not hold on to many pairs.

    The columns say which layout it is: jpg_0, jpg_1, label_0, caption, has_label (Pick-a-Pic V1 and V2: label_0 is 1
    where jpg_0 wins, 0 where jpg_1 wins, 0.5 for a tie); chosen, rejected, prompt (Open Image Preferences); or win,
    lose and perhaps prompt. Images are binary, or structs with a field `bytes`. Rows without a label are
    left out. Five bytes of memory per pair (six to nine with categories).

    where: a file, a glob, a folder, an address that fsspec knows, or a list of them. Files of several splits,
        train-00000-of-00645.parquet and test-..., or train/ and validation/, are refused unless they are in a list.
    ties: "drop" leaves them out, "keep" gives them weight 0.5 and the arms in the order of the columns, "error" is a
        SourceError.
    columns: further ones, for `Pair.extra`.
    category, weight: columns of text or integers, and of numbers >= 0; None for none. If not given, `category` and
        `weight` count where they are there, and where they hold something else they are not used, with a warning.
        Without a text a pair's category is "", and without a number its weight is 1; a tie has half of it.
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
        pa = _pyarrow()
        check_options(ties, columns)
        if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, int) or memory_bytes < 0:
            raise ValueError(f"memory_bytes is {memory_bytes!r}; expected an int >= 0")
        self._files = find_one_split(where, [".parquet"])
        self._names = names(self._files)
        self._extra = tuple(columns)

        # Side by side: what takes time is waiting for the storage.
        with ThreadPoolExecutor(min(16, len(self._files))) as pool:
            indexes = list(pool.map(partial(_index_of, category=category, folder=cache), self._files))
        schemas = [pa.ipc.read_schema(pa.py_buffer(index["schema"].tobytes())) for index in indexes]
        self._layout = layout_of(schemas[0].names, self._files[0].path)
        for name in (self._layout.first, self._layout.second):
            if name in self._extra:
                raise ValueError(f"columns has {name}, an image of the pair; expected others")
        if isinstance(weight, IfThere) and not _is_usable(schemas, self._files, weight, _is_number, "numbers"):
            weight = None
        if isinstance(category, IfThere) and not _is_usable(
            schemas, self._files, category, _is_category, "text or integers"
        ):
            category = None
        self._weight = weight
        for file, schema in zip(self._files, schemas, strict=True):
            self._check_columns(schema, file)
        kinds = [schema.field(self._layout.first).type for schema in schemas]
        self._has_paths = any(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 for kind in kinds)

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
        self._ends = np.cumsum([block.pairs for block in blocks], dtype=np.int64)
        found = np.sum([np.bincount(index["verdict"], minlength=4) for index in indexes], axis=0)
        self._counts = {"files": len(self._files), **counted(found, len(self._rows), self._files[0].path)}
        self._categories = _merged_categories(indexes, rows) if category is not None else None
        facts = [
            (name, file.size, index["digest"].tobytes(), hashlib.sha256(index["verdict"].tobytes()).digest())
            for name, file, index in zip(self._names, self._files, indexes, strict=True)
        ]
        self._fingerprint = fingerprint_of("parquet", [1, ties, category, self._weight, *facts])
        self._groups = _Groups(memory_bytes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        block = self._block_of(index)
        # What the network failed to give once may come the next time; a damaged file stays damaged, most likely.
        forget_s = _FORGET_S if self._files[block.file].is_local else 0.0
        group = self._groups.get((block.file, block.number), partial(self._read, block), forget_s)
        row = int(self._rows[index])
        verdict = int(self._verdicts[index])
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
        return f"{self._files[self._block_of(index).file].path}, row {self._rows[index]}"

    def expect_window(self, blocks: int) -> None:
        self._groups.window = max(self._groups.window, min(blocks, len(self._blocks)))

    @property
    def blocks(self) -> np.ndarray:
        """The pairs of each row group that has any."""
        return np.diff(self._ends, prepend=0)

    def _block_of(self, index: int) -> _Block:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"pair {index} of {len(self._rows)}")
        return self._blocks[int(np.searchsorted(self._ends, index, side="right"))]

    def _image(self, group: _Group, row: int, column: str, arm: Arm) -> memoryview:
        data = group.images[column].get(row)
        if not data:
            paths = "; paths are not followed: embed the files, or write a .jsonl or .csv manifest of the paths"
            raise PairError(f"{column} has no bytes{paths if self._has_paths else ''}", arm)
        return data

    def _category_of(self, index: int) -> str:
        if self._categories is None:
            return ""
        texts, codes = self._categories
        return texts[int(codes[index])]

    def _check_columns(self, schema: Any, file: File) -> None:
        """A column that is missing or of a type that is not understood is a SourceError before anything is read."""
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
            if not _is_image(schema.field(name).type):
                raise SourceError(
                    f"{file.path}: {name} is {schema.field(name).type}; expected binary, or a struct with bytes"
                    + ("; for paths of files write a .jsonl or .csv manifest" * _is_text(schema.field(name).type))
                )
        if layout.prompt in schema.names and not _is_text(schema.field(layout.prompt).type):
            raise SourceError(f"{file.path}: {layout.prompt} is {schema.field(layout.prompt).type}; expected text")
        if has_weight:
            kind = schema.field(self._weight).type
            if not _is_number(kind):
                raise SourceError(f"{file.path}: {self._weight} is {kind}; expected numbers, or weight=None")

    def _read(self, block: _Block) -> _Group:
        """A row group, with the columns that pairs are made of. Raises PairError."""
        pa = _pyarrow()
        file = self._files[block.file]
        what = f"{file.path}, row group {block.number}"
        layout = self._layout
        images = dict.fromkeys((layout.first, layout.second))
        others = dict.fromkeys(name for name in (layout.prompt, self._weight, *self._extra) if name is not None)

        def read() -> Any:
            _check_unchanged(file)
            with _open(file) as parquet:
                schema = parquet.schema_arrow
                # Of a struct only its bytes: the path is of no use, and other fields may be large.
                wanted = [f"{n}.bytes" if pa.types.is_struct(schema.field(n).type) else n for n in images]
                wanted += [name for name in others if name in schema.names]
                found = pa.Table.from_batches(_batches(parquet, block.number, wanted, file.size))
            _check_unchanged(file)  # it may have been replaced in between
            return found

        try:
            table = file.patiently(read)
            if table.num_rows != block.rows:
                raise ValueError(f"it has {table.num_rows} rows; expected {block.rows}")
            return _Group(
                {name: _Binary(table.column(name)) for name in images},
                {name: table.column(name) for name in others if name in table.column_names},
                table.nbytes,
            )
        except Exception as error:  # pyarrow's, and those of the storages' clients
            raise PairError(f"{what}: {error or type(error).__name__}", whole_block=True) from error


# ------------------------------------------------------------------------------------------ row groups in memory


@dataclass(frozen=True)
class _Block:
    """The pairs of a row group: its file and its number there, its first row, how many rows and pairs it has."""

    file: int
    number: int
    begin: int
    rows: int
    pairs: int


class _Binary:
    """A column of binary values, handed out as views: pyarrow's own scalars copy them."""

    def __init__(self, column: Any) -> None:
        pa = _pyarrow()
        self._chunks = []
        self._ends: list[int] = []  # of the chunks, in rows
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
        """The bytes, read-only; None for null. What holds them keeps the whole column alive."""
        begin, places, data, valid = self._chunks[bisect_right(self._ends, row)]
        row -= begin
        return None if valid is not None and not valid[row] else data[int(places[row]) : int(places[row + 1])]


@dataclass(frozen=True)
class _Group:
    images: Mapping[str, _Binary]
    others: Mapping[str, Any]  # pyarrow's chunked arrays
    size: int  # in bytes


class _Kept:
    """What is known of one row group."""

    def __init__(self) -> None:
        self.group: _Group | None = None
        self.reader: threading.Thread | None = None  # the thread that reads it now
        self.reading = 0  # threads that do, those among them that were given up
        self.error = ""
        self.until = 0.0  # by time.monotonic(), the error is taken for granted


class _Memory:
    """What belongs to one process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.changed = threading.Condition()  # holds the lock of all that follows
        self.kept: OrderedDict[tuple[int, int], _Kept] = OrderedDict()


class _Groups:
    """The row groups read last, of up to `limit` bytes. Threads that ask for the same one wait for one of them to read
    it. No lock is held during a read: where the thread that reads is given up, because its storage hangs, another one
    reads the row group again. A copy, by fork or pickle, begins empty."""

    def __init__(self, limit: int, window: int = 0) -> None:
        self._limit, self.window = limit, window  # how many are to be read among each other
        self._warned = False
        self._memory = _Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._limit, self.window)

    def get(self, key: tuple[int, int], read: Callable[[], _Group], forget_s: float) -> _Group:
        """forget_s: how long a failure is remembered, which makes it cheap for the other pairs of the row group."""
        memory = self._memory
        if memory.process != os.getpid():  # another thread may have held the lock when the process was forked
            memory = self._memory = _Memory()
        me = threading.current_thread()
        with memory.changed:
            kept = memory.kept.setdefault(key, _Kept())
            memory.kept.move_to_end(key)
            if (group := self._wait(memory, kept, me)) is not None:
                return group
        error = ""
        try:
            group = read()
        except PairError as failure:
            error = failure.reason
            raise
        finally:
            with memory.changed:
                kept.reading -= 1
                if kept.reader is me:  # it was not given up in the meantime
                    kept.reader, kept.error = None, error
                    kept.until = time.monotonic() + forget_s if error else 0.0
                kept.group = kept.group or group
                held = self._evict(memory)
                memory.changed.notify_all()
        if held < self.window and not self._warned:
            self._warned = True
            warnings.warn(
                f"memory_bytes is {self._limit}, which holds {held} row groups such as the last one, of {group.size} "
                f"bytes, while {self.window} are shuffled together: they are read again and again; expected "
                f"memory_bytes={self.window * group.size} and some more, or a loader with a smaller window",
                RuntimeWarning,
                stacklevel=2,
            )
        return group

    def _wait(self, memory: _Memory, kept: _Kept, me: threading.Thread) -> _Group | None:
        """Until another thread has read the row group; None: this one is to read it."""
        while kept.group is None:
            if time.monotonic() < kept.until:
                raise PairError(kept.error, whole_block=True)
            reader = kept.reader
            nobody = reader is None or was_given_up(reader) or not reader.is_alive()
            # Those that were given up may only be slow: memory, and the storage's work, are not to be multiplied.
            if nobody and kept.reading < _MOST_READS:
                kept.reader, kept.reading = me, kept.reading + 1
                return None
            if was_given_up(me):  # the read takes longer than this thread was to wait: another one may begin it anew
                kept.reader = None
                raise PairError("its row group was being read for too long by another thread")
            memory.changed.wait(_LOOK_S)
        return kept.group

    def _evict(self, memory: _Memory) -> int:
        """Returns how many are left, or `window` where nothing had to go."""
        loaded = [(key, kept.group.size) for key, kept in memory.kept.items() if kept.group is not None]
        size = sum(size for _, size in loaded)
        left = len(loaded)
        for old, freed in loaded[:-1]:
            if size <= self._limit:
                break
            del memory.kept[old]
            size, left = size - freed, left - 1
        return left if left < len(loaded) else max(left, self.window)


# ------------------------------------------------------------------------------------------------------ the index


def _index_of(file: File, category: str | None, folder: str | os.PathLike[str] | None) -> Mapping[str, np.ndarray]:
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
        return file.patiently(partial(_read_index, file, category))
    except (SourceError, ImportError):
        raise
    except Exception as error:  # pyarrow's, and those of the storages' clients
        raise SourceError(f"{file.path}: {error or type(error).__name__}") from error


def _read_index(file: File, category: str | None) -> dict[str, np.ndarray]:
    pa = _pyarrow()
    with _open(file, () if category is None else (category,)) as parquet:
        facts, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
        layout = layout_of(schema.names, file.path)
        if facts.num_rows >= min(2**32, 64 * file.size):  # so many rows of images cannot be in there
            raise SourceError(f"{file.path} says that it has {facts.num_rows} rows in {file.size} bytes")
        labels = [name for name in (layout.label, HAS_LABEL) if name in schema.names and layout.label is not None]
        has_category = category in schema.names
        if category is not None and not isinstance(category, IfThere) and not has_category:
            raise SourceError(f"{file.path} has no column {category}; its columns are {', '.join(schema.names)}")
        if has_category and isinstance(category, IfThere) and not _is_category(schema.field(category).type):
            has_category = False  # nobody asked for it; opening says that it is not used
        if has_category and pa.types.is_nested(kind := schema.field(category).type):
            raise SourceError(f"{file.path}: {category} is {kind}; expected text or integers, or category=None")
        wanted = labels + ([category] if has_category else [])
        table = parquet.read(columns=wanted, use_threads=False)  # without any, no rows either
        groups = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    length = int.from_bytes(file.read(file.size - 8, 4), "little")
    footer = file.read(file.size - 8 - length, length)
    _check_unchanged(file)
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
    pa = _pyarrow()
    if layout.label is None:
        return np.full(rows, WINS, dtype=np.uint8)
    column = table.column(layout.label)
    types = pa.types
    if types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if not (types.is_floating(column.type) or types.is_integer(column.type) or types.is_null(column.type)):
        raise SourceError(f"{file.path}: {layout.label} is {column.type}; expected numbers")
    labels = column.cast(pa.float64(), safe=False).to_numpy()  # NaN for null
    labelled = None
    if HAS_LABEL in table.column_names:
        # Where it is null, the label decides.
        labelled = table.column(HAS_LABEL).cast(pa.bool_()).fill_null(True).to_numpy()
    return verdicts(labels, labelled, layout.label, file.path)


def _coded(column: Any) -> tuple[np.ndarray, list[str]]:
    """The number of each row's text, (rows,) int32, and the texts; "" for null. Equal texts may have two numbers."""
    pa = _pyarrow()
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string()).dictionary_encode()
    coded = column.unify_dictionaries().combine_chunks()
    texts = [text or "" for text in coded.dictionary.cast(pa.large_string()).to_pylist()]
    codes = coded.indices.cast(pa.int64())
    if codes.null_count:
        codes, texts = codes.fill_null(len(texts)), [*texts, ""]
    return codes.to_numpy(zero_copy_only=False).astype(np.int32), texts


def _merged_categories(
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


# ------------------------------------------------------------------------------------------------------- the files


def _batches(parquet: Any, group: int, columns: list[str], file_size: int) -> Iterator[Any]:
    """The rows of a row group, some at a time. Raises ValueError where they grow far beyond what the file holds: a
    value that is stored once may stand in any number of rows, and zeros compress to nothing."""
    stored = parquet.metadata.row_group(group).total_byte_size  # not of its columns: damaged ones abort the process
    bound = max(_MOST_EXPANSION * min(stored, file_size), _LEAST_BOUND)
    # No value is larger than all of them together: so many rows keep within the bound even if all are that one.
    rows = min(max(1, bound // max(1, stored)), _MOST_ROWS)
    size = 0
    # Arrow's own threads are left alone: the reader's run side by side already, and these survive a fork.
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        size += batch.nbytes
        if size > bound:
            raise ValueError(f"it has {stored} bytes in the file of {file_size}, and more than {bound} as it is read")
        yield batch


@contextlib.contextmanager
def _open(file: File, coded: Sequence[str] = ()) -> Iterator[Any]:
    """Opened for each read: no descriptor or lock is shared with a forked process, and none is kept per shard.

    coded: columns of text that are read as numbers and a dictionary, where they are there.
    """
    pa = _pyarrow()
    # A network is asked once for all that a row group needs.
    options = {"pre_buffer": not file.is_local, "buffer_size": _READ_AHEAD}
    with (
        pa.OSFile(file.path) if file.is_local else file.open() as handle,
        pa.parquet.ParquetFile(handle, **options) as parquet,
    ):
        schema = parquet.schema_arrow
        found = [name for name in coded if schema.get_field_index(name) >= 0 and _is_text(schema.field(name).type)]
        if found:
            facts = parquet.metadata
            parquet = pa.parquet.ParquetFile(handle, metadata=facts, read_dictionary=found, **options)
        yield parquet


def _check_unchanged(file: File) -> None:
    if file.changed():
        raise SourceError(f"{file.path} has been changed since it was opened")


def _is_text(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(
        is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def _is_number(kind: Any) -> bool:
    types = _pyarrow().types
    return any(is_number(kind) for is_number in (types.is_floating, types.is_integer, types.is_null))


def _is_category(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_dictionary(kind):
        return _is_category(kind.value_type)
    return _is_text(kind) or types.is_integer(kind) or types.is_boolean(kind)


def _is_usable(
    schemas: Sequence[Any], files: Sequence[File], name: str, is_kind: Callable[[Any], bool], expected: str
) -> bool:
    """Whether one of the files has a column of that name, which nobody asked for; in none it is of another type."""
    for schema, file in zip(schemas, files, strict=True):
        place = schema.get_field_index(name)
        if place >= 0 and not is_kind(schema.field(place).type):
            warn_ignored(file.path, name, str(schema.field(place).type), expected)
            return False
    return any(name in schema.names for schema in schemas)


def _is_image(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _is_image(kind.field(field).type) and not types.is_struct(kind.field(field).type)
    kinds = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_binary(kind) for is_binary in kinds)


@cache
def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'polydpo-fast[data]'") from None
    return pyarrow
