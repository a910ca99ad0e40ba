"""Frames of clips on their way from FFmpeg into C++: of which samples they are, and what these mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..video import Clip, orientation
from .arguments import Output

if TYPE_CHECKING:
    from .. import _C

__all__ = ["check_frame", "colours_of", "store_frame"]

# Of what csrc/frame.hpp takes: bits, and the shifts of the chroma's width and height.
_FORMATS = {
    f"yuv{j}{name}p{end}": (depth, shifts)
    for name, shifts in (("420", (1, 1)), ("422", (1, 0)), ("444", (0, 0)), ("440", (0, 1)))
    for j, end, depth in (("", "", 8), ("j", "", 8), ("", "9le", 9), ("", "10le", 10), ("", "12le", 12))
}
_RGB = {f"gbrp{end}": depth for end, depth in (("", 8), ("9le", 9), ("10le", 10), ("12le", 12))}
_GREY = {f"gray{end}": depth for end, depth in (("", 8), ("9le", 9), ("10le", 10), ("12le", 12))}
# By ITU-T H.273's numbers, which are FFmpeg's. 2 and 3 tell nothing, and 0, which is RGB, nothing of YCbCr.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_UNTOLD = (0, 2, 3)
_LIMITED_RANGE, _FULL_RANGE = 1, 2
_STORED = ("yuv420p", "yuvj420p")  # what can be had as it is stored


def check_frame(frame: Any, clip: Clip, output: Output) -> None:
    name = frame.format.name
    if output.planes and (name not in _STORED or clip.siting):
        chroma = f", its chroma of type {clip.siting} of H.264's figure E-1" if clip.siting else ""
        raise ValueError(f"its pixels are {name}{chroma}; expected 8-bit 4:2:0 of type 0 for dtype='yuv420'")
    if output.resize is None and clip.aspect != 1:
        raise ValueError(f"its pixels are {float(clip.aspect):.4g} times as wide as high, and resize is None")


def colours_of(frame: Any, clip: Clip) -> tuple[str, bool]:
    """What the frame's samples mean: a name of `DecodedClips.matrix`, and whether they have the full range."""
    name, matrix, told = frame.format.name, int(frame.colorspace), clip.told[1] or int(frame.color_range)
    if matrix in _UNTOLD:
        matrix = clip.told[0]
    if name in _RGB:
        return "rgb", told != _LIMITED_RANGE
    if matrix not in _MATRICES and matrix not in _UNTOLD:
        raise ValueError(
            f"its colours have the matrix {matrix} of ITU-T H.273; expected {', '.join(map(str, _MATRICES))} or none"
        )
    return _MATRICES.get(matrix, "bt709" if frame.height >= 720 else "bt601"), told == _FULL_RANGE or "yuvj" in name


def store_frame(
    store: _C.FrameStore, frame: Any, clip: Clip, out: Tensor
) -> tuple[tuple[str, bool], tuple[int, int, int, int]]:
    """Writes a frame to (3, H, W), or stored planes. Matrix and range; original height and width, crop top and left."""
    planes, strides, depth, shifts = _samples_of(frame)
    matrix, full_range = colours_of(frame, clip)
    geometry = store.store(
        planes,
        strides,
        size=(frame.height, frame.width),
        depth=depth,
        shifts=shifts,
        full_range=full_range,
        matrix=matrix,
        siting=clip.siting if shifts == (1, 1) else 0,
        orientation=orientation(frame),
        shown=(frame.height, max(1, round(frame.width * clip.aspect))),
        out=out.data_ptr(),
        plane=out.stride(0) if out.dim() == 3 else 0,
    )
    return (matrix, full_range), geometry


def _samples_of(frame: Any) -> tuple[list[Any], list[int], int, tuple[int, int]]:
    """Three planes, their strides in bytes, the bits of a sample, and the shifts of the chroma's width and height."""
    name, planes, strides = frame.format.name, list(frame.planes), [plane.line_size for plane in frame.planes]
    if name in _FORMATS:
        return planes, strides, *_FORMATS[name]
    if name in _RGB:
        return planes, strides, _RGB[name], (0, 0)
    if name in _GREY:
        depth = _GREY[name]
        half = (frame.height + 1) // 2, (frame.width + 1) // 2
        neutral = np.full(half, 1 << (depth - 1), np.uint8 if depth == 8 else np.uint16)
        return [*planes, neutral, neutral], [*strides, *[neutral.strides[0]] * 2], depth, (1, 1)
    raise ValueError(f"its pixels are {name}; expected YCbCr, RGB or grey of 8, 9, 10 or 12 bits")
