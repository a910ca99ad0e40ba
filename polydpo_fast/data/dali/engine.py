"""What decodes images and clips by DALI: its pipelines, of which one call at a time makes use."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Engine", "reason"]


class Engine:
    """DALI on one device: its pipelines, which one call at a time uses, and the count of pairs for the canary.

    A forked process makes pipelines of its own.
    """

    def __init__(self, device: torch.device, threads: int, canary: int | None, hardware_load: float) -> None:
        self.device, self.threads, self.canary, self.hardware_load = device, threads, canary, hardware_load
        self.is_gpu = device.type == "cuda"
        self._pipelines: dict[str, tuple[int, Any]] = {}  # and how many samples each takes
        self._held: list[Any] = []  # what a GPU may still be reading
        self._pairs = itertools.count()  # that DALI decoded
        self._lock = threading.Lock()
        _engines.add(self)

    def with_defaults(self, defaults: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in defaults:
                raise TypeError(f"there is no option {name!r}; expected any of {', '.join(defaults)}")
        given = defaults | options
        return given if given["threads"] is not None else given | dict(threads=self.threads)

    @contextmanager
    def writing(self, out: Tensor) -> Iterator[None]:
        """Writes to an inference tensor are only allowed in its mode; no others are ever part of a graph."""
        device = torch.cuda.device(out.device) if out.device.type == "cuda" else nullcontext()
        with self._lock, torch.inference_mode(out.is_inference()), torch.no_grad(), device:
            try:
                yield
            finally:
                self.wait()

    def run(self, key: str, graph: Callable[[], Any], most: int, inputs: dict[str, list[np.ndarray]]) -> list[Tensor]:
        """One run of a pipeline, for up to `most` samples. It is built when it is first needed, and again for more.

        A smaller one beside it would hold buffers for each of its threads, too.
        """
        room, pipeline = self._pipelines.pop(key, (0, None))
        if room < most:
            room, pipeline = most, self._pipeline(graph, most)
        stream = torch.cuda.current_stream(self.device) if self.is_gpu else None
        (batch,) = pipeline.run(stream, **inputs)
        self._held.append(batch)
        self._pipelines[key] = room, pipeline  # one that fails is of no use any more
        return [torch.utils.dlpack.from_dlpack(sample) for sample in batch]

    def wait(self) -> None:
        """Until what was asked of the GPU is done; then DALI may use its buffers again."""
        if self.is_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        self._held.clear()

    def is_canary(self) -> bool:
        """Of the next pair that DALI decoded."""
        return self.canary is not None and next(self._pairs) % self.canary == 0

    def _begin_anew(self) -> None:
        # Never destroyed: that would wait for threads which are in the other process.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._pipelines, self._held)))
        self._pipelines, self._held, self._lock = {}, [], threading.Lock()

    def _pipeline(self, graph: Callable[[], Any], most: int) -> Any:
        from nvidia.dali import Pipeline

        pipeline = Pipeline(
            batch_size=most,
            # On a GPU a thread decodes a whole sample, and holds tens of megabytes on both sides.
            num_threads=min(self.threads, most) if self.is_gpu else self.threads,
            device_id=self.device.index if self.is_gpu else None,
            prefetch_queue_depth=1,  # each batch is given and awaited
        )
        with pipeline:
            pipeline.set_outputs(graph())
        return pipeline


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _begin_anew() -> None:
    for engine in _engines:
        engine._begin_anew()


os.register_at_fork(after_in_child=_begin_anew)


def reason(error: RuntimeError | None) -> str:
    """What DALI says, without the pages around it."""
    words = " ".join(str(error).rsplit("encountered:", 1)[-1].split())
    return words if len(words) < 300 else f"{words[:300]} ..."
