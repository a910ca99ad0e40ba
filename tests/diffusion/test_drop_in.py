"""Diffusers' published DPO scripts, and the lines of them that change.

The loops below are written anew after what train_diffusion_dpo.py (SD1.5) and train_diffusion_dpo_sdxl.py compute: what
they draw and in which order, their formulas, their beta, their LoRA. Data pipeline and encoders are not the matter.
"""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from diffusion.tiny import build
from peft import LoraConfig

import polydpo_fast
from polydpo_fast.diffusion import PairObjective, adapters_off

STEPS = 20
PAIRS = 2


def setting(family):
    """A UNet with LoRA, as both scripts train it, batches of latents and conditioning, a scheduler."""
    unet, _, conditioning, scheduler = build(family)
    unet.requires_grad_(False)
    lora = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
    )
    unet.add_adapter(lora)
    latents = torch.randn(STEPS, 2 * PAIRS, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    return unet, latents, conditioning, scheduler


def published(family, unet, latents, conditioning, scheduler):
    """The losses, and the implicit accuracies, in the model's dtype."""
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    losses, accuracies = [], []
    for batch in latents:
        noise = torch.randn_like(batch).chunk(2)[0].repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch) // 2,)).repeat(2)
        noisy = scheduler.add_noise(batch, noise, timesteps).to(unet.dtype)
        text = conditioning["encoder_hidden_states"].repeat(2, 1, 1)
        given = {}
        if family == "sdxl":
            added = conditioning["added_cond_kwargs"]
            given["added_cond_kwargs"] = {
                "text_embeds": added["text_embeds"].repeat(2, 1),
                "time_ids": added["time_ids"],
            }
        model_pred = unet(noisy, timesteps, text, **given).sample
        model_losses = F.mse_loss(model_pred, noise.to(unet.dtype), reduction="none").mean(dim=(1, 2, 3))
        model_losses_w, model_losses_l = model_losses.chunk(2)
        unet.disable_adapters()
        with torch.no_grad():
            ref_pred = unet(noisy, timesteps, text, **given).sample
            ref_losses = F.mse_loss(ref_pred, noise.to(unet.dtype), reduction="none").mean(dim=(1, 2, 3))
        unet.enable_adapters()
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        model_diff, ref_diff = model_losses_w - model_losses_l, ref_losses_w - ref_losses_l
        inside = -0.5 * 5000 * (model_diff - ref_diff) if family == "sdxl" else 2500 * (ref_diff - model_diff)
        loss = -F.logsigmoid(inside).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append(((inside > 0).double() + 0.5 * (inside == 0).double()).mean().item())
    return losses, accuracies


def ours(family, unet, latents, conditioning, scheduler):
    """The same loop with this library: from the noise on, two lines; both scripts become one."""
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    objective = PairObjective(scheduler, reference=adapters_off, beta=5000.0)
    losses, accuracies = [], []
    for batch in latents:
        noise = torch.randn_like(batch).chunk(2)[0]
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch) // 2,))
        loss, metrics = objective(unet, batch, conditioning, noise=noise, timesteps=timesteps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append(metrics["implicit_accuracy"].item())
    return losses, accuracies


# In float32 an error near 1 has an ulp of 1e-7, and the scripts multiply differences of four of them by 2500: off by up
# to 4e-4 when measured. In float64 nothing hides the formula.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_twenty_steps_have_equal_losses(family, dtype, tolerance):
    unet, latents, conditioning, scheduler = setting(family)
    conditioning = with_dtype(conditioning, dtype)
    runs = []
    for loop in (published, ours):
        torch.manual_seed(5)
        runs.append(loop(family, copy.deepcopy(unet).to(dtype), latents, conditioning, scheduler))
    (theirs, hits), (mine, my_hits) = runs
    assert mine[0] == pytest.approx(torch.tensor(2.0, dtype=dtype).log().item(), rel=1e-15)
    assert max(theirs) - min(theirs) > 0.05  # there is something to compare
    assert mine == pytest.approx(theirs, rel=tolerance)
    if dtype == torch.float64:  # else a logit near 0 may have either sign
        assert my_hits == hits


def test_the_lines_for_the_script_of_sdxl_compute_what_it_logs():
    """Those of the page, under the script's names: its loss, its three other figures and its gradient, in float64."""
    page = (Path(__file__).parents[2] / "docs" / "questions.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ref_preds = " in block)
    unet, latents, conditioning, scheduler = setting("sdxl")
    unet, given = unet.double(), with_dtype(conditioning, torch.float64)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:  # zeros at first, with which the policy is its reference
            torch.nn.init.normal_(weight, std=0.01)
    text, added = given["encoder_hidden_states"].repeat(2, 1, 1), given["added_cond_kwargs"]
    noise = torch.randn(PAIRS, 4, 8, 8, dtype=torch.float64).repeat(2, 1, 1, 1)
    scope = {
        "torch": torch,
        "polydpo_fast": polydpo_fast,
        "unet": unet,
        "accelerator": SimpleNamespace(unwrap_model=lambda model: model),
        "args": SimpleNamespace(beta_dpo=50.0),
        "timesteps": torch.tensor([100, 600]).repeat(2),
        "prompt_embeds": text,
        "pooled_prompt_embeds": added["text_embeds"].repeat(2, 1),
        "add_time_ids": added["time_ids"],
        "target": noise,
    }
    scope["noisy_model_input"] = scheduler.add_noise(latents[0].double(), noise, scope["timesteps"])
    kwargs = {"time_ids": scope["add_time_ids"], "text_embeds": scope["pooled_prompt_embeds"]}

    def predict():
        return unet(scope["noisy_model_input"], scope["timesteps"], text, added_cond_kwargs=kwargs).sample

    scope["model_pred"] = predict().detach().requires_grad_()
    exec(compile(code, "questions.md", "exec"), scope)

    unet.disable_adapters()
    with torch.no_grad():
        ref = F.mse_loss(predict(), noise, reduction="none").mean(dim=(1, 2, 3))
    unet.enable_adapters()
    assert torch.equal(predict(), scope["model_pred"])  # the adapters are on again
    pred = scope["model_pred"].detach().requires_grad_()
    model = F.mse_loss(pred, noise, reduction="none").mean(dim=(1, 2, 3))
    inside = -0.5 * 50.0 * ((model[:PAIRS] - model[PAIRS:]) - (ref[:PAIRS] - ref[PAIRS:]))
    assert inside.abs().min() > 1e-3
    loss = -F.logsigmoid(inside).mean()
    expected = {
        "loss": loss,
        "raw_model_loss": model.mean(),
        "raw_ref_loss": ref.mean(),
        "implicit_acc": (inside > 0).double().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(scope[name].double(), value.detach(), rtol=1e-6, atol=0, msg=name)
    (mine,), (theirs,) = torch.autograd.grad(scope["loss"], scope["model_pred"]), torch.autograd.grad(loss, pred)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)


def with_dtype(value, dtype):
    if isinstance(value, dict):
        return {name: with_dtype(part, dtype) for name, part in value.items()}
    return value.to(dtype)
