"""`decode_clips` against full decodes, and against the colour formulas written out in NumPy."""

import concurrent.futures.thread
import gc
import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from clip_oracle import ALL, assert_frames, av, encode, full_decode, index_folder, joined, remuxed, rgb  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from splitmix import outputs

import polydpo_fast
from polydpo_fast import ClipLimits, DecodeError, clips, decode_clips
from polydpo_fast.video import Clip
from polydpo_fast.video.opening import Opener
from polydpo_fast.video.timeline import Timeline, TooShortError, choose_times

CLIP = encode()


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_are_those_of_a_full_decode(codec, container):
    data = encode(codec=codec, container=container)
    whole = full_decode(data)
    assert len(whole) == 30
    decoded = decode_clips([data], [data], frames=7, size=(48, 64), dtype=torch.uint8)
    assert decoded.pixels.shape == (2, 3, 7, 48, 64)
    assert_frames(decoded.pixels[0], [frame for _, frame in whole[11:18]])
    assert torch.equal(decoded.pixels[0], decoded.pixels[1])
    np.testing.assert_allclose(decoded.times[0], [t for t, _ in whole[11:18]], atol=1e-3)
    for first in (0, 8, 9, 23):
        late = decode_clips([data], [data], frames=7, size=(48, 64), start=whole[first][0], dtype=torch.uint8)
        assert_frames(late.pixels[0], [frame for _, frame in whole[first : first + 7]])


def test_threads_decode_after_the_main_one_has_ended(monkeypatch):
    """When Python's pools take nothing more; the switch is what the end of the main thread turns."""
    known = decode_clips([CLIP], [CLIP], frames=3, size=32)
    monkeypatch.setattr(concurrent.futures.thread, "_shutdown", True)
    assert torch.equal(decode_clips([CLIP], [CLIP], frames=3, size=32).pixels, known.pixels)


@pytest.mark.parametrize(("level", "threads"), [(None, 4), (av.logging.ERROR, 1)])
def test_ffmpeg_has_no_threads_where_pyav_logs(level, threads):
    """They and the freeing of their context would wait for each other for ever."""
    av.logging.set_level(level)
    try:
        clip = Clip(CLIP, ClipLimits(), True, 4, None)
        clip.index()
        with clip._open(True, 4) as (_, stream):
            assert stream.codec_context.thread_count == threads
    finally:
        av.logging.set_level(None)


def test_interlaced_mpeg_4_is_the_same_for_any_number_of_threads():
    """FFmpeg's own would make a frame from others before they are whole."""
    data = encode(23, codec="mpeg4", flags="+ilme+ildct", g="6", bf="4")
    options = dict(frames=23, size=(48, 64), dtype=torch.uint8)
    known = decode_clips([data], [data], threads=1, **options).pixels
    for _ in range(5):
        assert torch.equal(decode_clips([data], [data], threads=16, **options).pixels, known)


def test_texts_in_another_encoding_do_not_matter():
    data = remuxed(CLIP, metadata={"title": "\u00e9" * 9}).replace("\u00e9".encode(), b"\xe9\xe9")
    assert decode_clips([data], [CLIP], frames=3, size=32).ok.all()


def test_pyav_19_has_no_errors_of_metadata_and_iterates_over_the_kinds_of_side_data(monkeypatch):
    """Its interface, in front of the PyAV that is here; with it a frame is shown as its matrix says."""
    quarter = with_matrix(CLIP, 0, 65536, -65536, 0)
    expected = decode_clips([CLIP], [quarter], frames=3, size=32)
    version, opening, kinds_of = int(av.__version__.split(".")[0]), av.open, av.sidedata.sidedata.SideDataContainer

    def open_19(file, mode="r", format=None, options=None, container_options=None, io_open=None):
        rest = {} if version >= 19 else {"metadata_errors": "replace"}
        return opening(file, mode, format, options, container_options, io_open=io_open, **rest)

    class SideData19(kinds_of):
        def __iter__(self):
            return iter([getattr(one, "type", one) for one in super().__iter__()])

    monkeypatch.setattr(av, "__version__", "19.0.2")
    monkeypatch.setattr(av, "open", open_19)
    monkeypatch.setattr(av.sidedata.sidedata, "SideDataContainer", SideData19)
    found = decode_clips([CLIP], [quarter], frames=3, size=32)
    assert torch.equal(found.pixels, expected.pixels)
    assert found.original_size.tolist() == [[48, 64], [64, 48]]


def test_where_there_are_no_more_threads_nothing_is_decoded_twice(monkeypatch):
    """A pool queues work before it starts a thread for it."""
    done, start = [], threading.Thread.start

    def refuse(thread):
        if thread.name.endswith("_1"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with ThreadPoolExecutor(2, thread_name_prefix="two") as pool, pytest.raises(RuntimeError, match="new thread"):
        clips._side_by_side(pool, [partial(time.sleep, 0.05), *(partial(done.append, i) for i in range(3))])
    assert len(done) == len(set(done))


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mov", "libx264"), ("mov", "libx265"), ("webm", "libvpx"), ("webm", "libvpx-vp9"), ("webm", "libsvtav1")],
)
def test_other_containers(container, codec):
    data = encode(codec=codec, container=container)
    decoded = decode_clips([data], [data], frames=7, size=(48, 64), dtype=torch.uint8)
    assert_frames(decoded.pixels[0], [frame for _, frame in full_decode(data)[11:18]])


