"""JPEG's YCbCr 4:2:0 planes to RGB: upsampling, colour, crop, flip and normalisation in one launch.

Traffic per output pixel: 1.5 bytes of planes, which the neighbours of a pixel find in the caches again, and three
values of the output. In bfloat16 that is 7.5 bytes.

The arithmetic is libjpeg's, in integers: every program computes its pixels from scratch, so the result depends
neither on the tiles nor on the crop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Output pixels of a program: 8 per thread, one 128-bit store per channel for 16-bit types.
ROWS = 4
COLS = 256
NUM_WARPS = 2 if torch.version.hip else 4


# Of the integers only the output's width decides something, the width of the stores.
@triton.jit(do_not_specialize=["H", "W", "h"])
def rgb_kernel(
    # inputs: planes (N, H * 3 / 2, W); crop (N, 2), int64, and flip (N,), bytes, may be None
    planes, crop, flip,
    # output (N, 3, h, w)
    out,
    # sizes: of the stored images, of the output
    H, W, h, w,
    # a channel's value v becomes (v - mean) * scale, in float32; not for uint8
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles in a row, rows of tiles, N)."""
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)

    # Where the pixels are in the image. Clamped: no crop, and no lane outside the output, reads outside the image.
    y = row
    x = col
    if flip is not None:
        x = tl.where(tl.load(flip + image) != 0, w - 1 - col, col)
    if crop is not None:
        # Clamped in 64 bits: whatever the crop is, it then fits into 32.
        y += tl.minimum(tl.maximum(tl.load(crop + 2 * image), 0), H - h).to(tl.int32)
        x += tl.minimum(tl.maximum(tl.load(crop + 2 * image + 1), 0), W - w).to(tl.int32)
    y = tl.minimum(y, H - 1)
    x = tl.minimum(tl.maximum(x, 0), W - 1)

    # The nearest sample of the chroma planes, and the next one on the side where the pixel's centre lies.
    # libjpeg replicates where the chroma planes have 1 or 2 columns: there, and at the edges, the next is the nearest.
    reach = tl.where(W > 4, 1, 0)
    near_y = y // 2
    near_x = x // 2
    far_y = tl.minimum(tl.maximum(near_y + (y % 2 * 2 - 1) * reach, 0), H // 2 - 1)
    far_x = tl.minimum(tl.maximum(near_x + (x % 2 * 2 - 1) * reach, 0), W // 2 - 1)
    near_row = near_y[:, None] * (W // 2)
    far_row = far_y[:, None] * (W // 2)
    near = near_row + near_x[None, :]
    below = far_row + near_x[None, :]
    beside = near_row + far_x[None, :]
    across = far_row + far_x[None, :]
    rounding = (8 - x % 2)[None, :]  # halves up in even columns, down in odd ones

    luma = planes + image * (H // 2 * 3) * W
    blue = luma + H * W
    red = blue + H // 2 * (W // 2)
    yy = tl.load(luma + (y[:, None] * W + x[None, :])).to(tl.int32)
    cb = _upsampled(blue, near, below, beside, across, rounding) - 128
    cr = _upsampled(red, near, below, beside, across, rounding) - 128

    # 16 bits of fraction; adding the luma before the shift that drops them changes nothing.
    one = yy * 65536 + 32768
    r = (one + 91881 * cr) >> 16
    g = (one - 22554 * cb - 46802 * cr) >> 16
    b = (one + 116130 * cb) >> 16

    at = row[:, None] * w + col[None, :]
    inside = (row < h)[:, None] & (col < w)[None, :]
    plane = tl.full([], 1, tl.int64) * h * w
    first = out + image * 3 * plane
    tl.store(first + at, _stored(r, mean_r, scale_r, out.dtype.element_ty), inside)
    tl.store(first + plane + at, _stored(g, mean_g, scale_g, out.dtype.element_ty), inside)
    tl.store(first + 2 * plane + at, _stored(b, mean_b, scale_b, out.dtype.element_ty), inside)


@triton.jit
def _upsampled(plane, near, below, beside, across, rounding):
    """A chroma plane at the pixels: 3/4 and 1/4 of the rows, unrounded, then the same of the columns."""
    this = 3 * tl.load(plane + near).to(tl.int32) + tl.load(plane + below).to(tl.int32)
    next_to_it = 3 * tl.load(plane + beside).to(tl.int32) + tl.load(plane + across).to(tl.int32)
    return (3 * this + next_to_it + rounding) >> 4


@triton.jit
def _stored(value, mean, scale, dtype: tl.constexpr):
    value = tl.minimum(tl.maximum(value, 0), 255)
    if dtype == tl.uint8:
        return value.to(tl.uint8)
    else:
        # Not value * scale - mean * scale: that would cancel, and compilers would fuse it or not.
        return ((value.to(tl.float32) - mean) * scale).to(dtype)


def launch_rgb(
    planes: Tensor, crop: Tensor | None, flip: Tensor | None, out: Tensor, means: list[float], scales: list[float]
) -> None:
    """Writes out (N, 3, h, w), contiguous, from planes (N, H * 3 / 2, W), in one launch.

    crop: (N, 2) int64, clamped to the image. flip: (N,) bool. means, scales: of the channels; a value v from 0 to 255
    is stored as (v - mean) * scale, or as it is in uint8. N is at most 65535, sides at most 16384.
    """
    n, _, h, w = out.shape
    height, width = planes.shape[1] // 3 * 2, planes.shape[2]
    grid = (triton.cdiv(w, COLS), triton.cdiv(h, ROWS), n)
    with torch.cuda.device_of(planes):
        rgb_kernel[grid](
            planes,
            None if crop is None else crop.contiguous(),
            None if flip is None else flip.contiguous().view(torch.uint8),
            out,
            height, width, h, w,
            *means, *scales,
            ROWS=ROWS, COLS=COLS,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
