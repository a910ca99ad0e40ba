"""Fused Poly-DPO / Diffusion-DPO losses and preference-pair decoding for diffusion models."""

from . import reference
from ._version import __version__
from .decode import DecodedPairs, DecodeError, DecodeFailure, DecodeLimits, decode_pairs
from .functional import available_backends, loss

__all__ = [
    "DecodeError",
    "DecodeFailure",
    "DecodeLimits",
    "DecodedPairs",
    "__version__",
    "available_backends",
    "decode_pairs",
    "loss",
    "reference",
]
