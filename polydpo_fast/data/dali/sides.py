"""The two clips of a pair, and whether DALI would show the same frames of them as PyAV."""

from __future__ import annotations

import os
from typing import NamedTuple

from typing_extensions import Buffer

from ...decoding.arguments import ClipRequest
from ...decoding.frames import colours_of
from ...video import (
    Clip,
    ClipSource,
    aspect_of,
    may_be_fields,
    may_change,
    open_regular,
    orientation,
    siting_of,
)
from .engine import Engine

__all__ = ["Side", "open_sides"]


class Side(NamedTuple):
    """A clip that has been looked at."""

    clip: Clip
    data: Buffer
    codec: str
    size: tuple[int, int]
    bt709: bool
    is_plain: bool  # DALI would show the same frames


def open_sides(engine: Engine, asked: ClipRequest, pair: int) -> tuple[Side, Side] | None:
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


def _open_clip(source: ClipSource, clip: Clip, is_gpu: bool) -> Side:
    clip.index()
    data = _bytes_of(source)
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
    return Side(clip, data, codec, size, matrix == "bt709", is_plain)


def _bytes_of(source: ClipSource) -> Buffer:
    if not isinstance(source, (str, os.PathLike)):
        return source
    with open_regular(os.fspath(source)) as file:
        return file.readall() or b""


_whole: set[tuple[str, tuple[int, int]]] = set()  # codecs and sizes of clips, of whose frames NVDEC cuts nothing off


def _is_safe(codec: str, size: tuple[int, int], coded: tuple[int, int]) -> bool:
    """Whether DALI decodes it by a decoder of its own size.

    It keeps NVDEC's decoders under the size that they show, and looks for them by the coded one: for a clip of 540
    lines, coded as 544, it would take that of a clip of 544, and find its chroma where there is luma.
    """
    if coded == size:
        _whole.add((codec, size))
    return coded == size or (codec, coded) not in _whole
