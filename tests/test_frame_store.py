"""The C++ that stores a decoded video frame, against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polydpo_fast import _C
from polydpo_fast.decoding.arguments import Output
from polydpo_fast.decoding.draws import Draw

CENTRE = Draw(True, 0, 0, False)
MATRICES = ["bt601", "bt709", "bt2020", "fcc", "smpte240m"]


def make_store(size, draw=CENTRE, dtype="uint8", resize="cover"):
    output = Output(size, resize, "bilinear", dtype, (127.5,) * 3, (1 / 127.5,) * 3, (255, 255, 255))
    return _C.FrameStore(draw=draw, output=output, memory=1 << 30)


def make_frame(height, width, depth=8, shift_x=1, shift_y=1, seed=0):
    """Three planes of noise, each in rows longer than they need to be."""
    random = np.random.default_rng(seed)
    shapes = [(height, width)] + [((height + shift_y) >> shift_y, (width + shift_x) >> shift_x)] * 2
    word = np.uint16 if depth > 8 else np.uint8
    return [random.integers(0, 1 << depth, (h, w + 3 * k + 1), word) for k, (h, w) in enumerate(shapes)]


def store(target, frame, form, out, full_range=True, matrix="bt601", **more):
    """`frame`: three arrays with rows that may be longer than the frame."""
    step = out[0].size if out.ndim == 3 else 0
    return store_at(target, frame, form, out.ctypes.data, step, full_range=full_range, matrix=matrix, **more)


def store_at(target, frame, form, address, step, strides=None, full_range=True, matrix="bt601", **more):
    height, width, depth, *shifts = form
    strides = strides or [plane.strides[0] for plane in frame]
    how = dict(size=(height, width), depth=depth, shifts=shifts, full_range=full_range, matrix=matrix)
    return target.store(frame, strides, **how, out=address, plane=step, **more)


def planes_of(frame, top, left, height, width):
    """The crop as one block, by slicing."""
    parts = [(frame[0], 1), (frame[1], 2), (frame[2], 2)]
    return np.concatenate(
        [p[top // s : (top + height) // s, left // s : (left + width) // s].ravel() for p, s in parts]
    ).reshape(height * 3 // 2, width)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (49, 65), (50, 67)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("corner", [None, (0, 0), (2**32 - 1, 2**32 - 1), (2**31, 3 * 2**30)])
def test_planes_are_cut_where_pixels_are(height, width, flipped, corner):
    """A mirrored pair's pixels are cut in the mirrored image; the planes of that region are stored, not mirrored."""
    draw = Draw(corner is None, *(corner or (0, 0)), flipped)
    frame = make_frame(height, width)
    out = np.zeros((60, 48), np.uint8)
    form = (height, width, 8, 1, 1)
    *original, top, left = store(make_store((40, 48), draw, "yuv420", None), frame, form, out)
    assert original == [height, width]
    stored_left = width - 48 - left if flipped else left
    assert top % 2 == 0
    assert stored_left % 2 == 0
    np.testing.assert_array_equal(out, planes_of(frame, top, stored_left, 40, 48))
    pixels = np.zeros((3, 40, 48), np.uint8)
    _, _, pixel_top, pixel_left = store(make_store((40, 48), draw, resize=None), frame, form, pixels)
    assert abs(top - pixel_top) <= 1
    assert abs(left - pixel_left) <= 2


