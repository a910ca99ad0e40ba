"""From steps to batches: pairs are read ahead and decoded, and others take the place of those that are bad."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..buffers import Buffers
from ..splitmix import mix
from .bad_pairs import BadPairs
from .batch import PairBatch
from .plan import Plan, Step
from .reading import LoaderError, Readers, Reading
from .ready import ReadyPair, stack_pairs
from .rows import Rows
from .source import Pair, PairError
from .stats import LoaderStats

__all__ = ["Assembler"]

_STEPS = 32  # whose pairs are computed together
_REPLACEMENT_WINDOW = 4096  # positions ahead: read soon anyway, but hardly in the same batch
_NEARBY_ATTEMPTS = 4  # with pairs of the blocks that are in memory already
_MOST_ATTEMPTS = 1000


@dataclass(eq=False)
class _Place:
    """A place in a batch, and the pair for it: the one that the order has there or, while that is bad, another one."""

    row: int  # of the batch
    position: int  # of the epoch
    index: int  # of the pair in its source; -1: the place stays empty
    lap: int
    pair: Pair | None = None  # once it is read
    reading: Reading | None = field(default=None, repr=False)  # where it comes from
    attempt: int = 0  # how many pairs were bad before
    lost_blocks: set[int] = field(default_factory=set)  # of which nothing can be read


class Assembler:
    """Makes batches, one after the other. look: called now and then; what it raises ends the work."""

    def __init__(
        self, plan: Plan, buffers: Buffers | None, stats: LoaderStats, readers: Readers, look: Callable[[], None]
    ) -> None:
        self._plan, self._buffers, self._stats, self._readers, self._look = plan, buffers, stats, readers, look
        self._bad = BadPairs(plan, stats)
        self._reading_s = 0.0  # that pairs were waited for

    def batches(self, steps: Iterable[Step]) -> Iterator[tuple[PairBatch, int]]:
        """Each batch, and the position of the epoch after it. While one is made, the next ones are read."""
        waiting: deque[tuple[list[_Place], int]] = deque()
        for step, pairs, laps in self._in_order(steps):
            waiting.append((self._ask(step, pairs, laps), step.end))
            if len(waiting) > self._plan.prefetch:
                yield self._assembled(*waiting.popleft())
        while waiting:
            yield self._assembled(*waiting.popleft())

    def _in_order(self, steps: Iterable[Step]) -> Iterator[tuple[Step, list[int], list[int]]]:
        """The steps, and for each position its pair, or -1, and its lap. Many steps take hardly longer than one."""
        order, remaining = self._plan.order, iter(steps)
        while some := list(islice(remaining, _STEPS)):
            positions = np.stack([step.positions for step in some])
            here, pairs, laps = positions < len(self._plan.source), np.full(positions.shape, -1), 0 * positions
            pairs[here], laps[here] = order(positions[here]), order.laps(positions[here])
            yield from zip(some, pairs.tolist(), laps.tolist(), strict=True)

    def _ask(self, step: Step, pairs: list[int], laps: list[int]) -> list[_Place]:
        facts = zip(range(len(pairs)), step.positions.tolist(), pairs, laps, strict=True)
        places = [_Place(*one) for one in facts]
        for place in places:
            if place.index >= 0:
                place.reading = self._readers.ask(place.index)
        return places

    def _assembled(self, places: list[_Place], end: int) -> tuple[PairBatch, int]:
        began, before = time.monotonic(), self._reading_s
        for place in places:
            self._read(place)
        batch = self._batch(places, self._decode(places))
        reading_s = self._reading_s - before  # also for others in the place of pairs that did not decode
        self._stats.waiting_for_source_s += reading_s
        self._stats.decoding_s += time.monotonic() - began - reading_s
        return batch, end

    # ---------------------------------------------------------------------------------- reading, and replacing

    def _read(self, place: _Place) -> None:
        """Waits for the place's pair or, if that cannot be read, for the first replacement that can."""
        began = time.monotonic()
        while place.pair is None and place.index >= 0:
            self._look()
            assert place.reading is not None
            self._readers.wait(place.reading, self._look)
            place.pair, error, block = place.reading.pair, place.reading.error, place.reading.block
            self._bad.count_seen()
            if error is not None:
                is_lost = block >= 0 and isinstance(error, PairError) and error.whole_block
                if is_lost:
                    place.lost_blocks.add(block)
                self._bad.add_unread(place.position, place.index, error, block if is_lost else None)
                self._replace(place)
            elif not place.attempt:  # a replacement says nothing of the pairs around
                self._bad.end_unread_run()
        self._reading_s += time.monotonic() - began

    def _replace(self, place: _Place) -> None:
        """Asks for another pair, or none. Which one depends on seed, epoch, position and attempt alone."""
        place.pair = None
        if not self._plan.replace_bad:
            place.index = -1
            return
        while True:
            place.attempt += 1
            if place.attempt > _MOST_ATTEMPTS or len(self._plan.source) < 2:
                where = self._plan.source.position(place.index)
                raise LoaderError(f"no pair was found to replace {where}; the last that was bad: {self._bad.last}")
            at = np.array([self._candidate(place)])
            # With the lap of that position: with this one's lap, the same pair may come elsewhere.
            place.index, place.lap = int(self._plan.order(at)[0]), int(self._plan.order.laps(at)[0])
            if self._readers.block_of(place.index) not in place.lost_blocks:
                break
        place.reading = self._readers.ask(place.index)

    def _candidate(self, place: _Place) -> int:
        """A position; at first one of the blocks that are being read, where a single pair costs a whole block."""
        plan = self._plan
        begin, end = 0, len(plan.source)
        if not plan.source.random_access and place.attempt <= _NEARBY_ATTEMPTS:
            nearby = plan.order.window(place.position)
            begin, end = nearby if nearby[1] - nearby[0] > 1 else (begin, end)
        size = end - begin
        ahead = 1 + mix(plan.seed, plan.epoch, place.position, place.attempt) % min(size - 1, _REPLACEMENT_WINDOW)
        return begin + (place.position - begin + ahead) % size

    # ------------------------------------------------------------------------------------------------ decoding

    def _decode(self, places: list[_Place]) -> Rows:
        plan = self._plan
        out = None if self._buffers is None else self._buffers.empty(plan.batch_shape, plan.dtype)
        taken = [place for place in places if place.pair is not None]
        if len(taken) == len(places):
            result = self._decoded(taken, out)
            rows = Rows.of(result)
        else:  # places without a pair stay zero
            pixels = torch.zeros(plan.batch_shape, dtype=plan.dtype, device="cpu") if out is None else out.zero_()
            rows = Rows.empty(pixels, plan.clips)
            if not taken:
                return rows
            result = self._decoded(taken, None)
            rows.pixels = pixels.to(result.pixels.device)
            rows.put([place.row for place in taken], result)
        self._replace_undecodable(taken, result.errors, rows)
        return rows

    def _decoded(self, places: list[_Place], out: Tensor | None) -> Any:
        pairs = [place.pair for place in places if place.pair is not None]
        if self._plan.source.ready is not None:
            return stack_pairs([pair for pair in pairs if isinstance(pair, ReadyPair)], out)
        seeds = [self._plan.seed_at(place.position) for place in places]
        wins, loses = [pair.win for pair in pairs], [pair.lose for pair in pairs]
        return self._plan.decode(wins, loses, seeds=seeds, out=out, on_error="mask")

    def _replace_undecodable(self, taken: list[_Place], errors: Iterable[Any], rows: Rows) -> None:
        """Puts others in the place of pairs that did not decode. errors: DecodeFailures, by the numbers of `taken`."""
        first_failures = {failure.index: failure for failure in reversed(tuple(errors))}
        for number, place in enumerate(taken):
            failure = first_failures.get(number)
            if failure is None and not place.attempt:
                self._bad.end_undecoded_run()
            while failure is not None:
                assert place.pair is not None
                error = PairError(failure.reason, failure.arm)
                self._bad.add_undecoded(place.position, place.index, place.pair.key, error)
                self._replace(place)
                self._read(place)
                if place.index < 0:
                    rows.clear(place.row)
                    break
                single = self._decoded([place], None)
                failure = single.errors[0] if single.errors else None
                if failure is None:
                    rows.put([place.row], single)

    def _batch(self, places: list[_Place], rows: Rows) -> PairBatch:
        nothing = Pair("", b"", b"", weight=0.0)
        pairs = [place.pair or nothing for place in places]
        names = list(dict.fromkeys(name for pair in pairs for name in pair.extra))
        return PairBatch(
            pixels=rows.pixels,
            prompts=[
                "" if self._plan.drops_prompt_at(place.position) else pair.prompt
                for place, pair in zip(places, pairs, strict=True)
            ],
            keys=[pair.key for pair in pairs],
            index=torch.tensor([place.index for place in places], dtype=torch.int64),
            lap=torch.tensor([place.lap for place in places], dtype=torch.int64),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            category=[pair.category for pair in pairs],
            ok=torch.tensor([place.pair is not None for place in places], dtype=torch.bool),
            original_size=rows.original_size,
            crop_top_left=rows.crop_top_left,
            flipped=rows.flipped,
            matrix=tuple(matrix for matrix, _ in rows.colours),
            full_range=tuple(full_range for _, full_range in rows.colours),
            extra={name: _column(name, [pair.extra.get(name) for pair in pairs]) for name in names},
        )


def _column(name: str, values: list[Any]) -> list[Any] | Tensor:
    """The values; tensors as one, with zeros where there is no pair. Raises ValueError where their shapes differ."""
    some = next((value for value in values if value is not None), None)
    if not isinstance(some, Tensor):
        return values
    try:
        return torch.stack([torch.zeros_like(some) if value is None else value for value in values])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"extra[{name!r}] of a batch's pairs; expected tensors of one shape: {error}") from error
