"""`yuv420_to_rgb` on every backend that runs here: against libjpeg by way of Pillow, and against an oracle in loops."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_program import OneProgram

from polydpo_fast.colour import fixed_point
from polydpo_fast.yuv import yuv420_to_rgb

BACKENDS = ["reference", "triton"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8]
SIZES = [(2, 2), (4, 2), (2, 4), (4, 4), (2, 6), (4, 6), (6, 4), (16, 16), (34, 50), (130, 66), (6, 522)]


def random_planes(images, height, width, seed=0, device="cpu"):
    random = np.random.default_rng(seed)
    planes = random.integers(0, 256, (images, height * 3 // 2, width), dtype=np.uint8)
    # Extremes side by side saturate the colours and reach the largest and smallest sums.
    extreme = random.random(planes.shape) < 0.3
    planes[extreme] = random.choice(np.array([0, 255], np.uint8), extreme.sum())
    return torch.from_numpy(planes).to(device)


# ------------------------------------------------------------------------------------------------- oracle


def upsampled(plane):
    """A chroma plane at twice its size, as libjpeg's description has it, sample by sample."""
    rows, cols = plane.shape
    result = np.zeros((2 * rows, 2 * cols), int)
    for y in range(2 * rows):
        for x in range(2 * cols):
            r, c = y // 2, x // 2
            if cols <= 2:
                result[y, x] = plane[r, c]
                continue
            neighbour = min(max(r + (1 if y % 2 else -1), 0), rows - 1)

            def column_sum(c, near=plane[r], far=plane[neighbour]):
                return 3 * int(near[c]) + int(far[c])

            if x == 0:
                result[y, x] = (4 * column_sum(c) + 8) // 16
            elif x == 2 * cols - 1:
                result[y, x] = (4 * column_sum(c) + 7) // 16
            elif x % 2 == 0:
                result[y, x] = (3 * column_sum(c) + column_sum(c - 1) + 8) // 16
            else:
                result[y, x] = (3 * column_sum(c) + column_sum(c + 1) + 7) // 16
    return result


def fixed(x):
    """A number in libjpeg's fixed point of 16 bits."""
    return int(x * 65536 + 0.5)


