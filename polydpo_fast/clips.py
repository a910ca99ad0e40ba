"""`polydpo_fast.decode_clips`: the compressed clips of a batch of pairs to one normalised tensor of frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .decode import DecodeError, DecodeFailure
from .decoding.arguments import ClipRequest, Output, check_clips
from .decoding.frames import check_frame, store_frame
from .limits import ClipLimits
from .video import Clip, ClipSource, TooShortError, choose_times, require_av, words_of

if TYPE_CHECKING:
    from . import _C

__all__ = ["ClipLimits", "DecodedClips", "decode_clips", "decode_timed"]

_MOST_THREADS = 16  # of FFmpeg's for a clip: each holds frames


@dataclass(frozen=True)
class DecodedClips:
    """The result of `decode_clips` for B pairs. Rows are [winners; losers], the halves layout of the loss.

    pixels: (2B, 3, T, H, W), or (2B, T, 3, H, W) under layout="TCHW", or (2B, T, H * 3/2, W) under dtype="yuv420".
    ok: (B,) bool; False where an arm failed under on_error="mask".
    errors: what failed, at most one per clip.
    times: (B, T) float64, seconds from each clip's first frame to those that were taken; both arms share them.
    original_size: (2B, 2) int64, height and width of the frames as they are to be shown, upright and with square
        pixels, before the transform. 0 where ok is False.
    crop_top_left: (2B, 2) int64, corner of the crop in the resized and mirrored frames; 0 where ok is False.
    flipped: (B,) bool, whether the pair is mirrored.
    concealed: (2B,) int64, how many of a clip's frames are not its own: another stands in, or FFmpeg marked them as
        corrupt; at least 1 where strict=True would have refused the clip. 0 under strict=True.
    matrix, full_range: for each of the 2B clips "bt601", "bt709", "bt2020", "fcc", "smpte240m" or "rgb", and a bool:
        what its samples mean.
    """

    pixels: Tensor
    ok: Tensor
    errors: tuple[DecodeFailure, ...]
    times: Tensor
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor
    concealed: Tensor
    matrix: tuple[str, ...]
    full_range: tuple[bool, ...]


def decode_clips(
    win: Sequence[ClipSource],
    lose: Sequence[ClipSource],
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
    dtype: torch.dtype | Literal["yuv420"] = torch.bfloat16,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    background: tuple[int, int, int] = (255, 255, 255),
    layout: Literal["CTHW", "TCHW"] = "CTHW",
    out: Tensor | None = None,
    strict: bool = True,
    limits: ClipLimits | None = None,
    on_error: Literal["raise", "mask"] = "raise",
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> DecodedClips:
    """Decodes T frames of B winners and B losers into one (2B, 3, T, H, W) tensor that a video VAE takes as it is.

    FFmpeg (through PyAV: `pip install 'polydpo-fast[video]'`) decodes; each frame's planes are cropped, resized,
    converted, mirrored, normalised and stored in one pass in C++, without an RGB frame in between. The clips of a batch
    are decoded side by side. Start, frame times, crop and mirror are the same for both arms of a pair.

    Frames are chosen by the times at which they are presented: those that a full decode gives, whatever the seeking.
    Quarter turns and mirrors of the display matrix are applied; frames of pixels that are not square are resized to the
    shape in which they are to be shown, except under "stretch", which looks at no shape, and fail under resize=None.
    Colour follows the stream's own flags, else the container's, and in H.264, HEVC and AV1 the stream's of where chroma
    lies; without any it is BT.709 from 720 lines on, BT.601 below, of limited range, its chroma on the even columns
    between the rows. Transfer functions (PQ, HLG) are not undone.

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
        dtype: bfloat16, float16, float32, or uint8; or "yuv420": the planes as they are stored, see below.
        layout: "CTHW" or "TCHW", of one clip in the output; planes have neither.
        out: a contiguous CPU tensor of the output's shape and dtype to write into.
        strict: whether damage that FFmpeg notices is an error. Else it mends what it can, the frame before stands in
            for one that is lost (the one after it at the beginning), and `concealed` counts them; a clip of which
            nothing can be decoded is an error all the same. One that is cut off ends where it is cut: see `short`.
        limits: what a clip may cost; `ClipLimits()` if None.
        threads: at most so many; None for as many as processors this process may use. Where PyAV passes on what FFmpeg
            logs (`av.logging.set_level`), one for each clip: FFmpeg's own would wait for Python for ever.
        cache: the folder where the times of frames and the places to seek to are kept for local files, until their
            size or time of modification changes; None for `$POLYDPO_FAST_CACHE`, or `polydpo_fast` in the user's
            cache folder.

    With dtype="yuv420", `pixels` is (2B, T, H * 3/2, W) uint8, H and W even: for each frame H * W bytes of Y, then
    H/2 * W/2 of Cb and of Cr. On a GPU, `polydpo_fast.yuv420_to_rgb(batch.pixels.cuda(), matrix=batch.matrix,
    full_range=batch.full_range, siting="left", flip=batch.flipped.repeat(2).cuda())` makes (2B, 3, T, H, W) of them,
    within one level of 255 of what is made here; mirroring is left to it, and corners of crops are even in the frames
    as stored. The outermost pixels of a crop may differ, because their neighbours' colours are cut off. Clips that are
    not 8-bit 4:2:0, whose chroma lies elsewhere, or that would have to be turned or resized, fail.

    Raises:
        DecodeError: a clip could not be decoded (on_error="raise"). `out` then holds unspecified pixels.
        ImportError: PyAV is not installed.
        TypeError, ValueError: an argument has the wrong type or value; the message says which.
    """
    return decode_timed(
        win, lose, frames=frames, size=size, fps=fps, start=start, short=short, resize=resize,
        interpolation=interpolation, crop=crop, hflip=hflip, seeds=seeds, dtype=dtype, mean=mean, std=std,
        background=background, layout=layout, out=out, strict=strict, limits=limits, on_error=on_error,
        threads=threads, cache=cache,
    )  # fmt: skip


def decode_timed(
    win: Sequence[ClipSource], lose: Sequence[ClipSource], *, clock: Fraction | None = None, **options: Any
) -> DecodedClips:
    """`decode_clips`, all of whose options are given.

    clock: of the clip from whose frames the times were taken, in seconds; 0 if from none. None: as the options have it.
    """
    require_av()
    asked = check_clips(win, lose, **options)
    rows = _rows_of(asked)
    try:
        times = _decode_rows(rows, asked, clock)
    finally:
        if not asked.out.is_inference():
            torch.autograd.graph.increment_version(asked.out)  # written behind PyTorch's back
    return _result(rows, asked, times)


def _rows_of(asked: ClipRequest) -> list[_Row]:
    from . import _C

    pairs = len(asked.win)
    stores = [_C.FrameStore(draw=draw, output=asked.output, memory=1 << 30) for draw in asked.draws]
    # FFmpeg's own threads only where there are more processors than clips.
    threads = min(max(1, asked.threads // (2 * pairs)), _MOST_THREADS)
    frames = asked.out if asked.output.planes or asked.layout == "TCHW" else asked.out.transpose(1, 2)
    rows = []
    for row, source in enumerate([*asked.win, *asked.lose]):
        clip = Clip(source, asked.limits, asked.strict, threads, asked.cache)
        rows.append(_Row(clip, stores[row % pairs], frames[row], asked.output))
    return rows


def _decode_rows(rows: list[_Row], asked: ClipRequest, clock: Fraction | None) -> Tensor:
    """Side by side. Returns the frames' times, (B, T). clock: as of `decode_timed`."""
    pairs = len(rows) // 2
    times = torch.zeros((pairs, asked.frames), dtype=torch.float64, device="cpu")
    with ThreadPoolExecutor(min(asked.threads, 2 * pairs), thread_name_prefix="polydpo-clip") as pool:
        try:
            _side_by_side(pool, [row.index for row in rows])
            work = []
            for pair, (win, lose) in enumerate(zip(rows[:pairs], rows[pairs:], strict=True)):
                moments = _times_of(win, lose, asked, asked.starts[pair])
                if not moments:
                    continue
                times[pair] = torch.tensor([float(moment) for moment in moments], dtype=torch.float64, device="cpu")
                # The resolution of the winner's times: what is not on a grid of its own is on that.
                own = win.clip.timeline.unit if asked.fps is None else Fraction(0)
                unit = own if clock is None else clock
                work += [partial(row.decode, moments, asked.short, unit) for row in (win, lose)]
            _side_by_side(pool, work)
        except BaseException:  # an interrupt: clips that are under way are not decoded to their end
            for row in rows:
                row.clip.cancel()
            raise
    return times


