"""What the bits of a clip tell and PyAV does not: where chroma lies, where a clip begins, which frames are spare.

Here it is asked by codec; `h26x`, `av1` and `mpeg4` know their own.
"""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import Buffer

from . import av1, h26x, mpeg4
from .h26x import begins_anew, may_be_fields, may_change, siting_in, states_range

__all__ = [
    "SpareFrames",
    "begins_anew",
    "chroma_siting",
    "is_hidden",
    "is_no_key",
    "may_be_fields",
    "may_change",
    "siting_in",
    "states_range",
]


def is_no_key(codec: str, packet: Buffer) -> bool:
    """Whether decoding surely cannot begin here, whatever the container says: a frame of MPEG-4 made from others, which
    FFmpeg would decode into something, without an error."""
    return codec == "mpeg4" and mpeg4.is_no_key(packet)


def is_hidden(codec: str, packet: Buffer, header: bytes | None = None, before: Buffer = b"") -> bool:
    """Whether it is a frame of VP8 that is not shown, RFC 6386, 9.1, or one of MPEG-4 that is not coded.

    header: of the stream, FFmpeg's extradata. before: the packet before it.
    """
    if codec == "mpeg4":
        return mpeg4.is_uncoded(packet, header or b"", before)
    data = memoryview(packet)
    return codec == "vp8" and len(data) > 0 and not data[0] >> 4 & 1


class SpareFrames:
    """Which packets of HEVC and AV1 can be left out without changing any other frame.

    (In VP9 a frame that refreshes nothing leaves probabilities and motion behind.)
    """

    def __init__(self, codec: str, header: bytes | None) -> None:
        self._has: Callable[[Buffer], bool] | None = None
        if codec == "hevc":
            self._has = h26x.SparePictures(header or b"").has
        elif codec == "av1":
            self._has = av1.SpareFrames(header or b"").has

    def has(self, packet: Buffer) -> bool:
        """To be asked of all packets, in their order."""
        return self._has is not None and self._has(packet)


def chroma_siting(codec: str, header: bytes | None) -> int:
    """Where the chroma of 4:2:0 lies: the chroma_sample_loc_type of H.264 and HEVC, 0 to 5; 0 where nothing is told.

    header: what a container keeps of a stream for its decoder, FFmpeg's extradata. Of a picture in fields the place in
    the first one is meant.
    """
    return av1.siting_of(header or b"") if codec == "av1" else h26x.siting_of(codec, header or b"")
