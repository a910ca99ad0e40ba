"""From decoded rows to normalised planes, as fast as PyTorch makes them: for codecs that stop at RGB."""

import numpy as np
import torch
from torch import Tensor


def finish(rgb: np.ndarray, out: Tensor) -> None:
    """(H, W, 3) bytes into (3, H, W) of any floating dtype, from -1 to 1: plane by plane, which caches hold."""
    for to, plane in zip(out, torch.from_numpy(rgb).permute(2, 0, 1).contiguous(), strict=True):
        to.copy_(plane.float().div_(127.5).sub_(1))


def as_the_scripts(rgb: np.ndarray) -> Tensor:
    """ToTensor and Normalize with their defaults, as torchvision has them: (3, H, W) float32."""
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.clone().sub_(0.5).div_(0.5)
