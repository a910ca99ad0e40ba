"""Decoding of images: whole ones against Pillow or the numbers that were written, and the transform of these against
the same in float64: the filter of a resize, mirror, crop, background, normalisation.

What is drawn for a pair is recomputed from its seed.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from .cases import Draw
from .data import normalised, picture, rounded
from .formulas import crop_at, drawn
from .report import Finding, must

__all__ = ["cut_out", "image", "inner", "png", "resampled"]

_PAIRS = 8  # copies of the pair, of as many seeds
_JPEGS: dict[str, dict[str, Any]] = {
    "JPEG 4:2:0": dict(subsampling="4:2:0"),
    "JPEG 4:2:2": dict(subsampling="4:2:2"),
    "JPEG 4:4:4": dict(subsampling="4:4:4", quality=100),  # optimize=True too would at times be too much for Pillow
    "JPEG with restarts": dict(restart_marker_blocks=2, optimize=True),
    "progressive JPEG": dict(progressive=True),
    "grey JPEG": dict(mode="L"),
    "CMYK JPEG": dict(mode="CMYK"),
}
# Colour types of PNG, and their depths; written here, because Pillow writes few of them.
_PNGS = {"grey": (0, (1, 2, 4, 8, 16)), "RGB": (2, (8, 16)), "palette": (3, (1, 2, 4, 8)), "RGBA": (6, (8, 16))}
_KINDS = (*_JPEGS, *(f"{name} PNG" for name in _PNGS), "grey and alpha PNG", "PNG of Pillow", "WebP")
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_FILTERS = 5  # of a PNG's rows
# Of the decoder. Options that equal them are left out of the call, so that the defaults are checked too.
_DEFAULTS: dict[str, Any] = dict(
    resize="cover", interpolation="bilinear", crop="center", hflip=0.0, background=(255, 255, 255), dtype=torch.bfloat16
)
_MEAN = _STD = 0.5  # likewise
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_Found = tuple[Finding, str]


class _Image(NamedTuple):
    """kind: of `_KINDS`. levels: (H, W, 3) float64, upright, on the background. orientation: EXIF's.

    off: levels. Versions of libjpeg differ by one; numbers are rounded once, those of 16 bits and an opacity twice.
    """

    kind: str
    data: bytes
    levels: np.ndarray
    orientation: int
    off: float


def image(seed: int, number: int) -> Iterator[_Found]:
    """A pair of images of two formats: whole, in a batch of many crops and mirrors, alone, damaged. Needs Pillow."""
    from ..decode import decode_pairs

    d = Draw(seed, number)
    resize = d.deal("resize", (None, "cover", "contain", "stretch"))
    size = [d.integer(8, 60), d.integer(8, 60)]
    if d.deal("wide", (True, False)):  # rows long enough for the widest stores
        size[1] = d.integer(64, 200)
    colour = d.deal("colour", (None, (d.integer(0, 255), d.integer(0, 255), d.integer(0, 255)))) or (255, 255, 255)
    kinds: tuple[str, str] = d.deal("kind", _KINDS), d.one_of(_KINDS)
    sides = [[side + d.integer(0, 90) if resize is None else d.integer(8, 250) for side in size] for _ in kinds]
    if d.chance(0.3):
        sides[1] = sides[0]
    arms = [_drawn(d, kind, of[0], of[1], colour) for kind, of in zip(kinds, sides, strict=True)]
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
        yield Finding("pixels" if arm.kind in _JPEGS else "pixels, lossless", levels / arm.off, levels), what
        whole.append(pixels.astype(np.float64))
        if arm.orientation > 1:
            undone_by = {6: 8, 8: 6}.get(arm.orientation, arm.orientation)  # the others by themselves
            as_stored = _upright(pixels, undone_by)
            full |= dict(size=as_stored.shape[:2], exif="ignore")
            ignored = decode_pairs([arm.data], [arm.data], **full).pixels[0].numpy().transpose(1, 2, 0)
            yield must("geometry", np.array_equal(ignored, as_stored), "exif='ignore' is not heeded"), what

    win, lose = ([arm.data] * _PAIRS for arm in arms)
    batch = decode_pairs(win, lose, seeds=seeds, dtype=torch.uint8, threads=d.integer(1, 3), **how)
    resized = [_resized(x, tuple(size), resize, interpolation) for x in whole]
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


# ------------------------------------------------------------------------------------------------ transform


def resampled(levels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """(H, W, 3) by Pillow's antialiased filters, without its rounding to bytes on the way; clamped there as it does."""
    down = levels.shape[0] - height
    down_first = down > 0 and down > 2 * (levels.shape[1] - width)
    for axis in (0, 1) if down_first else (1, 0):
        weights = _weights(levels.shape[axis], (height, width)[axis], interpolation)
        levels = np.moveaxis(np.tensordot(weights, levels, (1, axis)), 0, axis).clip(0, 255)
    return levels


