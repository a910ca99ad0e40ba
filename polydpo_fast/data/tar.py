"""Pairs in WebDataset's tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from .columns import HAS_LABEL, TIE_WEIGHT, is_labelled
from .fields import MAX_RECORD_BYTES, Fields, parse_json, text_of
from .files import File, Location
from .indexed import COMMON, IndexedSource, Notes, key_hash
from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES
from .source import Pair, PairError, SourceError
from .splits import find_one_split

__all__ = ["KEY_FIELD", "PACK_STATE", "TarPairs"]

KEY_FIELD = "pair_key"
"""In a sample's JSON: the pair's key, where it is another than the sample's."""

PACK_STATE = "pack.json"
"""Beside shards that `pack` made: how far it came."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION = 1 << 20
_MAX_PADDING = 1 << 20  # after the end mark; tar fills its last record, of 10 KB as a rule
_MAX_SAMPLE = 1 << 32
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
# Type flags of headers.
_REGULAR = b"\x0007"  # a file; 7 is one that lies in one piece
_EXTENSIONS = b"LKxXg"  # of the member that follows: L its long name, K its link's; x or X PAX fields; g PAX for all
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_ARMS = (("win", "lose"), ("0", "1"))
_CUT_OFF = "files cut off"
_LINKED = "arms passed over for being links (tar --hard-dereference --dereference stores their files)"
_DOTTED = "arms passed over for a further dot in their names (a key ends at the first one)"


class TarPairs(IndexedSource):
    """Samples of WebDataset shards; the members of a sample have a name up to the first dot in common, its key.

    where: paths, globs, folders or addresses of uncompressed tar files (ustar, GNU or PAX).
    A sample's members, which stand next to each other:
        KEY.win.EXT, KEY.lose.EXT  the winner and the loser; or
        KEY.0.EXT, KEY.1.EXT       two of which KEY.json says which is the winner: `label_0` and `label_1`, of which
                                   the greater wins and equal ones are a tie (one alone is compared with 0.5); or
                                   `label` or `preferred`: the winner's number, 0 or 1, and 0.5 for a tie
        KEY.json   an object: prompt or caption, weight, category, pair_key, and the `columns`
        KEY.txt    the prompt, if the JSON has none
    EXT is that of an image or a clip. Other members are passed over, links and devices too.
    ties: "drop", "keep" (arm 0 as the winner, half the weight), or "error".
    columns: further fields of the JSON for `Pair.extra`; None in samples that do not have them.
    cache: the folder of the kept index; `cache_folder()` if None.

    A pair's key is its `pair_key` or else KEY; SHARD/KEY where the shards' keys are not all different. A sample that
    lacks an arm or a label is left out and counted. So is the last one of a shard that was cut off, which is one that
    does not end as tar files do, and a warning says so. A sample that cannot be read, or has changed since, is a
    PairError.
    Takes 29 bytes of memory per pair. Raises SourceError for what is no tar file, or no plain one: compressed, sparse,
    damaged; for two samples or two members of the same name; for samples of more than 4 GiB.
    """

    kind: ClassVar[str] = "tar"
    version: ClassVar[int] = 3
    fingerprint_version: ClassVar[int | None] = 2
    apart: ClassVar[tuple[str, ...]] = ("crc",)
    row: ClassVar[np.dtype[Any]] = np.dtype([*COMMON, ("start", "<i8"), ("blocks", "<u4"), ("crc", "<u4")])

    def __init__(
        self,
        where: Location | Sequence[Location],
        *,
        ties: str = "drop",
        columns: Sequence[str] = (),
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        files = find_one_split(where, (".tar",))
        _check_complete(files)
        super().__init__(files, ties=ties, columns=columns, cache=cache)
        self._long_keys = self._repeated() is not None
        cut_off = [file.path for file, notes in zip(files, self._notes, strict=True) if notes.counts[_CUT_OFF]]
        if cut_off:
            others = f" and {len(cut_off) - 1} others" if len(cut_off) > 1 else ""
            warnings.warn(
                f"cut off, so that at least the last sample is missing: {cut_off[0]}{others}",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def blocks(self) -> np.ndarray:
        lengths = np.diff(self._ends, prepend=0)
        return lengths[lengths > 0].astype(np.int64)

    def _scan(self, file: File, notes: Notes) -> Iterator[tuple[Any, ...]]:
        with file.open_to_skip() as opened:
            begin = opened.read(_BLOCK)
            for magic, name in _COMPRESSED.items():
                if begin.startswith(magic) and not _is_header(begin):  # a member may be named BZh
                    raise ValueError(
                        f"it is compressed with {name}; expected a plain tar file, which can be read in parts"
                    )
            seen: set[int] = set()
            digest = hashlib.blake2b(digest_size=16)
            for sample in _samples(opened, file.size, notes):
                hashed = key_hash(sample.key)
                if hashed in seen:
                    raise ValueError(f"sample {sample.key!r} comes twice, not in one piece, at byte {sample.start}")
                seen.add(hashed)
                content = _content(sample)
                digest.update(content)
                if (row := _row_of(sample, notes)) is not None:
                    yield *row, zlib.crc32(content)
            notes.content = digest.hexdigest()

    def _within(self, rows: np.ndarray, size: int) -> bool:
        starts, lengths = rows["start"], rows["blocks"].astype(np.int64) * _BLOCK
        return bool(((starts >= 0) & (starts <= size - lengths) & (lengths <= _MAX_SAMPLE)).all())

    def _read(self, number: int, row: np.void) -> Pair:
        file = self._files[number]
        if file.is_local and file.changed():
            raise ValueError("the shard has been changed since it was opened")
        data = file.read(int(row["start"]), int(row["blocks"]) * _BLOCK)
        try:
            sample = _only_sample(data)
        except (EOFError, ValueError) as error:
            raise ValueError(f"the shard has changed or is damaged: {error}") from error
        order = None
        if zlib.crc32(_content(sample)) == row["crc"]:
            record = parse_json(sample.json) if sample.json is not None else {}
            fields, order = Fields.of(record, self._columns, KEY_FIELD), _order(sample, record)
        if order is None:
            raise ValueError(f"the shard has changed: another sample, {sample.key!r}, is where this one was")
        key = fields.key or sample.key
        win, lose = (memoryview(data)[m.data : m.data + m.size] for m in (sample.arms[arm] for arm in order.arms))
        if self._long_keys:
            key = f"{self._names[number].removesuffix('.tar')}/{key}"
        return Pair(
            key,
            win,
            lose,
            prompt=_prompt(sample) if fields.prompt is None else fields.prompt,
            weight=fields.weight * (TIE_WEIGHT if order.tie else 1.0),
            category=fields.category,
            extra=fields.extra,
        )

    def _where(self, file: File, row: np.void, notes: Notes) -> str:
        return f"{file.path} at byte {row['start']}"


def _check_complete(files: Sequence[File]) -> None:
    for folder in {file.folder for file in files if file.is_local}:
        try:
            with open(os.path.join(folder, PACK_STATE), "rb") as file:
                state = json.loads(file.read(1 << 16))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and state.get("complete") is False:
            raise SourceError(f"{folder} is not packed to its end; pack it again, which goes on where it stopped")


# ------------------------------------------------------------------------------------------------ samples


class _Member(NamedTuple):
    name: str
    is_file: bool  # and no folder, link or device
    start: int  # of its first header
    data: int
    size: int
    end: int


class _Order(NamedTuple):
    arms: tuple[str, str]
    tie: bool


class _Sample:
    """Members of one key. json, txt: their contents."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.arms: dict[str, _Member] = {}
        self.json: bytes | None = None
        self.txt: bytes | None = None
        self.start = self.end = -1

    def add(self, role: str, member: _Member, file: BinaryIO) -> None:
        if role in self.arms or (role == "json" and self.json is not None) or (role == "txt" and self.txt is not None):
            raise ValueError(f"sample {self.key!r} has two members {role!r}, the second at byte {member.start}")
        if role in ("json", "txt"):
            if member.size > MAX_RECORD_BYTES:
                raise ValueError(f"{member.name!r} has {member.size} bytes; expected at most {MAX_RECORD_BYTES}")
            file.seek(member.data)
            content = file.read(member.size)
            if len(content) < member.size:
                raise EOFError("it ends within a member")
            if role == "json":
                self.json = content
            else:
                self.txt = content
        else:
            self.arms[role] = member
        self.start, self.end = member.start if self.start < 0 else self.start, member.end


