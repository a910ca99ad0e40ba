"""Pairs on trial: whether they can be read and decoded, and what that costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .formats.media import CLIP_SUFFIXES, suffix_of
from .loader_arguments import decode_function
from .read_ahead import read_ahead
from .source import Pair, PairError, Source

__all__ = ["Problem", "Sample", "check", "decoded", "problem_of", "read", "sample", "sampled_indices", "undecodable"]

_BATCH = 16  # pairs decoded together
# How images, and clips, are decoded: for what it costs; and for damage, which is found outside of a small crop too.
_COSTS = dict(size=1024, threads=1), dict(frames=16, size=(480, 832), short="repeat", threads=1)
_DAMAGE = (
    dict(size=1, resize=None, dtype=torch.uint8),
    dict(frames=16, size=16, short="repeat", dtype=torch.uint8),
)
_BLOCKS = 4  # a sample's, where reading one pair means reading its neighbours
_NAMES = {"jpg": "JPEG", "tif": "TIFF", "webp": "WebP", "webm": "WebM", "mkv": "Matroska", "jp2": "JPEG 2000"}


@dataclass(frozen=True)
class Problem:
    """A pair that cannot be read or decoded. arm: "win", "lose", or None for both or neither."""

    index: int
    key: str
    position: str
    arm: str | None
    reason: str


@dataclass
class Sample:
    """Of some pairs: for each format its files' sizes in bytes, their (height, width) in pixels, and the CPU
    milliseconds that decoding one takes with one thread; and what could not be read or decoded."""

    sizes: dict[str, list[int]] = field(default_factory=dict)
    pixels: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def sampled_indices(source: Source, count: int) -> list[int]:
    """Up to so many pairs, spread over the source; over a few blocks of it where one pair costs a whole block."""
    size = len(source)
    if source.random_access or count >= size:
        return [*map(int, np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64)))]
    blocks = source.blocks
    ends = np.cumsum(blocks)
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(_BLOCKS, count, len(blocks))).astype(np.int64)).tolist()
    shares = [count // len(chosen) + (number < count % len(chosen)) for number in range(len(chosen))]
    return [
        index
        for block, share in zip(chosen, shares, strict=True)
        for index in range(
            int(ends[block] - blocks[block]), int(ends[block] - blocks[block] + min(share, blocks[block]))
        )
    ]


def sample(source: Source, indices: Iterable[int]) -> Sample:
    """Decodes the images to 1024 x 1024, and of clips 16 frames to 480 x 832, each pair by itself."""
    found = Sample()
    for index in indices:
        pair, problems = read(source, index)
        found.problems += problems
        if pair is None:
            continue
        began = time.process_time()
        result = decoded([pair], _COSTS[_is_clip(pair)])
        cpu_ms = (time.process_time() - began) * 1000 / 2
        bad = {error.arm: error.reason for error in result.errors}
        found.problems += [problem_of(source, index, pair.key, arm, reason) for arm, reason in bad.items()]
        for data, shape in zip((pair.win, pair.lose), result.original_size.tolist(), strict=True):
            name = _format(data)
            found.sizes.setdefault(name, []).append(_size(data))
            if not bad:
                found.pixels.setdefault(name, []).append((shape[0], shape[1]))
                found.cpu_ms.setdefault(name, []).append(cpu_ms)
    return found


def check(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, list[Problem]]]:
    """Reads and decodes these pairs whole, of clips 16 frames. Yields, time and again, how many more are done, and what
    is wrong with them."""
    batch: list[tuple[int, Pair]] = []
    for index, pair in read_ahead(source, indices):
        if isinstance(pair, PairError):
            yield 1, [problem_of(source, index, "", pair.arm, pair.reason)]
            continue
        batch.append((index, pair))
        if len(batch) == _BATCH:
            yield len(batch), undecodable(source, batch)
            batch = []
    if batch:
        yield len(batch), undecodable(source, batch)


def read(source: Source, index: int) -> tuple[Pair | None, list[Problem]]:
    """The pair, or what is wrong with it."""
    try:
        return source[index], []
    except PairError as error:
        return None, [problem_of(source, index, "", error.arm, error.reason)]


def problem_of(source: Source, index: int, key: str, arm: str | None, reason: str) -> Problem:
    """key: "" where the pair could not be read. reason: with the position before it or without."""
    position = source.position(index)
    return Problem(index, key, position, arm, reason.removeprefix(f"{position}: "))


def undecodable(source: Source, batch: list[tuple[int, Pair]]) -> list[Problem]:
    """What is wrong with these pairs, by their numbers, when they are decoded whole, of clips 16 frames."""
    problems = []
    for clips in (False, True):
        some = [(index, pair) for index, pair in batch if _is_clip(pair) == clips]
        if not some:
            continue
        result = decoded([pair for _, pair in some], _DAMAGE[clips])
        problems += [
            problem_of(source, some[error.index][0], some[error.index][1].key, error.arm, error.reason)
            for error in result.errors
        ]
    return sorted(problems, key=lambda problem: problem.index)


def decoded(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Any:
    """As `decode_pairs` or `decode_clips` returns them."""
    wins, loses = [pair.win for pair in pairs], [pair.lose for pair in pairs]
    return decode_function(options)(wins, loses, on_error="mask", **options)


def _is_clip(pair: Pair) -> bool:
    return any(isinstance(arm, os.PathLike) or _suffix(arm) in CLIP_SUFFIXES for arm in (pair.win, pair.lose))


def _suffix(data: Any) -> str:
    if isinstance(data, os.PathLike):
        return str(os.fspath(data)).rpartition(".")[2].lower()
    try:
        return suffix_of(data)
    except ValueError:
        return "unknown"


def _format(data: Any) -> str:
    suffix = _suffix(data)
    return _NAMES.get(suffix, suffix.upper() if suffix != "unknown" else suffix)


def _size(data: Any) -> int:
    if isinstance(data, os.PathLike):
        try:
            return os.stat(data).st_size
        except OSError:
            return 0
    return memoryview(data).nbytes
