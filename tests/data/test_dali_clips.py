"""Clips by `DaliDecoder` against the C++ decoder, on DALI's CPU operators; and which of them NVDEC is given."""

import io
import struct
import sys

import pytest
import torch

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import LEVELS, assert_same_facts

from polydpo_fast import DecodeError, decode_clips
from polydpo_fast.data.dali import clips as dali_clips
from polydpo_fast.data.dali import sides as dali_sides


@pytest.mark.parametrize(
    ("win", "lose", "options"),
    [
        ("small", "small", dict(frames=9, size=(48, 64), hflip=1.0)),
        ("small", "other", dict(frames=9, size=(40, 56), fps=12, start="random", crop="random", hflip=0.5)),
        ("small", "other", dict(frames=40, size=32, fps=24, short="loop", resize="contain")),
        ("other", "small", dict(frames=3, size=32, layout="TCHW", interpolation="bicubic")),
        ("709", "709", dict(frames=2, size=(720, 96))),
    ],
    ids=str,
)
def test_frames_are_those_of_cpp(decoder, clips, monkeypatch, win, lose, options):
    """Through DALI's VP9 decoder on the CPU. Its 8-bit RGB is rounded, and clipped before it is resized: 24 levels
    at edges of saturated colours, 37 beyond BT.601's; on average a quarter of a level, and of BT.709 less than 2.
    The next frame is 3 levels away on average, another mirror or crop more."""
    asked = []
    for way in ("decode_clips", "decode_timed"):
        plain = getattr(dali_clips, way)
        monkeypatch.setattr(dali_clips, way, lambda *a, f=plain, **o: asked.append(o["frames"]) or f(*a, **o))
    arms = [clips[win]], [clips[lose]]
    a = decode_clips(*arms, seeds=[3], **LEVELS, **options)
    b = decoder.decode_clips(*arms, seeds=[3], **LEVELS, **options)
    assert_same_facts(a, b, "times", "concealed")
    assert (a.matrix, a.full_range) == (b.matrix, b.full_range)
    apart = (a.pixels - b.pixels).abs()
    assert apart.mean() < (2 if win == "709" else 0.4)
    assert apart.max() < 40
    assert asked == [1, 1]  # the canary alone, at the first frame and the last


def test_paths_and_failures(decoder, clips, tmp_path):
    path = tmp_path / "clip.webm"
    path.write_bytes(clips["small"])
    win, lose = [path, clips["small"], b"no clip"], [clips["other"], path, path]
    a = decode_clips(win, lose, frames=3, size=32, on_error="mask")
    b = decoder.decode_clips(win, lose, frames=3, size=32, on_error="mask")
    assert_same_facts(a, b, "times")
    assert b.ok.tolist() == [True, True, False]
    with pytest.raises(DecodeError, match=r"win\[0\].* it ends after"):
        decoder.decode_clips([path], [path], frames=31, size=32)


