"""Fused Poly-DPO / Diffusion-DPO losses and preference-pair decoding for diffusion models."""

from . import reference
from ._version import __version__
from .functional import available_backends, loss

__all__ = [
    "__version__",
    "available_backends",
    "loss",
    "reference",
]
