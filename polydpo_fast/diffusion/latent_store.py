"""Latents and text embeddings, encoded once: a source of pairs that need neither images nor encoders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data import Pair, PairBatch, PairError, PairLoader, Source, SourceError
from ..data.formats.fields import parse_json
from ..data.ready import Ready, ReadyPair
from ..data.source import fingerprint_of
from .fingerprints import parts_of, random_options
from .shards import Columns, Encode, Form, OnProgress, Shards, text_of_row

__all__ = ["LatentPairs", "cache_latents"]

_KIND = "latents 1"
_EXTRA = "extra."
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_FIXED: Form = {
    "category": ("I64", ()),
    "crop_top_left": ("I64", (2, 2)),
    "flipped": ("BOOL", ()),
    "ok": ("BOOL", ()),
    "original_size": ("I64", (2, 2)),
    "text:record": ("U8", ()),
    "weight": ("F32", ()),
}


def cache_latents(
    loader: PairLoader,
    encode: Encode,
    folder: str | os.PathLike[str],
    *,
    parts: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    shard_pairs: int = 128,
    progress: OnProgress = lambda done, total: None,
) -> None:
    """Encodes the images and prompts of all pairs once, into safetensors shards that `LatentPairs` reads.

        images = PairLoader("pairs/", 8, size=512, device="cuda")
        cache_latents(images, encode, "latents", parts={"vae": vae, "text_encoder": clip})
        latents = LatentPairs("latents")
        latents.check(vae=vae, text_encoder=clip, source=images)
        for batch in PairLoader(latents, 8):  # pixels: (2B, 4, 64, 64); extra["encoder_hidden_states"]: (B, 77, 768)

    Each rank of the loader takes its share of the shards; what was interrupted goes on when called again, with any
    number of ranks. Pairs that cannot be read or decoded are kept as such: a training's loader replaces them, as it
    replaces those of the images, and the order stays theirs.

    Args:
        loader: of the images. Its source, batch size, ranks, decoding and device are used, its order is not. Random
            crops and mirrors are drawn once per pair, from the loader's seed.
        encode: a function of a batch that returns tensors: "latents", (2B, ...), and conditioning of any names, B rows
            each, of equal shapes for all pairs.
        folder: local; made if it is not there.
        parts: what the tensors depend on, to be compared later: models, and whatever JSON can tell.
        dtype: of what is stored of floating tensors; None for that in which they come.
        shard_pairs: pairs per shard. So many are held in memory, twice while they are written, and so many are encoded
            again after an interruption, at the most.
        progress: called with the pairs that this rank has encoded, and that it has to encode.

    Raises:
        ValueError: encode returns something else; the folder holds latents of another VAE, source, transform or dtype.
        TypeError: a further column of the source has a value that JSON cannot tell.
        LoaderError: more pairs are bad than the loader bears. They are read in the source's order, in which those of a
            damaged shard come in a row: with a larger max_bad_run it goes on when called again.
        OSError: the folder cannot be written to.
    """
    random = random_options(loader)
    names, codes = loader.source.categories
    store = Shards.create(
        folder,
        _KIND,
        len(loader.source),
        shard_pairs,
        {
            **parts_of(loader),
            "dtype": dtype or "as encoded",
            **({"seed": loader.seed} if random else {}),
            **parts,
        },
        {"blocks": loader.source.blocks.tolist(), "categories": list(names)},
    )

    def columns(batch: PairBatch, first: int) -> Columns:
        pairs = len(batch)
        encoded = dict(encode(batch))
        if "latents" not in encoded:
            raise ValueError(f"encode returned {', '.join(encoded) or 'nothing'}; expected latents among them")
        result: dict[str, Tensor] = {}
        for name, tensor in encoded.items():
            rows = 2 * pairs if name == "latents" else pairs
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != rows:
                shape = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"encode returned {name} {shape}; expected a tensor of {rows} rows")
            if tensor.is_floating_point():
                tensor = tensor.to(dtype or tensor.dtype)
            if name == "latents":
                result[name] = _by_pair(tensor)
            else:
                result[_EXTRA + name] = tensor.cpu()
        here = np.clip(np.arange(first, first + pairs), 0, len(codes) - 1)
        result |= {
            "original_size": _by_pair(batch.original_size),
            "crop_top_left": _by_pair(batch.crop_top_left),
            "flipped": batch.flipped,
            "ok": batch.ok,
            "weight": batch.weight,
            "category": torch.from_numpy(codes[here].astype(np.int64)),
        }
        return {**result, "record": [_record(batch, row, encoded) for row in range(pairs)]}

    with torch.no_grad():
        store.fill(loader, columns, progress)


class LatentPairs(Source):
    """What `cache_latents` stored in a folder: `PairLoader(LatentPairs(folder), 8)` needs no decoding.

    A batch's `pixels` are the latents, (2B, ...); its `extra` has the conditioning as tensors, (B, ...). All else is as
    the loader of the images has it: keys, prompts, weights, categories, sizes for SDXL, and, with the same seed and
    window, the order. No memory per pair.

    Raises SourceError where a shard is missing, damaged or unlike the others.
    """

    kind: ClassVar[str] = "latents"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._store, self._form = Shards.open(folder, _KIND)
        wrong = {name: self._form.get(name) for name, form in _FIXED.items() if self._form.get(name) != form}
        dtype, shape = self._form.get("latents", ("", ()))
        if wrong or dtype not in _DTYPES or len(shape) < 2 or shape[0] != 2:
            raise SourceError(f"{folder}: its shards have {self._form}; expected latents, and {_FIXED}")
        blocks, names = (self._store.facts.get(name) for name in ("blocks", "categories"))
        if (
            not isinstance(blocks, list)
            or not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) for name in names)
            or not all(type(block) is int and 0 <= block <= len(self) for block in blocks)
            or sum(blocks) != len(self)
        ):
            raise SourceError(f"{folder}: its index has other blocks or categories than it should")
        self._blocks, self._names = np.array(blocks, dtype=np.int64), (*names,)
        conditioning = tuple(name.removeprefix(_EXTRA) for name in self._form if name.startswith(_EXTRA))
        self._ready = Ready(shape[1:], _DTYPES[dtype], conditioning)

    def __len__(self) -> int:
        return self._store.pairs

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = self._store.row(index, self._form)
        if not row["ok"]:
            raise PairError("it could not be read or decoded when its latents were to be made")
        try:
            record = parse_json(text_of_row("record", row))
            category = self._names[int(row["category"])] if row["category"] >= 0 else ""
            return ReadyPair(
                key=str(record["key"]),
                win=b"",
                lose=b"",
                prompt=str(record["prompt"]),
                weight=float(row["weight"]),
                category=category,
                extra={
                    **dict(record["extra"]),
                    **{name.removeprefix(_EXTRA): row[name] for name in row if name.startswith(_EXTRA)},
                },
                pixels=row["latents"],
                original_size=row["original_size"],
                crop_top_left=row["crop_top_left"],
                flipped=bool(row["flipped"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PairError(f"{self.position(index)}: its record is damaged: {error}") from error

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.kind, [self._store.kind, sorted(self._store.made_with.items()), self._form])

    def position(self, index: int) -> str:
        number, row = divmod(index, self._store.shard_pairs)
        return f"{self._store.path(number)}: row {row}"

    @property
    def blocks(self) -> np.ndarray:
        """Those of the images' source."""
        return self._blocks

    @property
    def categories(self) -> tuple[tuple[str, ...], np.ndarray]:
        codes = np.empty(len(self), dtype=np.int64)
        for number in range(self._store.shards):
            begin, end = self._store.span(number)
            with self._store.reading(number) as file:
                codes[begin:end] = file.get_slice("category")[:].numpy()
        if ((codes < 0) | (codes >= len(self._names))).any():
            raise SourceError(f"{self._store.folder}: a category has a number beyond {len(self._names) - 1}")
        return self._names, codes.astype(np.min_scalar_type(len(self._names) - 1))

    @property
    def counts(self) -> Mapping[str, int]:
        return {"shards": self._store.shards, "pairs": len(self)}

    @property
    def unreadable(self) -> int:
        """How many pairs could not be read or decoded when their latents were to be made."""
        there = 0
        for number in range(self._store.shards):
            with self._store.reading(number) as file:
                there += int(file.get_slice("ok")[:].sum())
        return len(self) - there

    @property
    def ready(self) -> Ready:
        return self._ready

    def check(self, *, source: PairLoader | Source | None = None, **parts: Any) -> None:
        """Raises ValueError, with both fingerprints, where the latents are of something else.

        source: of the images, or its loader, whose transform is compared too. parts: those that were given: vae=...
        """
        self._store.check(**parts, **parts_of(source))


def _by_pair(rows: Tensor) -> Tensor:
    """(2B, ...) to (B, 2, ...) on the CPU."""
    return rows.detach().cpu().view(2, -1, *rows.shape[1:]).transpose(0, 1)


def _record(batch: PairBatch, row: int, encoded: Mapping[str, Any]) -> bytes:
    extra = {name: column[row] for name, column in batch.extra.items() if not isinstance(column, Tensor)}
    twice = sorted(set(extra) & set(encoded))
    if twice:
        raise ValueError(f"encode returned {twice[0]}, which is a column of the source; expected another name")
    try:
        return json.dumps({"key": batch.keys[row], "prompt": batch.prompts[row], "extra": extra}).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"pair {batch.keys[row]!r} has a column that JSON cannot tell: {error}") from error
