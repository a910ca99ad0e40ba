"""The compiled kernels on emulated.py: run by test_compiled.py in a process of its own, not collected otherwise."""

import re

import blocks
import emulated
import pytest
import torch

import polydpo_fast

SHAPE = (4, 2, 40, 32)  # 2560 elements a sample, in three programs


def batch(dtype=torch.bfloat16, shape=SHAPE):
    torch.manual_seed(0)
    policy, noise, target = (torch.randn(shape) for _ in range(3))
    return policy.to(dtype).requires_grad_(), (policy + 0.02 * noise).to(dtype), target.to(dtype)


def run(policy, reference, target, **options):
    value, metrics = polydpo_fast.loss(policy, reference, target, backend="triton", return_metrics=True, **options)
    value.backward()
    grad, policy.grad = policy.grad, None
    return value.detach(), torch.stack(list(metrics.values())), grad


@pytest.fixture
def changed(monkeypatch):
    def change(old, new, count=0):
        """In PTX, by regular expression; only of the kernel that has it."""
        found = []

        def changed(ptx):
            ptx, times = re.subn(old, new, ptx, count=count)
            found.append(times)
            return ptx

        monkeypatch.setattr(emulated, "change", changed)
        return found

    return change


def test_the_order_of_the_programs_changes_no_bit():
    inputs = batch()
    first, *others = (run(*inputs, alpha=2.0) for _ in range(6))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("dtype", "shared", "bytes_per_element"), [
    (torch.bfloat16, False, 12),
    (torch.bfloat16, True, 10),
    (torch.float32, False, 24),
])  # fmt: skip
def test_bytes_per_element(dtype, shared, bytes_per_element):
    """What the two launches load and store of the tensors of the (2B, ...) shape, as they are counted."""
    policy, reference, target = batch(dtype)
    emulated.traffic.clear()
    run(policy, reference, target[:2] if shared else target)
    counted = sum(emulated.traffic[name] for name in ("pred_win", "ref_win", "target_win", "grad_win"))
    assert counted == bytes_per_element * policy.numel()
    # Else a few words for each program and pair, and the coefficients, which all threads load from one address.
    words = ("slots", "pairs", "counters", "loss", "metrics")
    assert sum(emulated.traffic[name] for name in words) < 600 * len(policy)
    others = {"coefficients", "grad_loss"}
    assert set(emulated.traffic) == {"pred_win", "ref_win", "target_win", "grad_win", *words, *others}


ACQ_REL = r"atom\.global\.gpu\.acq_rel"


@pytest.mark.parametrize(("old", "new"), [
    (r"bar\.sync\s+0;", "bar.warp.sync -1;"),
    (r"bar\.sync\s+0;", "bar.sync 0, 32;"),
    (r"fma\.rn\.f32", "fma.rz.f32"),
    (r"cvt\.rn\.bf16x2", "cvt.rn.relu.bf16x2"),
    (r"setp\.lt\.f64", "setp.ltu.and.f64"),
])  # fmt: skip
def test_what_it_does_not_know_is_an_error(changed, old, new):
    found = changed(old, new)
    with pytest.raises((AssertionError, NotImplementedError)):
        run(*batch())
    assert any(found)


@pytest.mark.parametrize(("old", "new", "count", "said"), [
    # Arrivals that order nothing: the last program of a pair reads slots, the last pair the table, of others.
    (ACQ_REL, "atom.global.gpu.relaxed", 1, "two blocks read what another thread has written in slots"),
    (rf"({ACQ_REL}[\s\S]*){ACQ_REL}", r"\1atom.global.gpu.relaxed", 1, "two blocks read .* in pairs"),
    # Without barriers within a program.
    (r"bar\.sync\s+0;", "", 0, "one block read what another thread has written in shared memory"),
    # Loads and stores of lanes that are beyond the sample.
    (r"@%p\d+ (ld\.global\.v4\.b32)", r"\1", 0, "beyond|outside"),
    (r"@%p\d+ (st\.global\.v4\.b32)", r"\1", 0, "beyond grad_win|two blocks write .* in grad_win"),
    # A store that is not there, and counters that nobody resets.
    (r"@%p\d+ st\.global\.v4\.b32[^;]*;", "", 1, "never written"),
    (r"@%p\d+ st\.global\.b32 \[ %rd\d+ \+ 0 \], \{ %r\d+ \};", "", 0, "not zero again"),
])  # fmt: skip
def test_what_is_broken_on_purpose_is_seen(changed, old, new, count, said):
    inputs = batch(shape=(4, 2, 40, 31))
    run(*inputs)
    found = changed(old, new, count)
    with pytest.raises(blocks.Fault, match=said):
        run(*inputs)
    assert any(found)


def test_addresses_that_are_not_aligned_get_a_kernel_of_their_own(monkeypatch, changed):
    """With that for aligned ones a GPU would stop: "misaligned address"."""
    inputs = batch()
    shifted = [x.detach().flatten()[1:-1].view(2, -1)[:, 1:] for x in inputs]
    programs = []
    monkeypatch.setattr(emulated, "change", lambda ptx: programs.append(ptx) or ptx)
    run(*inputs)
    run(shifted[0].requires_grad_(), *shifted[1:])
    assert len(set(programs)) == 4
    for aligned, other in zip(programs[:2], programs[2:], strict=True):
        changed(re.escape(other), lambda _, aligned=aligned: aligned)
        with pytest.raises(blocks.Fault, match="does not divide"):
            run(*shifted)
