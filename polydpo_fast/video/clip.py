"""One clip through PyAV: its timeline, then the frames that are asked of it."""

from __future__ import annotations

import bisect
import io
import math
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

from .. import cache
from ..decode_arguments import ClipLimits
from .bitstream import SpareFrames, begins_anew, chroma_siting, is_hidden, is_no_key, siting_in, states_range
from .file import Source, TimedFile, container_of, open_clip, open_regular
from .matroska import damage_of
from .mp4 import check_counts
from .timeline import Timeline

__all__ = ["Clip", "aspect_of", "orientation", "require_av", "siting_of", "words_of"]

# The demuxer is chosen here, by the first bytes: others of FFmpeg's can open further files and URLs. So can these two,
# unless they are told not to.
_OPTIONS = {"mp4": {"enable_drefs": "0", "use_absolute_path": "0", "ignore_chapters": "1"}, "matroska": {}}
_CODECS = ("h264", "hevc", "vp9", "vp8", "av1", "mpeg4")
_DECODERS = (*_CODECS, "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9")  # as FFmpeg calls those that others wrote
# Whose decoders can tell packets that no other frame is made from.
_SKIPPING = ("h264", "mpeg4", "vp8")
_MOST_ASPECT = 16
_MIN_FRAMES_TO_SEEK = 3  # fewer are sooner decoded than a seek is done
_MOST_REORDERED = 16  # frames, by H.264
_FORMAT = 5  # of what is kept of a clip; another after each change


