"""Whether a Matroska or WebM file is whole, which FFmpeg does not tell: what it cannot read it leaves out."""

from __future__ import annotations

import io
from collections.abc import Callable

__all__ = ["damage_of"]

File = io.RawIOBase | io.BufferedIOBase

_EBML, _SEGMENT, _TRACKS, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0x1F43B675
_CUES, _ATTACHMENTS, _CHAPTERS, _TAGS = 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367
_GROUP, _SIMPLE_BLOCK, _BLOCK = 0xA0, 0xA3, 0xA1
_ANYWHERE = (0xEC, 0xBF)  # Void, CRC-32
# What may be in a segment, a cluster, a group: RFC 9559, 5.1, and what earlier drafts had.
_IN_SEGMENT = {_TRACKS, _CLUSTER, _CUES, _ATTACHMENTS, _CHAPTERS, _TAGS, 0x114D9B74, 0x1549A966, 0x1B538667, *_ANYWHERE}
_IN_CLUSTER = {_GROUP, _SIMPLE_BLOCK, 0xE7, 0x5854, 0xA7, 0xAB, 0xAF, *_ANYWHERE}
_IN_GROUP = {_BLOCK, 0x75A1, 0x9B, 0xFA, 0xFB, 0xA4, 0x75A2, 0x8E, 0xA2, 0xFD, 0xC8, 0xAF, *_ANYWHERE}
# Bytes, of what FFmpeg keeps in a multiple of them.
_MOST = {_TAGS: ("tags", 1 << 22), _CHAPTERS: ("chapters", 1 << 22), _ATTACHMENTS: ("attachments", 1 << 26)}
_NUMBERS = (0xE7, 0xA7, 0xAB)  # in a cluster: of eight bytes at the most
_MOST_TRACKS = 1 << 16  # bytes of their descriptions that are looked at


class _DamagedError(Exception):
    pass


def damage_of(
    file: File, most_cues: int, look: Callable[[], object] = lambda: None, *, blocks: bool = True
) -> str | None:
    """The first thing that is wrong with the elements of the file, down to its blocks; None if nothing is.

    blocks: whether to look at them, in clusters whose length is told: nine of ten elements, and more, are blocks.

    Raises ValueError where it has more tags, chapters, attachments or cues (bytes: `most_cues`) than FFmpeg may be
    given: it keeps them in up to twenty times as much memory. look: called now and then; what it raises ends this.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        _Walk(file, size, most_cues, look, blocks).whole()
    except _DamagedError as error:
        return str(error)
    return None


class _Walk:
    def __init__(self, file: File, size: int, most_cues: int, look: Callable[[], object], blocks: bool) -> None:
        self._file, self._size, self._look, self._blocks = file, size, look, blocks
        self._most = {**_MOST, _CUES: ("cues", most_cues)}
        self._tracks: set[int] | None = None
        self._count = 0

    def whole(self) -> None:
        at = 0
        while at < self._size:
            kind, begin, end = self._element(at, self._size)
            if kind == _SEGMENT:
                self._segment(begin, end)
            elif kind != _EBML and kind not in _ANYWHERE:
                raise _DamagedError(f"what begins at byte {at} is no part of a Matroska file")
            at = self._size if end is None else end

    def _segment(self, at: int, end: int | None) -> None:
        until = self._size if end is None else end
        while at < until:
            kind, begin, following = self._element(at, until)
            self._check(kind, _IN_SEGMENT, at)
            if kind in self._most:
                name, most = self._most[kind]
                length = (until if following is None else following) - begin
                if length > most:
                    raise ValueError(f"its {name} have {length} bytes, more than {most}")
            if kind == _TRACKS and following is not None:
                self._tracks = self._numbers(begin, following)
            if kind == _CLUSTER and (self._blocks or following is None):
                at = self._cluster(begin, following, until)
            elif following is None:
                raise _DamagedError(f"what begins at byte {at} has no length")
            else:
                at = following

    def _cluster(self, at: int, end: int | None, until: int) -> int:
        """Where it ends; one that was written as it came has no length, and ends where another begins."""
        last = until if end is None else end
        while at < last:
            kind, begin, following = self._element(at, last)
            if end is None and kind in _IN_SEGMENT and kind not in _ANYWHERE:
                return at
            self._check(kind, _IN_CLUSTER, at)
            if following is None:
                raise _DamagedError(f"what begins at byte {at} has no length")
            if kind in _NUMBERS and following - begin > 8:
                raise _DamagedError(f"it is damaged: what begins at byte {at} is no number")
            if kind == _SIMPLE_BLOCK:
                self._block(begin)
            elif kind == _GROUP:
                inner = begin
                while inner < following:
                    kind, begin, after = self._element(inner, following)
                    self._check(kind, _IN_GROUP, inner)
                    if kind == _BLOCK:
                        self._block(begin)
                    inner = following if after is None else after
            at = following
        return last

    def _block(self, at: int) -> None:
        number, _ = _vint(self._bytes(at), 0, keep=False)
        if self._tracks is not None and number not in self._tracks:
            raise _DamagedError(f"the block that begins at byte {at} is of no track")

    def _numbers(self, at: int, end: int) -> set[int] | None:
        """Of the tracks; None where they cannot be told."""
        found: set[int] = set()
        if end - at > _MOST_TRACKS:
            return None
        while at < end:
            kind, begin, following = self._element(at, end)
            while kind == 0xAE and begin < (following or end):
                inner, body, after = self._element(begin, following or end)
                if inner == 0xD7 and after is not None:
                    found.add(int.from_bytes(self._bytes(body)[: after - body], "big"))
                begin = end if after is None else after
            at = end if following is None else following
        return found

    def _element(self, at: int, end: int) -> tuple[int, int, int | None]:
        """Its type, and where its contents begin and end; None where that is not told."""
        self._count += 1
        if self._count % 1024 == 0:
            self._look()
        data = self._bytes(at)
        kind, length = _vint(data, 0, keep=True)
        size, more = _vint(data, length, keep=False)
        begin = at + length + more
        if begin > end:
            raise _DamagedError(f"it is cut off: what begins at byte {at} is not whole")
        if size == (1 << 7 * more) - 1:
            return kind, begin, None
        if begin + size > end:
            there = "" if end < self._size else f", of which {self._size - begin} are there"
            raise _DamagedError(f"it is cut off, or damaged: what begins at byte {at} has {size} bytes{there}")
        return kind, begin, begin + size

    def _check(self, kind: int, known: set[int], at: int) -> None:
        if kind not in known:
            raise _DamagedError(f"it is damaged: what begins at byte {at} is of an unknown type, {kind:x}")

    def _bytes(self, at: int) -> bytes:
        self._file.seek(at)
        return self._file.read(16) or b""


def _vint(data: bytes, at: int, *, keep: bool) -> tuple[int, int]:
    """A number of EBML's, and how many bytes it takes. keep: with the bit that tells its length, as types have it."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    if length > 8 or at + length > len(data):
        raise _DamagedError("it is cut off, or damaged: a length is not whole")
    value = int.from_bytes(data[at : at + length], "big")
    return (value if keep else value & ((1 << 7 * length) - 1)), length
