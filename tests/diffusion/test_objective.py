"""PairObjective on Diffusers' own model classes, against training steps written out plainly."""

import contextlib
import copy
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import EMAModel, compute_loss_weighting_for_sd3, compute_snr
from diffusion.tiny import FAMILIES, PAIRS, build, unet
from peft import LoraConfig, get_peft_model

from polydpo_fast.diffusion import (
    PairObjective,
    adapters_off,
    draw_timesteps,
    ema_weights,
    fingerprint,
    frozen_copy,
    predict,
    time_ids,
    timestep_weights,
)
from polydpo_fast.diffusion.fingerprints import alternatives
from polydpo_fast.diffusion.reference import unwrapped

SEEDS = [5, 6]
BETA, ALPHA = 500.0, 2.0


def perturbed(model, seed=1):
    """A policy that has learned something."""
    torch.manual_seed(seed)
    policy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003)
    return policy


def plain_forward(family, model, noisy, timesteps, cond):
    """How Diffusers' own pipelines and training scripts call these models."""
    if family in ("sd15", "sdxl"):
        return model(noisy, timesteps, **cond).sample
    if family == "sd3":
        return model(noisy, cond["encoder_hidden_states"], cond["pooled_projections"], timesteps).sample
    if family == "wan":
        return model(noisy, timesteps, cond["encoder_hidden_states"]).sample
    from diffusers import FluxPipeline

    n, c, h, w = noisy.shape
    packed = FluxPipeline._pack_latents(noisy, n, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", noisy.dtype)
    out = model(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.full((n,), 3.5),
        pooled_projections=cond["pooled_projections"],
        encoder_hidden_states=cond["encoder_hidden_states"],
        txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3),
        img_ids=ids,
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8)


