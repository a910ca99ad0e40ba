"""`make gpu` says what ran, what failed and what could not run; here on a machine without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


@pytest.fixture
def run(gpu, tmp_path):
    return gpu.Run(tmp_path / "log")


def test_a_part_passes_or_says_why_not(run, tmp_path):
    assert run.part("good", [sys.executable, "-c", "print('seen')"], 60) == "seen\n"
    assert run.part("bad", [sys.executable, "-c", "print('first'); raise SystemExit('the reason')"], 60) is None
    assert run.part("absent", [sys.executable, "-c", ""], 60, ("no_such_package",)) is None
    assert run.parts["good"]["status"] == "passed"
    assert run.parts["bad"]["reason"] == "exit code 1: the reason"
    assert run.parts["absent"] == {"status": "not run", "reason": "no_such_package not installed"}
    log = (tmp_path / "log").read_text()
    assert "seen" in log
    assert "first" in log


def test_parts_find_what_was_built_not_the_source(gpu, monkeypatch, tmp_path):
    """Python looks into the folder it is started in before anywhere else; the source has neither kernels nor _C."""
    monkeypatch.setattr(gpu, "PROBE", "import json; print(json.dumps({'gpu': 'X', 'torch': '2.9'}))")
    where = "import polydpo_fast; print(polydpo_fast.__file__)"
    found = []
    monkeypatch.setattr(
        gpu, "on_gpu", lambda run: found.append(run.part("where", [sys.executable, "-c", where], 60)) or {}
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main() == 0
    assert Path(found[0].strip()) == tmp_path / "work" / "polydpo_fast" / "__init__.py"


def test_on_a_gpu_tests_and_checks_run_side_by_side_and_then_the_benchmark(gpu, run, monkeypatch):
    began, ended, asked = {}, {}, []

    def part(name, command, limit_s, needs=(), folder=None):
        asked.append(command)
        began[name] = time.monotonic()
        time.sleep(0.5)
        ended[name] = time.monotonic()
        for argument in command:
            if argument.startswith("--junitxml="):
                Path(argument.removeprefix("--junitxml=")).write_text(
                    '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>'
                )

    monkeypatch.setattr(run, "part", part)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: range(8))
    results = gpu.on_gpu(run)
    assert results["tests of the kernels"] == dict(tests=12, failures=0, errors=0, skipped=4, failed=[])
    shares = [f"tests of the kernels, {share} of 4" for share in (1, 2, 3, 4)]
    benchmark = began.pop("benchmark of the losses")
    assert set(began) >= {"gpu tests", "check", *shares}
    assert max(began.values()) < min(ended.values())
    assert benchmark >= max(ended[name] for name in began)
    # A file that cannot be imported, as without the extension, keeps no other from running.
    assert all("--continue-on-collection-errors" in command for command in asked if "pytest" in command)


def test_tests_run_without_hypothesis_and_plugins_each_in_one_share():
    """As on a machine that has PyTorch, Triton and pytest."""
    code = "import sys; sys.modules['hypothesis'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("loss", "options")]
    options = ["-p", "no:cacheprovider", "-k", "log_two or any_mix or compiles", "-rA"]
    passed, skipped = [], 0
    for share in ("0/2", "1/2"):
        done = subprocess.run(
            [sys.executable, "-c", code, *files, *options, f"--share={share}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        passed.append({line for line in done.stdout.splitlines() if line.startswith("PASSED")})
        skipped += "hypothesis is not installed" in done.stdout
    assert skipped == 1
    assert not passed[0] & passed[1]
    assert abs(len(passed[0]) - len(passed[1])) <= 1 < len(passed[0])


def test_the_checks_need_neither_typer_nor_rich(gpu, tmp_path):
    there = gpu.CHECK.replace('check(device="cuda"', 'check(device="cpu", case=0').replace('"cuda"', '"cpu"')
    code = f"import sys; sys.modules.update(rich=None, typer=None){there}"
    written = tmp_path / "check.json"
    done = subprocess.run([sys.executable, "-c", code, str(written)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(written.read_text())["groups"]


def test_tests_that_failed_are_named_where_they_are_seen_and_the_benchmark_has_what_is_left(
    gpu, run, monkeypatch, capsys
):
    """A machine that is lent may give back no more than the end of what was printed."""
    begun = []

    def part(name, command, limit_s, needs=(), folder=None):
        begun.append((name, command, limit_s))
        for argument in command:
            if argument.startswith("--junitxml=") and name == "gpu tests":
                Path(argument.removeprefix("--junitxml=")).write_text(
                    '<testsuites><testsuite tests="1" failures="1"><testcase classname="a" name="b">'
                    '<failure message="1 is not 2"/></testcase></testsuite></testsuites>'
                )

    monkeypatch.setattr(run, "part", part)
    gpu.on_gpu(run)
    assert "gpu tests: a.b: 1 is not 2\n" in capsys.readouterr().out
    name, command, limit_s = begun[-1]
    assert name == "benchmark of the losses"
    assert 380 < float(command[command.index("--seconds") + 1]) < limit_s - 60


def test_a_part_that_takes_too_long_is_ended_with_its_children(run):
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    run.part("slow", [sys.executable, "-c", f"print('what hangs'); {sleep}"], 5.5)
    assert time.monotonic() - begin < 30  # the child holds the pipe open until it ends
    assert run.parts["slow"]["status"] == "failed"
    assert run.parts["slow"]["reason"] == "took more than 6 s: what hangs"


def test_nothing_begins_when_no_time_is_left(gpu, run, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_S", 4)
    run.part("late", [sys.executable, "-c", "raise SystemExit(1)"], 60)
    assert run.parts["late"] == {"status": "not run", "reason": "no time was left of 4 s"}


@pytest.mark.parametrize(
    ("found", "code", "reason"),
    [
        ({"gpu": None, "torch": "2.9"}, 3, "there is no CUDA or ROCm device"),
        ({"gpu": None, "torch": None}, 3, "PyTorch cannot be imported"),
        ({"gpu": "NVIDIA Some GPU", "torch": "2.9"}, 0, None),
    ],
)
def test_results_and_log_are_written(gpu, monkeypatch, tmp_path, found, code, reason):
    """The extension is not built here, and the parts that need a GPU are not run: what is told of them is."""
    monkeypatch.setattr(gpu, "PROBE", f"import json; print(json.dumps({found!r}))")
    monkeypatch.setattr(gpu, "on_gpu", lambda run: {"check": {"passed": True}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main() == code
    name = "gpu-none" if code else "gpu-nvidia-some-gpu"
    report = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert report["parts"]["C++ extension"]["reason"] == "setuptools, pybind11 not installed"
    assert report["parts"]["import"]["status"] == "passed"  # without the extension, kernels/ in its place
    assert (report.get("check") is None) == bool(code)
    if code:
        assert report["parts"]["check"] == {"status": "not run", "reason": reason}
    assert (tmp_path / "out" / f"{name}.log").read_text()


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("echo '580.95.05, 1980 MHz, 3201 MHz, 700.00 W'", ["580.95.05", "1980 MHz", "3201 MHz", "700.00 W"]),
        ("echo 'No devices were found'; exit 6", None),
        ("true", None),
    ],
)
def test_clocks_and_power_of_the_gpu_are_kept(gpu, tmp_path, says, told):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = f"import sys; sys.modules['torch'] = None{gpu.PROBE}"
    ran = subprocess.run([sys.executable, "-c", code], env={"PATH": str(tmp_path)}, capture_output=True, check=True)
    found = json.loads(ran.stdout)
    names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    assert [found.get(name) for name in names] == (told or [None] * 4)


def test_a_machine_without_pytorch_is_told_from_one_without_a_gpu(gpu):
    code = f"import sys; sys.modules['torch'] = None{gpu.PROBE}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found)["torch"] is json.loads(found)["gpu"] is None


@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (False, False)])
def test_make_takes_the_first_python_that_has_pytorch(tmp_path, first, second):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, imports in (("first", first), (".venv/bin/python", second)):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {1 - imports}\necho {name} runs "$@"\n')
        (tmp_path / name).chmod(0o755)
    command = ["make", "-s", "gpu", f"PYTHON={tmp_path / 'first'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    name = ".venv/bin/python" if second and not first else "first"
    assert done.stdout == f"{name} runs scripts/gpu.py\n"


@pytest.mark.parametrize(("version", "goes_on"), [((3, 10, 19), False), ((3, 11, 0), True), ((3, 13, 1), True)])
def test_make_says_that_the_pinned_versions_want_a_newer_python(tmp_path, version, goes_on):
    """NumPy 2.4 and others of constraints.txt have no release for Python 3.10: pip would only find no such version."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "system-packages.sh").write_text("echo goes on; exit 1\n")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "-s", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == ("goes on\n" if goes_on else "")
    assert ("make wants Python 3.11 or later" in done.stderr) is not goes_on


