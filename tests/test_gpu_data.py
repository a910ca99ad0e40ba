"""What only a GPU can show of the loader. tests/data/test_device.py has the same on a device that is no real one."""

import pytest
import torch

pytestmark = pytest.mark.gpu

TINY = dict(size=2, dtype=torch.uint8, decoder="cpp")


@pytest.fixture
def pairs():
    """Tiny ones, whose pixels say which they are."""
    pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
    from data import pairs

    return pairs


@pytest.mark.parametrize("own_stream", [False, True])
def test_pixels_are_those_of_the_cpu(pairs, own_stream):
    """Beside kernels that keep the device busy, so that everything is late, in three epochs; one pair is bad."""
    from polydpo_fast.data import PairLoader

    source = pairs.Tiny(200, bad={7: "win"})
    there, here = (PairLoader(source, 8, device=device, last="pad", **TINY) for device in ("cuda", None))
    busy = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            kept = []
            for a, b in zip(there, here, strict=True):
                for _ in range(5):
                    busy = busy @ busy / 2048
                kept.append((a.pixels.clone(), b.pixels.clone()))
                assert a.pixels.device == torch.device("cuda", torch.cuda.current_device())
                assert a.index.tolist() == b.index.tolist()
            assert all(torch.equal(a.cpu(), b) for a, b in kept)
    torch.cuda.synchronize()


def test_the_loader_is_not_held_up_by_the_model(pairs):
    """Batches come while the device is busy for long on the consumer's stream."""
    from polydpo_fast.data import PairLoader

    loader = PairLoader(pairs.Tiny(64), 8, device="cuda", **TINY)
    assert len(list(loader)) == 8
    # To page-lock more may wait for the device.
    spare = [loader._equipment.buffers.empty(loader._shape, loader._dtype) for _ in range(16)]
    assert all(one.is_pinned() for one in spare)
    del spare
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds or more
    busy = torch.cuda.Event()
    busy.record()
    batches = list(loader)
    assert not busy.query()
    assert len(batches) == 8
    assert sorted(number for batch in batches for number in pairs.which(batch.pixels)[0][:8]) == list(range(64))


def test_workers_of_a_dataloader(pairs):
    """They are forked after CUDA was used, and use none."""
    from polydpo_fast.data import PairLoader

    loader = PairLoader(pairs.Tiny(40), 4, device="cuda", **TINY)
    assert len(list(loader)) == 10
    got = []
    for batch in torch.utils.data.DataLoader(loader, batch_size=None, num_workers=2, pin_memory=True):
        assert batch.pixels.is_pinned()
        moved = batch.to("cuda", non_blocking=True)
        numbers, _ = pairs.which(moved.pixels)
        assert numbers == batch.index.tolist() * 2
        got += numbers[:4]
    assert sorted(got) == list(range(40))
