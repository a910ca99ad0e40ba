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
from ..clips import DecodedClips, decode_clips, decode_timed
from ..decode import DecodeError, DecodeFailure
from ..decode_arguments import ClipRequest, check_clips
from ..draws import Draw
from ..frames import colours_of
from ..video import (
    Clip,
    ClipSource,
    aspect_of,
    choose_times,
    may_be_fields,
    may_change,
    open_regular,
    orientation,
    require_av,
    siting_of,
)
from .dali_canary import compare, to_709
from .dali_engine import Engine, for_cpp, reason
from .dali_picture import Finish, Placement

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
    batch = _Batch(engine, check_clips(win, lose, device=engine.device, **options), options)
    with engine.writing(batch.asked.out):
        for i in range(len(batch.asked.win)):
            batch.decode(i)
        batch.decode_others()
    return batch.result()


class _Batch:
    """Pairs on their way into the output."""

    def __init__(self, engine: Engine, asked: ClipRequest, options: dict[str, Any]) -> None:
        self.asked, self._engine, self._options = asked, engine, options
        self._finish = Finish(asked.output, engine.device)
        self._facts = _Facts(len(asked.win), asked.frames)
        self._others: dict[int, Exception | None] = {}  # pairs that are not DALI's, and why

    def decode(self, pair: int) -> None:
        """By DALI, if it can."""
        asked = self.asked
        sides = None
        if not asked.output.planes:
            sides = _opened(self._engine, asked, pair)
        if sides is None:
            self._others[pair] = None
            return
        try:
            times, clock = self._decode(pair, sides)
        except (ValueError, RuntimeError) as error:  # C++ says what is wrong, if anything is
            self._others[pair] = error.with_traceback(None)  # which has frames
            return
        finally:
            self._engine.wait()  # the frames of one pair at a time: they are large
        if self._engine.is_canary():
            self._look_again(pair, sides, times, clock)

    def _decode(self, pair: int, sides: tuple[_Side, _Side]) -> tuple[list[Fraction], Fraction]:
        """Returns the frames' times, and the clock that they are from, as of `decode_timed`."""
        asked, short = self.asked, self.asked.short
        timelines = sides[0].clip.timeline, sides[1].clip.timeline
        times = choose_times(timelines, asked.frames, asked.fps, asked.start, asked.starts[pair], short)
        clock = timelines[0].unit if asked.fps is None else Fraction(0)
        ways = [Placement(**_C.plan(side.size, draw=asked.draws[pair], output=asked.output)) for side in sides]
        for row, side, way in zip((pair, pair + len(asked.win)), sides, ways, strict=True):
            timeline, target = side.clip.timeline, self._frames_of(asked.out)[row]
            shown = np.searchsorted(timeline.pts, timeline.shown_at(times, short, clock))
            for k, frame in enumerate(_frames(self._engine, side, shown)):
                self._finish.store(_recoloured(frame) if side.bt709 else frame, way, target[k])
        self._facts.set(pair, times, ways, sides)
        return times, clock

    def _look_again(self, pair: int, sides: tuple[_Side, _Side], times: list[Fraction], clock: Fraction) -> None:
        """The canary, at the first frame and the last: a decoder that loses count is wrong at the end."""
        asked, short = self.asked, self.asked.short
        rows = [pair, pair + len(asked.win)]
        for k in (0, asked.frames - 1):
            one = dict(frames=1, fps=1, start=times[k], short="repeat" if short == "error" else short)
            *arms, given = for_cpp(asked, self._options | one, [pair])
            known = decode_timed(*arms, clock=clock, **given)
            if known.ok.all():
                mine, there = self._frames_of(asked.out)[rows, k], self._frames_of(known.pixels)[:, 0]
                compare(pair, mine, there, asked.output, [side.bt709 for side in sides], _TILE)

    def decode_others(self) -> None:
        """By C++."""
        if not self._others:
            return
        asked, chosen = self.asked, list(self._others)
        *arms, given = for_cpp(asked, self._options, chosen)
        rest = decode_clips(*arms, **given)
        self._facts.take(rest, chosen)
        for k, row in enumerate((*chosen, *(i + len(asked.win) for i in chosen))):
            asked.out[row].copy_(rest.pixels[k])
        for error, ok in zip(self._others.values(), rest.ok, strict=True):
            if isinstance(error, RuntimeError) and ok:
                text = "DALI could not decode a clip of a batch that C++ could"
                warnings.warn(f"{text}: {reason(error)}", stacklevel=4)
                break

    def result(self) -> DecodedClips:
        if self._facts.failures and self.asked.on_error == "raise":
            raise DecodeError(self._facts.failures)
        return self._facts.result(self.asked.out, self.asked.draws)

    def _frames_of(self, pixels: Tensor) -> Tensor:
        """(2B, T, 3, H, W), whatever the layout."""
        return pixels if self.asked.layout == "TCHW" else pixels.transpose(1, 2)


