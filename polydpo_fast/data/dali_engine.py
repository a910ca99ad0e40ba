"""What decodes images and clips by DALI: its pipelines, the way of one picture into the output, and the canary."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..decode_arguments import Request

__all__ = ["CanaryError", "Engine", "Finish", "Plan", "compare", "for_cpp", "reason", "resized", "to_709"]

_CANARY_LEVELS = 8.0
_TILE = 16  # pixels, of a side; as wide as the blocks of 4:2:0


class CanaryError(RuntimeError):
    """DALI's pixels are not those of the C++ decoder: a pair that was decoded by both differs by more than it may."""


class Engine:
    """DALI on one device: its pipelines, which one call at a time uses, and the count of pairs for the canary."""

    def __init__(self, device: torch.device, threads: int, canary: int | None, hardware_load: float) -> None:
        self.device, self.threads, self.canary, self.hardware_load = device, threads, canary, hardware_load
        self.is_gpu = device.type == "cuda"
        self._pipelines: dict[tuple[object, ...], tuple[int, Any]] = {}  # and how many samples each takes
        self._held: list[Any] = []  # what a GPU may still be reading
        self._pairs = itertools.count()  # that DALI decoded
        self._lock = threading.Lock()

    def with_defaults(self, defaults: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in defaults:
                raise TypeError(f"there is no option {name!r}; expected any of {', '.join(defaults)}")
        given = defaults | options
        return given if given["threads"] is not None else given | dict(threads=self.threads)

    @contextmanager
    def writing(self, out: Tensor) -> Iterator[None]:
        """Writes to an inference tensor are only allowed in its mode; no others are ever part of a graph."""
        device = torch.cuda.device(out.device) if out.device.type == "cuda" else nullcontext()
        with self._lock, torch.inference_mode(out.is_inference()), torch.no_grad(), device:
            try:
                yield
            finally:
                self.wait()

    def run(
        self, key: tuple[object, ...], graph: Callable[[], Any], most: int, inputs: dict[str, list[np.ndarray]]
    ) -> list[Tensor]:
        """One run of a pipeline, for up to `most` samples. It is built when it is first needed, and again for more.

        A smaller one beside it would hold buffers for each of its threads, too.
        """
        room, pipeline = self._pipelines.pop(key, (0, None))
        if room < most:
            room, pipeline = most, self._pipeline(graph, most)
        stream = torch.cuda.current_stream(self.device) if self.is_gpu else None
        (batch,) = pipeline.run(stream, **inputs)
        self._held.append(batch)
        self._pipelines[key] = room, pipeline  # one that fails is of no use any more
        return [torch.utils.dlpack.from_dlpack(sample) for sample in batch]

    def wait(self) -> None:
        """Until what was asked of the GPU is done; then DALI may use its buffers again."""
        if self.is_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        self._held.clear()

    def is_canary(self) -> bool:
        """Of the next pair that DALI decoded."""
        return self.canary is not None and next(self._pairs) % self.canary == 0

    def _pipeline(self, graph: Callable[[], Any], most: int) -> Any:
        from nvidia.dali import Pipeline

        pipeline = Pipeline(
            batch_size=most,
            # On a GPU a thread decodes a whole sample, and holds tens of megabytes on both sides.
            num_threads=min(self.threads, most) if self.is_gpu else self.threads,
            device_id=self.device.index if self.is_gpu else None,
            prefetch_queue_depth=1,  # each batch is given and awaited
        )
        with pipeline:
            pipeline.set_outputs(graph())
        return pipeline


def reason(error: RuntimeError | None) -> str:
    """What DALI says, without the pages around it."""
    words = " ".join(str(error).rsplit("encountered:", 1)[-1].split())
    return words if len(words) < 300 else f"{words[:300]} ..."


def for_cpp(
    asked: Request, options: dict[str, Any], chosen: Sequence[int]
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """The arguments with which C++ decodes some of the pairs as they were asked for."""
    seeds = None if asked.seeds is None else [asked.seeds[i] for i in chosen]
    arms = [asked.win[i] for i in chosen], [asked.lose[i] for i in chosen]
    return *arms, options | dict(seeds=seeds, out=None, on_error="mask")


# ----------------------------------------------------------------------------------------------- one picture


class Plan(NamedTuple):
    """One image's way into the output, from csrc/bindings.cpp: all as stored. Zeros where C++ is to be asked."""

    height: int
    width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int
    to_top: int
    to_left: int
    transposed: int
    rows_reversed: int
    cols_reversed: int
    top: int
    left: int

    def is_resized(self) -> bool:
        return (self.height, self.width) != (self.resized_height, self.resized_width)

    def original(self) -> tuple[int, int]:
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    def corner(self) -> tuple[int, int]:
        return self.top, self.left

    def inputs(self, interpolation: str | None, decoded: Plan | None = None) -> dict[str, np.ndarray]:
        """What the pipeline is fed. decoded: a plan whose crop, unresized, is what was decoded; None to choose."""
        crop = (self.crop_top, self.crop_left), (self.crop_height, self.crop_width)
        if interpolation is None:
            return {"start": np.array(crop[0], np.int32), "shape": np.array(crop[1], np.int32)}
        starts, shapes, begins, ends = [], [], [], []
        for axis, (source, resized) in enumerate(
            ((self.height, self.resized_height), (self.width, self.resized_width))
        ):
            scale = source / resized
            begin, end = crop[0][axis] * scale, (crop[0][axis] + crop[1][axis]) * scale
            # As far as the filter looks, and a bit.
            reach = (2 if interpolation == "bicubic" else 1) * max(scale, 1) + 2
            first, last = max(0, math.floor(begin - reach)), min(source, math.ceil(end + reach))
            if decoded is not None:
                first, last = 0, source
            starts.append(first)
            shapes.append(last - first)
            begins.append(begin - first)
            ends.append(end - first)
        return {
            "start": np.array(starts, np.int32),
            "shape": np.array(shapes, np.int32),
            "roi_start": np.array(begins, np.float32),
            "roi_end": np.array(ends, np.float32),
            "size": np.array(crop[1], np.float32),
        }


def resized(pixels: Any, interpolation: str) -> Any:
    from nvidia.dali import fn, types

    given = {n: fn.external_source(name=n, dtype=types.FLOAT, ndim=1) for n in ("size", "roi_start", "roi_end")}
    kind = types.INTERP_CUBIC if interpolation == "bicubic" else types.INTERP_LINEAR
    return fn.resize(pixels, **given, interp_type=kind, antialias=True, subpixel_scale=False, dtype=types.FLOAT)


class Finish:
    """From levels to elements of the output, with the arithmetic of csrc/pixels.cpp."""

    def __init__(self, dtype: torch.dtype, native: dict[str, Any], device: torch.device) -> None:
        self._in_bytes = dtype == torch.uint8
        numbers = torch.tensor([*native["normal"], *native["background"]], dtype=torch.float32, device=device)
        self._offset, self._scale, self._background = numbers.view(3, 3, 1, 1).unbind()

    def store(self, levels: Tensor, where: Plan, out: Tensor) -> None:
        """levels: (h, w, 3), the crop as stored. out: (3, H, W)."""
        reversed_ = [axis for axis, turned in ((1, where.rows_reversed), (2, where.cols_reversed)) if turned]
        pixels = levels.permute(2, 0, 1).flip(reversed_) if reversed_ else levels.permute(2, 0, 1)
        if where.transposed:
            pixels = pixels.transpose(1, 2)
        h, w = pixels.shape[1:]
        if (h, w) != out.shape[1:]:
            out.copy_(self._element(self._background))
        out[:, where.to_top : where.to_top + h, where.to_left : where.to_left + w] = self._element(pixels)

    def _element(self, levels: Tensor) -> Tensor:
        if levels.dtype == torch.float32:
            levels = levels.clamp(0, 255)  # a bicubic filter leaves the range
        if self._in_bytes:
            return levels + 0.5 if levels.dtype == torch.float32 else levels  # cut off when stored
        return (levels - self._offset) * self._scale


# ------------------------------------------------------------------------------------------------- the canary


def compare(
    pair: int, mine: Tensor, known: Tensor, normal: list[float], bt709: Sequence[bool] = (False, False)
) -> None:
    """(2, 3, H, W) of both. bt709: whether an arm came by way of BT.601, where its colours were clipped."""
    numbers = torch.tensor(normal if mine.dtype != torch.uint8 else [0.0] * 3 + [1.0] * 3).view(2, 3, 1, 1)
    levels = torch.stack((mine.cpu(), known)).float() / numbers[1] + numbers[0]
    for arm, clipped in enumerate(bt709):
        if clipped:
            back = torch.tensor(np.linalg.inv(to_709()), dtype=torch.float32)
            levels[:, arm] = torch.einsum("ij,njhw->nihw", back, levels[:, arm]).clamp(0, 255)
    apart = levels[0] - levels[1]
    tiles = max(1, apart.shape[2] // _TILE), max(1, apart.shape[3] // _TILE)
    # In a tile, what is dithered or shifted by less than a pixel evens out; what is wrong does not.
    means = torch.nn.functional.adaptive_avg_pool2d(apart, tiles)
    worst = means.abs().nan_to_num(math.inf).amax(dim=(1, 2, 3))
    if float(worst.max()) > _CANARY_LEVELS:
        side = "win" if worst[0] >= worst[1] else "lose"
        raise CanaryError(
            f"{side}[{pair}] is decoded by DALI into other pixels than by C++: the mean of a tile of {_TILE} x {_TILE} "
            f"differs by {float(worst.max()):.1f} levels of 255; expected at most {_CANARY_LEVELS:g}. "
            "DALI's pixels cannot be relied upon here: use decoder='cpp', or hardware_load=0"
        )


def to_709() -> np.ndarray:
    """RGB in BT.709 of RGB that was taken for BT.601."""
    return _rgb_of_ycc(0.2126, 0.0722) @ np.linalg.inv(_rgb_of_ycc(0.299, 0.114))


def _rgb_of_ycc(red: float, blue: float) -> np.ndarray:
    """From Y, Cb, Cr of the same range to R, G, B, given the weights of red and blue in Y."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 - 2 * red],
            [1, -(2 - 2 * blue) * blue / green, -(2 - 2 * red) * red / green],
            [1, 2 - 2 * blue, 0],
        ]
    )