class Clip:
    """A clip in bytes or in a local file.

    timeline: known after `index`; is_damaged too: whether the index was made of what strict would have refused.
    concealed: how many of the `frames` were replaced or marked as corrupt by FFmpeg.
    aspect, siting: width of a pixel by its height, and where chroma lies, as `chroma_siting` has it; known while there
    are frames.
    told: the matrix and the range that the container tells, FFmpeg's numbers, for frames that tell none: 2 and 0 where
    it does not either, or frames always do. Known once it was opened.
    """

    timeline: Timeline
    aspect: Fraction
    siting: int
    told: tuple[int, int]

    def __init__(
        self, source: Source, limits: ClipLimits, strict: bool, threads: int, folder: str | os.PathLike[str] | None
    ) -> None:
        self.concealed = 0
        self.is_damaged = False
        self._source, self._limits, self._strict, self._threads, self._folder = source, limits, strict, threads, folder
        self._left = limits.timeout_s  # seconds, of work on this clip, not of waiting for others
        self._since = 0.0
        self._keys: list[int] = []
        self._depth = 0
        self._shortcut = False
        self._told_siting: int | None = None  # by parameters among the packets
        self._trouble: str | None = ""  # what is wrong with the container, or None; "" before anybody has looked
        self._is_kept = False  # the index was: a file of this size and time has been looked through before
        self._form: tuple[int, int, int, float] | None = None

    def index(self) -> None:
        """Finds the timeline and the places to seek to, from the packets, or from where they were kept for a file."""
        self._since = time.monotonic()
        if isinstance(self._source, (str, os.PathLike)):
            path = os.path.abspath(self._source)
            with open_regular(path) as file:
                facts = os.fstat(file.fileno())
            stamp = (
                f"clip {_FORMAT} {_version()} {self._strict} {facts.st_size} {facts.st_mtime_ns} {os.fsencode(path)!r}"
            )
            self._is_kept = True  # unless it has to be made
            found = cache.load_or_build(stamp, self._indexed, self._folder, _is_sound)
        else:
            found = self._indexed()
        pts, (numerator, denominator) = found["pts"], found["unit"].tolist()
        self._check_frames(len(pts))
        self.timeline, self._keys = Timeline(pts, Fraction(numerator, denominator)), found["keys"].tolist()
        self._depth, self.is_damaged = int(found["depth"][0]), bool(found["damaged"][0])
        self._left -= time.monotonic() - self._since

    def frames(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """(pts, frame) for the wanted presentation times, which ascend. None is held here when the next is decoded.

        Not everything that is marked as a place to seek to is one: open groups of pictures and gradual refreshes need
        what came before. Where a shortcut fails, the rest is decoded from the start. What fails even then is concealed,
        if that is wanted: the frame before it stands in, or the one after it at the beginning.
        """
        import av

        self._since, given = time.monotonic(), 0
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
        self._left = -math.inf

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and the stream, for a caller who reads them, and calls `check_timeout`."""
        self._since = time.monotonic()
        with self._open(True, 1) as found:
            yield found
        self._left -= time.monotonic() - self._since

    def told_size(self) -> tuple[int, int]:
        """Height and width of the frames by the container alone; `told` is of it alone from then on."""
        self._since = time.monotonic()
        with self._open(True, 1, {"codec_whitelist": "none"}) as (_, stream):
            return stream.codec_context.height, stream.codec_context.width

    def check_timeout(self) -> None:
        """Raises TimeoutError where the limits give it no more time."""
        if time.monotonic() - self._since > self._left:
            raise TimeoutError(f"it took more than {self._limits.timeout_s} s (limits.timeout_s)")

    # ---------------------------------------------------------------------------------------------- reading

    @contextmanager
    def _open(self, strict: bool, threads: int, probing: Mapping[str, str] | None = None) -> Iterator[tuple[Any, Any]]:
        import av

        with open_clip(self._source) as inner:
            file = TimedFile(inner, self.check_timeout)
            format = self._look_through(file)
            file.seek(0)
            # A decoder is told the limit too: it allocates for what the stream says, whatever the header does. It
            # counts whole blocks, so that a frame may be larger there.
            options = {"max_pixels": str(min(2 * self._limits.pixels + (1 << 16), 2**31 - 1))}
            if strict:
                options["err_detect"] = "explode"
            # Opening, FFmpeg decodes frames, for what we take from the first one or count ourselves: it is told not to.
            probing = {**options, "skip_frame": "all", **(probing or {})}
            opening = {**_OPTIONS[format], "max_streams": str(self._limits.streams + 1)}
            # Titles and the like may be in whatever encoding. PyAV 19 takes them all, and no such argument.
            reading = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
            try:
                opened = av.open(
                    file,
                    format=format,
                    options=probing,
                    container_options=opening,
                    io_open=_open_nothing,
                    **reading,
                )
            except av.FFmpegError as error:
                raise ValueError(self._trouble or words_of(error)) from error
            with opened as container:
                stream = self._choose(container)
                self._set_up(stream.codec_context, options, threads)
                yield container, stream

    def _look_through(self, file: TimedFile) -> str:
        """The kind of the container, and in `_trouble` what is wrong with it. Raises ValueError beyond the limits."""
        size = file.seek(0, io.SEEK_END)
        if size > self._limits.bytes:
            raise ValueError(f"it has {size} bytes, more than {self._limits.bytes} (limits.bytes)")
        file.seek(0)
        format = container_of(file.read(12))
        if format == "mp4":
            # With the sound's, and all edits'.
            most = 4 * max(self._limits.frames, 1 << 16)
            self._trouble = check_counts(file, most, self._limits.streams, self.check_timeout)
        elif self._trouble == "":  # once
            most_cues = 32 * max(self._limits.frames, 1 << 16)
            self._trouble = damage_of(file, most_cues, self.check_timeout, blocks=not self._is_kept)
        return format

    def _choose(self, container: Any) -> Any:
        """The first video stream; nothing is read of the others."""
        from av.stream import Discard, Disposition

        if len(container.streams) > self._limits.streams:
            raise ValueError(f"it has more than {self._limits.streams} streams (limits.streams)")
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not moving:
            raise ValueError(self._trouble or "it has no video stream")
        for other in container.streams:
            if other is not moving[0]:
                other.discard = Discard.all
        return moving[0]

    def _set_up(self, context: Any, options: dict[str, str], threads: int) -> None:
        import av

        name = context.name if context is not None else "unknown"
        if name not in _DECODERS:
            raise ValueError(f"its codec is {name}; expected one of {', '.join(_CODECS)}")
        if context.width * context.height <= 0:
            raise ValueError("its header states no size")
        self._check_pixels(context.width * context.height)
        # Before any frame is decoded: the decoders of HEVC and VP9 put what the stream tells in their place, or that it
        # tells nothing.
        is_range_told = states_range(context.codec.canonical_name, context.extradata)
        self.told = int(context.colorspace), 0 if is_range_told else int(context.color_range)
        # Where PyAV passes on what FFmpeg logs, FFmpeg's threads wait for Python's lock, and a context that is freed
        # holds it while it waits for them. Those of MPEG-4 do not wait for each other where it is interlaced.
        if av.logging.get_level() is not None or name == "mpeg4":
            threads = 1
        context.thread_count = threads
        context.thread_type = "AUTO" if threads > 1 else "NONE"
        if name == "h264":
            # Streams need not tell it, and then frames that come later than guessed are dropped.
            options = {**options, "has_b_frames": str(self._depth)}
        context.options = options

    def _indexed(self) -> Mapping[str, np.ndarray]:
        """What is kept of a clip.

        pts: of the frames that are shown, ascending. keys: of the places to seek to. unit: of both, a fraction. depth:
        how many frames at most are decoded before one that is shown before them.
        """
        self._is_kept = False
        pts: list[int] = []
        keys: list[int] = []
        latest: list[int] = []
        depth, held, is_whole, last = 0, 0, False, b""
        troubles: list[str] = []
        with self._open(self._strict, 1) as (container, stream):
            if self._trouble:
                troubles.append(self._trouble)
            for packet in _packets(container, stream, self._strict, troubles):
                self.check_timeout()
                held += packet.size > 0
                if packet.pts is None:
                    continue
                if packet.is_corrupt:
                    troubles.append("one of its packets is cut off")
                if held == 1:
                    is_whole = begins_anew(stream.codec_context.name, packet)
                depth = max(depth, len(latest) - bisect.bisect_right(latest, packet.pts))
                bisect.insort(latest, packet.pts)
                del latest[:-_MOST_REORDERED]
                name = stream.codec_context.codec.canonical_name
                if packet.is_keyframe and not is_no_key(name, packet):
                    keys.append(packet.pts)
                # Cut off by an edit list, though what follows may be decoded from it; or never shown.
                is_unseen = is_hidden(name, packet, stream.codec_context.extradata, last)
                last = packet
                if packet.is_discard or is_unseen:
                    continue
                pts.append(packet.pts)
                self._check_frames(len(pts))
            self.check_timeout()  # where it has run out FFmpeg may see an end
            unit = stream.time_base
            # FFmpeg takes an MP4 that ends between two packets for a shorter one. Of Matroska not all are listed.
            listed = getattr(stream, "index_entries", ())
            if held < len(listed) and held < (count := sum(entry.size > 0 for entry in listed)):
                troubles.append(f"it is cut off: it holds {held} of {count} packets")
            if self._strict and troubles:
                raise ValueError(troubles[0])
        if not pts or not unit:
            raise ValueError(troubles[0] if troubles else "it has no frames with a presentation time")
        self._depth = depth
        shown, times = np.unique(np.array(pts, np.int64), return_counts=True)
        return {
            "pts": shown if is_whole else shown[np.searchsorted(shown, self._first()) :],
            # Where several frames have the same time, seeking may lead to any of them.
            "keys": np.setdiff1d(np.array(keys, np.int64), shown[times > 1]),
            "unit": np.array([unit.numerator, unit.denominator], np.int64),
            "depth": np.array([depth], np.int64),
            "damaged": np.array([bool(troubles)], np.int64),
        }

    def _first(self) -> int:
        """The time of the first frame that can be decoded.

        A clip that was cut off another may begin with packets that need what is not there any more.
        """
        import av

        refused: list[int] = []
        with self._open(self._strict, 1) as (container, stream):
            name = stream.codec_context.codec.canonical_name
            for packet in _packets(container, stream, self._strict, []):
                self.check_timeout()
                if is_no_key(name, packet):
                    continue
                try:
                    found: list[int] = [frame.pts for frame in packet.decode() if frame.pts is not None]
                except av.FFmpegError:
                    if self._strict:
                        raise
                    if packet.pts is not None:
                        refused.append(packet.pts)
                else:
                    if found:
                        return min([found[0], *refused])
        raise ValueError("none of its frames can be decoded")

    def _frames(self, wanted: list[int], shortcuts: bool, strict: bool) -> Iterator[tuple[int, Any]]:
        self._shortcut = False
        at, decoded, before, last = 0, None, None, None
        with self._open(strict, self._threads) as (container, stream):
            while at < len(wanted):
                key = bisect.bisect_right(self._keys, wanted[at]) - 1
                if decoded is None or (shortcuts and self._is_far(last, key)):
                    is_sought = shortcuts and (decoded is not None or key > 0)
                    if is_sought:
                        self._shortcut = True
                        container.seek(self._keys[max(key, 0)], stream=stream, backward=True)
                    needed = frozenset(wanted) if shortcuts else None
                    decoded = self._decoded(container, stream, needed, strict, is_sought)
                while True:
                    frame = None  # its memory is in the caches: the next may be decoded into it
                    frame = next(decoded, None)
                    if frame is None:
                        break
                    if last is None:
                        self.aspect, self.siting = aspect_of(stream), self._told_siting or siting_of(stream)
                    if frame.pts is not None and self._is_fit(frame, aspect_of(stream), strict):
                        last = frame.pts
                        if frame.pts >= wanted[at]:
                            break
                        if not strict:
                            before = frame
                # Those that should have been shown by now.
                while at < len(wanted) and (frame is None or frame.pts > wanted[at]):
                    if strict:
                        moment = float((wanted[at] - int(self.timeline.pts[0])) * self.timeline.unit)
                        trouble = "is missing" if frame is None else "does not decode"
                        raise ValueError(f"its frame at {moment:.3f} s {trouble}")
                    stand_in = before if before is not None else frame
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
                    before = frame

    def _decoded(
        self, container: Any, stream: Any, wanted: frozenset[int] | None, strict: bool, is_sought: bool
    ) -> Iterator[Any]:
        """The frames from here on. wanted: the pts of those that are needed; None for all."""
        import av

        context = stream.codec_context
        name = context.codec.canonical_name
        spare = SpareFrames(name, context.extradata)
        for packet in _packets(container, stream, strict, []):
            self.check_timeout()
            # FFmpeg seeks by the container's word, and by times of decoding, which are others.
            if is_sought and packet.pts not in self._keys:
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
        if last is None or key < 0 or self._keys[key] <= last:
            return False
        between = np.searchsorted(self.timeline.pts, (last, self._keys[key]))
        return int(between[1] - between[0]) > _MIN_FRAMES_TO_SEEK + 2 * self._threads

    def _is_fit(self, frame: Any, aspect: Fraction, strict: bool) -> bool:
        """Whether it is of the same form as those before."""
        form = frame.width, frame.height, orientation(frame), float(aspect)
        self._check_pixels(frame.width * frame.height)  # other than the header said
        if self._form not in (None, form):
            if strict:
                raise ValueError(f"its frames change from {self._form} to {form} (width, height, orientation, aspect)")
            return False
        self._form = form
        return True

    # ---------------------------------------------------------------------------------------------- limits

    def _check_frames(self, count: int) -> None:
        if count > self._limits.frames:
            raise ValueError(f"it has more than {self._limits.frames} frames (limits.frames)")

    def _check_pixels(self, count: int) -> None:
        if count > self._limits.pixels:
            raise ValueError(f"it has {count} pixels, more than {self._limits.pixels} (limits.pixels)")


def require_av() -> None:
    """Raises ImportError, which names the extra, where there is no PyAV."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise ImportError("decode_clips needs PyAV: pip install 'polydpo-fast[video]'") from None


def _open_nothing(url: str, *_: object) -> Any:
    raise PermissionError("it refers to another file")


def words_of(error: Exception) -> str:
    """An error's message, without FFmpeg's number, and without the name that bytes in memory lack."""
    return re.sub(r"^\[Errno \d+\] |: '<none>'", "", f"{error}") or type(error).__name__


def _packets(container: Any, stream: Any, strict: bool, troubles: list[str]) -> Iterator[Any]:
    """The packets of a stream, and at the end an empty one, for which a decoder gives out all that it holds.

    Empty samples, at whose times the frame before stays, are left out: decoders of FFmpeg's refuse them.
    troubles: is told what was wrong, if it is let pass.
    """
    import av

    try:
        for packet in container.demux(stream):
            if packet.size > 0 or packet.pts is None:
                yield packet
    except av.FFmpegError as error:
        if strict:
            raise
        troubles.append(words_of(error))
        last = av.Packet()
        last.stream = stream
        yield last


def aspect_of(stream: Any) -> Fraction:
    """Width of a pixel by its height: the container's word, or else that of the frames, once one is decoded."""
    aspect = Fraction(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    if not Fraction(1, _MOST_ASPECT) <= aspect <= _MOST_ASPECT:
        raise ValueError(
            f"its pixels are {float(aspect):.4g} times as wide as high; expected 1/{_MOST_ASPECT} to {_MOST_ASPECT}"
        )
    return aspect


def siting_of(stream: Any) -> int:
    """Where chroma lies, by the stream's parameters."""
    context = stream.codec_context
    return chroma_siting(context.codec.canonical_name, context.extradata)


def orientation(frame: Any) -> int:
    """EXIF's number for the frame's display matrix.

    Column x, row y of the frame is shown at a x + c y, b x + d y.
    """
    from av.sidedata.sidedata import SideDataContainer

    # frame.side_data would be kept by the frame, which it keeps: megabytes that only the garbage collector gives back.
    data = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # of the stubs
    if data is None:
        return 1
    matrix = struct.unpack("=9i", bytes(data))
    parts = (*matrix[:2], *matrix[3:5])
    least = max(map(abs, parts)) / 100  # sines and cosines are rounded
    a, b, c, d = (int(v > least) - int(v < -least) for v in parts)
    if (a, b, c, d) not in _ORIENTATIONS:
        angle = -math.degrees(math.atan2(matrix[1], matrix[0]))
        by = ", ".join(f"{v / 65536:.3g}" for v in parts)
        raise ValueError(f"it is to be shown turned by {angle:.0f} degrees, by the matrix {by}; expected quarter turns")
    return _ORIENTATIONS[a, b, c, d]


_ORIENTATIONS = {
    (0, 0, 0, 0): 1,  # never filled in
    **{(1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4},
    **{(0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8},
}


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
