"""Every option of `polydpo_fast.loss` and `pair_errors`, alone and mixed, on every backend, against the oracle."""

import ast
import inspect
import typing
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loss import BACKENDS, FUSED
from torch.utils._pytree import tree_map

import polydpo_fast
from polydpo_fast import argument_checks, functional
from polydpo_fast.fused import arguments, autograd, fast_lane, head_arguments, operators
from polydpo_fast.objectives import OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def arms(pairs, sample, dtype, seed, device, closeness=0.1):
    """pred, ref, target as (win, lose), on the device."""
    random = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn((pairs, *sample), generator=random, dtype=torch.float64) for _ in range(2)]

    pred, step, target = draw(), draw(), draw()
    ref = [p + closeness * s for p, s in zip(pred, step, strict=True)]
    return [[x.to(dtype).to(device) for x in pair] for pair in (pred, ref, target)]


def join(pair, layout):
    if layout == "tuple":
        return tuple(pair)
    if layout == "interleaved":
        return torch.stack(pair, dim=1).flatten(0, 1)
    return torch.cat(pair)


def gradient_of(pred, layout):
    if layout == "tuple":
        return [x.grad for x in pred]
    if layout == "interleaved":
        return [pred.grad[0::2], pred.grad[1::2]]
    return list(pred.grad.chunk(2))


def close(actual, expected, rtol, atol=0.0):
    np.testing.assert_allclose(actual.detach().double().cpu().numpy(), expected.astype(float), rtol=rtol, atol=atol)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_options(device, data):
    draw = data.draw
    backend = draw(st.sampled_from(BACKENDS))
    layout = draw(st.sampled_from(["halves", "interleaved", "tuple"]))
    pairs, sample = draw(st.integers(1, 4)), tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    pred, ref, target = arms(pairs, sample, torch.float64, draw(st.integers(0, 9999)), device)
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    per_pair = [torch.rand(pairs, generator=random, dtype=torch.float64).to(device) for _ in range(5)]
    objective = draw(st.sampled_from(list(OBJECTIVES)))
    options, expected = {"objective": objective}, {"objective": objective}

    # beta as a float is float32 on the way into a Triton kernel only under the interpreter: take a round number.
    beta = 20.0 + 60 * per_pair[0] if draw(st.booleans()) else 40.0
    options["beta"], expected["beta"] = beta, oracle.wide(beta) if isinstance(beta, torch.Tensor) else beta
    if objective == "poly_dpo":
        alpha = draw(st.sampled_from([0.0, 8.0, -0.5, (1.0,), (0.5, -0.25, 2.0), (1.0, 2.0, 0.0, -0.5), "tensor"]))
        options["alpha"] = 4 * per_pair[1] if alpha == "tensor" else alpha
        expected["alpha"] = (4 * oracle.wide(per_pair[1]),) if alpha == "tensor" else np.atleast_1d(alpha)
    for name, key, values in [
        ("label_smoothing", "smoothing", [0.0, 0.125, 0.25]),
        ("margin", "margin", [0.0, 0.5]),
        ("sft_weight", "sft_weight", [0.0, 0.25]),
    ]:
        options[name] = expected[key] = draw(st.sampled_from(values))
    if draw(st.booleans()):
        options["pair_weight"], expected["weight"] = per_pair[2], oracle.wide(per_pair[2])
    mask = None
    if draw(st.booleans()):
        shape = draw(st.sampled_from([sample, (1, *sample), (pairs, *sample), (pairs, *(1,) * len(sample))]))
        mask = torch.rand(shape, generator=random) > 0.3
        mask.view(-1, *shape[1:])[..., :1] = True  # something is left
        if shape == sample:
            mask.flatten()[0] = True
        if shape[1:] == (1,) * len(sample):
            mask[:] = True
        options["mask"], expected["mask"] = mask.to(device), mask.numpy()
        if len(shape) == len(sample) and shape[0] == pairs:  # may look like one for each pair without its channels
            options["mask"] = options["mask"][None]
    reference = draw(st.sampled_from(["pred", "error", "free"]))
    given_ref = None
    if reference == "pred":
        given_ref, expected["ref"] = join(ref, layout), ref
    elif reference == "error":
        options["ref_error"], expected["ref_error"] = join(per_pair[3:], layout), per_pair[3:]
    else:
        options["reference_free"] = True
    shared = draw(st.booleans())
    if shared:
        target = [target[0], target[0]]
    given_target = target[0] if shared else join(target, layout)

    given_pred = join([x.clone() for x in pred], layout)
    for x in given_pred if layout == "tuple" else [given_pred]:
        x.requires_grad_()
    loss, metrics = polydpo_fast.loss(
        given_pred,
        given_ref,
        given_target,
        **options,
        layout="interleaved" if layout == "interleaved" else "halves",
        reduction="none",
        return_metrics=True,
        backend=backend,
    )
    upstream = per_pair[4]
    (loss * upstream).sum().backward()
    losses, logits, (win, lose) = oracle.full(*pred, *target, **expected)
    close(loss, losses, rtol=1e-9, atol=1e-11)
    rows = oracle.wide(upstream).reshape(-1, *(1,) * len(sample))
    for actual, exact in zip(gradient_of(given_pred, layout), (win * rows, lose * rows), strict=True):
        close(actual, exact, rtol=1e-9, atol=1e-11)
    close(metrics["logit_mean"], logits.mean(), rtol=1e-9, atol=1e-11)
    close(metrics["implicit_accuracy"], ((logits > 0) + 0.5 * (logits == 0)).mean(), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hinge_has_no_slope_from_one_on(backend, device):
    """z, the loser's error less the winner's, is 0, 1 and 4."""
    win, lose, target = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]], device=device)[..., None]
    pred = win.requires_grad_(), lose.requires_grad_()
    options = dict(objective="hinge", beta=2.0, reference_free=True, reduction="none", backend=backend)
    loss = polydpo_fast.loss(pred, None, target, **options)
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0, 0.0]
    assert win.grad.flatten().tolist() == [2.0, 0.0, 0.0]
    assert lose.grad.flatten().tolist() == [-2.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["halves", "interleaved", "tuple"])
