"""Where pixels of `decode_pairs` come from, against Pillow: resize, crop, mirror, EXIF orientation; what is drawn."""

import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_oracle import ENCODINGS, chunk, exif, file, jpeg, levels_apart, picture, pillow_pixels, png, segment
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from splitmix import outputs

from polydpo_fast import decode_pairs


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(1, 90))
def test_crop_corner_is_torchvisions(height, width, out_height, out_width):
    data = jpeg(Image.new("RGB", (width, height)))
    decoded = decode_pairs([data], [data], size=(out_height, out_width), dtype=torch.uint8)
    if out_height * width >= out_width * height:
        h, w = out_height, max(out_width, width * out_height // height)
    else:
        h, w = max(out_height, height * out_width // width), out_width
    assert decoded.crop_top_left[0].tolist() == [round((h - out_height) / 2), round((w - out_width) / 2)]
    assert decoded.original_size[0].tolist() == [height, width]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (300, 41), (17, 500), (1, 1), (401, 211)])
@pytest.mark.parametrize("size", [64, (31, 97), 1])
def test_every_resize_is_pillows(interpolation, resize, shape, size):
    """Pillow rounds to 8 bits between its two passes and at the end, we only at the end: at most one level."""
    data = jpeg(picture(*shape))
    decoded = decode_pairs(
        [data], [data], size=size, resize=resize, interpolation=interpolation, dtype=torch.uint8, background=(9, 9, 9)
    )
    expected = pillow_pixels(data, size, resize, interpolation, background=9)
    assert levels_apart(decoded.pixels[0], expected) <= 1


@given(data=st.data())
def test_bicubic_overshoot_is_clamped_between_the_passes(data):
    """Black and white noise, of which the filter leaves 0..255: Pillow's bytes cannot, so neither do ours. Which pass
    is the first shows then, by up to 28 levels: of the upright image the same, however it is stored.
    """
    draw = data.draw
    shape = draw(st.tuples(st.integers(1, 120), st.integers(1, 120)))
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, (*shape, 3), dtype=np.uint8)
    image = png(Image.fromarray(noise * 255), exif=exif(draw(st.integers(1, 8)))[6:])
    size = draw(st.tuples(st.integers(1, 120), st.integers(1, 120)))
    options = dict(resize=draw(st.sampled_from(["cover", "contain", "stretch"])), interpolation="bicubic")
    decoded = decode_pairs([image], [image], size=size, dtype=torch.uint8, **options)
    expected = pillow_pixels(image, size, **options, corner=tuple(decoded.crop_top_left[0].tolist()))
    assert levels_apart(decoded.pixels[0], expected) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [dict(), dict(hflip=1.0), dict(resize=None), dict(resize="contain")], ids=str)
@pytest.mark.parametrize("byte_order", "<>")
def test_exif_orientation(orientation, options, byte_order):
    data = jpeg(picture(61, 83), exif=exif(orientation, byte_order))
    decoded = decode_pairs([data], [data], size=(40, 32), dtype=torch.uint8, **options)
    expected = pillow_pixels(data, (40, 32), options.get("resize", "cover"), flip="hflip" in options)
    assert levels_apart(decoded.pixels[0], expected) <= 1
    assert decoded.original_size[0].tolist() == ([61, 83] if orientation < 5 else [83, 61])
    ignored = decode_pairs([data], [data], size=(40, 32), dtype=torch.uint8, exif="ignore", **options).pixels
    plain = decode_pairs(
        [jpeg(picture(61, 83))] * 1, [data], size=(40, 32), dtype=torch.uint8, exif="ignore", **options
    )
    assert torch.equal(ignored, plain.pixels)


