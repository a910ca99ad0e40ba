from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decoding.arguments import Output
from .decoding.draws import Draw
from .decoding.pillow import RawImage
from .limits import DecodeLimits

def decode_pairs(
    win: Sequence[Any],
    lose: Sequence[Any],
    *,
    raw: Sequence[RawImage],
    draws: Sequence[Draw],
    out: int,
    output: Output,
    apply_orientation: bool,
    strict: bool,
    limits: DecodeLimits,
    threads: int,
    jpeg: str = "either",
) -> tuple[NDArray[np.int64], list[tuple[int, str]], list[tuple[int, str]]]: ...
def foreign_plans(
    images: Sequence[Any],
    *,
    draws: Sequence[Draw],
    output: Output,
    apply_orientation: bool,
    limits: DecodeLimits,
) -> list[dict[str, Any] | None]: ...  # the fields of data/dali/picture.py's Placement
def resize_filter(
    interpolation: str, source: int, resized: int, offset: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def plan(source: tuple[int, int], *, draw: Draw, output: Output) -> dict[str, Any]: ...  # as well

class FrameStore:
    def __init__(self, *, draw: Draw, output: Output, memory: int) -> None: ...
    def store(
        self,
        planes: Sequence[Any],
        strides: Sequence[int],
        *,
        size: tuple[int, int],
        depth: int,
        shifts: tuple[int, int],
        full_range: bool,
        matrix: str,
        siting: int = 0,
        orientation: int = 1,
        shown: tuple[int, int] | None = None,
        out: int,
        plane: int,
    ) -> tuple[int, int, int, int]: ...

_Address = tuple[int, int, int, int]

class Head:
    def __init__(self, program: Sequence[tuple[int, int, int, float]], loss: int, slope: int) -> None: ...

class BoundLoss:
    def __init__(
        self,
        forms: Sequence[tuple[int, int, int]],
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
def pair_loss(
    pred: _Address,
    ref: _Address,
    target: _Address,
    mask: tuple[int, int],
    sizes: tuple[int, int, bool, int],
    head: Head | None,
    ref_error: int,
    beta: int,
    alpha: int,
    weight: int,
    parameters: Sequence[float],
    reduction: int,
    loss: int,
    metrics: int,
    table: int,
    /,
) -> None: ...
def pair_gradient(
    pred: _Address,
    target: _Address,
    mask: tuple[int, int],
    sizes: tuple[int, int, bool, int],
    coefficients: int,
    coefficients_stride: int,
    grad_loss: int,
    grad_loss_is_double: bool,
    grad_loss_stride: int,
    grad: _Address,
    /,
) -> None: ...
def build_info() -> dict[str, str]: ...
