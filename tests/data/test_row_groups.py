"""Row groups of Parquet files: read once for all threads, kept by size, handed out without a copy."""

import asyncio
import os
import pickle
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pairs import everything, plain, png
from data.parquet_files import counted_reads, expected, pa, pick_a_pic, write

from polydpo_fast.data import PairLoader
from polydpo_fast.data.formats import parquet as module
from polydpo_fast.data.formats.arrow import Binary
from polydpo_fast.data.formats.parquet import ParquetPairs
from polydpo_fast.data.reading import Readers
from polydpo_fast.data.source import PairError


def test_a_row_group_that_grows_without_bound_is_refused(tmp_path, monkeypatch):
    """A value that the file has once stands in all of its rows."""
    monkeypatch.setattr(module, "_LEAST_BOUND", 1 << 22)
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([os.urandom(1 << 16)]))
    table = pa.table({"win": many, "lose": pa.array([b"small"] * 2000)})
    options = dict(store_schema=False, dictionary_pagesize_limit=1 << 20)
    path = write(tmp_path / "bomb.parquet", table, rows_per_group=2000, **options)
    assert os.path.getsize(path) < 1 << 17
    source = ParquetPairs(path)
    most = pa.default_memory_pool().max_memory()
    with pytest.raises(
        PairError, match=r"row group 0: it has \d+ bytes in the file of \d+, and more than \d+"
    ) as caught:
        source[0]
    assert caught.value.whole_block
    assert pa.default_memory_pool().max_memory() < most + (1 << 25), "of 131 MB"
    few = write(tmp_path / "few.parquet", table.slice(0, 40), rows_per_group=40, **options)
    assert len(ParquetPairs(few)[39].win) == 1 << 16
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20000, np.int32)), pa.array(["x" * (1 << 16)]))
    table = pa.table({"win": [b"w"] * 20000, "lose": [b"l"] * 20000, "category": texts})
    path = write(tmp_path / "texts.parquet", table, rows_per_group=20000, **options)
    most = pa.default_memory_pool().max_memory()
    assert ParquetPairs(path).categories[0] == ("x" * (1 << 16),)
    assert pa.default_memory_pool().max_memory() < most + (1 << 25), "of 1.3 GB"


def test_the_bytes_are_views_that_outlive_the_source(tmp_path):
    path = write(tmp_path / "one.parquet", pick_a_pic([(0.0, True)] * 50), rows_per_group=50)
    source = ParquetPairs(path)
    pairs = [source[i] for i in range(50)]
    for pair in pairs:
        assert isinstance(pair.win, memoryview)
        assert pair.win.readonly
        assert pair.win.format == "B"
    address = [np.frombuffer(pair.win, np.uint8).ctypes.data for pair in pairs]
    assert np.diff(address).tolist() == [len(pair.win) for pair in pairs[:-1]], "one behind the other: not copied"
    del source
    assert [bytes(pair.win) for pair in pairs] == [b"one, longer %d" % i for i in range(50)]


def test_the_decoder_reads_images_where_they_lie_in_the_row_group(tmp_path, monkeypatch):
    from polydpo_fast import _C

    decode, given = _C.decode_pairs, []
    monkeypatch.setattr(_C, "decode_pairs", lambda *arms, **how: given.extend(chain(*arms)) or decode(*arms, **how))
    table = pa.table({arm: [png(number, 0, at) for number in range(40)] for at, arm in enumerate(("win", "lose"))})
    source = ParquetPairs(write(tmp_path / "pairs.parquet", table, rows_per_group=10))
    loader = PairLoader(source, 8, size=2, dtype=torch.uint8)
    given.clear()  # of what the options were tried with
    assert len(list(loader)) == 5
    address = lambda data: np.frombuffer(data, np.uint8).ctypes.data  # noqa: E731
    read = [source._groups.get((0, number), None, 0.0) for number in range(4)]
    lies = {address(group.images[arm].get(row)) for group in read for arm in ("win", "lose") for row in range(10)}
    assert {address(data) for data in given} == lies
    assert len(lies) == 80


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_views_into_slices_and_chunks(kind):
    values = [b"a", None, b"", b"four", b"fifth", None, b"7"]
    if pa.types.is_struct(kind):
        structs = [{"bytes": value} if value is not None or row == 1 else None for row, value in enumerate(values)]
        whole = pa.array(structs, kind)
    else:
        whole = pa.array(values, kind)
    column = Binary(pa.chunked_array([whole.slice(1, 3), whole.slice(0, 0), whole.slice(3), whole[:0]], kind))
    found = [column.get(row) for row in range(7)]
    expected_views = [*values[1:4], *values[3:]]
    assert [None if view is None else bytes(view) for view in found] == expected_views
    with pytest.raises(IndexError):
        column.get(7)


