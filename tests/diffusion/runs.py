"""Trainings on tiny pipelines, and what they leave behind."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

from polydpo_fast.diffusion.settings_file import read_settings, write_settings


def settings(here, out, **change):
    given = dict(
        model=str(here / "pipeline"), data=str(here / "pairs.parquet"), output=str(out), size=16, batch_size=2, steps=4
    )
    return read_settings(None, **{**given, "learning_rate": 1e-3, "log_every": 1, **change})


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stored(folder):
    """The bytes of a store's shards."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def two_processes(run, folder, port, command=("train",)):
    """Through `accelerate launch`, on CPUs. Returns the exit status, and what was printed."""
    write_settings(run, folder / "two.yaml")
    # Without --multi_gpu, which is torchrun, it starts processes on CPUs by MPI only.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port), "-m", "polydpo_fast", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, "--config", str(folder / "two.yaml")], env=environment, capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


def write_prompts(file, *prompts):
    file.write_text("".join(json.dumps({"tag": "single_object", "include": [], "prompt": p}) + "\n" for p in prompts))
    return str(file)
