"""Which JPEGs DALI may have, and what it is told of them. Needs no DALI."""

import pytest
from image_oracle import jpeg, picture, png
from PIL import Image

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import is_for_dali, oriented, plans

from polydpo_fast import DecodeLimits, decode_pairs
from polydpo_fast.decoding.draws import draw_of


@pytest.mark.parametrize(
    "image",
    [
        jpeg(picture(61, 83), subsampling=0),
        jpeg(picture(61, 83), subsampling=1),
        jpeg(picture(61, 83), subsampling=2),
        jpeg(picture(61, 83), progressive=True),
        jpeg(picture(61, 83), restart_marker_blocks=2),
        *(jpeg(picture(61, 83), subsampling=s, restart_marker_blocks=1) for s in range(3)),
        *(jpeg(picture(61, 83), subsampling=s, progressive=True, restart_marker_blocks=1) for s in range(3)),
        jpeg(picture(61, 83).convert("L")),
        jpeg(picture(61, 83).convert("L"), restart_marker_blocks=3),
        jpeg(picture(61, 83)) + b"what follows the end is not looked at",
    ],
)
def test_common_jpegs_are_for_dali(image):
    assert is_for_dali(image)
    assert (plans(image)[0]["height"], plans(image)[0]["width"]) == (61, 83)


def changed(marker, offset, value):
    """A JPEG with another byte at that offset from a marker."""
    image = bytearray(jpeg(picture(61, 83), subsampling=0))
    image[image.index(marker) + offset] = value
    return bytes(image)


RESTARTED = jpeg(picture(61, 83), subsampling=0, restart_marker_blocks=22)  # 4 times


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\xff\xd8\xff",
        png(picture(61, 83)),
        jpeg(picture(61, 83).convert("CMYK")),
        jpeg(picture(61, 83), keep_rgb=True),
        changed(b"\xff\xc0", 1, 0xC9),  # arithmetic coding
        changed(b"\xff\xc0", 4, 12),  # bits per sample
        changed(b"\xff\xc0", 11, 0x41),  # 4:1:1
        changed(b"\xff\xda", 1, 0xD8),  # no scan, but a second start
        changed(b"\xff\xda", 11, 1),  # a scan without the first coefficient
        changed(b"\xff\xda", 12, 62),  # and without the last one
        changed(b"\xff\xda", 13, 1),  # and without a bit
        RESTARTED.replace(b"\xff\xd1", b"\xff\xd6"),
        RESTARTED.replace(b"\xff\xd1", b""),
        RESTARTED.replace(b"\xff\xd9", b"\xff\xd4\xff\xd9"),
    ],
)
def test_others_are_not(image):
    assert not is_for_dali(image)


@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(restart_marker_blocks=1)], ids=str)
def test_no_truncated_jpeg_is_for_dali(options):
    """Every length; a thumbnail's end-of-image marker in the EXIF is not the image's."""
    thumbnail = Image.Exif()
    thumbnail[0x010E] = "\xff\xd9" * 3
    whole = jpeg(picture(24, 40), exif=thumbnail, **options)
    assert is_for_dali(whole)
    assert not [length for length in range(len(whole)) if is_for_dali(whole[:length])]


def test_limits_are_those_of_the_cpp_decoder():
    image = jpeg(picture(61, 83), progressive=True)
    assert is_for_dali(image, limits=DecodeLimits(61 * 83, len(image), 10))
    for tight in (
        dict(pixels=61 * 83 - 1),
        dict(bytes=len(image) - 1),
        dict(decoded=100),
        dict(scans=9),
    ):
        assert not is_for_dali(image, limits=DecodeLimits(**tight))
    few = DecodeLimits(decoded=1000)  # as little as a baseline JPEG takes, until it is resized
    assert is_for_dali(jpeg(picture(32, 32)), limits=few)
    assert not is_for_dali(jpeg(picture(61, 83)), limits=few)


def test_what_does_not_fit_is_left_to_cpp():
    assert not is_for_dali(jpeg(picture(20, 40)), resize=None)
    assert is_for_dali(jpeg(picture(32, 32)), resize=None)


def test_the_plan_is_the_one_that_cpp_follows():
    """The corner that it tells is the corner that decode_pairs reports, whatever the orientation and the draw."""
    images, seeds = [oriented(o) for o in range(1, 9)], range(8)
    options = dict(size=(32, 48), crop="random", hflip=0.5, seeds=seeds)
    known = decode_pairs(images, images, **options)
    found = plans(*images, draws=[draw_of(seed, "random", 0.5) for seed in seeds], size=(32, 48))
    assert [[plan["top"], plan["left"]] for plan in found] == known.crop_top_left[:8].tolist()
    assert [plan["transposed"] for plan in found] == [orientation >= 5 for orientation in range(1, 9)]
