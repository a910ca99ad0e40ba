"""What only a GPU can show of the bridge: the same numbers as on a CPU, and no waiting."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("polydpo_fast._C", reason="the C++ extension is not built")
from polydpo_fast.diffusion import PairObjective, draw_noise, ema_weights

pytestmark = pytest.mark.gpu


def test_noise_is_that_of_the_cpu():
    """To the bit, so that errors may be computed ahead on one and learned from on the other."""
    here, there = (draw_noise(range(8), (16, 5, 60, 104), device=device) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


def plain():
    """A model and a scheduler of nobody's, for a machine without Diffusers."""
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")
    scheduler = SimpleNamespace(config=config, alphas_cumprod=torch.linspace(0.999, 0.01, 1000))
    model = torch.nn.Conv2d(4, 4, 3, padding=1)
    return model, torch.randn(4, 4, 8, 8), {"scale": torch.tensor([0.5, 2.0])}, scheduler


def scaled(model, noisy, timesteps, conditioning):
    return model(noisy) * conditioning["scale"].view(-1, 1, 1, 1)


@pytest.mark.parametrize("family", ["plain", "sd15", "sdxl", "sd3", "flux", "wan"])
def test_a_step_is_that_of_the_cpu_and_waits_for_nothing(family, monkeypatch):
    if family == "plain":
        model, latents, conditioning, scheduler = plain()
    else:
        pytest.importorskip("diffusers", reason="diffusers is not installed")
        from diffusion.tiny import build

        model, latents, conditioning, scheduler = build(family)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(1.01)
    weights = torch.tensor([0.5, 2.0])
    results = []
    for device in ("cpu", "cuda"):
        model, frozen = model.to(device), frozen.to(device)
        name = "cosmap" if hasattr(scheduler, "sigmas") else "min_snr"
        forward = scaled if family == "plain" else None
        objective = PairObjective(scheduler, reference=frozen, forward=forward, timestep_weight=name, beta=500.0)
        given = moved(conditioning, device), latents.to(device)
        for attempt in range(2):  # the first compiles
            model.zero_grad()
            if device == "cuda" and attempt:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss, metrics = objective(model, given[1], given[0], seeds=range(2), pair_weight=weights)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        results.append(torch.stack([loss.detach(), norm, *metrics.values()]).cpu())
    # A convolution may differ by 1e-5 of itself (Winograd's), which beta multiplies; another noise would by far more.
    assert torch.allclose(*results, rtol=1e-2, atol=1e-2)


def test_autocast_keeps_no_averages():
    training = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    layer, x = torch.nn.Linear(64, 64, device="cuda"), torch.randn(8, 64, device="cuda")
    ema = training.EMAModel(layer.parameters())
    with torch.no_grad():
        layer.weight.mul_(3)
    with torch.autocast("cuda", torch.bfloat16):
        own = layer(x)
        with torch.no_grad(), ema_weights(layer, ema):
            averaged = layer(x)
        again = layer(x)
    assert torch.equal(own, again)
    assert not torch.equal(own, averaged)


def moved(x, device):
    return {name: moved(value, device) for name, value in x.items()} if isinstance(x, dict) else x.to(device)
