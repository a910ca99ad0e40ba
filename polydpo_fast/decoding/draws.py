"""What is drawn for a pair from its seed: its crop, its mirror, and where its start falls."""

from __future__ import annotations

from typing import NamedTuple

from ..splitmix import GOLDEN, splitmix64

__all__ = ["Draw", "draw_of", "start_of"]


class Draw(NamedTuple):
    """What is drawn for a pair. centre: whether that is its crop; else top and left, uniform in 32 bits, choose one."""

    centre: bool
    top: int
    left: int
    flipped: bool


def draw_of(seed: int | None, crop: str, hflip: float) -> Draw:
    """seed: None where nothing is left to chance."""
    if seed is None:
        return Draw(True, 0, 0, bool(hflip == 1))
    top, left, mirror = (_number(seed, step) for step in (1, 2, 3))
    return Draw(crop == "center", top >> 32, left >> 32, _share(mirror) < hflip)


def start_of(seed: int | None) -> float:
    """From 0 to less than 1."""
    return 0.0 if seed is None else _share(_number(seed, 4))


def _number(seed: int, step: int) -> int:
    """Each of 64 bits, of a sequence of its own."""
    return splitmix64(seed + step * GOLDEN)


def _share(number: int) -> float:
    return (number >> 11) * 2.0**-53
