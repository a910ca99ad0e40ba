"""Ours are the losses of the published scripts, where those are right: in float64, where rounding hides nothing."""

import pytest
import torch
import trainers

import polydpo_fast


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    pred, step, target = (torch.randn(8, 4, 6, 5, generator=random, dtype=torch.float64) for _ in range(3))
    return pred, pred + 0.01 * step, target


def test_diffusion_dpo_is_salesforces_script(batch):
    loss, metrics = polydpo_fast.loss(*batch, beta=5000.0, return_metrics=True)
    logits = trainers.salesforce(*batch, beta=5000.0)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(logits).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["implicit_accuracy"], (logits > 0).double().mean())


def test_beta_5000_is_2500_in_diffusers_sd15_script(batch):
    batch = [x.float() for x in batch]  # that script upcasts to float32, not to float64
    loss = polydpo_fast.loss(*batch, beta=5000.0)
    logits = trainers.diffusers_sd15(*batch, beta=2500.0)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(logits).mean(), rtol=1e-3, atol=0)


def test_hinge_is_diffusers(batch):
    logits = trainers.diffusers_sd15(*[x.float() for x in batch], beta=2500.0)
    loss = polydpo_fast.loss(*batch, beta=5000.0, objective="hinge")
    torch.testing.assert_close(loss.float(), torch.relu(1 - logits).mean(), rtol=1e-3, atol=0)


def test_ipo_is_a_quarter_of_diffusers(batch):
    """Its logits lack the 1/2, so its squares are four of ours at the beta that corresponds."""
    margin = trainers.diffusers_margin(*[x.float() for x in batch])
    theirs = (margin - 1 / (2 * 2500.0)).square().mean()
    ours = polydpo_fast.loss(*batch, beta=5000.0, objective="ipo")
    torch.testing.assert_close(ours.float(), theirs / 4, rtol=1e-3, atol=0)


def test_label_smoothing_is_cdpo_and_robust_dpo(batch):
    """TRL's formulas: (1-e)(-log s(z)) + e(-log s(-z)), and its unbiased version divided by 1 - 2e."""
    z, e = trainers.salesforce(*batch, beta=5000.0), 0.1
    right, wrong = -torch.nn.functional.logsigmoid(z), -torch.nn.functional.logsigmoid(-z)
    ours = polydpo_fast.loss(*batch, label_smoothing=e)
    torch.testing.assert_close(ours, ((1 - e) * right + e * wrong).mean(), rtol=1e-9, atol=0)
    ours = polydpo_fast.loss(*batch, label_smoothing=e, objective="robust")
    torch.testing.assert_close(ours, (((1 - e) * right - e * wrong) / (1 - 2 * e)).mean(), rtol=1e-9, atol=0)


def test_margin_without_reference_is_simpo(batch):
    """-log s(beta (r_w - r_l) - gamma) with the errors as negative rewards (Meng et al. 2024, arXiv 2405.14734)."""
    pred, _, target = batch
    win, lose = (pred - target).square().flatten(1).mean(dim=1).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.5 * 20.0 * (lose - win) - 0.7).mean()
    ours = polydpo_fast.loss(pred, None, target, beta=20.0, margin=0.7, reference_free=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
