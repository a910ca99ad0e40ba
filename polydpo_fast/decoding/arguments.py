"""The arguments of the decoders of images and clips: every check, in one place."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..buffers import LARGE, Buffers
from ..limits import ClipLimits, DecodeLimits
from ..values import check_choice, check_count, is_number, is_whole, plain
from .draws import Draw, draw_of, start_of

__all__ = ["ClipRequest", "ImageRequest", "Output", "Request", "check_clips", "check_images", "check_threads"]

_DTYPES = ("yuv420", torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_MAX_SIDE = 16384
_CPU = torch.device("cpu")
_results = Buffers(2, reclaimable=True)

T = TypeVar("T")


class Output(NamedTuple):
    """What is made of an image, or of a frame, as csrc/bindings.cpp reads it: (level - offset) * scale, of R, G, B."""

    size: tuple[int, int]  # height and width
    resize: str | None
    interpolation: str
    dtype: str  # a name of PyTorch's, or "yuv420"
    offset: Sequence[float]
    scale: Sequence[float]
    background: tuple[int, int, int]  # R, G, B

    @property
    def planes(self) -> bool:
        """Whether they are left as they are stored."""
        return self.dtype == "yuv420"


@dataclass(frozen=True)
class Request:
    """What a decoder of pairs is asked for, checked."""

    win: list[Any]
    lose: list[Any]
    output: Output
    out: Tensor
    seeds: Sequence[int | None]  # of the pairs; None where nothing is drawn
    draws: list[Draw]
    strict: bool
    on_error: str
    threads: int


@dataclass(frozen=True)
class ImageRequest(Request):
    exif: str
    limits: DecodeLimits


@dataclass(frozen=True)
class ClipRequest(Request):
    """starts: for each pair, from 0 to less than 1: where a random start falls."""

    frames: int
    fps: float | Fraction | None
    start: str | float | Fraction
    starts: list[float]
    short: str
    layout: str
    limits: ClipLimits
    cache: str | os.PathLike[str] | None


def check_images(
    win: Sequence[Any], lose: Sequence[Any], *, exif: str, limits: DecodeLimits | None, **common: Any
) -> ImageRequest:
    """The arguments of `decode_pairs`; and `device`, where `out` is to be."""
    check_choice("exif", exif, ("apply", "ignore"))
    arms = _check_arms(win, lose, "images", "bytes-like objects")
    for name, arm in zip(("win", "lose"), arms, strict=True):
        for index, image in enumerate(arm):
            _check_image(f"{name}[{index}]", image)
    limits = _check_limits(limits, DecodeLimits)
    return ImageRequest(**vars(_check(arms, **common)), exif=exif, limits=limits)


def check_clips(
    win: Sequence[Any],
    lose: Sequence[Any],
    *,
    frames: int,
    fps: float | Fraction | None,
    start: str | float,
    short: str,
    layout: str,
    limits: ClipLimits | None,
    cache: str | os.PathLike[str] | None,
    **common: Any,
) -> ClipRequest:
    """The arguments of `decode_clips`; and `device`, where `out` is to be."""
    arms = _check_arms(win, lose, "clips", "bytes-like objects or paths")
    for name, arm in zip(("win", "lose"), arms, strict=True):
        for index, clip in enumerate(arm):
            if not isinstance(clip, (str, os.PathLike)):
                _check_bytes(f"{name}[{index}]", clip, "expected a path, or a contiguous bytes-like object")
    frames = check_count("frames", frames, 1 << 16)
    check_choice("short", short, ("error", "repeat", "loop"))
    check_choice("layout", layout, ("CTHW", "TCHW"))
    if fps is not None and not (is_number(fps) and 0.001 <= fps <= 1000):
        raise ValueError(f"fps is {fps!r}; expected a number from 0.001 to 1000, or None")
    if start not in ("center", "random") and not (is_number(start) and 0 <= start < math.inf):  # type: ignore[operator]
        raise ValueError(f"start is {start!r}; expected 'center', 'random', or seconds >= 0")
    if not isinstance(cache, (str, os.PathLike, type(None))):
        raise TypeError(f"cache is a {type(cache).__name__}; expected the path of a folder, or None")
    limits = _check_limits(limits, ClipLimits)
    asked = _check(arms, frames=frames, layout=layout, is_start_drawn=start == "random", **common)
    return ClipRequest(
        **vars(asked),
        frames=frames,
        fps=None if fps is None else plain(fps),
        start=start if isinstance(start, str) else plain(start),
        starts=[start_of(seed) for seed in asked.seeds],
        short=short,
        layout=layout,
        limits=limits,
        cache=cache,
    )


def _check(
    arms: tuple[list[Any], list[Any]],
    *,
    size: int | tuple[int, int],
    resize: str | None,
    interpolation: str,
    crop: str,
    hflip: float,
    seeds: Sequence[int] | Tensor | None,
    dtype: torch.dtype | str,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    background: tuple[int, int, int],
    out: Tensor | None,
    strict: bool,
    on_error: str,
    threads: int | None,
    frames: int | None = None,
    layout: str = "CTHW",
    is_start_drawn: bool = False,
    device: torch.device = _CPU,
) -> Request:
    """The arguments that both have in common. frames, layout: of clips."""
    pairs = len(arms[0])
    height, width = _check_size(size)
    check_choice("resize", resize, (None, "cover", "contain", "stretch"))
    check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
    check_choice("crop", crop, ("center", "random"))
    check_choice("on_error", on_error, ("raise", "mask"))
    if not isinstance(dtype, (torch.dtype, str)) or dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype!r}; expected torch.bfloat16, float16, float32 or uint8, or 'yuv420'")
    if dtype == "yuv420" and (height % 2 or width % 2):
        raise ValueError(f"size is {size!r}; expected even sides for dtype='yuv420'")
    if not isinstance(strict, bool):
        raise TypeError(f"strict is {strict!r}; expected True or False")
    threads = check_threads(threads)
    offset, scale = _normalisation(mean, std)
    name = f"{dtype}".removeprefix("torch.")
    output = Output((height, width), resize, interpolation, name, offset, scale, _check_colour(background))
    element = dtype if isinstance(dtype, torch.dtype) else torch.uint8
    out = _check_out(out, (2 * pairs, *_shape(output, frames, layout)), element, device)
    if not is_number(hflip) or not 0 <= hflip <= 1:
        raise ValueError(f"hflip is {hflip!r}; expected a number from 0 to 1")
    of_pairs = _check_seeds(seeds, pairs, is_start_drawn or crop == "random" or hflip not in (0, 1))
    draws = [draw_of(seed, crop, hflip) for seed in of_pairs]
    return Request(*arms, output, out, of_pairs, draws, strict, on_error, threads)


def _shape(output: Output, frames: int | None, layout: str) -> tuple[int, ...]:
    """Of one image or clip in the output."""
    (height, width), count = output.size, () if frames is None else (frames,)
    if output.planes:
        return *count, height * 3 // 2, width
    return (*count, 3, height, width) if layout == "TCHW" else (3, *count, height, width)


# ------------------------------------------------------------------------------------------------ one by one


def _check_image(name: str, image: object) -> None:
    expected = "expected a contiguous bytes-like object (bytes, memoryview, ...) with the contents of an image file"
    hint = "; of a path: Path(path).read_bytes()" if isinstance(image, (str, os.PathLike)) else ""
    _check_bytes(name, image, expected, hint)


def _check_bytes(name: str, value: object, expected: str, hint: str = "") -> None:
    if isinstance(value, (bytes, bytearray)):
        return
    if not _is_contiguous(value):
        raise TypeError(f"{name} is a {type(value).__name__}; {expected}{hint}")
    if (shape := memoryview(value).shape) is not None and len(shape) != 1:  # type: ignore[arg-type]
        raise TypeError(f"{name} is an array of shape {shape}; {expected}, not decoded pixels")


def check_threads(threads: int | None) -> int:
    """At most so many; as many as processors this process may use if None."""
    if threads is None:
        return len(os.sched_getaffinity(0))
    return check_count("threads", threads, 1024)


def _check_arms(win: Sequence[T], lose: Sequence[T], noun: str, members: str) -> tuple[list[T], list[T]]:
    for name, arm in (("win", win), ("lose", lose)):
        # A single one is a sequence too, of numbers.
        if isinstance(arm, (bytes, bytearray, memoryview, str)) or not isinstance(arm, Sequence):
            raise TypeError(f"{name} is a {type(arm).__name__}; expected a list of {members}")
    win, lose = list(win), list(lose)  # other threads may change the caller's
    if len(win) != len(lose):
        raise ValueError(f"lose has {len(lose)} {noun}; expected {len(win)} like win")
    if len(win) == 0:
        raise ValueError("win and lose are empty; expected at least one pair")
    return win, lose


def _is_contiguous(value: object) -> bool:
    try:
        return memoryview(value).c_contiguous  # type: ignore[arg-type]  # which is the question
    except TypeError:
        return False


def _check_limits(limits: T | None, kind: type[T]) -> T:
    if limits is None:
        return kind()
    if not isinstance(limits, kind):
        raise TypeError(f"limits is a {type(limits).__name__}; expected a {kind.__name__}")
    return limits


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size if isinstance(size, Sequence) else (size, size))
    except (TypeError, ValueError):
        raise TypeError(f"size is {size!r}; expected an int or (height, width)") from None
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"size is {size!r}; expected sides from 1 to {_MAX_SIDE}")
    return height, width


def _normalisation(mean: float | Sequence[float], std: float | Sequence[float]) -> tuple[list[float], list[float]]:
    """What is subtracted from the levels of each channel, and what they are multiplied with then."""
    means, stds = _per_channel("mean", mean), _per_channel("std", std)
    if not all(s >= 1e-6 for s in stds):
        raise ValueError(f"std is {std!r}; expected numbers > 0, at least 1e-6")
    return [255 * m for m in means], [1 / (255 * s) for s in stds]


def _per_channel(name: str, value: float | Sequence[float]) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * 3
    for x in values:
        if not is_number(x) or not -1e6 < plain(x) < 1e6:
            raise ValueError(f"{name} is {value!r}; expected a number, or three")
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} numbers; expected one, or three")
    return [float(x) for x in values]


def _check_colour(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    if not (isinstance(colour, Sequence) and len(colour) == 3) or not all(
        is_whole(c) and 0 <= c <= 255 for c in colour
    ):
        raise ValueError(f"background is {colour!r}; expected red, green and blue, integers from 0 to 255")
    red, green, blue = map(int, colour)
    return red, green, blue


def _check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out`, or a new one."""
    if out is None:
        is_large = device.type == "cpu" and math.prod(shape) * dtype.itemsize >= LARGE
        return _results.empty(shape, dtype) if is_large else torch.empty(shape, dtype=dtype, device=device)
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; expected a torch.Tensor")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {dtype}")
    is_there = out.device == device or out.device.type == device.type == "cpu"
    plain = out.layout == torch.strided and not out.is_neg() and not out._is_zerotensor()
    if not is_there or not plain or not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"out is on {out.device}, of layout {out.layout}, requires_grad: {out.requires_grad}; "
            f"expected a contiguous {'CPU' if device.type == 'cpu' else device} tensor without gradient"
        )
    return out


def _check_seeds(seeds: Sequence[int] | Tensor | None, pairs: int, is_drawn: bool) -> Sequence[int | None]:
    if seeds is None:
        return torch.randint(2**63 - 1, (pairs,), device="cpu").tolist() if is_drawn else [None] * pairs
    try:
        found = [operator.index(seed) for seed in (seeds.tolist() if isinstance(seeds, Tensor) else seeds)]
    except TypeError:
        raise TypeError(f"seeds is {seeds!r}; expected a sequence of integers") from None
    if len(found) != pairs:
        raise ValueError(f"seeds has {len(found)} numbers; expected {pairs}, one per pair")
    return found
