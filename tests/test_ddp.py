"""Two processes on gloo get the gradient of the whole batch, and of samples of which each has a part."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import polydpo_fast


def batch():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 6, generator=random) for _ in range(3)]  # arm, pair, features


def gradient(model, inputs, ref, target):
    """Rows are halves: winners, then losers."""
    loss = polydpo_fast.loss(model(inputs.flatten(0, 1)), ref.flatten(0, 1), target.flatten(0, 1), beta=10.0, alpha=1.0)
    loss.backward()


def model():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 6)


def split_loss(pred_part, ref_part, target_part, group):
    """As docs/questions.md computes it."""
    page = (Path(__file__).parent.parent / "docs" / "questions.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "all_reduce" in code)
    assert code.count("beta=5000.0") == 1
    scope = {**locals(), "torch": torch, "polydpo_fast": polydpo_fast}
    exec(compile(code.replace("beta=5000.0", "beta=10.0"), "questions.md", "exec"), scope)
    return scope["loss"]


def work(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model())
    gradient(wrapped, *(x[:, 2 * rank : 2 * rank + 2] for x in batch()))
    pred, ref, target = (x.flatten(0, 1)[:, 3 * rank : 3 * rank + 3].contiguous() for x in batch())
    loss = split_loss(pred.requires_grad_(), ref, target, dist.group.WORLD)
    loss.backward()
    torch.save([wrapped.module.weight.grad, loss.detach(), pred.grad], f"{path}/{rank}.pt")
    # gloo's thread may still hold the work of the backward pass, with Python objects in it: PyTorch aborts if the
    # interpreter ends before it lets go.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(path),), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_get_the_gradient_of_the_whole_batch(found):
    whole = model()
    gradient(whole, *batch())
    for grad, _, _ in found:
        torch.testing.assert_close(grad, whole.weight.grad, rtol=1e-5, atol=1e-6)


def test_two_parts_of_each_sample_get_its_loss_and_their_gradient(found):
    pred, ref, target = (x.flatten(0, 1) for x in batch())
    loss = polydpo_fast.loss(pred.requires_grad_(), ref, target, beta=10.0)
    loss.backward()
    for _, part, _ in found:
        torch.testing.assert_close(part, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in found], dim=1), pred.grad, rtol=1e-5, atol=1e-7)
