"""`decode_pairs` on bytes that are damaged, cut off, or no image."""

import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_oracle import GOOD, bomb, chunk, jpeg, picture, pillow_pixels, png, truncated, written
from PIL import Image

from polydpo_fast import DecodeError, decode_pairs


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


def interlaced(pixels):
    return written(pixels, 2, 8, interlace=True)


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


def test_masking_works_in_an_inference_tensor():
    data = jpeg(picture(20, 20))
    with torch.inference_mode():
        out = torch.ones(4, 3, 8, 8)
    decoded = decode_pairs([data, b""], [data, data], size=8, dtype=torch.float32, out=out, on_error="mask")
    assert decoded.ok.tolist() == [True, False]
    assert not out[[1, 3]].any()
    assert out[[0, 2]].any()


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


def test_errors_cross_process_boundaries():
    with pytest.raises(DecodeError) as error:
        decode_pairs([b"", GOOD], [GOOD, b"x"], size=8)
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)
    assert copy.failures == error.value.failures
