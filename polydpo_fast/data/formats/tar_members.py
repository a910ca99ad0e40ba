"""Members of tar archives, read header by header: ustar, GNU and PAX."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["BLOCK", "Member", "is_header", "read_member"]

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION = 1 << 20
# Type flags of headers.
_REGULAR = b"\x0007"  # files; 7 is a contiguous one
_EXTENSIONS = b"LKxXg"  # about the next member: L its long name, K its link's, x and X PAX fields; g PAX for all
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes


class Member(NamedTuple):
    """name: its path. is_file: not a folder, link or device. size: of its data, in bytes.

    start, data, end: where in the archive its first header, its data, and what follows it begin.
    """

    name: str
    is_file: bool
    start: int
    data: int
    size: int
    end: int


def read_member(file: BinaryIO, start: int, size: int) -> Member | None:
    """The member whose first header is at `start`, in an archive of `size` bytes; None at the end mark.

    Raises EOFError if the archive ends before the member does, and ValueError if there is no member.
    """
    at, long_name, own_size = start, None, None
    while True:
        header = _take(file, at, BLOCK, size)
        if header == _ZEROS:
            if at != start:
                raise ValueError(f"a header without a member at byte {start}")
            return None
        kind = header[156]
        if not is_header(header):
            raise ValueError(f"no tar header at byte {at}")
        length = _number(header[124:136], at)
        at += BLOCK
        if kind not in _EXTENSIONS:
            break
        if length > _MAX_EXTENSION:
            raise ValueError(f"a header of {length} bytes at byte {at}; expected at most {_MAX_EXTENSION}")
        extension = _take(file, at, length, size)
        if kind == ord("L"):
            long_name = extension.rstrip(b"\0") if long_name is None else long_name
        elif kind in b"xX":
            for field, value in _pax(extension, at):
                if field == b"path":
                    long_name = value
                elif field == b"size":
                    own_size = _decimal(value, at)
                elif field.startswith(b"GNU.sparse."):
                    raise ValueError(f"a sparse member at byte {start}; expected plain ones")
        elif kind == ord("g") and any(field in (b"path", b"size") for field, _ in _pax(extension, at)):
            raise ValueError(f"a global header at byte {at} that names or measures members")
        at += _padded(length)
    length = length if own_size is None else own_size
    if kind == ord("S"):
        raise ValueError(f"a sparse member at byte {start}; expected plain ones")
    if kind in _WITHOUT_DATA and length:
        raise ValueError(f"a link, folder or device of {length} bytes at byte {start}")
    name = _text(_name(header) if long_name is None else long_name, start)
    end = at + _padded(length)
    if end > size:
        raise EOFError("it ends within a member")
    is_file = kind in _REGULAR and not name.endswith("/")
    return Member(name, is_file, start, at, length, end)


def _take(file: BinaryIO, at: int, length: int, size: int) -> bytes:
    if at + length > size:
        raise EOFError("it ends within a header")
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it ends within a header")
    return data


def is_header(block: bytes) -> bool:
    """Whether its checksum is right: the sum of its bytes, with spaces in place of the checksum."""
    digits = block[148:156].strip(b"\0 ")
    if not digits or digits.strip(b"01234567"):
        return False
    # The low 16 bits of Adler-32 are 1 + the sum of the bytes, modulo 65521, which 256 bytes never reach (255 * 256 is
    # 65280). So two halves of a block give their sums, less 1 each; sum() takes ten times as long.
    halves = (zlib.adler32(half) & 0xFFFF for half in (block[:256], block[256:]))
    return int(digits, 8) == sum(halves) - 2 - sum(block[148:156]) + 8 * 32


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _number(raw: bytes, at: int) -> int:
    """Of octal digits; or binary, as GNU tar writes larger ones."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ValueError(f"a tar header at byte {at} with the number {raw!r}")
    return int(digits or b"0", 8)


def _decimal(raw: bytes, at: int) -> int:
    if not raw.isdigit() or len(raw) > 19:
        raise ValueError(f"a PAX header at byte {at} with the number {raw[:40]!r}")
    return int(raw)


def _pax(data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """The names and values of records "LENGTH NAME=VALUE\\n", whose length counts itself."""
    done = 0
    while done < len(data) and data[done]:
        digits = data[done : done + 20].split(b" ", 1)[0]
        record = data[done : done + _decimal(digits, at)]
        name, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not name or not equals or not record.endswith(b"\n") or done + int(digits) > len(data):
            raise ValueError(f"a PAX header at byte {at} with a record that is not one")
        yield name, value
        done += len(record)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    # Where ustar has the prefix, GNU tar has times.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _text(name: bytes, at: int) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"a member's name at byte {at} is not UTF-8: {name[:80]!r}") from None
    if "\0" in text:
        raise ValueError(f"a member's name at byte {at} has a zero byte in it: {name[:80]!r}")
    return text