@pytest.mark.parametrize("codec", [*ALL, "libvpx"])
def test_pixels_are_those_of_swscale(codec):
    """With all that makes it accurate, and chroma linear as ours; seen 0.22 levels of 255 on average, 3 at most."""
    data = encode(12, 96, 128, codec=codec, container="matroska")
    decoded = decode_clips([data], [data], frames=12, size=(96, 128), dtype=torch.uint8)
    linear, accurate, all_columns, whole_chroma = 2, 0x40000, 0x2000, 0x4000
    for k, (_, frame) in enumerate(full_decode(data)):
        converted = frame.reformat(
            format="rgb24", src_colorspace=5, interpolation=linear | accurate | all_columns | whole_chroma
        )
        apart = np.abs(decoded.pixels[0, :, k].permute(1, 2, 0).numpy().astype(int) - converted.to_ndarray())
        assert apart.mean() <= 0.3
        assert apart.max() <= 3


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [("libvpx-vp9", "yuv420p"), ("libvpx", "yuv420p"), ("libx264", "yuv444p"), ("mpeg4", "yuv420p")],
)
@pytest.mark.parametrize("shape", [(49, 65), (48, 67), (51, 64)])
def test_odd_sizes(codec, pixels, shape):
    data = encode(5, *shape, codec=codec, pixels=pixels, container="matroska")
    decoded = decode_clips([data], [data], frames=5, size=shape, dtype=torch.uint8)
    assert decoded.original_size[0].tolist() == list(shape)
    assert_frames(decoded.pixels[0], [frame for _, frame in full_decode(data)])


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"x264-params": "open-gop=1:keyint=8"}), ("libx265", {})])
def test_open_groups_of_pictures(codec, options):
    """Frames before a keyframe that need the group before: found by an earlier seek."""
    options = options or {"x265-params": "open-gop=1:keyint=8:log-level=none"}
    data = encode(codec=codec, bf="3", **options)
    whole = full_decode(data)
    for first in range(0, 26, 3):
        decoded = decode_clips([data], [data], frames=4, size=(48, 64), start=whole[first][0], dtype=torch.uint8)
        assert_frames(decoded.pixels[0], [frame for _, frame in whole[first : first + 4]])


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(
    "options", ["open-gop=1:keyint=8", "keyint=8:intra-refresh=1", "keyint=2:min-keyint=1:open-gop=1"]
)
def test_places_that_only_look_like_ones_to_seek_to(container, options):
    """Open groups and gradual refreshes, from every start and sparsely: as in a full decode."""
    data = encode(44, container=container, bf="3", **{"x264-params": options})
    whole = full_decode(data)
    for first in range(0, 44, 5):
        one = decode_clips([data], [data], frames=1, size=(48, 64), start=whole[first][0], dtype=torch.uint8)
        assert_frames(one.pixels[0], [whole[first][1]])
    sparse = decode_clips([data], [data], frames=3, size=(48, 64), start=0.0, fps=Fraction(24, 19), dtype=torch.uint8)
    assert_frames(sparse.pixels[0], [whole[k][1] for k in (0, 19, 38)])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_of_frames_with_the_same_time_the_first_is_taken(codec):
    """All are keys: seeking leads to whichever of them it likes."""
    data = encode(40, codec=codec, g="1", bf="0")
    at = data.index(b"stts") - 4
    assert data[at : at + 16] == struct.pack(">I4sII", 24, b"stts", 0, 1)
    lasts = [0 if k % 7 == 0 else 512 for k in range(40)]
    table = struct.pack(">I4sII", 16 + 320, b"stts", 0, 40) + b"".join(struct.pack(">II", 1, last) for last in lasts)
    changed = bytearray(data[:at] + table + data[at + 24 :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        size = changed.index(name) - 4
        changed[size : size + 4] = (int.from_bytes(changed[size : size + 4], "big") + 336 - 24).to_bytes(4, "big")
    whole, times = full_decode(bytes(changed)), [sum(lasts[:k]) / 12288 for k in range(40)]
    assert [t for t, _ in whole] == pytest.approx(times)
    for k in range(1, 40):
        if times[k] > times[k - 1]:
            options = dict(frames=1, size=(48, 64), start=times[k], fps=24, dtype=torch.uint8)
            one = decode_clips([bytes(changed)], [data], **options)
            assert_frames(one.pixels[0], [whole[k][1]])


@pytest.mark.parametrize(
    "matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
)
def test_display_matrices(matrix):
    """All eight turns and mirrors: column x, row y is shown at a x + c y, b x + d y."""
    a, b, c, d = matrix
    data = encode(3)
    at = data.index(b"tkhd") + 44
    values = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data = data[:at] + values + data[at + 36 :]
    stored = rgb(full_decode(data)[1][1])
    y, x = np.mgrid[:48, :64]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.zeros((3, to_y.max() + 1, to_x.max() + 1))
    shown[:, to_y, to_x] = stored
    decoded = decode_clips([data], [data], frames=3, size=shown.shape[1:], dtype=torch.uint8)
    assert np.abs(decoded.pixels[0, :, 1].numpy() - shown).max() <= 0.53
    assert decoded.original_size[0].tolist() == list(shown.shape[1:])


def with_matrix(data, a, b, c, d):
    """Entries in 1/65536."""
    at = data.index(b"tkhd") + 44
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def test_other_angles_are_refused():
    half, one = 46341, 65536  # sin 45 degrees
    for matrix, told in (
        ((half, half, -half, half), "turned by -45 degrees, by the matrix 0.707, 0.707, -0.707, 0.707; expected"),
        ((one, 0, one, one), "turned by -0 degrees, by the matrix 1, 0, 1, 1; expected quarter turns"),
    ):
        data = with_matrix(encode(3), *matrix)
        with pytest.raises(DecodeError, match=f"it is to be shown {told}"):
            decode_clips([data], [data], frames=2, size=16)


def test_display_matrices_that_are_rounded_or_empty():
    """Sines of rounded angles, and fields that were never filled in."""
    data, one = encode(3), 65536
    for turned, exact in (
        ((one, 1, -1, one), (one, 0, 0, one)),
        ((0, 0, 0, 0), (one, 0, 0, one)),
        ((-3, one, 2 - one, 5), (0, one, -one, 0)),
        ((-one, 200, -200, -one), (-one, 0, 0, -one)),
    ):
        found = decode_clips([with_matrix(data, *turned)], [with_matrix(data, *exact)], frames=3, size=16)
        assert torch.equal(found.pixels[0], found.pixels[1])
        assert found.original_size[0].tolist() == found.original_size[1].tolist()


def test_frames_that_change_their_size_are_refused():
    data = joined(*(encode(8, 48, width, codec="libvpx-vp9", container="webm") for width in (64, 96)))
    assert {frame.width for _, frame in full_decode(data)} == {64, 96}
    with pytest.raises(DecodeError, match=r"its frames change from \(64, 48, 1, 1.0\) to \(96, 48, 1, 1.0\)"):
        decode_clips([data], [data], frames=16, size=16)


@pytest.mark.parametrize(
    "bad", [dict(pixels=0), dict(bytes=1.5), dict(frames=True), dict(streams=0), dict(timeout_s=-1)]
)
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match=rf"limits.{next(iter(bad))} is .*; expected"):
        ClipLimits(**bad)


def cut_by_an_edit_list(data, frames, rate=24):
    """The same MP4 with its first frames cut off as editors do it: the data stay, the presentation skips them."""
    at = data.index(b"elst")
    version, _, entries = struct.unpack(">BxHI", data[at + 4 : at + 12])
    assert (version, entries) == (0, 1)
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    start = struct.unpack(">i", data[at + 16 : at + 20])[0] + frames * scale // rate
    return data[: at + 16] + struct.pack(">i", start) + data[at + 20 :]


@pytest.mark.parametrize("cut", [3, 5, 12])
def test_edit_lists_that_start_between_keyframes(cut):
    data = cut_by_an_edit_list(encode(40), cut)
    whole = full_decode(data)
    assert len(whole) == 40 - cut
    for first in (0, 1, 4, 20):
        decoded = decode_clips([data], [data], frames=2, size=(48, 64), start=whole[first][0], dtype=torch.uint8)
        assert_frames(decoded.pixels[0], [frame for _, frame in whole[first : first + 2]])


@pytest.mark.parametrize("strict", [True, False])
def test_clips_that_begin_with_what_cannot_be_decoded(strict):
    """Cut at a keyframe of an open group: the pictures shown before it refer to the group that is gone."""
    source = encode(40, codec="libx265", bf="3", **{"x265-params": "open-gop=1:keyint=8:log-level=none"})
    file = io.BytesIO()
    with av.open(io.BytesIO(source)) as whole, av.open(file, "w", format="matroska") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        keys = 0
        for packet in whole.demux(video=0):
            keys += packet.is_keyframe
            if keys >= 2 and packet.dts is not None:
                packet.stream = stream
                cut.mux(packet)
    data = file.getvalue()
    shown = full_decode(data)
    with av.open(io.BytesIO(data)) as container:
        assert len(shown) < sum(packet.pts is not None for packet in container.demux(video=0))
    for first in (0, 1, 9, 20):
        decoded = decode_clips(
            [data], [data], frames=3, size=(48, 64), start=shown[first][0], dtype=torch.uint8, strict=strict
        )
        assert_frames(decoded.pixels[0], [frame for _, frame in shown[first : first + 3]])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("between", [0, 2])
def test_mpeg_4_that_begins_without_a_key(between, strict):
    """FFmpeg makes something of the frames whose key is gone, without an error: they are left out."""
    source, file = encode(40, codec="mpeg4", bf=f"{between}", g="10"), io.BytesIO()
    with av.open(io.BytesIO(source)) as whole, av.open(file, "w", format="matroska") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.dts is not None]
        first = min(packet.pts for packet in packets[4:] if packet.is_keyframe)
        for packet in packets[4:]:
            packet.stream = stream
            cut.mux(packet)
    data, shown = file.getvalue(), [frame for _, frame in full_decode(source) if frame.pts >= first]
    options = dict(size=(48, 64), start=0.0, dtype=torch.uint8, strict=strict)
    decoded = decode_clips([data], [data], frames=len(shown), **options)
    assert_frames(decoded.pixels[0], shown)
    assert not decoded.concealed.any()
    with pytest.raises(DecodeError, match=f"{len(shown)} frames"):
        decode_clips([data], [data], frames=len(shown) + 1, **options)


