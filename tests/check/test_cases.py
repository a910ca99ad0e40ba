"""The cases of `polydpo-fast check`, its truths and its comparisons."""

import json

import numpy as np
import pytest
import torch
from check.checking import needs_cpp
from oracle import full

from polydpo_fast import objectives
from polydpo_fast.check import cases, encoding, exact, images, losses, run, transform
from polydpo_fast.check.report import Finding, Report


@needs_cpp
def test_normalised_pixels_are_told_in_units_of_the_last_place():
    pytest.importorskip("PIL")
    found = [f for number in range(3) for f, _ in images.image(0, number) if f.check == "normalised"]
    assert 0.3 < max(finding.ulps for finding in found) < 1
    assert max(finding.relative for finding in found) > 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [8, 16])
def test_the_pngs_of_every_filter_are_those_of_pillow(channels, depth):
    from io import BytesIO

    image = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(channels).integers(0, 2**depth, (23, 9, channels))
    filters = np.arange(23) % 5
    for interlaced in (False, True):
        file = encoding.png(numbers, {1: 0, 2: 4, 3: 2, 4: 6}[channels], depth, interlaced, [], filters)
        found = np.asarray(image.open(BytesIO(file))).reshape(23, 9, -1)
        # Of 16 bits Pillow keeps the upper ones, but for grey; which with alpha it takes for RGBA then.
        shown = numbers >> (8 if depth == 16 and channels > 1 else 0)
        np.testing.assert_array_equal(found[..., -1], shown[..., -1])
        np.testing.assert_array_equal(found[..., : channels - 1], shown[..., : channels - 1])


def test_a_case_is_that_of_its_seed_and_number():
    one, again, other = cases.draw(7, 12), cases.draw(7, 12), cases.draw(8, 12)
    assert str(one) == str(again) != str(other)
    assert torch.equal(one.pred[0].nan_to_num(), again.pred[0].nan_to_num())


def test_the_default_run_meets_every_objective_dtype_layout_and_edge():
    drawn = [cases.draw(11, number) for number in range(run._CASES[0])]
    assert {c.options["objective"] for c in drawn} == set(objectives.OBJECTIVES)
    assert {c.dtypes for c in drawn} > set(cases._DTYPES) - {"any"}
    mixed = [c for c in drawn if len(set(c.dtypes.split("/"))) > 1]
    assert any(c.double for c in mixed)
    assert len({c.dtypes for c in mixed}) > 10
    assert {c.layout for c in drawn} == set(cases._LAYOUTS)
    assert {c.edge for c in drawn} == {"", *cases._EDGES}
    assert {c.memory[0] for c in drawn} == set(cases._MEMORY)
    assert {c.kind for c in drawn} == {"own", "shared", "expanded"}
    assert {c.options["reduction"] for c in drawn} == {"mean", "sum", "none"}
    options = {name for c in drawn for name in c.options}
    assert {"mask", "label_smoothing", "margin", "sft_weight", "pair_weight", "reference_free", "alpha"} <= options
    for name in ("alpha", "beta"):
        assert {type(c.options.get(name)) for c in drawn} >= {float, torch.Tensor}
    assert any(isinstance(c.options.get("alpha"), tuple) for c in drawn)
    special = {name: [c for c in drawn if c.number in numbers] for name, numbers in cases.SPECIAL.items()}
    for found in special.values():
        assert {c.dtypes for c in found} == {"bf16", "fp16", "fp32", "fp32/bf16/bf16"}
    assert all(c.elements >= 2 * 1_200_000 for c in special["large"])
    assert ["mask" in c.options for c in special["large"]] == [True, False, False, False]
    assert all(c.pairs >= 2 and c.elements > 2 * c.pairs * 32768 for c in special["long"])
    assert ["mask" in c.options for c in special["long"]] == [False, True, False, True]
    assert all(c.pairs >= 65 for c in special["many"])
    assert all("mask" in c.options and 2 * 1024 * c.pairs < c.elements <= run._SMALL for c in special["masked"])
    lengths = [len(c.options["alpha"]) for c in drawn if isinstance(c.options.get("alpha"), tuple)]
    assert lengths[0] == 4
    assert set(lengths) == {1, 2, 3, 4}


