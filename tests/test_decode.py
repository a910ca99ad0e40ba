"""`decode_pairs` against Pillow, NumPy and bytes that are no images."""

import base64
import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo
from splitmix import outputs

import polydpo_fast
from polydpo_fast import DecodeError, DecodeLimits, decode_pairs
from polydpo_fast import decode as decode_module


def picture(height, width, seed=0):
    """Smooth colours, edges and grain: what a codec finds easy and what it does not."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * (x * x + y * y))], axis=-1)
    edges = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    values = 128 + 60 * waves + 30 * edges[..., None] + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized_size(image, size, resize):
    """Height and width of the whole image after the resize, from the docstring."""
    (height, width), (w, h) = size, image.size
    if resize == "stretch":
        return height, width
    if resize is None:
        return h, w
    if (height * w >= width * h) == (resize == "cover"):
        side = w * height // h
        return height, max(width, side) if resize == "cover" else max(1, side)
    side = h * width // w
    return max(height, side) if resize == "cover" else max(1, side), width


def pillow_pixels(data, size, resize="cover", interpolation="bilinear", corner=None, flip=False, background=255):
    """The transform of the docstring with Pillow, in uint8: (3, H, W)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    size = (size, size) if isinstance(size, int) else size
    h, w = resized_size(image, size, resize)
    if (w, h) != image.size:
        image = image.resize((w, h), FILTERS[interpolation])
    if flip:
        image = ImageOps.mirror(image)
    inner = min(h, size[0]), min(w, size[1])
    top, left = corner or (round((h - inner[0]) / 2), round((w - inner[1]) / 2))
    pixels = np.full((*size, 3), background, np.uint8)
    y, x = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    cut = np.asarray(image.crop((left, top, left + inner[1], top + inner[0])))
    pixels[y : y + inner[0], x : x + inner[1]] = cut
    return pixels.transpose(2, 0, 1)


def levels_apart(decoded, expected):
    return np.abs(decoded.numpy().astype(int) - expected).max()