def test_a_row_group_is_read_once_and_evicted_by_size(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 40), rows_per_group=10)
    source = ParquetPairs(path)
    size = source._read(source._blocks[0]).size
    source = ParquetPairs(path, memory_bytes=size * 5 // 2)
    reads = counted_reads(source, monkeypatch)
    for index in (0, 1, 9, 10, 0, 20):  # 0 and 1; then 2 comes for 1, which was used longest ago
        source[index]
    assert [number for _, number in reads] == [0, 1, 2]
    source[5]
    assert [number for _, number in reads] == [0, 1, 2]
    source[15]
    assert [number for _, number in reads] == [0, 1, 2, 1]


def test_threads_share_a_read_and_do_not_wait_for_others(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 40), rows_per_group=10)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch, slow=0.2)
    found, started = {}, time.perf_counter()

    def get(index):
        found[index] = plain(source[index])

    threads = [threading.Thread(target=get, args=(index,)) for index in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert time.perf_counter() - started < 0.7, "four reads of 0.2 s each, side by side"
    assert found == dict(enumerate(chain(*expected([path], "drop"))))


def test_one_read_that_hangs_costs_the_pairs_that_waited_for_it(tmp_path, monkeypatch):
    """Another thread reads the row group again: for the rest of it, and for the next pass."""
    images = [{"win": png(i, 0, 0), "lose": png(i, 0, 1)} for i in range(80)]
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pa.Table.from_pylist(images), rows_per_group=20))
    read, hung, let_go = source._read, [], threading.Event()

    def once(block):
        if block.number == 1 and not hung:
            hung.append(block.number)
            let_go.wait(60)
        return read(block)

    monkeypatch.setattr(source, "_read", once)
    loader = PairLoader(source, 4, size=2, dtype=torch.uint8, shuffle=False, timeout_s=1.0, max_bad_rate=1.0)
    try:
        got = [i for batch in loader for i in batch.index.tolist()]
        lost = [i for i in range(80) if got[i] != i]
        assert 1 <= len(lost) <= 4, "as many as threads read"
        assert set(lost) <= set(range(20, 40))
        assert loader.stats.bad == len(lost)
        assert [i for batch in loader for i in batch.index.tolist()] == list(range(80))
        assert loader.stats.bad == len(lost)
    finally:
        let_go.set()


def test_slow_reads_are_not_multiplied(tmp_path, monkeypatch):
    """Each time a thread is given up another one may begin the same read: three at a time, not one for each thread."""
    images = [{"win": png(i, 0, 0), "lose": png(i, 0, 1)} for i in range(40)]
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pa.Table.from_pylist(images), rows_per_group=40))
    read, lock, now, most = source._read, threading.Lock(), [0], [0]

    def slow(block):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(1.0)
        try:
            return read(block)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(source, "_read", slow)
    options = dict(size=2, dtype=torch.uint8, timeout_s=0.15, readers=6, max_bad_rate=1.0, max_bad_run=40)
    got = [i for batch in PairLoader(source, 4, **options) for i in batch.index.tolist()]
    assert len(got) == 40
    assert 2 <= most[0] <= 3


