"""PairLoader: several passes at once, states at odd moments, workers that take turns, and how passes end."""

import copy
import dataclasses
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.loading import TINY, expected, threads, yielded
from data.pairs import Tiny, png
from hypothesis import given, settings
from hypothesis import strategies as st

from polydpo_fast import decode_pairs
from polydpo_fast.data import LoaderError, PairLoader, equipment, open_source, read_ledger
from polydpo_fast.data import loader as loader_module
from polydpo_fast.data import reading as reading_module
from polydpo_fast.data.assembly import Assembler
from polydpo_fast.data.dali.decoder import CppDecoder
from polydpo_fast.data.equipment import Equipment
from polydpo_fast.data.reading import Readers, was_given_up


def place(loader):
    state = loader.state_dict()
    return state["epoch"], state["position"]


# ---------------------------------------------------------------------------------------------- passes and states


def test_an_epoch_that_is_set_in_the_middle_is_the_next_one():
    loader = PairLoader(Tiny(20), 4, **TINY)
    got = []
    for step, batch in enumerate(loader):
        got += yielded(batch)
        if step == 1:
            loader.set_epoch(5)
        assert place(loader) == ((0, 4) if step == 0 else (5, 0))
    assert got == expected(20, 0, 0)
    assert loader.epoch == 5
    assert [i for batch in loader for i in yielded(batch)] == expected(20, 0, 5)


def test_a_copy_has_a_place_of_its_own():
    loader = PairLoader(Tiny(20), 4, **TINY)
    running = iter(loader)
    next(running)
    other = copy.copy(loader)
    next(running)
    assert (place(loader), place(other)) == ((0, 8), (0, 4))
    other.set_epoch(7)
    assert yielded(next(running)) == expected(20, 0, 0)[8:12]
    assert (place(loader), place(other)) == ((0, 12), (7, 0))


def test_a_pass_that_goes_on_after_a_state_was_loaded_does_not_change_it():
    loader = PairLoader(Tiny(20), 4, **TINY)
    old = iter(loader)
    next(old)
    state = loader.state_dict()
    next(old)
    loader.load_state_dict(state)
    assert len(list(old)) == 3
    assert loader.state_dict() == state
    assert [i for batch in loader for i in yielded(batch)] == expected(20, 0, 0)[4:]


def test_of_two_passes_at_once_the_younger_counts():
    loader = PairLoader(Tiny(20), 4, **TINY)
    pairs = [(yielded(a), yielded(b)) for a, b in zip(loader, loader, strict=True)]
    assert [i for a, _ in pairs for i in a] == [i for _, b in pairs for i in b] == expected(20, 0, 0)
    assert loader.epoch == 1
    old, young = iter(loader), iter(loader)
    next(young)
    assert len(list(old)) == 5
    assert place(loader) == (1, 4)


