"""`decode_pairs` against Pillow and NumPy: pixels, planes, dtypes; threads, processes and memory of others."""

import contextlib
import hashlib
import io
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from image_oracle import ENCODINGS, GOOD, chunk, exif, file, jpeg, picture, pillow_pixels, png, truncated
from PIL import Image

import polydpo_fast
from polydpo_fast import DecodeError, decode_pairs


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (200, 40)])
def test_pixels_without_resize_are_pillows(encoding, shape):
    """Both use libjpeg's slow integer DCT and triangle upsampling; versions may differ by one level at most."""
    data = jpeg(picture(*shape), **encoding)
    decoded = decode_pairs([data], [data], size=(40, 32), resize=None, dtype=torch.uint8)
    expected = pillow_pixels(data, (40, 32), resize=None)
    for row in decoded.pixels:
        assert np.abs(row.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("encoding", [dict(), dict(progressive=True)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (61, 83), (300, 41), (17, 500), (1, 1), (700, 700)])
@pytest.mark.parametrize("size", [64, (31, 97), 1])
def test_resized_pixels_are_pillows(encoding, shape, size):
    """Pillow rounds to 8 bits between its two passes and at the end, we only at the end: at most one level."""
    data = jpeg(picture(*shape), **encoding)
    decoded = decode_pairs([data], [data], size=size, dtype=torch.uint8)
    difference = np.abs(decoded.pixels[0].numpy().astype(int) - pillow_pixels(data, size))
    assert difference.max() <= 1
    assert torch.equal(decoded.pixels[0], decoded.pixels[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_batch_is_its_pairs_one_by_one(dtype):
    """Of more than 8 MB, which are written past the caches; with one that fails half way."""
    images = [jpeg(picture(512, 512, seed=seed), progressive=seed % 2 > 0) for seed in range(8)]
    images[5] = images[5][:-2000]
    batch = decode_pairs(images[:4], images[4:], size=512, dtype=dtype, on_error="mask", threads=2)
    assert batch.ok.tolist() == [True, False, True, True]
    for i in range(4):
        single = decode_pairs(images[i : i + 1], images[4 + i : 5 + i], size=512, dtype=dtype, on_error="mask")
        assert torch.equal(batch.pixels[[i, 4 + i]], single.pixels)


def test_grey_images_fill_three_planes():
    data = jpeg(picture(40, 40).convert("L"))
    pixels = decode_pairs([data], [data], size=40, dtype=torch.uint8).pixels[0]
    assert np.array_equal(pixels.numpy(), pillow_pixels(data, 40))
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_level_is_normalised_and_rounded_to_nearest_even(dtype):
    """Exhaustive: a ramp of all 256 levels. Torch's own conversion of the float64 value is the oracle."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16), 8, axis=0).repeat(8, axis=1)
    data = jpeg(Image.fromarray(ramp), quality=100)
    levels = decode_pairs([data], [data], size=128, dtype=torch.uint8).pixels
    assert len(levels.unique()) == 256
    pixels = decode_pairs([data], [data], size=128, dtype=dtype).pixels
    exact = (2 * levels.double() - 255) / 255
    if dtype == torch.float32:
        # Two roundings of at most 2^-24 each: of 1/255, and of the product.
        assert (pixels.double() - exact).abs().max() <= 2**-23
    else:
        # float32 is the step between; no level lies within its rounding of a tie.
        assert torch.equal(pixels, exact.to(dtype))
    assert pixels.min() == -1
    assert pixels.max() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resized_half_precision_is_the_rounded_float32(dtype):
    data = jpeg(picture(90, 70))
    single = decode_pairs([data], [data], size=64, dtype=torch.float32).pixels
    half = decode_pairs([data], [data], size=64, dtype=dtype).pixels
    assert torch.equal(half, single.to(dtype))


def test_resized_floats_are_finer_than_eight_bits():
    data = jpeg(picture(90, 70))
    decoded = decode_pairs([data], [data], size=64, dtype=torch.float32)
    levels = (decoded.pixels[0].double() * 255 + 255) / 2
    whole = decode_pairs([data], [data], size=64, dtype=torch.uint8).pixels[0]
    assert (levels - whole).abs().max() <= 0.5 + 1e-4
    assert (levels != levels.round()).double().mean() > 0.9


def test_rows_are_winners_then_losers_and_geometry_is_returned():
    shapes = [(50, 40), (40, 60), (64, 64), (33, 99)]
    images = [jpeg(picture(*shape, seed=i)) for i, shape in enumerate(shapes)]
    decoded = decode_pairs(images[:2], images[2:], size=32, dtype=torch.uint8)
    for row, data in zip(decoded.pixels, images, strict=True):
        assert np.abs(row.numpy().astype(int) - pillow_pixels(data, 32)).max() <= 1
    assert decoded.original_size.tolist() == [list(shape) for shape in shapes]
    # Resized: 40 x 32, 32 x 48, 32 x 32, 32 x 96.
    assert decoded.crop_top_left.tolist() == [[4, 0], [0, 8], [0, 0], [0, 32]]
    assert decoded.ok.tolist() == [True, True]
    assert decoded.errors == ()


def test_any_bytes_like_object_will_do():
    data = jpeg(picture(20, 20))
    kinds = [data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)]
    decoded = decode_pairs(kinds, kinds, size=16)
    assert all(torch.equal(row, decoded.pixels[0]) for row in decoded.pixels)


def test_out_is_written_in_place():
    data = jpeg(picture(20, 20))
    out = torch.full((2, 3, 16, 16), 9.0, dtype=torch.float16)
    decoded = decode_pairs([data], [data], size=16, dtype=torch.float16, out=out)
    assert decoded.pixels is out
    assert torch.equal(out, decode_pairs([data], [data], size=16, dtype=torch.float16).pixels)


def test_the_bytes_do_not_depend_on_the_number_of_threads():
    images = [jpeg(picture(30 + 7 * i, 90 - 5 * i, seed=i)) for i in range(12)]
    digests = {
        hashlib.sha256(
            decode_pairs(images, images[::-1], size=48, dtype=torch.float32, threads=threads).pixels.numpy()
        ).hexdigest()
        for threads in (1, 2, 3, 8, 64, None)
    }
    assert len(digests) == 1


def test_calls_from_many_threads():
    images = [jpeg(picture(64, 64, seed=i)) for i in range(4)]
    expected = decode_pairs(images, images, size=32).pixels
    results = []

    def work():
        results.extend(decode_pairs(images, images, size=32, threads=3).pixels for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 120
    assert all(torch.equal(result, expected) for result in results)


def _decode_in_child(data, queue):
    queue.put(decode_pairs([data] * 4, [data] * 4, size=32, dtype=torch.uint8, threads=4).pixels.sum().item())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_get_a_pool_of_their_own():
    data = jpeg(picture(64, 64))
    expected = decode_pairs([data] * 4, [data] * 4, size=32, dtype=torch.uint8, threads=4).pixels.sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_decode_in_child, args=(data, queue)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [queue.get() for _ in children] == [expected] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), (0.5, (0.5, 0.25, 1.0))]
)
def test_any_mean_and_std(dtype, mean, std):
    data = jpeg(picture(40, 40))
    levels = decode_pairs([data], [data], size=40, dtype=torch.uint8).pixels.double()
    pixels = decode_pairs([data], [data], size=40, dtype=dtype, mean=mean, std=std).pixels

    def column(x):
        return torch.tensor(x, dtype=torch.float64).expand(3).reshape(3, 1, 1)

    exact = (levels / 255 - column(mean)) / column(std)
    # Three roundings in float32, the first of 255 mean (at most 2^7, so 2^-17 / 255 / std), then that of the dtype.
    assert ((pixels.double() - exact).abs() <= 2**-23 + exact.abs() * (torch.finfo(dtype).eps / 2 + 2**-22)).all()


def test_planes_are_those_that_are_stored():
    """Pillow's YCbCr draft has the chroma upsampled; where it is the same everywhere that is the stored value."""
    y, x = np.mgrid[:64, :96]
    flat = np.stack([(x * 2 + y) % 256, x * 0 + 90, y * 0 + 160], axis=-1).astype(np.uint8)
    data = file(Image.fromarray(flat, "YCbCr"), "JPEG", quality=95, subsampling=2)
    stored = Image.open(io.BytesIO(data))
    stored.draft("YCbCr", None)
    expected = np.asarray(stored)
    for size, corner in [((64, 96), (0, 0)), ((32, 40), (16, 28))]:
        decoded = decode_pairs([data], [data], size=size, resize=None, dtype="yuv420")
        assert decoded.pixels.shape == (2, size[0] * 3 // 2, size[1])
        assert decoded.crop_top_left[0].tolist() == list(corner)
        luma, cb, cr = decoded.pixels[1].flatten().split([size[0] * size[1], *[size[0] * size[1] // 4] * 2])
        cut = expected[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
        assert np.array_equal(luma.reshape(size).numpy(), cut[..., 0])
        for plane, channel in ((cb, 1), (cr, 2)):
            half = plane.reshape(size[0] // 2, size[1] // 2).numpy().astype(int)
            assert np.abs(half - cut[::2, ::2, channel]).max() <= 1


@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (34, 50), (61, 83), (128, 66)])
@pytest.mark.parametrize("progressive", [False, True])
def test_planes_become_the_same_pixels(shape, progressive):
    """Bit for bit; in a crop all but the outermost pixels, which have lost the colours of their neighbours."""
    data = jpeg(picture(*shape), progressive=progressive)
    size = shape[0] // 2 * 2, shape[1] // 2 * 2
    for options in (dict(), dict(crop="random", hflip=0.5, seeds=[0, 2, 5])):
        if options:
            size = tuple(max(2, n // 4 * 2) for n in shape)
        arguments = dict(size=size, resize=None, **options)
        stored = decode_pairs([data] * 3, [data] * 3, dtype="yuv420", **arguments)
        assert not options or len(set(stored.flipped.tolist())) == 2
        rgb = polydpo_fast.yuv420_to_rgb(stored.pixels, flip=stored.flipped.repeat(2), dtype=torch.uint8)
        whole = decode_pairs([data], [data], size=shape, resize=None, dtype=torch.uint8).pixels[0]
        for pixels, (top, left), flip in zip(rgb, stored.crop_top_left.tolist(), stored.flipped.repeat(2), strict=True):
            expected = (whole.flip(2) if flip else whole)[:, top : top + size[0], left : left + size[1]]
            edge = 0 if size == shape else 1
            inner = (slice(None), slice(edge, size[0] - edge), slice(edge, size[1] - edge))
            if min(size) > 4 or size == shape:
                assert torch.equal(pixels[inner], expected[inner])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: jpeg(picture(40, 40), subsampling=0), "it is not stored as YCbCr 4:2:0"),
        (lambda: jpeg(picture(40, 40).convert("L")), "it is not stored as YCbCr 4:2:0"),
        (lambda: png(picture(40, 40)), "it is not a JPEG"),
        (lambda: jpeg(picture(40, 40), exif=exif(6)), r"it is stored turned or mirrored \(EXIF orientation 6\)"),
        (lambda: jpeg(picture(50, 50)), "it is 50 x 50 and would have to be resized or padded"),
        (lambda: truncated(jpeg(picture(40, 40))), "Premature end"),
    ],
)
def test_planes_of_other_images_fail(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_pairs([data()], [data()], size=40, dtype="yuv420")


def test_an_interrupt_stops_a_long_call():
    images = [jpeg(picture(512, 512))] * 20_000  # minutes of work
    # A shell that runs the tests in the background has it ignored; and libraries leave handlers of their own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        decode_pairs(images, images, size=16, dtype=torch.uint8, threads=2)
    assert time.perf_counter() - begin < 10
    timer.join()
    signal.signal(signal.SIGINT, before)


def test_bytes_that_change_during_the_call_do_no_harm():
    """The length of a PNG's text chunk flickers: any outcome but a crash."""
    data = bytearray(png(picture(64, 64)))
    text = chunk(b"tEXt", b"k\0" + b"v" * 100)
    at = data.index(b"IDAT") - 4
    data[at:at] = text * 50
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            for k in range(50):
                data[at + k * len(text)] ^= 0x7F

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(300):
            decode_pairs([data], [data], size=8, on_error="mask", strict=False)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("work", ["decode_pairs([data] * 400, [data] * 400, size=64)", "loss(*tensors)"])
def test_a_daemon_thread_does_not_abort_the_end_of_the_process(work):
    """A prefetching thread inside a call when the interpreter goes."""
    program = f"""
import io, threading, time, numpy as np, torch
from PIL import Image
from polydpo_fast import decode_pairs, loss
file = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(file, "JPEG")
data, tensors = file.getvalue(), [torch.randn(2, 4_000_000) for _ in range(3)]
def forever():
    while True:
        {work}
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
"""
    # PyTorch's own calls abort the process if the end finds the thread waiting in one of them, one time in five:
    # one of many attempts must find it in ours, where it never may.
    ended = []
    while len(ended) < 12 and (not ended or ended[-1].returncode):
        ended.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60))
    assert ended[-1].returncode == 0, ended[-1].stderr


def test_a_default_device_is_not_where_results_go():
    data = jpeg(picture(20, 20))
    with torch.device("meta"):
        decoded = decode_pairs([data], [data], size=16, crop="random", hflip=0.5)
    for tensor in (decoded.pixels, decoded.ok, decoded.flipped, decoded.original_size):
        assert tensor.device.type == "cpu"


def test_sequences_that_change_during_the_call_do_no_harm():
    """A prefetcher's list: what is decoded is what the list held when the call began."""

    class Growing(Sequence):
        def __init__(self):
            self.asked = 0

        def __len__(self):
            self.asked += 1
            return 1 if self.asked == 1 else 40

        def __getitem__(self, index):
            if index >= 40:
                raise IndexError
            return GOOD

    with pytest.raises(ValueError, match="expected"):
        decode_pairs(Growing(), [GOOD], size=8)
    images, stop = [GOOD], threading.Event()

    def change():
        while not stop.is_set():
            images.extend([GOOD] * 40)
            del images[1:]

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(200):
        with contextlib.suppress(ValueError):
            decode_pairs(images, [GOOD], size=8)
    stop.set()
    thread.join()


def test_overwriting_a_tensor_that_autograd_saved_is_an_error():
    out = torch.zeros(2, 3, 8, 8)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * out).sum()
    decode_pairs([GOOD], [GOOD], size=8, dtype=torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
