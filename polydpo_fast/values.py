"""Single values among arguments: of what kind they are, and whether they are in range."""

from __future__ import annotations

import numbers
from fractions import Fraction
from typing import TypeGuard

__all__ = ["check_choice", "check_count", "is_int", "is_number", "is_whole", "plain"]


def check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: object, most: int) -> int:
    if not is_whole(value) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}; expected an int from 1 to {most}")
    return int(value)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is one of Python's integers, which JSON and states hold."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, perhaps one of NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, perhaps one of NumPy's."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: float | Fraction) -> float | Fraction:
    """The same number as one of Python's: NumPy's have fewer digits, and make no fractions."""
    return value if isinstance(value, (int, float, Fraction)) else int(value) if is_whole(value) else float(value)
