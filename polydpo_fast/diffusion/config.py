"""What `polydpo-fast train` can be told: one dataclass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .objective import PairObjective, check_loss

__all__ = ["TAKEN", "Settings", "common", "lasting", "of_pairs"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run.

    model: a folder or a hub id of a Diffusers pipeline. variant: of its files, such as "fp16", where they have one.
        revision: of the hub's repository, a branch, a tag or a commit.
    data: what `open_source` takes, or a folder of latents that `polydpo-fast cache` made with the same settings;
        data_options: of that source, such as ties, root, columns.
    reference_errors: a folder that `polydpo-fast reference` made with the same settings, instead of a reference.
    output: the folder of checkpoints, metrics, pictures and the result; with checkpoint_every one that all nodes share.
    loader: further arguments of `PairLoader` and of decoding: crop, hflip, frames, fps, ledger, window ...
    size: of the pixels, a side or [height, width]; None for what the model was made for.
    batch_size: pairs per process and forward. accumulation: forwards per optimizer step.
    steps: of the optimizer.
    beta: None for 5000, published for SD1.5 and SDXL (Diffusion-DPO); flow matching has to be told one.
    alpha, beta, objective: of the loss; loss: further arguments of `PairObjective`, such as label_smoothing, density,
        timestep_weight (by its name).
    scheduler: values in place of those of the pipeline's scheduler, for training and pictures, such as
        prediction_type, rescale_betas_zero_snr, shift; _class_name for another class, where its own has no such value.
    guidance: of FLUX.1-dev's guidance embedding in training; None for 3.5, the default of Diffusers' scripts
        (train_dreambooth_lora_flux.py). Pictures have the pipeline's own.
    size_conditioning: what SDXL is told of a pair's images. "fixed": whole ones of the training's size, for both arms,
        as Diffusion-DPO's script has it, and as pictures are made. "own": each image's own size and crop, which differ
        between winner and loser where the files do, so that a size may be learned as worse.
    lora_rank: 0 trains all weights. lora_targets: names of layers; empty for the attention's projections.
        lora_alpha: the adapters are multiplied by lora_alpha / lora_rank; None for lora_rank. The saved weights have
        that factor in them, so that they load at a scale of 1. lora_weights: a folder in which `train` left LoRA
        weights, to begin with; the reference remains the model without them.
    optimizer: "adamw", "adamw8bit", "paged_adamw8bit" (bitsandbytes: two bytes of state per weight, not eight) or
        "adafactor" (with a fixed rate, as Diffusion-DPO's script has it).
    learning_rate: None for what was published: 1e-8 for each pair of a step (Diffusion-DPO, all weights), 1e-5 for LoRA
        (Diffusers' DPO scripts).
    schedule: of the learning rate, a name that diffusers.optimization.get_scheduler knows; warmup: steps, of all but
        "constant"; cycles: of "cosine_with_restarts"; power: of "polynomial". Those that decay end with `steps`: a run
        that is resumed with more of them goes on at another rate than one that was begun with them.
    max_grad_norm: 0 for no clipping.
    mixed_precision: "no", "fp16", "bf16", or None for what `accelerate launch` was told.
    ema: decay of the averaged weights, which are the result then, in step n no more than n / (n + 9); 0 for none.
    prompt_dropout: share of the prompts that are replaced by "", which is encoded as in the published scripts, also
        where a pipeline has zeros for it while it samples (SDXL's force_zeros_for_empty_prompt).
    latents: "sample" of the VAE's distribution, or its "mode".
    vae_batch: images or clips that the VAE encodes at once.
    log_every: steps between two lines of metrics, and between two looks for losses that are not finite.
    checkpoint_every: steps, and after the last; 0 for none. keep: the number of checkpoints that are kept; 0 for all.
    resume: "latest", the checkpoint that was written last, or the folder of one. The run goes on with the settings that
        it was begun with, but for steps, how often something is written, and what only costs memory or time.
    validation_prompts: rendered every validation_every steps, and after the last, with validation_steps of the
        pipeline's own scheduler.
    validation_data: pairs that are not trained on, whatever `data` may be, with the same data_options; where `data` is
        latents, latents too. They are measured whenever validation_prompts would be rendered. validation_pairs: so many
        of them at the most, the first, in batches of batch_size or, where it does not divide them, less.
    trackers: names that Accelerate knows, such as "tensorboard", "wandb". project: how they call the run.
    seed: of the order of the pairs, crops, noise and timesteps, LoRA's initial weights, pictures.
    """

    model: str
    data: str | list[str]
    variant: str | None = None
    revision: str | None = None
    output: str = "train-output"
    data_options: dict[str, Any] = field(default_factory=dict)
    reference_errors: str | None = None
    loader: dict[str, Any] = field(default_factory=dict)
    size: int | list[int] | None = None
    batch_size: int = 1
    accumulation: int = 1
    steps: int = 2000
    alpha: float | list[float] = 0.0
    beta: float | None = None
    objective: str = "poly_dpo"
    loss: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    size_conditioning: str = "fixed"
    lora_rank: int = 0
    lora_targets: list[str] = field(default_factory=list)
    lora_alpha: float | None = None
    lora_weights: str | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "constant_with_warmup"
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    ema: float = 0.0
    prompt_dropout: float = 0.0
    latents: str = "sample"
    vae_batch: int = 8
    log_every: int = 10
    checkpoint_every: int = 0
    keep: int = 0
    resume: str | None = None
    validation_prompts: list[str] = field(default_factory=list)
    validation_every: int = 0
    validation_steps: int = 30
    validation_data: str | list[str] | None = None
    validation_pairs: int = 256
    trackers: list[str] = field(default_factory=list)
    project: str = "polydpo-fast"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "steps", "vae_batch", "log_every", "cycles"):
            _check_range(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("validation_steps", "validation_pairs"):
            _check_range(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("lora_rank", "warmup", "checkpoint_every", "keep", "validation_every"):
            _check_range(name, getattr(self, name), 0, 2**31 - 1)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "power", "guidance"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, math.inf)
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; expected a number > 0, or None for lora_rank")
        for name in ("ema", "prompt_dropout", "adam_beta1", "adam_beta2"):
            _check_range(name, getattr(self, name), 0, 1)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(map(repr, choices))}")
        sides = [self.size] if isinstance(self.size, int) else self.size
        if sides is not None and not (len(sides) == 2 or isinstance(self.size, int)):
            raise ValueError(f"size is {self.size!r}; expected a side, or [height, width]")
        for side in sides or ():
            _check_range("size", side, 1, 16384)
        for name, taken in TAKEN.items():
            if both := sorted(taken & set(getattr(self, name))):
                raise ValueError(f"{name} has {', '.join(both)}; expected as settings of their own, or not at all")
        _check_loss(self)
        _check_unused(self)


