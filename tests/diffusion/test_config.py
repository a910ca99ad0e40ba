"""Settings of a training, from YAML and from the command line: what is wrong is named."""

import math
import re
from pathlib import Path

import pytest
from diffusion.runs import settings

from polydpo_fast.diffusion import setup
from polydpo_fast.diffusion.config import Settings
from polydpo_fast.diffusion.settings_file import read_assignments, read_settings, write_settings
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


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
        (dict(validation_pairs=2), "validation_pairs is 2, which has no effect without validation_data"),
        (
            dict(validation_data="held", reference_errors="errors"),
            "validation_data is 'held', which no stored errors are of, .*; expected none of either, or lora_rank 1 or",
        ),
        (dict(keep=2), "keep is 2, which has no effect with checkpoint_every 0"),
    ],
)
def test_bad_settings_are_named(here, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(here, tmp_path, **change)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        ("batch_size accumulation steps vae_batch log_every validation_steps validation_pairs cycles", 0),
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


def test_the_home_folder_is_meant_in_yaml_too(tmp_path, monkeypatch):
    """No shell expands it there, nor in --output=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ("model", "output", "reference_errors", "resume", "lora_weights")
    (tmp_path / "x.yaml").write_text("data: d\nlora_rank: 4\n" + "".join(f"{name}: ~/{name}\n" for name in places))
    found = read_settings(tmp_path / "x.yaml")
    assert [getattr(found, name) for name in places] == [str(tmp_path / name) for name in places]
    assert read_settings(None, model="a/b", data="d", resume="latest").resume == "latest"


def test_names_and_values_are_joined_name_by_name(tmp_path):
    """--set 'loader={hflip: 0.5}' leaves the file's crop, and what another --set said, as they are."""
    (tmp_path / "x.yaml").write_text("{model: m, data: d, loader: {crop: random, frames: 81}, loss: {margin: 1.0}}")
    given = read_assignments(
        ["loader={hflip: 0.5}", "loader={frames: 9, short: loop}", "lora_targets=[a]", "loader={short: repeat}"]
    )
    assert given == {"loader": {"hflip": 0.5, "frames": 9, "short": "repeat"}, "lora_targets": ["a"]}
    found = read_settings(tmp_path / "x.yaml", **given, lora_rank=2)
    assert found.loader == {"crop": "random", "frames": 9, "hflip": 0.5, "short": "repeat"}
    assert found.loss == {"margin": 1.0}
    assert read_settings(tmp_path / "x.yaml", scheduler={"shift": 3.0}).scheduler == {"shift": 3.0}
    (tmp_path / "y.yaml").write_text("{model: m, data: d, loader: 5}")
    assert read_settings(tmp_path / "y.yaml", loader={"crop": "random"}).loader == {"crop": "random"}


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_published_settings_are_settings(file):
    """And say where each value comes from."""
    assert read_settings(file).steps > 0
    for line in file.read_text().splitlines():
        assert line.startswith(("#", "model:", "loader:", "loss:")) or "  # " in line, line
