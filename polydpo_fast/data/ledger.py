"""What went wrong with which pair, in a file that only grows."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..limits import ClipLimits, DecodeLimits

__all__ = ["Ledger", "options_as_json", "options_of_json", "read_ledger"]


class Ledger:
    """Appends one line of JSON per bad pair, each in a single write, so that a machine's ranks and workers may share
    the file. (Over NFS those of two machines may overwrite each other's.)

    A line has: time (UTC, ISO 8601), key, arm ("win", "lose" or null), position (file and row), index (in the
    source), error (class), reason (text), and what else is given: a loader adds epoch, step_position, rank, the
    source's fingerprint (`source`) and how the pair was to be decoded (`decode`). A disk that is full, or a folder
    that is gone later, is a warning, once: the training matters more. ValueError where there is no such folder at the
    beginning. What is written after a line that was cut off begins on a line of its own.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path, self._warned = None, False
        if path is None:
            return
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"ledger is a {type(path).__name__}; expected a path or None")
        self._path = os.path.abspath(os.path.expanduser(path))  # a training may change its folder
        if not os.path.isdir(os.path.dirname(self._path)):
            raise ValueError(f"ledger is {os.fspath(path)!r}; its folder does not exist")
        if os.path.isdir(self._path):
            raise ValueError(f"ledger is {os.fspath(path)!r}, a folder; expected a file")

    @property
    def is_kept(self) -> bool:
        return self._path is not None

    def add(self, **facts: Any) -> None:
        if self._path is None:
            return
        line = json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts}, default=str)
        data = line.encode("ascii") + b"\n"
        try:
            # Opened each time: bad pairs are rare, and no descriptor is shared with other processes.
            handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    data = b"\n" + data
                if os.write(handle, data) != len(data):
                    raise OSError("there is no room for a whole line")
            finally:
                os.close(handle)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"bad pairs cannot be written to {self._path}: {error}", RuntimeWarning, stacklevel=2)


def read_ledger(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """The lines, but for those that a crash or a full disk cut off. Raises OSError where there is no such file."""
    with open(path, "rb") as file:
        for line in file:
            try:
                facts = json.loads(line)
            except (ValueError, RecursionError):  # the latter for what is nested without end
                continue
            if isinstance(facts, dict):
                yield facts


# Options of the decoder that do not matter for whether a pair decodes.
_NOT_KEPT = ("threads", "cache")


def options_as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder's options as JSON can hold them."""
    return {name: _as_json(value) for name, value in options.items() if name not in _NOT_KEPT}


def options_of_json(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The options again. Raises ValueError or TypeError for what `options_as_json` did not make."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    if isinstance(dtype := options.get("dtype"), str) and dtype != "yuv420":
        options["dtype"] = getattr(torch, dtype, dtype)
    if isinstance(fps := options.get("fps"), str):
        options["fps"] = Fraction(fps)
    if isinstance(limits := options.get("limits"), Mapping):
        options["limits"] = (ClipLimits if "frames" in options else DecodeLimits)(**limits)
    return options


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Fraction):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return [_as_json(one) for one in value] if isinstance(value, (tuple, list)) else value
