"""Clips to decode, and what they hold: full decodes, and the colour formulas written out in NumPy."""

import io
import os
import re
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")

ALL = ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"]
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}


def scene(index, height, width):
    """Everything moves, and no two frames are alike."""
    y, x = np.mgrid[:height, :width]
    channels = [(x + 5 * index) % 256, (2 * y + 3 * index) % 256, np.full((height, width), 40 + 2 * index % 200)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(
    count=30,
    height=48,
    width=64,
    codec="libx264",
    container="mp4",
    rate=24,
    pixels="yuv420p",
    ticks=None,
    aspect=None,
    **options,
):
    """A clip; `ticks` are the presentation times in 1/600 s. Options with dashes are given with underscores.

    Of HEVC three frames at least: of two, FFmpeg now and then cannot write the MP4 ("Not yet implemented").
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no encoder {codec}")
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"g": "8", "bf": "2", **QUIET.get(codec, {}), **options}
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(scene(index, height, width), format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[index], Fraction(1, 600)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    if codec == "libsvtav1":  # as root it makes the thread that calls it a real-time one, which starves the others
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return file.getvalue()


def without_range(data):
    """HEVC of x265's in MP4 without the five bits of its parameters that tell a format, a range, and no colours."""
    with av.open(io.BytesIO(data)) as container:
        header = container.streams.video[0].codec_context.extradata
    at = header.index(b"\x42\x01\x01")
    old = header[at : at + int.from_bytes(header[at - 2 : at], "big")]
    bits = "".join(f"{byte:08b}" for byte in old.replace(b"\0\0\3", b"\0\0"))
    place = bits.rindex("1" + "00" + "1" + "10100")  # VUI, no shape, no overscan; the flag, 5, limited, no colours
    bits = bits[: place + 3] + "0" + bits[place + 9 :] + "0" * 5
    new = bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))
    new = re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", new)
    assert len(new) == len(old)
    return data.replace(old, new)


def remuxed(data, container="mp4", metadata=(), **options):
    """The same packets in another file. options: the container's."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options) as output:
        output.metadata.update(metadata)
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def joined(first, second, container="webm"):
    """A clip of eight frames or fewer in WebM and another behind it, under the header of the first."""
    file = io.BytesIO()
    with (
        av.open(file, "w", format=container) as output,
        av.open(io.BytesIO(first)) as a,
        av.open(io.BytesIO(second)) as b,
    ):
        stream = output.add_stream_from_template(a.streams.video[0])
        for source, shift in ((a, 0), (b, 400)):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    output.mux(packet)
    return file.getvalue()


def full_decode(data):
    """[(seconds from the first frame, frame)] of the whole clip."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return [(float((f.pts - frames[0].pts) * f.time_base), f) for f in frames]


# By the numbers of ITU-T H.273, which are FFmpeg's: weights of red and of blue in luma.
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS[9] = (0.2627, 0.0593)
# Of the places of chroma in H.264: how far from the first of its columns and of its rows.
SITINGS = [(0, 0.5), (0.5, 0.5), (0, 0), (0.5, 0), (0, 1), (0.5, 1)]


def rgb(frame, siting=0):
    """(3, H, W) levels in float64, by the definitions; chroma interpolated linearly."""
    name, height, width = frame.format.name, frame.height, frame.width
    depth = next((depth for depth in (9, 10, 12) if f"{depth}le" in name), 8)
    sub_x, sub_y = "42" in name, "420" in name or "440" in name
    beside, below = SITINGS[siting]

    def plane(index, h, w):
        raw = np.frombuffer(frame.planes[index], np.uint16 if depth > 8 else np.uint8)
        row = frame.planes[index].line_size // raw.itemsize
        return raw[: row * h].reshape(h, row)[:, :w].astype(np.float64) / 2 ** (depth - 8)

    if "gbr" in name:
        assert frame.color_range == 2
        return np.stack([plane(i, height, width) for i in (2, 0, 1)]) * 255 / (256 - 2.0 ** (8 - depth))
    h, w = (height + sub_y) // 2 if sub_y else height, (width + sub_x) // 2 if sub_x else width
    y = plane(0, height, width)
    chroma = [np.full((h, w), 128.0)] * 2 if "gray" in name else [plane(i, h, w) for i in (1, 2)]
    at_y = np.clip((np.arange(height) - below) / 2, 0, h - 1) if sub_y else np.arange(height)
    at_x = np.clip((np.arange(width) - beside) / 2, 0, w - 1) if sub_x else np.arange(width)

    def interpolated(c):
        c = np.stack([np.interp(at_y, np.arange(h), c[:, i]) for i in range(w)], axis=1)
        return np.stack([np.interp(at_x, np.arange(w), row) for row in c])

    cb, cr = (interpolated(c) - 128 for c in chroma)
    full = frame.color_range == 2 or "yuvj" in name
    most = 256 - 2.0 ** (8 - depth)
    y, cb, cr = (y * 255 / most, cb * 255 / most, cr * 255 / most) if full else (
        (y - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224,
    )  # fmt: skip
    assert frame.colorspace in (*WEIGHTS, 2)
    kr, kb = WEIGHTS[frame.colorspace if frame.colorspace != 2 else 1 if height >= 720 else 5]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]).clip(0, 255)


def assert_frames(clip, expected, siting=0):
    """(3, T, H, W) bytes are those of the decoded frames, to the rounding."""
    assert clip.shape[1] == len(expected)
    for k, frame in enumerate(expected):
        assert np.abs(clip[:, k].numpy() - rgb(frame, siting)).max() <= 0.53, k


@pytest.fixture(autouse=True)
def index_folder(tmp_path_factory, monkeypatch):
    """Nothing is kept where the user keeps it."""
    folder = tmp_path_factory.mktemp("indexes")
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(folder))
    return folder