def test_layouts_agree(backend, dtype, layout, device):
    pred, ref, target = arms(3, (4, 6, 5), dtype, 0, device)
    given_pred = join(pred, layout)
    kind = "interleaved" if layout == "interleaved" else "halves"
    loss = polydpo_fast.loss(given_pred, join(ref, layout), join(target, layout), layout=kind, backend=backend)
    expected, _, _ = oracle.full(*pred, *target, ref=ref)
    close(loss, expected.mean(), rtol=2e-5)


needs_cpp = pytest.mark.skipif("cpp" not in polydpo_fast.available_backends("cpu"), reason="the extension is not built")
DTYPES_OF_SMALL_PAIRS = {
    "bfloat16": (torch.bfloat16,) * 3,
    "float16": (torch.float16,) * 3,
    "float32": (torch.float32,) * 3,
    "float64": (torch.float64,) * 3,
    "autocast": (torch.float32, torch.bfloat16, torch.bfloat16),
    "converted": (torch.bfloat16, torch.float16, torch.float32),
}


@pytest.mark.skipif("cpp" not in BACKENDS, reason="how many pairs C++ takes at a time")
@pytest.mark.parametrize("dtypes", DTYPES_OF_SMALL_PAIRS)
@pytest.mark.parametrize(
    ("elements", "shared"), [(1, False), (16, True), (16, False), (31, False), (33, True), (200, False)]
)
def test_many_small_pairs_are_each_as_if_alone(dtypes, elements, shared, device):
    """C++ takes small pairs several at a time, and eight at a time through the head: whose are whose?"""
    pairs, dtypes = 300, DTYPES_OF_SMALL_PAIRS[dtypes]
    drawn = arms(pairs, (elements,), torch.float64, 5, device)
    pred, ref, target = ([x.to(dtype) for x in both] for both, dtype in zip(drawn, dtypes, strict=True))
    target = [target[0], target[0]] if shared else target
    beta, alpha, weight, upstream = 0.5 + torch.rand(4, pairs, generator=torch.Generator().manual_seed(0)).double()
    pred[1][77, 0] = torch.nan

    def run(rows):
        x = [one[rows].clone().requires_grad_() for one in pred]
        loss, metrics = polydpo_fast.loss(
            tuple(x),
            tuple(one[rows] for one in ref),
            target[0][rows] if shared else tuple(one[rows] for one in target),
            beta=40 * beta[rows],
            alpha=alpha[rows],
            pair_weight=weight[rows],
            label_smoothing=0.25,
            margin=0.5,
            reduction="none",
            return_metrics=True,
        )
        (loss * upstream[rows]).sum().backward()
        return loss.detach(), *[one.grad for one in x], metrics["model_mse_lose"]

    together = run(torch.arange(pairs))
    losses, _, gradients = oracle.full(
        *pred, *target, ref=ref, beta=40 * oracle.wide(beta), alpha=(oracle.wide(alpha),), weight=oracle.wide(weight),
        smoothing=0.25, margin=0.5,
    )  # fmt: skip
    fine = torch.arange(pairs) != 77
    rtol = 1e-9 if torch.float64 in dtypes else 2e-4  # of logits that are differences
    close(together[0][fine], losses[fine], rtol=rtol, atol=rtol)
    for actual, exact in zip(together[1:3], gradients, strict=True):
        rounding = torch.finfo(dtypes[0]).eps + rtol
        close(actual[fine], exact[fine] * oracle.wide(upstream)[fine, None], rtol=rounding, atol=rounding)
        assert torch.isnan(actual[77]).all()
    assert torch.isnan(together[0][77])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, run(torch.arange(pairs)[fine])[:3], (x[fine] for x in together[:3])))
    finally:
        torch.set_num_threads(threads)
    for pair in (0, 7, 8, 71, 72, 299):
        assert all(map(torch.equal, run(torch.tensor([pair]))[:3], (x[pair : pair + 1] for x in together[:3])))


