"""`polydpo_fast.loss` on every backend that runs here, against the extended-precision oracle."""

import itertools
import math
import os
import warnings

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polydpo_fast
from polydpo_fast.fused import head_arguments
from polydpo_fast.layout import ERRORS, Column
from polydpo_fast.metrics import METRICS

BACKENDS = ["reference", "triton"] if torch.cuda.is_available() else ["reference", "triton", "cpp"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(2, 1), (2, 3), (6, 77, 5), (4, 4, 16, 16), (2, 4, 40, 32), (2, 3, 2, 9, 7)]
FUSED = BACKENDS[1:]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter computes in NumPy, which warns of what the kernels do on purpose: NaN and Inf go through.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def batch(shape, dtype, device, seed=0, closeness=1e-2):
    random = torch.Generator().manual_seed(seed)
    pred, target, step = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    return tuple(x.to(dtype).to(device) for x in (pred, pred + closeness * step, target))


def assert_gradient_close(actual, expected, dtype, backend):
    """Within 1 ulp of the output dtype, plus 1e-6 relative for the float32 arithmetic before the rounding.

    Triton's interpreter truncates float32 to bfloat16 where a GPU rounds: 1 ulp more there.
    """
    ulps = 2.0 if INTERPRETED and backend == "triton" and dtype == torch.bfloat16 else 1.0
    expected = expected.astype(np.float64)
    bound = ulps * oracle.ulp(expected, dtype) + 1e-6 * np.abs(expected)
    error = np.abs(actual.double().cpu().numpy() - expected)
    assert (error <= bound).all(), (error / bound).max()


# --------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradient(backend, dtype, shape, reduction, device):
    pred, ref, target = batch(shape, dtype, device)
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target, beta=500.0, alpha=2.0, reduction=reduction, backend=backend)
    weight = torch.arange(1, 1 + shape[0] // 2, dtype=loss.dtype, device=device)
    (loss * weight if reduction == "none" else 3 * loss).sum().backward()

    expected = oracle.poly_dpo(pred, ref, target, 500.0, 2.0)
    value = {"mean": expected.loss.mean(), "sum": expected.loss.sum(), "none": expected.loss}[reduction]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(
        loss.detach().cpu().numpy(), value.astype(float), rtol=1e-12 if dtype == torch.float64 else 2e-6
    )
    pairs = shape[0] // 2
    upstream = {
        "mean": np.full(pairs, 3 / pairs),
        "sum": np.full(pairs, 3.0),
        "none": np.arange(1, 1 + pairs),
    }
    rows = np.concatenate((upstream[reduction],) * 2).reshape(-1, *(1,) * (len(shape) - 1))
    assert pred.grad.dtype == dtype
    assert_gradient_close(pred.grad, expected.gradient * rows, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend, device):
    """What autocast makes of a script: a float32 policy, a bfloat16 reference, a float16 target."""
    pred, ref, target = batch((4, 4, 8, 8), torch.float32, device)
    ref, target = ref.bfloat16(), target.half()
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target, beta=50.0, reduction="none", backend=backend)
    loss.sum().backward()
    expected = oracle.poly_dpo(pred, ref, target, 50.0)
    np.testing.assert_allclose(loss.detach().cpu().numpy(), expected.loss.astype(float), rtol=2e-6)
    assert_gradient_close(pred.grad, expected.gradient, torch.float32, backend)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    pairs=st.integers(1, 3),
    inner=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    closeness=st.sampled_from([0.0, 1e-3, 1e-1, 10.0]),
    alpha=st.sampled_from([-1.0, 0.0, 8.0]),
    backend=st.sampled_from(FUSED),
)
def test_fused_backends_agree_with_the_oracle_on_any_shape(
    device, backend, seed, pairs, inner, dtype, closeness, alpha
):
    pred, ref, target = batch((2 * pairs, *inner), dtype, device, seed, closeness)
    loss, metrics = polydpo_fast.loss(
        pred, ref, target, alpha=alpha, reduction="none", return_metrics=True, backend=backend
    )
    expected = oracle.poly_dpo(pred, ref, target, alpha=alpha)
    # The logit's error: 1e-5 relative, or float32 rounding of the terms that cancel in it.
    p, r, t = (oracle.wide(x).reshape(2 * pairs, -1) for x in (pred, ref, target))
    terms = np.abs((p - r) * ((p - t) + (r - t))).mean(axis=1).reshape(2, pairs).sum(axis=0)
    allowed = 1e-5 * np.abs(expected.logit) + 2500 * 4 * np.finfo(np.float32).eps * terms
    slope = 1 + abs(alpha)  # |dL/dz| is at most that
    error = np.abs(loss.double().cpu().numpy() - expected.loss)
    assert (error <= slope * allowed + 1e-6 * np.abs(expected.loss) + 1e-7).all()
    mean_error = abs(metrics["logit_mean"].item() - float(expected.logit.mean()))
    assert mean_error <= float(allowed.mean()) + 1e-6 * abs(float(expected.logit.mean()))
    if closeness == 0.0:
        assert metrics["logit_mean"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_equal_to_reference_gives_exactly_log_two(backend, dtype, device):
    pred, _, target = batch((4, 3, 5), dtype, device)
    loss, metrics = polydpo_fast.loss(
        pred, pred.clone(), target, reduction="none", return_metrics=True, backend=backend
    )
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)
    assert metrics["logit_mean"] == 0
    assert metrics["implicit_accuracy"] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_target(backend, device):
    pred, ref, target = batch((6, 4, 5), torch.float32, device)
    shared = target[:3]
    grads = []
    for given_target in (shared, torch.cat((shared, shared))):
        x = pred.clone().requires_grad_()
        loss = polydpo_fast.loss(x, ref, given_target, beta=10.0, backend=backend)
        loss.backward()
        grads.append((loss.item(), x.grad))
    assert grads[0][0] == grads[1][0]
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=lambda d: "-".join(map(str, d)))
def test_every_mix_of_dtypes(backend, masked, dtypes, device):
    """Of samples that no vector, piece or chunk of the loops divides."""
    pred, ref, target = (x.to(dtype) for x, dtype in zip(batch((4, 2613), torch.float64, device), dtypes, strict=True))
    mask = torch.arange(2613, device=device) % 7 != 3 if masked else None
    x = pred.clone().requires_grad_()
    loss = polydpo_fast.loss(x, ref, target, beta=50.0, alpha=2.0, mask=mask, reduction="none", backend=backend)
    loss.sum().backward()
    chosen = [y[:, mask] if masked else y for y in (pred, ref, target)]
    expected = oracle.poly_dpo(*chosen, 50.0, alpha=2.0)
    error = abs(loss.detach().double().cpu().numpy() - expected.loss)
    assert (error <= 1e-6 * (abs(expected.loss) + abs(expected.logit))).all()
    assert_gradient_close(x.grad[:, mask] if masked else x.grad, expected.gradient, dtypes[0], backend)
    if masked:
        assert not x.grad[:, ~mask].any()