def _side_by_side(pool: ThreadPoolExecutor, work: Iterable[Callable[[], None]]) -> None:
    begun: list[Future[None]] = []
    try:
        for one in work:
            try:
                begun.append(pool.submit(one))
            except RuntimeError as error:
                # Python's pools take nothing more once its main thread has ended, though others go on. Where there is
                # no thread to be had for it, the work is queued all the same, and must not be done a second time.
                if "schedule" not in str(error):
                    raise
                one()
        for future in begun:
            future.result()
    finally:
        for future in begun:
            future.cancel()


def _result(rows: list[_Row], asked: ClipRequest, times: Tensor) -> DecodedClips:
    pairs = len(rows) // 2
    errors = tuple(
        DecodeFailure("win" if index < pairs else "lose", index % pairs, row.reason)
        for index, row in enumerate(rows)
        if row.reason
    )
    if errors and asked.on_error == "raise":
        raise DecodeError(errors)
    ok = torch.ones(pairs, dtype=torch.bool, device="cpu")
    for pair in {failure.index for failure in errors}:
        ok[pair], times[pair] = False, 0
        for row in (rows[pair], rows[pair + pairs]):  # nothing is told of the other arm either
            row.clear()
    flipped = torch.tensor([draw.flipped for draw in asked.draws], device="cpu")
    geometry = torch.tensor([row.geometry for row in rows], dtype=torch.int64, device="cpu")
    counts = [max(row.clip.concealed, int(row.clip.is_damaged)) for row in rows]
    concealed = torch.tensor(counts, dtype=torch.int64, device="cpu")
    matrix, full_range = zip(*(row.colours for row in rows), strict=True)
    return DecodedClips(
        asked.out, ok, errors, times, geometry[:, :2], geometry[:, 2:], flipped, concealed, matrix, full_range
    )


