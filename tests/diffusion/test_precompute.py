"""`polydpo-fast cache` and `reference`: trainings from their folders, against trainings from the images."""

import gc
import json
import math
import os
import re
import shutil
import weakref
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusion import pipelines
from diffusion.runs import lines, settings, stored, two_processes, weights
from safetensors.torch import load_file, save_file
from splitmix import chained
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.diffusion import LatentPairs, ReferenceErrors, policy, setup
from polydpo_fast.diffusion import inputs as batches
from polydpo_fast.diffusion import objective as objectives
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.precompute import cache, reference
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.shards import Shards
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

BETA = 100.0
# Two nearly equal errors are subtracted, each within float32's rounding of what a batch of another size gives.
TOLERANCE = BETA * 1e-6


def apart(one, other):
    """How far the losses of two trainings are from each other, and how far from their beginning they come."""
    losses, others = ([line["loss"] for line in lines(run)] for run in (one, other))
    assert len(losses) == len(others)
    return max(abs(a - b) for a, b in zip(losses, others, strict=True)), max(abs(a - losses[0]) for a in losses)


@pytest.mark.parametrize(
    ("family", "stores"),
    [
        ("sd15", "latents"),
        ("sd15", "errors"),
        ("sd15", "latents errors"),
        ("sdxl", "latents errors"),
        ("sd3", "latents errors"),
        ("flux", "latents errors"),
        ("wan", "latents errors"),
    ],
)
def test_trainings_from_stores_equal_those_from_images(family, stores, tmp_path):
    """Over more than an epoch, with the same noise, timesteps and dropped prompts."""
    model = pipelines.save(family, tmp_path)
    change = dict(model=str(model), latents="mode", beta=BETA, prompt_dropout=0.4, seed=4)
    if family == "wan":
        change |= dict(data=str(pipelines.write_clips(tmp_path / "clips", 4, 5)), size=[16, 32], loader={"frames": 5})
    else:
        change |= dict(data=str(pipelines.write_pairs(tmp_path / "pairs.parquet", 6)), loader={"window": 0})
    change |= dict(steps=5, max_grad_norm=0.0, adam_epsilon=1e-4)
    train(settings(tmp_path, tmp_path / "online", **change))
    if "latents" in stores:
        cache(settings(tmp_path, tmp_path, **{**change, "batch_size": 3}), tmp_path / "latents")
        change["data"] = str(tmp_path / "latents")
    if "errors" in stores:
        reference(settings(tmp_path, tmp_path, **{**change, "batch_size": 3}), tmp_path / "errors", draws=3)
        change["reference_errors"] = str(tmp_path / "errors")
    train(settings(tmp_path, tmp_path / "stored", **change))
    difference, learned = apart(tmp_path / "online", tmp_path / "stored")
    assert lines(tmp_path / "stored")[-1]["epoch"] >= 1
    assert difference <= TOLERANCE < learned / 10


