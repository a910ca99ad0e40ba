"""Images as files, and what `decode_pairs` makes of them, by Pillow."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps


def picture(height, width, seed=0):
    """Smooth colours, edges and grain: what a codec finds easy and what it does not."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * (x * x + y * y))], axis=-1)
    edges = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    values = 128 + 60 * waves + 30 * edges[..., None] + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized_size(image, size, resize):
    """Height and width of the whole image after the resize, from the docstring."""
    (height, width), (w, h) = size, image.size
    if resize == "stretch":
        return height, width
    if resize is None:
        return h, w
    if (height * w >= width * h) == (resize == "cover"):
        side = w * height // h
        return height, max(width, side) if resize == "cover" else max(1, side)
    side = h * width // w
    return max(height, side) if resize == "cover" else max(1, side), width


def pillow_pixels(data, size, resize="cover", interpolation="bilinear", corner=None, flip=False, background=255):
    """The transform of the docstring with Pillow, in uint8: (3, H, W)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    size = (size, size) if isinstance(size, int) else size
    h, w = resized_size(image, size, resize)
    if (w, h) != image.size:
        image = image.resize((w, h), FILTERS[interpolation])
    if flip:
        image = ImageOps.mirror(image)
    inner = min(h, size[0]), min(w, size[1])
    top, left = corner or (round((h - inner[0]) / 2), round((w - inner[1]) / 2))
    pixels = np.full((*size, 3), background, np.uint8)
    y, x = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    cut = np.asarray(image.crop((left, top, left + inner[1], top + inner[0])))
    pixels[y : y + inner[0], x : x + inner[1]] = cut
    return pixels.transpose(2, 0, 1)


def levels_apart(decoded, expected):
    return np.abs(decoded.numpy().astype(int) - expected).max()


ENCODINGS = [
    dict(subsampling=2),
    dict(subsampling=1),
    dict(subsampling=0),
    dict(progressive=True),
    dict(progressive=True, subsampling=0, optimize=True),
    dict(restart_marker_blocks=3),
    dict(quality=20),
]


def exif(orientation, byte_order="<"):
    tag = struct.pack(byte_order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    head = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(byte_order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(byte_order + "H", 1) + tag + b"\0\0\0\0"


def segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def file(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def truncated(data):
    return data[: len(data) * 2 // 3]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def written(rows, colour_type, depth, *between, interlace):
    """A PNG of (H, W) or (H, W, channels) numbers of so many bits, unfiltered; `between`: chunks before its data."""

    def packed(row):
        if depth == 16:
            return row.astype(">u2").tobytes()
        bits = np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)[:, 8 - depth :]
        return np.packbits(bits.reshape(-1)).tobytes()

    passes = [rows[top::down, left::across] for top, left, down, across in ADAM7] if interlace else [rows]
    data = b"".join(b"\0" + packed(row) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, interlace)
    parts = [chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width, height, data=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


GOOD = jpeg(picture(16, 16))