def test_an_import_that_fails_is_the_reason_of_all_that_did_not_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PROBE", 'print(\'{"gpu": "X", "torch": "2.9"}\')')
    monkeypatch.setattr(gpu, "IMPORT", "raise SystemExit('no such symbol')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 1
    parts = json.loads((tmp_path / "gpu-x.json").read_text())["parts"]
    assert parts["import"]["reason"] == "exit code 1: no such symbol"
    for name in ("gpu tests", "tests of the kernels", "check", "benchmark of the losses"):
        assert parts[name] == {"status": "not run", "reason": "the import failed"}


def test_a_pytorch_that_fails_is_the_reason_of_all_that_did_not_run(gpu, monkeypatch, tmp_path):
    """A library that it cannot load is not a machine without a GPU."""
    monkeypatch.setattr(gpu, "PROBE", "raise OSError('libcudart.so: cannot open shared object file')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 3
    parts = json.loads((tmp_path / "gpu-none.json").read_text())["parts"]
    reason = "exit code 1: OSError: libcudart.so: cannot open shared object file"
    assert parts["machine"] == {"status": "failed", "seconds": parts["machine"]["seconds"], "reason": reason}
    assert parts["check"] == {"status": "not run", "reason": f"PyTorch failed: {reason}"}


def test_warnings_behind_the_json_do_not_hide_it(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PROBE", 'print(\'{"gpu": null, "torch": "2.9"}\'); print("sys:1: ResourceWarning: x")')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 3
    assert json.loads((tmp_path / "gpu-none.json").read_text())["machine"]["torch"] == "2.9"


def test_a_failed_part_fails_the_whole(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PROBE", 'print(\'{"gpu": "X", "torch": "2.9"}\')')
    monkeypatch.setattr(
        gpu, "on_gpu", lambda run: run.part("check", [sys.executable, "-c", "raise SystemExit(1)"], 60) or {}
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else True)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main() == 1


def test_failures_are_taken_from_pytest(gpu, tmp_path):
    xml = tmp_path / "tests.xml"
    xml.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="b">'
        '<failure message="1 is not 2">...</failure></testcase></testsuite></testsuites>'
    )
    expected = dict(tests=6, failures=2, errors=0, skipped=2, failed=["a.b: 1 is not 2"] * 2)
    assert gpu.counted([xml, xml]) == expected


def test_modules_that_lack_a_package_are_told_apart(gpu, tmp_path):
    test = tmp_path / "test_x.py"
    test.write_text(
        "import json\nimport oracle\nimport no_such_package\nfrom another_one import x\nfrom tests import y\n"
    )
    assert gpu.missing_imports(test)[:2] == ["another_one", "no_such_package"]
    assert gpu.missing_imports(ROOT / "tests" / "test_gpu.py") == []


def test_a_machine_without_git_has_no_commit(gpu, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu.commit() is None


class Clock:
    """A CUDA event: when it was recorded, in calls of the work."""

    work = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.work

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_the_benchmark_on_a_gpu_times_what_is_queued_and_survives_a_compiler_that_fails(monkeypatch, capsys):
    """Its path for a GPU, on a CPU of another name: cold and warm are of one replay each, ours is always there."""
    import loss

    def fails(*tensors):
        raise ValueError("no such instruction")

    def replayed(step):
        def replay():
            Clock.work += 2.0
            step()

        return replay

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(loss, "COPIED", 2**10)
    monkeypatch.setattr(loss, "captured", replayed)
    monkeypatch.setattr(loss, "peak_bytes", lambda *_: 7)
    monkeypatch.setitem(loss.COMPILED, "torch.compile", lambda: fails)
    job = loss.Job("tiny", (2, 3), torch.float32)
    monkeypatch.setattr(loss, "l2_bytes", lambda device: 2 * 6 * 3 * 4 - 1)  # half of it lacks a byte for the inputs
    found, failed = loss.measure(job, "cpu:0", rounds=2)
    rows = {one.way: loss.row(one) for one in found}
    assert failed == [{"case": job.case, "way": "torch.compile", "reason": "ValueError: no such instruction"}]
    assert rows["ours"]["bytes"] == 6 * 6 * 4  # six elements; the second launch reads again
    assert loss.moved(job._replace(shape=(2, 2)), "cpu:0") == 4 * 4 * 4
    monkeypatch.setattr(loss, "l2_bytes", lambda device: 2 * 6 * 3 * 4)
    assert loss.moved(job, "cpu:0") == 4 * 6 * 4
    assert set(rows) == {"ours", "eager", "Salesforce's formula", "copy"}
    assert rows["ours"]["median"] == rows["ours"]["gpu, warm L2"] == 2.0
    assert rows["ours"]["clock"] == "gpu"
    assert rows["ours"]["least"] == 2.0
    loss.printed([*rows.values(), {**rows["copy"], "median": 1.0}], "cuda")
    printed = capsys.readouterr().out
    assert "torch.compile failed: ValueError: no such instruction" in printed
    assert "tiny, float32, forward and backward" in printed
    monkeypatch.setattr(loss.polydpo_fast, "loss", fails)
    with pytest.raises(ValueError, match="no such instruction"):
        loss.measure(job, "cpu:0", rounds=2)


def test_the_time_of_the_host_is_that_of_every_way_that_compiles(monkeypatch):
    import loss

    def fails(*tensors):
        raise ValueError("no such instruction")

    for compiled, device, more in ((loss.trainers.eager, "cpu", ["torch.compile"]), (fails, "cpu:0", [])):
        monkeypatch.setitem(loss.COMPILED, "torch.compile", lambda compiled=compiled: compiled)
        found, failed = loss.host(device, calls=20)
        assert [one.way for one in found] == [
            *("ours", "an empty autograd.Function", "eager", "Salesforce's formula"),
            *more,
        ]
        assert [one.way for one in found if one.ours] == ["ours"]
        assert all(len(one.times["wall"]) == 18 and min(one.times["wall"]) > 0 for one in found)
        assert [one["reason"] for one in failed] == [] if more else ["ValueError: no such instruction"]
    with pytest.raises(ValueError, match="no such instruction"):
        loss.host("cpu", calls=1)


def test_the_benchmark_on_a_gpu_begins_with_every_model_and_tunes_compilers_later(monkeypatch, tmp_path, capsys):
    """Tuning compiles for most of a minute a case: what has been measured by then stays if no time is left for it."""
    import loss

    jobs = loss.jobs("cuda")
    first = {job.case: job for job in jobs[: len(loss.SHAPES)]}
    assert [(job.name, job.dtypes, job.compiled) for job in first.values()] == [
        (model, "bfloat16", ("torch.compile",)) for model in loss.SHAPES
    ]
    again = [job for job in jobs[len(first) :] if job.case in first]
    assert {job.name for job in again} == {"SDXL", "Wan 480p"}
    assert all({"torch.compile, max-autotune", "torch.compile"} < {*job.compiled} for job in again)
    assert len({(job.case, job.compiled) for job in jobs}) == len(jobs)

    clock = [0.0]

    def measured(job, device):
        clock[0] += 1.0
        ways = ("ours", *job.compiled, "eager", "copy")
        facts = {"bytes": 1, "backward": True}
        times = {"gpu": [clock[0]]}
        return [loss.Measured(job.case, way, times, way == "ours", "gpu", facts=facts) for way in ways], []

    monkeypatch.setattr(loss.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loss, "host", lambda device: ([], []))
    monkeypatch.setattr(loss, "measure", measured)
    monkeypatch.setattr(loss, "jobs", lambda device: [*first.values(), *again])
    monkeypatch.setattr(sys, "argv", ["loss.py", "--seconds", "5.5", "--json", str(tmp_path / "loss.json")])
    loss.main()
    kept = json.loads((tmp_path / "loss.json").read_text())
    medians = {(row["case"], row["way"]): row["median"] for row in kept["rows"]}
    repeated, left = again
    assert medians[repeated.case, "ours"] == medians[repeated.case, "torch.compile, max-autotune"] == 6.0
    assert medians[left.case, "ours"] == 1.0 + [*first].index(left.case)
    assert [(one["case"], one["way"]) for one in kept["skipped"]] == [(left.case, way) for way in left.compiled[1:]]
    assert f"not measured: {left.case}, torch.compile, max-autotune: no time was left of 6 s" in capsys.readouterr().out