def test_waiting_for_other_clips_is_no_work():
    big = encode(60, 360, 640)
    alone = time.perf_counter()
    decode_clips([big], [big], frames=60, size=64, threads=2)
    alone = time.perf_counter() - alone
    limits = ClipLimits(timeout_s=4 * alone)
    assert decode_clips([big] * 12, [big] * 12, frames=60, size=64, threads=2, limits=limits, on_error="mask").ok.all()


def test_inference_mode():
    with torch.inference_mode():
        repeated = decode_clips([CLIP], [CLIP], frames=40, size=8, short="repeat")
        out = torch.ones(4, 3, 2, 8, 8)
    assert torch.equal(repeated.pixels, decode_clips([CLIP], [CLIP], frames=40, size=8, short="repeat").pixels)
    masked = decode_clips([CLIP, b""], [CLIP, CLIP], frames=2, size=8, dtype=torch.float32, out=out, on_error="mask")
    assert masked.ok.tolist() == [True, False]
    assert not out[[1, 3]].any()


PIXELS = {
    **dict.fromkeys(["yuv420p", "yuvj420p", "yuv422p", "yuv444p"], "libx264"),
    **dict.fromkeys(["yuv420p10le", "yuv422p10le", "yuv420p12le", "gbrp", "gbrp10le", "gray", "gray10le"], "libx265"),
    "yuv440p": "libvpx-vp9",
}


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("shape", [(48, 64), (50, 66), (720, 32)])
def test_colours(pixels, shape):
    data = encode(3, *shape, codec=PIXELS[pixels], pixels=pixels, container="matroska")
    whole = full_decode(data)
    assert whole[0][1].format.name == pixels
    decoded = decode_clips([data], [data], frames=3, size=shape, dtype=torch.uint8)
    assert_frames(decoded.pixels[0], [frame for _, frame in whole])
    default = ("rgb", True) if "gbrp" in pixels else ("bt709" if shape[0] == 720 else "bt601", "yuvj" in pixels)
    assert (decoded.matrix[0], decoded.full_range[0]) == default


