"""H.264 and HEVC: NAL units, the sequence parameter sets among them, and what these tell."""

from __future__ import annotations

from typing_extensions import Buffer

from .bits import MOST_HEADER, Bits

__all__ = ["SparePictures", "begins_anew", "may_be_fields", "may_change", "siting_in", "siting_of", "states_range"]

_SPS = {"h264": 7, "hevc": 33}  # types of NAL units: sequence parameter sets


def begins_anew(codec: str, packet: Buffer) -> bool:
    """Whether all frames from here on can surely be decoded: it is an IDR picture of H.264 or HEVC."""
    instant = {"h264": (5,), "hevc": (19, 20)}.get(codec, ())
    return any(_type_of(codec, unit) in instant for unit in _units(packet))


def siting_of(codec: str, header: bytes) -> int:
    """Where chroma lies by the parameters in the header, as `chroma_siting` of `bitstream` has it."""
    try:
        return _siting_by(codec, _parameters(codec, header)) or 0
    except (IndexError, ValueError):  # the decoder will say what is wrong
        return 0


def siting_in(codec: str, packet: Buffer, header: bytes | None) -> int | None:
    """As `siting_of`, by the parameters in a packet; None where there are none, or the header has them."""
    try:
        if codec not in _SPS or _parameters(codec, header):
            return None
        return _siting_by(codec, [unit for unit in _units(packet) if _type_of(codec, unit) == _SPS[codec]])
    except (IndexError, ValueError):
        return None


def states_range(codec: str, header: bytes | None) -> bool:
    """Whether a stream tells the range of its samples. HEVC need not; FFmpeg's frames have the limited one then.

    header: as of `chroma_siting`; without parameters in it the answer is yes.
    """
    try:
        sets = _parameters(codec, header) if codec == "hevc" else []
        for unit in sets:
            bits = Bits(unit)
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
            bits = Bits(unit)
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


def _siting_by(codec: str, sets: list[bytes]) -> int | None:
    """By the first of these parameter sets."""
    for unit in sets:
        bits = Bits(unit)
        (_to_vui_of_h264 if codec == "h264" else _to_vui_of_hevc)(bits)
        found = _siting_in_vui(bits)
        return found if found <= 5 else 0
    return None


class SparePictures:
    """Which packets of HEVC can be left out without changing any other frame.

    A picture of a type that is no reference may still be one for pictures of higher temporal layers. So it has to be of
    the highest, by the parameters that came before; FFmpeg's skip_frame does not look at that.
    """

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


# -------------------------------------------------------------------------------------------------- the units


def _type_of(codec: str, unit: bytes) -> int:
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


def _units(packet: Buffer) -> list[bytes]:
    """The first bytes of NAL units that follow their lengths, parameter sets whole; none of another kind of packet."""
    data, at, found = memoryview(packet), 0, []
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append(bytes(data[at + 4 : at + 4 + min(size, MOST_HEADER)]))
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
            unit = header[at + 2 : at + 2 + min(size, MOST_HEADER)]
            if len(unit) > 2 and _type_of(codec, unit) == _SPS[codec]:
                found.append(unit)
            at += 2 + size
            if at > len(header):
                return []
    return found


# ------------------------------------------------------------------------------------------- parameters, by bits


def _has_signal(bits: Bits) -> bool | None:
    """Whether format, range and colours are what comes next; None where there is no VUI. Flags say what there is."""
    if not bits.take(1):
        return None
    if bits.take(1) and bits.take(8) == 255:  # shape of pixels
        bits.take(32)
    if bits.take(1):  # overscan
        bits.take(1)
    return bool(bits.take(1))


def _siting_in_vui(bits: Bits) -> int:
    """The same in H.264 and HEVC, as far as it is read."""
    has_signal = _has_signal(bits)
    if has_signal is None:
        return 0
    if has_signal:
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    return bits.golomb() if bits.take(1) else 0


def _to_fields_of_h264(bits: Bits) -> None:
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


def _to_vui_of_h264(bits: Bits) -> None:
    """ITU-T H.264, 7.3.2.1.1."""
    _to_fields_of_h264(bits)
    if not bits.take(1):  # fields
        bits.take(1)
    bits.take(1)
    if bits.take(1):  # cropping
        bits.golomb(4)


def _skip_scaling_list(bits: Bits, count: int) -> None:
    scale = following = 8
    for _ in range(count):
        if following:
            number = bits.golomb()
            following = scale + (-(number // 2) if number % 2 == 0 else number // 2 + 1) & 255
        scale = following or scale


def _to_vui_of_hevc(bits: Bits) -> None:
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