def test_a_read_that_takes_longer_than_a_thread_may_wait_is_begun_anew(tmp_path, monkeypatch):
    """Also where the one that hangs is no loader's, so that nobody gives it up."""
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pick_a_pic([(1.0, True)] * 8)))
    read, entered, let_go = source._read, threading.Event(), threading.Event()

    def slow(block):
        if threading.current_thread().name == "stranger":
            entered.set()
            let_go.wait(60)
        return read(block)

    monkeypatch.setattr(source, "_read", slow)
    stranger = threading.Thread(target=lambda: source[0], name="stranger")
    stranger.start()
    assert entered.wait(30)
    readers = Readers(source, False, 1, 0.2)
    try:
        first, second = readers.ask(1), readers.ask(2)
        for reading in (first, second):
            readers.wait(reading, lambda: None)
        assert "more than 0.2 s" in str(first.error)
        assert bytes(second.pair.win) == b"zero 2"
    finally:
        let_go.set()
        stranger.join()
        readers.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_reads(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    source[7]
    reading, go_on, read = threading.Event(), threading.Event(), source._read

    def slow(block):
        reading.set()
        if threading.current_thread() is not threading.main_thread():
            go_on.wait(30)
        return read(block)

    monkeypatch.setattr(source, "_read", slow)
    thread = threading.Thread(target=lambda: source[0])
    thread.start()
    assert reading.wait(30)
    child = os.fork()
    if child == 0:  # its copy of the lock is held by a thread that it does not have
        os._exit(0 if bytes(source[0].win) == b"zero 0" and bytes(source[7].win) == b"zero 7" else 1)
    deadline = time.monotonic() + 60
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    go_on.set()
    thread.join()
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done
    assert status == 0


def test_no_descriptor_is_kept(shard):
    def descriptors():
        return sum("parquet" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    source = ParquetPairs(shard)
    pair = source[0]
    assert descriptors() == 0
    assert bytes(pair.win) == b"zero 0"


def test_pickling_keeps_the_pairs_and_leaves_the_row_groups(tmp_path):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 400), rows_per_group=100)
    source = ParquetPairs(path)
    cold = pickle.dumps(source)
    expected_pairs = everything(source)
    assert len(pickle.dumps(source)) == len(cold)
    again = pickle.loads(cold)
    assert everything(again) == expected_pairs
    assert again.fingerprint == source.fingerprint


def test_a_thread_that_is_given_up_leaves_a_network_that_hangs(shard, monkeypatch):
    """If it waited within pyarrow until the process ends, it would abort it."""
    fsspec = pytest.importorskip("fsspec")
    memory, let_go = fsspec.filesystem("memory"), threading.Event()
    memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
    try:
        source = ParquetPairs("memory://bucket/shard.parquet")
        for name in ("cat_file", "_open"):
            monkeypatch.setattr(type(memory), name, lambda *_, **__: let_go.wait(60))
        readers = Readers(source, False, 1, 0.1)
        reading = readers.ask(0)
        readers.wait(reading, lambda: None)
        assert "timeout_s" in str(reading.error)
        readers.close()
        (given_up,) = readers._given_up
        assert not given_up.thread.is_alive()
    finally:
        let_go.set()
        monkeypatch.undo()
        memory.rm("/bucket", recursive=True)


def test_what_a_network_failed_to_give_is_tried_again(shard, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
    try:
        source = ParquetPairs("memory://bucket/shard.parquet")
        with monkeypatch.context() as patch:
            patch.setattr(module.File, "read", lambda *_: (_ for _ in ()).throw(TimeoutError("slow")))
            patch.setattr("polydpo_fast.data.formats.remote._PAUSES_S", (0.0,))
            with pytest.raises(PairError, match="row group 0: slow"):
                source[0]
        assert bytes(source[0].win) == b"zero 0"
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.timeout(20)
def test_what_is_no_exception_of_a_client_ends_the_wait_for_it(shard, monkeypatch):
    """As a panic of one in Rust, or a request that asyncio cancels."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
    try:
        source = ParquetPairs("memory://bucket/shard.parquet")
        with monkeypatch.context() as patch:
            patch.setattr(module.File, "read", lambda *_: (_ for _ in ()).throw(asyncio.CancelledError))
            with pytest.raises(asyncio.CancelledError):
                source[0]
        assert bytes(source[0].win) == b"zero 0"
    finally:
        memory.rm("/bucket", recursive=True)
