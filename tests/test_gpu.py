"""What only a GPU can show. The tests of test_loss.py run on it too, compiled instead of interpreted."""

import oracle
import pytest
import torch

import polydpo_fast

# PyTorch warns of TF32 and of streams as it likes.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]


def needs_memory(gib):
    too_small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < gib * 2**30
    return pytest.mark.skipif(too_small, reason=f"needs {gib} GiB of the device's memory")


def batch(shape, dtype=torch.bfloat16, seed=0):
    random = torch.Generator("cuda").manual_seed(seed)
    pred, target, step = (torch.randn(shape, generator=random, device="cuda") for _ in range(3))
    return pred.to(dtype), (pred + 1e-2 * step).to(dtype), target.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 4, 128, 128), (16, 4, 128, 128), (2, 16, 21, 60, 104), (64, 4, 64, 64)])
def test_real_sizes(shape, dtype):
    pred, ref, target = batch(shape, dtype)
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target, alpha=2.0, reduction="none")
    loss.sum().backward()
    expected = oracle.poly_dpo(pred, ref, target, alpha=2.0)
    error = abs(loss.detach().double().cpu().numpy() - expected.loss)
    assert (error <= 1e-5 * (abs(expected.loss) + 3 * abs(expected.logit))).all()
    exact = expected.gradient.astype(float)
    bound = oracle.ulp(exact, dtype) + 1e-5 * abs(exact)
    assert (abs(pred.grad.double().cpu().numpy() - exact) <= bound).all()


def test_cuda_graph_replay_and_self_resetting_counters():
    tensors = batch((8, 4, 64, 64))
    pred = tensors[0].requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            polydpo_fast.loss(*tensors).backward()
            pred.grad = None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = polydpo_fast.loss(*tensors)
        (grad,) = torch.autograd.grad(loss, pred)
    for seed in range(1, 4):
        fresh = batch((8, 4, 64, 64), seed=seed)
        with torch.no_grad():
            for old, new in zip(tensors, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        x = fresh[0].requires_grad_()
        eager = polydpo_fast.loss(*fresh)
        (expected,) = torch.autograd.grad(eager, x)
        assert torch.equal(loss, eager)
        assert torch.equal(grad, expected)


def test_streams_do_not_share_counters():
    tensors = [batch((4, 16, 21, 60, 104), seed=seed) for seed in range(4)]
    expected = [polydpo_fast.loss(*t, reduction="none") for t in tensors]
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, t in zip(streams, tensors, strict=True):
            with torch.cuda.stream(stream):
                results.append(polydpo_fast.loss(*t, reduction="none"))
        torch.cuda.synchronize()
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result, reference)