def raw_profile(data):
    """As ImageMagick writes it."""
    digits = data.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return f"\nexif\n{len(data):8}\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("before", "strict"),
    [
        (b"\xff\xff\xff", True),  # fill bytes
        (b"\xff\x01", True),  # a marker that has no body
        (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), True),
        (segment(0xE1, b"") + segment(0xE1, b"Exif\0\0"), True),
        (segment(0xFE, segment(0xE1, exif(6))), True),  # EXIF in a comment is a comment
        (segment(0xFE, b"") + b"\0\xff\0garbage", False),
    ],
)
def test_exif_of_a_jpeg_is_its_first_segment_that_is_one(before, strict):
    image = jpeg(picture(61, 83))
    both = image[:2] + before + segment(0xE1, exif(8)) + segment(0xE1, exif(3)) + image[2:]
    decoded = decode_pairs([both], [jpeg(picture(61, 83), exif=exif(8))], size=(40, 32), strict=strict)
    assert torch.equal(decoded.pixels[0], decoded.pixels[1])


@pytest.mark.parametrize("compressed", [False, True])
def test_exif_in_a_text_of_a_png(compressed):
    image = picture(61, 83)
    for orientation in range(1, 9):
        texts = PngInfo()
        texts.add_text("Software", "somebody's")
        texts.add_text("Raw profile type exif", raw_profile(exif(orientation)), zip=compressed)
        data, both = png(image, pnginfo=texts), png(image, pnginfo=texts, exif=exif(3)[6:])
        decoded = decode_pairs([data], [both], size=(40, 32), dtype=torch.uint8).pixels
        assert levels_apart(decoded[0], pillow_pixels(data, (40, 32))) <= 1
        # A chunk for EXIF says more than a text.
        assert levels_apart(decoded[1], pillow_pixels(png(image, exif=exif(3)[6:]), (40, 32))) <= 1


@pytest.mark.parametrize("times", [0, 1])
def test_exif_of_a_png_may_begin_as_that_of_a_jpeg(times):
    """Pillow writes it without, and reads it with."""
    plain = png(picture(61, 83))
    for orientation in range(1, 9):
        body = exif(orientation).removeprefix(b"Exif\0\0")
        data = plain[:33] + chunk(b"eXIf", b"Exif\0\0" * times + body) + plain[33:]
        decoded = decode_pairs([data], [data], size=(40, 32), dtype=torch.uint8).pixels
        assert levels_apart(decoded[0], pillow_pixels(data, (40, 32))) <= 1


