"""The bridge to Diffusers: pieces that compose, and never own the training loop."""

from .fingerprints import fingerprint
from .forward import predict, time_ids
from .latent_store import LatentPairs, cache_latents
from .noising import NoisedPairs, draw_noise, draw_timesteps, noise_pairs
from .objective import PairObjective
from .reference import adapters_off, ema_weights, frozen_copy
from .reference_store import ReferenceErrors, precompute_reference_errors
from .weights import timestep_weights

__all__ = [
    "LatentPairs",
    "NoisedPairs",
    "PairObjective",
    "ReferenceErrors",
    "adapters_off",
    "cache_latents",
    "draw_noise",
    "draw_timesteps",
    "ema_weights",
    "fingerprint",
    "frozen_copy",
    "noise_pairs",
    "precompute_reference_errors",
    "predict",
    "time_ids",
    "timestep_weights",
]
