"""`polydpo-fast bench --compare`: what became worse or better beyond the noise."""

import json

import pytest
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.comparison import compare


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
