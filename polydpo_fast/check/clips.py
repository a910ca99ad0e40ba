"""Decoding of clips: frames against those of PyAV's full decode, which of them are taken, and their transform."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .cases import Draw
from .data import FRAME_LEVELS, picture, rgb, rounded
from .formulas import crop_at, drawn
from .report import Finding, must
from .transform import cut_out, inner, resampled

__all__ = ["clip"]

_RATE = 24
_KEYS = 4  # every so many frames
_STARTS: tuple[str | float, ...] = ("random", "center", 0.25)


def clip(seed: int, number: int) -> Iterator[tuple[Finding, str]]:
    """A pair of MPEG-4 clips: whole frames, and some of them at times of their own, resized. Needs PyAV."""
    from ..clips import decode_clips

    d = Draw(seed, number)
    height, width, count = 2 * d.integer(8, 30), 2 * d.integer(8, 30), d.integer(20, 26)
    matrix, mirrored = "bt601", d.deal("mirrored", (False, True))
    if d.deal("high", (True, False)):  # without a word about them, colours of 720 rows and more are those of HD
        height, width, matrix = 720, 16, "bt709"
    taken = d.integer(2, count // 2)
    encoded, expected = zip(*(_encoded(d, height, width, count + arm) for arm in (0, 1)), strict=True)
    win, lose = ([data] for data in encoded)
    what = f"{taken} of {count} frames of {height}x{width}"
    how: Any = dict(frames=taken, size=(height, width), start=0.0, resize=None)
    stored = decode_clips(win, lose, dtype="yuv420", **how).pixels
    pixels = decode_clips(win, lose, dtype=torch.uint8, hflip=float(mirrored), **how).pixels
    pixels = pixels.flip(-1) if mirrored else pixels
    for arm, frames in enumerate(expected):
        for index, planes in enumerate(frames[:taken]):
            same = np.array_equal(stored[arm, index].numpy().ravel(), np.concatenate([p.ravel() for p in planes]))
            yield must("planes as stored", same), what
            levels = float(np.abs(pixels[arm, :, index].numpy() - rgb(planes, matrix)).max())
            yield Finding("frames", levels / FRAME_LEVELS, levels), what

    whole = decode_clips(win, lose, dtype=torch.uint8, **{**how, "frames": count}).pixels.transpose(1, 2).numpy()
    yield from _of_pairs(d, win, lose, whole.transpose(0, 1, 3, 4, 2).astype(np.float64))


def _of_pairs(d: Draw, win: list[bytes], lose: list[bytes], whole: np.ndarray) -> Iterator[tuple[Finding, str]]:
    """Two pairs of the same clips, whose frames are known: (arms, frames, H, W, 3), but for one more of the loser.

    Both arms of a pair have the same times, crop and mirror, of its seed.
    """
    from ..clips import decode_clips

    count, height, width = whole.shape[1:4]
    start, fps = d.deal("start", _STARTS), d.deal("fps", (None, _RATE / 2, None, 2.0 * _RATE))
    short = d.deal("short", ("error", "loop", "repeat")) if start == 0.25 else "error"
    taken = count + 3 if short != "error" else d.integer(3, 7)
    resize, interpolation = d.deal("fit", ("cover", "stretch")), d.deal("filter", ("bilinear", "bicubic"))
    size = d.integer(8, min(40, height)), d.integer(8, min(40, width))
    seeds = [d.integer(0, 2**62) for _ in range(2)]
    means, stds = ([d.between(low, high) for _ in "rgb"] for low, high in ((0, 0.6), (0.2, 1)))
    frames_first, dtype = d.deal("layout", (True, False)), d.deal("dtype", (torch.bfloat16, torch.float32))
    how: Any = dict(frames=taken, fps=fps, start=start, short=short, size=size, resize=resize, crop="random", hflip=0.5)
    how |= dict(interpolation=interpolation, seeds=seeds, layout="TCHW" if frames_first else "CTHW")

    def decoded(**more: Any) -> tuple[Any, torch.Tensor]:
        batch = decode_clips(2 * win, 2 * lose, **how, **more)
        return batch, batch.pixels if frames_first else batch.pixels.transpose(1, 2)

    batch, pixels = decoded(dtype=torch.uint8)
    what = f"{taken} of {count} frames of {height}x{width} to {size}, {resize}, {interpolation}, start={start}"
    what = f"{what}, fps={fps}, short={short}"

    numbers = [drawn(seed) for seed in seeds]
    moments = [_moments(of_pair[3], start, fps, taken, count) for of_pair in numbers]  # in frames of the clip
    told = (batch.times * _RATE).tolist()
    near = np.abs(np.array(told) - np.array(moments)).max() < 1e-3
    yield must("moments", bool(near), f"they are {told}, not {moments}, in frames"), what

    to = inner((height, width), size, resize)
    expected = np.empty((4, taken, 3, *size))
    for pair, of_pair in enumerate(numbers):
        flipped, at = of_pair[2] / 2**64 < 0.5, crop_at(of_pair, to, size)
        found = [batch.flipped[pair].item(), *batch.crop_top_left[[pair, 2 + pair]].flatten().tolist()]
        yield must("crops", found == [flipped, *at, *at], f"mirror, corners are {found}"), what
        for arm in (0, 1):
            known = [*whole[arm], None][: count + arm]  # the loser has one frame more, which is not among these
            places = [int(moment + 1e-3) for moment in told[pair]]
            places = [place % len(known) if short == "loop" else min(place, len(known) - 1) for place in places]
            shown = {n: _shown(known[n], to, interpolation, flipped, at, size) for n in {*places}}
            expected[pair + 2 * arm] = [shown[place] for place in places]
    levels = float(np.nanmax(np.abs(pixels.numpy() - expected)))
    yield Finding("pixels, resized", levels / 0.6, levels), what

    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (means, stds))
    single = decoded(dtype=torch.float32, mean=means, std=stds)[1].double()
    off = float(np.nanmax(np.abs(((single * std + mean) * 255).numpy() - expected)))
    yield Finding("resized in float32", off / 0.03, off), what
    if dtype != torch.float32:
        yield rounded(decoded(dtype=dtype, mean=means, std=stds)[1], single), f"{dtype}, {what}"


def _moments(number: int, start: str | float, fps: float | None, taken: int, count: int) -> list[float]:
    """In frames of a clip, of which both arms have `count`. number: of 64 bits, drawn for a random start."""
    step = _RATE / (fps or _RATE)
    share = (number >> 11) * 2.0**-53 if start == "random" else 0.5
    if not isinstance(start, str):
        first = start * _RATE
    elif fps is None:
        first = int(share * (count - taken + 1)) if start == "random" else (count - taken) // 2
    else:
        first = share * (count - step * (taken - 1))
    return [first + step * k for k in range(taken)]


def _shown(
    levels: np.ndarray | None, to: tuple[int, int], interpolation: str, flip: bool, at: list[int], size: tuple[int, int]
) -> np.ndarray:
    """A frame in the output, (3, H, W); NaN of one that is not known."""
    if levels is None:
        return np.full((3, *size), np.nan)
    return cut_out(resampled(levels, *to, interpolation), flip, at, size, (0, 0, 0))


def _encoded(d: Draw, height: int, width: int, count: int) -> tuple[bytes, list[list[np.ndarray]]]:
    """A clip, and the planes of its frames."""
    import av

    with av.open(file := io.BytesIO(), "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=_RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", _KEYS
        for _ in range(count):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(d, height, width), format="rgb24")))
        output.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue())) as container:
        return file.getvalue(), [_stored(frame) for frame in container.decode(video=0)]


def _stored(frame: Any) -> list[np.ndarray]:
    """Y, Cb and Cr of a 4:2:0 frame of even sides."""
    result = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        result.append(rows[:, : plane.width].copy())
    return result
