"""What the bits of a clip tell and PyAV does not: where chroma lies, where a clip begins, which frames are spare."""

from __future__ import annotations

import re

from typing_extensions import Buffer

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

_SPS = {"h264": 7, "hevc": 33}  # types of NAL units: sequence parameter sets
_MOST_HEADER = 1 << 12  # bytes of parameter sets that are looked at
_VOP = b"\0\0\1\xb6"  # what a frame of MPEG-4 begins with; two bits of its type follow


def begins_anew(codec: str, packet: Buffer) -> bool:
    """Whether all frames from here on can surely be decoded: it is an IDR picture of H.264 or HEVC."""
    instant = {"h264": (5,), "hevc": (19, 20)}.get(codec, ())
    return any(_type_of(codec, unit) in instant for unit in _units(packet))


def is_no_key(codec: str, packet: Buffer) -> bool:
    """Whether decoding surely cannot begin here, whatever the container says: a frame of MPEG-4 made from others, which
    FFmpeg would decode into something, without an error."""
    data = bytes(memoryview(packet)[:_MOST_HEADER]) if codec == "mpeg4" else b""
    at = data.find(_VOP) + 4
    return 4 <= at < len(data) and data[at] >> 6 != 0


def is_hidden(codec: str, packet: Buffer, header: bytes | None = None, before: Buffer = b"") -> bool:
    """Whether it is a frame of VP8 that is not shown, RFC 6386, 9.1, or one of MPEG-4 that is not coded.

    header: of the stream, FFmpeg's extradata. before: the packet before it.
    """
    data = memoryview(packet)
    if codec == "mpeg4":
        try:
            # DivX packs two frames into one packet, and puts such a one in the place of the second.
            return _is_uncoded(bytes(data[:_MOST_HEADER]), header or b"") and bytes(before).count(_VOP) < 2
        except ValueError:
            return False
    return codec == "vp8" and len(data) > 0 and not data[0] >> 4 & 1


def _is_uncoded(data: bytes, header: bytes) -> bool:
    """By ISO/IEC 14496-2, 6.2.5: vop_coded is 0, and the frame before stays."""
    at = data.find(_VOP) + 4
    if at < 4:
        return False
    bits = _Bits(data[at:], escaped=False)
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
    bits = _Bits(data[found.end() :], escaped=False)
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


class SpareFrames:
    """Which packets of HEVC and AV1 can be left out without changing any other frame.

    In HEVC a picture of a type that is no reference may still be one for pictures of higher temporal layers. So it has
    to be of the highest, by the parameters that came before; FFmpeg's skip_frame does not look at that. In AV1 a frame
    that refreshes nothing leaves nothing behind. (In VP9 it leaves probabilities and motion behind.)
    """

    def __init__(self, codec: str, header: bytes | None) -> None:
        header = header or b""
        self._has = _SpareHevc(header).has if codec == "hevc" else _SpareAv1(header).has if codec == "av1" else None

    def has(self, packet: Buffer) -> bool:
        """To be asked of all packets, in their order."""
        return self._has is not None and self._has(packet)


class _SpareHevc:
    def __init__(self, header: bytes) -> None:
        self._sets = _parameters("hevc", header)
        self._highest = max((unit[2] >> 1 & 7 for unit in self._sets), default=None)

    def has(self, packet: Buffer) -> bool:
        pictures = []
        for unit in _units(packet):
            kind = _type_of("hevc", unit)
            if kind < 32:
                layer = (unit[1] & 7) - 1 if len(unit) > 1 else 0
                pictures.append(kind % 2 == 0 and kind < 16 and layer == self._highest)
            elif kind == _SPS["hevc"] and unit not in self._sets:
                self._highest = None  # other parameters than those that were told before
        return self._highest is not None and bool(pictures) and all(pictures)


class _SpareAv1:
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
                    self._sequence = _Sequence(_Bits(body, escaped=False))
                elif kind in _FRAMES:
                    header = _Bits(body[:64], escaped=False)
                    refreshed.append(255 if self._sequence is None else self._sequence.refreshed_by(header))
            except ValueError:
                refreshed.append(255)
        return bool(refreshed) and not any(refreshed)


_SEQUENCE, _FRAMES = 1, (3, 6)  # types of AV1's OBUs: sequence header; frame header, and frame


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
        found.append((begin >> 3, bytes(view[at : at + min(size, _MOST_HEADER)])))
        at += size
    return found


