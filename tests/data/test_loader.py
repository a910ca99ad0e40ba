"""PairLoader: what is yielded, in which order, after which interruption."""

import dataclasses
import gc
import json
import os
import pickle
import re
import threading
import time
import weakref
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.pairs import Tiny, which
from hypothesis import given, settings
from hypothesis import strategies as st
from splitmix import chained, outputs

from polydpo_fast import decode_pairs
from polydpo_fast.data import (
    LoaderError,
    LoaderStats,
    PairError,
    PairLoader,
    SourceError,
    equipment,
    open_source,
    read_ledger,
)
from polydpo_fast.data import loader as loader_module
from polydpo_fast.data import sources as sources_module
from polydpo_fast.data.bad_pairs import BadPairs
from polydpo_fast.data.ledger import Ledger
from polydpo_fast.data.order import Balanced, Shuffled
from polydpo_fast.data.rows import Rows
from polydpo_fast.splitmix import mix

TINY = dict(size=2, dtype=torch.uint8)


def expected(size, seed, epoch, bad=(), last="drop", group=1, blocks=None, window=None):
    """The specification, in ten lines: which pair stands at each position of an epoch; -1 is none."""
    order = Shuffled(np.array(blocks or [size]), mix(seed, epoch), window)(np.arange(size)).tolist()
    result = []
    for position in range(size // group * group if last == "drop" else -(-size // group) * group):
        index, attempt = order[position % size], 0
        while index in bad:
            attempt += 1
            ahead = 1 + mix(seed, epoch, position % size, attempt) % min(size - 1, 4096)
            index = order[(position + ahead) % size]
        result.append(-1 if last == "pad" and position >= size else index)
    return result


def yielded(batch):
    """The numbers of the pairs of a batch, checked against everything else that the batch says of them."""
    numbers, arms = which(batch.pixels)
    pairs = len(batch)
    assert batch.index.tolist() == [
        number if ok else -1 for number, ok in zip(numbers[:pairs], batch.ok.tolist(), strict=True)
    ]
    for row, ok in enumerate(batch.ok.tolist()):
        if not ok:
            assert batch.keys[row] == batch.prompts[row] == ""
            assert batch.weight[row] == 0
            assert not batch.pixels[[row, row + pairs]].any()
            assert not batch.flipped[row]
            assert not batch.original_size[[row, row + pairs]].any()
            continue
        number = numbers[row]
        assert numbers[row + pairs] == number
        assert (arms[row], arms[row + pairs]) == (0, 1)
        assert batch.keys[row] == f"k{number}"
        assert batch.prompts[row] == f"prompt {number}"
        assert batch.weight[row] == 1 + number / 8
        assert batch.extra["number"][row] == number
        assert batch.original_size[[row, row + pairs]].tolist() == [[2, 2]] * 2
    return batch.index.tolist()


@settings(max_examples=40)
@given(data=st.data())
def test_what_is_yielded_is_what_is_specified(data):
    """Any sizes, windows, ranks, readers, bad pairs, and a stop anywhere after which other ranks go on."""
    draw = data.draw
    size, seed, epoch = draw(st.integers(2, 60)), draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 3))
    kinds = st.sampled_from(["read", "win", "lose", "both", "bug"])
    bad = draw(st.dictionaries(st.integers(0, size - 1), kinds, max_size=size // 2))
    group = draw(st.integers(1, min(size, 16)))
    last = draw(st.sampled_from(["drop", "pad", "wrap"]))
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=6)))
    blocks, window = np.diff([0, *cuts, size]).tolist(), draw(st.sampled_from([0, 1, 2, 3]))
    source = Tiny(size, bad, blocks=blocks)
    want = expected(size, seed, epoch, bad, last, group, blocks, window or None)

    def loaders(world):
        return [
            PairLoader(
                source, group // world, seed=seed, window=window, last=last, rank=rank, world_size=world, threads=1,
                max_bad_rate=1.0, max_bad_run=10**6, readers=draw(st.integers(1, 3)), prefetch=draw(st.integers(1, 3)),
                **TINY,
            )
            for rank in range(world)
        ]  # fmt: skip

    worlds = [world for world in (1, 2, 3, 4, 8) if group % world == 0]
    first, second = loaders(draw(st.sampled_from(worlds))), loaders(draw(st.sampled_from(worlds)))
    stop = draw(st.integers(0, len(first[0])))
    got = []
    for loader in first:
        loader.set_epoch(epoch)
    passes = [iter(loader) for loader in first]
    for _ in range(stop):
        got += [index for one in passes for index in yielded(next(one))]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    assert all(state == states[0] for state in states)
    for loader in second:
        loader.load_state_dict(states[0])
    steps = [[yielded(batch) for batch in loader] for loader in second]
    got += [index for step in zip(*steps, strict=True) for part in step for index in part]
    assert got == want
    assert all(loader.epoch == epoch + 1 for loader in second)


