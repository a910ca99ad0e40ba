"""One picture's way from DALI's levels into the output, with the geometry and the arithmetic of csrc/."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _C
from ...decoding.arguments import Output

__all__ = ["Finish", "Placement"]


class Placement(NamedTuple):
    """One image's way into the output, from csrc/bindings.cpp: all as stored."""

    height: int
    width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int
    to_top: int
    to_left: int
    transposed: bool
    rows_reversed: bool
    cols_reversed: bool
    top: int
    left: int
    down_first: bool

    def is_resized(self) -> bool:
        return (self.height, self.width) != (self.resized_height, self.resized_width)

    def original(self) -> tuple[int, int]:
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    def corner(self) -> tuple[int, int]:
        return self.top, self.left


class Finish:
    """From levels to elements of the output, with the arithmetic of csrc/resample.cpp and csrc/pixels.cpp."""

    def __init__(self, output: Output, device: torch.device) -> None:
        self._in_bytes, self._interpolation, self._device = output.dtype == "uint8", output.interpolation, device
        numbers = torch.tensor([output.offset, output.scale, output.background], dtype=torch.float32, device=device)
        self._offset, self._scale, self._background = numbers.view(3, 3, 1, 1).unbind()
        self._filters: dict[tuple[int, ...], _Filter] = {}

    def store(self, levels: Tensor, where: Placement, out: Tensor) -> None:
        """levels: (h, w, 3), the whole image as stored. out: (3, H, W)."""
        if levels.shape != (where.height, where.width, 3):
            raise RuntimeError(f"DALI gave {tuple(levels.shape)}; expected {(where.height, where.width, 3)}")
        if where.is_resized():
            levels = self._resized(levels, where)
        else:
            top, left = where.crop_top, where.crop_left
            levels = levels[top : top + where.crop_height, left : left + where.crop_width]
        pixels = levels.permute(2, 0, 1)
        reversed_ = [axis for axis, turned in ((1, where.rows_reversed), (2, where.cols_reversed)) if turned]
        if reversed_:
            pixels = pixels.flip(reversed_)
        if where.transposed:
            pixels = pixels.transpose(1, 2)
        h, w = pixels.shape[1:]
        if (h, w) != out.shape[1:]:
            out.copy_(self._element(self._background))
        out[:, where.to_top : where.to_top + h, where.to_left : where.to_left + w] = self._element(pixels)

    def _resized(self, levels: Tensor, where: Placement) -> Tensor:
        """The crop of the resized image, (h, w, 3) float32."""
        across = self._filter(where.width, where.resized_width, where.crop_left, where.crop_width)
        down = self._filter(where.height, where.resized_height, where.crop_top, where.crop_height)
        part = levels[down.begin : down.end, across.begin : across.end].float()
        # Of a cubic filter in the order of csrc/, as what comes of the first pass is clamped; else down is cheaper.
        down_first = where.down_first or self._interpolation == "bilinear"
        for axis, way in ((0, down), (1, across)) if down_first else ((1, across), (0, down)):
            part = way.along(axis, part).clamp_(0, 255)
        return part

    def _filter(self, *axis: int) -> _Filter:
        """Kept: the images of a batch are often of one size."""
        if axis not in self._filters:
            first, weights = _C.resize_filter(self._interpolation, *axis)
            begin = int(first[0])
            end = int((first + weights.shape[1] - (weights[:, ::-1] != 0).argmax(1)).max())
            taps = (first[:, None] + np.arange(weights.shape[1])).clip(max=end - 1) - begin
            # As rows of one tap each.
            on_device = (torch.from_numpy(x.T.copy()).to(self._device) for x in (taps.astype(np.int64), weights))
            self._filters[axis] = _Filter(begin, end, *on_device)
        return self._filters[axis]

    def _element(self, levels: Tensor) -> Tensor:
        if levels.dtype == torch.float32:
            levels = levels.clamp(0, 255)  # colours of BT.709 may leave the range
        if self._in_bytes:
            return levels + 0.5 if levels.dtype == torch.float32 else levels  # cut off when stored
        return (levels - self._offset) * self._scale


class _Filter(NamedTuple):
    """Output i of an axis is the sum of weights[k, i] * input[begin + taps[k, i]]."""

    begin: int
    end: int
    taps: Tensor
    weights: Tensor

    def along(self, axis: int, pixels: Tensor) -> Tensor:
        shape = [-1 if dim == axis else 1 for dim in range(3)]
        # Not a matrix product: where TF32 is allowed, or within autocast, its numbers would be cut to 11 or 8 bits.
        result = pixels.index_select(axis, self.taps[0]).mul_(self.weights[0].view(shape))
        for taps, weights in zip(self.taps[1:], self.weights[1:], strict=True):
            result.addcmul_(pixels.index_select(axis, taps), weights.view(shape))
        return result
