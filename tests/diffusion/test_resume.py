"""Trainings that are interrupted, and go on: checkpoints, and what of a run may change."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import accelerate.utils
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusion import pipelines
from diffusion.runs import equal, lines, settings, weights
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from polydpo_fast.diffusion import checkpoints, config, fingerprints, inputs
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.checkpoints import save_checkpoint
from polydpo_fast.diffusion.config import Settings, lasting
from polydpo_fast.diffusion.families import LORA_FILE
from polydpo_fast.diffusion.pipelines import load_pipeline
from polydpo_fast.diffusion.precompute import cache
from polydpo_fast.diffusion.result import load_result
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


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
    shown = {"validation_prompts", "validation_data", "validation_pairs", "trackers"}
    costs = {"gradient_checkpointing", "vae_batch"}
    learned = {"crop", "hflip", "interpolation", "frames", "fps", "start", "window", "categories"}
    free = {"cache", "ledger", "limits", "max_bad_rate", "max_bad_run", "prefetch", "readers", "threads", "timeout_s"}
    kept = lasting(settings(here, tmp_path, loader=dict.fromkeys(learned | free, 1)))
    assert set(kept) == {one.name for one in fields(Settings)} - places - often - shown - costs
    assert set(kept["loader"]) == learned


@pytest.mark.parametrize("earlier", [False, True])
def test_the_files_of_a_manifest_may_be_moved(here, tmp_path, monkeypatch, earlier):
    """`root` and `cache` say where things are. Earlier versions compared them all the same."""
    random, first, second = np.random.default_rng(0), tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for name in "abcd":
        (first / f"{name}.jpg").write_bytes(pipelines.jpeg(random))
    pairs = [{"win": "a.jpg", "lose": "b.jpg", "prompt": "x"}, {"win": "c.jpg", "lose": "d.jpg", "prompt": "y"}]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))

    def of(folder, **change):
        options = {"root": str(folder), "cache": str(folder), "ties": "keep"}
        return settings(here, tmp_path / "run", data=str(tmp_path / "pairs.jsonl"), data_options=options, **change)

    with monkeypatch.context() as patch:
        if earlier:
            for module in (config, fingerprints, inputs):
                patch.setattr(module, "of_pairs", dict)
        train(of(first, steps=1, checkpoint_every=1))
        cache(of(first), tmp_path / "latents")
    first.rename(second)
    train(of(second, steps=2, checkpoint_every=1, resume="latest"))
    assert len(lines(tmp_path / "run")) == 2
    cached = replace(of(second, steps=1), data=str(tmp_path / "latents"), output=str(tmp_path / "cached"))
    train(cached)
    with pytest.raises(ValueError, match=r"made with another data_options: in the store it is .*keep"):
        train(replace(cached, data_options={"root": str(second)}, output=str(tmp_path / "other")))


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
