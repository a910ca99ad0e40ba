"""Decoding of images: whole ones against Pillow or the numbers that were written, and what is made of these against the
transform in float64. What is drawn for a pair is recomputed from its seed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

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


def image(seed: int, number: int) -> Iterator[_Found]:
    """A pair of images of two formats: whole, in a batch of many crops and mirrors, alone, damaged. Needs Pillow."""
    from ..decode import decode_pairs

    d = Draw(seed, number)
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
    how: Any = dict(
        size=tuple(size), resize=resize, interpolation=interpolation, crop=crop, hflip=hflip, background=colour
    )
    how = {name: x for name, x in how.items() if name == "size" or x != _DEFAULTS[name]}
    what = (
        f"{' and '.join(f'{x.kind} turned {x.orientation}' if x.orientation > 1 else x.kind for x in arms)} of "
        f"{' and '.join('x'.join(map(str, x.levels.shape[:2])) for x in arms)} to {size[0]}x{size[1]}, "
        f"resize={resize}, {interpolation}, {crop} crop"
    )

    whole = []
    for arm in arms:
        full: Any = dict(size=arm.levels.shape[:2], resize=None, background=colour, dtype=torch.uint8)
        pixels = decode_pairs([arm.data], [arm.data], **full).pixels[0].numpy().transpose(1, 2, 0)
        levels = float(np.abs(pixels - arm.levels).max())
        yield Finding("pixels" if arm.kind in JPEGS else "pixels, lossless", levels / arm.off, levels), what
        whole.append(pixels.astype(np.float64))
        if arm.orientation > 1:
            undone_by = {6: 8, 8: 6}.get(arm.orientation, arm.orientation)  # the others by themselves
            as_stored = upright(pixels, undone_by)
            full |= dict(size=as_stored.shape[:2], exif="ignore")
            ignored = decode_pairs([arm.data], [arm.data], **full).pixels[0].numpy().transpose(1, 2, 0)
            yield must("geometry", np.array_equal(ignored, as_stored), "exif='ignore' is not heeded"), what

    win, lose = ([arm.data] * _PAIRS for arm in arms)
    batch = decode_pairs(win, lose, seeds=seeds, dtype=torch.uint8, threads=d.integer(1, 3), **how)
    resized = [fit(x, tuple(size), resize, interpolation) for x in whole]
    yield _geometry(arms, batch, [x.shape[:2] for x in resized], tuple(size), crop, hflip, seeds), what
    expected = np.stack(
        [
            cut_out(resized[row // _PAIRS], bool(flip), corner, tuple(size), colour)
            for row, (flip, corner) in enumerate(
                zip(batch.flipped.repeat(2).tolist(), batch.crop_top_left.tolist(), strict=True)
            )
        ]
    )
    levels = float(np.abs(batch.pixels.numpy() - expected).max())
    if resize is None:
        yield must("geometry", levels == 0, f"{levels:.0f} levels off"), what
    else:
        yield Finding("pixels, resized", levels / 0.6, levels), what
    yield from _normalised(d, win, lose, {**how, "seeds": seeds}, expected, what)

    pair = d.integer(0, _PAIRS - 1)
    out = torch.full((2, 3, *size), 77, dtype=torch.uint8)
    few: Any = dict(seeds=[seeds[pair]], dtype=torch.uint8, threads=d.integer(1, 3), out=out)
    alone = decode_pairs(win[:1], lose[:1], **few, **how)
    rows = [pair, _PAIRS + pair]
    same = torch.equal(out, batch.pixels[rows]) and torch.equal(alone.crop_top_left, batch.crop_top_left[rows])
    yield must("threads, batch", same), what
    yield from _damaged(arms, batch, seeds, how, what)
    if arms[0].kind == "JPEG 4:2:0":
        yield _planes(d, arms[0].data, whole[0]), what
    if number == 0:
        yield _unseeded(win[:1] * 40), "40 pairs without seeds"
        yield _large(d), "16 pairs of 256x256"


def _geometry(
    arms: list[Encoded],
    batch: Any,
    resized: list[tuple[int, ...]],
    size: tuple[int, ...],
    crop: str,
    hflip: float,
    seeds: list[int],
) -> Finding:
    """Sizes; corners in the middle, or of each pair at one fraction of both arms' places; mirrors."""
    sizes = [list(arm.levels.shape[:2]) for arm in arms for _ in range(_PAIRS)]
    if batch.original_size.tolist() != sizes:
        return must("geometry", False, f"original_size is {batch.original_size.tolist()}")
    numbers = [drawn(seed) for seed in seeds]
    if crop == "center":
        corners = [[round(max(0, m - n) / 2) for m, n in zip(of, size, strict=True)] for of in resized for _ in seeds]
    else:
        corners = [crop_at(of_pair, of, size) for of in resized for of_pair in numbers]
    flipped = [mirror / 2**64 < hflip for _, _, mirror, _ in numbers]
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


def _damaged(arms: list[Encoded], batch: Any, seeds: list[int], how: dict[str, Any], what: str) -> Iterator[_Found]:
    """The middle of three pairs is cut off: refused by name, or masked. A JPEG without its end may be let pass."""
    from ..decode import DecodeError, decode_pairs

    win, lose = ([arm.data] * 3 for arm in arms)
    lose[1] = lose[1][: len(lose[1]) // 2]
    few: Any = dict(seeds=seeds[:3], dtype=torch.uint8, **how)
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