def test_pairs_that_come_often_have_noise_of_their_own_each_time(tmp_path, monkeypatch):
    """Two of six pairs are half of each epoch of "balanced": in two epochs they come three times each, others once or
    twice. Errors that were computed before are those of a reference that is asked, in each pair's own draw."""
    model, table = pipelines.save("sd15", tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 6)
    pairs = pq.read_table(table)
    pq.write_table(pairs.append_column("category", pa.array(["rare"] * 2 + ["common"] * 4)), table)
    change = dict(model=str(model), data=str(table), latents="mode", beta=BETA, seed=4, prompt_dropout=0.5)
    change |= dict(steps=6, loader={"categories": "balanced"}, max_grad_norm=0.0, adam_epsilon=1e-4)
    seen, ask = [], training._Loop.pair_losses

    def losses(self, batch):
        drawn, noised = [], objectives.noise_pairs

        def noise_pairs(scheduler, latents, noise, timesteps):
            drawn.extend(noise.flatten(1)[:, 0].tolist())
            return noised(scheduler, latents, noise, timesteps)

        with monkeypatch.context() as patch:
            patch.setattr(objectives, "noise_pairs", noise_pairs)
            result = ask(self, batch)
        seen.extend(zip(batch.index.tolist(), drawn, strict=True))
        return result

    monkeypatch.setattr(training._Loop, "pair_losses", losses)
    train(settings(tmp_path, tmp_path / "online", **change))
    assert [index for index, _ in seen].count(0) == [index for index, _ in seen].count(1) == 3
    assert len(seen) == 12 == len(set(seen))
    reference(settings(tmp_path, tmp_path, **{**change, "batch_size": 3}), tmp_path / "errors", draws=3)
    online, seen[:] = list(seen), []
    train(settings(tmp_path, tmp_path / "stored", **change, reference_errors=str(tmp_path / "errors")))
    assert seen == online
    difference, learned = apart(tmp_path / "online", tmp_path / "stored")
    assert difference <= TOLERANCE < learned / 10


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_one_file_of_settings_serves_all_commands(here, tmp_path):
    """Also where crops, mirrors, samples and dropped prompts are random: they are drawn once, but for the prompts."""
    config, latents, errors, out = (tmp_path / name for name in ("run.yaml", "latents", "errors", "out"))
    config.write_text(
        f"model: {here / 'pipeline'}\ndata: {here / 'pairs.parquet'}\noutput: {out}\nsize: 16\nbatch_size: 4\n"
        "steps: 4\nprompt_dropout: 0.3\nlatents: sample\nlearning_rate: 1e-3\nlog_every: 1\n"
        "loss: {density: logit_normal}\n"
        f"loader: {{crop: random, hflip: 0.5, readers: 1, threads: 1, ledger: {tmp_path / 'ledger.jsonl'}}}\n"
    )
    run("cache", latents, "--config", config)
    run("reference", errors, "--config", config, "--data", latents, "--draws", 2)
    before = stored(latents), stored(errors)
    # Nothing is to be done again.
    run("cache", latents, "--config", config)
    run("reference", errors, "--config", config, "--data", latents, "--draws", 2)
    assert (stored(latents), stored(errors)) == before
    run("train", "--config", config, "--data", latents, "--reference-errors", errors)
    written = lines(out)
    # The reference was another process's forward in a batch of the same size: almost the same numbers.
    assert written[0]["loss"] == pytest.approx(math.log(2), abs=5000 * 1e-6)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert len(LatentPairs(latents)) == len(ReferenceErrors(errors)) == 16


def test_a_complete_store_needs_no_folder_that_can_be_written_to(here, stores, tmp_path, monkeypatch):
    """The tests may run as root, who can write everywhere: that this one cannot is told in its place."""
    access = os.access

    def read_only(path, mode, **options):
        return access(path, mode, **options) and not (mode & os.W_OK and Path(path).is_relative_to(tmp_path / "stores"))

    shutil.copytree(stores, tmp_path / "stores")
    monkeypatch.setattr(os, "access", read_only)
    write_settings(settings(here, here, latents="mode", batch_size=4), tmp_path / "run.yaml")
    for command, name in (("cache", "latents"), ("reference", "errors")):
        folder = tmp_path / "stores" / name
        before = stored(folder)
        assert f"{folder} is complete: 16 pairs" in run(command, folder, "--config", tmp_path / "run.yaml")
        said = run(command, folder, "--config", tmp_path / "run.yaml", "--seed", 9, exit_code=2)
        assert f"{folder} was made with another seed" in said
        assert stored(folder) == before
        next(folder.glob("*.safetensors")).unlink()
        said = run(command, folder, "--config", tmp_path / "run.yaml", exit_code=2)
        assert f"{folder} is no folder that can be written to" in said