ENCODINGS = [
    dict(subsampling=2),
    dict(subsampling=1),
    dict(subsampling=0),
    dict(progressive=True),
    dict(progressive=True, subsampling=0, optimize=True),
    dict(restart_marker_blocks=3),
    dict(quality=20),
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (200, 40)])
def test_pixels_without_resize_are_pillows(encoding, shape):
    """Both use libjpeg's slow integer DCT and triangle upsampling; versions may differ by one level at most."""
    data = jpeg(picture(*shape), **encoding)
    decoded = decode_pairs([data], [data], size=(40, 32), resize=None, dtype=torch.uint8)
    expected = pillow_pixels(data, (40, 32), resize=None)
    for row in decoded.pixels:
        assert np.abs(row.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("encoding", [dict(), dict(progressive=True)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (300, 41), (17, 500), (1, 1), (700, 700)])
@pytest.mark.parametrize("size", [64, (31, 97), 1])
def test_resized_pixels_are_pillows(encoding, shape, size):
    """Pillow rounds to 8 bits between its two passes and at the end, we only at the end: at most one level."""
    data = jpeg(picture(*shape), **encoding)
    decoded = decode_pairs([data], [data], size=size, dtype=torch.uint8)
    difference = np.abs(decoded.pixels[0].numpy().astype(int) - pillow_pixels(data, size))
    assert difference.max() <= 1
    assert torch.equal(decoded.pixels[0], decoded.pixels[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_batch_is_its_pairs_one_by_one(dtype):
    """Of more than 8 MB, which are written past the caches; with one that fails half way."""
    images = [jpeg(picture(512, 512, seed=seed), progressive=seed % 2 > 0) for seed in range(8)]
    images[5] = images[5][:-2000]
    batch = decode_pairs(images[:4], images[4:], size=512, dtype=dtype, on_error="mask", threads=2)
    assert batch.ok.tolist() == [True, False, True, True]
    for i in range(4):
        single = decode_pairs(images[i : i + 1], images[4 + i : 5 + i], size=512, dtype=dtype, on_error="mask")
        assert torch.equal(batch.pixels[[i, 4 + i]], single.pixels)


def test_grey_images_fill_three_planes():
    data = jpeg(picture(40, 40).convert("L"))
    pixels = decode_pairs([data], [data], size=40, dtype=torch.uint8).pixels[0]
    assert np.array_equal(pixels.numpy(), pillow_pixels(data, 40))
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_level_is_normalised_and_rounded_to_nearest_even(dtype):
    """Exhaustive: a ramp of all 256 levels. Torch's own conversion of the float64 value is the oracle."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16), 8, axis=0).repeat(8, axis=1)
    data = jpeg(Image.fromarray(ramp), quality=100)
    levels = decode_pairs([data], [data], size=128, dtype=torch.uint8).pixels
    assert len(levels.unique()) == 256
    pixels = decode_pairs([data], [data], size=128, dtype=dtype).pixels
    exact = (2 * levels.double() - 255) / 255
    if dtype == torch.float32:
        # Two roundings of at most 2^-24 each: of 1/255, and of the product.
        assert (pixels.double() - exact).abs().max() <= 2**-23
    else:
        # float32 is the step between; no level lies within its rounding of a tie.
        assert torch.equal(pixels, exact.to(dtype))
    assert pixels.min() == -1
    assert pixels.max() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resized_half_precision_is_the_rounded_float32(dtype):
    data = jpeg(picture(90, 70))
    single = decode_pairs([data], [data], size=64, dtype=torch.float32).pixels
    half = decode_pairs([data], [data], size=64, dtype=dtype).pixels
    assert torch.equal(half, single.to(dtype))


def test_resized_floats_are_finer_than_eight_bits():
    data = jpeg(picture(90, 70))
    decoded = decode_pairs([data], [data], size=64, dtype=torch.float32)
    levels = (decoded.pixels[0].double() * 255 + 255) / 2
    whole = decode_pairs([data], [data], size=64, dtype=torch.uint8).pixels[0]
    assert (levels - whole).abs().max() <= 0.5 + 1e-4
    assert (levels != levels.round()).double().mean() > 0.9


def test_rows_are_winners_then_losers_and_geometry_is_returned():
    shapes = [(50, 40), (40, 60), (64, 64), (33, 99)]
    images = [jpeg(picture(*shape, seed=i)) for i, shape in enumerate(shapes)]
    decoded = decode_pairs(images[:2], images[2:], size=32, dtype=torch.uint8)
    for row, data in zip(decoded.pixels, images, strict=True):
        assert np.abs(row.numpy().astype(int) - pillow_pixels(data, 32)).max() <= 1
    assert decoded.original_size.tolist() == [list(shape) for shape in shapes]
    # Resized: 40 x 32, 32 x 48, 32 x 32, 32 x 96.
    assert decoded.crop_top_left.tolist() == [[4, 0], [0, 8], [0, 0], [0, 32]]
    assert decoded.ok.tolist() == [True, True]
    assert decoded.errors == ()


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


def test_any_bytes_like_object_will_do():
    data = jpeg(picture(20, 20))
    kinds = [data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)]
    decoded = decode_pairs(kinds, kinds, size=16)
    assert all(torch.equal(row, decoded.pixels[0]) for row in decoded.pixels)


def test_out_is_written_in_place():
    data = jpeg(picture(20, 20))
    out = torch.full((2, 3, 16, 16), 9.0, dtype=torch.float16)
    decoded = decode_pairs([data], [data], size=16, dtype=torch.float16, out=out)
    assert decoded.pixels is out
    assert torch.equal(out, decode_pairs([data], [data], size=16, dtype=torch.float16).pixels)


def test_the_bytes_do_not_depend_on_the_number_of_threads():
    images = [jpeg(picture(30 + 7 * i, 90 - 5 * i, seed=i)) for i in range(12)]
    digests = {
        hashlib.sha256(
            decode_pairs(images, images[::-1], size=48, dtype=torch.float32, threads=threads).pixels.numpy()
        ).hexdigest()
        for threads in (1, 2, 3, 8, 64, None)
    }
    assert len(digests) == 1


def test_calls_from_many_threads():
    images = [jpeg(picture(64, 64, seed=i)) for i in range(4)]
    expected = decode_pairs(images, images, size=32).pixels
    results = []

    def work():
        results.extend(decode_pairs(images, images, size=32, threads=3).pixels for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 120
    assert all(torch.equal(result, expected) for result in results)


def _decode_in_child(data, queue):
    queue.put(decode_pairs([data] * 4, [data] * 4, size=32, dtype=torch.uint8, threads=4).pixels.sum().item())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_get_a_pool_of_their_own():
    data = jpeg(picture(64, 64))
    expected = decode_pairs([data] * 4, [data] * 4, size=32, dtype=torch.uint8, threads=4).pixels.sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_decode_in_child, args=(data, queue)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [queue.get() for _ in children] == [expected] * 3


# ------------------------------------------------------------------------------------------------- geometry


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


def exif(orientation, byte_order="<"):
    tag = struct.pack(byte_order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    head = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(byte_order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(byte_order + "H", 1) + tag + b"\0\0\0\0"


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


def segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), (0.5, (0.5, 0.25, 1.0))]
)
def test_any_mean_and_std(dtype, mean, std):
    data = jpeg(picture(40, 40))
    levels = decode_pairs([data], [data], size=40, dtype=torch.uint8).pixels.double()
    pixels = decode_pairs([data], [data], size=40, dtype=dtype, mean=mean, std=std).pixels

    def column(x):
        return torch.tensor(x, dtype=torch.float64).expand(3).reshape(3, 1, 1)

    exact = (levels / 255 - column(mean)) / column(std)
    # Three roundings in float32, the first of 255 mean (at most 2^7, so 2^-17 / 255 / std), then that of the dtype.
    assert ((pixels.double() - exact).abs() <= 2**-23 + exact.abs() * (torch.finfo(dtype).eps / 2 + 2**-22)).all()


# -------------------------------------------------------------------------------------------------- formats


PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type


def file(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def transparent(height=33, width=45):
    image = picture(height, width).convert("RGBA")
    y, x = np.mgrid[:height, :width]
    image.putalpha(Image.fromarray(((x * 7 + y * 3) % 256).astype(np.uint8)))
    return image


def on(background, image):
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes(mode):
    """Pillow's encoder and decoder as the oracle; compositing may round differently by one level."""
    background = (10, 200, 99)
    image = transparent().convert(mode) if mode != "P" else picture(33, 45).quantize(200)
    decoded = decode_pairs([png(image)], [png(image)], size=(33, 45), dtype=torch.uint8, background=background)
    expected = on(background, image.convert("RGBA")) if "A" in mode else image.convert("RGB")
    assert levels_apart(decoded.pixels[0], np.asarray(expected).transpose(2, 0, 1)) <= ("A" in mode)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("WEBP", dict(lossless=True)),
        ("GIF", dict()),
        ("BMP", dict()),
        ("TIFF", dict(compression="tiff_lzw")),
        ("PPM", dict()),
    ],
)
def test_other_formats_come_through_pillow(format, options):
    image = picture(33, 45)
    data = file(image.quantize(64) if format == "GIF" else image, format, **options)
    decoded = decode_pairs([data], [jpeg(image)], size=(20, 30), dtype=torch.uint8)
    assert levels_apart(decoded.pixels[0], pillow_pixels(data, (20, 30))) <= 1
    assert levels_apart(decoded.pixels[1], pillow_pixels(jpeg(image), (20, 30))) <= 1


def test_transparent_webp_and_orientation_through_pillow():
    data = file(transparent(), "WEBP", lossless=True, exif=exif(6))
    decoded = decode_pairs([data], [data], size=(45, 33), dtype=torch.uint8, background=(0, 0, 255))
    expected = np.asarray(on((0, 0, 255), transparent()).rotate(-90, expand=True)).transpose(2, 0, 1)
    assert levels_apart(decoded.pixels[0], expected) <= 1


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


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(("colour_type", "depth"), [(t, d) for t, depths in PNG_DEPTHS.items() for d in depths])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (13, 31)])
@pytest.mark.parametrize("keyed", [False, True])
def test_every_kind_of_png(colour_type, depth, shape, interlace, keyed):
    """All colour types and depths, plain and interlaced, opaque and not: to half a level of what its numbers say."""
    random = np.random.default_rng(depth + colour_type)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    most, colours = (1 << depth) - 1, random.integers(0, 256, (1 << min(depth, 8), 4))
    numbers = random.integers(0, most + 1, (*shape, channels))
    if keyed:
        numbers[random.random(shape) < 0.3] = numbers[0, 0]
    levels, alpha = numbers * 255.0 / most, np.ones((*shape, 1))
    between = []
    if colour_type == 3:
        between.append(chunk(b"PLTE", colours[:, :3].astype(np.uint8).tobytes()))
        levels = colours[numbers[..., 0], :3].astype(float)
    elif colour_type >= 4:
        alpha = levels[..., -1:] / 255
        levels = levels[..., :-1]
    if keyed and colour_type < 4:
        key = colours[:, 3].astype(np.uint8).tobytes() if colour_type == 3 else numbers[0, 0].astype(">u2").tobytes()
        between.append(chunk(b"tRNS", key))
        is_key = (numbers == numbers[0, 0]).all(axis=-1, keepdims=True)
        alpha = colours[numbers[..., 0], 3:] / 255 if colour_type == 3 else np.where(is_key, 0.0, 1.0)
    data = written(numbers if channels > 1 else numbers[..., 0], colour_type, depth, *between, interlace=interlace)
    ground = (200, 100, 50)
    expected = np.broadcast_to(levels, (*shape, 3)) * alpha + np.array(ground) * (1 - alpha)
    options = dict(size=shape, resize=None, dtype=torch.uint8, background=ground)
    pixels = decode_pairs([data], [data], **options).pixels[0].permute(1, 2, 0).numpy()
    # Samples of 16 bits are rounded to 8 before they are put on the ground, and the result once more.
    assert np.abs(pixels - expected).max() <= (0.5 if alpha.all() and depth <= 8 else 1.01)
    mirrored = decode_pairs([data], [data], hflip=1.0, **options).pixels[0].permute(1, 2, 0).numpy()
    assert (mirrored == pixels[:, ::-1]).all()


