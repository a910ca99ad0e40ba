"""What is to be done in an epoch: for all of its batches, and step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..splitmix import mix
from .ledger import Ledger
from .order import Order
from .source import Source

__all__ = ["Plan", "Step"]


@dataclass(frozen=True)
class Step:
    """One batch of one rank. positions: (B,), of the epoch; at or beyond its length where there is no pair."""

    positions: np.ndarray
    end: int  # the position of the epoch that all ranks have reached after it


@dataclass(frozen=True)
class Plan:
    """What stays the same for all batches of an epoch."""

    source: Source
    order: Order
    seed: int
    epoch: int
    rank: int
    decode: Callable[..., Any]  # decode_pairs or decode_clips, or DALI's, with the user's options
    options: Mapping[str, Any]  # of the decoder, as the ledger has them
    clips: bool
    replace_bad: bool  # or leave their places empty
    batch_shape: tuple[int, ...]  # of the pixels
    dtype: torch.dtype
    prompt_dropout: float
    device: torch.device | None
    prefetch: int
    readers: int
    timeout_s: float
    max_bad_rate: float
    max_bad_run: int
    ledger: Ledger

    def seed_at(self, position: int) -> int:
        """The seed of what is drawn for the pair at a position: crop, mirror, start."""
        return mix(self.seed, self.epoch, position) >> 1

    def drops_prompt_at(self, position: int) -> bool:
        return mix(self.seed, self.epoch, position, 2**32) / 2**64 < self.prompt_dropout
