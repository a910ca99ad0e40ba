"""The order of the pairs: a permutation by formula, so that any part of it is there at once, on any rank.

Nothing is stored per pair and nothing is drawn one after the other: what stands at a position depends on the seed,
the epoch and the position alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Protocol

import numpy as np

from ..splitmix import mix, splitmix64_of_array

__all__ = ["Balanced", "Order", "Shuffled", "order_of", "permute"]

# Of the Feistel network. Four make a strong permutation of a large domain; of 3 to 64 numbers it takes 10 to 12 until
# 200,000 keys show no bias.
_ROUNDS = 12


class Order(Protocol):
    """One epoch: as many positions as there are pairs."""

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The pair at each position, int64; positions from 0 to one less than the number of pairs."""
        ...

    def laps(self, positions: np.ndarray) -> np.ndarray:
        """How many times the pair at each position comes before, int64, in this epoch and all earlier ones; those of
        one epoch are counted in an order of their own."""
        ...

    def window(self, position: int) -> tuple[int, int]:
        """The positions, from the first to before the last, whose pairs are shuffled among each other with that one's,
        so that their blocks are in memory together; a block's where nothing is shuffled."""
        ...


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """The key's permutation of 0 to size - 1 at `values`, int64.

    A Feistel network (Luby and Rackoff 1988) on the next power of four, walked until it comes back into the range
    (Black and Rogaway 2002): at most four steps on average. On four bits or more the network makes even permutations
    alone, which would show in small domains, so 0 and 1 are swapped for half of the keys.
    """
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key, number)) for number in range(_ROUNDS)]
    result = values.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for number in keys:
            left, right = right, left ^ (splitmix64_of_array(right + number) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= np.uint64(size)
    if size > 1:
        result[result < 2] ^= np.uint64(mix(key, _ROUNDS) & 1)
    return result.astype(np.int64)


class Shuffled:
    """Every pair once.

    blocks: (blocks,) lengths of successive runs of pairs. With a window of k, the blocks are shuffled, and pairs only
    among the k blocks that come together, so that k blocks in memory are enough to read each once. None shuffles
    all pairs among each other, 0 leaves them as they are. lap: of all pairs, the number of the epoch.
    """

    def __init__(self, blocks: np.ndarray, key: int, window: int | None, lap: int = 0) -> None:
        self._key, self._window, self._lap = key, window, lap
        self._size = int(blocks.sum())
        self._group_ends = np.cumsum(blocks) if window == 0 else np.array([self._size])
        if window:
            self._order = permute(np.arange(len(blocks)), len(blocks), mix(key, 1))
            self._begins = (np.cumsum(blocks) - blocks)[self._order]
            self._ends = np.cumsum(blocks[self._order])  # in the order of the epoch
            self._group_ends = self._ends[
                np.minimum(np.arange(window - 1, len(blocks) + window - 1, window), len(blocks) - 1)
            ]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        if self._window == 0:
            return positions.astype(np.int64)
        if self._window is None:
            return permute(positions, self._size, self._key)
        groups = np.searchsorted(self._group_ends, positions, side="right")
        shuffled = np.empty(len(positions), dtype=np.int64)
        for group in np.unique(groups).tolist():
            here = groups == group
            begin = int(self._group_ends[group - 1]) if group else 0
            size = int(self._group_ends[group]) - begin
            shuffled[here] = begin + permute(positions[here] - begin, size, mix(self._key, 2, group))
        block = np.searchsorted(self._ends, shuffled, side="right")
        before = np.where(block > 0, self._ends[block - 1], 0)
        result: np.ndarray = self._begins[block] + shuffled - before
        return result

    def laps(self, positions: np.ndarray) -> np.ndarray:
        return np.full(len(positions), self._lap, dtype=np.int64)

    def window(self, position: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._group_ends, position, side="right"))
        return int(self._group_ends[group - 1]) if group else 0, int(self._group_ends[group])