@needs_cpp
@pytest.mark.parametrize("elements", [8, 16, 31, 64, 1027])
def test_the_gradient_of_very_many_small_pairs(elements):
    """Of 6 MiB, which is written past the caches where samples are larger and begin at multiples of 16 bytes."""
    pairs = 6 * 2**20 // (2 * 4 * elements)
    pred, ref, target = (torch.randn(2 * pairs, elements, generator=torch.Generator().manual_seed(i)) for i in range(3))
    grads = []
    for backend in ("cpp", "reference"):
        leaf = pred.clone().requires_grad_()
        polydpo_fast.loss(leaf, ref, target, beta=0.5, reduction="sum", backend=backend).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)  # the reference computes in float32


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)])
def test_bytes_of_a_mask_may_be_any(dtypes, backend, device):
    """A bool that was a view of other bytes is true where they are not 0."""
    pred, ref, target = (torch.randn(4, 96, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    pred, ref, target = pred.to(dtypes[0]), ref.to(dtypes[1]), target.to(dtypes[1])
    values = torch.tensor([0, 1, 2, 255], dtype=torch.uint8, device=device).repeat(2, 24)
    results = []
    for mask in (values.view(torch.bool), values != 0):
        leaf = pred.clone().requires_grad_()
        loss = polydpo_fast.loss(leaf, ref, target, beta=2.0, mask=mask, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", FUSED)
def test_a_mask_for_all_pairs_does_what_one_for_each_does(backend, device):
    """Broadcast within a sample, it is copied once."""
    pred, ref, target = (torch.cat(x) for x in arms(3, (4, 5), torch.float32, 1, device))
    mask = torch.tensor([True, False, True, True], device=device)[:, None]
    found = []
    for given_mask in (mask, mask.expand(3, 4, 5)):
        leaf = pred.clone().requires_grad_()
        loss = polydpo_fast.loss(leaf, ref, target, beta=2.0, mask=given_mask, reduction="none", backend=backend)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [8, 300])
@pytest.mark.parametrize("dtypes", [torch.bfloat16, torch.float16, torch.float32, (torch.float32, torch.bfloat16)])
def test_what_is_masked_may_be_nan(backend, dtypes, columns, device):
    drawn = arms(2, (3, columns), torch.float32, 1, device)
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)
    pred, ref, target = ([x.to(dtype) for x in pair] for pair, dtype in zip(drawn, (*dtypes, dtypes[1]), strict=True))
    mask = torch.ones(2, 1, columns, dtype=torch.bool)
    mask[0, :, 5:] = False
    mask[1, :, ::3] = False
    options = {"beta": 2.0, "mask": mask.to(device), "backend": backend}
    clean = polydpo_fast.loss(tuple(pred), tuple(ref), tuple(target), **options)
    for x in (*pred, *ref, *target):
        x.masked_fill_(~mask.to(device), torch.nan)
    pred = [x.requires_grad_() for x in pred]
    loss = polydpo_fast.loss(tuple(pred), tuple(ref), tuple(target), **options)
    loss.backward()
    assert loss == clean
    expected, _, gradients = oracle.full(*pred, *target, ref=ref, beta=2.0, mask=mask.numpy())
    close(loss, expected.mean(), rtol=1e-5)
    for x, exact in zip(pred, gradients, strict=True):
        close(x.grad, exact / 2, rtol=2 * torch.finfo(dtypes[0]).eps + 1e-5, atol=1e-7)
        assert (x.grad[~mask.expand_as(x)] == 0).all()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the gradient that C++ writes past the caches")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64])
def test_a_large_masked_gradient(dtype, other, device):
    size = 2**21 // dtype.itemsize + 8  # 4 MB of both arms
    random = torch.Generator().manual_seed(0)
    x, ref, target = (torch.randn(2, size, generator=random).to(to) for to in (dtype, other, other))
    mask = torch.rand(size, generator=random) > 0.5
    polydpo_fast.loss(x.requires_grad_(), ref, target, beta=2.0, mask=mask).backward()
    # dL/dpred of the winner: beta/D (1 - p) (pred - target), of the loser with a minus.
    difference = (x.detach().double() - target.double()) * mask
    win, lose = (difference.square() - (ref.double() - target.double()).square() * mask).sum(dim=1) / mask.sum()
    coefficient = 2.0 / mask.sum() / (1 + torch.exp(lose - win))
    expected = torch.stack((coefficient * difference[0], -coefficient * difference[1]))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # float16 has few digits for such gradients
    torch.testing.assert_close(x.grad.float(), expected.float(), rtol=torch.finfo(dtype).eps + 1e-5, atol=smallest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["beta", "alpha", "pair_weight", "ref_error"])
def test_numbers_of_pairs_in_float64_change_no_dtype(name, backend, device):
    pred, ref, target = arms(2, (3, 4), torch.float32, 1, device)
    options = {"beta": 2.0, name: torch.ones(2, dtype=torch.float64, device=device)}
    if name == "ref_error":
        ref, options[name] = None, (options[name],) * 2
    for reduction in ("mean", "none"):
        loss, metrics = polydpo_fast.loss(
            tuple(pred), ref, tuple(target), **options, reduction=reduction, return_metrics=True, backend=backend
        )
        assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["beta", "alpha", "pair_weight", "ref_error"])
