"""Around a launch: how a sample is split, and the arrival counters of streams and CUDA graphs, with stand-ins."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from polydpo_fast.kernels import pair_loss

CPU = torch.device("cpu")


class Event:
    def record(self):
        time.sleep(0.05)  # so that others come before it is there

    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def nothing_made_yet(monkeypatch):
    monkeypatch.setattr(pair_loss, "_of_streams", {})
    monkeypatch.setattr(pair_loss, "_spare", {})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("numel", [1, 1023, 1024, 1025, 16_384, 2**20, 16 * 21 * 60 * 104, 16 * 21 * 90 * 160, 2**31])
def test_splits_cover_a_sample_and_few_are_left_to_the_last(numel):
    blocks = pair_loss.blocks_per_split(numel)
    splits = -(-numel // (blocks * pair_loss.BLOCK))
    assert splits * blocks * pair_loss.BLOCK >= numel
    assert (splits - 1) * blocks * pair_loss.BLOCK < numel
    if numel <= 2**25:  # each program reads 64 blocks at most
        assert splits <= 1.5 * pair_loss.LARGE_SPLITS  # at 1152 splits a program begins to read two blocks
    if numel >= 2**20:
        assert splits >= 512


def test_each_stream_has_counters_of_its_own_and_threads_share_them():
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda stream: pair_loss._stream_counters(4, CPU, stream), [1, 2] * 4))
    assert len({x.data_ptr() for x in made}) == 2
    assert made[0] is made[2]
    assert pair_loss._stream_counters(8, CPU, 1) is not made[0]
    assert not any(x.any() for x in made)


def test_each_capture_takes_counters_that_no_other_has_aligned_as_those_of_streams():
    """A kernel is compiled for addresses that are multiples of 16, and must not be compiled anew within a capture."""
    pair_loss._stream_counters(4, CPU, 1)
    sizes = [4, 8, 4, 1024, 4]
    taken = [pair_loss._graph_counters(size, CPU) for size in sizes]
    begins = [x.data_ptr() for x in taken]
    assert [len(x) for x in taken] == sizes
    assert all(b - a == 4 * size for a, b, size in zip(begins, begins[1:], sizes, strict=False))
    assert all(begin % 16 == 0 for begin in begins)
    assert not any(x.any() for x in taken)


def test_where_no_counters_are_spare_a_capture_makes_them():
    assert not pair_loss._graph_counters(4, CPU).any()  # nothing ran before
    pair_loss._stream_counters(4, CPU, 1)
    first = pair_loss._graph_counters(pair_loss.SPARE - 4, CPU)
    others = [pair_loss._graph_counters(8, CPU), pair_loss._graph_counters(4, CPU), pair_loss._graph_counters(4, CPU)]
    assert len({x.data_ptr() for x in (first, *others)}) == 4
    assert others[1].data_ptr() - first.data_ptr() == 4 * (pair_loss.SPARE - 4)
    assert not any(x.any() for x in others)


@pytest.mark.parametrize(("pairs", "size"), [(1, 4), (3, 4), (4, 8), (7, 8), (4096, 8192)])
def test_counters_are_one_more_than_pairs_and_sixteen_bytes_at_least(pairs, size):
    assert len(pair_loss._counters(pairs, CPU)) == size
