"""Fused Poly-DPO / Diffusion-DPO losses and preference-pair decoding for diffusion models."""

import importlib.util as _importlib
import sys as _sys
from pathlib import Path as _Path

from . import reference
from ._version import __version__
from .backends import available_backends
from .clips import DecodedClips, decode_clips
from .decode import DecodedPairs, DecodeError, DecodeFailure, decode_pairs
from .functional import PairErrors, loss, pair_errors
from .limits import ClipLimits, DecodeLimits
from .yuv import yuv420_to_rgb

# In a checkout polydpo_fast.kernels lies beside the package.
_kernels = _Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "pair_loss.py").exists():
    _spec = _importlib.spec_from_file_location(
        "polydpo_fast.kernels", _kernels / "__init__.py", submodule_search_locations=[str(_kernels)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _sys.modules["polydpo_fast.kernels"] = kernels = _importlib.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

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
