"""Images by `DaliDecoder` against the C++ decoder, on DALI's CPU operators."""

import pytest
import torch
from image_oracle import jpeg, picture, png
from PIL import Image

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from data.dali_cases import LEVELS, assert_same_facts, is_for_dali, oriented

from polydpo_fast import DecodeError, DecodeLimits, decode_pairs
from polydpo_fast.data.dali import images as dali_images
from polydpo_fast.decoding.draws import Draw

SHAPES = [((300, 200), 128), ((61, 83), (31, 50)), ((64, 64), 200), ((300, 41), 64), ((700, 700), 64)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("resize", ["cover", "contain", "stretch"])
def test_resized_pixels_are_those_of_cpp(decoder, shape, size, resize, interpolation):
    """All orientations, mirrored or not. The filters are the same; that of C++ across is rounded: 1/32 level, of the
    cubic one, whose second pass enlarges it by up to 1.3, a bit more."""
    win = [oriented(o, shape, subsampling=o % 3) for o in range(1, 9)]
    lose = [oriented(9 - o, shape, progressive=True) for o in range(1, 9)]
    options = dict(size=size, resize=resize, interpolation=interpolation, crop="random", hflip=0.5, seeds=range(8))
    a = decode_pairs(win, lose, background=(3, 99, 200), **LEVELS, **options)
    b = decoder.decode_pairs(win, lose, background=(3, 99, 200), **LEVELS, **options)
    assert_same_facts(a, b)
    assert (a.pixels - b.pixels).abs().max() <= 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (8, 8), (1, 1), (512, 40), (20, 700), (128, 1000)])
def test_sharp_edges_at_the_border_are_those_of_cpp(decoder, size, interpolation):
    """Where a filter leaves the image, and where it overshoots: of both passes in their order."""
    framed = Image.new("RGB", (512, 384), "black")
    framed.paste("white", (1, 1, 511, 383))
    framed.paste("black", (200, 100, 203, 240))
    image = jpeg(framed, quality=100, subsampling=0)
    options = dict(size=size, resize="stretch", interpolation=interpolation, **LEVELS)
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert (a.pixels - b.pixels).abs().max() <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("resize", [None, "cover", "contain"])
def test_pixels_that_are_not_resized_are_the_same_bits(decoder, in_cpp, dtype, resize):
    """All orientations and samplings, from the inside of a JPEG too; or with padding on two sides."""
    size = {None: (40, 48), "cover": (61, 83), "contain": (61, 120)}[resize]
    images = [oriented(o if resize is None else 1 + (o - 1) % 4, subsampling=o % 3) for o in range(1, 9)]
    options = dict(size=size, resize=resize, crop="random", hflip=0.5, seeds=range(8), dtype=dtype)
    options |= dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), background=(9, 8, 7))
    a, b = decode_pairs(images, images[::-1], **options), decoder.decode_pairs(images, images[::-1], **options)
    assert_same_facts(a, b)
    assert torch.equal(a.pixels, b.pixels)
    assert in_cpp == [1] * 8  # the canaries alone


