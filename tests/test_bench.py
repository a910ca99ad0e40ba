"""`polydpo-fast bench`: suites are run, timed in turns and kept."""

import ast
import hashlib
import importlib.util
import itertools
import os
import re
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tables
import torch
from finishing import as_the_scripts, finish
from timing import Measured, cpu_and_wall, interleaved, row
from typer.testing import CliRunner

from polydpo_fast import bench, results_file
from polydpo_fast.cli import app

ROOT = Path(__file__).parent.parent


def test_what_is_no_file_of_results_is_refused_before_anything_is_measured(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("it measured"))
    for name in ("results.json", "results.json.refused"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name} is no file of results"):
            bench.run(["small"], tmp_path / "results.json")
        (tmp_path / name).unlink()


def test_an_unknown_suite_is_named():
    result = CliRunner().invoke(app, ["bench", "los"])
    assert result.exit_code == 2
    assert "suite is 'los'; expected one of" in result.output


def test_without_the_source_the_error_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "polydpo_fast" / "bench.py"))
    with pytest.raises(FileNotFoundError, match="they come with the source"):
        bench.suites()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Suites of a test or two, through pytest-benchmark, in processes of their own."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("timing.py", "conftest.py"):
        (folder / name).write_text((ROOT / "benchmarks" / name).read_text())
    (folder / "test_small.py").write_text(
        "import os, pytest\n"
        "from timing import Measured, report\n"
        "@pytest.mark.parametrize('way', ['mine', 'peer'])\n"
        "def test_small(benchmark, way):\n"
        "    if way == 'peer' and 'PEER' not in os.environ:\n"
        "        pytest.skip('it does not load')\n"
        "    times = {'cpu': [2.0, 4.0, 3.0], 'wall': [5.0]}\n"
        "    report(benchmark, Measured('c', way, times, way == 'mine', per=2, facts={'more': 7}))\n"
    )
    (folder / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    monkeypatch.setattr(bench, "benchmarks_folder", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with it pytest-benchmark measures nothing
    return folder


def test_a_suite_is_run_and_kept_beside_the_others(folder, tmp_path):
    path = tmp_path / "results.json"
    results_file.merge(path, {"other": results_file.suite([], "a command")})
    with pytest.raises(RuntimeError, match="broken"):
        bench.run(out=path)
    found = results_file.read_results(path)
    assert list(found["suites"]) == ["other", "small"]
    kept = found["suites"]["small"]
    # The quartiles of 2, 3, 4 are 2 and 4; all per two things.
    times = {"median": 1.5, "iqr": 1.0, "rounds": 3, "wall": 2.5}
    assert kept["rows"] == [{"case": "c", "way": "mine", "ours": True, "clock": "cpu", **times, "more": 7}]
    assert kept["skipped"] == [{"case": "test_small[peer]", "way": "peer", "reason": "it does not load"}]
    assert "- peer, `test_small[peer]`: it does not load" in tables.skipped(found, "small")
    assert kept["command"] == "polydpo-fast bench small"
    assert kept["versions"]["torch"]
    assert set(results_file.PEERS) <= set(kept["versions"])


def test_a_run_without_a_peer_does_not_drop_its_figures(folder, monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    monkeypatch.setenv("PEER", "1")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{tmp_path / 'build' / 'peers'}")
    bench.run(["small"], path)
    full = path.read_text()
    assert results_file.read_results(path)["suites"]["small"]["command"] == "make bench-peers SUITES=small"
    monkeypatch.delenv("PEER")
    with pytest.raises(RuntimeError, match=r"peer \(1 of its cases\)"):
        bench.run(["small"], path)
    assert path.read_text() == full
    aside = results_file.read_results(tmp_path / "results.json.refused")
    assert [row["way"] for row in aside["suites"]["small"]["rows"]] == ["mine"]
    bench.run(["small"], path, replace=True)
    assert results_file.read_results(path)["suites"] == aside["suites"]


def test_the_kept_results_are_of_a_commit(folder, monkeypatch):
    for module in (bench, results_file):
        monkeypatch.setattr(module, "commit", lambda: "0123-dirty")
    result = CliRunner().invoke(app, ["bench", "small"])
    assert result.exit_code == 2
    assert "the source differs from its commit" in result.output
    assert not (folder / "results").exists()
    assert CliRunner().invoke(app, ["bench", "small", "--dirty"]).exit_code == 0
    (path,) = (folder / "results").glob("*.json")
    assert results_file.read_results(path)["suites"]["small"]["commit"] == "0123-dirty"


def test_a_machine_without_git_has_no_commit_and_keeps_its_results(monkeypatch):
    """As one that was lent for its GPU may be."""
    monkeypatch.setenv("PATH", "")
    found = results_file.suite([], "make gpu")
    assert found["commit"] is None
    assert found["versions"]["torch"] == torch.__version__


def test_pages_and_results_do_not_make_a_source_another(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments], cwd=tmp_path, check=True)

    files = [tmp_path / name for name in ("README.md", "docs/benchmarks.md", "benchmarks/results/m.json", "bench.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "c")
    monkeypatch.setattr(results_file, "__file__", str(files[-1]))
    for file in files:
        assert not results_file.commit().endswith("-dirty")
        file.write_text("2")
    assert results_file.commit().endswith("-dirty")


def test_what_peers_are_finished_by_is_the_same_normalisation():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    out = torch.empty((3, 5, 7))
    finish(rgb, out)
    expected = (torch.from_numpy(rgb).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(as_the_scripts(rgb), expected)


def test_peers_are_pinned_and_their_versions_kept():
    makefile = (ROOT / "Makefile").read_text()
    rule = makefile[makefile.index("$(PEERS)/installed:") :].partition("touch")[0]
    words = [word for line in rule.splitlines() if "#" not in line for word in line.split()]
    packages = [
        word for word in words if re.fullmatch(r"[a-z][a-z0-9-]+(==\S+)?", word) and word not in ("pip", "install")
    ]
    assert all("==" in word for word in packages), packages
    pinned = {word.partition("==")[0] for word in packages}
    assert set(results_file.PEERS) - {"torchcodec"} <= pinned  # that one is timed where somebody has it


def test_the_extra_that_the_error_names_has_the_plugins_that_pytest_is_asked_for():
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^bench = (\[.*\])$", text, re.MULTILINE)
    assert re.search(r"^timeout = ", text, re.MULTILINE)
    assert "--strict-config" in text
    named = {re.split(r"[>\[]", requirement)[0] for requirement in ast.literal_eval(extra)}
    assert {"pytest", "pytest-benchmark", "pytest-timeout"} <= named


def test_suites_have_the_time_they_need_however_they_are_run():
    """`pytest benchmarks/` too, under the limit of pyproject.toml; tests beside them keep that one."""
    spec = importlib.util.spec_from_file_location("conftest_of_benchmarks", ROOT / "benchmarks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marks = {ROOT / "benchmarks" / "test_loss.py": [], ROOT / "tests" / "test_loss.py": []}
    module.pytest_collection_modifyitems([SimpleNamespace(path=path, add_marker=marks[path].append) for path in marks])
    slow, quick = marks.values()
    assert [(mark.name, mark.args) for mark in slow] == [("timeout", (3600,))]
    assert quick == []


def test_ways_take_turns_and_first_calls_do_not_count():
    calls, clock = [], iter(range(10**6))
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(ways, 40, calls=2, stopwatch=lambda run: {"cpu": run() or float(next(clock))}, uncounted=3)
    blocks = ["".join(calls[at : at + 5]) for at in range(0, len(calls), 5)]
    assert set(blocks) == {"aaaaa", "bbbbb", "ccccc"}
    in_order = "".join(block[0] for block in blocks)
    rounds = [in_order[at : at + 3] for at in range(0, len(in_order), 3)]
    assert len(rounds) == 41
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    # No way is always found after the same one, whose leavings it would pay for.
    after = Counter(itertools.pairwise(in_order))
    assert all(after[pair] >= 8 for pair in itertools.permutations("abc", 2)), after
    # A median for each round but the first: its calls are not independent of each other.
    assert times["b"]["cpu"] == [5 * at + 3.5 for at, block in enumerate(blocks) if block[0] == "b"][1:]
    found = row(Measured("c", "b", {"cpu": [11.5, 26.5]}, True))
    assert (found["median"], found["rounds"]) == (19.0, 2)


@pytest.mark.heavy
def test_parts_of_a_training_step_do_their_work_in_any_order(monkeypatch):
    """An optimizer without gradients, or with those of the part before, would take another time than in a step."""
    diffusers = pytest.importorskip("diffusers")
    import test_training

    few = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    unet = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",) * 2)
    tiny = diffusers.UNet2DConditionModel(**few, **unet, cross_attention_dim=768, attention_head_dim=4)
    monkeypatch.setattr(test_training, "large", lambda: tiny)
    monkeypatch.setattr(test_training, "vae", lambda: diffusers.AutoencoderKL(**few, **encoder, latent_channels=4))
    encoder = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    training = test_training.Training()
    training.optimizer.param_groups[0]["lr"] = 0.1  # so that what it does is seen
    step, parts = training.way(False, False), training.parts()
    weight = next(tiny.parameters())
    for name in ("optimizer", "policy, forward and backward", "optimizer", "loss", "decoding", "VAE", "reference"):
        for run, changes in ((step, True), (parts[name], name == "optimizer")):
            before = weight.detach().clone()
            run()
            assert torch.equal(weight, before) != changes, name
            assert all(parameter.grad is None for parameter in tiny.parameters()), name


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="both threads are to run at the same time")
def test_cpu_time_of_other_threads_is_that_of_the_call_not_of_the_last_tick():
    """A thread that hashes all the time cannot use more than the time there is, in calls of 0.1 ms too."""
    data, done, allowed = bytes(2**24), threading.Event(), os.sched_getaffinity(0)
    here, there, *_ = sorted(allowed)

    def hashing():
        os.sched_setaffinity(0, {there})  # of this thread
        while not done.is_set():
            hashlib.sha256(data).digest()  # without the interpreter's lock

    busy, shares = threading.Thread(target=hashing), []
    busy.start()
    os.sched_setaffinity(0, {here})
    try:
        for _ in range(500):
            begin = time.perf_counter()
            cpu = cpu_and_wall(lambda: time.sleep(1e-4))["cpu"]
            shares.append(cpu / (time.perf_counter() - begin))
    finally:
        os.sched_setaffinity(0, allowed)
        done.set()
        busy.join()
    assert max(shares) < 2.1  # of two threads; the clock of the process alone shows 20 now and then, and else nothing