def test_latents_may_be_stored_in_half_precision(here, tmp_path, monkeypatch):
    for kind in ("float32", "bfloat16"):
        arguments = ["--model", here / "pipeline", "--data", here / "pairs.parquet", "--size", 16]
        run("cache", tmp_path / kind, *arguments, "--store", kind)
    whole, half = (LatentPairs(tmp_path / kind)[3].pixels for kind in ("float32", "bfloat16"))
    assert torch.equal(whole.bfloat16(), half)
    assert whole.dtype == torch.float32
    # They are given to the models in the dtypes that the encoders have, and noised in float32.
    dtypes, noised = set(), objectives.noise_pairs

    def noise_pairs(scheduler, latents, *rest):
        dtypes.add(latents.dtype)
        return noised(scheduler, latents, *rest)

    monkeypatch.setattr(objectives, "noise_pairs", noise_pairs)
    for kind in ("float32", "bfloat16"):
        train(settings(here, tmp_path / f"of-{kind}", data=str(tmp_path / kind), beta=BETA, learning_rate=1e-5))
    difference, learned = apart(tmp_path / "of-float32", tmp_path / "of-bfloat16")
    assert 0 < difference < learned / 10
    assert dtypes == {torch.float32}
    said = run("cache", tmp_path / "x", *arguments, "--store", "int8", exit_code=2)
    assert "--store is 'int8'; expected float32, bfloat16 or float16" in said


def test_samples_that_are_stored_are_of_the_seed(here, tmp_path, monkeypatch):
    """As those that a training draws when a pair comes first."""
    seen = {}
    encode, inside = batches.encode_pixels, batches.Inputs.encode

    def encoded(self, batch, seeds):
        seen.setdefault("index", []).append(batch.index.tolist())
        return inside(self, batch, seeds)

    def pixels(vae, pixels, seeds, **options):
        seen.setdefault("seeds", []).append(seeds)
        return encode(vae, pixels, seeds, **options)

    monkeypatch.setattr(batches.Inputs, "encode", encoded)
    monkeypatch.setattr(batches, "encode_pixels", pixels)
    cache(settings(here, tmp_path, seed=11, batch_size=8), tmp_path / "latents")
    assert seen["index"] == [[*range(8)], [*range(8, 16)]]
    assert seen["seeds"] == [
        [chained(chained(11, 0, i), arm) for arm in (1, 2) for i in index] for index in seen["index"]
    ]


def test_errors_are_computed_in_the_precision_of_the_training(here, tmp_path):
    """Else the difference of their rounding would be a preference before anything was learned."""
    change = dict(latents="mode", mixed_precision="bf16", batch_size=16, steps=1)
    reference(settings(here, tmp_path, **change), tmp_path / "errors", draws=1)
    train(settings(here, tmp_path / "out", **change, reference_errors=str(tmp_path / "errors")))
    assert lines(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=5000 * 1e-6)


@pytest.fixture(scope="module")
def stores(here, tmp_path_factory):
    """Latents, and errors of them and of the images."""
    folder = tmp_path_factory.mktemp("stores")
    plain = dict(latents="mode", batch_size=4)
    cache(settings(here, folder, **plain), folder / "latents")
    reference(settings(here, folder, **plain), folder / "errors")
    reference(settings(here, folder, **plain, data=str(folder / "latents")), folder / "latent-errors")
    return folder


def from_stores(stores, **change):
    return {
        **dict(latents="mode", data=str(stores / "latents"), reference_errors=str(stores / "latent-errors")),
        **change,
    }


def test_what_stores_make_needless_is_not_in_memory(here, stores, tmp_path, monkeypatch):
    """No VAE, no text encoder, no reference: while steps are made they are gone."""
    kept, seen = {}, []
    load, step = setup.load_pipeline, training.Journal.add

    def watched(*arguments, **options):
        pipe = load(*arguments, **options)
        kept.update({name: weakref.ref(getattr(pipe, name)) for name in ("vae", "text_encoder", "unet")})
        return pipe

    def look(*arguments):
        gc.collect()
        seen.append({name for name, part in kept.items() if part() is not None})
        step(*arguments)

    monkeypatch.setattr(setup, "load_pipeline", watched)
    monkeypatch.setattr(training.Journal, "add", look)
    monkeypatch.setattr(policy, "frozen_copy", None)
    monkeypatch.setattr(batches, "encode_pixels", None)
    train(settings(here, tmp_path / "out", **from_stores(stores, prompt_dropout=0.0, steps=2)))
    assert seen == [{"unet"}] * 2
    # Pictures need them.
    prompts = dict(validation_prompts=["ab"], validation_steps=1)
    train(settings(here, tmp_path / "pictures", **from_stores(stores, steps=1, **prompts)))
    assert seen[-1] == {"unet", "vae", "text_encoder"}
    assert (tmp_path / "pictures" / "validation" / "000001.png").exists()