def test_no_host_synchronisation():
    tensors = batch((4, 4, 32, 32))
    pred = tensors[0].requires_grad_()
    polydpo_fast.loss(*tensors).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = polydpo_fast.loss(*tensors, return_metrics=True)
        torch.autograd.grad(loss, pred)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_launches():
    tensors = batch((4, 4, 32, 32))
    pred = tensors[0].requires_grad_()
    torch.autograd.grad(polydpo_fast.loss(*tensors), pred, torch.ones((), device="cuda"))
    grad_loss = torch.ones((), device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        loss, _ = polydpo_fast.loss(*tensors, return_metrics=True)
        torch.autograd.grad(loss, pred, grad_loss)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["errors_kernel", "gradient_kernel"]


def test_two_launches_in_a_graph():
    tensors = batch((4, 4, 32, 32))
    pred = tensors[0].requires_grad_()
    grad_loss = torch.ones((), device="cuda")
    torch.autograd.grad(polydpo_fast.loss(*tensors), pred, grad_loss)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(polydpo_fast.loss(*tensors), pred, grad_loss)
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["errors_kernel", "gradient_kernel"]


def test_graphs_of_one_stream_are_replayed_side_by_side():
    tensors = [batch((4, 16, 21, 60, 104), seed=seed) for seed in range(3)]
    expected = [polydpo_fast.loss(*t, reduction="none") for t in tensors]
    graphs, results = [torch.cuda.CUDAGraph() for _ in tensors], []
    for graph, t in zip(graphs, tensors, strict=True):
        with torch.cuda.graph(graph):
            results.append(polydpo_fast.loss(*t, reduction="none"))
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = polydpo_fast.loss(*tensors[0], reduction="none")
        torch.cuda.synchronize()
        for result, reference in zip((*results, eager), (*expected, expected[0]), strict=True):
            assert torch.equal(result, reference)


def test_runs_agree_bit_for_bit():
    tensors = batch((6, 16, 21, 60, 104))
    pred = tensors[0].requires_grad_()
    results = []
    for _ in range(10):
        loss, metrics = polydpo_fast.loss(*tensors, return_metrics=True)
        results.append((loss, *metrics.values(), torch.autograd.grad(loss, pred)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_memory(18)
def test_more_than_two_gibibytes():
    shape = (2, 1, 2**15, 2**15 + 1)  # 2^30 elements a sample, 2^31 + 2^16 in all: 4 GiB a tensor in bfloat16
    pred = torch.full(shape, 1.0, dtype=torch.bfloat16, device="cuda").requires_grad_()
    ref = torch.zeros_like(pred, requires_grad=False)
    target = torch.zeros_like(ref)
    with torch.no_grad():
        pred[1] = 0.5
    loss, metrics = polydpo_fast.loss(pred, ref, target, beta=2.0, return_metrics=True)
    loss.backward()
    assert metrics["model_mse_win"].item() == pytest.approx(1.0, rel=1e-6)
    assert metrics["model_mse_lose"].item() == pytest.approx(0.25, rel=1e-6)
    assert metrics["logit_mean"].item() == pytest.approx(-0.75, rel=1e-6)
    last = pred.grad[1, 0, -1, -1].item()
    first = pred.grad[1, 0, 0, 0].item()
    assert last == first != 0


def test_compiles_with_inductor():
    @torch.compile(fullgraph=True)
    def step(pred, ref, target):
        return polydpo_fast.loss(pred * 1.0, ref, target, alpha=1.0)

    tensors = batch((4, 4, 32, 32))
    pred = tensors[0].requires_grad_()
    compiled = step(*tensors)
    eager = polydpo_fast.loss(*tensors, alpha=1.0)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled, pred)[0], torch.autograd.grad(eager, pred)[0])


def test_compiles_for_cuda_graphs():
    """reduce-overhead warms up in a memory pool of its own, where our counters must not be made."""

    @torch.compile(mode="reduce-overhead")
    def step(pred, ref, target):
        return polydpo_fast.loss(pred, ref, target, alpha=1.0)

    for seed in range(5):
        pred, ref, target = batch((4, 4, 32, 32), seed=seed)
        with torch.no_grad():
            assert torch.equal(step(pred, ref, target).clone(), polydpo_fast.loss(pred, ref, target, alpha=1.0))


@pytest.mark.parametrize("change", [dict(beta=123.456), dict(alpha=0.1), dict(margin=0.3), dict(sft_weight=0.7)])
def test_parameters_reach_the_kernel_in_float64(change):
    pred, ref, target = (x.double() for x in batch((2, 3, 5), torch.float32))
    ours = polydpo_fast.loss(pred, ref, target, **{"beta": 10.0, **change})
    reference = polydpo_fast.loss(pred, ref, target, **{"beta": 10.0, **change}, backend="reference")
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=0)


@needs_memory(30)
def test_offsets_beyond_two_to_the_31():
    """The second pair begins 2^31 elements after the first, and more: 8 GiB a tensor, 28 GiB in all."""
    sample = (2**15, 2**15 + 1)
    pred = torch.zeros((4, *sample), dtype=torch.bfloat16, device="cuda")
    ref = torch.zeros_like(pred)
    pred[2], pred[3] = 1.0, 0.5
    target = torch.zeros((2, *sample), dtype=torch.bfloat16, device="cuda")  # shared by the arms
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target, beta=2.0, layout="interleaved", reduction="none")
    loss.sum().backward()
    z = torch.tensor([0.0, -0.75], dtype=torch.float64)
    expected = torch.nn.functional.softplus(-z).float()
    torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-6, atol=0)
    slope = -torch.sigmoid(-z[1]).item()
    scale = slope * 2.0 / (sample[0] * sample[1])
    for row, gradient in enumerate((0.0, 0.0, -scale, 0.5 * scale)):
        for place in ((0, 0), (-1, -1)):
            assert pred.grad[row][place].item() == pytest.approx(gradient, rel=2**-8)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_the_current_one():
    pred, ref, target = (x.to("cuda:1") for x in batch((4, 4, 16, 16)))
    pred.requires_grad_()
    loss = polydpo_fast.loss(pred, ref, target)
    loss.backward()
    assert loss.device == pred.grad.device == torch.device("cuda:1")
