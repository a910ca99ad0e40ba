"""`polydpo-fast check` finds what is wrong: changed lines of the library are caught and named."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from check.checking import PLAIN, needs_cpp, runner

import polydpo_fast
from polydpo_fast import functional, metrics
from polydpo_fast.check import cases, check, clips, encoding, exact, images, loading, losses, planes, run
from polydpo_fast.check.report import Report
from polydpo_fast.cli import app
from polydpo_fast.fused import cpu, fast_lane, operators, programs

PACKAGE = Path(polydpo_fast.__file__).parent
heavy = pytest.mark.heavy


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
        pytest.param(
            "mask + row * mask_stride + first + at",
            "mask + row * mask_stride + at",
            "gradient",
            marks=heavy,
        ),
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
@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("mix(self._key, 2, group)", "mix(self._key, 2, 0)"),
        ("permute(np.arange(len(blocks)), len(blocks), mix(key, 1))", "np.arange(len(blocks))"),
        ("np.divmod(self._epoch * quota + slots", "np.divmod(slots"),
        ("np.argsort(result - exact", "np.argsort(exact - result"),
        ("permute(turns[now], count, mix(self._seed, 4, code, lap))", "turns[now]"),
        ("slots = permute(positions, self._size, self._key)", "slots = positions"),
    ],
    ids=["windows alike", "blocks as they are", "each epoch anew", "the smallest remainder", "as they are", "in turns"],
)
def test_a_changed_line_of_an_order_is_caught_and_named(line, changed, monkeypatch):
    """Of windows, in which Parquet is read, and of shares."""
    from polydpo_fast.data import loader, order

    source = Path(order.__file__).read_text()
    assert source.count(line) == 1
    names = {**vars(order)}
    exec(compile(source.replace(line, changed), order.__file__, "exec"), names)
    for module in (loader, order):
        monkeypatch.setattr(module, "order_of", names["order_of"])
    assert broken(loading.loader(0)) == {"order"}


@needs_cpp
def test_seeds_that_are_not_heeded_are_caught(monkeypatch):
    pytest.importorskip("PIL")
    from polydpo_fast.decoding import arguments as decode_arguments

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
@pytest.mark.parametrize("wrong", ["diagonal", "even"])
def test_crops_and_mirrors_of_other_numbers_are_caught(wrong, monkeypatch):
    from polydpo_fast.decoding import arguments as decode_arguments

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
    from polydpo_fast.data.formats import columns

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
    from polydpo_fast.decoding import arguments as decode_arguments
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
