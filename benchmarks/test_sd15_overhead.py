"""What PairObjective takes of a step of a UNet of SD1.5's own configuration, 860 million random weights.

One pair of 128 x 128 pixels, float32, one thread, no VAE, no text encoder, no optimizer, and the policy is its own
reference (7 GB of memory): the smallest step that there may be, of which the wrapper's share is the largest. Measured
by the clock on the wall while a call is neither in a model nor in the loss; drawing the noise and adding it are the
wrapper's. To subtract steps without the wrapper from steps with it would tell nothing: from one to the next, steps
differ by more than it takes.
"""

import contextlib
import statistics
import time

import pytest
import torch
from timing import Measured, report

from polydpo_fast.diffusion import PairObjective
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
    # As in test_training.py: with several, a copy of the text's 59,136 numbers waits for what else the machine does.
    torch.set_num_threads(1)
    latents, conditioning = torch.randn(2, 4, 16, 16), {"encoder_hidden_states": torch.randn(1, 77, 768)}
    objective = PairObjective(diffusers.DDPMScheduler(), reference=contextlib.nullcontext)
    elsewhere, own, steps = Stopwatch(), [], []
    monkeypatch.setattr(unet, "forward", elsewhere.around(unet.forward))
    monkeypatch.setattr(wrapper, "preference_loss", elsewhere.around(wrapper.preference_loss))
    for _ in range(1 + ROUNDS):
        elsewhere.seconds, begin = 0.0, time.perf_counter()
        loss = objective(unet, latents, conditioning, seeds=[7])[0]
        own.append(time.perf_counter() - begin - elsewhere.seconds)
        loss.backward()
        unet.zero_grad(set_to_none=False)
        steps.append(time.perf_counter() - begin)
    del own[0], steps[0]  # of the first step, which finds no memory of its own
    step = statistics.median(steps)
    share = statistics.median(own) / step
    facts, case = {"share of the step": share, "step s": step}, "PairObjective in a step of SD1.5's UNet"
    report(benchmark, Measured(case, "own time", {"wall": own}, True, "wall", facts=facts))
    assert share < LIMIT
