"""Pairs are read ahead by threads, each within its time."""

from __future__ import annotations

import os
import queue
import threading
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from .source import Arm, Pair, PairError, Source, is_unicode, weight_of

__all__ = ["LoaderError", "Readers", "Reading", "checked", "was_given_up"]


_PATIENCE_S = 0.002  # that a pair is waited for before all threads begin to read
_LOOKED_AT = 256  # waiting pairs, to find one whose block nobody is reading
_MOST_STUCK = 64  # threads that were given up; a source that hangs this often is gone


class LoaderError(RuntimeError):
    """Too many pairs are bad, or take too long to read, for a training to go on."""


class _Thread(threading.Thread):
    """A reader's. given_up: nobody waits for it any more, nor need other threads of a source (`was_given_up`)."""

    given_up = False


def was_given_up(thread: threading.Thread) -> bool:
    return isinstance(thread, _Thread) and thread.given_up


class Reading:
    """A pair that was asked for: when it is done, the pair or an error."""

    __slots__ = ("block", "done", "error", "index", "pair")

    def __init__(self, index: int, block: int) -> None:
        self.index, self.block = index, block  # of `Source.blocks`; -1 where blocks say nothing
        self.pair: Pair | None = None
        self.error: Exception | None = None
        self.done = threading.Lock()  # held until it is done; costs a tenth of an Event
        self.done.acquire()


class Readers:
    """Daemon threads that read pairs of a source in the order in which they are asked for; but of a source whose pairs
    are read in blocks, pairs of a block that no other thread is reading come first.

    One of them reads as long as nobody waits long for a pair: from a local disk it is quick enough, and several threads
    would spend more time on handing the interpreter to each other. Where pairs are waited for, all of them read.

    clips: whether files may be handed out as paths.
    timeout_s: how long one pair may take, from when its reading begins. A thread that is stuck is left to itself, and
    another one takes its place.
    """

    def __init__(self, source: Source, clips: bool, threads: int, timeout_s: float) -> None:
        self._source, self._clips, self._timeout_s = source, clips, timeout_s
        self._block_ends = None if source.random_access else np.cumsum(source.blocks).tolist()
        self._tasks = _Tasks()
        self._workers: list[_Worker] = []
        self._given_up: list[_Worker] = []
        try:
            for _ in range(threads):
                self._workers.append(_Worker(source, clips, self._tasks))
        except RuntimeError:  # there are no more threads
            self.close()
            raise

    def ask(self, index: int) -> Reading:
        reading = Reading(index, self.block_of(index))
        self._tasks.put(reading)
        return reading

    def block_of(self, index: int) -> int:
        """-1 where pairs are cheap to read without their neighbours."""
        return -1 if self._block_ends is None else bisect_right(self._block_ends, index)

    def wait(self, reading: Reading, look: Callable[[], None]) -> None:
        """Waits until it is done; calls `look` now and then. Raises LoaderError if one pair after the other hangs."""
        if reading.done.acquire(timeout=_PATIENCE_S):
            return
        self._tasks.hurry(len(self._workers))
        while not reading.done.acquire(timeout=0.05):
            look()
            self._replace_stuck()

    def close(self) -> None:
        """Tells the threads to end, and waits for those that can; what is asked for already is not read any more."""
        self._tasks.close(len(self._workers))
        _join(self._workers, 1.0)
        for worker in self._workers:
            worker.thread.given_up = True  # if it hangs
        _join([*self._workers, *self._given_up], 0.2)  # some look whether they are given up

    def _replace_stuck(self) -> None:
        # All of them: the pair that is waited for may be queued behind one that hangs.
        for place, worker in enumerate(self._workers):
            reading, began = worker.at
            if reading is None or time.monotonic() - began < self._timeout_s:
                continue
            error = PairError(f"reading it took more than {self._timeout_s} s (timeout_s)")
            if not self._tasks.give_up(worker, reading, error):
                continue  # it was done after all
            self._given_up = [*(one for one in self._given_up if one.thread.is_alive()), worker]
            if len(self._given_up) > _MOST_STUCK:
                raise LoaderError(
                    f"the source hangs: {len(self._given_up)} pairs took more than {self._timeout_s} s (timeout_s), "
                    "and are still being read"
                )
            self._workers[place] = _Worker(self._source, self._clips, self._tasks)
            self._tasks.hurry(len(self._workers))