@pytest.mark.skipif("EMULATED_GPU" in os.environ, reason="the emulator keeps a record of every byte")
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("elements", [20, 60])  # C++ copies samples of less than 32
def test_pairs_beyond_two_to_the_31_elements(backend, masked, elements, device):
    """Views whose rows are 2^30 elements apart; of the memory between them no page is touched."""
    memory = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=device)
    flags = torch.empty(2**31 + 2**10 if masked else 1, dtype=torch.bool, device=device)
    plain = [x.chunk(2) for x in batch((6, elements), torch.bfloat16, device)]
    far = [
        [memory.as_strided((3, elements), (2**30, 1), 64 * (2 * i + j)).copy_(arm) for j, arm in enumerate(both)]
        for i, both in enumerate(plain)
    ]
    mask, far_mask = None, None
    if masked:
        mask = torch.arange(3 * elements, device=device).view(3, elements) % 7 != 3
        far_mask = flags.as_strided((3, elements), (2**30, 1)).copy_(mask)
    found = []
    for tensors, kept in ((plain, mask), (far, far_mask)):
        pred = [x.detach().requires_grad_() for x in tensors[0]]
        loss = polydpo_fast.loss(pred, *tensors[1:], beta=50.0, mask=kept, reduction="none", backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), pred)))
    assert all(map(torch.equal, *found))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="where C++ writes a gradient")
def test_a_gradient_beyond_two_to_the_31_elements(monkeypatch):
    """In memory that is not touched between the pairs."""
    from polydpo_fast.fused import cpu

    pred, _, target = (list(x.chunk(2)) for x in batch((6, 60), torch.bfloat16, "cpu"))
    coefficients = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (pred, target, None, coefficients, torch.ones(()), "halves", "cpp")
    plain = torch.ops.polydpo_fast.pair_gradient(*arguments)
    memory = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    places = iter((0, 64))
    monkeypatch.setattr(cpu, "_empty_gradient", lambda shape, *_: memory.as_strided(shape, (2**30, 1), next(places)))
    assert all(map(torch.equal, plain, torch.ops.polydpo_fast.pair_gradient(*arguments)))


