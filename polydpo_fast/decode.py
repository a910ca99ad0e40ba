"""`polydpo_fast.decode_pairs`: the compressed images of a batch of pairs to one normalised tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Buffer  # of collections.abc from Python 3.12 on; PyTorch brings it

from .decoding.arguments import check_images
from .decoding.pillow import through_pillow
from .limits import DecodeLimits

__all__ = ["DecodeError", "DecodeFailure", "DecodeLimits", "DecodedPairs", "decode_pairs"]


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
    images, raw, refused = through_pillow(
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
