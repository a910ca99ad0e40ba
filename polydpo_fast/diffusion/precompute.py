"""`polydpo-fast cache` and `polydpo-fast reference`: what a training needs again and again, made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from ..data import LoaderError, PairBatch
from ..splitmix import mix
from .config import Settings
from .fingerprints import fingerprint
from .forward import predict
from .inputs import Inputs
from .latent_store import LatentPairs, cache_latents
from .reference_store import ReferenceErrors, precompute_reference_errors
from .setup import accelerator_of, check_writable, objective_of, set_up
from .shards import OnProgress, is_complete
from .together import check_same, check_shared, of_all, together

__all__ = ["cache", "reference"]


def cache(settings: Settings, folder: Path, *, dtype: torch.dtype | None = None, shard_pairs: int = 128) -> None:
    """Encodes the images and prompts of `settings.data` into a folder that is `settings.data` of a training then.

    dtype, shard_pairs: see `cache_latents`.

    Crops, mirrors and samples of the VAE are drawn once. The processes share the work; what was interrupted goes on.

    Raises ValueError where the folder holds something else, LoaderError where no pair could be read or decoded.
    """
    accelerator = accelerator_of(settings)
    _check_out(accelerator, folder)
    setup = set_up(settings, accelerator, weights=False)
    with together(accelerator):
        inputs = Inputs(settings, setup)
        if inputs.cached:
            raise ValueError(f"data is {settings.data!r}, which is encoded already; expected images or clips")
    inputs.to(accelerator.device, keep_encoders=True)

    def encode(batch: PairBatch) -> dict[str, Tensor]:
        return inputs.encode(batch, [mix(settings.seed, 0, pair) for pair in batch.index.tolist()])

    parts = {**inputs.parts, "seed": settings.seed}
    own = {"--store": dtype, "--shard-pairs": shard_pairs, "data": inputs.loader.source.fingerprint}
    check_same(accelerator, {**parts, **own})
    with _progress(accelerator, "encoding") as told:
        cache_latents(inputs.loader, encode, folder, parts=parts, dtype=dtype, shard_pairs=shard_pairs, progress=told)
    _tell(accelerator, LatentPairs, folder)


def reference(settings: Settings, folder: Path, *, draws: int = 4, shard_pairs: int = 1024) -> None:
    """Computes the reference's errors of `settings.data` into a folder that is `reference_errors` of a training then.

    draws: so many times that a pair comes it has noise and timesteps of its own. shard_pairs: see
    `precompute_reference_errors`.

    The processes share the work; what was interrupted goes on.

    Raises ValueError where the folder holds something else, and where pixels or latents are drawn anew in each epoch;
    LoaderError where no pair could be read or decoded.
    """
    accelerator = accelerator_of(settings)
    _check_out(accelerator, folder)
    setup = set_up(settings, accelerator)
    with together(accelerator):
        inputs = Inputs(settings, setup)
        inputs.check_fixed()
    model = getattr(setup.pipe, setup.family.model)
    models = {"model": fingerprint(model), "model's scheduler": fingerprint(setup.pipe.scheduler)}
    own = {"--draws": draws, "--shard-pairs": shard_pairs, "data": inputs.loader.source.fingerprint}
    check_same(accelerator, {**inputs.parts_of_errors, **models, **own})
    inputs.to(accelerator.device, keep_encoders=False)
    model.to(accelerator.device)

    def forward(model: Any, *inputs: Any) -> Tensor:
        with accelerator.autocast():  # as a training's
            return predict(model, *inputs)

    objective = objective_of(settings, setup.pipe, reference=model, forward=forward)
    with _progress(accelerator, "computing errors") as told:
        precompute_reference_errors(
            inputs.loader,
            objective,
            inputs.encode,
            folder,
            draws=draws,
            seed=settings.seed,
            parts=inputs.parts_of_errors,
            shard_pairs=shard_pairs,
            vary=inputs.conditioning,
            progress=told,
        )
    _tell(accelerator, ReferenceErrors, folder)


def _check_out(accelerator: Any, folder: Path) -> None:
    """Raises ValueError where what is missing could not be written: before the model is loaded."""
    with together(accelerator):
        complete = is_complete(folder)
        if not complete:
            check_writable("out", folder)
    if not all(of_all(accelerator, complete)):
        check_shared(accelerator, "out", folder.expanduser())


def _tell(accelerator: Any, kind: type[LatentPairs] | type[ReferenceErrors], folder: Path) -> None:
    """What the store holds. Raises LoaderError where no pair is in it: a training could do nothing with it."""
    accelerator.wait_for_everyone()
    with together(accelerator):
        if accelerator.is_main_process:
            _tell_of(kind(folder), folder)


def _tell_of(store: LatentPairs | ReferenceErrors, folder: Path) -> None:
    unreadable = store.unreadable  # which reads all of its shards
    text = f"{unreadable} of {len(store)} pairs of {folder} could not be read or decoded"
    if unreadable == len(store):
        raise LoaderError(f"{text}; `polydpo-fast inspect` says why, and {folder} is to be removed before the next try")
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder} is complete: {len(store)} pairs")
    if unreadable:
        note = f"{text}: a training has others in their place; `polydpo-fast inspect --all` says why"
        console.print(note, style="yellow")


@contextmanager
def _progress(accelerator: Any, what: str) -> Iterator[OnProgress]:
    """Of the main process's share."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not accelerator.is_main_process) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