# ---------------------------------------------------------------------------------------------- inside DALI


def _frames(engine: Engine, side: _Side, shown: np.ndarray) -> list[Tensor]:
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


def _opened(engine: Engine, asked: ClipRequest, pair: int) -> tuple[_Side, _Side] | None:
    """Both clips of a pair, if DALI can take them."""
    from av import FFmpegError

    sides = []
    for source in (asked.win[pair], asked.lose[pair]):
        try:
            clip = Clip(source, asked.limits, asked.strict, 1, asked.cache)
            side = _open_clip(source, clip, engine.is_gpu)
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


def _open_clip(source: ClipSource, clip: Clip, is_gpu: bool) -> _Side:
    clip.index()
    data: Buffer = source  # type: ignore[assignment]  # if it is no path
    if isinstance(source, (str, os.PathLike)):
        with open_regular(os.fspath(source)) as file:
            data = file.readall() or b""
    with clip.opened() as (container, stream):
        context = stream.codec_context
        codec, header = context.codec.canonical_name, context.extradata
        is_only = len(container.streams.video) == 1  # else DALI may choose another
        packets, is_steady, frame = 0, True, None
        for packet in container.demux(stream):
            clip.check_timeout()
            packets += packet.size > 0 or packet.pts is not None  # empty ones too, which DALI may count
            is_steady &= packet.size == 0 or not may_change(codec, packet, header)
            if frame is None:
                frame = next(iter(packet.decode()), None)
        aspect, siting, coded = aspect_of(stream), siting_of(stream), (context.coded_height, context.coded_width)
    if frame is None:
        raise ValueError("none of its frames can be decoded")
    matrix, full_range = colours_of(frame, clip)
    size, pts = (frame.height, frame.width), clip.timeline.pts
    is_plain = (
        is_only
        and not clip.is_damaged
        and frame.format.name == "yuv420p"
        and not full_range
        and matrix in ("bt709", "bt601")
        and orientation(frame) == 1
        and aspect == 1
        and siting == 0
        and packets == len(pts)
        and frame.pts == int(pts[0])
        and clip.told_size() == size  # DALI makes frames of that size, and reads beyond smaller ones
    )
    if is_gpu:
        # DALI counts the frames that NVDEC decodes, and of VP9 and AV1 some are only shown, or never; it takes fields
        # for frames, and other parameters for the first. It sorts by times of 32 bits, of which -1 is none.
        is_plain &= codec in ("h264", "hevc") and is_steady and not may_be_fields(codec, header)
        is_plain &= int(pts[0]) >= 0 and int(pts[-1]) < 1 << 31
        is_plain &= _is_safe(codec, size, coded)
    return _Side(clip, data, codec, size, matrix == "bt709", is_plain)


_whole: set[tuple[str, tuple[int, int]]] = set()  # codecs and sizes of clips, of whose frames NVDEC cuts nothing off


def _is_safe(codec: str, size: tuple[int, int], coded: tuple[int, int]) -> bool:
    """Whether DALI decodes it by a decoder of its own size.

    It keeps NVDEC's decoders under the size that they show, and looks for them by the coded one: for a clip of 540
    lines, coded as 544, it would take that of a clip of 544, and find its chroma where there is luma.
    """
    if coded == size:
        _whole.add((codec, size))
    return coded == size or (codec, coded) not in _whole


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

    def set(self, pair: int, times: Sequence[Fraction], plans: Sequence[Placement], sides: Sequence[_Side]) -> None:
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
