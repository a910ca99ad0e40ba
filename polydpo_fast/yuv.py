"""`polydpo_fast.yuv420_to_rgb`: stored YCbCr 4:2:0 planes to the RGB tensor that the VAE takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .argument_checks import check_number
from .backends import choose_backend
from .colour import MATRICES, fixed_point

__all__ = ["yuv420_to_rgb"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)
_MAX_SIDE = 16384
_MAX_IMAGES = 65535  # programs in the third dimension of a CUDA grid


def yuv420_to_rgb(
    planes: Tensor,
    *,
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    matrix: str | Sequence[str] = "bt601",
    full_range: bool | Sequence[bool] = True,
    siting: Literal["center", "left"] = "center",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """RGB of images, or of the frames of clips, that are stored as planes of YCbCr with 4:2:0 subsampling.

    By default bit for bit what libjpeg and libjpeg-turbo make of JPEG's planes with their defaults: "fancy"
    upsampling, a triangle filter in integers (replication where the chroma planes have 1 or 2 columns), then colour in
    16-bit fixed point. Neighbours are taken from the whole image, so a crop is the crop of the whole.

    Args:
        planes: (N, H * 3 / 2, W) uint8, contiguous, on any device. Each image is planar I420: H * W bytes of Y, then
            H/2 * W/2 of Cb, then as many of Cr, row by row. H and W are even, at most 16384; N is at most 65535.
            Or (N, T, H * 3 / 2, W), N clips of T frames, N * T at most 65535; one crop and one flip for each clip.
        crop: (N, 2) int64 on the same device: top and left of the output in each image, in pixels of Y, odd or even.
            None for (0, 0). Where the output would leave the image, a CPU raises; elsewhere the values are not
            known without waiting for the device, and are clamped.
        size: (h, w) of the output, at most (H, W), which None stands for.
        flip: (N,) bool on the same device: which outputs are mirrored left to right, after the crop.
        dtype: bfloat16, float16 or float32: (v/255 - mean) / std of v in 0..255, computed in float32 and rounded to
            nearest even; or uint8: v itself, and mean and std are not used.
        mean, std: a number, or one each for R, G and B; std > 0. The defaults map to [-1, 1].
        matrix: "bt601" (JPEG's), "bt709", "bt2020", "smpte240m" or "fcc"; or N of them. Neighbours that have the same
            are converted in one launch.
        full_range: whether all of 0..255 is used, as JPEG does; else Y is 16..235, and Cb and Cr are 16..240. Or N of
            them.
        siting: where chroma lies: "center", between the columns, as in JPEG; or "left", on the even columns, as in
            H.264, HEVC, VP9 and AV1: interpolated linearly there, and rounded once. Always between the rows.
        out: a contiguous tensor (N, 3, h, w) of that dtype, on the same device, to write into.
        backend: "triton", "reference", or None: Triton on a CUDA or ROCm device where it is installed, the reference
            (PyTorch operations) elsewhere.

    Returns:
        (N, 3, h, w), or (N, 3, T, h, w) of clips, contiguous; `out` where it is given. Not differentiable. Works under
        torch.compile.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message says which.
    """
    images, frames, height, width = _check_planes(planes)
    if crop is not None:
        _check_tensor("crop", crop, torch.int64, (images, 2), planes.device)
    if flip is not None:
        _check_tensor("flip", flip, torch.bool, (images,), planes.device)
    h, w = _check_size(size, height, width)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype!r}; expected torch.bfloat16, float16, float32 or uint8")
    means, stds = _three("mean", mean), _three("std", std)
    if min(stds) <= 0:
        raise ValueError(f"std is {std!r}; expected numbers > 0")
    if siting not in ("center", "left"):
        raise ValueError(f"siting is {siting!r}; expected 'center' or 'left'")
    runs = _runs(images, matrix, full_range)
    out = _check_out(out, (images, 3, *frames, h, w), dtype, planes.device)
    backend = choose_backend(backend, planes.device, has_cpp=False)
    for some, colours in runs:
        torch.ops.polydpo_fast.yuv420_to_rgb(
            planes[some],
            None if crop is None else crop[some],
            None if flip is None else flip[some],
            out[some],
            means,
            stds,
            colours,
            siting == "left",
            backend,
        )
    return out


# --------------------------------------------------------------------------------------------- arguments


def _check_tensor(
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; expected {dtype}")
    if shape is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device} like planes")


def _check_planes(planes: Tensor) -> tuple[int, tuple[int, ...], int, int]:
    """How many images or clips, the shape of one's frames, height and width."""
    _check_tensor("planes", planes, torch.uint8)
    if planes.dim() not in (3, 4) or planes.shape[-2] % 3 or planes.shape[-1] % 2 or 0 in planes.shape:
        raise ValueError(
            f"planes has shape {tuple(planes.shape)}; expected (N, H * 3 / 2, W) or (N, T, H * 3 / 2, W) "
            "with H and W even, and none of them 0"
        )
    images, frames, height, width = planes.shape[0], planes.shape[1:-2], planes.shape[-2] // 3 * 2, planes.shape[-1]
    if images * math.prod(frames) > _MAX_IMAGES or height > _MAX_SIDE or width > _MAX_SIDE:
        raise ValueError(
            f"planes holds {images * math.prod(frames)} images of {height} x {width}; "
            f"expected at most {_MAX_IMAGES}, with sides of at most {_MAX_SIDE}"
        )
    if not planes.is_contiguous():
        raise ValueError(f"planes has strides {planes.stride()}; expected a contiguous tensor")
    return images, tuple(frames), height, width


def _check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out`, or a new one."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    _check_tensor("out", out, dtype, shape, device)
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"out is contiguous: {out.is_contiguous()}, requires_grad: {out.requires_grad}; "
            "expected a contiguous tensor without gradient"
        )
    return out


def _check_size(size: tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    if size is None:
        return height, width
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, int) for n in size):
        raise TypeError(f"size is {size!r}; expected (height, width), two ints")
    h, w = size
    if not (1 <= h <= height and 1 <= w <= width):
        raise ValueError(f"size is {size!r}; expected at least (1, 1) and at most {(height, width)}, the images' size")
    return h, w


def _runs(images: int, matrix: str | Sequence[str], full_range: bool | Sequence[bool]) -> list[tuple[slice, list[int]]]:
    """Neighbouring images that share their colours, as a slice, and the numbers of these."""
    keys = []
    for name, values in (("matrix", matrix), ("full_range", full_range)):
        if isinstance(values, (list, tuple)) and len(values) != images:
            raise ValueError(f"{name} has {len(values)} values; expected {images}, one for each image or clip")
        keys.append(values if isinstance(values, (list, tuple)) else itertools.repeat(values))
    if not isinstance(matrix, (list, tuple)) and not isinstance(full_range, (list, tuple)):
        return [(slice(None), _colours(matrix, full_range))]  # without a look at N, which torch.compile may not know
    runs, first = [], 0
    for colours, same in itertools.groupby(_colours(*key) for key in zip(*keys, strict=False)):
        last = first + len(list(same))
        runs.append((slice(first, last), colours))
        first = last
    return runs


def _colours(matrix: object, full_range: object) -> list[int]:
    if not isinstance(matrix, str) or matrix not in MATRICES:
        raise ValueError(f"matrix is {matrix!r}; expected one of {', '.join(map(repr, MATRICES))}")
    if not isinstance(full_range, bool):
        raise TypeError(f"full_range is {full_range!r}; expected True or False")
    return fixed_point(matrix, full_range)


def _three(name: str, values: float | Sequence[float]) -> list[float]:
    if not isinstance(values, (tuple, list)):
        values = [values] * 3  # type: ignore[list-item]  # checked below
    if len(values) != 3:
        raise TypeError(f"{name} is {values!r}; expected a number, or three")
    return [check_number(f"{name}[{i}]", value) for i, value in enumerate(values)]


# ---------------------------------------------------------------------------------------------- operator

_library = torch.library.Library("polydpo_fast", "FRAGMENT")
_library.define(
    "yuv420_to_rgb(Tensor planes, Tensor? crop, Tensor? flip, Tensor(a!) out, float[] mean, float[] std,"
    " int[] colours, bool left, str backend) -> ()"
)


def _yuv420_to_rgb(
    planes: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    out: Tensor,
    mean: list[float],
    std: list[float],
    colours: list[int],
    left: bool,
    backend: str,
) -> None:
    if crop is not None and crop.device.type == "cpu":
        _check_crop(crop, planes.shape[-2] // 3 * 2 - out.shape[-2], planes.shape[-1] - out.shape[-1])
    if planes.dim() == 3:  # clips of one frame
        planes, written = planes.unsqueeze(1), out.unsqueeze(2)
    else:
        written = out
    # (v/255 - mean) / std = (v - 255 mean) * 1/(255 std): a difference and a product, which nothing fuses.
    means = [255 * m for m in mean]
    scales = [1 / (255 * s) for s in std]
    if backend == "reference":
        _reference(planes, crop, flip, written, means, scales, colours, left)
        return
    from .kernels.yuv import launch_rgb

    launch_rgb(planes, crop, flip, written, means, scales, colours, left)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind PyTorch's back


_library.impl("yuv420_to_rgb", _yuv420_to_rgb, "CompositeExplicitAutograd")


@torch.library.register_fake("polydpo_fast::yuv420_to_rgb", lib=_library)
def _(*arguments: Any) -> None:
    """Nothing but `out` is written."""


def _check_crop(crop: Tensor, most_top: int, most_left: int) -> None:
    """Not with the other arguments, whose checks torch.compile traces, where crops have no values."""
    outside = ((crop < 0) | (crop > crop.new_tensor([most_top, most_left]))).any(dim=1)
    if outside.any():
        index = int(outside.nonzero()[0])
        top, left = crop[index].tolist()
        raise ValueError(
            f"crop[{index}] is ({top}, {left}); expected a top from 0 to {most_top} and a left from 0 to {most_left}"
        )


# --------------------------------------------------------------------------------------------- reference


def _reference(
    planes: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    out: Tensor,
    means: list[float],
    scales: list[float],
    colours: list[int],
    left: bool,
) -> None:
    """The operator in PyTorch: the whole images are upsampled, then cut, then converted."""
    height, width = planes.shape[2] // 3 * 2, planes.shape[3]
    images, _, frames, h, w = out.shape
    stored = planes.flatten(2).int()
    luma, cb, cr = stored.split([height * width, height * width // 4, height * width // 4], dim=2)
    chroma = torch.stack((cb, cr), dim=1).unflatten(3, (height // 2, width // 2))
    upsampled = _linearly_upsampled if left else _fancy_upsampled if width > 4 else _replicated
    ycc = torch.cat((luma.view(images, 1, frames, height, width), upsampled(chroma)), dim=1)

    y = torch.arange(h, device=out.device).expand(images, h)
    x = torch.arange(w, device=out.device).expand(images, w)
    if flip is not None:
        x = torch.where(flip[:, None], w - 1 - x, x)
    if crop is not None:
        y = y + crop[:, :1].clamp(0, height - h)
        x = x + crop[:, 1:].clamp(0, width - w)
    ycc = ycc.gather(3, y[:, None, None, :, None].expand(images, 3, frames, h, width))
    ycc = ycc.gather(4, x[:, None, None, None, :].expand(images, 3, frames, h, w))

    luma, cb, cr = ycc.unbind(1)
    offset, scale_y, red_cr, green_cb, green_cr, blue_cb = colours
    unit, bits = (8, 19) if left else (1, 16)
    one = (luma - offset) * (scale_y * unit) + 32768 * unit
    r = one + red_cr * cr >> bits
    g = one - green_cb * cb - green_cr * cr >> bits
    b = one + blue_cb * cb >> bits
    rgb = torch.stack((r, g, b), dim=1).clamp(0, 255)
    if out.dtype != torch.uint8:
        mean, scale = (
            torch.tensor(x, dtype=torch.float32, device=out.device)[:, None, None, None] for x in (means, scales)
        )
        rgb = (rgb - mean) * scale
    out.copy_(rgb)


def _fancy_upsampled(chroma: Tensor) -> Tensor:
    """libjpeg's h2v2: (..., H/2, W/2) to (..., H, W), each pixel 9/16, 3/16, 3/16, 1/16 of the four nearest samples.

    Less 128. Rows first, without rounding. Halves round up in even columns, else down.
    """
    sums = _with_all_rows(chroma)
    last = torch.cat((sums[..., :1], sums[..., :-1]), dim=-1)
    after = torch.cat((sums[..., 1:], sums[..., -1:]), dim=-1)
    return torch.stack((3 * sums + last + 8 >> 4, 3 * sums + after + 7 >> 4), dim=-1).flatten(-2) - 128


def _linearly_upsampled(chroma: Tensor) -> Tensor:
    """(..., H/2, W/2) to (..., H, W), less 128, times 8: 3/4 and 1/4 of the rows, samples and means of the columns."""
    sums = _with_all_rows(chroma) - 512
    after = torch.cat((sums[..., 1:], sums[..., -1:]), dim=-1)
    return torch.stack((2 * sums, sums + after), dim=-1).flatten(-2)


def _with_all_rows(chroma: Tensor) -> Tensor:
    """(..., H/2, W/2) to (..., H, W/2), times 4: 3/4 and 1/4 of the two nearest rows. Edges are repeated outwards."""
    above = torch.cat((chroma[..., :1, :], chroma[..., :-1, :]), dim=-2)
    below = torch.cat((chroma[..., 1:, :], chroma[..., -1:, :]), dim=-2)
    return torch.stack((3 * chroma + above, 3 * chroma + below), dim=-2).flatten(-3, -2)


def _replicated(chroma: Tensor) -> Tensor:
    """(..., H/2, W/2) to (..., H, W), less 128: what libjpeg does instead where W/2 is 1 or 2."""
    return chroma.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1) - 128
