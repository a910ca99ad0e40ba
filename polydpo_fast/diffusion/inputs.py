"""What the models are given: pairs from images, or from a folder of latents that `polydpo-fast cache` made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import PairBatch, PairLoader
from ..splitmix import mix
from .config import Settings, of_pairs
from .families import conditioning, encode_prompts
from .fingerprints import fingerprint, random_options
from .forward import FLUX_GUIDANCE
from .latent_store import LatentPairs
from .moving import moved
from .pixels import encode_pixels
from .setup import Setup

__all__ = ["Inputs"]

_NOT_PIXELS = ("threads", "limits", "cache")  # of the decoder's options


class Inputs:
    """The pairs of `settings.data` in batches, and of a batch the latents and the conditioning.

    last: of `PairLoader`.
    loader: of images, or of latents; prompts are whole. parts: fingerprints of what encoded tensors depend on.
    parts_of_errors: of what the reference's errors depend on.

    Raises ValueError where a store was made with other settings or another pipeline, with both fingerprints.
    """

    def __init__(self, settings: Settings, setup: Setup, *, last: Literal["drop", "wrap"] = "drop") -> None:
        pipe = setup.pipe
        self._settings, self._setup = settings, setup
        self._encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
        parts = {
            "precision": setup.precision,
            "latents": settings.latents,
            "decoding": {"size": list(setup.size), **_decoding(settings.loader)},
            "data_options": of_pairs(settings.data_options),
            "vae": pipe.vae,
            **{
                name: part
                for name, part in pipe.components.items()
                if name.startswith(("text_encoder", "tokenizer")) and part is not None
            },
        }
        # Texts, because the parts themselves may be freed.
        self.parts: dict[str, Any] = {name: fingerprint(part) for name, part in parts.items()}
        self.cached = isinstance(setup.source, LatentPairs)
        self.loader = self._loader(last)
        of_source = {"precision": self.parts["precision"]} if self.cached else self.parts
        self.parts_of_errors: dict[str, Any] = {**of_source, "prompt_dropout": fingerprint(settings.prompt_dropout)}
        if getattr(pipe, setup.family.model).config.get("guidance_embeds"):
            guidance = FLUX_GUIDANCE if settings.guidance is None else settings.guidance
            self.parts_of_errors["guidance"] = fingerprint(guidance)
        if setup.family.told_sizes:
            self.parts_of_errors["size_conditioning"] = fingerprint(settings.size_conditioning)
        self._nothing: dict[str, Tensor] | None = None

    def to(self, device: torch.device, *, keep_encoders: bool) -> None:
        """Moves VAE and text encoders to the device, or frees them where latents take their place."""
        pipe = self._setup.pipe
        if self._settings.prompt_dropout:
            self._move(device)
            self._nothing = encode_prompts(pipe, self._setup.family, [""], device)
        if self.cached and not keep_encoders:
            for name in ("vae", *self._encoders):
                setattr(pipe, name, None)
            self._encoders.clear()
        else:
            pipe.vae.to(device)
            self._move(device)

    def check_fixed(self) -> None:
        """Raises ValueError where a pair's latents differ from epoch to epoch: stored errors would not be theirs."""
        random = random_options(self.loader)
        if not self.cached and self._settings.latents == "sample":
            random = f"{random}, latents='sample'" if random else "latents='sample'"
        if random:
            raise ValueError(
                f"reference errors are of fixed latents; got {random}; expected latents='mode' and nothing random in "
                "loader, or as data a folder that `polydpo-fast cache` made"
            )

    def encode(self, batch: PairBatch, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Latents, (2B, ...), and what the text encoders make of the prompts, B rows each.

        seeds: of the pairs, from which a VAE's sample is drawn.
        """
        if self.cached:
            # In the dtypes that the encoders would give, whatever they were stored in.
            text = {name: column for name, column in batch.extra.items() if isinstance(column, Tensor)}
            text = {name: x.to(self._setup.precision) if x.is_floating_point() else x for name, x in text.items()}
            return {"latents": batch.pixels.float(), **text}
        pipe, settings = self._setup.pipe, self._settings
        of_arms = None
        if settings.latents == "sample":
            assert seeds is not None
            of_arms = [mix(seed, arm) for arm in (1, 2) for seed in seeds]
        text = encode_prompts(pipe, self._setup.family, batch.prompts, batch.pixels.device)
        return {"latents": encode_pixels(pipe.vae, batch.pixels, of_arms, chunk=settings.vae_batch), **text}

    def conditioning(self, batch: PairBatch, text: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Any]:
        """The model's arguments, where some of the prompts are dropped, as the pairs' seeds say."""
        if self._nothing is not None:
            dropped = torch.tensor([mix(seed, 4) < self._settings.prompt_dropout * 2**64 for seed in seeds])
            text = {
                name: torch.where(
                    moved(dropped, value.device).view(-1, *[1] * (value.dim() - 1)),
                    self._nothing[name].to(value),
                    value,
                )
                for name, value in text.items()
            }
        setup, settings = self._setup, self._settings
        result = conditioning(setup.family, text, batch, setup.size, settings.size_conditioning)
        return result if settings.guidance is None else {**result, "guidance": settings.guidance}

    def _loader(self, last: Literal["drop", "wrap"]) -> PairLoader:
        settings, setup = self._settings, self._setup
        accelerator = setup.accelerator
        options = dict(
            seed=settings.seed,
            last=last,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
        if isinstance(setup.source, LatentPairs):
            latents = setup.source
            latents.check(**self.parts)
            own = {name: value for name, value in settings.loader.items() if name not in _decoding(settings.loader)}
            own = {name: value for name, value in own.items() if name not in _NOT_PIXELS}
            return PairLoader(latents, settings.batch_size, **options, **own)
        pixels = dict(size=setup.size, dtype=setup.pipe.vae.dtype)
        return PairLoader(setup.source, settings.batch_size, **pixels, **options, **settings.loader)

    def _move(self, device: torch.device) -> None:
        for part in self._encoders.values():
            if part is not None:
                part.to(device)


def _decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a loader's options those on which the pixels depend."""
    own = set(inspect.signature(PairLoader).parameters)
    return {name: value for name, value in options.items() if name not in own and name not in _NOT_PIXELS}
