"""The loss under DistributedDataParallel: two processes on gloo get the gradient of the whole batch."""

import os

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


def work(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model())
    gradient(wrapped, *(x[:, 2 * rank : 2 * rank + 2] for x in batch()))
    torch.save(wrapped.module.weight.grad, f"{path}/{rank}.pt")
    # gloo's thread may still hold the work of the backward pass, with Python objects in it: PyTorch aborts if the
    # interpreter ends before it lets go.
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path, unused_tcp_port):
    mp.spawn(work, (unused_tcp_port, str(tmp_path)), nprocs=2)
    whole = model()
    gradient(whole, *batch())
    for rank in range(2):
        grad = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(grad, whole.weight.grad, rtol=1e-5, atol=1e-6)