def oracle(planes):
    """(3, H, W) uint8 from one image of planes."""
    height, width = planes.shape[0] // 3 * 2, planes.shape[1]
    stored = planes.reshape(-1)
    size, quarter = height * width, height * width // 4
    chroma = (height // 2, width // 2)
    luma = stored[:size].reshape(height, width).astype(int)
    blue = upsampled(stored[size : size + quarter].reshape(chroma)) - 128
    red = upsampled(stored[size + quarter :].reshape(chroma)) - 128
    half = 32768
    r = luma + (fixed(1.40200) * red + half) // 65536
    g = luma + (-fixed(0.34414) * blue - fixed(0.71414) * red + half) // 65536
    b = luma + (fixed(1.77200) * blue + half) // 65536
    return np.clip(np.stack([r, g, b]), 0, 255).astype(np.uint8)


def oracles(planes):
    return torch.from_numpy(np.stack([oracle(image) for image in planes.cpu().numpy()]))


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("size", SIZES)
def test_a_jpeg_becomes_what_libjpeg_makes_of_it(backend, quality, size, device):
    height, width = size
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")

    def decoded(mode, size):
        image = Image.open(file)
        image.draft(mode, size)
        image.load()
        assert (image.mode, image.size) == (mode, size)
        return np.asarray(image)

    luma = decoded("YCbCr", (width, height))[..., 0]
    # At half the size libjpeg scales the luma alone: the chroma comes as it is stored.
    chroma = decoded("YCbCr", (width // 2, height // 2))
    planes = np.concatenate([luma.ravel(), chroma[..., 1].ravel(), chroma[..., 2].ravel()])
    planes = torch.from_numpy(planes).view(1, height * 3 // 2, width).to(device)
    rgb = yuv420_to_rgb(planes, dtype=torch.uint8, backend=backend)
    np.testing.assert_array_equal(rgb[0].permute(1, 2, 0).cpu().numpy(), decoded("RGB", (width, height)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), backend=st.sampled_from(BACKENDS), seed=st.integers(0, 2**20), images=st.integers(1, 3))
def test_any_crop_and_flip_is_that_of_the_whole(device, data, backend, seed, images):
    height, width = (2 * data.draw(st.integers(1, 12), label=name) for name in ("height / 2", "width / 2"))
    h, w = data.draw(st.integers(1, height), label="h"), data.draw(st.integers(1, width), label="w")
    corner = st.tuples(st.integers(0, height - h), st.integers(0, width - w))
    corners = data.draw(st.lists(corner, min_size=images, max_size=images), label="crop")
    mirrored = data.draw(st.lists(st.booleans(), min_size=images, max_size=images), label="flip")
    planes = random_planes(images, height, width, seed, device)
    rgb = yuv420_to_rgb(
        planes,
        crop=torch.tensor(corners, device=device),
        size=(h, w),
        flip=torch.tensor(mirrored, device=device),
        dtype=torch.uint8,
        backend=backend,
    )
    for image, whole, (top, left), flip in zip(rgb.cpu(), oracles(planes), corners, mirrored, strict=True):
        expected = whole[:, top : top + h, left : left + w]
        assert torch.equal(image, expected.flip(2) if flip else expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(9, 300), (4, 256), (5, 257)])
def test_more_than_one_tile(backend, size, device):
    planes = random_planes(2, 16, 520, device=device)
    crop = torch.tensor([[7, 219], [3, 0]], device=device)
    flip = torch.tensor([False, True], device=device)
    rgb = yuv420_to_rgb(planes, crop=crop, size=size, flip=flip, dtype=torch.uint8, backend=backend).cpu()
    h, w = size
    whole = oracles(planes)
    assert torch.equal(rgb[0], whole[0, :, 7 : 7 + h, 219 : 219 + w])
    assert torch.equal(rgb[1], whole[1, :, 3 : 3 + h, :w].flip(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_default_normalisation_is_exact(backend, dtype, device):
    """Every value from 0 to 255, grey, against (2 v - 255) / 255 in float64 rounded once."""
    planes = torch.full((1, 24, 16), 128, dtype=torch.uint8)
    planes[:, :16] = torch.arange(256).view(16, 16)
    values = yuv420_to_rgb(planes.to(device), dtype=dtype, backend=backend)
    exact = (2 * torch.arange(256, dtype=torch.float64) - 255).div(255).view(16, 16)
    assert values.dtype == dtype
    for channel in values[0].cpu():
        if dtype == torch.float32 or (INTERPRETED and backend == "triton" and dtype == torch.bfloat16):
            # float32 takes two roundings; Triton's interpreter truncates to bfloat16 where a GPU rounds.
            ulps = (channel.double() - exact).abs() / (exact.abs() * torch.finfo(dtype).eps)
            assert ulps.max() <= 1
        else:
            assert torch.equal(channel, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_mean_and_std_of_each_channel(backend, dtype, device):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    planes = random_planes(2, 8, 12, device=device)
    values = yuv420_to_rgb(planes, dtype=dtype, mean=mean, std=std, backend=backend).cpu()
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    expected = (oracles(planes) / 255.0 - mean) / std
    torch.testing.assert_close(values.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_backends_agree_in_every_bit_of_float32(device):
    planes = random_planes(2, 14, 34, device=device)
    options = {"dtype": torch.float32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    results = [yuv420_to_rgb(planes, **options, backend=backend) for backend in BACKENDS]
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------ colours of clips


LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


def linear(planes, matrix, full_range):
    """(3, H, W) in float64: chroma on the even columns and between the rows, by the definitions of the standards."""
    height, width = planes.shape[0] // 3 * 2, planes.shape[1]
    stored = planes.reshape(-1).astype(np.float64)
    size = height * width
    y = stored[:size].reshape(height, width)
    rows = np.clip((np.arange(height) - 0.5) / 2, 0, height // 2 - 1)
    columns = np.clip(np.arange(width) / 2, 0, width // 2 - 1)

    def chroma(samples):
        samples = samples.reshape(height // 2, width // 2)
        tall = np.stack([np.interp(rows, np.arange(height // 2), c) for c in samples.T], axis=1)
        return np.stack([np.interp(columns, np.arange(width // 2), row) for row in tall]) - 128

    cb, cr = chroma(stored[size : size * 5 // 4]), chroma(stored[size * 5 // 4 :])
    if not full_range:
        y, cb, cr = (y - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
    kr, kb = LUMA[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]).clip(0, 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full_range", [True, False])
@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("size", [(2, 2), (2, 4), (4, 2), (6, 10), (18, 34)])
def test_colours_of_clips(backend, matrix, full_range, size, device):
    planes = random_planes(2, *size, device=device)
    rgb = yuv420_to_rgb(planes, dtype=torch.uint8, matrix=matrix, full_range=full_range, siting="left", backend=backend)
    expected = np.stack([linear(image, matrix, full_range) for image in planes.cpu().numpy()])
    # Half a level of rounding, and factors of 16 bits (JPEG's of five decimal places, bt601 in full range).
    assert np.abs(rgb.cpu().numpy() - expected).max() <= 0.51


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", LUMA)
def test_other_colours_in_the_centre(backend, matrix, device):
    """Chroma as JPEG's, rounded on its way: half a level of it is at most 1.1 of a channel's."""
    planes = random_planes(1, 16, 22, device=device)
    rgb = yuv420_to_rgb(planes, dtype=torch.uint8, matrix=matrix, full_range=False, backend=backend)[0].cpu().numpy()
    size, quarter = 16 * 22, 16 * 22 // 4
    stored = planes[0].cpu().numpy().reshape(-1)
    y = (stored[:size].reshape(16, 22) - 16.0) * 255 / 219
    cb, cr = (
        (upsampled(part.reshape(8, 11)) - 128.0) * 255 / 224
        for part in (stored[size : size + quarter], stored[-quarter:])
    )
    kr, kb = LUMA[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    expected = np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]).clip(0, 255)
    assert np.abs(rgb - expected).max() <= 0.51


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_of_different_colours(backend, device):
    """(N, T, ...) to (N, 3, T, ...): as frame by frame, with the crop, the flip and the colours of each clip."""
    planes = random_planes(15, 8, 12, device=device).view(5, 3, 12, 12)
    crop = torch.tensor([[0, 1], [3, 2], [1, 0], [2, 5], [3, 4]], device=device)
    flip = torch.tensor([True, False, False, True, True], device=device)
    matrix, full_range = ["bt709", "bt709", "bt709", "bt601", "bt2020"], [False, False, True, False, False]
    options = dict(size=(5, 7), dtype=torch.float32, siting="left", backend=backend)
    clips = yuv420_to_rgb(planes, crop=crop, flip=flip, matrix=matrix, full_range=full_range, **options)
    assert clips.shape == (5, 3, 3, 5, 7)
    for i in range(5):
        frames = yuv420_to_rgb(
            planes[i],
            crop=crop[i].expand(3, 2),
            flip=flip[i].expand(3),
            matrix=matrix[i],
            full_range=full_range[i],
            **options,
        )
        assert torch.equal(clips[i].transpose(0, 1), frames)


# ------------------------------------------------------------------------------------------------- memory


def addresses_read(monkeypatch):
    """Every address that a kernel loads from under Triton's interpreter, of lanes that are not masked."""
    from triton.runtime import interpreter

    addresses = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def recording(self, ptrs, mask, *rest):
        addresses.append(ptrs.data[mask.data].ravel())
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recording)
    return addresses


@pytest.mark.skipif(not INTERPRETED, reason="sees the addresses under Triton's interpreter")
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(3, 5), (2, 2), (10, 14), (1, 1)])
@pytest.mark.parametrize("corner", ["first", "last", "far outside", "far before"])
def test_no_lane_reads_outside_the_planes(monkeypatch, flip, size, corner):
    """Also where the crop is outside the image, which a GPU cannot refuse: it is clamped to the nearest inside."""
    from polydpo_fast.kernels.yuv import launch_rgb

    planes = random_planes(1, 10, 14)
    h, w = size
    last = (10 - h, 14 - w)
    crop = {"first": (0, 0), "last": last, "far outside": (2**62, 2**32), "far before": (-(2**62), -(2**32) - 3)}[
        corner
    ]
    top, left = last if corner in ("last", "far outside") else (0, 0)
    crop, flip = torch.tensor([crop]), torch.tensor([flip])
    out = torch.empty((1, 3, h, w), dtype=torch.uint8)
    addresses = addresses_read(monkeypatch)
    launch_rgb(
        planes.unsqueeze(1), crop, flip, out.unsqueeze(2), [0.0] * 3, [1.0] * 3, fixed_point("bt601", True), False
    )
    expected = oracles(planes)[..., top : top + h, left : left + w]
    assert torch.equal(out, expected.flip(3) if flip else expected)

    read = np.unique(np.concatenate(addresses))
    arguments = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (planes, crop, flip)]
    assert [address for address in read.tolist() if not any(address in x for x in arguments)] == []
    assert sum(address in arguments[0] for address in read.tolist()) >= h * w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_nothing_around_it(backend, dtype, device):
    buffer = torch.full((4, 3, 5, 7), 77, dtype=dtype, device=device)
    out = buffer[1:3]
    planes = random_planes(2, 6, 10, device=device)
    version = out._version
    crop = torch.tensor([[1, 3], [0, 2]], device=device)
    result = yuv420_to_rgb(planes, crop=crop, size=(5, 7), dtype=dtype, out=out, backend=backend)
    assert result is out
    assert out._version > version
    assert (buffer[0] == 77).all()
    assert (buffer[3] == 77).all()
    assert torch.equal(out, yuv420_to_rgb(planes, crop=crop, size=(5, 7), dtype=dtype, backend=backend))
    with torch.inference_mode():
        yuv420_to_rgb(planes, dtype=dtype, backend=backend)


@pytest.mark.skipif("EMULATED_GPU" in os.environ, reason="the emulator keeps a record of every byte")
def test_a_frame_beyond_two_to_the_31_bytes(device):
    """One grey pixel of the last of seven frames; of the memory before it no page is touched."""
    planes = torch.empty(1, 7, 24576, 16384, dtype=torch.uint8, device=device)
    luma, chroma = planes[0, -1, :16384], planes[0, -1, 16384:].view(2, 8192, 8192)
    luma[0, 0], chroma[:, :2, :2] = 77, 128
    rgb = yuv420_to_rgb(planes[0, -1:], size=(1, 1), dtype=torch.uint8, backend="triton")
    assert rgb.flatten().tolist() == [77] * 3
    clip = yuv420_to_rgb(planes, size=(1, 1), dtype=torch.uint8, backend="triton")
    assert clip[0, :, -1].flatten().tolist() == [77] * 3


@pytest.mark.gpu
def test_a_crop_outside_the_image_is_clamped_on_a_gpu():
    planes = random_planes(1, 10, 14, device="cuda")
    for backend in BACKENDS:
        rgb = yuv420_to_rgb(
            planes, crop=torch.tensor([[99, -5]], device="cuda"), size=(3, 5), dtype=torch.uint8, backend=backend
        )
        assert torch.equal(rgb.cpu(), oracles(planes)[:, :, 7:, :5])


@pytest.mark.skipif(not INTERPRETED, reason="one program alone runs in Triton's interpreter")
def test_a_clip_of_more_than_two_to_the_31_pixels(monkeypatch):
    """Its last program; of the memory of the others no page is touched."""
    from polydpo_fast.kernels import yuv

    monkeypatch.setattr(yuv, "rgb_kernel", OneProgram(yuv.rgb_kernel, monkeypatch, first=False))
    side = 16384
    planes = torch.empty(1, 9, side * 3 // 2, side, dtype=torch.uint8)
    planes[0, -1, side - 4 : side, -256:] = 77
    planes[0, -1, side:].view(2, side // 2, side // 2)[:, -3:, -129:] = 128
    out = torch.empty(1, 3, 9, side, side, dtype=torch.uint8)
    corner = out[0, :, -1, -4:, -256:].zero_()
    yuv420_to_rgb(planes, dtype=torch.uint8, out=out, backend="triton")
    assert corner.eq(77).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes_on_a_gpu(dtype):
    planes = random_planes(8, 1280, 1536, device="cuda")
    random = torch.Generator().manual_seed(0)
    crop = torch.stack([torch.randint(0, most, (8,), generator=random) for most in (257, 513)], dim=1).cuda()
    flip = (torch.arange(8) % 2 == 0).cuda()
    results = [
        yuv420_to_rgb(planes, crop=crop, size=(1024, 1024), flip=flip, dtype=dtype, backend=backend)
        for backend in BACKENDS
    ]
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------- compile, arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic, device):
    def step(planes, crop, flip):
        return yuv420_to_rgb(planes, crop=crop, size=(5, 9), flip=flip, dtype=torch.float32, backend=backend) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for images in (2, 3):
        arguments = (
            random_planes(images, 8, 12, device=device),
            torch.tensor([[3, 1]] * images, device=device),
            torch.arange(images, device=device) > 0,
        )
        assert torch.equal(compiled(*arguments), step(*arguments))


def test_compiles_with_an_output_given(device):
    def step(planes, out):
        return yuv420_to_rgb(planes, dtype=torch.float32, out=out) * 2

    planes = random_planes(1, 4, 6, device=device)
    out = torch.zeros((1, 3, 4, 6), device=device)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(planes, out)
    assert torch.equal(out, yuv420_to_rgb(planes, dtype=torch.float32))
    assert torch.equal(result, out * 2)


def test_the_operator_keeps_its_contract(device):
    planes = random_planes(2, 4, 6, device=device)
    out = torch.zeros((2, 3, 4, 6), device=device)
    torch.library.opcheck(
        torch.ops.polydpo_fast.yuv420_to_rgb.default,
        (planes, None, None, out, [0.5] * 3, [0.5] * 3, fixed_point("bt709", False), True, "reference"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


GOOD = torch.zeros((2, 6, 8), dtype=torch.uint8)  # two images of 4 x 8
BAD = {
    "planes type": (dict(planes=[1]), TypeError, "planes is a list; expected a torch.Tensor"),
    "planes dtype": (dict(planes=GOOD.float()), TypeError, "planes has dtype torch.float32; expected torch.uint8"),
    "planes dims": (dict(planes=GOOD[0]), ValueError, r"planes has shape \(6, 8\); expected \(N, H \* 3 / 2, W\)"),
    "odd height": (dict(planes=GOOD[:, :5].contiguous()), ValueError, r"planes has shape \(2, 5, 8\)"),
    "odd width": (dict(planes=GOOD[..., :7].contiguous()), ValueError, r"planes has shape \(2, 6, 7\).* even"),
    "no image": (dict(planes=GOOD[:0]), ValueError, r"planes has shape \(0, 6, 8\).* none of them 0"),
    "too wide": (dict(planes=torch.empty(1, 3, 16386, dtype=torch.uint8)), ValueError, "images of 2 x 16386; .*16384"),
    "too tall": (dict(planes=torch.empty(1, 24579, 2, dtype=torch.uint8)), ValueError, "images of 16386 x 2; .*16384"),
    "too many": (dict(planes=torch.empty(65536, 3, 2, dtype=torch.uint8)), ValueError, "65536 images .* most 65535"),
    "not contiguous": (dict(planes=GOOD.mT.contiguous().mT), ValueError, r"planes has strides \(48, 1, 6\); expected"),
    "too many frames": (
        dict(planes=torch.empty(3, 21846, 3, 2, dtype=torch.uint8)),
        ValueError,
        "65538 images .* most 65535",
    ),
    "matrix": (dict(matrix="bt470"), ValueError, "matrix is 'bt470'; expected one of 'bt601', 'bt709', 'bt2020'"),
    "matrices": (dict(matrix=["bt601"]), ValueError, "matrix has 1 values; expected 2, one for each image or clip"),
    "full_range": (dict(full_range=[True, 1]), TypeError, "full_range is 1; expected True or False"),
    "full_range type": (dict(full_range=None), TypeError, "full_range is None; expected True or False"),
    "siting": (dict(siting="top"), ValueError, "siting is 'top'; expected 'center' or 'left'"),
    "crop type": (dict(crop=(0, 0)), TypeError, "crop is a tuple; expected a torch.Tensor"),
    "crop dtype": (dict(crop=torch.zeros(2, 2)), TypeError, "crop has dtype torch.float32; expected torch.int64"),
    "crop shape": (dict(crop=torch.tensor([0, 0])), ValueError, r"crop has shape \(2,\); expected \(2, 2\)"),
    "crop device": (dict(crop=torch.zeros(2, 2, dtype=torch.int64, device="meta")), ValueError, "crop is on meta"),
    "crop above": (dict(crop=torch.tensor([[0, 0], [-1, 3]])), ValueError, r"crop\[1\] is \(-1, 3\); expected a top"),
    "crop right": (
        dict(crop=torch.tensor([[1, 5], [0, 6]]), size=(3, 3)),
        ValueError,
        r"crop\[1\] is \(0, 6\); expected a top from 0 to 1 and a left from 0 to 5",
    ),
    "flip dtype": (dict(flip=torch.zeros(2)), TypeError, "flip has dtype torch.float32; expected torch.bool"),
    "flip shape": (dict(flip=torch.ones(1, 2).bool()), ValueError, r"flip has shape \(1, 2\); expected \(2,\)"),
    "size type": (dict(size=4), TypeError, r"size is 4; expected \(height, width\)"),
    "size float": (dict(size=(4, 4.0)), TypeError, r"size is \(4, 4.0\); expected \(height, width\)"),
    "size 0": (dict(size=(0, 4)), ValueError, r"size is \(0, 4\); expected at least \(1, 1\)"),
    "size too large": (dict(size=(4, 9)), ValueError, r"size is \(4, 9\); .* at most \(4, 8\)"),
    "dtype": (dict(dtype=torch.float64), TypeError, "dtype is torch.float64; expected torch.bfloat16, float16"),
    "mean": (dict(mean="x"), TypeError, r"mean\[0\] is .x. \(str\); expected a number"),
    "mean nan": (dict(mean=(0.5, 0.5, float("nan"))), ValueError, r"mean\[2\] is nan; expected a finite number"),
    "mean bool": (dict(mean=(0.5, True, 0.5)), TypeError, r"mean\[1\] is True \(bool\); expected a number"),
    "std count": (dict(std=(0.5, 0.5)), TypeError, r"std is \(0.5, 0.5\); expected a number, or three"),
    "std 0": (dict(std=(0.5, 0, 0.5)), ValueError, r"std is \(0.5, 0, 0.5\); expected numbers > 0"),
    "out type": (dict(out=1), TypeError, "out is a int; expected a torch.Tensor"),
    "out dtype": (dict(out=torch.empty(2, 3, 4, 8)), TypeError, "out has dtype torch.float32; expected torch.bfloat16"),
    "out shape": (
        dict(out=torch.empty(2, 3, 4, 4), dtype=torch.float32),
        ValueError,
        r"out has shape \(2, 3, 4, 4\); expected \(2, 3, 4, 8\)",
    ),
    "out strides": (
        dict(out=torch.empty(2, 4, 8, 3, dtype=torch.bfloat16).movedim(3, 1)),
        ValueError,
        "out is contiguous: False",
    ),
    "out gradient": (
        dict(out=torch.empty(2, 3, 4, 8, requires_grad=True), dtype=torch.float32),
        ValueError,
        "out is contiguous: True, requires_grad: True; expected",
    ),
    "backend": (dict(backend="cpp"), ValueError, "backend is 'cpp'; expected one of 'reference'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        yuv420_to_rgb(**{"planes": GOOD} | arguments)