@pytest.mark.parametrize(
    ("matrix", "number", "name"),
    [
        ("bt709", 1, "bt709"),
        ("fcc", 4, "fcc"),
        ("bt470bg", 5, "bt601"),
        ("smpte240m", 7, "smpte240m"),
        ("bt2020nc", 9, "bt2020"),
    ],
)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p10le"])
def test_the_streams_own_matrix_is_honoured(matrix, number, name, pixels):
    data = encode(2, 48, 64, pixels=pixels, **{"x264-params": f"colormatrix={matrix}"})
    decoded = decode_clips([data], [data], frames=2, size=(48, 64), dtype=torch.uint8)
    whole = full_decode(data)
    assert whole[0][1].colorspace == number
    assert decoded.matrix == (name,) * 2
    assert_frames(decoded.pixels[0], [frame for _, frame in whole])


@pytest.mark.parametrize("matrix", ["YCgCo", "bt2020c", "chroma-derived-nc", "ICtCp"])
def test_colours_that_are_no_such_matrix_are_refused(matrix):
    """Not shown in wrong ones."""
    data = encode(2, pixels="yuv444p", **{"x264-params": f"colormatrix={matrix}"})
    with pytest.raises(
        DecodeError, match=r"its colours have the matrix \d+ of ITU-T H.273; expected 1, 4, 5, 6, 7, 9 or"
    ):
        decode_clips([data], [data], frames=2, size=(48, 64))


@pytest.mark.parametrize("siting", range(6))
@pytest.mark.parametrize(
    ("codec", "pixels"), [("libx264", "yuv420p"), ("libx265", "yuv420p10le"), ("libx264", "yuv422p")]
)
def test_chroma_lies_where_the_stream_says(codec, pixels, siting):
    """Of 4:2:0; that of 4:2:2 lies on the even columns, whatever a stream says."""
    data = encode(
        3,
        50,
        66,
        codec=codec,
        pixels=pixels,
        **{codec.replace("lib", "") + "-params": f"chromaloc={siting}:log-level=none"},
    )
    decoded = decode_clips([data], [data], frames=3, size=(50, 66), dtype=torch.uint8)
    expected = [frame for _, frame in full_decode(data)]
    assert_frames(decoded.pixels[0], expected, siting if "420" in pixels else 0)
    if pixels == "yuv420p":
        options = dict(frames=2, size=(50, 66), dtype="yuv420")
        if siting == 0:
            assert decode_clips([data], [data], **options).ok.all()
        else:
            with pytest.raises(DecodeError, match=f"its pixels are yuv420p, its chroma of type {siting} of H.264's"):
                decode_clips([data], [data], **options)
        with pytest.raises(AssertionError):  # or the places are no different here
            assert_frames(decoded.pixels[0], expected, (siting + 1) % 6)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
def test_variable_frame_rate_and_a_start_that_is_not_zero(container, codec):
    ticks = np.cumsum([900] + [7, 31, 12, 55, 25] * 6)[:30].tolist()
    data = encode(ticks=ticks, container=container, codec=codec, bf="3")
    whole = full_decode(data)
    decoded = decode_clips([data], [data], frames=12, size=(48, 64), start=0.3, fps=20, dtype=torch.uint8)
    expected = [[frame for t, frame in whole if t <= 0.3 + k / 20 + 5e-4][-1] for k in range(12)]
    assert_frames(decoded.pixels[0], expected)
    np.testing.assert_allclose(decoded.times[0], 0.3 + np.arange(12) / 20, atol=1e-6)


def test_both_arms_share_the_times():
    """12 and 30 frames per second: the loser shows what it has at the winner's times."""
    win, lose = encode(24, rate=12), encode(45, rate=30, height=96, width=128)
    shown = full_decode(lose)
    for options in (dict(), dict(start="random", seeds=[3], crop="random", hflip=0.5), dict(fps=10, start=0.4)):
        decoded = decode_clips([win], [lose], frames=6, size=(40, 40), dtype=torch.uint8, **options)
        exact = decode_clips(
            [lose], [lose], frames=1, size=(40, 40), dtype=torch.uint8, start=decoded.times[0, 2].item(), fps=1,
            **{k: v for k, v in options.items() if k in ("crop", "hflip", "seeds")},
        )  # fmt: skip
        assert torch.equal(decoded.pixels[1, :, 2], exact.pixels[0, :, 0])
        assert decoded.times[0, -1] < shown[-1][0] + 1 / 30


