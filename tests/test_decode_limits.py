"""What an image may cost: limits, and images that would take more."""

import os
import struct
import subprocess
import sys
import time
import zlib

import pytest
import torch
from image_oracle import GOOD, bomb, chunk, exif, file, jpeg, picture, png, segment
from PIL import Image

from polydpo_fast import DecodeError, DecodeLimits, decode_pairs
from polydpo_fast.decoding import pillow


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
        assert pillow._webp_size(data) == shape[::-1]
    assert pillow._webp_size(memoryview(b"RIFF")) == (0, 0)


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


def test_pillows_own_limit_is_told(monkeypatch):
    """It is the process's, and stays as it is."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    data = file(picture(20, 20), "BMP")
    with pytest.raises(DecodeError, match=r"400 pixels.*twice PIL\.Image\.MAX_IMAGE_PIXELS, beside limits\.pixels"):
        decode_pairs([data], [jpeg(picture(20, 20))], size=8)
    assert Image.MAX_IMAGE_PIXELS == 199


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


def test_what_a_resize_keeps_is_limited_too():
    """Rows that one output row is blended from: all of them, at the output's width."""
    data = jpeg(Image.new("L", (2, 40_000)))
    with pytest.raises(DecodeError, match=r"limits\.decoded"):
        decode_pairs([data], [data], size=(1, 16_000), resize="stretch")


GOOD_PNG = png(picture(24, 24))


@pytest.mark.parametrize("bad", [dict(pixels=0), dict(bytes=1.5), dict(scans=2**40), dict(pixels=True)])
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match=rf"limits.{next(iter(bad))} is .*; expected an int from 1 to"):
        DecodeLimits(**bad)