def test_one_pass_in_two_threads_ends_in_both():
    one, ends = iter(PairLoader(Tiny(40), 4, **TINY)), []

    def consume():
        ends.append(sum(len(batch) for batch in one))

    both = [threading.Thread(target=consume) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(10)
    assert sum(ends) == 40
    assert len(ends) == 2


def test_an_error_in_one_of_two_threads_is_no_end_of_the_epoch_in_the_other(monkeypatch):
    decode = Assembler._decode

    def broken(assembler, places):
        if places[0].position >= 20:
            time.sleep(0.3)
            raise LoaderError("too many bad pairs")
        return decode(assembler, places)

    monkeypatch.setattr(Assembler, "_decode", broken)
    loader = PairLoader(Tiny(40), 4, **TINY)
    one, raised = iter(loader), []

    def consume():
        try:
            raised.append(list(one))
        except BaseException as error:
            raised.append(error)

    both = [threading.Thread(target=consume) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(10)
    assert [str(x) for x in raised] == ["too many bad pairs"] * 2
    assert (loader.epoch, loader.state_dict()["position"]) == (0, 20)


def test_a_resumed_epoch_that_is_left_early_begins_at_its_start():
    """As any other: a state is for one iteration."""
    loader = PairLoader(Tiny(20), 4, **TINY)
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert yielded(next(iter(loader))) == expected(20, 0, 0)[4:8]
    with pytest.warns(UserWarning, match="epoch 0 was left at position 8 of 20, and begins again"):
        assert yielded(next(iter(loader))) == expected(20, 0, 0)[:4]


def test_a_pass_that_another_thread_ends_early_is_no_complete_epoch():
    loader = PairLoader(Tiny(40), 4, **TINY)
    one = iter(loader)
    next(one)
    one._pipeline.close()  # as by Ctrl-C there, while this thread waits
    assert list(one) == []
    assert place(loader) == (0, 4)


# ------------------------------------------------------------------------------------- workers that take turns


class Turns:
    """What torchdata's StatefulDataLoader does with workers: each has its copy and its state."""

    def __init__(self, monkeypatch, make, workers, states=None):
        self.patch, self.workers, self.at = monkeypatch, workers, 0
        self.loaders, self.passes = [make() for _ in range(workers)], []
        for worker, loader in enumerate(self.loaders):
            self.be(worker)
            if states is not None:
                loader.load_state_dict(states[0][worker])
            self.passes.append(iter(loader))
        if states is not None:
            self.at = states[1]

    def be(self, worker):
        info = SimpleNamespace(id=worker, num_workers=self.workers)
        self.patch.setattr(loader_module, "get_worker_info", lambda: info)

    def __iter__(self):
        misses = 0
        while misses < self.workers:
            self.be(self.at)
            batch = next(self.passes[self.at], None)
            self.at = (self.at + 1) % self.workers
            misses = misses + 1 if batch is None else 0
            if batch is not None:
                yield batch

    def states(self):
        result = []
        for worker, loader in enumerate(self.loaders):
            self.be(worker)
            result.append(json.loads(json.dumps(loader.state_dict())))
        return result, self.at


@pytest.mark.parametrize("last", ["drop", "pad", "wrap"])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_workers_go_on_in_turn(monkeypatch, workers, first, last):
    """Also where the turns began in the middle of an epoch, at a place that is no multiple of the step."""
    bad = {5: "read"}
    source = Tiny(30, bad)
    start = PairLoader(source, 3, seed=7, last=last, **TINY)
    one = iter(start)
    head = [i for _ in range(first) for i in yielded(next(one))]
    state = start.state_dict()

    def make():
        loader = PairLoader(source, 4, seed=7, last=last, **TINY)
        loader.load_state_dict(state)
        return loader

    whole = [yielded(batch) for batch in make()]
    for stop in range(len(whole)):
        monkeypatch.undo()
        turns = Turns(monkeypatch, make_main(monkeypatch, make), workers)
        it = iter(turns)
        got = [yielded(next(it)) for _ in range(stop)]
        states = turns.states()
        got += [
            yielded(batch)
            for batch in Turns(monkeypatch, lambda: PairLoader(source, 4, seed=7, last=last, **TINY), workers, states)
        ]
        assert got == whole
    if last == "drop":
        want = expected(30, 7, 0, bad, group=1)
        assert head + [i for step in whole for i in step] == want[: len(head) + 4 * len(whole)]


def make_main(monkeypatch, make):
    def made():
        monkeypatch.setattr(loader_module, "get_worker_info", lambda: None)
        return make()

    return made


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_workers_yield_is_what_is_specified(data):
    """Any sizes, ranks, workers and bad pairs, and a stop anywhere after which the same workers go on."""
    draw = data.draw
    size, seed, epoch = draw(st.integers(2, 40)), draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 3))
    kinds = st.sampled_from(["read", "win", "lose", "both", "bug"])
    bad = draw(st.dictionaries(st.integers(0, size - 1), kinds, max_size=size // 2))
    world, workers, last = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["drop", "pad", "wrap"])),
    )
    batch = draw(st.integers(1, max(1, size // world // 2)))
    if batch * world > size:
        last = "pad"
    whole, rest = divmod(size, batch * world)
    stop, parts = draw(st.integers(0, whole + (rest > 0 and last != "drop"))), []
    for rank in range(world):

        def make(rank=rank):
            loader = PairLoader(
                Tiny(size, bad), batch, seed=seed, last=last, rank=rank, world_size=world, max_bad_rate=1.0,
                max_bad_run=10**6, readers=1, prefetch=1, threads=1, **TINY,
            )  # fmt: skip
            loader.set_epoch(epoch)
            return loader

        with pytest.MonkeyPatch.context() as patch:
            turns = Turns(patch, make, workers)
            steps = [yielded(one) for one in itertools.islice(turns, stop)]
            steps += [yielded(one) for one in Turns(patch, make, workers, turns.states())]
        parts.append(steps)
    got = [i for step in zip(*parts, strict=True) for part in step for i in part]
    assert got == expected(size, seed, epoch, bad, last, batch * world)


def test_a_workers_state_is_refused_where_turns_are_others(monkeypatch):
    turns = Turns(monkeypatch, lambda: PairLoader(Tiny(30), 4, **TINY), 2)
    for batch, _ in zip(turns, range(2), strict=False):
        yielded(batch)
    (state, _), _ = turns.states()
    for workers, size in ((3, 4), (2, 5)):
        with pytest.raises(ValueError, match=r"the state was taken by .* with {'workers': 2"):
            Turns(monkeypatch, lambda size=size: PairLoader(Tiny(30), size, **TINY), workers, ([state] * workers, 0))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"here it is {'workers': 0"):
        PairLoader(Tiny(30), 4, **TINY).load_state_dict(state)
    for broken in (1, {}, {"workers": 0, "step": 4, "begin": "0"}):
        with pytest.raises(ValueError, match="the state was taken by"):
            PairLoader(Tiny(30), 4, **TINY).load_state_dict({**state, "turns": broken})


def test_workers_of_a_dataloader_go_on_after_a_state_of_the_loader():
    first = PairLoader(Tiny(30), 4, seed=7, **TINY)
    got = yielded(next(iter(first)))
    again = PairLoader(Tiny(30), 4, seed=7, **TINY)
    again.load_state_dict(first.state_dict())
    outer = torch.utils.data.DataLoader(again, batch_size=None, num_workers=2)
    got += [i for batch in outer for i in yielded(batch)]
    assert got == expected(30, 7, 0, group=4)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_takes_it_as_it_is(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        loader = PairLoader(Tiny(30, {5: "read"}), 4, seed=7, threads=1, **TINY)
        return stateful(loader, batch_size=None, num_workers=workers)

    for stop in (0, 1, 4, 7):
        outer = make()
        one = iter(outer)
        got = [i for _ in range(stop) for i in yielded(next(one))]
        again = make()
        again.load_state_dict(outer.state_dict())
        got += [i for batch in again for i in yielded(batch)]
        assert got == expected(30, 7, 0, {5}, group=4)


# --------------------------------------------------------------------------------------------- how passes end


def test_a_forked_process_has_no_part_in_a_pass():
    one = iter(PairLoader(Tiny(4000), 4, **TINY))
    next(one)
    with one._pipeline._batches.mutex:  # as the loader's thread may hold it
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(10)
                one._pipeline.close()  # as garbage is collected
                next(one)
            except RuntimeError as error:
                os._exit(0 if "forked" in str(error) else 2)
            finally:
                os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
    assert len(next(one)) == 4


@pytest.fixture
def control_c():
    """As at a terminal, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("waits_for", ["source", "consumer"])
@pytest.mark.usefixtures("control_c")
def test_control_c_ends_the_threads(waits_for):
    source, got = Tiny(400, hangs=[20] if waits_for == "source" else ()), []
    loader = PairLoader(source, 4, shuffle=False, readers=1, **TINY)

    def work():
        for batch in loader:
            got.extend(yielded(batch))
            if waits_for == "consumer" and len(got) == 20:
                time.sleep(30)

    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert got == list(range(20))
    source.let_go.set()
    timer.join()
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == []
    assert [i for batch in PairLoader(Tiny(8), 4, **TINY) for i in yielded(batch)] == expected(8, 0, 0)


def test_a_pass_ends_in_the_middle_of_a_batch():
    """Here of 1500 pairs that take 1 ms each, which is too short to be waited for."""
    one = iter(PairLoader(Tiny(1500, slow=dict.fromkeys(range(1500), 0.001)), 1500, readers=1, **TINY))
    time.sleep(0.05)
    began = time.monotonic()
    one._pipeline.close()
    assert time.monotonic() - began < 1


def test_control_c_while_a_pass_begins_ends_its_thread(monkeypatch):
    """`Thread.start` waits until the thread runs: nobody has the iterator yet, whose end would end it."""
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "polydpo-load":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            iter(PairLoader(Tiny(4000), 4, **TINY))
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == []


def test_an_interrupted_pass_holds_no_batches(monkeypatch):
    """Its iterator may live on for long, in a notebook's last traceback."""
    one = iter(PairLoader(Tiny(40), 4, **TINY))
    next(one)
    while one._pipeline._batches.empty():
        time.sleep(0.001)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(one._pipeline, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(one)
    assert one._pipeline._batches.empty()
    assert list(one) == []


def test_control_c_after_a_batch_was_taken_does_not_leave_it_out(monkeypatch):
    """The pass is over, and does not go on behind a batch that nobody was given."""
    loader = PairLoader(Tiny(40), 4, **TINY)
    one = iter(loader)
    got = yielded(next(one))
    take = one._pipeline.next

    class Interrupted:
        @property
        def ok(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(one._pipeline, "next", lambda: (Interrupted(), take()[1]))
    with pytest.raises(KeyboardInterrupt):
        next(one)
    monkeypatch.undo()
    assert list(one) == []
    loader.load_state_dict(loader.state_dict())
    assert got + [i for batch in loader for i in yielded(batch)] == expected(40, 0, 0)


@pytest.mark.parametrize("name", ["polydpo-load", "polydpo-read"])
def test_garbage_that_is_collected_in_a_thread_of_a_loader_does_not_wait(name):
    """Even while that thread holds the lock of the queue."""
    one = iter(PairLoader(Tiny(4000), 4, **TINY))
    next(one)
    pipeline = one._pipeline

    def collect():
        with pipeline._batches.mutex:
            pipeline.close()

    thread = threading.Thread(target=collect, name=name, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    pipeline._thread.join(5)
    assert not pipeline._thread.is_alive()


@pytest.mark.parametrize("how", ["iter(loader)", "loader.walk(np.arange(4000))"])
def test_a_process_that_ends_in_the_middle_ends_the_threads_first(how):
    """The decoder's threads must not be at work while the process takes itself apart: that aborts it."""
    script = f"""
import atexit, sys, threading
names = lambda: [thread.name for thread in threading.enumerate() if thread.name == "polydpo-load"]
atexit.register(lambda: print(names()))
import numpy as np
from data.pairs import Tiny
from data.loading import TINY
from polydpo_fast.data import PairLoader
loader = PairLoader(Tiny(4000), 4, **TINY)
batches = {how}
next(batches)
print(names())
"""
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.split("\n")) == (0, ["['polydpo-load']", "[]", ""]), done.stderr


def test_threads_that_cannot_be_started_are_told(monkeypatch):
    before = threads()
    start, count = threading.Thread.start, iter(range(4))

    def fails(thread):
        if thread.name == "polydpo-read" and next(count) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(iter(PairLoader(Tiny(20), 4, **TINY)))
    assert threads() == before


def test_workers_have_memory_of_their_own():
    """That of the first process may be page-locked, and be made by CUDA, which has no part in a fork."""
    equipment = Equipment("cpp", torch.device("cuda", 0), TINY)
    equipment.set_up(None)
    assert equipment.buffers.pinned
    inherited = weakref.ref(equipment.buffers)
    equipment.set_up(SimpleNamespace(id=0, num_workers=2))
    assert not equipment.buffers.pinned
    assert inherited() is not None, "freeing what a device has read from asks CUDA, which ends a forked process"
    assert pickle.loads(pickle.dumps(equipment))._forked is None
    first = equipment.buffers
    equipment.set_up(SimpleNamespace(id=0, num_workers=2))
    assert equipment.buffers is first


def test_workers_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for workers, own, each in ((3, {}, 2), (20, {}, 1), (3, {"threads": 5}, 5)):
        plan = PairLoader(Tiny(8), 4, **own, **TINY)._plan(SimpleNamespace(id=0, num_workers=workers))
        assert plan.decode.keywords["threads"] == each


def test_workers_decode_clips_for_a_gpu_in_cpp(monkeypatch):
    """What they have of DALI, its CPU operators, would refuse what NVDEC decodes in the first process."""
    chosen = []
    kinds = lambda kind, device, threads=None: chosen.append((kind, device)) or CppDecoder()  # noqa: E731
    monkeypatch.setattr("polydpo_fast.data.equipment.choose_decoder", kinds)
    device = torch.device("cuda", 0)
    for options in (TINY, dict(size=16, frames=2)):
        del chosen[:]
        equipment = Equipment("dali", device, options)
        equipment.set_up(None)
        equipment.set_up(SimpleNamespace(id=0, num_workers=2))
        assert chosen == [("dali", device), ("cpp" if "frames" in options else "dali", "cpu")]


def test_an_epoch_of_batches_that_was_kept_is_given_back():
    loader = PairLoader(Tiny(400), 4, **TINY)
    kept = list(loader)
    del kept
    assert len(loader._equipment.buffers._free) == 16


# ---------------------------------------------------------------------------------------- sources with surprises


class Panic(BaseException):
    """As pyo3 raises it: no Exception."""


class Odd(Tiny):
    """Pair 3 is `change(pair)`."""

    def __init__(self, change):
        super().__init__(12)
        self.change = change

    def __getitem__(self, index):
        pair = super().__getitem__(index)
        return self.change(pair) if index == 3 else pair


def panic(_):
    raise Panic("in Rust")


@pytest.mark.parametrize(
    ("change", "arm", "reason"),
    [
        (panic, None, r"Panic\('in Rust'\)"),
        (lambda pair: sys.exit(3), None, r"SystemExit\(3\)"),
        (lambda pair: None, None, r"source\[3\] is a NoneType; expected a Pair"),
        (lambda pair: dataclasses.replace(pair, prompt=None), None, "prompt is a NoneType; expected text"),
        (lambda pair: dataclasses.replace(pair, weight=None), None, "weight is None; expected a number >= 0"),
        (lambda pair: dataclasses.replace(pair, weight=float("nan")), None, "weight is nan"),
        (lambda pair: dataclasses.replace(pair, prompt="a \ud83d b"), None, "prompt is not Unicode text: 'a "),
        (
            lambda pair: dataclasses.replace(pair, weight=1e39),
            None,
            r"weight is 1e\+39; expected 0, or a number that fl",
        ),
        (lambda pair: dataclasses.replace(pair, category=None), None, "category is a NoneType; expected text"),
        (lambda pair: dataclasses.replace(pair, extra=None), None, "extra is a NoneType; expected a mapping"),
        (lambda pair: dataclasses.replace(pair, lose=None), "lose", "it is a NoneType; expected bytes or a path"),
        (lambda pair: dataclasses.replace(pair, win="a.mp4"), "win", "it is the file of a clip, a.mp4; expected an im"),
        (lambda pair: dataclasses.replace(pair, lose=Path("b")), "lose", "it is the file of a clip, b; expected an im"),
        (
            lambda pair: dataclasses.replace(pair, win=memoryview(bytes(99))[::2]),
            "win",
            "it is a memoryview with gaps; expected contiguous bytes",
        ),
        (
            lambda pair: dataclasses.replace(pair, lose=np.zeros((4, 4, 3), np.uint8)),
            "lose",
            r"it is an array of shape \(4, 4, 3\); expected the bytes of a file, not decoded pixels",
        ),
        (lambda pair: dataclasses.replace(pair, key=np.int64(3), win=b""), "win", "win|empty|bytes"),
    ],
)
def test_what_is_no_pair_is_a_bad_pair(tmp_path, change, arm, reason):
    began = time.monotonic()
    loader = PairLoader(Odd(change), 4, shuffle=False, ledger=tmp_path / "bad.jsonl", **TINY)
    got = [i for batch in loader for i in yielded(batch)]
    assert [i for i in range(12) if got[i] != i] == [3]
    assert time.monotonic() - began < 30  # and not a timeout_s later
    (line,) = read_ledger(tmp_path / "bad.jsonl")
    assert (line["index"], line["arm"]) == (3, arm)
    assert re.search(reason, line["reason"])


def test_a_thread_that_has_gone_on_is_not_given_up():
    """It may have finished the pair that took so long just before."""
    readers = Readers(Tiny(4, {1: "read"}), False, 1, 60.0)
    first = readers.ask(0)
    readers.wait(first, lambda: None)
    assert not readers._tasks.give_up(readers._workers[0], first, ValueError("too late"))
    second = readers.ask(1)
    readers.wait(second, lambda: None)
    assert first.pair is not None
    assert first.error is None
    assert "its shard is cut off" in str(second.error)
    readers.close()


def test_pairs_are_read_while_others_are_decoded(monkeypatch):
    further = threading.Event()

    class Watched(Tiny):
        def __getitem__(self, index):
            if index >= 4:
                further.set()
            return super().__getitem__(index)

    def decode(*arms, **options):
        assert further.wait(10)
        return decode_pairs(*arms, **options)

    monkeypatch.setattr(equipment, "choose_decoder", lambda *_: SimpleNamespace(decode_pairs=decode))
    assert len(list(PairLoader(Watched(8), 4, shuffle=False, prefetch=1, **TINY))) == 2


def test_threads_that_are_only_slow_do_no_harm(monkeypatch):
    """They were given up, and take nothing more; and a source of which none hangs for good does not end it."""
    monkeypatch.setattr(reading_module, "_MOST_STUCK", 2)
    source = Tiny(30, slow=dict.fromkeys(range(4, 24, 4), 0.2))
    loader = PairLoader(source, 5, shuffle=False, readers=1, timeout_s=0.1, max_bad_rate=1.0, **TINY)
    assert sum(len(yielded(batch)) for batch in loader) == 30
    assert loader.stats.bad > 2


def test_what_was_asked_for_is_not_read_after_the_end():
    entered = []

    class Counted(Tiny):
        def __getitem__(self, index):
            entered.append(index)
            return super().__getitem__(index)

    readers = Readers(Counted(50, slow=dict.fromkeys(range(50), 0.02)), False, 1, 60.0)
    for index in range(50):
        readers.ask(index)
    readers.close()
    assert not readers._workers[0].thread.is_alive()
    assert len(entered) <= 2


def test_a_thread_that_waits_holds_no_pair():
    """It may be a view into a row group of hundreds of megabytes."""
    made = []

    class Watched(Tiny):
        def __getitem__(self, index):
            pair = super().__getitem__(index)
            made.append(weakref.ref(pair))
            return pair

    readers = Readers(Watched(4), False, 1, 60.0)
    readers.wait(readers.ask(0), lambda: None)
    until = time.monotonic() + 5
    while made[0]() is not None and time.monotonic() < until:
        time.sleep(0.001)
    assert made[0]() is None
    readers.close()


def test_a_thread_that_hangs_at_the_end_is_given_up():
    """So that threads of the next pass do not wait for the row group that it reads."""
    source = Tiny(4, hangs=[0])
    readers = Readers(source, False, 1, 60.0)
    readers.ask(0)
    time.sleep(0.05)
    assert not was_given_up(readers._workers[0].thread)
    readers.close()
    assert was_given_up(readers._workers[0].thread)
    source.let_go.set()


def test_one_thread_reads_until_somebody_waits():
    """And then all do: four pairs of a tenth of a second each take one, not four."""
    entered = []

    class Slow(Tiny):
        def __getitem__(self, index):
            entered.append(threading.current_thread())
            time.sleep(0.1)
            return super().__getitem__(index)

    readers = Readers(Slow(12), False, 4, 60.0)
    asked = [readers.ask(index) for index in range(12)]
    time.sleep(0.05)
    assert len(entered) == 1
    began = time.monotonic()
    for reading in asked:
        readers.wait(reading, lambda: None)
    assert time.monotonic() - began < 0.9
    assert len(set(entered)) == 4
    readers.close()


def test_threads_read_different_blocks():
    """Not all of them the first block, one after the other, while the others wait for nobody."""
    reading, at_once = [], []

    class Blocks(Tiny):
        random_access = False

        def __getitem__(self, index):
            reading.append(index // 10)
            at_once.append(sorted(reading))
            time.sleep(0.05)
            reading.remove(index // 10)
            return super().__getitem__(index)

    readers = Readers(Blocks(40, blocks=[10] * 4), False, 4, 60.0)
    asked = [readers.ask(index) for index in range(40)]
    for one in asked:
        readers.wait(one, lambda: None)
    assert [one.pair.key for one in asked] == [f"k{index}" for index in range(40)]
    assert all(len(set(blocks)) == len(blocks) for blocks in at_once[:30])
    assert max(map(len, at_once)) == 4
    readers.close()


def test_a_source_that_hangs_for_good_ends_it(tmp_path, monkeypatch):
    """And not as so many bad pairs: those that wait behind the ones that hang have no fault."""
    monkeypatch.setattr(reading_module, "_MOST_STUCK", 3)
    source = Tiny(40, hangs=range(8, 40))
    options = dict(shuffle=False, timeout_s=0.1, readers=1, max_bad_rate=1.0, ledger=tmp_path / "bad.jsonl", **TINY)
    got = []
    with pytest.raises(LoaderError, match=r"the source hangs: 4 pairs took more than 0\.1 s \(timeout_s\)"):
        got += [i for batch in PairLoader(source, 4, **options) for i in yielded(batch)]
    assert {line["index"] for line in read_ledger(tmp_path / "bad.jsonl")} <= set(range(8, 40))
    assert len(list(read_ledger(tmp_path / "bad.jsonl"))) <= 3
    source.let_go.set()


def test_ledgers_that_cannot_be_are_told_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ledger is '.*none/bad.jsonl'; its folder does not exist"):
        PairLoader(Tiny(12), 4, ledger=tmp_path / "none" / "bad.jsonl", **TINY)
    with pytest.raises(ValueError, match="a folder; expected a file"):
        PairLoader(Tiny(12), 4, ledger=tmp_path, **TINY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match=r"ledger is '~/bad.jsonl'; its folder does not exist"):
        PairLoader(Tiny(12), 4, ledger="~/bad.jsonl", **TINY)
    monkeypatch.setenv("HOME", str(tmp_path))
    list(PairLoader(Tiny(12, {3: "read"}), 4, ledger="~/home.jsonl", **TINY))
    assert len(list(read_ledger(tmp_path / "home.jsonl"))) == 1
    monkeypatch.chdir(tmp_path)
    loader = PairLoader(Tiny(12, {3: "read"}), 4, ledger="bad.jsonl", **TINY)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    list(loader)
    assert len(list(read_ledger(tmp_path / "bad.jsonl"))) == 1


def test_shares_that_would_say_nothing_are_refused():
    for change in (dict(shuffle=False), dict(window=2)):
        with pytest.raises(ValueError, match="categories is 'balanced' with shuffle="):
            PairLoader(Tiny(12), 4, categories="balanced", **change, **TINY)
    records = [{"win": png(i, 0, 0), "lose": png(i, 0, 1), "prompt": ""} for i in range(8)]
    with pytest.raises(ValueError, match="expected None, because the source has no categories"):
        PairLoader(records, 4, categories="balanced", **TINY)
    for shares, message in (
        ({"cat": "1", "dog": 2}, "expected shares >= 0"),
        ({"cat": -1, "dog": 2}, "expected shares >= 0"),
        ({"cat": 0, "dog": 0}, "add up to 0"),
        ({"cat": 1, "cow": 2}, "only one of them has: 'cow', 'dog'"),
        (dict.fromkeys(range(5000), 1), "a mapping of 5000 shares; expected one for each of the source's 2 categories"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            PairLoader(Tiny(12), 4, categories=shares, **TINY)
        assert len(str(caught.value)) < 1200


def test_a_state_costs_nothing_that_grows_with_the_source(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"win": "a.png", "lose": "b.png"}\n' * 20)
    source = open_source(tmp_path / "pairs.jsonl")
    loader = PairLoader(source, 4, **TINY)
    assert loader.state_dict()["fingerprint"] is loader.state_dict()["fingerprint"]
