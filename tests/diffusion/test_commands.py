"""What the commands of the bridge say where they cannot go on."""

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusion.runs import settings, write_prompts
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.data import LoaderError
from polydpo_fast.diffusion import setup
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.shards import Shards
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_whether_a_folder_can_be_written_to_is_asked_of_the_home_folder_that_a_tilde_means(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=f"output is '~/run', and {tmp_path}/file is no folder"):
        setup.check_writable("output", "~/run")


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


@pytest.mark.parametrize("name", ["win", "seeds", "out", "on_error", "decode", "source"])
def test_no_option_leads_to_what_the_loader_does_not_take(name):
    """As --out of `cache`, whose OUT is an argument."""
    assert f"No such option: --{name}" in CliRunner().invoke(app, ["cache", f"--{name}", "x"]).output


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
