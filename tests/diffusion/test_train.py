"""`polydpo-fast train` and `geneval` on whole pipelines with tiny random weights."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch._inductor.config
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LoggerType
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusion import pipelines
from diffusion.runs import equal, lines, settings, two_processes, weights
from PIL import Image
from safetensors.torch import load_file
from splitmix import chained
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from polydpo_fast import demo
from polydpo_fast.cli import app
from polydpo_fast.data import LoaderError, PairLoader
from polydpo_fast.diffusion import (
    checkpoints,
    draw_noise,
    draw_timesteps,
    frozen_copy,
    geneval,
    inputs,
    journal,
    predict,
    setup,
    sharding,
    validation,
)
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.checkpoints import save_checkpoint
from polydpo_fast.diffusion.config import Settings, lasting, read_settings, write_settings
from polydpo_fast.diffusion.families import FAMILIES
from polydpo_fast.diffusion.optimizers import learning_rate, new_optimizer
from polydpo_fast.diffusion.pipelines import LORA_FILE, load_pipeline, load_result
from polydpo_fast.diffusion.precompute import reference
from polydpo_fast.diffusion.shards import Shards
from polydpo_fast.diffusion.train import NotFiniteError, train
from polydpo_fast.splitmix import mix

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture
def here(sd15_and_pairs):
    return sd15_and_pairs


# ----------------------------------------------------------------------------------------------- the whole


def test_a_training_from_the_command_line(here, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(
        f"model: {here / 'pipeline'}\ndata: nowhere.parquet\nsize: 16\nlearning_rate: 1e-3\nlog_every: 2\nbeta: 1\n"
    )
    arguments = ["--config", str(config), "--data", str(here / "pairs.parquet"), "--output", str(out), "--steps", "5"]
    arguments += ["--batch-size", "2", "--beta", "300", "--alpha", "2", "--gradient-checkpointing", "--ema", "0.9"]
    arguments += ["--validation-prompts", "ab", "--validation-prompts", "c", "--validation-every", "3"]
    arguments += [
        "--checkpoint-every",
        "2",
        "--keep",
        "2",
        "--set",
        "validation_steps=2",
        "--set",
        "loader={hflip: 0.5}",
    ]
    arguments += ["--resume", "latest"]
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    assert f"\nno checkpoint is in {out} yet: a new run begins\n" in f"\n{result.output}"
    assert result.output.splitlines()[-1] == f"the result is in {out}: from_pretrained({str(out)!r}) takes it"
    written = lines(out)
    assert [line["step"] for line in written] == [2, 3, 4, 5]
    assert [line["steps"] for line in written] == [2, 1, 1, 1]
    assert all(math.isfinite(value) for line in written for value in line.values())
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]
    for step in (3, 5):
        with Image.open(out / "validation" / f"{step:06d}.png") as sheet:
            assert sheet.size == (32, 16)
    used = read_settings(out / "settings.yaml")
    assert (used.beta, used.alpha, used.learning_rate, used.loader) == (300.0, 2.0, 1e-3, {"hflip": 0.5})
    # The result is the average, not the last weights, and a model that Diffusers loads.
    averaged, last = weights(out), load_file(out / "checkpoint-5" / "model.safetensors")
    assert averaged.keys() == last.keys()
    assert not equal(averaged, last)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    assert equal(dict(unet.state_dict()), averaged)
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(app, ["train", *arguments, "--steps", "6"])
    assert result.exit_code == 0, result.output
    assert f"\ngoes on from {out / 'checkpoint-5'}\n" in f"\n{result.output}"
    assert [line["step"] for line in lines(out)][-2:] == [5, 6]


def images(pipe):
    generator = torch.Generator().manual_seed(3)
    return pipe("ab", height=16, width=16, num_inference_steps=3, generator=generator, output_type="np").images


def test_the_result_is_a_pipeline(here, tmp_path):
    """That of before, but for the trained weights and the scheduler, to the bit, whatever the precision of training."""
    out = tmp_path / "out"
    zero_snr = dict(_class_name="EulerDiscreteScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = {**zero_snr, "prediction_type": "v_prediction"}
    train(settings(here, out, steps=2, learning_rate=0.05, mixed_precision="bf16", scheduler=scheduler))
    ours, before = (DiffusionPipeline.from_pretrained(folder) for folder in (out, here / "pipeline"))
    for pipe in (ours, before):
        pipe.set_progress_bar_config(disable=True)
    assert equal(ours.vae.state_dict(), before.vae.state_dict())
    assert equal(ours.text_encoder.state_dict(), before.text_encoder.state_dict())
    assert (images(ours) != images(before)).any()
    before.unet.load_state_dict(weights(out))
    assert (images(ours) != images(before)).any()
    assert type(ours.scheduler) is EulerDiscreteScheduler
    before.scheduler = EulerDiscreteScheduler.from_config(before.scheduler.config, **{**scheduler, "_class_name": None})
    assert (images(ours) == images(before)).all()
    assert ours.scheduler.alphas_cumprod[-1] < 1e-7
    # It can be trained and judged itself.
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a dog")
    result = CliRunner().invoke(app, ["geneval", str(out), prompts, str(tmp_path / "images"), "--samples", "1"])
    assert result.exit_code == 0, result.output
    train(settings(here, tmp_path / "more", model=str(out), steps=1))


@pytest.mark.parametrize("lora", [0, 2])
def test_another_scheduler_is_that_of_training_and_of_pictures(here, tmp_path, monkeypatch, lora):
    seen = {}

    class Watched(training.objective_of.__globals__["PairObjective"]):
        def __init__(self, scheduler, **options):
            seen["trained"] = scheduler
            super().__init__(scheduler, **options)

    monkeypatch.setitem(training.objective_of.__globals__, "PairObjective", Watched)
    scheduler = dict(prediction_type="v_prediction", beta_end=0.02)
    loss = dict(timestep_weight="min_snr", snr_gamma=1.0, weight_applies_to="logit")
    train(settings(here, tmp_path / "out", steps=1, lora_rank=lora, scheduler=scheduler, loss=loss))
    pipe = load_pipeline(str(here / "pipeline"), policy=torch.bfloat16, frozen=torch.bfloat16)
    load_result(pipe, tmp_path / "out")
    assert pipe.unet.dtype == torch.bfloat16  # in which it is to make pictures
    wanted = DDPMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear").alphas_cumprod
    for one in (seen["trained"], pipe.scheduler):
        assert one.config.prediction_type == "v_prediction"
        assert torch.equal(one.alphas_cumprod, wanted)


def test_weights_equal_those_of_a_loop_written_plainly(here, tmp_path):
    """Two steps of two forwards each, in Diffusers' and PyTorch's own words; noise is drawn as the library says."""
    run = settings(
        here, tmp_path / "out", steps=2, accumulation=2, beta=400.0, alpha=1.5, warmup=1, latents="mode", seed=3
    )
    train(run)

    pipe = DiffusionPipeline.from_pretrained(here / "pipeline")
    policy = pipe.unet
    reference = UNet2DConditionModel.from_pretrained(here / "pipeline", subfolder="unet")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01)
    batches = iter(PairLoader(here / "pairs.parquet", 2, size=16, dtype=torch.float32, seed=3))
    losses = []
    for step in range(2):
        for _ in range(2):
            batch = next(batches)
            seeds = [mix(3, 0, int(i)) for i in batch.index]
            with torch.no_grad():
                latents = pipe.vae.encode(batch.pixels).latent_dist.mode() * 0.18215
                ids = pipe.tokenizer(
                    batch.prompts, padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids
                text = pipe.text_encoder(ids)[0].repeat(2, 1, 1)
            noise = draw_noise(seeds, latents.shape[1:]).repeat(2, 1, 1, 1)
            timesteps = draw_timesteps(scheduler, seeds).repeat(2)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with torch.no_grad():
                ref = reference(noisy, timesteps, text).sample
            pred = policy(noisy, timesteps, text).sample
            # In float64, where the difference of two errors keeps its digits.
            error, ref_error = ((x.double() - noise).square().flatten(1).mean(1) for x in (pred, ref))
            win, lose = (error - ref_error).chunk(2)
            z = -0.5 * 400.0 * (win - lose)
            loss = (-torch.nn.functional.logsigmoid(z) + 1.5 * torch.sigmoid(-z)).mean()
            losses.append(loss.item())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * step  # the warmup begins at 0
        optimizer.step()
        optimizer.zero_grad()
    assert [line["loss"] for line in lines(tmp_path / "out")] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5
    )
    before = reference.state_dict()
    for name, value in weights(tmp_path / "out").items():
        step = (policy.state_dict()[name] - before[name]).norm()
        # Adam divides by what may be a gradient of rounding alone: norms of whole tensors, not single numbers.
        assert (value - policy.state_dict()[name]).norm() <= 2e-2 * step + 1e-9, name
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())


@pytest.mark.parametrize(("family", "lora"), [("sdxl", 0), ("sd3", 2), ("flux", 2), ("wan", 2)])
def test_each_family_takes_steps(family, lora, tmp_path):
    """At the first step policy and reference agree exactly, whatever the family makes of prompts and latents."""
    model = pipelines.save(family, tmp_path)
    change = {}
    if family == "wan":
        data = pipelines.write_clips(tmp_path / "clips", 2, 5)
        change = dict(size=[16, 32], loader={"frames": 5}, batch_size=1)
    else:
        data = pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    train(settings(tmp_path, tmp_path / "out", model=str(model), data=str(data), steps=2, lora_rank=lora, **change))
    first, second = lines(tmp_path / "out")
    assert first["loss"] == torch.tensor(math.log(2)).item()
    assert first["implicit_accuracy"] == 0.5
    assert first["grad_norm"] > 0
    assert second["loss"] != first["loss"]
    assert math.isfinite(second["loss"])


def test_sizes_are_heights_and_widths_and_the_seed_is_set(here, tmp_path):
    """[height, width] of settings; of LoRA's first weights the generator's seed, of which NumPy takes 32 bits."""
    begun = setup.set_up(settings(here, tmp_path, size=[16, 24], seed=2**40 + 7))
    assert begun.size == (16, 24)
    assert torch.initial_seed() == 7
    given = settings(here, tmp_path, size=[16, 24], loader={"hflip": 1.0})
    batch = next(iter(inputs.Inputs(given, begun).loader))
    assert batch.pixels.shape == (4, 3, 16, 24)
    assert batch.flipped.all()


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_trained_is_whole_and_the_rest_in_half_precision(here, tmp_path, lora):
    """All weights in float32, where a step of 1e-8 is not lost; beside adapters nothing has to be."""
    pipe = setup.set_up(settings(here, tmp_path, mixed_precision="bf16", lora_rank=lora)).pipe
    assert pipe.unet.dtype == (torch.bfloat16 if lora else torch.float32)
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16


def test_a_run_keeps_the_guidance_that_takes_effect(here, tmp_path):
    accelerator = SimpleNamespace(num_processes=3, mixed_precision="no")
    begun = SimpleNamespace(accelerator=accelerator, family=FAMILIES["FluxPipeline"], size=(16, 16))
    for given, kept in ((None, 3.5), (3.5, 3.5), (1.0, 1.0)):
        run = settings(here, tmp_path, guidance=given)
        told = training._run_identity(run, begun, SimpleNamespace(parts={}), torch.nn.Linear(2, 2), None)
        assert told["guidance"] == kept
        assert told["pairs per step (processes x batch_size x accumulation)"] == 3 * 2


def test_averages_weights_of_pairs_and_gradients_that_are_not_clipped(here, tmp_path, monkeypatch):
    """Averages by their definition from the weights after each step, from the first on; pictures are of them."""
    rows = pq.read_table(here / "pairs.parquet")
    weight = [0.5 + i / 8 for i in range(len(rows))]
    pq.write_table(rows.append_column("weight", pa.array(weight)), tmp_path / "weighted.parquet")
    seen, limits, shown = [], [], {}
    ask, clip = training.PairObjective.__call__, Accelerator.clip_grad_norm_

    def asked(self, *given, pair_weight, **more):
        seen.append(pair_weight.tolist())
        return ask(self, *given, pair_weight=pair_weight, **more)

    def clipped(self, parameters, most):
        limits.append(most)
        return clip(self, parameters, most)

    def render(accelerator, pipe, *rest):
        shown.update(training=pipe.unet.training, **{k: v.clone() for k, v in pipe.unet.state_dict().items()})

    monkeypatch.setattr(training.PairObjective, "__call__", asked)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipped)
    monkeypatch.setattr(training, "render", render)
    change = dict(steps=3, max_grad_norm=0.0, ema=0.2, checkpoint_every=1, validation_prompts=["ab"], seed=2)
    change |= dict(data=str(tmp_path / "weighted.parquet"), learning_rate=0.05)
    train(settings(here, tmp_path / "out", **change))
    assert not shown.pop("training")
    one, two, three = (load_file(tmp_path / "out" / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2, 3))
    for name, average in weights(tmp_path / "out").items():
        early = (2 * one[name] + 9 * two[name]) / 11  # in the second step no more than 2 / 11
        torch.testing.assert_close(average, 0.2 * early + 0.8 * three[name])
    assert equal(shown, weights(tmp_path / "out"))
    assert not equal(shown, three)
    batches = iter(PairLoader(tmp_path / "weighted.parquet", 2, size=16, seed=2))
    assert seen == [[weight[i] for i in next(batches).index.tolist()] for _ in range(3)]
    assert limits == [math.inf] * 3


def test_what_is_drawn_for_a_pair_is_drawn_apart(here, tmp_path, monkeypatch):
    """Each from a number of its own, by the published generator: both arms' samples of the VAE, and whether the prompt
    is dropped, which would go with the timestep if it were drawn from the same number."""
    seen = {}
    encode, conditioned = inputs.encode_pixels, inputs.Inputs.conditioning

    def encoding(vae, pixels, seeds, **options):
        seen.update(samples=seeds, chunk=options["chunk"])
        return encode(vae, pixels, seeds, **options)

    def conditioning(self, batch, text, seeds):
        given = conditioned(self, batch, text, seeds)
        (name,) = text
        kept = (given[name] == text[name]).flatten(1).all(1)
        seen.update(pairs=seeds, index=batch.index.tolist(), dropped=(~kept).tolist())
        return given

    monkeypatch.setattr(inputs, "encode_pixels", encoding)
    monkeypatch.setattr(inputs.Inputs, "conditioning", conditioning)
    train(settings(here, tmp_path / "out", steps=1, batch_size=16, prompt_dropout=0.4, seed=5, vae_batch=3))
    pairs = [chained(5, 0, index) for index in seen["index"]]
    assert seen["pairs"] == pairs
    assert seen["samples"] == [chained(pair, arm) for arm in (1, 2) for pair in pairs]
    assert seen["dropped"] == [chained(pair, 4) < 0.4 * 2**64 for pair in pairs]
    assert len(set(seen["dropped"])) == 2
    assert seen["chunk"] == 3


def test_both_arms_of_sdxl_are_told_the_same_sizes(tmp_path, monkeypatch):
    """The pairs' first images have 24 pixels, the second ones 30, and either may win.

    By default as in Diffusion-DPO's train.py: [resolution, resolution, 0, 0, resolution, resolution] for all rows.
    Diffusers' script repeats its time_ids too, for the second arm: `.repeat(2, 1)`.
    """
    change = dict(model=str(pipelines.save("sdxl", tmp_path)), steps=2, lora_rank=2, checkpoint_every=1, size=[16, 16])
    pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    seen = []
    predict = UNet2DConditionModel.forward

    def watched(self, *arguments, **given):
        seen.append(given["added_cond_kwargs"]["time_ids"].tolist())
        return predict(self, *arguments, **given)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    train(settings(tmp_path, tmp_path / "fixed", **change))
    assert seen == [[[16, 16, 0, 0, 16, 16]] * 4] * 4  # policy and reference, twice
    seen.clear()
    own = {**change, "size_conditioning": "own"}
    train(settings(tmp_path, tmp_path / "own", **own))
    assert {tuple(sorted((a[0], b[0]))) for ids in seen for a, b in zip(ids[:2], ids[2:], strict=True)} == {(24, 30)}
    # A checkpoint of when there was no choice is one of own sizes.
    file = tmp_path / "own" / "checkpoint-1" / "run.json"
    told = json.loads(file.read_text())
    assert told["settings"].pop("size_conditioning") == "own"
    file.write_text(json.dumps(told))
    again = dict(resume=str(file.parent), output=str(tmp_path / "again"))
    with pytest.raises(
        ValueError, match=r"size_conditioning is 'fixed'; the run of .* was begun with 'own': expected it"
    ):
        train(settings(tmp_path, tmp_path / "again", **{**change, **again}))
    train(settings(tmp_path, tmp_path / "again", **{**own, **again}))


def test_lora_weights_load_into_the_pipeline(here, tmp_path, monkeypatch):
    kept = {}
    noisy, step, text = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 5, 12)

    def keep(pipe, family, model, *rest, **more):
        with torch.no_grad():
            kept["pred"] = model(noisy, step, text).sample
        save(pipe, family, model, *rest, **more)

    save = checkpoints.save_lora
    monkeypatch.setattr(checkpoints, "save_lora", keep)
    out = tmp_path / "out"
    train(settings(here, out, lora_rank=3, checkpoint_every=4, optimizer="adafactor", learning_rate=1e-2))
    assert not (out / "unet").exists()
    # Checkpoints hold what is trained, not the rest.
    assert not (out / "checkpoint-4" / "model.safetensors").exists()
    assert all("lora" in name for name in load_file(out / "checkpoint-4" / "adapters.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(here / "pipeline")
    with torch.no_grad():
        plain = pipe.unet(noisy, step, text).sample
        pipe.load_lora_weights(out)
        loaded = pipe.unet(noisy, step, text).sample
    torch.testing.assert_close(loaded, kept["pred"], rtol=1e-5, atol=1e-6)
    assert (loaded - plain).abs().max() > 1e-4


def test_lora_begins_with_weights_and_has_an_alpha(here, tmp_path):
    """What a run left is what the next begins with, at any alpha; and it is saved for a scale of 1."""
    given = dict(steps=1, lora_rank=2, learning_rate=0.05, seed=1)
    train(settings(here, tmp_path / "one", **given))
    first = load_file(tmp_path / "one" / LORA_FILE)
    for name, alpha, precision in (("same", None, "no"), ("half", 1.0, "no"), ("bf16", None, "bf16")):
        kept = dict(lora_weights=str(tmp_path / "one"), learning_rate=0.0, lora_alpha=alpha, mixed_precision=precision)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(settings(here, tmp_path / name, **{**given, **kept}))
        again = load_file(tmp_path / name / LORA_FILE)
        assert again.keys() == first.keys()
        for key in first:
            torch.testing.assert_close(again[key], first[key])
        # The reference is the model without them.
        assert lines(tmp_path / name)[0]["loss"] != torch.tensor(math.log(2)).item()
    # After one step of Adam B is of the same size, and does its part of alpha / rank.
    AcceleratorState._reset_state(reset_partial_state=True)
    train(settings(here, tmp_path / "double", **given, lora_alpha=4.0))
    double = load_file(tmp_path / "double" / LORA_FILE)
    key = next(key for key in first if "lora_B" in key)
    torch.testing.assert_close(double[key], 2 * first[key], rtol=1e-2, atol=1e-5)
    for folder, message in ((tmp_path, "expected a folder with pytorch_lora_w"), (tmp_path / "one", "other adapters")):
        with pytest.raises(ValueError, match=message):
            train(settings(here, tmp_path / "x", **{**given, "lora_rank": 3}, lora_weights=str(folder)))


@pytest.mark.parametrize("lora", [0, 2])
def test_dropout_is_no_preference(here, tmp_path, lora):
    """The reference has none, so that the policy must have none."""
    model = tmp_path / "pipeline"
    shutil.copytree(here / "pipeline", model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "dropout": 0.3}))
    train(settings(here, tmp_path / "out", model=str(model), steps=1, lora_rank=lora))
    assert lines(tmp_path / "out")[0]["loss"] == torch.tensor(math.log(2)).item()
    if not lora:
        assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["dropout"] == 0.3


def test_a_policy_that_is_not_its_reference_is_said(here, tmp_path, monkeypatch):
    def other(model):
        result = frozen_copy(model)
        with torch.no_grad():
            result.conv_out.bias += 0.1
        return result

    monkeypatch.setattr(training, "frozen_copy", other)
    with pytest.warns(UserWarning, match="before the first step the implicit rewards are .*; expected 0"):
        train(settings(here, tmp_path / "out", steps=1))


@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.heavy), 2])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own look at it
def test_regions_that_are_compiled(tmp_path, monkeypatch, lora):
    """Names within the model have no trace of it: not in the result, and not in a checkpoint of adapters."""
    model, data = pipelines.save("sd3", tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    given = dict(model=str(model), data=str(data), lora_rank=lora, checkpoint_every=1, resume="latest")
    train(settings(tmp_path, tmp_path / "plain", steps=2, **given))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        patch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        for steps in (1, 2):
            AcceleratorState._reset_state(reset_partial_state=True)
            train(settings(tmp_path, tmp_path / "compiled", steps=steps, **given))
    name = LORA_FILE if lora else "transformer/diffusion_pytorch_model.safetensors"
    plain, compiled = (load_file(tmp_path / run / name) for run in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "rounds"), [("bf16", True), ("no", False)])
def test_compiled_graphs_round_alike(here, tmp_path, monkeypatch, precision, rounds):
    """With gradients and without; that the loss then begins at log 2 is for the heavy tests."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with torch._inductor.config.patch(emulate_precision_casts=False):
        setup.set_up(settings(here, tmp_path, mixed_precision=precision))
        assert torch._inductor.config.emulate_precision_casts == rounds


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_policy_begins_at_its_reference(here, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with torch._inductor.config.patch(emulate_precision_casts=False):
        train(settings(here, tmp_path / "out", steps=1, mixed_precision="bf16"))
    assert lines(tmp_path / "out")[0]["loss"] == torch.tensor(math.log(2)).item()


def test_what_cannot_be_saved_is_said_before_the_first_step(here, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.get_state_dict", lambda self, model: {"wrapped.weight": torch.ones(1)})
    monkeypatch.setattr(training.Journal, "add", None)
    with pytest.raises(RuntimeError, match="Missing key"):
        train(settings(here, tmp_path / "out"))


def test_files_of_a_variant(here, tmp_path):
    """Are asked for, named where they are all there is, and the result has none of it."""
    model = tmp_path / "pipeline"
    pipe = DiffusionPipeline.from_pretrained(here / "pipeline")
    pipe.save_pretrained(model, variant="fp16", max_shard_size="20KB")
    assert list(model.rglob("*.fp16-00001-of-*")), "there is an index to be renamed"
    with pytest.raises(ValueError, match="whose weights are of variant 'fp16', and variant is None; expected that of"):
        train(settings(here, tmp_path / "out", model=str(model), steps=1))
    train(settings(here, tmp_path / "out", model=str(model), variant="fp16", steps=1))
    assert not list((tmp_path / "out").rglob("*fp16*"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for part in ("vae", "text_encoder"):
        assert equal(getattr(again, part).state_dict(), getattr(pipe, part).state_dict())
    for file in (model / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="text_encoder"):  # not of the variant, which is right
        train(settings(here, tmp_path / "other", model=str(model), variant="fp16", steps=1))


def test_a_revision_is_asked_for(here, tmp_path, monkeypatch):
    asked, load = [], DiffusionPipeline.from_pretrained.__func__

    def watched(cls, *arguments, **options):
        asked.append(options["revision"])
        return load(cls, *arguments, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(watched))
    train(settings(here, tmp_path / "out", revision="abc", steps=1))
    assert asked == ["abc"]


def test_the_guidance_of_flux(tmp_path):
    """Is 3.5, or the setting, in training and in a store of errors; a shift must take the place of its own."""
    model, data = pipelines.save("flux", tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    given = dict(model=str(model), data=str(data), lora_rank=2, steps=1, latents="mode")
    losses = {}
    for guidance in (None, 3.5, 1.0):
        out = tmp_path / f"{guidance}"
        train(settings(tmp_path, out, guidance=guidance, **given))
        losses[guidance] = lines(out)[0]["model_mse_win"]
    assert losses[None] == losses[3.5] != losses[1.0]
    reference(settings(tmp_path, tmp_path, guidance=1.0, **given), tmp_path / "errors")
    stored = dict(given, reference_errors=str(tmp_path / "errors"))
    train(settings(tmp_path, tmp_path / "stored", guidance=1.0, **stored))
    with pytest.raises(ValueError, match=r"another guidance: in the store it is 1\.0, here it is 3\.5"):
        train(settings(tmp_path, tmp_path / "other", **stored))
    shift = dict(given, scheduler={"shift": 1.5})
    with pytest.raises(ValueError, match=r"scheduler has shift=1\.5, which does nothing where use_dynamic_shifting"):
        train(settings(tmp_path, tmp_path / "shifted", **shift))
    shift["scheduler"]["use_dynamic_shifting"] = False
    train(settings(tmp_path, tmp_path / "shifted", **shift))


def test_processes_wait_for_each_other_for_hours(here, monkeypatch, unused_tcp_port):
    """One may have much to download, to encode or to render while the others are done."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=unused_tcp_port, OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        setup.new_accelerator()
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout >= timedelta(hours=1)
    finally:
        torch.distributed.destroy_process_group()


def test_mixed_precision_begins_at_the_reference(here, tmp_path):
    """Also where all weights are trained: the reference computes as the policy does."""
    pictures = dict(validation_prompts=["ab"], validation_steps=1)  # of weights in float32 and text in bfloat16
    train(settings(here, tmp_path / "full", steps=1, mixed_precision="bf16", **pictures))
    train(settings(here, tmp_path / "lora", steps=1, mixed_precision="bf16", lora_rank=2))
    for run in ("full", "lora"):
        assert lines(tmp_path / run)[0]["loss"] == torch.tensor(math.log(2)).item()
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "full").values())


@pytest.fixture
def float16_on_cpus(monkeypatch):
    """Accelerate has it on GPUs alone; PyTorch's autocast and GradScaler are there. Called with the initial scale."""
    import accelerate

    class Float16(accelerate.Accelerator):
        def __init__(self, *, mixed_precision, **options):
            AcceleratorState._reset_state(reset_partial_state=True)
            super().__init__(mixed_precision="no", **options)
            self.state._mixed_precision, self.native_amp = mixed_precision, True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=initial[0])

    initial = []
    monkeypatch.setattr(accelerate, "Accelerator", Float16)
    return initial.append


@pytest.mark.parametrize(("lora", "exponent"), [(0, 15), (2, 19)])
def test_float16_skips_what_overflows_and_goes_on(here, tmp_path, float16_on_cpus, lora, exponent):
    """A step that overflows changes neither weights nor schedule nor averages, and halves the scale."""
    float16_on_cpus(2.0**exponent)
    options = dict(mixed_precision="fp16", lora_rank=lora, ema=0.9, beta=500.0)
    options |= dict(schedule="constant_with_warmup", warmup=7)
    out = tmp_path / "out"
    train(settings(here, out, steps=8, checkpoint_every=4, **options))
    norms = [line["grad_norm"] for line in lines(out)]
    skipped = norms.count(None)
    assert 1 <= skipped <= 6
    first = next(step for step, norm in enumerate(norms) if norm is not None)  # later ones may overflow once more
    assert first >= 1
    assert [line["loss"] for line in lines(out)][: first + 1] == [torch.tensor(math.log(2)).item()] * (first + 1)
    assert lines(out)[-1]["loss"] != lines(out)[0]["loss"]
    assert lines(out)[-1]["learning_rate"] == pytest.approx(1e-3 * (8 - skipped) / 7)
    checkpoint = out / "checkpoint-8"
    assert torch.load(checkpoint / "scaler.pt")["scale"] == 2.0 ** (exponent - skipped)
    average = torch.load(checkpoint / "custom_checkpoint_2.pkl", weights_only=False)
    assert average["optimization_step"] == 8 - skipped
    trained = load_file(checkpoint / ("adapters.safetensors" if lora else "model.safetensors"))
    assert all(value.dtype == torch.float32 for value in trained.values())
    # And the scale is resumed.
    resumed = dict(resume=str(out / "checkpoint-4"), checkpoint_every=4)
    train(settings(here, tmp_path / "broken", steps=8, **resumed, **options))
    again = load_file(tmp_path / "broken" / "checkpoint-8" / ("adapters.safetensors" if lora else "model.safetensors"))
    assert equal(trained, again)


def test_float16_that_overflows_for_ever_stops(here, tmp_path, monkeypatch, float16_on_cpus):
    """Else no step would ever be taken, and nothing be said of it."""
    make = training.objective_of

    def spoiled(model, *inputs):
        result = predict(model, *inputs)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(training, "objective_of", lambda *given, **more: make(*given, **more, forward=spoiled))
    float16_on_cpus(2.0**-22)
    with pytest.raises(NotFiniteError, match="the gradient is not finite at step 3, though the losses are"):
        train(settings(here, tmp_path / "out", steps=8, mixed_precision="fp16"))


# ------------------------------------------------------------------------------- trackers, optimizers, schedules


@pytest.fixture
def wandb(monkeypatch):
    """What Accelerate's tracker calls of W&B, which would talk to its server; images as strict as its own."""
    import types

    module, told = types.ModuleType("wandb"), {"config": {}, "values": {}, "images": {}}

    class Run:
        def log(self, values, step):
            for name, value in values.items():
                if isinstance(value, list):
                    told["images"][step] = (name, value)
                else:
                    told["values"].setdefault(name, {})[step] = value

        def finish(self):
            told["finished"] = True

    def init(project):
        told["project"] = project
        return Run()

    class Picture:
        def __init__(self, pixels):
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            self.pixels = pixels
            assert pixels.shape[2] == 3

    module.init, module.Image, module.config = init, Picture, types.SimpleNamespace()
    module.config.update = lambda values, allow_val_change: told["config"].update(values)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    return told


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trackers_are_told_what_is_written(here, tmp_path, wandb):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    prompts = dict(validation_prompts=["ab", "c"], validation_every=2, validation_steps=1)
    train(settings(here, out, trackers=["tensorboard", "wandb"], project="trial", beta=70.0, **prompts))
    (file,) = (out / "logs" / "trial").glob("events*")
    board = EventAccumulator(str(file))
    board.Reload()
    for line in lines(out):
        for name in set(line) - {"step", "steps", "epoch"}:
            scalar = next(one for one in board.Scalars(name) if one.step == line["step"])
            assert scalar.value == pytest.approx(line[name], rel=1e-6)
            assert wandb["values"][name][line["step"]] == line[name]
    assert [(one.step, one.width, one.height) for one in board.Images("validation")] == [(2, 32, 16), (4, 32, 16)]
    sheet = np.asarray(Image.open(out / "validation" / "000004.png"))
    assert sheet.std() > 1  # there is something to compare
    name, (picture,) = wandb["images"][4]
    assert name == "validation"
    assert (picture.pixels == sheet).all()
    shown = np.asarray(Image.open(io.BytesIO(board.Images("validation")[1].encoded_image_string)))
    assert (shown == sheet).all()
    assert (wandb["project"], wandb["config"]["beta"], wandb["finished"]) == ("trial", 70.0, True)


def test_optimizers_are_those_of_the_scripts(here, tmp_path):
    """AdamW by the defaults of Diffusers' (--adam_beta1, --max_grad_norm ...), Adafactor as Diffusion-DPO's has it."""
    rate, weights = 3e-4, [torch.nn.Parameter(torch.zeros(2))]
    usual = settings(here, tmp_path)
    group = new_optimizer(weights, usual, rate).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (rate, (0.9, 0.999), 1e-8, 0.01)
    assert usual.max_grad_norm == 1.0
    of_a_step = settings(here, tmp_path, learning_rate=None, batch_size=2, accumulation=3)
    assert learning_rate(of_a_step, processes=4) == pytest.approx(24e-8)
    own = settings(here, tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    group = new_optimizer(weights, own, rate).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)
    fixed = new_optimizer(weights, settings(here, tmp_path, optimizer="adafactor", weight_decay=0.1), rate)
    theirs = dict(lr=rate, weight_decay=0.1, clip_threshold=1.0, scale_parameter=False, relative_step=False)
    assert {name: fixed.param_groups[0][name] for name in theirs} == theirs


@pytest.mark.parametrize(("name", "kind"), [("adamw8bit", "AdamW8bit"), ("paged_adamw8bit", "PagedAdamW8bit")])
def test_optimizers_of_eight_bits_are_asked_for(here, tmp_path, monkeypatch, name, kind):
    """The arguments are those of torch's AdamW, which stands in here."""
    made = []

    class Eight(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            made.append((type(self).__name__, options))

    module = type(sys)("bitsandbytes.optim")
    for one in ("AdamW8bit", "PagedAdamW8bit"):
        setattr(module, one, type(one, (Eight,), {}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", type(sys)("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    options = dict(steps=2, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=0.1)
    train(settings(here, tmp_path / "eight", optimizer=name, **options))
    assert made == [(kind, dict(lr=1e-3, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1))]
    train(settings(here, tmp_path / "whole", **options))
    assert equal(weights(tmp_path / "eight"), weights(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_optimizers_of_eight_bits_where_they_are_installed(here, tmp_path, name):
    """They learn nearly what AdamW does, and resume to the bit."""
    pytest.importorskip("bitsandbytes")
    options = dict(batch_size=4, beta=100.0, checkpoint_every=2, optimizer=name)
    train(settings(here, tmp_path / "whole", **options))
    train(settings(here, tmp_path / "broken", steps=2, **options))
    train(settings(here, tmp_path / "broken", resume="latest", **options))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    train(settings(here, tmp_path / "adamw", **{**options, "optimizer": "adamw"}))
    before = load_file(here / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = [
        torch.cat([(weights(tmp_path / run)[k] - before[k]).flatten() for k in before]) for run in ("whole", "adamw")
    ]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.95


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        (dict(schedule="linear", warmup=2, accumulation=2), lambda n: n / 2 if n < 2 else (6 - n) / 4),
        (dict(schedule="cosine"), lambda n: (1 + math.cos(math.pi * n / 6)) / 2),
        (
            dict(schedule="cosine_with_restarts", cycles=2),
            lambda n: (1 + math.cos(math.pi * (n % 3) / 3)) / 2 if n < 6 else 0,
        ),
        (dict(schedule="polynomial", power=2.0), lambda n: 1e-4 + (1 - 1e-4) * (1 - n / 6) ** 2),  # down to 1e-7
    ],
    ids=lambda value: value["schedule"] if isinstance(value, dict) else "",
)
def test_schedules_of_the_learning_rate(here, tmp_path, change, rate):
    """What is written after a step is the rate of the next, as Diffusers' scripts have it."""
    train(settings(here, tmp_path / "out", steps=6, batch_size=1, **change))
    rates = [line["learning_rate"] for line in lines(tmp_path / "out")]
    assert rates == pytest.approx([1e-3 * rate(n) for n in range(1, 7)], abs=1e-9)


@pytest.mark.parametrize(
    ("change", "rate"), [(dict(accumulation=3), 6e-8), (dict(lora_rank=2), 1e-5), (dict(learning_rate=0.0), 0.0)]
)
def test_learning_rates_are_the_published_ones(here, tmp_path, change, rate):
    train(settings(here, tmp_path / "out", steps=1, **{"learning_rate": None, "seed": 2**62, **change}))
    assert lines(tmp_path / "out")[0]["learning_rate"] == pytest.approx(rate, rel=1e-12)


def test_a_model_is_made_trainable_as_it_was_told(here, tmp_path):
    """LoRA's first weights need not be there any more where there is a checkpoint."""
    family, nowhere = FAMILIES["StableDiffusionPipeline"], str(tmp_path / "nowhere")
    for checkpointing in (False, True):
        model = UNet2DConditionModel.from_pretrained(here / "pipeline", subfolder="unet")
        run = settings(here, tmp_path, gradient_checkpointing=checkpointing, lora_rank=2, lora_weights=nowhere)
        training._make_trainable(model, family, run, has_checkpoint=True)
        assert model.is_gradient_checkpointing == checkpointing
    free = settings(here, tmp_path, loss={"reference_free": True})
    assert training._reference(model, free, None) is None


@pytest.mark.parametrize("change", [{}, dict(lora_rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(here, tmp_path, change):
    for name, checkpointing in (("with", True), ("without", False)):
        run = settings(here, tmp_path / name, gradient_checkpointing=checkpointing, checkpoint_every=4, **change)
        train(run)
    file = "checkpoint-4/" + ("adapters.safetensors" if change else "model.safetensors")
    assert equal(load_file(tmp_path / "with" / file), load_file(tmp_path / "without" / file))


# ------------------------------------------------------------------------------------------- interruptions


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("change", [dict(ema=0.9), dict(lora_rank=2, optimizer="adafactor")], ids=["full", "lora"])
def test_resuming_is_as_if_nothing_had_happened(here, tmp_path, monkeypatch, change):
    """Bit for bit: weights, averages, moments, schedule, order, noise. The epoch ends between; prompts are dropped."""
    change = dict(steps=7, accumulation=2, batch_size=3, schedule="cosine", warmup=2, prompt_dropout=0.3, **change)
    change["loader"] = {"crop": "random", "hflip": 0.5}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(here, whole, checkpoint_every=7, **change))
    assert lines(whole)[-1]["epoch"] == 2

    add, calls = training.Journal.add, []

    def fail(self, step, *rest):
        calls.append(step)
        if step == 6:
            raise Killed
        add(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training.Journal, "add", fail)
        with pytest.raises(Killed):
            train(settings(here, broken, checkpoint_every=2, **change))
    (broken / "partial-checkpoint-6").mkdir()  # as a crash while saving would leave it
    assert [line["step"] for line in lines(broken)] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="has checkpoints of another run; expected --resume latest"):
        train(settings(here, broken, checkpoint_every=2, **change))
    train(settings(here, broken, resume="latest", checkpoint_every=7, **change))
    assert not list(broken.glob("partial-*"))
    times = ("pairs_per_s",)
    first, second = (
        [{k: v for k, v in line.items() if k not in times} for line in lines(run)] for run in (whole, broken)
    )
    assert first == second
    name = "adapters.safetensors" if "lora_rank" in change else "model.safetensors"
    assert equal(load_file(whole / "checkpoint-7" / name), load_file(broken / "checkpoint-7" / name))
    one, other = (torch.load(run / "checkpoint-7" / "optimizer.bin") for run in (whole, broken))
    assert str(one) == str(other)
    if "ema" in change:
        assert equal(weights(whole), weights(broken))


def test_a_checkpoint_that_does_not_fit_is_refused(here, tmp_path):
    out = tmp_path / "out"
    train(settings(here, out, steps=1, lora_rank=2, checkpoint_every=1))
    (out / "checkpoint-1" / "run.json").unlink()  # as an earlier version left it
    for change, message in (
        (dict(lora_rank=3), "other adapters than this run; expected its lora_rank and lora_targets"),
        (dict(lora_rank=2, seed=1), "the state was taken with seed=0; this loader has 1"),
        (dict(lora_rank=2, resume=str(here)), "expected 'latest', or a folder checkpoint-STEP"),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings(here, out, **{"steps": 2, "resume": "latest", **change}))


@pytest.mark.parametrize("file", ["adapters.safetensors", "optimizer.bin", "run.json"])
@pytest.mark.parametrize("left", [0, 10])
def test_a_damaged_checkpoint_is_named(here, tmp_path, file, left):
    out = tmp_path / "out"
    train(settings(here, out, steps=1, lora_rank=2, checkpoint_every=1))
    path = out / "checkpoint-1" / file
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"checkpoint-1\S* is damaged"):
        train(settings(here, out, steps=2, lora_rank=2, resume="latest"))


def test_a_checkpoint_beyond_the_last_step_is_refused(here, tmp_path):
    """It would be saved as the result of a run that is shorter than itself. Of the last step it becomes the result."""
    train(settings(here, tmp_path / "out", steps=2, checkpoint_every=2))
    result = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "unet")
    train(settings(here, tmp_path / "out", steps=2, resume="latest"))
    assert equal(weights(tmp_path / "out"), result)
    with pytest.raises(ValueError, match=r"steps is 1, and .*checkpoint-2 is of step 2; expected 2 steps or more"):
        train(settings(here, tmp_path / "out", steps=1, resume="latest"))


def test_a_run_goes_on_as_it_was_begun(here, tmp_path):
    """Or it is another one, which is said; but for what changes nothing that is learned."""
    out, other = tmp_path / "out", tmp_path / "other"
    given = dict(batch_size=4, checkpoint_every=1, resume="latest", loader={"crop": "random"})
    train(settings(here, out, steps=1, **given))
    model = pipelines.save("sd15", other, seed=1)
    words = tmp_path / "words"
    shutil.copytree(here / "pipeline", words)
    CLIPTokenizer.from_pretrained(words / "tokenizer", model_max_length=12).save_pretrained(words / "tokenizer")
    for change, message in (
        (dict(learning_rate=1e-5), "learning_rate is 1e-05; the run of .*checkpoint-1 was begun with 0.001: expected"),
        (dict(learning_rate=None), "learning_rate is 4e-08; the run of .* was begun with 0.001"),
        (dict(alpha=5.0), "alpha is 5.0; the run of .* was begun with 0.0"),
        (dict(beta=10.0, resume=str(out / "checkpoint-1")), "beta is 10.0; the run of .* was begun with 5000.0"),
        (dict(size=32), r"size is \[32, 32\]; the run of .* was begun with \[16, 16\]"),
        (dict(prompt_dropout=0.5), "prompt_dropout is 0.5; the run of .* was begun with 0.0"),
        (dict(loader={}), r"loader is \{\}; the run of .* was begun with \{'crop': 'random'\}"),
        (dict(batch_size=2), r"pairs per step \(processes x batch_size x accumulation\) is 2; the run of .* with 4"),
        (dict(lora_rank=2), "lora_rank is 2; the run of .* was begun with 0"),
        (dict(mixed_precision="bf16"), "mixed_precision is 'bf16'; the run of .* was begun with 'no'"),
        (dict(loss={"label_smoothing": 0.1}), r"loss is \{'label_smoothing': 0.1\}; the run of .* was begun with \{\}"),
        (dict(model=str(words)), "tokenizer is 'tokenizer:.*'; the run of .* was begun with 'tokenizer:"),
        (dict(model=str(model)), "model is 'UNet2DConditionModel:.*'; the run of .* was begun with 'UNet2DCondition"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match=message):
            train(settings(here, out, steps=2, **{**given, **change}))
    AcceleratorState._reset_state(reset_partial_state=True)
    moved = tmp_path / "moved"
    shutil.copytree(here / "pipeline", moved)
    may = dict(batch_size=2, accumulation=2, gradient_checkpointing=True, vae_batch=2, keep=1, log_every=2)
    may |= dict(model=str(moved), loader={"crop": "random", "readers": 1, "ledger": str(tmp_path / "ledger")})
    train(settings(here, out, steps=2, **{**given, **may}))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_all_that_changes_what_is_learned_is_kept_for_the_whole_run(here, tmp_path):
    """But for where things are, how long and how often, and what costs memory or time alone."""
    places = {"model", "variant", "revision", "data", "reference_errors", "lora_weights", "output", "resume", "project"}
    often = {"steps", "log_every", "checkpoint_every", "keep", "validation_every", "validation_steps"}
    shown = {"validation_prompts", "trackers"}
    costs = {"gradient_checkpointing", "vae_batch"}
    learned = {"crop", "hflip", "interpolation", "frames", "fps", "start", "window", "categories"}
    free = {"cache", "ledger", "limits", "max_bad_rate", "max_bad_run", "prefetch", "readers", "threads", "timeout_s"}
    kept = lasting(settings(here, tmp_path, loader=dict.fromkeys(learned | free, 1)))
    assert set(kept) == {one.name for one in fields(Settings)} - places - often - shown - costs
    assert set(kept["loader"]) == learned


def test_two_results_are_not_mixed(here, tmp_path):
    """Of all weights and LoRA in one folder nobody would know the later."""
    out = tmp_path / "out"
    train(settings(here, out, steps=1))
    for change in (dict(lora_rank=2), dict(lora_rank=2, resume="latest"), {}):
        with pytest.raises(ValueError, match=r"out has unet, and no checkpoint .*: it is the result of another run"):
            train(settings(here, out, steps=1, **change))
    train(settings(here, tmp_path / "lora", steps=1, lora_rank=2, checkpoint_every=1))
    checkpoint = str(tmp_path / "lora" / "checkpoint-1")
    with pytest.raises(ValueError, match="out has unet"):
        train(settings(here, out, steps=2, lora_rank=2, resume=checkpoint))
    # From a checkpoint of its own a run goes on, and its result takes the place of the earlier one.
    before = load_file(tmp_path / "lora" / LORA_FILE)
    train(settings(here, tmp_path / "lora", steps=2, lora_rank=2, resume=checkpoint))
    assert not equal(before, load_file(tmp_path / "lora" / LORA_FILE))
    # As an earlier version may have left it.
    shutil.copy(tmp_path / "lora" / LORA_FILE, out)
    pipe = load_pipeline(str(here / "pipeline"), policy=torch.float32, frozen=torch.float32)
    with pytest.raises(ValueError, match=r"out has unet/ and pytorch_lora_weights\.safetensors, of two runs"):
        load_result(pipe, out)


@pytest.mark.parametrize("left", ["unet", "transformer", LORA_FILE])
def test_a_result_of_any_kind_is_not_written_over(here, tmp_path, left):
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=f"has {left}, and no checkpoint .* it is the result of another run"):
        checkpoints.check_output(settings(here, tmp_path))


def test_told_to_stop_it_leaves_a_checkpoint(here, tmp_path, monkeypatch):
    """And goes on from it as if nothing had happened; without checkpoints the signal does what it always does."""
    given = dict(checkpoint_every=4, resume="latest", log_every=2)
    train(settings(here, tmp_path / "whole", **given))
    add = training.Journal.add
    seen = []

    def told(self, step, *rest):
        add(self, step, *rest)
        seen.append(signal.getsignal(signal.SIGTERM))
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(training.Journal, "add", told)
        with pytest.raises(SystemExit) as caught:
            train(settings(here, tmp_path / "told", **given))
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == before
        assert [path.name for path in (tmp_path / "told").glob("*checkpoint*")] == ["checkpoint-3"]
        assert not (tmp_path / "told" / "unet").exists()
        train(settings(here, tmp_path / "other", steps=1))
        assert seen[-1] == before
    train(settings(here, tmp_path / "told", **given))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "told"))


def test_told_to_stop_in_the_last_step_it_leaves_the_result(here, tmp_path, monkeypatch):
    add = training.Journal.add

    def told(self, step, *rest):
        add(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == before  # a second one would end the process

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training.Journal, "add", told)
    train(settings(here, tmp_path / "out", steps=2, checkpoint_every=1))
    assert (tmp_path / "out" / "unet").exists()


class Saves:
    is_main_process = True

    def __init__(self):
        self.asked = []

    def wait_for_everyone(self):
        self.asked.append("wait")

    def save_state(self, folder):
        self.asked.append("save")
        Path(folder, "random").mkdir(parents=True)
        Path(folder, "model.bin").write_bytes(b"12345")
        Path(folder, "random", "states").write_bytes(b"123")


def test_checkpoints_may_lie_elsewhere_and_alpha_may_be_said(here, tmp_path):
    """A link to a folder of more room; and a setting that is given as what it is without."""
    out, given = tmp_path / "out", dict(lora_rank=2, checkpoint_every=2, steps=2)
    train(settings(here, out, **given))
    (out / "checkpoint-2").rename(tmp_path / "moved")
    (out / "checkpoint-2").symlink_to(tmp_path / "moved")
    train(settings(here, out, **{**given, "steps": 4}, lora_alpha=2.0, resume="latest", keep=1))
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-4"]
    assert (tmp_path / "moved" / "adapters.safetensors").exists()  # the link alone is removed


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_training(tmp_path, monkeypatch):
    """As on NFS where a file of it is open."""

    def busy(folder, **options):
        raise OSError("Directory not empty")

    given = Settings(model="m", data="d", checkpoint_every=1, keep=1)
    (tmp_path / "checkpoint-1-of-mine").mkdir()  # none of the training's
    save_checkpoint(Saves(), tmp_path, 1, given, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        save_checkpoint(Saves(), tmp_path, 2, given, {})
    assert (tmp_path / "checkpoint-1").exists()
    save_checkpoint(Saves(), tmp_path, 3, given, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1-of-mine", "checkpoint-3"]


@pytest.mark.parametrize("mine", [None, "checkpoint-4"])
def test_processes_go_on_from_one_checkpoint(tmp_path, monkeypatch, mine):
    """Where each machine has a folder of its own the first one alone has checkpoints: the others would begin anew."""
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [2, *mine])
    run = Settings(model="m", data="d", output="out", steps=9)
    message = f"output is 'out', .* of steps 2, {4 if mine else 0} .*; expected a folder that all of them share"
    with pytest.raises(ValueError, match=message):
        checkpoints.resume(None, run, mine and tmp_path / mine, {})


def test_metrics_whose_last_line_is_cut_off(here, tmp_path):
    out = tmp_path / "out"
    given = dict(lora_rank=2, checkpoint_every=2, resume="latest")
    train(settings(here, out, steps=3, **given))
    file, whole = out / "metrics.jsonl", lines(out)
    shutil.rmtree(out / "checkpoint-3")
    file.write_text(file.read_text()[:-40])
    train(settings(here, out, steps=3, **given))
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in whole]
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: no line of metrics: 'step'"):
        train(settings(here, out, steps=4, **given))


def test_more_steps_bend_a_schedule_that_decays(here, tmp_path):
    given = dict(lora_rank=2, checkpoint_every=2, resume="latest")
    for schedule in ("constant", "cosine"):
        train(settings(here, tmp_path / schedule, steps=2, schedule=schedule, **given))
    train(settings(here, tmp_path / "constant", steps=4, schedule="constant", **given))
    with pytest.warns(UserWarning, match="steps is 4, and was 2 when .*checkpoint-2 was written: the learning rate of"):
        train(settings(here, tmp_path / "cosine", steps=4, schedule="cosine", **given))


def test_a_checkpoint_is_on_the_disk_before_older_ones_are_removed(tmp_path, monkeypatch):
    """Or a machine that loses its power in between leaves a run with none. All processes have written their parts."""
    done, fsync = [], os.fsync

    def settle(file):
        assert saves.asked == ["wait", "save", "wait"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "partial-checkpoint-2"]
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    given = Settings(model="m", data="d", checkpoint_every=1, keep=1)
    save_checkpoint(Saves(), tmp_path, 1, given, {})
    monkeypatch.setattr(os, "fsync", settle)
    saves = Saves()
    save_checkpoint(saves, tmp_path, 2, given, {})
    assert sorted(map(os.path.basename, done)) == ["model.bin", "run.json", "states"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_latest_checkpoint_is_that_which_was_written_last(here, tmp_path):
    """Not that of the highest step, where a run has gone on from an older one."""
    out = tmp_path / "out"
    train(settings(here, out, steps=6, checkpoint_every=2))
    for folder in out.glob("checkpoint-*"):  # as a copy may have them
        os.utime(folder / "model.safetensors", (1e9, 1e9))
    train(settings(here, out, steps=5, checkpoint_every=1, keep=2, resume=str(out / "checkpoint-2")))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    train(settings(here, out, steps=8, checkpoint_every=8, resume=str(out / "checkpoint-4")))
    train(settings(here, out, steps=7, checkpoint_every=7, resume=str(out / "checkpoint-5")))
    train(settings(here, out, steps=9, checkpoint_every=9, keep=1, resume="latest"))
    # From step 7: the metrics of step 8 were cut off when the run went on from step 5.
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-9"]


def test_resuming_with_another_accumulation(here, tmp_path):
    """Two forwards of two pairs are one of four, though the count of forwards was odd."""
    for name, change in (("two", dict(batch_size=2, accumulation=2)), ("one", dict(batch_size=4))):
        given = dict(checkpoint_every=3, beta=300.0, adam_epsilon=1e-3)
        train(settings(here, tmp_path / name, steps=3, **given, batch_size=4))
        train(settings(here, tmp_path / name, steps=5, resume="latest", **given, **change))
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in one:
        assert (two[name] - one[name]).norm() <= 1e-5 * one[name].norm() + 1e-9, name


@pytest.mark.heavy
def test_killed_by_a_signal(here, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(here, whole, steps=60))
    run = settings(here, broken, steps=60, checkpoint_every=2, keep=2, resume="latest")
    write_settings(run, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "polydpo_fast", "train", "--config", str(tmp_path / "run.yaml")]
    kills = 0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        reached = 7 * (kills + 1)
        while process.poll() is None and not any(
            int(path.name.split("-")[1]) >= reached for path in broken.glob("checkpoint-*")
        ):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills > 2
    assert equal(weights(whole), weights(broken))


# ----------------------------------------------------------------------------------------------- processes


def test_two_processes_equal_one_with_twice_the_batch(here, tmp_path, unused_tcp_port):
    """On the demo's digits, in Pick-a-Pic's columns, through `accelerate launch`."""
    one, two, digits = tmp_path / "one", tmp_path / "two", tmp_path / "digits.parquet"
    demo.write_pairs(digits, demo.Settings())
    change = dict(data=str(digits), steps=3, beta=500.0, optimizer="adamw", adam_epsilon=1e-3)
    train(settings(here, one, batch_size=4, **change))
    prompts = dict(validation_prompts=["ab", "c", "d"], validation_every=3, validation_steps=1)
    code, said = two_processes(settings(here, two, checkpoint_every=2, **change, **prompts), tmp_path, unused_tcp_port)
    assert code == 0, said
    before = load_file(here / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    alone, together = weights(one), weights(two)
    assert alone.keys() == together.keys()
    for name in alone:
        assert (together[name] - alone[name]).norm() <= 1e-5 * alone[name].norm() + 1e-9, name
    # There is something to compare: what was learned is a hundred times what may differ.
    moved = sum((alone[name] - before[name]).norm() ** 2 for name in alone) ** 0.5
    assert moved > 1e-3 * sum(value.norm() ** 2 for value in before.values()) ** 0.5
    assert lines(two)[0]["loss"] == torch.tensor(math.log(2)).item()
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["implicit_accuracy"] == b["implicit_accuracy"]
    assert len(list((two / "checkpoint-3").glob("random_states_*.pkl"))) == 2
    with Image.open(two / "validation" / "000003.png") as sheet:
        assert sheet.size == (32, 32)
        assert np.asarray(sheet)[16:, 16:].min() == 255  # three pictures, and nothing


@pytest.mark.heavy
def test_two_processes_with_lora_stop_together_and_resume(here, tmp_path, unused_tcp_port):
    one, two = tmp_path / "one", tmp_path / "two"
    change = dict(beta=500.0, adam_epsilon=1e-3, lora_rank=2, accumulation=2, checkpoint_every=2)
    train(settings(here, one, batch_size=4, steps=6, **change))
    for steps in (3, 6):
        run = settings(here, two, steps=steps, resume="latest", **change)
        code, said = two_processes(run, tmp_path, unused_tcp_port)
        assert code == 0, said
    alone, together = (load_file(run / "checkpoint-6" / "adapters.safetensors") for run in (one, two))
    for name in alone:
        assert (together[name] - alone[name]).norm() <= 1e-4 * alone[name].norm() + 1e-7, name


def fsdp2(blocks="ResnetBlock2D"):
    """As `accelerate launch` tells it to processes."""
    return {
        **dict(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="false"),
        **dict(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP=blocks),
        **dict(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="true"),
    }


def sharded(run, folder, port, told):
    """Two processes on CPUs, through Accelerate's FSDP2 or DeepSpeed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(port), str(Path(__file__).with_name("sharded_on_cpus.py")), "train"]
    write_settings(run, folder / "sharded.yaml")
    command = [*launch, "--config", str(folder / "sharded.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **told}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_pictures(folder, steps):
    for step in steps:
        pictures = [Image.open(folder / run / "validation" / f"{step:06d}.png") for run in ("one", "two")]
        one, two = (np.asarray(picture).astype(int) for picture in pictures)
        assert abs(one - two).max() <= 1
        assert one.std() > 1


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "blocks"), [("sd15", "ResnetBlock2D"), ("flux", "FluxTransformerBlock")])
def test_sharded_in_half_precision_the_reference_computes_as_the_policy(tmp_path, unused_tcp_port, family, blocks):
    """FSDP computes in bfloat16 alone, where autocast keeps some layers in float32."""
    model, data = pipelines.save(family, tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    change = dict(model=str(model), data=str(data), mixed_precision="bf16", steps=2, batch_size=1, beta=500.0)
    sharded(settings(tmp_path, tmp_path / "out", **change), tmp_path, unused_tcp_port, fsdp2(blocks))
    first, second = lines(tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["reward_win"], first["reward_lose"]) == (0.0, 0.0)
    assert second["loss"] != first["loss"]


@pytest.mark.parametrize(
    ("kind", "fsdp2", "change", "message"),
    [
        (
            "FSDP",
            False,
            {},
            "all weights are trained under FSDP, .*; expected FSDP's version 2, or mixed_precision 'no'",
        ),
        (
            "DEEPSPEED",
            False,
            {},
            "all weights are trained under DEEPSPEED, whose rounding the reference would not have",
        ),
        (
            "FSDP",
            True,
            dict(reference_errors="x"),
            "reference_errors is 'x'; .* they are rounded otherwise than the po",
        ),
        ("FSDP", True, {}, None),
        ("FSDP", True, dict(ema=0.9, validation_prompts=["x"]), None),
        (
            "FSDP",
            False,
            dict(lora_rank=2),
            "adapters are of another dtype than the rest, and FSDP's version 1 takes one",
        ),
        ("DEEPSPEED", False, dict(lora_rank=2, validation_prompts=["x"]), None),
        ("FSDP", False, dict(loss={"reference_free": True}), None),
        ("MULTI_GPU", False, {}, None),
    ],
)
def test_a_reference_that_would_round_otherwise_is_refused(here, tmp_path, kind, fsdp2, change, message):
    run = settings(here, tmp_path, **change)
    for precision in ("bf16", "no"):
        accelerator = SimpleNamespace(distributed_type=DistributedType[kind], mixed_precision=precision, is_fsdp2=fsdp2)
        refused = message is not None and precision == "bf16"
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            sharding.check_sharding(run, accelerator)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("FSDP", dict(ema=0.9), "ema is 0.9, under FSDP; expected FSDP's version 2, or 0"),
        ("DEEPSPEED", dict(ema=0.9), "ema is 0.9, under DEEPSPEED; expected"),
        ("FSDP", dict(validation_prompts=["x"]), "validation_prompts are given, under FSDP; expected FSDP's version 2"),
        ("FSDP2", dict(optimizer="adamw8bit"), "optimizer is 'adamw8bit', which takes no weights that FSDP2 has shard"),
        ("FSDP2", dict(optimizer="adafactor"), "optimizer is 'adafactor', which takes no weights"),
    ],
)
def test_what_sharding_does_not_allow_is_refused(here, tmp_path, kind, change, message):
    fsdp2 = kind == "FSDP2"
    distributed = DistributedType["FSDP" if fsdp2 else kind]
    accelerator = SimpleNamespace(distributed_type=distributed, mixed_precision="no", is_fsdp2=fsdp2)
    with pytest.raises(ValueError, match=message):
        sharding.check_sharding(settings(here, tmp_path, lora_rank=2, **change), accelerator)


@pytest.mark.heavy
@pytest.mark.parametrize("lora", [0, 2])
def test_sharded_processes_equal_one_with_twice_the_batch(here, tmp_path, unused_tcp_port, lora):
    """Through Accelerate's FSDP2, stopped and resumed in between; averages and pictures too."""
    change = dict(beta=500.0, adam_epsilon=1e-3, learning_rate=1e-4, lora_rank=lora, checkpoint_every=2, ema=0.9)
    change |= dict(validation_prompts=["ab", "c", "d"], validation_every=2, validation_steps=2)
    train(settings(here, tmp_path / "one", batch_size=4, **change))
    for steps in (2, 4):
        run = settings(here, tmp_path / "two", steps=steps, resume="latest", **change)
        sharded(run, tmp_path, unused_tcp_port, fsdp2())
    # It was sharded: a process has its part alone.
    assert len(list((tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert_same_pictures(tmp_path, (2, 4))
    name = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    alone, together = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for key in alone:
        assert (together[key] - alone[key]).norm() <= 1e-4 * alone[key].norm() + 1e-7, key


@pytest.mark.heavy
def test_sharded_and_compiled_there_are_pictures_too(here, tmp_path, unused_tcp_port):
    change = dict(steps=1, learning_rate=1e-9, validation_prompts=["ab", "c", "d"], validation_steps=2)
    train(settings(here, tmp_path / "one", **change))
    compiled = {**fsdp2(), "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    sharded(settings(here, tmp_path / "two", **change), tmp_path, unused_tcp_port, compiled)
    assert_same_pictures(tmp_path, (1,))


@pytest.mark.heavy
@pytest.mark.parametrize(("stage", "lora"), [("2", 0), ("2", 2), ("3", 0), ("3", 2)])
def test_deepspeed_equals_one_process_with_twice_the_batch(here, tmp_path, unused_tcp_port, stage, lora):
    """It clips where the settings say so, and tells the norm."""
    pytest.importorskip("deepspeed")
    change = dict(beta=500.0, adam_epsilon=1e-3, learning_rate=1e-3, lora_rank=lora, accumulation=2)
    change |= dict(max_grad_norm=0.01, checkpoint_every=2, schedule="constant_with_warmup", warmup=1)
    change |= dict(validation_prompts=["ab", "c", "d"], validation_every=2, validation_steps=2)
    train(settings(here, tmp_path / "one", batch_size=4, **change))
    told = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=stage, DS_ACCELERATOR="cpu")
    told["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"
    for steps in (2, 4):
        run = settings(here, tmp_path / "two", steps=steps, resume="latest", **change)
        sharded(run, tmp_path, unused_tcp_port, told)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert_same_pictures(tmp_path, (2, 4))
    name = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    alone, together = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for key in alone:
        assert (together[key] - alone[key]).norm() <= 1e-4 * alone[key].norm() + 1e-7, key


def test_what_fsdp_and_deepspeed_are_told(here, tmp_path):
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    run = settings(here, tmp_path, batch_size=3, accumulation=2, max_grad_norm=0.5)
    for kind in (MixedPrecision, MixedPrecisionPolicy):
        plugin = SimpleNamespace(mixed_precision_policy=kind(torch.bfloat16, torch.bfloat16))
        sharding.set_sharding(run, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}})
    sharding.set_sharding(run, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert plugin.deepspeed_config == {
        **dict(train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2, gradient_clipping=0.5),
        "zero_optimization": {"stage": 2},
    }


# ------------------------------------------------------------------------------------------------ bad input


def poisoned(monkeypatch, keys, at=math.nan):
    """The prompts of these pairs are encoded as NaN."""
    condition, seen = inputs.conditioning, []

    def spoil(family, text, batch, *sizes):
        result = condition(family, text, batch, *sizes)
        seen.append(batch.keys)
        for row, key in enumerate(batch.keys):
            if key in keys:
                result["encoder_hidden_states"][row] = at
        return result

    monkeypatch.setattr(inputs, "conditioning", spoil)
    return seen


def test_a_loss_that_is_not_finite_stops_and_names_its_pairs(here, tmp_path, monkeypatch):
    order = [batch.keys for batch in PairLoader(here / "pairs.parquet", 4, size=16)]
    bad = {order[1][2], order[2][0]}
    poisoned(monkeypatch, bad)
    out = tmp_path / "out"
    run = settings(here, out, batch_size=4, steps=4, log_every=100, checkpoint_every=4)
    with pytest.raises(NotFiniteError) as caught:
        train(run)
    # Only the first step's: afterwards the weights are spoiled too. What is spoiled is not written.
    assert (caught.value.step, caught.value.keys) == (2, (order[1][2],))
    assert "diverged" not in str(caught.value)
    assert not list(out.glob("*checkpoint*"))
    assert not (out / "unet").exists()

    write_settings(settings(here, tmp_path / "again", batch_size=4, log_every=1), tmp_path / "run.yaml")
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 1
    assert f"the loss is not finite at step 2, of the pairs {order[1][2]}" in result.output
    assert [line["step"] for line in lines(tmp_path / "again")] == [1]


def of_three(**change):
    """What a journal asks of Accelerate, in the first of three processes, of which the others have twice and thrice."""
    given = dict(is_main_process=True, mixed_precision="no", num_processes=3, log=lambda values, step: None)
    return SimpleNamespace(**{**given, "gather": lambda row: torch.cat((row, 2 * row, 3 * row)), **change})


def test_metrics_are_those_of_all_processes(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(journal.time, "perf_counter", lambda: next(clock))
    ours = journal.Journal(of_three(), tmp_path / "metrics.jsonl", 0)
    for value in (1.0, 3.0):
        ours.add(7, ["a", "b"], torch.tensor([value, value + 1]), {"implicit_accuracy": torch.tensor(value / 10)})
    ours.write(2, 1e-3)
    ours.add(8, ["a", "b"], torch.tensor([0.0, 1.0]), {"implicit_accuracy": torch.tensor(0.5)})
    ours.write(2, 1e-4)
    first, second = lines(tmp_path)
    assert (first["loss"], first["implicit_accuracy"]) == pytest.approx((2 * 2.5, 2 * 0.2))
    assert (first["step"], first["steps"], first["epoch"], first["learning_rate"]) == (7, 1, 2, 1e-3)
    assert (second["loss"], second["step"], second["learning_rate"]) == (1.0, 8, 1e-4)
    assert (first["pairs_per_s"], second["pairs_per_s"]) == (3 * 4 / 2, 3 * 2 / 8)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(4, "loss", ["c"], False)], "the loss is not finite at step 4, of the pairs c$"),
        ([(5, "gradient", ["c"], False)], "the loss is not finite at step 5, of the pairs b$"),
        ([(5, "loss", ["c"], True)], "the loss is not finite at step 5, of the pairs b, c$"),
        ([(6, "loss", ["c"], True)], "the loss is not finite at step 5, of the pairs b$"),
    ],
)
def test_the_first_step_of_any_process_that_is_not_finite_is_named(tmp_path, monkeypatch, others, message):
    """A loss explains the gradients, which are not finite in all processes then."""
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda found: [*found, *others])
    ours = journal.Journal(of_three(), tmp_path / "metrics.jsonl", 0)
    ours.add(5, ["a", "b"], torch.tensor([1.0, math.nan]), {"implicit_accuracy": torch.tensor(0.5)})
    with pytest.raises(NotFiniteError, match=message):
        ours.write(0, 1e-3)


def test_a_loss_of_another_process_that_is_not_finite_stops_this_one_too(tmp_path, monkeypatch):
    """Else it would wait for the other one for ever."""
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda found: [*found, (5, "loss", ["c"], False)])
    bad = torch.tensor([math.nan, 0.5, 1.0])  # loss, accuracy, and that there is something
    ours = journal.Journal(of_three(gather=lambda row: torch.stack((row[0], bad))), tmp_path / "metrics.jsonl", 0)
    ours.add(5, ["a", "b"], torch.tensor([1.0, 2.0]), {"implicit_accuracy": torch.tensor(0.5)})
    with pytest.raises(NotFiniteError, match=r"the loss is not finite at step 5, of the pairs c$"):
        ours.write(0, 1e-3)


def test_weights_that_have_diverged_are_said_to_have(here, tmp_path):
    with pytest.raises(NotFiniteError, match="all of the batch: the weights may have diverged before"):
        train(settings(here, tmp_path / "out", learning_rate=1e30))


@pytest.mark.parametrize(("steps", "norm", "precision"), [(4, 1.0, "no"), (2, 0.0, "bf16")])
def test_a_gradient_that_is_not_finite_stops_too(here, tmp_path, monkeypatch, steps, norm, precision):
    """Of finite losses, also in the last step, and without clipping: before anything of it is written."""
    order = [batch.keys for batch in PairLoader(here / "pairs.parquet", 2, size=16)]
    forwards, make = [], training.objective_of

    def spoiled(model, *inputs):
        result = predict(model, *inputs)
        if result.requires_grad:
            forwards.append(1)
            if len(forwards) == 3:  # the first of the second step
                result.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(training, "objective_of", lambda *given, **more: make(*given, **more, forward=spoiled))
    out = tmp_path / "out"
    run = dict(accumulation=2, steps=steps, log_every=100, max_grad_norm=norm, checkpoint_every=steps)
    run["mixed_precision"] = precision
    with pytest.raises(
        NotFiniteError, match="the gradient is not finite at step 2, though the losses are, of the"
    ) as e:
        train(settings(here, out, **run))
    assert (e.value.step, e.value.keys) == (2, (*order[2], *order[3]))
    assert not list(out.glob("*checkpoint*"))
    assert not (out / "unet").exists()


def test_accumulation_of_the_environment_is_named(here, tmp_path, monkeypatch):
    """Accelerate takes it before the argument, without a word; the loop counts with the settings'."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(
        ValueError, match=r"accumulation is 1, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS .* makes it 4"
    ):
        train(settings(here, tmp_path / "out"))
    train(settings(here, tmp_path / "out", steps=1, accumulation=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=0), "batch_size is 0; expected 1 or more"),
        (dict(batch_size=2.5), "batch_size is 2.5; expected int"),
        (dict(batch_size=True), "batch_size is True; expected int"),
        (dict(learning_rate="fast"), "learning_rate is 'fast'; expected float"),
        (dict(learning_rate=math.inf), "learning_rate is inf; expected 0 or more"),
        (dict(learning_rate=math.nan), "learning_rate is nan; expected 0 or more"),
        (dict(ema=1.5), "ema is 1.5; expected 0 to 1"),
        (dict(optimizer="sgd"), "optimizer is 'sgd'; expected 'adamw', 'adamw8bit', 'paged_adamw8bit', 'adafactor'"),
        (dict(size_conditioning="image"), "size_conditioning is 'image'; expected 'fixed', 'own'"),
        (dict(size=[16]), r"size is \[16\]; expected a side, or \[height, width\]"),
        (dict(size="big"), "size is 'big'; expected int | list"),
        (dict(velocity=3), "velocity: no setting; expected accumulation, "),
        (dict(data=None), "data not given; expected --data, or data: in the file of --config"),
        (dict(loader={"seed": 1}), "loader has seed; expected as settings of their own"),
        (dict(loss={"beta": 1}), "loss has beta; expected as settings of their own"),
        (dict(loader=[1]), r"loader is \[1\]; expected names and values, such as \{name: value\}"),
        (dict(trackers="wandb"), "trackers is 'wandb'; expected list"),
        (dict(objective="ppo"), "objective is 'ppo'; expected one of 'poly_dpo', "),
        (dict(beta=-1), "beta is -1.0; expected a finite number > 0"),
        (dict(loss={"label_smoothing": 0.5}), "label_smoothing is 0.5; expected a number from 0 to below 0.5"),
        (
            dict(warmup=2, schedule="constant"),
            "warmup is 2, which has no effect with schedule 'constant'",
        ),
        (dict(warmup=4), "warmup is 4 and steps 4, so that the learning rate would never be reached"),
        (
            dict(cycles=2),
            "cycles is 2, which has no effect with schedule 'constant_with_warmup'",
        ),
        (
            dict(power=2.0, schedule="linear"),
            "power is 2.0, which has no effect with schedule 'linear'; expected",
        ),
        (dict(adam_epsilon=1e-3, optimizer="adafactor"), "adam_epsilon is 0.001, which has no effect with optimizer"),
        (
            dict(lora_targets=["to_q"]),
            r"lora_targets is \['to_q'\], which has no effect with lora_rank 0",
        ),
        (dict(lora_alpha=4.0), "lora_alpha is 4.0, which has no effect with lora_rank 0"),
        (dict(validation_every=2), "validation_every is 2, which has no effect without validation_prompts"),
        (dict(keep=2), "keep is 2, which has no effect with checkpoint_every 0"),
    ],
)
def test_bad_settings_are_named(here, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(here, tmp_path, **change)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        ("batch_size accumulation steps vae_batch log_every validation_steps cycles", 0),
        ("lora_rank warmup checkpoint_every keep validation_every seed", -1),
        ("learning_rate weight_decay max_grad_norm adam_epsilon power guidance", -1.0),
        ("learning_rate weight_decay max_grad_norm adam_epsilon power guidance lora_alpha", math.inf),
        ("ema prompt_dropout adam_beta1 adam_beta2", 1.5),
        ("ema prompt_dropout adam_beta1 adam_beta2", -0.5),
    ],
)
def test_numbers_out_of_range_are_named(here, tmp_path, names, value):
    for name in names.split():
        with pytest.raises(ValueError, match=f"^{name} is {value}; expected "):
            settings(here, tmp_path, **{name: value})


def test_what_the_training_gives_is_no_option(here, tmp_path):
    """It would be given twice, or change pixels behind the models' backs."""
    of_loader = "source batch_size seed rank world_size prompt_dropout device size dtype last layout mean std"
    of_loss = "scheduler reference forward alpha beta objective reduction"
    for part, names in (("loader", of_loader), ("loss", of_loss)):
        for name in names.split():
            with pytest.raises(ValueError, match=f"^{part} has {name}; expected as settings of their own"):
                settings(here, tmp_path, **{part: {name: 1}})


def test_bad_names_of_the_loss_are_named(here, tmp_path):
    for name in ("denisty", "mask"):
        with pytest.raises(TypeError, match=f"{name}: no argument of PairObjective; expected "):
            settings(here, tmp_path, loss={name: 1})


@pytest.mark.parametrize(
    ("data", "message"), [("nope.jsonl", "nope.jsonl"), (["a", "b"], r"data is \[.*expected one folder of latents")]
)
def test_the_data_are_opened_before_the_model(here, tmp_path, monkeypatch, data, message):
    """Which may have to be downloaded."""
    monkeypatch.setattr(setup, "family_of", None)
    monkeypatch.chdir(tmp_path)
    for store in ("a", "b"):
        (tmp_path / store).mkdir()
        (tmp_path / store / "store.json").write_text("{}")
    with pytest.raises((OSError, ValueError), match=message):
        train(settings(here, tmp_path / "out", data=data))


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "\t- x", "!!python/object/apply:os.getcwd []"])
def test_bad_yaml_is_named(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.yaml'} is ")):
        read_settings(tmp_path / "x.yaml")


def test_settings_survive_yaml(tmp_path):
    one = Settings(
        model="m", data=["a", "b"], alpha=[1.0, 2.0], size=[480, 832], learning_rate=1e-9, loader={"frames": 5}
    )
    write_settings(one, tmp_path / "x.yaml")
    assert read_settings(tmp_path / "x.yaml") == one
    (tmp_path / "y.yaml").write_text("model: m\ndata: d\nlearning_rate: 1e-8\nbeta: 2000\n")
    assert read_settings(tmp_path / "y.yaml", beta=3.0).learning_rate == 1e-8
    assert read_settings(tmp_path / "y.yaml", beta=3.0).beta == 3.0


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_published_settings_are_settings(file):
    """And say where each value comes from."""
    assert read_settings(file).steps > 0
    for line in file.read_text().splitlines():
        assert line.startswith(("#", "model:", "loader:", "loss:")) or "  # " in line, line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size=15), "size is 15 x 15; expected multiples of 2"),
        (dict(loader={"frames": 5}), "loader has frames=5; StableDiffusionPipeline takes images"),
        (dict(data="/nowhere/*.parquet"), "/nowhere"),
        (
            dict(batch_size=17),
            "batch_size is 17, in each of 1 processes, and data has only 16 pairs; expected a smaller",
        ),
        (dict(data_options={"sheet": 1}), "sheet: no option of ParquetPairs"),
        (dict(loader={"pixels": 1}), "pixels: no argument of PairLoader"),
        (dict(loss={"timestep_weight": 5}), "timestep_weight is 5; expected a name"),
        (dict(loss={"timestep_weight": "snr"}), "timestep_weight is 'snr'; with a DDPMScheduler expected 'min_snr'"),
        (dict(size_conditioning="own"), "size_conditioning is 'own', and a StableDiffusionPipeline is told no sizes"),
        (dict(guidance=2.0), "guidance is 2.0, and this UNet2DConditionModel has no guidance embedding"),
        (dict(scheduler={"shfit": 1}), "scheduler has shfit; a DDIMScheduler knows beta_end, "),
        (dict(scheduler={"_class_name": "AutoencoderKL"}), "scheduler has _class_name 'AutoencoderKL'"),
        (dict(optimizer="adamw8bit"), "needs bitsandbytes: pip install bitsandbytes"),
        (dict(trackers=["wandb"]), "trackers has 'wandb', which is not installed: pip install wandb"),
        (dict(trackers=["wandbb"]), "trackers has 'wandbb'; expected some of .*tensorboard.*wandb"),
        (dict(lora_rank=2, lora_targets=["to_q", "o_k"]), "lora_targets has 'o_k', and no layer of the UNet2DCond"),
        (dict(mixed_precision="fp16"), "mixed_precision is 'fp16', which Accelerate has on GPUs only"),
    ],
)
def test_what_does_not_fit_is_said_by_the_command(here, tmp_path, monkeypatch, change, message):
    for package in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    write_settings(settings(here, tmp_path / "out", **change), tmp_path / "run.yaml")
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["train"], ["cache", "out"], ["reference", "out"]], ids=lambda words: words[0])
def test_what_can_be_known_before_it_is_said_before_the_model_is_loaded(here, tmp_path, monkeypatch, command):
    def loaded(*arguments, **options):
        raise AssertionError("the model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "load_pipeline", loaded)
    monkeypatch.setattr(setup, "family_of", loaded)  # of a hub's model a download
    (tmp_path / "file").write_text("")
    there = command[1:] and [f"file/{command[1]}"]
    for change, words, message in (
        (dict(loader={"crops": "center"}), command[1:], "crops: no argument of PairLoader"),
        (dict(loader={"crop": "middle"}), command[1:], "crop is 'middle'; expected"),
        (dict(batch_size=99), command[1:], "batch_size is 99, in each of 1 processes, and data has only 16 pairs"),
        (dict(output="file/run"), there, f"{'out' if there else 'output'} is 'file/"),
    ):
        write_settings(settings(here, change.pop("output", "run"), **change), tmp_path / "run.yaml")
        result = CliRunner().invoke(app, [command[0], *words, "--config", "run.yaml"])
        assert result.exit_code == 2, result.output
        assert result.output.splitlines()[-1].startswith(message), result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(loss={"density": "logitnormal"}), "density is 'logitnormal'; expected 'uniform', "),
        (dict(loss={"timestep_weight": "cosmap"}), "timestep_weight is 'cosmap'; with a DDPMScheduler"),
        (dict(scheduler={"shift": 3.0}), "scheduler has shift; a DDIMScheduler knows "),
        (dict(scheduler={"prediction_type": "flow_prediction"}), "that predicts 'flow_prediction'; expected 'epsilon'"),
        (dict(optimizer="adamw8bit"), "optimizer is 'adamw8bit', which needs bitsandbytes"),
    ],
)
def test_what_the_scheduler_alone_can_tell_is_said_before_the_model_is_loaded(
    here, tmp_path, monkeypatch, change, message
):
    def loaded(*arguments, **options):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(setup, "load_pipeline", loaded)
    for package in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((ValueError, ImportError), match=message):
        train(settings(here, tmp_path / "run", **change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a\n", "run.yaml is not YAML: line 2, column 1: expected ',' or ']'"),
        ("modle: m\ndata: d\n", "modle: no setting; expected model\n"),
        ("model: m\ndata: d\nlora-rank: 8\n", "lora-rank: no setting; expected lora_rank\n"),
        ("resolution: 512\nlr: 1e-5\nrnak: 2\n", "lr, resolution, rnak: no setting; expected learning_rate, size\n"),
        ("dataset_name: d\n", "dataset_name: no setting; expected data\n"),
        ("resolution: 512\ncrop: random\n", "crop, resolution: no setting; expected loader: {crop: ...}, size\n"),
        ("model: m\ndata: d\nloader: center\n", "loader is 'center'; expected names and values"),
        ("just text", "run.yaml is a str; expected names and values"),
    ],
)
def test_a_wrong_file_of_settings_is_told_in_a_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["train", "--config", "run.yaml"])
    assert result.exit_code == 2
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--resolution", "1024"], "--resolution: no option; expected --size"),
        (["train", "--max_train_steps=3"], "--max_train_steps: no option; expected --steps"),
        (["train", "--seed", "1", "--batch_size", "2"], "--batch_size: no option; expected --batch-size"),
        (["train", "--use_8bit_adam"], "--use_8bit_adam: no option; expected --optimizer adamw8bit"),
        (["train", "--random_crop"], "--random_crop: no option; expected --set 'loader={crop: random}'"),
        (["train", "--hflip", "0.5"], "--hflip: no option; expected --set 'loader={hflip: ...}'"),
        (["train", "--prompt-dropout", "0.2"], "--prompt-dropout: no option; expected --set 'prompt_dropout=...'"),
        (["cache", "out", "--train_batch_size", "2"], "--train_batch_size: no option; expected --batch-size"),
        (["reference", "out", "--alpha", "2"], "--alpha: no option; expected --set 'alpha=...'"),
    ],
)
def test_an_option_of_diffusers_scripts_or_of_a_setting_leads_to_ours(words, expected):
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output) == (2, f"{expected}\n")
    assert "No such option: --nonsense" in CliRunner().invoke(app, [words[0], "--nonsense"]).output


