"""Around a launch: how a sample is split, and offsets beyond 32 bits."""

import os

import pytest
import torch
from one_program import OneProgram
from polydpo_fast.kernels import pair_loss


@pytest.mark.parametrize("numel", [1, 1023, 1024, 1025, 16_384, 2**20, 16 * 21 * 60 * 104, 16 * 21 * 90 * 160, 2**31])
def test_splits_cover_a_sample_and_few_are_left_to_the_last(numel):
    blocks = pair_loss.blocks_per_split(numel)
    splits = -(-numel // (blocks * pair_loss.BLOCK))
    assert splits * blocks * pair_loss.BLOCK >= numel
    assert (splits - 1) * blocks * pair_loss.BLOCK < numel
    if numel <= 2**25:  # each program reads 64 blocks at most
        assert splits <= 1.5 * pair_loss.LARGE_SPLITS  # at 1152 splits a program begins to read two blocks
    if numel >= 2**20:
        assert splits >= 512


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="one program alone runs in Triton's interpreter")
@pytest.mark.parametrize(("pairs", "numel"), [(1, 2**31 + 5), (3, 2**30 + 5)])
def test_offsets_beyond_two_to_the_31(pairs, numel, monkeypatch):
    """The program of the last elements; of the memory before them no page is touched."""
    values = torch.tensor([[3.0, -1.0, 2.0], [1.0, 4.0, 0.5]])  # prediction, reference, target of the winner and loser
    tensors = [[torch.empty(1, numel, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)]
    for row, both in zip(values.T, tensors, strict=True):
        for value, x in zip(row.tolist(), both, strict=True):
            x[:, -5:] = value
    pred, ref, target = ([x.expand(pairs, numel) for x in both] for both in tensors)
    errors = OneProgram(pair_loss.errors_kernel, monkeypatch, first=False)
    gradient = OneProgram(pair_loss.gradient_kernel, monkeypatch, first=True)  # it begins at the end
    monkeypatch.setattr(pair_loss, "errors_kernel", errors)
    monkeypatch.setattr(pair_loss, "gradient_kernel", gradient)
    pair_loss.launch_errors(pred, ref, target, *[None] * 5, [0.0] * 9, None, "halves", "mean", False)
    p, r, t = values.T
    model, excess = (p - t).square(), (p - t).square() - (r - t).square()
    assert errors.given["slots"][-4:].tolist() == (5 * torch.cat((model, excess))).tolist()
    coefficients = torch.tensor([[0.5, -2.0]], dtype=torch.float64).expand(pairs, 2)
    grads = pair_loss.launch_gradient(pred, target, None, coefficients, torch.ones(()), "halves", False)
    found = torch.stack([grad[-1, -5:] for grad in grads])
    assert torch.equal(found.double(), (coefficients[0] * (p - t))[:, None].expand(2, 5))