def _samples(file: BinaryIO, size: int, notes: Notes) -> Iterator[_Sample]:
    """All that have at least one arm. Raises ValueError for what is no tar file."""
    at, sample = 0, None
    try:
        while (member := _member(file, at, size)) is not None:
            at = member.end
            named = _key_and_role(member.name)
            if named is None:
                continue
            key, role = named
            if not member.is_file:
                if role not in ("", "json", "txt"):
                    notes.counts[_LINKED] += 1
                continue
            if sample is not None and sample.key != key:
                if sample.arms:
                    yield sample
                sample = None
            if role:
                sample = sample or _Sample(key)
                sample.add(role, member, file)
            elif _is_arm(*member.name.lower().split(".")[-2:]):
                notes.counts[_DOTTED] += 1
    except EOFError:
        if at == 0:
            raise ValueError("it ends before its first member does") from None
        # What was to follow may have been of the last sample: its prompt, its label.
        notes.counts[_CUT_OFF] += 1
        return
    if sample is not None and sample.arms:
        yield sample
    file.seek(at)
    rest = file.read(_MAX_PADDING + 1)
    if len(rest) > _MAX_PADDING or rest.strip(b"\0"):
        raise ValueError(f"it goes on after its end, at byte {at}: tar files put together, or a download not finished")