def test_epochs_go_on_by_themselves_and_start_anew_after_a_break():
    loader = PairLoader(Tiny(20), 4, seed=5, **TINY)
    assert len(loader) == 5
    for epoch in range(3):
        assert [i for batch in loader for i in yielded(batch)] == expected(20, 5, epoch, group=4)
    first = yielded(next(iter(loader)))
    assert loader.epoch == 3
    with pytest.warns(UserWarning, match="epoch 3 was left at position 4 of 20, and begins again") as caught:
        assert yielded(next(iter(loader))) == first == expected(20, 5, 3)[:4]
    assert caught[0].filename == __file__
    assert yielded(next(iter(loader))) == first, "and no second warning"
    loader.set_epoch(1)
    assert [i for batch in loader for i in yielded(batch)] == expected(20, 5, 1, group=4)


def test_an_epoch_that_was_left_early_goes_on_as_the_warning_says():
    loader = PairLoader(Tiny(20), 4, seed=5, **TINY)
    want, got = expected(20, 5, 0), []
    for _ in range(5):
        got += yielded(next(iter(loader)))
        loader.load_state_dict(loader.state_dict())
    assert got == want
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        assert yielded(next(iter(loader))) == expected(20, 5, epoch)[:4]
    loader.set_epoch(2)
    assert yielded(next(iter(loader))) == expected(20, 5, 2)[:4]


def test_without_shuffling_the_order_is_that_of_the_source():
    loader = PairLoader(Tiny(11), 4, shuffle=False, last="pad", **TINY)
    assert [yielded(batch) for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]


def test_another_batch_size_after_resuming():
    loader = PairLoader(Tiny(64), 8, **TINY)
    one = iter(loader)
    got = [i for _ in range(3) for i in yielded(next(one))]
    other = PairLoader(Tiny(64), 5, **TINY)
    other.load_state_dict(loader.state_dict())
    got += [i for batch in other for i in yielded(batch)]
    assert got == expected(64, 0, 0)[: 24 + 40]


def test_categories_in_equal_shares():
    codes = np.array([0] * 90 + [1] * 10)
    loader = PairLoader(Tiny(100, codes=codes), 10, categories="balanced", **TINY)
    seen = [category for batch in loader for category in batch.category]
    assert seen.count("cat") == seen.count("dog") == 50
    with pytest.raises(ValueError, match="categories is"):
        PairLoader(Tiny(100, codes=codes), 10, categories={"cat": 1}, **TINY)


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


