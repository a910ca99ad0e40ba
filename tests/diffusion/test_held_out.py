"""Pairs that are not trained on: what is measured of them, and that the training knows nothing of it."""

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusion import pipelines
from diffusion.runs import lines, settings, weights
from PIL import Image
from splitmix import chained

from polydpo_fast.data import PairLoader
from polydpo_fast.diffusion import PairObjective, draw_noise
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("error:epoch 0 was left:UserWarning"),
]

NAMES = {"validation_loss", "validation_implicit_accuracy", "validation_reward_margin"}


def wide(jpeg):
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).resize((60, 24)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Nine pairs of wide images, of which the second cannot be decoded."""
    file = tmp_path_factory.mktemp("held") / "held.parquet"
    pipelines.write_pairs(file, 9, seed=5)
    rows = pq.read_table(file).to_pylist()
    rows = [{**row, "jpg_0": wide(row["jpg_0"]), "jpg_1": wide(row["jpg_1"])} for row in rows]
    rows[1]["jpg_0"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def run(here, out, **change):
    given = dict(batch_size=4, beta=300.0, alpha=2.0, ema=0.5, prompt_dropout=0.5, seed=3, checkpoint_every=2)
    given["loader"] = {"crop": "random", "hflip": 1.0, "ledger": str(out.with_suffix(".jsonl"))}
    train(settings(here, out, **{**given, **change}))


@pytest.fixture(scope="module")
def whole(here, held, tmp_path_factory):
    """A run of four steps; after two of them, and at the end, six of the pairs are measured, in batches of three."""
    out, threads = tmp_path_factory.mktemp("whole") / "whole", torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, so that bits can be compared
    run(here, out, validation_data=str(held), validation_pairs=6, validation_every=2)
    torch.set_num_threads(threads)
    return out


def without_times(run):
    return [{name: value for name, value in line.items() if name != "pairs_per_s"} for line in lines(run)]


def test_what_is_measured_is_what_a_plain_loop_measures(here, whole, held):
    """Pair by pair, of the result: the averages; whole prompts, and of images the centre, whatever is trained on."""
    assert [set(line) >= NAMES for line in lines(whole)] == [False, True, False, True]
    pipe, reference = (DiffusionPipeline.from_pretrained(folder) for folder in (whole, here / "pipeline"))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    objective = PairObjective(scheduler, reference=reference.unet, beta=300.0, alpha=2.0)
    taken, rows = [], []
    for _, batch in zip(
        range(6), PairLoader(held, 1, size=16, dtype=torch.float32, shuffle=False, seed=3), strict=False
    ):
        (index,) = batch.index.tolist()
        seed = chained(3, 0, index)
        with torch.no_grad():
            drawn = pipe.vae.encode(batch.pixels).latent_dist
            noise = draw_noise([chained(seed, arm) for arm in (1, 2)], drawn.mean.shape[1:])
            text, _ = pipe.encode_prompt(batch.prompts, "cpu", 1, False)
            latents = (drawn.mean + drawn.std * noise) * 0.18215
            loss, metrics = objective(pipe.unet, latents, {"encoder_hidden_states": text}, seeds=[seed])
        taken.append(index)
        rows.append([loss, metrics["implicit_accuracy"], metrics["reward_margin"]])
    assert len(taken) == 6
    assert 1 not in taken  # another is in its place
    loss, accuracy, margin = torch.tensor(rows).double().mean(0).tolist()
    last = lines(whole)[-1]
    assert abs(margin) > 1e-3  # there is something to compare
    # Batches of three give other last bits of the errors than single pairs; beta makes 300 times that of them.
    assert last["validation_reward_margin"] == pytest.approx(margin, abs=3e-4)
    assert last["validation_loss"] == pytest.approx(loss, abs=5e-4)
    assert last["validation_implicit_accuracy"] == pytest.approx(accuracy)
    told = [json.loads(line) for line in Path(whole.with_suffix(".jsonl")).read_text().splitlines()]
    assert {line["index"] for line in told} == {1}


def test_the_training_knows_nothing_of_it(here, whole, tmp_path):
    run(here, tmp_path / "plain")
    for file in ("unet/diffusion_pytorch_model.safetensors", "checkpoint-2/model.safetensors"):
        assert (whole / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    plain = [{name: value for name, value in line.items() if name not in NAMES} for line in without_times(whole)]
    assert plain == without_times(tmp_path / "plain")


def test_a_resumed_run_measures_the_same(here, whole, held, tmp_path):
    out = tmp_path / "whole"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet")
    run(here, out, validation_data=[str(held)], validation_pairs=6, validation_every=2, resume="latest")
    assert without_times(out) == without_times(whole)
    assert torch.equal(weights(out)["conv_in.weight"], weights(whole)["conv_in.weight"])
