"""`decode_clips`: what is known of a clip without FFmpeg's look at its first frames is what that look would tell."""

import io
import struct
import time

import numpy as np
import pytest
import torch
from clip_oracle import ALL, assert_frames, av, encode, full_decode, index_folder, remuxed  # noqa: F401
from test_clip_index import SPARSE

from polydpo_fast import ClipLimits, DecodeError, decode_clips
from polydpo_fast.video import Clip, index
from polydpo_fast.video.opening import Opener

FORMS = {
    **SPARSE,
    "full range": dict(pixels="yuvj420p"),
    "4:4:4": dict(pixels="yuv444p"),
    "10 bits": dict(codec="libx265", pixels="yuv420p10le"),
    "wide pixels": dict(aspect="4/3"),
    "wide pixels in MPEG-4": dict(aspect="4/3", codec="mpeg4"),
    "wide pixels in HEVC": dict(aspect="4/3", codec="libx265"),
    "wide pixels, told by the stream alone": {"x264-params": "sar=4/3"},
    "colours": {"x264-params": "colormatrix=bt2020nc:fullrange=on"},
    "other times": dict(ticks=np.cumsum([900] + [25, 31, 12, 55, 25] * 10)[:50].tolist()),
}


def facts(frame):
    return (
        *(frame.pts, frame.time_base, frame.width, frame.height, frame.format.name, frame.is_corrupt),
        *(int(frame.colorspace), int(frame.color_range), int(frame.color_primaries), int(frame.color_trc)),
        *(frame.rotation, bytes(frame.planes[0])[: frame.width]),
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_is_what_a_full_look_at_it_tells(form):
    options = dict(FORMS[form])
    for container in [options.pop("container")] if "container" in options else ["mp4", "matroska"]:
        data = encode(50, container=container, **options)
        with av.open(io.BytesIO(data)) as opened:
            stream = opened.streams.video[0]
            unit, aspect, frames = stream.time_base, stream.sample_aspect_ratio or 1, list(opened.decode(stream))
        clip = Clip(data, ClipLimits(), True, 1, None)
        clip.index()
        assert clip.timeline.unit == unit
        assert clip.timeline.pts.tolist() == [frame.pts for frame in frames]
        assert [facts(frame) for _, frame in clip.frames(clip.timeline.pts.tolist())] == [facts(f) for f in frames]
        assert clip.aspect == aspect


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_containers_shape_of_pixels_counts_more_than_the_streams(width):
    data = encode(3, aspect="4/3")
    at = data.index(b"pasp") + 4
    data = data[:at] + struct.pack(">II", width, 1) + data[at + 8 :]
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.video[0].sample_aspect_ratio == width
    shown = decode_clips([data], [data], frames=2, size=(48, 64 * width))
    assert shown.original_size[0].tolist() == [48, 64 * width]


def test_shapes_that_only_the_stream_tells_are_checked():
    data = encode(3, **{"x264-params": "sar=17/1"})
    with pytest.raises(DecodeError, match="its pixels are 17 times as wide as high; expected 1/16 to 16"):
        decode_clips([data], [data], frames=1, size=32)


def without_restriction(data):
    """H.264 whose parameters do not tell how far frames are out of order, as some cameras write it."""
    at = data.index(b"\x01d\x00", data.index(b"avcC") if b"avcC" in data else data.index(b"\x63\xa2"))
    size = int.from_bytes(data[at + 6 : at + 8], "big")
    bits = "".join(f"{byte:08b}" for byte in data[at + 8 : at + 8 + size].replace(b"\0\0\3", b"\0\0"))

    def is_here(place):
        """The flag, another, six numbers, the last bit and padding."""
        if bits[place] == "0":
            return False
        place += 2
        for _ in range(6):
            zeros = bits.find("1", place) - place
            if zeros < 0:
                return False
            place += 2 * zeros + 1
        return bits[place:].rstrip("0") == "1"

    flag = max(place for place in range(len(bits) - 16) if is_here(place))
    rest = bits[:flag] + "01"
    rest += "0" * (-len(rest) % 8)
    parameters = bytearray()
    for byte in int(rest, 2).to_bytes(len(rest) // 8, "big"):
        if parameters[-2:] == b"\0\0" and byte <= 3:
            parameters.append(3)
        parameters.append(byte)
    return data[: at + 8] + bytes(parameters).ljust(size, b"\0") + data[at + 8 + size :]


def fragmented(data):
    return remuxed(data, movflags="frag_keyframe+empty_moov")


@pytest.mark.parametrize("container", ["mp4", "matroska", "fragments"])
@pytest.mark.parametrize("kind", ["pyramid", "strict pyramid, open groups", "weighted, no deblocking", "intra refresh"])
def test_h264_that_does_not_tell_its_order(container, kind, monkeypatch):
    """FFmpeg drops frames of these, in the beginning, after a seek, or both, where nobody tells it the depth."""
    told = encode(50, container="mp4" if container == "fragments" else container, **SPARSE[kind])
    if container == "fragments":
        told = fragmented(told)
    data = without_restriction(told)
    with av.open(io.BytesIO(data)) as opened:
        opened.streams.video[0].codec_context.options = {"has_b_frames": "0"}
        assert len(list(opened.decode(video=0))) < 50
    opens = []
    plain = Opener.open
    monkeypatch.setattr(Opener, "open", lambda *arguments, **named: opens.append(1) or plain(*arguments, **named))
    expected = [frame for _, frame in full_decode(told)]
    whole = decode_clips([data], [data], frames=50, size=(48, 64), dtype=torch.uint8)
    assert_frames(whole.pixels[0], expected)
    assert len(opens) == 2 * 2  # no second try
    for first in (13, 30, 41):
        part = decode_clips([data], [data], frames=5, size=(48, 64), start=first / 24, dtype=torch.uint8)
        assert_frames(part.pixels[0], expected[first : first + 5])


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_clips_of_one_frame(codec, container):
    data = encode(1, codec=codec, container=container)
    assert_frames(
        decode_clips([data], [data], frames=1, size=(48, 64), dtype=torch.uint8).pixels[0], [full_decode(data)[0][1]]
    )


def test_opening_decodes_nothing():
    data = encode(8, 720, 1280, bf="3", preset="superfast", qp="4")  # of which one frame costs 20 times the opening
    clip = Clip(data, ClipLimits(), True, 1, None)

    def seconds(work):
        times = []
        for _ in range(5):
            begin = time.thread_time()
            with work():
                times.append(time.thread_time() - begin)
        return min(times)

    assert seconds(clip.opened) < 0.5 * seconds(lambda: av.open(io.BytesIO(data)))


@pytest.mark.parametrize(("codec", "begins_anew"), [("libx264", True), ("libx265", True), ("libvpx-vp9", False)])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_only_unclear_beginnings_are_decoded_twice(codec, begins_anew, container, monkeypatch):
    firsts = []
    plain = index._first
    monkeypatch.setattr(index, "_first", lambda *arguments: firsts.append(1) or plain(*arguments))
    data = encode(9, codec=codec, container=container)
    decode_clips([data], [data], frames=9, size=8)
    assert len(firsts) == (0 if begins_anew else 2)
