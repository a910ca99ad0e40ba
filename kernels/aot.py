"""Ahead-of-time compilation of the kernels for GPUs that need not be there: `python -m polydpo_fast.kernels.aot`.

Prints one JSON line per specialisation and target with what decides its speed: registers, spills, shared memory,
barriers, and its wide loads and stores, read from the machine code by the tools that Triton ships.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polydpo_fast.colour import fixed_point

from . import pair_loss, yuv

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bf16", "fp16", "fp32", "fp64")
RGB_DTYPES = ("bf16", "fp16", "fp32", "u8")
THREADS = 128

# What a call may change in the kernels, as the arguments it gives other types or values. None leaves a tensor out.
ERRORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed dtypes": {"pred_win": "*fp32", "pred_lose": "*fp32"},
    "shared target": {"SHARED_TARGET": True},
    "mask": {"mask": "*u8"},
    "ref_error": {"REF": "error", "ref_win": None, "ref_lose": None, "ref_error": "*fp32"},
    "reference_free": {"REF": "none", "ref_win": None, "ref_lose": None},
    "per pair": {"beta": "*fp32", "alpha": "*fp32", "weight": "*fp32"},
    "none": {"REDUCTION": "none"},
    "sum": {"REDUCTION": "sum"},
    "errors": {"HEAD": None},
    "one element": {"numel": 1, "pred_stride": 1, "ref_stride": 1, "target_stride": 1},
    "long strides": dict.fromkeys(("pred_stride", "ref_stride", "target_stride"), "i64"),
    **{f"head {name}": {"HEAD": head} for name, head in pair_loss.HEADS.items()},
}
GRADIENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed dtypes": {"target_win": "*fp32", "target_lose": "*fp32"},
    "shared target": {"SHARED_TARGET": True},
    "mask": {"mask": "*u8"},
    "one element": {"numel": 1, "pred_stride": 1, "target_stride": 1, "grad_stride": 1},
    "long strides": dict.fromkeys(("pred_stride", "target_stride", "grad_stride"), "i64"),
}
COLOURS = ("Y_OFFSET", "Y_SCALE", "RED_CR", "GREEN_CB", "GREEN_CR", "BLUE_CB")
RGB: dict[str, dict[str, Any]] = {
    "crop and flip": {},
    "whole": {"crop": None, "flip": None},
    "width 1": {"w": 1},
    "clips": {**dict(zip(COLOURS, fixed_point("bt709", False), strict=True)), "LEFT": True},
}


def specialisations() -> Iterator[tuple[str, str, str]]:
    """(kernel, variant, dtype): every variant in bfloat16, the usual ones in every dtype."""
    for kernel, variants in (("errors", ERRORS), ("gradient", GRADIENT)):
        for variant in variants:
            for dtype in DTYPES if variant == "plain" else DTYPES[:1]:
                yield kernel, variant, dtype
    for variant in RGB:
        for dtype in RGB_DTYPES if variant == "crop and flip" else RGB_DTYPES[:1]:
            yield "rgb", variant, dtype


def source(kernel: str, variant: str, dtype: str) -> ASTSource:
    """A kernel as its launcher specialises it for inputs that are aligned to 16 bytes."""
    if kernel == "rgb":
        return _rgb_source(variant, dtype)
    acc = "fp64" if dtype == "fp64" else "fp32"
    tensor = f"*{dtype}"
    given: dict[str, Any] = {"BLOCK": pair_loss.BLOCK, "ACC": tl.float64 if acc == "fp64" else tl.float32}
    if kernel == "errors":
        function, changes = pair_loss.errors_kernel, ERRORS[variant]
        inputs = ("pred_win", "pred_lose", "ref_win", "ref_lose", "target_win", "target_lose")
        strides = ("pred_stride", "ref_stride", "target_stride", "mask_stride")
        given |= {"HEAD": pair_loss.HEADS["poly_dpo"], "REF": "pred", "SHARED_TARGET": False, "REDUCTION": "mean"}
        given |= {"SLOT_BLOCK": pair_loss.SLOT_BLOCK, "PAIR_BLOCK": pair_loss.PAIR_BLOCK}
        given |= dict.fromkeys(("mask", "ref_error", "beta", "alpha", "weight"))
        given |= {"slots": "*fp64", "counters": "*i32", "pairs": "*fp64", "loss": f"*{acc}", "metrics": f"*{acc}"}
        given |= dict.fromkeys(("beta_value", "a1", "a2", "a3", "a4", "keep", "flip", "margin", "sft_weight"), "fp64")
        given |= dict.fromkeys(("n_pairs", "n_splits", "n_blocks", "ref_error_arm", "ref_error_stride"), "i32")
    else:
        function, changes = pair_loss.gradient_kernel, GRADIENT[variant]
        inputs = ("pred_win", "pred_lose", "target_win", "target_lose", "grad_win", "grad_lose")
        strides = ("pred_stride", "target_stride", "mask_stride", "grad_stride")
        given |= {"SHARED_TARGET": False, "mask": None, "coefficients": "*fp64", "grad_loss": f"*{acc}"}
        given |= dict.fromkeys(("n_splits", "coefficients_stride", "grad_loss_stride"), "i32")
    given |= dict.fromkeys(inputs, tensor) | dict.fromkeys(("numel", *strides), "i32") | changes
    runtime = {name for name, value in given.items() if isinstance(value, str) and name not in ("REF", "REDUCTION")}
    return _specialised(function, given, runtime, {*inputs, "mask", "numel", *strides} & runtime)


def _rgb_source(variant: str, dtype: str) -> ASTSource:
    given: dict[str, Any] = {"planes": "*u8", "crop": "*i64", "flip": "*u8", "out": f"*{dtype}"}
    given |= dict.fromkeys(("T", "H", "W", "h", "w"), "i32") | {"ROWS": yuv.ROWS, "COLS": yuv.COLS}
    given |= dict(zip(COLOURS, fixed_point("bt601", True), strict=True)) | {"LEFT": False}
    given |= dict.fromkeys(("mean_r", "mean_g", "mean_b", "scale_r", "scale_g", "scale_b"), "fp32")
    given |= RGB[variant]
    runtime = {name for name, value in given.items() if isinstance(value, str)}
    return _specialised(yuv.rgb_kernel, given, runtime, {"planes", "crop", "flip", "out", "w"} & runtime)


def _specialised(function: Any, given: dict[str, Any], runtime: set[str], aligned: set[str]) -> ASTSource:
    """runtime: the arguments that are not constants. aligned: those of them that are multiples of 16."""
    place = {name: index for index, name in enumerate(function.arg_names)}
    return ASTSource(
        function,
        {name: given[name] if name in runtime else "constexpr" for name in function.arg_names},
        {(place[name],): value for name, value in given.items() if name not in runtime},
        {(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )


def report(kernel: str, variant: str, dtype: str, target: str) -> dict[str, Any]:
    """Compiles one kernel for one target and reads its resources off the machine code."""
    options = {"num_warps": THREADS // TARGETS[target].warp_size, "enable_fp_fusion": True}
    if kernel == "errors":
        options |= pair_loss.register_bound(dtype == "fp64", hip=target.startswith("gfx"))
    compiled = triton.compile(source(kernel, variant, dtype), target=TARGETS[target], options=options)
    result: dict[str, Any] = {"kernel": kernel, "variant": variant, "dtype": dtype, "target": target}
    result["shared_bytes"] = compiled.metadata.shared
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        result["spilled"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
        result["barriers"] = len(re.findall(r"\bs_barrier\b", assembly))
        loads, stores = (_count(assembly, rf"(?:global|buffer)_{to}_dwordx%s\b", (4, 2)) for to in ("load", "store"))
    else:
        usage, machine_code = _disassemble(compiled.asm["cubin"])
        result["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        result["spilled"] = int(re.search(r"LOCAL:(\d+)", usage)[1])
        result["barriers"] = len(re.findall(r"\bBAR\.SYNC", machine_code))
        result["loads_in_flight"] = _loads_in_flight(machine_code)
        loads, stores = (_count(machine_code, rf"{to}\.E(?:\.\w+)*?\.%s\b", (128, 64)) for to in ("LDG", "STG"))
    result["wide_loads"], result["wide_stores"] = loads[0], stores[0]
    if kernel == "errors":
        result["sums_of_one_warp"] = _are_of_one_warp(compiled.asm["ttgir"])
    if kernel == "rgb":
        # The planes come from memory once, 1.5 bytes, narrow as the loads are. The rest is what the wide stores write.
        stored = 16 * stores[0] + 8 * stores[1]
        result["bytes_per_pixel"] = 1.5 + stored / (yuv.ROWS * yuv.COLS // THREADS)
        return result
    # Of the (2B, ...) tensors: both arms of a block, spread over the threads, once through the loop. What the error
    # kernel stores is per pair.
    elements = 2 * pair_loss.BLOCK // THREADS
    result["bytes_per_element"] = 16 * (loads[0] + (stores[0] if kernel == "gradient" else 0)) / elements
    return result


def _count(code: str, instruction: str, widths: tuple[int, int]) -> list[int]:
    """How often an instruction occurs with 128 and with 64 bits."""
    return [len(re.findall(instruction % width, code)) for width in widths]


def _loads_in_flight(machine_code: str) -> int:
    """How many 128-bit loads are issued, at most, before anything uses what one of them has loaded."""
    most, issued, loading = 0, 0, set[int]()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", machine_code):
        load = re.search(r"LDG\.E\S*\.128\S* R(\d+), (.*)", instruction)
        if loading & {int(register) for register in re.findall(r"\bR(\d+)\b", load[2] if load else instruction)}:
            issued, loading = 0, set()
        if load:
            issued, first = issued + 1, int(load[1])
            loading |= set(range(first, first + 4))
            most = max(most, issued)
    return most


def _are_of_one_warp(ttgir: str) -> bool:
    """Whether the four sums of a split are spread over the threads of one warp; the first then stores them."""
    layout = re.search(r"tt\.store .*tensor<2x2x!tt\.ptr<f64>, (#\w+)>", ttgir)[1]
    blocked = re.search(rf"^{layout} = #ttg\.blocked<(.*)>$", ttgir, re.MULTILINE)[1]
    per_thread, threads = (
        [int(n) for n in re.search(rf"{name} = \[(\d+), (\d+)\]", blocked).groups()]
        for name in ("sizePerThread", "threadsPerWarp")
    )
    return all(a * b >= 2 for a, b in zip(per_thread, threads, strict=True))


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


def main() -> None:
    jobs = [(*specialisation, target) for target in TARGETS for specialisation in specialisations()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(report, *zip(*jobs, strict=True)):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
