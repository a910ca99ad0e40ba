"""The order of pairs: permutations, blocks, shares of categories."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polydpo_fast.data.order import _ROUNDS, Balanced, Shuffled, _mixed, mix, order_of, permute

BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutations_are_permutations(size, key):
    whole = permute(np.arange(size), size, key)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.array([size - 1, 0, size // 2])
    assert permute(some, size, key).tolist() == whole[some].tolist()


def test_a_large_permutation_stays_in_range():
    size = 2**40 + 7
    at = np.array([0, 1, size - 1, 12345678901])
    result = permute(at, size, 9)
    assert len(set(result.tolist())) == 4
    assert ((result >= 0) & (result < size)).all()


def permutations(size, keys):
    """(keys, size): what `permute` makes of all numbers with the keys mix(0), mix(1) ..., of all keys at once."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64(2**half - 1), np.uint64(half)

    def chained(state, number):
        return _mixed(state + np.uint64((number + 0x9E3779B97F4A7C15) % 2**64))

    state = chained(chained(np.arange(keys, dtype=np.uint64), 0), 0)
    of_rounds = [chained(state, number)[:, None] for number in range(_ROUNDS + 1)]
    result = np.broadcast_to(np.arange(size, dtype=np.uint64), (keys, size))
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result >> shift, result & mask
        for key in of_rounds[:-1]:
            left, right = right, left ^ (_mixed(right + key) & mask)
        result = np.where(outside, left << shift | right, result)
        outside = result >= size
    return np.where((result < 2) & (size > 1), result ^ (of_rounds[-1] & np.uint64(1)), result).astype(np.int64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_permutation_is_equally_likely(size):
    """Chi squared over 60,000 keys, as below. Rounds that are too few show in it; so does that what a Feistel network
    makes of 16 numbers is even."""
    keys = 60_000
    whole = permutations(size, keys)
    for key in range(20):
        assert permute(np.arange(size), size, mix(key)).tolist() == whole[key].tolist()
    seen = np.unique(whole, axis=0, return_counts=True)[1]
    every = math.factorial(size)
    expected, freedom = keys / every, every - 1
    assert len(seen) == every
    assert ((seen - expected) ** 2 / expected).sum() <= freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 5, 16, 33])