def test_numbers_of_pairs_may_be_every_other_one_of_more(name, backend, device):
    pred, ref, target = (torch.cat(x) for x in arms(3, (3, 4), torch.float32, 1, device))
    values = 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(0)).to(device)
    values = values[::2] if name == "ref_error" else values[::4]
    ref = None if name == "ref_error" else ref
    options = dict(beta=2.0, reduction="none", backend=backend)
    found = [polydpo_fast.loss(pred, ref, target, **options | {name: x}) for x in (values, values.contiguous())]
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_with_nothing_left_is_nan_and_alone(backend, device):
    pred, ref, target = arms(2, (3, 4), torch.float32, 1, device)
    mask = torch.tensor([[[True]], [[False]]]).to(device)
    loss = polydpo_fast.loss(tuple(pred), tuple(ref), tuple(target), mask=mask, reduction="none", backend=backend)
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["channels_last", "transposed", "different"])
def test_masks_and_tuples_in_other_memory_orders(backend, argument, device):
    pred, ref, target = arms(2, (3, 4, 5), torch.float32, 2, device)
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    expected, _, (win, lose) = oracle.full(*pred, *target, ref=ref, mask=mask.numpy(), beta=30.0)
    if argument == "channels_last":
        pred, ref, target = ([x.contiguous(memory_format=torch.channels_last) for x in y] for y in (pred, ref, target))
    elif argument == "transposed":
        pred = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in pred]
    else:  # arms in different orders, a target expanded from one sample
        pred = [pred[0], pred[1].contiguous(memory_format=torch.channels_last)]
        target = [target[0][:1].expand(2, -1, -1, -1), target[1]]
        expected, _, (win, lose) = oracle.full(*pred, *target, ref=ref, mask=mask.numpy(), beta=30.0)
    pred = [x.detach().requires_grad_() for x in pred]
    loss = polydpo_fast.loss(
        tuple(pred), tuple(ref), tuple(target), beta=30.0, mask=mask.to(device), reduction="none", backend=backend
    )
    loss.sum().backward()
    close(loss, expected, rtol=1e-5)
    close(pred[0].grad, win, rtol=1e-5, atol=1e-6)
    close(pred[1].grad, lose, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [tuple, list])
