"""The reference's errors ahead of time: training needs no reference in memory, and a step one forward less."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import PairBatch, PairLoader, Source, SourceError
from ..splitmix import mix
from ..values import is_int
from .fingerprints import fingerprint, parts_of, random_options
from .objective import PairObjective
from .shards import Encode, Form, OnProgress, Shards

__all__ = ["ReferenceErrors", "precompute_reference_errors"]

Vary = Callable[[PairBatch, Mapping[str, Any], list[int]], Mapping[str, Any]]

_KIND = "reference errors 1"  # to be raised when noise is drawn in another way


def precompute_reference_errors(
    loader: PairLoader,
    objective: PairObjective,
    encode: Encode,
    folder: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    draws: int = 4,
    seed: int = 0,
    parts: Mapping[str, Any] | None = None,
    shard_pairs: int = 1024,
    vary: Vary | None = None,
    progress: OnProgress = lambda done, total: None,
) -> None:
    """Computes the reference's errors of all pairs at `draws` noises and timesteps each, and stores them.

        precompute_reference_errors(loader, objective, encode, "errors", parts={"vae": vae}, draws=10)
        errors = ReferenceErrors("errors")
        errors.check(model=unet, scheduler=scheduler, source=loader)
        for batch in loader:
            draw = batch.lap % errors.draws
            ref_error, seeds = errors(batch.index, draw), errors.seeds(batch.index, draw)
            loss, metrics = objective(unet, latents, conditioning, seeds=seeds, ref_error=ref_error)

    Each rank of the loader takes its share of the shards; what was interrupted goes on when called again, with any
    number of ranks. A pair's noise and timesteps are functions of the seed, its index and the draw; its errors are the
    same for any number of ranks, but may differ in the last bits with the loader's batch_size, as a model's
    outputs do. Two float64 numbers are stored for each pair and draw, in safetensors: a draw is read without the
    others, without parsing, by a library that checks untrusted headers.

    Pairs that cannot be read or decoded have no errors. A training's loader puts others in their place.

    Args:
        loader: of the pairs. Its source, batch size, ranks, decoding and device are used, its order is not.
        objective: with the reference and the scheduler.
        encode: a function of a batch that returns "latents", (2B, ...), and conditioning as the model takes it. It must
            say the same each time: the mean or the mode of a VAE's distribution.
        folder: local; made if it is not there.
        model: the policy, where the objective's reference is a function of it.
        draws: noises per pair: so many times that it comes it has one of its own, then the first one again.
        parts: what else the errors depend on, to be compared later: {"vae": vae, "text_encoder": text_encoder}.
        shard_pairs: pairs per shard, of which an interruption costs one at the most on each rank.
        vary: a function of a batch, its conditioning, and its seeds in a draw, that returns the conditioning in that
            draw, such as with some prompts dropped. The training has to do the same.
        progress: called with the pairs that this rank has done, and that it has to do.

    Raises:
        ValueError: the loader crops, mirrors or cuts at random, or drops prompts, so that the training would see other
            pixels; encode says something else the second time; an error is not finite; the folder holds errors of
            another model, scheduler, source, transform, seed, or number of draws.
        LoaderError: more pairs are bad than the loader bears. They are read in the source's order, in which those of a
            damaged shard come in a row: with a larger max_bad_run it goes on when called again.
        OSError: the folder cannot be written to.
    """
    if not is_int(draws) or not 1 <= draws <= 1 << 16:
        raise ValueError(f"draws is {draws!r}; expected an int from 1 to {1 << 16}")
    if not is_int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; expected an int from 0 to 2^63 - 1")
    random = random_options(loader)
    if random:
        raise ValueError(f"the loader has {random}; expected nothing random, or cached latents as its source")
    if loader.prompt_dropout > 0:
        raise ValueError(f"the loader has prompt_dropout={loader.prompt_dropout}; expected 0")
    store = Shards.create(
        folder,
        _KIND,
        len(loader.source),
        shard_pairs,
        {
            "model": _reference_fingerprint(objective, model),
            "scheduler": objective.scheduler,
            "timesteps": objective.timestep_options,
            **parts_of(loader),
            "seed": seed,
            "draws": draws,
            **(parts or {}),
        },
        {},
    )
    compared = False

    def columns(batch: PairBatch, first: int) -> dict[str, Tensor]:
        nonlocal compared
        result = torch.full((len(batch), draws, 2), torch.nan, dtype=torch.float64)
        if not batch.ok.any():
            return {"errors": result}
        conditioning = dict(encode(batch))
        latents = conditioning.pop("latents")
        if not compared:
            if not torch.equal(encode(batch)["latents"], latents):
                raise ValueError("encode returned other latents when called again; expected a VAE's mean or mode")
            compared = True
        for draw in range(draws):
            seeds = [mix(seed, draw, index) for index in batch.index.tolist()]
            given = conditioning if vary is None else vary(batch, conditioning, seeds)
            errors = objective.reference_errors(model, latents, given, seeds=seeds)
            result[:, draw] = errors.view(2, -1).T.cpu()
        bad = ~result.isfinite().flatten(1).all(1) & batch.ok.cpu()
        if bad.any():
            row = int(bad.int().argmax())
            raise ValueError(f"the reference's errors of pair {batch.keys[row]!r} are {result[row].tolist()}")
        result[~batch.ok.cpu()] = torch.nan
        return {"errors": result}

    with torch.no_grad():
        store.fill(loader, columns, progress)


class ReferenceErrors:
    """What `precompute_reference_errors` stored in a folder, of all ranks.

    A draw is read when it is asked for, and stays in memory: 16 bytes per pair.

    Raises SourceError where a shard is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._store, form = Shards.open(folder, _KIND)
        try:
            self._seed, self.draws = (int(self._store.made_with[name]) for name in ("seed", "draws"))
        except (KeyError, ValueError):
            raise SourceError(f"{folder}: its index does not tell seed and draws") from None
        expected: Form = {"errors": ("F64", (self.draws, 2))}
        if form != expected:
            raise SourceError(f"{folder}: its shards have {form}; expected {expected}")
        self._loaded: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Pairs."""
        return self._store.pairs

    @property
    def unreadable(self) -> int:
        """How many pairs have no errors, as they could not be read or decoded."""
        return int(np.isnan(self._of(0)).any(axis=1).sum())

    def seeds(self, index: Tensor, draw: int | Tensor) -> list[int]:
        """Of the noise and timesteps of these pairs, (B,) int64: PairObjective's `seeds`. draw: as below."""
        chosen = zip(self._draws_of(index, draw), index.tolist(), strict=True)
        return [mix(self._seed, one, number) for one, number in chosen]

    def __call__(self, index: Tensor, draw: int | Tensor) -> Tensor:
        """The errors of these pairs, (2B,) float64 on the index's device: what PairObjective takes as `ref_error`.

        index: (B,) int64, as `PairBatch.index`; -1 where there is no pair, whose errors are 0.
        draw: 0 to draws - 1, of all or (B,) of each: `batch.lap % errors.draws`.
        Raises IndexError for other numbers, ValueError for a pair that could not be read or decoded.
        """
        numbers, draws = index.cpu().numpy(), np.array(self._draws_of(index, draw))
        wrong = (numbers < -1) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"pair {numbers[wrong][0]} of {len(self)}")
        found = np.zeros((len(numbers), 2))
        for one in np.unique(draws[numbers >= 0]).tolist():
            here = (draws == one) & (numbers >= 0)
            found[here] = self._of(one)[numbers[here]]
        absent = np.isnan(found).any(axis=1)
        if absent.any():
            pair = int(numbers[absent][0])
            shard = self._store.path(pair // self._store.shard_pairs)
            raise ValueError(
                f"pair {pair} has no errors: when they were computed it could not be read or decoded; remove {shard} "
                "and compute them again, which makes that file anew"
            )
        return torch.from_numpy(np.ascontiguousarray(found.T).reshape(-1)).to(index.device)

    def check(
        self,
        *,
        objective: PairObjective | None = None,
        source: PairLoader | Source | None = None,
        **parts: Any,
    ) -> None:
        """Raises ValueError, with both fingerprints, where the errors are of something else.

        objective: of the training, for its scheduler and the density of its timesteps.
        source: the training's, or its loader, whose transform is compared too.
        parts: model, the reference or the policy before its first step (adapters do not count); scheduler; others that
            were given. Or of any of these the text that `fingerprint` gave.
        """
        if objective is not None:
            parts = {"scheduler": objective.scheduler, "timesteps": objective.timestep_options, **parts}
        self._store.check(**parts, **parts_of(source))

    def _draws_of(self, index: Tensor, draw: int | Tensor) -> list[int]:
        draws = torch.as_tensor(draw)
        if draws.shape not in ((), index.shape):
            raise ValueError(
                f"draw has shape {tuple(draws.shape)}; expected that of index, {tuple(index.shape)}, or an int"
            )
        if wrong := [one for one in draws.flatten().tolist() if not 0 <= one < self.draws]:
            raise ValueError(f"draw is {wrong[0]}; expected 0 to {self.draws - 1}, such as batch.lap % draws")
        result: list[int] = draws.expand(index.shape).tolist()
        return result

    def _of(self, draw: int) -> np.ndarray:
        """(pairs, 2)."""
        if draw not in self._loaded:
            result = np.empty((len(self), 2))
            for number in range(self._store.shards):
                begin, end = self._store.span(number)
                with self._store.reading(number) as file:
                    result[begin:end] = file.get_slice("errors")[:, draw].numpy()
            self._loaded[draw] = result
        return self._loaded[draw]


def _reference_fingerprint(objective: PairObjective, model: torch.nn.Module | None) -> str:
    if objective.reference is None:
        raise ValueError("objective has no reference; expected one whose errors are to be computed")
    if isinstance(objective.reference, torch.nn.Module):
        return fingerprint(objective.reference)
    if model is None:
        raise ValueError("model is None; expected the policy, of which the objective's reference is a function")
    with objective.reference(model):
        return fingerprint(model)
