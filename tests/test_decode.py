"""`decode_pairs` against Pillow, NumPy and bytes that are no images."""

import contextlib
import hashlib
import io
import multiprocessing
import pickle
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import polydpo_fast
from polydpo_fast import DecodeError, DecodeLimits, decode_pairs


def picture(height, width, seed=0):
    """Smooth colours, edges and grain: what a codec finds easy and what it does not."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * (x * x + y * y))], axis=-1)
    edges = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    values = 128 + 60 * waves + 30 * edges[..., None] + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def pillow_pixels(data, size, resize="cover"):
    """The transform of the docstring with Pillow, in uint8: (3, H, W)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = (size, size) if isinstance(size, int) else size
    w, h = image.size
    if resize == "cover":
        if height * w >= width * h:
            h, w = height, max(width, w * height // h)
        else:
            h, w = max(height, h * width // w), width
        image = image.resize((w, h), Image.Resampling.BILINEAR)
    top, left = round((h - height) / 2), round((w - width) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


ENCODINGS = [
    dict(subsampling=2),
    dict(subsampling=1),
    dict(subsampling=0),
    dict(progressive=True),
    dict(progressive=True, subsampling=0, optimize=True),
    dict(restart_marker_blocks=3),
    dict(quality=20),
]


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


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(1, 90))
def test_crop_corner_is_torchvisions(height, width, out_height, out_width):
    data = jpeg(Image.new("RGB", (width, height)))
    decoded = decode_pairs([data], [data], size=(out_height, out_width), dtype=torch.uint8)
    if out_height * width >= out_width * height:
        h, w = out_height, max(out_width, width * out_height // height)
    else:
        h, w = max(out_height, height * out_width // width), out_width
    assert decoded.crop_top_left[0].tolist() == [round((h - out_height) / 2), round((w - out_width) / 2)]
    assert decoded.original_size[0].tolist() == [height, width]


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


# ------------------------------------------------------------------------------------------------ bad bytes


def truncated(data):
    return data[: len(data) * 2 // 3]


def flipped(data):
    damaged = bytearray(data)
    for at in range(len(data) // 2, len(data) // 2 + 60, 3):
        damaged[at] ^= 0x5A
    return bytes(damaged)


def oversized(data):
    """The header claims 60,000 x 60,000 pixels."""
    damaged = bytearray(data)
    at = data.index(b"\xff\xc0") + 5
    damaged[at : at + 4] = b"\xea\x60\xea\x60"
    return bytes(damaged)


def cmyk(data):
    return jpeg(Image.open(io.BytesIO(data)).convert("CMYK"))


BAD = [
    (lambda data: b"", "it is empty"),
    (lambda data: b"hello", "it is not a JPEG: it begins with 68 65 6c 6c"),
    (lambda data: b"\x89PNG\r\n\x1a\n" + data, "it is not a JPEG: it begins with 89 50 4e 47"),
    (lambda data: data[:10], "JPEG"),
    (lambda data: data[:100], "JPEG"),
    (truncated, "Premature end of JPEG file"),
    (flipped, "Corrupt JPEG data"),
    (oversized, r"it has 3600000000 pixels, more than 134217728 \(limits.pixels\)"),
    (cmyk, "CMYK"),
]


@pytest.mark.parametrize(("damage", "reason"), BAD)
@pytest.mark.parametrize("arm", ["win", "lose"])
def test_bad_bytes_name_arm_and_index(damage, reason, arm):
    good = jpeg(picture(64, 64))
    arms = {"win": [good] * 3, "lose": [good] * 3}
    arms[arm][1] = damage(good)
    with pytest.raises(DecodeError, match=rf"{arm}\[1\] could not be decoded: .*{reason}") as error:
        decode_pairs(**arms, size=32)
    assert [(f.arm, f.index) for f in error.value.failures] == [(arm, 1)]
    assert isinstance(error.value, ValueError)


def test_all_failures_are_listed():
    good = jpeg(picture(32, 32))
    with pytest.raises(DecodeError, match=r"win\[0\] could not be decoded: it is empty \(and 2 more\)") as error:
        decode_pairs([b"", good, b"x"], [good, b"", good], size=16)
    assert [str(f)[:8] for f in error.value.failures] == ["win[0]: ", "win[2]: ", "lose[1]:"]


def test_masked_pairs_are_zeroed_and_the_others_untouched():
    images = [jpeg(picture(40, 40, seed=i)) for i in range(6)]
    clean = decode_pairs(images[:3], images[3:], size=32)
    broken = [images[0], truncated(images[1]), images[2]]
    out = torch.full((6, 3, 32, 32), 5.0, dtype=torch.bfloat16)
    decoded = decode_pairs(broken, images[3:], size=32, on_error="mask", out=out)
    assert decoded.ok.tolist() == [True, False, True]
    assert [(f.arm, f.index) for f in decoded.errors] == [("win", 1)]
    assert (decoded.pixels[[1, 4]] == 0).all()
    keep = [0, 2, 3, 5]
    assert torch.equal(decoded.pixels[keep], clean.pixels[keep])


def test_lenient_mode_decodes_what_is_there():
    data = truncated(jpeg(picture(64, 64)))
    pixels = decode_pairs([data], [data], size=64, dtype=torch.uint8, strict=False).pixels[0]
    whole = pillow_pixels(jpeg(picture(64, 64)), 64)
    assert np.abs(pixels[:, :24].numpy().astype(int) - whole[:, :24]).max() <= 1


def test_crop_larger_than_the_image_is_an_error_of_that_image():
    data = jpeg(picture(20, 30))
    with pytest.raises(DecodeError, match="it is 20 x 30, smaller than the crop of 24 x 24, and resize is None"):
        decode_pairs([data], [data], size=24, resize=None)


def test_limits():
    data = jpeg(picture(64, 64), progressive=True)
    assert decode_pairs([data], [data], size=16, limits=DecodeLimits(64 * 64, len(data), 50)).ok.all()
    for limits, reason in [
        (DecodeLimits(pixels=64 * 64 - 1), "limits.pixels"),
        (DecodeLimits(bytes=len(data) - 1), "limits.bytes"),
        (DecodeLimits(scans=3), "limits.scans"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            decode_pairs([data], [data], size=16, limits=limits)


@given(data=st.data())
def test_damaged_files_never_crash_and_never_touch_their_neighbours(data):
    """Any damage: either a decoded image or an error of that image, and the neighbours stay right."""
    good = jpeg(picture(48, 40), progressive=data.draw(st.booleans()))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(2, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(3, len(damaged)))])
    strict = data.draw(st.booleans())
    clean = decode_pairs([good], [good], size=24, dtype=torch.uint8).pixels[0]
    decoded = decode_pairs([good, damaged], [good, good], size=24, dtype=torch.uint8, on_error="mask", strict=strict)
    assert decoded.ok[0]
    assert torch.equal(decoded.pixels[0], clean)
    assert torch.equal(decoded.pixels[2], clean)
    if not decoded.ok[1]:
        assert decoded.errors[0].arm == "win"
        assert decoded.errors[0].index == 1
        assert not decoded.pixels[[1, 3]].any()


# --------------------------------------------------------------------------------------------- bad arguments

GOOD = jpeg(picture(16, 16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(win=GOOD), TypeError, "win is a bytes; expected a list of bytes-like objects"),
        (dict(lose="x"), TypeError, "lose is a str"),
        (dict(win=[GOOD, GOOD]), ValueError, "lose has 1 images; expected 2 like win"),
        (dict(win=[], lose=[]), ValueError, "win and lose are empty"),
        (dict(lose=["x"]), TypeError, r"lose\[0\] is a str; expected a contiguous bytes-like object"),
        (dict(win=[None]), TypeError, r"win\[0\] is a NoneType"),
        (dict(size=0), ValueError, "size is 0; expected sides from 1 to 16384"),
        (dict(size=(8, 20000)), ValueError, r"size is \(8, 20000\)"),
        (dict(size=8.0), TypeError, "size is 8.0; expected an int or"),
        (dict(size=(8, 8, 3)), TypeError, "size is"),
        (dict(resize="fit"), ValueError, "resize is 'fit'; expected 'cover' or None"),
        (dict(dtype=torch.int32), TypeError, "dtype is torch.int32; expected torch.bfloat16"),
        (dict(on_error="skip"), ValueError, "on_error is 'skip'"),
        (dict(limits=100), TypeError, "limits is a int"),
        (dict(threads=0), ValueError, "threads is 0; expected an int from 1 to 1024"),
        (dict(out=[]), TypeError, "out is a list"),
        (
            dict(out=torch.zeros(2, 3, 8, 9)),
            ValueError,
            r"out has shape \(2, 3, 8, 9\); expected \(2, 3, 8, 8\)",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8)),
            TypeError,
            "out has dtype torch.float32; expected torch.bfloat16",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16).transpose(2, 3)),
            ValueError,
            "expected a contiguous CPU tensor",
        ),
        (
            dict(out=torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16, device="meta")),
            ValueError,
            "out is on meta",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        decode_pairs(**{**dict(win=[GOOD], lose=[GOOD], size=8), **change})


def test_public_names_are_documented():
    for name in ("decode_pairs", "loss", "DecodedPairs", "DecodeLimits", "DecodeError", "DecodeFailure"):
        assert getattr(polydpo_fast, name).__doc__


def test_errors_cross_process_boundaries():
    with pytest.raises(DecodeError) as error:
        decode_pairs([b"", GOOD], [GOOD, b"x"], size=8)
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)
    assert copy.failures == error.value.failures


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


@pytest.mark.parametrize("bad", [dict(pixels=0), dict(bytes=1.5), dict(scans=2**40), dict(pixels=True)])
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match=rf"limits.{next(iter(bad))} is .*; expected an int from 1 to"):
        DecodeLimits(**bad)
