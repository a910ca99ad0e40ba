"""A step on a device: everything is where it should be, and the host never waits for the device.

On fake tensors, which have devices and no numbers: a model and latents "on the device" beside schedulers, weights and
errors on the CPU, as in a training. What mixes devices raises, and so does what asks for a number.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from diffusion.tiny import FAMILIES, PAIRS, build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from polydpo_fast.diffusion import PairObjective, ema_weights, families, pixels

DEVICE = torch.device("meta")  # any that is not the CPU's; a build without CUDA cannot even index fake CUDA tensors


class Watch(TorchFunctionMode):
    """Refuses copies to the device that wait for all that was asked of it before, as blocking copies do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        there = any(isinstance(x, (str, torch.device)) and str(x) == str(DEVICE) for x in (*args[1:], *kwargs.values()))
        made_here = name in ("tensor", "as_tensor")
        moved = name == "to" and args[0].device.type == "cpu"
        if there and (made_here or (moved and not kwargs.get("non_blocking"))):
            raise AssertionError(f"{name}() waits for the device")
        assert name not in ("item", "tolist", "cpu", "cuda", "nonzero", "__bool__") or args[0].device != DEVICE
        return func(*args, **kwargs)


def on_device(x):
    if isinstance(x, torch.nn.Module):
        return moved(x)
    if isinstance(x, dict):
        return {name: on_device(value) for name, value in x.items()}
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)


def moved(model):
    """The model itself."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(on_device(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)
    return model


@pytest.fixture
def fakes():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reference", "weight_applies_to"), [("model", "loss"), ("errors", "logit")])
def test_a_step_does_not_wait(family, reference, weight_applies_to):
    policy, latents, conditioning, scheduler = build(family)
    frozen = copy.deepcopy(policy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy, frozen, latents, conditioning = map(on_device, (policy, frozen, latents, conditioning))
        flow = hasattr(scheduler, "sigmas")
        objective = PairObjective(
            scheduler,
            reference=frozen if reference == "model" else None,
            timestep_weight="cosmap" if flow else "min_snr",
            weight_applies_to=weight_applies_to,
            density="logit_normal",
            beta=500.0 if weight_applies_to == "loss" else torch.full((PAIRS,), 500.0),
        )
        errors = None if reference == "model" else torch.ones(2 * PAIRS, dtype=torch.float64)
        with Watch():
            loss, metrics = objective(
                policy, latents, conditioning, seeds=[1, 2], ref_error=errors, pair_weight=torch.ones(PAIRS)
            )
            loss.backward()
        assert {x.device for x in (loss, *metrics.values())} == {DEVICE}
        assert all(p.grad.device == DEVICE for p in policy.parameters() if p.grad is not None)


def test_the_watch_sees_what_waits(fakes):
    with Watch():
        for waits in (
            lambda: torch.ones(2).to(DEVICE),
            lambda: torch.ones(2).to(torch.empty(2, device=DEVICE).device, torch.float64),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: torch.ones((), device=DEVICE).item(),
        ):
            with pytest.raises(AssertionError):
                waits()
        torch.ones(2).to(DEVICE, non_blocking=True)


def test_the_geometry_of_sdxl_does_not_wait(fakes):
    family = families.FAMILIES["StableDiffusionXLPipeline"]
    batch = SimpleNamespace(original_size=torch.ones(4, 2).long(), crop_top_left=torch.zeros(4, 2).long())
    for sizes in ("fixed", "own"):
        text = {"text_embeds": torch.empty(2, 8, device=DEVICE)}
        with Watch():
            given = families.conditioning(family, text, batch, (64, 64), sizes)
        assert given["added_cond_kwargs"]["time_ids"].device == DEVICE


def test_the_normalisation_of_latents_does_not_wait(fakes):
    config = dict(latents_mean=[0.1, 0.2], latents_std=[1.0, 2.0])
    vae = SimpleNamespace(config=config)
    with Watch():
        shift, scale = pixels._normalisation(vae, torch.empty(1, 2, 3, 4, 4, device=DEVICE))
    assert {shift.device, scale.device} == {DEVICE}
    assert shift.shape == scale.shape == (2, 1, 1, 1)


def test_autocast_keeps_no_weights_of_the_reference():
    """Autocast converts a weight once and keeps it, whatever becomes of the weight; policy and reference share one."""
    model, latents, conditioning, scheduler = build("sd15")
    averages = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in averages.parameters():
            parameter.mul_(1.01)

    class Exchanged:
        def __init__(self, policy):
            self.policy = policy

        def __enter__(self):
            self.own = [p.detach().clone() for p in self.policy.parameters()]
            for p, average in zip(self.policy.parameters(), averages.parameters(), strict=True):
                p.data.copy_(average)

        def __exit__(self, *_):
            for p, own in zip(self.policy.parameters(), self.own, strict=True):
                p.data.copy_(own)

    results = []
    for reference in (averages, Exchanged):
        objective = PairObjective(scheduler, reference=reference, beta=500.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = objective(model, latents, conditioning, seeds=[1, 2])
        loss.backward()
        results.append([loss.detach(), *metrics.values(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert results[0][0] != torch.tensor(2.0).log()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_keeps_no_averages():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    ema = EMAModel(layer.parameters())
    with torch.no_grad():
        layer.weight.mul_(3)
    with torch.autocast("cpu", torch.bfloat16):
        own = layer(x)
        with torch.no_grad(), ema_weights(layer, ema):
            averaged = layer(x)
        again = layer(x)
    assert torch.equal(own, again)
    assert not torch.equal(own, averaged)