class _Sequence:
    """What reading a frame header takes of the sequence header, AV1's 5.5.1. Raises ValueError for kinds not read."""

    def __init__(self, bits: _Bits) -> None:
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

    def refreshed_by(self, bits: _Bits) -> int:
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


def chroma_siting(codec: str, header: bytes | None) -> int:
    """Where the chroma of 4:2:0 lies: the chroma_sample_loc_type of H.264 and HEVC, 0 to 5; 0 where nothing is told.

    header: what a container keeps of a stream for its decoder, FFmpeg's extradata. Of a picture in fields the place in
    the first one is meant.
    """
    header = header or b""
    if codec == "av1":  # 2: in the place of a pixel, as 2 of H.264
        return 2 if len(header) > 2 and header[0] == 0x81 and header[2] & 3 == 2 else 0
    try:
        return _siting_of(codec, _parameters(codec, header)) or 0
    except (IndexError, ValueError):  # the decoder will say what is wrong
        return 0


def siting_in(codec: str, packet: Buffer, header: bytes | None) -> int | None:
    """The same by the parameters in a packet of H.264 or HEVC; None where there are none, or the header has them."""
    try:
        if codec not in _SPS or _parameters(codec, header):
            return None
        return _siting_of(codec, [unit for unit in _units(packet) if _type_of(codec, unit) == _SPS[codec]])
    except (IndexError, ValueError):
        return None


def states_range(codec: str, header: bytes | None) -> bool:
    """Whether a stream tells the range of its samples. HEVC need not; FFmpeg's frames have the limited one then.

    header: as of `chroma_siting`; without parameters in it the answer is yes.
    """
    try:
        sets = _parameters(codec, header) if codec == "hevc" else []
        for unit in sets:
            bits = _Bits(unit)
            _to_vui_of_hevc(bits)
            if _has_signal(bits):
                return True
        return not sets
    except (IndexError, ValueError):
        return True


def may_be_fields(codec: str, header: bytes | None) -> bool:
    """Whether pictures of H.264 may be fields, by the parameters in the header; also where there are none."""
    try:
        sets = _parameters(codec, header) if codec == "h264" else []
        for unit in sets:
            bits = _Bits(unit)
            _to_fields_of_h264(bits)
            if not bits.take(1):
                return True
        return codec == "h264" and not sets
    except (IndexError, ValueError):
        return True


def may_change(codec: str, packet: Buffer, header: bytes | None) -> bool:
    """Whether a packet of H.264 or HEVC may bring other sequence parameters than the header; or is of no known form."""
    if codec not in _SPS:
        return False
    units, known = _units(packet), _parameters(codec, header)
    return not units or any(_type_of(codec, unit) == _SPS[codec] and unit not in known for unit in units)


def _siting_of(codec: str, sets: list[bytes]) -> int | None:
    """By the first of these parameter sets."""
    for unit in sets:
        bits = _Bits(unit)
        (_to_vui_of_h264 if codec == "h264" else _to_vui_of_hevc)(bits)
        found = _siting_in_vui(bits)
        return found if found <= 5 else 0
    return None


# -------------------------------------------------------------------------------------------------- the units


def _type_of(codec: str, unit: bytes) -> int:
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


def _units(packet: Buffer) -> list[bytes]:
    """The first bytes of NAL units that follow their lengths, parameter sets whole; none of another kind of packet."""
    data, at, found = memoryview(packet), 0, []
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append(bytes(data[at + 4 : at + 4 + min(size, _MOST_HEADER)]))
        at += 4 + size
    return found if at == len(data) and all(found) else []


def _parameters(codec: str, header: bytes | None) -> list[bytes]:
    """The sequence parameter sets in an avcC or hvcC."""
    header, found = header or b"", []
    if codec not in _SPS or header[:1] != b"\x01" or len(header) < 6:
        return []
    if codec == "h264":
        at, arrays = 5, 1
    else:
        at, arrays = 23, header[22] if len(header) > 22 else 0
    for _ in range(arrays):
        if codec == "hevc":
            at += 1
        count = header[at] & 31 if codec == "h264" else int.from_bytes(header[at : at + 2], "big")
        at += 1 if codec == "h264" else 2
        for _ in range(count):
            size = int.from_bytes(header[at : at + 2], "big")
            unit = header[at + 2 : at + 2 + min(size, _MOST_HEADER)]
            if len(unit) > 2 and _type_of(codec, unit) == _SPS[codec]:
                found.append(unit)
            at += 2 + size
            if at > len(header):
                return []
    return found


