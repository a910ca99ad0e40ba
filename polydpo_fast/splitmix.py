"""SplitMix64 (Steele, Lea and Flood 2014), from which all that is drawn comes: of ints, arrays and tensors."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["GOLDEN", "mix", "signed", "splitmix64", "splitmix64_of_array", "splitmix64_of_tensor"]

GOLDEN = 0x9E3779B97F4A7C15
"""From one counter of the generator to the next."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(counter: int) -> int:
    """64 well mixed bits of a counter, which counts modulo 2^64."""
    z = counter % 2**64
    z = (z ^ z >> 30) * _FIRST % 2**64
    z = (z ^ z >> 27) * _SECOND % 2**64
    return z ^ z >> 31


def mix(*numbers: int) -> int:
    """64 well mixed bits of the numbers, chained."""
    state = 0
    for number in numbers:
        state = splitmix64(state + number + GOLDEN)
    return state


def splitmix64_of_array(counters: np.ndarray) -> np.ndarray:
    """Of each uint64."""
    z = (counters ^ counters >> np.uint64(30)) * np.uint64(_FIRST)
    z = (z ^ z >> np.uint64(27)) * np.uint64(_SECOND)
    mixed: np.ndarray = z ^ z >> np.uint64(31)
    return mixed


def splitmix64_of_tensor(counters: Tensor) -> Tensor:
    """Of each int64, whose products wrap around; shifts must be told to bring in zeros."""
    z = (counters ^ (counters >> 30 & (1 << 34) - 1)) * signed(_FIRST)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * signed(_SECOND)
    return z ^ (z >> 31 & (1 << 33) - 1)


def signed(number: int) -> int:
    """The int64 that has the bits of this number below 2^64."""
    return number - 2**64 if number >= 2**63 else number
