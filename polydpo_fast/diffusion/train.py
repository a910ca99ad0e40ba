"""`polydpo-fast train`: an ordinary training loop on Accelerate, with the batches and the loss of this library.

    accelerate launch -m polydpo_fast train --config configs/sd15-pickapic.yaml

What is drawn at random is a function: noise, timesteps and samples of the VAE of the seed, the pair, and how many times
it came before; crops and mirrors of the seed, the epoch and the place in it. So neither the number of processes nor
an interruption changes what is learned.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..data import PairBatch, PairLoader
from ..splitmix import mix
from .checkpoints import (
    WholeAverages,
    check_output,
    checkpoint_adapters_only,
    resume,
    save_checkpoint,
)
from .config import Settings, lasting
from .fingerprints import fingerprint
from .forward import FLUX_GUIDANCE
from .inputs import Inputs
from .journal import Journal, NotFiniteError
from .objective import PairObjective
from .optimizers import check_optimizer, learning_rate, new_optimizer, new_schedule
from .policy import averages_of, make_trainable, reference_of, trained
from .reference import ema_weights
from .reference_store import ReferenceErrors
from .result import result_of, save_result
from .settings_file import write_settings
from .setup import Setup, accelerator_of, expect_steps, inductor_as_before, objective_of, set_up, validation_source
from .together import check_same, check_shared, together
from .validation import held_out, measure, render

__all__ = ["NotFiniteError", "train"]

_MOST_AT_START = 0.05  # of implicit rewards, before anything was learned


@inductor_as_before()
def train(settings: Settings) -> None:
    """Trains, and writes the result to the output folder: a pipeline that Diffusers loads, or LoRA weights.

    There are also settings.yaml, metrics.jsonl, checkpoint-STEP/ and validation/STEP.png. Checkpoints hold pickles of
    Accelerate's: resume only from your own.

    With checkpoint_every, a run that is told to stop (SIGTERM, as by Slurm) finishes its step, writes a checkpoint and
    exits; of several processes after the next line of metrics, when they speak to each other.

    Raises ValueError for settings that do not fit the model, the data, the output folder or the run that is resumed,
    NotFiniteError where the loss or the gradient is no number, SystemExit where it was told to stop.
    """
    accelerator, output = accelerator_of(settings), Path(settings.output)
    with together(accelerator):
        checkpoint = check_output(settings)
        check_optimizer(settings)
        unseen = validation_source(settings)
    if settings.checkpoint_every:
        check_shared(accelerator, "output", output)
    setup = set_up(settings, accelerator, training=True)
    pipe, family = setup.pipe, setup.family
    with together(accelerator):
        inputs = Inputs(settings, setup)
        validation = None if unseen is None else held_out(settings, setup, unseen)
        model = getattr(pipe, family.model)
        errors = _errors(settings, inputs, model)
        run = _run_identity(settings, setup, inputs, model, errors)
    own = {
        "model's scheduler": fingerprint(pipe.scheduler),
        "data": inputs.loader.source.fingerprint,
        "validation_data": None if unseen is None else unseen.fingerprint,
    }
    check_same(accelerator, {**run, **own})
    for one in (inputs, validation):
        if one is not None:
            one.to(accelerator.device, keep_encoders=bool(settings.validation_prompts) or not inputs.cached)
    fsdp2 = getattr(accelerator, "is_fsdp2", False)
    if not fsdp2:  # which moves a block at a time, and keeps its part
        model.to(accelerator.device)

    # The reference is the model as it is now; then it becomes the policy, and another object when it is prepared.
    # Stored errors take its place. There are none of validation's pairs, for which adapters can still be switched off.
    stored = errors is not None and settings.lora_rank == 0
    reference = None if stored else reference_of(model, settings, accelerator)
    objective = objective_of(settings, pipe, reference=reference)
    with together(accelerator):
        if errors is not None:
            errors.check(objective=objective)
        make_trainable(model, family, settings, has_checkpoint=checkpoint is not None)
        optimizer = new_optimizer(trained(model), settings, learning_rate(settings, accelerator.num_processes))
    model, optimizer = accelerator.prepare(model, optimizer)
    if fsdp2:  # of all its modules only the prepared one calls what torch.compile made
        setattr(pipe, family.model, model)
    schedule = new_schedule(optimizer, settings)  # of the prepared optimizer, which may be DeepSpeed's own
    ema = averages_of(model, settings)

    accelerator.register_for_checkpointing(inputs.loader, schedule, *([] if ema is None else [WholeAverages(ema)]))
    if settings.lora_rank:
        checkpoint_adapters_only(accelerator)
    result_of(accelerator, model, settings)
    done = resume(accelerator, settings, checkpoint, run)
    if settings.resume is not None:
        _say(
            accelerator, f"goes on from {checkpoint}" if done else f"no checkpoint is in {output} yet: a new run begins"
        )
    accelerator.step = 0  # its count of forwards, which is off where the run had another accumulation before
    with together(accelerator):
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            write_settings(settings, output / "settings.yaml")
        accelerator.init_trackers(settings.project, _flat(settings))
        journal = Journal(accelerator, output / "metrics.jsonl", done)

    loop = _Loop(
        settings=settings,
        setup=setup,
        inputs=inputs,
        validation=validation,
        errors=errors,
        objective=objective,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        journal=journal,
        run=run,
    )
    batches = _forever(inputs.loader)
    model.train()
    expect_steps()
    with _told_to_stop(settings) as told, _progress(accelerator, settings.steps, done) as advance:
        for step in range(done + 1, settings.steps + 1):
            loop.training_step(step, batches)
            stop = step < settings.steps and loop.any_told(step, told)  # after the last only the result is missing
            advance(loop.after_step(step, stop))
            if stop:
                raise SystemExit(128 + signal.SIGTERM)

    with loop.result_weights():
        save_result(accelerator, pipe, family, model, settings, output)
    accelerator.end_training()
    loads = f"pipe.load_lora_weights({str(output)!r})" if settings.lora_rank else f"from_pretrained({str(output)!r})"
    _say(accelerator, f"the result is in {output}: {loads} takes it")


@dataclass(frozen=True, kw_only=True)
class _Loop:
    settings: Settings
    setup: Setup
    inputs: Inputs
    validation: Inputs | None
    errors: ReferenceErrors | None
    objective: PairObjective
    model: Any
    optimizer: Any
    schedule: Any
    ema: Any
    journal: Journal
    run: dict[str, Any]

    def training_step(self, step: int, batches: Iterator[PairBatch]) -> None:
        accelerator, model = self.setup.accelerator, self.model
        for forward in range(self.settings.accumulation):
            batch = next(batches)
            with accelerator.accumulate(model):
                losses, metrics = self.pair_losses(batch)
                if step == 1 and forward == 0:
                    self.check_start(metrics)
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    # All parameters, trained or not: by them Accelerate knows a model of FSDP, whose norm is not its
                    # shard's. Also where nothing is clipped: the norm tells whether the gradient is finite.
                    norm = accelerator.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm or math.inf)
                    if norm is not None:
                        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                        metrics["grad_norm"] = torch.as_tensor(norm, device=losses.device)  # DeepSpeed's is a number
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.journal.add(step, batch.keys, losses.detach(), metrics)
        if not accelerator.optimizer_step_was_skipped:  # for an overflow of float16
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(trained(self.model))

    def pair_losses(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        ref_error = None
        if self.errors is None:
            came = zip(batch.lap.tolist(), batch.index.tolist(), strict=True)
            seeds = [mix(self.settings.seed, lap, pair) for lap, pair in came]
        else:
            draw = batch.lap % self.errors.draws
            seeds, ref_error = self.errors.seeds(batch.index, draw), self.errors(batch.index, draw)
        text = self.inputs.encode(batch, seeds)
        latents = text.pop("latents")
        given = self.inputs.conditioning(batch, text, seeds)
        with self.setup.accelerator.autocast():  # the reference is not prepared by Accelerate; the policy is
            return self.objective(
                self.model, latents, given, seeds=seeds, ref_error=ref_error, pair_weight=batch.weight
            )

    def check_start(self, metrics: dict[str, Tensor]) -> None:
        """Warns where the policy is not its reference before anything was learned."""
        if self.settings.lora_weights or self.settings.loss.get("reference_free"):
            return
        win, lose = metrics["reward_win"].item(), metrics["reward_lose"].item()
        if abs(win) + abs(lose) > _MOST_AT_START:
            warnings.warn(
                f"before the first step the implicit rewards are {win:.3g} and {lose:.3g}; expected 0, as the policy "
                "is its reference: what is computed in another precision or another way (by torch.compile, FSDP, "
                "reference errors of other batches) is taken for a preference. A smaller beta makes it smaller",
                stacklevel=2,
            )

    def result_weights(self) -> AbstractContextManager[None]:
        """The model with those that are the result: the averages, if there are any."""
        return contextlib.nullcontext() if self.ema is None else ema_weights(self.model, self.ema)

    def any_told(self, step: int, told: list[int]) -> bool:
        """Whether a process was told to stop. To ask the others costs a wait for the device."""
        accelerator = self.setup.accelerator
        if accelerator.num_processes == 1:
            return bool(told)
        if not _is_due(step, self.settings.log_every):
            return False
        if told:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())

    def after_step(self, step: int, stop: bool) -> str:
        """Writes what is due after a step; returns a note of the metrics, if they were written."""
        settings, accelerator = self.settings, self.setup.accelerator
        last, note, output = step == settings.steps, "", Path(settings.output)
        checkpoint = settings.checkpoint_every > 0 and (last or stop or _is_due(step, settings.checkpoint_every))
        validation = (last or _is_due(step, settings.validation_every)) and not stop
        picture = validation and bool(settings.validation_prompts)
        measured = validation and self.validation is not None
        if last or checkpoint or picture or measured or _is_due(step, settings.log_every):
            more = self.measured if measured else dict
            note = self.journal.write(self.inputs.loader.epoch, self.schedule.get_last_lr()[0], more)
        if checkpoint:
            save_checkpoint(accelerator, output, step, settings, self.run)
        if picture:
            with self.as_result():
                folder, size = output / "validation", self.setup.size
                render(accelerator, self.setup.pipe, self.setup.family, settings, size, folder, step)
        return note

    def measured(self) -> dict[str, float]:
        assert self.validation is not None
        own = replace(self, inputs=self.validation, errors=None)
        with self.as_result():
            return measure(self.setup.accelerator, self.validation, self.settings.validation_pairs, own.pair_losses)

    @contextlib.contextmanager
    def as_result(self) -> Iterator[None]:
        with self.result_weights():
            self.model.eval()
            yield
            self.model.train()


# ------------------------------------------------------------------------------------- what is made before


def _errors(settings: Settings, inputs: Inputs, model: Any) -> ReferenceErrors | None:
    """Those that the settings name. Raises ValueError where they are of something else, with both fingerprints."""
    if settings.reference_errors is None:
        return None
    inputs.check_fixed()
    errors = ReferenceErrors(settings.reference_errors)
    errors.check(**inputs.parts_of_errors, model=model, source=inputs.loader)
    return errors


def _run_identity(
    settings: Settings, setup: Setup, inputs: Inputs, model: Any, errors: ReferenceErrors | None
) -> dict[str, Any]:
    """What is the same whenever the run is resumed, by name: settings as they take effect, and models.

    Of pairs per step only their number: that a run goes on with more processes and smaller batches changes nothing.
    """
    processes = setup.accelerator.num_processes
    settings_that_matter = lasting(settings)
    pairs = processes * settings_that_matter.pop("batch_size") * settings_that_matter.pop("accumulation")
    if not setup.family.told_sizes:  # so that earlier runs of other families go on
        del settings_that_matter["size_conditioning"]
    return {
        **settings_that_matter,
        "pairs per step (processes x batch_size x accumulation)": pairs,
        "size": list(setup.size),
        "learning_rate": learning_rate(settings, processes),
        "lora_alpha": settings.lora_alpha or settings.lora_rank,
        "guidance": FLUX_GUIDANCE if settings.guidance is None else settings.guidance,
        "mixed_precision": setup.accelerator.mixed_precision,
        "draws of reference_errors": errors.draws if errors is not None else None,
        "model": fingerprint(model),
        **{name: text for name, text in inputs.parts.items() if name.startswith(("vae", "text_encoder", "tokenizer"))},
    }


def _say(accelerator: Any, text: str) -> None:
    if accelerator.is_main_process:
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _flat(settings: Settings) -> dict[str, Any]:
    """For trackers, which take numbers and text."""
    return {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in vars(settings).items()}


# ---------------------------------------------------------------------------------------------- in the loop


def _forever(loader: PairLoader) -> Iterator[PairBatch]:
    """Epoch after epoch; `loader.epoch` is that of the batch."""
    while True:
        yield from loader


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _told_to_stop(settings: Settings) -> Iterator[list[int]]:
    """The signals to stop that came: a second one ends the process, and so does the first where there are no
    checkpoints."""
    told: list[int] = []
    if settings.checkpoint_every == 0 or threading.current_thread() is not threading.main_thread():
        yield told
        return

    def stop(number: int, _: Any) -> None:
        told.append(number)
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


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