def beta_of(settings: Settings) -> float:
    return 5000.0 if settings.beta is None else settings.beta


def lasting(settings: Settings) -> dict[str, Any]:
    """What a run has from its beginning to its end, however often it is resumed, by name."""
    told = {name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE}
    told["beta"] = beta_of(settings)
    told["loader"] = {name: value for name, value in settings.loader.items() if name not in _MAY_CHANGE_OF_LOADER}
    told["data_options"] = of_pairs(settings.data_options)
    return told


def of_pairs(data_options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a source's options those that say what the pairs are, and not where their files lie."""
    return {name: value for name, value in data_options.items() if name not in ("root", "cache")}


def common(settings: Settings) -> dict[str, Any]:
    """What all processes must be told alike, by name."""
    return {**lasting(settings), **{name: getattr(settings, name) for name in _OF_A_STEP}}


_DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Settings)}
# Where things are, how long and how often, and what changes no number. Of the data the loader's own state tells.
_MAY_CHANGE = {
    *("model", "variant", "revision", "data", "reference_errors", "lora_weights", "output", "resume"),
    *("steps", "log_every", "checkpoint_every", "keep", "trackers", "project"),
    *("validation_prompts", "validation_every", "validation_steps", "validation_data", "validation_pairs"),
    *("gradient_checkpointing", "vae_batch"),
}
# When the processes wait for each other.
_OF_A_STEP = (
    *("steps", "log_every", "checkpoint_every", "validation_prompts", "validation_every", "validation_steps"),
    "validation_pairs",
)
_MAY_CHANGE_OF_LOADER = {
    *("cache", "ledger", "limits", "max_bad_rate", "max_bad_run", "prefetch", "readers", "threads", "timeout_s"),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "optimizer": ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor"),
    "schedule": ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    "mixed_precision": (None, "no", "fp16", "bf16"),
    "latents": ("sample", "mode"),
    "size_conditioning": ("fixed", "own"),
}
# What the training itself gives, or asks for under its own name.
TAKEN = {
    "loader": {"source", "batch_size", "seed", "rank", "world_size", "prompt_dropout", "device", "size", "dtype"}
    | {"last", "layout", "mean", "std"},
    "loss": {"scheduler", "reference", "forward", "alpha", "beta", "objective", "reduction"},
}


def _check_loss(settings: Settings) -> None:
    of_objective = set(inspect.signature(PairObjective).parameters)
    of_loss = {name: value for name, value in settings.loss.items() if name not in of_objective}
    check_loss({"alpha": settings.alpha, "beta": beta_of(settings), "objective": settings.objective, **of_loss})


def _check_unused(settings: Settings) -> None:
    """Raises ValueError for settings that would be taken and do nothing; those that are as they were do not count."""
    schedule = f"with schedule {settings.schedule!r}; expected"
    for name, used, why in (
        ("warmup", settings.schedule != "constant", f"{schedule} 'constant_with_warmup'"),
        ("cycles", settings.schedule == "cosine_with_restarts", f"{schedule} 'cosine_with_restarts'"),
        ("power", settings.schedule == "polynomial", f"{schedule} 'polynomial'"),
        *(
            (name, settings.optimizer != "adafactor", "with optimizer 'adafactor'; expected another one")
            for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
        ),
        *(
            (name, settings.lora_rank > 0, "with lora_rank 0; expected 1 or more")
            for name in ("lora_targets", "lora_alpha", "lora_weights")
        ),
        (
            "validation_every",
            bool(settings.validation_prompts) or settings.validation_data is not None,
            "without validation_prompts and validation_data; expected one of them",
        ),
        ("validation_pairs", settings.validation_data is not None, "without validation_data; expected some"),
        ("keep", settings.checkpoint_every > 0, "with checkpoint_every 0; expected 1 or more"),
    ):
        value = getattr(settings, name)
        if value != _DEFAULTS[name] and value != [] and not used:
            raise ValueError(f"{name} is {value!r}, which has no effect {why}")
    if settings.validation_data is not None and settings.reference_errors is not None and not settings.lora_rank:
        raise ValueError(
            f"validation_data is {settings.validation_data!r}, which no stored errors are of, and all weights are "
            "trained without a reference, by reference_errors; expected none of either, or lora_rank 1 or more"
        )
    if settings.warmup >= settings.steps:
        raise ValueError(
            f"warmup is {settings.warmup} and steps {settings.steps}, so that the learning rate would never be "
            "reached; expected a warmup of fewer steps"
        )


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most or value == math.inf:
        limits = f"{least} or more" if most >= 2**31 - 1 else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected {limits}")
