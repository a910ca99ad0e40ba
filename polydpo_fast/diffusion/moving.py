"""To a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moved"]


def moved(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device, in the dtype if one is given; the host goes on at once where x is on the CPU.

    A plain copy from the CPU first waits until the device has done all that it was asked for, which leaves it without
    work afterwards. CUDA has read memory that is not page-locked when the call returns. Into the CPU's memory a copy
    that nobody waits for would be read too early.
    """
    return x.to(device, dtype or x.dtype, non_blocking=x.device.type == "cpu")
