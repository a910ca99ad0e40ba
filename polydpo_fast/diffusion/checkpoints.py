"""What a training leaves in its folder: checkpoints to go on from, and the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..data.fields import parse_json
from .config import Settings
from .families import Family, save_lora, save_rest, save_scheduler
from .reference import unwrapped

__all__ = ["checkpoint_adapters_only", "resume", "save_checkpoint", "save_result"]

_ADAPTERS = "adapters.safetensors"
_RUN = "run.json"


def save_checkpoint(accelerator: Any, output: Path, step: int, keep: int, run: Mapping[str, Any]) -> None:
    """Under another name until it is whole: what a crash leaves behind is never resumed from.

    keep: the number of those written last that are kept; 0 for all. run: what `resume` compares, by name.
    """
    folder, partial = output / f"checkpoint-{step}", output / f"partial-checkpoint-{step}"
    number = 0
    if accelerator.is_main_process:
        number = max(map(_number, _checkpoints(output)), default=0) + 1
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        told = {"number": number, "settings": dict(run)}
        (partial / _RUN).write_text(json.dumps(told, default=str) + "\n", encoding="utf-8")
        partial.rename(folder)
        for old in _checkpoints(output)[: -keep or None] if keep else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(output: Path) -> list[Path]:
    """As they were written, which need not be the order of their steps: a run may have gone on from an older one."""
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: (_number(path), _step_of(path)))


def _told(checkpoint: Path) -> dict[str, Any]:
    """Nothing where an earlier version wrote it."""
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


def resume(accelerator: Any, settings: Settings, output: Path, run: Mapping[str, Any]) -> int:
    """Loads the checkpoint, if there is one to be loaded, and returns the steps that it has behind it.

    Raises ValueError where it is of a run that was begun otherwise than `run` says, of a later step than the settings'
    last one, or damaged.
    """
    from safetensors import SafetensorError

    found = _checkpoints(output)
    if settings.resume is None:
        if found:
            raise ValueError(f"{output} has checkpoints of another run; expected --resume latest, or another --output")
        return 0
    if settings.resume == "latest":
        if not found:  # so that a job that is started again and again has one command
            return 0
        checkpoint = found[-1]
    else:
        checkpoint = Path(settings.resume)
        if not checkpoint.is_dir() or not checkpoint.name.removeprefix("checkpoint-").isdecimal():
            raise ValueError(f"resume is {settings.resume!r}; expected 'latest', or a folder checkpoint-STEP")
    had, here = _told(checkpoint).get("settings", {}), json.loads(json.dumps(dict(run), default=str))
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


def save_result(accelerator: Any, pipe: Any, family: Family, model: Any, settings: Settings, output: Path) -> None:
    """A pipeline that Diffusers loads, or LoRA weights that its `load_lora_weights` does."""
    state = {name.removeprefix("_orig_mod."): value for name, value in accelerator.get_state_dict(model).items()}
    if accelerator.is_main_process:
        inner = unwrapped(model)
        if settings.lora_rank:
            save_lora(pipe, family, inner, state, output)
            if settings.scheduler:
                save_scheduler(pipe, output)
        else:
            with torch.device("meta"):  # what is wrapped, patched or sharded for training is not what is saved
                plain = type(inner).from_config(inner.config)
            plain.load_state_dict(state, assign=True)
            plain.save_pretrained(output / family.model)
            save_rest(pipe, family, settings.model, output)
    accelerator.wait_for_everyone()
