"""MPEG-4, part 2: types of frames, and those that are not coded."""

from __future__ import annotations

import re

from typing_extensions import Buffer

from .bits import MOST_HEADER, Bits

__all__ = ["is_no_key", "is_uncoded"]

_VOP = b"\0\0\1\xb6"  # what a frame begins with; two bits of its type follow


def is_no_key(packet: Buffer) -> bool:
    """Whether its first frame is made from others."""
    data = bytes(memoryview(packet)[:MOST_HEADER])
    at = data.find(_VOP) + 4
    return 4 <= at < len(data) and data[at] >> 6 != 0


def is_uncoded(packet: Buffer, header: bytes, before: Buffer) -> bool:
    """Whether it is one that stands for the frame before; header and before as of `is_hidden` of `bitstream`."""
    try:
        # DivX packs two frames into one packet, and puts such a one in the place of the second.
        return _is_uncoded(bytes(memoryview(packet)[:MOST_HEADER]), header) and bytes(before).count(_VOP) < 2
    except ValueError:
        return False


def _is_uncoded(data: bytes, header: bytes) -> bool:
    """By ISO/IEC 14496-2, 6.2.5: vop_coded is 0, and the frame before stays."""
    at = data.find(_VOP) + 4
    if at < 4:
        return False
    bits = Bits(data[at:], escaped=False)
    bits.take(2)
    while bits.take(1):  # whole seconds
        pass
    bits.take(1 + _bits_of_time(data[:at] + header) + 1)
    return not bits.take(1)


def _bits_of_time(data: bytes) -> int:
    """How many bits a frame's time has, by the first description of a video object layer, 6.2.3."""
    found = re.search(b"\0\0\1[\x20-\x2f]", data)
    if found is None:
        raise ValueError("there is none")
    bits = Bits(data[found.end() :], escaped=False)
    bits.take(1 + 8)
    version = 1
    if bits.take(1):
        version = bits.take(4)
        bits.take(3)
    if bits.take(4) == 15:  # shape of pixels
        bits.take(16)
    if bits.take(1):  # chroma, delay
        bits.take(3)
        if bits.take(1):  # bit rate, buffer
            bits.take(79)
    if bits.take(2) == 3 and version != 1:  # shapes in grey
        bits.take(4)
    bits.take(1)
    return max(1, (bits.take(16) - 1).bit_length())
