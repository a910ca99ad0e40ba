"""The bytes of a clip as files that FFmpeg reads: of a path, or of memory, without a copy."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable

from typing_extensions import Buffer

__all__ = ["ClipSource", "TimedFile", "container_of", "open_clip", "open_regular"]

ClipSource = Buffer | str | os.PathLike[str]

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")


def container_of(begin: bytes) -> str:
    """ "mp4" or "matroska", by the first 12 bytes. Raises ValueError for others."""
    if begin[4:8] in _BOXES:
        return "mp4"
    if begin[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if not begin:
        raise ValueError("it is empty")
    raise ValueError(f"it is neither MP4, MOV, Matroska nor WebM: it begins with {begin[:4].hex(' ')}")


def open_regular(path: str) -> io.FileIO:
    file = io.FileIO(path, opener=_opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is no regular file")
    return file


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer


class TimedFile(io.RawIOBase):
    """A file that calls `look`, which may raise, at each read: FFmpeg may search long for a beginning or an end."""

    def __init__(self, file: io.RawIOBase | io.BytesIO, look: Callable[[], None]) -> None:
        self._file, self._look = file, look

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._look()
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def open_clip(source: ClipSource) -> io.FileIO | io.BytesIO | _Memory:
    """A seekable binary file. Raises OSError; ValueError for a path to anything but a regular file."""
    if isinstance(source, (str, os.PathLike)):
        return open_regular(os.fspath(source))
    # BytesIO shares bytes, and copies anything else.
    return io.BytesIO(source) if isinstance(source, bytes) else _Memory(memoryview(source).cast("B"))


class _Memory(io.RawIOBase):
    """A file of bytes that somebody else owns."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part = bytes(self._view[self._at : self._at + size if size >= 0 else None])
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (0, self._at, len(self._view))[whence]
        if place < 0:
            raise ValueError(f"the place is {place}; expected at least 0")
        self._at = place
        return place

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._view.release()
        super().close()
