"""Clips of pairs by DALI: the frames that PyAV's timeline chooses; the others by C++."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from .. import _C
from ..clip_file import Source
from ..clips import DecodedClips, colours_of, decode_clips, decode_timed
from ..decode import DecodeError, DecodeFailure
from ..decode_arguments import ClipLimits, Draw, check_clips
from ..timeline import plan
from ..video import Clip, aspect_of, orientation, require_av, siting_of
from .dali_canary import compare, to_709
from .dali_engine import Engine, for_cpp, reason
from .dali_picture import Finish, Plan

__all__ = ["decode"]

_DEFAULTS: dict[str, Any] = decode_clips.__kwdefaults__ or {}
_TO_709 = to_709()
_TILE = 32  # pixels: on a GPU chroma may lie half a pixel off, which must even out


def decode(engine: Engine, win: Sequence[Source], lose: Sequence[Source], options: dict[str, Any]) -> DecodedClips:
    """`decode_clips`, by DALI where it may have the clips."""
    require_av()
    options = engine.with_defaults(_DEFAULTS, options)
    asked = check_clips(win, lose, device=engine.device, **options)
    pairs, out, frames = len(asked.win), asked.out, asked.frames
    short, strict, cache = options["short"], options["strict"], options["cache"]
    frames_axis = 1 if options["layout"] == "TCHW" else 2  # of the whole
    finish = Finish(asked.output, engine.device)
    facts = _Facts(pairs, frames)
    with engine.writing(out):
        others: list[int] = []
        refused: dict[int, RuntimeError] = {}
        for i in range(pairs):
            pair = (asked.win[i], asked.lose[i])
            sides = None if asked.output.planes else _opened(engine, pair, strict, asked.limits, cache)
            try:
                if sides is None:
                    raise ValueError("it is not for DALI")
                timelines = sides[0].clip.timeline, sides[1].clip.timeline
                times = plan(timelines, frames, asked.fps, asked.start, asked.starts[i], short)
                where = [Plan(**_C.plan(side.size, draw=asked.draws[i], output=asked.output)) for side in sides]
                clock = timelines[0].unit if asked.fps is None else Fraction(0)
                for row, side, way in zip((i, i + pairs), sides, where, strict=True):
                    shown = np.searchsorted(side.clip.timeline.pts, side.clip.timeline.shown_at(times, short, clock))
                    target = out[row].movedim(frames_axis - 1, 0)
                    for k, frame in enumerate(_frames(engine, side, shown)):
                        finish.store(_recoloured(frame) if side.bt709 else frame, way, target[k])
            except (ValueError, RuntimeError) as error:  # C++ says what is wrong, if anything is
                others.append(i)
                if isinstance(error, RuntimeError):
                    refused[i] = error
                continue
            finally:
                engine.wait()  # the frames of one clip at a time: they are large
            facts.set(i, times, where, sides)
            if engine.is_canary():
                colours = [side.bt709 for side in sides]
                for k in (0, frames - 1):  # a decoder that loses count is wrong at the end
                    one = dict(frames=1, fps=1, start=times[k], short="repeat" if short == "error" else short)
                    *arms, given = for_cpp(asked, options | one, [i])
                    known = decode_timed(*arms, clock=clock, **given)
                    if known.ok.all():
                        mine = out[[i, i + pairs]].select(frames_axis, k)
                        there = known.pixels.select(frames_axis, 0)
                        compare(i, mine, there, asked.output, colours, _TILE)
        if others:
            *arms, given = for_cpp(asked, options, others)
            rest = decode_clips(*arms, **given)
            facts.take(rest, others)
            for trouble in [refused[i] for i in refused if rest.ok[others.index(i)]][:1]:
                warnings.warn(
                    f"DALI could not decode a clip of a batch that C++ could: {reason(trouble)}", stacklevel=3
                )
            for k, row in enumerate((*others, *(i + pairs for i in others))):
                out[row].copy_(rest.pixels[k])
    if facts.failures and options["on_error"] == "raise":
        raise DecodeError(facts.failures)
    return facts.result(out, asked.draws)


# ---------------------------------------------------------------------------------------------- inside DALI


def _frames(engine: Engine, side: _Side, shown: np.ndarray) -> Tensor:
    encoded: np.ndarray = np.frombuffer(memoryview(side.data), np.uint8)
    inputs = {"encoded": [encoded], "frames": [shown.astype(np.int32)]}
    (levels,) = engine.run("clips", lambda: _graph(engine), 1, inputs)
    if len(levels) != len(shown):
        raise RuntimeError(f"DALI gave {len(levels)} frames; expected {len(shown)}")
    return levels


def _graph(engine: Engine) -> Any:
    """The frames as stored, (T, H, W, 3) uint8."""
    from nvidia.dali import fn, types

    return fn.decoders.video(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if engine.is_gpu else "cpu",
        frames=fn.external_source(name="frames", dtype=types.INT32, ndim=1),
        affine=False,  # as in dali_images
    )


def _recoloured(levels: Tensor) -> Tensor:
    """RGB that was taken for BT.601, (h, w, 3), as it is in BT.709."""
    matrix = torch.tensor(_TO_709, dtype=torch.float32, device="cpu").to(levels.device, non_blocking=True)
    # Not a matrix product: within autocast, or where TF32 is allowed, its numbers would be cut to 8 or 11 bits.
    red, green, blue = (levels[..., k : k + 1].float() * matrix[:, k] for k in range(3))
    return red + green + blue


# ----------------------------------------------------------------------------------------------- the clips


class _Side(NamedTuple):
    """A clip that has been looked at."""

    clip: Clip
    data: Buffer
    codec: str
    size: tuple[int, int]
    bt709: bool
    is_plain: bool  # DALI would show the same frames


def _opened(
    engine: Engine, sources: Sequence[Source], strict: bool, limits: ClipLimits, cache: Any
) -> tuple[_Side, _Side] | None:
    """Both clips of a pair, if DALI can take them."""
    from av import FFmpegError

    sides = []
    for source in sources:
        try:
            side = _open_clip(source, Clip(source, limits, strict, 1, cache), engine.is_gpu)
        except (OSError, ValueError, TypeError, FFmpegError):  # C++ says what is wrong
            return None
        if not engine.is_gpu and side.codec not in ("vp8", "vp9"):
            raise ValueError(
                f"a clip's codec is {side.codec}, and DALI's CPU build decodes VP8 and VP9 only; "
                "use decoder='cpp', or a DaliDecoder on a CUDA device"
            )
        if not side.is_plain:
            return None
        sides.append(side)
    return sides[0], sides[1]


def _open_clip(source: Source, clip: Clip, is_gpu: bool) -> _Side:
    clip.index()
    data: Buffer
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            data = file.read()
    else:
        data = source
    with clip.opened() as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        is_only = len(container.streams.video) == 1  # else DALI may choose another
        packets, frame = 0, None
        for packet in container.demux(stream):
            clip.check_timeout()
            packets += packet.size > 0 or packet.pts is not None  # empty ones too, which DALI may count
            if frame is None:
                frame = next(iter(packet.decode()), None)
        aspect, siting = aspect_of(stream), siting_of(stream)
    if frame is None:
        raise ValueError("none of its frames can be decoded")
    matrix, full_range = colours_of(frame, clip)
    is_plain = (
        is_only
        and frame.format.name == "yuv420p"
        and not full_range
        and matrix in ("bt709", "bt601")
        and orientation(frame) == 1
        and aspect == 1
        and siting == 0
        and packets == len(clip.timeline.pts)
        and frame.pts == int(clip.timeline.pts[0])
    )
    if is_gpu:
        # DALI counts the frames that NVDEC decodes, and of VP9 and AV1 some are only shown, or never; it takes fields
        # for frames.
        is_plain &= codec in ("h264", "hevc") and not frame.interlaced_frame
    return _Side(clip, data, codec, (frame.height, frame.width), matrix == "bt709", is_plain)


class _Facts:
    """What `DecodedClips` tells beside the pixels, pair by pair."""

    def __init__(self, pairs: int, frames: int) -> None:
        self._pairs = pairs
        self._ok = torch.ones(pairs, dtype=torch.bool, device="cpu")
        self._times = torch.zeros((pairs, frames), dtype=torch.float64, device="cpu")
        self._original = torch.zeros((2 * pairs, 2), dtype=torch.int64, device="cpu")
        self._corner = torch.zeros_like(self._original)
        self._concealed = torch.zeros(2 * pairs, dtype=torch.int64, device="cpu")
        self._matrix, self._full_range = ["bt709"] * (2 * pairs), [False] * (2 * pairs)
        self.failures: list[DecodeFailure] = []

    def set(self, pair: int, times: Sequence[Fraction], plans: Sequence[Plan], sides: Sequence[_Side]) -> None:
        self._times[pair] = torch.tensor([float(t) for t in times], dtype=torch.float64, device="cpu")
        for row, way, side in zip((pair, pair + self._pairs), plans, sides, strict=True):
            self._original[row] = torch.tensor(way.original(), device="cpu")
            self._corner[row] = torch.tensor(way.corner(), device="cpu")
            self._matrix[row] = "bt709" if side.bt709 else "bt601"

    def take(self, rest: DecodedClips, chosen: list[int]) -> None:
        rows = [*chosen, *(i + self._pairs for i in chosen)]
        self._ok[chosen], self._times[chosen] = rest.ok, rest.times
        self._original[rows], self._corner[rows] = rest.original_size, rest.crop_top_left
        self._concealed[rows] = rest.concealed
        for k, row in enumerate(rows):
            self._matrix[row], self._full_range[row] = rest.matrix[k], rest.full_range[k]
        self.failures += [DecodeFailure(e.arm, chosen[e.index], e.reason) for e in rest.errors]

    def result(self, out: Tensor, draws: Sequence[Draw]) -> DecodedClips:
        flipped = torch.tensor([draw.flipped for draw in draws], device="cpu")
        places = self._original, self._corner, flipped, self._concealed
        colours = tuple(self._matrix), tuple(self._full_range)
        return DecodedClips(out, self._ok, tuple(self.failures), self._times, *places, *colours)
