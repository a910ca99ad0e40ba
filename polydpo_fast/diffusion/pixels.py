"""From pixels to normalised latents and back, and the pictures of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .families import Family
from .moving import moved
from .noising import draw_noise

__all__ = ["decode_latents", "encode_pixels", "sample"]


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, seeds: Sequence[int] | None = None, *, chunk: int = 8) -> Tensor:
    """Normalised latents, float32: the mode of the VAE's distribution, or, with a seed per row, a sample of it."""
    rows = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels.split(chunk)]
    latents = torch.cat([row.mode().float() for row in rows])
    if seeds is not None:
        noise = draw_noise(seeds, latents.shape[1:], device=latents.device)
        latents += torch.cat([row.std.float() for row in rows]) * noise
    shift, scale = _normalisation(vae, latents)
    normalised: Tensor = (latents - shift) * scale
    return normalised


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of normalised latents, in [-1, 1] but for what overshoots."""
    shift, scale = _normalisation(vae, latents)
    pixels: Tensor = vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0]
    return pixels.float()


@torch.no_grad()
def sample(
    pipe: Any,
    family: Family,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    frames: int | None = None,
    steps: int,
    seeds: Sequence[int],
    guidance: float | None = None,
) -> Tensor:
    """Of each prompt an image, (N, 3, H, W) uint8, or a clip, (N, 3, T, H, W), by the VAE's own dtype. On the CPU.

    seeds: one for each, of its noise alone, so that other images in the batch change no more of it than rounding.
    """
    height, width = size
    options: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    if family.video:
        options["num_frames"] = frames
    latents = pipe(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed % 2**63) for seed in seeds],
        output_type="latent",
        return_dict=False,
        **options,
    )[0]
    if latents.dim() == 3:  # FLUX's tokens
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    with torch.autocast(latents.device.type, enabled=False):  # one by one: the VAE's memory is the largest of all
        pixels = torch.cat([decode_latents(pipe.vae, one) for one in latents.split(1)])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _normalisation(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """What is subtracted from a VAE's latents, and what they are multiplied by then."""
    config = vae.config

    def channels(values: Sequence[float]) -> Tensor:
        table = moved(torch.tensor(values, device="cpu"), latents.device)
        return table.view(-1, *[1] * (latents.dim() - 2))

    shift: Any = config.get("shift_factor") or 0.0
    scale: Any = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift, scale = channels(config["latents_mean"]), scale / channels(config["latents_std"])
    return shift, scale