@pytest.mark.parametrize("memory", cases._MEMORY)
@pytest.mark.parametrize("layout", cases._LAYOUTS)
def test_memory_holds_the_same_numbers(memory, layout):
    arms = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    plain, given = cases.arranged(arms, layout, "contiguous"), cases.arranged(arms, layout, memory)
    tensors = [(plain, given)] if layout != "tuple" else list(zip(plain, given, strict=True))
    for expected, x in tensors:
        assert torch.equal(x, expected)
        assert memory in ("contiguous", "batch slice") or not x.is_contiguous()


def test_the_truth_is_that_of_the_oracle():
    """Which shares no code with it either, and subtracts means in extended precision."""
    seen = set()
    for case in (cases.draw(5, number) for number in range(120)):
        if case.edge or case.elements > 2**16:
            continue
        options = {name: x.double().numpy() if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
        alpha = options.get("alpha", 0.0)
        value, logit, gradient = full(
            *case.pred,
            *case.target,
            ref=case.ref,
            ref_error=case.ref_error,
            beta=options["beta"],
            alpha=alpha if isinstance(alpha, tuple) else (alpha,),
            objective=options["objective"],
            smoothing=options.get("label_smoothing", 0.0),
            margin=options.get("margin", 0.0),
            sft_weight=options.get("sft_weight", 0.0),
            weight=options.get("pair_weight", 1.0),
            mask=None if case.options.get("mask") is None else case.options["mask"].numpy(),
        )
        found = exact.exact_of(case, exact.errors_of(case))
        np.testing.assert_allclose(found.logit.numpy(), logit.astype(float), rtol=1e-9)
        np.testing.assert_allclose(found.value.numpy(), value.astype(float), rtol=1e-8, atol=1e-300)
        upstream = exact.upstream_of(case).numpy()
        for arm in (0, 1):
            rows = exact.residual_of(case, arm).flatten(1).numpy()
            expected = gradient[arm].reshape(rows.shape).astype(float) * upstream[:, None]
            np.testing.assert_allclose(found.coefficient[arm].numpy()[:, None] * rows, expected, rtol=1e-8, atol=1e-300)
        seen.add(options["objective"])
    assert seen == set(objectives.OBJECTIVES)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_filter_is_pillows(interpolation):
    """But for its rounding to bytes between the passes and at the end."""
    image = pytest.importorskip("PIL.Image")
    levels = np.random.default_rng(0).integers(0, 256, (57, 83, 3), dtype=np.uint8)
    for height, width in ((20, 31), (57, 200), (90, 40), (11, 83)):
        expected = image.fromarray(levels).resize((width, height), getattr(image.Resampling, interpolation.upper()))
        found = transform.resampled(levels.astype(np.float64), height, width, interpolation)
        assert np.abs(found - np.asarray(expected)).max() < 1.1


def compared(actual, expected, allowed=1e-6, dtype=torch.float32):
    actual, expected = torch.tensor(actual), torch.tensor(expected, dtype=torch.float64)
    return losses._compared("value", actual, expected, torch.full_like(expected, allowed), dtype)


def test_comparisons_find_the_worst_element():
    finding = compared([1.0, 2.0, 3.0], [1.0, 2.0 + 5e-7, 3.0 - 2e-6])
    assert finding.share == pytest.approx(2.0)
    assert finding.ulps == pytest.approx(2e-6 / 2**-22, rel=1e-3)
    assert finding.relative == pytest.approx(2e-6 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("actual", "expected", "fine"),
    [
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
        (float("inf"), 1e39, True),  # beyond float32
        (float("inf"), 1.0, False),
        (0.1, 0.1, True),  # what rounds to it
    ],
)
def test_comparisons_of_what_is_not_finite(actual, expected, fine):
    assert (compared([actual], [expected], allowed=0.0).share <= 1) == fine


def test_a_report_without_findings_has_not_passed():
    report = Report(0, False)
    assert not report.passed
    report.add("cpp", "cpu", Finding("value", 0.5), "1e-6")
    assert report.passed
    report.add("cpp", "cpu", Finding("value", float("nan")), "1e-6")
    assert not report.passed
    report.add("cpp", "cpu", Finding("value", 0.5), "1e-6")
    assert json.loads(report.as_json())["groups"][0]["worst"]["share_of_gate"] is None
