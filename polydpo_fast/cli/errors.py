"""What went wrong in a command, in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from ..data.inspect import safe

__all__ = ["failed", "said"]


@contextmanager
def said(*errors: type[Exception], code: int = 2, more: str = "") -> Iterator[None]:
    """Of these errors, or those that a user's arguments and files may cause, it says in a line what went wrong."""
    errors = errors or (OSError, TypeError, ValueError, ImportError)
    try:
        yield
    except errors as error:
        raise failed(error, code, more) from error


def failed(error: Exception | str, code: int = 2, more: str = "") -> typer.Exit:
    """Says in a line what went wrong; the exit to be raised then."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # without a number
        text = f"{error.filename}: {error.strerror}"
    Console(stderr=True).print(safe(" ".join(f"{text}\n{more}".splitlines())), style="red", soft_wrap=True)
    return typer.Exit(code)