def test_batches_tell_how_many_times_a_pair_came_before():
    """Over epochs, ranks and what replaces bad pairs; without categories it is the number of the epoch."""
    codes = np.array([0] * 18 + [1] * 2)
    how = dict(categories="balanced", last="pad", max_bad_rate=1.0, seed=2, **TINY)
    whole = [PairLoader(Tiny(20, codes=codes), 2, rank=rank, world_size=3, **how) for rank in range(3)]
    came = {}
    for _ in range(3):
        for batch in (batch for loader in whole for batch in loader):
            for index, lap in zip(batch.index.tolist(), batch.lap.tolist(), strict=True):
                came.setdefault(index, []).append(lap)
    assert set(came.pop(-1)) == {0}
    assert len(came[18]) == 15
    assert all(sorted(laps) == list(range(len(laps))) for laps in came.values())
    damaged = PairLoader(Tiny(20, {18: "read", 3: "win"}, codes=codes), 20, **how)
    damaged.set_epoch(1)
    (batch,) = damaged
    for index, lap in zip(batch.index.tolist(), batch.lap.tolist(), strict=True):
        assert lap in ((5, 6, 7, 8, 9) if index == 19 else (0, 1))
    plain = PairLoader(Tiny(20, {3: "lose"}), 5, max_bad_rate=1.0, **TINY)
    assert [batch.lap.tolist() for _ in range(3) for batch in plain] == [
        [epoch] * 5 for epoch in range(3) for _ in range(4)
    ]


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


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("polydpo-")]


@pytest.mark.parametrize("how", ["end", "break", "exception", "garbage", "failure"])
def test_no_thread_outlives_its_pass(how):
    loader = PairLoader(Tiny(200, {50: "read"}), 4, shuffle=False, max_bad_run=0 if how == "failure" else 9, **TINY)
    descriptors = len(os.listdir("/proc/self/fd"))

    def work():
        for number, batch in enumerate(loader):
            assert len(batch) == 4
            if number == 3 and how == "break":
                break
            if number == 3 and how == "exception":
                raise KeyError
            if number == 3 and how == "garbage":
                loader.set_epoch(0)
                return iter([iter(loader)])
        return None

    if how == "exception":
        with pytest.raises(KeyError):
            work()
    elif how == "failure":
        with pytest.raises(LoaderError):
            work()
    else:
        work()
    gc.collect()
    until = time.monotonic() + 5  # those that an earlier test left stuck may still be on their way
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_is_kept_is_never_written_to_again():
    loader = PairLoader(Tiny(300), 3, seed=1, **TINY)
    kept = [(batch, batch.pixels[1:2]) for batch in loader]
    for batch, view in kept:
        yielded(batch)
        assert torch.equal(view, batch.pixels[1:2])
    assert len({batch.pixels.data_ptr() for batch, _ in kept}) == 100


def test_memory_of_batches_is_used_again():
    loader = PairLoader(Tiny(300), 3, **TINY)
    places = {batch.pixels.data_ptr() for batch in loader}
    assert len(places) <= 6  # as many as can be under way: prefetch 2, one in work, one in hand, one just dropped


def test_a_batch_that_is_let_go_is_not_held_until_the_next():
    source = Tiny(8, hangs=[4])
    one = iter(PairLoader(source, 4, shuffle=False, **TINY))
    pixels = weakref.ref(next(one).pixels)
    assert pixels() is None
    source.let_go.set()


@pytest.mark.parametrize("odd", [torch.zeros(4), "text"])
def test_tensors_that_are_no_batch_are_named(odd):
    class WithTensors(Tiny):
        def __getitem__(self, index):
            extra = {"number": index, "embedding": torch.zeros(3) if index != 2 else odd}
            return dataclasses.replace(super().__getitem__(index), extra=extra)

    with pytest.raises(ValueError, match=r"extra\['embedding'\] of a batch's pairs; expected tensors of one shape: "):
        list(PairLoader(WithTensors(8), 4, shuffle=False, **TINY))


def test_tensors_of_the_source_are_zeros_where_there_is_no_pair():
    class WithTensors(Tiny):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), extra={"text": torch.full((3,), index + 1)})

    (batch,) = PairLoader(WithTensors(2), 4, last="pad", shuffle=False, **TINY)
    assert batch.extra["text"].tolist() == [[1] * 3, [2] * 3, [0] * 3, [0] * 3]


