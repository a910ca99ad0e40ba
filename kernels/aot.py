"""Ahead-of-time compilation of the kernels for GPUs that need not be there: `python -m polydpo_fast.kernels.aot`.

Prints one JSON line per kernel, input dtype and target with what decides its speed: registers, spills, shared
memory and the width of its global loads, read from the machine code by the tools that Triton ships.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polydpo_fast.metrics import METRICS

from . import pair_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bf16", "fp16", "fp32", "fp64")


def sources(dtype: str) -> Iterator[tuple[str, ASTSource]]:
    """The kernels as the launchers specialise them for aligned inputs of one dtype."""
    acc = "fp64" if dtype == "fp64" else "fp32"
    value, tensor = f"*{acc}", f"*{dtype}"
    blocks = {"BLOCK": pair_loss.BLOCK, "ACC": tl.float64 if acc == "fp64" else tl.float32}
    inputs = dict.fromkeys(("pred_win", "pred_lose", "ref_win", "ref_lose", "target_win", "target_lose"), tensor)
    yield (
        "errors",
        _source(
            pair_loss.errors_kernel,
            {
                **inputs,
                "slots": "*fp64",
                "counters": "*i32",
                "pairs": "*fp64",
                "coefficients": "*fp64",
                "loss": value,
                "metrics": value,
                **dict.fromkeys(("n_pairs", "numel", "n_splits", "n_blocks"), "i32"),
                **dict.fromkeys(("pred_stride", "ref_stride", "target_stride"), "i32"),
                "half_beta": "fp32",
                "alpha": "fp32",
            },
            {
                "HEAD": pair_loss.HEADS["poly_dpo"],
                "SHARED_TARGET": False,
                "REDUCTION": "mean",
                "N_METRICS": len(METRICS),
                "SLOT_BLOCK": pair_loss.SLOT_BLOCK,
                "PAIR_BLOCK": pair_loss.PAIR_BLOCK,
                **blocks,
            },
            aligned=(*inputs, "numel", "pred_stride", "ref_stride", "target_stride"),
        ),
    )
    arms = dict.fromkeys(("pred_win", "pred_lose", "target_win", "target_lose", "grad_win", "grad_lose"), tensor)
    yield (
        "gradient",
        _source(
            pair_loss.gradient_kernel,
            {
                **arms,
                "coefficients": "*fp64",
                "grad_loss": value,
                **dict.fromkeys(("numel", "n_splits", "pred_stride", "target_stride", "grad_stride"), "i32"),
            },
            {"SHARED_TARGET": False, "PER_PAIR": False, **blocks},
            aligned=(*arms, "numel", "pred_stride", "target_stride", "grad_stride"),
        ),
    )


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...]) -> ASTSource:
    place = {name: index for index, name in enumerate(kernel.arg_names)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(place[name],): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, {(place[name],): value for name, value in constants.items()}, attributes)


def report(name: str, dtype: str, target: str) -> dict[str, Any]:
    """Compiles one kernel for one target and reads its resources off the machine code."""
    source = dict(sources(dtype))[name]
    options = {"num_warps": 128 // TARGETS[target].warp_size, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    result: dict[str, Any] = {"kernel": name, "dtype": dtype, "target": target}
    result["shared_bytes"] = compiled.metadata.shared
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        result["spilled"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
        loads = re.findall(r"(?:global|buffer)_load_(\w+)", assembly)
        result["widest_load_bits"] = 128 if any("dwordx4" in load for load in loads) else 64
    else:
        usage, machine_code = _disassemble(compiled.asm["cubin"])
        result["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        result["spilled"] = int(re.search(r"LOCAL:(\d+)", usage)[1])
        widths = {int(width) for width in re.findall(r"LDG\.E(?:\.\w+)*?\.(64|128)\b", machine_code)}
        result["widest_load_bits"] = max(widths, default=32)
        result["wide_loads"] = len(re.findall(r"LDG\.E(?:\.\w+)*?\.128\b", machine_code))
    return result


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    return usage, code


if __name__ == "__main__":
    for target in TARGETS:
        for dtype in DTYPES:
            for name in ("errors", "gradient"):
                print(json.dumps(report(name, dtype, target)), flush=True)
