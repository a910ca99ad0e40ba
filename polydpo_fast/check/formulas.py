"""What is drawn, as the docs have it: the order of pairs, crops, mirrors. In integers of Python, and without the code
that is checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["balanced", "crop_at", "drawn", "mixed", "place", "windowed"]

_64 = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def place(position: int, size: int, seed: int, epoch: int) -> int:
    """The pair at a position, where all are shuffled among each other."""
    return _permuted(position, size, mixed(seed, epoch))


def windowed(lengths: Sequence[int], seed: int, epoch: int, window: int) -> list[int]:
    """All pairs of blocks of these lengths: the blocks are shuffled, then the pairs of each `window` of them."""
    key, ends, found = mixed(seed, epoch), list(itertools.accumulate(lengths)), list[int]()
    blocks = [_permuted(number, len(lengths), mixed(key, 1)) for number in range(len(lengths))]
    for group, first in enumerate(range(0, len(blocks), window)):
        some = blocks[first : first + window]
        pairs = [pair for block in some for pair in range(ends[block] - lengths[block], ends[block])]
        found += [pairs[_permuted(turn, len(pairs), mixed(key, 2, group))] for turn in range(len(pairs))]
    return found


def balanced(codes: Sequence[int], quotas: Sequence[int], seed: int, epoch: int) -> list[int]:
    """An epoch of pairs of these categories, of which each has its quota of the positions: it goes through its pairs in
    an order of its own, and in the next epoch goes on where it stopped."""
    found, key = [], mixed(seed, epoch, 3)
    of_slots = [(code, turn) for code, quota in enumerate(quotas) for turn in range(epoch * quota, (epoch + 1) * quota)]
    for position in range(len(codes)):
        code, turn = of_slots[_permuted(position, len(codes), key)]
        members = [pair for pair, of in enumerate(codes) if of == code]
        lap, turn = divmod(turn, len(members))
        found.append(members[_permuted(turn, len(members), mixed(seed, 4, code, lap))])
    return found


def _permuted(position: int, size: int, key: int) -> int:
    """A Feistel network of 12 rounds on the smallest even number of bits, at least two, that `size` numbers take,
    applied again while the result is not below `size`. Keys are those of key and round. If the key of a round 12 is
    odd, 0 and 1 are swapped."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
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
