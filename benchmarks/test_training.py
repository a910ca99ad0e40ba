"""A training step with and without a reference that is asked, and with cached latents: part of `make bench`.

A UNet2DConditionModel of SD1.5's architecture in a fraction of its width (142 million parameters), a VAE likewise (5
million with its decoder), pictures of 128 x 128 pixels, float32, AdamW. CPU time of one thread in interleaved rounds;
peak resident memory in a process of its own each, less what it has once all is imported. The parts of a step are timed
one by one, and so is what stands before it: decoding the pictures.

And what PairObjective itself takes, beside the calls of the models and the loss: with models that only return what
they are given, so that there is no large number to subtract from a large one.
"""

import io
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timing import Measured, interleaved, report

import polydpo_fast
from polydpo_fast.diffusion import PairObjective, draw_noise, draw_timesteps, frozen_copy, noise_pairs

diffusers = pytest.importorskip("diffusers", reason="Diffusers is not installed")

SIDE = 128
PAIRS = 1
ROUNDS = 3
WAYS = {
    "reference and VAE in each step": (True, True),
    "errors ahead of time": (False, True),
    "cached latents": (True, False),
    "errors ahead of time and cached latents": (False, False),
}


def large():
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(128, 256, 512, 512), cross_attention_dim=768
    )


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def picture():
    """A JPEG of smooth shapes and grain."""
    y, x = np.mgrid[:SIDE, :SIDE][..., None] / SIDE
    levels = 128 + 60 * np.sin((9 * x + 3 * y) * (1, 2, 3)) + np.random.default_rng(0).normal(0, 4, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


class Training:
    """What all ways of a step share."""

    def __init__(self):
        torch.manual_seed(0)
        self.scheduler = diffusers.DDPMScheduler()
        self.policy = large()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.text = {"encoder_hidden_states": torch.randn(PAIRS, 77, 768)}

    def way(self, online_reference, online_latents):
        """A function that makes a step; it holds what that needs."""
        reference = frozen_copy(self.policy) if online_reference else None
        encoder = vae().requires_grad_(False).eval() if online_latents else None
        objective = PairObjective(self.scheduler, reference=reference)
        pixels = torch.rand(2 * PAIRS, 3, SIDE, SIDE) * 2 - 1
        latents = torch.randn(2 * PAIRS, 4, SIDE // 8, SIDE // 8)
        errors = None if online_reference else torch.rand(2 * PAIRS, dtype=torch.float64)

        def step():
            rows = latents if encoder is None else encoder.encode(pixels).latent_dist.mode() * 0.18215
            loss, _ = objective(self.policy, rows, self.text, seeds=range(PAIRS), ref_error=errors)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def parts(self):
        encoder, reference = vae().requires_grad_(False).eval(), frozen_copy(self.policy)
        pixels, latents = torch.rand(2 * PAIRS, 3, SIDE, SIDE), torch.randn(2 * PAIRS, 4, SIDE // 8, SIDE // 8)
        timesteps, text = torch.full((2 * PAIRS,), 500), self.text["encoder_hidden_states"].repeat(2, 1, 1)
        arm = [picture()] * PAIRS
        pred, ref_pred, target = (torch.randn_like(latents) for _ in range(3))
        pred.requires_grad_()
        gradients = [(parameter, torch.full_like(parameter, 1e-3)) for parameter in self.policy.parameters()]

        # Each is found without gradients, and leaves none, whatever comes before and after it.
        def forward_and_backward():
            self.policy(latents, timesteps, text).sample.square().mean().backward()
            self.optimizer.zero_grad()

        def ask_reference():
            with torch.no_grad():
                reference(latents, timesteps, text)

        def loss():
            polydpo_fast.loss(pred, ref_pred, target, return_metrics=True)[0].backward()
            pred.grad = None

        def optimizer():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()

        return {
            "decoding": lambda: polydpo_fast.decode_pairs(arm, arm, size=SIDE, dtype=torch.float32, threads=1),
            "VAE": lambda: encoder.encode(pixels),
            "reference": ask_reference,
            "policy, forward and backward": forward_and_backward,
            "loss": loss,
            "optimizer": optimizer,
        }


def resident_mb(field="VmRSS"):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def peak_mb(name):
    code = "from test_training import *; torch.set_num_threads(1); before = resident_mb()\n"
    code += f"step = Training().way(*WAYS[{name!r}]); step(); step(); print(resident_mb('VmHWM') - before)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    return float(run.stdout.split()[-1])


@pytest.fixture(scope="module")
def measured():
    """Times of each way and part."""
    torch.set_num_threads(1)
    training = Training()
    ways = {name: training.way(*way) for name, way in WAYS.items()}
    return interleaved({**ways, **training.parts()}, ROUNDS)


@pytest.mark.parametrize("way", WAYS)
def test_steps(benchmark, measured, way):
    facts = {"peak MB": peak_mb(way)}
    report(benchmark, Measured("training step, 142 M parameters", way, measured[way], True, facts=facts))


@pytest.mark.parametrize("part", ["decoding", "VAE", "reference", "policy, forward and backward", "loss", "optimizer"])
def test_parts(benchmark, measured, part):
    ours = part in ("decoding", "loss")
    report(benchmark, Measured("parts of the step", part, measured[part], ours))


class UNet2DConditionModel(torch.nn.Module):
    """By its name what PairObjective takes it for; its prediction costs nothing."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        return (self.prediction,)


SHAPES = {
    "tiny (4, 4, 8, 8)": (4, 4, 8, 8),
    "the large one's (2, 4, 16, 16)": (2, 4, 16, 16),
    "SD1.5's (8, 4, 64, 64)": (8, 4, 64, 64),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_overhead(benchmark, measured, shape):
    """Microseconds of the wall clock: a call, less calls of both models and the loss with the same tensors."""
    latents, scheduler = torch.randn(SHAPES[shape]), diffusers.DDPMScheduler()
    text, seeds = torch.randn(len(latents) // 2, 77, 768), range(len(latents) // 2)
    policy, reference = (UNet2DConditionModel(torch.randn_like(latents)) for _ in range(2))
    objective = PairObjective(scheduler, reference=reference)
    noise, timesteps = draw_noise(seeds, latents.shape[1:]), draw_timesteps(scheduler, seeds)
    noised, both = noise_pairs(scheduler, latents, noise, timesteps), torch.cat((text, text))

    def bare():
        with torch.no_grad():
            ref_pred = reference(noised.noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        pred = policy(noised.noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        polydpo_fast.loss(pred, ref_pred, noised.target, return_metrics=True)

    ways = {
        "bare": bare,
        "drawn": lambda: objective(policy, latents, {"encoder_hidden_states": text}, seeds=seeds),
        "given": lambda: objective(policy, latents, {"encoder_hidden_states": text}, noise=noise, timesteps=timesteps),
    }
    times = interleaved(ways, rounds=500)
    median = {name: statistics.median(found["wall"]) for name, found in times.items()}
    facts = {"microseconds with noise given": (median["given"] - median["bare"]) * 1e6}
    if "large" in shape:
        step = statistics.median(measured[next(iter(WAYS))]["cpu"])
        facts["share of the step"] = (median["drawn"] - median["bare"]) / step
    overhead = [max(0.0, drawn - median["bare"]) for drawn in times["drawn"]["wall"]]
    times = {"wall": overhead}
    report(benchmark, Measured("PairObjective beside models and loss", shape, times, True, "wall", facts=facts))
