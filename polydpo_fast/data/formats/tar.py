"""Pairs in WebDataset's tar shards."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from ..source import Pair, SourceError, warn
from .columns import TIE_WEIGHT
from .fields import Fields, text_of
from .files import File, Location
from .indexed import COMMON, IndexedSource, Notes, key_hash
from .splits import find_one_split
from .tar_members import BLOCK, is_header
from .tar_samples import CUT_OFF, FIRST_WINS, Order, Sample, only_sample, samples

__all__ = ["KEY_FIELD", "PACK_STATE", "TarPairs"]

KEY_FIELD = "pair_key"
"""In a sample's JSON: the pair's key, if it differs from the sample's."""

PACK_STATE = "pack.json"
"""Beside shards that `pack` made: how far it came."""

_MAX_SAMPLE = 1 << 32
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


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
        cut_off = [file.path for file, notes in zip(files, self._notes, strict=True) if notes.counts[CUT_OFF]]
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
            for sample in samples(opened, file.size, notes):
                hashed = key_hash(sample.key)
                if hashed in seen:
                    raise ValueError(f"sample {sample.key!r} comes twice, not in one piece, at byte {sample.start}")
                seen.add(hashed)
                content = sample.content()
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
            sample = only_sample(data)
        except (EOFError, ValueError) as error:
            raise ValueError(f"the shard has changed or is damaged: {error}") from error
        order = None
        if zlib.crc32(sample.content()) == row["crc"]:
            record = sample.record()
            fields, order = Fields.of(record, self._columns, KEY_FIELD), sample.order(record)
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
            prompt=sample.prompt() if fields.prompt is None else fields.prompt,
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


def _row_of(sample: Sample, notes: Notes) -> tuple[Any, ...] | None:
    notes.counts["samples"] += 1
    if not sample.is_complete:
        notes.counts["incomplete"] += 1
        return None
    if sample.end - sample.start > _MAX_SAMPLE:
        raise ValueError(f"sample {sample.key!r} has {sample.end - sample.start} bytes; expected at most {_MAX_SAMPLE}")
    record, key, category = {}, sample.key, 0
    order: Order | None = FIRST_WINS
    try:
        record = sample.record()
        key, category = text_of(record, KEY_FIELD) or key, notes.category(text_of(record, "category") or "")
    except ValueError:
        # It stays a pair, which fails when it is read. In the first category: one of its own would get a share under
        # categories="balanced".
        notes.counts["of bad JSON"] += 1
    else:
        order = sample.order(record)
    notes.see(record)
    if order is None:
        notes.counts["without label"] += 1
        return None
    blocks = (sample.end - sample.start) // BLOCK
    return key_hash(key), category, order.tie, sample.start, blocks
