"""The settings of a training as options of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import torch
import typer
from typer.core import TyperCommand

from ..data import LoaderError
from ..diffusion.config import Settings
from ..diffusion.settings_file import meant_by, read_assignments, read_settings
from .errors import failed, said

__all__ = ["SETTINGS", "TakesSettings", "takes_settings", "training"]

SETTINGS = {
    "model": "Folder or hub id of a Diffusers pipeline",
    "data": "Pairs: file, glob, folder or URL; or a folder made by `cache`",
    "reference_errors": "Folder made by `reference`; then no reference model is run",
    "output": "Folder of the result, checkpoints and metrics",
    "size": "Side in pixels (default: the model's own)",
    "batch_size": "Pairs per process and forward pass",
    "accumulation": "Forward passes per optimizer step",
    "steps": "Optimizer steps",
    "alpha": "Poly-DPO's alpha, above 0 for noisy labels; 0 is Diffusion-DPO",
    "beta": "Pull to the reference, with Diffusion-DPO's 1/2 (default: 5000; flow matching: give 100 to 2000)",
    "objective": "poly_dpo, robust, ipo, hinge or linear",
    "lora_rank": "Train LoRA adapters of this rank; 0 trains all weights",
    "optimizer": "adamw, adamw8bit, paged_adamw8bit or adafactor",
    "learning_rate": "After warmup (default: 1e-5 for LoRA, else 1e-8 per pair of a step)",
    "warmup": "Steps of linear warmup",
    "mixed_precision": "no, fp16 or bf16 (default: what `accelerate` is configured for)",
    "gradient_checkpointing": "Recompute activations in backward: less memory, more time",
    "ema": "Decay of the averaged weights; 0 for none",
    "checkpoint_every": "Steps between checkpoints; 0 for none",
    "keep": "Number of checkpoints to keep; 0 for all",
    "resume": "Resume from 'latest', or from the folder of a checkpoint",
    "validation_prompts": "Prompt to render into a grid of images; may be repeated",
    "validation_data": "Pairs to measure that are not trained on; as --data",
    "validation_every": "Steps between two grids or measurements; 0 for none but the last",
    "trackers": "tensorboard, wandb; may be repeated",
    "seed": "Random seed",
}
"""Of the settings that are options too."""
_TYPES = get_type_hints(Settings)
_DEFAULTS = {one.name: one.default for one in fields(Settings)}

_LESS_MEMORY = (
    "Less is taken by --gradient-checkpointing, a smaller --batch-size with more --accumulation, latents made ahead "
    "(`polydpo-fast cache`), --optimizer adamw8bit, --lora-rank"
)


class TakesSettings(TyperCommand):
    """A command that says which option, or setting, is meant by one that it does not have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for one in self.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
        for word in args:
            option = word.partition("=")[0]
            if not option.startswith("--") or option == "--" or option in known:
                continue
            name, _, value = (meant_by(option[2:]) or "").partition(": ")
            own = f"--{name.replace('_', '-')}"
            if name:
                expected = f"{own} {value}".rstrip() if own in known else f"--set '{name}={value or '...'}'"
                raise failed(f"{option}: no option; expected {expected}")
        return super().parse_args(ctx, args)


def takes_settings(*names: str, **helps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these of the settings as options, and --config and --set; they arrive by keyword.

    helps: of settings that mean something of their own to this command.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for one in signature(command, eval_str=True).parameters.values() if one.kind is not one.VAR_KEYWORD]
        taken = [name for name in SETTINGS if name in {*names, *helps}]
        options = {
            "config": (Path, typer.Option(help="YAML file of settings; options on the command line win.")),
            **{name: _option(name, helps.get(name, SETTINGS[name])) for name in taken},
            "assign": (list[str], typer.Option("--set", help="NAME=VALUE of any setting, in YAML; may be repeated.")),
        }
        given = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
            for name, (kind, option) in options.items()
        ]
        # The help shows them in this order: what every call needs, and then the command's own options.
        arguments, own_options = ([one for one in own if (one.kind is one.KEYWORD_ONLY) == so] for so in (False, True))
        command.__signature__ = Signature([*arguments, *given, *own_options])  # type: ignore[attr-defined]
        return command

    return decorated


def _option(name: str, text: str) -> tuple[Any, Any]:
    """The type of a setting's option, and what is said of it. The option itself has no default, so that a file of
    settings can say otherwise."""
    kinds = get_args(_TYPES[name]) if isinstance(_TYPES[name], UnionType) else (_TYPES[name],)
    default: Any = _DEFAULTS[name]
    if default not in (None, MISSING):
        told = "off" if default is False else f"{default:g}" if isinstance(default, (int, float)) else default
        text = f"{text} (default {told})"
    return list[str] if list[str] in kinds else kinds[0], typer.Option(help=f"{text}.")


@contextmanager
def training(options: dict[str, Any]) -> Iterator[Settings]:
    """The settings that a command was given. What goes wrong is said in a line."""
    given = {name: value for name, value in options.items() if value is not None and value not in ([], ())}
    config, assign = given.pop("config", None), given.pop("assign", ())
    out_of_memory = said(torch.OutOfMemoryError, code=1, more=_LESS_MEMORY)
    with said(), said(ArithmeticError, LoaderError, code=1), out_of_memory:
        yield read_settings(config, **{**given, **read_assignments(assign)})
