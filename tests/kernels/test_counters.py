"""The arrival counters of streams and CUDA graphs, with stand-ins."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from polydpo_fast.kernels import counters

CPU = torch.device("cpu")


class Event:
    def record(self):
        time.sleep(0.05)  # so that others come before it is there

    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def nothing_made_yet(monkeypatch):
    monkeypatch.setattr(counters, "_of_streams", {})
    monkeypatch.setattr(counters, "_spare", {})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def test_each_stream_has_counters_of_its_own_and_threads_share_them():
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda stream: counters._stream_counters(4, CPU, stream), [1, 2] * 4))
    assert len({x.data_ptr() for x in made}) == 2
    assert made[0] is made[2]
    assert counters._stream_counters(8, CPU, 1) is not made[0]
    assert not any(x.any() for x in made)


def test_counters_are_made_in_another_thread_and_waited_for(monkeypatch):
    """This one may be warming up for a graph, into its memory; and whoever reads them may be on another stream."""
    made = []

    class Event:
        def __init__(self):
            self.thread, self.waited = threading.get_ident(), False
            made.append(self)

        def record(self):
            pass

        def synchronize(self):
            self.waited = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    counters._stream_counters(4, CPU, 1)
    assert [event.waited for event in made] == [True, True]  # its own, and the spare ones
    assert threading.get_ident() not in {event.thread for event in made}


def test_each_capture_takes_counters_that_no_other_has_aligned_as_those_of_streams():
    """A kernel is compiled for addresses that are multiples of 16, and must not be compiled anew within a capture."""
    counters._stream_counters(4, CPU, 1)
    sizes = [4, 8, 4, 1024, 4]
    taken = [counters._graph_counters(size, CPU) for size in sizes]
    begins = [x.data_ptr() for x in taken]
    assert [len(x) for x in taken] == sizes
    assert all(b - a == 4 * size for a, b, size in zip(begins, begins[1:], sizes, strict=False))
    assert all(begin % 16 == 0 for begin in begins)
    assert not any(x.any() for x in taken)


def test_where_no_counters_are_spare_a_capture_makes_them():
    assert not counters._graph_counters(4, CPU).any()  # nothing ran before
    counters._stream_counters(4, CPU, 1)
    first = counters._graph_counters(counters.SPARE - 4, CPU)
    others = [counters._graph_counters(8, CPU), counters._graph_counters(4, CPU), counters._graph_counters(4, CPU)]
    assert len({x.data_ptr() for x in (first, *others)}) == 4
    assert others[1].data_ptr() - first.data_ptr() == 4 * (counters.SPARE - 4)
    assert not any(x.any() for x in others)


@pytest.mark.parametrize(("pairs", "size"), [(1, 4), (3, 4), (4, 8), (7, 8), (4096, 8192)])
def test_counters_are_one_more_than_pairs_and_sixteen_bytes_at_least(pairs, size):
    assert len(counters.counters_of(pairs, CPU)) == size