def _weights(count: int, to: int, interpolation: str) -> np.ndarray:
    """(to, count): a triangle, or Keys's cubic with a = -1/2, as wide as what it takes together."""
    scale = count / to
    stretch = max(scale, 1.0)
    centre = (np.arange(to)[:, None] + 0.5) * scale
    x = np.abs(np.arange(count)[None, :] + 0.5 - centre) / stretch
    if interpolation == "bilinear":
        weights = np.maximum(0.0, 1 - x)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    result: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return result


def _resized(levels: np.ndarray, size: tuple[int, ...], resize: str | None, interpolation: str) -> np.ndarray:
    to = inner(levels.shape[:2], size, resize)
    return levels if levels.shape[:2] == to else resampled(levels, *to, interpolation)


def inner(of: tuple[int, ...], to: tuple[int, ...], resize: str | None) -> tuple[int, int]:
    """Height and width after the resize: torchvision's integers."""
    (h, w), (height, width) = of, to
    if resize is None:
        return h, w
    if resize == "stretch":
        return height, width
    if (height * w >= width * h) == (resize == "cover"):  # the height is met
        side = w * height // h
        return height, max(width, side) if resize == "cover" else max(1, side)
    side = h * width // w
    return max(height, side) if resize == "cover" else max(1, side), width


