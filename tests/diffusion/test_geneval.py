"""`polydpo-fast geneval`, and the pictures of a training."""

import io
import json
import os
import re
import shutil
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusion import pipelines
from diffusion.runs import settings, write_prompts
from PIL import Image
from splitmix import chained
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.diffusion import geneval, validation
from polydpo_fast.diffusion.families import FAMILIES
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


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
    monkeypatch.setattr(geneval, "check_shared", lambda *arguments: None)  # there is no first one
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

    samples, replace, written = tmp_path / "out" / "00000" / "samples", os.replace, []

    def noted(part, file):
        written.extend(path.name for path in samples.iterdir())
        replace(part, file)

    monkeypatch.setattr(os, "replace", noted)
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a dog")
    arguments = [str(here / "pipeline"), prompts, str(tmp_path / "out"), "--samples", "1", "--steps", "1"]
    assert CliRunner().invoke(app, ["geneval", *arguments]).exit_code == 0
    assert len(written) == 1
    assert not re.match(r"\d+\.png", written[0])
    assert [path.name for path in samples.iterdir()] == ["00000.png"]


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