@pytest.mark.parametrize("offset", [1, 8, 16, 63])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (2, 2), (512, 512), (480, 640), (512, 514), (130000, 6)])
def test_planes_fill_a_block_exactly(height, width, offset):
    """Large ones are stored otherwise, past the caches."""
    frame = make_frame(height, width)
    size = height * width * 3 // 2
    out = np.full(size + 192, 7, np.uint8)
    place = -out.ctypes.data % 64 + offset
    target = make_store((height, width), dtype="yuv420")
    store_at(target, frame, (height, width, 8, 1, 1), out.ctypes.data + place, 0, full_range=False)
    np.testing.assert_array_equal(
        out[place : place + size].reshape(height * 3 // 2, width), planes_of(frame, 0, 0, height, width)
    )
    assert (out[:place] == 7).all()
    assert (out[place + size :] == 7).all()


@pytest.mark.parametrize(
    ("form", "orientation", "size", "resize", "message"),
    [
        ((48, 64, 10, 1, 1), 1, (48, 64), "cover", "it is not stored as YCbCr 4:2:0 of 8 bits"),
        ((48, 64, 8, 1, 0), 1, (48, 64), "cover", "it is not stored as YCbCr 4:2:0 of 8 bits"),
        ((48, 64, 8, 0, 0), 1, (48, 64), "cover", "it is not stored as YCbCr 4:2:0 of 8 bits"),
        ((48, 64, 8, 1, 1), 6, (64, 48), "cover", r"it is stored turned or mirrored \(EXIF orientation 6\)"),
        ((48, 64, 8, 1, 1), 1, (24, 32), "cover", "it is 48 x 64 and would have to be resized or padded"),
        ((48, 64, 8, 1, 1), 1, (48, 96), "contain", "it is 48 x 64 and would have to be resized or padded"),
        ((48, 64, 8, 1, 1), 1, (50, 64), None, "it is 48 x 64, smaller than the crop of 50 x 64"),
    ],
)
def test_frames_without_such_planes_are_refused(form, orientation, size, resize, message):
    out = np.zeros((size[0] * 3 // 2, size[1]), np.uint8)
    with pytest.raises(RuntimeError, match=message):
        store(make_store(size, resize=resize, dtype="yuv420"), make_frame(*form), form, out, orientation=orientation)


def test_planes_have_even_sides():
    with pytest.raises(ValueError, match="size is odd; expected even sides for planes"):
        make_store((41, 48), dtype="yuv420")


# Where chroma lies, in pixels from the first of its two columns and of its two rows: H.264's figure E-1, in its order.
SITINGS = [(0, 0.5), (0.5, 0.5), (0, 0), (0.5, 0), (0, 1), (0.5, 1)]


def levels_of(frame, form, full_range, matrix, siting=0):
    """(3, H, W) in float64, by the definitions; chroma is interpolated linearly."""
    height, width, depth, shift_x, shift_y = form
    beside, below = SITINGS[siting]

    def interpolated(plane, length, shift, places):
        at = np.clip(places, 0, ((length + shift) >> shift) - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, ((length + shift) >> shift) - 1)
        return plane[low] + (at - low)[:, None] * (plane[high] - plane[low])

    def full_size(plane):
        rows = (np.arange(height) - below) / 2 if shift_y else np.arange(height)
        columns = (np.arange(width) - beside) / 2 if shift_x else np.arange(width)
        down = interpolated(plane.astype(np.float64), height, shift_y, rows)
        return interpolated(down.T, width, shift_x, columns).T

    unit, most = 2 ** (depth - 8), 2**depth - 1
    y, cb, cr = frame[0][:, :width].astype(np.float64), *(full_size(plane) - 128 * unit for plane in frame[1:])
    if full_range:
        y, cb, cr = (255 / most * part for part in (y, cb, cr))
    else:
        y, cb, cr = 255 / 219 / unit * (y - 16 * unit), 255 / 224 / unit * cb, 255 / 224 / unit * cr
    kr, kb = [(0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593), (0.30, 0.11), (0.212, 0.087)][MATRICES.index(matrix)]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]).clip(0, 255)


FORMS = [
    *[(8, 1, 1), (8, 1, 0), (8, 0, 0), (8, 0, 1), (9, 1, 1)],
    *[(10, 1, 1), (10, 1, 0), (10, 0, 0), (12, 1, 1), (12, 0, 0)],
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_levels_are_those_of_the_formulas(form, full_range, matrix):
    """Noise of all samples, and of the extreme ones only, which sums must not overflow with."""
    for height, width in ((37, 201), (2, 64), (1, 1), (8, 65)):
        frame = make_frame(height, width, *form, seed=MATRICES.index(matrix))
        most = 2 ** form[0] - 1
        for planes in (frame, [np.where(plane > most // 2, most, 0).astype(plane.dtype) for plane in frame]):
            out = np.zeros((3, height, width), np.uint8)
            store(make_store((height, width)), planes, (height, width, *form), out, full_range, matrix)
            error = out - levels_of(planes, (height, width, *form), full_range, matrix)
            # Rounding takes 0.5. Of 64 parts of a level, which is what a word of 16 bits holds: 1 for the two products
            # that are rounded down, 1/2 for an offset, 1/2 for the factors.
            assert np.abs(error).max() <= (0.53 if form[0] == 8 and form[1] else 0.51)
    # No drift: the mean of many roundings is nothing, to 1/64 and some.
    frame = make_frame(200, 300, *form)
    out = np.zeros((3, 200, 300), np.uint8)
    store(make_store((200, 300)), frame, (200, 300, *form), out, full_range, matrix)
    error = out - levels_of(frame, (200, 300, *form), full_range, matrix)
    for channel in range(3):
        inside = (out[channel] > 0) & (out[channel] < 255)
        assert abs(error[channel][inside].mean()) < 0.02


@pytest.mark.parametrize("form", [form for form in FORMS if form[1:] != (0, 0)])
@pytest.mark.parametrize("siting", range(1, 6))
def test_chroma_lies_where_the_stream_says(form, siting):
    for height, width in ((37, 201), (2, 64), (1, 1), (8, 65), (1, 2), (6, 1)):
        frame = make_frame(height, width, *form, seed=siting)
        most = 2 ** form[0] - 1
        for planes in (frame, [np.where(plane > most // 2, most, 0).astype(plane.dtype) for plane in frame]):
            out = np.zeros((3, height, width), np.uint8)
            store(make_store((height, width)), planes, (height, width, *form), out, False, "bt709", siting=siting)
            error = out - levels_of(planes, (height, width, *form), False, "bt709", siting)
            assert np.abs(error).max() <= (0.53 if form[0] == 8 and form[1] else 0.51)


@pytest.mark.parametrize("depth", [8, 10, 12])
@pytest.mark.parametrize("full_range", [False, True])
def test_rgb_is_rescaled(depth, full_range):
    """Planes of green, blue and red, as FFmpeg has them."""
    frame, form = make_frame(21, 75, depth, 0, 0), (21, 75, depth, 0, 0)
    out = np.zeros((3, 21, 75), np.uint8)
    store(make_store((21, 75)), frame, form, out, full_range, "rgb")
    samples = np.stack([frame[part][:, :75] for part in (2, 0, 1)]) / 2 ** (depth - 8)
    levels = samples * 255 / (256 - 2 ** (8 - depth)) if full_range else (samples - 16) * 255 / 219
    assert np.abs(out - levels.clip(0, 255)).max() <= 0.5 + 1e-6


@settings(max_examples=150)
@given(data=st.data())
def test_crops_turns_and_mirrors_are_those_of_the_whole_frame(data):
    draw = data.draw
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    form = (height, width, *draw(st.sampled_from(FORMS)))
    frame = make_frame(*form, seed=draw(st.integers(0, 99)))
    orientation, flipped = draw(st.integers(1, 8)), draw(st.booleans())
    colours = dict(matrix=draw(st.sampled_from(MATRICES)), siting=draw(st.integers(0, 5)))
    whole = np.zeros((3, height, width), np.uint8)
    store(make_store((height, width)), frame, form, whole, **colours)
    shown = whole[:, ::-1] if orientation in (3, 4, 6, 7) else whole
    shown = shown[:, :, ::-1] if orientation in (2, 3, 7, 8) else shown
    shown = shown.transpose(0, 2, 1) if orientation >= 5 else shown
    shown = shown[:, :, ::-1] if flipped else shown
    size = draw(st.integers(1, shown.shape[1])), draw(st.integers(1, shown.shape[2]))
    corner = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
    out = np.zeros((3, *size), np.uint8)
    target = make_store(size, Draw(False, *corner, flipped), resize=None)
    *original, top, left = store(target, frame, form, out, orientation=orientation, **colours)
    assert original == list(shown.shape[1:])
    np.testing.assert_array_equal(out, shown[:, top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("flipped", [False, True])
def test_other_dtypes_are_the_levels_normalised(dtype, flipped):
    frame, form, draw = make_frame(20, 203), (20, 203, 8, 1, 1), Draw(True, 0, 0, flipped)
    levels = np.zeros((3, 20, 203), np.uint8)
    store(make_store((20, 203), draw), frame, form, levels)
    out = torch.zeros(3, 20, 203, dtype=dtype)
    target = make_store((20, 203), draw, f"{dtype}".removeprefix("torch."))
    store_at(target, frame, form, out.data_ptr(), 20 * 203)
    expected = (torch.from_numpy(levels).float() - 127.5) * np.float32(1 / 127.5)
    assert torch.equal(out, expected.to(dtype))


def test_words_that_are_deeper_than_their_depth_are_cut():
    frame, form = make_frame(16, 30, 10), (16, 30, 10, 1, 1)
    dirty = [plane | np.uint16(0xFC00) for plane in frame]
    clean, cut = np.zeros((2, 3, 16, 30), np.uint8)
    store(make_store((16, 30)), frame, form, clean)
    store(make_store((16, 30)), dirty, form, cut)
    np.testing.assert_array_equal(cut, clean)


def test_planes_that_are_too_short_are_refused():
    frame = make_frame(16, 30)
    out = np.zeros((3, 16, 30), np.uint8)
    for part in range(3):
        short = [plane.ravel()[:-40].copy() if k == part else plane for k, plane in enumerate(frame)]
        strides = [plane.strides[0] for plane in frame]
        with pytest.raises(ValueError, match="a plane is smaller than its frame"):
            store_at(make_store((16, 30)), short, (16, 30, 8, 1, 1), out.ctypes.data, 480, strides)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_frames_are_the_same_wherever_they_are_stored(dtype):
    """On some processors those that begin at multiples of 64 bytes go past the caches."""
    frame, form = make_frame(800, 640), (800, 640, 8, 1, 1)
    plane = 800 * 640
    stored = []
    for offset in (0, 1, 32):
        room = torch.full((3 * plane + 33,), 7, dtype=torch.int16)
        assert room.data_ptr() % 64 == 0
        target = make_store((800, 640), dtype=dtype)
        store_at(target, frame, form, room.data_ptr() + 2 * offset, plane, full_range=False, matrix="bt709")
        assert (room[:offset] == 7).all()
        assert (room[offset + 3 * plane :] == 7).all()
        stored.append(room[offset : offset + 3 * plane])
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])
