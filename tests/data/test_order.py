"""The order of pairs: permutations, blocks, shares of categories."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitmix import chained, outputs

from polydpo_fast.data.order import _ROUNDS, Balanced, Shuffled, order_of, permute
from polydpo_fast.splitmix import GOLDEN, mix, splitmix64_of_array

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
        return splitmix64_of_array(state + np.uint64((number + GOLDEN) % 2**64))

    state = chained(chained(np.arange(keys, dtype=np.uint64), 0), 0)
    of_rounds = [chained(state, number)[:, None] for number in range(_ROUNDS + 1)]
    result = np.broadcast_to(np.arange(size, dtype=np.uint64), (keys, size))
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result >> shift, result & mask
        for key in of_rounds[:-1]:
            left, right = right, left ^ (splitmix64_of_array(right + key) & mask)
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


def test_mixing_is_splitmix64():
    """Its numbers for two seeds as others print them, and chains of it."""
    assert outputs(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert outputs(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    for numbers in ((0,), (1234567,), (2**64 - 1, 3), (7, 0, 2**70 + 1), (-1,)):
        assert mix(*numbers) == chained(*numbers)


def permuted(value, size, key):
    """Of one number, in Python's integers: Feistel's network on so many bits that they halve evenly."""
    half = next(half for half in range(1, 40) if 4**half >= size)
    while True:
        left, right = divmod(value, 2**half)
        for number in range(12):
            z = (right + chained(key, number)) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (z ^ z >> 31) % 2**half
        value = left * 2**half + right
        if value < size:
            return value ^ (chained(key, 12) & 1) if value < 2 and size > 1 else value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 2**40 + 7])
def test_permutations_stay_what_they_were(size):
    """A training that goes on with a newer version has the rest of its epoch, and nothing else."""
    values = sorted({*range(min(size, 20)), size // 2, size - 1})
    for key in (0, 9, 2**64 - 1):
        assert permute(np.array(values), size, key).tolist() == [permuted(value, size, key) for value in values]


def test_orders_stay_what_they_were():
    """Seed and epoch make the key; blocks, and the pairs of k of them, have keys of their own; so have categories."""
    blocks, seed, epoch = [3, 0, 4, 2, 5], 11, 2
    key, order = chained(seed, epoch), dict(categories=None, shares=None, seed=seed, epoch=epoch)
    at, size = np.arange(14), 14
    assert order_of(np.array(blocks), window=None, **order)(at).tolist() == [permuted(p, size, key) for p in range(14)]
    turns = [permuted(place, 5, chained(key, 1)) for place in range(5)]
    want, begins = [], np.cumsum([0, *blocks]).tolist()
    for group in range(3):
        here = [begins[b] + k for b in turns[2 * group : 2 * group + 2] for k in range(blocks[b])]
        want += [here[permuted(place, len(here), chained(key, 2, group))] for place in range(len(here))]
    assert order_of(np.array(blocks), window=2, **order)(at).tolist() == want

    codes = np.array([0] * 11 + [1] * 3)
    order |= dict(categories=(("cat", "dog"), codes), shares={"dog": 1, "cat": 1})
    got, want = order_of(np.array(blocks), window=None, **order), []
    for place in range(14):
        slot = permuted(place, 14, chained(seed, epoch, 3))
        code, (first, count) = slot // 7, ((0, 11), (11, 3))[slot // 7]
        lap, turn = divmod(epoch * 7 + slot % 7, count)
        want.append((first + permuted(turn, count, chained(seed, 4, code, lap)), lap))
    assert list(zip(got(at).tolist(), got.laps(at).tolist(), strict=True)) == want


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
