"""Arguments of `PairLoader`: what is wrong with them is named at once."""

import pytest
import torch
from data.loading import TINY, expected, yielded
from data.pairs import Tiny

from polydpo_fast import decode_pairs
from polydpo_fast.data import PairLoader, equipment
from polydpo_fast.data import loader as loader_module


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
