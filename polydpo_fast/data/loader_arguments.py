"""The arguments of `PairLoader`: every check, in one place."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..clips import decode_clips
from ..decode import decode_pairs
from ..values import is_int
from .ready import Ready

__all__ = ["batch_form", "check_arguments", "check_device", "decode_function", "decode_options", "ranks_of"]

_OF_SOURCES = ("ties", "root", "columns", "category", "weight", "memory_bytes")


def check_arguments(
    *, batch_size: Any, shuffle: Any, seed: Any, window: Any, last: Any, prompt_dropout: Any, prefetch: Any,
    readers: Any, timeout_s: Any, max_bad_rate: Any, max_bad_run: Any,
) -> None:  # fmt: skip
    """Raises ValueError for a value that is wrong whatever the source is."""
    for name, count in (("batch_size", batch_size), ("prefetch", prefetch), ("readers", readers)):
        if not is_int(count) or not 1 <= count <= 1 << 16:
            raise ValueError(f"{name} is {count!r}; expected an int from 1 to {1 << 16}")
    for name, share in (("prompt_dropout", prompt_dropout), ("max_bad_rate", max_bad_rate)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"{name} is {share!r}; expected a number from 0 to 1")
    if not isinstance(shuffle, bool):
        raise ValueError(f"shuffle is {shuffle!r}; expected True or False")
    if not is_int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; expected an int from 0 to 2^63 - 1")
    if window is not None and (not is_int(window) or window < 0):
        raise ValueError(f"window is {window!r}; expected a number of blocks, 0 for all pairs, or None")
    if not is_int(max_bad_run) or max_bad_run < 0:
        raise ValueError(f"max_bad_run is {max_bad_run!r}; expected an int >= 0")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds > 0")
    if last not in ("drop", "pad", "wrap"):
        raise ValueError(f"last is {last!r}; expected 'drop', 'pad' or 'wrap'")


def check_device(device: torch.device | str | int | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; expected None, 'cpu', 'cuda', 'cuda:1', ...") from None
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {device!r}; PyTorch finds {count or 'no'} CUDA devices here")
    return found


def ranks_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank!r} and world_size {world_size!r}; expected both or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = _ranks_of_environment()
    if not is_int(rank) or not is_int(world_size):
        raise ValueError(f"rank is {rank!r} and world_size {world_size!r}; expected ints")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank!r}; expected 0 to {world_size - 1} (world_size is {world_size})")
    return rank, world_size


def _ranks_of_environment() -> tuple[int, int]:
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not rank and world_size in ("", "1"):
        return 0, 1
    try:
        return int(rank), int(world_size)
    except ValueError:
        raise ValueError(
            f"the environment has RANK={rank!r} and WORLD_SIZE={world_size!r}; expected two numbers, as torchrun sets "
            "them, or rank= and world_size="
        ) from None


def decode_function(options: Mapping[str, Any]) -> Callable[..., Any]:
    """What the options are for: those of clips have `frames`."""
    return decode_clips if "frames" in options else decode_pairs


def decode_options(function: Callable[..., Any]) -> set[str]:
    """The names of those arguments of a decoder that a loader does not give itself."""
    return set(inspect.signature(function).parameters) - {"win", "lose", "seeds", "out", "on_error"}


def batch_form(options: Mapping[str, Any], ready: Ready | None, batch_size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of a batch's pixels. Raises for wrong options now, which a thread would do later."""
    if ready is not None:
        if options:
            raise TypeError(f"{', '.join(options)}: no argument of PairLoader; the source needs no decoding")
        return (2 * batch_size, *ready.shape), ready.dtype
    function = decode_function(options)
    known = decode_options(function)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: no argument of PairLoader, nor of {function.__name__}, which takes "
            f"{', '.join(sorted(known))}{_hint(unknown)}"
        )
    one = dict(options)
    if "frames" in one:
        one["frames"] = min(1, one["frames"]) if isinstance(one["frames"], int) else one["frames"]
    pixels = function([b""], [b""], on_error="mask", **one).pixels
    shape = [2 * batch_size, *pixels.shape[1:]]
    if "frames" in one:
        shape[1 if one.get("layout") == "TCHW" or one.get("dtype") == "yuv420" else 2] = options["frames"]
    return (*shape,), pixels.dtype


def _hint(unknown: list[str]) -> str:
    """What may have been meant by unknown arguments."""
    if of_source := [name for name in unknown if name in _OF_SOURCES]:
        return f". Options of a source go to open_source: PairLoader(open_source(where, {of_source[0]}=...), ...)"
    if {"num_workers", "workers"}.intersection(unknown):
        return ". Threads do the work here: threads= of them decode, and readers= read"
    return ""
