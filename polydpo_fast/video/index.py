"""The index of a clip: when its frames are shown and where seeking may lead, made of its packets or kept for a file."""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import cache
from ..limits import ClipLimits
from .bitstream import begins_anew, is_hidden, is_no_key
from .file import open_regular
from .opening import Opener, packets_of
from .timeline import Timeline

__all__ = ["UNKNOWN", "Index", "index_of"]

_MOST_REORDERED = 16  # frames, by H.264
_FORMAT = 5  # of what is kept of a clip; another after each change


class Index(NamedTuple):
    """What is known of a clip before any frame is wanted.

    keys: the presentation times of the places to seek to, ascending.
    depth: how many frames at most are decoded before one that is shown before them.
    is_damaged: whether it was made of what strict would have refused.
    """

    timeline: Timeline
    keys: list[int]
    depth: int
    is_damaged: bool


UNKNOWN = Index(Timeline(np.empty(0, np.int64), Fraction(1)), [], 0, False)  # of a clip that nobody has looked at


def index_of(opener: Opener, strict: bool, folder: str | os.PathLike[str] | None) -> Index:
    """From the packets, or from where it was kept for a file."""
    build = partial(_built, opener, strict)
    if isinstance(opener.source, (str, os.PathLike)):
        path = os.path.abspath(opener.source)
        with open_regular(path) as file:
            facts = os.fstat(file.fileno())
        stamp = f"clip {_FORMAT} {_version()} {strict} {facts.st_size} {facts.st_mtime_ns} {os.fsencode(path)!r}"
        found = cache.load_or_build(stamp, build, folder, _is_sound)
    else:
        found = build()
    pts, (numerator, denominator) = found["pts"], found["unit"].tolist()
    _check_count(len(pts), opener.limits)
    timeline = Timeline(pts, Fraction(numerator, denominator))
    return Index(timeline, found["keys"].tolist(), int(found["depth"][0]), bool(found["damaged"][0]))


def _built(opener: Opener, strict: bool) -> Mapping[str, np.ndarray]:
    """What is kept of a clip.

    pts: of the frames that are shown, ascending. keys: of the places to seek to. unit: of both, a fraction. depth:
    how many frames at most are decoded before one that is shown before them.
    """
    troubles: list[str] = []
    with opener.open(strict, 1, 0, blocks=True) as (container, stream):
        if opener.trouble:
            troubles.append(opener.trouble)
        seen = _Packets(stream.codec_context, troubles)
        for packet in packets_of(container, stream, strict, troubles):
            opener.timer.check()
            seen.add(packet)
            _check_count(len(seen.pts), opener.limits)
        opener.timer.check()  # where it has run out FFmpeg may see an end
        unit = stream.time_base
        # FFmpeg takes an MP4 that ends between two packets for a shorter one. Of Matroska not all are listed.
        listed = getattr(stream, "index_entries", ())
        if seen.held < len(listed) and seen.held < (count := sum(entry.size > 0 for entry in listed)):
            troubles.append(f"it is cut off: it holds {seen.held} of {count} packets")
        if strict and troubles:
            raise ValueError(troubles[0])
    if not seen.pts or not unit:
        raise ValueError(troubles[0] if troubles else "it has no frames with a presentation time")
    shown, times = np.unique(np.array(seen.pts, np.int64), return_counts=True)
    return {
        "pts": shown if seen.is_whole else shown[np.searchsorted(shown, _first(opener, strict, seen.depth)) :],
        # Where several frames have the same time, seeking may lead to any of them.
        "keys": np.setdiff1d(np.array(seen.keys, np.int64), shown[times > 1]),
        "unit": np.array([unit.numerator, unit.denominator], np.int64),
        "depth": np.array([seen.depth], np.int64),
        "damaged": np.array([bool(troubles)], np.int64),
    }


class _Packets:
    """What the packets of a stream tell, in their order.

    pts: of the frames that are shown. keys, depth: as of `_built`. held: how many hold something. is_whole: whether all
    can surely be decoded. troubles: is told of those that are cut off.
    """

    def __init__(self, context: Any, troubles: list[str]) -> None:
        self.pts: list[int] = []
        self.keys: list[int] = []
        self.depth, self.held, self.is_whole = 0, 0, False
        self._context, self._troubles = context, troubles
        self._latest: list[int] = []  # times, ascending
        self._last: Any = b""

    def add(self, packet: Any) -> None:
        self.held += packet.size > 0
        if packet.pts is None:
            return
        if packet.is_corrupt:
            self._troubles.append("one of its packets is cut off")
        if self.held == 1:
            self.is_whole = begins_anew(self._context.name, packet)
        self.depth = max(self.depth, len(self._latest) - bisect.bisect_right(self._latest, packet.pts))
        bisect.insort(self._latest, packet.pts)
        del self._latest[:-_MOST_REORDERED]
        name = self._context.codec.canonical_name
        if packet.is_keyframe and not is_no_key(name, packet):
            self.keys.append(packet.pts)
        # Cut off by an edit list, though what follows may be decoded from it; or never shown.
        is_unseen = is_hidden(name, packet, self._context.extradata, self._last)
        self._last = packet
        if not (packet.is_discard or is_unseen):
            self.pts.append(packet.pts)


def _first(opener: Opener, strict: bool, depth: int) -> int:
    """The time of the first frame that can be decoded.

    A clip that was cut off another may begin with packets that need what is not there any more.
    """
    import av

    refused: list[int] = []
    with opener.open(strict, 1, depth) as (container, stream):
        name = stream.codec_context.codec.canonical_name
        for packet in packets_of(container, stream, strict, []):
            opener.timer.check()
            if is_no_key(name, packet):
                continue
            try:
                found: list[int] = [frame.pts for frame in packet.decode() if frame.pts is not None]
            except av.FFmpegError:
                if strict:
                    raise
                if packet.pts is not None:
                    refused.append(packet.pts)
            else:
                if found:
                    return min([found[0], *refused])
    raise ValueError("none of its frames can be decoded")


def _check_count(frames: int, limits: ClipLimits) -> None:
    if frames > limits.frames:
        raise ValueError(f"it has more than {limits.frames} frames (limits.frames)")


def _is_sound(found: Mapping[str, np.ndarray]) -> bool:
    """Whether a kept index may be right: others may write to its folder."""
    arrays = pts, keys, unit, depth, damaged = [found[name] for name in ("pts", "keys", "unit", "depth", "damaged")]
    return (
        all(array.dtype == np.int64 and array.ndim == 1 for array in arrays)
        and len(pts) > 0
        and (len(unit), len(depth), len(damaged)) == (2, 1, 1)
        and bool((unit > 0).all() and (pts[1:] > pts[:-1]).all() and (keys[1:] > keys[:-1]).all())
        and bool(0 <= depth[0] <= _MOST_REORDERED)
    )


def _version() -> str:
    import av

    return f"{av.__version__}"