@pytest.mark.parametrize("format", ["AVIF", "WEBP", "GIF", "PNG", "TIFF", "TGA", "JPEG2000", "QOI", "BMP", "PPM"])
def test_other_formats_are_pillows_pixels(format):
    """The first picture of those that have several; transparency on the ground."""
    image, second = picture(33, 45), picture(33, 45, seed=1)
    options = dict(save_all=True, append_images=[second]) if format in ("AVIF", "WEBP", "GIF", "PNG", "TIFF") else {}
    data = file(image, format, **options)
    decoded = decode_pairs([data], [data], size=(33, 45), resize=None, dtype=torch.uint8)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decoded.pixels[0].numpy(), expected)


def test_sixteen_bit_pixels_that_pillow_would_clip_are_refused():
    data = file(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "TIFF")
    with pytest.raises(DecodeError, match=r"mode I;16.*; expected 8 bits per channel"):
        decode_pairs([data], [data], size=8)


def test_limits_hold_for_pillows_formats():
    data = file(picture(40, 40), "WEBP")
    for limits, reason in [(DecodeLimits(pixels=1599), "limits.pixels"), (DecodeLimits(bytes=50), "limits.bytes")]:
        with pytest.raises(DecodeError, match=reason):
            decode_pairs([data], [data], size=8, limits=limits)
    with pytest.raises(DecodeError, match=r"win\[0\] could not be decoded: "):
        decode_pairs([data[:60]], [data], size=8)


def test_a_webp_is_refused_before_its_canvas_is_made():
    """Of 90 bytes, an animation of 13,000 x 13,000, whose canvas would take 1.3 GB."""
    frame = file(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    side = (13_000 - 1).to_bytes(3, "little")
    anmf = b"\0" * 12 + b"\0" * 3 + b"\0" + frame
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side * 2
    body += b"ANIM" + struct.pack("<I", 6) + b"\0" * 6 + b"ANMF" + struct.pack("<I", len(anmf)) + anmf
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    program = f"""
import resource
import PIL.Image, PIL.WebPImagePlugin
from polydpo_fast import DecodeError, decode_pairs
data = {data!r}
try: decode_pairs([data[:40]], [data[:40]], size=8)
except DecodeError: pass
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000,) * 2)
try: decode_pairs([data], [data], size=8)
except DecodeError as error: print(error)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "169000000 pixels, more than 134217728 (limits.pixels)" in printed


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own limits")
def test_an_image_for_which_there_is_no_memory_costs_its_pair(tmp_path):
    """50 MB of coefficients, in a process of its own, whose heap has no room left over."""
    (tmp_path / "large.jpg").write_bytes(file(Image.new("L", (5000, 5000)), "JPEG", progressive=True))
    (tmp_path / "small.jpg").write_bytes(jpeg(picture(20, 20)))
    program = f"""
import resource, torch
from polydpo_fast import decode_pairs
large, small = (open({str(tmp_path)!r} + name, "rb").read() for name in ("/large.jpg", "/small.jpg"))
how = dict(size=8, dtype=torch.uint8, on_error="mask", threads=1)
known = decode_pairs([small], [small], **how)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24,) * 2)
out = torch.full((4, 3, 8, 8), 7, dtype=torch.uint8)
decoded = decode_pairs([large, small], [small] * 2, out=out, **how)
print(decoded.ok.tolist(), *decoded.errors, int(out[[0, 2]].max()), torch.equal(out[[1, 3]], known.pixels))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "[False, True] win[0]: there is not enough memory to decode it 0 True\n"