def test_random_starts_depend_on_the_seed_and_stay_inside():
    starts = set()
    for seed in range(30):
        decoded = decode_clips([CLIP], [CLIP], frames=5, size=8, start="random", seeds=[seed], dtype=torch.uint8)
        again = decode_clips([CLIP], [CLIP], frames=5, size=8, start="random", seeds=[seed], dtype=torch.uint8)
        assert torch.equal(decoded.pixels, again.pixels)
        starts.add(round(decoded.times[0, 0].item() * 24))
    assert len(starts) > 10
    assert starts <= set(range(26))


@pytest.mark.parametrize("fps", [None, 24])
def test_short_clips_follow_the_policy(fps):
    data = encode(5)
    whole = [frame for _, frame in full_decode(data)]
    options = dict(frames=8, size=(48, 64), fps=fps, dtype=torch.uint8)
    with pytest.raises(
        DecodeError, match=r"win\[0\] .* it ends after 0.208 s \(5 frames\); expected a frame at 0.292 s"
    ):
        decode_clips([data], [CLIP], **options, start=0.0)
    with pytest.raises(DecodeError, match=r"lose\[0\] .* it ends after 0.208 s"):
        decode_clips([CLIP], [data], **options, start=0.0)
    repeated = decode_clips([data], [data], short="repeat", **options)
    assert_frames(repeated.pixels[0], whole + [whole[-1]] * 3)
    looped = decode_clips([data], [data], short="loop", **options)
    assert_frames(looped.pixels[0], whole + whole[:3])


@pytest.mark.parametrize("fps", [None, 24])
def test_starts_beyond_the_end(fps):
    """Looped clips go on from there, whether or not a rate is given; the others are told where they were to begin."""
    data = encode(5)
    whole = [frame for _, frame in full_decode(data)]
    options = dict(frames=3, size=(48, 64), fps=fps, dtype=torch.uint8)
    for first in (0, 3, 4, 5, 6, 9, 10, 1203):
        looped = decode_clips([data], [data], start=first / 24, short="loop", **options)
        assert looped.times[0].tolist() == pytest.approx([(first + k) / 24 for k in range(3)], abs=1e-6)
        assert_frames(looped.pixels[0], [whole[(first + k) % 5] for k in range(3)])
    with pytest.raises(DecodeError, match=r"it ends after 0.208 s \(5 frames\); expected a frame at 99.083 s"):
        decode_clips([data], [data], start=99.0, **options)
    repeated = decode_clips([data], [data], start=99.0, short="repeat", **options)
    assert repeated.times[0].tolist() == pytest.approx([99 + k / 24 for k in range(3)])
    assert_frames(repeated.pixels[0], [whole[-1]] * 3)


@settings(max_examples=60)
@given(data=st.data())
def test_plans_hold_for_any_times(data):
    draw = data.draw
    arms = []
    for _ in range(2):
        steps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
        arms.append(Timeline(np.cumsum([draw(st.integers(-100, 100)), *steps]), Fraction(1, 90)))
    frames, fps = draw(st.integers(1, 10)), draw(st.sampled_from([None, 1, 12.5, 60]))
    start = draw(st.sampled_from(["center", "random"]))
    drawn = draw(st.floats(0, 1, exclude_max=True))
    times = choose_times(tuple(arms), frames, fps, start, drawn, "repeat")
    assert len(times) == frames
    assert all(b > a for a, b in itertools.pairwise(times))
    assert times[0] >= 0
    try:
        assert choose_times(tuple(arms), frames, fps, start, drawn, "error") == times
    except ValueError:
        # Only where no start would have done.
        if fps is None:
            assert sum(t < arms[1].duration() for t in arms[0].times(0, None)) < frames
        else:
            assert min(a.duration() for a in arms) <= Fraction(fps) ** -1 * (frames - 1) + Fraction(2, 90)
    for arm in arms:
        for t, pts in zip(times, arm.shown_at(times, "repeat"), strict=True):
            begin = [(int(p) - int(arm.pts[0])) * arm.unit for p in arm.pts]
            last = sum(b <= t for b in begin) - 1
            if last + 1 < len(begin) and begin[last + 1] - t < min(t - begin[last], Fraction(99, 100_000)):
                last += 1
            assert pts == arm.pts[last]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("fps", [None, 24])
@pytest.mark.parametrize("count", [5, 7])
def test_loops_begin_anew_at_the_first_frame(container, fps, count):
    """Matroska's clock is of milliseconds, which 24 frames a second do not divide."""
    whole, clip = encode(count, container="mp4"), encode(count, container=container)
    options = dict(frames=5 * count, start=0.0, fps=fps, short="loop", size=(48, 64), dtype=torch.uint8)
    expected = decode_clips([whole], [whole], frames=count, start=0.0, size=(48, 64), dtype=torch.uint8).pixels[0]
    for win, lose in ((clip, clip), (whole, clip), (clip, whole)):
        got = decode_clips([win], [lose], **options)
        for arm in got.pixels:
            assert torch.equal(arm, expected.repeat(1, 5, 1, 1))
        assert got.times[0, 4 * count].item() == pytest.approx(4 * count / 24, abs=1e-9)


