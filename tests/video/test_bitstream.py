"""What is read of the bits of H.264, HEVC and AV1, against what encoders were told to write."""

import io
import struct

import numpy as np
import pytest
from clip_oracle import av, encode, without_range

from polydpo_fast.video.bitstream import (
    SpareFrames,
    begins_anew,
    chroma_siting,
    is_hidden,
    is_no_key,
    may_be_fields,
    may_change,
    states_range,
)


def header_of(data):
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        return context.codec.canonical_name, context.extradata


X264 = [
    "",
    "sar=4/3:fullrange=on:colorprim=bt2020:cqm=jvt",
    "interlaced=1:overscan=show",
    "nal-hrd=vbr:vbv-maxrate=500:vbv-bufsize=500",
]
X265 = [
    "",
    "sar=1:range=full:scaling-list=default",
    "temporal-layers=3:bframes=4",
    "keyint=30:ref=5:bframes=8:hrd=1:vbv-maxrate=500:vbv-bufsize=500",
    "colorprim=bt2020:overscan=show:lossless=1",
]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("siting", range(6))
@pytest.mark.parametrize(
    ("codec", "options"), [*[("libx264", options) for options in X264], *[("libx265", options) for options in X265]]
)
def test_where_chroma_lies(codec, options, siting, container):
    for pixels in ("yuv420p", "yuv420p10le"):
        if "interlaced" in options and codec == "libx265":
            continue
        given = f"chromaloc={siting}:{options}:log-level=none"
        data = encode(
            9, codec=codec, container=container, pixels=pixels, **{codec.replace("lib", "") + "-params": given}
        )
        assert chroma_siting(*header_of(data)) == siting


class Writer:
    """Bits, by the syntax tables of the standards: u(n), ue(v) and se(v)."""

    def __init__(self):
        self.bits = ""

    def u(self, count, value=0):
        self.bits += f"{int(value):0{int(count)}b}" if count else ""
        return self

    def ue(self, *values):
        for value in values:
            code = f"{value + 1:b}"
            self.bits += "0" * (len(code) - 1) + code
        return self

    def se(self, *values):
        return self.ue(*(2 * value - 1 if value > 0 else -2 * value for value in values))

    def data(self):
        bits = self.bits + "1"
        return int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")

    def unit(self, header):
        """With the bytes that keep three zeros apart."""
        out, zeros = bytearray(header), 0
        for byte in self.data():
            if zeros == 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return bytes(out)

    def vui(self, siting, signal=True):
        """ITU-T H.264, E.1.1, and H.265, E.2.1: the shape of pixels, overscan, the range, and where chroma lies."""
        self.u(1, 1).u(8, 255).u(16, 4).u(16, 3).u(1, 1).u(1, 1).u(1, signal)
        if signal:
            self.u(3, 5).u(1, 1).u(1, 1).u(24, 0x010101)
        return self.u(1, 1).ue(siting, siting).u(8)


def avcc(siting, profile=100, chroma=1, lists=(), order=(0, 4), fields=False, crop=False):
    """lists: of scaling, by number, each a list of its deltas. order: pic_order_cnt_type and what comes behind it."""
    w = Writer().u(8, profile).u(8).u(8, 30).ue(0)
    if profile == 100:
        w.ue(chroma).u(chroma == 3, 1).ue(2, 2).u(1).u(1, bool(lists))
        for number in range(12 if chroma == 3 else 8) if lists else ():
            w.u(1, number in lists).se(*lists.get(number, ()))
    w.ue(5, order[0])
    if order[0] == 0:
        w.ue(order[1])
    elif order[0] == 1:
        w.u(1).se(*order[1:3]).ue(len(order[3:])).se(*order[3:])
    w.ue(4).u(1).ue(3, 2).u(1, not fields).u(fields, 1).u(1, 1).u(1, crop)
    if crop:
        w.ue(0, 1, 0, 3)
    sps = w.u(1, 1).vui(siting).unit(b"\x67")
    return b"\1" + sps[1:4] + b"\xff\xe1" + struct.pack(">H", len(sps)) + sps + b"\0"


