"""What tests of `DaliDecoder` share."""

import pytest
import torch
from image_oracle import jpeg, picture
from PIL import Image

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from polydpo_fast import _C, DecodeLimits
from polydpo_fast.data.dali import decoder as dali
from polydpo_fast.decoding.arguments import Output
from polydpo_fast.decoding.draws import Draw

LEVELS = dict(dtype=torch.float32, mean=0.0, std=1 / 255)  # pixels are levels of 255, not rounded
LIMITS = DecodeLimits()
CENTRE = Draw(True, 0, 0, False)
needs_dali = pytest.mark.skipif(not dali._is_installed(), reason="nvidia-dali is not installed")


def oriented(orientation, shape=(61, 83), **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(picture(*shape, seed=orientation), exif=exif, **options)


def assert_same_facts(a, b, *names):
    for name in ("ok", "original_size", "crop_top_left", "flipped", *names):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.errors == b.errors


def plans(*images, draws=(CENTRE,), size=(32, 32), resize="cover", limits=LIMITS):
    output = Output(size, resize, "bilinear", "uint8", (0, 0, 0), (1, 1, 1), (0, 0, 0))
    return _C.foreign_plans(images, draws=draws, output=output, apply_orientation=True, limits=limits)


def is_for_dali(image, **options):
    return plans(image, **options)[0] is not None
