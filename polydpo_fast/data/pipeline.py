"""One pass over an epoch: batches are made in a thread, some ahead, and handed to the consumer."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

from ..buffers import Buffers
from .assembly import Assembler
from .batch import PairBatch
from .plan import Plan, Step
from .reading import Readers
from .stats import LoaderStats
from .transfer import Transfer, await_transfer

__all__ = ["Pipeline"]

_THREAD = "polydpo-load"


class _Stopped(Exception):  # noqa: N818  # no error: how a pass ends early
    pass


class Pipeline:
    """The consumer's end. The thread holds no reference to it, and ends when it is dropped."""

    def __init__(self, plan: Plan, steps: Iterable[Step], buffers: Buffers | None, stats: LoaderStats) -> None:
        self._device, self._stats = plan.device, stats
        self._batches: queue.Queue[Any] = queue.Queue(maxsize=plan.prefetch)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.is_complete = False  # the last batch was taken
        self._process = os.getpid()
        producer = _Producer(plan, steps, buffers, stats, self._batches, self._stop)
        self._thread = threading.Thread(target=producer.run, name=_THREAD, daemon=True)
        weakref.finalize(self, self._stop.set)  # before it starts: Ctrl-C may come in the middle of that
        self._thread.start()

    def next(self) -> tuple[PairBatch, int]:
        """The next batch, and the position of the epoch after it. Raises StopIteration, or what went wrong."""
        began = time.monotonic()
        if os.getpid() != self._process:  # nor may the queue be touched: its lock may have been held
            raise RuntimeError(
                "the process was forked while iterating, and has no part in it; expected a new iteration"
            )
        while True:
            try:
                item = self._batches.get(timeout=0.5)  # so that Ctrl-C is looked at
                break
            except queue.Empty:
                if self._stop.is_set():  # by another thread that had the last batch, or an error
                    raise self._error or StopIteration from None
                if not self._thread.is_alive() and self._batches.empty():
                    raise RuntimeError("the loader's thread is gone") from None
        self._stats.waiting_for_loader_s += time.monotonic() - began
        if isinstance(item, float):  # when all batches were made: the last ones stood in the queue since then
            self._stats.waiting_for_consumer_s += max(0.0, began - item)
            self.is_complete = True
            raise StopIteration
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, end, event = item
        await_transfer(batch, event, self._device)
        return batch, end

    def close(self) -> None:
        """Ends the threads. A pair that is being decoded is finished first."""
        if os.getpid() != self._process:
            return
        self._stop.set()
        if threading.current_thread().name.startswith("polydpo-"):
            return  # garbage that was collected there: what would be waited for may wait for a lock of this thread
        self._thread.join(timeout=60.0)
        with contextlib.suppress(queue.Empty):
            while True:
                self._batches.get_nowait()


class _Producer:
    """What the thread does, until it is told to stop."""

    def __init__(
        self,
        plan: Plan,
        steps: Iterable[Step],
        buffers: Buffers | None,
        stats: LoaderStats,
        batches: queue.Queue[Any],
        stop: threading.Event,
    ) -> None:
        self._plan, self._steps, self._buffers, self._stats = plan, steps, buffers, stats
        self._batches, self._stop = batches, stop
        self._transfer = Transfer(plan.device)

    def run(self) -> None:
        try:
            self._make_batches()
            self._put(time.monotonic())
        except _Stopped:
            pass
        except BaseException as error:  # the consumer's to see, whatever it is
            with contextlib.suppress(_Stopped):
                self._put(error)

    def _make_batches(self) -> None:
        plan = self._plan
        readers = Readers(plan.source, plan.clips, plan.readers, plan.timeout_s)
        try:
            with self._transfer.stream():
                assembler = Assembler(plan, self._buffers, self._stats, readers, self._raise_if_stopped)
                for batch, end in assembler.batches(self._steps):
                    moved, event = self._transfer.move(batch)
                    made = time.monotonic()
                    self._put((moved, end, event))
                    self._stats.waiting_for_consumer_s += time.monotonic() - made
                    del batch, moved  # their memory is the consumer's to give back
        finally:
            self._transfer.finish()
            readers.close()

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _put(self, item: Any) -> None:
        while True:
            self._raise_if_stopped()
            try:
                return self._batches.put(item, timeout=0.05)
            except queue.Full:
                continue
