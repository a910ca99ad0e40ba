"""What PairObjective takes of a step of a UNet of SD1.5's own configuration, 860 million random weights.

One pair of 128 x 128 pixels, bfloat16 (6 GB of memory), no VAE, no text encoder, no optimizer: the smallest step that
there may be, of which the wrapper's share is the largest. Measured in two ways. Directly: the clock on the wall while a
call is neither in a model nor in the loss; drawing the noise and adding it are the wrapper's. And by subtraction: steps
with the wrapper less steps of the same calls written plainly, with noise that is there already, in turns; of that the
noise of the machine is part.
"""

import statistics
import time

import pytest
import torch
from timing import Measured, interleaved, report

import polydpo_fast
from polydpo_fast.diffusion import PairObjective, draw_noise, draw_timesteps, frozen_copy, noise_pairs
from polydpo_fast.diffusion import objective as wrapper

diffusers = pytest.importorskip("diffusers", reason="Diffusers is not installed")

ROUNDS = 5
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
    model = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    assert 859e6 < sum(parameter.numel() for parameter in model.parameters()) < 860e6
    return model.bfloat16()


def test_share_of_a_step(benchmark, unet, monkeypatch):
    scheduler, reference = diffusers.DDPMScheduler(), frozen_copy(unet)
    latents, text, seeds = torch.randn(2, 4, 16, 16), torch.randn(1, 77, 768).bfloat16(), [7]
    noise, timesteps = draw_noise(seeds, latents.shape[1:]), draw_timesteps(scheduler, seeds)
    noised, both = noise_pairs(scheduler, latents, noise, timesteps), torch.cat((text, text))
    objective, elsewhere, own = PairObjective(scheduler, reference=reference), Stopwatch(), []

    def bare():
        noisy = noised.noisy.bfloat16()
        with torch.no_grad():
            ref_pred = reference(noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        pred = unet(noisy, noised.timesteps, encoder_hidden_states=both, return_dict=False)[0]
        polydpo_fast.loss(pred, ref_pred, noised.target, return_metrics=True)[0].backward()
        unet.zero_grad(set_to_none=False)

    def wrapped():
        objective(unet, latents, {"encoder_hidden_states": text}, seeds=seeds)[0].backward()
        unet.zero_grad(set_to_none=False)

    times = interleaved({"bare": bare, "wrapped": wrapped}, ROUNDS)
    median = {name: statistics.median(found["wall"]) for name, found in times.items()}

    for model in (unet, reference):
        monkeypatch.setattr(model, "forward", elsewhere.around(model.forward))
    monkeypatch.setattr(wrapper, "preference_loss", elsewhere.around(wrapper.preference_loss))
    for _ in range(ROUNDS):
        elsewhere.seconds, begin = 0.0, time.perf_counter()
        loss = objective(unet, latents, {"encoder_hidden_states": text}, seeds=seeds)[0]
        own.append(time.perf_counter() - begin - elsewhere.seconds)
        loss.backward()
        unet.zero_grad(set_to_none=False)
    share = statistics.median(own) / median["bare"]
    subtracted = (median["wrapped"] - median["bare"]) / median["bare"]
    facts = {"share of the step": share, "by subtraction": subtracted, "step s": median["bare"]}
    report(benchmark, Measured("PairObjective in a step of SD1.5's UNet", "own time", {"wall": own}, "wall", 1, facts))
    assert share < LIMIT