@settings(max_examples=200)
@given(
    count=st.integers(1, 300),
    rate=st.sampled_from([Fraction(24), Fraction(30_000, 1001), Fraction(25), Fraction(16), Fraction(121, 5)]),
    ticks=st.sampled_from([1000, 600, 90_000, 12_288]),
)
def test_a_lap_is_as_long_as_its_frames_but_for_the_clock(count, rate, ticks):
    unit = Fraction(1, ticks)
    clip = Timeline(np.array([round(k / rate / unit) for k in range(count)], np.int64), unit)
    exact = count / rate
    if count > 1:  # what the clock tells of the interval, times the frames
        assert abs(clip.lap() - exact) <= count * unit / (count - 1)
    if 24 / rate == 1 and count > 4:
        assert clip.lap() == exact
    uneven = Timeline(np.array([0, 10, 500, 510]), unit)
    assert uneven.lap() == 680 * unit
    rounded = Timeline(np.array([0, 25, 50, 74, 99, 124], np.int64), Fraction(1, 600))  # 24.2 a second, to half a tick
    assert rounded.lap() == 6 / Fraction(121, 5)


def test_no_frame_is_taken_before_it_is_shown():
    """A clock of one tick per frame is no reason to round up to the next one."""
    coarse = Timeline(np.arange(24), Fraction(1, 24))
    fine = Timeline(512 * np.arange(24), Fraction(1, 12288))
    times = choose_times((coarse, coarse), 8, 16, 0.0, 0.0, "error")
    assert coarse.shown_at(times, "error") == [0, 1, 3, 4, 6, 7, 9, 10]
    assert [p // 512 for p in fine.shown_at(times, "error")] == [0, 1, 3, 4, 6, 7, 9, 10]
    rounded = [Fraction(round(1000 * k / 24), 1000) for k in range(24)]  # by another clip's clock
    assert fine.shown_at(rounded, "error", Fraction(1, 1000)) == fine.pts.tolist()


@pytest.mark.parametrize("rate", [24, Fraction(24_000, 1001), Fraction(30_000, 1001), 60, 1000])
@pytest.mark.parametrize("first", [1, 2, 3, 31])
def test_the_first_time_may_be_rounded_too(rate, first):
    """Matroska's milliseconds: of many files the first frame comes two frames after 0, or anywhere."""
    number = np.arange(120)
    clip = Timeline(np.array([round(Fraction(1000 * int(k + first)) / rate) for k in number]), Fraction(1, 1000))
    exact = Timeline(number, 1 / Fraction(rate))
    grid = exact.times(0, None)
    assert clip.shown_at(grid, "error") == clip.pts.tolist()
    if rate in (24, 60):  # which the clock tells exactly
        assert clip.shown_at([t + 5 * len(number) / Fraction(rate) for t in grid], "loop") == clip.pts.tolist()
    # The winner's times, on the same clip, on an arm whose own are exact, and on one that begins elsewhere.
    other = Timeline(np.array([round(Fraction(1000 * int(k)) / rate) for k in number]), Fraction(1, 1000))
    for arm in (clip, exact, other):
        assert arm.shown_at(clip.times(0, None), "error", clip.unit) == arm.pts.tolist()


@pytest.mark.parametrize("start", [0.0, "center", "random"])
def test_one_frame_more_than_the_winner_has_is_an_error(start):
    """Also where the last frame is shown longer than the others, as by a clock of milliseconds."""
    other = Timeline(np.arange(60), Fraction(1, 24))
    for count in range(2, 40):
        times = np.array([round(1000 * k / 24) for k in range(count)])
        for last in (0, 500):
            clip = Timeline(times + last * (np.arange(count) == count - 1), Fraction(1, 1000))
            for arms in ((clip, clip), (clip, other)):
                assert len(choose_times(arms, count, None, start, 0.999, "error")) == count
                with pytest.raises(TooShortError, match=f"{count} frames") as told:
                    choose_times(arms, count + 1, None, start, 0.999, "error")
                assert told.value.arm == 0


@pytest.mark.parametrize("start", [0.0, "center", "random"])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(24_000, 1001), Fraction(30_000, 1001), Fraction(60)])
def test_one_frame_more_than_a_clip_has_is_an_error(rate, start):
    """By a clock of milliseconds, too, whose times may lie further apart than the frames, or come before them."""
    drawn = 1 - 2**-32
    longer = [
        Timeline(np.array([round(k / rate / unit) for k in range(60)]), unit)
        for unit in (Fraction(1, 1000), Fraction(1, 90_000), 1 / (1000 * rate))
    ]
    # Eight at least: where their first time is rounded, too, fewer may be of another rate.
    for count, first in itertools.product(range(8, 50, 3), (0, 2)):
        times = np.array([round(1000 * (k + first) / rate) for k in range(count)])
        clip = Timeline(times, Fraction(1, 1000))
        for arms, fps in (((clip, clip), rate), *(((other, clip), None) for other in longer)):
            for fitting in (count, count - 1, count // 2):
                assert len(choose_times(arms, fitting, fps, start, drawn, "error")) == fitting
            with pytest.raises(TooShortError, match=f"{count} frames"):
                choose_times(arms, count + 1, fps, start, drawn, "error")


def test_places_of_a_start_at_a_rate():
    """Of 1.25 s that are shown, five frames an eighth of a second apart leave 0.75 s to begin in."""
    clip = Timeline(np.arange(30), Fraction(1, 24))
    for start, drawn, begin in (
        ("center", 0.0, Fraction(3, 8)),
        ("random", 0.0, 0),
        ("random", 0.5, Fraction(3, 8)),
        ("random", 1 - 2**-32, Fraction(3, 4) - Fraction(1, 24)),  # a frame before what is left ends
    ):
        times = choose_times((clip, clip), 5, 8, start, drawn, "error")
        assert times == [begin + Fraction(k, 8) for k in range(5)]
    for start, drawn, first in (("center", 0.0, 12), ("random", 0.0, 0), ("random", 1 - 2**-32, 25)):
        assert choose_times((clip, clip), 5, None, start, drawn, "error") == [Fraction(first + k, 24) for k in range(5)]


def test_where_a_random_start_falls_stays_what_it_was():
    """By the fourth number of the seed, among the places that there are: one frame more than are left over."""
    seeds = [0, 1, 1234567, -1, 2**64 - 1, *range(40, 50)]
    clips = [CLIP] * len(seeds)
    got = decode_clips(clips, clips, frames=5, size=8, start="random", seeds=seeds)
    places = [int((outputs(seed, 4)[3] >> 11) * 2.0**-53 * 26) for seed in seeds]
    times = [seconds for seconds, _ in full_decode(CLIP)]
    assert len(times) == 30
    assert len(set(places)) > 5
    assert [row[0] for row in got.times.tolist()] == pytest.approx([times[place] for place in places])


def test_a_random_start_is_never_the_end():
    """Of the largest number that a seed can give."""
    from polydpo_fast.decoding import draws

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "splitmix64", lambda _: 2**64 - 1)
        assert draws.start_of(0) < 1
        exact = decode_clips([CLIP], [CLIP], frames=30, start="random", seeds=[0], size=16)
    assert exact.times[0, 0] == 0


