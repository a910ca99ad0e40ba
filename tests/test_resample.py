"""The resize of `decode_pairs` against filters in float64, and its loops against each other. Pillow: test_decode.py."""

import ctypes
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polydpo_fast import decode_pairs


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def exact_weights(source, resized, interpolation):
    """(resized, source) in float64: the filter of Pillow's and torchvision's antialiased resize."""
    scale = source / resized
    wide = max(scale, 1.0)
    centre = (np.arange(resized) + 0.5) * scale
    x = np.abs(np.arange(source) + 0.5 - centre[:, None]) / wide
    if interpolation == "bilinear":
        weights = np.maximum(0, 1 - x)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("width", [250, 20_000, 65_000])
def test_roundings_do_not_add_up(interpolation, width):
    """A row of the pixels whose weights rounding makes greater, to one pixel: integers of 22 bits were off by 0.7."""
    weights = exact_weights(width, 1, interpolation)[0]
    scaled = np.cumsum(weights) * 2**22
    greater = np.diff(np.round(scaled), prepend=0) > weights * 2**22
    image = np.repeat((greater * 255).astype(np.uint8)[None, :, None], 3, axis=2)
    options = dict(size=1, resize="stretch", interpolation=interpolation, dtype=torch.float32)
    pixels = decode_pairs([png(Image.fromarray(image))], [png(Image.fromarray(image))], **options).pixels[0]
    expected = weights @ (greater * 255.0)
    assert np.abs((pixels.double().numpy() + 1) * 127.5 - expected).max() <= 1 / 32


def test_rows_of_many_pixels_are_clamped_between_the_passes():
    """An edge, beside which bicubic leaves 0..255, above a row that is white."""
    image = np.full((2, 20_000, 3), 255, np.uint8)
    image[0, :10_000] = 0
    options = dict(size=(1, 9), resize="stretch", interpolation="bicubic", dtype=torch.float32)
    pixels = decode_pairs([png(Image.fromarray(image))], [png(Image.fromarray(image))], **options).pixels[0, 0, 0]
    across = exact_weights(20_000, 9, "bicubic") @ image[0, :, 0].astype(float)
    assert across.min() < -1
    expected = (across.clip(0, 255) + 255) / 2
    assert np.abs((pixels.double().numpy() + 1) * 127.5 - expected).max() <= 1 / 32


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", [(90, 70), (64, 64), (333, 411), (2000, 30), (3, 5000), (3, 60_000)])
@pytest.mark.parametrize("size", [(64, 64), (7, 150), (3, 2)])
def test_a_resize_is_exact_but_for_a_fraction_of_a_level(interpolation, source, size):
    """Weights across have 15 bits of the largest, 1/32 of a level in all; what follows is in float32."""
    random = np.random.default_rng(3)
    image = random.choice(np.array([0, 255, 130], np.uint8), (*source, 3))
    options = dict(size=size, resize="stretch", interpolation=interpolation, dtype=torch.float32)
    pixels = decode_pairs([png(Image.fromarray(image))] * 1, [png(Image.fromarray(image))], **options).pixels[0]
    across, down = (exact_weights(source[axis], size[axis], interpolation) for axis in (1, 0))
    passes = [("xw,hwc->hxc", across), ("yh,hwc->ywc", down)]
    if source[0] - size[0] > max(0, 2 * (source[1] - size[1])):  # over twice as many rows are lost as columns
        passes.reverse()
    expected = image
    for axes, weights in passes:
        expected = np.einsum(axes, weights, expected).clip(0, 255)
    expected = expected.transpose(2, 0, 1)
    assert np.abs((pixels.double().numpy() + 1) * 127.5 - expected).max() <= 1 / 32


@pytest.fixture(scope="module")
def resample_both(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("resample") / "resample_rows.so"
    source = Path(__file__).with_name("resample_rows.cpp")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", "-Wno-unused", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).resample_both


@given(data=st.data())
def test_a_resize_is_the_same_on_every_processor(resample_both, data):
    quads, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    first = random.integers(0, 30, width, dtype=np.int32)
    pixels = random.integers(0, 256, 4 * (30 + 4 * quads), dtype=np.uint8)
    weights = random.integers(-32768, 32768, 4 * quads * width, dtype=np.int16)
    plain, quick = np.full((2, 4 * width), -1, np.float32)
    unit = ctypes.c_float(2.0 ** -data.draw(st.integers(12, 22)))
    missing = resample_both(
        *(array.ctypes.data_as(ctypes.c_void_p) for array in (pixels, first, weights)), quads, width, unit,
        *(array.ctypes.data_as(ctypes.c_void_p) for array in (plain, quick)),
    )  # fmt: skip
    if missing:
        pytest.skip("this processor has no AVX2")
    assert np.array_equal(plain, quick)
    assert (plain >= 0).all()


@pytest.mark.parametrize("source", [(500, 37), (37, 500), (8, 8)])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_an_even_colour_stays_as_it_is(source, level):
    data = png(Image.new("RGB", source, (level, 255 - level, level)))
    for interpolation in ("bilinear", "bicubic"):
        options = dict(size=(30, 33), resize="stretch", interpolation=interpolation, dtype=torch.float32)
        levels = (decode_pairs([data], [data], **options).pixels[0] + 1) * 127.5
        expected = torch.tensor([level, 255.0 - level, level])[:, None, None]
        assert (levels - expected).abs().max() <= 1e-4