class Balanced:
    """Categories in given shares, each pair of a category as often as the others of it, give or take one.

    An epoch has as many positions as there are pairs. Each category has its share of them, to the nearest number; it
    goes through its pairs in an order of its own, and goes on in the next epoch where it stopped in the last.
    """

    def __init__(self, codes: np.ndarray, shares: Sequence[float], seed: int, epoch: int) -> None:
        self._size = len(codes)
        self._key, self._seed, self._epoch = mix(seed, epoch, 3), seed, epoch
        # The pairs of each category after those of the one before: 4 bytes per pair below 4 billion pairs.
        kind = np.uint32 if self._size < 2**32 else np.int64
        self._members = np.argsort(codes, kind="stable").astype(kind)
        self._counts = np.bincount(codes, minlength=len(shares)).astype(np.int64)
        self._begins = np.cumsum(self._counts) - self._counts
        self._quotas = _apportioned(np.where(self._counts > 0, np.asarray(shares, dtype=np.float64), 0.0), self._size)
        self._quota_ends = np.cumsum(self._quotas)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        category, laps, turns = self._turns(positions)
        result = np.empty(len(positions), dtype=np.int64)
        for code in np.unique(category).tolist():
            here, count = category == code, int(self._counts[code])
            for lap in np.unique(laps[here]).tolist():
                now = here & (laps == lap)
                member = permute(turns[now], count, mix(self._seed, 4, code, lap))
                result[now] = self._members[self._begins[code] + member]
        return result

    def laps(self, positions: np.ndarray) -> np.ndarray:
        return self._turns(positions)[1]

    def _turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each position the category, how often all pairs of it have come before, and the turn among them since."""
        slots = permute(positions, self._size, self._key)
        category = np.searchsorted(self._quota_ends, slots, side="right")
        quota, count = self._quotas[category], self._counts[category]
        laps, turns = np.divmod(self._epoch * quota + slots - (self._quota_ends[category] - quota), count)
        return category, laps, turns

    def window(self, position: int) -> tuple[int, int]:
        return 0, self._size


def order_of(
    blocks: np.ndarray,
    categories: tuple[tuple[str, ...], np.ndarray] | None,
    shares: Mapping[str, float] | str | None,
    *,
    seed: int,
    epoch: int,
    window: int | None,
) -> Order:
    """The order of one epoch. shares: of the categories; "balanced" for equal ones, None for pairs as they are."""
    if shares is None or categories is None:
        return Shuffled(blocks, mix(seed, epoch), window, epoch)
    names, codes = categories
    if tuple(names) == ("",):
        raise ValueError(f"categories is {shares!r}; expected None, because the source has no categories")
    if shares == "balanced":
        return Balanced(codes, [1.0] * len(names), seed, epoch)
    if not isinstance(shares, Mapping):
        raise ValueError(f"categories is {shares!r}; expected 'balanced', or a share for each category")
    if wrong := sorted(map(repr, set(shares) ^ set(names))):
        raise ValueError(
            f"categories is a mapping of {len(shares)} shares; expected one for each of the source's {len(names)} "
            f"categories. Those that only one of them has: {', '.join(wrong[:20])}"
        )
    if not all(_is_share(share) for share in shares.values()):
        raise ValueError(f"categories is {str(dict(shares))[:999]}; expected shares >= 0")
    if not 0 < sum(shares.values()) < np.inf:
        raise ValueError(f"categories has shares that add up to {sum(shares.values())}; expected more than 0")
    return Balanced(codes, [shares[name] for name in names], seed, epoch)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and float(value) >= 0


def _apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the ratio of the shares that add up to the total: the largest remainders are rounded up."""
    if not shares.sum() > 0:
        raise ValueError("no category with a share above 0 has a pair")
    exact = shares / shares.sum() * total
    result: np.ndarray = np.floor(exact).astype(np.int64)
    most = np.argsort(result - exact, kind="stable")[: total - int(result.sum())]
    result[most] += 1
    return result
