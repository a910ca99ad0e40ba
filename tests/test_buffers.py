"""Large results and gradients on a CPU lie in memory that was used before, and nobody notices but the clock."""

import io
import mmap
import resource
import runpy
import threading

import pytest
import torch
from loss import peak_bytes
from PIL import Image

import polydpo_fast
from polydpo_fast import buffers as module
from polydpo_fast.buffers import Buffers
from polydpo_fast.decoding import arguments as decode_arguments
from polydpo_fast.fused import cpu

ELEMENTS = 1 << 20  # a pair of float32: 8 MB
pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture
def nothing_kept():
    for buffers in (cpu._gradients, decode_arguments._results):
        buffers._free.clear()


def faults_of(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def batch(seed, shape=(2, ELEMENTS), dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for _ in range(3)]


def gradient_of(pred, ref, target):
    pred = pred.detach().requires_grad_()
    polydpo_fast.loss(pred, ref, target).backward()
    return pred.grad


def closed_form(pred, ref, target, beta=5000.0):
    pred, ref, target = pred.double(), ref.double(), target.double()
    delta = ((pred - ref) * (pred + ref - 2 * target)).mean(1)
    p = torch.sigmoid(-0.5 * beta * (delta[0] - delta[1]))
    sign = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return -(1 - p) * sign * beta / pred.shape[1] * (pred - target)


def assert_right(grad, tensors):
    torch.testing.assert_close(grad.double(), closed_form(*tensors), rtol=1e-5, atol=1e-12)


def test_memory_is_used_again_only_when_nobody_holds_it():
    first, second, third = batch(0), batch(1), batch(2)
    held = gradient_of(*first)
    view = held[1, 5:]  # holds the storage alone, as a hook or an optimizer might
    address = held.data_ptr()
    del held
    other = gradient_of(*second)
    assert other.data_ptr() != address
    assert_right(other, second)
    torch.testing.assert_close(view.double(), closed_form(*first)[1, 5:], rtol=1e-5, atol=1e-12)
    del view
    again = gradient_of(*third)
    assert again.data_ptr() == address
    assert_right(again, third)


@pytest.mark.parametrize("arms", [1, 2])
def test_gradients_cost_no_page_faults_once_their_memory_is_there(arms):
    tensors = batch(0)
    if arms == 2:
        tensors = [(x[:1], x[1:]) for x in tensors]

    def faults():
        pred = [x.detach().requires_grad_() for x in (tensors[0] if arms == 2 else tensors[:1])]
        value = polydpo_fast.loss(tuple(pred) if arms == 2 else pred[0], *tensors[1:])
        return faults_of(value.backward)

    faults()
    # Fresh memory costs 4 each time, or 2,048 where the system gives no huge pages.
    assert min(faults() for _ in range(5)) == 0


def test_at_most_two_blocks_are_kept_and_those_of_other_sizes_leave_in_time():
    held = [gradient_of(*batch(seed)) for seed in range(3)]
    del held
    assert [block.nbytes for block, _ in cpu._gradients._free] == [8 * ELEMENTS] * 2
    smaller = batch(3, (2, ELEMENTS // 2))
    held = [gradient_of(*smaller) for _ in range(2)]
    assert_right(held[0], smaller)
    del held
    assert [block.nbytes for block, _ in cpu._gradients._free] == [4 * ELEMENTS] * 2


def test_batches_of_several_shapes_take_turns_in_the_memory_of_the_largest():
    """As those of images in buckets of about one size have."""
    shapes = [(2, ELEMENTS), (2, ELEMENTS * 5 // 6), (2, ELEMENTS - 3)]
    addresses, storages = set(), set()
    for seed in range(9):
        tensors = batch(seed, shapes[seed % 3])
        grad = gradient_of(*tensors)
        assert_right(grad, tensors)
        addresses.add(grad.data_ptr())
        storages.add(grad.untyped_storage().nbytes() - grad.nbytes)
        del grad
    assert len(addresses) == 1
    assert storages == {0}  # what is saved or sent to a worker is no larger than the tensor


def test_memory_that_is_a_little_too_small_is_not_taken():
    smaller, larger = batch(0, (2, ELEMENTS - 8)), batch(1)
    address = gradient_of(*smaller).data_ptr()
    grad = gradient_of(*larger)
    assert grad.data_ptr() != address
    assert_right(grad, larger)


def test_threads_never_share_a_block():
    wrong = []

    def work(seed):
        tensors = batch(seed, (2, 1 << 20))
        expected = closed_form(*tensors)
        grads = (gradient_of(*tensors).double() for _ in range(20))
        wrong.extend(seed for grad in grads if not torch.allclose(grad, expected, rtol=1e-5, atol=1e-12))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_order_of_the_elements_is_that_of_the_prediction(dtype):
    pred, ref, target = (x.to(memory_format=torch.channels_last) for x in batch(0, (4, 8, 256, 256), dtype))
    grad = gradient_of(pred, ref, target)
    assert grad.stride() == pred.stride()
    assert grad.dtype == dtype
    flat = [x.contiguous() for x in (pred, ref, target)]
    # The order of the sums is another.
    torch.testing.assert_close(grad, gradient_of(*flat), rtol=0.01 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_a_gradient_can_be_copied_saved_and_shared(tmp_path):
    grad = gradient_of(*batch(0, (2, 1 << 20)))
    expected = grad.clone()
    torch.save(grad, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt"), expected)
    assert torch.equal(grad.share_memory_(), expected)


def test_the_benchmark_counts_it_though_the_allocator_does_not():
    pred, ref, target = batch(0, (2, 1 << 20))
    pred.requires_grad_()
    beyond = peak_bytes(lambda: polydpo_fast.loss(pred, ref, target).backward(), pred, "cpu") - pred.nbytes
    assert 0 < beyond <= 1024


def test_the_compiled_loss_uses_it_too():
    step = torch.compile(gradient_of, fullgraph=False, backend="aot_eager")
    tensors = batch(0, (2, 1 << 20))
    addresses = set()
    for _ in range(3):
        grad = step(*tensors)
        addresses.add(grad.data_ptr())
        assert_right(grad, tensors)
        del grad
    assert len(addresses) == 1


def test_code_that_is_compiled_gets_memory_too():
    buffers = Buffers(1)
    compiled = torch.compile(lambda *a: buffers.empty(*a), backend="eager", fullgraph=True)
    assert compiled((2, 3), torch.float16).shape == (2, 3)
    assert compiled((2, 3), torch.float16, (1, 2)).stride() == (1, 2)


def test_where_there_is_no_memory_the_error_is_pytorchs():
    """accelerate's find_executable_batch_size looks for its words."""
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory: .* 1125899906842624 bytes"):
        Buffers(1).empty((1 << 50,), torch.uint8)


def test_pythons_that_do_not_name_the_advice_give_it(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_FREE")
    buffers = runpy.run_path(module.__file__)["Buffers"](1, reclaimable=True)
    buffers.empty((5,), torch.uint8)
    assert len(buffers._free) == 1


def png(level, side=1024):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(stream, "png", compress_level=1)
    return stream.getvalue()


def decoded(*levels, **options):
    images = [png(level) if level else b"no image" for level in levels]
    return polydpo_fast.decode_pairs(images, images, dtype=torch.uint8, on_error="mask", **options).pixels


def test_pixels_reuse_memory_that_nobody_holds_and_what_was_in_it_is_gone():
    first = decoded(7, 8)
    row = first[3, 1]
    address = first.data_ptr()
    del first
    other = decoded(0, 9)
    assert other.data_ptr() != address
    assert row.eq(8).all()
    del row
    again = decoded(5, 0)
    assert again.data_ptr() == address
    assert [image.unique().tolist() for image in again] == [[5], [0], [5], [0]]
    assert [image.unique().tolist() for image in other] == [[0], [9], [0], [9]]


def test_pixels_cost_no_page_faults_once_their_memory_is_there():
    image = [png(3)] * 2

    def decode():
        polydpo_fast.decode_pairs(image, image, threads=1)

    decode()
    # Fresh memory costs 12, or 6,144 where the system gives no huge pages.
    assert min(faults_of(decode) for _ in range(5)) < 12


def test_an_output_of_the_callers_is_his():
    out = torch.empty(4, 3, 1024, 1024, dtype=torch.uint8)
    assert decoded(1, 2, out=out).data_ptr() == out.data_ptr()
    assert not decode_arguments._results._free