def test_what_is_neither_path_nor_bytes_is_named():
    for wrong in (5, None, 1.5, memoryview(CLIP)[::2]):
        for on_error in ("raise", "mask"):
            with pytest.raises(
                TypeError, match=r"lose\[1\] is a \w+; expected a path, or a contiguous bytes-like object"
            ):
                decode_clips([CLIP, CLIP], [CLIP, wrong], frames=2, size=16, on_error=on_error)


def test_paths_of_any_bytes(tmp_path):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"clip\xff.mp4"))
    with open(path, "wb") as file:
        file.write(CLIP)
    for _ in range(2):
        assert decode_clips([path], [path], frames=2, size=16).ok.all()


def test_layouts_dtypes_threads_and_out_agree():
    options = dict(frames=5, size=(30, 40), crop="random", hflip=0.5, seeds=[4, 5])
    base = decode_clips([CLIP] * 2, [CLIP] * 2, **options)
    assert base.pixels.dtype == torch.bfloat16
    for threads in (1, 3, 16):
        assert torch.equal(decode_clips([CLIP] * 2, [CLIP] * 2, threads=threads, **options).pixels, base.pixels)
    out = torch.zeros(4, 5, 3, 30, 40, dtype=torch.bfloat16)
    turned = decode_clips([CLIP] * 2, [CLIP] * 2, layout="TCHW", out=out, **options)
    assert turned.pixels is out
    assert torch.equal(out.transpose(1, 2), base.pixels)
    single = decode_clips([CLIP] * 2, [CLIP] * 2, dtype=torch.float32, **options)
    assert torch.equal(single.pixels.bfloat16(), base.pixels)
    assert torch.equal(single.crop_top_left, base.crop_top_left)
    assert single.original_size.tolist() == [[48, 64]] * 4


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (3, 1), (4, 1), (8, 2), (19, 4)])
def test_threads_are_shared_among_the_clips(monkeypatch, threads, each):
    """One each where clips outnumber processors; what is left over is FFmpeg's."""
    given, plain = [], Opener.open

    @contextmanager
    def opened(*arguments, **named):
        with plain(*arguments, **named) as (container, stream):
            given.append((stream.codec_context.thread_count, str(stream.codec_context.thread_type)))
            yield container, stream

    monkeypatch.setattr(Opener, "open", opened)
    at_once, most, decoded = [], [], Clip._decoded

    def counting(self, *arguments):
        at_once.append(1)
        most.append(len(at_once))
        try:
            yield from decoded(self, *arguments)
        finally:
            at_once.pop()

    monkeypatch.setattr(Clip, "_decoded", counting)
    decode_clips([CLIP] * 2, [CLIP] * 2, frames=30, size=16, threads=threads)
    assert {count for count, _ in given[4:]} == {each}  # after the four indexes
    assert max(most) <= threads