def plain_step(family, policy, reference, latents, cond, scheduler, noise, numbers):
    """Diffusion-DPO's step as the published scripts have it (Poly-DPO's term added), in float32."""

    def double(value):
        if isinstance(value, dict):
            return {k: double(v) for k, v in value.items()}
        return value if len(value) == 2 * PAIRS else torch.cat([value, value])

    cond = double(cond)
    noise2 = torch.cat([noise, noise])
    if family in ("sd15", "sdxl"):
        timesteps = torch.cat([numbers, numbers])
        noisy, target = scheduler.add_noise(latents, noise2, timesteps), noise2
    else:
        timesteps = scheduler.timesteps[torch.cat([numbers, numbers])]
        sigmas = scheduler.sigmas[torch.cat([numbers, numbers])].view(-1, *[1] * (latents.dim() - 1))
        noisy, target = (1.0 - sigmas) * latents + sigmas * noise2, noise2 - latents
    with torch.no_grad():
        ref_pred = plain_forward(family, reference, noisy, timesteps, cond)
    model_pred = plain_forward(family, policy, noisy, timesteps, cond)
    # In float64: in float32 this formula alone would lose what the test is to compare.
    model_losses = (model_pred.double() - target.double()).pow(2).flatten(1).mean(1)
    ref_losses = (ref_pred.double() - target.double()).pow(2).flatten(1).mean(1)
    model_w, model_l = model_losses.chunk(2)
    ref_w, ref_l = ref_losses.chunk(2)
    inside = -0.5 * BETA * ((model_w - model_l) - (ref_w - ref_l))
    loss = (-F.logsigmoid(inside) + ALPHA * (1 - torch.sigmoid(inside))).mean()
    return loss, (inside > 0).double().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_one_written_plainly(family):
    reference, latents, cond, scheduler = build(family)
    policy = perturbed(reference)
    other = copy.deepcopy(policy)
    torch.manual_seed(3)
    noise, numbers = torch.randn(PAIRS, *latents.shape[1:]), torch.tensor([300, 700])
    objective = PairObjective(scheduler, reference=reference, beta=BETA, alpha=ALPHA)
    loss, metrics = objective(policy, latents, cond, noise=noise, timesteps=numbers)
    expected, accuracy = plain_step(family, other, reference, latents, cond, scheduler, noise, numbers)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(loss.item() - math.log(2) - ALPHA / 2) > 1e-3  # there is something to compare
    assert metrics["implicit_accuracy"].item() == accuracy
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(policy.named_parameters(), other.parameters(), strict=True):
        # All of float32's rounding is a tenth of that.
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    for model in (policy, other):
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    moved = 0.0
    for ours, theirs, old in zip(policy.parameters(), other.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        moved += (ours - old).norm().item()
    assert moved > 0.1  # of weights whose norm is about 25


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_begin_at_their_references(family):
    """At step 0 the loss is log 2 + alpha/2 exactly, and every pair a tie; a LoRA's base weights get no gradient."""
    model, latents, cond, scheduler = build(family)
    base = frozen_copy(model)
    objective = PairObjective(scheduler, reference=base, beta=5000.0, alpha=ALPHA)
    loss, metrics = objective(model, latents, cond, seeds=SEEDS)
    assert loss.item() == torch.tensor(math.log(2) + ALPHA / 2).item()
    assert metrics["implicit_accuracy"].item() == 0.5
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights="gaussian"))
    objective = PairObjective(scheduler, reference=adapters_off, beta=5000.0, alpha=ALPHA)
    loss, metrics = objective(model, latents, cond, seeds=SEEDS)
    assert loss.item() == torch.tensor(math.log(2) + ALPHA / 2).item()
    assert metrics["implicit_accuracy"].item() == 0.5
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    # After a step the frozen copy says the same as the adapters switched off.
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    ours, _ = objective(model, latents, cond, seeds=SEEDS)
    copied, _ = PairObjective(scheduler, reference=base, beta=5000.0, alpha=ALPHA)(model, latents, cond, seeds=SEEDS)
    assert ours.item() == copied.item() != loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    """What is computed again in the backward pass has its adapters on; and what is kept for it is less."""
    model, latents, cond, scheduler = build(family)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))
    model.train()
    objective = PairObjective(scheduler, reference=adapters_off, beta=5.0)
    gradients, kept = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=bytes_kept: sizes.append(x.nbytes) or x, lambda x: x
        ):
            loss, _ = objective(model, latents, cond, seeds=SEEDS)
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append([parameter.grad.clone() for parameter in trained])
        kept.append(sum(bytes_kept))
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_are_as_before_afterwards():
    model, *_ = build("sd15")
    with pytest.raises(ValueError, match="model is a UNet2DConditionModel without PEFT adapters"), adapters_off(model):
        pass
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    model.set_adapter("second")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), adapters_off(torch.compile(model)):
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.active_adapters() == ["second"]
    model.disable_adapters()
    with adapters_off(model):
        pass
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert all(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def test_a_reference_that_would_be_trained_is_refused():
    """What PEFT trains of the model itself has no copy without it."""
    model, latents, cond, scheduler = build("sd15")
    for change, name in (("lora_only", r"\S*to_out\.0\.base_layer\.bias"), ("conv_out", r"conv_out\.weight")):
        policy = copy.deepcopy(model)
        bias = change if change == "lora_only" else "none"
        policy.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, bias=bias))
        if change == "conv_out":
            policy.conv_out.requires_grad_(True)
        objective = PairObjective(scheduler, reference=adapters_off)
        with pytest.raises(ValueError, match=f"model's {name} requires gradients and is of no adapter"):
            objective(torch.compile(policy), latents, cond, seeds=SEEDS)
        policy.requires_grad_(False)
        objective(policy, latents, cond, seeds=SEEDS)
    # Errors of before do not move.
    errors = PairObjective(scheduler, reference=model).reference_errors(None, latents, cond, seeds=SEEDS)
    policy.conv_out.requires_grad_(True)
    PairObjective(scheduler)(policy, latents, cond, seeds=SEEDS, ref_error=errors)
    assert fingerprint(model) in alternatives(policy)


def test_modules_that_are_saved_whole_are_switched_off_too():
    """PEFT trains copies of them, and keeps the originals."""
    model, latents, cond, scheduler = build("sd15")
    base = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, modules_to_save=["conv_out"])
    policy = get_peft_model(model, config)
    trained = [parameter for name, parameter in policy.named_parameters() if "modules_to_save" in name]
    assert len(trained) == 2
    with torch.no_grad():
        trained[0].add_(0.1)
    ours, _ = PairObjective(scheduler, reference=adapters_off, beta=BETA)(policy, latents, cond, seeds=SEEDS)
    want, _ = PairObjective(scheduler, reference=base, beta=BETA)(policy, latents, cond, seeds=SEEDS)
    assert ours.item() == want.item()
    ours.backward()
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_a_reference(dtype):
    """Of float32, also for a policy of another dtype: both are afterwards what they were, to the bit."""
    model, latents, cond, scheduler = build("sd15")
    policy = perturbed(model).to(dtype)
    policy.conv_in.requires_grad_(False)  # has its averages nevertheless
    ema = EMAModel(model.parameters())
    averages = [average.clone() for average in ema.shadow_params]
    weights = [parameter.clone() for parameter in policy.parameters()]
    cond = {name: value.to(dtype) for name, value in cond.items()}
    objective = PairObjective(scheduler, reference=lambda m: ema_weights(m, ema), beta=BETA)
    loss, _ = objective(policy, latents, cond, seeds=SEEDS)
    loss.backward()  # the swap has not spoiled what autograd keeps
    want, _ = PairObjective(scheduler, reference=model.to(dtype), beta=BETA)(policy, latents, cond, seeds=SEEDS)
    assert loss.item() == want.item() != torch.tensor(math.log(2)).item()
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages, ema.shadow_params, strict=True))


