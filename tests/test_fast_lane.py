"""The usual call on a CPU is checked once per signature and then looked up: nothing else may change by it."""

import io
import re

import pytest
import torch

import polydpo_fast
from polydpo_fast.fused import fast_lane, operators
from polydpo_fast.layout import PAIR_COLUMNS

pytestmark = pytest.mark.skipif(
    "cpp" not in polydpo_fast.available_backends("cpu"), reason="the C++ extension is not built"
)


def three(shape=(4, 3, 6, 5), dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    pred, target, step = (torch.randn(shape, generator=random) for _ in range(3))
    return [pred.to(dtype), (pred + 0.01 * step).to(dtype), target.to(dtype)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "slice", "first channels", "shared target"])
def test_a_later_call_gives_the_bits_of_the_first(reduction, layout, dtype, form):
    """The first call of a signature is checked, later ones take the fast lane: other numbers, the same function."""

    def run(tensors, beta=7.0):
        x = tensors[0].detach().requires_grad_()
        loss, metrics = polydpo_fast.loss(
            x, *tensors[1:], beta=beta, alpha=2, layout=layout, reduction=reduction, return_metrics=True
        )
        total = (loss * torch.arange(1, 1 + loss.numel())).sum() if reduction == "none" else loss
        return loss.detach(), *torch.autograd.grad(total, x), torch.stack(list(metrics.values()))

    def formed(tensors):
        if form == "channels_last":
            return [x.contiguous(memory_format=torch.channels_last) for x in tensors]
        if form == "slice":
            return [torch.cat((x, x))[2:6] if layout == "halves" else x for x in tensors]
        if form == "first channels":
            return [torch.cat((x, x), dim=1)[:, :3] for x in tensors]
        if form == "shared target":
            return [*tensors[:2], tensors[2][:2]]
        return tensors

    fast_lane._signature.cache_clear()
    first = formed(three(dtype=dtype))
    expected = run(first)
    run(formed(three(dtype=dtype, seed=1)))
    again = run(first)
    assert fast_lane._signature.cache_info().hits == 2
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert not torch.equal(run(first, beta=8.0)[0], expected[0])


def swapped(x):
    """The same shape and values with other strides."""
    return x.contiguous(memory_format=torch.channels_last)


def but_for(place, function):
    return lambda tensors: [function(x) if i == place else x for i, x in enumerate(tensors)]


OTHERWISE = {
    **{f"strides of {i}": (but_for(i, swapped), {}) for i in range(3)},
    **{f"dtype of {i}": (but_for(i, torch.Tensor.double), {}) for i in range(3)},
    "shape": (lambda t: [x[:2] for x in t], {}),
    "shared target": (lambda t: [t[0], t[1], t[2][:2]], {}),
    "reference_free": (lambda t: [t[0], None, t[2]], dict(reference_free=True)),
    "ref_error": (lambda t: [t[0], None, t[2]], dict(ref_error=torch.tensor([0.5, 1.0, 1.5, 2.0]))),
    "pair_weight": (list, dict(pair_weight=torch.tensor([0.25, 3.0]))),
    "mask": (list, dict(mask=torch.tensor([[True, False, True, True, False]]))),
    "tensors": (list, dict(beta=torch.tensor([3.0, 9.0]), alpha=torch.tensor([-0.5, 2.0]))),
    **{
        f"{name}={value}": (list, {name: value})
        for name, value in dict(
            beta=3.0, alpha=2.0, objective="ipo", label_smoothing=0.2, margin=0.5, sft_weight=2.0, layout="interleaved"
        ).items()
    },
    "reduction": (list, dict(reduction="sum")),
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_a_call_that_differs_in_one_thing_is_another(change):
    """What was worked out for one signature must not be taken for the next."""
    fast_lane._signature.cache_clear()
    tensors, (form, options) = three(), OTHERWISE[change]
    for _ in range(2):
        polydpo_fast.loss(*tensors, beta=7.0)
    found, wanted = [], []
    for backend, results in ((None, found), (None, found), ("reference", wanted)):
        pred, *others = form(tensors)
        x = pred.detach().requires_grad_()
        loss = polydpo_fast.loss(x, *others, **{"beta": 7.0, **options}, backend=backend)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for loss, grad in found:
        torch.testing.assert_close(loss, wanted[0][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grad, wanted[0][1], rtol=1e-4, atol=1e-6)


def test_metrics_that_nobody_asked_for_change_nothing_else():
    tensors = three()
    found = []
    for with_metrics in (False, True, False, True):  # of the first call, and of the fast lane
        x = tensors[0].detach().requires_grad_()
        loss = polydpo_fast.loss(x, *tensors[1:], beta=30.0, return_metrics=with_metrics)
        loss, metrics = loss if with_metrics else (loss, {})
        assert not any(metric.requires_grad for metric in metrics.values())
        loss.backward()
        found.append((loss.detach(), x.grad, metrics))
    expected = polydpo_fast.reference.loss(*tensors, beta=30.0, return_metrics=True)[1]
    for loss, grad, metrics in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])
        for name, metric in metrics.items():
            torch.testing.assert_close(metric, expected[name], rtol=1e-4, atol=1e-6)


