"""The canary: a pair that was decoded by DALI and by C++ must look alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...decoding.arguments import Output

__all__ = ["CanaryError", "compare", "to_709"]

_LEVELS = 8.0
_TILE = 16  # pixels, of a side; as wide as the blocks of 4:2:0


class CanaryError(RuntimeError):
    """DALI's pixels are not those of the C++ decoder: a pair that was decoded by both differs by more than it may."""


def compare(
    pair: int,
    mine: Tensor,
    known: Tensor,
    output: Output,
    bt709: Sequence[bool] = (False, False),
    tile: int = _TILE,
) -> None:
    """(2, 3, H, W) of both. bt709: whether an arm came by way of BT.601, where its colours were clipped."""
    levels = torch.stack((mine.cpu(), known)).float()
    if output.dtype != "uint8":
        offset, scale = torch.tensor([output.offset, output.scale], device="cpu").view(2, 3, 1, 1)
        levels = levels / scale + offset
    for arm, clipped in enumerate(bt709):
        if clipped:
            back = torch.tensor(np.linalg.inv(to_709()), dtype=torch.float32, device="cpu")
            levels[:, arm] = torch.einsum("ij,njhw->nihw", back, levels[:, arm]).clamp(0, 255)
    apart = levels[0] - levels[1]
    tiles = max(1, apart.shape[2] // tile), max(1, apart.shape[3] // tile)
    # In a tile, what is dithered or shifted by less than a pixel evens out; what is wrong does not.
    means = torch.nn.functional.adaptive_avg_pool2d(apart, tiles)
    worst = means.abs().nan_to_num(math.inf).amax(dim=(1, 2, 3))
    if float(worst.max()) > _LEVELS:
        side = "win" if worst[0] >= worst[1] else "lose"
        raise CanaryError(
            f"{side}[{pair}] is decoded by DALI into other pixels than by C++: the mean of a tile of {tile} x {tile} "
            f"differs by {float(worst.max()):.1f} levels of 255; expected at most {_LEVELS:g}. "
            "DALI's pixels cannot be relied upon here: use decoder='cpp', or hardware_load=0"
        )


def to_709() -> np.ndarray:
    """RGB in BT.709 of RGB that was taken for BT.601."""
    return _rgb_of_ycc(0.2126, 0.0722) @ np.linalg.inv(_rgb_of_ycc(0.299, 0.114))


def _rgb_of_ycc(red: float, blue: float) -> np.ndarray:
    """From Y, Cb, Cr of the same range to R, G, B, given the weights of red and blue in Y."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 - 2 * red],
            [1, -(2 - 2 * blue) * blue / green, -(2 - 2 * red) * red / green],
            [1, 2 - 2 * blue, 0],
        ]
    )
