"""`polydpo-fast check`: green on what is right, red on one changed line, and the same again from its seed."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import full
from rich.console import Console
from typer.testing import CliRunner

import polydpo_fast
from polydpo_fast import cpu, fast_lane, functional, metrics, objectives, operators, programs
from polydpo_fast.check import (
    cases,
    check,
    clips,
    data,
    encoding,
    exact,
    images,
    loading,
    losses,
    planes,
    run,
    transform,
)
from polydpo_fast.check.report import Finding, Report, must
from polydpo_fast.cli import app

runner = CliRunner()
PACKAGE = Path(polydpo_fast.__file__).parent
needs_cpp = pytest.mark.skipif("cpp" not in polydpo_fast.available_backends("cpu"), reason="the extension is not built")
heavy = pytest.mark.heavy


@pytest.fixture
def few(monkeypatch):
    """A few cases of each kind, one of them large."""
    monkeypatch.setattr(run, "_CASES", (21, 21))
    monkeypatch.setattr(run, "_LEAST", 20)
    monkeypatch.setattr(run, "_INTERPRETED", (3, 3))
    monkeypatch.setattr(run, "_LEAST_SLOW", 2)
    monkeypatch.setattr(run, "_COMPILED", (2, 2))
    monkeypatch.setattr(run, "_IMAGES", (4, 4))
    monkeypatch.setattr(run, "_CLIPS", (1, 1))


# --------------------------------------------------------------------------------------------------- green


def test_everything_is_within_its_gate(few, tmp_path):
    file = tmp_path / "check.json"
    result = runner.invoke(app, ["check", "--seed", "3", "--device", "cpu", "--seconds", "280", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "all within tolerance" in result.output
    found = json.loads(file.read_text())
    assert found["passed"] is True
    assert found["seed"] == 3
    assert found["broken"] == []
    groups = {(group["subject"], group["check"]): group for group in found["groups"]}
    expected = [
        (backend, quantity)
        for backend in polydpo_fast.available_backends("cpu")
        for quantity in ("logit", "value", "gradient", "metrics", "pair_errors")
    ]
    assert set(expected) <= set(groups)
    for backend in set(polydpo_fast.available_backends("cpu")) - {"reference"}:
        assert {(backend, "determinism"), (backend, "torch.compile")} <= set(groups)
        # Never exactly right: something was compared.
        assert groups[backend, "gradient"]["worst"]["ulps"] > 0.4
        assert 0 < groups[backend, "logit"]["worst"]["share_of_gate"] <= 1


def test_thorough_tries_the_operators_too(few):
    report = check(
        seed=0,
        thorough=True,
        backend="triton" if "triton" in polydpo_fast.available_backends("cpu") else None,
        seconds=200.0,
    )
    assert report.passed, report.as_json()
    assert '"check": "opcheck"' in report.as_json()


@heavy
@pytest.mark.parametrize("tens", range(12))
def test_what_is_right_is_green_for_any_seed(tens, monkeypatch):
    monkeypatch.setattr(run, "_BACKENDS", ("cpp", "reference"))
    monkeypatch.setattr(run, "_CASES", (40, 40))
    monkeypatch.setattr(run, "_COMPILED", (0, 0))
    monkeypatch.setattr(run, "_IMAGES", (6, 6))
    monkeypatch.setattr(run, "_CLIPS", (1, 1))
    for seed in range(10 * tens, 10 * tens + 10):
        report = check(seed=seed, device="cpu", seconds=1000.0)
        assert report.passed, report.as_json()


def test_only_what_is_wrong_has_a_note():
    report = Report(seed=0, thorough=False)
    report.add("decode_pairs", "cpu", must("geometry", True, "3 levels off"), "that of the docs")
    assert report.passed
    assert "levels" not in report.as_json()
    report.add("decode_pairs", "cpu", must("geometry", False, "3 levels off"), "that of the docs")
    assert not report.passed
    assert json.loads(report.as_json())["groups"][0]["note"] == "3 levels off"


# ----------------------------------------------------------------------------------------------------- red


@needs_cpp
def test_a_coefficient_of_the_cpp_backend_is_caught(few, monkeypatch):
    """One constant of the program that C++ runs: the 0 of the slope's 0 - q."""

    def program(objective):
        instructions, loss, slope = programs.program(objective)
        if objective == "poly_dpo":
            constant = programs.OPERATIONS.index("constant")
            instructions = tuple((*i[:3], 1e-3) if (i[0], i[3]) == (constant, 0.0) else i for i in instructions)
        return instructions, loss, slope

    monkeypatch.setattr(cpu, "program", program)
    _forget_programs()
    try:
        result = runner.invoke(app, ["check", "--seed", "5", "--backend", "cpp"])
    finally:
        _forget_programs()
    assert result.exit_code == 1
    assert "cpp on cpu: gradient, case" in result.output
    assert "(poly_dpo, " in result.output
    assert "cpp on cpu: logit" not in result.output


