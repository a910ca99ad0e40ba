"""One program of a launch alone, in Triton's interpreter: of tensors that are too large to read or write whole."""

from typing import Any

import pytest


class OneProgram:
    """A kernel of whose programs only the first or the last runs; `given` are its arguments, by name."""

    def __init__(self, kernel: Any, monkeypatch: pytest.MonkeyPatch, *, first: bool) -> None:
        self._kernel, self._monkeypatch, self._first = kernel, monkeypatch, first

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        from triton.runtime.interpreter import InterpreterBuilder

        grid = (*grid, 1, 1)[:3]
        place = tuple(0 if self._first else n - 1 for n in grid)

        def launch(*args: Any, **options: Any) -> None:
            self.given = dict(zip(self._kernel.arg_names, args, strict=False))
            with self._monkeypatch.context() as patch:
                patch.setattr(InterpreterBuilder, "set_grid_dim", lambda self, *_: setattr(self, "grid_dim", grid))
                patch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", place))
                self._kernel[(1,)](*args, **options)

        return launch
