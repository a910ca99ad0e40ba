"""Parquet files that are damaged, or change while they are read, or are none."""

import contextlib
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from data.parquet_files import SOME, counted_reads, pa, pick_a_pic, pq, write

from polydpo_fast.data.formats import parquet as module
from polydpo_fast.data.formats.parquet import ParquetPairs
from polydpo_fast.data.source import PairError, SourceError


def test_files_that_are_no_parquet(tmp_path, shard):
    content = Path(shard).read_bytes()
    damaged = {
        "empty": b"",
        "short": b"PAR1",
        "text": b"<html>404</html>" * 10,
        "cut": content[: len(content) // 2],
        "footer": content[:-8][: -int.from_bytes(content[-8:-4], "little")].ljust(len(content) - 8, b"\xff")
        + content[-8:],
        "length": content[:-8] + b"\xff\xff\xff\x7fPAR1",
    }
    for name, data in damaged.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=f"{name}.parquet"):
            ParquetPairs(path)


def test_a_damaged_row_group_costs_its_own_pairs_only(tmp_path, monkeypatch):
    path = write(tmp_path / "bad.parquet", pick_a_pic([(1.0, True)] * 12), rows_per_group=4, compression="snappy")
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(file.schema_arrow.names.index("jpg_0"))
        begin = min(p for p in (chunk.dictionary_page_offset, chunk.data_page_offset) if p)
        length = chunk.total_compressed_size
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * length)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch)
    for index in range(12):
        if 4 <= index < 8:
            with pytest.raises(PairError, match=r"bad.parquet, row group 1: ") as caught:
                source[index]
            assert caught.value.arm is None
        else:
            assert bytes(source[index].win) == b"zero %d" % index
    assert [number for _, number in reads] == [0, 1, 2], "a failure is not tried again"
    monkeypatch.setattr(module, "_FORGET_S", 0.01)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch)
    for _ in range(2):
        with pytest.raises(PairError):
            source[4]
        time.sleep(0.02)
    assert [number for _, number in reads] == [1, 1], "but after a while"


def test_any_flipped_byte_is_an_error_or_gives_a_pair(tmp_path):
    """Never another exception, never a hang."""
    path = write(tmp_path / "flip.parquet", pick_a_pic(SOME), rows_per_group=4)
    content = Path(path).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        data = bytearray(content)
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(data)
        try:
            source = ParquetPairs(path)
        except SourceError as error:
            outcomes.add("source" if "flip.parquet" in str(error) else "a source without its name")
            continue
        for index in range(len(source)):
            try:
                source[index]
                outcomes.add("pair")
            except PairError:
                outcomes.add("error")
    assert outcomes == {"source", "pair", "error"}


def test_a_file_that_has_changed_since(tmp_path):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    source[0]
    write(path, pick_a_pic([(0.0, True)] * 8), rows_per_group=4)
    with pytest.raises(PairError, match=r"row group 1: .*has been changed since it was opened"):
        source[4]
    os.unlink(path)
    fresh = pickle.loads(pickle.dumps(source))
    with pytest.raises(PairError, match=r"shard.parquet, row group 0: .*No such file"):
        fresh[0]
    with pytest.raises(SourceError, match="no such file"):
        ParquetPairs(path)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source, opened = ParquetPairs(path), module.open_parquet

    @contextlib.contextmanager
    def replaced(file):
        with opened(file) as parquet:
            yield parquet
        write(path, pick_a_pic([(0.0, True)] * 9), rows_per_group=4)

    monkeypatch.setattr(module, "open_parquet", replaced)
    with pytest.raises(PairError, match="has been changed since it was opened"):
        source[0]


def test_a_file_that_is_truncated_later(tmp_path):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    facts = os.stat(path)
    os.truncate(path, facts.st_size // 2)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(PairError, match="row group 0"):
        source[0]


def test_text_that_is_not_utf8_costs_one_pair(tmp_path):
    table = pa.table({"win": [b"a", b"b"], "lose": [b"c", b"d"], "prompt": pa.array([b"fine", b"\xff\xfe"])})
    binary = table.schema.get_field_index("prompt")
    text = pa.StringArray.from_buffers(2, *table.column("prompt").chunk(0).buffers()[1:])
    source = ParquetPairs(write(tmp_path / "text.parquet", table.set_column(binary, "prompt", text)))
    assert source[0].prompt == "fine"
    with pytest.raises(PairError, match="utf-8"):
        source[1]


def test_more_rows_than_a_file_can_hold_are_refused(tmp_path):
    count = 2_000_000
    table = pa.table({"win": pa.nulls(count, pa.binary()), "lose": pa.nulls(count, pa.binary())})
    path = write(tmp_path / "bomb.parquet", table, rows_per_group=count)
    with pytest.raises(SourceError, match="says that it has 2000000 rows"):
        ParquetPairs(path)
