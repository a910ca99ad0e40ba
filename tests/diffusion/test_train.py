"""`polydpo-fast train` on whole pipelines with tiny random weights: what it learns, and the result."""

import json
import math
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusion import pipelines
from diffusion.runs import equal, lines, settings, weights, write_prompts
from PIL import Image
from safetensors.torch import load_file
from splitmix import chained
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.data import PairLoader
from polydpo_fast.diffusion import draw_noise, draw_timesteps, frozen_copy, inputs, policy, result, setup
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.families import FAMILIES, LORA_FILE
from polydpo_fast.diffusion.pipelines import load_pipeline
from polydpo_fast.diffusion.precompute import reference
from polydpo_fast.diffusion.result import load_result
from polydpo_fast.diffusion.settings_file import read_settings
from polydpo_fast.diffusion.train import train
from polydpo_fast.splitmix import mix

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


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
    change = {} if family == "sdxl" else dict(beta=500.0)
    if family == "wan":
        data = pipelines.write_clips(tmp_path / "clips", 2, 5)
        change.update(size=[16, 32], loader={"frames": 5}, batch_size=1)
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
    run = settings(here, tmp_path, size=[16, 24], seed=2**40 + 7)
    begun = setup.set_up(run, setup.accelerator_of(run))
    assert begun.size == (16, 24)
    assert torch.initial_seed() == 7
    given = settings(here, tmp_path, size=[16, 24], loader={"hflip": 1.0})
    batch = next(iter(inputs.Inputs(given, begun).loader))
    assert batch.pixels.shape == (4, 3, 16, 24)
    assert batch.flipped.all()


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

    save = result.save_lora
    monkeypatch.setattr(result, "save_lora", keep)
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

    monkeypatch.setattr(policy, "frozen_copy", other)
    with pytest.warns(UserWarning, match="before the first step the implicit rewards are .*; expected 0"):
        train(settings(here, tmp_path / "out", steps=1))


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
    reference(settings(tmp_path, tmp_path, guidance=1.0, **given), tmp_path / "errors")  # which need no beta
    with pytest.raises(ValueError, match="beta is not given, and none was published for models that flow matching"):
        train(settings(tmp_path, tmp_path / "beta", **given))
    given["beta"], losses = 1000.0, {}
    for guidance in (None, 3.5, 1.0):
        out = tmp_path / f"{guidance}"
        train(settings(tmp_path, out, guidance=guidance, **given))
        losses[guidance] = lines(out)[0]["model_mse_win"]
    assert losses[None] == losses[3.5] != losses[1.0]
    stored = dict(given, reference_errors=str(tmp_path / "errors"))
    train(settings(tmp_path, tmp_path / "stored", guidance=1.0, **stored))
    with pytest.raises(ValueError, match=r"another guidance: in the store it is 1\.0, here it is 3\.5"):
        train(settings(tmp_path, tmp_path / "other", **stored))
    shift = dict(given, scheduler={"shift": 1.5})
    with pytest.raises(ValueError, match=r"scheduler has shift=1\.5, which does nothing where use_dynamic_shifting"):
        train(settings(tmp_path, tmp_path / "shifted", **shift))
    shift["scheduler"]["use_dynamic_shifting"] = False
    train(settings(tmp_path, tmp_path / "shifted", **shift))


def test_a_model_is_made_trainable_as_it_was_told(here, tmp_path):
    """LoRA's first weights need not be there any more where there is a checkpoint."""
    family, nowhere = FAMILIES["StableDiffusionPipeline"], str(tmp_path / "nowhere")
    for checkpointing in (False, True):
        model = UNet2DConditionModel.from_pretrained(here / "pipeline", subfolder="unet")
        run = settings(here, tmp_path, gradient_checkpointing=checkpointing, lora_rank=2, lora_weights=nowhere)
        policy.make_trainable(model, family, run, has_checkpoint=True)
        assert model.is_gradient_checkpointing == checkpointing
    free = settings(here, tmp_path, loss={"reference_free": True})
    assert policy.reference_of(model, free, None) is None


@pytest.mark.parametrize("change", [{}, dict(lora_rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(here, tmp_path, change):
    for name, checkpointing in (("with", True), ("without", False)):
        run = settings(here, tmp_path / name, gradient_checkpointing=checkpointing, checkpoint_every=4, **change)
        train(run)
    file = "checkpoint-4/" + ("adapters.safetensors" if change else "model.safetensors")
    assert equal(load_file(tmp_path / "with" / file), load_file(tmp_path / "without" / file))
