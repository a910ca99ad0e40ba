"""`polydpo-fast bench`: what is kept of a run, how two are compared; and that the documents show what was measured."""

import json
from pathlib import Path

import pytest
import report
import tables
from timing import Measured, interleaved, row
from typer.testing import CliRunner

from polydpo_fast import bench
from polydpo_fast.cli import app

ROOT = Path(__file__).parent.parent


def results(ours, peers=(2.0, 3.0), iqr=0.0, peak=100):
    """One case of a suite: medians of our way and of its peers."""
    ways = {"ours": ours, **{f"peer {number}": median for number, median in enumerate(peers)}}
    rows = [
        {
            "case": "c",
            "way": way,
            "clock": "cpu",
            "median": median,
            "iqr": iqr * median,
            "rounds": 9,
            "peak_bytes": peak,
        }
        for way, median in ways.items()
    ]
    return {"machine": {"name": "m"}, "suites": {"s": {"rows": rows}}}


def only(before, after):
    (change,) = bench.compare(before, after)
    return change


def test_a_slower_way_is_told_from_a_slower_machine():
    change = only(results(1.0), results(1.5))
    assert change.slower
    assert change.ratio == pytest.approx(1.5)
    change = only(results(1.0), results(1.5, peers=(3.0, 4.5)))  # all take half as long again
    assert not change.slower
    assert not change.faster
    assert change.ratio == pytest.approx(1.0)
    assert only(results(1.0), results(1.0, peers=(3.0, 4.5))).faster


def test_what_may_be_chance_is_no_change():
    assert not only(results(1.0), results(1.04)).slower  # less than a twentieth
    assert only(results(1.0), results(1.06)).slower
    noisy = only(results(1.0, iqr=0.3), results(1.3, iqr=0.3))
    # Of a median: 0.93 * 0.3 / sqrt(9) = 0.093. Ours in two runs, and half of that of four medians of peers.
    assert noisy.noise == pytest.approx(3 * (2 * 0.093**2 + 4 * 0.093**2 / 4) ** 0.5)
    assert not noisy.slower
    assert only(results(1.0, iqr=0.3), results(2.0, iqr=0.3)).slower


def test_more_memory_is_a_loss_whatever_the_noise():
    assert only(results(1.0, iqr=2.0), results(0.5, iqr=2.0, peak=102)).slower
    assert not only(results(1.0), results(1.0, peak=100)).slower


def test_the_command_compares_and_exits_with_what_it_found(tmp_path):
    for name, found in (("a", results(1.0)), ("b", results(2.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "c.json").write_text("[]")

    def compared(*names):
        return CliRunner().invoke(app, ["bench", "--compare", *(str(tmp_path / f"{name}.json") for name in names)])

    worse = compared("a", "b")
    assert worse.exit_code == 1
    assert "1 slower, 0 faster of 1" in worse.output
    assert compared("b", "a").exit_code == 0
    wrong = compared("a", "c")
    assert wrong.exit_code == 2
    assert "c.json is no file of results" in wrong.output


def test_an_unknown_suite_is_named():
    result = CliRunner().invoke(app, ["bench", "los"])
    assert result.exit_code == 2
    assert "suite is 'los'; expected one of" in result.output


def test_without_the_source_the_error_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "polydpo_fast" / "bench.py"))
    with pytest.raises(FileNotFoundError, match="they come with the source"):
        bench.suites()


def test_a_suite_is_run_and_kept_beside_the_others(monkeypatch, tmp_path):
    """A suite of one test, through pytest-benchmark, in a process of its own."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "timing.py").write_text((ROOT / "benchmarks" / "timing.py").read_text())
    (folder / "test_small.py").write_text(
        "from timing import Measured, report\n"
        "def test_small(benchmark):\n"
        "    times = {'cpu': [2.0, 4.0, 3.0], 'wall': [5.0]}\n"
        "    report(benchmark, Measured('c', 'ours', times, per=2, facts={'more': 7}))\n"
    )
    (folder / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    monkeypatch.setattr(bench, "benchmarks_folder", lambda: folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    path = tmp_path / "results.json"
    bench.merge(path, {"other": bench.suite([], "a command")})
    with pytest.raises(RuntimeError, match="broken"):
        bench.run(out=path)
    found = bench.read_results(path)
    assert list(found["suites"]) == ["other", "small"]
    kept = found["suites"]["small"]
    # The quartiles of 2, 3, 4 are 2 and 4; all per two things.
    times = {"median": 1.5, "iqr": 1.0, "rounds": 3, "wall": 2.5}
    assert kept["rows"] == [{"case": "c", "way": "ours", "clock": "cpu", **times, "more": 7}]
    assert kept["command"] == "polydpo-fast bench small"
    assert kept["versions"]["torch"]


def test_ways_take_turns_and_first_calls_do_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(ways, rounds=2, calls=2, stopwatch=lambda run: {"cpu": run() or float(len(calls))})
    assert "".join(calls) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert times["b"]["cpu"] == [11.0, 12.0, 26.0, 27.0]
    assert row(Measured("c", "b", times["b"]))["median"] == 19.0


# ------------------------------------------------------------------------------------------------- the documents


@pytest.fixture(scope="module")
def shown():
    return bench.read_results(report.RESULTS / f"{report.SHOWN}.json")


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


def test_the_page_of_benchmarks_is_the_reports():
    machines = [bench.read_results(path) for path in sorted(report.RESULTS.glob("*.json"))]
    assert report.PAGE.read_text() == report.page(machines), "run `make report`"
    for results in machines:
        assert results["suites"].keys() & {"loss", "decode"}


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