# ------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_saturated_logits_are_finite_with_the_right_gradient(backend, sign, device):
    pred, ref, target = (torch.zeros(2, 8, device=device) for _ in range(3))
    pred[0 if sign < 0 else 1] = 3.0  # z = sign * 2500 * 9
    pred.requires_grad_()
    loss, metrics = polydpo_fast.loss(pred, ref, target, alpha=1.5, return_metrics=True, backend=backend)
    loss.backward()
    z = sign * 2500 * 9
    assert metrics["logit_mean"].item() == z
    assert metrics["saturated"] == 1
    assert loss.item() == pytest.approx(max(-z, 0) + 1.5 * (z < 0), rel=1e-6)
    slope = -1.0 if z < 0 else 0.0
    np.testing.assert_allclose(pred.grad[0].cpu(), slope * -5000 / 8 * pred[0].detach().cpu(), rtol=1e-6)
    assert torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_nearly_zero_keeps_its_digits(backend, device):
    """-log p = log(1 + exp(-z)), where 1 + exp(-z) has few digits of exp(-z), or none."""
    z = torch.tensor([4.0, 16.0, 25.0, 36.0, 64.0])
    nothing, lose = torch.zeros(5, 1, device=device), z.sqrt()[:, None].to(device)
    loss = polydpo_fast.loss(
        (nothing, lose), None, (nothing, nothing), beta=2.0, reference_free=True, reduction="none", backend=backend
    )
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in z.tolist()], rel=2e-6, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_nan_and_inf_stay_in_their_pair(backend, poison, argument, device):
    tensors = batch((6, 5), torch.float32, device)
    clean = polydpo_fast.loss(*tensors, beta=3.0, reduction="none", backend=backend)
    tensors[argument][1, 2] = poison  # the winner of pair 1
    pred = tensors[0].requires_grad_()
    loss = polydpo_fast.loss(*tensors, beta=3.0, reduction="none", backend=backend)
    loss.sum().backward()
    assert torch.isnan(loss[1])
    assert torch.isnan(pred.grad[1]).any()
    assert torch.equal(loss[[0, 2]], clean[[0, 2]])
    assert torch.isfinite(pred.grad[[0, 2, 3, 5]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_any_nan_stays_one(backend, dtype, bits, device):
    """Rounding to 16 bits must not carry a NaN's payload into its exponent."""
    pred, ref, target = batch((4, 3, 7, 5), dtype, device)
    pred.requires_grad_()
    upstream = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
    polydpo_fast.loss(pred, ref, target, beta=1.0, backend=backend).backward(upstream)
    assert pred.grad.isnan().all()
    nans = torch.tensor([0x7FFF, -1, 0x7F81], dtype=torch.int16, device=device).view(torch.bfloat16).to(dtype)
    poisoned = pred.detach().clone()
    poisoned[1].view(-1)[:3] = nans
    poisoned.requires_grad_()
    polydpo_fast.loss(poisoned, ref, target, beta=1.0, backend=backend, reduction="none").sum().backward()
    assert poisoned.grad[[1, 3]].isnan().all()
    assert poisoned.grad[[0, 2]].isfinite().all()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="rounds by code of its own")
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=lambda d: "-".join(map(str, d)))
def test_a_nan_of_any_dtype_stays_one_beside_numbers(dtypes):
    """A target of all ones in binary: what rounding adds would carry through such a payload, to a zero."""
    pred, _, target = batch((2, 100), torch.float64, "cpu")
    pred, target = pred.to(dtypes[0]), target.to(dtypes[1])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    target.view(integers[dtypes[1].itemsize])[:, ::3] = -1
    coefficients = torch.full((1, 2), 0.5, dtype=torch.float64)
    (grad,) = torch.ops.polydpo_fast.pair_gradient(
        [pred], [target], None, coefficients, torch.ones(()), "halves", "cpp"
    )
    assert torch.equal(grad.isnan(), target.isnan())
    expected = oracle.wide(pred) - oracle.wide(target.nan_to_num(0.0))
    finite = ~target.isnan()
    assert_gradient_close(grad[finite], 0.5 * expected[finite.numpy()], dtypes[0], "cpp")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("other", DTYPES)
def test_a_gradient_is_rounded_to_nearest_even(other, dtype, backend, device):
    """3/2 of a number with an odd last bit is a tie; the last ones overflow, but where bfloat16 is of float16."""
    if INTERPRETED and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates float32 to bfloat16")
    steps = torch.arange(4096, dtype=torch.float64, device=device)
    largest = min(torch.finfo(dtype).max, torch.finfo(other).max)
    target = torch.cat(((1 + steps / 1024) * 0.75, steps / 2**26, largest * (1 - steps / 2**14))).to(other)
    target = torch.stack((target, -target))
    (grad,) = torch.ops.polydpo_fast.pair_gradient(
        [torch.zeros_like(target, dtype=dtype)],
        [target],
        None,
        torch.full((1, 2), -1.5, dtype=torch.float64, device=device),
        torch.ones((), device=device),
        "halves",
        backend,
    )
    expected = (target.float() * 1.5).to(dtype)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_a_coefficient_that_float32_has_not_may_be_scaled(backend, device):
    """As the gradient's of a saturated pair, before a GradScaler's factor: they are multiplied in float64."""
    pred, _, target = batch((2, 40), torch.float32, device)
    coefficients = torch.tensor([[1e-50, -3e-50]], dtype=torch.float64, device=device)
    upstream = torch.tensor(1e30, device=device)
    (grad,) = torch.ops.polydpo_fast.pair_gradient([pred], [target], None, coefficients, upstream, "halves", backend)
    exact = coefficients.double().T * upstream.double() * (pred.double() - target.double())
    assert_gradient_close(grad, exact.cpu().numpy(), torch.float32, backend)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the sums of C++")
def test_many_elements_are_added_without_drift():
    """Equal terms round the same way each time: in one float32 a sum of half a million would drift by a thousandth."""
    pred = torch.full((2, 2**19), 0.1)
    errors = polydpo_fast.pair_errors(pred, 3 * pred, torch.zeros_like(pred), backend="cpp")
    exact = pred[0, 0].double().square()
    torch.testing.assert_close(errors.model_win, exact.float()[None], rtol=2e-6, atol=0)
    torch.testing.assert_close(errors.excess_lose, -8 * exact.float()[None], rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_sums_beyond_a_lane_are_float64(backend, device):
    """Of whole numbers: those of a lane, up to 64 terms, have no more than the 24 bits of float32, any others more."""
    random = torch.Generator().manual_seed(0)

    def draw(low, high):
        return torch.randint(low, high, (2, 4101), generator=random)

    target, step, ref_step = draw(-100, 100), draw(400, 500), draw(0, 50)
    pred, ref = target + step * (1 - 2 * draw(0, 2)), target + ref_step
    _, _, table = torch.ops.polydpo_fast.pair_loss(
        *([x.float().to(device)] for x in (pred, ref, target)),
        *[None] * 5, [0.0] * 9, None, "halves", "mean", backend,
    )  # fmt: skip
    model, excess = (step**2).sum(1), (step**2 - ref_step**2).sum(1)
    assert table[0, ERRORS].tolist() == (torch.cat((model, excess)).double() / 4101).tolist()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, *DTYPES[:1] * 2)])