def test_pairs_that_are_not_trained_on_are_measured_from_stores(here, stores, tmp_path):
    """As from images and with a reference; of adapters, which can be switched off."""
    held = pipelines.write_pairs(tmp_path / "held.parquet", 5, seed=4)
    change = dict(lora_rank=2, steps=2, latents="mode", validation_data=str(held), learning_rate=0.02)
    change["loader"] = {"window": 0}  # the same order of both
    train(settings(here, tmp_path / "images", **change))
    with pytest.raises(
        ValueError, match=r"validation_data is .*held.parquet', and data .*expected latents too, made by"
    ):
        train(settings(here, tmp_path / "refused", **from_stores(stores, **change)))
    cache(settings(here, tmp_path, latents="mode", data=str(held)), tmp_path / "held")
    train(
        settings(
            here, tmp_path / "stored", **from_stores(stores, **{**change, "validation_data": str(tmp_path / "held")})
        )
    )
    images, stored = lines(tmp_path / "images")[-1], lines(tmp_path / "stored")[-1]
    assert images["validation_reward_margin"] != 0
    for name in ("validation_loss", "validation_reward_margin"):
        assert stored[name] == pytest.approx(images[name], rel=1e-2)


def test_draws_come_again_when_all_have_been(here, stores, tmp_path, monkeypatch):
    asked, ask = [], ReferenceErrors.__call__

    def watched(self, index, draw):
        asked.append(set(draw.tolist()))
        return ask(self, index, draw)

    monkeypatch.setattr(ReferenceErrors, "__call__", watched)
    train(settings(here, tmp_path, **from_stores(stores, batch_size=16, steps=6)))
    assert asked == [{0}, {1}, {2}, {3}, {0}, {1}]


def test_the_loader_of_latents_is_told_what_is_not_of_pixels(here, stores, tmp_path):
    run = settings(here, tmp_path, **from_stores(stores, loader={"shuffle": False, "threads": 2}))
    batch = next(iter(batches.Inputs(run, setup.set_up(run, setup.accelerator_of(run))).loader))
    assert batch.index.tolist() == [0, 1]


