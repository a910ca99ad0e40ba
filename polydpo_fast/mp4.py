"""What an MP4 or MOV counts, before FFmpeg believes it and allocates for it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

__all__ = ["check_counts"]

_MOST_HEADERS = 1 << 28  # bytes


def check_counts(file: io.RawIOBase | io.BufferedIOBase, most: int, most_tracks: int) -> None:
    """Raises ValueError where there are more tracks than that, the tables count more samples than `most`, over all of
    them, or the headers are packed.

    FFmpeg makes an entry of some seventy bytes for each sample that a table counts, again for each edit; but a table
    of twenty bytes can count four thousand million. Nothing is known here of where tables may be: FFmpeg takes them
    anywhere outside of the data.
    """
    total = tracks = 0
    for headers in _headers(file):
        for track in re.split(rb"(?=tra[kf])", headers):
            total += _counted(track)
            tracks += track.startswith(b"trak")
            if tracks > most_tracks:
                raise ValueError(f"it has more than {most_tracks} streams (limits.streams)")
    if total > most:
        raise ValueError(f"its tables count {total} samples; expected at most {most} (limits.frames)")


def _headers(file: io.RawIOBase | io.BufferedIOBase) -> Iterator[bytes]:
    """What is not data, box by box."""
    at, taken, size = 0, 0, file.seek(0, io.SEEK_END)
    while at < size:
        file.seek(at)
        begin = file.read(16) or b""
        length = int.from_bytes(begin[:4], "big")
        if length == 1:
            length = int.from_bytes(begin[8:], "big")
        if length < 8 or length > size - at:
            length = size - at
        if begin[4:8] not in (b"mdat", b"free", b"skip"):
            taken += length
            if taken > _MOST_HEADERS:
                raise ValueError(f"its headers have more than {_MOST_HEADERS} bytes")
            file.seek(at)
            yield _read(file, length)
        at += length


def _read(file: io.RawIOBase | io.BufferedIOBase, count: int) -> bytes:
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _counted(track: bytes) -> int:
    """Entries that FFmpeg would make for a track, or for a fragment of one."""
    if b"cmov" in track:
        raise ValueError("its headers are compressed")
    samples = sum(_number(track, at + 8) for at in _behind(track, rb"stsz|stz2"))
    samples += sum(_number(track, at + 4) for at in _behind(track, rb"trun"))
    # Of PCM, where samples are those of the sound, it makes an entry for a thousand of them, chunk by chunk.
    is_one_each = [track[at + 4 : at + 8] == track[at + 12 : at + 16] == b"\0\0\0\1" for at in _behind(track, rb"stts")]
    if is_one_each and all(is_one_each) and b"soun" in track and b"vide" not in track:
        chunks = sum(_number(track, at + 4) for at in _behind(track, rb"stco|co64"))
        in_chunk = 0
        for at in _behind(track, rb"stsc"):
            entries = track[at + 8 : at + 8 + 12 * _number(track, at + 4)]
            in_chunk = max([in_chunk, *(_number(entries, i) for i in range(4, len(entries), 12))])
        samples = chunks * (in_chunk // 900 + 1)
    return samples * max(1, sum(_number(track, at + 4) for at in _behind(track, rb"elst")))


def _behind(track: bytes, types: bytes) -> list[int]:
    """Where the contents of boxes of these types begin."""
    return [found.end() for found in re.finditer(types, track)]


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