def cut_out(
    levels: np.ndarray, flip: bool, corner: list[int], size: tuple[int, ...], colour: tuple[int, int, int]
) -> np.ndarray:
    """(3, H, W)."""
    levels = levels[:, ::-1] if flip else levels
    (top, left), (height, width) = corner, size
    cut = levels[top : top + height, left : left + width]
    result = np.empty((height, width, 3))
    result[:] = colour
    y, x = (height - cut.shape[0]) // 2, (width - cut.shape[1]) // 2
    result[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return result.transpose(2, 0, 1)


def _geometry(
    arms: list[_Image],
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


def _damaged(arms: list[_Image], batch: Any, seeds: list[int], how: dict[str, Any], what: str) -> Iterator[_Found]:
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
    if arms[0].kind in _JPEGS and arms[0].levels[..., 0].size > 4000:
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


# -------------------------------------------------------------------------------------------------- encoding


def _drawn(d: Draw, kind: str, height: int, width: int, background: tuple[int, int, int]) -> _Image:
    """An image that is upright of that size, or of even sides where its planes are to be compared."""
    from PIL import Image, features

    if kind == "WebP" and not features.check("webp"):
        kind = "PNG of Pillow"
    orientation = 1 if kind in ("WebP", "JPEG 4:2:0") or d.chance(0.3) else d.integer(1, 8)
    if kind == "JPEG 4:2:0":
        height, width = height + height % 2, width + width % 2
    if orientation >= 5:
        height, width = width, height
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = exif.tobytes() if orientation > 1 else b""
    stored: np.ndarray = picture(d, height, width)
    file = io.BytesIO()
    off = 1.0 if kind in _JPEGS else 0.51
    if kind in _JPEGS:
        options = dict(_JPEGS[kind])
        encoded = Image.fromarray(stored).convert(options.pop("mode", "RGB"))
        encoded.save(file, "JPEG", exif=turned, **{"quality": d.integer(60, 97), **options})
        stored = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        data, levels = file.getvalue(), stored.astype(np.float64)
    elif kind in ("PNG of Pillow", "WebP"):
        options = dict(format="PNG", exif=turned) if kind != "WebP" else dict(format="WEBP", lossless=True)
        Image.fromarray(stored).save(file, **options)
        data, levels = file.getvalue(), stored.astype(np.float64)
    else:
        data, levels, twice = _png_drawn(d, kind, stored, background, turned[6:])
        off = 1.01 if twice else off
    return _Image(kind, data, _upright(levels, orientation), orientation, off)


def _upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF's orientation means it: where the first row and the first column are to be seen."""
    if orientation >= 5:
        stored = stored.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    return stored[:, ::-1] if orientation in (2, 3, 6, 7) else stored


def _png_drawn(
    d: Draw, kind: str, shown: np.ndarray, background: tuple[int, int, int], exif: bytes
) -> tuple[bytes, np.ndarray, bool]:
    """A PNG of a drawn depth, interlaced or not, opaque or not; its levels on the background; whether 16 bits of these
    are mixed."""
    colour_type, depths = _PNGS.get(kind[:-4], (4, (8, 16)))
    depth = d.one_of(depths)
    most = 2**depth - 1
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    fine = shown.astype(np.int64) * 256 + (256 * d.uniform(*shown.shape)).long().numpy()  # 16 bits
    numbers = (fine >> (16 - depth))[..., : 1 if channels in (1, 2) else 3]
    alpha = np.ones((*shown.shape[:2], 1))
    between = [(b"eXIf", exif)] if exif else []
    keyed = d.chance(0.5)
    if channels in (2, 4):
        opacity = (d.uniform(*alpha.shape) * 2**depth).long().numpy()
        alpha, numbers = opacity / most, np.concatenate((numbers, opacity), axis=-1)
    levels = numbers[..., : 1 if channels in (1, 2) else 3] * 255 / most
    if colour_type == 3:
        palette, opacities = ((256 * d.uniform(2**depth, n)).long().numpy().astype(np.uint8) for n in (3, 1))
        between.append((b"PLTE", palette.tobytes()))
        levels = palette[numbers[..., 0]].astype(np.float64)
        if keyed:
            between.append((b"tRNS", opacities.tobytes()))
            alpha = opacities[numbers[..., 0]] / 255
    elif keyed and channels in (1, 3):  # one colour is transparent
        key = numbers[0, 0]
        between.append((b"tRNS", key.astype(">u2").tobytes()))
        alpha = 1.0 - (numbers == key).all(axis=-1, keepdims=True)
    levels = levels * alpha + np.array(background) * (1 - alpha)
    filters = (_FILTERS * d.uniform(len(numbers))).long().numpy()
    data = png(numbers, colour_type, depth, d.chance(0.5), between, filters)
    return data, levels + np.zeros(3), depth == 16 and bool((alpha < 1).any())


def png(
    numbers: np.ndarray,
    colour_type: int,
    depth: int,
    interlaced: bool,
    between: list[tuple[bytes, bytes]],
    filters: np.ndarray,
) -> bytes:
    """A file of the numbers (H, W, channels), of so many bits each; between: chunks that stand before the pixels;
    filters: (H,), of the rows."""
    height, width = numbers.shape[:2]
    bytes_of_pixel = max(1, numbers.shape[2] * depth // 8)
    rows = []
    for top, left, down, across in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = numbers[top::down, left::across]
        if part.size:
            bits = (part.reshape(len(part), -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
            packed = np.packbits(bits.reshape(len(part), -1).astype(np.uint8), axis=1)
            rows.append(_filtered(packed, bytes_of_pixel, filters[top::down]).tobytes())
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *between, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks
    )


def _filtered(rows: np.ndarray, pixel: int, filters: np.ndarray) -> np.ndarray:
    """Rows of bytes, each behind its filter's number: less what that guesses from the byte a pixel to the left, the one
    above, and the one above on the left."""
    beside = np.pad(rows.astype(np.int64), ((1, 0), (pixel, 0)))
    left, above, corner = beside[1:, :-pixel], beside[:-1, pixel:], beside[:-1, :-pixel]
    distances = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
    paeth = np.choose(np.argmin(distances, axis=0), (left, above, corner))  # the first of those that are as near
    guesses = np.stack((0 * left, left, above, (left + above) // 2, paeth))
    guess = guesses[filters, np.arange(len(rows))]
    return np.concatenate((filters[:, None], rows - guess), axis=1).astype(np.uint8)
