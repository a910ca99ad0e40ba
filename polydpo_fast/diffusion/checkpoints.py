"""Checkpoints of a training, and going on from them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..data.formats.fields import parse_json
from .config import Settings
from .families import LORA_FILE
from .fingerprints import as_told_now
from .reference import unwrapped
from .setup import check_writable

__all__ = ["WholeAverages", "check_output", "checkpoint_adapters_only", "resume", "save_checkpoint"]

_ADAPTERS = "adapters.safetensors"
_RUN = "run.json"


def check_output(settings: Settings) -> Path | None:
    """The checkpoint that the run is to go on from, if there is one.

    Raises ValueError where the output folder has what another run left, and this one does not go on from it.

    Two results in one folder would be mixed up: what loads it takes whatever weights, LoRA and scheduler are there.
    """
    output = Path(settings.output)
    check_writable("output", output)
    checkpoint = _resumed(settings, output)
    goes_on = checkpoint is not None and checkpoint.parent.resolve() == output.resolve()
    left = [name for name in ("unet", "transformer", LORA_FILE) if (output / name).exists()]
    if left and not goes_on:
        raise ValueError(
            f"{output} has {left[0]}, and no checkpoint that this run goes on from: it is the result of another run; "
            "expected another --output"
        )
    return checkpoint


def save_checkpoint(accelerator: Any, output: Path, step: int, settings: Settings, run: Mapping[str, Any]) -> None:
    """Under another name until it is whole: what a crash leaves behind is never resumed from.

    run: what `resume` compares, by name.
    """
    folder, partial = output / f"checkpoint-{step}", output / f"partial-checkpoint-{step}"
    keep, number = settings.keep, 0
    if accelerator.is_main_process:
        number = max(map(_number, _checkpoints(output)), default=0) + 1
        for stale in output.glob("partial-checkpoint-*"):  # of a process that was killed
            _remove(stale)
        _remove(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        told = {"number": number, "steps": settings.steps, "settings": dict(run)}
        (partial / _RUN).write_text(json.dumps(told, default=str) + "\n", encoding="utf-8")
        for file in filter(Path.is_file, partial.rglob("*")):  # on the disk before older checkpoints are removed
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        partial.rename(folder)
        for old in _checkpoints(output)[: -keep or None] if keep else ():
            _remove(old)
    accelerator.wait_for_everyone()


def _remove(checkpoint: Path) -> None:
    """Of a link the link alone. What cannot be removed now, as a file that is open on NFS, ends no training."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(output: Path) -> list[Path]:
    """As they were written, which need not be the order of their steps: a run may have gone on from an older one."""
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: (_number(path), _step_of(path)))


def _told(checkpoint: Path) -> dict[str, Any]:
    """Empty where an earlier version wrote the checkpoint."""
    file = checkpoint / _RUN
    try:
        result: dict[str, Any] = parse_json(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return result


def _number(checkpoint: Path) -> int:
    """Counted, not timed: copies of files may have other times."""
    return int(_told(checkpoint).get("number", 0))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _resumed(settings: Settings, output: Path) -> Path | None:
    """The checkpoint that a run is to go on from, if there is one."""
    found = _checkpoints(output)
    if settings.resume is None:
        if found:
            raise ValueError(f"{output} has checkpoints of another run; expected --resume latest, or another --output")
        return None
    if settings.resume == "latest":  # none yet: so that a job that is started again and again has one command
        return found[-1] if found else None
    checkpoint = Path(settings.resume)
    if not checkpoint.is_dir() or not checkpoint.name.removeprefix("checkpoint-").isdecimal():
        raise ValueError(f"resume is {settings.resume!r}; expected 'latest', or a folder checkpoint-STEP")
    return checkpoint


def resume(accelerator: Any, settings: Settings, checkpoint: Path | None, run: Mapping[str, Any]) -> int:
    """Loads the checkpoint, if there is one to be loaded, and returns the steps that it has behind it.

    Raises ValueError where it is of a run that was begun otherwise than `run` says, of a later step than the settings'
    last one, damaged, or not that of the other processes.
    """
    from accelerate.utils import gather_object
    from safetensors import SafetensorError

    steps = gather_object([0 if checkpoint is None else _step_of(checkpoint)])
    if len(set(steps)) > 1:  # they would train apart, and sum their gradients
        raise ValueError(
            f"output is {settings.output!r}, where the processes find checkpoints of steps "
            f"{', '.join(map(str, steps))} (0: none); expected a folder that all of them share"
        )
    if checkpoint is None:
        return 0
    told = _told(checkpoint)
    had, here = as_told_now(told.get("settings", {})), json.loads(json.dumps(dict(run), default=str))
    for name in [name for name in here if name in had]:
        if here[name] != had[name]:
            raise ValueError(
                f"{name} is {here[name]!r}; the run of {checkpoint} was begun with {had[name]!r}: expected it again, "
                "or another --output without --resume"
            )
    step = _step_of(checkpoint)
    if step > settings.steps:
        raise ValueError(
            f"steps is {settings.steps}, and {checkpoint} is of step {step}; expected {step} steps or more"
        )
    if not settings.schedule.startswith("constant") and told.get("steps", settings.steps) != settings.steps:
        warnings.warn(
            f"steps is {settings.steps}, and was {told['steps']} when {checkpoint} was written: the learning rate of "
            f"schedule {settings.schedule!r} goes on as if it had been {settings.steps} all the time",
            stacklevel=2,
        )
    try:
        accelerator.load_state(str(checkpoint))
    except (RuntimeError, LookupError, EOFError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged, or of another model: {error}") from error
    return step


def checkpoint_adapters_only(accelerator: Any) -> None:
    """The other weights are those of the pipeline."""
    from safetensors.torch import load_file, save_file

    def trained(model: Any) -> dict[str, Tensor]:
        named = unwrapped(model).named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if weights:  # FSDP and DeepSpeed have written them already
            weights.clear()
            if accelerator.is_main_process:
                tensors = {name: parameter.detach().contiguous() for name, parameter in trained(models[0]).items()}
                save_file(tensors, Path(folder) / _ADAPTERS)

    def load(models: list[Any], folder: str) -> None:
        file = Path(folder) / _ADAPTERS
        if file.exists():
            saved, own = load_file(file), trained(models.pop())
            shapes = {name: tensor.shape for name, tensor in saved.items()}
            if shapes != {name: parameter.shape for name, parameter in own.items()}:
                raise ValueError(f"{file} has other adapters than this run; expected its lora_rank and lora_targets")
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class WholeAverages:
    """The state of averages for checkpoints: whole ones, also of weights that FSDP2 shards, so that any number of
    processes may go on from it. All of them ask for it, and load it.
    """

    def __init__(self, ema: Any) -> None:
        self._ema = ema

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._ema.state_dict()
        # On the CPU, so that the device has one of them whole at a time.
        whole = [x.full_tensor().cpu() if hasattr(x, "full_tensor") else x for x in state["shadow_params"]]
        return {**state, "shadow_params": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.tensor import distribute_tensor

        own, saved = self._ema.shadow_params, state.pop("shadow_params")
        if [x.shape for x in own] != [x.shape for x in saved]:
            raise ValueError("the averages are of other weights than this run's")
        self._ema.load_state_dict(state)
        with torch.no_grad():
            for average, whole in zip(own, saved, strict=True):
                whole = whole.to(average.device)
                if hasattr(average, "full_tensor"):
                    whole = distribute_tensor(whole, average.device_mesh, average.placements)
                average.copy_(whole)
