"""What is read of the bits of H.264, HEVC and AV1, against what encoders were told to write."""

import io
import struct

import numpy as np
import pytest
from clip_oracle import av, encode, without_range

from polydpo_fast.bitstream import SpareFrames, begins_anew, chroma_siting, is_hidden, states_range


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