@pytest.mark.parametrize("siting", [0, 3, 5])
@pytest.mark.parametrize(
    "told",
    [
        dict(),
        dict(profile=66),
        dict(profile=66, order=(1, -3, 2)),
        dict(order=(1, 0, -1, 4, -4, 7)),
        dict(order=(2,), fields=True, crop=True),
        dict(chroma=3),
        dict(chroma=3, lists={0: [1] * 16, 5: [-8], 6: [-1, 1] * 32, 11: [3, -11]}, order=(0, 11)),
        dict(lists={1: [0, 0, -8], 7: [2] * 64}, fields=True),
    ],
    ids=lambda told: "-".join(told) or "usual",
)
def test_parameters_of_h264_by_its_table(told, siting):
    """What x264 never writes: ITU-T H.264, 7.3.2.1.1. A list of scaling ends where its next scale is 0."""
    assert chroma_siting("h264", avcc(siting, **told)) == siting


def hevc_sps(siting, layers=(), chroma=1, bits=8, each=False, lists=None, pcm=False, sets=(), far=(), signal=True):
    """layers: (profile, level) present of each sub-layer. lists: (size, matrix) to deltas, or None where predicted.
    sets: short-term, (negative, positive), or flags by one that is predicted: used, or used and use_delta.
    bits: of an order. far: long-term references' orders."""
    w = Writer().u(4).u(3, len(layers)).u(1, 1).u(88, (1 << 80) + 5).u(8, 93)
    for profile, level in layers:
        w.u(1, profile).u(1, level)
    w.u(2 * (8 - len(layers)) if layers else 0)
    for profile, level in layers:
        w.u(88 * profile, 7 * profile).u(8 * level, 90 * level)
    w.ue(0, chroma).u(chroma == 3).ue(64, 48).u(1, 1).ue(0, 1, 0, 2).ue(0, 0, bits - 4).u(1, each)
    for _ in range(1 + len(layers) if each else 1):
        w.ue(4, 2, 0)
    w.ue(0, 3, 0, 3, 1, 2).u(1, lists is not None)
    if lists is not None:
        w.u(1, 1)
        for size in range(4):
            for matrix in range(2 if size == 3 else 6):
                deltas = lists.get((size, matrix))
                w.u(1, deltas is not None)
                w.ue(matrix and 1) if deltas is None else w.se(*deltas)
    w.u(1, 1).u(1, 1).u(1, pcm)
    if pcm:
        w.u(4, 7).u(4, 7).ue(0, 2).u(1, 1)
    w.ue(len(sets))
    for number, one in enumerate(sets):
        if number:
            w.u(1, isinstance(one, str))
        if isinstance(one, str):
            w.u(1, 1).ue(0)
            w.bits += one
        else:
            w.ue(*one)
            for _ in range(sum(one)):
                w.ue(0).u(1, 1)
    w.u(1, bool(far))
    if far:
        w.ue(len(far))
        for order in far:
            w.u(bits, order).u(1, 1)
    return w.u(2, 3).u(1, 1).vui(siting, signal).unit(b"\x42\1")


