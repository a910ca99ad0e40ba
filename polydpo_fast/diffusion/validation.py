"""Pictures of what a model in training makes of some prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..splitmix import mix
from .config import Settings
from .families import Family
from .pixels import sample

__all__ = ["render"]


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