def test_arms_apart_compile_to_one_graph(kind, backend, device):
    def step(pred, ref, target):
        pred, ref, target = (kind(x.chunk(2)) for x in (pred, ref, target))
        errors = polydpo_fast.pair_errors(pred, ref, target, backend=backend)
        return polydpo_fast.loss(pred, ref, target, beta=2.0, backend=backend) + errors.model_win.sum()

    torch._dynamo.reset()
    tensors = [torch.cat(x) for x in arms(2, (3, 5), torch.float32, 5, device)]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pred = tensors[0].clone().requires_grad_()
        value = function(pred, *tensors[1:])
        results.append((value.detach(), *torch.autograd.grad(value, pred)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_what_is_compiled_avoids_what_pytorch_2_6_cannot_compile():
    """It cannot catch the error of an import, and takes every zip for strict. Later ones do not show either."""
    for module in (functional, arguments, head_arguments, argument_checks, autograd, fast_lane, operators):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            assert not isinstance(node, ast.Try)
            assert not (isinstance(node, ast.keyword) and node.arg == "strict" and ast.unparse(node.value) == "False")


# -------------------------------------------------------------------------------------------- your own head


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["halves", "interleaved", "tuple"])
def test_pair_errors_and_a_head_of_ones_own(backend, layout, device):
    pred, ref, target = arms(3, (4, 5), torch.float64, 3, device)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    given_pred = join([x.clone() for x in pred], layout)
    for x in given_pred if layout == "tuple" else [given_pred]:
        x.requires_grad_()
    errors = polydpo_fast.pair_errors(
        given_pred,
        join(ref, layout),
        join(target, layout),
        mask=mask.to(device),
        layout="interleaved" if layout == "interleaved" else "halves",
        backend=backend,
    )
    z = errors.logit(40.0)
    (torch.nn.functional.softplus(-z) + 0.25 * errors.model_win).sum().backward()
    _, logits, (win, lose) = oracle.full(*pred, *target, ref=ref, mask=mask.numpy(), beta=40.0, sft_weight=0.25)
    close(z, logits, rtol=1e-10)
    for actual, exact in zip(gradient_of(given_pred, layout), (win, lose), strict=True):
        close(actual, exact, rtol=1e-10, atol=1e-13)
    assert errors.model_lose.shape == (3,)


@pytest.mark.parametrize("backend", FUSED)
def test_pair_errors_keep_their_precision_next_to_the_reference(backend, device):
    pred, ref, target = arms(4, (4, 16, 16), torch.bfloat16, 4, device, closeness=0.01)
    errors = polydpo_fast.pair_errors(tuple(pred), tuple(ref), tuple(target), backend=backend)
    _, logits, _ = oracle.full(*pred, *target, ref=ref)
    assert {error.dtype for error in errors} == {torch.float32}
    close(errors.logit(5000.0), logits, rtol=1e-5)


# --------------------------------------------------------------------------------------- how training uses it


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_grad_scaler(backend, device):
    """A bfloat16 forward of the policy under autocast, a scaled backward: the unscaled gradient is the plain one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6).to(device)
    x, target = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    with torch.no_grad():
        ref = model(x) + 0.1
    grads = []
    for scale in (None, 1024.0):
        model.zero_grad()
        scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast(device, torch.bfloat16):
            pred = model(x)
            assert pred.dtype == torch.bfloat16
            loss = polydpo_fast.loss(pred, ref, target, beta=10.0, backend=backend)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        grads.append(model.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=2**-7, atol=1e-6)


def losses_of(backend, ref, target):
    """A loss and the sum of an error, functions of the policy's prediction."""
    return (
        lambda x: polydpo_fast.loss(x, ref, target, beta=1.0, backend=backend),
        lambda x: polydpo_fast.pair_errors(x, ref, target, backend=backend).model_win.sum(),
    )


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, x))),
    "vmap over pairs": lambda f, x: torch.func.vmap(f)(x),
    "constant in grad": lambda f, x: torch.func.grad(lambda w: w * f(x))(torch.ones((), device=x.device)),
}


@pytest.mark.parametrize("backend", [*FUSED, None])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("called_before", [False, True])
def test_functional_transforms_refuse(transform, called_before, backend, device):
    """In the same words, whether or not the fast lane has seen such a call."""
    fast_lane._signature.cache_clear()
    pred, ref, target = (torch.cat(x) for x in arms(2, (3,), torch.float32, 0, device))
    for function in losses_of(backend, ref, target):
        if called_before:
            function(pred)
        with pytest.raises(RuntimeError, match=r"polydpo_fast has no torch\.func transforms .* backend='reference'"):
            TRANSFORMS[transform](function, pred)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("called_before", [False, True])
def test_batched_gradients_refuse(called_before, backend, device):
    fast_lane._signature.cache_clear()
    pred, ref, target = (torch.cat(x) for x in arms(2, (3,), torch.float32, 0, device))
    pred.requires_grad_()
    for _ in range(1 + called_before):
        loss = polydpo_fast.loss(pred, ref, target, reduction="none", backend=backend)
    errors = polydpo_fast.pair_errors(pred, ref, target, backend=backend).model_win
    for value in (loss, errors):
        with pytest.raises(RuntimeError, match=r"polydpo_fast has no torch\.func transforms .* is_grads_batched"):
            torch.autograd.grad(value, pred, torch.eye(2, device=device), is_grads_batched=True)
        with pytest.raises(RuntimeError, match=r"polydpo_fast has no torch\.func transforms"):
            torch.func.vmap(partial(torch.autograd.grad, value, pred))(torch.eye(2, device=device))


def test_functional_transforms_refuse_in_a_graph(device):
    """torch.compile traces torch.func.grad through an operator without asking it, to a gradient of zeros."""
    pred, ref, target = (torch.cat(x) for x in arms(2, (3,), torch.float32, 0, device))
    for function in losses_of(None, ref, target):
        for whole in (
            torch.compile(torch.func.grad(function), backend="eager"),
            torch.func.grad(torch.compile(function, backend="eager")),
        ):
            with pytest.raises(RuntimeError, match=r"polydpo_fast has no torch\.func transforms"):
                whole(pred)


