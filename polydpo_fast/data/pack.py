"""Any source of pairs as WebDataset shards, which are read in long runs."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Buffer

from ..values import is_int
from .formats.fields import MAX_RECORD_BYTES
from .formats.media import suffix_of
from .formats.tar import KEY_FIELD, PACK_STATE
from .read_ahead import read_ahead
from .source import Arm, Pair, PairError, Source, SourceError, weight_of

__all__ = ["UNREADABLE", "Packed", "bytes_of", "pack"]

UNREADABLE, _STATE = "unreadable.jsonl", PACK_STATE
_VERSION = 2


@dataclass(frozen=True)
class Packed:
    """How far it is. next: the pair to begin with. unreadable_bytes: of what was written down of those left out.
    complete: all is there; until then the folder cannot be opened as a source."""

    source: str
    shard_size: int
    shards: int = 0
    next: int = 0
    pairs: int = 0
    unreadable: int = 0
    unreadable_bytes: int = 0
    complete: bool = False
    version: int = _VERSION


def pack(
    source: Source,
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1_000_000_000,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Writes pairs-000000.tar, pairs-000001.tar, ... into the folder `out`, for `TarPairs`.

    out: a folder of this machine; not within one that the source was opened as, or they are read as a part of it.

    A pair becomes NUMBER.win.EXT, NUMBER.lose.EXT and NUMBER.json with pair_key, prompt, weight, category and what it
    has in `extra`, where floats that are not finite become null. Images and clips are copied as they are; EXT is told
    from their first bytes. The same source makes the same bytes.
    shard_size: in bytes, that a shard has at most, unless a single pair is larger.
    progress: called with the number of pairs that are done, whenever it grows.

    A pair that cannot be read, is neither image nor clip, or has more than 16 MiB of JSON, is left out and written
    down in unreadable.jsonl. Can be interrupted at any moment: called again it goes on after the last whole shard.
    Raises SourceError if the folder holds the shards of another source or size, or with other columns, or other tar
    files, or if another process is packing into it; also for extra columns that JSON cannot hold. Raises ValueError
    where `out` is an address.
    """
    if not is_int(shard_size) or shard_size < 1:
        raise ValueError(f"shard_size is {shard_size!r}; expected a number of bytes, 1 or more")
    folder = Path(out).expanduser()
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(folder)):  # a Path has only one slash of an address
        raise ValueError(f"out is {os.fspath(out)}; expected a folder of this machine, to copy the shards from")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        state = _begin(folder, source, shard_size)
        if state.shards:
            _check_first_pair(folder / _shard_name(0), source)
        shard, faults = _Shard(folder), list[bytes]()
        pairs = read_ahead(source, range(state.next, len(source)))
        try:
            for index, pair in pairs:
                members = _members(index, pair)
                if isinstance(members, PairError):
                    faults.append(_fault(source, index, members))
                else:
                    if shard.pairs and shard.size_with(members) > shard_size:
                        state = _commit(folder, state, shard, faults, index)
                        shard, faults = _Shard(folder), []
                    shard.add(members)
                if progress is not None:
                    progress(index + 1)
            if state.next < len(source):
                state = _commit(folder, state, shard, faults, len(source))
            state = replace(state, complete=True)
            _write(folder, state)
        finally:
            pairs.close()
            shard.abandon()
    return state


def bytes_of(text: str) -> int:
    """Of a size such as 500MB, 1GB, 2GiB or 1000. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT]?)(i?)B?)", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise ValueError(f"size is {text!r}; expected bytes, such as 500MB, 1GB or 2GiB")
    return size


# ------------------------------------------------------------------------------------------------ members

Members = list[tuple[str, Buffer]]


def _members(index: int, pair: Pair | PairError) -> Members | PairError:
    if isinstance(pair, PairError):
        return pair
    try:
        weight_of(pair.weight)
    except ValueError as error:
        return PairError(str(error))
    members: Members = []
    arms: tuple[tuple[Arm, Any], ...] = (("win", pair.win), ("lose", pair.lose))
    for arm, stored in arms:
        try:
            data = Path(stored).read_bytes() if isinstance(stored, os.PathLike) else stored
            members.append((f"{index:09d}.{arm}.{suffix_of(data)}", data))
        except (OSError, ValueError) as error:
            return PairError(str(error), arm)
    record = {KEY_FIELD: pair.key, "prompt": pair.prompt, "weight": pair.weight, "category": pair.category}
    # Twice, so that a column which has the name of one of these does not take its place, but the order is the same.
    record = {**record, **pair.extra, **record}
    try:
        text = json.dumps(record, default=_plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(record), allow_nan=False)
    try:
        json.dumps(record, default=_plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can spell, but nothing reads as text
        return PairError("its prompt or another text is not Unicode text")
    if len(text) > MAX_RECORD_BYTES:  # of which the whole shard would be refused
        return PairError(f"its JSON has {len(text)} bytes; expected at most {MAX_RECORD_BYTES}")
    return [*members, (f"{index:09d}.json", text.encode())]


def _without_nan(value: Any) -> Any:
    """null in the place of floats that are not finite, which JSON does not have."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return value if isinstance(value, (str, int, type(None))) else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise SourceError(
        f"extra holds a {type(value).__name__}, which JSON cannot; expected text, numbers, lists and the like"
    )


