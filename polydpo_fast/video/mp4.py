"""What an MP4 or MOV counts, before FFmpeg believes it and allocates for it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator

__all__ = ["check_counts"]

File = io.RawIOBase | io.BufferedIOBase

_MOST_HEADERS = 1 << 28  # bytes
_MOST_BOXES = 1 << 20
_MOST_HIDDEN = 1 << 8  # boxes among descriptions of samples, and bytes of each: what counts is at its beginning
# The boxes in which FFmpeg looks for others, of any kind. In all others, texts among them, bytes are only bytes.
_HOLDS_BOXES = (
    *(b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"edts", b"tref", b"mvex", b"moof", b"traf", b"udta"),
    *(b"ilst", b"meta", b"sinf", b"schi", b"wave", b"----"),
)
_COUNTED = (b"stsz", b"stz2", b"stts", b"stsc", b"stco", b"co64", b"elst", b"trun", b"hdlr")
_HIDDEN = re.compile(b"|".join((*_COUNTED, b"cmov")))


def check_counts(file: File, most: int, most_tracks: int, look: Callable[[], object] = lambda: None) -> str | None:
    """What is missing of the headers, if anything is.

    Raises ValueError where there are more tracks than that, the tables count more entries than `most`, over all of
    them, or the headers are packed.

    FFmpeg makes an entry of some seventy bytes for each sample that a table counts, again for each edit, and one for
    each track in each fragment; but a table of twenty bytes can count four thousand million.
    look: called now and then; what it raises ends the reading.
    """
    total = tracks = fragments = here = 0
    of_track, is_told, troubles = _Counts(), False, list[str]()
    listed = 0  # fragments, by an index that comes before them
    for kind, body in _boxes(file, look, troubles):
        is_told |= kind in (b"moov", b"meta")  # of a video, or a picture
        if kind in (b"trak", b"traf"):
            total += of_track.entries()
            of_track = _Counts()
            tracks += kind == b"trak"
            if tracks > most_tracks:
                raise ValueError(f"it has more than {most_tracks} streams (limits.streams)")
        elif kind == b"moof":
            fragments += 1
            here += 1
        elif kind == b"sidx":
            fragments += len(body) // 12  # of its references each has so many bytes
            if not here:  # others are of what follows them, perhaps a second time
                listed = max(listed, _listed_in(body))
        elif kind == b"iinf":  # items of a picture
            total += _number(body, 4) if body[:1] != b"\0" else 0
        elif kind == b"iloc":
            total += _number(body, 6) if body[:1] > b"\1" else 0
        elif kind == b"cmov":
            raise ValueError("its headers are compressed")
        else:
            of_track.add(kind, body)
    total += of_track.entries() + fragments * tracks
    if total > most:
        raise ValueError(f"its tables count {total} samples; expected at most {most} (limits.frames)")
    if not is_told:
        return "it is cut off, or was never finished: it has no moov box, which tells where its frames are"
    if listed > here:
        troubles.append(f"it is cut off: it holds {here} of the {listed} fragments that its index lists")
    return troubles[0] if troubles else None


def _listed_in(sidx: bytes) -> int:
    """How many parts of a track, each of a fragment or more, an index lists: ISO/IEC 14496-12, 8.16.3."""
    first = 24 if sidx[:1] == b"\0" else 32
    references = (sidx[at] for at in range(first, min(first + 12 * _short(sidx, first - 2), len(sidx)), 12))
    return sum(byte < 0x80 for byte in references)  # the others are of further indexes


class _Counts:
    """The tables of one track, or of a fragment of one."""

    def __init__(self) -> None:
        self._samples = self._runs = self._chunks = self._edits = 0
        self._in_chunk = 0
        self._is_one_each = True  # sample of a tick, as uncompressed sound has them
        self._is_timed = False
        self._kinds = b""

    def add(self, kind: bytes, body: bytes) -> None:
        if kind in (b"stsz", b"stz2"):
            self._samples += _number(body, 8)
        elif kind == b"trun":
            self._runs += _number(body, 4)
        elif kind == b"stts":
            self._is_timed = True
            self._is_one_each &= body[4:8] == body[12:16] == b"\0\0\0\1"
        elif kind in (b"stco", b"co64"):
            self._chunks += _number(body, 4)
        elif kind == b"stsc":
            entries = memoryview(body)[8 : 8 + 12 * _number(body, 4)]
            largest = max((_number(entries, i) for i in range(4, len(entries), 12)), default=0)
            self._in_chunk = max(self._in_chunk, largest)
        elif kind == b"elst":
            self._edits += _number(body, 4)
        elif kind == b"hdlr":
            self._kinds += body[8:12]

    def entries(self) -> int:
        """How many FFmpeg would make."""
        samples = self._samples + self._runs
        # Of PCM, where samples are those of the sound, it makes an entry for a thousand of them, chunk by chunk.
        if self._is_timed and self._is_one_each and b"soun" in self._kinds and b"vide" not in self._kinds:
            samples = self._chunks * (self._in_chunk // 900 + 1)
        return samples * max(1, self._edits)


def _boxes(file: File, look: Callable[[], object], troubles: list[str]) -> Iterator[tuple[bytes, bytes]]:
    """Those that FFmpeg would look at, outside of the data, with their contents if they are counted."""
    count = hidden = 0
    stack: list[tuple[bytes, int, int]] = []  # headers, and a part of them that is left
    for headers in _headers(file, look, troubles):
        stack.append((headers, 0, len(headers)))
        while stack:
            data, at, end = stack.pop()
            if end - at < 8:
                continue
            count += 1
            if count > _MOST_BOXES:
                raise ValueError(f"its headers have more than {_MOST_BOXES} boxes")
            if count % 1024 == 0:
                look()
            kind, begin = data[at + 4 : at + 8], at + 8
            size = _number(data, at)
            if size == 1:
                size, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
            following = end if size == 0 else min(at + size, end)
            if size and size < begin - at:  # there FFmpeg ends
                continue
            stack.append((data, following, end))
            if kind in (b"free", b"hoov") and data[begin + 4 : begin + 8] in (b"mvhd", b"cmov"):
                kind = b"moov"  # which FFmpeg finds there
            if kind in _HOLDS_BOXES:
                yield kind, b""
                if kind == b"meta":  # its boxes begin with this one, wherever it is
                    begin = max(begin, data.find(b"hdlr", begin, following) - 4)
                stack.append((data, begin, following))
            elif kind in (*_COUNTED, b"sidx", b"cmov", b"iinf", b"iloc"):
                yield kind, data[begin:following]
            elif kind == b"stsd":  # its entries hold boxes, behind fields that differ by codec
                for found in _HIDDEN.finditer(data, begin, following):
                    hidden += 1
                    if hidden > _MOST_HIDDEN:
                        raise ValueError(f"its descriptions of samples have more than {_MOST_HIDDEN} tables")
                    yield found[0], data[found.end() : min(found.end() + _MOST_HIDDEN, following)]


def _headers(file: File, look: Callable[[], object], troubles: list[str]) -> Iterator[bytes]:
    """What is not data, box by box. troubles: is told which of them are not whole."""
    at, taken, count, size = 0, 0, 0, file.seek(0, io.SEEK_END)
    while at < size:
        file.seek(at)
        begin = file.read(16) or b""
        length = int.from_bytes(begin[:4], "big")
        if length == 1:
            length = int.from_bytes(begin[8:], "big")
        if length > size - at and begin[4:8] in (b"moov", b"moof"):
            name = begin[4:8].decode()
            troubles.append(f"it is cut off: its {name} box has {length} bytes, of which {size - at} are there")
        if length < 8 or length > size - at:
            length = size - at
        count += 1
        if count > _MOST_BOXES:
            raise ValueError(f"it has more than {_MOST_BOXES} boxes")
        if count % 1024 == 0:
            look()
        if begin[4:8] not in (b"mdat", b"free", b"skip") or begin[12:16] in (b"mvhd", b"cmov"):
            taken += length
            if taken > _MOST_HEADERS:
                raise ValueError(f"its headers have more than {_MOST_HEADERS} bytes")
            file.seek(at)
            yield _read(file, length)
        at += length


def _read(file: File, count: int) -> bytes:
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _short(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def _number(data: bytes | memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
