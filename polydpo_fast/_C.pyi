from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def decode_pairs(
    win: Sequence[Any],
    lose: Sequence[Any],
    *,
    raw: Sequence[tuple[int, int, int, int]],
    draws: Sequence[tuple[bool, int, int, bool]],
    out: int,
    dtype: int,
    normal: Sequence[float],
    background: tuple[int, int, int],
    size: tuple[int, int],
    resize: int,
    interpolation: int,
    apply_orientation: bool,
    strict: bool,
    limits: tuple[int, int, int, int, int],
    threads: int,
    jpeg: int = 0,
) -> tuple[NDArray[np.int64], list[tuple[int, str]], list[tuple[int, str]]]: ...
def foreign_plans(
    images: Sequence[Any],
    *,
    draws: Sequence[tuple[bool, int, int, bool]],
    size: tuple[int, int],
    resize: int,
    interpolation: int,
    apply_orientation: bool,
    limits: tuple[int, int, int, int, int],
) -> list[list[int]]: ...
def resize_filter(
    interpolation: int, source: int, resized: int, offset: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def plan(
    source: tuple[int, int], *, draw: tuple[bool, int, int, bool], size: tuple[int, int], resize: int
) -> list[int]: ...

class FrameStore:
    def __init__(
        self,
        *,
        draw: tuple[bool, int, int, bool],
        dtype: int,
        normal: Sequence[float],
        background: tuple[int, int, int],
        size: tuple[int, int],
        resize: int,
        interpolation: int,
        apply_orientation: bool,
        memory: int,
        planes: bool = False,
    ) -> None: ...
    def store(
        self,
        planes: Sequence[Any],
        strides: Sequence[int],
        form: tuple[int, int, int, int, int],
        full_range: bool,
        matrix: int,
        orientation: int,
        out: int,
        plane: int,
        shown: tuple[int, int] = (0, 0),
        siting: int = 0,
    ) -> tuple[int, int, int, int]: ...

class Head:
    def __init__(self, program: Sequence[tuple[int, int, int, float]], loss: int, slope: int) -> None: ...

class BoundLoss:
    def __init__(
        self,
        arms: Sequence[tuple[int, int, int]],
        sizes: tuple[int, int, bool],
        head: Head,
        parameters: Sequence[float],
        reduction: int,
    ) -> None: ...
    def errors(
        self, pred: int, ref: int, target: int, loss: int, metrics: int, table: int, threads: int, /
    ) -> None: ...
    def gradient(
        self, pred: int, target: int, table: int, grad_loss: int, grad_loss_stride: int, grad: int, threads: int, /
    ) -> None: ...

def set_openmp(entry: int) -> None: ...
def pair_loss(*arguments: Any) -> None: ...
def pair_gradient(*arguments: Any) -> None: ...
def build_info() -> dict[str, str]: ...
