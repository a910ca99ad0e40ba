"""The settings of a training from YAML and from the command line, and back."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .config import TAKEN, Settings
from .extras import need

__all__ = ["meant_by", "read_assignments", "read_settings", "write_settings"]

_PLACES = ("model", "output", "reference_errors", "resume", "lora_weights")  # of data the sources expand a ~
# What Diffusers' DPO scripts call otherwise. Their validation_steps is our validation_every: ours has that name, too.
_OF_SCRIPTS = {
    "adam_weight_decay": "weight_decay",
    "beta_dpo": "beta",
    "checkpointing_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep",
    "dataset_name": "data",
    "gradient_accumulation_steps": "accumulation",
    "loss_type": "objective",
    "lr": "learning_rate",
    "lr_num_cycles": "cycles",
    "lr_power": "power",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup",
    "max_train_steps": "steps",
    "no_hflip": "loader: {hflip: 0}",
    "num_train_epochs": "steps",
    "output_dir": "output",
    "pretrained_model_name_or_path": "model",
    "proportion_empty_prompts": "prompt_dropout",
    "random_crop": "loader: {crop: random}",
    "rank": "lora_rank",
    "report_to": "trackers",
    "resolution": "size",
    "resume_from_checkpoint": "resume",
    "run_validation": "validation_prompts",
    "tracker_name": "project",
    "train_batch_size": "batch_size",
    "train_data_dir": "data",
    "use_8bit_adam": "optimizer: adamw8bit",
    "vae_encode_batch_size": "vae_batch",
}


def read_settings(file: str | os.PathLike[str] | None, **given: Any) -> Settings:
    """The settings of a YAML file, if there is one, with those that are given in their place.

    Of settings that are names and values themselves, such as loader, only the names that are given.

    Raises ValueError for names that are none, and values that are of another type or out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        need("yaml")
        import yaml

        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--config is {str(file)!r}: there is no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {_place_and_reason(error)}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} is a {type(values).__name__}; expected names and values")
    values = _joined(values, given)
    known = {one.name for one in fields(Settings)}
    if unknown := sorted(str(name) for name in set(values) - known):
        close = (meant_by(name) or "".join(get_close_matches(name.replace("-", "_"), known, n=1)) for name in unknown)
        meant = sorted({*close} - {""})
        raise ValueError(f"{', '.join(unknown)}: no setting; expected {', '.join(meant or sorted(known))}")
    if missing := [name for name in ("model", "data") if values.get(name) is None]:
        options, keys = (" and ".join(map(mark.format, missing)) for mark in ("--{}", "{}:"))
        raise ValueError(f"{' and '.join(missing)} not given; expected {options}, or {keys} in the file of --config")
    hints = typing.get_type_hints(Settings)
    values = {name: _of_type(name, value, hints[name]) for name, value in values.items()}
    expanded = {name: os.path.expanduser(values[name]) for name in _PLACES if values.get(name) is not None}
    return Settings(**{**values, **expanded})


def meant_by(name: str) -> str | None:
    """The setting, or its line in YAML, that is meant by a name of Diffusers' scripts, or of an argument of the loader.

    None where none is known."""
    from ..clips import decode_clips
    from ..data import PairLoader
    from ..data.loader_arguments import decode_options
    from ..decode import decode_pairs

    name = name.replace("-", "_").removeprefix("loader.")
    if name in _OF_SCRIPTS or name in {one.name for one in fields(Settings)}:
        return _OF_SCRIPTS.get(name, name)
    own = {one.name for one in inspect.signature(PairLoader).parameters.values() if one.kind is not one.VAR_KEYWORD}
    parts = own | decode_options(decode_pairs) | decode_options(decode_clips)
    return f"loader: {{{name}: ...}}" if name in parts - TAKEN["loader"] else None


def read_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Of NAME=VALUE in YAML, the later in place of the earlier. Raises ValueError for what is neither."""
    need("yaml")
    import yaml

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign:
            raise ValueError(f"--set is {assignment!r}; expected NAME=VALUE")
        try:
            values = _joined(values, {name: yaml.safe_load(value)})
        except yaml.YAMLError as error:
            raise ValueError(f"--set is {assignment!r}, whose value is not YAML: {_place_and_reason(error)}") from error
    return values


def _joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The later in place of the earlier; of names and values, name by name."""
    parts = {
        name: {**earlier[name], **value}
        for name, value in later.items()
        if isinstance(value, Mapping) and isinstance(earlier.get(name), Mapping)
    }
    return {**earlier, **later, **parts}


def _place_and_reason(error: Exception) -> str:
    """In a line, where YAML's own text has six."""
    mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else str(error)


def write_settings(settings: Settings, file: Path) -> None:
    """As YAML that `read_settings` takes."""
    import yaml

    file.write_text(yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """The value as the hint has it. YAML reads 1e-8 as text, and 8 as a whole number."""
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is types.NoneType and value is None:
            return value
        if origin is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is list and isinstance(value, Sequence) and not isinstance(value, str):
            return [_of_type(name, item, arguments[0]) for item in value]
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if origin in (str, bool, int) and type(value) is origin:
            return value
    shown = hint.__name__ if isinstance(hint, type) else str(hint)
    if shown.startswith("dict"):
        shown = "names and values, such as {name: value}"
    raise ValueError(f"{name} is {value!r}; expected {shown}")
