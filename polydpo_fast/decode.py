"""`polydpo_fast.decode_pairs`: the compressed images of a batch of pairs to one normalised tensor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Buffer  # of collections.abc from Python 3.12 on; PyTorch brings it

from .decode_arguments import check_images
from .limits import DecodeLimits

__all__ = ["DecodeError", "DecodeFailure", "DecodeLimits", "DecodedPairs", "decode_pairs"]

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


@dataclass(frozen=True)
class DecodeFailure:
    """One image or clip that could not be decoded.

    arm, index: which: "win" or "lose", and its place among them, 0 to B - 1.
    reason: why, in a few words: "it has no palette".
    """

    arm: Literal["win", "lose"]
    index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.arm}[{self.index}]: {self.reason}"


class DecodeError(ValueError):
    """At least one image or clip of a batch could not be decoded; `failures` lists them all."""

    def __init__(self, failures: Sequence[DecodeFailure]) -> None:
        self.failures = tuple(failures)
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        first = failures[0]
        super().__init__(f"{first.arm}[{first.index}] could not be decoded: {first.reason}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failures,)  # it crosses process boundaries, in a loader's workers


@dataclass(frozen=True)
class DecodedPairs:
    """The result of `decode_pairs` for B pairs. Rows are [winners; losers], the halves layout of the loss.

    pixels: (2B, 3, H, W); planes under dtype="yuv420".
    ok: (B,) bool; False where an arm failed under on_error="mask".
    errors: what failed, at most one per image.
    original_size: (2B, 2) int64, height and width of the image, upright, before the transform. 0 where ok is False.
    crop_top_left: (2B, 2) int64, corner of the crop in the resized and mirrored image; 0 where ok is False. With
        original_size, SDXL's size conditioning.
    flipped: (B,) bool, whether the pair is mirrored.
    damaged: images that were decoded though something is wrong with them (strict=False): at most one line for each, of
        what was noticed first. What their decoder did not have to look at, such as the rest of an image below a crop,
        is not in it. There, libjpeg-turbo reads a row of blocks and a few bytes further than our own decoder of JPEGs,
        so that a processor without AVX2 may notice more.
    """

    pixels: Tensor
    ok: Tensor
    errors: tuple[DecodeFailure, ...]
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor
    damaged: tuple[DecodeFailure, ...] = ()


def decode_pairs(
    win: Sequence[Buffer],
    lose: Sequence[Buffer],
    *,
    size: int | tuple[int, int] = 1024,
    resize: Literal["cover", "contain", "stretch"] | None = "cover",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    crop: Literal["center", "random"] = "center",
    hflip: float = 0.0,
    seeds: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype | Literal["yuv420"] = torch.bfloat16,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    background: tuple[int, int, int] = (255, 255, 255),
    out: Tensor | None = None,
    exif: Literal["apply", "ignore"] = "apply",
    strict: bool = True,
    limits: DecodeLimits | None = None,
    on_error: Literal["raise", "mask"] = "raise",
    threads: int | None = None,
) -> DecodedPairs:
    """Decodes B winners and B losers into one (2B, 3, H, W) tensor that the VAE takes as it is.

    One call into C++ with the GIL released: each image goes row by row from the entropy decoder to its place in
    the output, images side by side on `threads` threads. The bytes do not depend on the number of threads, nor on
    the processor.

    Crop and mirror are drawn once per pair, and are the same for both arms, also where these differ in size or format.

    Args:
        win, lose: the compressed images, B bytes-like objects each (bytes, memoryview, pyarrow buffers, ...).
            JPEG (baseline, progressive, grey, CMYK) and PNG (all of it, without gamma and colour profiles) are
            decoded here; WebP, AVIF, the first frame of a GIF, BMP, TIFF, JPEG 2000 and a few more by Pillow, if it is
            installed, one after the other.
        size: of the output: a side, or (height, width), 1 to 16384.
        resize: "cover" scales the image, keeping its aspect ratio, until it just covers the output, and cuts what is
            too much (torchvision's Resize and CenterCrop, with their rounding); "contain" scales it until it just fits,
            and pads with the background; "stretch" scales each side on its own; None only cuts.
        interpolation: "bilinear" or "bicubic", both antialiased: Pillow's and torchvision's filters, within one level
            of 255 of Pillow's result.
        crop: "center" or "random": where to cut what is too much. At random every corner has the same chance.
        hflip: the probability, 0 to 1, that a pair is mirrored left to right; before the crop, as Diffusers' SDXL
            scripts do it.
        seeds: (B,) integers; what is drawn for a pair depends on its seed alone. None draws them with torch.randint,
            so that torch.manual_seed decides.
        dtype: bfloat16, float16 or float32, normalised: (v / 255 - mean) / std, rounded to nearest even in 16 bits;
            or uint8 in 0..255. Or "yuv420": the planes of a 4:2:0 JPEG as they are stored, a quarter of the bytes of
            bfloat16 and no colour conversion on the CPU; see below.
        mean, std: a number, or one per channel. The default gives [-1, 1], within 2^-23 in float32.
        background: red, green and blue, 0 to 255, under transparent pixels and around contained images.
        out: a contiguous CPU tensor (2B, 3, H, W) of that dtype, pinned or not, to write into. It is returned
            as `pixels`.
        exif: "apply" turns and mirrors the image as its EXIF orientation says; "ignore" takes it as it is stored.
        strict: whether a decoder's warning (damaged, missing or misplaced data) is an error, also outside of the
            crop. Bytes after the end of an image are not looked at. Pillow's decoders know no other way than strict.
        limits: what an image may cost; `DecodeLimits()` if None.
        on_error: "raise" a DecodeError, or "mask": both arms of a failed pair are zeroed, `ok` is False there,
            the other pairs are not touched. What is not bytes-like raises all the same.
        threads: at most so many; None for as many as processors this process may use.

    With dtype="yuv420", `pixels` is (2B, H * 3/2, W) uint8, H and W even: for each image H * W bytes of Y, then
    H/2 * W/2 of Cb and of Cr. `polydpo_fast.yuv420_to_rgb(batch.pixels, flip=batch.flipped.repeat(2))` makes the same
    pixels of them, on a GPU; mirroring is left to it, and corners of crops are even in the image as stored. The
    outermost pixels of a crop may differ, because their neighbours' colours are cut off. Images that are
    not 4:2:0 JPEGs, or would have to be turned or resized, fail.

    Raises:
        DecodeError: an image could not be decoded (on_error="raise"). `out` then holds unspecified pixels.
        TypeError, ValueError: an argument has the wrong type or value; the message says which.
    """
    from . import _C

    asked = check_images(
        win, lose, size=size, resize=resize, interpolation=interpolation, crop=crop, hflip=hflip, seeds=seeds,
        dtype=dtype, mean=mean, std=std, background=background, out=out, exif=exif, strict=strict, limits=limits,
        on_error=on_error, threads=threads,
    )  # fmt: skip
    pairs, out = len(asked.win), asked.out
    images, raw, refused = _through_pillow(
        [*asked.win, *asked.lose], asked.output.background, asked.limits, asked.strict
    )
    try:
        geometry, failed, tolerated = _C.decode_pairs(
            images[:pairs],
            images[pairs:],
            raw=raw,
            draws=asked.draws,
            out=out.data_ptr(),
            output=asked.output,
            apply_orientation=asked.exif == "apply",
            strict=asked.strict,
            limits=asked.limits,
            threads=asked.threads,
        )
    finally:
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # written behind PyTorch's back
    errors, damaged = (
        tuple(DecodeFailure("win" if row < pairs else "lose", row % pairs, reason) for row, reason in rows)
        for rows in ([(row, refused.get(row, reason)) for row, reason in failed], tolerated)
    )
    if errors and asked.on_error == "raise":
        raise DecodeError(errors)
    bad = {error.index for error in errors}
    ok = torch.tensor([pair not in bad for pair in range(pairs)], device="cpu")
    numbers = torch.from_numpy(geometry)
    if errors:
        numbers[torch.cat((~ok, ~ok))] = 0  # nothing is told of the other arm either
    flipped = torch.tensor([draw.flipped for draw in asked.draws], device="cpu")
    return DecodedPairs(out, ok, errors, numbers[:, :2], numbers[:, 2:], flipped, damaged)


# ------------------------------------------------------------------------------------------ through Pillow


class RawImage(NamedTuple):
    """An image, in this row of the batch, that is RGBX bytes now. size: height and width. orientation: of its EXIF."""

    row: int
    size: tuple[int, int]
    orientation: int


def _through_pillow(
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
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of a known format: {begins}") from None
    except Image.DecompressionBombError as error:  # the limit is the whole process's: not for us to change
        raise ValueError(
            f"Pillow refuses it: {error} That limit is twice PIL.Image.MAX_IMAGE_PIXELS, beside limits.pixels"
        ) from None
    with image:
        width, height = image.size
        _check_size(width, height, limits)
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
