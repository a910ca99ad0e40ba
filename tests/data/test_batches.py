"""Batches: their memory, and the tensors and prompts in them."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from data.loading import TINY, yielded
from data.pairs import Tiny

from polydpo_fast.data import PairLoader
from polydpo_fast.data.rows import Rows


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
