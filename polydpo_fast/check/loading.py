"""The loader's batches: which pairs, in which order, on any number of ranks, after a resume, and around a bad pair.

The order is recomputed from its formula, in integers of Python and without `polydpo_fast.data.order`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .report import Finding, must

__all__ = ["loader", "place", "splitmix"]

_64 = 2**64


def loader(seed: int) -> Iterator[tuple[Finding, str]]:
    """Tiny pairs whose pixels say which they are: each once whatever the ranks, resumed, one of them damaged."""
    from ..data import PairLoader

    pairs = 24
    records = [{"win": _png(number, 0), "lose": _png(number, 1), "prompt": str(number)} for number in range(pairs)]
    how: Any = dict(seed=seed, size=2, resize=None, dtype=torch.uint8, readers=2, threads=1)
    one_rank: Any = dict(rank=0, world_size=1, **how)

    alone = _indices(PairLoader(records, 4, **one_rank))
    for ranks, size in ((1, 4), (2, 3), (4, 2)):
        loaders = [PairLoader(records, size, rank=rank, world_size=ranks, **how) for rank in range(ranks)]
        read = [batch for step in zip(*loaders, strict=True) for batch in step]
        order = _indices(read)
        right = order == alone and sorted(order) == list(range(pairs))
        note = "pixels or prompts of another pair or arm" if right else f"the order is {order}"
        yield must("each pair once", right and all(map(_shown, read)), note), f"{ranks} ranks of {size}"

    yield from _order(seed, records, alone, one_rank)
    yield _windowed(seed), "a window of 8 of 30 blocks"
    yield _labelled(one_rank), "jpg_0, jpg_1, label_0"

    first = PairLoader(records, 4, **one_rank)
    batches = iter(first)
    before = [next(batches), next(batches)]
    second = PairLoader(records, 6, **one_rank)
    second.load_state_dict(first.state_dict())
    order = _indices([*before, *second])
    same = order == alone[: len(order)] and len(order) >= pairs - 6
    yield must("resumed", same, order), "after 8 of 24 pairs"

    bad = list(records)
    bad[5] = {**bad[5], "lose": bad[5]["lose"][:40]}
    order = _indices(PairLoader(bad, 4, **one_rank))
    at = alone.index(5)
    right = [*order[:at], *order[at + 1 :]] == [*alone[:at], *alone[at + 1 :]] and order[at] != 5
    yield must("a bad pair", right, order), "pair 5 cut off"


def _indices(batches: Iterable[Any]) -> list[int]:
    return [index for batch in batches for index in batch.index.tolist()]


# --------------------------------------------------------------------------------------------------- order


def place(position: int, size: int, seed: int, epoch: int) -> int:
    """The pair at a position: a Feistel network of 12 rounds on the smallest even number of bits, at least two, that
    `size` numbers take, applied again while the result is not below `size`. Keys are splitmix64 of seed, epoch and
    round, chained. If the key of a round 12 is odd, 0 and 1 are swapped."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    key = _chained(_chained(0, seed), epoch)
    while True:
        left, right = divmod(position, 2**half)
        for number in range(12):
            left, right = right, left ^ splitmix(right + _chained(_chained(0, key), number)) % 2**half
        position = left * 2**half + right
        if position < size:
            return position ^ (_chained(_chained(0, key), 12) & 1) if position < 2 <= size else position


def _chained(state: int, number: int) -> int:
    return splitmix(state + number + 0x9E3779B97F4A7C15)


def splitmix(z: int) -> int:
    """Steele, Lea and Flood 2014, Fig. 16, of a number modulo 2^64."""
    z %= _64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _64
    return z ^ (z >> 31)


def _order(
    seed: int, records: list[dict[str, Any]], alone: list[int], one_rank: dict[str, Any]
) -> Iterator[tuple[Finding, str]]:
    """Against the formula: epochs, other seeds, no shuffle; and of many pairs, without loading them."""
    from ..data import PairLoader
    from ..data.order import order_of

    pairs = len(records)
    seen = {tuple(alone)}
    for epoch, of_seed in ((0, seed), (1, seed), (2, seed), (0, seed + 1)):
        own = PairLoader(records, 6, **{**one_rank, "seed": of_seed})
        own.set_epoch(epoch)
        order = _indices(own)
        right = order == [place(position, pairs, of_seed, epoch) for position in range(pairs)]
        seen.add(tuple(order))
        yield must("order", right, f"it is {order}"), f"epoch {epoch}, seed {of_seed}"
    yield must("order", len(seen) == 4, "epochs or seeds have the same order"), "epochs and seeds"
    order = _indices(PairLoader(records, 6, shuffle=False, **one_rank))
    yield must("order", order == list(range(pairs)), f"it is {order}"), "shuffle=False"
    for size in (1, 2, 5, 1000, 3_000_017):
        positions = np.unique(np.linspace(0, size - 1, 40).astype(np.int64))
        found = order_of(np.array([size]), None, None, seed=seed, epoch=7, window=None)(positions).tolist()
        right = found == [place(position, size, seed, 7) for position in positions.tolist()]
        yield must("order", right, f"it is {found}"), f"{size} pairs"


def _windowed(seed: int) -> Finding:
    """Every pair once, and those that are shuffled among each other are of few blocks."""
    from ..data.order import order_of

    lengths = [1 + number * 7 % 5 for number in range(30)]
    order = order_of(np.array(lengths), None, None, seed=seed, epoch=3, window=8)
    found = order(np.arange(sum(lengths)))
    right = sorted(found.tolist()) == list(range(sum(lengths)))
    block, begin = np.repeat(np.arange(30), lengths)[found], 0
    while right and begin < len(found):
        first, end = order.window(begin)
        right, begin = first == begin < end and len(np.unique(block[begin:end])) <= 8, end
    return must("order", right, f"it is {found.tolist()}")


def _labelled(one_rank: dict[str, Any]) -> Finding:
    """The label says which of two images is the winner."""
    from ..data import PairLoader

    labels = (1, 0, 0, 1)
    records = [
        {"jpg_0": _png(number, 1 - label), "jpg_1": _png(number, label), "label_0": label, "caption": str(number)}
        for number, label in enumerate(labels)
    ]
    (batch,) = PairLoader(records, len(labels), **one_rank)
    return must("each pair once", _shown(batch), "of other arms")


# --------------------------------------------------------------------------------------------------- pairs


def _png(number: int, arm: int) -> bytes:
    """2 x 2 pixels of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + bytes([number, arm, 0]) * 2
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")


def _shown(batch: Any) -> bool:
    """Whether the rows show their pairs, winners before losers, beside their prompts."""
    numbers = batch.index.tolist()
    arms = [0] * len(numbers) + [1] * len(numbers)
    pixels = batch.pixels[:, :2, 0, 0].tolist()
    right: bool = pixels == [list(x) for x in zip(numbers * 2, arms, strict=True)]
    return right and batch.prompts == [str(number) for number in numbers]
