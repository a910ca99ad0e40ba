"""Pairs that cannot be read or decoded: others in their place, the ledger, and when there are too many."""

import os
from datetime import datetime, timezone

import numpy as np
import pytest
from data.loading import TINY, expected, yielded
from data.pairs import Tiny
from splitmix import chained

from polydpo_fast.data import LoaderError, LoaderStats, PairError, PairLoader, read_ledger
from polydpo_fast.data.bad_pairs import BadPairs
from polydpo_fast.data.ledger import Ledger
from polydpo_fast.data.order import Balanced
from polydpo_fast.splitmix import mix


def test_pairs_in_shares_are_replaced_from_the_whole_source():
    """Also where single pairs are slow to read, and others would come from the blocks in memory."""

    class Blockwise(Tiny):
        random_access = False

    codes, bad = np.array([0] * 30 + [1] * 10), {3, 12, 33}
    source = Blockwise(40, dict.fromkeys(bad, "read"), blocks=[10] * 4, codes=codes)
    loader = PairLoader(source, 8, categories="balanced", seed=6, max_bad_rate=1.0, **TINY)
    order, want = Balanced(codes, [1.0, 1.0], 6, 0)(np.arange(40)).tolist(), []
    for position in range(40):
        index, attempt = order[position], 0
        while index in bad:
            attempt += 1
            index = order[(position + 1 + mix(6, 0, position, attempt) % 39) % 40]
        want.append(index)
    assert set(order) & bad
    assert [index for batch in loader for index in yielded(batch)] == want


def test_a_block_of_one_pair_has_its_replacement_elsewhere():
    class Blockwise(Tiny):
        random_access = False

    loader = PairLoader(Blockwise(20, {3: "read"}, blocks=[1] * 20), 4, shuffle=False, seed=2, **TINY)
    got = [index for batch in loader for index in yielded(batch)]
    assert got == [*range(3), (4 + mix(2, 0, 3, 1) % 19) % 20, *range(4, 20)]


def test_bad_pairs_are_written_down(tmp_path):
    ledger = tmp_path / "bad.jsonl"
    bad = {3: "read", 5: "win", 7: "lose", 9: "bug", 10: "both"}
    loader = PairLoader(Tiny(12, bad), 4, ledger=ledger, max_bad_rate=1.0, **TINY)
    for batch in loader:
        yielded(batch)
    lines = list(read_ledger(ledger))
    assert {line["index"] for line in lines} == set(bad)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert all(abs((one - datetime.now(timezone.utc)).total_seconds()) < 60 for one in times)
    assert loader.stats.bad == len(lines)
    assert loader.stats.pairs == 12
    order = expected(12, 0, 0)
    places = {(line["index"], line["step_position"]) for line in lines}  # and of what was to replace others
    assert places >= {(index, order.index(index)) for index in bad}
    assert all(line["decode"]["seed"] == chained(0, 0, line["step_position"]) >> 1 for line in lines)
    by_index = {line["index"]: line for line in lines}
    facts = [
        (i, by_index[i]["key"], by_index[i]["arm"], by_index[i]["error"], by_index[i]["position"]) for i in sorted(bad)
    ]
    assert facts == [
        (3, "", None, "PairError", "tiny.tar:3"),
        (5, "k5", "win", "PairError", "tiny.tar:5"),
        (7, "k7", "lose", "PairError", "tiny.tar:7"),
        (9, "", None, "RuntimeError", "tiny.tar:9"),
        (10, "k10", "win", "PairError", "tiny.tar:10"),
    ]
    assert by_index[3]["reason"] == "its shard is cut off"
    assert "3c 68 74 6d" in by_index[7]["reason"]
    with open(ledger, "a") as file:
        file.write('{"key": "cut o')
    assert len(list(read_ledger(ledger))) == len(lines)


def test_a_ledger_tells_epoch_and_rank_and_each_place_once(tmp_path):
    class Telling(Tiny):
        def __getitem__(self, index):
            if index == 5:
                raise PairError(f"{self.position(index)}: cut off")
            return super().__getitem__(index)

    for rank in (0, 1):
        loader = PairLoader(Telling(12), 3, rank=rank, world_size=2, ledger=tmp_path / f"{rank}", shuffle=False, **TINY)
        loader.set_epoch(2)
        list(loader)
    assert not (tmp_path / "0").exists()
    (line,) = read_ledger(tmp_path / "1")
    assert (line["epoch"], line["rank"], line["position"], line["reason"]) == (2, 1, "tiny.tar:5", "cut off")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_does_not_end_the_training():
    loader = PairLoader(Tiny(12, {3: "read", 4: "read"}), 4, ledger="/dev/full", **TINY)
    with pytest.warns(RuntimeWarning, match="bad pairs cannot be written to /dev/full: .*No space left") as caught:
        assert sum(len(batch) for batch in loader) == 12
    assert len(caught) == 1


