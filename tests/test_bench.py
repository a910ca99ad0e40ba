"""`polydpo-fast bench`: what is kept of a run, how two are compared; and that the documents show what was measured."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import report
import tables
import torch
from finishing import as_the_scripts, finish
from timing import Measured, cpu_and_wall, interleaved, row
from typer.testing import CliRunner

from polydpo_fast import bench, results_file
from polydpo_fast.cli import app
from polydpo_fast.comparison import compare

ROOT = Path(__file__).parent.parent


def results(ours, peers=(2.0, 3.0), iqr=0.0, **facts):
    """One case of a suite: medians of our way, whose name does not say so, and of its peers."""
    ways = {"mine": ours, **{f"peer {number}": median for number, median in enumerate(peers)}}
    rows = [
        {
            "case": "c",
            "way": way,
            "ours": way == "mine",
            "clock": "cpu",
            "median": median,
            "iqr": iqr * median,
            "rounds": 9,
            **(facts if way == "mine" else {}),
        }
        for way, median in ways.items()
    ]
    return {"machine": {"name": "m"}, "suites": {"s": {"versions": {"torch": "2"}, "rows": rows}}}


def only(before, after):
    (change,) = compare(before, after).changes
    return change


def test_a_slower_way_is_told_from_a_slower_machine():
    change = only(results(1.0), results(1.5))
    assert change.worse
    assert change.ratio == pytest.approx(1.5)
    change = only(results(1.0), results(1.5, peers=(3.0, 4.5)))  # all take half as long again
    assert not change.worse
    assert not change.better
    assert change.ratio == pytest.approx(1.0)
    assert only(results(1.0), results(1.0, peers=(3.0, 4.5))).better


def test_what_may_be_chance_is_no_change():
    assert not only(results(1.0), results(1.04)).worse  # less than a twentieth
    assert only(results(1.0), results(1.06)).worse
    noisy = only(results(1.0, iqr=0.3), results(1.3, iqr=0.3))
    # Of a median: 0.93 * 0.3 / sqrt(9) = 0.093. Ours in two runs, and half of that of four medians of peers.
    assert noisy.noise == pytest.approx(3 * (2 * 0.093**2 + 4 * 0.093**2 / 4) ** 0.5)
    assert not noisy.worse
    assert only(results(1.0, iqr=0.3), results(2.0, iqr=0.3)).worse


def test_one_odd_peer_hides_nothing_and_peers_that_disagree_are_noise():
    before, odd = results(1.0, peers=(1.0, 1.0, 1.0)), results(1.5, peers=(1.0, 1.0, 9.0))
    assert only(before, odd).ratio == 1.5
    assert only(before, odd).worse
    apart = only(before, results(1.3, peers=(0.8, 1.0, 1.2)))
    assert apart.noise == pytest.approx(3 * 1.48 * 0.2)
    assert not apart.worse


def test_without_a_peer_only_twice_the_time_is_slower():
    """The machine may be a slower one now: nothing tells."""
    assert not only(results(1.0, peers=()), results(1.9, peers=())).worse
    assert only(results(1.0, peers=()), results(2.1, peers=())).worse
    # Peers of another case of the suite were there in the same run.
    before, after = results(1.0, peers=(1.0,)), results(1.3, peers=(1.3,))
    for found in (before, after):
        found["suites"]["s"]["rows"][0]["case"] = "alone"
    assert only(before, after).ratio == 1.0


def test_medians_that_are_zero_or_no_numbers():
    nan = float("nan")
    assert only(results(1.0), results(nan)).worse
    assert only(results(1.0), results(1.5, peers=(nan, 3.0))).worse  # of that peer nothing is known
    assert only(results(0.0), results(1.0)).worse
    assert not only(results(0.0), results(0.0)).worse
    assert not only(results(1.0), results(1.0, peers=(0.0, 3.0))).worse


@pytest.mark.parametrize(
    ("fact", "before", "bad", "fine"),
    [
        ("peak_bytes", 100, 102, 100),
        ("peak MB", 100, 120, 105),
        ("bytes of memory per pair", 50, 70, 55),
        ("seconds to resume", 0.01, 0.03, 0.015),
        ("win_rate", 1.0, 0.9, 0.99),
        ("mean error", 1e-8, 4e-4, 1.5e-8),
        ("gpu, warm L2", 1.0, 1.2, 1.05),
    ],
)
def test_other_facts_may_be_worse_whatever_the_time(fact, before, bad, fine):
    for after, worse in ((bad, True), (fine, False), (before, False)):
        found = compare(results(1.0, iqr=2.0, **{fact: before}), results(0.5, iqr=2.0, **{fact: after}))
        assert {change.what: change.worse for change in found.changes} == {"time": False, fact: worse}


def test_what_vanished_is_listed_and_other_machines_and_versions_are_told():
    before, after = results(1.0), results(1.0, peers=(2.0,))
    before["suites"]["t"] = {"rows": []}
    after["machine"]["name"], after["suites"]["s"]["versions"]["torch"] = "n", "3"
    found = compare(before, after)
    assert found.vanished == ["s: c: peer 1", "t: the whole suite"]
    assert found.worse
    assert found.warnings == ["name: m before, n after", "torch: 2 before, 3 after"]
    assert not compare(after, before).worse
    for kept in (*before["suites"]["s"]["rows"], *after["suites"]["s"]["rows"]):
        del kept["ours"]
    assert "nothing was judged" in compare(before, after).warnings[0]


def test_the_command_compares_and_exits_with_what_it_found(tmp_path):
    files = {"a": results(1.0), "b": results(2.0), "less": {**results(1.0), "suites": {}}}
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))

    def compared(*names):
        return CliRunner().invoke(app, ["bench", "--compare", *(str(tmp_path / f"{name}.json") for name in names)])

    worse = compared("a", "b")
    assert worse.exit_code == 1
    assert "1 worse, 0 better of 1" in worse.output
    assert compared("b", "a").exit_code == 0
    gone = compared("a", "less")
    assert gone.exit_code == 1
    assert "gone: s: the whole suite" in gone.output
    for content in ([], {**results(1.0), "suites": []}, {**results(1.0), "suites": {"s": {}}}, *wrong_rows()):
        (tmp_path / "c.json").write_text(json.dumps(content))
        wrong = compared("a", "c")
        assert wrong.exit_code == 2
        assert "c.json is no file of results" in wrong.output
    for more in (["loss"], ["--out", "x"], ["--replace"], ["--dirty"]):
        wrong = CliRunner().invoke(
            app, ["bench", *more, "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
        )
        assert wrong.exit_code == 2
        assert "--compare measures nothing" in wrong.output


def wrong_rows():
    for change in ({"way": None}, {"median": "1"}, {"rounds": None}):
        found = results(1.0)
        found["suites"]["s"]["rows"][0] |= change
        yield found


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


def test_ways_take_turns_and_first_calls_do_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(ways, rounds=2, calls=2, stopwatch=lambda run: {"cpu": run() or float(len(calls))})
    assert "".join(calls) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert times["b"]["cpu"] == [11.5, 26.5]  # a median for each round: its calls are not independent of each other
    found = row(Measured("c", "b", times["b"], True))
    assert (found["median"], found["rounds"]) == (19.0, 2)


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


# ------------------------------------------------------------------------------------------------- the documents


def test_empty_cells_beside_each_other_are_cells():
    lines = tables.table(["", "a", "b"], [["x", "", ""], ["", "", "y"]]).splitlines()
    assert lines == ["| | a | b |", "| --- | ---: | ---: |", "| x | | |", "| | | y |"]


def curve(suite, name, at, seconds, **facts):
    rows = [
        {"case": f"{name} {x}", "way": "ours", "ours": True, "curve": name, "at": x, "median": t, "iqr": 0.0}
        | {fact: values[number] for fact, values in facts.items() if fact != "copy"}
        for number, (x, t) in enumerate(zip(at, seconds, strict=True))
    ]
    copies = [{**row, "way": "copy", "median": t} for row, t in zip(rows, facts.get("copy", ()), strict=False)]
    suites = {suite: {"command": "polydpo-fast bench", "rows": rows + copies}}
    return {"machine": {"processors": 2}, "suites": suites}


def test_the_sentences_of_a_curve_name_its_worst_point():
    loss = curve(
        *("scaling", "loss, one pair, elements per sample", [10, 100, 1000, 10_000], [1e-3, 2e-3, 4e-2, 4e-1]),
        bytes=[8e6, 8e7, 8e8, 1.6e10],
        copy=[1e-4, 1e-3, 1e-2, 2e-1],
    )
    text = tables.scaling(loss)
    assert "The smallest takes 1000 us." in text
    # 4e10 bytes per second, then 2e10, then 4e10 again.
    assert "highest at 100: 40.0 GB/s, 50% of a copy of as many bytes; " in text
    assert "lowest at 1,000: 20.0 GB/s, 25%; in the end, at 10,000: 40.0 GB/s, 50%." in text
    pixels = curve("scaling", "decoding, one thread, side of the image", [100, 200, 400], [1e-3, 8e-3, 16e-3])
    assert "at least 5 at 200 x 200, at most 10 at 400 x 400" in tables.scaling(pixels)
    pairs = curve("scaling", "decoding, two threads, pairs", [1, 2, 4], [2e-3, 5e-3, 3e-3])
    assert "An image costs 2.0 ms (batches of 1) to 5.0 ms (batches of 2)." in tables.scaling(pairs)
    name, at = "loader, first batch, pairs in the source", [10, 20, 30]
    first = curve("scaling", name, at, [2e-3, 9e-3, 3e-3], **{"seconds per pair": [1e-6, 7e-6, 2e-6]})
    assert "takes 2 ms (10 pairs) to 9 ms (20); a pair after it costs 1 to 7 us" in tables.scaling(first)
    ranks = curve("scaling", "loader, first batch of 9 pairs, ranks", at, [2e-3, 9e-3, 3e-3])
    assert "at worst one of 20 after 9 ms" in tables.scaling(ranks)


def test_the_share_of_bare_decoding_is_that_of_the_rates_beside_it(shown):
    changed = json.loads(json.dumps(shown))
    for found in changed["suites"]["clips"]["rows"]:
        found.pop("of bare decoding", None)
        if found["way"] == "bare_decoding":
            found["median"] = 0.01
        elif found["way"] == "ours_cthw":
            found["median"] = 0.008
    assert "| ours, bfloat16 (C, T, H, W) | 125 (1.25) | 125 (1.25) |" in tables.clips(changed)


def test_shares_of_a_copy_above_all_of_it_are_explained():
    assert "beyond 100%" in report.NOTES["loss"]


@pytest.fixture(scope="module")
def shown():
    return results_file.read_results(report.RESULTS / f"{report.SHOWN}.json")


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_figures_are_those_of_the_results(path, shown):
    text = path.read_text()
    assert tables.filled(text, shown) == text, "run `make report`"


def test_the_readme_has_its_tables():
    text = (ROOT / "README.md").read_text()
    for name in ("measured", "precision", "loss", "decode", "clips", "loader"):
        assert f"<!-- results: {name} -->" in text


def test_figures_that_are_arithmetic():
    """Bytes of a pair in an index, on the page of the data; numbers of a cached pair, on that of trainings."""
    from polydpo_fast.data.manifest import ManifestPairs
    from polydpo_fast.data.tar import TarPairs

    data, training = (" ".join((ROOT / "docs" / f"{name}.md").read_text().split()) for name in ("data", "training"))
    assert f"{TarPairs.row.itemsize} for shards and {ManifestPairs.row.itemsize} for manifests" in data
    assert f"A pair takes {4 * (2 * 4 * 64 * 64 + 77 * 768) / 1000:.0f} kB for SD1.5" in training


def test_the_published_script_in_float16_is_as_the_pages_say():
    import precision

    script, batch = precision.FORMULAS["Salesforce's script (in the inputs' dtype)"], precision.batch
    wrong = precision.survival(script, batch(torch.float32, torch.float16))["wrong sign"]
    assert round(10 * wrong) == 1
    assert "the sign is wrong in one pair of ten" in (ROOT / "docs" / "loss.md").read_text()
    assert "and of a tenth in its own fp16" in (ROOT / "README.md").read_text()


def test_the_fastest_way_is_in_bold_whatever_a_copy_of_other_bytes_takes():
    ways = {"ours": {"median": 2e-3}, "eager": {"median": 3e-3}, "copy": {"median": 1e-3}}
    assert tables.best(ways["ours"], ways) == "**2.00**"
    assert tables.best(ways["ours"], {**ways, "eager": {"median": 1.5e-3}}) == "2.00"


def test_the_page_of_benchmarks_is_the_reports():
    assert report.PAGE.read_text() == report.page(report.machines()), "run `make report`"


@pytest.mark.parametrize("wrong", ["<!-- end of result -->", "<!-- end of results-->", ""])
def test_a_mark_without_its_other_is_noticed(shown, wrong):
    text = "<!-- results: precision -->\n\n<!-- end of results -->\n" * 2
    assert tables.filled(text, shown).count("polydpo_fast |") == 6
    with pytest.raises(ValueError, match="blocks of results, but 2 times '<!-- results: ' and 1 times"):
        tables.filled(text.replace("<!-- end of results -->", wrong, 1), shown)
    with pytest.raises(ValueError, match="1 blocks of results, but 1 times"):
        tables.filled(text.replace("<!-- results: ", "<!-- result: ", 1), shown)


def gpu_results(shown, suites=True):
    """As `make gpu` writes them: two small cases, one of a compiler that failed."""
    cases = ("SD1.5, bfloat16, forward and backward", "SD1.5, bfloat16, forward")
    suite = {
        **shown["suites"]["loss"],
        "rows": [
            {**found, "clock": "gpu", "gpu, warm L2": found["median"] / 2}
            for found in shown["suites"]["loss"]["rows"]
            if found["case"] in cases and found["way"] != "torch.compile"
        ],
        "skipped": [{"case": cases[0], "way": "torch.compile", "reason": "no such instruction"}],
    }
    counts = {"tests": 5, "failures": 1, "errors": 0, "skipped": 2, "failed": ["a.b: 1 is not 2"]}
    return {
        "machine": {"gpu": "NVIDIA Some GPU", "torch": "2.9", "memory_gib": 80},
        "commit": "0123",
        "parts": {
            "gpu tests": {"status": "failed", "seconds": 3.5, "reason": "exit code 1: a | b"},
            "C++ extension": {"status": "not run", "reason": "pybind11 not installed"},
        },
        "suites": {"loss": suite} if suites else {},
        "gpu tests": counts,
        "check": {"passed": False, "seed": 7, "seconds": 40.0, "broken": ["loss on triton"]},
    }


@pytest.mark.parametrize("suites", [True, False])
def test_a_gpu_is_reported_with_what_it_has(shown, monkeypatch, tmp_path, suites):
    """No Wan 480p, no time of the host, no torch.compile; or no suite at all; and no name of the processor."""
    import plots

    (tmp_path / "gpu-some.json").write_text(json.dumps(gpu_results(shown, suites)))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (machine,) = report.machines()
    page = report.page([machine])
    assert "## NVIDIA Some GPU" in page
    assert "| C++ extension | not run | | pybind11 not installed |" in page
    assert "| gpu tests | failed | 3.5 s | exit code 1: a \\| b |" in page
    assert "gpu tests: 5 tests, 1 failures, 0 errors, 2 skipped." in page
    assert "check, seed 7, 40.0 s: loss on triton." in page
    assert ("ours, warm L2" in page) == suites
    assert ("gpu, warm L2, ms" in page) == suites
    assert ("- torch.compile, `SD1.5, bfloat16, forward and backward`: no such instruction" in page) == suites
    assert ("No suite was measured." in page) != suites
    plots.save(machine, tmp_path / "plots")
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.svg")}
    assert drawn == ({"roofline", "loss_ratios"} if suites else set())
    assert drawn == set(re.findall(r"benchmarks/gpu-some/(\w+)\.svg", page))


def test_results_of_a_changed_source_are_marked(shown):
    page = report.page([{**shown, "suites": {"precision": {**shown["suites"]["precision"], "commit": "0123-dirty"}}}])
    assert "`-dirty`: the source differed from that commit." in page
    page = report.page([{**shown, "suites": {"precision": {**shown["suites"]["precision"], "commit": None}}}])
    assert "| precision | |" in page  # of a machine without git


def test_times_of_a_gpu_have_digits_enough():
    assert [tables.ms({"median": x}) for x in (1.234e-5, 9.94e-5, 1.234e-4, 0.0123)] == [
        "0.012",
        "0.099",
        "0.12",
        "12.3",
    ]


def test_a_changed_figure_is_noticed(shown):
    text = (ROOT / "README.md").read_text()
    changed = json.loads(json.dumps(shown))
    for found in changed["suites"]["decode"]["rows"]:
        found["median"] *= 1.5
    assert tables.filled(text, changed) != text


def test_plots_are_drawn_from_results(shown, tmp_path):
    import plots

    plots.save(shown, tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {path.stem for path in (report.PAGE.with_suffix("") / report.SHOWN).glob("*.svg")}
    assert drawn == set(plots.PLOTS)


def test_plots_can_be_read(shown):
    """Labels of ticks do not overlap, no two ways look alike, and what is measured per image says so."""
    import plots

    with plots.plt.rc_context(plots.STYLE):
        figure = plots.scaling(shown)
        figure.draw_without_rendering()
        for axes in figure.axes:
            title = axes.get_title("left")
            boxes = [text.get_window_extent() for text in axes.get_xticklabels(which="both") if text.get_text()]
            assert len(boxes) > 3
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), title
            assert axes.get_ylabel() == ("ms per image" if title.startswith("decoding") else "ms")
        (axes,) = plots.decode_ratios(shown).axes
        drawn = [line.get_color() for line in axes.lines]
        assert len(drawn) == len(set(drawn)) > 5
    plots.plt.close("all")
