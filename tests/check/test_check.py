"""`polydpo-fast check`: what is right is within its gates, and the command."""

import json
from io import StringIO

import pytest
from check.checking import runner
from rich.console import Console

import polydpo_fast
from polydpo_fast.check import check, clips, data, run
from polydpo_fast.check.report import Finding, Report, must
from polydpo_fast.cli import app


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


@pytest.mark.heavy
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


def test_nothing_is_checked_twice():
    jobs = run._jobs(Report(0, False), [("cpp", "cpu"), ("reference", "cpu")], None, ["cpu"], None)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)


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
        (["--device", "cpu:1"], "device is 'cpu:1'; expected 'cpu', or 'cuda'"),
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