def test_prompts_are_dropped_per_pair():
    loader = PairLoader(Tiny(256), 16, prompt_dropout=0.25, seed=3, **TINY)
    dropped = {key for batch in loader for key, prompt in zip(batch.keys, batch.prompts, strict=True) if prompt == ""}
    assert 40 <= len(dropped) <= 90  # 64 in the mean, standard deviation 7
    again = PairLoader(Tiny(256), 4, prompt_dropout=0.25, seed=3, rank=0, world_size=2, **TINY)
    part = {key: prompt for batch in again for key, prompt in zip(batch.keys, batch.prompts, strict=True)}
    assert {key for key, prompt in part.items() if prompt == ""} == dropped & set(part)


@pytest.mark.parametrize(
    ("rank", "world_size", "ranks"),
    [("", "", (0, 1)), ("", "1", (0, 1)), ("0", "1", (0, 1)), ("2", "4", (2, 4)), ("", "4", None), ("x", "4", None)],
)
def test_ranks_of_the_environment(monkeypatch, rank, world_size, ranks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    if ranks is not None:
        assert PairLoader(Tiny(20), 4, **TINY).ranks == ranks
        return
    with pytest.raises(ValueError, match=f"the environment has RANK='{rank}' and WORLD_SIZE='4'; expected two numbers"):
        PairLoader(Tiny(20), 4, **TINY)


def test_a_state_is_json_whatever_the_shares_are():
    shares = {"cat": np.float32(1), "dog": Fraction(1, 2)}
    loader = PairLoader(Tiny(20, codes=np.arange(20) % 2), 4, categories=shares, **TINY)
    loader.load_state_dict(json.loads(json.dumps(loader.state_dict())))


def test_crops_and_mirrors_do_not_depend_on_ranks():
    options = dict(size=1, dtype=torch.uint8, crop="random", hflip=0.5, resize=None, seed=2)
    whole = list(PairLoader(Tiny(32), 8, **options))
    parts = [list(PairLoader(Tiny(32), 4, rank=rank, world_size=2, **options)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        pieces = [part[step] for part in parts]
        assert torch.equal(batch.flipped, torch.cat([piece.flipped for piece in pieces]))
        corners = [piece.crop_top_left.unflatten(0, (2, 4)) for piece in pieces]
        assert torch.equal(batch.crop_top_left.unflatten(0, (2, 8)), torch.cat(corners, dim=1))
    assert 5 < sum(int(batch.flipped.sum()) for batch in whole) < 27


def test_what_is_drawn_for_a_position_stays_what_it_was():
    """By seed, epoch and position: the crop's and mirror's seed, and whether the prompt is dropped."""
    loader = PairLoader(Tiny(64), 4, seed=5, hflip=0.4, prompt_dropout=0.3, **TINY)
    loader.set_epoch(3)
    batches = list(loader)
    seeds = [chained(5, 3, position) >> 1 for position in range(64)]
    mirrored = [(outputs(seed, 3)[2] >> 11) * 2.0**-53 < 0.4 for seed in seeds]
    assert [one for batch in batches for one in batch.flipped.tolist()] == mirrored
    dropped = [chained(5, 3, position, 2**32) / 2**64 < 0.3 for position in range(64)]
    assert [prompt == "" for batch in batches for prompt in batch.prompts] == dropped


def test_a_state_of_another_source_or_order_is_refused():
    state = PairLoader(Tiny(20), 4, seed=1, **TINY).state_dict()
    json.dumps(state)
    with pytest.raises(ValueError, match="the source has changed: its fingerprint is tiny:20:1, in the state it is"):
        PairLoader(Tiny(20, version=1), 4, seed=1, **TINY).load_state_dict(state)
    PairLoader(Tiny(20, version=1), 4, seed=1, **TINY).load_state_dict(state, changed_source=True)
    with pytest.raises(ValueError, match="the state was taken with seed=1; this loader has 2"):
        PairLoader(Tiny(20), 4, seed=2, **TINY).load_state_dict(state)
    with pytest.raises(ValueError, match="the state was taken with shuffle=True; this loader has False"):
        PairLoader(Tiny(20), 4, seed=1, shuffle=False, **TINY).load_state_dict(state)
    for bad in (None, {}, {**state, "version": 99}, {**state, "position": -1}, {**state, "epoch": "0"}):
        with pytest.raises(ValueError, match="state"):
            PairLoader(Tiny(20), 4, seed=1, **TINY).load_state_dict(bad)


@pytest.mark.parametrize("last", ["drop", "pad", "wrap"])
def test_a_state_after_the_last_batch_leaves_nothing_of_its_epoch(last):
    size = 8 if last == "drop" else 7
    loader = PairLoader(Tiny(size), 4, last=last, **TINY)
    one = iter(loader)
    next(one), next(one)
    state = loader.state_dict()
    assert state["position"] == size
    assert loader.stats.pairs == (8 if last == "wrap" else size)
    again = PairLoader(Tiny(size), 4, last=last, **TINY)
    again.load_state_dict(state)
    assert list(again) == []
    assert [i for batch in again for i in yielded(batch)] == expected(size, 0, 1, last=last, group=4)


def test_statistics_tell_what_is_slow(monkeypatch):
    slow = dict.fromkeys(range(40), 0.02)
    loader = PairLoader(Tiny(40, slow=slow), 4, readers=1, **TINY)
    list(loader)
    assert loader.stats.bottleneck == "reading"
    loader = PairLoader(Tiny(40), 4, **TINY)
    for _ in loader:
        time.sleep(0.02)
    assert loader.stats.bottleneck == "model"
    assert loader.stats.waiting_for_consumer_s > 0.1
    slow = SimpleNamespace(decode_pairs=lambda *arms, **options: time.sleep(0.02) or decode_pairs(*arms, **options))
    monkeypatch.setattr(equipment, "choose_decoder", lambda *_: slow)
    loader = PairLoader(Tiny(40), 4, **TINY)
    list(loader)
    assert loader.stats.bottleneck == "decoding"
    assert loader.stats.decoding_s > 0.2


@pytest.mark.parametrize("steps", [1, 2])
def test_statistics_of_epochs_of_few_batches(steps):
    """They never fill the queue."""
    loader = PairLoader(Tiny(4 * steps), 4, **TINY)
    began = time.monotonic()
    for _ in range(3):
        for _ in loader:
            time.sleep(0.06)
    took = time.monotonic() - began
    assert loader.stats.bottleneck == "model"
    assert 0.5 * took < loader.stats.waiting_for_consumer_s < took
    quick = PairLoader(Tiny(4 * steps, slow=dict.fromkeys(range(8), 0.01)), 4, readers=1, **TINY)
    for _ in range(3):
        assert len(list(quick)) == steps
    assert quick.stats.bottleneck == "reading"


def test_statistics_of_pairs_that_replace_undecodable_ones():
    """They are read while nothing else is done, and that is no decoding."""
    source = Tiny(24, bad=dict.fromkeys(range(0, 24, 3), "win"), slow=dict.fromkeys(range(24), 0.02))
    loader = PairLoader(source, 4, readers=4, max_bad_rate=1.0, **TINY)
    began = time.monotonic()
    assert len(list(loader)) == 6
    assert loader.stats.bottleneck == "reading"
    assert 0.5 * (time.monotonic() - began) < loader.stats.waiting_for_source_s


@settings(max_examples=20)
@given(
    indices=st.lists(st.integers(-1, 29), min_size=1, max_size=40),
    bad=st.dictionaries(st.integers(0, 29), st.sampled_from(["read", "win", "lose", "both", "bug"]), max_size=8),
    size=st.integers(1, 6),
)
def test_a_walk_has_the_pairs_that_were_asked_for(indices, bad, size):
    loader = PairLoader(Tiny(30, bad), size, last="pad", prompt_dropout=1.0, hflip=1.0, max_bad_rate=1.0, **TINY)
    one = iter(loader)
    next(one)
    state = loader.state_dict()
    got = [i for batch in loader.walk(np.array(indices)) for i in yielded(batch)]
    assert got == [-1 if i in bad else i for i in indices] + [-1] * (-len(indices) % size)
    assert loader.state_dict() == state


@pytest.mark.parametrize("index", [30, -2])
def test_a_walk_of_pairs_that_are_not_there(index):
    loader = PairLoader(Tiny(30), 4, **TINY)
    with pytest.raises(IndexError, match=r"indices are from -?\d+ to \d+; the source has 30"):
        next(loader.walk(np.array([3, index])))


def test_a_walk_draws_by_index():
    loader = PairLoader(Tiny(40), 8, hflip=0.5, seed=3, **TINY)
    flipped = {
        i: f for b in loader.walk(np.arange(40)) for i, f in zip(b.index.tolist(), b.flipped.tolist(), strict=True)
    }
    assert 8 < sum(flipped.values()) < 32
    loader.set_epoch(3)  # says nothing of a walk
    for batch in loader.walk(np.arange(40)[::-3]):
        assert [flipped[i] for i in batch.index.tolist() if i >= 0] == batch.flipped[batch.ok].tolist()


def test_pickled_loaders_are_small():
    """Neither what has been computed of an order nor memory for batches goes to another process."""
    source = Tiny(50_000, codes=np.arange(50_000, dtype=np.uint8) % 2)
    loader = PairLoader(source, 4, categories="balanced", size=64, dtype=torch.uint8)
    next(iter(loader))
    assert len(pickle.dumps(loader)) < len(pickle.dumps(source)) + 10_000


def test_pickled_loaders_go_on():
    loader = PairLoader(Tiny(20), 4, seed=7, **TINY)
    one = iter(loader)
    next(one)
    copy = pickle.loads(pickle.dumps(loader))
    copy.load_state_dict(loader.state_dict())
    assert [i for batch in copy for i in yielded(batch)] == expected(20, 7, 0)[4:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_dataloader_keep_the_order(workers):
    loader = PairLoader(Tiny(30), 4, seed=7, last="pad", **TINY)
    outer = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=workers)
    assert [i for batch in outer for i in yielded(batch)] == expected(30, 7, 0, last="pad", group=4)


def test_accelerate_takes_it_as_it_is(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(PairLoader(Tiny(20), 4, seed=7, **TINY))
    accelerator.register_for_checkpointing(loader)
    one = iter(loader)
    got = yielded(next(one))
    accelerator.save_state(str(tmp_path))
    next(one)
    accelerator.load_state(str(tmp_path))
    got += [i for batch in loader for i in yielded(batch)]
    assert got == expected(20, 7, 0)


def test_the_decoder_is_the_chosen_one(monkeypatch):
    asked, decoded = [], []

    class Counting:
        @staticmethod
        def decode_pairs(win, lose, **options):
            decoded.append((len(win), options["size"], options["on_error"]))
            return decode_pairs(win, lose, **options)

    def choose(decoder, device, threads=None):
        asked.append((decoder, str(device), threads))
        return Counting

    for module in (loader_module, equipment):
        monkeypatch.setattr(module, "choose_decoder", choose)
    got = [i for batch in PairLoader(Tiny(8), 4, decoder="dali", threads=1, **TINY) for i in yielded(batch)]
    assert got == expected(8, 0, 0)
    assert asked[-1] == ("dali", "cpu", 1)
    assert decoded == [(4, 2, "mask")] * 2


def test_batches_move():
    batch = next(iter(PairLoader(Tiny(8), 4, **TINY)))
    moved = batch.to("meta")
    assert moved.pixels.is_meta
    assert moved.weight.is_meta
    assert moved.pin_memory().pixels is moved.pixels  # what is not on the CPU cannot be pinned, and need not
    assert moved.keys == batch.keys
    assert next(iter(PairLoader(Tiny(8), 4, device="meta", **TINY))).pixels.is_meta

    class WithTensors(Tiny):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), extra={"text": torch.zeros(3)})

    assert next(iter(PairLoader(WithTensors(8), 4, device="meta", **TINY))).extra["text"].is_meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(batch_size=0), ValueError, "batch_size is 0; expected an int from 1"),
        (dict(batch_size=21), ValueError, "batch_size is 21 on 1 ranks; the source has only 20 pairs"),
        (dict(seed=-1), ValueError, "seed is -1"),
        (dict(seed=True), ValueError, "seed is True"),
        (dict(seed=1.0), ValueError, "seed is 1.0"),
        (dict(window=-1), ValueError, "window is -1"),
        (dict(last="keep"), ValueError, "last is 'keep'; expected 'drop', 'pad' or 'wrap'"),
        (dict(rank=1), ValueError, "rank is 1 and world_size None; expected both or neither"),
        (dict(rank=2, world_size=2), ValueError, "rank is 2; expected 0 to 1"),
        (dict(rank=0.5, world_size=2), ValueError, "rank is 0.5 and world_size 2; expected ints"),
        (dict(shuffle="no"), ValueError, "shuffle is 'no'; expected True or False"),
        (dict(ledger=5), TypeError, "ledger is a int; expected a path or None"),
        (dict(prompt_dropout=2), ValueError, "prompt_dropout is 2; expected a number from 0 to 1"),
        (dict(prefetch=0), ValueError, "prefetch is 0"),
        (dict(readers=True), ValueError, "readers is True"),
        (dict(timeout_s=0), ValueError, "timeout_s is 0; expected seconds > 0"),
        (dict(max_bad_run=-1), ValueError, "max_bad_run is -1"),
        (dict(decoder="gpu"), ValueError, "decoder is 'gpu'"),
        (dict(device="gpu"), ValueError, "device is 'gpu'; expected None, 'cpu', 'cuda'"),
        (dict(device="cuda:99"), ValueError, r"device is 'cuda:99'; PyTorch finds (no|\d+) CUDA devices here"),
        (dict(sise=3), TypeError, "sise: no argument of PairLoader, nor of decode_pairs, which takes background, crop"),
        (
            dict(ties="keep"),
            TypeError,
            r"ties: no argument .*: PairLoader\(open_source\(where, ties=\.\.\.\), \.\.\.\)",
        ),
        (dict(num_workers=4), TypeError, "num_workers: no argument .* threads= of them decode, and readers= read"),
        (dict(size=0), ValueError, "size is 0; expected sides from 1"),
        (dict(frames=0), ValueError, "frames is 0; expected an int from 1"),
        (dict(seeds=[1]), TypeError, "seeds: no argument"),
    ],
)
def test_bad_arguments_are_named_at_once(change, error, message):
    options = {**dict(source=Tiny(20), batch_size=4), **TINY, **change}
    with pytest.raises(error, match=message):
        PairLoader(**options)


