"""What a loader's passes share in one process: the decoder, and the memory for batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from ..buffers import Buffers
from .dali.decoder import Decoder, choose_decoder

__all__ = ["Equipment"]

_MOST_FREE = 16  # buffers; more are let go: somebody kept an epoch of batches, and dropped it


class Equipment:
    """decoder: as of `PairLoader`. options: of `decode_pairs`, or of `decode_clips` if `frames` is among them.

    buffers: the memory of batches; None where they are decoded on a device. A copy of it makes its own, by pickle too.
    """

    def __init__(
        self, decoder: Literal["auto", "cpp", "dali"], device: torch.device | None, options: Mapping[str, Any]
    ) -> None:
        self._kind, self._device, self._options = decoder, device, options
        self._chosen: tuple[object, Decoder] | None = None  # and what it was chosen for
        self.buffers: Buffers | None = None
        self._forked: Buffers | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._kind, self._device, self._options)

    def set_up(self, worker: Any) -> tuple[Callable[..., Any], torch.device | None]:
        """What decodes, and the device to which batches go; in a DataLoader's worker, or None. Provides `buffers`."""
        options = dict(self._options)
        if worker is not None and "threads" not in options:
            options["threads"] = max(1, len(os.sched_getaffinity(0)) // worker.num_workers)
        # No process but its first may use CUDA after a fork.
        device = None if worker is not None else _with_number(self._device)
        decoder = self._decoder(device, options.get("threads"), worker is not None)
        if getattr(decoder, "device", torch.device("cpu")).type == "cpu":
            self._provide_memory(pinned=device is not None and device.type == "cuda")
        return partial(decoder.decode_clips if "frames" in options else decoder.decode_pairs, **options), device

    def _decoder(self, device: torch.device | None, threads: int | None, is_worker: bool) -> Decoder:
        """The same for all passes: DALI's is slow to build. A worker has one of its own."""
        if is_worker:
            # DALI on a CPU does not decode all that NVDEC would.
            on_cuda = self._device is not None and self._device.type == "cuda"
            return choose_decoder("cpp" if on_cuda and "frames" in self._options else self._kind, "cpu", threads)
        if self._chosen is None or self._chosen[0] != device:
            self._chosen = device, choose_decoder(self._kind, device or "cpu", threads)
        return self._chosen[1]

    def _provide_memory(self, pinned: bool) -> None:
        # A worker may have been forked after batches of the first process, whose page-locked memory is not its own.
        if self.buffers is None or self.buffers.pinned != pinned:
            self._forked = self.buffers  # not to be freed: to free page-locked memory asks CUDA, and a fork has none
            self.buffers = Buffers(_MOST_FREE, pinned=pinned)


def _with_number(device: torch.device | None) -> torch.device | None:
    """With "cuda" as the current device of this thread; the loader's own thread has another one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
