"""Fused Poly-DPO / Diffusion-DPO losses and preference-pair decoding for diffusion models."""

from pathlib import Path

from . import reference
from ._version import __version__
from .clips import ClipLimits, DecodedClips, decode_clips
from .decode import DecodedPairs, DecodeError, DecodeFailure, DecodeLimits, decode_pairs
from .functional import PairErrors, available_backends, loss, pair_errors
from .yuv import yuv420_to_rgb

# In a checkout that is not installed, polydpo_fast.kernels lies beside the package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "pair_loss.py").exists():
    __path__.append(str(_checkout))

__all__ = [
    "ClipLimits",
    "DecodeError",
    "DecodeFailure",
    "DecodeLimits",
    "DecodedClips",
    "DecodedPairs",
    "PairErrors",
    "__version__",
    "available_backends",
    "decode_clips",
    "decode_pairs",
    "loss",
    "pair_errors",
    "reference",
    "yuv420_to_rgb",
]