def _forget_programs():
    cpu._head.cache_clear()
    fast_lane._signature.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    ("line", "changed", "check"),
    [
        ("    gl = scale_l * (pred_l - target_l)\n", "    gl = scale_l * (pred_l - target_w)\n", "gradient"),
        pytest.param("            excess_w += ew\n", "            excess_w += 1.001 * ew\n", "logit", marks=heavy),
        pytest.param("tl.where(tl.abs(logit) > 10.0, 1.0, 0.0)", "0.37", "metrics", marks=heavy),
        pytest.param("mask + row * mask_stride + first + at", "mask + row * mask_stride + at", "gradient", marks=heavy),
    ],
    ids=["gradient", "logit", "metrics", "mask"],
)
def test_a_changed_line_of_a_triton_kernel_is_caught_and_named(line, changed, check, tmp_path):
    pytest.importorskip("triton")
    package = tmp_path / "polydpo_fast"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(operators.module_of("triton").__file__).parent, package / "kernels", dirs_exist_ok=True)
    kernels = package / "kernels" / "pair_loss.py"
    source = kernels.read_text()
    assert source.count(line) == 1, f"the kernel has {line!r} {source.count(line)} times"
    kernels.write_text(source.replace(line, changed))
    # In this case the target is not shared, and the reference's predictions are there.
    case = cases.SPECIAL["masked"][0] if line.startswith("mask") else PLAIN
    options = ["--backend", "triton", "--device", "cpu", "--seed", "0", "--case", str(case)]
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:polydpo_fast", "-m", "polydpo_fast.check", *options],
        env={**os.environ, "TRITON_INTERPRET": "True", "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"triton on cpu: {check}, case {case}" in done.stdout


PLAIN = next(
    c.number
    for c in (cases.draw(0, number) for number in range(1000))
    if (c.edge, c.dtypes, c.kind, c.options["objective"]) == ("", "fp32", "own", "poly_dpo") and c.ref and c.pairs > 1
)


def test_the_case_of_the_changed_kernels_is_green_without_the_change():
    assert check(seed=0, backend="reference", case=PLAIN).passed


@needs_cpp
def test_an_exception_is_a_finding(few, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(cpu, "launch_errors", broken)
    fast_lane._signature.cache_clear()
    result = runner.invoke(app, ["check", "--seed", "0", "--backend", "cpp", "--case", "0"])
    assert result.exit_code == 1
    assert "cpp on cpu: runs, case 0" in result.output
    assert "RuntimeError: no such instruction" in result.output


@needs_cpp
def test_pixels_of_another_crop_are_caught(monkeypatch):
    pytest.importorskip("PIL")
    from polydpo_fast import decode

    whole = decode.decode_pairs

    def shifted(*arguments, **options):
        found = whole(*arguments, **options)
        found.pixels[:] = found.pixels.roll(1, -1)
        return found

    monkeypatch.setattr(decode, "decode_pairs", shifted)
    found = [finding for finding, _ in images.image(0, 1)]
    assert any(finding.share > 1 for finding in found if finding.check.startswith("pixels"))


@needs_cpp
@pytest.mark.parametrize("heeded", [("seed",), ("epoch",), ()])
def test_an_order_that_is_not_the_formulas_is_caught(heeded, monkeypatch):
    from polydpo_fast.data import loader, order

    def changed(blocks, categories, shares, *, window, **numbers):
        key = order.mix(*(numbers[name] for name in heeded))
        return order.Shuffled(blocks, key, window if heeded else 0)

    monkeypatch.setattr(loader, "order_of", changed)
    assert caught("order", loading.loader(0))


@needs_cpp
def test_seeds_that_are_not_heeded_are_caught(monkeypatch):
    pytest.importorskip("PIL")
    from polydpo_fast import decode_arguments

    draw_of = decode_arguments.draw_of
    monkeypatch.setattr(decode_arguments, "draw_of", lambda seed, *how: draw_of(None if seed is None else 7, *how))
    assert caught("crops", (found for number in range(4) for found in images.image(0, number)))


@needs_cpp
def test_wrong_metrics_are_blamed_on_the_reference_too(monkeypatch):
    first, second, *others = metrics.METRICS
    monkeypatch.setattr(metrics, "METRICS", (second, first, *others))
    for backend in ("cpp", "reference"):
        broken = json.loads(check(seed=0, backend=backend, case=PLAIN).as_json())["broken"]
        assert [line for line in broken if line.startswith(f"{backend} on cpu: metrics, case {PLAIN}")]


@pytest.mark.parametrize("factor", [0.9985, 1.0015])
def test_a_gradient_that_is_a_little_too_small_is_caught(factor, monkeypatch):
    """Less than half an ulp of bfloat16: no element is far off, but their mean is."""
    long = (cases.draw(seed, number) for seed in range(99) for number in cases.SPECIAL["long"])
    case = next(c for c in long if (c.dtypes, c.edge) == ("bf16", ""))
    case = replace(case, options={"objective": "linear", "reduction": "mean", "beta": 5000.0})
    result = losses._run

    def off(case, *arguments, **changes):
        return result(replace(case, upstream=factor * case.upstream), *arguments, **changes)

    monkeypatch.setattr(losses, "_run", off)
    found = {finding.check: finding for finding in losses.examine(case, exact.errors_of(case), "reference", "cpu")}
    assert found["gradient"].share > 1
    assert found["bias"].share > 1


def broken(findings):
    return {finding.check for finding, *_ in findings if not finding.share <= 1}


def caught(check, findings):
    """No more is tried than it takes."""
    return any(finding.check == check and not finding.share <= 1 for finding, *_ in findings)


def of_images(*numbers):
    pytest.importorskip("PIL")
    return broken(found for number in numbers for found in images.image(0, number))


def of_loss(case, backend):
    return {
        finding.check for finding in losses.examine(case, exact.errors_of(case), backend, "cpu") if finding.share > 1
    }


@needs_cpp
def test_a_gradient_that_reads_past_an_expanded_one_is_caught(monkeypatch):
    """From the second call on, which takes the fast lane."""
    gradient = cpu.BoundLoss.gradient

    def dense(self, pred, target, table, grad_loss):
        return gradient(self, pred, target, table, torch.nn.functional.pad(grad_loss[:1], (0, len(grad_loss) - 1)))

    monkeypatch.setattr(cpu.BoundLoss, "gradient", dense)
    assert of_loss(cases.draw(0, cases.SPECIAL["usual"][0]), "cpp") == {"determinism"}


@pytest.mark.parametrize(("off", "fine"), [(4e-16, True), (1e-9, False)])
def test_a_pair_alone_is_within_the_gates_of_float64_on_a_gpu(off, fine, monkeypatch):
    """Where sums have another order: the reference plays the GPU."""
    drawn = (cases.draw(0, number) for number in range(99))
    case = next(c for c in drawn if c.double and c.pairs > 1 and c.options["reduction"] == "none" and not c.edge)
    arguments, result, loss, errors = losses._arguments, losses._run, functional.loss, functional.pair_errors

    def nudged(case, *rest, **changes):
        found = result(case, *rest, **changes)
        return found._replace(value=found.value * (1 + off)) if case.pairs == 1 else found

    monkeypatch.setattr(losses, "_arguments", lambda case, device: arguments(case, "cpu"))
    monkeypatch.setattr(losses, "_run", nudged)
    monkeypatch.setattr(functional, "loss", lambda *a, **k: loss(*a, **{**k, "backend": "reference"}))
    monkeypatch.setattr(functional, "pair_errors", lambda *a, **k: errors(*a, **{**k, "backend": "reference"}))
    found = {finding.check: finding for finding in losses.examine(case, exact.errors_of(case), "triton", "cuda")}
    assert (found["one pair alone"].share <= 1) == fine


def test_another_default_of_beta_is_caught(monkeypatch):
    case = next(
        c for c in (cases.draw(0, number) for number in range(99)) if c.options["beta"] == 5000.0 and not c.edge
    )
    assert not of_loss(case, "reference")
    monkeypatch.setitem(functional.loss.__kwdefaults__, "beta", 2500.0)
    assert "logit" in of_loss(case, "reference")


@needs_cpp
def test_a_factor_of_the_fourth_alpha_is_caught(monkeypatch):
    def program(objective):
        instructions, loss, slope = programs.program(objective)
        constant = programs.OPERATIONS.index("constant")
        return tuple((*i[:3], 5.0) if (i[0], i[3]) == (constant, 4.0) else i for i in instructions), loss, slope

    monkeypatch.setattr(cpu, "program", program)
    _forget_programs()
    try:
        drawn = (cases.draw(0, number) for number in range(20))
        (case,) = (c for c in drawn if isinstance(c.options.get("alpha"), tuple))
        assert "gradient" in of_loss(case, "cpp")
    finally:
        _forget_programs()


@needs_cpp
def test_an_alpha_that_a_graph_takes_from_elsewhere_is_caught(monkeypatch):
    whole = functional._without_symbols

    def swapped(*given):
        found = whole(*given)
        return found if found.alpha is None else found._replace(alpha=found.beta + 0.0)

    case = next(c for c in (cases.draw(0, number) for number in range(99)) if type(c.options.get("alpha")) is float)
    assert losses.examine_compiled(case, "cpp", "cpu", "aot_eager").share == 0
    monkeypatch.setattr(functional, "_without_symbols", swapped)
    assert losses.examine_compiled(case, "cpp", "cpu", "aot_eager").share > 1


@needs_cpp
def test_normalised_pixels_are_told_in_units_of_the_last_place():
    pytest.importorskip("PIL")
    found = [f for number in range(3) for f, _ in images.image(0, number) if f.check == "normalised"]
    assert 0.3 < max(finding.ulps for finding in found) < 1
    assert max(finding.relative for finding in found) > 0


@needs_cpp
@pytest.mark.parametrize("wrong", ["diagonal", "even"])
def test_crops_and_mirrors_of_other_numbers_are_caught(wrong, monkeypatch):
    from polydpo_fast import decode_arguments

    draw_of = decode_arguments.draw_of

    def changed(seed, crop, hflip):
        draw = draw_of(seed, crop, 0.5 if wrong == "even" else hflip)
        return draw._replace(left=draw.top) if wrong == "diagonal" else draw

    monkeypatch.setattr(decode_arguments, "draw_of", changed)
    pytest.importorskip("PIL")
    assert caught("crops", (found for number in range(8) for found in images.image(0, number)))


@needs_cpp
def test_another_default_of_the_mean_is_caught(monkeypatch):
    from polydpo_fast import decode

    monkeypatch.setitem(decode.decode_pairs.__kwdefaults__, "mean", 0.49)
    assert of_images(0, 1, 2) & {"normalised", "resized in float32"}


@needs_cpp
def test_windows_that_lose_a_pair_are_caught(monkeypatch):
    from polydpo_fast.data import order

    class Left:
        def __getattr__(self, name):
            return getattr(np, name)

        def searchsorted(self, *arguments, **_):
            return np.searchsorted(*arguments, side="left")

    monkeypatch.setattr(order, "np", Left())
    report = Report(0, False)
    run._gather(report, "PairLoader", "cpu", loading.loader(0))
    assert not report.passed


@needs_cpp
def test_labels_that_are_taken_the_other_way_are_caught(monkeypatch):
    from polydpo_fast.data import columns

    arms = columns.Layout.arms
    monkeypatch.setattr(
        columns.Layout, "arms", lambda self, verdict: arms(self, {1: 2, 2: 1}[verdict] if self.label else 1)
    )
    assert broken(loading.loader(0)) == {"each pair once"}


@pytest.mark.parametrize("wrong", ["coefficient", "mirror"])
def test_other_colours_and_mirrors_of_planes_are_caught(wrong, monkeypatch):
    """Of the reference, too, that other backends are held against."""
    from polydpo_fast import colour, yuv

    if wrong == "coefficient":
        monkeypatch.setitem(colour.MATRICES, "bt709", (0.2126, 0.0822))
    else:
        whole = yuv._reference
        monkeypatch.setattr(yuv, "_reference", lambda planes, crop, flip, *rest: whole(planes, crop, None, *rest))
    found = [found for number in range(5) for found in planes.planes(0, number, "cpu", "reference")]
    assert broken(found) == {"colours"}


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


@needs_cpp
def test_an_order_that_repeats_a_pair_is_caught(monkeypatch):
    from polydpo_fast.data import order

    permute = order.permute
    monkeypatch.setattr(order, "permute", lambda *arguments: np.maximum(permute(*arguments), 1))
    assert caught("each pair once", loading.loader(0))


@needs_cpp
def test_a_gradient_that_a_second_backward_pass_spoils_is_caught(monkeypatch):
    gradient = cpu.BoundLoss.gradient

    def spoiling(self, pred, target, table, grad_loss):
        found = gradient(self, pred, target, table, grad_loss)
        table.data[:, -2:] *= 0.5  # behind autograd's back, as C++ would
        return found

    monkeypatch.setattr(cpu.BoundLoss, "gradient", spoiling)
    assert of_loss(cases.draw(0, cases.SPECIAL["usual"][0]), "cpp") == {"determinism"}


@needs_cpp
def test_an_upstream_gradient_that_is_taken_for_dense_is_caught(monkeypatch):
    drawn = (cases.draw(0, number) for number in range(99))
    case = next(c for c in drawn if c.pairs > 2 and c.options["reduction"] == "none" and "mask" in c.options)
    gradient = cpu.launch_gradient

    def dense(*arguments):
        *before, grad_loss, layout, double = arguments
        return gradient(*before, grad_loss.as_strided(grad_loss.shape, (1,) * grad_loss.dim()), layout, double)

    monkeypatch.setattr(cpu, "launch_gradient", dense)
    assert "gradient" in of_loss(case, "cpp")


def test_numbers_of_pairs_that_are_taken_for_dense_are_caught(monkeypatch):
    drawn = (cases.draw(0, number) for number in range(1, 99, 2))
    case = next(c for c in drawn if c.pairs > 1 and isinstance(c.options.get("alpha"), torch.Tensor) and not c.edge)
    loss = functional.loss

    def dense(*arguments, alpha=0.0, **options):
        alpha = alpha.as_strided(alpha.shape, (1,)) if isinstance(alpha, torch.Tensor) else alpha
        return loss(*arguments, alpha=alpha, **options)

    monkeypatch.setattr(functional, "loss", dense)
    assert "value" in of_loss(case, "reference")


@pytest.mark.parametrize("wrong", ["mean", "matrix"])
def test_planes_that_are_normalised_or_coloured_alike_are_caught(wrong, monkeypatch):
    """Every channel by the mean of red, every image by the matrix of the first."""
    from polydpo_fast import yuv

    whole, runs = yuv._reference, yuv._runs
    if wrong == "mean":
        monkeypatch.setattr(yuv, "_reference", lambda *a: whole(*a[:4], a[4][:1] * 3, *a[5:]))
    else:
        monkeypatch.setattr(yuv, "_runs", lambda *a: [(some, runs(*a)[0][1]) for some, _ in runs(*a)])
    found = [found for number in range(6) for found in planes.planes(0, number, "cpu", "reference")]
    assert broken(found) == {"normalised" if wrong == "mean" else "colours"}


@needs_cpp
@pytest.mark.parametrize("wrong", ["out", "seeds", "exif", "corners"])
def test_arguments_of_the_decoder_that_are_not_heeded_are_caught(wrong, monkeypatch):
    pytest.importorskip("PIL")
    from polydpo_fast import decode

    whole = decode.decode_pairs

    def changed(*arguments, **options):
        if wrong == "out":
            options.pop("out", None)
        if wrong == "seeds":
            options.setdefault("seeds", range(len(arguments[0])))
        if wrong == "exif":
            options.pop("exif", None)
        found = whole(*arguments, **options)
        if wrong == "corners" and options.get("dtype") == "yuv420":
            found.crop_top_left[:] = found.crop_top_left.flip(1)
        return found

    monkeypatch.setattr(decode, "decode_pairs", changed)
    name = {"out": "threads, batch", "seeds": "crops", "exif": "geometry", "corners": "planes of JPEG"}[wrong]

    def found():
        for number in range(len(encoding.KINDS)):
            if wrong != "corners" or cases.Draw(0, number).deal("kind", encoding.KINDS) == "JPEG 4:2:0":
                with suppress(decode.DecodeError):  # of an image that lies on its side
                    yield from images.image(0, number)

    assert caught(name, found())


@needs_cpp
@pytest.mark.parametrize("wrong", ["start", "pair", "loop", "mean"])
def test_other_frames_of_clips_are_caught(wrong, monkeypatch):
    pytest.importorskip("av")
    from polydpo_fast import decode_arguments
    from polydpo_fast.video import timeline

    if wrong == "start":
        monkeypatch.setattr(decode_arguments, "start_of", lambda _: 0.0)
    elif wrong == "pair":
        from polydpo_fast import _C

        store, first = _C.FrameStore, []

        def of_the_first(*, draw, **options):
            first.append(draw)
            return store(draw=first[0] if len(first) % 2 == 0 else draw, **options)

        monkeypatch.setattr(_C, "FrameStore", of_the_first)
    elif wrong == "loop":
        shown = timeline.Timeline.shown_at
        monkeypatch.setattr(timeline.Timeline, "shown_at", lambda self, times, _, clock: shown(self, times, "", clock))
    else:
        normalisation = decode_arguments._normalisation
        monkeypatch.setattr(decode_arguments, "_normalisation", lambda mean, std: normalisation([0.5] * 3, std))
    name = {"start": "moments", "pair": "crops", "loop": "pixels, resized", "mean": "resized in float32"}[wrong]
    assert caught(name, (found for number in range(4) for found in clips.clip(0, number)))


@needs_cpp
@pytest.mark.parametrize("wrong", ["epoch", "prompt", "place", "replaced", "wrap"])
def test_draws_and_ends_that_are_not_the_formulas_are_caught(wrong, monkeypatch):
    from polydpo_fast.data import assembly, loader, order, plan

    if wrong == "epoch":  # each with the same crops
        monkeypatch.setattr(plan.Plan, "seed_at", lambda self, position: order.mix(self.seed, 0, position) >> 1)
    elif wrong == "prompt":
        monkeypatch.setattr(plan.Plan, "drops_prompt_at", lambda *_: False)
    elif wrong == "place":  # in the batch, which depends on the ranks
        decoded = assembly.Assembler._decoded
        monkeypatch.setattr(
            assembly.Assembler,
            "_decoded",
            lambda self, places, out: decoded(self, [replace(p, position=p.row) for p in places], out),
        )
    elif wrong == "replaced":
        monkeypatch.setattr(assembly.Rows, "put", lambda *_: None)
    else:
        steps = loader.PairLoader._steps
        monkeypatch.setattr(
            loader.PairLoader,
            "_steps",
            lambda self, *a: (
                step if self._last != "wrap" else loader.Step(np.maximum(step.positions, 1), step.end)
                for step in steps(self, *a)
            ),
        )
    name = {"replaced": "a bad pair", "wrap": "the last batch"}.get(wrong, "draws")
    assert caught(name, loading.loader(0))


@needs_cpp
@pytest.mark.parametrize("kind", ["manifest", "tar", "Parquet"])
def test_arms_of_files_that_are_taken_the_other_way_are_caught(kind, monkeypatch):
    pytest.importorskip("pyarrow" if kind == "Parquet" else "json")
    from polydpo_fast.data import assembly

    decoded = assembly.Assembler._decoded

    def swapped(self, places, out):
        for place in places:
            place.pair = replace(place.pair, win=place.pair.lose, lose=place.pair.win)
        return decoded(self, places, out)

    assert not broken(loading.stored(0, kind))
    monkeypatch.setattr(assembly.Assembler, "_decoded", swapped)
    assert broken(loading.stored(0, kind)) == {"each pair once"}


def test_nothing_is_checked_twice():
    jobs = run._jobs(Report(0, False), [("cpp", "cpu"), ("reference", "cpu")], None, ["cpu"], None)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)


# -------------------------------------------------------------------------------------------- command line


def test_what_is_not_there_is_said_and_no_failure(few, monkeypatch):
    monkeypatch.setattr(data, "missing", lambda *packages: "Pillow is not installed" if "PIL" in packages else "")
    monkeypatch.setattr(clips, "clip", lambda *arguments: iter(()))
    monkeypatch.setattr(run, "_BACKENDS", ("reference",))
    monkeypatch.setattr(run, "_CASES", (3, 3))
    result = runner.invoke(app, ["check", "--seed", "0", "--seconds", "280"])
    assert result.exit_code == 0, result.output
    assert "not run: decode_pairs: Pillow is not installed" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "device is 'tpu'; expected 'cpu', or 'cuda'"),
        (["--device", "cuda:99"], "device is 'cuda:99'; there are"),
        (["--device", "cpu:"], "device is 'cpu:'; expected 'cpu', or 'cuda'"),
        (["--backend", "numpy"], "backend is 'numpy'; expected one of 'cpp', 'triton', 'reference'"),
        (["--case", "3"], "--case needs the --seed"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_options_are_named(options, message):
    result = runner.invoke(app, ["check", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_without_time_no_cases_are_begun_and_that_is_said(few):
    result = runner.invoke(app, ["check", "--seed", "0", "--backend", "reference", "--seconds", "0"])
    assert result.exit_code == 1
    assert "not run: reference on cpu from case 0 on: no time was left" in result.output
    assert "reference on cpu: 0 cases, of 20 at least: no time was left" in result.output
    assert "parts not finished (time limit)" in result.output
    assert " broken" not in result.output


def test_it_ends_within_a_minute_unless_it_is_to_be_thorough(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run, "_CASES", (14, 14))
    monkeypatch.setattr(run, "_gather", lambda *_: clock.append(clock[-1] + 5.0))
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[-1])
    assert check(seed=0, backend="reference", device="cpu").seconds < 60
    assert check(seed=0, backend="reference", device="cpu", thorough=True).seconds > 60


def test_no_backend_is_left_without_cases(few, monkeypatch):
    """One that takes all the time it is given leaves theirs to the others."""
    clock = [0.0]

    def slow(report, subject, device, *_):
        clock[0] += 40.0 if subject == "triton" else 0.1
        report.add(subject, device, Finding("value", 0.0), "1e-6")

    monkeypatch.setattr(run, "_gather", slow)
    monkeypatch.setattr(run, "_CASES", (20, 20))
    monkeypatch.setattr(run, "available_backends", lambda device: ("cpp", "triton", "reference"))
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    report = check(seed=0, device="cpu", seconds=100.0)
    groups = {(group["subject"], group["check"]): group for group in json.loads(report.as_json())["groups"]}
    for backend in ("cpp", "reference"):
        assert groups[backend, "value"]["cases"] >= 20


def test_a_file_that_cannot_be_written_is_told_at_once(monkeypatch, tmp_path):
    from polydpo_fast import check as package

    monkeypatch.setattr(package, "check", lambda **_: pytest.fail("it ran"))
    result = runner.invoke(app, ["check", "--json", str(tmp_path / "no" / "such" / "folder.json")])
    assert result.exit_code == 2
    assert "No such file" in result.output


@pytest.mark.parametrize("width", [40, 120])
def test_narrow_terminals_get_lines(width):
    report, console = Report(0, False), Console(width=width, file=StringIO())
    report.add("cpp", "cpu", Finding("value", 0.5, 2.0), "1e-6", case=3)
    report.print(console)
    line = "\ncpp on cpu: value (1e-6): cases 1, ulp 2.00, relative 0, of tolerance 50%, worst case 3\n"
    assert (line in console.file.getvalue()) == (width == 40)


def test_a_seed_is_drawn_and_printed(few, monkeypatch):
    monkeypatch.setattr(run, "_CASES", (1, 1))
    seeds = {runner.invoke(app, ["check", "--backend", "reference"]).output.split("seed ")[-1] for _ in range(2)}
    assert len(seeds) == 2


# ------------------------------------------------------------------------------------- cases and comparisons


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
