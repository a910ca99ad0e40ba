"""What decoding does with whole images, once more in float64: the filter of a resize, mirror, crop, background."""

from __future__ import annotations

import numpy as np

__all__ = ["cut_out", "fit", "inner", "resampled"]


def resampled(levels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """(H, W, 3) by Pillow's antialiased filters, without its rounding to bytes on the way; clamped there as it does."""
    down = levels.shape[0] - height
    down_first = down > 0 and down > 2 * (levels.shape[1] - width)
    for axis in (0, 1) if down_first else (1, 0):
        weights = _weights(levels.shape[axis], (height, width)[axis], interpolation)
        levels = np.moveaxis(np.tensordot(weights, levels, (1, axis)), 0, axis).clip(0, 255)
    return levels


def _weights(count: int, to: int, interpolation: str) -> np.ndarray:
    """(to, count): a triangle, or Keys's cubic with a = -1/2, as wide as what it takes together."""
    scale = count / to
    stretch = max(scale, 1.0)
    centre = (np.arange(to)[:, None] + 0.5) * scale
    x = np.abs(np.arange(count)[None, :] + 0.5 - centre) / stretch
    if interpolation == "bilinear":
        weights = np.maximum(0.0, 1 - x)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    result: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return result


def fit(levels: np.ndarray, size: tuple[int, ...], resize: str | None, interpolation: str) -> np.ndarray:
    to = inner(levels.shape[:2], size, resize)
    return levels if levels.shape[:2] == to else resampled(levels, *to, interpolation)


def inner(of: tuple[int, ...], to: tuple[int, ...], resize: str | None) -> tuple[int, int]:
    """Height and width after the resize: torchvision's integers."""
    (h, w), (height, width) = of, to
    if resize is None:
        return h, w
    if resize == "stretch":
        return height, width
    if (height * w >= width * h) == (resize == "cover"):  # the height is met
        side = w * height // h
        return height, max(width, side) if resize == "cover" else max(1, side)
    side = h * width // w
    return max(height, side) if resize == "cover" else max(1, side), width


def cut_out(
    levels: np.ndarray, flip: bool, corner: list[int], size: tuple[int, ...], colour: tuple[int, int, int]
) -> np.ndarray:
    """(3, H, W)."""
    levels = levels[:, ::-1] if flip else levels
    (top, left), (height, width) = corner, size
    cut = levels[top : top + height, left : left + width]
    result = np.empty((height, width, 3))
    result[:] = colour
    y, x = (height - cut.shape[0]) // 2, (width - cut.shape[1]) // 2
    result[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return result.transpose(2, 0, 1)