def _times_of(win: _Row, lose: _Row, asked: ClipRequest, drawn: float) -> list[Fraction]:
    """The times of a pair's frames, in seconds; none if an arm has failed, or is too short."""
    if win.reason or lose.reason:
        return []
    try:
        return choose_times(
            (win.clip.timeline, lose.clip.timeline), asked.frames, asked.fps, asked.start, drawn, asked.short
        )
    except TooShortError as error:
        (win, lose)[error.arm].reason = str(error)
        return []


class _Row:
    """A clip of the batch: where its frames go, and what became of it.

    frames: (T, 3, H, W), or (T, H * 3/2, W) of stored planes, in whatever order of memory.
    reason: why it failed, or "". geometry: original height, width, crop top, left. colours: matrix and full range.
    """

    def __init__(self, clip: Clip, store: _C.FrameStore, frames: Tensor, output: Output) -> None:
        self.clip, self._store, self._frames, self._output = clip, store, frames, output
        self.reason = ""
        self._forget()

    def _forget(self) -> None:
        self.geometry, self.colours = (0, 0, 0, 0), ("bt709", False)

    def clear(self) -> None:
        """As of a clip that failed."""
        with torch.inference_mode(self._frames.is_inference()):
            self._frames.zero_()
        self._forget()

    def index(self) -> None:
        with self._failing():
            self.clip.index()

    def decode(self, times: list[Fraction], short: str, clock: Fraction) -> None:
        """The frames that are shown at these times, each decoded once."""
        with self._failing():
            self._decode(self.clip.timeline.shown_at(times, short, clock))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # FFmpeg's errors are of many classes, OSError and ValueError among them
            self.reason = self.reason or words_of(error)

    def _decode(self, chosen: list[int]) -> None:
        first_place: dict[int, int] = {}
        for place, pts in enumerate(chosen):
            first_place.setdefault(pts, place)
        stored = False
        for pts, frame in self.clip.frames(sorted(first_place)):
            check_frame(frame, self.clip, self._output)
            colours, self.geometry = store_frame(self._store, frame, self.clip, self._frames[first_place[pts]])
            if self._output.planes and stored and colours != self.colours:
                raise ValueError(f"what its YCbCr means changes from {self.colours} to {colours} (matrix, full range)")
            self.colours, stored = colours, True
            del frame
        with torch.inference_mode(self._frames.is_inference()):  # a thread has a mode of its own
            for place, pts in enumerate(chosen):
                if first_place[pts] != place:
                    self._frames[place] = self._frames[first_place[pts]]
