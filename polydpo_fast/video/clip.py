"""One clip through PyAV: its timeline, then the frames that are asked of it."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

from ..limits import ClipLimits
from .bitstream import SpareFrames, siting_in
from .file import ClipSource
from .form import aspect_of, orientation, siting_of
from .index import UNKNOWN, index_of
from .opening import Opener, packets_of
from .timeline import Timeline

__all__ = ["Clip"]

# Whose decoders can tell packets that no other frame is made from.
_SKIPPING = ("h264", "mpeg4", "vp8")
_MIN_FRAMES_TO_SEEK = 3  # fewer are sooner decoded than a seek is done


class Clip:
    """A clip in bytes or in a local file.

    concealed: how many of the `frames` were replaced or marked as corrupt by FFmpeg.
    aspect, siting: width of a pixel by its height, and where chroma lies, as `chroma_siting` has it; known while there
    are frames.
    """

    aspect: Fraction
    siting: int

    def __init__(
        self, source: ClipSource, limits: ClipLimits, strict: bool, threads: int, folder: str | os.PathLike[str] | None
    ) -> None:
        self.concealed = 0
        self._opener, self._strict, self._threads, self._folder = Opener(source, limits), strict, threads, folder
        self._index = UNKNOWN
        self._shortcut = False
        self._told_siting: int | None = None  # by parameters among the packets
        self._form: tuple[int, int, int, float] | None = None

    @property
    def timeline(self) -> Timeline:
        """Of the frames; known after `index`."""
        return self._index.timeline

    @property
    def is_damaged(self) -> bool:
        """Whether the index was made of what strict would have refused."""
        return self._index.is_damaged

    @property
    def told(self) -> tuple[int, int]:
        """The matrix and the range that the container tells, FFmpeg's numbers, for frames that tell none: 2 and 0 where
        it does not either, or frames always do. Known once it was opened."""
        return self._opener.told

    def index(self) -> None:
        """Finds the timeline and the places to seek to, from the packets, or from where they were kept for a file."""
        self._opener.timer.begin()
        self._index = index_of(self._opener, self._strict, self._folder)
        self._opener.timer.end()

    def frames(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """(pts, frame) for the wanted presentation times, which ascend. None is held here when the next is decoded.

        Not everything that is marked as a place to seek to is one: open groups of pictures and gradual refreshes need
        what came before. Where a shortcut fails, the rest is decoded from the start. What fails even then is concealed,
        if that is wanted: the frame before it stands in, or the one after it at the beginning.
        """
        import av

        self._opener.timer.begin()
        given = 0
        failure: Exception = ValueError("nothing is wanted of it")
        for shortcuts, strict in ((True, True), (False, True), (False, False)):
            if strict and not shortcuts and not self._shortcut:
                continue  # nothing else would come of it
            if not strict and self._strict:
                break
            try:
                for found in self._frames(wanted[given:], shortcuts, strict):
                    yield found
                    del found
                    given += 1
            except TimeoutError:
                raise
            except (OSError, ValueError, av.FFmpegError) as error:
                failure = error
            else:
                if not strict:  # FFmpeg does not tell of all that it mends
                    self.concealed = max(1, self.concealed)
                return
        raise failure

    def cancel(self) -> None:
        """Makes what another thread does with it end soon."""
        self._opener.timer.cancel()

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and the stream, for a caller who reads them, and calls `check_timeout`."""
        self._opener.timer.begin()
        with self._open(True, 1) as found:
            yield found
        self._opener.timer.end()

    def told_size(self) -> tuple[int, int]:
        """Height and width of the frames by the container alone; `told` is of it alone from then on."""
        self._opener.timer.begin()
        with self._open(True, 1, {"codec_whitelist": "none"}) as (_, stream):
            return stream.codec_context.height, stream.codec_context.width

    def check_timeout(self) -> None:
        """Raises TimeoutError where the limits give it no more time."""
        self._opener.timer.check()

    def _open(
        self, strict: bool, threads: int, probing: Mapping[str, str] | None = None
    ) -> AbstractContextManager[tuple[Any, Any]]:
        return self._opener.open(strict, threads, self._index.depth, probing=probing)

    def _frames(self, wanted: list[int], shortcuts: bool, strict: bool) -> Iterator[tuple[int, Any]]:
        self._shortcut = False
        with self._open(strict, self._threads) as (container, stream):
            search = _Search(self, container, stream, frozenset(wanted), shortcuts, strict)
            at = 0
            while at < len(wanted):
                frame = search.first_from(wanted[at])
                # Those that should have been shown by now.
                while at < len(wanted) and (frame is None or frame.pts > wanted[at]):
                    if strict:
                        moment = float((wanted[at] - int(self._index.timeline.pts[0])) * self._index.timeline.unit)
                        trouble = "is missing" if frame is None else "does not decode"
                        raise ValueError(f"its frame at {moment:.3f} s {trouble}")
                    stand_in = search.before if search.before is not None else frame
                    if stand_in is None:
                        raise ValueError("none of its frames can be decoded")
                    self.concealed += 1
                    yield wanted[at], stand_in
                    at += 1
                if frame is not None and at < len(wanted) and frame.pts == wanted[at]:
                    if frame.is_corrupt:
                        if strict:
                            raise ValueError("one of its frames is corrupt")
                        self.concealed += 1
                    yield frame.pts, frame
                    at += 1
                if not strict:
                    search.before = frame
                frame = stand_in = None  # their memory is in the caches: the next may be decoded into it

    def _decoded(
        self, container: Any, stream: Any, wanted: frozenset[int] | None, strict: bool, is_sought: bool
    ) -> Iterator[Any]:
        """The frames from here on. wanted: the pts of those that are needed; None for all."""
        import av

        context = stream.codec_context
        name = context.codec.canonical_name
        spare = SpareFrames(name, context.extradata)
        for packet in packets_of(container, stream, strict, []):
            self._opener.timer.check()
            # FFmpeg seeks by the container's word, and by times of decoding, which are others.
            if is_sought and packet.pts not in self._index.keys:
                raise ValueError("seeking leads to what is no key")
            is_sought = False
            if self._told_siting is None and packet.is_keyframe:
                self._told_siting = siting_in(name, packet, context.extradata)
            if wanted is not None and context.name in _SKIPPING:
                is_needed = packet.pts is None or packet.pts in wanted
                context.skip_frame = "DEFAULT" if is_needed else "NONREF"
                self._shortcut |= not is_needed
            elif wanted is not None and spare.has(packet) and packet.pts is not None and packet.pts not in wanted:
                self._shortcut = True
                continue
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if strict:
                    raise
                continue
            while frames:
                yield frames.pop(0)  # none is held while others are decoded

    def _is_far(self, last: int | None, key: int) -> bool:
        """Whether it is cheaper to seek to a key than to decode all from the last frame to it."""
        if last is None or key < 0 or self._index.keys[key] <= last:
            return False
        between = np.searchsorted(self._index.timeline.pts, (last, self._index.keys[key]))
        return int(between[1] - between[0]) > _MIN_FRAMES_TO_SEEK + 2 * self._threads

    def _is_fit(self, frame: Any, aspect: Fraction, strict: bool) -> bool:
        """Whether it is of the same form as those before."""
        form = frame.width, frame.height, orientation(frame), float(aspect)
        self._opener.check_pixels(frame.width * frame.height)  # other than the header said
        if self._form not in (None, form):
            if strict:
                raise ValueError(f"its frames change from {self._form} to {form} (width, height, orientation, aspect)")
            return False
        self._form = form
        return True


