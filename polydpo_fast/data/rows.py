"""The rows of a batch that a decoder fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rows"]

_NO_COLOURS = "bt709", False  # as `decode_clips` has it where a clip fails


@dataclass
class Rows:
    """What a batch is decoded to: 2B images or clips, and of the B pairs whether they are mirrored."""

    pixels: Tensor
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor
    colours: list[tuple[str, bool]]  # of clips: matrix and full_range

    @classmethod
    def of(cls, result: Any) -> Rows:
        """result: of `decode_pairs` or `decode_clips`."""
        colours = zip(getattr(result, "matrix", ()), getattr(result, "full_range", ()), strict=True)
        return cls(result.pixels, result.original_size, result.crop_top_left, result.flipped, list(colours))

    @classmethod
    def empty(cls, pixels: Tensor, clips: bool) -> Rows:
        """Without any pair, around pixels that are zeros."""
        count = len(pixels)
        size, corner = (torch.zeros((count, 2), dtype=torch.int64) for _ in range(2))
        flipped = torch.zeros(count // 2, dtype=torch.bool)
        return cls(pixels, size, corner, flipped, [_NO_COLOURS] * count if clips else [])

    def put(self, pairs: list[int], result: Any) -> None:
        """Decoded pairs in the places of those."""
        new, both = Rows.of(result), self._both(pairs)
        places = torch.tensor(both)
        self.pixels[places.to(self.pixels.device)] = new.pixels
        self.original_size[places], self.crop_top_left[places] = new.original_size, new.crop_top_left
        self.flipped[torch.tensor(pairs)] = new.flipped
        for place, colours in zip(both, new.colours, strict=False):  # images have none
            self.colours[place] = colours

    def clear(self, pair: int) -> None:
        """No pair in that place."""
        both = self._both([pair])
        self.pixels[both], self.original_size[both], self.crop_top_left[both], self.flipped[pair] = 0, 0, 0, False
        for row in both if self.colours else ():
            self.colours[row] = _NO_COLOURS

    def _both(self, pairs: list[int]) -> list[int]:
        """The rows of winners, then those of losers."""
        return pairs + [pair + len(self.flipped) for pair in pairs]