def muxed(*clips, sizes, default=0):
    """Streams of VP9 in one WebM, under headers that tell those sizes."""
    import av
    from av.stream import Disposition

    file = io.BytesIO()
    with av.open(file, "w", format="webm") as output:
        streams, packets = [], []
        for number, (clip, (height, width)) in enumerate(zip(clips, sizes, strict=True)):
            stream = output.add_stream("libvpx-vp9", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
            with av.open(io.BytesIO(clip)) as opened:
                packets += [(p.pts * p.time_base, number, p.pts, p.time_base, p.is_keyframe, bytes(p))
                            for p in opened.demux(video=0) if p.size]  # fmt: skip
        for _, number, pts, unit, is_keyframe, data in sorted(packets, key=lambda p: p[:2]):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = streams[number], unit, is_keyframe
            packet.pts = packet.dts = pts
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("form", ["two streams", "header"])
def test_clips_of_which_dali_would_show_something_else_are_for_cpp(decoder, clips, form):
    from clip_oracle import encode

    plain = {"auto-alt-ref": "0", "lag-in-frames": "0"}
    one = encode(count=16, codec="libvpx-vp9", container="webm", **plain)
    other = encode(count=16, height=96, width=80, codec="libvpx-vp9", container="webm", **plain)
    if form == "header":
        clip = muxed(one, sizes=[(96, 128)])
    else:
        clip = muxed(one, other, sizes=[(48, 64), (96, 80)], default=1)
    options = dict(frames=3, size=(40, 40), **LEVELS)
    a = decode_clips([clip], [one], **options)
    b = decoder.decode_clips([clip], [one], **options)
    assert_same_facts(a, b, "times")
    assert torch.equal(a.pixels, b.pixels)


def test_without_pyav_the_extra_is_named(decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install 'polydpo-fast\[video\]'"):
        decoder.decode_clips([b""], [b""], frames=2, size=32)


def test_clips_have_their_time(decoder, clips):
    from polydpo_fast import ClipLimits

    late = ClipLimits(timeout_s=1e-9)
    got = decoder.decode_clips([clips["small"]], [clips["small"]], frames=2, size=32, limits=late, on_error="mask")
    assert "limits.timeout_s" in got.errors[0].reason


def test_frames_that_are_asked_for_twice_are_decoded_once(decoder, clips, monkeypatch):
    """For each of them DALI begins again."""
    asked, run = [], decoder._engine.run
    monkeypatch.setattr(decoder._engine, "run", lambda *a: asked.append(a[3]["frames"][0].tolist()) or run(*a))
    options = dict(frames=24, size=(48, 64), fps=48, start=0.4, short="repeat", dtype=torch.uint8)
    a = decode_clips([clips["small"]], [clips["small"]], **options)
    b = decoder.decode_clips([clips["small"]], [clips["small"]], **options)
    assert asked == [[*range(9, 22)]] * 2
    assert torch.equal(a.times, b.times)
    # The frame beside it is three levels away.
    assert (a.pixels.float() - b.pixels.float()).abs().mean(dim=(0, 1, 3, 4)).max() < 0.8


def side_of(clip, is_gpu, strict=True):
    from polydpo_fast import ClipLimits
    from polydpo_fast.video import Clip

    return dali_sides._open_clip(clip, Clip(clip, ClipLimits(), strict, 1, None), is_gpu)


def test_frames_that_dali_does_not_find_are_not_black(decoder, clips, monkeypatch):
    side = side_of(clips["small"], False)
    with pytest.raises(RuntimeError, match="frame index 30"):
        dali_clips._frames(decoder._engine, side, torch.tensor([0, 30]).numpy())
    monkeypatch.setattr(dali_clips, "_MOST_BYTES", 3 * 48 * 64)
    with pytest.raises(ValueError, match="memory"):
        dali_clips._frames(decoder._engine, side, torch.tensor([0, 1]).numpy())


def test_a_clip_that_is_cut_off_is_told(decoder, clips):
    """Without strict=True it is decoded, by C++, which counts what is concealed."""
    cut = clips["small"][: len(clips["small"]) * 3 // 4]
    options = dict(frames=3, size=32, start=0.0, strict=False)
    a, b = decode_clips([cut], [cut], **options), decoder.decode_clips([cut], [cut], **options)
    for found in (a, b):
        assert torch.equal(found.concealed, torch.tensor([1, 1]))  # numbers, not flags
    assert torch.equal(a.pixels, b.pixels)


def with_size(clip, height, width):
    """The header of an MP4 tells another size than the stream."""
    at = clip.index(b"stsd") + 12 + 32
    return clip[:at] + struct.pack(">HH", width, height) + clip[at + 4 :]


def test_what_nvdec_is_given():
    """What NVDEC decodes of VP9, AV1 and fields DALI would count wrongly; other sizes it would take for those told."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode, joined

    repeated = {"x264-params": "repeat-headers=1", "bf": "0"}
    changing = [encode(4, width=width, container="matroska", **repeated) for width in (64, 80)]
    late = [(1 << 31) * 600 // 1000 + 1 - 25 * k for k in (3, 2, 1)]  # milliseconds of 32 bits end after the last
    for number, (clip, is_plain) in enumerate(
        (
            (encode(count=4), True),
            (encode(count=4, codec="libx265"), True),
            (encode(count=4, **repeated), True),
            (encode(count=4, codec="libvpx-vp9"), False),
            (encode(count=4, **{"x264-params": "tff=1"}), False),
            (encode(count=4, **{"x264-params": "fake-interlaced=1"}), False),
            (joined(*changing, container="matroska"), False),
            (joined(changing[0], changing[0], container="matroska"), True),
            (encode(3, ticks=late, container="matroska"), True),
            (encode(4, ticks=[*late, late[-1] + 25], container="matroska"), False),
            *((with_size(encode(4, codec=codec), 48, 64), True) for codec in ("libx264", "libx265")),
            *((with_size(encode(4, codec=codec), 96, 128), False) for codec in ("libx264", "libx265")),
        )
    ):
        assert side_of(clip, True).is_plain == is_plain, number


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_nvdec_is_given_no_size_for_which_dali_has_the_decoder_of_another(monkeypatch, codec):
    """It looks for decoders by the coded size, and keeps them by the one that is shown."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode

    monkeypatch.setattr(dali_sides, "_whole", set())
    whole, less, other = (encode(4, height=height, codec=codec) for height in (48, 42, 58))
    assert [side_of(clip, True).is_plain for clip in (less, whole, less, whole, other)] == [
        True,
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colours_are_exact_within_autocast(dtype):
    levels = (255 * torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = dali_clips._recoloured(levels)
    exact = levels.double() @ torch.from_numpy(dali_clips._TO_709).T
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4  # float32 of some hundred levels, three products


def test_h264_needs_a_gpu(decoder, clips):
    with pytest.raises(ValueError, match=r"codec is h264, and DALI's CPU build decodes VP8 and VP9 only; .*'cpp'"):
        decoder.decode_clips([clips["small"]], [clips["h264"]], frames=3, size=32)
