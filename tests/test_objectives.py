import pytest
import torch

from polydpo_fast.objectives import OBJECTIVES

ALPHAS = (-1.0, -0.3, 0.0, 1.0, 8.0)


def head_at(name, z, alpha):
    nll = torch.logaddexp(torch.zeros_like(z), -z)  # torch's softplus is approximate beyond 20
    return OBJECTIVES[name].head(nll, torch.sigmoid(z), torch.sigmoid(-z), alpha)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_slope_is_the_derivative_of_the_loss(name, alpha):
    z = torch.linspace(-30, 30, 241, dtype=torch.float64, requires_grad=True)
    loss, slope = head_at(name, z, alpha)
    (derivative,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(slope.detach(), derivative, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_poly_dpo_at_zero_is_log_two_plus_half_alpha(alpha):
    loss, slope = head_at("poly_dpo", torch.zeros(1, dtype=torch.float64), alpha)
    assert loss.item() == pytest.approx(0.6931471805599453 + alpha / 2, rel=1e-15)
    assert slope.item() == pytest.approx(-0.5 * (1 + alpha / 2), rel=1e-15)


def test_poly_dpo_with_alpha_zero_is_dpo():
    z = torch.linspace(-40, 40, 81, dtype=torch.float64)
    loss, slope = head_at("poly_dpo", z, 0.0)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(z), rtol=1e-13, atol=0)
    torch.testing.assert_close(slope, -torch.sigmoid(-z), rtol=0, atol=0)


def test_poly_dpo_is_monotone_down_to_alpha_minus_one():
    """dL/dz <= 0 for alpha >= -1; below, pairs with p > -1/alpha would be pushed the wrong way."""
    z = torch.linspace(-20, 20, 401, dtype=torch.float64)
    assert (head_at("poly_dpo", z, -1.0)[1] <= 0).all()
    assert (head_at("poly_dpo", z, -1.2)[1] > 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_its_formula_and_source(name):
    objective = OBJECTIVES[name]
    assert objective.formula
    assert objective.slope
    assert "arXiv" in objective.source