def _join(workers: Iterable[_Worker], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    for worker in workers:
        worker.thread.join(max(0.0, until - time.monotonic()))


class _Tasks:
    """What is to be read, and how many threads are awake to do so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Reading] = deque()
        self._blocks: defaultdict[int, int] = defaultdict(int)  # that are being read from
        self._awake = 0  # threads that have not been given up
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each thread that is to wake up, or to end

    def put(self, reading: Reading) -> None:
        with self._lock:
            self._pending.append(reading)
            self._wake(1)

    def hurry(self, threads: int) -> None:
        """Lets so many read, if there is enough to do."""
        with self._lock:
            self._wake(min(threads, self._awake + len(self._pending)))

    def _wake(self, threads: int) -> None:
        for _ in range(threads - self._awake):
            self._awake += 1
            self._calls.put(True)

    def close(self, threads: int) -> None:
        with self._lock:
            self._pending.clear()
        for _ in range(threads):
            self._calls.put(False)

    def called(self) -> bool:
        """Waits until the thread is to read; False: it is to end."""
        return self._calls.get()

    def take(self, worker: _Worker) -> Reading | None:
        """The next one to read; None: there is nothing more to do for this thread."""
        with self._lock:
            if worker.thread.given_up:
                return None
            if self._pending:
                reading = self._next()
                self._blocks[reading.block] += 1
                return reading
            self._awake -= 1
            return None

    def _next(self) -> Reading:
        for place, reading in enumerate(islice(self._pending, _LOOKED_AT)):
            if reading.block < 0 or not self._blocks[reading.block]:
                del self._pending[place]
                return reading
        return self._pending.popleft()

    def finish(self, worker: _Worker, reading: Reading, pair: Pair | None, error: Exception | None) -> None:
        with self._lock:
            if not worker.thread.given_up:
                reading.pair, reading.error = pair, error
                worker.at = None, 0.0
                self._blocks[reading.block] -= 1
                reading.done.release()

    def give_up(self, worker: _Worker, reading: Reading, error: Exception) -> bool:
        """Leaves the thread to itself; False if it reads that no more."""
        with self._lock:
            if worker.at[0] is not reading:
                return False
            worker.thread.given_up = True
            self._awake -= 1
            self._blocks[reading.block] -= 1
            reading.error = error
            reading.done.release()
            return True


class _Worker:
    def __init__(self, source: Source, clips: bool, tasks: _Tasks) -> None:
        self.at: tuple[Reading | None, float] = None, 0.0  # what it reads, and since when
        self.thread = _Thread(target=self._run, args=(source, clips, tasks), name="polydpo-read", daemon=True)
        self.thread.start()

    def _run(self, source: Source, clips: bool, tasks: _Tasks) -> None:
        while not self.thread.given_up and tasks.called():
            while (reading := tasks.take(self)) is not None:
                self.at = reading, time.monotonic()
                pair, error = None, None
                try:
                    pair = checked(source[reading.index], reading.index, clips)
                except BaseException as raised:  # a source may raise anything: OSError, ArrowInvalid, a panic of Rust's
                    error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
                tasks.finish(self, reading, pair, error)
                del reading, pair, error  # not to be kept while waiting for the next


def checked(pair: Any, index: int, clips: bool) -> Pair:
    """The pair; what the decoder and the batch could not take is an error of this pair, not of its batch."""
    if not isinstance(pair, Pair):
        raise TypeError(f"source[{index}] is a {type(pair).__name__}; expected a Pair")
    for name, kind, wanted in (("prompt", str, "text"), ("category", str, "text"), ("extra", Mapping, "a mapping")):
        if not isinstance(value := getattr(pair, name), kind):
            raise PairError(f"{name} is a {type(value).__name__}; expected {wanted}")
        if isinstance(value, str) and not is_unicode(value):
            raise PairError(f"{name} is not Unicode text: {value!a}")
    try:
        weight_of(pair.weight)
    except ValueError as error:
        raise PairError(str(error)) from None
    arms: tuple[tuple[Arm, Any], ...] = (("win", pair.win), ("lose", pair.lose))
    for arm, data in arms:
        if isinstance(data, (str, os.PathLike)):
            if not clips:
                raise PairError(f"it is the file of a clip, {data}; expected an image: frames= is for clips", arm)
            continue
        try:
            view = memoryview(data)
        except TypeError:
            raise PairError(f"it is a {type(data).__name__}; expected bytes or a path", arm) from None
        if view.ndim != 1:
            raise PairError(
                f"it is an array of shape {view.shape}; expected the bytes of a file, not decoded pixels", arm
            )
        if not view.c_contiguous:
            raise PairError(f"it is a {type(data).__name__} with gaps; expected contiguous bytes", arm)
    return pair