def test_averages_are_swapped_and_not_copied_away():
    """Where the dtypes are the same no second set of weights is made: a tensor at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, *_ = build("sd15")
    averaged = perturbed(model)
    ema = EMAModel(averaged.parameters())

    class Largest(TorchDispatchMode):
        alive, most = weakref.WeakSet(), 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and "clone" in str(function):
                self.alive.add(result)
                self.most = max(self.most, len(self.alive))
            return result

    with Largest() as seen, ema_weights(model, ema):
        assert torch.equal(next(model.parameters()), next(averaged.parameters()))
    assert 1 <= seen.most <= 2


def test_what_autocast_keeps_of_the_weights_serves_one_forward():
    """It keeps them converted until its end: those of the policy are not the reference's, and those of the reference,
    which has no graph, would leave the policy without gradients."""

    @contextlib.contextmanager
    def halved(model):
        with torch.no_grad():
            model.weight.div_(2)
        yield
        with torch.no_grad():
            model.weight.mul_(2)

    def forward(model, noisy, *rest):
        return model(noisy)

    scheduler, latents = build("sd15")[3], torch.randn(4, 4, 8, 8)
    policy = torch.nn.Conv2d(4, 4, 1)
    reference = copy.deepcopy(policy)
    reference.weight.data.div_(2)
    wanted, ours = (PairObjective(scheduler, reference=one, forward=forward, beta=5.0) for one in (reference, halved))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [objective(policy, latents, seeds=SEEDS)[0] for objective in (wanted, ours, ours)]
    assert losses[0].item() == losses[1].item() == losses[2].item() != torch.tensor(math.log(2)).item()
    losses[2].backward()
    assert policy.weight.grad.abs().sum() > 0
    averages = SimpleNamespace(shadow_params=[one.detach().clone() for one in reference.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        policy(latents)
        with ema_weights(policy, averages):
            assert torch.equal(policy(latents), reference(latents))


def test_averages_may_be_of_adapters_alone():
    model, latents, cond, scheduler = build("sd15")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema, own = EMAModel(trained), [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for average in ema.shadow_params:
            average.zero_()  # adapters that do nothing
    objective = PairObjective(scheduler, reference=lambda m: ema_weights(m, ema), beta=BETA)
    loss, _ = objective(model, latents, cond, seeds=SEEDS)
    want, _ = PairObjective(scheduler, reference=adapters_off, beta=BETA)(model, latents, cond, seeds=SEEDS)
    assert loss.item() == want.item() != torch.tensor(math.log(2)).item()
    assert all(map(torch.equal, trained, own))


def test_averages_that_cannot_be_swapped_leave_all_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    ema = SimpleNamespace(shadow_params=[torch.full_like(x, 7.0) for x in model.parameters()])
    ema.shadow_params[-1] = torch.full((3,), 7.0)
    before = [x.detach().clone() for x in model.parameters()]
    with pytest.raises(RuntimeError, match="size"), ema_weights(model, ema):
        pass
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    assert all((x == 7).all() for x in ema.shadow_params)


def test_averages_of_something_else_are_refused():
    model, *_ = build("sd15")
    ema = EMAModel(list(model.parameters())[:-1])
    with (
        pytest.raises(ValueError, match=r"ema has \d+ averages; the model has \d+ parameters"),
        ema_weights(model, ema),
    ):
        pass


def test_frozen_copies_are_apart():
    model, latents, cond, scheduler = build("sd15")
    reference = frozen_copy(torch.compile(model.train()))
    assert type(reference).__name__ == "UNet2DConditionModel"
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    objective = PairObjective(scheduler, reference=reference)
    loss, metrics = objective(model, latents, cond, seeds=SEEDS)
    assert loss.item() == torch.tensor(math.log(2)).item()
    assert metrics["implicit_accuracy"].item() == 0.5
    next(model.parameters()).data.add_(1)
    assert not torch.equal(next(model.parameters()), next(reference.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_ahead_of_time_equal_those_online(family):
    reference, latents, cond, scheduler = build(family)
    policy = perturbed(reference)
    online = PairObjective(scheduler, reference=reference, beta=BETA)
    errors = online.reference_errors(None, latents, cond, seeds=SEEDS)
    assert errors.shape == (2 * PAIRS,)
    want, _ = online(policy, latents, cond, seeds=SEEDS)
    ours, _ = PairObjective(scheduler, beta=BETA)(policy, latents, cond, seeds=SEEDS, ref_error=errors)
    # The difference of two nearly equal errors, each exact to float32's rounding of the loss's own sum.
    assert ours.item() == pytest.approx(want.item(), abs=BETA * 4e-7)


def test_batches_may_be_split():
    reference, latents, cond, scheduler = build("sdxl")
    policy = perturbed(reference)
    objective = PairObjective(scheduler, reference=reference, beta=BETA, reduction="none", density="logit_normal")
    whole, _ = objective(policy, latents, cond, seeds=SEEDS)
    time_ids = cond["added_cond_kwargs"]["time_ids"]
    for i in range(PAIRS):
        part = {
            "encoder_hidden_states": cond["encoder_hidden_states"][i : i + 1],
            "added_cond_kwargs": {
                "text_embeds": cond["added_cond_kwargs"]["text_embeds"][i : i + 1],
                "time_ids": time_ids[[i, i + PAIRS]],
            },
        }
        one, _ = objective(policy, latents[[i, i + PAIRS]], part, seeds=SEEDS[i : i + 1])
        assert one.item() == pytest.approx(whole[i].item(), rel=1e-4)  # the model's own rounding differs with B


@pytest.mark.parametrize("words", [PAIRS, 2 * PAIRS, 5])
def test_flux_takes_the_places_that_its_pipeline_gives(words):
    """A row per token, for all pairs, also where there are as many tokens as pairs."""
    reference, latents, cond, scheduler = build("flux")
    policy = perturbed(reference)
    cond["encoder_hidden_states"] = torch.randn(PAIRS, words, 12)
    objective = PairObjective(scheduler, reference=reference, beta=BETA)
    want, _ = objective(policy, latents, cond, seeds=SEEDS)
    places = FluxPipeline._prepare_latent_image_ids(1, latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float)
    ours, _ = objective(policy, latents, {**cond, "img_ids": places, "txt_ids": torch.zeros(words, 3)}, seeds=SEEDS)
    assert ours.item() == want.item()
    other, _ = objective(policy, latents, {**cond, "txt_ids": torch.ones(words, 3)}, seeds=SEEDS)
    assert other.item() != want.item()


class DeepSpeedEngine(torch.nn.Module):
    """As DistributedDataParallel it has the model, and not what the model has."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *arguments, **given):
        return self.module(*arguments, **given)


