"""What published training scripts compute, and the arguments of ours that give the same value and gradient, in float64.

Each formula is written down from what the script does, in PyTorch and on its own. All take halves, winners and then
losers, and give the loss (). In float64 rounding hides nothing: a factor or a sign that differs shows.

What the scripts do before the loss is not here. The Salesforce script and Diffusers' for SD1.5 flip and crop the winner
and the loser independently, a defect: the pair then differs in more than what was judged. Diffusers' for SD1.5 also
trains ties (label 0.5) as if the first image had won.
"""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainers
from torch.nn.functional import logsigmoid, mse_loss

import polydpo_fast

BETA = 5000.0
BACKENDS = [name for name in ("cpp", "reference") if name in polydpo_fast.available_backends("cpu")]


@pytest.fixture
def batch():
    """Close to the reference: z is from -2.3 to 1.9, so that no pair is saturated, and one is beyond hinge loss's 1."""
    random = torch.Generator().manual_seed(0)
    pred, step, target = (torch.randn(8, 4, 6, 5, generator=random, dtype=torch.float64) for _ in range(3))
    return pred, pred + 2e-3 * step, target


# --------------------------------------------------------------------------------------------- the formulas


def salesforce_logits(pred, ref, target):
    """-0.5 beta (model_diff - ref_diff); the difference of an arm pair is error of the winner - of the loser.

    Errors are means over (C, H, W) in the dtype of the inputs. In half precision that is a defect:
    `test_errors_in_the_dtype_of_the_inputs_are_a_defect`.
    """
    model_w, model_l = (pred - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = (ref - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    return -0.5 * BETA * ((model_w - model_l) - (ref_w - ref_l))


def salesforce(pred, ref, target):
    """-mean(log sigmoid(inside_term)), beta_dpo 5000."""
    return -logsigmoid(salesforce_logits(pred, ref, target)).mean()


def sd15_logits(pred, ref, target):
    """logits = ref_diff - model_diff, without beta and without the 1/2. The script calls `.float()` on all three."""

    def difference(x):
        win, lose = mse_loss(x, target, reduction="none").mean(dim=list(range(1, x.dim()))).chunk(2)
        return win - lose

    return difference(ref) - difference(pred)


def sd15_sigmoid(pred, ref, target, beta_dpo=BETA / 2):
    """-mean(log sigmoid(beta_dpo logits)), beta_dpo 2500."""
    return -logsigmoid(beta_dpo * sd15_logits(pred, ref, target)).mean()


def sd15_hinge(pred, ref, target, beta_dpo=BETA / 2):
    """mean(relu(1 - beta_dpo logits))."""
    return torch.relu(1 - beta_dpo * sd15_logits(pred, ref, target)).mean()


def sd15_ipo(pred, ref, target, beta_dpo=BETA / 2):
    """mean((logits - 1 / (2 beta))^2), as it is meant.

    As published it crashes, a defect: it reads args.beta, and the script has only args.beta_dpo, which stands here.
    """
    return (sd15_logits(pred, ref, target) - 1 / (2 * beta_dpo)).square().mean()


def sdxl(pred, ref, target):
    """-mean(log sigmoid(-0.5 beta_dpo (model_diff - ref_diff))), beta_dpo 5000; errors of float32 copies."""
    inside = -0.5 * BETA * -sd15_logits(pred, ref, target)
    return -logsigmoid(inside).mean()


def flow_grpo_sd3(pred, ref, target, beta=100.0):
    """-mean(log sigmoid(-0.5 beta (w_diff - l_diff))), w_diff = the policy's error of the winner - the reference's.

    An error is the mean over a whole sample of (velocity - (noise - x0))^2, of float32 copies, without a weight that
    depends on the timestep. Every so many steps the reference becomes a copy of the policy, which is not the loss's.
    """
    model = (pred - target).square().flatten(1).mean(dim=1).unflatten(0, (2, -1))
    reference = (ref - target).square().flatten(1).mean(dim=1).unflatten(0, (2, -1))
    win, lose = model - reference
    return -logsigmoid(-0.5 * beta * (win - lose)).mean()


def log_ratios(pred, ref, target):
    """What `logits` is in TRL: log(policy / reference) of the chosen answer, less that of the rejected one.

    In a diffusion model half the squared error stands for -log p.
    """
    policy, reference = (-0.5 * (x - target).square().flatten(1).mean(dim=1) for x in (pred, ref))
    chosen, rejected = (policy - reference).chunk(2)
    return chosen - rejected


def ipo(pred, ref, target, tau=BETA):
    """Azar et al. 2023, Eq. 17: mean((h - 1 / (2 tau))^2), h the difference of the log ratios. TRL's "ipo" too."""
    return (log_ratios(pred, ref, target) - 1 / (2 * tau)).square().mean()


def trl_smoothed(pred, ref, target, e=0.1):
    """TRL's "sigmoid" with label_smoothing e: -(1 - e) log sigmoid(beta logits) - e log sigmoid(-beta logits)."""
    z = BETA * log_ratios(pred, ref, target)
    return (-(1 - e) * logsigmoid(z) - e * logsigmoid(-z)).mean()


def trl_robust(pred, ref, target, e=0.1):
    """TRL's "robust": (-(1 - e) log sigmoid(beta logits) + e log sigmoid(-beta logits)) / (1 - 2 e)."""
    z = BETA * log_ratios(pred, ref, target)
    return ((-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)).mean()


def trl_hinge(pred, ref, target):
    """TRL's "hinge": relu(1 - beta logits)."""
    return torch.relu(1 - BETA * log_ratios(pred, ref, target)).mean()


def simpo(pred, ref, target, beta=BETA, gamma=0.7):
    """-log sigmoid(beta (r_w - r_l) - gamma), rewards the log likelihoods (Meng et al. 2024, arXiv 2405.14734)."""
    win, lose = (-0.5 * (pred - target).square().flatten(1).mean(dim=1)).chunk(2)
    return -logsigmoid(beta * (win - lose) - gamma).mean()


# --------------------------------------------------------------------------------- the table, held to them

FORMULAS = {
    "Diffusion-DPO, `train.py` (Salesforce)": salesforce,
    "Diffusers, SD1.5 DPO script": sd15_sigmoid,
    'Diffusers, SD1.5, `--loss_type="hinge"`': sd15_hinge,
    'Diffusers, SD1.5, `--loss_type="ipo"`': sd15_ipo,
    "Diffusers, SDXL DPO script": sdxl,
    "flow_grpo, SD3 DPO script": flow_grpo_sd3,
    "IPO; TRL `ipo`": ipo,
    "TRL `sigmoid` with `label_smoothing`": trl_smoothed,
    "TRL `robust`": trl_robust,
    "TRL `hinge`": trl_hinge,
    "SimPO": simpo,
}


def rows():
    """Of the table in docs/loss.md: what somebody has now, and the line that replaces it."""
    page = (Path(__file__).parents[2] / "docs" / "loss.md").read_text()
    return dict(re.findall(r"^\| (.+?) \| .+? \| `([^`]*polydpo_fast\.loss\([^`]*\))` \| .*\|$", page, re.MULTILINE))


def test_the_page_has_a_line_for_each_and_no_other():
    assert list(rows()) == list(FORMULAS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_line_on_the_page_gives_the_value_and_the_gradient(name, backend, batch):
    """The errors of 1e-9 are those of the formulas: they subtract means of about 2 to get differences of about 1e-4."""
    pred, ref, target = batch
    results = []
    ours = SimpleNamespace(loss=partial(polydpo_fast.loss, backend=backend))
    for compute in (
        FORMULAS[name],
        lambda pred, ref, target: eval(rows()[name], dict(polydpo_fast=ours, pred=pred, ref=ref, target=target)),
    ):
        x = pred.clone().requires_grad_()
        value = compute(x, ref, target)
        assert value.dtype == torch.float64
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    (expected, expected_gradient), (value, gradient) = results
    assert expected_gradient.flatten(1).abs().amax(dim=1).gt(0).any()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_each_pair_is_that_of_the_script(backend, batch):
    """Under "none" each pair alone, with winner and loser exchanged in some: no sum in which they could hide."""
    for win in range(4):
        alone = [x[[win, win + 4]] for x in batch]
        swapped = [x[[win + 4, win]] for x in batch]
        for tensors in (alone, swapped):
            pred = tensors[0].clone().requires_grad_()
            (expected,) = torch.autograd.grad(salesforce(pred, *tensors[1:]), pred)
            loss = polydpo_fast.loss(pred, *tensors[1:], beta=BETA, reduction="none", backend=backend)
            torch.testing.assert_close(torch.autograd.grad(loss.sum(), pred)[0], expected, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------- accuracy


def strict_accuracy(logits):
    """Salesforce's script and flow_grpo's: the share of pairs above 0. A tie counts as wrong, a defect."""
    return (logits > 0).double().mean()


def halved_accuracy(logits):
    """Both of Diffusers' scripts: a tie counts 1/2."""
    return (logits > 0).double().mean() + 0.5 * (logits == 0).double().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_is_that_of_diffusers_and_without_ties_of_all(backend, batch):
    _, ref, target = batch
    logits = salesforce_logits(*batch)
    accuracy = polydpo_fast.loss(*batch, return_metrics=True, backend=backend)[1]["implicit_accuracy"]
    assert accuracy == strict_accuracy(logits) == halved_accuracy(logits)

    # With the policy at the reference, as before the first step, all are ties: theirs starts at 0, which says that the
    # policy prefers every loser.
    logits = salesforce_logits(ref, ref, target)
    accuracy = polydpo_fast.loss(ref, ref, target, return_metrics=True, backend=backend)[1]["implicit_accuracy"]
    assert strict_accuracy(logits) == 0
    assert accuracy == halved_accuracy(logits) == 0.5


# ------------------------------------------------------------------------------------- precision, benchmarks


def test_errors_in_the_dtype_of_the_inputs_are_a_defect():
    """In bfloat16 the Salesforce formula gets the sign of z wrong, of more than a quarter of such pairs; ours of none.

    1e-3 is the noise of the policy around its reference before rounding. Expected: the formula in float64 on the same,
    rounded, inputs.
    """
    random = torch.Generator().manual_seed(0)
    pairs = 256
    target, noise, step = (torch.randn(2 * pairs, 4, 16, 16, generator=random) for _ in range(3))
    target = target.bfloat16()
    ref = (target + 0.3 * noise).bfloat16()
    pred = (ref + 1e-3 * step).bfloat16()
    exact = salesforce_logits(pred.double(), ref.double(), target.double())
    theirs = salesforce_logits(pred, ref, target).double()
    ours = polydpo_fast.pair_errors(pred, ref, target).logit(BETA).double()
    assert (theirs * exact <= 0).double().mean() > 0.25
    # 1e-5 as everywhere; the formula's own cancellation in float64 is some 1e-12.
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-11)


def test_the_formulas_that_benchmarks_measure_are_these(batch):
    torch.testing.assert_close(trainers.salesforce(*batch), salesforce_logits(*batch), rtol=1e-9, atol=0)
    halves = [x.float() for x in batch]  # that function upcasts to float32, as the script does
    # Means of about 2 in float32 are right to 2e-7, and are multiplied by 2500.
    expected = 2500.0 * sd15_logits(*batch).float()
    torch.testing.assert_close(trainers.diffusers_sd15(*halves), expected, rtol=0, atol=2e-3)


def test_the_baseline_of_the_benchmarks_is_that_formula_by_the_faster_square(batch):
    pred, ref, target = (x.float() for x in batch)
    pred.requires_grad_()
    with torch.profiler.profile(acc_events=True) as profile:
        loss = trainers.eager(pred, ref, target)
    called = {event.name for event in profile.events()}
    assert "aten::mse_loss" in called
    assert "aten::pow" not in called
    exact = batch[0].clone().requires_grad_()
    salesforce(exact, *batch[1:]).backward()
    loss.backward()
    torch.testing.assert_close(loss.double(), salesforce(*batch), rtol=0, atol=1e-3)  # 2500 times 2e-7, as above
    torch.testing.assert_close(pred.grad.double(), exact.grad, rtol=1e-3, atol=0)
    half = [x.bfloat16() for x in batch]
    assert trainers.eager(*half).dtype == torch.float32
