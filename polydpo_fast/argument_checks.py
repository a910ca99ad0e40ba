"""What a tensor or a number among the arguments must be, whatever it is for."""

from __future__ import annotations

import numbers
import sys

import torch
from torch import Tensor

__all__ = ["check_dense", "check_device", "check_floating", "check_number", "is_lazy", "show"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST = sys.float_info.max


def check_dense(place: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        what = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{place} {what}; expected a dense tensor (torch.strided)")
    if type(x) is not Tensor and hasattr(x, "to_local"):
        raise TypeError(f"{place} is a {type(x).__name__}; expected a plain tensor, such as {place}.to_local()")


def check_floating(place: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{place} has dtype {x.dtype}; expected float64, float32, bfloat16 or float16")
    if is_lazy(x):
        raise TypeError(f"{place} is lazily negated or zero; expected its values in memory, such as {place} + 0")


def is_lazy(x: Tensor) -> bool:
    """Whether memory holds the negatives of the values, or nothing. Compiled graphs resolve that themselves."""
    return not torch.compiler.is_compiling() and (x.is_neg() or x._is_zerotensor())


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device} like model_pred")


def check_number(name: str, value: float, wanted: str = "a finite number", *, also: str = "") -> float:
    """also: what else than a number it may be, in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} is {show(value)}; expected a number{also}")
    number = value if isinstance(value, int) else float(value)  # NumPy's float32 would be compared as one: a warning
    # Not math.isfinite: torch.compile makes the number symbolic when it changes from call to call.
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name} is {value}; expected {wanted}")
    return float(value)


def show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return f"{value!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"
