"""What a training writes of its metrics, to its file and to trackers; and losses that are no numbers."""

import io
import math
import shutil
import sys
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pytest
import torch
from accelerate.tracking import LoggerType
from diffusion.runs import lines, settings
from PIL import Image
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.data import PairLoader
from polydpo_fast.diffusion import inputs, journal, predict
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.train import NotFiniteError, train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


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
    prompts |= dict(validation_data=str(here / "pairs.parquet"), validation_pairs=2)
    train(settings(here, out, trackers=["tensorboard", "wandb"], project="trial", beta=70.0, **prompts))
    assert "validation_loss" in lines(out)[-1]
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
    note = ours.write(2, 1e-4, lambda: {"validation_loss": 0.25, "validation_implicit_accuracy": 0.75})
    assert note == "loss 1.0000, accuracy 1.000, validation loss 0.2500, accuracy 0.750"
    first, second = lines(tmp_path)
    assert (first["loss"], first["implicit_accuracy"]) == pytest.approx((2 * 2.5, 2 * 0.2))
    assert (first["step"], first["steps"], first["epoch"], first["learning_rate"]) == (7, 1, 2, 1e-3)
    assert (second["loss"], second["step"], second["learning_rate"]) == (1.0, 8, 1e-4)
    assert (first.get("validation_loss"), second["validation_loss"]) == (None, 0.25)
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
