"""`polydpo_fast.decode_pairs`: the compressed images of a batch of pairs to one normalised tensor."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Buffer  # of collections.abc from Python 3.12 on; PyTorch brings it

__all__ = ["DecodeError", "DecodeFailure", "DecodeLimits", "DecodedPairs", "decode_pairs"]

# The numbers of csrc/pixels.hpp.
_DTYPES = {torch.uint8: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_MAX_SIDE = 16384


@dataclass(frozen=True)
class DecodeLimits:
    """What an image may cost; more is refused before memory is allocated for it.

    pixels: height times width.
    bytes: of the compressed image.
    scans: of a progressive JPEG; each is a pass over all coefficients, so a small file can cost minutes.
    """

    pixels: int = 1 << 27
    bytes: int = 1 << 28
    scans: int = 100

    def __post_init__(self) -> None:
        for name, largest in (("pixels", 2**62), ("bytes", 2**62), ("scans", 2**30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ValueError(f"limits.{name} is {value!r}; expected an int from 1 to {largest}")


@dataclass(frozen=True)
class DecodeFailure:
    """One image that could not be decoded: which, and why."""

    arm: Literal["win", "lose"]
    index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.arm}[{self.index}]: {self.reason}"


class DecodeError(ValueError):
    """At least one image of a batch could not be decoded; `failures` lists them all."""

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

    pixels: (2B, 3, H, W).
    ok: (B,) bool; False where an arm failed under on_error="mask".
    errors: what failed, at most one per image.
    original_size: (2B, 2) int64, height and width of the image before the transform.
    crop_top_left: (2B, 2) int64, corner of the crop in the resized image. With original_size, SDXL's size
        conditioning.
    """

    pixels: Tensor
    ok: Tensor
    errors: tuple[DecodeFailure, ...]
    original_size: Tensor
    crop_top_left: Tensor


def decode_pairs(
    win: Sequence[Buffer],
    lose: Sequence[Buffer],
    *,
    size: int | tuple[int, int] = 1024,
    resize: Literal["cover"] | None = "cover",
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    strict: bool = True,
    limits: DecodeLimits | None = None,
    on_error: Literal["raise", "mask"] = "raise",
    threads: int | None = None,
) -> DecodedPairs:
    """Decodes B winners and B losers into one (2B, 3, H, W) tensor that the VAE takes as it is.

    One call into C++ with the GIL released: each image goes row by row from the entropy decoder to its place in
    the output, images side by side on `threads` threads. The bytes do not depend on the number of threads, nor on
    the processor.

    Args:
        win, lose: the compressed images, B bytes-like objects each (bytes, memoryview, pyarrow buffers, ...).
            JPEG: baseline and progressive, colour or grey. An EXIF orientation is not applied.
        size: of the output: a side, or (height, width), 1 to 16384.
        resize: "cover" scales the image, keeping its aspect ratio, until it just covers the output, with the
            antialiased triangle filter (Pillow's and torchvision's bilinear); None does not scale. Both then cut
            the centre. Rounding follows torchvision's Resize and CenterCrop.
        dtype: bfloat16, float16 or float32 in [-1, 1], that is (2 v - 255) / 255, rounded to nearest even in 16
            bits and within 1 ulp in float32; or uint8 in 0..255.
        out: a contiguous CPU tensor (2B, 3, H, W) of that dtype, pinned or not, to write into. It is returned
            as `pixels`.
        strict: whether a decoder's warning (damaged or missing data) is an error.
        limits: what an image may cost; `DecodeLimits()` if None.
        on_error: "raise" a DecodeError, or "mask": both arms of a failed pair are zeroed, `ok` is False there,
            the other pairs are not touched. What is not bytes-like raises all the same.
        threads: at most so many; None for as many as processors this process may use.

    Raises:
        DecodeError: an image could not be decoded (on_error="raise"). `out` then holds unspecified pixels.
        TypeError, ValueError: an argument has the wrong type or value; the message says which.
    """
    from . import _C

    win, lose = _check_arms(win, lose)
    pairs = len(win)
    height, width = _check_size(size)
    if resize not in ("cover", None):
        raise ValueError(f"resize is {resize!r}; expected 'cover' or None")
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; expected torch.bfloat16, float16, float32 or uint8")
    if not isinstance(strict, bool):
        raise TypeError(f"strict is {strict!r}; expected True or False")
    if on_error not in ("raise", "mask"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'mask'")
    if limits is None:
        limits = DecodeLimits()
    elif not isinstance(limits, DecodeLimits):
        raise TypeError(f"limits is a {type(limits).__name__}; expected a DecodeLimits")
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    elif isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads!r}; expected an int from 1 to 1024")
    shape = (2 * pairs, 3, height, width)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    else:
        _check_out(out, shape, dtype)

    geometry, failed = _C.decode_pairs(
        win,
        lose,
        pairs=pairs,
        out=out.data_ptr(),
        dtype=_DTYPES[dtype],
        height=height,
        width=width,
        cover=resize == "cover",
        strict=strict,
        max_pixels=limits.pixels,
        max_bytes=limits.bytes,
        max_scans=limits.scans,
        threads=threads,
    )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind PyTorch's back
    errors = tuple(DecodeFailure("win" if row < pairs else "lose", row % pairs, reason) for row, reason in failed)
    if errors and on_error == "raise":
        raise DecodeError(errors)
    ok = torch.ones(pairs, dtype=torch.bool)
    for error in errors:
        ok[error.index] = False
        out[error.index] = 0
        out[pairs + error.index] = 0
    numbers = torch.from_numpy(geometry)
    return DecodedPairs(out, ok, errors, original_size=numbers[:, :2], crop_top_left=numbers[:, 2:])


def _check_arms(win: Sequence[Buffer], lose: Sequence[Buffer]) -> tuple[list[Buffer], list[Buffer]]:
    for name, arm in (("win", win), ("lose", lose)):
        # A single image is a sequence too, of numbers.
        if isinstance(arm, (bytes, bytearray, memoryview, str)) or not isinstance(arm, Sequence):
            raise TypeError(f"{name} is a {type(arm).__name__}; expected a list of bytes-like objects")
    win, lose = list(win), list(lose)  # other threads may change the caller's
    if len(win) != len(lose):
        raise ValueError(f"lose has {len(lose)} images; expected {len(win)} like win")
    if len(win) == 0:
        raise ValueError("win and lose are empty; expected at least one pair")
    return win, lose


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size if isinstance(size, Sequence) else (size, size))
    except (TypeError, ValueError):
        raise TypeError(f"size is {size!r}; expected an int or (height, width)") from None
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"size is {size!r}; expected sides from 1 to {_MAX_SIDE}")
    return height, width


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; expected a torch.Tensor")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {dtype}")
    if out.device.type != "cpu" or not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"out is on {out.device}, contiguous: {out.is_contiguous()}, requires_grad: {out.requires_grad}; "
            "expected a contiguous CPU tensor without gradient"
        )
