"""The loops and commands of docs/training.md, as they stand there, on tiny pipelines."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from diffusion import pipelines
from typer.testing import CliRunner

from polydpo_fast.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
CODE = [code for language, code in BLOCKS if language == "python"]
LOOPS = [code for code in CODE if code.startswith("MODEL,")]
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "wan", "sd15"]
NAMES = [*FAMILIES[:5], "stores"]
PROMPT = "a photo of a bench"


def test_there_is_a_loop_for_each_family_and_one_of_stores():
    assert len(LOOPS) == len(FAMILIES)
    assert "cache_latents" in LOOPS[-1]
    for code in LOOPS[1:5]:  # in float32, and with all activations kept, 1024 pixels would fit on no GPU
        assert "torch.bfloat16" in code
        assert "enable_gradient_checkpointing()" in code


@pytest.mark.parametrize("file", ["sd35-medium-vipo", "flux-dev-vipo", "wan21-1.3b-vipo"])
def test_the_loops_begin_where_the_configurations_do(file):
    settings = yaml.safe_load((PAGE.parents[1] / "configs" / f"{file}.yaml").read_text())
    (code,) = (code for code in LOOPS if settings["model"] in code)
    found = dict(re.findall(r"\b(beta|r|lora_alpha|lr|density)=([^,)]+)", code))
    expected = {
        "beta": settings["beta"],
        "r": settings["lora_rank"],
        "lora_alpha": settings["lora_rank"],  # where a configuration has none
        "lr": settings["learning_rate"],
        **settings.get("loss", {}),
    }
    assert {name: yaml.safe_load(value) for name, value in found.items()} | {"lr": float(found["lr"])} == expected


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("family", "code"), [*zip(FAMILIES, LOOPS, strict=True)], ids=NAMES)
def test_the_loop_runs_and_trains(tmp_path, monkeypatch, family, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = str(pipelines.save(family, tmp_path))
    if family == "wan":
        data, rest = pipelines.write_clips(tmp_path / "clips"), "(32, 32), 5, 'cpu'"
    else:
        data, rest = pipelines.write_pairs(tmp_path / "pairs.parquet", count=8), "16, 'cpu'"
    names, _ = code.split("\n", 1)[0].split(" = ", 1)
    code = f"{names} = {model!r}, {str(data)!r}, {rest}\n" + code.split("\n", 1)[1]
    before, after = {}, {}
    step = torch.optim.AdamW.step

    def watched(optimiser, *arguments):
        weights = optimiser.param_groups[0]["params"]
        before.setdefault("all", [w.detach().clone() for w in weights])
        result = step(optimiser, *arguments)
        after["all"] = [w.detach().clone() for w in weights]
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    scope = {}
    exec(compile(code, str(PAGE), "exec"), scope)
    assert torch.isfinite(scope["loss"])
    assert scope["metrics"]["logit_mean"].isfinite()
    if family == "sdxl":  # of files of 24 and of 30 pixels; as its pipeline calls the UNet for images of 16
        added = scope["conditioning"]["added_cond_kwargs"]
        assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * len(added["text_embeds"])
    moved = [not torch.equal(a, b) for a, b in zip(before["all"], after["all"], strict=True)]
    assert sum(moved) > len(moved) / 4


def test_what_is_said_of_the_decay_is_what_diffusers_averages_by():
    ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.999)
    said = re.search(
        r"n / \(n \+ 9\) where .{1,40} 0\.999 holds from step (\d+) on, and (\d+) steps come to ([\d.]+)\.",
        " ".join(PAGE.read_text().split()),
    )
    first, steps, reached = int(said[1]), int(said[2]), float(said[3])
    for step in (2, 100, steps, first - 1):  # the first takes the weights as they are
        assert ema.get_decay(step) == step / (step + 9) < 0.999
    assert ema.get_decay(first) == 0.999
    assert round(ema.get_decay(steps), 4) == reached


def test_another_model_and_its_timesteps():
    scope = {}
    for code in CODE:
        if code not in LOOPS and "from_pretrained" not in code:
            exec(compile(code, str(PAGE), "exec"), scope)
    assert scope["loss"].item() == torch.tensor(2.0).log().item()
    scope["objective"](scope["model"], torch.randn(8, 4, 16, 16), {"strength": torch.rand(4)})[0].backward()
    assert scope["model"].weight.grad.isfinite().all()
    assert scope["first_low"] in (300, 301)  # 3 t / (1 + 2 t) >= 0.875 where t >= 0.7, which is one of them
    assert scope["weights"].shape == (1000,)
    assert scope["weights"][-1] == 0  # zero terminal SNR and v-prediction


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning")
def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, fresh_accelerate):
    """With a model and pairs that are small, and without bitsandbytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path / "cache"))
    model, pairs = str(pipelines.save("sd15", tmp_path)), str(pipelines.write_pairs(tmp_path / "pairs.parquet", 8))
    (settings,) = (yaml.safe_load(text) for language, text in BLOCKS if language == "yaml")
    small = dict(model=model, data=pairs, size=16, batch_size=2, steps=2, optimizer="adamw", validation_steps=1)
    Path("run.yaml").write_text(yaml.safe_dump({**settings, **small}))
    Path("evaluation_metadata.jsonl").write_text(json.dumps({"tag": "single_object", "prompt": PROMPT}) + "\n")
    text = "\n".join(code for language, code in BLOCKS if language == "sh").replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line]
    assert [command[-1] for command in commands if "train" in command] == ["500", "latest", "errors"]
    for command in commands:
        for launcher in (["accelerate", "launch", "-m", "polydpo_fast"], ["polydpo-fast"]):
            if command[: len(launcher)] == launcher:
                arguments = command[len(launcher) :]
        replaced = {settings["model"]: model, settings["data"]: pairs}
        arguments = [replaced.get(word, word) for word in arguments]
        if "--model" in arguments:
            arguments += ["--size", "16", "--steps", "2"]
        AcceleratorState._reset_state(reset_partial_state=True)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert {path.name for path in Path("run").iterdir()} >= {
        *("settings.yaml", "metrics.jsonl", "checkpoint-2", "validation", "logs", "unet", "model_index.json")
    }
    for images in ("images", "images-lora"):
        assert len(list(Path(images).rglob("*.png"))) == 4
    (code,) = (code for code in CODE if "DiffusionPipeline.from_pretrained" in code and code not in LOOPS)
    exec(compile(code, str(PAGE), "exec"), scope := {})
    scope["pipe"].load_lora_weights("lora")
