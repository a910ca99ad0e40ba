"""`polydpo_fast.decode_clips`: the compressed clips of a batch of pairs to one normalised tensor of frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .colour import MATRICES
from .decode import DecodeError, DecodeFailure
from .decode_arguments import ClipLimits, check_clips
from .timeline import TooShortError, plan
from .video import Clip, Source, need_av, orientation

if TYPE_CHECKING:
    from . import _C

__all__ = ["ClipLimits", "DecodedClips", "decode_clips"]

# Of what csrc/frame.hpp takes: bits, and the shifts of the chroma's width and height.
_FORMATS = {
    f"yuv{j}{name}p{end}": (depth, *shifts)
    for name, shifts in (("420", (1, 1)), ("422", (1, 0)), ("444", (0, 0)), ("440", (0, 1)))
    for j, end, depth in (("", "", 8), ("j", "", 8), ("", "9le", 9), ("", "10le", 10), ("", "12le", 12))
}
_RGB = {f"gbrp{end}": depth for end, depth in (("", 8), ("9le", 9), ("10le", 10), ("12le", 12))}
_GREY = {f"gray{end}": depth for end, depth in (("", 8), ("9le", 9), ("10le", 10), ("12le", 12))}
# csrc/frame.hpp's Matrix, and of which of ITU-T H.273's numbers, which are FFmpeg's, it is. 2 and 3 tell nothing, and
# 0, which is RGB, nothing of YCbCr.
_MATRIX_NAMES = (*MATRICES, "rgb")
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_UNTOLD = (0, 2, 3)
_LIMITED_RANGE, _FULL_RANGE = 1, 2
_MOST_THREADS = 16  # of FFmpeg's for a clip: each holds frames
_STORED = ("yuv420p", "yuvj420p")  # what can be had as it is stored


@dataclass(frozen=True)
class DecodedClips:
    """The result of `decode_clips` for B pairs. Rows are [winners; losers], the halves layout of the loss.

    pixels: (2B, 3, T, H, W), or (2B, T, 3, H, W) under layout="TCHW", or (2B, T, H * 3/2, W) under dtype="yuv420".
    ok: (B,) bool; False where an arm failed under on_error="mask".
    errors: what failed, at most one per clip.
    times: (B, T) float64, seconds from each clip's first frame to those that were taken; both arms share them.
    original_size: (2B, 2) int64, height and width of the frames as they are to be shown, upright and with square
        pixels, before the transform.
    crop_top_left: (2B, 2) int64, corner of the crop in the resized and mirrored frames.
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
    Colour follows the stream's own flags, and in H.264, HEVC and AV1 those of where chroma lies; without any it is
    BT.709 from 720 lines on, BT.601 below, of limited range, its chroma on the even columns between the rows. Transfer
    functions (PQ, HLG) are not undone.

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
        threads: at most so many; None for as many as processors this process may use.
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
    from . import _C

    need_av()
    asked = check_clips(
        win, lose, frames=frames, size=size, fps=fps, start=start, short=short, resize=resize,
        interpolation=interpolation, crop=crop, hflip=hflip, seeds=seeds, dtype=dtype, mean=mean, std=std,
        background=background, layout=layout, out=out, strict=strict, limits=limits, on_error=on_error,
        threads=threads, cache=cache,
    )  # fmt: skip
    clips, planes, (height, width), out = [*asked.win, *asked.lose], asked.planes, asked.size, asked.out
    pairs = len(asked.win)
    stores = [
        _C.FrameStore(draw=draw, apply_orientation=True, memory=1 << 30, planes=planes, **asked.native)
        for draw in asked.draws
    ]

    reasons: dict[int, str] = {}
    geometry, colours = [(0, 0, 0, 0)] * (2 * pairs), [("bt709", False)] * (2 * pairs)
    times = torch.zeros((pairs, frames), dtype=torch.float64, device="cpu")
    # FFmpeg's own threads only where there are more processors than clips.
    own_threads = min(max(1, asked.threads // len(clips)), _MOST_THREADS)
    opened = [Clip(clip, asked.limits, strict, own_threads, cache) for clip in clips]
    in_order = planes or layout == "TCHW"
    frame_bytes = math.prod(out.shape[2:] if in_order else out.shape[3:]) * out.element_size()
    plane = 0 if planes else height * width * (1 if in_order else frames)

    def attempt(row: int, work: Any) -> None:
        try:
            work()
        except Exception as error:  # FFmpeg's errors are of many classes, OSError and ValueError among them
            reasons.setdefault(row, f"{error}" or type(error).__name__)

    def decode(row: int) -> None:
        clip, pair = opened[row], row % pairs
        clock = opened[pair].timeline.unit if fps is None else Fraction(0)
        chosen = clip.timeline.shown_at(plans[pair], short, clock)
        base = out[row].data_ptr()
        first_place: dict[int, int] = {}
        stored = False
        for k, pts in enumerate(chosen):
            first_place.setdefault(pts, k)
        for pts, frame in clip.frames(sorted(first_place)):
            _check_frame(frame, clip, resize, planes)
            place = base + first_place[pts] * frame_bytes
            shown_in, geometry[row] = _store(stores[pair], frame, clip, place, plane)
            if planes and stored and shown_in != colours[row]:
                raise ValueError(f"what its YCbCr means changes from {colours[row]} to {shown_in} (matrix, full range)")
            colours[row], stored = shown_in, True
            del frame
        with torch.inference_mode(out.is_inference()):  # a thread has a mode of its own
            shown = out[row] if in_order else out[row].transpose(0, 1)
            for k, pts in enumerate(chosen):
                if first_place[pts] != k:
                    shown[k] = shown[first_place[pts]]

    plans: dict[int, list[Fraction]] = {}
    with ThreadPoolExecutor(min(asked.threads, len(clips))) as pool:
        try:
            list(pool.map(lambda row: attempt(row, opened[row].index), range(2 * pairs)))
            for pair in range(pairs):
                if pair in reasons or pair + pairs in reasons:
                    continue
                arms = opened[pair].timeline, opened[pair + pairs].timeline
                try:
                    plans[pair] = plan(arms, frames, fps, start, asked.starts[pair], short)
                except TooShortError as early:
                    reasons[pair if early.arm == 0 else pair + pairs] = str(early)
                else:
                    times[pair] = torch.tensor([float(t) for t in plans[pair]], dtype=torch.float64, device="cpu")
            rows = [row for row in range(2 * pairs) if row % pairs in plans]
            list(pool.map(lambda row: attempt(row, lambda: decode(row)), rows))
        except BaseException:  # somebody is in a hurry: the clips that are under way are not decoded to their end
            for clip in opened:
                clip.give_up()
            raise
        finally:
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)  # written behind PyTorch's back

    errors = tuple(
        DecodeFailure("win" if row < pairs else "lose", row % pairs, reason) for row, reason in sorted(reasons.items())
    )
    if errors and on_error == "raise":
        raise DecodeError(errors)
    ok = torch.ones(pairs, dtype=torch.bool, device="cpu")
    with torch.inference_mode(out.is_inference()):
        for pair in {failure.index for failure in errors}:
            ok[pair], times[pair] = False, 0
            for row in (pair, pair + pairs):  # of the other arm nothing is told either
                out[row] = 0
                geometry[row], colours[row] = (0, 0, 0, 0), ("bt709", False)
    flipped = torch.tensor([bool(flip) for *_, flip in asked.draws], device="cpu")
    numbers = torch.tensor(geometry, dtype=torch.int64, device="cpu")
    concealed = torch.tensor([max(clip.concealed, clip.is_damaged) for clip in opened], device="cpu")
    matrix, full_range = zip(*colours, strict=True)
    return DecodedClips(out, ok, errors, times, numbers[:, :2], numbers[:, 2:], flipped, concealed, matrix, full_range)


def _check_frame(frame: Any, clip: Clip, resize: str | None, planes: bool) -> None:
    name = frame.format.name
    if planes and (name not in _STORED or clip.siting):
        chroma = f", its chroma of type {clip.siting} of H.264's figure E-1" if clip.siting else ""
        raise ValueError(f"its pixels are {name}{chroma}; expected 8-bit 4:2:0 of type 0 for dtype='yuv420'")
    if resize is None and clip.aspect != 1:
        raise ValueError(f"its pixels are {float(clip.aspect):.4g} times as wide as high, and resize is None")


def _colours_of(frame: Any) -> tuple[str, bool]:
    """What the frame's samples mean: a name of `DecodedClips.matrix`, and whether they have the full range."""
    name, matrix, told = frame.format.name, int(frame.colorspace), int(frame.color_range)
    if name in _RGB:
        return "rgb", told != _LIMITED_RANGE
    if matrix not in _MATRICES and matrix not in _UNTOLD:
        raise ValueError(
            f"its colours have the matrix {matrix} of ITU-T H.273; expected {', '.join(map(str, _MATRICES))} or none"
        )
    return _MATRICES.get(matrix, "bt709" if frame.height >= 720 else "bt601"), told == _FULL_RANGE or "yuvj" in name


def _store(
    store: _C.FrameStore, frame: Any, clip: Clip, place: int, plane: int
) -> tuple[tuple[str, bool], tuple[int, int, int, int]]:
    """Matrix and range; original height and width, crop top and left."""
    name, height, width = frame.format.name, frame.height, frame.width
    planes, strides = list(frame.planes), [plane.line_size for plane in frame.planes]
    if name in _RGB:
        form = _RGB[name], 0, 0
    elif name in _GREY:
        form = _GREY[name], 1, 1
        neutral = np.full(
            ((height + 1) // 2, (width + 1) // 2), 1 << (form[0] - 1), np.uint8 if form[0] == 8 else np.uint16
        )
        planes, strides = [*planes, neutral, neutral], [*strides, *[neutral.strides[0]] * 2]
    elif name in _FORMATS:
        form = _FORMATS[name]
    else:
        raise ValueError(f"its pixels are {name}; expected YCbCr, RGB or grey of 8, 9, 10 or 12 bits")
    matrix, full_range = _colours_of(frame)
    geometry = store.store(
        planes,
        strides,
        (height, width, *form),
        full_range,
        _MATRIX_NAMES.index(matrix),
        orientation(frame),
        place,
        plane,
        (height, max(1, round(width * clip.aspect))),
        clip.siting if form[1:] == (1, 1) else 0,
    )
    return (matrix, full_range), geometry