def test_a_dataloader_that_would_make_batches_of_batches_is_told():
    outer = torch.utils.data.DataLoader(PairLoader(Tiny(8), 4, **TINY))
    with pytest.raises(TypeError, match=r"yields batches already; expected DataLoader\(loader, batch_size=None\)"):
        next(iter(outer))


def test_empty_and_missing_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"the source has no pairs: \{'pairs': 0\}"):
        PairLoader(Tiny(0, blocks=[0]), 1)
    with pytest.raises(SourceError, match="no such file"):
        PairLoader(tmp_path / "none.parquet", 1)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(SourceError, match="files of several kinds: csv, jsonl; expected one"):
        PairLoader(tmp_path, 1)
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="files of several kinds: parquet, tar; expected one"):
        PairLoader(tmp_path, 1)
    (tmp_path / "c.txt").touch()
    with pytest.raises(SourceError, match=r"ends in .txt; expected .parquet, .tar"):
        PairLoader(tmp_path / "c.txt", 1)


def test_folders_of_something_else_are_told(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        SourceError, match=r"photos: the folder has no .parquet or .tar or .jsonl or .csv or .json in it$"
    ):
        PairLoader(tmp_path / "photos", 1)
    (tmp_path / "photos" / "a.JPG").touch()
    with pytest.raises(SourceError, match=r'in it; for files of images .* lines such as \{"win": "a.jpg", "lose": "b'):
        PairLoader(tmp_path / "photos", 1)
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).touch()
    with pytest.raises(
        SourceError, match=r"saved was written by save_to_disk .*; expected .*load_from_disk\('/.*saved'\)"
    ):
        PairLoader(tmp_path / "saved", 1)