@pytest.mark.parametrize("command", [["train"], ["cache", "out"], ["reference", "out"]], ids=lambda words: words[0])
def test_a_loader_that_gives_up_is_said_in_a_line(here, tmp_path, monkeypatch, command):
    """With another status than wrong settings, and no traceback."""
    monkeypatch.chdir(tmp_path)
    rows = [{"jpg_0": b"none", "jpg_1": b"none", "label_0": 1.0, "caption": "x"}] * 16
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    given = settings(here, tmp_path / "run", data=str(tmp_path / "bad.parquet"), latents="mode")
    write_settings(given, tmp_path / "run.yaml")

    def refused(message):
        result = CliRunner().invoke(app, [*command, "--config", str(tmp_path / "run.yaml")])
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1, result.output
        assert re.search(message, result.output, re.MULTILINE), result.output

    if command == ["train"]:
        refused(r"^all 16 pairs of the source failed; the first was ")
        return
    refused(r"^16 of 16 pairs of out could not be read or decoded; ")

    def hang(*arguments):
        raise LoaderError("all 16 pairs hang")

    monkeypatch.setattr(Shards, "fill", hang)
    refused(r"^all 16 pairs hang$")


@pytest.mark.parametrize("command", ["train", "geneval"])
def test_a_lack_of_memory_is_told_with_what_helps(here, tmp_path, monkeypatch, command):
    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(training, "train", too_large)
    monkeypatch.setattr("polydpo_fast.diffusion.geneval.render", too_large)
    prompts = write_prompts(tmp_path / "p.jsonl", "a dog")
    words = {"train": ["--model", "m", "--data", "d"], "geneval": ["m", prompts, str(tmp_path / "out")]}[command]
    result = CliRunner().invoke(app, [command, *words])
    assert result.exit_code == 1
    assert re.search(r"^CUDA out of memory. .* Less is taken by .*--batch-size", result.output, re.MULTILINE)