@pytest.mark.parametrize("column", [0, 7])
def test_crops_of_one_column(decoder, column, monkeypatch):
    image = jpeg(picture(61, 83), subsampling=2)
    draw = Draw(False, 0, (column << 32) // 83, False)
    monkeypatch.setattr("polydpo_fast.decoding.arguments.draw_of", lambda *_: draw)
    options = dict(size=(50, 1), resize=None, crop="random")
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert abs(int(a.crop_top_left[0, 1]) - column) <= 1
    assert torch.equal(a.pixels, b.pixels)


def test_large_batches_are_decoded_in_parts(decoder, in_cpp, monkeypatch):
    """So that what is decoded is bounded, whatever the images are resized to."""
    runs, run = [], dali_images._run
    monkeypatch.setattr(dali_images, "_run", lambda engine, rows, *a: runs.append(len(rows)) or run(engine, rows, *a))
    monkeypatch.setattr(dali_images, "_RUN_BYTES", 3 * 3 * 60 * 60)
    images = [jpeg(picture(60, 60, seed=i)) for i in range(4)] + [jpeg(picture(300, 300))]
    options = dict(size=60)
    a, b = decode_pairs(images, images, **options), decoder.decode_pairs(images, images, **options)
    assert sorted(runs) == [1, 1, 1, 1, 3, 3]
    assert in_cpp == [1] * 5
    assert (a.pixels - b.pixels).abs().max() < 0.005


def test_the_default_device_does_not_matter(decoder, clips):
    image = jpeg(picture(48, 48))
    with torch.device("meta"):
        assert decoder.decode_pairs([image], [image], size=32).ok.all()
        assert decoder.decode_clips([clips["small"]], [clips["small"]], frames=2, size=32).ok.all()


def test_seeds_are_drawn_once(decoder):
    """One pair by DALI and one by C++, without seeds: torch.manual_seed decides, as for decode_pairs."""
    win, lose = [jpeg(picture(60, 60)), png(picture(60, 60))], [jpeg(picture(60, 60))] * 2
    options = dict(size=(30, 30), resize=None, crop="random", hflip=0.5)
    torch.manual_seed(5)
    a = decode_pairs(win, lose, **options)
    torch.manual_seed(5)
    b = decoder.decode_pairs(win, lose, **options)
    assert_same_facts(a, b)
    assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize("resize", [None, "cover"])
def test_what_is_not_for_dali_goes_through_cpp(decoder, in_cpp, resize):
    good = jpeg(picture(48, 48))
    win = [good, png(picture(48, 48)), good, good, jpeg(picture(50, 48).convert("CMYK"))]
    lose = [good, good, good[:-9], b"no image", good]
    options = dict(size=48 if resize is None else 32, resize=resize, on_error="mask")
    a, b = decode_pairs(win, lose, **options), decoder.decode_pairs(win, lose, **options)
    assert_same_facts(a, b)
    assert b.ok.tolist() == [True, True, False, False, True]
    assert in_cpp == [4, 1]  # and the canary
    assert (a.pixels - b.pixels).abs().max() < 0.005  # half a bfloat16's last bit
    with pytest.raises(DecodeError, match=r"lose\[2\] could not be decoded"):
        decoder.decode_pairs(win, lose, size=32)


def test_what_dali_chokes_on_costs_its_own_pair(decoder, in_cpp):
    """The quantisation tables are turned into comments: whole, by its markers, and not decodable."""
    good = jpeg(picture(48, 48))
    bad = good.replace(b"\xff\xdb", b"\xff\xfe")
    assert is_for_dali(bad)
    win, lose = [good] * 7, [good] * 3 + [bad] + [good] * 3
    got = decoder.decode_pairs(win, lose, size=48, on_error="mask")
    assert got.ok.tolist() == [True] * 3 + [False] + [True] * 3
    assert [(e.arm, e.index) for e in got.errors] == [("lose", 3)]
    assert sum(in_cpp) == 1 + 6  # itself, and the canaries
    assert not got.pixels[3].any()
    assert not got.pixels[7 + 3].any()
    assert torch.equal(got.pixels[4], decode_pairs([good], [good], size=48).pixels[0])
    assert decoder.decode_pairs([good], [good], size=48).ok.all()  # it works after that


def test_a_dali_that_decodes_nothing_is_told_of(decoder, monkeypatch):
    def broken(*_):
        raise RuntimeError("Critical error\nwhich was used in\n  a file\nencountered:\n\nout of\nmemory")

    monkeypatch.setattr(dali_images, "_run", broken)
    image = jpeg(picture(48, 48))
    with pytest.warns(
        UserWarning, match="DALI decoded none of the images of a batch that C.. could decode: out of memory$"
    ):
        got = decoder.decode_pairs([image], [image], size=32)
    assert torch.equal(got.pixels, decode_pairs([image], [image], size=32).pixels)


def test_into_a_buffer(decoder):
    image = jpeg(picture(48, 48))
    with torch.inference_mode():
        kept = torch.empty((2, 3, 32, 32), dtype=torch.float16)
    for out in (torch.full((2, 3, 32, 32), 9, dtype=torch.float16), kept):
        got = decoder.decode_pairs([image], [image], size=32, dtype=torch.float16, out=out)
        assert got.pixels is out
        assert out.abs().max() <= 1
    for wrong, message in (
        (torch.empty((2, 3, 32, 31), dtype=torch.float16), "out has shape"),
        (torch.empty((2, 3, 32, 32)), "out has dtype"),
        (torch.empty((2, 3, 32, 32), dtype=torch.float16, device="meta"), "expected a contiguous CPU tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            decoder.decode_pairs([image], [image], size=32, dtype=torch.float16, out=wrong)


def test_planes_are_those_of_cpp(decoder):
    image = jpeg(picture(48, 48), subsampling=2)
    options = dict(size=32, resize=None, dtype="yuv420")
    a, b = decode_pairs([image], [image], **options), decoder.decode_pairs([image], [image], **options)
    assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(win=[]), ValueError, "lose has 1 images; expected 0 like win"),
        (dict(lose=["x"]), TypeError, r"lose\[0\] is a str; expected a contiguous bytes-like object"),
        (dict(size=0), ValueError, "size is 0"),
        (dict(resize="crop"), ValueError, "resize is 'crop'"),
        (dict(interpolation="nearest"), ValueError, "interpolation is 'nearest'"),
        (dict(dtype=torch.float64), TypeError, "dtype is torch.float64"),
        (dict(seeds=[1, 2]), ValueError, "seeds has 2 numbers; expected 1"),
        (dict(seeds=7, crop="random"), TypeError, "seeds is 7; expected a sequence"),
        (dict(strict=1), TypeError, "strict is 1"),
        (dict(limits=3), TypeError, "limits is a int; expected a DecodeLimits"),
        (dict(std=0), ValueError, "std is 0"),
        (dict(background=(1, 2)), ValueError, "background is"),
        (dict(on_error="skip"), ValueError, "on_error is 'skip'"),
        (dict(frames=3), TypeError, "there is no option 'frames'; expected any of size, resize"),
        (dict(threads=0), ValueError, "threads is 0; expected an int from 1"),
        (dict(limits=DecodeLimits(pixels=9)), DecodeError, "limits.pixels"),
    ],
)
def test_bad_arguments(decoder, changed, error, message):
    image = jpeg(picture(40, 40))
    given = dict(win=[image], lose=[image], size=32) | changed
    with pytest.raises(error, match=message):
        decoder.decode_pairs(given.pop("win"), given.pop("lose"), **given)
