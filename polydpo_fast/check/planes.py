"""Stored planes of images and clips to RGB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .cases import Draw
from .data import FRAME_LEVELS, MATRICES, normalised, rgb
from .report import Finding, must

__all__ = ["planes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def planes(seed: int, number: int, device: str, backend: str) -> Iterator[tuple[Finding, str]]:
    """Stored planes of images or clips to RGB on a device: against the plain PyTorch of the same on the CPU, against
    the matrices, and normalised."""
    from ..yuv import yuv420_to_rgb

    d = Draw(seed, number)
    images, height, width = d.integer(1, 3), 2 * d.integer(1, 20), 2 * d.integer(1, 20)
    frames = d.deal("frames", (1, d.integer(2, 3)))
    clips = (256 * d.uniform(images, frames, height * 3 // 2, width)).to(torch.uint8)
    flip = d.uniform(images) < 0.5
    dtype = d.deal("planes", (*_DTYPES, torch.uint8))
    means, stds = ([d.between(low, high) for _ in "rgb"] for low, high in ((0, 0.6), (0.2, 1)))
    stored = clips if frames > 1 else clips[:, 0]
    how: Any = dict(flip=flip, mean=means, std=stds, backend="reference")
    on_device: Any = {**how, "flip": flip.to(device), "backend": backend}
    expected = yuv420_to_rgb(stored, dtype=dtype, **how)
    actual = yuv420_to_rgb(stored.to(device), dtype=dtype, **on_device).cpu()
    ulps = 1 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 0  # the interpreter truncates
    difference = (actual.double() - expected.double()).abs()
    near = 2.0**-7 * expected.double().abs() * ulps
    same = bool((difference <= near).all())
    what = f"{images} of {frames} of {height}x{width}"
    yield must("yuv420_to_rgb", same), f"{dtype}, {what}"
    if dtype != torch.uint8:
        whole = yuv420_to_rgb(stored, dtype=torch.uint8, **how)
        mean, std = (torch.tensor(x, dtype=torch.float64).view(3, *(1,) * (whole.dim() - 2)) for x in (means, stds))
        yield normalised(expected, whole.double(), mean, std), f"{dtype}, {what}"
    found, colours = _colours(d, clips, flip, device, backend)
    yield found, f"{colours}, {what}"


def _colours(d: Draw, clips: torch.Tensor, flip: torch.Tensor, device: str, backend: str) -> tuple[Finding, str]:
    """Crops of clips (N, T, H * 3/2, W), each of colours of its own, against the matrices; and these colours."""
    from ..yuv import yuv420_to_rgb

    images, frames, height, width = *clips.shape[:2], clips.shape[2] * 2 // 3, clips.shape[3]
    stored = clips if frames > 1 else clips[:, 0]
    colours = [(d.deal("matrix", list(MATRICES)), d.deal("range", (True, False)))]
    colours += [(d.one_of(list(MATRICES)), d.chance(0.5)) for _ in range(1, images)]
    size = d.integer(1, height), d.integer(1, width)
    corners = [(d.integer(0, height - size[0]), d.integer(0, width - size[1])) for _ in range(images)]
    matrices, full = (list(x) for x in zip(*colours, strict=True))
    how: Any = dict(size=size, matrix=matrices, full_range=full, siting="left", dtype=torch.uint8, backend=backend)
    crop = torch.tensor(corners)
    pixels = yuv420_to_rgb(stored.to(device), flip=flip.to(device), crop=crop.to(device), **how).cpu()
    found = pixels.view(images, 3, frames, *size).transpose(1, 2).flatten(0, 1).numpy()
    levels = 0.0
    for index, frame in enumerate(clips.flatten(0, 1).numpy()):
        image = index // frames
        (top, left), (matrix, is_full) = corners[image], colours[image]
        y, c = np.split(frame.ravel(), [height * width])
        ycc = [y.reshape(height, width), *c.reshape(2, height // 2, width // 2)]
        cut = rgb(ycc, matrix, is_full)[:, top : top + size[0], left : left + size[1]]
        levels = max(levels, float(np.abs(found[index] - (cut[..., ::-1] if flip[image] else cut)).max()))
    return Finding("colours", levels / FRAME_LEVELS, levels), str(colours)
