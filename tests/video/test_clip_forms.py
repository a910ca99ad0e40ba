"""`decode_clips`: planes as they are stored, and pixels that are not square."""

import io
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from clip_oracle import ALL, assert_frames, av, encode, full_decode, index_folder, joined, rgb, without_range  # noqa: F401

from polydpo_fast import ClipLimits, DecodeError, decode_clips, yuv420_to_rgb
from polydpo_fast.data.dali import sides as dali_sides
from polydpo_fast.video import Clip

CLIP = encode(12, 48, 64)
COLOURS = {  # x264's and FFmpeg's names, and ours
    ("bt709", "tv"): ("bt709", False),
    ("bt709", "pc"): ("bt709", True),
    ("smpte170m", "tv"): ("bt601", False),
    ("bt2020nc", "tv"): ("bt2020", False),
    ("bt2020nc", "pc"): ("bt2020", True),
}


def planes_of(frame):
    """(H * 3 / 2, W) of a frame of 8-bit 4:2:0 with even sides."""
    h, w = frame.height, frame.width
    parts = []
    for plane, shape in zip(frame.planes, [(h, w), (h // 2, w // 2), (h // 2, w // 2)], strict=True):
        rows = np.frombuffer(plane, np.uint8)[: plane.line_size * shape[0]].reshape(shape[0], plane.line_size)
        parts.append(rows[:, : shape[1]].ravel())
    return torch.from_numpy(np.concatenate(parts).reshape(h * 3 // 2, w))


def to_rgb(batch, **options):
    return yuv420_to_rgb(
        batch.pixels,
        matrix=batch.matrix,
        full_range=batch.full_range,
        siting="left",
        flip=batch.flipped.repeat(2),
        dtype=torch.uint8,
        **options,
    )


@pytest.mark.parametrize("codec", [*ALL, "libvpx"])
def test_planes_are_those_that_are_stored(codec):
    data = encode(9, codec=codec, container="matroska")
    stored = torch.stack([planes_of(frame) for _, frame in full_decode(data)])
    batch = decode_clips([data], [data], frames=14, size=(48, 64), start=0.0, short="loop", dtype="yuv420")
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (2, 14, 72, 64)
    assert torch.equal(batch.pixels[0], torch.cat((stored, stored[:5])))
    out = torch.zeros_like(batch.pixels)
    again = decode_clips([data], [data], frames=14, size=(48, 64), start=0.0, short="loop", dtype="yuv420", out=out)
    assert again.pixels is out
    assert torch.equal(out, batch.pixels)


@pytest.mark.parametrize("colours", COLOURS)
def test_planes_become_the_pixels_of_the_normal_path(colours):
    matrix, full_range = colours
    options = {"x264-params": f"colormatrix={matrix}"}
    data = encode(4, pixels="yuvj420p" if full_range == "pc" else "yuv420p", **options)
    pixels = decode_clips([data], [data], frames=4, size=(48, 64), dtype=torch.uint8)
    batch = decode_clips([data], [data], frames=4, size=(48, 64), dtype="yuv420")
    assert (batch.matrix, batch.full_range) == ((COLOURS[colours][0],) * 2, (COLOURS[colours][1],) * 2)
    assert (pixels.matrix, pixels.full_range) == (batch.matrix, batch.full_range)
    # Both round once; they differ where the last bits of the factors tip it.
    assert (to_rgb(batch).int() - pixels.pixels).abs().max() <= 1
    assert_frames(to_rgb(batch)[0], [frame for _, frame in full_decode(data)])


def test_crops_and_mirrors_of_planes_are_those_of_pixels_up_to_an_even_corner():
    """Interior pixels: at the border of a crop the chroma beyond it is missing."""
    win, lose = CLIP, encode(12, 60, 80, **{"x264-params": "colormatrix=bt709"})
    seen = set()
    for seed in range(12):
        options = dict(frames=3, size=(30, 36), resize=None, crop="random", hflip=0.5, seeds=[seed])
        batch = decode_clips([win], [lose], dtype="yuv420", **options)
        made = to_rgb(batch)
        assert batch.matrix == ("bt601", "bt709")
        flip = bool(batch.flipped[0])
        for row, data in enumerate((win, lose)):
            top, left = batch.crop_top_left[row].tolist()
            shape, start = batch.original_size[row].tolist(), batch.times[0, 0].item()
            whole = decode_clips(
                [data], [data], frames=3, size=shape, start=start, hflip=float(flip), dtype=torch.uint8
            )
            cut = whole.pixels[0, :, :, top + 2 : top + 28, left + 2 : left + 34]
            assert (made[row, :, :, 2:28, 2:34].int() - cut).abs().max() <= 1
            assert top % 2 == 0
            stored_left = batch.original_size[row, 1].item() - 36 - left if flip else left
            assert stored_left % 2 == 0
            seen.add((flip, top, left))
    assert len(seen) > 12


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (dict(pixels="yuv420p10le", codec="libx265"), {}, "its pixels are yuv420p10le; expected 8-bit 4:2:0"),
        (dict(pixels="yuv444p"), {}, "its pixels are yuv444p; expected 8-bit 4:2:0"),
        (dict(), dict(size=(24, 32)), "would have to be resized"),
        (dict(), dict(size=(60, 64), resize="contain"), "would have to be resized or padded"),
        (dict(aspect="4/3"), {}, "would have to be resized"),
    ],
)
def test_what_has_no_such_planes_fails(data, options, reason):
    bad = encode(3, **data)
    with pytest.raises(DecodeError) as error:
        decode_clips([CLIP], [bad], **{**dict(frames=2, size=(48, 64), dtype="yuv420"), **options})
    failure = error.value.failures[-1]
    assert (failure.arm, failure.index) == ("lose", 0)
    assert reason in failure.reason


def with_colours(data, entry, matrix, full_range):
    """The MP4 with a box of colours in its description of samples, which is of that type."""
    at = data.index(entry, data.index(b"stsd")) - 4
    box = struct.pack(">I4s4sHHHB", 19, b"colr", b"nclx", matrix, 2, matrix, 128 * full_range)
    result = bytearray(data)
    for place in [at, *(data.rindex(name) - 4 for name in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"))]:
        result[place : place + 4] = struct.pack(">I", int.from_bytes(data[place : place + 4], "big") + len(box))
    end = at + int.from_bytes(data[at : at + 4], "big")
    return bytes(result[:end] + box + result[end:])


@pytest.mark.parametrize(
    ("codec", "entry", "ranged"),
    [("libx265", b"hev1", True), ("libvpx-vp9", b"vp09", False), ("libsvtav1", b"av01", False)],
)
@pytest.mark.parametrize(("matrix", "name"), [(1, "bt709"), (9, "bt2020")])
def test_colours_are_the_containers_where_the_stream_tells_none(codec, entry, ranged, matrix, name):
    """The range too in HEVC; VP9 and AV1 always tell it."""
    plain = encode(4, codec=codec)
    data = with_colours(without_range(plain) if ranged else plain, entry, matrix, True)
    batch = decode_clips([data], [data], frames=4, size=(48, 64), dtype=torch.uint8)
    assert (batch.matrix, batch.full_range) == ((name,) * 2, (ranged,) * 2)
    frames = [frame for _, frame in full_decode(plain)]
    for frame in frames:
        frame.colorspace, frame.color_range = matrix, 2 if ranged else 1
    assert_frames(batch.pixels[0], frames)
    planes = decode_clips([data], [data], frames=4, size=(48, 64), dtype="yuv420")
    assert (planes.matrix, planes.full_range) == (batch.matrix, batch.full_range)
    side = dali_sides._open_clip(data, Clip(data, ClipLimits(), True, 1, None), codec == "libx265")
    assert side.bt709 == (matrix == 1)
    assert not (side.is_plain and (ranged or matrix == 9))


@pytest.mark.parametrize(
    ("codec", "entry", "options", "name"),
    [
        ("libx265", b"hev1", {}, "bt709"),  # which tells its range alone
        ("libvpx-vp9", b"vp09", {"colorspace": "bt2020nc"}, "bt2020"),
    ],
)
def test_the_streams_colours_come_before_the_containers(codec, entry, options, name):
    plain = encode(4, codec=codec, **options)
    data = with_colours(plain, entry, 1, True)
    batch = decode_clips([data], [data], frames=4, size=(48, 64), dtype=torch.uint8)
    assert (batch.matrix, batch.full_range) == ((name,) * 2, (False,) * 2)
    frames = [frame for _, frame in full_decode(plain)]
    for frame in frames:
        frame.colorspace, frame.color_range = {"bt709": 1, "bt2020": 9}[name], 1
    assert_frames(batch.pixels[0], frames)


def test_colours_of_webm():
    """VP9 that tells none, under a header that tells BT.709."""
    file, plain = io.BytesIO(), encode(2, codec="libvpx-vp9", container="webm")
    with av.open(file, "w", format="webm") as output, av.open(io.BytesIO(plain)) as source:
        stream = output.add_stream_from_template(source.streams.video[0])
        stream.codec_context.colorspace = 1
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    batch = decode_clips([file.getvalue()], [plain], frames=2, size=(48, 64), dtype=torch.uint8)
    assert batch.matrix == ("bt709", "bt601")
    frames = [frame for _, frame in full_decode(plain)]
    for frame in frames:
        frame.colorspace = 1
    assert_frames(batch.pixels[0], frames)


def test_planes_mean_one_thing():
    """Frames of pixels are each converted by their own flags; of planes one matrix is told."""
    parts = [encode(8, codec="libvpx-vp9", container="webm", colorspace=name) for name in ("bt709", "smpte170m")]
    data = joined(*parts)
    whole = [frame for _, frame in full_decode(data)]
    assert {frame.colorspace for frame in whole} == {1, 6}
    options = dict(size=(48, 64), start=0.0)
    assert_frames(decode_clips([data], [data], frames=16, dtype=torch.uint8, **options).pixels[0], whole)
    assert decode_clips([data], [data], frames=8, dtype="yuv420", **options).matrix == ("bt709",) * 2
    with pytest.raises(DecodeError, match=r"YCbCr means changes from \('bt709', False\) to \('bt601', False\)"):
        decode_clips([data], [data], frames=16, dtype="yuv420", **options)


def test_odd_sides_have_no_planes():
    with pytest.raises(ValueError, match=r"size is \(48, 63\); expected even sides for dtype='yuv420'"):
        decode_clips([CLIP], [CLIP], frames=2, size=(48, 63), dtype="yuv420")


# ------------------------------------------------------------------------------------------------ pixel aspect


def resized(levels, height, width):
    """(3, H, W) levels, bilinear, where it is only ever enlarged: then no filter is widened."""
    _, h, w = levels.shape
    y = np.clip((np.arange(height) + 0.5) * h / height - 0.5, 0, h - 1)
    x = np.clip((np.arange(width) + 0.5) * w / width - 0.5, 0, w - 1)
    tall = np.stack([[np.interp(y, np.arange(h), column) for column in plane.T] for plane in levels])
    return np.stack([[np.interp(x, np.arange(w), row) for row in plane.T] for plane in tall])


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(("aspect", "width"), [("4/3", 85), ("8/9", 57), ("2/1", 128), ("1/1", 64)])
def test_frames_are_shown_in_their_shape(container, aspect, width):
    data, shown = encode(3, aspect=aspect, container=container), (48, width)
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.video[0].sample_aspect_ratio == Fraction(aspect)
    whole = decode_clips([data], [data], frames=3, size=shown, dtype=torch.uint8)
    assert whole.original_size[0].tolist() == list(shown)
    assert whole.crop_top_left[0].tolist() == [0, 0]
    if shown[1] >= 64:
        expected = resized(rgb(full_decode(data)[1][1]), *shown)
        # Pixels are rounded before they are resized and after.
        assert np.abs(whole.pixels[0, :, 1].numpy() - expected).max() <= 1.1


def test_cover_and_contain_keep_the_shape_that_is_shown():
    data, square = encode(3, aspect="2/1"), encode(3, 48, 128)
    cover = decode_clips([data], [square], frames=1, size=(96, 96), dtype=torch.uint8)
    assert cover.original_size.tolist() == [[48, 128]] * 2
    assert cover.crop_top_left.tolist() == [[0, 80]] * 2
    contain = decode_clips([data], [square], frames=1, size=(96, 128), resize="contain", dtype=torch.uint8)
    for row in range(2):  # 48 rows in the middle of 96
        is_white = (contain.pixels[row, :, 0] == 255).all(dim=0).all(dim=1)
        assert is_white.nonzero().flatten().tolist() == [*range(24), *range(72, 96)]


def test_stretch_looks_at_no_shape():
    data = encode(3, aspect="2/1")
    stretched = decode_clips([data], [data], frames=3, size=(48, 64), resize="stretch", dtype=torch.uint8)
    assert_frames(stretched.pixels[0], [frame for _, frame in full_decode(data)])
    planes = decode_clips([data], [data], frames=3, size=(48, 64), resize="stretch", dtype="yuv420")
    assert torch.equal(planes.pixels[0, 0], planes_of(full_decode(data)[0][1]))


def test_crops_alone_need_square_pixels():
    data = encode(3, aspect="4/3")
    with pytest.raises(DecodeError, match=r"its pixels are 1\.333 times as wide as high, and resize is None"):
        decode_clips([data], [data], frames=1, size=32, resize=None)
    assert decode_clips([CLIP], [CLIP], frames=1, size=32, resize=None).ok.all()


@pytest.mark.parametrize(("aspect", "text"), [("17/1", "17"), ("1/17", "0.05882")])
def test_other_aspects_are_refused(aspect, text):
    data = encode(3, aspect=aspect)
    with pytest.raises(DecodeError, match=f"its pixels are {text} times as wide as high; expected 1/16 to 16"):
        decode_clips([data], [data], frames=1, size=32)


def test_a_shape_of_pixels_that_changes_is_refused():
    """Or it would depend on where decoding begins."""
    square, wide = (encode(16, aspect=a, **{"x264-params": "repeat-headers=1:keyint=8:bframes=0"}) for a in (1, 2))
    file = io.BytesIO()
    with av.open(io.BytesIO(square)) as a, av.open(io.BytesIO(wide)) as b, av.open(file, "w", format="matroska") as out:
        stream = out.add_stream_from_template(a.streams.video[0])
        for source, shift in ((a, 0), (b, 16 * 512)):
            for packet in source.demux(video=0):
                if packet.pts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    out.mux(packet)
    options = dict(size=32, dtype=torch.uint8)
    assert decode_clips([file.getvalue()], [wide], frames=8, start=0.0, **options).original_size[0].tolist() == [48, 64]
    with pytest.raises(
        DecodeError, match=r"its frames change from .*1\.0\) to .*2\.0\) \(width, height, orientation, aspect"
    ):
        decode_clips([file.getvalue()], [wide], frames=30, start=0.0, short="repeat", **options)


@pytest.mark.parametrize(("codec", "box", "form"), [("libx265", b"hvcC", b"hev1"), ("libx264", b"avcC", b"avc3")])
def test_chroma_lies_where_parameters_among_the_packets_say(codec, box, form):
    """As in files whose header has none: what is decoded is the same."""
    told = {"libx265": "x265-params", "libx264": "x264-params"}[codec]
    data = encode(4, codec=codec, **{told: "repeat-headers=1:chromaloc=2" + ":log-level=none" * (codec == "libx265")})
    at = data.index(box) + 4
    untold = bytearray(data)
    if codec == "libx265":
        untold[at + 22] = 0  # arrays of parameters
        untold = bytes(untold).replace(b"hvc1", form, 1)
    else:
        untold[at + 5 : at + 7] = b"\xe0\x00"
        untold = bytes(untold).replace(b"avc1", form, 1)
    assert untold != data
    options = dict(frames=4, start=0.0, size=(48, 64), dtype=torch.uint8)
    assert torch.equal(
        decode_clips([untold], [data], **options).pixels[0], decode_clips([data], [data], **options).pixels[0]
    )
    plain = encode(4, codec=codec, **{told: "repeat-headers=1" + ":log-level=none" * (codec == "libx265")})
    assert not torch.equal(
        decode_clips([untold], [data], **options).pixels[0], decode_clips([plain], [plain], **options).pixels[0]
    )