@pytest.mark.parametrize("options", [dict(lossless=True), dict(lossless=False), dict(exif=exif(3))], ids=str)
def test_what_a_webp_says_of_its_size(options):
    for shape in ((1, 1), (33, 45), (300, 2), (16_383, 1), (2, 16_383)):
        data = memoryview(file(picture(*shape), "WEBP", **options))
        assert decode_module._webp_size(data) == shape[::-1]
    assert decode_module._webp_size(memoryview(b"RIFF")) == (0, 0)


def test_orientation_is_of_exif_alone():
    """In JPEG and PNG that of XMP is not looked for: nor where Pillow would."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = file(picture(30, 50), "WEBP", xmp=xmp)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6
    assert decode_pairs([data], [data], size=8).original_size.tolist() == [[30, 50]] * 2


def test_pillow_is_not_to_fill_up_images_under_strict(monkeypatch):
    """A switch that many scripts turn on, and which nobody sees from here."""
    whole, half = (file(picture(40, 40), "BMP")[:size] for size in (None, 2500))
    with pytest.raises(DecodeError):
        decode_pairs([half], [whole], size=8)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DecodeError, match=r"LOAD_TRUNCATED_IMAGES is True.*expected False, or strict=False"):
        decode_pairs([half], [whole], size=8)
    assert decode_pairs([half], [whole], size=8, strict=False).ok.all()
    assert decode_pairs([GOOD], [GOOD], size=8).ok.all()  # Pillow has no part in it


def test_cmyk():
    data = jpeg(picture(40, 40).convert("CMYK"))
    decoded = decode_pairs([data], [data], size=40, dtype=torch.uint8)
    assert levels_apart(decoded.pixels[0], pillow_pixels(data, 40)) <= 1


ARITHMETIC = base64.b64decode(
    """
    /9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5a
    YVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQAR
    CAAQABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AHLIaKgMEez5zkCVd2nkON8sNhvNBKSm5nfCN+OV1zt+OWSYuO02
    /9k=
    """
)


def test_arithmetic_coding():
    """Pillow's own encoder with quality=60, transcoded by libjpeg-turbo's jpegtran -arithmetic."""
    y, x = np.mgrid[:16, :16] * 15
    huffman = jpeg(Image.fromarray(np.stack([x, y, (x // 15 ^ y // 15) * 15], axis=-1).astype(np.uint8)), quality=60)
    try:
        decoded = decode_pairs([ARITHMETIC], [huffman], size=16, dtype=torch.uint8)
    except DecodeError as error:
        pytest.skip(f"this libjpeg was built without it: {error}")
    assert torch.equal(decoded.pixels[0], decoded.pixels[1])


def test_planes_are_those_that_are_stored():
    """Pillow's YCbCr draft has the chroma upsampled; where it is the same everywhere that is the stored value."""
    y, x = np.mgrid[:64, :96]
    flat = np.stack([(x * 2 + y) % 256, x * 0 + 90, y * 0 + 160], axis=-1).astype(np.uint8)
    data = file(Image.fromarray(flat, "YCbCr"), "JPEG", quality=95, subsampling=2)
    stored = Image.open(io.BytesIO(data))
    stored.draft("YCbCr", None)
    expected = np.asarray(stored)
    for size, corner in [((64, 96), (0, 0)), ((32, 40), (16, 28))]:
        decoded = decode_pairs([data], [data], size=size, resize=None, dtype="yuv420")
        assert decoded.pixels.shape == (2, size[0] * 3 // 2, size[1])
        assert decoded.crop_top_left[0].tolist() == list(corner)
        luma, cb, cr = decoded.pixels[1].flatten().split([size[0] * size[1], *[size[0] * size[1] // 4] * 2])
        cut = expected[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
        assert np.array_equal(luma.reshape(size).numpy(), cut[..., 0])
        for plane, channel in ((cb, 1), (cr, 2)):
            half = plane.reshape(size[0] // 2, size[1] // 2).numpy().astype(int)
            assert np.abs(half - cut[::2, ::2, channel]).max() <= 1


@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (34, 50), (61, 83), (128, 66)])
@pytest.mark.parametrize("progressive", [False, True])
def test_planes_become_the_same_pixels(shape, progressive):
    """Bit for bit; in a crop all but the outermost pixels, which have lost the colours of their neighbours."""
    data = jpeg(picture(*shape), progressive=progressive)
    size = shape[0] // 2 * 2, shape[1] // 2 * 2
    for options in (dict(), dict(crop="random", hflip=0.5, seeds=[0, 2, 5])):
        if options:
            size = tuple(max(2, n // 4 * 2) for n in shape)
        arguments = dict(size=size, resize=None, **options)
        stored = decode_pairs([data] * 3, [data] * 3, dtype="yuv420", **arguments)
        assert not options or len(set(stored.flipped.tolist())) == 2
        rgb = polydpo_fast.yuv420_to_rgb(stored.pixels, flip=stored.flipped.repeat(2), dtype=torch.uint8)
        whole = decode_pairs([data], [data], size=shape, resize=None, dtype=torch.uint8).pixels[0]
        for pixels, (top, left), flip in zip(rgb, stored.crop_top_left.tolist(), stored.flipped.repeat(2), strict=True):
            expected = (whole.flip(2) if flip else whole)[:, top : top + size[0], left : left + size[1]]
            edge = 0 if size == shape else 1
            inner = (slice(None), slice(edge, size[0] - edge), slice(edge, size[1] - edge))
            if min(size) > 4 or size == shape:
                assert torch.equal(pixels[inner], expected[inner])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: jpeg(picture(40, 40), subsampling=0), "it is not stored as YCbCr 4:2:0"),
        (lambda: jpeg(picture(40, 40).convert("L")), "it is not stored as YCbCr 4:2:0"),
        (lambda: png(picture(40, 40)), "it is not a JPEG"),
        (lambda: jpeg(picture(40, 40), exif=exif(6)), r"it is stored turned or mirrored \(EXIF orientation 6\)"),
        (lambda: jpeg(picture(50, 50)), "it is 50 x 50 and would have to be resized or padded"),
        (lambda: truncated(jpeg(picture(40, 40))), "Premature end"),
    ],
)
def test_planes_of_other_images_fail(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_pairs([data()], [data()], size=40, dtype="yuv420")


def test_an_interrupt_stops_a_long_call():
    images = [jpeg(picture(512, 512))] * 20_000  # minutes of work
    # A shell that runs the tests in the background has it ignored; and libraries leave handlers of their own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        decode_pairs(images, images, size=16, dtype=torch.uint8, threads=2)
    assert time.perf_counter() - begin < 10
    timer.join()
    signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ bad bytes


def truncated(data):
    return data[: len(data) * 2 // 3]


def flipped(data):
    damaged = bytearray(data)
    for at in range(len(data) // 2, len(data) // 2 + 60, 3):
        damaged[at] ^= 0x5A
    return bytes(damaged)


def oversized(data):
    """The header claims 60,000 x 60,000 pixels."""
    damaged = bytearray(data)
    at = data.index(b"\xff\xc0") + 5
    damaged[at : at + 4] = b"\xea\x60\xea\x60"
    return bytes(damaged)


BAD = [
    (lambda data: b"", "it is empty"),
    (lambda data: b"hello", "it is no image of a known format: it begins with 68 65 6c 6c"),
    (lambda data: b"<!doctype html><title>404</title>", "it is no image of a known format: it begins with 3c 21 64 6f"),
    (lambda data: b"\x89PNG\r\n\x1a\n" + data, ""),
    (lambda data: data[:10], "JPEG"),
    (lambda data: data[:100], "JPEG"),
    (truncated, "Premature end of JPEG file"),
    (flipped, "Corrupt JPEG data"),
    (oversized, r"it has 3600000000 pixels, more than 134217728 \(limits.pixels\)"),
]


@pytest.mark.parametrize(("damage", "reason"), BAD)
@pytest.mark.parametrize("arm", ["win", "lose"])
def test_bad_bytes_name_arm_and_index(damage, reason, arm):
    good = jpeg(picture(64, 64))
    arms = {"win": [good] * 3, "lose": [good] * 3}
    arms[arm][1] = damage(good)
    with pytest.raises(DecodeError, match=rf"{arm}\[1\] could not be decoded: .*{reason}") as error:
        decode_pairs(**arms, size=32)
    assert [(f.arm, f.index) for f in error.value.failures] == [(arm, 1)]
    assert isinstance(error.value, ValueError)


def test_all_failures_are_listed():
    good = jpeg(picture(32, 32))
    with pytest.raises(DecodeError, match=r"win\[0\] could not be decoded: it is empty \(and 2 more\)") as error:
        decode_pairs([b"", good, b"x"], [good, b"", good], size=16)
    assert [str(f)[:8] for f in error.value.failures] == ["win[0]: ", "win[2]: ", "lose[1]:"]


def test_masked_pairs_are_zeroed_and_the_others_untouched():
    images = [jpeg(picture(40, 40, seed=i)) for i in range(6)]
    clean = decode_pairs(images[:3], images[3:], size=32)
    broken = [images[0], truncated(images[1]), images[2]]
    out = torch.full((6, 3, 32, 32), 5.0, dtype=torch.bfloat16)
    decoded = decode_pairs(broken, images[3:], size=32, on_error="mask", out=out)
    assert decoded.ok.tolist() == [True, False, True]
    assert [(f.arm, f.index) for f in decoded.errors] == [("win", 1)]
    assert (decoded.pixels[[1, 4]] == 0).all()
    keep = [0, 2, 3, 5]
    for facts in ("original_size", "crop_top_left"):  # nothing is told of the other arm either
        assert not getattr(decoded, facts)[[1, 4]].any()
        assert torch.equal(getattr(decoded, facts)[keep], getattr(clean, facts)[keep])
    assert torch.equal(decoded.pixels[keep], clean.pixels[keep])


def test_lenient_mode_decodes_what_is_there():
    data = truncated(jpeg(picture(64, 64)))
    pixels = decode_pairs([data], [data], size=64, dtype=torch.uint8, strict=False).pixels[0]
    whole = pillow_pixels(jpeg(picture(64, 64)), 64)
    assert np.abs(pixels[:, :24].numpy().astype(int) - whole[:, :24]).max() <= 1


def test_crop_larger_than_the_image_is_an_error_of_that_image():
    data = jpeg(picture(20, 30))
    with pytest.raises(DecodeError, match="it is 20 x 30, smaller than the crop of 24 x 24, and resize is None"):
        decode_pairs([data], [data], size=24, resize=None)


def test_limits():
    data = jpeg(picture(64, 64), progressive=True)
    assert decode_pairs([data], [data], size=16, limits=DecodeLimits(64 * 64, len(data), 50)).ok.all()
    for limits, reason in [
        (DecodeLimits(pixels=64 * 64 - 1), "limits.pixels"),
        (DecodeLimits(bytes=len(data) - 1), "limits.bytes"),
        (DecodeLimits(scans=3), "limits.scans"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            decode_pairs([data], [data], size=16, limits=limits)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "PNG"])
def test_every_truncation_is_noticed(kind):
    """At 60 places, the last of them one byte before the end, under a crop that does not need the end."""
    image = picture(64, 64)
    good = png(image) if kind == "PNG" else jpeg(image, progressive=kind == "progressive")
    for length in sorted({len(good) * k // 60 for k in range(60)} | {len(good) - 1}):
        decoded = decode_pairs([good[:length]], [good], size=(8, 64), resize=None, on_error="mask")
        assert not decoded.ok[0], length
        lenient = decode_pairs([good[:length]], [good], size=(8, 64), resize=None, on_error="mask", strict=False)
        assert lenient.errors == () or lenient.errors[0].arm == "win"


@pytest.mark.parametrize("kind", ["baseline", "progressive", "CMYK", "PNG", "interlaced PNG", "parts of PNG"])
def test_damage_that_is_let_pass_is_reported(kind):
    """Cut in its middle: decoded under strict=False, and the result says which image it was, and what is wrong."""
    image = picture(64, 64)
    good = {
        "baseline": lambda: jpeg(image),
        "progressive": lambda: jpeg(image, progressive=True),
        "CMYK": lambda: jpeg(image.convert("CMYK")),
        "PNG": lambda: png(image),
        "interlaced PNG": lambda: interlaced(np.asarray(image)),
        "parts of PNG": lambda: parts(png(image), 7),
    }[kind]()
    cut = good[: len(good) - 60]
    options = dict(size=16, resize="stretch", strict=False)
    decoded = decode_pairs([good, good], [good, cut], **options)
    assert decoded.ok.all()
    assert decoded.errors == ()
    (damage,) = decoded.damaged
    assert (damage.arm, damage.index) == ("lose", 1)
    assert re.search("end early" if "PNG" in kind else "Premature end|Corrupt", damage.reason)
    assert not torch.equal(decoded.pixels[2], decoded.pixels[3])
    assert decode_pairs([good], [good], **options).damaged == ()
    with pytest.raises(DecodeError, match=re.escape(damage.reason)):
        decode_pairs([good], [cut], **{**options, "strict": True})


def test_damage_of_png_beside_its_end_is_reported():
    palette = png(picture(20, 20).convert("P", palette=Image.Palette.ADAPTIVE, colors=8), bits=8)
    at = palette.index(b"PLTE")
    short = palette[: at - 4] + chunk(b"PLTE", palette[at + 4 : at + 4 + 9]) + palette[at + 4 + 24 + 4 :]
    for data, reason in (
        (short, "a pixel of colour [3-7] of a palette of 3"),
        (bomb(4, 4, b"\0" * 60), "more PNG data"),
    ):
        decoded = decode_pairs([data], [GOOD], size=4, resize="stretch", strict=False)
        assert [(d.arm, d.index) for d in decoded.damaged] == [("win", 0)]
        assert re.search(reason, decoded.damaged[0].reason)
        with pytest.raises(DecodeError, match=reason):
            decode_pairs([data], [GOOD], size=4, resize="stretch")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def parts(data, count):
    """A PNG with so many IDAT chunks in place of its only one."""
    at = data.index(b"IDAT")
    length = int.from_bytes(data[at - 4 : at], "big")
    body, size = data[at + 4 : at + 4 + length], -(-length // count)
    return (
        data[: at - 4]
        + b"".join(chunk(b"IDAT", body[i : i + size]) for i in range(0, length, size))
        + data[at + 8 + length :]
    )


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def written(rows, colour_type, depth, *between, interlace):
    """A PNG of (H, W) or (H, W, channels) numbers of so many bits, unfiltered; `between`: chunks before its data."""

    def packed(row):
        if depth == 16:
            return row.astype(">u2").tobytes()
        bits = np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)[:, 8 - depth :]
        return np.packbits(bits.reshape(-1)).tobytes()

    passes = [rows[top::down, left::across] for top, left, down, across in ADAM7] if interlace else [rows]
    data = b"".join(b"\0" + packed(row) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, interlace)
    parts = [chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def interlaced(pixels):
    return written(pixels, 2, 8, interlace=True)


def test_pillows_own_limit_is_told(monkeypatch):
    """It is the process's, and stays as it is."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    data = file(picture(20, 20), "BMP")
    with pytest.raises(DecodeError, match=r"400 pixels.*twice PIL\.Image\.MAX_IMAGE_PIXELS, beside limits\.pixels"):
        decode_pairs([data], [jpeg(picture(20, 20))], size=8)
    assert Image.MAX_IMAGE_PIXELS == 199


def bomb(width, height, data=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (bomb(60_000, 60_000), {}, "limits.pixels"),
        (bomb(2**31 - 1, 2**31 - 1), {}, ""),
        (bomb(0, 5), {}, ""),
        (bomb(4, 4, b"\0" * 50_000_000), {}, ""),  # inflates to far more than its header says
        (bomb(4, 4, b"\0" * 20), {}, ""),  # and to less
        (bomb(100, 100, b"\0" * 30_100), dict(decoded=30_000), "limits.decoded"),
        (jpeg(picture(64, 64), progressive=True), dict(decoded=10_000), "limits.decoded"),
    ],
)
def test_bombs_are_refused_before_they_go_off(data, limits, reason):
    with pytest.raises(DecodeError, match=rf"win\[0\] could not be decoded: .*{reason}"):
        decode_pairs([data], [GOOD], size=4, limits=DecodeLimits(**limits))


def test_chunks_of_png_are_limited():
    header, rest = GOOD_PNG[:33], GOOD_PNG[33:]
    for name in (b"tEXt", b"iCCP", b"abCd"):
        data = header + chunk(name, b"k\0" + b"x" * 998) + rest
        assert decode_pairs([data], [data], size=8, limits=DecodeLimits(chunk=1000)).ok.all()
        with pytest.raises(DecodeError, match=rf"its chunk {name.decode()} at byte 33 has 1000 bytes, .*limits.chunk"):
            decode_pairs([data], [data], size=8, limits=DecodeLimits(chunk=999))
    assert decode_pairs(
        [GOOD_PNG], [GOOD_PNG], size=8, limits=DecodeLimits(chunk=13)
    ).ok.all()  # IDAT is another matter


def test_texts_with_exif_cost_once():
    """4,000 of them in one file took 1.5 s when each was inflated."""
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" * 160_000, 9))
    data = GOOD_PNG[:33] + text * 4000 + GOOD_PNG[33:]
    began = time.process_time()
    assert decode_pairs([data], [data], size=8).ok.all()
    assert time.process_time() - began < 0.5


def test_segments_of_a_jpeg_cost_once():
    """A hundred thousand empty ones took 8 s when libjpeg kept them: it walks past all others for each."""
    good = jpeg(picture(20, 20))
    data = good[:2] + segment(0xE1, b"") * 100_000 + good[2:]
    began = time.process_time()
    assert decode_pairs([data], [data], size=8).ok.all()
    assert time.process_time() - began < 0.5


def test_a_side_beyond_what_a_number_holds_is_refused():
    """One column of a million pixels, covered at a width of 4096: four thousand million rows."""
    column = zlib.compress(b"\0\x80" * 1_000_000)
    header = struct.pack(">IIBBBBB", 1, 1_000_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", column) + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="it would be 4096000000 pixels long after the resize"):
        decode_pairs([data], [data], size=(16, 4096))
    assert (decode_pairs([data], [data], size=16, dtype=torch.uint8).pixels == 0x80).all()


def test_weights_of_a_resize_are_limited_too():
    data = file(Image.new("L", (1, 3_000_000)), "TIFF", compression="tiff_deflate")
    with pytest.raises(DecodeError, match=r"limits\.decoded"):
        decode_pairs([data], [data], size=16, resize="stretch", limits=DecodeLimits(decoded=20_000_000))


def test_a_damaged_palette_index_below_the_crop_is_noticed():
    rows = b"".join(b"\0" + bytes([0, 1, 2 if y < 9 else 200]) for y in range(10))
    header = struct.pack(">IIBBBBB", 3, 10, 8, 3, 0, 0, 0)
    data = b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"PLTE", bytes(9)), chunk(b"IDAT", zlib.compress(rows))]
    )
    data += chunk(b"IEND", b"")
    assert decode_pairs([data], [data], size=(2, 3), resize=None, strict=False).ok.all()
    with pytest.raises(DecodeError):
        decode_pairs([data], [data], size=(2, 3), resize=None)


def test_bytes_after_the_end_are_no_damage():
    for data in (png(picture(20, 20)), jpeg(picture(20, 20))):
        pixels = decode_pairs([data + b"\n\0appended"], [data], size=16).pixels
        assert torch.equal(pixels[0], pixels[1])


def test_bytes_that_change_during_the_call_do_no_harm():
    """The length of a PNG's text chunk flickers: any outcome but a crash."""
    data = bytearray(png(picture(64, 64)))
    text = chunk(b"tEXt", b"k\0" + b"v" * 100)
    at = data.index(b"IDAT") - 4
    data[at:at] = text * 50
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            for k in range(50):
                data[at + k * len(text)] ^= 0x7F

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(300):
            decode_pairs([data], [data], size=8, on_error="mask", strict=False)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("work", ["decode_pairs([data] * 400, [data] * 400, size=64)", "loss(*tensors)"])
def test_a_daemon_thread_does_not_abort_the_end_of_the_process(work):
    """A prefetching thread inside a call when the interpreter goes."""
    program = f"""
import io, threading, time, numpy as np, torch
from PIL import Image
from polydpo_fast import decode_pairs, loss
file = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(file, "JPEG")
data, tensors = file.getvalue(), [torch.randn(2, 4_000_000) for _ in range(3)]
def forever():
    while True:
        {work}
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
"""
    # PyTorch's own calls abort the process if the end finds the thread waiting in one of them, one time in five:
    # one of many attempts must find it in ours, where it never may.
    ended = []
    while len(ended) < 12 and (not ended or ended[-1].returncode):
        ended.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60))
    assert ended[-1].returncode == 0, ended[-1].stderr


def test_a_default_device_is_not_where_results_go():
    data = jpeg(picture(20, 20))
    with torch.device("meta"):
        decoded = decode_pairs([data], [data], size=16, crop="random", hflip=0.5)
    for tensor in (decoded.pixels, decoded.ok, decoded.flipped, decoded.original_size):
        assert tensor.device.type == "cpu"


def test_masking_works_in_an_inference_tensor():
    data = jpeg(picture(20, 20))
    with torch.inference_mode():
        out = torch.ones(4, 3, 8, 8)
    decoded = decode_pairs([data, b""], [data, data], size=8, dtype=torch.float32, out=out, on_error="mask")
    assert decoded.ok.tolist() == [True, False]
    assert not out[[1, 3]].any()
    assert out[[0, 2]].any()


def test_what_a_resize_keeps_is_limited_too():
    """Rows that one output row is blended from: all of them, at the output's width."""
    data = jpeg(Image.new("L", (2, 40_000)))
    with pytest.raises(DecodeError, match=r"limits\.decoded"):
        decode_pairs([data], [data], size=(1, 16_000), resize="stretch")


@pytest.mark.parametrize("shape", [(1, 65_500), (65_500, 1), (3, 65_500)])
def test_the_widest_jpegs(shape):
    data = jpeg(Image.new("RGB", shape[::-1], (200, 100, 50)), quality=100, subsampling=0)
    for options in (dict(resize="stretch"), dict(resize="contain", background=(200, 100, 50))):
        pixels = decode_pairs([data], [data], size=8, dtype=torch.uint8, **options).pixels[0]
        assert (pixels.int() - torch.tensor([200, 100, 50]).reshape(3, 1, 1)).abs().max() <= 2


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


@given(data=st.data())
def test_damaged_files_never_crash_and_never_touch_their_neighbours(data):
    """Any damage: either a decoded image or an error of that image, and the neighbours stay right."""
    good = jpeg(picture(48, 40), progressive=data.draw(st.booleans()))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(2, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(3, len(damaged)))])
    strict = data.draw(st.booleans())
    clean = decode_pairs([good], [good], size=24, dtype=torch.uint8).pixels[0]
    decoded = decode_pairs([good, damaged], [good, good], size=24, dtype=torch.uint8, on_error="mask", strict=strict)
    assert decoded.ok[0]
    assert torch.equal(decoded.pixels[0], clean)
    assert torch.equal(decoded.pixels[2], clean)
    if not decoded.ok[1]:
        assert decoded.errors[0].arm == "win"
        assert decoded.errors[0].index == 1
        assert not decoded.pixels[[1, 3]].any()


# --------------------------------------------------------------------------------------------- bad arguments

GOOD_PNG = png(picture(24, 24))
GOOD = jpeg(picture(16, 16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(win=GOOD), TypeError, "win is a bytes; expected a list of bytes-like objects"),
        (dict(lose="x"), TypeError, "lose is a str"),
        (dict(win=[GOOD, GOOD]), ValueError, "lose has 1 images; expected 2 like win"),
        (dict(win=[], lose=[]), ValueError, "win and lose are empty"),
        (dict(lose=["x"]), TypeError, r"lose\[0\] is a str; expected a contiguous bytes-like object"),
        (dict(win=[None]), TypeError, r"win\[0\] is a NoneType"),
        (dict(win=["a.jpg"]), TypeError, r"with the contents of an image file; of a path: Path\(path\).read_bytes\(\)"),
        (dict(win=[np.zeros((4, 6, 3), np.uint8)]), TypeError, r"array of shape \(4, 6, 3\); .*, not decoded pixels"),
        (dict(win=[np.zeros(8, np.uint8)[::2]]), TypeError, r"win\[0\] is a ndarray; expected a contiguous"),
        (dict(size=0), ValueError, "size is 0; expected sides from 1 to 16384"),
        (dict(size=(8, 20000)), ValueError, r"size is \(8, 20000\)"),
        (dict(size=8.0), TypeError, "size is 8.0; expected an int or"),
        (dict(size=(8, 8, 3)), TypeError, "size is"),
        (dict(resize="fit"), ValueError, "resize is 'fit'; expected one of None, 'cover', 'contain', 'stretch'"),
        (
            dict(interpolation="nearest"),
            ValueError,
            "interpolation is 'nearest'; expected one of 'bilinear', 'bicubic'",
        ),
        (dict(crop="left"), ValueError, "crop is 'left'; expected one of 'center', 'random'"),
        (dict(exif=True), ValueError, "exif is True; expected one of 'apply', 'ignore'"),
        (dict(hflip=1.5), ValueError, "hflip is 1.5; expected a number from 0 to 1"),
        (dict(hflip=float("nan")), ValueError, "hflip is nan"),
        (dict(crop="random", seeds=[1, 2]), ValueError, "seeds has 2 numbers; expected 1, one per pair"),
        (dict(seeds=[1.5]), TypeError, "expected a sequence of integers"),
        (dict(seeds=7), TypeError, "seeds is 7; expected a sequence of integers"),
        (dict(mean="x"), ValueError, "mean is 'x'; expected a number, or three"),
        (dict(mean=(0.5, 0.5)), ValueError, "mean has 2 numbers; expected one, or three"),
        (dict(std=0), ValueError, "std is 0; expected numbers > 0"),
        (dict(background=(0, 0, 256)), ValueError, "background is .*; expected red, green and blue"),
        (dict(dtype=torch.int32), TypeError, "dtype is torch.int32; expected torch.bfloat16"),
        (dict(on_error="skip"), ValueError, "on_error is 'skip'"),
        (dict(limits=100), TypeError, "limits is a int"),
        (dict(threads=0), ValueError, "threads is 0; expected an int from 1 to 1024"),
        (dict(out=[]), TypeError, "out is a list"),
        (
            dict(out=torch.zeros(2, 3, 8, 9)),
            ValueError,
            r"out has shape \(2, 3, 8, 9\); expected \(2, 3, 8, 8\)",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8)),
            TypeError,
            "out has dtype torch.float32; expected torch.bfloat16",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16).transpose(2, 3)),
            ValueError,
            "expected a contiguous CPU tensor",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16, device="meta")),
            ValueError,
            "out is on meta",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        decode_pairs(**{**dict(win=[GOOD], lose=[GOOD], size=8), **change})


def test_public_names_are_documented():
    for name in ("decode_pairs", "loss", "DecodedPairs", "DecodeLimits", "DecodeError", "DecodeFailure"):
        assert getattr(polydpo_fast, name).__doc__


def test_errors_cross_process_boundaries():
    with pytest.raises(DecodeError) as error:
        decode_pairs([b"", GOOD], [GOOD, b"x"], size=8)
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)
    assert copy.failures == error.value.failures


def test_sequences_that_change_during_the_call_do_no_harm():
    """A prefetcher's list: what is decoded is what the list held when the call began."""

    class Growing(Sequence):
        def __init__(self):
            self.asked = 0

        def __len__(self):
            self.asked += 1
            return 1 if self.asked == 1 else 40

        def __getitem__(self, index):
            if index >= 40:
                raise IndexError
            return GOOD

    with pytest.raises(ValueError, match="expected"):
        decode_pairs(Growing(), [GOOD], size=8)
    images, stop = [GOOD], threading.Event()

    def change():
        while not stop.is_set():
            images.extend([GOOD] * 40)
            del images[1:]

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(200):
        with contextlib.suppress(ValueError):
            decode_pairs(images, [GOOD], size=8)
    stop.set()
    thread.join()


def test_overwriting_a_tensor_that_autograd_saved_is_an_error():
    out = torch.zeros(2, 3, 8, 8)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * out).sum()
    decode_pairs([GOOD], [GOOD], size=8, dtype=torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("bad", [dict(pixels=0), dict(bytes=1.5), dict(scans=2**40), dict(pixels=True)])
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match=rf"limits.{next(iter(bad))} is .*; expected an int from 1 to"):
        DecodeLimits(**bad)
