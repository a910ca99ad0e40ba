"""What a loader yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["PairBatch"]


@dataclass(frozen=True)
class PairBatch:
    """B pairs. Rows of what is per image are [winners; losers], the halves layout of the loss.

    pixels: (2B, 3, H, W), or of clips (2B, 3, T, H, W), as `decode_pairs` and `decode_clips` give them; or latents,
        (2B, ...), of a source that has those.
    prompts: B texts; "" where the prompt was dropped.
    keys: B names of the pairs in their source; "" where there is no pair (last="pad").
    index: (B,) int64, the numbers of the pairs in their source; -1 where there is none.
    lap: (B,) int64, how many times the pair comes before, in this epoch and all earlier ones: the number of the epoch,
        but with `categories`, where a pair may come several times in one. 0 where there is none.
    weight: (B,) float32; 0 where there is no pair: give it to the loss as `pair_weight`.
    category: B texts.
    ok: (B,) bool; False where there is no pair, whose pixels are zeros then.
    original_size, crop_top_left: (2B, 2) int64, SDXL's size conditioning.
    flipped: (B,) bool.
    matrix, full_range: of clips, for each of the 2B, as `decode_clips` gives them: under dtype="yuv420"
        `yuv420_to_rgb` must be told. Empty for images.
    extra: the further columns that were asked for, B values each; cached conditioning as tensors, (B, ...).
    """

    pixels: Tensor
    prompts: list[str]
    keys: list[str]
    index: Tensor
    lap: Tensor
    weight: Tensor
    category: list[str]
    ok: Tensor
    original_size: Tensor
    crop_top_left: Tensor
    flipped: Tensor
    matrix: tuple[str, ...] = ()
    full_range: tuple[bool, ...] = ()
    extra: Mapping[str, list[Any] | Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """B."""
        return len(self.keys)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PairBatch:
        """The same with all tensors on the device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: torch.device | str | None = None) -> PairBatch:
        """The same in page-locked memory, as torch's DataLoader asks for it with pin_memory=True; what is on a device
        already stays there."""

        def pinned(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu":
                return tensor
            return tensor.pin_memory(device) if device else tensor.pin_memory()

        return self._each(pinned)

    def _each(self, change: Any) -> PairBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        extra = {name: change(column) if isinstance(column, Tensor) else column for name, column in self.extra.items()}
        return replace(self, extra=extra, **{name: change(tensor) for name, tensor in tensors.items()})
