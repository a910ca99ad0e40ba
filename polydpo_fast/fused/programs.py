"""The heads of the objectives as short programs, which csrc/head.hpp runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ..objectives import OBJECTIVES

__all__ = ["INPUTS", "OPERATIONS", "program"]

INPUTS = ("z", "p", "q", "nlp", "nlq", "beta", "a1", "a2", "a3", "a4")
OPERATIONS = ("constant", "+", "-", "*", "/", "<")  # their numbers are csrc/head.hpp's

Instruction = tuple[int, int, int, float]
"""Operation, its two registers, its constant. Result i of a program goes to register len(INPUTS) + i."""


@cache
def program(objective: str) -> tuple[tuple[Instruction, ...], int, int]:
    """An objective's head as instructions, and the registers of its loss and slope."""
    instructions: list[Instruction] = []

    def append(operation: str, left: int = 0, right: int = 0, constant: float = 0.0) -> int:
        instructions.append((OPERATIONS.index(operation), left, right, constant))
        return len(INPUTS) + len(instructions) - 1

    def place(value: _Register | float) -> int:
        return value.index if isinstance(value, _Register) else append("constant", constant=float(value))

    def record(operation: str, left: _Register | float, right: _Register | float) -> _Register:
        return _Register(append(operation, place(left), place(right)), record)

    loss, slope = OBJECTIVES[objective].head(*(_Register(i, record) for i in range(len(INPUTS))))
    return tuple(instructions), place(loss), place(slope)


def _binary(operation: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """The operator's method, and that with the sides exchanged."""
    return (
        lambda self, other: self.record(operation, self, other),
        lambda self, other: self.record(operation, other, self),
    )


class _Register:
    """Stands for a number, and records what is done with it."""

    def __init__(self, index: int, record: Callable[..., _Register]) -> None:
        self.index, self.record = index, record

    __add__, __radd__ = _binary("+")
    __sub__, __rsub__ = _binary("-")
    __mul__, __rmul__ = _binary("*")
    __truediv__, __rtruediv__ = _binary("/")
    __lt__, __gt__ = _binary("<")

    def __neg__(self) -> _Register:
        return self.record("-", 0.0, self)
