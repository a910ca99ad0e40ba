from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def decode_pairs(
    win: Sequence[Any],
    lose: Sequence[Any],
    *,
    out: int,
    dtype: int,
    height: int,
    width: int,
    cover: bool,
    strict: bool,
    max_pixels: int,
    max_bytes: int,
    max_scans: int,
    threads: int,
) -> tuple[NDArray[np.int64], list[tuple[int, str]]]: ...
def build_info() -> dict[str, str]: ...
