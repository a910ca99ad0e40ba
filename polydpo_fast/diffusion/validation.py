"""What a model in training makes of some prompts, and of pairs that it does not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import PairBatch, Source
from ..splitmix import mix
from .config import Settings
from .families import Family
from .inputs import Inputs
from .latent_store import LatentPairs
from .pixels import sample
from .setup import Setup

__all__ = ["held_out", "measure", "render"]


def held_out(settings: Settings, setup: Setup, source: Source) -> Inputs:
    """The pairs that `measure` takes: in the order of the source, whole prompts, and of images the centre."""
    pairs = min(settings.validation_pairs, len(source))
    # All batches are full, so that the mean of theirs is that of the pairs, whichever process has them.
    size = next((n for n in range(min(settings.batch_size, pairs), 0, -1) if pairs % n == 0), 1)
    loader = {name: value for name, value in settings.loader.items() if name not in ("categories", "window")}
    if not isinstance(source, LatentPairs):  # which were cropped when they were made
        loader = {name: value for name, value in loader.items() if name != "hflip" and value != "random"}
    settings = replace(settings, batch_size=size, prompt_dropout=0.0, loader={**loader, "shuffle": False})
    return Inputs(settings, setup._replace(source=source), last="wrap")


@torch.no_grad()
def measure(
    accelerator: Any,
    inputs: Inputs,
    pairs: int,
    pair_losses: Callable[[PairBatch], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, float]:
    """Loss, accuracy and margin of the first pairs, each with the same noise every time; the processes share the work.

    inputs: as `held_out` made them. A bad pair has the same one in its place every time.
    """
    loader, processes = inputs.loader, accelerator.num_processes
    loader.set_epoch(0)
    batches, rows = min(pairs, len(loader.source)) // loader.batch_size, []
    # Each measures as many: FSDP's processes go through the model together.
    for number, batch in zip(
        range(accelerator.process_index, batches + -batches % processes, processes), loader, strict=False
    ):
        losses, metrics = pair_losses(batch)
        row = torch.stack([losses.mean(), metrics["implicit_accuracy"], metrics["reward_margin"]])
        rows.append(row if number < batches else torch.zeros_like(row))
    means = (accelerator.gather(torch.stack(rows)).double().cpu().sum(0) / batches).tolist()
    names = ("validation_loss", "validation_implicit_accuracy", "validation_reward_margin")
    return dict(zip(names, means, strict=True))


@torch.no_grad()
def render(
    accelerator: Any, pipe: Any, family: Family, settings: Settings, size: tuple[int, int], folder: Path, step: int
) -> None:
    """One sheet of all prompts, each from the same noise every time; the processes share the work."""
    import numpy as np
    from accelerate.utils import gather_object
    from PIL import Image

    rows, count, processes = [], len(settings.validation_prompts), accelerator.num_processes
    # Each renders as many: FSDP's processes go through the model together.
    for number in range(accelerator.process_index, count + -count % processes, processes):
        with accelerator.autocast():
            pixels = sample(
                pipe,
                family,
                [settings.validation_prompts[number % count]],
                size=size,
                frames=settings.loader.get("frames"),
                steps=settings.validation_steps,
                seeds=[mix(settings.seed, number)],
            )
        rows.append((number, pixels[0].numpy()))
    rows = sorted(gather_object(rows))[:count]
    if accelerator.is_main_process:
        if family.video:  # a row of four frames for each prompt
            tiles = [clip[:, at] for _, clip in rows for at in np.linspace(0, clip.shape[1] - 1, 4).round().astype(int)]
            columns = 4
        else:
            tiles = [image for _, image in rows]
            columns = int(np.ceil(np.sqrt(len(tiles))))
        blank = [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
        lines = [np.concatenate((tiles + blank)[i : i + columns], axis=2) for i in range(0, len(tiles), columns)]
        sheet = np.ascontiguousarray(np.concatenate(lines, axis=1).transpose(1, 2, 0))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(folder / f"{step:06d}.png")
        for tracker in accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": sheet[None]}, step=step, **options)
    accelerator.wait_for_everyone()