@pytest.mark.parametrize("command", ["cache", "reference"])
def test_stores_tell_of_pairs_that_are_not_in_them(here, tmp_path, command):
    rows = pq.read_table(here / "pairs.parquet").to_pylist()
    rows[3]["jpg_1"] = rows[5]["jpg_0"] = b"none"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    given = settings(here, tmp_path / "run", data=str(tmp_path / "some.parquet"), latents="mode")
    write_settings(given, tmp_path / "run.yaml")
    result = CliRunner().invoke(app, [command, str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    assert f"2 of 16 pairs of {tmp_path / 'out'} could not be read or decoded: a training has others" in result.output


# -------------------------------------------------------------------------------------------------- GenEval


def write_prompts(file, *prompts):
    file.write_text("".join(json.dumps({"tag": "single_object", "include": [], "prompt": p}) + "\n" for p in prompts))
    return str(file)


def test_geneval_folders(here, tmp_path):
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", "a photo of a bench", "a dog"), tmp_path / "images"
    arguments = ["geneval", str(here / "pipeline"), prompts, str(out), "--samples", "2", "--steps", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    numbers = ("00000", "00001")
    of_each = ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    assert files == [*sorted(f"{number}/{file}" for number in numbers for file in of_each), "rendering.json"]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text())["prompt"] == "a dog"
    before = {file: (out / file).read_bytes() for file in files}
    assert len({before[file] for file in files if file.endswith("png")}) == 4
    with Image.open(out / files[1]) as image:
        assert image.size == (16, 16)
    # It goes on where it stopped, and makes the same.
    (out / "00001" / "samples" / "00000.png").unlink()
    (out / "00000" / "samples" / "00000.png").write_bytes(b"kept")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    after = {file: (out / file).read_bytes() for file in files}
    assert after == {**before, "00000/samples/00000.png": b"kept"}
    # Another file of prompts does not fit this folder.
    other = write_prompts(tmp_path / "other.jsonl", "a photo of a bench", "a cat")
    result = CliRunner().invoke(app, [*arguments[:2], other, *arguments[3:]])
    assert result.exit_code == 2
    assert "is of 'a dog'; expected 'a cat', or another folder" in result.output
    # Nor does anything that would make other pictures.
    model = pipelines.save("sd15", tmp_path / "other", seed=1)
    for change, message in (
        (["--steps", "3"], f"steps is 3; {out} was rendered with 2: expected another folder"),
        (["--seed", "7"], "seed is 7; "),
        (["--guidance", "2"], f"guidance is 2.0; {out} was rendered with None"),
        (["--size", "32"], f"size is [32, 32]; {out} was rendered with [16, 16]"),
    ):
        result = CliRunner().invoke(app, [*arguments, *change])
        assert result.exit_code == 2
        assert message in result.output
    result = CliRunner().invoke(app, ["geneval", str(model), *arguments[2:]])
    assert "vae is 'AutoencoderKL:" in result.output
    result = CliRunner().invoke(app, [*arguments, "--dtype", "bfloat16"])
    assert f"dtype is 'bfloat16'; {out} was rendered with 'float32'" in result.output
    result = CliRunner().invoke(app, [*arguments, "--dtype", "int8"])
    assert "--dtype is 'int8'; expected float32, bfloat16 or float16" in result.output
    # The same pipeline in another place is the same.
    shutil.copytree(here / "pipeline", tmp_path / "moved")
    result = CliRunner().invoke(app, ["geneval", str(tmp_path / "moved"), *arguments[2:]])
    assert result.exit_code == 0, result.output
    assert {file: (out / file).read_bytes() for file in files} == after
    assert CliRunner().invoke(app, [*arguments, "--samples", "3"]).exit_code == 0
    assert len(list(out.rglob("*.png"))) == 6
    # Several at once, of more than one prompt, are the same but for rounding.
    result = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "batched"), *arguments[4:], "--batch-size", "3"])
    assert result.exit_code == 0, result.output
    for file in (file for file in files if file.endswith("png")):
        found = np.asarray(Image.open(tmp_path / "batched" / file), dtype=int)
        assert np.abs(found - np.asarray(Image.open(io.BytesIO(before[file])), dtype=int)).max() <= 1