def test_functional_transforms_take_the_reference(device):
    pred, ref, target = (torch.cat(x) for x in arms(2, (3,), torch.float32, 0, device))
    for function in losses_of("reference", ref, target):
        x = pred.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(x), x)
        torch.testing.assert_close(torch.func.grad(function)(pred), expected)
        torch.testing.assert_close(torch.func.vmap(function)(torch.stack((pred, pred))), function(pred).expand(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(layout="mixed"), ValueError, "layout is 'mixed'; expected one of 'halves', 'interleaved'"),
        (dict(ref_pred=None), ValueError, "ref_pred is None, ref_error is None and reference_free is False"),
        (dict(reference_free=True), ValueError, "ref_pred is given, .* reference_free is True; expected exactly one"),
        (dict(reference_free=1), TypeError, "reference_free is 1"),
        (dict(ref_pred=None, ref_error=torch.zeros(3)), ValueError, r"ref_error has shape \(3,\); expected \(4,\)"),
        (
            dict(model_pred=(torch.zeros(2, 3),)),
            TypeError,
            r"model_pred is a tuple; expected a torch.Tensor: model_pred\[0\] or a tuple \(win, lose\) of two",
        ),
        (dict(target=[torch.zeros(2, 3)] * 3), TypeError, "target is a list; expected a torch.Tensor or a tuple"),
        (
            dict(model_pred=(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2, device="meta"))),
            ValueError,
            r"model_pred\[1\] is on meta; expected cpu like model_pred\[0\]",
        ),
        (
            dict(ref_pred=(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2, device="meta"))),
            ValueError,
            r"ref_pred\[1\] is on meta; expected cpu like ref_pred\[0\]",
        ),
        (
            dict(model_pred=(torch.zeros(2, 3, 2), torch.zeros(2, 3, 1))),
            ValueError,
            r"model_pred\[1\] has shape \(2, 3, 1\); expected \(2, 3, 2\) like model_pred\[0\]",
        ),
        (
            dict(ref_pred=(torch.zeros(2, 3, 2), torch.zeros(3, 3, 2))),
            ValueError,
            r"ref_pred\[1\] has shape \(3, 3, 2\); expected \(2, 3, 2\)",
        ),
        (
            dict(model_pred=(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2).half())),
            TypeError,
            r"model_pred\[1\] has dtype torch.float16; expected torch.float32 like model_pred\[0\]",
        ),
        (dict(mask=torch.ones(3, 2)), TypeError, "mask has dtype torch.float32; expected torch.bool"),
        (
            dict(mask=torch.ones(3, 3, 2, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(3, 3, 2\); expected one that",
        ),
        (dict(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask has shape \(5,\)"),
        (
            dict(mask=torch.ones(1, 1, 1, 3, 2, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(1, 1, 1, 3, 2\); expected",
        ),
        (dict(mask=True), TypeError, "mask is True"),
        (dict(mask=torch.ones(3, 2, dtype=torch.bool, device="meta")), ValueError, "mask is on meta; expected cpu"),
        (
            dict(target=torch.zeros(4, 3, 2, device="meta")),
            ValueError,
            "target is on meta; expected cpu like model_pred",
        ),
        (
            dict(target=(torch.zeros(2, 3, 2), torch.zeros(2, 3, 1))),
            ValueError,
            r"target\[1\] has shape \(2, 3, 1\); expected \(2, 3, 2\)",
        ),
        (
            dict(ref_pred=None, ref_error=torch.zeros(4, device="meta")),
            ValueError,
            "ref_error is on meta; expected cpu like model_pred",
        ),
        (dict(beta=torch.ones(2, device="meta")), ValueError, "beta is on meta; expected cpu like model_pred"),
        (
            dict(beta=torch.tensor(2.0)),
            ValueError,
            r"beta has shape \(\); expected \(2,\), .* \(a float for all pairs\)",
        ),
        (
            dict(mask=torch.ones(3, 2, dtype=torch.bool).to_sparse()),
            TypeError,
            "mask has layout torch.sparse_coo; expec",
        ),
        (dict(beta=torch.ones(2).to_sparse()), TypeError, "beta has layout torch.sparse_coo; expected a dense"),
        (dict(alpha=torch.ones(2).to_sparse()), TypeError, "alpha has layout torch.sparse_coo; expected a dense"),
        (dict(pair_weight=torch.ones(2).to_sparse()), TypeError, "pair_weight has layout torch.sparse_coo; expected"),
        (dict(alpha=[]), ValueError, "alpha has 0 coefficients; expected 1 to 4"),
        (dict(alpha=[1.0, "x"]), TypeError, r"alpha\[1\] is 'x'"),
        (dict(alpha=torch.zeros(2, dtype=torch.int64)), TypeError, "alpha has dtype torch.int64"),
        (dict(beta=torch.ones(2).requires_grad_()), ValueError, "beta requires a gradient; expected a constant"),
        (dict(alpha=[0.0] * 5), ValueError, "alpha has 5 coefficients; expected 1 to 4"),
        (dict(alpha=[0.0, 1.0], objective="ipo"), ValueError, "alpha is a list; expected 0 for objective 'ipo'"),
        (dict(alpha=1.0, objective="ipo"), ValueError, "expected 0 for objective 'ipo', which does not use it"),
        (dict(label_smoothing=0.5), ValueError, "label_smoothing is 0.5; expected a number from 0 to below 0.5"),
        (dict(sft_weight=-1), ValueError, "sft_weight is -1; expected a number >= 0"),
        (dict(margin=float("nan")), ValueError, "margin is nan; expected a finite number"),
        (dict(margin=float("-inf")), ValueError, "margin is -inf; expected a finite number"),
        (
            dict(objective="ipo", alpha=torch.ones(2)),
            ValueError,
            r"alpha is a Tensor of shape \(2,\); expected 0 for obj",
        ),
        (dict(pair_weight=2.0), TypeError, r"pair_weight is 2.0 \(float\); expected a torch.Tensor"),
        (dict(pair_weight=torch.ones(4)), ValueError, r"pair_weight has shape \(4,\); expected \(2,\)"),
        (dict(objective=["poly_dpo"]), ValueError, r"objective is \['poly_dpo'\]; expected one of"),
        (dict(beta=10**400), ValueError, "expected a finite number > 0"),
        (dict(target=torch.zeros(4, 3, 2).to_sparse()), TypeError, "target has layout torch.sparse_coo"),
        (dict(ref_pred=torch.zeros(4, 3, 2, device="meta")), ValueError, "ref_pred is on meta; expected cpu"),
    ],
)
def test_bad_options_are_named(change, error, message):
    good = dict(model_pred=torch.zeros(4, 3, 2), ref_pred=torch.zeros(4, 3, 2), target=torch.zeros(4, 3, 2))
    with pytest.raises(error, match=message):
        polydpo_fast.loss(**{**good, **change})


@pytest.mark.parametrize(
    ("pairs", "sample", "shape", "fits"),
    [
        (4, (4, 6, 5), (4, 6, 5), False),  # (B, H, W) or (C, H, W)
        (4, (4, 6, 5), (1, 4, 6, 5), True),
        (4, (4, 6, 5), (4, 1, 6, 5), True),
        (4, (4, 6, 5), (4, 1, 1), True),  # of channels
        (4, (4, 6, 5), (6, 5), True),
        (3, (4, 6, 5), (4, 6, 5), True),
        (1, (4, 6, 5), (1, 6, 5), True),  # the same for the only pair as for all
        (6, (6, 6), (6, 6), False),  # (B, N) or (N, C)
        (1, (6, 6), (1, 6), False),
        (1, (6, 5), (1, 5), True),
        (1, (1, 5), (1, 1), True),
        (3, (3,), (3,), False),
    ],
)
def test_a_mask_that_could_be_of_pairs_or_of_samples_is_refused(pairs, sample, shape, fits):
    """With other numbers of pairs one of the two readings is refused: it must not change with the last batch."""
    tensors = torch.randn(3, 2 * pairs, *sample, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(shape, dtype=torch.bool)
    if fits:
        plain = polydpo_fast.loss(*tensors, beta=1.0)
        assert polydpo_fast.loss(*tensors, beta=1.0, mask=mask) == plain
    else:
        with pytest.raises(ValueError, match="could be for all pairs or one for each"):
            polydpo_fast.loss(*tensors, beta=1.0, mask=mask)


def test_rounded_reference_errors_warn_once():
    arguments._warn_rounded_reference.cache_clear()
    pred, target = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="ref_error is torch.bfloat16") as warned:
        polydpo_fast.loss(pred, None, target, ref_error=torch.ones(4).bfloat16())
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polydpo_fast.loss(pred, None, target, ref_error=torch.ones(4).bfloat16())
        polydpo_fast.loss(pred, None, target, ref_error=torch.ones(4))


def test_numbers_of_numpy_are_numbers():
    tensors = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    plain = polydpo_fast.loss(*tensors, beta=2.0, alpha=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an overflow, too, in comparing them with float64's largest
        assert polydpo_fast.loss(*tensors, beta=np.float32(2), alpha=np.float16(0.5)) == plain


def test_the_types_have_every_option():
    options = set(typing.get_type_hints(functional._Options))
    given = set(inspect.signature(polydpo_fast.loss).parameters)
    assert given == {"model_pred", "ref_pred", "target", "return_metrics"} | options
    assert given - {"backend"} == set(inspect.signature(polydpo_fast.reference.loss).parameters)


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python before 3.11 does not keep overloads")
def test_the_types_take_a_flag_that_is_not_known():
    """`return_metrics=step % 100 == 0` is of type bool, which is neither literal to a type checker."""
    returned = {}
    for form in typing.get_overloads(polydpo_fast.loss):
        hints = typing.get_type_hints(form)
        returned[hints["return_metrics"]] = hints["return"]
    alone, with_metrics = torch.Tensor, tuple[torch.Tensor, dict[str, torch.Tensor]]
    assert returned == {
        typing.Literal[False]: alone,
        typing.Literal[True]: with_metrics,
        bool: alone | with_metrics,
    }


def test_a_beta_that_is_not_of_the_pairs_is_refused_by_the_logit():
    errors = polydpo_fast.pair_errors(*torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)))
    assert errors.logit(torch.tensor(2.0)).equal(errors.logit(2.0))
    with pytest.raises(ValueError, match=r"beta has shape \(2, 1\); expected \(2,\)"):
        errors.logit(torch.ones(2, 1))


# -------------------------------------------------------------------------------- tensors without memory


class Wrapped(torch.Tensor):
    """A tensor whose values are another's, as DTensor and FSDP's are: its own address is 0."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*tree_map(lambda x: x.inner if isinstance(x, cls) else x, args), **(kwargs or {}))


@needs_cpp
@pytest.mark.parametrize("name", ["ref_pred", "target", "beta", "alpha", "pair_weight", "ref_error", "mask"])
def test_wrapped_tensors_are_not_taken_for_absent_ones(name):
    random = torch.Generator().manual_seed(0)
    pred, ref, target = torch.randn(3, 4, 4, 8, generator=random)
    given = {"ref_pred": ref, "target": target, "beta": torch.tensor([1.0, 3.0])}
    if name == "alpha":
        given["alpha"] = torch.tensor([2.0, -0.5])
    if name == "pair_weight":
        given["pair_weight"] = torch.tensor([2.0, 0.5])
    if name == "mask":
        given["mask"] = torch.rand(2, 4, 8, generator=random) > 0.5
    if name == "ref_error":
        given["ref_pred"], given["ref_error"] = None, torch.rand(4, generator=random)
    grads = []
    for wrap in (False, True):
        leaf = pred.clone().requires_grad_()
        loss = polydpo_fast.loss(leaf, **{**given, **({name: Wrapped(given[name])} if wrap else {})})
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    assert grads[0][0] == grads[1][0]
    assert grads[0][1].equal(grads[1][1])


@needs_cpp  # the reference reads what is not there, as all of PyTorch does
@pytest.mark.parametrize("freed", [0, 1, 2])
@pytest.mark.parametrize("calls", [0, 2])
def test_freed_memory_is_an_error(freed, calls):
    """In the first call, and in one that is like an earlier one."""
    tensors = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for _ in range(calls):
        polydpo_fast.loss(*tensors)
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        polydpo_fast.loss(*tensors)


@needs_cpp
@pytest.mark.parametrize("freed", [0, 1, 2])
@pytest.mark.parametrize("arm", [0, 1])
def test_freed_memory_of_one_arm_is_an_error(arm, freed):
    tensors = [[torch.randn(2, 16, generator=torch.Generator().manual_seed(i)) for _ in range(2)] for i in range(3)]
    tensors[freed][arm].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        polydpo_fast.loss(*map(tuple, tensors))


@needs_cpp
@pytest.mark.parametrize("freed", [0, 2])
@pytest.mark.parametrize("calls", [1, 2])
def test_memory_that_is_freed_before_backward_is_an_error(freed, calls):
    tensors = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    tensors[0].requires_grad_()
    losses = [polydpo_fast.loss(*tensors) for _ in range(calls)]
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        losses[-1].backward()


def test_sharded_tensors_are_told_to_be_local():
    class Sharded(Wrapped):
        def to_local(self):
            return self.inner

    pred, ref, target = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        TypeError, match=r"ref_pred is a Sharded; expected a plain tensor, such as ref_pred.to_local\(\)"
    ):
        polydpo_fast.loss(pred, Sharded(ref), target)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    pred, ref, target = torch.randn(3, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="ref_pred is nested; expected a dense tensor"):
        polydpo_fast.loss(pred, torch.nested.nested_tensor(list(ref)), target)


def test_a_forgotten_reference_is_an_error():
    """It would train with a loss of log 2 for ever. Equal values are fine: so begins every training."""
    pred, target = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    pred.requires_grad_()
    for _ in range(2):  # also where a call of the same form came before
        with pytest.raises(ValueError, match="ref_pred is model_pred itself"):
            polydpo_fast.loss(pred, pred, target)
        with pytest.raises(ValueError, match="ref_pred is model_pred itself"):
            polydpo_fast.loss((pred[:2], lose := pred[2:]), (pred[:2].detach(), lose), target)
        constant = pred.detach()
        for policy in (pred, constant):  # the latter in an evaluation
            assert polydpo_fast.loss(policy, constant, target).item() == pytest.approx(np.log(2))


def test_a_models_whole_output_is_told_where_its_tensor_is():
    pred, ref, target = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"model_pred is a SimpleNamespace; .*: model_pred\.sample or"):
        polydpo_fast.loss(SimpleNamespace(sample=pred), ref, target)