# ------------------------------------------------------------------------------------------- parameters, by bits


class _Bits:
    """A unit's bits, from the left. Raises ValueError beyond the end. escaped: with emulation prevention bytes."""

    def __init__(self, unit: bytes, escaped: bool = True) -> None:
        data = unit[:_MOST_HEADER].replace(b"\0\0\3", b"\0\0") if escaped else unit
        self._number, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("the parameters are cut off")
        return self._number >> self._left & ((1 << count) - 1)

    def golomb(self, count: int = 1) -> int:
        """The last of so many numbers in Golomb's code, ue(v). Those with a sign, se(v), are as long."""
        value = 0
        for _ in range(count):
            zeros = 0
            while not self.take(1):
                zeros += 1
            value = (1 << zeros) - 1 + self.take(zeros)
        return value


def _has_signal(bits: _Bits) -> bool | None:
    """Whether format, range and colours are what comes next; None where there is no VUI. Flags say what there is."""
    if not bits.take(1):
        return None
    if bits.take(1) and bits.take(8) == 255:  # shape of pixels
        bits.take(32)
    if bits.take(1):  # overscan
        bits.take(1)
    return bool(bits.take(1))


def _siting_in_vui(bits: _Bits) -> int:
    """The same in H.264 and HEVC, as far as it is read."""
    has_signal = _has_signal(bits)
    if has_signal is None:
        return 0
    if has_signal:
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    return bits.golomb() if bits.take(1) else 0


def _to_fields_of_h264(bits: _Bits) -> None:
    """ITU-T H.264, 7.3.2.1.1: to the flag that says that all pictures are frames."""
    bits.take(8)
    profile = bits.take(8)
    bits.take(16)
    bits.golomb()
    if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
        chroma = bits.golomb()
        if chroma == 3:
            bits.take(1)
        bits.golomb(2)
        bits.take(1)
        if bits.take(1):
            for k in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if k < 6 else 64)
    bits.golomb()
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.golomb(2)
        bits.golomb(bits.golomb())
    bits.golomb()
    bits.take(1)
    bits.golomb(2)


def _to_vui_of_h264(bits: _Bits) -> None:
    """ITU-T H.264, 7.3.2.1.1."""
    _to_fields_of_h264(bits)
    if not bits.take(1):  # fields
        bits.take(1)
    bits.take(1)
    if bits.take(1):  # cropping
        bits.golomb(4)


def _skip_scaling_list(bits: _Bits, count: int) -> None:
    scale = following = 8
    for _ in range(count):
        if following:
            number = bits.golomb()
            following = scale + (-(number // 2) if number % 2 == 0 else number // 2 + 1) & 255
        scale = following or scale


def _to_vui_of_hevc(bits: _Bits) -> None:
    """ITU-T H.265, 7.3.2.2.1."""
    bits.take(16 + 4)
    layers = bits.take(3)
    bits.take(1 + 96)
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    if layers:
        bits.take(2 * (8 - layers))
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()
    if bits.golomb() == 3:
        bits.take(1)
    bits.golomb(2)
    if bits.take(1):  # the part that is shown
        bits.golomb(4)
    bits.golomb(2)
    order_bits = 4 + bits.golomb()
    bits.golomb(3 * (1 + layers * bits.take(1)))
    bits.golomb(6)
    if bits.take(1) and bits.take(1):
        for size in range(4):
            for _ in range(2 if size == 3 else 6):
                if bits.take(1):
                    bits.golomb((size > 1) + min(64, 16 << 2 * size))
                else:
                    bits.golomb()
    bits.take(2)
    if bits.take(1):  # PCM
        bits.take(8)
        bits.golomb(2)
        bits.take(1)
    pictures = 0  # in the set before
    for k in range(bits.golomb()):
        if k > 0 and bits.take(1):
            bits.take(1)
            bits.golomb()
            pictures = sum(bool(bits.take(1) or bits.take(1)) for _ in range(pictures + 1))
        else:
            pictures = bits.golomb() + bits.golomb()
            for _ in range(pictures):
                bits.golomb()
                bits.take(1)
    if bits.take(1):
        for _ in range(bits.golomb()):
            bits.take(order_bits + 1)
    bits.take(2)