def test_geneval_renders_what_it_was_told(here, tmp_path, monkeypatch):
    """Each image's noise by its prompt's number and its own, and with the settings that it says."""
    asked = []

    def sample(pipe, family, prompts, **options):
        asked.append((prompts, options))
        return torch.zeros(len(prompts), 3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(geneval, "sample", sample)
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", "a dog", "a cat"), tmp_path / "out"
    told = dict(size=(16, 24), steps=3, guidance=2.5)
    geneval.render(str(here / "pipeline"), prompts, out, samples=2, batch_size=3, seed=9, **told)
    assert [prompts for prompts, _ in asked] == [["a dog", "a dog", "a cat"], ["a cat"]]
    assert asked[0][1] == {**told, "seeds": [chained(9, 0, 0), chained(9, 0, 1), chained(9, 1, 0)]}
    assert asked[1][1] == {**told, "seeds": [chained(9, 1, 1)]}
    # The second of two processes has the second prompt.
    two = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"), wait_for_everyone=lambda: None)
    monkeypatch.setattr(geneval, "new_accelerator", lambda: two)
    geneval.render(str(here / "pipeline"), prompts, tmp_path / "two", samples=2, batch_size=3, seed=9, **told)
    assert asked[2:] == [(["a cat"] * 2, {**told, "seeds": [chained(9, 1, 0), chained(9, 1, 1)]})]
    # What is not written is not compared: pictures of something else would be taken for these.
    of_model = {"weights", "vae", "scheduler", "text_encoder", "tokenizer"}
    of_pictures = {"seed", "steps", "guidance", "size", "dtype"}
    assert set(json.loads((out / "rendering.json").read_text())) == {"model", "result"} | of_model | of_pictures


def test_pictures_of_a_training_have_the_same_noise_each_time(here, tmp_path, monkeypatch):
    asked, sheets = [], []

    def sample(pipe, family, prompts, **options):
        asked.append((prompts, options))
        return torch.full((1, 3, 2, 2), 50 * len(asked[-1][0][0]), dtype=torch.uint8)

    monkeypatch.setattr(validation, "sample", sample)
    # Of several processes, whose pictures come process by process.
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda rows: [*rows[1:], rows[0]])
    run = settings(here, tmp_path, validation_prompts=["a", "ab", "abc"], validation_steps=7, seed=6)
    family = FAMILIES["StableDiffusionPipeline"]
    for step in (2, 4):
        validation.render(Accelerator(cpu=True), None, family, run, (2, 2), tmp_path, step)
        with Image.open(tmp_path / f"{step:06d}.png") as sheet:
            sheets.append(np.asarray(sheet)[::2, ::2, 0].tolist())
    assert asked[:3] == asked[3:]
    for number, (prompts, options) in enumerate(asked[:3]):
        assert prompts == [run.validation_prompts[number]]
        assert (options["seeds"], options["steps"], options["size"]) == ([chained(6, number)], 7, (2, 2))
    assert sheets == [[[50, 100], [150, 255]]] * 2


