"""Batches on their way to a device, beside what the consumer does there."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .batch import PairBatch

__all__ = ["Transfer", "await_transfer"]


class Transfer:
    """device: None leaves batches where they are."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._stream = _stream_of(device) if device and device.type == "cuda" else None
        self._copies: deque[tuple[Any, Tensor]] = deque()  # events, and the host memory that is being copied from

    def stream(self) -> AbstractContextManager[Any]:
        """Where all that a batch needs of the device is asked for, by a thread that uses no other device."""
        if self._stream is None:
            return contextlib.nullcontext()
        # A thread begins with device 0. To leave the stream for that device would make a context there: on every rank.
        torch.cuda.set_device(self._stream.device)
        return torch.cuda.stream(self._stream)

    def move(self, batch: PairBatch) -> tuple[PairBatch, Any]:
        """To the device, and an event of when it is there. The small tensors stay where they are cheap to look at."""
        device = self._device
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

    def finish(self) -> None:
        """Waits until nothing is copied any more."""
        with contextlib.suppress(RuntimeError):  # of a device that has failed the consumer hears anyway
            for event, _ in self._copies:
                event.synchronize()


def await_transfer(batch: PairBatch, event: Any, device: torch.device | None) -> None:
    """What the consumer asks of the device from now on comes after the batch is there."""
    if event is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for tensor in (batch.pixels, *_tensors(batch.extra).values()):
            tensor.record_stream(stream)


@cache
def _stream_of(device: torch.device) -> Any:
    """Of all that loaders ask of a device: their work does not wait for the consumer's. One for all iterations, because
    PyTorch keeps the memory of a stream for that stream."""
    return torch.cuda.Stream(device)


def _tensors(extra: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: column for name, column in extra.items() if isinstance(column, Tensor)}