def test_flux_without_a_guidance_embedding():
    """FLUX.1-schnell has none, and takes no guidance."""
    dev, latents, cond, _ = build("flux")
    schnell = type(dev).from_config(dev.config, guidance_embeds=False).eval()
    cond = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in cond.items()}
    times = torch.full((2 * PAIRS,), 300.0)
    with torch.no_grad():
        found = predict(schnell, latents, times, cond)
        assert torch.equal(predict(schnell, latents, times, {**cond, "guidance": 2.0}), found)
        assert torch.equal(predict(DeepSpeedEngine(schnell), latents, times, cond), found)
        assert found.shape == latents.shape


def test_a_unet_that_is_told_the_guidance_is_not_trained_without():
    """A latent consistency model: its pipeline gives it timestep_cond, and without it another model is trained."""
    _, latents, cond, scheduler = build("sd15")
    model = unet(time_cond_proj_dim=8)
    objective = PairObjective(scheduler, reference=frozen_copy(model), beta=BETA)
    with pytest.raises(ValueError, match=r"time_cond_proj_dim.* conditioning has no timestep_cond"):
        objective(model, latents, cond, seeds=SEEDS)
    loss, _ = objective(model, latents, {**cond, "timestep_cond": torch.ones(PAIRS, 8)}, seeds=SEEDS)
    assert loss.isfinite()


def test_a_class_of_the_users_that_is_called_like_a_unet_needs_no_config():
    class UNet2DConditionModel(torch.nn.Module):
        def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
            return (0.5 * noisy,)

    _, latents, cond, scheduler = build("sd15")
    objective = PairObjective(scheduler, reference=UNet2DConditionModel(), beta=BETA)
    loss, _ = objective(UNet2DConditionModel(), latents, cond, seeds=SEEDS)
    assert loss.item() == pytest.approx(math.log(2))


