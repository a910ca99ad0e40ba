"""`PairObjective`: from latents of both arms to the loss, around the model calls that a training loop makes anyway."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..functional import loss as preference_loss
from ..fused.head_arguments import check_head
from .forward import Forward, both_arms, forward_of, is_of_flow
from .moving import moved
from .noising import Density, NoisedPairs, Seeds, draw_noise, draw_timesteps, is_flow_matching, noise_pairs
from .reference import base_model, unwrapped
from .weights import timestep_weights

__all__ = ["PairObjective", "check_loss"]

_DEFAULTS = {
    name: one.default
    for name, one in inspect.signature(preference_loss).parameters.items()
    if one.kind is one.KEYWORD_ONLY
}
_OF_CALLS = {"ref_error", "pair_weight", "mask"}
_OF_LOSS = set(_DEFAULTS) - _OF_CALLS - {"return_metrics", "layout"}

Reference = torch.nn.Module | Callable[[torch.nn.Module], AbstractContextManager[None]]


class PairObjective:
    """Noises the latents of pairs, asks policy and reference, and takes the preference loss.

        objective = PairObjective(scheduler, reference=frozen_copy(unet), beta=5000.0, alpha=8.0)
        loss, metrics = objective(unet, latents, {"encoder_hidden_states": text})
        loss.backward()

    Args:
        scheduler: of training, as `noise_pairs` takes it.
        reference: a model; or `adapters_off`, or another function of the policy that returns a context manager in which
            the policy is the reference; or None, where each call gives `ref_error`, or with reference_free=True.
        density, logit_mean, logit_std, mode_scale: of the timesteps; see `draw_timesteps`.
        timestep_weight: a function of the timesteps' numbers, (B,) int64, that gives weights, (B,); or a name that
            `timestep_weights` knows, such as "min_snr" or "cosmap". None for all the same, which is what Diffusion-DPO
            does.
        snr_gamma: of "min_snr".
        weight_applies_to: what is multiplied by the weight: each pair's "loss"; or its "logit", which is omega in
            Diffusion-DPO (Wallace et al. 2023, Eq. 14) and acts as a beta of its own for each timestep.
        forward: a function of (model, noisy, timesteps, conditioning) that returns the prediction; None for Diffusers'
            models that `predict` knows.
        loss: everything else goes to `polydpo_fast.loss`: beta, alpha, objective, label_smoothing, sft_weight ...
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        reference: Reference | None = None,
        density: Density = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        timestep_weight: Callable[[Tensor], Tensor] | str | None = None,
        snr_gamma: float = 5.0,
        weight_applies_to: Literal["loss", "logit"] = "loss",
        forward: Forward | None = None,
        **loss: Any,
    ) -> None:
        check_loss(loss)
        _check_scheduler(scheduler)
        if not (reference is None or callable(reference)) or isinstance(reference, AbstractContextManager):
            raise TypeError(
                f"reference is a {type(reference).__name__}; expected a frozen model, or a function of the policy that "
                "returns a context manager, such as adapters_off (which is not called here)"
            )
        if weight_applies_to not in ("loss", "logit"):
            raise ValueError(f"weight_applies_to is {weight_applies_to!r}; expected 'loss' or 'logit'")
        self.scheduler, self.reference = scheduler, reference
        self.timestep_options: dict[str, Any] = dict(
            density=density, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale
        )
        if not (timestep_weight is None or isinstance(timestep_weight, str) or callable(timestep_weight)):
            raise TypeError(f"timestep_weight is {timestep_weight!r}; expected a name, a function, or None")
        self.noised(torch.zeros(2, 1, device="cpu"), seeds=(0,))  # what is wrong is said here, not in the first step
        if isinstance(timestep_weight, str):
            table = timestep_weights(scheduler, timestep_weight, snr_gamma=snr_gamma)
            if weight_applies_to == "logit" and loss.get("objective") == "ipo" and not table.all():
                raise ValueError(
                    f"weight_applies_to is 'logit' and timestep_weight {timestep_weight!r}, which is 0 at timestep "
                    f"{int((table == 0).int().argmax())}; objective 'ipo' divides by it: expected 'loss'"
                )
            timestep_weight = lambda numbers: moved(table, numbers.device)[numbers]  # noqa: E731
        self._timestep_weight, self._weight_applies_to = timestep_weight, weight_applies_to
        self._forward, self._loss = forward, loss
        self._compared = False

    def __call__(
        self,
        model: torch.nn.Module,
        latents: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        ref_error: Tensor | Sequence[Tensor] | None = None,
        pair_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the metrics of `polydpo_fast.loss` (detached, on the device).

        model: the policy, wrapped or not.
        latents: (2B, ...), [winners; losers].
        conditioning: keyword arguments for the model, with a row per pair, which both arms get, or 2B rows.
        seeds: (B,) integers: noise and timesteps are functions of them. None draws them by torch's generator.
        noise, timesteps: (B, ...) and (B,) int64, instead of drawn ones.
        ref_error: (2B,), the reference's mean squared errors at this noise and these timesteps.
        pair_weight: (B,). mask: as in `polydpo_fast.loss`; not with ref_error, which is of whole samples.
        """
        if mask is not None and ref_error is not None:
            raise ValueError(
                "mask is given with ref_error, whose errors are of whole samples; expected one of them: with a mask "
                "there must be a reference"
            )
        noised = self.noised(latents, seeds=seeds, noise=noise, timesteps=timesteps)
        inputs = self._inputs(model, noised, conditioning)
        ref_pred = None
        if ref_error is None and not self._loss.get("reference_free", False):
            if self.reference is None:
                raise ValueError("there is neither reference nor ref_error; expected one, or reference_free=True")
            if isinstance(self.reference, torch.nn.Module) and base_model(self.reference) is base_model(model):
                raise ValueError(
                    "reference is the policy itself, so that nothing would be learned; expected frozen_copy(model), "
                    "adapters_off, or ref_error"
                )
            if isinstance(self.reference, torch.nn.Module) and not self._compared:
                _check_same_precision(model, self.reference, latents.device)
                self._compared = True
            # Before the policy: a reference that borrows the policy's weights must not touch them afterwards.
            ref_pred = self._reference_prediction(model, inputs)
        pred = self._predict(model, inputs)
        options = self._loss
        if self._timestep_weight is not None:
            numbers = self._timestep_numbers(noised.timesteps[: len(latents) // 2])
            weight = moved(self._timestep_weight(numbers), pred.device, torch.float32)
            if self._weight_applies_to == "logit":
                beta = options.get("beta", _DEFAULTS["beta"])
                if isinstance(beta, Tensor):
                    beta = moved(beta, pred.device, torch.float32)
                options = {**options, "beta": weight * beta}
            else:
                pair_weight = weight if pair_weight is None else weight * moved(pair_weight, pred.device)
        if pair_weight is not None:
            pair_weight = moved(pair_weight, pred.device)
        if isinstance(ref_error, Tensor):
            ref_error = moved(ref_error, pred.device)
        loss, metrics = preference_loss(
            pred,
            ref_pred,
            noised.target,
            ref_error=ref_error,
            pair_weight=pair_weight,
            mask=mask,
            return_metrics=True,
            **options,
        )
        return loss, metrics

    def noised(
        self,
        latents: Tensor,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
    ) -> NoisedPairs:
        """The latents with noise, as a call with these arguments has them."""
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents is a {type(latents).__name__}; expected a torch.Tensor (2B, ...), winners first")
        pairs = len(latents) // 2
        if seeds is None and (noise is None or timesteps is None):
            seeds = torch.randint(2**63 - 1, (pairs,), device="cpu")
        if seeds is not None and len(seeds) != pairs:
            raise ValueError(f"seeds has {len(seeds)} numbers; expected {pairs}, one per pair")
        if noise is None:
            assert seeds is not None
            noise = draw_noise(seeds, latents.shape[1:], device=latents.device)
        if timesteps is None:
            assert seeds is not None
            timesteps = draw_timesteps(self.scheduler, seeds, device=latents.device, **self.timestep_options)
        return noise_pairs(self.scheduler, latents, noise, timesteps)

    @torch.no_grad()
    def reference_errors(
        self,
        model: torch.nn.Module | None,
        latents: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
    ) -> Tensor:
        """The reference's mean squared errors, (2B,) float64 on the latents' device: what `ref_error` takes later.

        model: the policy, where the reference is a function of it; else None.
        """
        noised = self.noised(latents, seeds=seeds, noise=noise, timesteps=timesteps)
        policy = model if model is not None else self.reference
        inputs = self._inputs(policy, noised, conditioning)
        pred = self._reference_prediction(policy, inputs)
        target = noised.target if len(noised.target) == len(pred) else torch.cat((noised.target, noised.target))
        errors: Tensor = (pred.double() - target.double()).square().flatten(1).mean(1)
        return errors

    # ------------------------------------------------------------------------------------------------ inside

    def _inputs(self, model: Any, noised: NoisedPairs, conditioning: Mapping[str, Any] | None) -> tuple[Any, ...]:
        conditioning = {} if conditioning is None else conditioning
        if not isinstance(conditioning, Mapping):
            raise TypeError(
                f"conditioning is a {type(conditioning).__name__}; expected a dict of the model's keyword arguments, "
                'such as {"encoder_hidden_states": text}'
            )
        # A flow's configuration has no prediction_type: a DDPMScheduler made of it predicts noise, its default.
        if self._forward is None and is_of_flow(model) and not is_flow_matching(self.scheduler):
            raise ValueError(
                f"scheduler is a {type(self.scheduler).__name__}, and model a {type(base_model(model)).__name__}, "
                "which flow matching trains; expected a FlowMatchEulerDiscreteScheduler"
            )
        dtype = _dtype_of(model) or noised.noisy.dtype
        pairs = len(noised.noisy) // 2
        return noised.noisy.to(dtype), noised.timesteps, both_arms(conditioning, pairs)

    def _predict(self, model: Any, inputs: tuple[Any, ...]) -> Tensor:
        return (self._forward or forward_of(model))(model, *inputs)

    def _reference_prediction(self, model: Any, inputs: tuple[Any, ...]) -> Tensor:
        with torch.no_grad():
            if isinstance(self.reference, torch.nn.Module):
                return self._predict(self.reference, inputs)
            assert self.reference is not None  # checked before
            # What autocast keeps of the policy's weights is not the reference's, and neither's may be the other's.
            torch.clear_autocast_cache()
            with self.reference(model):
                result = self._predict(model, inputs)
            torch.clear_autocast_cache()
            return result

    def _timestep_numbers(self, timesteps: Tensor) -> Tensor:
        """The numbers of a scheduler's timesteps."""
        if timesteps.dtype == torch.int64:
            return timesteps
        table: Tensor = moved(self.scheduler.timesteps, timesteps.device, torch.float32)
        return (table[None] == timesteps[:, None]).int().argmax(1)


def check_loss(options: Mapping[str, Any]) -> None:
    """Raises TypeError for names that are none of the loss's, ValueError for values that it refuses with any batch."""
    if of_calls := sorted(_OF_CALLS & set(options)):
        raise TypeError(f"{', '.join(of_calls)}: no argument of PairObjective; expected in its calls, objective(...)")
    if unknown := sorted(set(options) - _OF_LOSS):
        known = sorted({*_OF_LOSS, *inspect.signature(PairObjective).parameters} - {"loss"})
        raise TypeError(f"{', '.join(unknown)}: no argument of PairObjective; expected {', '.join(known)}")
    # Tensors are of a batch's pairs, which are not here yet.
    given = {**_DEFAULTS, **{name: value for name, value in options.items() if not isinstance(value, Tensor)}}
    names = ("beta", "alpha", "objective", "label_smoothing", "margin", "sft_weight", "reduction")
    check_head(**{name: given[name] for name in names}, pair_weight=None, pairs=0, device=torch.device("cpu"))


_dtypes: WeakKeyDictionary[torch.nn.Module, tuple[torch.dtype | None, torch.dtype | None]] = WeakKeyDictionary()


def _dtype_of(model: Any) -> torch.dtype | None:
    """Asked again only where that of the first weight has changed: Diffusers goes through all modules for it, which of
    SD1.5 with LoRA takes milliseconds."""
    inner = unwrapped(model)
    if not isinstance(inner, torch.nn.Module):  # with a forward of the caller's, anything
        return getattr(inner, "dtype", None)
    first = next((parameter.dtype for parameter in inner.parameters()), None)
    if inner not in _dtypes or _dtypes[inner][0] != first:
        _dtypes[inner] = first, getattr(inner, "dtype", None)
    return _dtypes[inner][1]


def _check_same_precision(model: torch.nn.Module, reference: torch.nn.Module, device: torch.device) -> None:
    """Warns where the weights are of two dtypes, as they may be to save memory. Raises ValueError where Accelerate has
    prepared the policy alone, around whose forward is an autocast then.

    With a beta of thousands the difference of the rounding decides pairs before anything is learned.
    """
    policy, other = unwrapped(model), unwrapped(reference)
    dtypes = [getattr(one, "dtype", None) for one in (other, policy)]
    if None not in dtypes and dtypes[0] != dtypes[1]:
        warnings.warn(
            f"the reference's weights are {dtypes[0]} and the policy's {dtypes[1]}: what rounding makes of them is "
            "taken for a preference; expected the same, as frozen_copy has them",
            stacklevel=3,
        )
    prepared = ["_original_forward" in vars(one) for one in (other, policy)]
    if prepared == [False, True] and not torch.is_autocast_enabled(device.type):
        raise ValueError(
            "the policy computes in half precision by Accelerate's autocast, and the reference without it: what "
            "rounding makes of that is taken for a preference; expected the call within `with accelerator.autocast():`"
        )


def _check_scheduler(scheduler: Any) -> None:
    if not hasattr(getattr(scheduler, "config", None), "num_train_timesteps"):
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__}; expected a scheduler of Diffusers, such as DDPMScheduler or "
            "FlowMatchEulerDiscreteScheduler"
        )
    is_flow_matching(scheduler)