def test_mixed_dtypes_in_other_memory_orders(dtypes, backend, device):
    tensors = [x.to(dtype) for x, dtype in zip(batch((4, 3, 6, 5), torch.float64, device), dtypes, strict=True)]
    expected = oracle.poly_dpo(*tensors, 30.0)
    for ordered in ((0,), (1, 2)):
        pred, ref, target = (
            x.contiguous(memory_format=torch.channels_last) if i in ordered else x for i, x in enumerate(tensors)
        )
        x = pred.detach().requires_grad_()
        loss = polydpo_fast.loss(x, ref, target, beta=30.0, reduction="none", backend=backend)
        loss.sum().backward()
        np.testing.assert_allclose(loss.detach().cpu().numpy(), expected.loss.astype(float), rtol=1e-5)
        assert_gradient_close(x.grad, expected.gradient, dtypes[0], backend)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the loops of C++")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES[:3], repeat=3)), ids=lambda d: "-".join(map(str, d)))
def test_any_mix_at_any_address_and_of_any_size(masked, dtypes):
    """Around the sizes of blocks, whole chunks and what is left, at addresses that no vector divides."""
    for size in (1, 7, 8, 15, 17, 31, 32, 33, 64, 95, 512, 1055, 2080):
        drawn = batch((4, size), torch.float64, "cpu", seed=size, closeness=0.5)
        pred, ref, target = (
            torch.empty(4 * size + 1, dtype=dtype)[1:].view(4, size).copy_(x)
            for x, dtype in zip(drawn, dtypes, strict=True)
        )
        mask = torch.arange(size) % 5 != 3 if masked else None
        p, r, t = (x[:, mask].double() if masked else x.double() for x in (pred, ref, target))
        model = ((p - t) ** 2).mean(1).view(2, 2)
        for cached in (False, True):
            known = torch.tensor([[0.5, 2.0], [1.5, 0.25]]) if cached else ((r - t) ** 2).mean(1).view(2, 2)
            reference, error = (None, tuple(known)) if cached else (ref, None)
            policy = pred.detach().requires_grad_()
            loss = polydpo_fast.loss(
                policy, reference, target, beta=2.0, mask=mask, ref_error=error, reduction="none", backend="cpp"
            )
            (grad,) = torch.autograd.grad(loss.sum(), policy)
            excess = model - known
            logit = excess[1] - excess[0]
            torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(-logit), rtol=3e-6, atol=1e-7)
            slope = 2.0 * torch.sigmoid(-logit) / p.shape[1]
            exact = torch.cat((slope, -slope))[:, None] * (p - t)
            assert_gradient_close(grad[:, mask] if masked else grad, exact.numpy(), dtypes[0], "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_half_precision_values_do_not_overflow(backend, device):
    """300^2 is beyond float16, 60,000 nearly is."""
    pred, ref, target = batch((4, 9), torch.float16, device)
    pred, ref = pred * 300, ref * 300
    loss = polydpo_fast.loss(pred, ref, target, beta=0.01, reduction="none", backend=backend)
    expected = oracle.poly_dpo(pred, ref, target, 0.01)
    np.testing.assert_allclose(loss.cpu().numpy(), expected.loss.astype(float), rtol=1e-5)


def one_ulp_apart(pred, target, dtype):
    """A reference that is the policy's neighbour everywhere: what one optimiser step in low precision leaves."""
    ulps = 2**20 if dtype == torch.float64 else 1  # the oracle has only 11 bits more than float64
    up = ulps * torch.from_numpy(oracle.ulp(pred.double().numpy(), dtype))
    signs = torch.where(torch.arange(pred.numel()).reshape(pred.shape) % 3 == 0, -1.0, 1.0)
    return pred, (pred.double() + signs * up).to(dtype), target


def scaled_to(size):
    def case(pred, target, dtype):
        scale = size(torch.finfo(dtype)) if callable(size) else size
        return (pred * scale).to(dtype), (pred * scale * 1.5).to(dtype), (target * scale).to(dtype)

    return case


def arms_cancel(pred, target, dtype):
    """Winner and loser differ from the reference by the same, but for one element: delta is a small remainder."""
    pred, target = pred.clone(), target.clone()
    pred[2:], target[2:] = pred[:2], target[:2]
    ref = (pred.double() * 1.5).to(dtype)
    ref[0, 0] = pred[0, 0]
    return pred, ref, target


ADVERSARIAL = {
    "policy one ulp from the reference": one_ulp_apart,
    # float16 ends at 65504: 100 squared is near, the sum of squares beyond. Elsewhere squares reach 1e30.
    "huge errors": scaled_to(lambda info: 100.0 if info.max < 1e5 else 1e15),
    "float16's overflow range": scaled_to(10_000.0),
    "tiny errors": scaled_to(lambda info: 1e-3 if info.max < 1e5 else 1e-15),
    "denormals": scaled_to(lambda info: max(info.tiny / 8, 1e-300)),
    "arms that cancel": arms_cancel,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_values(backend, dtype, case, device):
    if INTERPRETED and (backend, dtype, case) == ("triton", torch.bfloat16, "denormals"):
        pytest.skip("Triton's interpreter reads bfloat16 denormals as other numbers; a GPU does not")
    pred, _, target = batch((4, 129), dtype, "cpu")
    tensors = pred, ref, target = ADVERSARIAL[case](pred, target, dtype)
    assert all(torch.isfinite(x).all() for x in tensors)
    assert not torch.equal(pred, ref)
    delta = float(np.abs(oracle.poly_dpo(*tensors, 1.0).logit).max())
    beta = min(max(1 / max(delta, 1e-20), 1e-30), 5000.0)  # a logit near 1 where that is possible
    pred, ref, target = (x.to(device) for x in tensors)
    pred.requires_grad_()
    loss, metrics = polydpo_fast.loss(
        pred, ref, target, beta=beta, reduction="none", return_metrics=True, backend=backend
    )
    loss.sum().backward()
    expected = oracle.poly_dpo(pred, ref, target, beta)
    # 1e-5 relative, as promised; below that only rounding of float32 terms that cancel, or terms that it has not got.
    p, r, t = (oracle.wide(x) for x in (pred, ref, target))
    terms = np.abs((p - r) * ((p - t) + (r - t))).mean(axis=1).reshape(2, 2).sum(axis=0)
    allowed = 1e-5 * np.abs(expected.logit) + 0.5 * beta * (4 * np.finfo(np.float32).eps * terms + 1e-37)
    error = np.abs(loss.detach().double().cpu().numpy() - expected.loss)
    assert (error <= allowed + 1e-6 * np.abs(expected.loss)).all()
    assert abs(metrics["logit_mean"].item() - float(expected.logit.mean())) <= float(allowed.mean())
    assert_gradient_close(pred.grad, expected.gradient, dtype, backend)


# ------------------------------------------------------------------------------------------- promises kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend, device):
    pred, ref, target = batch((8, 6, 5), torch.float32, device)
    # Two ties, and one pair won by a winner that got worse and a loser that got much worse.
    pred[1], pred[5], pred[2] = ref[1], ref[5], ref[2]
    pred[6] = ref[6]
    pred[3] = target[3] + 1.1 * (ref[3] - target[3])
    pred[7] = target[7] + 2.0 * (ref[7] - target[7])
    pred.requires_grad_()
    _, metrics = polydpo_fast.loss(pred, ref, target, beta=40.0, return_metrics=True, backend=backend)
    e = oracle.poly_dpo(pred, ref, target, 40.0)
    z = np.where(np.abs(e.logit) < 1e-12, 0, e.logit)
    reward = -20 * (e.model_error - e.ref_error)
    expected = {
        "implicit_accuracy": ((z > 0) + 0.5 * (z == 0)).mean(),
        "reward_win": reward[0].mean(),
        "reward_lose": reward[1].mean(),
        "reward_margin": (reward[0] - reward[1]).mean(),
        "logit_mean": z.mean(),
        "p_mean": (1 / (1 + np.exp(-z))).mean(),
        "saturated": (np.abs(z) > 10).mean(),
        "false_success": ((z > 0) & (e.model_error[0] > e.ref_error[0])).mean(),
        "ref_mse_win": e.ref_error[0].mean(),
        "ref_mse_lose": e.ref_error[1].mean(),
        "model_mse_win": e.model_error[0].mean(),
        "model_mse_lose": e.model_error[1].mean(),
    }
    assert list(metrics) == list(METRICS) == list(expected)
    assert expected["false_success"] >= 0.25
    assert expected["saturated"] >= 0.25
    for name, value in expected.items():
        assert metrics[name].shape == ()
        assert not metrics[name].requires_grad
        assert metrics[name].item() == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_are_saturated_beyond_ten(backend, device):
    """z is 5/2 of the loser's error less the winner's: of 9.9, 10 and 10.1, of either sign, and a tie."""
    z = torch.tensor([9.9, -9.9, 10.0, -10.0, 10.1, -10.1, 0.0], device=device)[:, None]
    win, lose = ((sign * z / 2.5).clamp(min=0).sqrt() for sign in (-1, 1))
    win[-1] = lose[-1] = 1.0
    nothing = (torch.zeros_like(win), torch.zeros_like(win))
    options = dict(beta=5.0, reference_free=True, return_metrics=True, backend=backend)
    _, metrics = polydpo_fast.loss((win, lose), None, nothing, **options)
    assert metrics["saturated"].item() == pytest.approx(2 / 7)
    assert metrics["implicit_accuracy"].item() == pytest.approx(3.5 / 7)
    assert metrics["false_success"] == 0  # where z > 0 the winner has no error at all; a tie is no success


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_margin_changes_no_metric(backend, device):
    """Taken off these logits, it would change how many are positive, how many saturated and how many falsely so."""
    random = torch.Generator().manual_seed(1)
    pred, target = (torch.randn(12, 5, generator=random) for _ in range(2))
    ref = pred + 0.5 * torch.randn(12, 5, generator=random)
    tensors = [x.to(device) for x in (pred, ref, target)]
    options = dict(beta=20.0, return_metrics=True, backend=backend)
    plain, shifted = (polydpo_fast.loss(*tensors, margin=margin, **options)[1] for margin in (0.0, 3.0))
    shares = "implicit_accuracy", "saturated", "false_success"
    assert [round(6 * plain[name].item()) for name in shares] == [3, 2, 1]
    assert plain == shifted


@pytest.mark.parametrize("backend", FUSED)
def test_a_pair_does_not_depend_on_its_batch_and_runs_agree_bit_for_bit(backend, device):
    """A promise of the fused backends; the reference's sums are PyTorch's, which split by the size of the batch."""

    def losses(*tensors):
        return polydpo_fast.loss(*tensors, beta=50.0, reduction="none", backend=backend)

    tensors = batch((10, 3, 700), torch.float32, device)
    whole = losses(*tensors)
    assert torch.equal(whole, losses(*tensors))
    for pair in range(5):
        alone = losses(*(x[[pair, 5 + pair]] for x in tensors))
        assert torch.equal(alone, whole[pair : pair + 1])


def test_the_triton_counters_reset_themselves(device, monkeypatch):
    """One buffer serves every launch of a stream: each must leave it as it was, zero."""
    from polydpo_fast.kernels import pair_loss

    counters = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr(pair_loss, "counters_of", lambda pairs, device: counters)
    tensors = batch((6, 3, 700), torch.float32, device)
    results = [
        polydpo_fast.loss(*tensors, return_metrics=True, backend="triton")[1]["logit_mean"].item() for _ in range(3)
    ]
    polydpo_fast.pair_errors(*tensors, backend="triton")
    assert not counters.any()
    assert len(set(results)) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_the_triton_loops_go_on_where_they_were(masked, device, monkeypatch):
    """As for samples of millions of elements and batches of hundreds of pairs, with less in each round."""
    from polydpo_fast.kernels import pair_loss

    for name, value in dict(LARGE_SPLITS=4, SLOT_BLOCK=2, PAIR_BLOCK=2).items():
        monkeypatch.setattr(pair_loss, name, value)
    numel = 12_289
    assert pair_loss.blocks_per_split(numel) == 3  # of five programs for each of five pairs, the last with one element
    pred, ref, target = batch((10, numel), torch.float32, device)
    mask = torch.arange(numel) % torch.arange(2, 7)[:, None] != 1 if masked else None
    pred.requires_grad_()
    options = dict(beta=50.0, mask=mask if mask is None else mask.to(device), return_metrics=True, backend="triton")
    loss, metrics = polydpo_fast.loss(pred, ref, target, **options)
    loss.backward()
    arms = [x.chunk(2) for x in (pred, target, ref)]
    losses, logits, gradient = oracle.full(*arms[0], *arms[1], ref=arms[2], beta=50.0, mask=mask)
    assert loss.item() == pytest.approx(float(losses.mean()), rel=1e-6)
    assert metrics["logit_mean"].item() == pytest.approx(float(logits.mean()), rel=1e-5)
    assert_gradient_close(pred.grad, np.concatenate(gradient) / 5, torch.float32, "triton")


def layouts(x):
    """The same numbers in other memory: (name, tensor)."""
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 77.0, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    yield "first channels of more", wide[:, : x.shape[1]]
    wide = torch.full_like(wide, 77.0)
    wide[:, 3:] = x
    yield "last channels of more", wide[:, 3:]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 1), 77.0, dtype=x.dtype, device=x.device)
    padded[..., :-1] = x
    yield "rows with gaps", padded[..., :-1]
    every_other = torch.full((2 * x.shape[0], *x.shape[1:]), 77.0, dtype=x.dtype, device=x.device)
    every_other[::2] = x
    yield "every other sample", every_other[::2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", [0, 1, 2, None])
def test_memory_layouts(backend, argument, device):
    plain = batch((4, 4, 6, 5), torch.float32, device)
    expected = oracle.poly_dpo(*plain, 30.0)
    for name, _ in layouts(plain[0]):
        given_layout = [dict(layouts(x))[name] if argument in (i, None) else x.clone() for i, x in enumerate(plain)]
        pred = given_layout[0].requires_grad_()
        loss = polydpo_fast.loss(*given_layout, beta=30.0, reduction="none", backend=backend)
        np.testing.assert_allclose(loss.detach().cpu().numpy(), expected.loss.astype(float), rtol=2e-6, err_msg=name)
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert_gradient_close(grad, expected.gradient, torch.float32, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("narrow", [(4, 3, 1), (4, 1, 5), (1, 3, 5), (1, 1, 1)])
def test_expanded_tensors(narrow, argument, backend, device):
    """One number in memory for many elements, of a sample or of all samples: the bits of a copy."""
    tensors = list(batch((4, 3, 5), torch.float32, device))
    expanded = torch.randn(narrow, generator=torch.Generator().manual_seed(3)).to(device).expand(4, 3, 5)
    found = []
    for tensors[argument] in (expanded, expanded.contiguous()):
        pred = tensors[0].detach().requires_grad_()
        loss = polydpo_fast.loss(pred, *tensors[1:], beta=2.0, reduction="none", backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), pred)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_policy_receives_a_gradient(backend, device):
    pred, ref, target = (x.requires_grad_() for x in batch((4, 3), torch.float32, device))
    polydpo_fast.loss(pred, ref, target, backend=backend).backward()
    assert pred.grad is not None
    assert ref.grad is None
    assert target.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_and_accumulated_backward(backend, device):
    pred, ref, target = batch((4, 3, 5), torch.float32, device)
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target, beta=10.0, backend=backend)
    loss.backward(retain_graph=True)
    once = pred.grad.clone()
    loss.backward()
    assert torch.equal(pred.grad, 2 * once)


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_refuses_clearly(backend, device):
    pred, ref, target = batch((4, 3), torch.float32, device)
    loss = polydpo_fast.loss(pred.requires_grad_(), ref, target, backend=backend)
    for value in (loss, polydpo_fast.pair_errors(pred, ref, target, backend=backend).model_win.sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, pred, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_an_exported_graph_refuses_a_gradient(backend, device):
    """It holds the operator alone: the parameters of a model that is exported with its loss would learn nothing."""

    class Step(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.model, self.function = torch.nn.Linear(5, 5).to(device), function

        def forward(self, x, ref, target):
            return self.function(self.model(x), ref, target, backend=backend)

    tensors = batch((4, 3, 5), torch.float32, device)
    for function in (polydpo_fast.loss, lambda *x, **options: polydpo_fast.pair_errors(*x, **options).model_win.sum()):
        step = Step(function)
        exported = torch.export.export(step, tensors, strict=False).module()
        value = exported(*tensors)
        assert value == step(*tensors)
        with pytest.raises(RuntimeError, match=r"no gradient in a graph of torch\.export"):
            value.backward()


@pytest.mark.parametrize("backend", FUSED)
def test_inference_mode(backend, device):
    with torch.inference_mode():
        loss = polydpo_fast.loss(*batch((4, 3), torch.float32, device), backend=backend)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend, device):
    pred, ref, target = batch((4, 3, 5), torch.float32, device)
    per_pair = torch.rand(2, device=device)
    parameters = [10.0, 1.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.0, 0.5]
    mask = torch.rand(1, 3, 5, device=device) > 0.3
    for optional in ([None] * 4, [mask, per_pair, per_pair, per_pair]):
        torch.library.opcheck(
            torch.ops.polydpo_fast.pair_loss.default,
            ([pred], [ref], [target], None, *optional, parameters, "poly_dpo", "halves", "none", backend),
        )
    coefficients = torch.randn(2, 2, dtype=torch.float64, device=device)
    for x in (pred, pred.transpose(1, 2), pred[:, :2]):
        t = target[:, : x.shape[1]] if x.shape[1] == 2 else target.reshape(x.shape)
        torch.library.opcheck(
            torch.ops.polydpo_fast.pair_gradient.default,
            ([x], [t], None, coefficients, torch.ones((), device=device), "halves", backend),
        )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("double", [None, 0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_promise_what_they_return(reduction, double, backend, device):
    """To torch.compile: shapes, dtypes and strides, here of a winner and a loser in different orders."""
    drawn = [list(x.chunk(2)) for x in batch((4, 3, 5, 6), torch.bfloat16, device)]
    drawn[0][0] = drawn[0][0].contiguous(memory_format=torch.channels_last)
    if double is not None:
        drawn[double] = [x.double() for x in drawn[double]]

    def results(to):
        pred, ref, target = ([x.to(to) for x in both] for both in drawn)
        parameters = [2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
        value, metrics, table = torch.ops.polydpo_fast.pair_loss(
            pred, ref, target, *[None] * 5, parameters, "poly_dpo", "halves", reduction, backend
        )
        grads = torch.ops.polydpo_fast.pair_gradient(pred, target, None, table, value, "halves", backend)
        return [(x.shape, x.dtype, x.stride()) for x in (value, metrics, table, *grads)]

    assert results("meta") == results(device)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, backend, device):
    def step(pred, ref, target):
        loss, metrics = polydpo_fast.loss(
            2 * pred, ref, target, beta=10.0, alpha=1.0, return_metrics=True, backend=backend
        )
        return loss, metrics["logit_mean"]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((4, 3, 5), (6, 3, 8)):
        tensors = batch(shape, torch.float32, device)
        results = []
        for function in (step, compiled):
            pred = tensors[0].clone().requires_grad_()
            loss, logit = function(pred, *tensors[1:])
            loss.backward()
            results.append((loss.detach(), logit, pred.grad))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_numbers_that_change_do_not_compile_a_graph_each(name, backend, device):
    from torch.fx.experimental import symbolic_shapes

    if backend != "reference" and not hasattr(symbolic_shapes, "has_static_value"):
        pytest.skip("PyTorch 2.6 cannot tell which numbers change")
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    def step(pred, ref, target, value):
        return polydpo_fast.loss(pred, ref, target, **{"beta": 10.0, name: value}, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counted)
    tensors = batch((4, 3, 5), torch.float32, device)
    for value in torch.linspace(0.5, 7.3, 11).tolist():
        results = []
        for function in (step, compiled):
            pred = tensors[0].clone().requires_grad_()
            loss = function(pred, *tensors[1:], value)
            loss.backward()
            results.append((loss.detach(), pred.grad))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced) if backend != "reference" else torch.allclose(eager, traced)
    assert len(graphs) == 2  # of the first value, and of any other


@pytest.mark.parametrize("backend", FUSED)
def test_errors_compile_to_one_graph_of_their_tensors(backend, device):
    """What the objectives would be given, numbers that no errors depend on, is no input of the graph."""
    inputs_of_graphs = []

    def counted(graph, inputs):
        inputs_of_graphs.append([x for x in inputs if isinstance(x, torch.Tensor)])
        return graph

    def step(pred, ref, target):
        return polydpo_fast.pair_errors(pred, ref, target, backend=backend).logit(beta=2.0)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counted)
    for shape in ((4, 3, 5), (6, 3, 8), (10, 2, 8)):
        tensors = batch(shape, torch.float32, device)
        assert torch.equal(compiled(*tensors), step(*tensors))
    assert [len(tensors) for tensors in inputs_of_graphs] == [3]


def test_the_table_of_pairs_has_the_metrics_in_their_order():
    names = [column.name.lower() for column in Column]
    assert names[1:13] == list(METRICS)
    assert names[ERRORS] == ["model_mse_win", "model_mse_lose", "excess_win", "excess_lose"]


# ------------------------------------------------------------------------------------------------ bad input


GOOD = dict(model_pred=torch.zeros(4, 3, 2), ref_pred=torch.zeros(4, 3, 2), target=torch.zeros(4, 3, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model_pred=[1.0]), TypeError, "model_pred is a list; expected a torch.Tensor or a tuple"),
        (dict(target=None), TypeError, r"target is None \(NoneType\); expected a torch.Tensor"),
        (dict(ref_pred=torch.zeros(4, 3, 2, dtype=torch.int64)), TypeError, "ref_pred has dtype torch.int64"),
        (
            dict(target=torch.zeros(4, 3, 2, dtype=torch.complex64)),
            TypeError,
            "target has dtype torch.complex64",
        ),
        (
            dict(ref_pred=torch.zeros(4, 3, 5)),
            ValueError,
            r"ref_pred has shape \(4, 3, 5\); expected \(4, 3, 2\) like model_pred",
        ),
        (
            dict(target=torch.zeros(3, 3, 2)),
            ValueError,
            r"target has shape \(3, 3, 2\); expected \(4, 3, 2\)",
        ),
        (dict(model_pred=torch.zeros(3, 2)), ValueError, "model_pred has 3 rows .* expected an even number"),
        (dict(model_pred=torch.zeros(4)), ValueError, r"model_pred has shape \(4,\); expected \(2B, ...\)"),
        (dict(model_pred=torch.zeros(0, 3)), ValueError, "expected at least one pair"),
        (dict(model_pred=torch.zeros(2, 0)), ValueError, "expected at least one pair and one element"),
        (dict(ref_pred=torch.zeros(4, 3, 2, device="meta")), ValueError, "ref_pred is on meta; expected cpu"),
        (
            dict(target=torch.zeros(4, 3, 2).to_sparse()),
            TypeError,
            "target has layout torch.sparse_coo; expected a dense",
        ),
        (
            dict(ref_pred=torch.zeros(4, 3, 2, dtype=torch.cfloat).conj().imag),
            TypeError,
            "ref_pred is lazily negated",
        ),
        (dict(beta=0.0), ValueError, "beta is 0.0; expected a finite number > 0"),
        (dict(beta=-1), ValueError, "beta is -1"),
        (dict(beta=math.inf), ValueError, "beta is inf"),
        (dict(beta=math.nan), ValueError, "beta is nan"),
        (dict(beta="5000"), TypeError, r"beta is '5000' \(str\); expected a number, or a torch.Tensor of one per pair"),
        (dict(alpha=np.zeros(4)), TypeError, "alpha is a ndarray; expected a number, a list of up to 4 numbers, or a "),
        (dict(beta=True), TypeError, "beta is True"),
        (dict(beta=torch.ones(3)), ValueError, r"beta has shape \(3,\); expected \(2,\), one value per pair"),
        (dict(alpha=math.nan), ValueError, "alpha is nan; expected a finite number"),
        (dict(alpha=None), TypeError, "alpha is None"),
        (dict(objective="dpo"), ValueError, "objective is 'dpo'; expected one of 'poly_dpo'"),
        (dict(reduction="avg"), ValueError, "reduction is 'avg'; expected one of 'mean', 'sum', 'none'"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda'; expected one of '(cpp|reference)'"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        polydpo_fast.loss(**{**GOOD, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["model_pred", "ref_pred", "target"])
def test_a_tensor_without_dimensions_is_named(argument, backend, device):
    good = {name: x.to(device) for name, x in GOOD.items()}
    for call in (polydpo_fast.loss, polydpo_fast.pair_errors):
        with pytest.raises(ValueError, match=rf"{argument} has shape \(\); expected \("):
            call(**{**good, argument: torch.zeros((), device=device)}, backend=backend)


@pytest.mark.parametrize("alpha", [-1.5, [-1.5], (-1.5,)])
def test_alpha_below_minus_one_warns_once(alpha):
    head_arguments._warn_not_monotone.cache_clear()
    with pytest.warns(UserWarning, match="not monotone") as warned:
        polydpo_fast.loss(**GOOD, alpha=alpha)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polydpo_fast.loss(**GOOD, alpha=alpha)


def test_alphas_of_poly_n_and_of_pairs_and_minus_one_do_not_warn():
    head_arguments._warn_not_monotone.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polydpo_fast.loss(**GOOD, alpha=-1.0)
        polydpo_fast.loss(**GOOD, alpha=[-1.5, 3.0])
        polydpo_fast.loss(**GOOD, alpha=torch.full((2,), -1.5))


@pytest.mark.skipif(not INTERPRETED, reason="counts the CPU allocator's bytes")
@pytest.mark.parametrize("backend", FUSED)
def test_allocates_the_gradient_and_kilobytes(backend, device):
    pred, ref, target = batch((4, 8, 32, 32), torch.bfloat16, device)
    pred.requires_grad_()
    polydpo_fast.loss(pred, ref, target, backend=backend).backward()  # what is made once
    pred.grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True, profile_memory=True
    ) as profile:
        polydpo_fast.loss(pred, ref, target, backend=backend).backward()
    sizes = [e.cpu_memory_usage for e in profile.events() if e.name in ("aten::empty", "aten::empty_strided")]
    gradient = pred.numel() * pred.element_size()
    assert max(sizes) == gradient
    assert sum(sizes) - gradient < 8192


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_float64_reference_alone_makes_the_same_gradient_at_each_call(reduction):
    """The first call looks at its arguments, later ones know them: both compute in float64."""
    draw = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(8, 4, 64, 64, generator=draw) for _ in range(2))
    target = target.half()  # of this mixture the two differ in a quarter of the elements
    ref = torch.randn(8, 4, 64, 64, generator=draw, dtype=torch.float64)
    found = []
    for _ in range(4):
        policy = pred.clone().requires_grad_()
        loss = polydpo_fast.loss(policy, ref, target, beta=3.0, alpha=0.5, reduction=reduction)
        assert loss.dtype == torch.float64
        loss.sum().backward()
        found.append(policy.grad)
    assert all(torch.equal(found[0], grad) for grad in found)
