"""From positions of an epoch to batches: reading ahead, decoding, and replacing what is bad, in the background."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import PairBatch
from .buffers import Buffers
from .ledger import Ledger
from .order import Order, mix
from .reading import LoaderError, Readers, Reading
from .ready import ReadyPair, stack_pairs
from .source import Pair, PairError, Source

__all__ = ["LoaderError", "LoaderStats", "Pipeline", "Plan", "Step"]

_STEPS = 32  # whose pairs are worked out together
_REPLACEMENT_WINDOW = 4096  # positions ahead: read soon anyway, but hardly in the same batch
_NEARBY_ATTEMPTS = 4  # with pairs of the blocks that are in memory already
_MOST_ATTEMPTS = 1000
_THREAD = "polydpo-load"
_NO_COLOURS = "bt709", False  # as `decode_clips` has it where a clip fails
_RATE_AFTER = 100  # pairs, before a share of bad ones says anything
_RATE_OF = 10_000  # pairs that it is a share of, if the source has so many: bad ones come together, in a damaged shard


@dataclass
class LoaderStats:
    """What a loader did so far, and what it waited for. Times in seconds of wall clock.

    pairs: yielded. bad: pairs that could not be read or decoded.
    waiting_for_source_s: decoding stood still because pairs were not there yet.
    decoding_s: spent decoding.
    waiting_for_consumer_s: finished batches stood in the queue, and it was full.
    waiting_for_loader_s: the consumer waited for a batch.
    """

    pairs: int = 0
    bad: int = 0
    waiting_for_source_s: float = 0.0
    decoding_s: float = 0.0
    waiting_for_consumer_s: float = 0.0
    waiting_for_loader_s: float = 0.0

    @property
    def bottleneck(self) -> str:
        """ "reading", "decoding", or "model": which of them the others wait for."""
        if self.waiting_for_consumer_s > self.waiting_for_loader_s:
            return "model"
        return "reading" if self.waiting_for_source_s > self.decoding_s else "decoding"


@dataclass(frozen=True)
class Step:
    """One batch of one rank. positions: (B,), of the epoch; at or beyond its length where there is no pair."""

    positions: np.ndarray
    end: int  # the position of the epoch that all ranks have reached after it


@dataclass(frozen=True)
class Plan:
    """What stays the same for all batches of an epoch."""

    source: Source
    order: Order
    seed: int
    epoch: int
    rank: int
    decode: Callable[..., Any]  # decode_pairs or decode_clips, or DALI's, with the user's options
    options: Mapping[str, Any]  # of the decoder, as the ledger has them
    clips: bool
    replace_bad: bool  # or leave their rows without a pair
    batch_shape: tuple[int, ...]  # of the pixels
    dtype: torch.dtype
    prompt_dropout: float
    device: torch.device | None
    prefetch: int
    readers: int
    timeout_s: float
    max_bad_rate: float
    max_bad_run: int
    ledger: Ledger


@dataclass(eq=False)
class _Slot:
    """A row of a batch on its way."""

    position: int
    index: int = -1
    lap: int = 0
    pair: Pair | None = None
    attempt: int = 0
    lost: set[int] = field(default_factory=set)  # blocks of which nothing can be read
    reading: Reading | None = field(default=None, repr=False)


@dataclass
class _Rows:
    """What a batch is decoded to: 2B images or clips, and of the B pairs whether they are mirrored."""

    pixels: Tensor
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor
    colours: list[tuple[str, bool]]  # of clips: matrix and full_range

    @classmethod
    def of(cls, result: Any) -> _Rows:
        """result: of `decode_pairs` or `decode_clips`."""
        colours = zip(getattr(result, "matrix", ()), getattr(result, "full_range", ()), strict=True)
        return cls(result.pixels, result.original_size, result.crop_top_left, result.flipped, list(colours))

    @classmethod
    def empty(cls, pixels: Tensor, clips: bool) -> _Rows:
        """Without any pair, around pixels that are zeros."""
        count = len(pixels)
        size, corner = (torch.zeros((count, 2), dtype=torch.int64) for _ in range(2))
        flipped = torch.zeros(count // 2, dtype=torch.bool)
        return cls(pixels, size, corner, flipped, [_NO_COLOURS] * count if clips else [])

    def put(self, pairs: list[int], result: Any) -> None:
        """Decoded pairs in the places of those."""
        new, both = _Rows.of(result), self._both(pairs)
        places = torch.tensor(both)
        self.pixels[places.to(self.pixels.device)] = new.pixels
        self.original_size[places], self.crop_top_left[places] = new.original_size, new.crop_top_left
        self.flipped[torch.tensor(pairs)] = new.flipped
        for place, colours in zip(both, new.colours, strict=False):  # images have none
            self.colours[place] = colours

    def clear(self, pair: int) -> None:
        """No pair in that place."""
        both = self._both([pair])
        self.pixels[both], self.original_size[both], self.crop_top_left[both], self.flipped[pair] = 0, 0, 0, False
        for row in both if self.colours else ():
            self.colours[row] = _NO_COLOURS

    def _both(self, pairs: list[int]) -> list[int]:
        return pairs + [pair + len(self.flipped) for pair in pairs]


class _Stopped(Exception):  # noqa: N818  # no error: how a pipeline ends early
    pass


class Pipeline:
    """Runs in a thread of its own, which holds nothing that the consumer holds, so that dropping that ends it."""

    def __init__(self, plan: Plan, steps: Iterable[Step], buffers: Buffers | None, stats: LoaderStats) -> None:
        self._plan, self._steps, self._stats = plan, steps, stats
        self._buffers = buffers
        self._batches: queue.Queue[Any] = queue.Queue(maxsize=plan.prefetch)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.is_complete = False  # the last batch was taken
        self._seen, self._bad = 0, 0
        self._unread, self._undecoded = 0, 0  # in a row: all of a batch are read before any is decoded
        self._last_bad = ""  # what was wrong with it, and where
        self._unread_blocks: set[int] = set()  # of that row: all pairs of a block that cannot be read count as one
        self._failed: dict[int, str] = {}  # the pairs of a source that is smaller than a row of bad pairs may be
        self._stream = _stream_of(plan.device) if plan.device and plan.device.type == "cuda" else None
        self._process = os.getpid()
        self._copies: deque[tuple[Any, Tensor]] = deque()  # events, and the host memory that is being copied from
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
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
        if item is None:
            self.is_complete = True
            raise StopIteration
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, end, event = item
        if event is not None:
            stream = torch.cuda.current_stream(self._plan.device)
            stream.wait_event(event)
            for tensor in (batch.pixels, *_tensors(batch.extra).values()):
                tensor.record_stream(stream)
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

    # ------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        plan = self._plan
        readers: Readers | None = None
        waiting: deque[tuple[Step, list[_Slot]]] = deque()
        try:
            readers = Readers(plan.source, plan.clips, plan.readers, plan.timeout_s)
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                for step, pairs, laps in self._in_order():
                    waiting.append((step, self._ask(step, pairs, laps, readers)))
                    if len(waiting) > plan.prefetch:
                        self._finish_batch(*waiting.popleft(), readers)
                while waiting:
                    self._finish_batch(*waiting.popleft(), readers)
            self._put(None)
        except _Stopped:
            pass
        except BaseException as error:  # the consumer's to see, whatever it is
            with contextlib.suppress(_Stopped):
                self._put(error)
        finally:
            with contextlib.suppress(RuntimeError):  # of a device that has failed the consumer hears anyway
                for event, _ in self._copies:
                    event.synchronize()
            if readers is not None:
                readers.close()

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _put(self, item: Any) -> None:
        began = time.monotonic()
        while True:
            self._raise_if_stopped()
            try:
                self._batches.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        self._stats.waiting_for_consumer_s += time.monotonic() - began

    def _in_order(self) -> Iterator[tuple[Step, list[int], list[int]]]:
        """The steps, and for each position the pair, or -1, and its lap. Some at once, which is hardly slower."""
        steps = iter(self._steps)
        while some := list(islice(steps, _STEPS)):
            positions = np.stack([step.positions for step in some])
            here, pairs, laps = positions < len(self._plan.source), np.full(positions.shape, -1), 0 * positions
            pairs[here], laps[here] = self._plan.order(positions[here]), self._plan.order.laps(positions[here])
            yield from zip(some, pairs.tolist(), laps.tolist(), strict=True)

    def _ask(self, step: Step, pairs: list[int], laps: list[int], readers: Readers) -> list[_Slot]:
        slots = [_Slot(*facts) for facts in zip(step.positions.tolist(), pairs, laps, strict=True)]
        for slot in slots:
            if slot.index >= 0:
                slot.reading = readers.ask(slot.index)
        return slots

    def _finish_batch(self, step: Step, slots: list[_Slot], readers: Readers) -> None:
        real = [slot for slot in slots if slot.index >= 0]
        began = time.monotonic()
        for slot in real:
            self._read(slot, readers)
        real = [slot for slot in real if slot.pair is not None]
        read = time.monotonic()
        self._stats.waiting_for_source_s += read - began
        batch = self._decode(slots, real, readers)
        self._stats.decoding_s += time.monotonic() - read
        batch, event = self._move(batch)
        self._put((batch, step.end, event))

    def _read(self, slot: _Slot, readers: Readers) -> None:
        """Waits for the slot's pair, or for the first of those that take its place that can be read."""
        while slot.pair is None and slot.index >= 0:
            self._raise_if_stopped()
            assert slot.reading is not None
            readers.wait(slot.reading, self._raise_if_stopped)
            slot.pair, error, block = slot.reading.pair, slot.reading.error, slot.reading.block
            slot.reading = None
            self._seen += 1
            if error is not None:
                self._count_unread(slot, block, error)
                self._record_bad(slot, "", error.arm if isinstance(error, PairError) else None, error, self._unread)
                self._substitute(slot, readers)
            elif not slot.attempt:  # what takes another's place says nothing
                self._unread = 0
                self._unread_blocks.clear()

    def _count_unread(self, slot: _Slot, block: int, error: Exception) -> None:
        if block >= 0 and isinstance(error, PairError) and error.whole_block:
            self._unread += block not in self._unread_blocks
            self._unread_blocks.add(block)
            slot.lost.add(block)
        else:
            self._unread += 1

    def _substitute(self, slot: _Slot, readers: Readers) -> None:
        """Another pair for the slot, with the lap of its own place, which depends on seed, epoch, position and attempt
        alone; or none."""
        slot.pair, slot.reading = None, None
        if not self._plan.replace_bad:
            slot.index = -1
            return
        while True:
            slot.attempt += 1
            if slot.attempt > _MOST_ATTEMPTS or len(self._plan.source) < 2:
                where = self._plan.source.position(slot.index)
                raise LoaderError(f"no pair was found to replace {where}; the last that was bad: {self._last_bad}")
            place = np.array([self._candidate(slot)])
            slot.index, slot.lap = int(self._plan.order(place)[0]), int(self._plan.order.laps(place)[0])
            if not slot.lost or readers.block_of(slot.index) not in slot.lost:
                break
        slot.reading = readers.ask(slot.index)

    def _candidate(self, slot: _Slot) -> int:
        """A position: first of the blocks being read, where reading another one for a single pair takes long."""
        plan = self._plan
        begin, end = 0, len(plan.source)
        if not plan.source.random_access and slot.attempt <= _NEARBY_ATTEMPTS:
            nearby = plan.order.window(slot.position)
            begin, end = nearby if nearby[1] - nearby[0] > 1 else (begin, end)
        size = end - begin
        ahead = 1 + mix(plan.seed, plan.epoch, slot.position, slot.attempt) % min(size - 1, _REPLACEMENT_WINDOW)
        return begin + (slot.position - begin + ahead) % size

    def _record_bad(self, slot: _Slot, key: str, arm: str | None, error: Exception, run: int) -> None:
        """run: how many pairs in a row have the same trouble, this one among them."""
        plan, pairs = self._plan, len(self._plan.source)
        self._bad += 1
        self._stats.bad += 1
        where = plan.source.position(slot.index)
        reason = error.reason if isinstance(error, PairError) else f"{error}"
        if plan.ledger.is_kept:
            plan.ledger.add(
                key=key,
                arm=arm,
                position=where,
                index=slot.index,
                error=type(error).__name__,
                reason=reason,
                epoch=plan.epoch,
                step_position=slot.position,
                rank=plan.rank,
                source=plan.source.fingerprint,
                decode={**plan.options, "seed": self._seed_of(slot)},
            )
        this = f"{key} ({where}): {reason}" if key else f"{where}: {reason}"
        self._last_bad, last = this, f"the last was {this}"
        if pairs <= plan.max_bad_run:
            self._failed.setdefault(slot.index, this)
        if run > plan.max_bad_run and len(self._failed) == pairs:
            raise LoaderError(
                f"all {pairs} pairs of the source failed; the first was {next(iter(self._failed.values()))}"
            )
        if run > plan.max_bad_run:
            raise LoaderError(f"{run} pairs in a row are bad, more than {plan.max_bad_run} (max_bad_run); {last}")
        enough = self._seen >= _RATE_AFTER or not plan.max_bad_rate
        if enough and self._bad > plan.max_bad_rate * max(self._seen, min(pairs, _RATE_OF)):
            raise LoaderError(
                f"{self._bad} of {self._seen} pairs are bad, more than {plan.max_bad_rate:.1%} (max_bad_rate); {last}"
            )

    def _seed_of(self, slot: _Slot) -> int:
        """Of what is drawn for the pair in this place: crop, mirror, start."""
        return mix(self._plan.seed, self._plan.epoch, slot.position) >> 1

    def _decode(self, slots: list[_Slot], real: list[_Slot], readers: Readers) -> PairBatch:
        plan, pairs = self._plan, len(slots)
        out = None if self._buffers is None else self._buffers.take()
        if len(real) == pairs:
            result = self._decoded(real, out)
            rows = _Rows.of(result)
        else:  # the last batch: rows without a pair stay zero
            pixels = torch.zeros(plan.batch_shape, dtype=plan.dtype, device="cpu") if out is None else out.zero_()
            rows = _Rows.empty(pixels, plan.clips)
            if real:
                result = self._decoded(real, None)
                rows.pixels = pixels.to(result.pixels.device)
                rows.put([slots.index(slot) for slot in real], result)
        if real:
            self._replace_undecodable(result, slots, real, rows, readers)
        return self._batch(slots, rows)

    def _decoded(self, slots: list[_Slot], out: Tensor | None) -> Any:
        if self._plan.source.ready is not None:
            return stack_pairs([slot.pair for slot in slots if isinstance(slot.pair, ReadyPair)], out)
        wins, loses = zip(*((slot.pair.win, slot.pair.lose) for slot in slots if slot.pair is not None), strict=True)
        seeds = [self._seed_of(slot) for slot in slots]
        return self._plan.decode(list(wins), list(loses), seeds=seeds, out=out, on_error="mask")

    def _replace_undecodable(
        self, result: Any, slots: list[_Slot], real: list[_Slot], rows: _Rows, readers: Readers
    ) -> None:
        """Puts others in the place of pairs that did not decode."""
        failures = {failure.index: failure for failure in reversed(result.errors)}
        for number, slot in enumerate(real):
            failure, row = failures.get(number), slots.index(slot)
            if failure is None and not slot.attempt:
                self._undecoded = 0
            while failure is not None:
                self._raise_if_stopped()
                assert slot.pair is not None
                self._undecoded += 1
                self._record_bad(
                    slot, slot.pair.key, failure.arm, PairError(failure.reason, failure.arm), self._undecoded
                )
                self._substitute(slot, readers)
                self._read(slot, readers)
                if slot.index < 0:
                    rows.clear(row)
                    break
                single = self._decoded([slot], None)
                failure = single.errors[0] if single.errors else None
                if failure is None:
                    rows.put([row], single)

    def _batch(self, slots: list[_Slot], rows: _Rows) -> PairBatch:
        plan = self._plan
        found = [slot.pair for slot in slots]
        ok = [pair is not None for pair in found]
        pairs = [pair or Pair("", b"", b"", weight=0.0) for pair in found]
        prompts = [
            "" if mix(plan.seed, plan.epoch, slot.position, 2**32) / 2**64 < plan.prompt_dropout else pair.prompt
            for slot, pair in zip(slots, pairs, strict=True)
        ]
        names = list(dict.fromkeys(name for pair in pairs for name in pair.extra))
        return PairBatch(
            pixels=rows.pixels,
            prompts=prompts,
            keys=[pair.key for pair in pairs],
            index=torch.tensor([slot.index for slot in slots], dtype=torch.int64),
            lap=torch.tensor([slot.lap for slot in slots], dtype=torch.int64),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            category=[pair.category for pair in pairs],
            ok=torch.tensor(ok, dtype=torch.bool),
            original_size=rows.original_size,
            crop_top_left=rows.crop_top_left,
            flipped=rows.flipped,
            matrix=tuple(matrix for matrix, _ in rows.colours),
            full_range=tuple(full_range for _, full_range in rows.colours),
            extra={name: _column([pair.extra.get(name) for pair in pairs]) for name in names},
        )

    def _move(self, batch: PairBatch) -> tuple[PairBatch, Any]:
        """To the device, and an event of when it is there. The small tensors stay where they are cheap to look at."""
        device = self._plan.device
        if device is None:
            return batch, None
        extra = {**batch.extra, **{name: tensor.to(device) for name, tensor in _tensors(batch.extra).items()}}
        pixels = batch.pixels.to(device, non_blocking=self._stream is not None)
        if self._stream is None:
            return replace(batch, pixels=pixels, extra=extra), None
        event = torch.cuda.Event()
        event.record(self._stream)
        while self._copies and self._copies[0][0].query():
            self._copies.popleft()
        if batch.pixels.device != device:
            self._copies.append((event, batch.pixels))  # not to be written to again before it has been copied
        return replace(batch, pixels=pixels, extra=extra), event


@cache
def _stream_of(device: torch.device) -> Any:
    """Of all that loaders ask of a device: their work does not wait for the consumer's. One for all iterations, because
    PyTorch keeps the memory of a stream for that stream."""
    return torch.cuda.Stream(device)


def _column(values: list[Any]) -> list[Any] | Tensor:
    """The values; tensors as one, with zeros where there is no pair."""
    some = next((value for value in values if value is not None), None)
    if not isinstance(some, Tensor):
        return values
    return torch.stack([torch.zeros_like(some) if value is None else value for value in values])


def _tensors(extra: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: column for name, column in extra.items() if isinstance(column, Tensor)}
