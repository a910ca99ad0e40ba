"""Batches that go to a device, on one that is late with everything. On a real one: tests/test_gpu_data.py."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from data import late_cuda
from data.late_cuda import Late, OnDevice, on_device, read
from data.loading import TINY, expected, threads, yielded
from data.pairs import Tiny

from polydpo_fast import decode_pairs
from polydpo_fast.data import PairLoader, equipment, transfer
from polydpo_fast.data.dali import decoder as dali


@pytest.fixture
def machine(monkeypatch):
    """Of which the test's thread uses the second device."""
    late_cuda.set_device(1)
    monkeypatch.setattr(dali, "_has_cuda", lambda: False)  # DALI would ask a real one
    transfer._stream_of.cache_clear()
    yield Late(monkeypatch)
    transfer._stream_of.cache_clear()
    late_cuda.set_device(0)


def seen(batch):
    """The numbers of the pairs, as a kernel sees them."""
    assert batch.pixels.device == torch.device("cuda", 1)
    return yielded(replace(batch, pixels=read(batch.pixels)))


class OnTheDevice:
    """A decoder whose pixels come into being on the device, on the stream that is current where it is called."""

    device = torch.device("cuda", 1)

    @staticmethod
    def decode_pairs(win, lose, out=None, **options):
        assert out is None
        result = decode_pairs(win, lose, **options)
        pixels = torch.full_like(result.pixels, late_cuda.GARBAGE)
        late_cuda.current_stream(1).ask(lambda: pixels.copy_(result.pixels))
        return replace(result, pixels=on_device(pixels, 1))


@pytest.fixture(params=["copied", "decoded there"])
def decoder(request, monkeypatch):
    if request.param == "decoded there":
        monkeypatch.setattr(equipment, "choose_decoder", lambda *_: OnTheDevice)
    return request.param


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_batches_are_whole_however_late_the_device_is(machine, decoder, last):
    bad = {3: "read", 5: "win", 11: "lose"}
    loader = PairLoader(Tiny(38, bad=bad), 4, device="cuda", last=last, max_bad_rate=1, prefetch=3, **TINY)
    for epoch in range(3):
        got = [number if ok else -1 for batch in loader for number, ok in zip(seen(batch), batch.ok, strict=True)]
        assert got == expected(38, 0, epoch, bad, last, group=4)
    if decoder == "copied":
        gc.collect()
        assert 1 <= len(machine.page_locked) <= 8  # used again
    else:
        assert not machine.page_locked


def test_batches_that_are_kept_while_the_loader_goes_on(machine, decoder):
    """Nobody has waited for their copies yet, and the passes that they came from are over."""
    loader = PairLoader(Tiny(40), 4, device="cuda:1", **TINY)
    kept, numbers = [], []
    for epoch in range(6):
        loader.set_epoch(epoch)
        some = iter(loader)
        kept += [next(some), next(some)]
        some._close()
        del some
    for batch in kept:
        numbers += seen(batch)
    assert numbers == [number for epoch in range(6) for number in expected(40, 0, epoch)[:8]]


def test_a_consumer_with_a_stream_of_its_own(machine, decoder):
    loader = PairLoader(Tiny(20), 4, device="cuda", **TINY)
    own = late_cuda.Stream(1)
    with late_cuda.stream(own):
        got = [number for batch in loader for number in seen(batch)]
    assert got == expected(20, 0, 0)
    assert own.done


def test_a_consumer_that_looks_at_another_device_meanwhile(machine, decoder):
    batches = iter(PairLoader(Tiny(20), 4, device="cuda", **TINY))
    late_cuda.set_device(0)
    assert [number for batch in batches for number in seen(batch)] == expected(20, 0, 0)


def test_nothing_waits_for_the_consumers_kernels(machine, decoder):
    """The loader works beside them, on a stream of its own."""
    batches = iter(PairLoader(Tiny(20), 4, device="cuda", **TINY))
    first = next(batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late_cuda._default[1], "run", lambda *_: pytest.fail("the loader waits for the model"))
        rest = list(batches)
    assert [number for batch in (first, *rest) for number in seen(batch)] == expected(20, 0, 0)


def test_a_device_that_fails(machine, monkeypatch):
    """The consumer is told, and no thread is left."""

    def fails(event):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before = threads()
    batches = iter(PairLoader(Tiny(400), 4, device="cuda", **TINY))
    next(batches)
    for name in ("query", "synchronize"):
        monkeypatch.setattr(late_cuda.Event, name, fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(batches)
    assert threads() == before


def test_walks_are_whole_too(machine, decoder):
    loader = PairLoader(Tiny(20, bad={6: "win"}), 4, device="cuda", max_bad_rate=1, **TINY)
    got = [batch.index.tolist() for batch in loader.walk(torch.arange(4, 14).numpy()) if seen(batch)]
    assert got == [[4, 5, -1, 7], [8, 9, 10, 11], [12, 13, -1, -1]]


def test_tensors_of_the_source_go_along(machine, decoder):
    class WithTensors(Tiny):
        def __getitem__(self, index):
            pair = super().__getitem__(index)
            return replace(pair, extra={**pair.extra, "text": torch.full((3,), index)})

    for batch in PairLoader(WithTensors(20), 4, device="cuda", **TINY):
        assert isinstance(batch.extra["text"], OnDevice)
        assert read(batch.extra["text"])[:, 0].tolist() == batch.index.tolist()


def test_the_decoder_is_kept_between_epochs(machine, monkeypatch):
    made = []
    monkeypatch.setattr(equipment, "choose_decoder", lambda *_: made.append(OnTheDevice) or OnTheDevice)
    loader = PairLoader(Tiny(8), 4, device="cuda", **TINY)
    made.clear()
    for _ in range(3):
        assert len(list(loader)) == 2
    assert len(made) == 1


def test_memory_of_the_device_is_used_again_in_the_next_epoch(machine, decoder):
    """PyTorch keeps what a stream has used for that stream alone."""
    loader = PairLoader(Tiny(8), 4, device="cuda", **TINY)
    batches = [batch for _ in range(3) for batch in loader]
    assert len({id(batch.pixels.made_by) for batch in batches}) == 1
    assert batches[0].pixels.made_by is not late_cuda.current_stream(1)


def test_no_other_device_has_a_context(machine, decoder):
    """Of eight ranks each would take some hundreds of megabytes of the first device."""
    assert len(list(PairLoader(Tiny(8), 4, device="cuda", **TINY))) == 2
    assert late_cuda.contexts == {1}


def test_what_was_handed_out_is_not_held(machine, decoder):
    """A batch of clips can be a gigabyte of the device's memory."""
    batches = iter(PairLoader(Tiny(40), 4, device="cuda", **TINY))
    pixels = []
    for batch, _ in zip(batches, range(3), strict=False):
        stream = batch.pixels.made_by
        pixels.append(weakref.ref(batch.pixels))
    del batch
    with late_cuda._LOCK:
        stream.todo[:] = [lambda: None] * len(stream.todo)  # what is asked of this device holds what it writes to
    gc.collect()
    assert [one() for one in pixels] == [None] * 3