def test_names_of_the_hub_are_told(tmp_path, monkeypatch):
    """By the command with which the configurations download one; paths that are wrong are no such names."""
    monkeypatch.chdir(tmp_path)
    recipe = (Path(__file__).parents[2] / "configs" / "sd15-pickapic.yaml").read_text()
    command = re.search("hf download .*", recipe)[0]
    name = command.split()[2]
    with pytest.raises(
        SourceError, match=f"{name}: no such .*, expected hf://datasets/{name}, or the folder .* `{command}` m"
    ):
        open_source(name)
    (tmp_path / "data").mkdir()
    for where in ("data/pickapic_v2", "pickapic/pairs.jsonl", "/pickapic/v2", "a/b/c", "pickapic_v2"):
        with pytest.raises(SourceError, match=r"no such file or folder [^;]*$"):
            open_source(where)


def test_a_storage_is_not_listed_twice(tmp_path, monkeypatch):
    """What kind of source it is, the names tell."""
    (tmp_path / "pairs.jsonl").write_text('{"win": "a.png", "lose": "b.png"}\n')
    monkeypatch.setattr(sources_module, "find", lambda *_: pytest.fail("listed"))
    for where in ("pairs.jsonl", "*.jsonl", "pair?.jsonl"):
        assert len(open_source(tmp_path / where)) == 1
    assert len(open_source([tmp_path / "pairs.jsonl"])) == 1


