"""Pairs in WebDataset's tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from .columns import HAS_LABEL, TIE_WEIGHT, is_labelled
from .fields import MAX_RECORD_BYTES, Fields, parse_json, text_of
from .files import File, Location
from .indexed import COMMON, IndexedSource, Notes, key_hash
from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES
from .source import Pair, PairError, SourceError, warn
from .splits import find_one_split
from .tar_members import BLOCK, Member, is_header, read_member

__all__ = ["KEY_FIELD", "PACK_STATE", "TarPairs"]

KEY_FIELD = "pair_key"
"""In a sample's JSON: the pair's key, if it differs from the sample's."""

PACK_STATE = "pack.json"
"""Beside shards that `pack` made: how far it came."""

_MAX_PADDING = 1 << 20  # after the end mark; tar fills its last record, of 10 KB as a rule
_MAX_SAMPLE = 1 << 32
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_ARMS = (("win", "lose"), ("0", "1"))
_TEXTS = ("json", "txt")
_CUT_OFF = "files cut off"
_LINKED = "arms passed over for being links (tar --hard-dereference --dereference stores their files)"
_DOTTED = "arms passed over for a further dot in their names (a key ends at the first one)"


class TarPairs(IndexedSource):
    """Samples of WebDataset shards: members that share their name up to its first dot, the sample's key.

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

    A pair's key is its `pair_key` or else KEY; SHARD/KEY if the shards' keys are not all different. A sample that lacks
    an arm or a label is left out and counted. So is the last one of a shard that was cut off, without the end mark of
    tar files, and a warning says so. A sample that cannot be read, or has changed since, is a PairError.
    Takes 29 bytes of memory per pair. Raises SourceError for anything but a plain tar file (compressed, sparse,
    damaged), for two samples or two members of the same name, and for samples of more than 4 GiB.
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
            warn(f"cut off, so that at least the last sample is missing: {cut_off[0]}{others}")

    @property
    def blocks(self) -> np.ndarray:
        lengths = np.diff(self._ends, prepend=0)
        return lengths[lengths > 0].astype(np.int64)

    def _scan(self, file: File, notes: Notes) -> Iterator[tuple[Any, ...]]:
        with file.open_to_skip() as opened:
            begin = opened.read(BLOCK)
            for magic, name in _COMPRESSED.items():
                if begin.startswith(magic) and not is_header(begin):  # a member may be named BZh
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
        starts, lengths = rows["start"], rows["blocks"].astype(np.int64) * BLOCK
        return bool(((starts >= 0) & (starts <= size - lengths) & (lengths <= _MAX_SAMPLE)).all())

    def _read(self, number: int, row: np.void) -> Pair:
        file = self._files[number]
        if file.is_local and file.changed():
            raise ValueError("the shard has been changed since it was opened")
        data = file.read(int(row["start"]), int(row["blocks"]) * BLOCK)
        try:
            sample = _only_sample(data)
        except (EOFError, ValueError) as error:
            raise ValueError(f"the shard has changed or is damaged: {error}") from error
        order = None
        if zlib.crc32(_content(sample)) == row["crc"]:
            record = _record(sample)
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


class _Order(NamedTuple):
    arms: tuple[str, str]
    tie: bool


class _Sample:
    """Members of one key. texts: the contents of its json and txt."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.arms: dict[str, Member] = {}
        self.texts: dict[str, bytes] = {}
        self.start = self.end = -1

    def add(self, role: str, member: Member, file: BinaryIO) -> None:
        if role in self.arms or role in self.texts:
            raise ValueError(f"sample {self.key!r} has two members {role!r}, the second at byte {member.start}")
        if role in _TEXTS:
            if member.size > MAX_RECORD_BYTES:
                raise ValueError(f"{member.name!r} has {member.size} bytes; expected at most {MAX_RECORD_BYTES}")
            file.seek(member.data)
            content = file.read(member.size)
            if len(content) < member.size:
                raise EOFError("it ends within a member")
            self.texts[role] = content
        else:
            self.arms[role] = member
        self.start, self.end = member.start if self.start < 0 else self.start, member.end


def _samples(file: BinaryIO, size: int, notes: Notes) -> Iterator[_Sample]:
    """All samples with at least one arm. Raises ValueError if it is no tar file."""
    at, sample = 0, None
    try:
        while (member := read_member(file, at, size)) is not None:
            at = member.end
            named = _key_and_role(member.name)
            if named is None:
                continue
            key, role = named
            if not member.is_file:
                if role and role not in _TEXTS:
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
        # The last sample may have had more members: its prompt, its label.
        notes.counts[_CUT_OFF] += 1
        return
    if sample is not None and sample.arms:
        yield sample
    file.seek(at)
    rest = file.read(_MAX_PADDING + 1)
    if len(rest) > _MAX_PADDING or rest.strip(b"\0"):
        raise ValueError(f"it goes on after its end, at byte {at}: tar files put together, or a download not finished")


def _only_sample(data: bytes) -> _Sample:
    """Raises ValueError or EOFError if the data is not exactly one whole sample."""
    file, at, sample = io.BytesIO(data), 0, None
    while at < len(data):
        member = read_member(file, at, len(data))
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
    """The role is an arm, "json", "txt", or "" for any other member; None for names without a key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot:
        return None
    key, suffix = f"{folder}{slash}{stem}", suffix.lower()
    if suffix in _TEXTS:
        return key, suffix
    arm, _, form = suffix.rpartition(".")
    return key, arm if _is_arm(arm, form) else ""


def _is_arm(arm: str, form: str) -> bool:
    return any(arm in arms for arms in _ARMS) and (form in IMAGE_SUFFIXES or form in CLIP_SUFFIXES)


def _content(sample: _Sample) -> bytes:
    """What tells whether a sample has changed: its texts, and the names and sizes of its arms."""
    members = sorted((arm, member.name, member.size) for arm, member in sample.arms.items())
    return b"%r %r %r %r" % (sample.key, members, sample.texts.get("json"), sample.texts.get("txt"))


def _record(sample: _Sample) -> dict[str, Any]:
    """The object in its json. Raises ValueError."""
    return parse_json(sample.texts["json"]) if "json" in sample.texts else {}


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
        record = _record(sample)
        key, category = text_of(record, KEY_FIELD) or key, notes.category(text_of(record, "category") or "")
    except ValueError:
        # It stays a pair, which fails when it is read. In the first category: one of its own would get a share under
        # categories="balanced".
        notes.counts["of bad JSON"] += 1
    else:
        order = _order(sample, record)
    notes.see(record)
    if order is None:
        notes.counts["without label"] += 1
        return None
    blocks = (sample.end - sample.start) // BLOCK
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
    try:
        return sample.texts.get("txt", b"").decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise PairError(f"sample {sample.key!r}: its txt is not UTF-8") from error
