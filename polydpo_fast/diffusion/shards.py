"""A folder of safetensors shards with so many successive pairs in each, on which both stores are built.

A shard is complete or absent: it is written under another name and renamed. Which pairs are in which shard depends on
their number alone, so that any number of ranks may write, and go on after an interruption with another number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import part_of, write_atomically
from ..data import PairBatch, PairError, PairLoader, SourceError
from ..data.formats.fields import MAX_RECORD_BYTES, parse_json
from ..values import is_int
from .extras import need
from .fingerprints import alternatives, as_told_now, fingerprint

__all__ = ["Columns", "Encode", "Form", "OnProgress", "Shards", "is_complete", "is_store", "text_of_row"]

Encode = Callable[[PairBatch], Mapping[str, Any]]
Columns = Mapping[str, Tensor | list[bytes]]
OnProgress = Callable[[int, int], None]
"""Called with the pairs that this rank has done, and that it has to do."""

Form = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor the dtype, as safetensors names it, and the shape of one pair's part; None where lengths differ."""

_INDEX = "store.json"
_STAMP = "polydpo_fast"
_TEXT = "text:"  # begins the names of tensors whose rows are texts, filled up with zeros
_MOST_PAIRS, _MOST_SHARDS = 1 << 36, 1 << 24


@dataclass(frozen=True)
class Shards:
    """A folder whose shards may not all be there.

    kind: of the store, with the version of its format. made_with: fingerprints of all that the tensors depend on.
    facts: what else the reader needs to know, as JSON has it.
    """

    folder: Path
    kind: str
    pairs: int
    shard_pairs: int
    made_with: Mapping[str, str]
    facts: Mapping[str, Any]

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        kind: str,
        pairs: int,
        shard_pairs: int,
        parts: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> Shards:
        """A new one, or that which is there, if it is of the same. Raises ValueError where it is not."""
        need("safetensors", what="a store")
        if not is_int(shard_pairs) or shard_pairs < 1:
            raise ValueError(f"shard_pairs is {shard_pairs!r}; expected an int >= 1")
        made_with = {name: fingerprint(part) for name, part in parts.items()}
        own = cls(_place(folder), kind, pairs, shard_pairs, made_with, facts)
        if own.shards > _MOST_SHARDS or pairs > _MOST_PAIRS:
            raise ValueError(f"shard_pairs is {shard_pairs}; expected more, for no more than {_MOST_SHARDS} shards")
        own.folder.mkdir(parents=True, exist_ok=True)
        index = own.folder / _INDEX
        if not index.exists():
            write_atomically(index, json.dumps(own._index(), indent=1).encode())
        # Read back: another rank may have been first, and with other arguments.
        there = cls._read_index(own.folder, kind)
        there.check(**made_with)
        unsaid = sorted(set(there.made_with) - set(made_with))
        if unsaid:
            raise ValueError(f"{folder} was begun with {unsaid[0]} {there.made_with[unsaid[0]]}; expected it again")
        for name in ("pairs", "shard_pairs"):
            if getattr(there, name) != getattr(own, name):
                raise ValueError(f"{name} is {getattr(own, name)}; {folder} was begun with {getattr(there, name)}")
        return there

    @classmethod
    def open(cls, folder: str | os.PathLike[str], kind: str) -> tuple[Shards, Form]:
        """One that is complete, and what all its shards hold.

        Raises SourceError where a shard is missing, damaged, of another store, or unlike the others.
        """
        need("safetensors", what="a store")
        store = cls._read_index(_place(folder), kind)
        missing = store.missing()
        if missing:
            some = ", ".join(store.name(number) for number in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise SourceError(
                f"{folder} is incomplete: {len(missing)} of {store.shards} shards are missing ({some}); what made it "
                "goes on with the same arguments"
            )
        form: Form = {}
        for number in range(store.shards):
            try:
                with store.reading(number) as file:
                    here = store._form(file, number)
                form = form or here
                _compare(here, form)
            except PairError as error:
                raise SourceError(error.reason) from error
            except ValueError as error:
                raise SourceError(f"{store.path(number)}: {error}") from error
        return store, form

    @property
    def shards(self) -> int:
        return -(-self.pairs // self.shard_pairs)

    def name(self, number: int) -> str:
        return f"{number:05d}-of-{self.shards:05d}.safetensors"

    def path(self, number: int) -> Path:
        return self.folder / self.name(number)

    def span(self, number: int) -> tuple[int, int]:
        """The shard's first pair, and the one after its last."""
        return number * self.shard_pairs, min((number + 1) * self.shard_pairs, self.pairs)

    def missing(self) -> list[int]:
        there = set(os.listdir(self.folder))
        return [number for number in range(self.shards) if self.name(number) not in there]

    def check(self, **parts: Any) -> None:
        """Raises ValueError, with both fingerprints, where a part is another than that of the store's making."""
        made_with = as_told_now(self.made_with)
        for name, part in parts.items():
            if name not in made_with:
                known = ", ".join(self.made_with)
                raise ValueError(f"{self.folder} does not say with what {name} it was made; it does of {known}")
            mine = list(alternatives(part))
            if made_with[name] not in mine:
                raise ValueError(
                    f"{self.folder} was made with another {name}: in the store it is {made_with[name]}, "
                    f"here it is {mine[0]}"
                )

    def fill(self, loader: PairLoader, columns: Callable[[PairBatch, int], Columns], progress: OnProgress) -> None:
        """Makes the shards that are missing, of this rank's share.

        columns: a function of a batch and the number of its first pair, that returns tensors and texts, B rows each.
        Rows beyond the shard's end are left out. Every shard begins with a batch of its own, so that what is in it
        depends on neither the ranks nor interruptions. All ranks call it, where torch.distributed has as many.
        """
        mine = self._share(*loader.ranks)
        if not mine:
            return
        size, form, done = loader.batch_size, self._present(), 0
        total = sum(end - begin for begin, end in map(self.span, mine))
        progress(0, total)
        walks = []
        for number in mine:
            begin, end = self.span(number)
            walks += [np.arange(begin, end), np.full(-(end - begin) % size, -1)]
        with contextlib.closing(loader.walk(np.concatenate(walks))) as batches:
            for number in mine:
                begin, end = self.span(number)
                shard = _Columns(end - begin)
                for start in range(begin, end, size):
                    rows = min(size, end - start)
                    shard.add(columns(next(batches), start), rows)
                    done += rows
                    progress(done, total)
                form = self._write(number, shard.tensors(), form)

    def _share(self, rank: int, world_size: int) -> list[int]:
        """Of the missing shards those of a rank: an equal number for each, where they can agree on what is missing."""
        missing = [self.missing()]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() == world_size:
            torch.distributed.broadcast_object_list(missing)  # another may have written some meanwhile
            return missing[0][rank::world_size]
        return [number for number in missing[0] if number % world_size == rank]

    @contextlib.contextmanager
    def reading(self, number: int) -> Any:
        """The opened shard. Whatever is wrong with it is a PairError that names it."""
        from safetensors import SafetensorError, safe_open

        try:
            # Opened each time: a file that has become shorter is noticed, where a kept mapping of it would crash.
            with safe_open(self.path(number), framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise PairError(f"{self.path(number)}: {error}") from error

    def row(self, index: int, form: Form) -> dict[str, Tensor]:
        """A pair's part of each tensor, in memory of its own."""
        number, row = divmod(index, self.shard_pairs)
        with self.reading(number) as file:
            try:
                _compare(self._form(file, number), form)
            except ValueError as error:
                raise PairError(f"{self.path(number)}: {error}") from error
            return {name: file.get_slice(name)[row : row + 1][0].clone() for name in form}

    @classmethod
    def _read_index(cls, folder: Path, kind: str | None = None) -> Shards:
        """kind: which it must be; None for either."""
        path = folder / _INDEX
        try:
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise ValueError(f"it has more than {MAX_RECORD_BYTES} bytes")
            index = parse_json(path.read_bytes())
            found, made_with, facts = index.get("kind"), index.get("made_with"), index.get("facts")
            if kind is not None and found != kind:
                raise ValueError(f"it is of {found!r}; expected {kind!r}")
            pairs, shard_pairs = index.get("pairs"), index.get("shard_pairs")
            if (
                not isinstance(found, str)
                or not isinstance(made_with, dict)
                or not all(isinstance(text, str) for text in made_with.values())
                or not isinstance(facts, dict)
                or type(pairs) is not int
                or type(shard_pairs) is not int
                or not 1 <= pairs <= _MOST_PAIRS
                or not 1 <= shard_pairs <= _MOST_PAIRS
                or pairs > shard_pairs * _MOST_SHARDS
            ):
                raise ValueError("it does not have what it should")
        except OSError as error:
            raise SourceError(f"{folder}: no store{f' of {kind}' if kind else ''} is there: {error}") from error
        except ValueError as error:
            raise SourceError(f"{path}: {error}") from error
        return cls(folder, found, pairs, shard_pairs, made_with, facts)

    def _index(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pairs": self.pairs,
            "shard_pairs": self.shard_pairs,
            "made_with": dict(self.made_with),
            "facts": dict(self.facts),
        }

    def _stamp(self, number: int) -> str:
        text = json.dumps([self.kind, self.pairs, self.shard_pairs, sorted(self.made_with.items()), number])
        return hashlib.sha256(text.encode()).hexdigest()

    def _form(self, file: Any, number: int) -> Form:
        """Raises ValueError where the shard is not this store's, or has another number of pairs."""
        if (file.metadata() or {}).get(_STAMP) != self._stamp(number):
            raise ValueError("it belongs to another store, or to another place in this one")
        begin, end = self.span(number)
        result: Form = {}
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            if not shape or shape[0] != end - begin:
                raise ValueError(f"{name} has shape {shape}; expected {end - begin} rows, one per pair")
            result[name] = part.get_dtype(), () if name.startswith(_TEXT) else shape[1:]
        return dict(sorted(result.items()))

    def _present(self) -> Form:
        """Of a shard that is there, or nothing."""
        absent = set(self.missing())
        for number in range(self.shards):
            if number not in absent:
                with self.reading(number) as file:
                    return self._form(file, number)
        return {}

    def _write(self, number: int, tensors: dict[str, Tensor], form: Form) -> Form:
        from safetensors import deserialize
        from safetensors.torch import save

        rowless = deserialize(save({name: tensor[:0] for name, tensor in tensors.items()}))  # type: ignore[no-untyped-call]
        here = {
            name: (part["dtype"], () if name.startswith(_TEXT) else tuple(part["shape"][1:])) for name, part in rowless
        }
        here = dict(sorted(here.items()))
        _compare(here, form or here)
        for stale in self.folder.glob(part_of(self.path(number), "*").name):  # of a process that was killed
            stale.unlink(missing_ok=True)
        write_atomically(self.path(number), save(tensors, {_STAMP: self._stamp(number)}))
        return here


class _Columns:
    """Those of one shard, filled batch by batch."""

    def __init__(self, pairs: int) -> None:
        self._pairs, self._there = pairs, 0
        self._tensors: dict[str, Tensor] = {}
        self._texts: dict[str, list[bytes]] = {}

    def add(self, columns: Columns, rows: int) -> None:
        """The first rows of each."""
        for name, value in columns.items():
            if isinstance(value, list):
                self._texts.setdefault(_TEXT + name, []).extend(value[:rows])
                continue
            if name not in self._tensors:
                self._tensors[name] = torch.empty((self._pairs, *value.shape[1:]), dtype=value.dtype)
            whole = self._tensors[name]
            if (value.dtype, value.shape[1:]) != (whole.dtype, whole.shape[1:]):
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape[1:])} for a pair; expected "
                    f"{whole.dtype} {tuple(whole.shape[1:])}, as before"
                )
            whole[self._there : self._there + rows] = value[:rows]
        self._there += rows

    def tensors(self) -> dict[str, Tensor]:
        return {**self._tensors, **{name: _packed(texts) for name, texts in self._texts.items()}}


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Of either kind, complete or not."""
    return (_place(folder) / _INDEX).is_file()


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether it is a store, of either kind, that lacks no shard. Raises SourceError where its index is damaged."""
    return is_store(folder) and not Shards._read_index(_place(folder)).missing()


def _place(folder: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(folder)).absolute()  # a program may go to another folder while it is being read


def text_of_row(name: str, row: Mapping[str, Tensor]) -> bytes:
    return row[_TEXT + name].numpy().tobytes().rstrip(b"\0")


def _compare(here: Form, form: Form) -> None:
    for name in sorted(set(here) | set(form)):
        if here.get(name) != form.get(name):
            raise ValueError(f"{name} is {here.get(name)} for a pair; in the other shards it is {form.get(name)}")


def _packed(texts: list[bytes]) -> Tensor:
    result = np.zeros((len(texts), max(1, *map(len, texts))), dtype=np.uint8)
    for row, text in zip(result, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return torch.from_numpy(result)
