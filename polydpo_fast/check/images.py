"""Decoding of images: whole ones against Pillow or the numbers that were written, and what is made of these against the
transform in float64. What is drawn for a pair is recomputed from its seed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from .cases import Draw
from .data import normalised, picture, rounded
from .encoding import JPEGS, KINDS, Encoded, encode, upright
from .formulas import crop_at, drawn
from .report import Finding, must
from .transform import cut_out, fit

__all__ = ["image"]

_PAIRS = 8  # copies of the pair, of as many seeds
# Of the decoder. Options that equal them are left out of the call, so that the defaults are checked too.
_DEFAULTS: dict[str, Any] = dict(
    resize="cover", interpolation="bilinear", crop="center", hflip=0.0, background=(255, 255, 255), dtype=torch.bfloat16
)
_MEAN = _STD = 0.5  # likewise
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_Found = tuple[Finding, str]


class _Given(NamedTuple):
    """A pair of images, and what is asked of the decoder. how: its options, but for those that equal its defaults."""

    arms: list[Encoded]
    size: tuple[int, int]
    resize: str | None
    interpolation: str
    crop: str
    hflip: float
    background: tuple[int, int, int]
    seeds: list[int]

    @property
    def how(self) -> dict[str, Any]:
        names = ("resize", "interpolation", "crop", "hflip", "background")
        others = {name: getattr(self, name) for name in names if getattr(self, name) != _DEFAULTS[name]}
        return {"size": self.size, **others}

    def __str__(self) -> str:
        kinds = (f"{x.kind} turned {x.orientation}" if x.orientation > 1 else x.kind for x in self.arms)
        shapes = ("x".join(map(str, x.levels.shape[:2])) for x in self.arms)
        return (
            f"{' and '.join(kinds)} of {' and '.join(shapes)} to {self.size[0]}x{self.size[1]}, "
            f"resize={self.resize}, {self.interpolation}, {self.crop} crop"
        )


def image(seed: int, number: int) -> Iterator[_Found]:
    """A pair of images of two formats: whole, in a batch of many crops and mirrors, alone, damaged. Needs Pillow."""
    from ..decode import decode_pairs

    d = Draw(seed, number)
    given = _draw_pair(d)
    what = str(given)
    whole = []
    for arm in given.arms:
        pixels = _whole(arm.data, arm.levels.shape[:2], background=given.background)
        levels = float(np.abs(pixels - arm.levels).max())
        yield Finding("pixels" if arm.kind in JPEGS else "pixels, lossless", levels / arm.off, levels), what
        whole.append(pixels.astype(np.float64))
        if arm.orientation > 1:
            yield _as_stored(arm, pixels, given.background), what

    win, lose = ([arm.data] * _PAIRS for arm in given.arms)
    how: Any = dict(seeds=given.seeds, **given.how)
    batch = decode_pairs(win, lose, dtype=torch.uint8, threads=d.integer(1, 3), **how)
    resized = [fit(x, given.size, given.resize, given.interpolation) for x in whole]
    yield _geometry(given, batch, [x.shape[:2] for x in resized]), what
    expected = _cut_out(given, batch, resized)
    levels = float(np.abs(batch.pixels.numpy() - expected).max())
    if given.resize is None:
        yield must("geometry", levels == 0, f"{levels:.0f} levels off"), what
    else:
        yield Finding("pixels, resized", levels / 0.6, levels), what
    yield from _normalised(d, win, lose, how, expected, what)
    yield _alone(d, given, batch), what
    yield from _damaged(given, batch, what)
    if given.arms[0].kind == "JPEG 4:2:0":
        yield _planes(d, given.arms[0].data, whole[0]), what
    if number == 0:
        yield _unseeded(win[:1] * 40), "40 pairs without seeds"
        yield _large(d), "16 pairs of 256x256"


def _draw_pair(d: Draw) -> _Given:
    resize = d.deal("resize", (None, "cover", "contain", "stretch"))
    size = [d.integer(8, 60), d.integer(8, 60)]
    if d.deal("wide", (True, False)):  # rows long enough for the widest stores
        size[1] = d.integer(64, 200)
    colour = d.deal("colour", (None, (d.integer(0, 255), d.integer(0, 255), d.integer(0, 255)))) or (255, 255, 255)
    kinds: tuple[str, str] = d.deal("kind", KINDS), d.one_of(KINDS)
    sides = [[side + d.integer(0, 90) if resize is None else d.integer(8, 250) for side in size] for _ in kinds]
    if d.chance(0.3):
        sides[1] = sides[0]
    arms = [encode(d, kind, of[0], of[1], colour) for kind, of in zip(kinds, sides, strict=True)]
    crop, interpolation = d.deal("crop", ("random", "center", "random")), d.deal("filter", ("bilinear", "bicubic"))
    hflip = d.deal("hflip", (0.5, 0.0, 0.2, 1.0))
    seeds = [d.integer(0, 2**62) for _ in range(_PAIRS)]
    return _Given(arms, (size[0], size[1]), resize, interpolation, crop, hflip, colour, seeds)


def _whole(data: bytes, size: tuple[int, ...], **options: Any) -> np.ndarray:
    """The whole image, (H, W, 3) uint8."""
    from ..decode import decode_pairs

    how: Any = dict(size=size, resize=None, dtype=torch.uint8, **options)
    pixels: np.ndarray = decode_pairs([data], [data], **how).pixels[0].numpy()
    return pixels.transpose(1, 2, 0)


def _as_stored(arm: Encoded, pixels: np.ndarray, background: tuple[int, int, int]) -> Finding:
    """pixels: of the image as it is meant."""
    undone_by = {6: 8, 8: 6}.get(arm.orientation, arm.orientation)  # the others by themselves
    stored = upright(pixels, undone_by)
    ignored = _whole(arm.data, stored.shape[:2], background=background, exif="ignore")
    return must("geometry", np.array_equal(ignored, stored), "exif='ignore' is not heeded")


def _cut_out(given: _Given, batch: Any, resized: list[np.ndarray]) -> np.ndarray:
    """What the batch's mirrors and corners make of whole images that were resized, (2B, 3, H, W)."""
    places = zip(batch.flipped.repeat(2).tolist(), batch.crop_top_left.tolist(), strict=True)
    return np.stack(
        [
            cut_out(resized[row // _PAIRS], bool(flip), corner, given.size, given.background)
            for row, (flip, corner) in enumerate(places)
        ]
    )


def _alone(d: Draw, given: _Given, batch: Any) -> Finding:
    """One of the pairs, on other threads and into memory of its own."""
    from ..decode import decode_pairs

    pair = d.integer(0, _PAIRS - 1)
    out = torch.full((2, 3, *given.size), 77, dtype=torch.uint8)
    few: Any = dict(seeds=[given.seeds[pair]], dtype=torch.uint8, threads=d.integer(1, 3), out=out)
    win, lose = ([arm.data] for arm in given.arms)
    alone = decode_pairs(win, lose, **few, **given.how)
    rows = [pair, _PAIRS + pair]
    same = torch.equal(out, batch.pixels[rows]) and torch.equal(alone.crop_top_left, batch.crop_top_left[rows])
    return must("threads, batch", same)


def _geometry(given: _Given, batch: Any, resized: list[tuple[int, ...]]) -> Finding:
    """Sizes; corners in the middle, or of each pair at one fraction of both arms' places; mirrors."""
    sizes = [list(arm.levels.shape[:2]) for arm in given.arms for _ in range(_PAIRS)]
    if batch.original_size.tolist() != sizes:
        return must("geometry", False, f"original_size is {batch.original_size.tolist()}")
    numbers = [drawn(seed) for seed in given.seeds]
    if given.crop == "center":
        corners = [
            [round(max(0, m - n) / 2) for m, n in zip(of, given.size, strict=True)] for of in resized for _ in numbers
        ]
    else:
        corners = [crop_at(of_pair, of, given.size) for of in resized for of_pair in numbers]
    flipped = [mirror / 2**64 < given.hflip for _, _, mirror, _ in numbers]
    found = batch.crop_top_left.tolist(), batch.flipped.tolist()
    return must("crops", found == (corners, flipped), f"corners, mirrors are {found} instead of {(corners, flipped)}")


def _normalised(
    d: Draw, win: list[bytes], lose: list[bytes], how: dict[str, Any], expected: np.ndarray, what: str
) -> Iterator[_Found]:
    """float32 to the levels and another dtype to float32; or to the levels, where these are whole."""
    from ..decode import decode_pairs

    means, stds = ([d.between(low, high) for _ in "rgb"] for low, high in ((0, 0.6), (0.2, 1)))
    given: Any = dict(mean=means, std=stds)
    if d.deal("normalisation", (True, False, False)):
        means, stds, given = [_MEAN] * 3, [_STD] * 3, {}
    dtype = d.deal("float", _FLOATS)
    of_other: Any = {} if dtype == _DEFAULTS["dtype"] else dict(dtype=dtype)
    other = decode_pairs(win, lose, **of_other, **given, **how).pixels
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (means, stds))
    levels = torch.from_numpy(expected)
    if how.get("resize", "cover") is None:
        found = normalised(other, levels, mean, std)
    else:
        single = decode_pairs(win, lose, dtype=torch.float32, **given, **how).pixels.double()
        off = float(((single * std + mean) * 255 - levels).abs().max())
        yield Finding("resized in float32", off / 0.03, off), what
        found = rounded(other, single)
    yield found, f"{dtype}, mean and std by channel, {what}"


def _large(d: Draw) -> Finding:
    """A batch that is written past the caches: 8 MB and more of 16-bit pixels, in rows of whole cache lines."""
    from PIL import Image

    from ..decode import decode_pairs

    arms = []
    for kind in ("PNG", "JPEG"):
        Image.fromarray(picture(d, 256, 256)).save(file := io.BytesIO(), kind)
        arms.append([file.getvalue()])
    one = decode_pairs(*arms, size=256, resize=None).pixels
    many = decode_pairs(*(16 * arm for arm in arms), size=256, resize=None).pixels
    same = torch.equal(many.unflatten(0, (2, 16)), one[:, None].expand(2, 16, *one.shape[1:]))
    return must("threads, batch", same)


# ------------------------------------------------------------------------------------------- what is promised


def _damaged(given: _Given, batch: Any, what: str) -> Iterator[_Found]:
    """The middle of three pairs is cut off: refused by name, or masked. A JPEG without its end may be let pass."""
    from ..decode import DecodeError, decode_pairs

    arms = given.arms
    win, lose = ([arm.data] * 3 for arm in arms)
    lose[1] = lose[1][: len(lose[1]) // 2]
    few: Any = dict(seeds=given.seeds[:3], dtype=torch.uint8, **given.how)
    try:
        decode_pairs(win, lose, **few)
        yield must("damage", False, "half an image was decoded"), what
    except DecodeError as error:
        right = [(failure.arm, failure.index) for failure in error.failures] == [("lose", 1)]
        yield must("damage", right, error), what
    masked = decode_pairs(win, lose, on_error="mask", **few)
    rows = [0, 2, 3, 5]
    others = batch.pixels[[0, 2, _PAIRS, _PAIRS + 2]]
    right = masked.ok.tolist() == [True, False, True] and torch.equal(masked.pixels[rows], others)
    right = right and not masked.pixels[[1, 4]].any() and [(e.arm, e.index) for e in masked.errors] == [("lose", 1)]
    yield must("masked", right), what
    if arms[0].kind in JPEGS and arms[0].levels[..., 0].size > 4000:
        cut = [arms[0].data, arms[0].data[:-20]]
        passed = decode_pairs([arms[1].data] * 2, cut, size=16, resize="stretch", strict=False)
        right = bool(passed.ok.all()) and [(x.arm, x.index) for x in passed.damaged] == [("lose", 1)]
        yield must("damage let pass", right, passed.damaged), what


def _planes(d: Draw, data: bytes, whole: np.ndarray) -> Finding:
    """Of the whole image, and of crops but for their outermost pixels, whose neighbours' colours are cut off."""
    from ..decode import decode_pairs
    from ..yuv import yuv420_to_rgb

    height, width = whole.shape[:2]
    for size in ((height, width), (2 * d.integer(4, height // 2), 2 * d.integer(4, width // 2))):
        how: Any = dict(size=size, resize=None, crop="random", hflip=0.5, seeds=[d.integer(0, 2**62) for _ in "pair"])
        batch = decode_pairs(4 * [data], 4 * [data], dtype="yuv420", **how)
        flips = batch.flipped.repeat(2)
        pixels = yuv420_to_rgb(batch.pixels, flip=flips, dtype=torch.uint8).numpy()
        inside = slice(None) if size == (height, width) else slice(1, -1)
        for row, (flip, corner) in enumerate(zip(flips.tolist(), batch.crop_top_left.tolist(), strict=True)):
            expected = cut_out(whole, flip, corner, size, (0, 0, 0))
            if not np.array_equal(pixels[row, :, inside, inside], expected[:, inside, inside]):
                return must("planes of JPEG", False, f"other pixels of {size} at {corner}, mirrored: {flip}")
    return must("planes of JPEG", True)


def _unseeded(images: list[bytes]) -> Finding:
    """Without seeds each call draws others, which torch.manual_seed repeats."""
    from ..decode import decode_pairs

    found = []
    with torch.random.fork_rng(devices=()):
        for repeated in (0, None, 0):
            if repeated is not None:
                torch.manual_seed(repeated)
            found.append(decode_pairs(images, images, size=8, hflip=0.5).flipped.tolist())
    return must("crops", found[0] == found[2] != found[1], f"mirrors are {found}")
