"""A batch of pairs that DALI decodes, but for those that go through C++: what is told of each, whoever decoded it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...decode import DecodeError, DecodeFailure
from ...decoding.arguments import Request
from .engine import Engine, reason
from .picture import Finish, Placement

__all__ = ["Batch"]


class Batch:
    """What images and clips have in common. ok, original_size, crop_top_left, errors: as the results have them."""

    def __init__(self, engine: Engine, asked: Request, options: dict[str, Any]) -> None:
        self.engine, self.asked, self._options = engine, asked, options
        self.finish = Finish(asked.output, engine.device)
        self.pairs = len(asked.win)
        self.ok = torch.ones(self.pairs, dtype=torch.bool, device="cpu")
        self.original_size = torch.zeros((2 * self.pairs, 2), dtype=torch.int64, device="cpu")
        self.crop_top_left = torch.zeros_like(self.original_size)
        self.errors: tuple[DecodeFailure, ...] = ()

    def rows(self, pairs: Sequence[int]) -> list[int]:
        """Those of the winners, then those of the losers."""
        return [*pairs, *(self.pairs + pair for pair in pairs)]

    def place(self, row: int, placement: Placement) -> None:
        """Of a picture that DALI decoded."""
        self.original_size[row] = torch.tensor(placement.original(), device="cpu")
        self.crop_top_left[row] = torch.tensor(placement.corner(), device="cpu")

    def by_cpp(self, decode: Callable[..., Any], pairs: Sequence[int], **changes: Any) -> Any:
        """What a decoder of C++ makes of these pairs as they were asked for, but for some changed options."""
        asked = self.asked
        seeds = None if asked.seeds[0] is None else [asked.seeds[pair] for pair in pairs]
        options = self._options | dict(seeds=seeds, out=None, on_error="mask") | changes
        return decode([asked.win[pair] for pair in pairs], [asked.lose[pair] for pair in pairs], **options)

    def take(self, pairs: Sequence[int], result: Any) -> None:
        """The pixels of pairs that C++ decoded, and what is told of them."""
        rows = self.rows(pairs)
        for place, row in enumerate(rows):
            self.asked.out[row].copy_(result.pixels[place])
        self.ok[pairs] = result.ok
        self.original_size[rows], self.crop_top_left[rows] = result.original_size, result.crop_top_left
        self.errors = self.renumbered(pairs, result.errors)

    def renumbered(self, pairs: Sequence[int], failures: Iterable[DecodeFailure]) -> tuple[DecodeFailure, ...]:
        """Of some pairs, as failures of the batch."""
        return tuple(DecodeFailure(failure.arm, pairs[failure.index], failure.reason) for failure in failures)

    def warn(self, text: str, error: RuntimeError | None) -> None:
        """Of what DALI should have decoded; as a warning of the line that called the decoder."""
        warnings.warn(f"{text}: {reason(error)}", stacklevel=5)

    def raise_errors(self) -> None:
        """Raises DecodeError, if pairs failed and that is wanted."""
        if self.errors and self.asked.on_error == "raise":
            raise DecodeError(self.errors)

    def flipped(self) -> Tensor:
        return torch.tensor([draw.flipped for draw in self.asked.draws], device="cpu")
