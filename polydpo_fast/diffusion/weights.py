"""Weights of timesteps that Diffusers' training scripts know by name."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .noising import is_flow_matching

__all__ = ["timestep_weights"]


def timestep_weights(scheduler: Any, name: str, *, snr_gamma: float = 5.0) -> Tensor:
    """The weight of each timestep's number, (num_train_timesteps,) float32 on the CPU.

    name: with a DDPM-like scheduler "min_snr": min(snr, snr_gamma), divided by snr for epsilon prediction, by snr + 1
        for v-prediction (Hang et al. 2023, arXiv 2303.09556); at zero terminal SNR its limit, 1 and 0. With flow
        matching "sigma_sqrt", 1 / sigma^2, or "cosmap", 2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, arXiv
        2403.03206, section 3.1; the names are Diffusers').

    Raises ValueError for another name, or one that the scheduler's kind does not have.
    """
    flow = is_flow_matching(scheduler)
    names = ("sigma_sqrt", "cosmap") if flow else ("min_snr",)
    if name not in names:
        raise ValueError(
            f"timestep_weight is {name!r}; with a {type(scheduler).__name__} expected "
            f"{', '.join(map(repr, names))}, or a function of the timesteps' numbers"
        )
    weights: Tensor
    if flow:
        sigmas = scheduler.sigmas[: int(scheduler.config.num_train_timesteps)].double()
        weights = sigmas**-2 if name == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    else:
        kept = scheduler.alphas_cumprod.double()
        snr = kept / (1 - kept)
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            weights = (snr_gamma / snr).clamp(max=1)
        else:
            weights = snr.clamp(max=snr_gamma) / (snr + 1 if kind == "v_prediction" else 1)
    return weights.float().cpu()