@pytest.mark.parametrize("siting", [0, 3, 5])
@pytest.mark.parametrize(
    "told",
    [
        dict(),
        dict(layers=[(1, 1), (0, 1), (1, 0)], each=True),
        dict(layers=[(0, 0)] * 6),
        dict(chroma=3, pcm=True),
        dict(lists={}),
        dict(lists={(0, 0): [3] * 16, (1, 5): [-1] * 64, (2, 0): [9, *[1] * 64], (3, 1): [0, *[-2] * 64]}),
        dict(sets=[(1, 2), (0, 0), (3, 1)]),
        # Of four pictures, that before it among them: three are kept, one of them by its second flag; of four two.
        dict(sets=[(2, 1), "101001", "0010100", (1, 0)]),
        dict(far=[3, 255], bits=8),
        dict(far=[1], bits=16, sets=[(1, 0)], signal=False),
    ],
    ids=lambda told: "-".join(told) or "usual",
)
def test_parameters_of_hevc_by_its_table(told, siting):
    """What x265 never writes: ITU-T H.265, 7.3.2.2.1, 7.3.3, 7.3.4 and 7.3.7."""
    sps = hevc_sps(siting, **told)
    header = hvcc(struct.pack(">I", len(sps)) + sps)
    assert chroma_siting("hevc", header) == siting
    assert states_range("hevc", header) is told.get("signal", True)


@pytest.mark.parametrize("resolution", [1, 25, 30_000, 65_535])
@pytest.mark.parametrize(("shape", "version"), [(0, None), (0, 5), (3, 1), (3, 2)])
@pytest.mark.parametrize("bounded", [None, False, True])
def test_frames_of_mpeg_4_that_are_not_coded(resolution, shape, version, bounded):
    """By the tables of ISO/IEC 14496-2, 6.2.3 and 6.2.5, whatever is told before the length of its time."""
    w = Writer().u(1).u(8, 1).u(1, version is not None)
    if version is not None:
        w.u(4, version).u(3, 1)
    w.u(4, 15).u(8, 4).u(8, 3) if bounded else w.u(4, 1)
    w.u(1, bounded is not None)
    if bounded is not None:
        w.u(2, 1).u(1, 1).u(1, bounded)
        for count in (15, 15, 15) if bounded else ():  # rates and the buffer's size, with a marker behind each
            w.u(count).u(1, 1)
        if bounded:
            w.u(3, 5).u(11).u(1, 1).u(15).u(1, 1)
    w.u(2, shape).u(4 if shape == 3 and version != 1 else 0).u(1, 1).u(16, resolution).u(1, 1)
    header = b"\0\0\1\x20" + w.data()
    bits = max(1, (resolution - 1).bit_length())
    for seconds in (0, 1, 3):
        for ticks in (0, resolution - 1):
            for coded in (0, 1):
                frame = Writer().u(2, 1).u(seconds, 2**seconds - 1).u(1).u(1, 1).u(bits, ticks).u(1, 1).u(1, coded)
                packet = b"\0\0\1\xb6" + frame.data() + bytes(4)
                assert is_hidden("mpeg4", packet, header) is (coded == 0)


def test_frames_of_mpeg_4_that_stand_for_packed_ones_are_not_hidden():
    """DivX puts one that is not coded where the second of two in a packet would be."""
    codec, header = header_of(encode(3, codec="mpeg4"))
    frame, uncoded = b"\0\0\1\xb6\x50\xf0\x82\x3c", b"\0\0\1\xb6\x50\xdf"  # 01 0 1 00001 1, and 1 or 0
    assert codec == "mpeg4"
    assert is_hidden(codec, uncoded, header)
    assert is_hidden(codec, uncoded, header, frame)
    assert not is_hidden(codec, uncoded, header, frame + frame)
    assert not is_hidden(codec, frame, header)
    assert not is_hidden(codec, uncoded, b"")  # the length of its time is not known
    for cut in range(len(uncoded)):
        assert not is_hidden(codec, uncoded[:cut], header)


def test_whether_a_range_is_told():
    data = encode(9, codec="libx265")
    codec, header = header_of(data)
    assert states_range(codec, header)  # by x265 always
    assert states_range(codec, None)
    codec, header = header_of(without_range(data))
    assert not states_range(codec, header)
    assert states_range("h264", header)