def test_every_place_is_equally_likely(size):
    """Chi squared of where each element lands, over 4,000 keys: the mean is its degrees of freedom, (size - 1)^2, and
    six standard deviations of sqrt(2 df) are beyond any luck."""
    keys = 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, mix(key))] += 1
    expected, freedom = keys / size, (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_together():
    order = permute(np.arange(10_000), 10_000, 3)
    assert (np.abs(np.diff(order)) <= 3).mean() < 0.003  # 6 of 10,000 by chance


def test_mixing_tells_all_numbers_and_their_places_apart():
    assert len({mix(*numbers) for numbers in ([], [0], [0, 0], [0, 1], [1, 0], [1], [2**64 - 1])}) == 7


@given(blocks=BLOCKS, window=st.one_of(st.none(), st.integers(0, 14)), key=st.integers(0, 2**63))
def test_an_epoch_has_every_pair_once(blocks, window, key):
    order = Shuffled(np.array(blocks, dtype=np.int64), key, window)
    whole = order(np.arange(sum(blocks)))
    assert sorted(whole.tolist()) == list(range(sum(blocks)))
    if window == 0:
        assert whole.tolist() == list(range(sum(blocks)))
    for cut in (0, len(whole) // 3):
        assert order(np.arange(cut, len(whole))).tolist() == whole[cut:].tolist()


@settings(max_examples=30)
@given(blocks=BLOCKS, window=st.one_of(st.none(), st.integers(0, 5)), key=st.integers(0, 2**63))
def test_windows_are_what_is_shuffled_together(blocks, window, key):
    """Each position is in its own, and they follow each other: of one block or of k, the last of fewer."""
    order, size = Shuffled(np.array(blocks, dtype=np.int64), key, window), sum(blocks)
    found = [order.window(position) for position in range(size)]
    assert all(begin <= position < end for position, (begin, end) in enumerate(found))
    windows = sorted(set(found))
    assert [0, *(end for _, end in windows)] == [*(begin for begin, _ in windows), size]
    block_of, whole = np.repeat(np.arange(len(blocks)), blocks), order(np.arange(size))
    if window is None:
        assert windows == [(0, size)]
        return
    inside = [set(block_of[whole[begin:end]].tolist()) for begin, end in windows]
    assert sum(map(len, inside)) == sum(block > 0 for block in blocks)  # none is in two
    assert all(len(some) <= max(1, window) for some in inside)
    if 0 not in blocks:
        assert all(len(some) == max(1, window) for some in inside[:-1])


@given(blocks=BLOCKS, window=st.integers(1, 5), key=st.integers(0, 2**63))
def test_a_window_reads_few_blocks_at_a_time(blocks, window, key):
    owner = np.repeat(np.arange(len(blocks)), blocks)
    visits = owner[Shuffled(np.array(blocks, dtype=np.int64), key, window)(np.arange(sum(blocks)))]
    first = {block: visits.tolist().index(block) for block in set(visits.tolist())}
    last = {block: len(visits) - 1 - visits.tolist()[::-1].index(block) for block in first}
    for at in range(len(visits)):
        assert sum(first[block] <= at <= last[block] for block in first) <= window


def test_epochs_and_seeds_differ():
    def whole(**change):
        options = {**dict(seed=0, epoch=0, window=None), **change}
        return order_of(np.array([50, 50]), None, None, **options)(np.arange(100)).tolist()

    orders = [whole(), whole(epoch=1), whole(seed=1), whole(window=1), whole(window=1, epoch=1)]
    assert len({tuple(order) for order in orders}) == len(orders)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
    data=st.data(),
    seed=st.integers(0, 2**62),
)
def test_shares_are_kept_exactly(sizes, data, seed):
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    shares = data.draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)))
    usable = [share if size else 0.0 for share, size in zip(shares, sizes, strict=True)]
    if not sum(usable) > 0:
        with pytest.raises(ValueError, match="no category with a share above 0"):
            Balanced(codes, shares, seed, 0)
        return
    total, taken = len(codes), np.zeros(len(codes), dtype=int)
    for epoch in range(5):
        balanced = Balanced(codes, shares, seed, epoch)
        order, laps = balanced(np.arange(total)), balanced.laps(np.arange(total))
        for pair in set(order.tolist()):  # each of its times has a number, which go on where the last epoch ended
            times = laps[order == pair]
            assert sorted(times.tolist()) == list(range(taken[pair], taken[pair] + len(times)))
        counts = np.bincount(codes[order], minlength=len(sizes))
        for count, share in zip(counts, usable, strict=True):
            assert abs(count - share / sum(usable) * total) < 1
        taken += np.bincount(order, minlength=total)
        for code in range(len(sizes)):  # all pairs of a category equally often, over epochs too
            times = taken[codes == code]
            assert times.size == 0 or times.max() - times.min() <= 1


def test_bad_shares_are_named():
    categories = ("cat", "dog"), np.array([0, 1, 1])
    for bad, message in (
        ({"cat": 1}, "categories is a mapping of 1 shares; .* only one of them has: 'dog'"),
        ({"cat": 1, "dog": 1, "cow": 1}, "categories is a mapping of 3 shares; .* only one of them has: 'cow'"),
        ({"cat": 1, "dog": -1}, r"categories is \{'cat': 1, 'dog': -1\}; expected shares >= 0"),
        ({"cat": 0, "dog": 0}, "categories has shares that add up to 0; expected more than 0"),
        ({"cat": float("inf"), "dog": 1}, "categories has shares that add up to inf"),
    ):
        with pytest.raises(ValueError, match=message):
            order_of(np.array([3]), categories, bad, seed=0, epoch=0, window=None)
    with pytest.raises(ValueError, match="categories is 'even'; expected 'balanced'"):
        order_of(np.array([3]), categories, "even", seed=0, epoch=0, window=None)
