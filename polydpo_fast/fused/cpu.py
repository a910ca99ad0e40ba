"""The losses on a CPU: from tensors to the addresses that C++ takes (csrc/loss.hpp)."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..buffers import LARGE, Buffers
from ..layout import PAIR_COLUMNS, dense_strides, pairs_in
from ..metrics import METRICS
from .programs import program

__all__ = ["BoundLoss", "launch_errors", "launch_gradient"]

# The numbers of csrc/loss.hpp.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}

_gradients = Buffers(2, reclaimable=True)  # both arms


def _empty_gradient(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if shape.numel() * dtype.itemsize < LARGE:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    return _gradients.empty(shape, dtype, strides)


@cache
def _head(objective: str) -> Any:
    _join_openmp()
    return _C.Head(*program(objective))


@cache
def _join_openmp() -> None:
    """Gives C++ the threads of the OpenMP runtime that PyTorch has loaded, if it can be found; else it has its own.

    PyTorch has no handle to its runtime, and a second set of threads would compete with the first for the cores.
    """
    import ctypes

    with suppress(OSError):  # no /proc, or a library that was replaced under the running process
        with open("/proc/self/maps") as maps:
            found = {line.split(maxsplit=5)[5].rstrip() for line in maps if re.search(r"/lib(g|i|)omp[^/]*\.so", line)}
        if len(found) == 1:  # of two runtimes we could not tell which is PyTorch's
            entry = getattr(ctypes.CDLL(found.pop()), "GOMP_parallel", None)
            if entry is not None:
                _C.set_openmp(ctypes.cast(entry, ctypes.c_void_p).value or 0)


def _address(x: list[Tensor], layout: str, pairs: int) -> tuple[int, int, int, int]:
    """Where the arms begin, their dtype, and the distance from one pair to the next in elements."""
    first = x[0]
    base, stride, dtype = first.data_ptr(), first.stride(0), _DTYPES[first.dtype]
    if not all(one.data_ptr() for one in x):
        raise ValueError(f"a tensor of shape {tuple(first.shape)} has no memory; expected one whose storage is there")
    if len(x) == 2:
        return base, x[1].data_ptr(), dtype, stride
    if first.shape[0] == pairs:
        return base, base, dtype, stride
    if layout == "interleaved":
        return base, base + stride * first.element_size(), dtype, 2 * stride
    return base, base + pairs * stride * first.element_size(), dtype, stride


def _mask_address(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0)


def launch_errors(
    pred: list[Tensor],
    ref: list[Tensor],
    target: list[Tensor],
    ref_error: Tensor | None,
    mask: Tensor | None,
    beta: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor | None,
    parameters: list[float],
    objective: str | None,
    layout: str,
    reduction: str,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.pair_loss.launch_errors`."""
    pairs = pairs_in(pred)
    dtype = torch.float64 if double else torch.float32
    value = torch.empty((pairs,) if reduction == "none" else (), dtype=dtype, device="cpu")
    metrics = torch.empty(len(METRICS), dtype=dtype, device="cpu")
    table = torch.empty((pairs, PAIR_COLUMNS), dtype=torch.float64, device="cpu")
    doubles = [None if x is None else x.to(torch.float64).contiguous() for x in (ref_error, beta, alpha, weight)]
    ref_error_at, beta_at, alpha_at, weight_at = (0 if x is None else x.data_ptr() for x in doubles)
    _C.pair_loss(
        _address(pred, layout, pairs),
        _address(ref, layout, pairs) if ref else (0, 0, 0, 0),
        _address(target, layout, pairs),
        _mask_address(mask),
        (pairs, pred[0].numel() // pred[0].shape[0], double, torch.get_num_threads()),
        None if objective is None else _head(objective),
        ref_error_at,
        beta_at,
        alpha_at,
        weight_at,
        parameters,
        _REDUCTIONS[reduction],
        value.data_ptr(),
        metrics.data_ptr(),
        table.data_ptr(),
    )
    return value, metrics, table


def launch_gradient(
    pred: list[Tensor],
    target: list[Tensor],
    mask: Tensor | None,
    coefficients: Tensor,
    grad_loss: Tensor,
    layout: str,
    double: bool,
) -> list[Tensor]:
    """As `kernels.pair_loss.launch_gradient`."""
    grad = [_empty_gradient(x.shape, dense_strides(x), x.dtype) for x in pred]
    pairs = pairs_in(pred)
    _C.pair_gradient(
        _address(pred, layout, pairs),
        _address(target, layout, pairs),
        _mask_address(mask),
        (pairs, pred[0].numel() // pred[0].shape[0], double, torch.get_num_threads()),
        coefficients[:, -2:].data_ptr(),
        coefficients.stride(0),
        grad_loss.data_ptr(),
        grad_loss.dtype == torch.float64,
        grad_loss.stride(0) if grad_loss.dim() else 0,
        _address(grad, layout, pairs),
    )
    return grad


def _facts(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype, x.device


class BoundLoss:
    """The loss for tensors of one shape, dtype and order in memory, with the options it was made for.

    What `launch_errors` and `launch_gradient` work out at each call is worked out once. For three plain tensors that
    need no copy, and options that are numbers.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],  # model_pred, ref_pred, target
        pairs: int,
        parameters: list[float],
        objective: str,
        layout: str,
        reduction: str,
    ) -> None:
        pred, _, target = tensors
        self._saved = _facts(pred), _facts(target)
        self.layout = layout
        self._double = any(x.dtype == torch.float64 for x in tensors)
        self._dtype = torch.float64 if self._double else torch.float32
        self._shape = (pairs,) if reduction == "none" else ()
        self._table = (pairs, PAIR_COLUMNS)
        self._grad = pred.shape, dense_strides(pred), pred.dtype
        forms = []
        for x in (*tensors, _empty_gradient(*self._grad)):
            win, lose, dtype, stride = _address([x], layout, pairs)
            forms.append((lose - win, dtype, stride))
        sizes = (pairs, pred.numel() // pred.shape[0], self._double)
        self._c = _C.BoundLoss(forms, sizes, _head(objective), parameters, _REDUCTIONS[reduction])

    def knows(self, pred: Tensor, target: Tensor, table: Tensor) -> bool:
        """Whether these are still as they were when they were saved; hooks may have brought back something else."""
        return (_facts(pred), _facts(target)) == self._saved and table.dtype == torch.float64 and table.is_contiguous()

    def errors(
        self, pred: Tensor, ref: Tensor, target: Tensor, with_metrics: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        value = pred.new_empty(self._shape, dtype=self._dtype)
        metrics = pred.new_empty(len(METRICS), dtype=self._dtype) if with_metrics else None
        table = pred.new_empty(self._table, dtype=torch.float64)
        self._c.errors(
            pred.data_ptr(),
            ref.data_ptr(),
            target.data_ptr(),
            value.data_ptr(),
            0 if metrics is None else metrics.data_ptr(),
            table.data_ptr(),
            torch.get_num_threads(),
        )
        return value, metrics, table

    def gradient(self, pred: Tensor, target: Tensor, table: Tensor, grad_loss: Tensor) -> Tensor:
        grad = _empty_gradient(*self._grad)
        self._c.gradient(
            pred.data_ptr(),
            target.data_ptr(),
            table.data_ptr(),
            grad_loss.data_ptr(),
            grad_loss.stride(0) if self._shape else 0,
            grad.data_ptr(),
            torch.get_num_threads(),
        )
        return grad
