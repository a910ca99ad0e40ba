"""`polydpo_fast.decode_clips`: the compressed clips of a batch of pairs to one normalised tensor of frames."""

from __future__ import annotations

import bisect
import io
import math
import os
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Buffer

from .decode import (
    _DTYPES,
    _GOLDEN,
    _INTERPOLATIONS,
    _RESIZES,
    DecodeError,
    DecodeFailure,
    _check_arms,
    _check_choice,
    _check_colour,
    _check_count,
    _check_out,
    _check_size,
    _check_threads,
    _draw,
    _normalisation,
    _splitmix64,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import _C

__all__ = ["ClipLimits", "DecodedClips", "decode_clips"]

Source = Buffer | str | os.PathLike[str]

# Told apart by their first bytes, so that no other demuxer of FFmpeg's ever sees what somebody sent: some of them open
# further files and addresses.
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_CODECS = ("h264", "hevc", "vp9", "vp8", "av1", "mpeg4")
_DECODERS = (*_CODECS, "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9")  # as FFmpeg calls those that others wrote
# Of what csrc/frame.hpp takes: bits, and the shifts of the chroma's width and height.
_FORMATS = {
    f"yuv{j}{name}p{end}": (depth, *shifts)
    for name, shifts in (("420", (1, 1)), ("422", (1, 0)), ("444", (0, 0)))
    for j, end, depth in (("", "", 8), ("j", "", 8), ("", "10le", 10), ("", "12le", 12))
}
# AVColorSpace to csrc/frame.hpp's Matrix: BT.709, BT.470BG, SMPTE 170M, BT.2020.
_MATRICES = {1: 1, 5: 0, 6: 0, 9: 2, 10: 2}
_FULL_RANGE = 2


@dataclass(frozen=True)
class ClipLimits:
    """What a clip may cost; more is refused before memory is allocated for it.

    pixels: height times width of a frame.
    bytes: of the compressed clip.
    frames: in the stream, also of those that are not used.
    timeout_s: seconds of work that one clip may take; looked at between two frames.
    """

    pixels: int = 1 << 24
    bytes: int = 1 << 32
    frames: int = 1 << 20
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("pixels", "bytes", "frames"):
            _check_count(f"limits.{name}", getattr(self, name), 2**62)
        if not _is_number(self.timeout_s) or not 0 <= self.timeout_s < math.inf:
            raise ValueError(f"limits.timeout_s is {self.timeout_s!r}; expected seconds >= 0")


@dataclass(frozen=True)
class DecodedClips:
    """The result of `decode_clips` for B pairs. Rows are [winners; losers], the halves layout of the loss.

    pixels: (2B, 3, T, H, W), or (2B, T, 3, H, W) under layout="TCHW".
    ok: (B,) bool; False where an arm failed under on_error="mask".
    errors: what failed, at most one per clip.
    times: (B, T) float64, seconds from each clip's first frame to those that were taken; both arms share them.
    original_size: (2B, 2) int64, height and width of the frames, upright, before the transform.
    crop_top_left: (2B, 2) int64, corner of the crop in the resized and mirrored frames.
    flipped: (B,) bool, whether the pair is mirrored.
    """

    pixels: Tensor
    ok: Tensor
    errors: tuple[DecodeFailure, ...]
    times: Tensor
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor


def decode_clips(
    win: Sequence[Source],
    lose: Sequence[Source],
    *,
    frames: int = 81,
    size: int | tuple[int, int] = (720, 1280),
    fps: float | Fraction | None = None,
    start: Literal["center", "random"] | float = "center",
    short: Literal["error", "repeat", "loop"] = "error",
    resize: Literal["cover", "contain", "stretch"] | None = "cover",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    crop: Literal["center", "random"] = "center",
    hflip: float = 0.0,
    seeds: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    background: tuple[int, int, int] = (255, 255, 255),
    layout: Literal["CTHW", "TCHW"] = "CTHW",
    out: Tensor | None = None,
    strict: bool = True,
    limits: ClipLimits | None = None,
    on_error: Literal["raise", "mask"] = "raise",
    threads: int | None = None,
) -> DecodedClips:
    """Decodes T frames of B winners and B losers into one (2B, 3, T, H, W) tensor that a video VAE takes as it is.

    FFmpeg (through PyAV: `pip install 'polydpo-fast[video]'`) decodes; each frame's planes are cropped, resized,
    converted, mirrored, normalised and stored in one pass in C++, without an RGB frame in between. The clips of a batch
    are decoded side by side. Start, frame times, crop and mirror are the same for both arms of a pair.

    Frames are chosen by the times at which they are presented: those that a full decode gives, whatever the seeking.
    Quarter turns and mirrors of the display matrix are applied; pixels are taken as square, also where they are not.
    Colour follows the stream's own flags; without any it is BT.709 from 720 lines on, BT.601 below, limited range.

    Args:
        win, lose: B clips each: bytes-like objects, or paths. H.264, HEVC, VP8, VP9, AV1 and MPEG-4 in MP4, MOV,
            Matroska and WebM. The first video stream is taken.
        frames: T, at least 1.
        size: height and width of the output, or one side.
        fps: frames per second of the output; at each time the frame that is being shown. None takes T successive
            frames of the winner, and the loser's at the same times.
        start: "center" of what both arms have, "random" (from the pair's seed), or seconds from the first frame.
        short: where an arm ends too early: an "error", or "repeat" its last frame, or "loop" from the start.
        resize, interpolation, crop, hflip, seeds, mean, std, background, on_error: as in `decode_pairs`.
        dtype: bfloat16, float16, float32, or uint8.
        layout: "CTHW" or "TCHW", of one clip in the output.
        out: a contiguous CPU tensor of the output's shape and dtype to write into.
        strict: whether damage that FFmpeg notices is an error; else it conceals what it can.
        limits: what a clip may cost; `ClipLimits()` if None.
        threads: at most so many; None for as many as processors this process may use.

    Raises:
        DecodeError: a clip could not be decoded (on_error="raise"). `out` then holds unspecified pixels.
        ImportError: PyAV is not installed.
        TypeError, ValueError: an argument has the wrong type or value; the message says which.
    """
    from . import _C

    try:
        import av  # noqa: F401
    except ImportError:
        raise ImportError("decode_clips needs PyAV: pip install 'polydpo-fast[video]'") from None
    clips = [clip for arm in _check_arms(win, lose) for clip in arm]
    pairs = len(clips) // 2
    height, width = _check_size(size)
    _check_count("frames", frames, 1 << 16)
    _check_choice("short", short, ("error", "repeat", "loop"))
    _check_choice("resize", resize, (*_RESIZES,))
    _check_choice("interpolation", interpolation, (*_INTERPOLATIONS,))
    _check_choice("crop", crop, ("center", "random"))
    _check_choice("layout", layout, ("CTHW", "TCHW"))
    _check_choice("on_error", on_error, ("raise", "mask"))
    if fps is not None and not (_is_number(fps) and 0.001 <= fps <= 1000):
        raise ValueError(f"fps is {fps!r}; expected a number from 0.001 to 1000, or None")
    if start not in ("center", "random") and not (_is_number(start) and 0 <= start < math.inf):  # type: ignore[operator]
        raise ValueError(f"start is {start!r}; expected 'center', 'random', or seconds >= 0")
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; expected torch.bfloat16, float16, float32 or uint8")
    if not isinstance(strict, bool):
        raise TypeError(f"strict is {strict!r}; expected True or False")
    if limits is None:
        limits = ClipLimits()
    elif not isinstance(limits, ClipLimits):
        raise TypeError(f"limits is a {type(limits).__name__}; expected a ClipLimits")
    threads = _check_threads(threads)
    inner = (3, frames, height, width) if layout == "CTHW" else (frames, 3, height, width)
    if out is None:
        out = torch.empty((2 * pairs, *inner), dtype=dtype, device="cpu")
    else:
        _check_out(out, (2 * pairs, *inner), dtype)
    if seeds is None and start == "random":
        seeds = torch.randint(2**63 - 1, (pairs,), device="cpu")
    draws = _draw(pairs, crop, hflip, seeds)
    starts = [_splitmix64(int(seed) + _START) / 2**64 for seed in seeds] if seeds is not None else [0.0] * pairs
    stores = [
        _C.FrameStore(
            draw=draw,
            dtype=_DTYPES[dtype],
            normal=_normalisation(mean, std),
            background=_check_colour(background),
            size=(height, width),
            resize=_RESIZES[resize],
            interpolation=_INTERPOLATIONS[interpolation],
            apply_orientation=True,
            memory=1 << 30,
        )
        for draw in draws
    ]

    reasons: dict[int, str] = {}
    geometry = [(0, 0, 0, 0)] * (2 * pairs)
    times = torch.zeros((pairs, frames), dtype=torch.float64, device="cpu")
    at_once = min(threads, len(clips))
    # FFmpeg's own threads only where there are more processors than clips.
    opened = [_Clip(clip, limits, strict, max(1, threads // len(clips))) for clip in clips]

    def attempt(row: int, work: Any) -> None:
        try:
            work()
        except Exception as error:  # FFmpeg's errors are of many classes, OSError and ValueError among them
            reasons.setdefault(row, f"{error}" or type(error).__name__)

    def decode(row: int) -> None:
        clip, pair = opened[row], row % pairs
        chosen = clip.timeline.shown_at(plans[pair], short)
        store = stores[pair]
        element = out.element_size()
        base, frame_step, plane = out[row].data_ptr(), height * width * (3 if layout == "TCHW" else 1), height * width
        if layout == "CTHW":
            plane *= frames
        first_place: dict[int, int] = {}
        for k, pts in enumerate(chosen):
            first_place.setdefault(pts, k)
        for pts, frame in clip.frames(sorted(first_place)):
            place = base + first_place[pts] * frame_step * element
            geometry[row] = _store(store, frame, place, plane)
        with torch.inference_mode(out.is_inference()):  # a thread has a mode of its own
            shown = out[row] if layout == "TCHW" else out[row].transpose(0, 1)
            for k, pts in enumerate(chosen):
                if first_place[pts] != k:
                    shown[k] = shown[first_place[pts]]

    plans: dict[int, list[Fraction]] = {}
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda row: attempt(row, opened[row].index), range(2 * pairs)))
        for pair in range(pairs):
            if pair in reasons or pair + pairs in reasons:
                continue
            arms = opened[pair].timeline, opened[pair + pairs].timeline
            try:
                plans[pair] = _plan(arms, frames, fps, start, starts[pair], short)
            except _TooShortError as early:
                reasons[pair if early.arm == 0 else pair + pairs] = str(early)
            else:
                times[pair] = torch.tensor([float(t) for t in plans[pair]], dtype=torch.float64, device="cpu")
        rows = [row for row in range(2 * pairs) if row % pairs in plans]
        list(pool.map(lambda row: attempt(row, lambda: decode(row)), rows))
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind PyTorch's back

    errors = tuple(
        DecodeFailure("win" if row < pairs else "lose", row % pairs, reason) for row, reason in sorted(reasons.items())
    )
    if errors and on_error == "raise":
        raise DecodeError(errors)
    ok = torch.ones(pairs, dtype=torch.bool, device="cpu")
    with torch.inference_mode(out.is_inference()):
        for failure in errors:
            ok[failure.index] = False
            out[failure.index] = 0
            out[pairs + failure.index] = 0
    flipped = torch.tensor([bool(flip) for *_, flip in draws], device="cpu")
    numbers = torch.tensor(geometry, dtype=torch.int64, device="cpu")
    return DecodedClips(out, ok, errors, times, numbers[:, :2], numbers[:, 2:], flipped)


_START = 4 * _GOLDEN  # the fourth number of a pair's seed; _draw takes three


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ the times


class _Timeline(NamedTuple):
    """The frames of a clip, in the order in which they are shown."""

    pts: list[int]
    unit: Fraction  # seconds

    def times(self) -> list[Fraction]:
        return [(pts - self.pts[0]) * self.unit for pts in self.pts]

    def duration(self) -> Fraction:
        """Until the last frame ends; it is shown as long as the one before it."""
        last = self.pts[-1] - self.pts[-2] if len(self.pts) > 1 else 1
        return (self.pts[-1] - self.pts[0] + last) * self.unit

    def shown_at(self, times: Sequence[Fraction], short: str) -> list[int]:
        """The pts of the frame that is shown at each time."""
        duration, result = self.duration(), []
        for t in times:
            if short == "loop":
                t %= duration
            # Rounded down to this clip's clock: a time taken from another clip's may fall just before its tick.
            ticks = (t + self.unit / 2) // self.unit + self.pts[0]
            result.append(self.pts[max(0, bisect.bisect_right(self.pts, ticks) - 1)])
        return result


class _TooShortError(ValueError):
    def __init__(self, arm: int, message: str) -> None:
        super().__init__(message)
        self.arm = arm


def _plan(
    arms: tuple[_Timeline, _Timeline],
    frames: int,
    fps: float | Fraction | None,
    start: str | float,
    drawn: float,
    short: str,
) -> list[Fraction]:
    """The times, from each clip's first frame, of the frames to take from both arms."""
    ends = [arm.duration() for arm in arms]
    # Beyond the end, the places to start from are those of a clip that fits exactly.
    if fps is None:
        given = arms[0].times()
        usable = bisect.bisect_left(given, ends[1])
        places = max(0, usable - frames)
        if isinstance(start, str):
            first = places // 2 if start == "center" else int(drawn * (places + 1))
        else:
            first = bisect.bisect_left(given, Fraction(start) - arms[0].unit / 2)  # floats are not exact
        step = ends[0] / len(given)
        times = given[first : first + frames]
        while len(times) < frames:
            times.append(times[-1] + step if times else ends[0] + len(times) * step)
    else:
        interval = 1 / Fraction(fps).limit_denominator(1_000_000)
        slack = max(Fraction(0), min(ends) - interval * (frames - 1))
        if isinstance(start, str):
            # Strictly before the end of what is left, so that the last frame is still shown.
            begin = slack / 2 if start == "center" else slack * Fraction(drawn).limit_denominator(1 << 32)
            begin = max(Fraction(0), min(begin, slack - min(arm.unit for arm in arms)))
        else:
            begin = Fraction(start).limit_denominator(1_000_000)
        times = [begin + k * interval for k in range(frames)]
    if short == "error":
        for arm, end in enumerate(ends):
            if times[-1] >= end:
                raise _TooShortError(
                    arm,
                    f"it ends after {float(end):.3f} s ({len(arms[arm].pts)} frames); "
                    f"expected a frame at {float(times[-1]):.3f} s, or short='repeat' or 'loop'",
                )
    return times


# ----------------------------------------------------------------------------------------------- the frames


class _Clip:
    """One clip: its timeline, then the frames that are asked of it."""

    def __init__(self, source: Source, limits: ClipLimits, strict: bool, threads: int) -> None:
        self._source, self._limits, self._strict, self._threads = source, limits, strict, threads
        self._left = limits.timeout_s  # seconds, of work on this clip, not of waiting for others
        self._since = 0.0
        self.timeline = _Timeline([], Fraction(1))
        self._keys: list[int] = []
        self._sought = False
        self._form: tuple[int, int, int] | None = None

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        import av

        if isinstance(self._source, (str, os.PathLike)):
            file: Any = open(self._source, "rb")  # noqa: SIM115  # closed below
            size = os.fstat(file.fileno()).st_size
        else:
            view = memoryview(self._source).cast("B")
            size, file = len(view), io.BytesIO(view)
        with file:
            if size > self._limits.bytes:
                raise ValueError(f"it has {size} bytes, more than {self._limits.bytes} (limits.bytes)")
            begin = file.read(12)
            file.seek(0)
            format = _container(begin)
            with av.open(file, format=format, options={"err_detect": "explode"} if self._strict else {}) as container:
                if not container.streams.video:
                    raise ValueError("it has no video stream")
                stream = container.streams.video[0]
                context = stream.codec_context
                if context.name not in _DECODERS:
                    raise ValueError(f"its codec is {context.name}; expected one of {', '.join(_CODECS)}")
                pixels = context.width * context.height
                if pixels <= 0:
                    raise ValueError("its header states no size")
                if pixels > self._limits.pixels:
                    raise ValueError(f"it has {pixels} pixels, more than {self._limits.pixels} (limits.pixels)")
                context.thread_count = self._threads
                context.thread_type = "AUTO" if self._threads > 1 else "NONE"
                if self._strict:
                    context.options = {"err_detect": "explode"}
                yield container, stream

    def _look_at_the_clock(self) -> None:
        if time.monotonic() - self._since > self._left:
            raise TimeoutError(f"it took more than {self._limits.timeout_s} s (limits.timeout_s)")

    def index(self) -> None:
        """Reads the packets, without decoding more than the first, for the times of frames and the places to seek."""
        self._since = time.monotonic()
        pts, keys = [], []
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if packet.pts is None:
                    continue
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if packet.is_discard:  # cut off by an edit list, but what follows may be decoded from it
                    continue
                pts.append(packet.pts)
                if len(pts) > self._limits.frames:
                    raise ValueError(f"it has more than {self._limits.frames} frames (limits.frames)")
                self._look_at_the_clock()
            unit = stream.time_base
        if not pts:
            raise ValueError("it has no frames with a presentation time")
        # A clip that was cut off another may begin with packets that need what is not there any more.
        with self._open() as (container, stream):
            first = next((frame.pts for frame in container.decode(stream) if frame.pts is not None), None)
        if first is None:
            raise ValueError("none of its frames can be decoded")
        shown = sorted({p for p in pts if p >= first})
        self.timeline, self._keys = _Timeline(shown, unit), sorted(keys)
        self._left -= time.monotonic() - self._since

    def frames(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """(pts, frame) of the wanted presentation times, which ascend.

        Not everything that is marked as a place to seek to is one: open groups of pictures and gradual refreshes need
        what came before. Where seeking fails, the rest is decoded from the start.
        """
        self._since, given = time.monotonic(), 0
        try:
            for found in self._frames(wanted, seeking=True):
                yield found
                given += 1
        except TimeoutError:
            raise
        except (OSError, ValueError):
            if not self._sought:
                raise
            yield from self._frames(wanted[given:], seeking=False)

    def _frames(self, wanted: list[int], seeking: bool) -> Iterator[tuple[int, Any]]:
        self._sought = False
        with self._open() as (container, stream):
            at, decoder, last = 0, None, -math.inf
            while at < len(wanted):
                before = bisect.bisect_right(self._keys, wanted[at])
                key = self._keys[before - 1] if before else self.timeline.pts[0]
                # Far ahead it is cheaper to seek than to decode what nobody needs.
                skipped = bisect.bisect_right(self._keys, key) - bisect.bisect_right(self._keys, last)
                if decoder is None or (seeking and skipped > 1):
                    if seeking and (decoder is not None or (before and key > self._keys[0])):
                        container.seek(key, stream=stream, backward=True)
                        self._sought = True
                    decoder = container.decode(stream)
                frame = next(decoder, None)
                self._look_at_the_clock()
                if frame is None:
                    moment = float((wanted[at] - self.timeline.pts[0]) * self.timeline.unit)
                    raise ValueError(f"its frame at {moment:.3f} s is missing")
                if frame.pts is None:
                    continue
                last = frame.pts
                if frame.pts < wanted[at]:
                    continue
                if frame.pts > wanted[at]:
                    moment = float((wanted[at] - self.timeline.pts[0]) * self.timeline.unit)
                    raise ValueError(f"its frame at {moment:.3f} s does not decode")
                if self._strict and frame.is_corrupt:
                    raise ValueError("one of its frames is corrupt")
                form = frame.width, frame.height, _orientation(frame)
                if self._form not in (None, form):
                    raise ValueError(f"its frames change from {self._form} to {form} (width, height, orientation)")
                self._form = form
                if frame.width * frame.height > self._limits.pixels:  # other than the header said
                    raise ValueError(f"a frame has more than {self._limits.pixels} pixels (limits.pixels)")
                yield frame.pts, frame
                at += 1


def _container(begin: bytes) -> str:
    if begin[4:8] in _BOXES:
        return "mp4"
    if begin[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if not begin:
        raise ValueError("it is empty")
    raise ValueError(f"it is neither MP4, MOV, Matroska nor WebM: it begins with {begin[:4].hex(' ')}")


def _store(store: _C.FrameStore, frame: Any, out: int, plane: int) -> tuple[int, int, int, int]:
    """Original height and width, crop top and left."""
    orientation = _orientation(frame)
    name = frame.format.name
    if name not in _FORMATS:
        frame = frame.reformat(format="yuv444p")
        name = frame.format.name
    depth, shift_x, shift_y = _FORMATS[name]
    matrix = _MATRICES.get(int(frame.colorspace), 1 if frame.height >= 720 else 0)
    full = int(frame.color_range) == _FULL_RANGE or "yuvj" in name
    return store.store(
        frame.planes,
        [plane.line_size for plane in frame.planes],
        (frame.height, frame.width, depth, shift_x, shift_y),
        full,
        matrix,
        orientation,
        out,
        plane,
    )


def _orientation(frame: Any) -> int:
    """EXIF's number for the frame's display matrix.

    Column x, row y of the frame is shown at a x + c y, b x + d y. (`frame.rotation` does not know mirrored ones.)
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = (int(v > 0) - int(v < 0) for v in struct.unpack("=9i", bytes(data))[:5])
            if (a, b, c, d) not in _ORIENTATIONS:
                raise ValueError(f"it is to be shown turned by {frame.rotation} degrees; expected quarter turns")
            return _ORIENTATIONS[a, b, c, d]
    return 1


_ORIENTATIONS = {
    **{(1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4},
    **{(0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8},
}