def test_resuming_from_stores(here, stores, tmp_path):
    change = from_stores(stores, batch_size=3, steps=8, checkpoint_every=4)
    train(settings(here, tmp_path / "whole", **change))
    train(settings(here, tmp_path / "broken", **{**change, "steps": 4}))
    train(settings(here, tmp_path / "broken", **change, resume="latest"))
    whole, broken = (weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert lines(tmp_path / "whole")[-1]["epoch"] == 1
    # With another number of draws a pair would have noise from then on that it had before, or has not had.
    reference(settings(here, tmp_path, **from_stores(stores)), tmp_path / "fewer", draws=3)
    fewer = {**change, "reference_errors": str(tmp_path / "fewer"), "steps": 9}
    with pytest.raises(ValueError, match=r"draws of reference_errors is 3; the run of .* was begun with 4"):
        train(settings(here, tmp_path / "broken", **fewer, resume="latest"))


@pytest.mark.parametrize(
    ("change", "name", "values"),
    [
        (dict(mixed_precision="bf16"), "precision", ("float32", "bfloat16")),
        (dict(latents="sample"), "latents", ("mode", "sample")),
        (dict(size=32), "decoding", ('{"size": [16, 16]}', '{"size": [32, 32]}')),
        (dict(loader={"crop": "random"}), "decoding", ('{"size": [16, 16]}', '{"crop": "random", "size": [16, 16]}')),
        (dict(loader={"hflip": 0.5}), "decoding", ('{"size": [16, 16]}', '{"hflip": 0.5, "size": [16, 16]}')),
        (dict(data_options={"ties": "keep"}), "data_options", ("{}", '{"ties": "keep"}')),
        (dict(model="other"), "vae", ("AutoencoderKL:[0-9a-f]{32}", "AutoencoderKL:[0-9a-f]{32}")),
    ],
)
def test_latents_of_other_things_are_refused(here, stores, tmp_path, change, name, values):
    if "model" in change:
        change["model"] = str(pipelines.save("sd15", tmp_path, seed=1))
    had, got = (value if name == "vae" else re.escape(value) for value in values)
    with pytest.raises(ValueError, match=f"was made with another {name}: in the store it is {had}, here it is {got}"):
        train(settings(here, tmp_path / "out", **from_stores(stores, **{"reference_errors": None, **change})))


def test_stores_tell_all_that_they_depend_on(stores):
    """What is not told is not compared: a store of something else would be taken."""
    pixels, texts = {"decoding", "transform", "data_options", "latents", "vae"}, {"text_encoder", "tokenizer"}
    drawn = {"model", "scheduler", "timesteps", "prompt_dropout", "seed", "draws"}
    for name, told in (
        ("latents", {"source", "precision", "dtype", "seed"} | pixels | texts),
        ("errors", {"source", "precision"} | drawn | pixels | texts),
        ("latent-errors", {"source", "precision", "transform"} | drawn),
    ):
        assert set(json.loads((stores / name / "store.json").read_text())["made_with"]) == told, name


def test_errors_of_other_things_are_refused(here, stores, tmp_path):
    other = pipelines.save("sd15", tmp_path)
    images = dict(latents="mode", data=str(here / "pairs.parquet"), reference_errors=str(stores / "errors"))
    train(settings(here, tmp_path / "fits", **images, steps=1))
    for change, name in (
        (dict(prompt_dropout=0.1), "prompt_dropout"),
        (dict(size=32), "decoding"),
        (dict(data=str(pipelines.write_pairs(tmp_path / "more.parquet", 17))), "source"),
        (dict(data=str(stores / "latents")), "source"),
        (dict(loss={"density": "mode"}), "timesteps"),
    ):
        with pytest.raises(ValueError, match=f"was made with another {name}: in the store it is .*, here it is "):
            train(settings(here, tmp_path / "out", **{**images, **change}))
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(other, subfolder="unet")
    with torch.no_grad():
        model.conv_out.bias += 1
    model.save_pretrained(other / "unet")
    with pytest.raises(ValueError, match=r"another model: in the store it is UNet2DC.*, here it is UNet2DC"):
        train(settings(here, tmp_path / "out", **{**images, "model": str(other)}))


def test_errors_of_other_sizes_are_refused(tmp_path):
    """Those of an earlier version, which did not say what SDXL was told, were of each image's own."""
    model = str(pipelines.save("sdxl", tmp_path))
    pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    change = dict(model=model, latents="mode", steps=1, lora_rank=2, batch_size=4)
    cache(settings(tmp_path, tmp_path, **change), tmp_path / "latents")
    change["data"] = str(tmp_path / "latents")
    own = dict(change, size_conditioning="own")  # of the same latents: they do not depend on it
    for name, one in (("fixed", change), ("own", own)):
        reference(settings(tmp_path, tmp_path, **one), tmp_path / name, draws=1)
    fixed, others = (load_file(next((tmp_path / name).glob("*.safetensors")))["errors"] for name in ("fixed", "own"))
    assert not torch.equal(fixed, others)
    shutil.copytree(tmp_path / "own", tmp_path / "earlier")
    for name in ("fixed", "own", "earlier"):
        if name == "earlier":
            unsaid(tmp_path / name, "size_conditioning")
        for setting, one in (("fixed", change), ("own", own)):
            run = settings(tmp_path, tmp_path / f"{name}-{setting}", **one, reference_errors=str(tmp_path / name))
            if setting == name or (name, setting) == ("earlier", "own"):
                train(run)
                assert lines(tmp_path / f"{name}-{setting}")[0]["loss"] == pytest.approx(math.log(2), abs=5000 * 1e-6)
            else:
                had = "fixed" if name == "fixed" else "own"
                said = f"made with another size_conditioning: in the store it is {had}, here it is {setting}"
                with pytest.raises(ValueError, match=said):
                    train(run)


def unsaid(folder, name):
    """The store as if it had been made before it told this."""
    index = json.loads((folder / "store.json").read_text())
    del index["made_with"][name]
    (folder / "store.json").write_text(json.dumps(index))
    store = Shards._read_index(folder, index["kind"])
    for number in range(store.shards):
        save_file(load_file(store.path(number)), store.path(number), {"polydpo_fast": store._stamp(number)})


def test_what_is_random_in_each_epoch_has_no_errors(here, tmp_path):
    for change, said in (
        (dict(latents="sample"), "got latents='sample'"),
        (dict(latents="sample", loader={"hflip": 0.5}), "got hflip=0.5, latents='sample'"),
    ):
        one = settings(here, tmp_path, reference_errors=str(tmp_path / "errors"), **change)
        for command in (lambda one=one: reference(one, tmp_path / "errors"), lambda one=one: train(one)):
            with pytest.raises(ValueError, match=f"of fixed latents; {said}; expected latents='mode' and nothing"):
                command()


def test_other_folders_are_named(here, stores, tmp_path):
    for change, said in (
        (dict(data=str(stores / "errors")), "it is of 'reference errors 1'; expected 'latents 1'"),
        (dict(reference_errors=str(stores / "latents")), "it is of 'latents 1'; expected 'reference errors 1'"),
        (dict(reference_errors=str(tmp_path)), "no store of reference errors 1 is there"),
    ):
        write_settings(settings(here, tmp_path / "out", **from_stores(stores, **change)), tmp_path / "run.yaml")
        assert said in run("train", "--config", tmp_path / "run.yaml", exit_code=2)
    with pytest.raises(ValueError, match="which is encoded already; expected images or clips"):
        cache(settings(here, tmp_path, **from_stores(stores)), tmp_path / "again")


@pytest.mark.heavy
def test_two_processes_make_the_same_stores(here, tmp_path, unused_tcp_port):
    plain = settings(here, tmp_path / "out", latents="mode", batch_size=2)
    for command, make in (("cache", cache), ("reference", reference)):
        make(plain, tmp_path / f"{command}-one", shard_pairs=6)
        arguments = command, str(tmp_path / f"{command}-two"), "--shard-pairs", "6"
        code, said = two_processes(plain, tmp_path, unused_tcp_port, arguments)
        assert code == 0, said
        assert len(stored(tmp_path / f"{command}-two")) == 3
        assert stored(tmp_path / f"{command}-two") == stored(tmp_path / f"{command}-one")
        # Of the missing ones each process makes one.
        for number in (0, 2):
            (tmp_path / f"{command}-two" / f"{number:05d}-of-00003.safetensors").unlink()
        code, said = two_processes(plain, tmp_path, unused_tcp_port, arguments)
        assert code == 0, said
        assert stored(tmp_path / f"{command}-two") == stored(tmp_path / f"{command}-one")


@pytest.mark.parametrize("family", pipelines.PIPELINES)
def test_latents_need_no_weights_of_the_model_that_is_trained(family, tmp_path):
    """Which in float32 are most of a pipeline."""
    model = pipelines.save(family, tmp_path)
    data, loader = pipelines.write_pairs(tmp_path / "pairs.parquet", 2), {}
    if family == "wan":
        data, loader = pipelines.write_clips(tmp_path / "clips", 2), {"frames": 5}
    run = settings(tmp_path, tmp_path / "run", data=str(data), loader=loader)
    cache(run, tmp_path / "with")
    for file in model.glob("*/diffusion_pytorch_model.safetensors"):
        if file.parent.name != "vae":
            file.unlink()
    cache(run, tmp_path / "without")
    assert stored(tmp_path / "without") == stored(tmp_path / "with") != {}
