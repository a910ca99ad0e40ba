"""The kernels compiled for GPUs that need not be there: they compile, do not spill, and load 128 bits at a time.

In a process of its own, since this one may have put Triton into interpreter mode.
"""

import json
import os
import subprocess
import sys

import pytest

# Bounds, not readings: 64 registers let 8 programs of 128 threads share an SM, 98 KB of loads in flight.
MAX_REGISTERS = {
    ("errors", "bf16"): 96,
    ("errors", "fp32"): 128,
    ("gradient", "bf16"): 48,
    ("gradient", "fp32"): 64,
}


@pytest.fixture(scope="module")
def reports():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "polydpo_fast.kernels.aot"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["target"], row["kernel"], row["dtype"]): row for row in rows}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", ["errors", "gradient"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_compiles_without_spills_and_with_wide_loads(reports, target, kernel, dtype):
    row = reports[target, kernel, dtype]
    assert row["spilled"] == 0
    assert row["widest_load_bits"] == 128
    if "wide_loads" in row:  # every element load of both arms, 8 elements of a thread at a time
        tensors = 6 if kernel == "errors" else 4
        width = {"bf16": 1, "fp16": 1, "fp32": 2, "fp64": 4}[dtype]
        assert row["wide_loads"] == tensors * width
    assert row["registers"] <= MAX_REGISTERS.get((kernel, dtype), 255)
