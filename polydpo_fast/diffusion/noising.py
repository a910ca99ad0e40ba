"""One noise and one timestep per pair, for both arms: drawing them, adding the noise, and what the model is to predict.

What is drawn is a function of the pair's seed alone, computed by counters: the same for any split into batches and
ranks, today and in a later run, which is what allows the reference's errors to be computed ahead of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..splitmix import GOLDEN, mix, signed, splitmix64_of_tensor
from .moving import moved

__all__ = ["Density", "NoisedPairs", "Seeds", "draw_noise", "draw_timesteps", "is_flow_matching", "noise_pairs"]

Seeds = Sequence[int] | Tensor
Density = Literal["uniform", "logit_normal", "mode"]


class NoisedPairs(NamedTuple):
    """What a model gets, and what it is to predict, for B pairs; rows are [winners; losers].

    noisy: (2B, ...) in the latents' dtype.
    timesteps: (2B,), as the scheduler has them: int64 of a DDPM-like one, float32 of flow matching.
    target: float32, (2B, ...), or (B, ...) where both arms share it (epsilon prediction).
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor


def draw_noise(seeds: Seeds, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise, (B, *shape) float32, each row a function of its seed alone, to the bit on all devices.

    Counters hashed by splitmix64 (Steele, Lea and Flood 2014), then Box and Muller's transform in float64.
    """
    count = math.prod(shape)
    counter = torch.arange((count + 1) // 2, dtype=torch.int64, device=device) * signed(GOLDEN)
    starts = torch.tensor([signed(mix(seed, 1)) for seed in _numbers(seeds)], dtype=torch.int64, device="cpu")
    rows = []
    for some in moved(starts, counter.device).split(1 + _AT_ONCE // (1 + len(counter))):
        bits = splitmix64_of_tensor(some[:, None] + counter)
        rows.append(torch.cat(_normals(bits), dim=1)[:, :count].float())
    return torch.cat(rows).view(len(starts), *shape)


def draw_timesteps(
    scheduler: Any,
    seeds: Seeds,
    *,
    density: Density = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers of training timesteps, (B,) int64 from 0 to num_train_timesteps - 1, one per seed.

    density: of the position in the schedule: "uniform"; "logit_normal" (with logit_mean and logit_std) or "mode" (with
        mode_scale), as Stable Diffusion 3's training has them (Esser et al. 2024, section 3.1; the parameters are
        Diffusers'). A flow-matching scheduler's number 0 is its noisiest timestep, a DDPM scheduler's its cleanest.
    """
    if density not in ("uniform", "logit_normal", "mode"):
        raise ValueError(f"density is {density!r}; expected 'uniform', 'logit_normal' or 'mode'")
    total = int(scheduler.config.num_train_timesteps)
    result = []
    for seed in _numbers(seeds):
        u = ((mix(seed, 2) >> 11) + 0.5) * 2.0**-53
        if density == "logit_normal":
            v = ((mix(seed, 3) >> 11) + 0.5) * 2.0**-53
            normal = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
            u = 1 / (1 + math.exp(-(logit_mean + logit_std * normal)))
        elif density == "mode":
            u = 1 - u - mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        result.append(min(max(int(u * total), 0), total - 1))
    numbers = torch.tensor(result, dtype=torch.int64, device=None if device is None else "cpu")
    return numbers if device is None else moved(numbers, device)


def noise_pairs(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> NoisedPairs:
    """Adds each pair's noise to both of its arms, at its timestep.

    scheduler: a Diffusers scheduler: one with alphas_cumprod (DDPM, and the samplers of models that were trained so),
        with prediction_type "epsilon", "v_prediction" or "sample", also with rescaled betas (zero terminal SNR); or
        flow matching (FlowMatchEulerDiscreteScheduler), whose model predicts noise - latents. The timesteps of the
        latter must be those of training, not of `set_timesteps`; of the former the cumulated alphas alone are used.
    latents: (2B, ...), any floating dtype; the arithmetic is float32.
    noise: (B, ...). timesteps: (B,) int64, numbers as `draw_timesteps` gives them. Raises ValueError where one is none
        of the scheduler's, if they are on the CPU: of others it is not known without waiting for the device.
    """
    pairs = len(latents) // 2
    if len(latents) % 2 or pairs == 0 or not latents.is_floating_point():
        raise ValueError(f"latents is {latents.dtype} of shape {tuple(latents.shape)}; expected (2B, ...), floating")
    if noise.shape != (pairs, *latents.shape[1:]):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {(pairs, *latents.shape[1:])}, one per pair")
    if timesteps.shape != (pairs,) or timesteps.dtype != torch.int64:
        raise ValueError(f"timesteps is {timesteps.dtype} {tuple(timesteps.shape)}; expected int64 ({pairs},)")
    total = int(scheduler.config.num_train_timesteps)
    if timesteps.device.type == "cpu" and not (timesteps.min() >= 0 and timesteps.max() < total):
        raise ValueError(f"timesteps is {timesteps.tolist()}; expected numbers from 0 to {total - 1}")
    clean, shared = latents.float(), moved(noise, latents.device, torch.float32)
    both = torch.cat((shared, shared))
    at = moved(timesteps, latents.device).repeat(2)

    def of_rows(table: Tensor) -> Tensor:
        # On the device without waiting for it: only the tables are moved, and they are small.
        return moved(table, latents.device, torch.float32)[at].view(-1, *[1] * (clean.dim() - 1))

    target: Tensor
    if is_flow_matching(scheduler):
        if not len(scheduler.timesteps) == len(scheduler.sigmas) == total:  # for sampling it has a last sigma of 0 too
            raise ValueError(
                f"scheduler has {len(scheduler.timesteps)} timesteps and {len(scheduler.sigmas)} sigmas; expected its "
                f"{total} of training: set_timesteps was called on it, take another one for sampling"
            )
        sigma = of_rows(scheduler.sigmas)
        noisy, target = (1 - sigma) * clean + sigma * both, both - clean
        steps = moved(scheduler.timesteps, latents.device, torch.float32)[at]
    else:
        # Not the scheduler's add_noise: a sampler's may be of latents in another scale (Euler's is).
        kept = of_rows(scheduler.alphas_cumprod)
        signal, spread = kept**0.5, (1 - kept) ** 0.5
        noisy, steps = signal * clean + spread * both, at
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            target = shared
        elif kind == "v_prediction":
            target = signal * both - spread * clean
        elif kind == "sample":
            target = clean
        else:
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__} that predicts {kind!r}; expected 'epsilon', "
                "'v_prediction' or 'sample', or for flow matching a FlowMatchEulerDiscreteScheduler(shift=...)"
            )
    return NoisedPairs(noisy.to(latents.dtype), steps, target)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the scheduler interpolates between data and noise by sigmas, as SD3's, FLUX's and Wan's do.

    Raises TypeError for one that is neither that nor has cumulated alphas, such as EDM's.
    """
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return False
    if hasattr(scheduler, "scale_noise") and hasattr(scheduler, "sigmas"):
        return True
    raise TypeError(
        f"scheduler is a {type(scheduler).__name__}; expected one with alphas_cumprod, such as DDPMScheduler, or "
        "FlowMatchEulerDiscreteScheduler"
    )


_LOW = 0xFFFFFFFF
_AT_ONCE = 1 << 20  # pairs of numbers: ten tensors of float64 are made on the way, which for clips would be large
# Taylor's series from the highest power down, until what is left out is below float64's rounding: of atanh(x) / x for
# |x| <= 0.172, cos x and sin(x) / x for |x| <= pi / 4, all in powers of x squared.
_ATANH = [1 / (2 * k + 1) for k in range(10, -1, -1)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8, -1, -1)]


def _normals(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, float64, of each 64 bits: Box and Muller's.

    The logarithm, cosine and sine are made of operations that IEEE 754 rounds alike everywhere, each an operator of its
    own, so that none are fused: those of libraries differ in the last bit between devices, processors and versions.
    """
    first, second = bits >> 32 & _LOW, bits & _LOW
    # log((first + 1/2) / 2^32), by the number's exponent and its mantissa, 1/2 to 1.
    mantissa, exponent = torch.frexp((first.double() + 0.5) * 2.0**-32)
    middle = math.sqrt(0.5)
    x = (mantissa - middle) / (mantissa + middle)
    logarithm = (exponent.double() - 0.5) * math.log(2) + _series(_ATANH, x * x) * x * 2
    radius = (logarithm * -2).sqrt_()
    # The angle (second + 1/2) / 2^32 of a turn, from the nearest quarter.
    quarter = second + (1 << 29) >> 30
    x = ((second - (quarter << 30)).double() + 0.5) * (2.0**-31 * math.pi)
    square = x * x
    cosine, sine, odd = _series(_COS, square), _series(_SIN, square) * x, quarter & 1 == 1
    return (
        radius * torch.where(odd, sine, cosine) * (1 - (quarter + 1 & 2)),
        radius * torch.where(odd, cosine, sine) * (1 - (quarter & 2)),
    )


def _series(coefficients: Sequence[float], x: Tensor) -> Tensor:
    result = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result.add_(coefficient).mul_(x)
    return result.add_(coefficients[-1])


def _numbers(seeds: Seeds) -> list[int]:
    return [int(seed) for seed in (seeds.tolist() if isinstance(seeds, Tensor) else seeds)]
