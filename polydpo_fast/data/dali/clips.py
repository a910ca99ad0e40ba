"""Clips of pairs by DALI: the frames that PyAV's timeline chooses; the others by C++."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _C
from ...clips import DecodedClips, decode_clips, decode_timed
from ...decoding.arguments import ClipRequest, check_clips
from ...video import ClipSource, choose_times, require_av
from .batch import Batch
from .canary import compare, to_709
from .engine import Engine
from .picture import Placement
from .sides import Side, open_sides

__all__ = ["decode"]

_DEFAULTS: dict[str, Any] = decode_clips.__kwdefaults__ or {}
_TO_709 = to_709()
_MOST_BYTES = 1 << 32  # of a clip's decoded frames, which DALI holds at once
_TILE = 32  # pixels: on a GPU chroma may lie half a pixel off, which must even out


def decode(
    engine: Engine, win: Sequence[ClipSource], lose: Sequence[ClipSource], options: dict[str, Any]
) -> DecodedClips:
    """`decode_clips`, by DALI where it may have the clips."""
    require_av()
    options = engine.with_defaults(_DEFAULTS, options)
    asked = check_clips(win, lose, device=engine.device, **options)
    batch = _Clips(engine, asked, options)
    with engine.writing(asked.out):
        batch.decode()
    batch.raise_errors()
    facts = batch.times, batch.original_size, batch.crop_top_left, batch.flipped(), batch.concealed
    return DecodedClips(asked.out, batch.ok, batch.errors, *facts, tuple(batch.matrix), tuple(batch.full_range))


class _Clips(Batch):
    """times, concealed, matrix, full_range: as of `DecodedClips`."""

    asked: ClipRequest

    def __init__(self, engine: Engine, asked: ClipRequest, options: dict[str, Any]) -> None:
        super().__init__(engine, asked, options)
        self.times = torch.zeros((self.pairs, asked.frames), dtype=torch.float64, device="cpu")
        self.concealed = torch.zeros(2 * self.pairs, dtype=torch.int64, device="cpu")
        self.matrix, self.full_range = ["bt709"] * (2 * self.pairs), [False] * (2 * self.pairs)

    def decode(self) -> None:
        """By DALI those that it may have, and the others by C++."""
        others: dict[int, Exception | None] = {}
        for pair in range(self.pairs):
            sides = None if self.asked.output.planes else open_sides(self.engine, self.asked, pair)
            if sides is None:
                others[pair] = None
                continue
            try:
                times, clock = self._decode(pair, sides)
            except (ValueError, RuntimeError) as error:  # C++ says what is wrong, if anything is
                others[pair] = error.with_traceback(None)  # which has frames
                continue
            finally:
                self.engine.wait()  # the frames of one pair at a time: they are large
            if self.engine.is_canary():
                self._look_again(pair, sides, times, clock)
        if others:
            self.take([*others], self.by_cpp(decode_clips, [*others]))
        troubles = [error for pair, error in others.items() if isinstance(error, RuntimeError) and self.ok[pair]]
        if troubles:
            self.warn("DALI could not decode a clip of a batch that C++ could", troubles[0])

    def _decode(self, pair: int, sides: tuple[Side, Side]) -> tuple[list[Fraction], Fraction]:
        """Returns the frames' times, and the clock that they are from, as of `decode_timed`."""
        asked, timelines = self.asked, (sides[0].clip.timeline, sides[1].clip.timeline)
        times = choose_times(timelines, asked.frames, asked.fps, asked.start, asked.starts[pair], asked.short)
        clock = timelines[0].unit if asked.fps is None else Fraction(0)
        self.times[pair] = torch.tensor([float(time) for time in times], dtype=torch.float64, device="cpu")
        for row, side in zip(self.rows([pair]), sides, strict=True):
            placement = Placement(**_C.plan(side.size, draw=asked.draws[pair], output=asked.output))
            timeline, target = side.clip.timeline, self._frames_of(asked.out)[row]
            shown = np.searchsorted(timeline.pts, timeline.shown_at(times, asked.short, clock))
            for k, frame in enumerate(_frames(self.engine, side, shown)):
                self.finish.store(_recoloured(frame) if side.bt709 else frame, placement, target[k])
            self.place(row, placement)
            self.matrix[row] = "bt709" if side.bt709 else "bt601"
        return times, clock

    def _look_again(self, pair: int, sides: tuple[Side, Side], times: list[Fraction], clock: Fraction) -> None:
        """The canary, at the first frame and the last: a decoder that loses count is wrong at the end."""
        asked = self.asked
        for k in (0, asked.frames - 1):
            short = "repeat" if asked.short == "error" else asked.short
            known = self.by_cpp(decode_timed, [pair], clock=clock, frames=1, fps=1, start=times[k], short=short)
            if known.ok.all():
                mine, there = self._frames_of(asked.out)[self.rows([pair]), k], self._frames_of(known.pixels)[:, 0]
                compare(pair, mine, there, asked.output, [side.bt709 for side in sides], _TILE)

    def take(self, pairs: Sequence[int], result: DecodedClips) -> None:
        super().take(pairs, result)
        rows = self.rows(pairs)
        self.times[pairs], self.concealed[rows] = result.times, result.concealed
        for row, matrix, full_range in zip(rows, result.matrix, result.full_range, strict=True):
            self.matrix[row], self.full_range[row] = matrix, full_range

    def _frames_of(self, pixels: Tensor) -> Tensor:
        """(2B, T, 3, H, W), whatever the layout."""
        return pixels if self.asked.layout == "TCHW" else pixels.transpose(1, 2)


# ---------------------------------------------------------------------------------------------- inside DALI


def _frames(engine: Engine, side: Side, shown: np.ndarray) -> list[Tensor]:
    # For each that is asked for a second time DALI would decode the clip from its beginning again.
    once, places = np.unique(shown, return_inverse=True)
    encoded: np.ndarray = np.frombuffer(memoryview(side.data), np.uint8)
    if 3 * len(once) * side.size[0] * side.size[1] > _MOST_BYTES:
        raise ValueError("its frames would take too much of the device's memory at once")
    inputs = {"encoded": [encoded], "frames": [once.astype(np.int32)]}
    (levels,) = engine.run("clips", lambda: _graph(engine), 1, inputs)
    if len(levels) != len(once):
        raise RuntimeError(f"DALI gave {len(levels)} frames; expected {len(once)}")
    return [levels[place] for place in places.tolist()]


def _graph(engine: Engine) -> Any:
    """The frames as stored, (T, H, W, 3) uint8."""
    from nvidia.dali import fn, types

    return fn.decoders.video(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if engine.is_gpu else "cpu",
        frames=fn.external_source(name="frames", dtype=types.INT32, ndim=1),
        pad_mode="none",  # else those that it does not find are black
        affine=False,  # as in images
    )


def _recoloured(levels: Tensor) -> Tensor:
    """RGB that was taken for BT.601, (h, w, 3), as it is in BT.709."""
    matrix = torch.tensor(_TO_709, dtype=torch.float32, device="cpu").to(levels.device, non_blocking=True)
    # Not a matrix product: within autocast, or where TF32 is allowed, its numbers would be cut to 8 or 11 bits.
    red, green, blue = (levels[..., k : k + 1].float() * matrix[:, k] for k in range(3))
    return red + green + blue
