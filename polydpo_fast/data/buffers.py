"""Memory for batches, used again as soon as nobody looks at it any more."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

__all__ = ["Buffers"]

_MOST_FREE = 16  # more are let go: somebody kept an epoch of batches, and dropped it


class Buffers:
    """Tensors of one shape and dtype on the CPU, whose memory comes back when the last view of it is gone.

    A batch that is kept is never written to again; one that is let go spares the next one the page faults of fresh
    memory, which cost as much as a third of decoding an image.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> None:
        self._shape, self._dtype, self.pinned = shape, dtype, pinned
        self._free: deque[tuple[Tensor, np.ndarray]] = deque(maxlen=_MOST_FREE)

    def take(self) -> Tensor:
        """Holds anything, such as an earlier batch."""
        try:
            memory, whole = self._free.popleft()
        except IndexError:
            memory = torch.empty(self._shape, dtype=self._dtype, device="cpu", pin_memory=self.pinned)
            whole = memory.view(torch.uint8).numpy()
        # The tensor's storage owns this view, and lets go of it when its last tensor is gone.
        lease = whole[...]
        weakref.finalize(lease, self._free.append, (memory, whole)).atexit = False
        return torch.from_numpy(lease).view(self._dtype)
