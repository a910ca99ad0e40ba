"""The kernels compiled for a GPU and run on the CPU, in place of launches: tests of backend="triton" then run on them.

`install()` before anything is launched, in a process without TRITON_INTERPRET. Compilation, specialisation (also by the
addresses of the tensors at hand) and the order of arguments are Triton's own; what a driver would do, ptx.py does.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import blocks
import numpy as np
import ptx
import torch
import triton
from polydpo_fast.kernels import pair_loss
from polydpo_fast.kernels import yuv as yuv_kernels
from triton.backends.compiler import GPUTarget

from polydpo_fast import backends

# Of the tensors that a kernel is given, what it may write, and which of these it may read before.
WRITTEN = {"slots", "counters", "pairs", "loss", "metrics", "grad_win", "grad_lose", "out"}
ZEROED = "counters"
ENDED = ("grad_win", "grad_lose", "out")  # whose every element must have been written in the end

# For tests: bytes that the launches loaded and stored, by tensor; the order of the blocks; a kernel's PTX, changed.
traffic: Counter[str] = Counter()
seed = 0
change: Callable[[str], str] = str


class Emulated:
    """A jitted kernel that is launched here."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        global seed
        compiled = self._function.run(*args, grid=grid, warmup=True, **options)
        given = dict(zip(self._function.arg_names, args, strict=False)) | options
        memory = blocks.Memory()
        parameters = []
        for name, kind in compiled.src.signature.items():
            value = given[name]
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                memory.give(name, value, readable=name not in WRITTEN or name == ZEROED, writable=name in WRITTEN)
                parameters.append(np.uint64(value.data_ptr()))
            else:
                dtype = np.dtype({"i32": "i4", "i64": "i8", "fp32": "f4", "fp64": "f8"}[kind])
                parameters.append(dtype.type(value).view(f"u{dtype.itemsize}"))
        seed += 1
        blocks.launch(translated(change(compiled.asm["ptx"])), grid, parameters, memory, compiled.metadata.shared, seed)
        traffic.update(memory.traffic())
        if ZEROED in given and given[ZEROED].any():
            raise blocks.Fault(f"{ZEROED} are not zero again")
        for name in ENDED:
            if memory.unwritten(name):
                raise blocks.Fault(f"an element of {name} was never written")


translated = cache(ptx.Program)


def install() -> None:
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", int(os.environ.get("EMULATED_CAPABILITY", "90")), 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(target)
    for module, kernel in ((pair_loss, "errors_kernel"), (pair_loss, "gradient_kernel"), (yuv_kernels, "rgb_kernel")):
        setattr(module, kernel, Emulated(getattr(module, kernel)))
    backends.INTERPRETING = True  # backend="triton" takes tensors on the CPU
