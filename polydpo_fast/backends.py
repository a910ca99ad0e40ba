"""Which backends can run on a device, and which one is taken."""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["INTERPRETING", "available_backends", "choose_backend"]

# Looked up once: torch.compile cannot trace through any of them.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_CPP = importlib.util.find_spec("polydpo_fast._C") is not None
# As Triton reads it; PyTorch before 2.8 comes with a Triton that has no `knobs` to ask.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The backends that can run on a device, "cpu" or "cuda" (ROCm's too), the automatic choice first.

    Of "triton", "cpp" and "reference": what `backend` of `loss` and `pair_errors` may be there.
    """
    kind = (device if isinstance(device, torch.device) else torch.device(device)).type
    if kind == "cuda" and _HAS_TRITON:
        return ("triton", "reference")
    if kind == "cpu":
        cpp = ("cpp",) if _HAS_CPP else ()
        return (*cpp, "reference", "triton") if _HAS_TRITON and INTERPRETING else (*cpp, "reference")
    return ("reference",)


def choose_backend(backend: str | None, device: torch.device, *, has_cpp: bool = True) -> str:
    """The one asked for, or the first of those available. has_cpp: whether there is one in C++ of what is to be run."""
    available = [name for name in available_backends(device) if has_cpp or name != "cpp"]
    if backend is None:
        return available[0]
    if backend not in available:
        cpp = "; cpp needs a CPU and the built extension" if has_cpp else ""
        raise ValueError(
            f"backend is {backend!r}; expected one of {', '.join(map(repr, available))} for tensors on {device} "
            f"(triton needs a CUDA or ROCm device, or TRITON_INTERPRET=1{cpp})"
        )
    return backend