@pytest.mark.parametrize(
    "text", ["", "\n\n", "\nexif\n  20\n", "\nexif\n  3\n4578z", "\nexif\n  3\n456", "9" * 300_000]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_texts_that_hold_no_exif_turn_nothing(text, compressed):
    texts = PngInfo()
    texts.add_text("Raw profile type exif", text, zip=compressed)
    plain, data = png(picture(20, 30)), png(picture(20, 30), pnginfo=texts)
    decoded = decode_pairs([plain], [data], size=16, dtype=torch.uint8).pixels
    assert torch.equal(decoded[0], decoded[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_turned_images_in_every_dtype(dtype):
    data, turned = (jpeg(picture(61, 83), exif=exif(o)) for o in (1, 8))
    upright = decode_pairs([data], [turned], size=48, resize="stretch", dtype=dtype).pixels
    assert torch.equal(upright[1], upright[0].rot90(1, (1, 2)))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_crop_inside_the_decoder_is_the_crop_of_the_whole(encoding):
    """Bit for bit, wherever it lies, though upsampling looks at neighbours and blocks are 8 or 16 wide."""
    data = jpeg(picture(150, 210), **encoding)
    whole = decode_pairs([data], [data], size=(150, 210), resize=None, dtype=torch.uint8).pixels[0]
    seeds = list(range(24))
    for size in [(150, 20), (20, 210), (33, 47), (1, 1)]:
        cut = decode_pairs(
            [data] * 24, [data] * 24, size=size, resize=None, crop="random", seeds=seeds, dtype=torch.uint8
        )
        assert len({tuple(corner.tolist()) for corner in cut.crop_top_left}) > 10
        for pixels, (top, left) in zip(cut.pixels, cut.crop_top_left.tolist(), strict=True):
            assert torch.equal(pixels, whole[:, top : top + size[0], left : left + size[1]])


def test_crop_and_mirror_are_drawn_once_per_pair():
    """The arms differ in size and format; a gradient shows where they were cut."""
    y, x = np.mgrid[:96, :96] * 2
    image = Image.fromarray(np.stack([y, x, 0 * x], axis=-1).astype(np.uint8))
    win, lose = png(image), png(image.resize((192, 192), Image.Resampling.NEAREST))
    options = dict(size=48, resize=None, crop="random", hflip=0.5, seeds=list(range(200)), dtype=torch.uint8)
    decoded = decode_pairs([win] * 200, [win] * 200, **options)
    assert torch.equal(decoded.pixels[:200], decoded.pixels[200:])
    assert 70 <= decoded.flipped.sum() <= 130
    corners = decoded.crop_top_left[:200]
    assert corners.min() == 0
    assert corners.max() == 48
    for pixels, (top, left), flip in zip(decoded.pixels, corners.tolist(), decoded.flipped.tolist(), strict=False):
        assert levels_apart(pixels, pillow_pixels(win, 48, None, corner=(top, left), flip=flip)) == 0
    mixed = decode_pairs([win] * 200, [lose] * 200, **options)
    relative = mixed.crop_top_left.double() / torch.tensor([[49.0], [145.0]]).repeat_interleave(200, 0)
    assert (relative[:200] - relative[200:]).abs().max() < 1 / 49  # the same fraction, rounded down to whole places
    assert torch.equal(mixed.flipped, decoded.flipped)


def test_the_three_draws_of_a_pair_are_independent():
    image = jpeg(Image.new("L", (64, 64)))
    drawn = decode_pairs(
        [image] * 2000, [image] * 2000, size=8, resize=None, crop="random", hflip=0.5, seeds=range(2000)
    )
    numbers = torch.cat((drawn.crop_top_left[:2000], drawn.flipped[:, None]), dim=1).double().T
    correlation = torch.corrcoef(numbers) - torch.eye(3)
    assert correlation.abs().max() < 0.1  # of 2000 independent draws 0.02 is usual


def test_corners_of_planes_are_even_and_equally_likely():
    image = jpeg(Image.new("RGB", (37, 34)))
    drawn = decode_pairs(
        [image] * 3000,
        [image] * 3000,
        size=32,
        resize=None,
        crop="random",
        hflip=0.5,
        seeds=range(3000),
        dtype="yuv420",
    )
    tops, lefts = drawn.crop_top_left[:3000].T
    assert set(tops.tolist()) == {0, 2}
    assert 1400 < (tops == 0).sum() < 1600
    stored = torch.where(drawn.flipped, 37 - 32 - lefts, lefts)
    assert [900 < (stored == left).sum() < 1100 for left in (0, 2, 4)] == [True] * 3


def test_what_is_drawn_for_a_seed_stays_what_it_was():
    """Its first numbers: the corner's row and column, as parts of the room that there is, and the mirror."""
    data, seeds = jpeg(picture(40, 60)), [0, 1, 1234567, -1, 2**80, 2**64 - 1, *range(50, 80)]
    got = decode_pairs(
        [data] * len(seeds), [data] * len(seeds), size=(8, 16), resize=None, crop="random", hflip=0.3, seeds=seeds
    )
    drawn = [outputs(seed, 3) for seed in seeds]
    corners = [[(row >> 32) * 33 >> 32, (column >> 32) * 45 >> 32] for row, column, _ in drawn]
    assert got.crop_top_left.tolist() == corners * 2
    assert got.flipped.tolist() == [(mirror >> 11) * 2.0**-53 < 0.3 for *_, mirror in drawn]


def test_draws_depend_on_the_seed_alone():
    data = jpeg(picture(64, 96))
    options = dict(size=32, crop="random", hflip=0.5, dtype=torch.uint8)
    seeds = [5, -1, 2**80, 5]
    together = decode_pairs([data] * 4, [data] * 4, seeds=seeds, **options).pixels
    assert torch.equal(together[0], together[3])
    for seed, pixels in zip([torch.tensor([5]), *([x] for x in seeds[1:])], together, strict=False):
        assert torch.equal(decode_pairs([data], [data], seeds=seed, **options).pixels[0], pixels)
    torch.manual_seed(3)
    first = decode_pairs([data] * 9, [data] * 9, **options)
    torch.manual_seed(3)
    assert torch.equal(decode_pairs([data] * 9, [data] * 9, **options).pixels, first.pixels)
    assert len({tuple(x) for x in first.crop_top_left.tolist()}) > 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_oriented_tiffs_are_turned_once(orientation):
    """Pillow turns these by itself when they are loaded, and no other format."""
    image = picture(31, 45)
    tags = Image.Exif()
    tags[0x0112] = orientation
    tiff = file(image, "TIFF", compression="tiff_lzw", exif=tags.tobytes())
    same = png(image, exif=exif(orientation)[6:])
    for mode in ("apply", "ignore"):
        decoded = decode_pairs([tiff], [same], size=24, dtype=torch.uint8, exif=mode)
        assert torch.equal(decoded.pixels[0], decoded.pixels[1])
        assert decoded.original_size[0].tolist() == decoded.original_size[1].tolist()


def test_an_orientation_may_be_a_long():
    tag = struct.pack("<HHII", 0x0112, 4, 1, 6)
    long = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + tag + b"\0\0\0\0"
    turned = decode_pairs([jpeg(picture(30, 50), exif=long)], [jpeg(picture(30, 50), exif=exif(6))], size=16)
    assert torch.equal(turned.pixels[0], turned.pixels[1])
    odd = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + struct.pack("<HHIHH", 0x0112, 3, 2, 6, 0)
    plain = decode_pairs([jpeg(picture(30, 50), exif=odd + b"\0\0\0\0")], [jpeg(picture(30, 50))], size=16)
    assert torch.equal(plain.pixels[0], plain.pixels[1])  # of two values none is meant


def test_orientation_is_of_exif_alone():
    """In JPEG and PNG that of XMP is not looked for: nor where Pillow would."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = file(picture(30, 50), "WEBP", xmp=xmp)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6
    assert decode_pairs([data], [data], size=8).original_size.tolist() == [[30, 50]] * 2


@given(data=st.data())
def test_any_geometry_is_pillows(data):
    """Sizes, orientation, resize, filter, crop, mirror, mixed at random; the arms differ in size."""
    draw = data.draw
    shapes = [draw(st.tuples(st.integers(1, 90), st.integers(1, 90))) for _ in range(2)]
    images = [
        png(picture(*shape), exif=exif(draw(st.integers(1, 8)))[6:])
        if draw(st.booleans())
        else jpeg(picture(*shape), subsampling=draw(st.integers(0, 2)), exif=exif(draw(st.integers(1, 8))))
        for shape in shapes
    ]
    size = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    options = dict(
        resize=draw(st.sampled_from(["cover", "contain", "stretch"])),
        interpolation=draw(st.sampled_from(["bilinear", "bicubic"])),
    )
    decoded = decode_pairs(
        images[:1],
        images[1:],
        size=size,
        crop=draw(st.sampled_from(["center", "random"])),
        hflip=0.5,
        seeds=[draw(st.integers(0, 2**64))],
        dtype=torch.uint8,
        **options,
    )
    for pixels, image, corner in zip(decoded.pixels, images, decoded.crop_top_left.tolist(), strict=True):
        expected = pillow_pixels(image, size, **options, corner=tuple(corner), flip=decoded.flipped.item())
        assert levels_apart(pixels, expected) <= 1
