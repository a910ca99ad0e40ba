"""What is drawn, as the docs have it: the order of pairs, crops, mirrors. In integers of Python, and without the code
that is checked."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["crop_at", "drawn", "mixed", "place"]

_64 = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def place(position: int, size: int, seed: int, epoch: int) -> int:
    """The pair at a position: a Feistel network of 12 rounds on the smallest even number of bits, at least two, that
    `size` numbers take, applied again while the result is not below `size`. Keys are those of seed, epoch and round. If
    the key of a round 12 is odd, 0 and 1 are swapped."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    key = mixed(seed, epoch)
    while True:
        left, right = divmod(position, 2**half)
        for number in range(12):
            left, right = right, left ^ _splitmix(right + mixed(key, number)) % 2**half
        position = left * 2**half + right
        if position < size:
            return position ^ (mixed(key, 12) & 1) if position < 2 <= size else position


def mixed(*numbers: int) -> int:
    """The key of several numbers: splitmix64, chained."""
    state = 0
    for number in numbers:
        state = _splitmix(state + number + _GOLDEN)
    return state


def drawn(seed: int) -> list[int]:
    """Of a pair, 64 bits each: for the crop's top and left, the mirror, and the start in a clip."""
    return [_splitmix(seed + step * _GOLDEN) for step in (1, 2, 3, 4)]


def crop_at(numbers: Sequence[int], of: Sequence[int], size: Sequence[int]) -> list[int]:
    """Top and left of a crop of a size, out of another."""
    return [(x >> 32) * (max(0, m - n) + 1) >> 32 for x, m, n in zip(numbers[:2], of, size, strict=True)]


def _splitmix(z: int) -> int:
    """Steele, Lea and Flood 2014, Fig. 16, of a number modulo 2^64."""
    z %= _64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _64
    return z ^ (z >> 31)
