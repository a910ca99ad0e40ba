"""How the arms of a batch and the table of its pairs lie in memory; how tensors are brought into one element order."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "ERRORS",
    "PAIR_COLUMNS",
    "Arms",
    "Column",
    "arms",
    "common_order",
    "dense_mask",
    "dense_strides",
    "empty_dense_like",
    "pairs_in",
]

Arms = Tensor | Sequence[Tensor]
"""Both arms of a batch: a (2B, ...) tensor, or a tuple (win, lose) of (B, ...)."""


class Column(IntEnum):
    """Columns of the table that the error pass writes, (B, 18) float64, a row for each pair; as in csrc/loss.hpp.

    IMPLICIT_ACCURACY to MODEL_MSE_LOSE are `metrics.METRICS`. ELEMENTS is how many elements of a sample count. The
    gradient is the pair's coefficient, GRAD_WIN or GRAD_LOSE, times pred - target.
    """

    LOSS = 0
    IMPLICIT_ACCURACY = 1
    REWARD_WIN = 2
    REWARD_LOSE = 3
    REWARD_MARGIN = 4
    LOGIT_MEAN = 5
    P_MEAN = 6
    SATURATED = 7
    FALSE_SUCCESS = 8
    REF_MSE_WIN = 9
    REF_MSE_LOSE = 10
    MODEL_MSE_WIN = 11
    MODEL_MSE_LOSE = 12
    EXCESS_WIN = 13
    EXCESS_LOSE = 14
    ELEMENTS = 15
    GRAD_WIN = 16
    GRAD_LOSE = 17


PAIR_COLUMNS = len(Column)
ERRORS = slice(Column.MODEL_MSE_WIN, Column.EXCESS_LOSE + 1)
"""The four columns of `PairErrors`."""


def arms(x: list[Tensor], layout: str, pairs: int) -> tuple[Tensor, Tensor]:
    """(win, lose) of one tensor of both arms, or of two; a (B, ...) tensor, which both arms share, comes back twice."""
    if len(x) == 2:
        return x[0], x[1]
    both = x[0]
    if both.shape[0] == pairs:
        return both, both
    if layout == "interleaved":
        return both[0::2], both[1::2]
    return both[:pairs], both[pairs:]


def pairs_in(pred: list[Tensor]) -> int:
    """B."""
    return pred[0].shape[0] if len(pred) == 2 else pred[0].shape[0] // 2


def common_order(pred: list[Tensor], *others: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The tensors with one element order within a sample, each sample dense; copies only what does not fit.

    The losses do not care in which order a sample's elements are visited, as long as all tensors are visited in
    the same. So channels_last batches, batch slices and expanded samples are read where they are.
    """
    first = pred[0]
    if all(x.is_contiguous() for tensors in (pred, *others) for x in tensors):
        return (pred, *others)
    if not _dense_sample(first):
        first = first.contiguous()
    order, sizes = first.stride()[1:], first.shape[1:]

    def fit(x: Tensor, stride: int | None) -> Tensor:
        fits = _same_order(x.stride()[1:], order, sizes) and (stride is None or x.stride(0) == stride)
        return x if fits else empty_dense_like(first, x).copy_(x)

    def fit_arms(tensors: list[Tensor]) -> list[Tensor]:
        if len(tensors) < 2:
            return [fit(x, None) for x in tensors]
        win, lose = (fit(x, None) for x in tensors)
        if win.stride(0) != lose.stride(0):  # the backends take one stride for both
            win, lose = (fit(x, first.numel() // first.shape[0]) for x in (win, lose))
        return [win, lose]

    return (fit_arms([first, *pred[1:]]), *(fit_arms(tensors) for tensors in others))


def _same_order(a: Sequence[int], b: Sequence[int], sizes: Sequence[int]) -> bool:
    return all(s == t or n == 1 for s, t, n in zip(a, b, sizes, strict=True))


def _dense_sample(x: Tensor) -> bool:
    """Whether the elements of a sample fill one stretch of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense_strides(like: Tensor) -> tuple[int, ...]:
    """Strides for the element order of `like` within a sample, and no gaps between them."""
    return like.numel() // like.shape[0], *like.stride()[1:]


def empty_dense_like(like: Tensor, x: Tensor | None = None) -> Tensor:
    """Uninitialised, shape and dtype of x (or `like`), with `dense_strides(like)`."""
    x = like if x is None else x
    return torch.empty_strided(x.shape, dense_strides(like), dtype=x.dtype, device=x.device)


def dense_mask(mask: Tensor, pred: Tensor) -> Tensor:
    """The expanded mask as bytes in the element order of the samples, (1 or B, ...); copied only if it has to be."""
    if not _same_order(mask.stride()[1:], pred.stride()[1:], pred.shape[1:]):
        mask = empty_dense_like(pred, mask).copy_(mask)
    return mask.view(torch.uint8)
