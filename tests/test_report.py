"""Figures, tables and plots of the documents are those of the kept results."""

import itertools
import json
import re
from pathlib import Path

import pytest
import report
import tables
import torch

from polydpo_fast import results_file

ROOT = Path(__file__).parent.parent


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
    assert "one of 30 after 3 ms, and at worst one of 20 after 9 ms." in tables.scaling(ranks)
    ranks = curve("scaling", "loader, first batch of 9 pairs, ranks", at, [9e-3, 2e-3, 3e-3])
    assert "A single one has its first batch after 9 ms, one of 30 after 3 ms." in tables.scaling(ranks)


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


def test_the_host_s_time_of_the_peers_stands_beside_ours():
    host = [("ours", 2e-5), ("an empty autograd.Function", 1e-5), ("eager", 3e-4), ("torch.compile", 4e-5)]
    rows = [{"case": "host time, 16 elements", "way": way, "median": seconds} for way, seconds in host]
    text = tables.loss({"suites": {"loss": {"command": "c", "rows": [{"backward": False, **row} for row in rows]}}})
    assert "A call costs 20 us" in text
    assert "an empty `autograd.Function` takes 10 us; torch.compile 40 us, eager 300 us." in text


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
    from polydpo_fast.data.formats.manifest import ManifestPairs
    from polydpo_fast.data.formats.tar import TarPairs

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
            {**found, "clock": "gpu", "gpu, warm L2": found["median"] / 2, "least": 3.44e-6}
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
        "tests of the kernels": {**counts, "tests": 1234},
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
    assert "tests of the kernels: 1234 tests, 1 failures, 0 errors, 2 skipped." in page
    assert "check, seed 7, 40.0 s: loss on triton." in page
    assert ("ours, warm L2" in page) == suites
    assert ("gpu, warm L2, ms" in page) == suites
    assert ("one of one kernel of one element takes 3.4 us." in page) == suites
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