def test_pictures_of_clips_are_of_the_whole_clip(here, tmp_path, monkeypatch):
    """Four frames of each, the first and the last among them, in a row."""
    clip = torch.arange(13, dtype=torch.uint8).view(1, 1, 13, 1, 1).expand(1, 3, 13, 2, 2)
    monkeypatch.setattr(validation, "sample", lambda *arguments, **options: clip)
    run, family = settings(here, tmp_path, validation_prompts=["a", "b"]), FAMILIES["WanPipeline"]
    validation.render(Accelerator(cpu=True), None, family, run, (2, 2), tmp_path, 1)
    with Image.open(tmp_path / "000001.png") as sheet:
        assert np.asarray(sheet)[::2, ::2, 0].tolist() == [[0, 4, 8, 12]] * 2


def test_the_scorer_does_not_see_a_picture_that_is_not_whole(here, tmp_path, monkeypatch):
    """GenEval's evaluate_images.py takes what matches its expression, of which the end is open."""

    def broken(self, file, kind):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", broken)
        prompts = write_prompts(tmp_path / "prompts.jsonl", "a dog")
        arguments = [str(here / "pipeline"), prompts, str(tmp_path / "out"), "--samples", "1", "--steps", "1"]
        assert CliRunner().invoke(app, ["geneval", *arguments]).exit_code == 2
    files = [path.name for path in (tmp_path / "out" / "00000" / "samples").iterdir()]
    assert len(files) == 1
    assert not any(re.match(r"\d+\.png", name) for name in files)
    assert CliRunner().invoke(app, ["geneval", *arguments]).exit_code == 0
    assert [path.name for path in (tmp_path / "out" / "00000" / "samples").iterdir()] == ["00000.png"]


