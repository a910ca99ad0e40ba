import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polydpo_fast import reference

SHAPES = [(2, 1), (2, 7, 3), (6, 4, 5, 3), (4, 2, 3, 4, 5)]


def batch(shape, dtype=torch.float64, seed=0, closeness=0.1):
    random = torch.Generator().manual_seed(seed)
    pred, target, step = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    return pred.to(dtype), (pred + closeness * step).to(dtype), target.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 8.0])
@pytest.mark.parametrize("shared", [False, True])
def test_value_and_gradient_are_those_of_the_papers(shape, alpha, shared):
    pred, ref, target = batch(shape)
    target = target[: len(target) // 2] if shared else target
    pred.requires_grad_()
    loss = reference.loss(pred, ref, target, beta=20.0, alpha=alpha, reduction="none")
    loss.sum().backward()
    expected = oracle.poly_dpo(pred, ref, target, 20.0, alpha)
    np.testing.assert_allclose(loss.detach().numpy(), expected.loss.astype(float), rtol=1e-12)
    np.testing.assert_allclose(pred.grad.numpy(), expected.gradient.astype(float), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(shape, reduction):
    pred, ref, target = batch(shape)
    assert torch.autograd.gradcheck(
        lambda x: reference.loss(x, ref, target, beta=3.0, alpha=2.0, reduction=reduction),
        pred.requires_grad_(),
    )


def test_second_derivative_exists():
    pred, ref, target = batch((4, 3))
    pred.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: reference.loss(x, ref, target, beta=3.0, alpha=2.0), pred)


@given(
    seed=st.integers(0, 2**20),
    pairs=st.integers(1, 4),
    elements=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    closeness=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
)
def test_logit_keeps_its_precision_for_low_precision_inputs(seed, pairs, elements, dtype, closeness):
    """Computed from the rounded inputs: the error comes from the float32 arithmetic alone."""
    pred, ref, target = batch((2 * pairs, elements), dtype, seed, closeness)
    _, metrics = reference.loss(pred, ref, target, beta=5000.0, return_metrics=True)
    logit = reference.pair_errors(pred, ref, target).logit(5000.0)
    expected = oracle.poly_dpo(pred, ref, target)
    # 1e-5 of the logit, or of what cancels in it: the sum of the magnitudes of its terms.
    p, r, t = (oracle.wide(x) for x in (pred, ref, target))
    terms = np.abs((p - r) * ((p - t) + (r - t))).mean(axis=1).reshape(2, pairs).sum(axis=0)
    bound = 1e-5 * np.abs(expected.logit) + 2500 * 4 * np.finfo(np.float32).eps * terms
    assert (np.abs(logit.double().numpy() - expected.logit) <= bound).all()
    assert metrics["logit_mean"].dtype == torch.float32
    if closeness == 0.0:
        assert (logit == 0).all()


def test_naive_bfloat16_formula_gets_the_sign_wrong_where_the_reference_does_not():
    """What the library is for: the policy one small step from the reference, as in a run's first thousand steps."""
    pred, ref, target = batch((64, 4, 32, 32), torch.bfloat16, closeness=0.01)
    expected = np.sign(oracle.poly_dpo(pred, ref, target).logit.astype(float))
    m, r = (((x - target) ** 2).mean(dim=(1, 2, 3)) for x in (pred, ref))
    naive = -2500 * ((m[:32] - r[:32]) - (m[32:] - r[32:]))
    ours = reference.pair_errors(pred, ref, target).logit(5000.0)
    assert np.mean(np.sign(naive.float().numpy()) != expected) > 0.2
    assert (np.sign(ours.numpy()) == expected).all()


def test_reference_and_target_are_constants():
    pred, ref, target = (x.requires_grad_() for x in batch((4, 3)))
    reference.loss(pred, ref, target).backward()
    assert pred.grad is not None
    assert ref.grad is None
    assert target.grad is None
    error = torch.rand(4, dtype=pred.dtype, requires_grad=True)
    reference.loss(pred, None, target, ref_error=error).backward()
    assert error.grad is None


def test_arms_may_come_as_tuples():
    pred, ref, target = batch((6, 4, 3))
    halves = reference.loss(pred, ref, target, beta=10.0)
    tuples = reference.loss(pred.chunk(2), ref.chunk(2), target.chunk(2), beta=10.0)
    assert halves == tuples
