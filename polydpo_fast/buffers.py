"""Memory of tensors on a CPU, used again as soon as nobody looks at it any more."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

__all__ = ["LARGE", "Buffers"]

# Bytes. What is freed above this the C library may give back to the system, and above 32 MB it always does. The page
# faults of fresh memory then cost several times the computation of a gradient, or as much as decoding.
LARGE = 4 << 20
_MADV_FREE = getattr(mmap, "MADV_FREE", 8)  # a Python that was built on an older system lacks the name


class Buffers:
    """What is free of the memory that was taken from here, to be taken again.

    A tensor that is kept is never written to again; one that is let go spares the next one of about its size the page
    faults of fresh memory.

    Args:
        most_free: more blocks than these are let go.
        pinned: whether they are page-locked.
        reclaimable: whether the system may take free blocks back when it is short of memory. That costs a tenth of
            the page faults on systems without huge pages.
    """

    def __init__(self, most_free: int, *, pinned: bool = False, reclaimable: bool = False) -> None:
        self.pinned, self._reclaimable = pinned, reclaimable
        self._free: deque[tuple[np.ndarray, mmap.mmap | None]] = deque(maxlen=most_free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
        """As torch.empty, or torch.empty_strided of elements without gaps; at least one of them."""
        if torch.compiler.is_compiling():  # Dynamo cannot follow what is below
            fresh = torch.empty(shape, dtype=dtype, device="cpu")
            return fresh if strides is None else fresh.as_strided(shape, strides)
        size = math.prod(shape) * dtype.itemsize
        block, pages = self._take(size)
        # The storage holds this view, and lets go of it when its last tensor is gone.
        lease = block[:size]
        weakref.finalize(lease, self._give_back, block, pages).atexit = False
        flat = torch.frombuffer(lease, dtype=dtype)
        if strides is None:
            return flat.view(*shape)
        return flat.new_empty(0).set_(flat.untyped_storage(), 0, shape, strides)

    def _take(self, size: int) -> tuple[np.ndarray, mmap.mmap | None]:
        with suppress(IndexError):  # another thread was quicker
            for _ in range(len(self._free)):
                block, pages = self._free.pop()
                if size <= block.nbytes <= 1.25 * size:  # batches of several shapes take turns
                    return block, pages
                self._free.appendleft((block, pages))
        if not self.pinned:
            with suppress(OSError):  # there is no memory, which PyTorch says in words that programs look for
                pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(OSError):  # a system without huge pages
                    pages.madvise(mmap.MADV_HUGEPAGE)
                return np.frombuffer(pages, np.uint8), pages
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned).numpy(), None

    def _give_back(self, block: np.ndarray, pages: mmap.mmap | None) -> None:
        if self._reclaimable and pages is not None:
            with suppress(OSError):
                pages.madvise(_MADV_FREE)
        self._free.append((block, pages))
