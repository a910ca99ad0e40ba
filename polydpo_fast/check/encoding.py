"""Images of many kinds as files, and the levels that are in them. PNGs are written here: Pillow writes few of them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from .cases import Draw
from .data import picture

__all__ = ["JPEGS", "KINDS", "Encoded", "encode", "png", "upright"]

JPEGS: dict[str, dict[str, Any]] = {
    "JPEG 4:2:0": dict(subsampling="4:2:0"),
    "JPEG 4:2:2": dict(subsampling="4:2:2"),
    "JPEG 4:4:4": dict(subsampling="4:4:4", quality=100),  # optimize=True too would at times be too much for Pillow
    "JPEG with restarts": dict(restart_marker_blocks=2, optimize=True),
    "progressive JPEG": dict(progressive=True),
    "grey JPEG": dict(mode="L"),
    "CMYK JPEG": dict(mode="CMYK"),
}
# Colour types of PNG, and their depths.
_PNGS = {"grey": (0, (1, 2, 4, 8, 16)), "RGB": (2, (8, 16)), "palette": (3, (1, 2, 4, 8)), "RGBA": (6, (8, 16))}
KINDS = (*JPEGS, *(f"{name} PNG" for name in _PNGS), "grey and alpha PNG", "PNG of Pillow", "WebP")
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_FILTERS = 5  # of a PNG's rows


class Encoded(NamedTuple):
    """kind: of `KINDS`. levels: (H, W, 3) float64, upright, on the background. orientation: EXIF's.

    off: levels. Versions of libjpeg differ by one; numbers are rounded once, those of 16 bits and an opacity twice.
    """

    kind: str
    data: bytes
    levels: np.ndarray
    orientation: int
    off: float


def encode(d: Draw, kind: str, height: int, width: int, background: tuple[int, int, int]) -> Encoded:
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
    off = 1.0 if kind in JPEGS else 0.51
    if kind in JPEGS:
        options = dict(JPEGS[kind])
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
    return Encoded(kind, data, upright(levels, orientation), orientation, off)


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
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
