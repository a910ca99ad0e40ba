"""The kernels compiled for GPUs that need not be there, in every specialisation that a call can ask for.

They compile, do not spill, and move 128 bits at a time on the aligned path (64 where bytes are written): then the bytes
per element follow from the kernel's own loads and stores. In a process of its own, since this one may have put Triton
into interpreter mode.
"""

import json
import os
import subprocess
import sys

import pytest

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "u8": 1}

# Of a GPU's 65,536 registers per SM, at 80 six programs of 128 threads have enough. AMD's have twice as many.
MAX_REGISTERS = {"errors": {"fp64": 192}, "gradient": {"fp64": 96}, "rgb": {}}
MAX_REGISTERS_ELSE = {"errors": 80, "gradient": 64, "rgb": 128}

# Tensors of the (2B, ...) shape that a variant moves, in units of the dtype's size; a shared target is half of one.
TENSORS = {
    ("errors", "plain"): 3,
    ("errors", "shared target"): 2.5,
    ("errors", "ref_error"): 2,
    ("errors", "reference_free"): 2,
    ("gradient", "plain"): 3,
    ("gradient", "shared target"): 2.5,
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
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_specialisation_is_compiled(reports):
    from polydpo_fast.kernels import aot

    expected = {(*s, target) for s in aot.specialisations() for target in TARGETS}
    assert {(r["kernel"], r["variant"], r["dtype"], r["target"]) for r in reports} == expected
    assert len(expected) > 100


def test_nothing_spills(reports):
    assert [r for r in reports if r["spilled"]] == []


def test_registers_stay_within_their_bound(reports):
    for r in reports:
        bound = MAX_REGISTERS[r["kernel"]].get(r["dtype"], MAX_REGISTERS_ELSE[r["kernel"]])
        assert r["registers"] <= (2 * bound if r["target"] == "gfx942" else bound), r


def test_all_loads_of_an_iteration_are_under_way_at_once(reports):
    """In groups, each would wait for memory by itself. The gradient's programs are many enough to hide that.

    Before Triton 3.8 two groups remain on sm_80.
    """
    for r in reports:
        if r["kernel"] == "errors" and r["dtype"] in ("bf16", "fp16") and r["target"].startswith("sm"):
            in_groups = r["variant"] == "mask" or r["target"] == "sm_80"
            assert r["loads_in_flight"] >= r["wide_loads"] / (2 if in_groups else 1), r


def test_the_sums_of_a_split_are_stored_by_one_warp(reports):
    """AMD's barrier does not wait for the stores of other waves before the arrival is announced."""
    errors = [r for r in reports if r["kernel"] == "errors"]
    assert errors
    assert [r for r in errors if not r["sums_of_one_warp"]] == []


def test_the_end_of_a_pair_waits_seldom(reports):
    """What is left when the last split of the last pair has arrived is latency: nothing else runs then.

    Sums are taken together: one by one they took 45 barriers, and three times the instructions. A mask adds its count.
    """
    for r in reports:
        if r["kernel"] == "errors" and r["dtype"] == "bf16":
            assert r["barriers"] <= (24 if r["variant"] == "mask" else 18), r


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_element_are_those_of_the_formula(reports, target):
    """All of them in 128-bit instructions: a narrow load or store would be missing from the count."""
    for r in reports:
        tensors = TENSORS.get((r["kernel"], r["variant"]))
        if r["target"] == target and tensors is not None:
            assert r["bytes_per_element"] == tensors * ITEM[r["dtype"]], r


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_move_twelve_bytes_per_element_in_bfloat16(reports, target):
    plain = [r for r in reports if r["target"] == target and r["variant"] == "plain" and r["dtype"] == "bf16"]
    assert sum(r["bytes_per_element"] for r in plain) == 12


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_per_pixel_are_the_planes_and_three_wide_values(reports, target):
    rgb = [r for r in reports if r["target"] == target and r["kernel"] == "rgb" and r["variant"] != "width 1"]
    assert {r["dtype"] for r in rgb} == {"bf16", "fp16", "fp32", "u8"}
    for r in rgb:
        assert r["bytes_per_pixel"] == 1.5 + 3 * ITEM[r["dtype"]], r


def test_masks_do_not_narrow_the_loads(reports):
    for r in reports:
        if r["variant"] == "mask" and r["kernel"] == "errors":
            assert r["wide_loads"] >= 6, r


def test_the_launcher_passes_parameters_in_float64_and_counts_as_integers():
    """How Triton binds the arguments of a real call. A count of 1 must not become a constant: it has no dtype."""
    code = """
import json
from polydpo_fast.kernels.pair_loss import errors_kernel, gradient_kernel
print(json.dumps([{p.name: [p.annotation_type, p.do_not_specialize] for p in k.params if not p.is_constexpr}
                  for k in (errors_kernel, gradient_kernel)]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    errors, gradient = json.loads(done.stdout)
    for name in ("beta_value", "a1", "a2", "a3", "a4", "keep", "flip", "margin", "sft_weight"):
        assert errors[name][0] == "fp64", name
    for name in ("n_pairs", "n_splits", "n_blocks"):
        assert errors[name][1], name
    assert gradient["n_splits"][1]


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_triton_without_knobs_will_do(interpret):
    """PyTorch 2.6 and 2.7 come with Triton 3.2 and 3.3."""
    code = (
        "import triton; del triton.knobs; from polydpo_fast.kernels import pair_loss as p; print(type(p.HEADS['ipo']))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("JITFunction" in done.stdout) == (interpret == "0")
