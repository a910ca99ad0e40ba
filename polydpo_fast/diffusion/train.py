"""`polydpo-fast train`: an ordinary training loop on Accelerate, with the batches and the loss of this library.

    accelerate launch -m polydpo_fast train --config configs/sd15-pickapic.yaml

What is drawn at random, noise, timesteps, samples of the VAE, crops, is a function of the seed, the epoch and the pair.
So neither the number of processes nor an interruption changes what is learned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..data import PairBatch, PairLoader
from ..data.order import mix
from .checkpoints import checkpoint_adapters_only, resume, save_checkpoint, save_result
from .config import Settings, lasting, write_settings
from .families import Family
from .fingerprints import fingerprint
from .inputs import Inputs
from .journal import Journal, NotFiniteError
from .reference import adapters_off, frozen_copy
from .reference_store import ReferenceErrors
from .setup import Setup, objective_of, set_up
from .validation import render

__all__ = ["NotFiniteError", "train"]


def train(settings: Settings) -> None:
    """Trains, and writes the result to the output folder: a pipeline that Diffusers loads, or LoRA weights.

    There are also settings.yaml, metrics.jsonl, checkpoint-STEP/ and validation/STEP.png. Checkpoints hold pickles of
    Accelerate's: resume only from your own.

    Raises ValueError for settings that do not fit the model, the data or the run that is resumed, NotFiniteError where
    the loss or the gradient is no number.
    """
    setup = set_up(settings)
    accelerator, pipe, family, size, _ = setup
    output = Path(settings.output)
    inputs = Inputs(settings, setup)
    loader = inputs.loader
    model = getattr(pipe, family.model)
    errors = _errors(settings, inputs, model)
    run = _run(settings, setup, inputs, model, errors)
    inputs.to(accelerator.device, keep_encoders=bool(settings.validation_prompts))
    model.to(accelerator.device)

    objective = objective_of(settings, pipe, reference=None if errors is not None else _reference(model, settings))
    if errors is not None:
        errors.check(objective=objective)
    parameters = _trainable(model, family, settings)
    optimizer = _optimizer(parameters, settings, _learning_rate(settings, accelerator.num_processes))
    schedule = _schedule(optimizer, settings)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # FSDP2 has made others
    average = _average(parameters, settings, accelerator)
    accelerator.register_for_checkpointing(*filter(None, (loader, schedule, average)))
    if settings.lora_rank:
        checkpoint_adapters_only(accelerator)
    done = resume(accelerator, settings, output, run)
    accelerator.step = 0  # of its count of forwards, which is another where accumulation was another
    if average is not None:
        average.to(accelerator.device)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_settings(settings, output / "settings.yaml")
    accelerator.init_trackers(settings.project, _flat(settings))

    def pair_losses(batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        ref_error = None
        if errors is None:
            seeds = [mix(settings.seed, loader.epoch, pair) for pair in batch.index.tolist()]
        else:
            draw = loader.epoch % errors.draws
            seeds, ref_error = errors.seeds(batch.index, draw), errors(batch.index, draw)
        text = inputs.encode(batch, seeds)
        latents = text.pop("latents")
        given = inputs.conditioning(batch, text, seeds)
        with accelerator.autocast():  # the reference is not prepared by Accelerate; the policy is
            return objective(model, latents, given, seeds=seeds, ref_error=ref_error, pair_weight=batch.weight)

    journal, batches = Journal(accelerator, output / "metrics.jsonl", done), _forever(loader)
    model.train()
    with _progress(accelerator, settings.steps, done) as advance:
        for step in range(done + 1, settings.steps + 1):
            for _ in range(settings.accumulation):
                batch = next(batches)
                with accelerator.accumulate(model):
                    losses, metrics = pair_losses(batch)
                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        # All of them: by these it knows a model of FSDP's, whose norm is not that of its shard.
                        # Without clipping too: the norm tells whether the gradient is finite.
                        norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
                        if isinstance(norm, Tensor):  # DeepSpeed clips on its own
                            metrics["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                    optimizer.step()
                    optimizer.zero_grad()
                journal.add(step, batch.keys, losses.detach(), metrics)
            if not accelerator.optimizer_step_was_skipped:  # for an overflow of float16
                schedule.step()
                if average is not None:
                    average.step(parameters)

            last, note = step == settings.steps, ""
            checkpoint, picture = (
                last or bool(every and step % every == 0)
                for every in (settings.checkpoint_every, settings.validation_every)
            )
            if checkpoint or picture or step % settings.log_every == 0:
                note = journal.write(loader.epoch, schedule.get_last_lr()[0])
            if checkpoint and settings.checkpoint_every:
                save_checkpoint(accelerator, output, step, settings.keep, run)
            if picture and settings.validation_prompts:
                with _averaged(average, parameters):
                    model.eval()
                    render(accelerator, pipe, family, settings, size, output / "validation", step)
                    model.train()
            advance(note)

    with _averaged(average, parameters):
        save_result(accelerator, pipe, family, model, settings, output)
    accelerator.end_training()


# ------------------------------------------------------------------------------------- what is made before


def _errors(settings: Settings, inputs: Inputs, model: Any) -> ReferenceErrors | None:
    """Those that the settings name. Raises ValueError where they are of something else, with both fingerprints."""
    if settings.reference_errors is None:
        return None
    inputs.check_fixed()
    errors = ReferenceErrors(settings.reference_errors)
    errors.check(**inputs.parts_of_errors, model=model, source=inputs.loader)
    return errors


def _run(
    settings: Settings, setup: Setup, inputs: Inputs, model: Any, errors: ReferenceErrors | None
) -> dict[str, Any]:
    """What is the same whenever the run is resumed, by name: settings as they take effect, and models.

    Of pairs per step only their number: that a run goes on with more processes and smaller batches changes nothing.
    """
    processes = setup.accelerator.num_processes
    told = lasting(settings)
    pairs = processes * told.pop("batch_size") * told.pop("accumulation")
    return {
        **told,
        "pairs per step (processes x batch_size x accumulation)": pairs,
        "size": list(setup.size),
        "learning_rate": _learning_rate(settings, processes),
        "mixed_precision": setup.accelerator.mixed_precision,
        "draws of reference_errors": errors.draws if errors is not None else None,
        "model": fingerprint(model),
        **{name: text for name, text in inputs.parts.items() if name.startswith(("vae", "text_encoder", "tokenizer"))},
    }


def _reference(model: Any, settings: Settings) -> Any:
    """Of the policy's own dtype: another one's rounding would be a preference before the first step."""
    if settings.loss.get("reference_free"):
        return None
    return adapters_off if settings.lora_rank else frozen_copy(model)


def _trainable(model: Any, family: Family, settings: Settings) -> list[Tensor]:
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if settings.lora_rank == 0:
        model.requires_grad_(True)
        return list(model.parameters())
    from peft import LoraConfig

    # Diffusers loads LoRA at a scale of lora_alpha / r, which it takes to be 1 where the file does not say.
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_rank,
        init_lora_weights="gaussian",
        target_modules=settings.lora_targets or list(family.lora_targets),
    )
    model.add_adapter(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _learning_rate(settings: Settings, processes: int) -> float:
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 1e-5 if settings.lora_rank else 1e-8 * processes * settings.batch_size * settings.accumulation


def _optimizer(parameters: list[Tensor], settings: Settings, learning_rate: float) -> torch.optim.Optimizer:
    if settings.optimizer == "adafactor":
        from transformers import Adafactor

        fixed: torch.optim.Optimizer = Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=settings.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
        return fixed
    kind: Any = torch.optim.AdamW
    if settings.optimizer.endswith("8bit"):
        try:
            from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
        except ImportError as error:
            raise ImportError(
                f"optimizer is {settings.optimizer!r}, which needs bitsandbytes: pip install bitsandbytes"
            ) from error
        kind = PagedAdamW8bit if settings.optimizer.startswith("paged") else AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        parameters,
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def _schedule(optimizer: Any, settings: Settings) -> Any:
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )


def _average(parameters: list[Tensor], settings: Settings, accelerator: Any) -> Any:
    if not settings.ema:
        return None
    from diffusers.training_utils import EMAModel

    average = EMAModel(parameters, decay=settings.ema, foreach=True)
    average.to(accelerator.device)
    return average


def _flat(settings: Settings) -> dict[str, Any]:
    """For trackers, which take numbers and text."""
    return {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in vars(settings).items()}


# ---------------------------------------------------------------------------------------------- in the loop


def _forever(loader: PairLoader) -> Iterator[PairBatch]:
    """Epoch after epoch; `loader.epoch` is that of the batch."""
    while True:
        yield from loader


@contextlib.contextmanager
def _averaged(average: Any, parameters: list[Tensor]) -> Iterator[None]:
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


@contextlib.contextmanager
def _progress(accelerator: Any, steps: int, done: int) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    show = accelerator.is_main_process
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("", total=steps, completed=done, note="")

        def advance(note: str) -> None:
            fields: dict[str, Any] = {"note": note} if note else {}
            bar.update(task, advance=1, **fields)

        yield advance
