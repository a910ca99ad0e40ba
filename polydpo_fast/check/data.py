"""What all checks of data share: gates, pictures, colours, how pixels are compared."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from .cases import Draw
from .losses import ulp_at
from .report import Finding

__all__ = ["FRAME_LEVELS", "GATES", "MATRICES", "missing", "normalised", "picture", "rgb", "rounded"]

FRAME_LEVELS = 0.53
"""Of which half is the rounding to bytes."""

GATES = {
    "pixels": "1 level of Pillow's",
    "pixels, lossless": "rounded once, alpha of 16 bits twice",
    "pixels, resized": "0.6 level of the filter",
    "resized in float32": "0.03 level of the filter",
    "normalised": "rounded once",
    "geometry": "that of the docs",
    "crops": "of the seed, of the pair",
    "threads, batch": "bit for bit",
    "planes of JPEG": "bit for bit RGB's",
    "masked": "zeros, no other touched",
    "damage": "refused",
    "damage let pass": "reported",
    "planes as stored": "equal to FFmpeg's",
    "frames": f"{FRAME_LEVELS} level of BT.601, 709",
    "moments": "those of the docs, of the pair",
    "yuv420_to_rgb": "bit for bit",
    "colours": f"{FRAME_LEVELS} level of the matrix",
    "each pair once": "on any number of ranks",
    "order": "the formula's",
    "resumed": "bit for bit",
    "a bad pair": "replaced and told",
    "the last batch": "padded, or the first pairs again",
    "draws": "the formula's, on any ranks",
    "runs": "no exception",
}

# The luma of red and of blue: ITU-R BT.601, BT.709, BT.2020, FCC 73.682 and SMPTE 240M.
MATRICES = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "fcc": (0.3, 0.11),
    "smpte240m": (0.212, 0.087),
}


def missing(*packages: str) -> str:
    """Why these checks cannot run here, or nothing."""
    if importlib.util.find_spec("polydpo_fast._C") is None:
        return "the C++ extension is not built"
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def normalised(pixels: torch.Tensor, levels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> Finding:
    """Pixels of whole levels of 255, against (level / 255 - mean) / std in float64: rounded once.

    Of float32's own, those of 255 mean, of a reciprocal and of two results.
    """
    exact = (levels / 255 - mean) / std
    return rounded(pixels, exact, 2.0**-22 * (exact.abs() + (mean + 1) / std))


def rounded(pixels: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor | float = 0.0) -> Finding:
    """Pixels against float64 numbers that were rounded to their dtype, off by so much before."""
    info = torch.finfo(pixels.dtype)
    near = exact.abs().clamp_min(info.tiny) * info.eps / 2 + slack
    off = (pixels.double() - exact).abs()
    share, off, exact = (off / near).flatten(), off.flatten(), exact.flatten()
    worst = int(share.argmax())
    ulps, relative = (
        float(off[worst] / x[worst]) if off[worst] else 0.0 for x in (ulp_at(exact, pixels.dtype), exact.abs())
    )
    return Finding("normalised", float(share[worst]), ulps, relative)


def picture(d: Draw, height: int, width: int) -> np.ndarray:
    """A smooth picture with a little noise, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / d.between(3, 30) + d.between(0, 6)) * np.cos(y / d.between(3, 30)) for _ in "rgb"]
    noise = 8 * d.normal(height, width, 3).numpy()
    result: np.ndarray = (np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    return result


def rgb(ycc: list[np.ndarray], matrix: str, full: bool = False) -> np.ndarray:
    """(3, H, W) levels in float64, from 16 to 235 or the full range; chroma on the left, interpolated linearly."""
    y, cb, cr = ycc
    height, width = y.shape
    at_y = np.clip((np.arange(height) - 0.5) / 2, 0, len(cb) - 1)
    at_x = np.clip(np.arange(width) / 2, 0, cb.shape[1] - 1)

    def upsampled(c: np.ndarray) -> np.ndarray:
        tall = np.stack([np.interp(at_y, np.arange(len(c)), column) for column in c.T], axis=1)
        wide = np.stack([np.interp(at_x, np.arange(c.shape[1]), row) for row in tall])
        return (wide - 128) * (1 if full else 255 / 224)

    blue, red = upsampled(cb), upsampled(cr)
    luma = y.astype(np.float64) if full else (y.astype(np.float64) - 16) * 255 / 219
    of_red, of_blue = MATRICES[matrix]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    result: np.ndarray = np.stack([r, (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue), b]).clip(0, 255)
    return result
