"""Images of the formats that C++ does not decode, through Pillow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import Buffer

from ..limits import DecodeLimits

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["RawImage", "through_pillow"]

# What C++ decodes; anything else is Pillow's, of those formats whose decoders run no other programs.
_NATIVE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_PILLOW_FORMATS = ("WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "QOI")
_EXIF_ORIENTATION = 0x0112
# Of each EXIF orientation, the name in Pillow's Image.Transpose of what undoes it.
_UNDONE = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


class RawImage(NamedTuple):
    """An image, in this row of the batch, that is RGBX bytes now. size: height and width. orientation: of its EXIF."""

    row: int
    size: tuple[int, int]
    orientation: int


def through_pillow(
    images: list[Buffer], background: tuple[int, int, int], limits: DecodeLimits, strict: bool
) -> tuple[list[Buffer], list[RawImage], dict[int, str]]:
    """Replaces the images that C++ does not decode by their pixels.

    Returns the images, those that are pixels now, and the reasons of those that Pillow could not decode: they go on as
    they are, to be refused with the others.
    """
    raw, refused = [], {}
    for row, image in enumerate(images):
        try:
            data = memoryview(image).cast("B")
        except (TypeError, ValueError):
            continue  # C++ says what is wrong with it
        if len(data) < 4 or len(data) > limits.bytes or _is_native(bytes(data[:8])):
            continue
        try:
            images[row], size, orientation = _pillow_pixels(data, background, limits, strict)
        except Exception as error:  # Pillow's plugins raise anything: OSError, ValueError, SyntaxError, struct.error
            refused[row] = f"{error or type(error).__name__}"
        else:
            raw.append(RawImage(row, size, orientation))
    return images, raw, refused


def _is_native(head: bytes) -> bool:
    return head.startswith(_NATIVE) or _NATIVE[1].startswith(head)  # a cut-off PNG is native too


def _pillow_pixels(
    data: memoryview, background: tuple[int, int, int], limits: DecodeLimits, strict: bool
) -> tuple[bytes, tuple[int, int], int]:
    """RGBX bytes, height and width, and EXIF orientation."""
    with _opened(data, limits, strict) as image:
        from PIL import Image

        _check_size(*image.size, limits)
        if image.mode.startswith(("I", "F")):  # Pillow would clip 16 bits to 8
            raise ValueError(f"its pixels are of Pillow's mode {image.mode}; expected 8 bits per channel")
        for name in ("xmp", "XML:com.adobe.xmp"):  # which getexif would ask too: JPEG and PNG have EXIF alone
            image.info.pop(name, None)
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        if image.format == "TIFF" and orientation in _UNDONE:  # Pillow turns these by itself: turned back
            upright: Image.Image = image.copy()
            turned = upright.transpose(Image.Transpose[_UNDONE[orientation]])
        else:
            turned = image
        width, height = turned.size
        turned.load()  # only then is its mode the one of its pixels
        mode = "RGBA" if turned.has_transparency_data else "RGB"
        canvas = turned if turned.mode == mode else turned.convert(mode)
        if mode == "RGBA":
            canvas = Image.alpha_composite(Image.new("RGBA", turned.size, (*background, 255)), canvas)
        pixels = canvas.tobytes("raw", "RGBX" if mode == "RGB" else "RGBA")  # X is anything
    return pixels, (height, width), orientation if orientation in range(1, 9) else 1


def _opened(data: memoryview, limits: DecodeLimits, strict: bool) -> Image.Image:
    """Nothing is decoded yet."""
    begins = f"it begins with {data[:4].hex(' ')}"
    try:
        from PIL import Image, ImageFile, UnidentifiedImageError
    except ImportError:
        raise ValueError(
            f"it is neither JPEG nor PNG: {begins}; for other formats: pip install 'polydpo-fast[data]'"
        ) from None
    if strict and ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, which fills up what is missing of an image; expected False, "
            "or strict=False"
        )
    _check_size(*_webp_size(data), limits)  # Pillow makes a canvas of it at once
    Image.init()
    formats = [name for name in _PILLOW_FORMATS if name in Image.OPEN]  # before version 11.3 Pillow has no AVIF
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of a known format: {begins}") from None
    except Image.DecompressionBombError as error:  # the limit is the whole process's: not for us to change
        raise ValueError(
            f"Pillow refuses it: {error} That limit is twice PIL.Image.MAX_IMAGE_PIXELS, beside limits.pixels"
        ) from None


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.pixels:
        raise ValueError(f"it has {width * height} pixels, more than {limits.pixels} (limits.pixels)")
    if 4 * width * height > limits.decoded:
        raise ValueError(f"it takes {4 * width * height} bytes, more than {limits.decoded} (limits.decoded)")


def _webp_size(data: memoryview) -> tuple[int, int]:
    """Width and height as a WebP file states them; 0 of anything else. Source: RFC 9649, sections 2.6 to 2.7."""
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0