@pytest.mark.parametrize("lora", [0, 2])
def test_geneval_of_what_was_trained(here, tmp_path, lora):
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a dog")
    train(settings(here, tmp_path / "result", steps=2, learning_rate=0.05, lora_rank=lora))
    images = []
    for name, options in (("base", []), ("trained", ["--result", str(tmp_path / "result")])):
        arguments = [str(here / "pipeline"), prompts, str(tmp_path / name), "--samples", "1", "--steps", "2", *options]
        result = CliRunner().invoke(app, ["geneval", *arguments])
        assert result.exit_code == 0, result.output
        images.append((tmp_path / name / "00000" / "samples" / "00000.png").read_bytes())
    assert images[0] != images[1]
    # A result that is trained anew is another one.
    shutil.rmtree(tmp_path / "result")
    train(settings(here, tmp_path / "result", steps=1, learning_rate=0.05, lora_rank=lora))
    result = CliRunner().invoke(app, ["geneval", *arguments])
    assert result.exit_code == 2
    assert "weights is 'UNet2DConditionModel:" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ("{}\n", ":1: prompt is None; expected text"),
        ('\n{"prompt": 3}', ":2: prompt is 3"),
        ("x", ":1: "),
    ],
)
def test_bad_prompt_files_are_named(here, tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    result = CliRunner().invoke(
        app, ["geneval", str(here / "pipeline"), str(tmp_path / "p.jsonl"), str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------- what is not installed


_FOR_ALL = ("diffusers", "accelerate", "transformers", "safetensors")


@pytest.mark.parametrize(
    ("command", "package"),
    [
        *((command, package) for command in ("train", "cache", "reference") for package in (*_FOR_ALL, "peft", "yaml")),
        *(("geneval", package) for package in _FOR_ALL),
    ],
)
def test_missing_packages_name_the_extra(here, tmp_path, monkeypatch, package, command):
    for name in [*sys.modules]:
        if name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    given = ["--model", str(here / "pipeline"), "--data", str(here / "pairs.parquet"), "--set", "lora_rank=2"]
    arguments = {
        "train": given,
        "cache": [str(tmp_path / "out"), *given],
        "reference": [str(tmp_path / "out"), *given],
        "geneval": [str(here / "pipeline"), write_prompts(tmp_path / "p.jsonl", "a dog"), str(tmp_path / "out")],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert f"needs {package}: pip install 'polydpo-fast[train]'" in result.output
