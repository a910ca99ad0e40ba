"""Memory for pixels that nobody has written yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fresh_pixels"]


def fresh_pixels(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None, pinned: bool = False
) -> Tensor:
    """Uninitialised. On the CPU, the default, in huge pages where the system gives them on request.

    A large batch is memory that the process has not had before, and its page faults, one for each 4 KB, can cost more
    than decoding.
    """
    out = torch.empty(shape, dtype=dtype, device=device or "cpu", pin_memory=pinned)
    if out.device.type == "cpu" and not pinned:
        from . import _C

        _C.advise_huge_pages(out.data_ptr(), out.data_ptr() + out.nbytes)
    return out