def test_without_pyav():
    """Everything else works."""
    code = """
import sys
sys.modules["av"] = None
import io, torch
from PIL import Image
import polydpo_fast
file = io.BytesIO()
Image.new("RGB", (16, 16)).save(file, "JPEG")
assert polydpo_fast.decode_pairs([file.getvalue()], [file.getvalue()], size=16).ok.all()
polydpo_fast.decode_clips([b""], [b""])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.endswith("ImportError: decode_clips needs PyAV: pip install 'polydpo-fast[video]'\n")


def test_paths_will_do(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CLIP)
    a = decode_clips([path], [str(path)], frames=3, size=16)
    assert torch.equal(a.pixels[0], decode_clips([CLIP], [CLIP], frames=3, size=16).pixels[0])
    with pytest.raises(DecodeError, match=r"win\[0\] .*No such file"):
        decode_clips([tmp_path / "none"], [path], frames=3, size=16)


def sound():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (b"", {}, "it is empty"),
        (PLAYLIST, {}, "it is neither MP4, MOV, Matroska nor WebM: it begins with 23 45 58 54"),
        (b"<html>", {}, "it is neither"),
        (CLIP[: len(CLIP) // 2], {}, ""),
        (CLIP[:40], {}, ""),
        (sound, {}, "it has no video stream"),
        (lambda: encode(3, codec="mpeg2video"), {}, "its codec is mpeg2video; expected one of h264"),
        (CLIP, dict(pixels=3000), r"it has 3072 pixels, more than 3000 \(limits.pixels\)"),
        (CLIP, dict(bytes=1000), "limits.bytes"),
        (CLIP, dict(frames=29), "limits.frames"),
        (CLIP, dict(timeout_s=0.0), "limits.timeout_s"),
    ],
)
def test_bad_clips_are_named_and_masked(data, limits, reason):
    bad = data() if callable(data) else data
    options = dict(frames=3, size=16, limits=ClipLimits(**limits))
    with pytest.raises(DecodeError, match=rf"lose\[0\] could not be decoded: .*{reason}|win\[0\]") as error:
        decode_clips([CLIP], [bad], **options)
    assert any(f.arm == "lose" and f.index == 0 for f in error.value.failures)
    if not limits:
        masked = decode_clips([CLIP, CLIP], [CLIP, bad], on_error="mask", **options)
        assert masked.ok.tolist() == [True, False]
        assert not masked.pixels[[1, 3]].any()
        assert torch.equal(masked.pixels[0], decode_clips([CLIP], [CLIP], **options).pixels[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(win=CLIP), TypeError, "win is a bytes; expected a list of bytes-like objects or paths"),
        (dict(lose=[]), ValueError, "lose has 0 clips; expected 1 like win"),
        (dict(frames=0), ValueError, "frames is 0; expected an int from 1 to 65536"),
        (dict(frames=True), ValueError, "frames is True; expected an int"),
        (dict(frames=2.0), ValueError, r"frames is 2\.0; expected an int"),
        (dict(fps=True), ValueError, "fps is True; expected a number"),
        (dict(fps=np.bool_(True)), ValueError, rf"fps is {np.True_!r}; expected a number"),  # "True" before NumPy 2
        (dict(hflip="1"), ValueError, "hflip is '1'; expected a number from 0 to 1"),
        (dict(fps=0), ValueError, "fps is 0; expected a number from 0.001 to 1000"),
        (dict(start=-1), ValueError, "start is -1; expected 'center', 'random', or seconds >= 0"),
        (dict(start="end"), ValueError, "start is 'end'"),
        (dict(short="cut"), ValueError, "short is 'cut'; expected one of 'error', 'repeat', 'loop'"),
        (dict(layout="THWC"), ValueError, "layout is 'THWC'; expected one of 'CTHW', 'TCHW'"),
        (dict(dtype="yuv444"), TypeError, "dtype is 'yuv444'; expected torch.bfloat16"),
        (dict(limits=3), TypeError, "limits is a int; expected a ClipLimits"),
        (dict(threads=0), ValueError, "threads is 0"),
        (dict(seeds=[1, 2]), ValueError, "seeds has 2 numbers"),
        (dict(out=torch.zeros(1)), ValueError, r"out has shape \(1,\); expected \(2, 3, 2, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        decode_clips(**{**dict(win=[CLIP], lose=[CLIP], frames=2, size=8), **change})


def test_numbers_of_numpy_are_numbers():
    plain = decode_clips([CLIP], [CLIP], frames=2, size=8, fps=0.1 * 80, start=0.25, hflip=1, mean=0.5, std=0.25)
    limits = ClipLimits(frames=np.int64(30), timeout_s=np.float32(60), pixels=np.uint32(3072))
    assert [type(x) for x in (limits.frames, limits.timeout_s)] == [int, float]
    given = decode_clips(
        [CLIP], [CLIP], frames=np.int64(2), size=np.int32(8), fps=np.float32(8), start=np.float16(0.25),
        hflip=np.float32(1), mean=np.float32(0.5), std=[np.float64(0.25), np.float16(0.25), Fraction(1, 4)],
        background=tuple(np.full(3, 255, np.uint8)), threads=np.int64(2), limits=limits,
    )  # fmt: skip
    assert torch.equal(given.pixels, plain.pixels)
    assert torch.equal(given.times, plain.times)
    assert torch.equal(plain.times, decode_clips([CLIP], [CLIP], frames=2, size=8, fps=np.int16(8), start=0.25).times)


def test_decoded_frames_are_no_clips():
    with pytest.raises(
        TypeError, match=r"lose\[0\] is an array of shape \(3, 4\); expected a path, .*not decoded pixels"
    ):
        decode_clips([CLIP], [np.zeros((3, 4), np.float32)], frames=2, size=8)


def test_the_public_names():
    assert polydpo_fast.decode_clips is decode_clips


def test_frames_are_given_back_at_once():
    """Not when the garbage collector comes: until then each would take new memory."""

    def alive():
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    before, most = alive(), []
    gc.disable()
    try:
        clip = Clip(CLIP, ClipLimits(), True, 1, None)
        clip.index()
        for _, frame in clip.frames(clip.timeline.pts.tolist()):
            most.append(alive() - before)
            del frame
        decode_clips([CLIP], [CLIP], frames=30, size=(48, 64))
        assert alive() == before
    finally:
        gc.enable()
    assert max(most) <= 3  # PyAV has one ready, and the last packets give two