def _fault(source: Source, index: int, error: PairError) -> bytes:
    position = source.position(index)
    reason = error.reason.removeprefix(f"{position}: ")
    fault = {"pair": index, "position": position, "arm": error.arm, "error": reason}
    return json.dumps(fault).encode() + b"\n"


# ------------------------------------------------------------------------------------------------ shards


class _Shard:
    """Written under another name until it is whole."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "unfinished.part"
        self._file = open(self._path, "wb")  # noqa: SIM115  # open as long as the shard is written
        # GNU's form has sizes of any length; the names are short.
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        self.pairs = 0

    def size_with(self, members: Members) -> int:
        """Of the whole shard, in bytes, with these besides."""
        blocks = sum(1 + -(-memoryview(data).nbytes // tarfile.BLOCKSIZE) for _, data in members) + 2
        size = self._tar.offset + blocks * tarfile.BLOCKSIZE
        return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, members: Members) -> None:
        for name, data in members:
            info = tarfile.TarInfo(name)  # of nobody, from 1970
            info.size = memoryview(data).nbytes
            self._tar.addfile(info, io.BytesIO(data))
        self.pairs += 1

    def finish(self, path: Path) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, path)

    def abandon(self) -> None:
        """No harm to one that is finished."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # what was still to be written may find a full disk
                self._file.close()
            self._path.unlink()


# ------------------------------------------------------------------------------------------------ state


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"{folder}: another process is packing into it") from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(handle)


def _begin(folder: Path, source: Source, shard_size: int) -> Packed:
    """What is done already; what was begun after that is removed."""
    new = Packed(source.fingerprint, shard_size)
    try:
        state = Packed(**json.loads((folder / _STATE).read_bytes()))
    except FileNotFoundError:
        if any(folder.glob("*.tar")):
            raise SourceError(f"{folder} has tar files, but no {_STATE}; expected an empty folder") from None
        state = new
        _write(folder, state)  # before any shard: its folder is known again
    except (ValueError, TypeError) as error:
        raise SourceError(f"{folder / _STATE} is damaged: {error}") from error
    for name in ("version", "source", "shard_size"):
        old, now = getattr(state, name), getattr(new, name)
        if old != now:
            why = " (other files, or options such as ties)" if name == "source" else ""
            raise SourceError(
                f"{folder} was begun with {name} {old}; now it is {now}{why}; expected the same, or another folder"
            )
    for number in range(state.shards):
        if not (folder / _shard_name(number)).exists():
            raise SourceError(f"{folder / _shard_name(number)} is missing, though {_STATE} has it")
    (folder / _shard_name(state.shards)).unlink(missing_ok=True)
    with open(folder / UNREADABLE, "ab") as file:
        file.truncate(min(file.tell(), state.unreadable_bytes))
    return state


def _check_first_pair(shard: Path, source: Source) -> None:
    """Raises SourceError if it would be packed otherwise now, which fingerprints do not always tell."""
    try:
        with tarfile.open(shard, "r:") as tar:
            files = ((info.name, tar.extractfile(info)) for info in tar)
            kept = [(name, file.read()) for name, file in itertools.islice(files, 3) if file is not None]
        index = int(kept[0][0].split(".")[0])
    except (tarfile.TarError, LookupError, ValueError) as error:
        raise SourceError(f"{shard} is damaged: {error}") from error
    try:
        members = _members(index, source[index])
    except PairError as error:
        members = error
    if isinstance(members, PairError):
        raise SourceError(f"{shard} has pair {index}, which cannot be read now: {members}")
    if kept != [(name, bytes(data)) for name, data in members]:
        raise SourceError(
            f"{shard.parent} was begun with other columns, or the source has changed: pair {index} is another one now"
        )


def _commit(folder: Path, state: Packed, shard: _Shard, faults: list[bytes], following: int) -> Packed:
    """The shard is whole first, then the state says so; until then it would be written again, to the same bytes."""
    if shard.pairs:
        shard.finish(folder / _shard_name(state.shards))
    with open(folder / UNREADABLE, "ab") as file:
        file.write(b"".join(faults))
        file.flush()
        os.fsync(file.fileno())
        length = file.tell()
    state = replace(
        state,
        shards=state.shards + (shard.pairs > 0),
        next=following,
        pairs=state.pairs + shard.pairs,
        unreadable=state.unreadable + len(faults),
        unreadable_bytes=length,
    )
    _write(folder, state)
    return state


def _write(folder: Path, state: Packed) -> None:
    part = folder / f"{_STATE}.part"
    with open(part, "wb") as file:
        file.write(json.dumps(asdict(state), indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / _STATE)


def _shard_name(number: int) -> str:
    return f"pairs-{number:06d}.tar"
