import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch

from polydpo_fast import _C
from polydpo_fast.fused.programs import INPUTS, OPERATIONS, program
from polydpo_fast.objectives import OBJECTIVES, Objective

ALPHAS = [(0.0,) * 4, (-1.0, 0.0, 0.0, 0.0), (8.0, 0.0, 0.0, 0.0), (0.5, -0.3, 2.0, 1.0)]
BETA = 7.0


def primitives(z):
    zero = torch.zeros_like(z)  # torch's softplus is approximate beyond 20
    return torch.sigmoid(z), torch.sigmoid(-z), torch.logaddexp(zero, -z), torch.logaddexp(zero, z)


def head_at(name, z, *alphas):
    alphas = (*alphas, *(0.0,) * (4 - len(alphas)))
    return OBJECTIVES[name].head(z, *primitives(z), BETA, *alphas)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("alphas", ALPHAS)
def test_slope_is_the_derivative_of_the_loss(name, alphas):
    z = torch.linspace(-30, 30, 242, dtype=torch.float64, requires_grad=True)  # not through hinge's kink at 1
    loss, slope = head_at(name, z, *alphas)
    (derivative,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(slope.detach(), derivative, rtol=1e-12, atol=1e-14)


def closed_form(name, z, alphas):
    """Each formula once more, from its paper, in plain Python."""
    p = 1 / (1 + math.exp(-z))
    return {
        "poly_dpo": -math.log(p) + sum(a * (1 - p) ** (j + 1) for j, a in enumerate(alphas)),
        "robust": -math.log(p) + sum(a * (1 - p) ** (j + 1) for j, a in enumerate(alphas)),
        "ipo": (z / BETA - 1 / (2 * BETA)) ** 2,
        "hinge": max(0.0, 1 - z),
        "linear": -z,
    }[name]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("z", [-5.0, -0.3, 0.0, 0.5, 1.0, 1.5, 2.0, 6.0])
def test_loss_is_the_closed_form(name, alphas, z):
    loss, _ = head_at(name, torch.tensor(z, dtype=torch.float64), *alphas)
    assert loss.item() == pytest.approx(closed_form(name, z, alphas), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_labels_that_are_wrong_are_smoothed_over_as_published(share):
    """With "robust" the expectation over labels, of which a share is flipped, is the loss of the true ones (Chowdhury
    et al. 2024); the others are the expectation of the loss where the label itself may be wrong (Mitchell 2023)."""
    true, flipped = 0.3, 1.7
    keep, flip = OBJECTIVES["robust"].smoothing(share)
    seen, otherwise = keep * true + flip * flipped, keep * flipped + flip * true
    assert (1 - share) * seen + share * otherwise == pytest.approx(true, rel=1e-12)
    for name in set(OBJECTIVES) - {"robust"}:
        assert OBJECTIVES[name].smoothing(share) == (1 - share, share)


def either_side(z, p, q, nlp, nlq, beta, a1, a2, a3, a4):
    """Every operation of a head, with a number to its left and to its right."""
    return (2.0 + z) * (z + 2.0) - (2.0 - z) / (3.0 / nlp), (z < 0.5) * 2.0 + 3.0 * (q > 0.5) - (z > p) / 2.0


@pytest.mark.parametrize("name", [*OBJECTIVES, "either side"])
@pytest.mark.parametrize("alphas", ALPHAS)
def test_the_recorded_program_is_the_head(name, alphas, monkeypatch):
    """What C++ computes, run here by a five-line machine and compared bit for bit."""
    monkeypatch.setitem(OBJECTIVES, "either side", Objective(either_side, "", "", ""))
    instructions, loss_at, slope_at = program(name)
    for value in (-40.0, -1.0, 0.0, 0.7, 1.0, 35.0, math.nan):
        z = torch.tensor(value, dtype=torch.float64)
        registers = [x.item() for x in (z, *primitives(z))] + [BETA, *alphas]
        assert len(registers) == len(INPUTS)
        for operation, left, right, constant in instructions:
            a, b = registers[left], registers[right]
            results = (constant, a + b, a - b, a * b, a / b if b else math.nan, float(a < b))
            registers.append(results[operation])
        expected = torch.stack(head_at(name, z, *alphas)).tolist()
        assert [registers[loss_at], registers[slope_at]] == pytest.approx(expected, rel=1e-15, nan_ok=True)


def test_programs_with_registers_that_do_not_exist_are_refused():
    add = OPERATIONS.index("+")
    for bad, loss, slope in itertools.product([(add, 0, 99, 0.0), (add, -1, 0, 0.0), (add, 10, 0, 0.0)], [10], [10]):
        with pytest.raises(ValueError, match="register"):
            _C.Head([bad], loss, slope)
    for loss, slope in [(11, 0), (-1, 0), (0, 11), (0, -1)]:
        with pytest.raises(ValueError, match="register"):
            _C.Head([(add, 0, 1, 0.0)], loss, slope)
    with pytest.raises(ValueError, match="register"):
        _C.Head([(add, 0, 1, 0.0)] * 60, 0, 0)


@pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.0, 1.0, 8.0])
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


@pytest.mark.parametrize("alpha", [-1.0, -1.0 + 1e-9, -0.999, -0.5, 0.0, 8.0])
@pytest.mark.parametrize("z", [-60.0, -30.0, -1.0, 0.0, 1.0, 5.0, 20.0, 30.0, 60.0])
def test_poly_dpos_slope_keeps_its_digits_where_alpha_takes_nearly_all_of_it(z, alpha):
    with localcontext() as context:
        context.prec = 80
        q = 1 / (1 + Decimal(z).exp())
        expected = float(-q * (1 + Decimal(alpha) * (1 - q)))
    _, slope = head_at("poly_dpo", torch.tensor(z, dtype=torch.float64), alpha)
    assert slope.item() == pytest.approx(expected, rel=1e-15 * 4, abs=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_its_formula_and_source(name):
    objective = OBJECTIVES[name]
    assert objective.formula
    assert objective.slope
    assert "arXiv" in objective.source