class _Search:
    """One way through an opened clip. before: the last frame that was passed over or taken, where one may stand in."""

    def __init__(
        self, clip: Clip, container: Any, stream: Any, wanted: frozenset[int], shortcuts: bool, strict: bool
    ) -> None:
        self._clip, self._container, self._stream = clip, container, stream
        self._wanted, self._shortcuts, self._strict = wanted, shortcuts, strict
        self._decoded: Iterator[Any] | None = None
        self._last: int | None = None  # the time of the last frame that was decoded
        self.before: Any = None

    def first_from(self, pts: int) -> Any:
        """The next frame at that time or after it; None at the end."""
        clip, stream = self._clip, self._stream
        key = bisect.bisect_right(clip._index.keys, pts) - 1
        if self._decoded is None or (self._shortcuts and clip._is_far(self._last, key)):
            self._decoded = self._decoded_from(key)
        while True:
            frame = None  # its memory is in the caches: the next may be decoded into it
            frame = next(self._decoded, None)
            if frame is None:
                return None
            if self._last is None:
                clip.aspect, clip.siting = aspect_of(stream), clip._told_siting or siting_of(stream)
            if frame.pts is not None and clip._is_fit(frame, aspect_of(stream), self._strict):
                self._last = frame.pts
                if frame.pts >= pts:
                    return frame
                if not self._strict:
                    self.before = frame

    def _decoded_from(self, key: int) -> Iterator[Any]:
        """From the beginning, or where that is a shortcut from a key."""
        clip = self._clip
        is_sought = self._shortcuts and (self._decoded is not None or key > 0)
        if is_sought:
            clip._shortcut = True
            self._container.seek(clip._index.keys[max(key, 0)], stream=self._stream, backward=True)
        wanted = self._wanted if self._shortcuts else None
        return clip._decoded(self._container, self._stream, wanted, self._strict, is_sought)
