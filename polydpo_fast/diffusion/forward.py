"""How each of Diffusers' models is called, and what it predicts, in the shape of the latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .moving import moved
from .reference import base_model, unwrapped

__all__ = ["FLUX_GUIDANCE", "Forward", "both_arms", "forward_of", "is_of_flow", "predict", "time_ids"]

Forward = Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]

_OF_TOKENS = {"img_ids", "txt_ids"}
FLUX_GUIDANCE = 3.5  # the default of Diffusers' pipeline and of its training scripts (train_dreambooth_lora_flux.py)


def predict(model: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    """The model's prediction for noisy latents, in their shape.

    Knows UNet2DModel, UNet2DConditionModel (SD1.5, SD2, SDXL), SD3Transformer2DModel, FluxTransformer2DModel and
    WanTransformer3DModel, also within DDP, FSDP, torch.compile and PEFT.

    noisy: (N, C, H, W), or (N, C, T, H, W). FLUX's are packed into tokens here, and its prediction is unpacked.
    timesteps: (N,), as the scheduler has them.
    conditioning: keyword arguments of the model's forward, N rows each. SDXL's are in added_cond_kwargs; FLUX's
        `guidance` may be one number (3.5 if there is none), and its `img_ids` and `txt_ids`, (tokens, 3), which all
        rows share, are made here where they are not given.

    Raises TypeError for any other class of model.
    """
    return forward_of(model)(model, noisy, timesteps, conditioning)


def forward_of(model: Any) -> Forward:
    inner = base_model(model)
    # A class that is derived from one of them, as FSDP2 makes it, is one.
    name = next((base.__name__ for base in type(inner).__mro__ if base.__name__ in _FORWARDS), None)
    if name is None:
        raise TypeError(
            f"model is a {type(inner).__name__}; expected one of {', '.join(_FORWARDS)}, or forward=, a function of "
            "(model, noisy, timesteps, conditioning) that returns its prediction"
        )
    return _FORWARDS[name]


def is_of_flow(model: Any) -> bool:
    """Whether flow matching trains it, as it does all but the UNets here."""
    return forward_of(model) is not _unet


def both_arms(conditioning: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Conditioning for all 2B rows: tensors of B rows come twice, those of 2B rows are as they are.

    FLUX's img_ids and txt_ids of two dimensions have a row per token, which all pairs share: they are as they are.
    """

    def twice(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: twice(f"{name}[{key!r}]", part) for key, part in value.items()}
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == 2 * pairs:
            return value
        if len(value) != pairs:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected {pairs} rows, one per pair, or {2 * pairs}"
            )
        return torch.cat((value, value))

    return {
        key: value if key in _OF_TOKENS and _is_table(value) else twice(f"conditioning[{key!r}]", value)
        for key, value in conditioning.items()
    }


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def time_ids(original_size: Tensor, crop_top_left: Tensor, size: tuple[int, int]) -> Tensor:
    """SDXL's `time_ids`, (2B, 6): original height and width, top and left of the crop, height and width of the output.

    original_size, crop_top_left: (2B, 2) as `decode_pairs` and `PairLoader` give them. size: of the pixels.

    Where the images of a pair had different sizes, its arms are told different ones then, and the model may learn that
    one size is worse. DPO's formula asks for the same condition: [height, width, 0, 0, height, width] of the pixels for
    all rows, as Diffusion-DPO's script has it.
    """
    target = torch.tensor(size, dtype=original_size.dtype, device=original_size.device).expand(len(original_size), 2)
    return torch.cat((original_size, crop_top_left, target), dim=1)


def _unet(model: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    config = getattr(unwrapped(model), "config", None)  # which a class of the user's of that name may not have
    if getattr(config, "time_cond_proj_dim", None) and "timestep_cond" not in conditioning:
        raise ValueError(
            "the UNet has time_cond_proj_dim, an embedding of the guidance as latent consistency models have, and "
            "conditioning has no timestep_cond, which its pipeline makes of it; expected one, or another model"
        )
    return _first(model(noisy, timesteps, **conditioning, return_dict=False))


def _transformer(model: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    return _first(model(hidden_states=noisy, timestep=timesteps, **conditioning, return_dict=False))


def _flux(model: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    rows, channels, height, width = noisy.shape
    if height % 2 or width % 2:
        raise ValueError(f"latents are {height} x {width}; expected even sides, which FLUX packs in squares of four")
    high, wide = height // 2, width // 2
    tokens = noisy.view(rows, channels, high, 2, wide, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    given = {"guidance": FLUX_GUIDANCE, **conditioning}
    if unwrapped(model).config.guidance_embeds:
        guidance = torch.as_tensor(given["guidance"], dtype=torch.float32)
        given["guidance"] = moved(guidance, noisy.device).expand(rows)
    else:
        given["guidance"] = None
    place = torch.zeros((high, wide, 3), device=noisy.device, dtype=noisy.dtype)
    place[..., 1] = torch.arange(high, device=noisy.device)[:, None]
    place[..., 2] = torch.arange(wide, device=noisy.device)
    words = conditioning["encoder_hidden_states"].shape[1]
    given.setdefault("img_ids", place.flatten(0, 1))
    given.setdefault("txt_ids", torch.zeros((words, 3), device=noisy.device, dtype=noisy.dtype))
    # It takes time from 0 to 1, and multiplies by 1000 inside.
    out = _first(model(hidden_states=tokens, timestep=timesteps / 1000, **given, return_dict=False))
    squares = out.view(rows, high, wide, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(rows, channels, height, width)


def _first(out: Any) -> Tensor:
    result: Tensor = out[0]
    return result


_FORWARDS: dict[str, Forward] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _transformer,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _transformer,
}