def _only_sample(data: bytes) -> _Sample:
    """Raises ValueError or EOFError where the data is not one sample, whole."""
    file, at, sample = io.BytesIO(data), 0, None
    while at < len(data):
        member = _member(file, at, len(data))
        if member is None:
            raise ValueError("the archive ends where it should not")
        at = member.end
        key, role = (member.is_file and _key_and_role(member.name)) or ("", "")
        if role:
            sample = sample or _Sample(key)
            if sample.key != key:
                raise ValueError(f"members of {sample.key!r} and {key!r} where those of one should be")
            sample.add(role, member, file)
    if sample is None:
        raise ValueError("no members of a sample")
    return sample


def _key_and_role(name: str) -> tuple[str, str] | None:
    """The role is an arm, "json", "txt", or "" for what is none of our business; None for names without a key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot:
        return None
    key, suffix = f"{folder}{slash}{stem}", suffix.lower()
    if suffix in ("json", "txt"):
        return key, suffix
    arm, _, form = suffix.rpartition(".")
    return key, arm if _is_arm(arm, form) else ""


def _is_arm(arm: str, form: str) -> bool:
    return any(arm in arms for arms in _ARMS) and (form in IMAGE_SUFFIXES or form in CLIP_SUFFIXES)


def _content(sample: _Sample) -> bytes:
    """What is said of the pair, and the names and sizes of its members."""
    members = sorted((arm, member.name, member.size) for arm, member in sample.arms.items())
    return b"%r %r %r %r" % (sample.key, members, sample.json, sample.txt)


def _row_of(sample: _Sample, notes: Notes) -> tuple[Any, ...] | None:
    notes.counts["samples"] += 1
    if not any(set(arms) <= set(sample.arms) for arms in _ARMS):
        notes.counts["incomplete"] += 1
        return None
    if sample.end - sample.start > _MAX_SAMPLE:
        raise ValueError(f"sample {sample.key!r} has {sample.end - sample.start} bytes; expected at most {_MAX_SAMPLE}")
    record, key, category = {}, sample.key, 0
    order: _Order | None = _Order(_ARMS[0], False)
    try:
        record = parse_json(sample.json) if sample.json is not None else {}
        key, category = text_of(record, KEY_FIELD) or key, notes.category(text_of(record, "category") or "")
    except ValueError:
        # Will be one again when the pair is read: it is that pair's own trouble. It is of the first category: one of
        # its own would have a share where categories are balanced.
        notes.counts["of bad JSON"] += 1
    else:
        order = _order(sample, record)
    notes.see(record)
    if order is None:
        notes.counts["without label"] += 1
        return None
    blocks = (sample.end - sample.start) // _BLOCK
    return key_hash(key), category, order.tie, sample.start, blocks


def _order(sample: _Sample, record: dict[str, Any]) -> _Order | None:
    """None without a label. Raises ValueError for a label that means nothing."""
    if set(_ARMS[0]) <= set(sample.arms):
        return _Order(_ARMS[0], False)
    if not is_labelled(record.get(HAS_LABEL)):
        return None
    labels = [_label(record, f"label_{arm}", sample.key) for arm in "01"]
    if labels != [None, None]:
        first = 1 - labels[1] if labels[0] is None else labels[0]
        second = 1 - first if labels[1] is None else labels[1]
        return _Order(("1", "0") if second > first else ("0", "1"), first == second)
    for name in ("label", "preferred"):
        if (number := _label(record, name, sample.key)) is not None:
            if number not in (0, 0.5, 1):
                raise ValueError(f"sample {sample.key!r}: {name} is {number}; expected 0, 1, or 0.5 for a tie")
            return _Order(("1", "0") if number == 1 else ("0", "1"), number == 0.5)
    return None


def _label(record: dict[str, Any], name: str, key: str) -> Any:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise ValueError(f"sample {key!r}: {name} is {value!r}; expected a number from 0 to 1")
    return value


def _prompt(sample: _Sample) -> str:
    if sample.txt is None:
        return ""
    try:
        return sample.txt.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise PairError(f"sample {sample.key!r}: its txt is not UTF-8") from error


# ------------------------------------------------------------------------------------------------ the format


def _member(file: BinaryIO, start: int, size: int) -> _Member | None:
    """The member whose first header is there; None at the end mark.

    Raises EOFError where the file ends before the member does, and ValueError where there is no member.
    """
    at, long_name, own_size = start, None, None
    while True:
        header = _take(file, at, _BLOCK, size)
        if header == _ZEROS:
            if at != start:
                raise ValueError(f"a header without a member at byte {start}")
            return None
        kind = header[156]
        if not _is_header(header):
            raise ValueError(f"no tar header at byte {at}")
        length = _number(header[124:136], at)
        at += _BLOCK
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
    return _Member(name, is_file, start, at, length, end)


def _take(file: BinaryIO, at: int, length: int, size: int) -> bytes:
    if at + length > size:
        raise EOFError("it ends within a header")
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it ends within a header")
    return data


def _is_header(block: bytes) -> bool:
    """Whether it has the sum of its bytes, in which those of the sum count as spaces."""
    digits = block[148:156].strip(b"\0 ")
    if not digits or digits.strip(b"01234567"):
        return False
    # The low 16 bits of Adler-32 are 1 + the sum of the bytes, modulo 65521, which 256 bytes never reach (255 * 256 is
    # 65280). So two halves of a block give their sums, less 1 each; sum() takes ten times as long.
    halves = (zlib.adler32(half) & 0xFFFF for half in (block[:256], block[256:]))
    return int(digits, 8) == sum(halves) - 2 - sum(block[148:156]) + 8 * 32


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _number(raw: bytes, at: int) -> int:
    """Octal digits; or binary, as GNU tar writes what is too large for those."""
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
    """Records of "LENGTH NAME=VALUE\\n", where the length counts itself."""
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
    # GNU tar has times in the place of the prefix.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _text(name: bytes, at: int) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"a member's name at byte {at} is not UTF-8: {name[:80]!r}") from None
    if "\0" in text:
        raise ValueError(f"a member's name at byte {at} has a zero byte in it: {name[:80]!r}")
    return text
