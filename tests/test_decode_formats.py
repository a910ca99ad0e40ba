"""`decode_pairs` on every kind of JPEG and PNG, and on the formats that go through Pillow."""

import base64
import io

import numpy as np
import pytest
import torch
from image_oracle import GOOD, chunk, exif, file, jpeg, levels_apart, picture, pillow_pixels, png, written
from PIL import Image, ImageFile

from polydpo_fast import DecodeError, decode_pairs

PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type


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


def test_a_pillow_without_avif(monkeypatch):
    """As before version 11.3: its other formats are decoded, and what is no image is named as such."""
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    image = picture(33, 45)
    data = file(image, "BMP")
    decoded = decode_pairs([data], [data], size=(33, 45), resize=None, dtype=torch.uint8)
    assert np.array_equal(decoded.pixels[0].numpy(), np.asarray(image).transpose(2, 0, 1))
    with pytest.raises(DecodeError, match="no image of a known format"):
        decode_pairs([b"<html>"], [data], size=8)


def test_sixteen_bit_pixels_that_pillow_would_clip_are_refused():
    data = file(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "TIFF")
    with pytest.raises(DecodeError, match=r"mode I;16.*; expected 8 bits per channel"):
        decode_pairs([data], [data], size=8)


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


@pytest.mark.parametrize("shape", [(1, 65_500), (65_500, 1), (3, 65_500)])
def test_the_widest_jpegs(shape):
    data = jpeg(Image.new("RGB", shape[::-1], (200, 100, 50)), quality=100, subsampling=0)
    for options in (dict(resize="stretch"), dict(resize="contain", background=(200, 100, 50))):
        pixels = decode_pairs([data], [data], size=8, dtype=torch.uint8, **options).pixels[0]
        assert (pixels.int() - torch.tensor([200, 100, 50]).reshape(3, 1, 1)).abs().max() <= 2