@pytest.mark.parametrize(("place", "siting"), [("vertical", 0), ("colocated", 2)])
def test_where_chroma_lies_in_av1(place, siting):
    data = encode(4, codec="libsvtav1", **{"svtav1-params": f"chroma-sample-position={place}"})
    assert chroma_siting(*header_of(data)) == siting


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"])
def test_nothing_told_is_the_usual_place(codec):
    assert chroma_siting(*header_of(encode(3, codec=codec))) == 0


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1"])
def test_headers_of_any_bytes(codec):
    """Cut off anywhere, or with flipped bits: a number, at once."""
    name, header = header_of(encode(3, codec=codec))
    random = np.random.default_rng(0)
    broken = [None, b"", *(header[:k] for k in range(len(header)))]
    for _ in range(500):
        bad = bytearray(header)
        for _ in range(random.integers(1, 6)):
            bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        broken.append(bytes(bad))
    for bad in broken:
        assert chroma_siting(name, bad) in range(6)
        SpareFrames(name, bad)


@pytest.mark.parametrize(
    ("codec", "units", "expected"),
    [
        ("h264", [b"\x67ab", b"\x68c", b"\x65def"], True),
        ("h264", [b"\x67ab", b"\x06c", b"\x41def"], False),  # a place to start from that is no IDR picture
        ("hevc", [b"\x26\1abc"], True),
        ("hevc", [b"\x28\1abc"], True),
        ("hevc", [b"\x2a\1abc"], False),  # a clean random access: others before it may be shown
        ("vp9", [b"\x65def"], False),
        ("h264", [], False),
    ],
)
def test_beginnings(codec, units, expected):
    packet = b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
    assert begins_anew(codec, packet) is expected
    for broken in (packet + b"\0", packet[:-1], b"\0\0\0\1" + b"".join(units), b"\xff" * 9, b"\0" * 9):
        assert not begins_anew(codec, broken)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_other_parameters_than_those_of_the_header(codec):
    repeated = {codec.replace("lib", "") + "-params": "repeat-headers=1:log-level=none"}
    data, other = (encode(4, width=width, codec=codec, **repeated) for width in (64, 80))
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    (name, own), (_, others) = header_of(data), header_of(other)
    assert not any(may_change(name, packet, own) for packet in packets)
    assert [may_change(name, packet, others) for packet in packets] == [True, False, False, False]
    assert may_change(name, packets[0], None)
    assert may_change(name, packets[0], own[:5])  # an error here would be one of the whole batch
    assert may_change(name, packets[1][:-1], own)
    assert not may_change("vp9", b"", None)


@pytest.mark.parametrize(("options", "fields"), [("", False), ("interlaced=1", True), ("fake-interlaced=1", True)])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p"])
def test_pictures_that_may_be_fields(options, fields, pixels):
    name, header = header_of(encode(3, pixels=pixels, **{"x264-params": options}))
    assert may_be_fields(name, header) == fields
    assert may_be_fields(name, None)
    assert may_be_fields(name, header[:12])
    assert not may_be_fields("hevc", header)


def unit(kind, layer, body=b"abc"):
    return struct.pack(">IBB", len(body) + 2, kind << 1, layer + 1) + body


def hvcc(*sets):
    head = b"\x01" + bytes(21) + bytes([len(sets)])
    return head + b"".join(b"\x21\0\1" + struct.pack(">H", len(one) - 4) + one[4:] for one in sets)


def test_pictures_that_another_layer_may_need_are_not_spare():
    """Of two temporal layers, by the parameters: the lower one's may be references, whatever their type."""
    two, one = (unit(33, 0, bytes([layers << 1, 9, 9])) for layers in (1, 0))
    spare = SpareFrames("hevc", hvcc(two))
    assert not spare.has(unit(0, 0))
    assert spare.has(unit(0, 1))
    assert spare.has(unit(8, 1) + unit(8, 1))
    assert spare.has(unit(39, 0) + unit(2, 1))  # with a message
    assert not spare.has(unit(0, 1) + unit(1, 1))
    assert not spare.has(unit(1, 1))
    assert not spare.has(unit(19, 0))
    assert not spare.has(unit(39, 0))  # no picture at all
    for broken in (b"", b"\0\0\0\1", unit(0, 1)[:-1], unit(0, 1) + b"\0", b"\0\0\0\1\0"):
        assert not spare.has(broken)
    assert SpareFrames("hevc", hvcc(one)).has(unit(0, 0))
    assert not SpareFrames("hevc", hvcc()).has(unit(0, 0))  # nothing is known
    assert not SpareFrames("hevc", None).has(unit(0, 0))