def test_pairs_that_are_decoded_later_bring_all_of_theirs():
    """Sizes, corners, mirrors and colours as well as pixels: a model is told them, or learns from them."""

    def decoded(*pairs):
        both = [*pairs, *(pair + 10 for pair in pairs)]
        numbers = torch.tensor(both)[:, None]
        colours = dict(matrix=[f"m{one}" for one in both], full_range=[True] * len(both))
        of_pairs = torch.ones(len(pairs), dtype=torch.bool)
        return SimpleNamespace(
            pixels=numbers, original_size=numbers * 2, crop_top_left=numbers * 3, flipped=of_pairs, **colours
        )

    rows = Rows.empty(torch.zeros(6, 1, dtype=torch.int64), clips=True)
    rows.put([2, 0], decoded(5, 3))
    told = [3, 0, 5, 13, 0, 15]
    for tensor, factor in ((rows.pixels, 1), (rows.original_size, 2), (rows.crop_top_left, 3)):
        assert tensor[:, -1].tolist() == [factor * one for one in told]
    assert rows.flipped.tolist() == [True, False, True]
    assert rows.colours == [(f"m{one}", True) if one else ("bt709", False) for one in told]
    rows.clear(2)
    for tensor in (rows.pixels, rows.original_size, rows.crop_top_left):
        assert (tensor[:, -1] > 0).tolist() == [True, False, False] * 2
    assert rows.flipped.tolist() == [True, False, False]
    assert rows.colours[2] == rows.colours[5] == ("bt709", False)