def test_a_ledger_that_was_cut_off_loses_one_line(tmp_path, monkeypatch):
    """A disk that is full takes a part of a line; when it has room again, the next line is whole."""
    ledger, write = tmp_path / "bad.jsonl", os.write
    lines, descriptors = Ledger(ledger), os.listdir("/proc/self/fd")
    lines.add(index=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
        with pytest.warns(RuntimeWarning, match="there is no room for a whole line"):
            lines.add(index=2)
    for one in (lines, Ledger(ledger), lines):
        one.add(index=3)
    assert os.listdir("/proc/self/fd") == descriptors
    assert [line["index"] for line in read_ledger(ledger)] == [1, 3, 3, 3]
    assert ledger.read_bytes().count(b"\n") == 5


def test_too_many_bad_pairs_end_it():
    source = Tiny(400, dict.fromkeys(range(0, 400, 4), "win"))
    with pytest.raises(LoaderError, match=r"of \d+ pairs are bad, more than 10.0% \(max_bad_rate\); the last was k\d+"):
        list(PairLoader(source, 4, max_bad_rate=0.1, **TINY))
    source = Tiny(400, dict.fromkeys(range(60, 200), "read"))
    with pytest.raises(LoaderError, match=r"8 pairs in a row are bad, more than 7 \(max_bad_run\); the last was tiny"):
        list(PairLoader(source, 4, shuffle=False, max_bad_run=7, max_bad_rate=1, **TINY))
    with pytest.raises(LoaderError, match=r"all 3 pairs of the source failed; the first was tiny\.tar:\d: its shard"):
        list(PairLoader(Tiny(3, dict.fromkeys(range(3), "read")), 1, **TINY))
    with pytest.raises(LoaderError, match=r"no pair was found to replace tiny\.tar:0"):
        list(PairLoader(Tiny(1, {0: "read"}), 1, **TINY))


@pytest.mark.parametrize("how", ["read", "win"])
def test_as_many_bad_pairs_in_a_row_as_are_allowed_end_nothing(how):
    """Good ones begin the count anew."""
    source = Tiny(400, {begin + k: how for begin in range(50, 350, 60) for k in range(3)})
    options = dict(
        shuffle=False, seed=1, readers=1, max_bad_rate=1.0, **TINY
    )  # one by which no other bad pair replaces them
    assert sum(len(batch) for batch in PairLoader(source, 4, max_bad_run=3, **options)) == 400
    with pytest.raises(LoaderError, match="3 pairs in a row are bad, more than 2"):
        list(PairLoader(source, 4, max_bad_run=2, **options))


def test_a_share_of_no_bad_pairs_at_all_ends_it_at_the_first():
    loader = PairLoader(Tiny(2000, {1: "win"}), 4, max_bad_rate=0.0, shuffle=False, **TINY)
    with pytest.raises(
        LoaderError, match=r"1 of \d+ pairs are bad, more than 0.0% .* the last was k1 \(tiny\.tar:1\): "
    ):
        next(iter(loader))


def test_scattered_pairs_that_cannot_be_read_are_not_in_a_row():
    """All of a batch are read before any is decoded: those that can be read count between those that cannot."""
    source = Tiny(1024, dict.fromkeys(range(0, 1024, 10), "read"))
    batches = list(PairLoader(source, 256, max_bad_rate=1.0, **TINY))
    assert len(batches) == 4
    with pytest.raises(LoaderError, match="51 pairs in a row"):
        list(
            PairLoader(Tiny(1024, dict.fromkeys(range(300, 400), "read")), 256, shuffle=False, max_bad_rate=1.0, **TINY)
        )


def test_pairs_in_the_place_of_unreadable_ones_end_no_run():
    """They stand elsewhere in the source: here every other pair cannot be read, and the others not be decoded."""
    bad = {index: "read" if index % 2 else "win" for index in range(100, 130)}
    with pytest.raises(LoaderError, match="11 pairs in a row are bad, more than 10"):
        list(PairLoader(Tiny(4000, bad), 10, shuffle=False, max_bad_rate=1.0, max_bad_run=10, **TINY))


def test_a_lost_block_counts_again_after_something_could_be_read():
    plan = PairLoader(Tiny(400), 4, max_bad_rate=1.0, max_bad_run=2, **TINY)._plan(None)
    bad = BadPairs(plan, LoaderStats())
    for block in (0, 0, 1, 1):
        bad.add_unread(0, 0, ValueError("lost"), block)
    bad.end_unread_run()
    for block in (0, 1, 0, 1):
        bad.add_unread(0, 0, ValueError("lost"), block)
    with pytest.raises(LoaderError, match="3 pairs in a row are bad, more than 2"):
        bad.add_unread(0, 0, ValueError("lost"), 2)


def test_blocks_of_which_nothing_can_be_read_count_in_a_row():
    """One each, however many pairs they have; and no longer once something could be read."""

    class Lost(Tiny):
        random_access = False

        def __getitem__(self, index):
            if index // 10 in self.lost:
                raise PairError("its row group is damaged", whole_block=True)
            return super().__getitem__(index)

    def batches(lost, max_bad_run):
        source = Lost(400, blocks=[10] * 40)
        source.lost = lost
        how = dict(shuffle=False, max_bad_rate=1.0, max_bad_run=max_bad_run, readers=1, **TINY)
        return list(PairLoader(source, 10, **how))

    with pytest.raises(LoaderError, match="4 pairs in a row are bad, more than 3"):
        batches(range(40), 3)
    got = [index // 10 for batch in batches({5, 15, 25}, 2) for index in yielded(batch)]
    assert len(got) == 400
    assert not {5, 15, 25} & set(got)


def test_a_damaged_shard_is_no_reason_to_end():
    """2.5% of the pairs, all of which come within the first 800."""
    bad = dict.fromkeys(range(0, 800, 8), "read")
    batches = list(PairLoader(Tiny(4000, bad), 8, shuffle=False, **TINY))
    assert len(batches) == 500
    more = dict.fromkeys(range(0, 1640, 8), "read")
    with pytest.raises(LoaderError, match=r"201 of \d+ pairs are bad, more than 5.0% \(max_bad_rate\)"):
        list(PairLoader(Tiny(4000, more), 8, shuffle=False, **TINY))


def test_a_source_that_hangs_costs_a_pair_each_time():
    source = Tiny(30, hangs=[4, 8])
    loader = PairLoader(source, 5, timeout_s=0.2, readers=1, shuffle=False, **TINY)
    got = [i for batch in loader for i in yielded(batch)]
    assert [i for i in range(30) if got[i] != i] == [4, 8]
    assert loader.stats.bad == 2
    source.let_go.set()