@pytest.mark.parametrize("kind", range(32))
def test_only_pictures_that_are_no_references_are_spare(kind):
    """ITU-T H.265, table 7-1: of types below 16 the even ones; from 16 on there are places to start from."""
    one = unit(33, 0, bytes([0, 9, 9]))
    assert SpareFrames("hevc", hvcc(one)).has(unit(kind, 0)) == (kind in range(0, 16, 2))


@pytest.mark.parametrize(("kind", "is_key"), [(0, True), (1, False), (2, False), (3, False)])
def test_frames_of_mpeg_4_that_are_made_from_others(kind, is_key):
    """ISO/IEC 14496-2, table 6-20: I, P, B and S; the last from a sprite, or by global motion."""
    packet = b"\0\0\1\xb6" + bytes([kind << 6 | 0x15]) + b"abc"
    assert is_no_key("mpeg4", b"\0\0\1\xb0\1" + packet) is not is_key
    assert not is_no_key("h264", packet)
    assert not is_no_key("mpeg4", packet[:4])


def test_other_parameters_on_the_way_end_it():
    two, one = (unit(33, 0, bytes([layers << 1, 9, 9])) for layers in (1, 0))
    spare = SpareFrames("hevc", hvcc(one))
    assert spare.has(one + unit(0, 0))  # the same once more
    assert not spare.has(two + unit(0, 0))
    assert not spare.has(unit(0, 0))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("options", ["pred-struct=1", "hierarchical-levels=4", "scm=1", "hierarchical-levels=3"])
def test_spare_frames_of_av1_leave_nothing_behind(options, container):
    """Without them dav1d decodes the others to the same bits."""
    data = encode(60, codec="libsvtav1", container=container, g="24", **{"svtav1-params": options})

    def frames(is_left_out):
        found = {}
        with av.open(io.BytesIO(data)) as opened:
            stream = opened.streams.video[0]
            spare = SpareFrames(*header_of(data))
            for packet in opened.demux(stream):
                if packet.size == 0 or not (spare.has(packet) and is_left_out):
                    found |= {frame.pts: frame.to_ndarray().tobytes() for frame in packet.decode()}
        return found

    whole, kept = frames(False), frames(True)
    assert len(whole) == 60
    assert len(kept) < 60 or options == "hierarchical-levels=3"  # which has none
    assert kept.items() <= whole.items()


def test_av1_that_cannot_be_read_has_no_spare_frames():
    """Without a sequence header; with one that has more to it; and whatever bytes there are."""
    data = encode(12, codec="libsvtav1", container="matroska", **{"svtav1-params": "pred-struct=1"})
    name, header = header_of(data)
    with av.open(io.BytesIO(data)) as opened:
        packets = [bytes(packet) for packet in opened.demux(video=0) if packet.size]
    first, spare = packets[0], next(p for p in packets if SpareFrames(name, header).has(p))
    assert not SpareFrames(name, None).has(spare)
    assert first[0] == 0x0A  # a sequence header
    for bit in (0x08, 0x04):  # reduced headers, timing
        changed = bytearray(first)
        changed[2] |= bit
        reader = SpareFrames(name, None)
        assert not reader.has(bytes(changed))
        assert not reader.has(spare)
    random = np.random.default_rng(0)
    for _ in range(2000):
        reader = SpareFrames(name, header)
        bad = bytearray(packets[random.integers(len(packets))][: random.integers(1, 80)])
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        reader.has(bytes(bad))
