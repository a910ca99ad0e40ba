"""AV1: its OBUs, and what the headers of sequences and frames tell."""

from __future__ import annotations

from typing_extensions import Buffer

from .bits import MOST_HEADER, Bits

__all__ = ["SpareFrames", "siting_of"]

_SEQUENCE, _FRAMES = 1, (3, 6)  # types of AV1's OBUs: sequence header; frame header, and frame


def siting_of(header: bytes) -> int:
    """As `chroma_siting` of `bitstream`."""
    # 2: in the place of a pixel, as 2 of H.264.
    return 2 if len(header) > 2 and header[0] == 0x81 and header[2] & 3 == 2 else 0


class SpareFrames:
    """Which packets of AV1 can be left out without changing any other frame: a frame that refreshes nothing leaves
    nothing behind."""

    def __init__(self, header: bytes) -> None:
        self._sequence: _Sequence | None = None
        if header[:1] == b"\x81":
            self.has(header[4:])

    def has(self, packet: Buffer) -> bool:
        refreshed = []
        for kind, body in _obus(packet):
            try:
                if kind == _SEQUENCE:
                    self._sequence = None
                    self._sequence = _Sequence(Bits(body, escaped=False))
                elif kind in _FRAMES:
                    header = Bits(body[:64], escaped=False)
                    refreshed.append(255 if self._sequence is None else self._sequence.refreshed_by(header))
            except ValueError:
                refreshed.append(255)
        return bool(refreshed) and not any(refreshed)


def _obus(data: Buffer) -> list[tuple[int, bytes]]:
    """Types and first bytes of AV1's OBUs; none if they do not fill the data."""
    view, at, found = memoryview(data), 0, []
    while at < len(view):
        begin, extended, sized = view[at], view[at] >> 2 & 1, view[at] >> 1 & 1
        at += 1 + extended
        size, shift = 0, 0
        while sized:
            if at >= len(view) or shift > 49:
                return []
            size |= (view[at] & 127) << shift
            shift, sized, at = shift + 7, view[at] >> 7, at + 1
        if not begin >> 1 & 1:  # it ends with the data
            size = len(view) - at
        if begin & 0x81 or size < 0 or at + size > len(view):
            return []
        found.append((begin >> 3, bytes(view[at : at + min(size, MOST_HEADER)])))
        at += size
    return found


class _Sequence:
    """What reading a frame header takes of the sequence header, AV1's 5.5.1. Raises ValueError for kinds not read."""

    def __init__(self, bits: Bits) -> None:
        bits.take(4)
        if bits.take(1) or bits.take(1):
            raise ValueError("reduced headers, or timing")
        delays = bits.take(1)
        for _ in range(bits.take(5) + 1):
            if bits.take(12):
                raise ValueError("layers")
            if bits.take(5) > 7:
                bits.take(1)
            if delays and bits.take(1):
                bits.take(4)
        width, height = bits.take(4), bits.take(4)
        bits.take(width + 1 + height + 1)
        if bits.take(1):
            raise ValueError("numbers of frames")
        bits.take(7)
        has_order = bits.take(1)
        bits.take(2 * has_order)
        self._screen = 2 if bits.take(1) else bits.take(1)
        self._whole_motion = 2
        if self._screen and not bits.take(1):
            self._whole_motion = bits.take(1)
        self._order = 1 + bits.take(3) if has_order else 0

    def refreshed_by(self, bits: Bits) -> int:
        """A bit for each of the eight references that a frame replaces, by its header, 5.9.2."""
        if bits.take(1):  # one that is kept is shown: of a keyframe all are replaced
            return 255
        kind, is_shown = bits.take(2), bits.take(1)
        if not is_shown:
            bits.take(1)
        if kind == 3 or (kind == 0 and is_shown):
            return 255
        alone = bits.take(1)
        bits.take(1)
        screen = bits.take(1) if self._screen == 2 else self._screen
        if screen and self._whole_motion == 2:
            bits.take(1)
        bits.take(1 + self._order)
        if not (kind in (0, 2) or alone):
            bits.take(3)
        return bits.take(8)