def test_drawn_by_torchs_generator_without_seeds():
    model, latents, cond, scheduler = build("sd15")
    objective = PairObjective(scheduler, reference=perturbed(model), beta=BETA)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(objective(model, latents, cond)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_pairs_without_seeds_have_noise_of_their_own():
    """Of 300 of a million seeds two would be the same in one batch of twenty; of 2^63 none ever are."""
    noised = PairObjective(build("sd15")[3]).noised(torch.zeros(600, 1, 1, 2))
    assert len(torch.unique(noised.target, dim=0)) == 300


def test_noise_or_timesteps_may_be_given_alone():
    latents, objective = torch.zeros(2 * PAIRS, 1, 1, 2), PairObjective(build("sd15")[3])
    noise, timesteps = torch.randn(PAIRS, 1, 1, 2), torch.tensor([3, 5])
    for seeds in (None, SEEDS):
        assert torch.equal(objective.noised(latents, seeds=seeds, noise=noise).target, noise)
        assert objective.noised(latents, seeds=seeds, timesteps=timesteps).timesteps.tolist() == [3, 5, 3, 5]


def test_a_mask_is_the_losses_and_the_reference_keeps_no_graph():
    """The reference is asked first: one that borrows the policy's weights must not touch them after its forward."""
    _, latents, _, scheduler = build("sd15")
    policy, reference = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
    asked = []

    def forward(one, noisy, timesteps, conditioning):
        asked.append((one is policy, torch.is_grad_enabled()))
        return one(noisy)

    mask = torch.rand(PAIRS, 1, 8, 8) > 0.5
    objective = PairObjective(scheduler, reference=reference, forward=forward, beta=BETA)
    loss, _ = objective(policy, latents, seeds=SEEDS, mask=mask)
    assert asked == [(False, False), (True, True)]
    noisy, _, target = objective.noised(latents, seeds=SEEDS)
    errors = []
    for one in (policy, reference):
        square = (one(noisy).double() - target.repeat(2, 1, 1, 1)).square() * mask.repeat(2, 1, 1, 1)
        errors.append(square.flatten(1).sum(1) / (4 * mask.flatten(1).sum(1).repeat(2)))
    win, lose = (errors[0] - errors[1]).chunk(2)
    torch.testing.assert_close(loss.double(), -F.logsigmoid(-0.5 * BETA * (win - lose)).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [dict(density="logit_normal", logit_mean=-1.5, logit_std=0.5), dict(density="mode", mode_scale=0.4)],
    ids=lambda options: options["density"],
)
def test_timesteps_are_drawn_as_the_objective_was_told(options):
    scheduler, seeds = build("sd15")[3], range(50)
    noised = PairObjective(scheduler, **options).noised(torch.zeros(100, 1, 1, 2), seeds=seeds)
    told = draw_timesteps(scheduler, seeds, **options)
    assert torch.equal(noised.timesteps, torch.cat((told, told)))
    assert not torch.equal(told, draw_timesteps(scheduler, seeds, density=options["density"]))


def test_defaults_of_the_loss_and_gamma_are_weighted_too():
    """omega times the default beta, which is 5000; and min(snr, gamma) with the gamma that was given."""
    model, latents, cond, scheduler = build("sd15")
    options = dict(reference=perturbed(model), reduction="none")
    given = dict(noise=torch.randn(PAIRS, *latents.shape[1:]), timesteps=torch.tensor([100, 200]))
    snr = compute_snr(scheduler, given["timesteps"])
    weights = snr.clamp(max=2.0) / snr
    assert weights[0] < weights[1] < 1
    told = dict(timestep_weight="min_snr", snr_gamma=2.0, weight_applies_to="logit")
    ours, _ = PairObjective(scheduler, **told, **options)(model, latents, cond, **given)
    plain, _ = PairObjective(scheduler, beta=5000.0 * weights, **options)(model, latents, cond, **given)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_weights_of_timesteps_and_pairs():
    model, latents, cond, scheduler = build("sd3")
    options = dict(reference=perturbed(model), beta=BETA, reduction="none")
    plain, _ = PairObjective(scheduler, **options)(model, latents, cond, seeds=SEEDS)
    objective = PairObjective(scheduler, timestep_weight=lambda number: number / 1000, **options)
    numbers = torch.tensor([250, 500])
    noise = torch.randn(PAIRS, *latents.shape[1:])
    plain, _ = PairObjective(scheduler, **options)(model, latents, cond, noise=noise, timesteps=numbers)
    loss, _ = objective(model, latents, cond, noise=noise, timesteps=numbers, pair_weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(loss, plain * torch.tensor([0.25, 1.5]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction):
    """As Diffusers' training scripts have them, and what they tend to where the signal is gone; of a model that
    predicts the latents themselves min(snr, gamma), as Hang et al. 2023 begin."""
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    weights = timestep_weights(scheduler, "min_snr", snr_gamma=3.0)
    assert weights.shape == (1000,)
    numbers = torch.arange(999)
    snr = compute_snr(scheduler, numbers)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    theirs = torch.stack([snr, torch.full_like(snr, 3.0)]).amin(0) / divisor
    torch.testing.assert_close(weights[:999], theirs, rtol=1e-4, atol=1e-7)
    assert weights[999] == (prediction == "epsilon")


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_flow_matching(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = compute_loss_weighting_for_sd3(name, scheduler.sigmas)
    torch.testing.assert_close(timestep_weights(scheduler, name), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "name"), [("sd15", "min_snr"), ("sd3", "cosmap")])
def test_named_weights_of_losses_and_logits(family, name):
    model, latents, cond, scheduler = build(family)
    options = dict(reference=perturbed(model), alpha=0.5, reduction="none")
    numbers, noise = torch.tensor([100, 700]), torch.randn(PAIRS, *latents.shape[1:])
    given = dict(noise=noise, timesteps=numbers)
    weights = timestep_weights(scheduler, name)[numbers]
    assert weights[0] != weights[1]
    plain, _ = PairObjective(scheduler, beta=BETA, **options)(model, latents, cond, **given)
    ours, _ = PairObjective(scheduler, beta=BETA, timestep_weight=name, **options)(model, latents, cond, **given)
    torch.testing.assert_close(ours, plain * weights)
    for beta in (BETA, torch.tensor([BETA, 2 * BETA])):  # omega of Diffusion-DPO's formula is a beta of the timestep
        plain, _ = PairObjective(scheduler, beta=beta * weights, **options)(model, latents, cond, **given)
        objective = PairObjective(scheduler, beta=beta, timestep_weight=name, weight_applies_to="logit", **options)
        ours, _ = objective(model, latents, cond, **given)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_weights_of_timesteps_are_not_rounded_to_the_models_precision():
    scheduler, latents = build("sd15")[3], torch.randn(4, 4, 8, 8)
    policy, reference = (torch.nn.Conv2d(4, 4, 1).bfloat16() for _ in range(2))
    weights, numbers = timestep_weights(scheduler, "min_snr"), torch.tensor([100, 200])
    assert not torch.equal(weights[numbers], weights[numbers].bfloat16().float())
    options = dict(reference=reference, forward=lambda model, noisy, *rest: model(noisy.bfloat16()))
    told = PairObjective(scheduler, beta=5.0, timestep_weight="min_snr", weight_applies_to="logit", **options)
    plain = PairObjective(scheduler, beta=5.0 * weights[numbers], **options)
    given = dict(noise=torch.randn(PAIRS, 4, 8, 8), timesteps=numbers)
    assert told(policy, latents, **given)[0].item() == plain(policy, latents, **given)[0].item()


def test_compiled_and_wrapped_models():
    model, latents, cond, scheduler = build("sd15")
    policy = perturbed(model)
    objective = PairObjective(scheduler, reference=model, beta=BETA)
    want, _ = objective(policy, latents, cond, seeds=SEEDS)
    compiled = torch.compile(policy, backend="aot_eager")
    ours, _ = objective(compiled, latents, cond, seeds=SEEDS)
    assert ours.item() == pytest.approx(want.item(), rel=1e-4)
    ours.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert unwrapped(compiled) is policy


def test_a_reference_is_rounded_as_a_policy_that_accelerate_has_prepared(fresh_accelerate):
    """Its autocast is around the policy's forward alone: else pairs would be decided before anything is learned."""
    from accelerate import Accelerator

    model, latents, cond, scheduler = build("sd15")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    reference = frozen_copy(model)
    policy = accelerator.prepare(model)
    objective = PairObjective(scheduler, reference=reference, beta=5000.0)
    with pytest.raises(ValueError, match=r"the policy computes in half precision.*accelerator\.autocast\(\)"):
        objective(policy, latents, cond, seeds=SEEDS)
    with accelerator.autocast():
        losses = [objective(policy, latents, cond, seeds=SEEDS)[0]]
    prepared_too = PairObjective(scheduler, reference=frozen_copy(policy), beta=5000.0)
    losses.append(prepared_too(policy, latents, cond, seeds=SEEDS)[0])
    assert [loss.item() for loss in losses] == [pytest.approx(math.log(2), abs=1e-8)] * 2


def test_a_reference_in_half_precision_beside_a_policy_in_float32_is_told():
    """As Diffusers' scripts have it, ref_unet.to(weight_dtype): the first logits are those of the rounding then."""
    model, latents, cond, scheduler = build("sd15")
    objective = PairObjective(scheduler, reference=frozen_copy(model).bfloat16(), beta=5000.0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match=r"reference's weights are torch\.bfloat16 and the policy's torch\.float32"),
    ):
        _, metrics = objective(model, latents, cond, seeds=SEEDS)
    assert abs(metrics["reward_win"]) + abs(metrics["reward_lose"]) > 0.1
    of_no_dtype = PairObjective(scheduler, reference=torch.nn.Identity(), forward=lambda model, noisy, *_: noisy)
    of_no_dtype(model, latents)  # without a warning, which would be an error here


def test_with_a_forward_of_the_callers_a_policy_may_be_any_function():
    scale, latents = torch.full((), 0.5, requires_grad=True), torch.randn(4, 4, 8, 8)
    objective = PairObjective(
        build("sd15")[-1], reference_free=True, forward=lambda model, noisy, *_: model(noisy), beta=BETA
    )
    loss, _ = objective(lambda noisy: noisy * scale, latents, seeds=(1, 2))
    loss.backward()
    assert scale.grad.isfinite()
    assert scale.grad != 0


def test_half_precision_models():
    model, latents, cond, scheduler = build("sd15")
    policy = perturbed(model).bfloat16()
    cond = {name: value.bfloat16() for name, value in cond.items()}
    objective = PairObjective(scheduler, reference=frozen_copy(model).bfloat16(), beta=BETA)
    loss, _ = objective(policy, latents, cond, seeds=SEEDS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert next(policy.parameters()).grad.dtype == torch.bfloat16


def test_models_are_not_gone_through_for_their_dtype_in_each_step(monkeypatch):
    """Which Diffusers does: of SD1.5 with LoRA 2000 modules. A model that was converted is asked again."""
    model, latents, cond, scheduler = build("sd15")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS))
    objective, walk, seen = PairObjective(scheduler, reference=adapters_off), torch.nn.Module.named_modules, []

    def watched(self, *arguments, **options):
        for one in walk(self, *arguments, **options):
            seen.append(one)
            yield one

    monkeypatch.setattr(torch.nn.Module, "named_modules", watched)
    counts = []
    for _ in range(2):
        seen.clear()
        objective(model, latents, cond, seeds=SEEDS)
        counts.append(len(seen))
    assert counts[0] > 100
    assert counts[1] < 10
    cond = {name: value.bfloat16() for name, value in cond.items()}
    loss, _ = objective(model.bfloat16(), latents, cond, seeds=SEEDS)
    assert loss.item() == torch.tensor(math.log(2)).item()


def test_float16_with_a_scaled_loss():
    """Gradients of the scaled loss, divided again, are those of float32; one that overflows is noticed."""
    model, latents, cond, scheduler = build("sd15")
    policy = perturbed(model)
    objective = PairObjective(scheduler, reference=model, beta=BETA)
    objective(policy, latents, cond, seeds=SEEDS)[0].backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    for scale, finite in ((2.0**10, True), (2.0**40, False)):
        policy.zero_grad()
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), torch.optim.SGD(policy.parameters(), lr=1e-6)
        before = policy.conv_out.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss, _ = objective(policy, latents, cond, seeds=SEEDS)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        ours = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        scaler.step(optimizer)
        scaler.update()
        assert bool(ours.isfinite().all()) == finite
        assert torch.equal(policy.conv_out.weight, before) != finite
        if finite:  # of a few thousand weights, with eleven bits in each of some ten layers
            assert (ours - wanted).norm() < 0.05 * wanted.norm()


