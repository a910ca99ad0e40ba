"""What `polydpo-fast info` prints: versions, devices, backends, SIMD level, codecs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata

import torch

from ._version import __version__
from .backends import available_backends

__all__ = ["collect", "versions"]

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "accelerate",
    "transformers",
    "peft",
    "bitsandbytes",
    "pyarrow",
    "pillow",
    "av",
    "nvidia-dali-cuda120",
)


def collect() -> dict[str, dict[str, str]]:
    """Sections of name -> text, in the order in which they are shown."""
    return {
        "versions": {"polydpo-fast": __version__, "python": platform.python_version(), **versions(_PACKAGES)},
        "devices": _devices(),
        "backends of the loss": _backends(),
        "decoder": _decoder(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of each its version, or "not installed"."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors usable"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    return devices


def _backends() -> dict[str, str]:
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {kind: ", ".join(available_backends(kind)) for kind in kinds}


def _decoder() -> dict[str, str]:
    try:
        from . import _C
    except ImportError as error:
        return {"extension": f"not built ({error})"}
    built = _C.build_info()
    return {
        "JPEG": built["jpeg"],
        "PNG": built["png"],
        "SIMD level": built["simd"],
        "compiler": built["compiler"],
    }