def test_bad_input_is_named_however_often():
    good = three()
    for _ in range(2):
        polydpo_fast.loss(*good)
        polydpo_fast.loss(*good, beta=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="ref_pred has shape"):
            polydpo_fast.loss(good[0], good[1][:2], good[2])
        with pytest.raises(TypeError, match=r"beta is True \(bool\)"):  # equal to 1, of which we know
            polydpo_fast.loss(*good, beta=True)
        with pytest.raises(TypeError, match="label_smoothing is a list"):
            polydpo_fast.loss(*good, label_smoothing=[0.1])
        with pytest.raises(TypeError, match="target is lazily negated"):  # of the shape and strides of a good one
            polydpo_fast.loss(*good[:2], torch._neg_view(good[2]))
        with pytest.raises(ValueError, match="ref_pred is given, ref_error is given"):
            polydpo_fast.loss(*good, ref_error=torch.ones(4))
        with pytest.raises(TypeError, match="strided"):
            polydpo_fast.loss(good[0].to_sparse(), *good[1:])
        policy = good[0].detach().requires_grad_()
        with pytest.raises(ValueError, match="ref_pred is model_pred itself"):
            polydpo_fast.loss(policy, policy, good[2])


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("only", [None, 0, 2])
def test_saved_tensors_may_come_back_in_another_order(only, layout):
    """torch.autograd.graph.save_on_cpu and its like keep values, not strides."""
    tensors = [x.contiguous(memory_format=torch.channels_last) for x in three()]
    grads = []
    for hooks in (False, False, True):

        def unpack(t, hooks=hooks):
            chosen = only is None or torch.equal(t, tensors[only])
            return t.contiguous() if hooks and chosen else t

        x = tensors[0].detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            polydpo_fast.loss(x, *tensors[1:], layout=layout).backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_checkpointing_may_record_the_first_call_and_replay_a_later_one():
    from torch.utils.checkpoint import checkpoint

    fast_lane._signature.cache_clear()
    tensors = three()
    x = tensors[0].requires_grad_()
    checkpoint(lambda p: polydpo_fast.loss(p * 1.0, *tensors[1:], beta=3.0), x, use_reentrant=False).backward()
    recorded, x.grad = x.grad, None
    polydpo_fast.loss(x, *tensors[1:], beta=3.0).backward()
    assert torch.equal(x.grad, recorded)


@pytest.mark.parametrize("dims", [(4,), (4, 2), (2,)], ids=["the samples", "and the table of pairs", "the table alone"])
def test_saved_tensors_may_come_back_in_another_dtype(dims):
    tensors = three()
    grads = []
    for _ in range(3):
        x = tensors[0].detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half() if t.dim() in dims else t, lambda t: t):
            polydpo_fast.loss(x, *tensors[1:]).backward()
        grads.append(x.grad.float())
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    x = tensors[0].detach().requires_grad_()
    polydpo_fast.loss(x, *tensors[1:]).backward()
    torch.testing.assert_close(grads[0], x.grad, rtol=2e-2, atol=1e-2 * x.grad.abs().max().item())


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_may_come_back_as_numbers_and_the_table_of_pairs_with_other_strides(masked):
    tensors, mask = three(), None
    if masked:
        mask = torch.rand(tensors[0].shape[1:], generator=torch.Generator().manual_seed(0)) > 0.3
    table = tensors[0].shape[0] // 2, PAIR_COLUMNS
    grads = []
    for hooks in (False, True):
        x = tensors[0].detach().requires_grad_()

        def unpack(t, hooks=hooks):
            if hooks and t.shape == table:
                return t.t().contiguous().t()
            return t.float() if hooks and t.dtype == torch.bool else t

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            polydpo_fast.loss(x, *tensors[1:], mask=mask).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_an_upstream_gradient_may_be_lazy(sign):
    tensors = three()
    upstream = torch.tensor(1j).conj().imag if sign else torch._efficientzerotensor(())
    fast_lane._signature.cache_clear()
    for _ in range(2):
        x = tensors[0].detach().requires_grad_()
        loss = polydpo_fast.loss(x, *tensors[1:])
        (grad,) = torch.autograd.grad(loss, x, upstream)
        (expected,) = torch.autograd.grad(polydpo_fast.loss(x, *tensors[1:]), x)
        assert torch.equal(grad, sign * expected)


def test_a_default_device_is_not_where_results_go():
    tensors = three()
    expected = polydpo_fast.loss(*tensors)
    for reduction in ("mean", "none", "none"):
        with torch.device("meta"):
            x = tensors[0].detach().requires_grad_()
            loss = polydpo_fast.loss(x, *tensors[1:], reduction=reduction)
            loss.sum().backward()
        assert loss.device.type == x.grad.device.type == "cpu"
        torch.testing.assert_close(loss.detach().mean(), expected)


def test_other_devices_and_backends_do_not_take_it(monkeypatch):
    tensors = three()
    for _ in range(2):
        polydpo_fast.loss(*tensors, beta=2.0)
    assert polydpo_fast.loss(*(x.to("meta") for x in tensors), beta=2.0).device.type == "meta"
    if "triton" in polydpo_fast.available_backends("cpu"):
        monkeypatch.setattr(operators.module_of("cpp"), "BoundLoss", None)
        for _ in range(2):
            polydpo_fast.loss(*tensors, beta=2.0, backend="triton")


def test_the_threads_are_those_of_the_one_openmp_that_is_loaded(monkeypatch):
    """Of two it cannot be told which is PyTorch's."""
    cpu = operators.module_of("cpp")
    with open("/proc/self/maps") as maps:
        loaded = re.findall(r".*/lib(?:g|i|)omp[^/]*\.so.*\n", maps.read())
    if not loaded:
        pytest.skip("PyTorch has no OpenMP runtime here")
    given = []
    monkeypatch.setattr(cpu._C, "set_openmp", given.append)
    for maps in (loaded[0], loaded[0] + loaded[0].replace("/lib", "/another/lib"), ""):
        monkeypatch.setattr(cpu, "open", lambda path, maps=maps: io.StringIO(maps), raising=False)
        cpu._join_openmp.__wrapped__()
    assert len(given) == 1
    assert given[0]