def test_models_of_ones_own():
    scheduler = build("sd15")[3]
    model, latents = torch.nn.Conv2d(4, 4, 1), torch.randn(4, 4, 8, 8)
    with pytest.raises(TypeError, match=r"model is a Conv2d; expected one of UNet2DModel, .*, or forward=, a function"):
        PairObjective(scheduler, reference=copy.deepcopy(model))(model, latents)
    with pytest.raises(TypeError, match="model is a Conv2d"):
        predict(model, latents, torch.zeros(4), {})
    objective = PairObjective(scheduler, reference=copy.deepcopy(model), forward=lambda m, x, t, c: m(x) * c["scale"])
    loss, _ = objective(model, latents, {"scale": torch.tensor(2.0)})
    assert loss.item() == torch.tensor(math.log(2)).item()


def test_bad_arguments_are_named():
    model, latents, cond, scheduler = build("sd15")
    with pytest.raises(ValueError, match="there is neither reference nor ref_error"):
        PairObjective(scheduler)(model, latents, cond)
    for name, expected in (("mask", r"in its calls, objective\(...\)"), ("denisty", "alpha, .*beta, density, ")):
        with pytest.raises(TypeError, match=f"{name}: no argument of PairObjective; expected {expected}"):
            PairObjective(scheduler, **{name: None})
    for options, message in (
        (dict(objective="dpo"), "objective is 'dpo'; expected one of 'poly_dpo', "),
        (dict(beta=-1), "beta is -1; expected a finite number > 0"),
        (dict(alpha=[1.0] * 9), "alpha has 9 coefficients"),
        (dict(reduction="max"), "reduction is 'max'"),
        (dict(density="normal"), "density is 'normal'; expected 'uniform'"),
        (dict(weight_applies_to="beta"), "weight_applies_to is 'beta'; expected 'loss' or 'logit'"),
        (dict(timestep_weight="cosmap"), "timestep_weight is 'cosmap'; with a DDPMScheduler expected 'min_snr', or"),
    ):
        with pytest.raises(ValueError, match=message):
            PairObjective(scheduler, **options)
    for given in (None, "ddpm", DDPMScheduler):
        with pytest.raises(TypeError, match=r"scheduler is a \w+; expected a scheduler of Diffusers, such as DDPM"):
            PairObjective(given)
    adapted = copy.deepcopy(model)
    for policy, reference in (
        (model, model),
        (torch.compile(model, backend="eager"), model),
        (get_peft_model(adapted, LoraConfig(r=2, target_modules=["to_q"])), adapted),
    ):
        with pytest.raises(ValueError, match=r"reference is the policy itself.*; expected frozen_copy\(model\), adapt"):
            PairObjective(scheduler, reference=reference)(policy, latents, cond)
    with pytest.raises(TypeError, match=r"conditioning is a Tensor; expected a dict .* such as \{\"encoder_hidden_s"):
        PairObjective(scheduler, reference=frozen_copy(model))(model, latents, cond["encoder_hidden_states"])
    for given in ((latents[:2], latents[2:]), None):
        with pytest.raises(TypeError, match=r"latents is a \w+; expected a torch.Tensor \(2B, \.\.\.\), winners first"):
            PairObjective(scheduler, reference=frozen_copy(model))(model, given, cond)
    for given in ("unet", adapters_off(adapted)):
        with pytest.raises(TypeError, match=r"reference is a \w+; expected a frozen model, .*such as adapters_off"):
            PairObjective(scheduler, reference=given)
    with pytest.raises(TypeError, match="timestep_weight is 5; expected a name, a function, or None"):
        PairObjective(scheduler, timestep_weight=5)
    with pytest.raises(ValueError, match="mask is given with ref_error, whose errors are of whole samples"):
        PairObjective(scheduler)(model, latents, cond, ref_error=torch.ones(4), mask=torch.ones(2, 1, 8, 8))
    none = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ipo = dict(timestep_weight="min_snr", objective="ipo")
    with pytest.raises(ValueError, match=r"timestep_weight 'min_snr', which is 0 at timestep 999; objective 'ipo' "):
        PairObjective(none, weight_applies_to="logit", **ipo)
    PairObjective(none, **ipo)
    PairObjective(scheduler, weight_applies_to="logit", **ipo)
    with pytest.raises(TypeError, match="scheduler is a EDMEulerScheduler"):
        PairObjective(EDMEulerScheduler())
    with pytest.raises(ValueError, match="seeds has 3 numbers; expected 2, one per pair"):
        PairObjective(scheduler, reference=model)(model, latents, cond, seeds=[1, 2, 3])
    bad = {"encoder_hidden_states": torch.randn(3, 5, 12)}
    with pytest.raises(ValueError, match=r"conditioning\['encoder_hidden_states'\] has shape \(3, 5, 12\); expected 2"):
        PairObjective(scheduler, reference=model)(model, latents, bad)
    flux, latents, cond, scheduler = build("flux")
    with pytest.raises(ValueError, match="latents are 7 x 6; expected even sides"):
        PairObjective(scheduler, reference=frozen_copy(flux))(flux, latents[:, :, :7], cond)


def test_sdxl_time_ids():
    ids = time_ids(torch.tensor([[512, 640], [1024, 1024]]), torch.tensor([[0, 64], [1, 2]]), (512, 768))
    assert ids.tolist() == [[512, 640, 0, 64, 512, 768], [1024, 1024, 1, 2, 512, 768]]


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_a_transformer_of_flow_matching_is_not_trained_to_predict_noise(family):
    """The line of a script for SDXL, taken over: the configuration of a flow's scheduler has no prediction_type."""
    model, latents, conditioning, scheduler = build(family)
    objective = PairObjective(DDPMScheduler.from_config(scheduler.config), reference=frozen_copy(model))
    message = rf"scheduler is a DDPMScheduler, and model a {type(model).__name__}, .* FlowMatchEulerDiscreteScheduler"
    for call in (objective, objective.reference_errors):
        with pytest.raises(ValueError, match=message):
            call(model, latents, conditioning)
