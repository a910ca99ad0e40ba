"""What PairObjective takes of a step of a UNet of SD1.5's own configuration, 860 million random weights.

One pair of 128 x 128 pixels, float32, no VAE, no text encoder, no optimizer, and the policy is its own reference (7 GB
of memory): the smallest step that there may be, of which the wrapper's share is the largest. Measured in two ways.
Directly: the clock on the wall while a call is neither in a model nor in the loss; drawing the noise and adding it are
the wrapper's. And by subtraction: steps with the wrapper less steps of the same calls written plainly, with noise that
is there already, in turns; of that the noise of the machine is part.
"""

import contextlib
import statistics
import time

import pytest
import torch
from timing import Measured, interleaved, report

import polydpo_fast
from polydpo_fast.diffusion import PairObjective, draw_noise, draw_timesteps, noise_pairs
from polydpo_fast.diffusion import objective as wrapper

diffusers = pytest.importorskip("diffusers", reason="Diffusers is not installed")

ROUNDS = 3
LIMIT = 0.01


class Stopwatch:
    """Sums up what functions take."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, function):
        def timed(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    with torch.device("meta"):  # its own initial weights would take a minute
        model = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.02, 0.02)
            else:
                parameter.fill_(float(name.endswith("weight")))
    assert 859e6 < sum(parameter.numel() for parameter in model.parameters()) < 860e6
    return model


@pytest.mark.timeout(900)
def test_share_of_a_step(benchmark, unet, monkeypatch):
    scheduler, latents, text, seeds = diffusers.DDPMScheduler(), torch.randn(2, 4, 16, 16), torch.randn(1, 77, 768), [7]
    noise, timesteps = draw_noise(seeds, latents.shape[1:]), draw_timesteps(scheduler, seeds)
    noised, both = noise_pairs(scheduler, latents, noise, timesteps), torch.cat((text, text))
    objective, elsewhere, own = PairObjective(scheduler, reference=contextlib.nullcontext), Stopwatch(), []

    def bare():
        with torch.no_grad():
            ref_pred = unet(noised.noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        pred = unet(noised.noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        polydpo_fast.loss(pred, ref_pred, noised.target, return_metrics=True)[0].backward()
        unet.zero_grad(set_to_none=False)

    def wrapped():
        objective(unet, latents, {"encoder_hidden_states": text}, seeds=seeds)[0].backward()
        unet.zero_grad(set_to_none=False)

    times = interleaved({"bare": bare, "wrapped": wrapped}, ROUNDS)
    # The fastest: what others do on the machine makes some steps several times as slow.
    step, wrapped_step = (min(times[name]["wall"]) for name in ("bare", "wrapped"))

    monkeypatch.setattr(unet, "forward", elsewhere.around(unet.forward))
    monkeypatch.setattr(wrapper, "preference_loss", elsewhere.around(wrapper.preference_loss))
    for _ in range(ROUNDS):
        elsewhere.seconds, begin = 0.0, time.perf_counter()
        loss = objective(unet, latents, {"encoder_hidden_states": text}, seeds=seeds)[0]
        own.append(time.perf_counter() - begin - elsewhere.seconds)
        loss.backward()
        unet.zero_grad(set_to_none=False)
    share = statistics.median(own) / step
    facts = {"share of the step": share, "by subtraction": wrapped_step / step - 1, "step s": step}
    case, times = "PairObjective in a step of SD1.5's UNet", {"wall": own}
    report(benchmark, Measured(case, "own time", times, True, "wall", facts=facts))
    assert share < LIMIT
