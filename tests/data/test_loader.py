"""PairLoader: what is yielded, in which order, after which interruption."""

import gc
import json
import os
import pickle
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.loading import TINY, expected, threads, yielded
from data.pairs import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from splitmix import chained, outputs

from polydpo_fast import decode_pairs
from polydpo_fast.data import LoaderError, PairLoader, equipment


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
