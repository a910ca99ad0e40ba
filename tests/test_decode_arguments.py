"""Bad arguments of `decode_pairs`, and its documentation."""

import numpy as np
import pytest
import torch
from image_oracle import GOOD

import polydpo_fast
from polydpo_fast import decode_pairs


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
