"""The form of a clip's frames: shape of their pixels, place of chroma, orientation."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

from .bitstream import chroma_siting

__all__ = ["aspect_of", "orientation", "siting_of"]

_MOST_ASPECT = 16


def aspect_of(stream: Any) -> Fraction:
    """Width of a pixel by its height: the container's word, or else that of the frames, once one is decoded."""
    aspect = Fraction(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    if not Fraction(1, _MOST_ASPECT) <= aspect <= _MOST_ASPECT:
        raise ValueError(
            f"its pixels are {float(aspect):.4g} times as wide as high; expected 1/{_MOST_ASPECT} to {_MOST_ASPECT}"
        )
    return aspect


def siting_of(stream: Any) -> int:
    """Where chroma lies, by the stream's parameters."""
    context = stream.codec_context
    return chroma_siting(context.codec.canonical_name, context.extradata)


def orientation(frame: Any) -> int:
    """EXIF's number for the frame's display matrix.

    Column x, row y of the frame is shown at a x + c y, b x + d y.
    """
    from av.sidedata.sidedata import SideDataContainer

    # frame.side_data would be kept by the frame, which it keeps: megabytes that only the garbage collector gives back.
    data = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # of the stubs
    if data is None:
        return 1
    matrix = struct.unpack("=9i", bytes(data))
    parts = (*matrix[:2], *matrix[3:5])
    least = max(map(abs, parts)) / 100  # sines and cosines are rounded
    a, b, c, d = (int(v > least) - int(v < -least) for v in parts)
    if (a, b, c, d) not in _ORIENTATIONS:
        angle = -math.degrees(math.atan2(matrix[1], matrix[0]))
        by = ", ".join(f"{v / 65536:.3g}" for v in parts)
        raise ValueError(f"it is to be shown turned by {angle:.0f} degrees, by the matrix {by}; expected quarter turns")
    return _ORIENTATIONS[a, b, c, d]


_ORIENTATIONS = {
    (0, 0, 0, 0): 1,  # never filled in
    **{(1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4},
    **{(0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8},
}
