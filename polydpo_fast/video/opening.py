"""How FFmpeg opens a clip: what is looked at before, what it is told, and within which limits."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..limits import ClipLimits
from .bitstream import states_range
from .file import ClipSource, TimedFile, container_of, open_clip
from .matroska import damage_of
from .mp4 import check_counts

__all__ = ["Opener", "packets_of", "require_av", "words_of"]

# The demuxer is chosen here, by the first bytes: others of FFmpeg's can open further files and URLs. So can these two,
# unless they are told not to.
_OPTIONS = {"mp4": {"enable_drefs": "0", "use_absolute_path": "0", "ignore_chapters": "1"}, "matroska": {}}
_CODECS = ("h264", "hevc", "vp9", "vp8", "av1", "mpeg4")
_DECODERS = (*_CODECS, "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9")  # as FFmpeg calls those that others wrote


class Timer:
    """Seconds of work on a clip, not of waiting for others."""

    def __init__(self, most: float) -> None:
        self._most, self._left, self._since = most, most, 0.0

    def begin(self) -> None:
        self._since = time.monotonic()

    def end(self) -> None:
        self._left -= time.monotonic() - self._since

    def cancel(self) -> None:
        """Makes work in another thread end soon."""
        self._left = -math.inf

    def check(self) -> None:
        """Raises TimeoutError where the limits give it no more time."""
        if time.monotonic() - self._since > self._left:
            raise TimeoutError(f"it took more than {self._most} s (limits.timeout_s)")


class Opener:
    """Opens a clip, for each purpose anew.

    told: as of `Clip`. trouble: what is wrong with the container, or None; "" before anybody has looked.
    """

    told: tuple[int, int]

    def __init__(self, source: ClipSource, limits: ClipLimits) -> None:
        self.source, self.limits, self.timer = source, limits, Timer(limits.timeout_s)
        self.trouble: str | None = ""

    @contextmanager
    def open(
        self,
        strict: bool,
        threads: int,
        depth: int,
        *,
        blocks: bool = False,
        probing: Mapping[str, str] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """The container, and its first video stream.

        depth: how many frames at most are decoded before one that is shown before them; 0 where nothing is decoded.
        blocks: whether blocks of Matroska are looked at too, if nobody has looked at the container before. probing:
        options of FFmpeg's while it looks for streams.
        """
        import av

        with open_clip(self.source) as inner:
            file = TimedFile(inner, self.timer.check)
            format = self._look_through(file, blocks)
            file.seek(0)
            # A decoder is told the limit too: it allocates for what the stream says, whatever the header does. It
            # counts whole blocks, so that a frame may be larger there.
            options = {"max_pixels": str(min(2 * self.limits.pixels + (1 << 16), 2**31 - 1))}
            if strict:
                options["err_detect"] = "explode"
            # Opening, FFmpeg decodes frames, for what we take from the first one or count ourselves: it is told not to.
            probing = {**options, "skip_frame": "all", **(probing or {})}
            opening = {**_OPTIONS[format], "max_streams": str(self.limits.streams + 1)}
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
                raise ValueError(self.trouble or words_of(error)) from error
            with opened as container:
                stream = self._choose(container)
                self._set_up(stream.codec_context, options, threads, depth)
                yield container, stream

    def _look_through(self, file: TimedFile, blocks: bool) -> str:
        """The kind of the container, and in `trouble` what is wrong with it. Raises ValueError beyond the limits."""
        size = file.seek(0, io.SEEK_END)
        if size > self.limits.bytes:
            raise ValueError(f"it has {size} bytes, more than {self.limits.bytes} (limits.bytes)")
        file.seek(0)
        format = container_of(file.read(12))
        if format == "mp4":
            # With the sound's, and all edits'.
            most = 4 * max(self.limits.frames, 1 << 16)
            self.trouble = check_counts(file, most, self.limits.streams, self.timer.check)
        elif self.trouble == "":  # once
            most_cues = 32 * max(self.limits.frames, 1 << 16)
            self.trouble = damage_of(file, most_cues, self.timer.check, blocks=blocks)
        return format

    def _choose(self, container: Any) -> Any:
        """The first video stream; nothing is read of the others."""
        from av.stream import Discard, Disposition

        if len(container.streams) > self.limits.streams:
            raise ValueError(f"it has more than {self.limits.streams} streams (limits.streams)")
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not moving:
            raise ValueError(self.trouble or "it has no video stream")
        for other in container.streams:
            if other is not moving[0]:
                other.discard = Discard.all
        return moving[0]

    def _set_up(self, context: Any, options: dict[str, str], threads: int, depth: int) -> None:
        import av

        name = context.name if context is not None else "unknown"
        if name not in _DECODERS:
            raise ValueError(f"its codec is {name}; expected one of {', '.join(_CODECS)}")
        if context.width * context.height <= 0:
            raise ValueError("its header states no size")
        self.check_pixels(context.width * context.height)
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
            options = {**options, "has_b_frames": str(depth)}
        context.options = options

    def check_pixels(self, count: int) -> None:
        if count > self.limits.pixels:
            raise ValueError(f"it has {count} pixels, more than {self.limits.pixels} (limits.pixels)")


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


def packets_of(container: Any, stream: Any, strict: bool, troubles: list[str]) -> Iterator[Any]:
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
