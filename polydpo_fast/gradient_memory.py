"""Memory of large gradients on a CPU, kept from one backward pass to the next."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from .layout import empty_dense_like

__all__ = ["empty_gradient", "is_large"]

# What is freed above this may go back to the system, and always does above 32 MB. The page faults of fresh memory then
# cost several times the computation.
_LARGE = 4 << 20  # bytes

# The two arms of one gradient, or two gradients.
_kept: deque[mmap.mmap] = deque(maxlen=2)


def is_large(like: Tensor) -> bool:
    return like.numel() * like.element_size() >= _LARGE and like.device.type == "cpu"


def empty_gradient(like: Tensor) -> Tensor:
    """As `empty_dense_like(like)`, if it is large in memory of a gradient that nobody holds any more."""
    if not is_large(like):
        return empty_dense_like(like)
    memory = _take(like.numel() * like.element_size())
    owner = memoryview(memory)  # which the storage holds
    weakref.finalize(owner, _keep, memory).atexit = False
    storage = torch.frombuffer(owner, dtype=like.dtype).untyped_storage()
    strides = (like.numel() // like.shape[0], *like.stride()[1:])
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, like.shape, strides)


def _take(size: int) -> mmap.mmap:
    with suppress(IndexError):  # there is none, or another thread was quicker
        while True:
            memory = _kept.pop()
            if len(memory) == size:
                return memory
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _keep(memory: mmap.mmap) -> None:
    with suppress(OSError):
        memory.madvise(mmap.MADV_FREE)  # so that the system takes it back when it is short of memory
        _kept.append(memory)
