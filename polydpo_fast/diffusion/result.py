"""The result of a training: a pipeline that Diffusers loads, or LoRA weights; its files written, and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Settings
from .families import FAMILIES, LORA_FILE, Family
from .pipelines import scheduler_class
from .reference import unwrapped

__all__ = ["load_lora", "load_result", "result_of", "save_lora", "save_rest", "save_result"]


def result_of(accelerator: Any, model: Any, settings: Settings) -> tuple[dict[str, Tensor], Any]:
    """The model's state under its own names, in the main process; and, of all weights, a model that has them.

    All processes call it. A training does so before its first step too: what cannot be saved is said then.
    """
    whole = accelerator.get_state_dict(model) or {}  # DeepSpeed gives the main process alone something
    state = {name.replace("_orig_mod.", ""): value for name, value in whole.items()}  # as if nothing were compiled
    if settings.lora_rank or not accelerator.is_main_process:
        return state, None
    inner = unwrapped(model)
    with torch.device("meta"):  # what is wrapped, patched or sharded for training is not what is saved
        plain = type(inner).from_config(inner.config)
    plain.load_state_dict(state, assign=True)
    return state, plain


def save_result(accelerator: Any, pipe: Any, family: Family, model: Any, settings: Settings, output: Path) -> None:
    """A pipeline that Diffusers loads, or LoRA weights that its `load_lora_weights` does."""
    state, plain = result_of(accelerator, model, settings)
    if accelerator.is_main_process:
        if settings.lora_rank:
            scale = (settings.lora_alpha or settings.lora_rank) / settings.lora_rank
            save_lora(pipe, family, unwrapped(model), state, output, scale=scale)
            if settings.scheduler:
                save_scheduler(pipe, output)
        else:
            plain.save_pretrained(output / family.model)
            save_rest(pipe, family, settings.model, output, variant=settings.variant, revision=settings.revision)
    accelerator.wait_for_everyone()


def save_lora(
    pipe: Any, family: Family, model: Any, state: dict[str, Tensor], folder: Path, *, scale: float = 1.0
) -> None:
    """The adapters among a model's state, as `pipe.load_lora_weights(folder)` takes them.

    scale: lora_alpha / rank. It goes into the weights, because what reads them takes it to be 1.
    """
    from peft.utils import get_peft_model_state_dict

    # PEFT's own names, as Diffusers' scripts of SD3 and FLUX write them. Its older names exist for the attention's
    # projections alone, and of a file with both kinds it loads one.
    layers = get_peft_model_state_dict(model, state_dict=state)
    layers = {name: value * scale if ".lora_B." in name else value for name, value in layers.items()}
    pipe.save_lora_weights(folder, **{f"{family.model}_lora_layers": layers})


def load_lora(family: Family, model: Any, folder: Path, *, scale: float = 1.0) -> None:
    """Gives the model's adapters the values that `save_lora` left in a folder.

    Raises ValueError where they are others, of another rank or other layers.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / LORA_FILE
    if not file.is_file():
        raise ValueError(f"lora_weights is {str(folder)!r}; expected a folder with {LORA_FILE}")
    saved = {name.removeprefix(f"{family.model}."): value for name, value in load_file(file).items()}
    own = get_peft_model_state_dict(model)
    if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in own.items()}:
        raise ValueError(f"{file} has other adapters than this run; expected its lora_rank and lora_targets")
    saved = {name: value / scale if ".lora_B." in name else value for name, value in saved.items()}
    set_peft_model_state_dict(model, saved)


def save_rest(
    pipe: Any, family: Family, model: str, folder: Path, *, variant: str | None = None, revision: str | None = None
) -> None:
    """Makes the folder, which has the trained part, a pipeline that Diffusers loads, without a variant.

    model: the pipeline that was trained, whose other files are copied, so that nothing of them is rounded.
    """
    from diffusers import DiffusionPipeline

    if Path(model).is_dir():
        origin = Path(model)
    else:
        options = {"variant": variant, "revision": revision, **dict.fromkeys(family.left_out)}
        origin = Path(DiffusionPipeline.download(model, **options))
    index = dict(DiffusionPipeline.load_config(origin))
    for name, part in index.items():
        if name == family.model or name == "scheduler" or not name.isidentifier() or not isinstance(part, list):
            continue
        if (origin / name).is_dir():
            _copy(origin / name, folder / name, variant)
        elif part[0] is not None:  # a safety checker that is not there
            index[name] = [None, None]
    save_scheduler(pipe, folder)
    index["scheduler"] = ["diffusers", type(pipe.scheduler).__name__]
    (folder / DiffusionPipeline.config_name).write_text(json.dumps(index, indent=2) + "\n")


def save_scheduler(pipe: Any, folder: Path) -> None:
    pipe.scheduler.save_pretrained(folder / "scheduler")


def load_result(pipe: Any, folder: Path) -> None:
    """Puts what a training left in its folder into a pipeline: LoRA, or a whole model; and its scheduler.

    Raises ValueError where the folder has neither, or both, of which nobody knows which is the later one.
    """
    family = FAMILIES[type(pipe).__name__]
    if (folder / family.model).is_dir() and (folder / LORA_FILE).is_file():
        raise ValueError(f"{folder} has {family.model}/ and {LORA_FILE}, of two runs; expected the result of one")
    if (folder / "scheduler").is_dir():
        config, _ = pipe.scheduler.load_config(folder / "scheduler", return_unused_kwargs=True)
        pipe.scheduler = scheduler_class(config.get("_class_name")).from_config(config)
    if (folder / family.model).is_dir():
        old = getattr(pipe, family.model)
        device, dtype = old.device, old.dtype
        old.to("meta")  # so that there are never two sets of weights in memory
        new = type(old).from_pretrained(folder / family.model, dtype=dtype)
        setattr(pipe, family.model, new.to(device).requires_grad_(False).eval())
    elif (folder / LORA_FILE).is_file():
        pipe.load_lora_weights(folder)
    else:
        raise ValueError(f"{folder} has neither {family.model}/ nor {LORA_FILE}; no result of train")


def _copy(origin: Path, folder: Path, variant: str | None) -> None:
    """The files of a part of a pipeline; those of the variant under names without it, in place of those without."""
    if variant is None or not any(origin.glob(f"*.{variant}[.-]*")):
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(origin.iterdir(), key=lambda one: f".{variant}" in one.name):  # those of the variant at last
        target = folder / file.name.replace(f".{variant}", "")
        if ".index." in file.name:
            target.write_text(file.read_text(encoding="utf-8").replace(f".{variant}", ""), encoding="utf-8")
        elif file.is_file():
            shutil.copyfile(file, target)
