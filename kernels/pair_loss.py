"""The fused preference loss: one launch for errors, head, loss and metrics, one for the gradient.

Traffic per element of the (2B, ...) tensors, in units of the element size: the error launch reads the
prediction, the reference and the target (3), the gradient launch reads the prediction and the target and
writes the gradient (3). In bfloat16 that is 12 bytes; a target shared by both arms is read once per pair.

Determinism: a sample is cut into splits whose number depends on its size alone. Each split stores its partial
sums in a slot; the last split of a pair to arrive adds the slots in order, and the last pair to arrive adds the
pairs in order. Who is last changes from run to run, what is added in which order does not. So the result is
the same bit for bit, and a pair's value does not depend on the batch it stands in.

Precision: elements are converted to ACC (float32, or float64 for float64 inputs), each lane adds a handful of
terms in ACC, and everything above a lane (across lanes, splits, pairs, and the head) is float64. That is a few
operations per thousand elements, so it is affordable also where float64 runs at 1/64 of the float32 rate.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydpo_fast.metrics import METRICS
from polydpo_fast.objectives import OBJECTIVES

# 1024 elements per arm and iteration over 128 threads: 8 each, one 128-bit load for 16-bit types.
BLOCK = 1024
NUM_WARPS = 2 if torch.version.hip else 4
SLOT_BLOCK = 256
PAIR_BLOCK = 64

# Triton's interpreter runs plain functions, and refuses jitted ones that do not see triton.language.
_jit_head = (lambda head: head) if triton.knobs.runtime.interpret else triton.jit
HEADS = {name: _jit_head(objective.head) for name, objective in OBJECTIVES.items()}


@triton.jit
def errors_kernel(
    # inputs, one pointer per arm
    pred_win, pred_lose, ref_win, ref_lose, target_win, target_lose,
    # scratch: partial sums (B, 4, splits), arrival counters (1 + B) that are zero before and after
    slots, counters,
    # outputs: per pair (B, 6), gradient coefficients (B, 2), loss () or (B,), metrics (12,)
    pairs, coefficients, loss, metrics,
    # shapes: pairs, elements per sample, splits per sample, blocks per split
    n_pairs, numel, n_splits, n_blocks,
    # strides from one pair to the next, in elements
    pred_stride, ref_stride, target_stride,
    # parameters
    half_beta, alpha,
    # constants
    HEAD: tl.constexpr, SHARED_TARGET: tl.constexpr, REDUCTION: tl.constexpr, N_METRICS: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // n_splits
    split = tl.program_id(0) % n_splits
    row = pair.to(tl.int64)
    first = split.to(tl.int64) * n_blocks * BLOCK
    pred_win += row * pred_stride + first
    pred_lose += row * pred_stride + first
    ref_win += row * ref_stride + first
    ref_lose += row * ref_stride + first
    target_win += row * target_stride + first
    target_lose += row * target_stride + first

    # Model error and excess error, m D and (m - r) D, of the winner and of the loser.
    model_w = tl.zeros([BLOCK], ACC)
    excess_w = tl.zeros([BLOCK], ACC)
    model_l = tl.zeros([BLOCK], ACC)
    excess_l = tl.zeros([BLOCK], ACC)
    left = numel - first
    lane = tl.arange(0, BLOCK)
    for block in range(n_blocks):
        at = block * BLOCK + lane
        inside = at < left
        pw = tl.load(pred_win + at, inside, 0.0).to(ACC)
        pl = tl.load(pred_lose + at, inside, 0.0).to(ACC)
        rw = tl.load(ref_win + at, inside, 0.0).to(ACC)
        rl = tl.load(ref_lose + at, inside, 0.0).to(ACC)
        tw = tl.load(target_win + at, inside, 0.0).to(ACC)
        if SHARED_TARGET:
            t_l = tw
        else:
            t_l = tl.load(target_lose + at, inside, 0.0).to(ACC)
        dw = pw - tw
        dl = pl - t_l
        model_w += dw * dw
        model_l += dl * dl
        # (p - t)^2 - (r - t)^2 = (p - r) ((p - t) + (r - t)): no subtraction of nearly equal sums.
        excess_w += (pw - rw) * (dw + (rw - tw))
        excess_l += (pl - rl) * (dl + (rl - t_l))

    slot = slots + row * 4 * n_splits + split
    tl.store(slot, tl.sum(model_w.to(tl.float64)))
    tl.store(slot + n_splits, tl.sum(model_l.to(tl.float64)))
    tl.store(slot + 2 * n_splits, tl.sum(excess_w.to(tl.float64)))
    tl.store(slot + 3 * n_splits, tl.sum(excess_l.to(tl.float64)))

    # The barrier orders this program's stores before its arrival; acq_rel orders them for the last one.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + 1 + pair, 1, sem="acq_rel")
    if arrived == n_splits - 1:
        tl.store(counters + 1 + pair, 0)
        _finish_pair(
            slots + row * 4 * n_splits, pairs + row * 6, coefficients + row * 2, loss + row,
            n_pairs, numel, n_splits, half_beta, alpha, HEAD, REDUCTION, SLOT_BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        finished = tl.atomic_add(counters, 1, sem="acq_rel")
        if finished == n_pairs - 1:
            tl.store(counters, 0)
            _finish_batch(pairs, loss, metrics, n_pairs, half_beta, REDUCTION, N_METRICS, PAIR_BLOCK)


@triton.jit
def _finish_pair(
    slots, pair, coefficients, loss, n_pairs, numel, n_splits, half_beta, alpha,
    HEAD: tl.constexpr, REDUCTION: tl.constexpr, SLOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a pair's slots, applies the head, stores what the batch and the gradient need."""
    m_w = tl.zeros([SLOT_BLOCK], tl.float64)
    m_l = tl.zeros([SLOT_BLOCK], tl.float64)
    e_w = tl.zeros([SLOT_BLOCK], tl.float64)
    e_l = tl.zeros([SLOT_BLOCK], tl.float64)
    for start in range(0, n_splits, SLOT_BLOCK):
        at = start + tl.arange(0, SLOT_BLOCK)
        inside = at < n_splits
        # .cg: other programs wrote these; this one's L1 cache must not answer.
        m_w += tl.load(slots + at, inside, 0.0, cache_modifier=".cg")
        m_l += tl.load(slots + n_splits + at, inside, 0.0, cache_modifier=".cg")
        e_w += tl.load(slots + 2 * n_splits + at, inside, 0.0, cache_modifier=".cg")
        e_l += tl.load(slots + 3 * n_splits + at, inside, 0.0, cache_modifier=".cg")
    size = numel.to(tl.float64)
    model_w = tl.sum(m_w) / size
    model_l = tl.sum(m_l) / size
    excess_w = tl.sum(e_w) / size
    excess_l = tl.sum(e_l) / size
    z = -half_beta * (excess_w - excess_l)
    z = tl.where(tl.abs(z) == float("inf"), float("nan"), z)  # an infinite error is no evidence of a preference

    # Stable sigmoid(z), sigmoid(-z) and softplus(-z) from e = exp(-|z|) <= 1.
    e = tl.exp(-tl.abs(z))
    big = 1.0 / (1.0 + e)
    small = e * big
    p = tl.where(z >= 0, big, small)
    q = tl.where(z >= 0, small, big)
    # log1p(e) without libdevice: the rounding of 1 + e cancels between log(u) and u - 1.
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    nll = tl.where(z >= 0, log1p, log1p - z)
    value, slope = HEAD(nll, p, q, alpha)

    # dL/dpred_w = slope dz/dm_w dm_w/dpred = slope (-beta/2) (2/D) (pred - target), the loser's with +.
    coefficient = slope * (-2.0 * half_beta / size)
    if REDUCTION == "mean":
        coefficient = coefficient / n_pairs.to(tl.float64)
    tl.store(coefficients, coefficient)
    tl.store(coefficients + 1, -coefficient)
    tl.store(pair, value)
    tl.store(pair + 1, z)
    tl.store(pair + 2, model_w)
    tl.store(pair + 3, model_l)
    tl.store(pair + 4, excess_w)
    tl.store(pair + 5, excess_l)
    if REDUCTION == "none":
        tl.store(loss, value)


@triton.jit
def _finish_batch(
    pairs, loss, metrics, n_pairs, half_beta,
    REDUCTION: tl.constexpr, N_METRICS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the pairs: the reduced loss and the metrics, in the order of `polydpo_fast.metrics.METRICS`."""
    total = tl.zeros([PAIR_BLOCK], tl.float64)
    accuracy = tl.zeros([PAIR_BLOCK], tl.float64)
    logit = tl.zeros([PAIR_BLOCK], tl.float64)
    probability = tl.zeros([PAIR_BLOCK], tl.float64)
    model_w = tl.zeros([PAIR_BLOCK], tl.float64)
    model_l = tl.zeros([PAIR_BLOCK], tl.float64)
    excess_w = tl.zeros([PAIR_BLOCK], tl.float64)
    excess_l = tl.zeros([PAIR_BLOCK], tl.float64)
    saturated = tl.zeros([PAIR_BLOCK], tl.float64)
    false_success = tl.zeros([PAIR_BLOCK], tl.float64)
    for start in range(0, n_pairs, PAIR_BLOCK):
        at = start + tl.arange(0, PAIR_BLOCK)
        inside = at < n_pairs
        pair = pairs + at.to(tl.int64) * 6
        z = tl.load(pair + 1, inside, 0.0, cache_modifier=".cg")
        e_w = tl.load(pair + 4, inside, 0.0, cache_modifier=".cg")
        total += tl.load(pair, inside, 0.0, cache_modifier=".cg")
        model_w += tl.load(pair + 2, inside, 0.0, cache_modifier=".cg")
        model_l += tl.load(pair + 3, inside, 0.0, cache_modifier=".cg")
        excess_w += e_w
        excess_l += tl.load(pair + 5, inside, 0.0, cache_modifier=".cg")
        logit += z
        e = tl.exp(-tl.abs(z))
        probability += tl.where(inside, tl.where(z >= 0, 1.0, e) / (1.0 + e), 0.0)
        accuracy += tl.where(inside, tl.where(z > 0, 1.0, tl.where(z == 0, 0.5, 0.0)), 0.0)
        saturated += tl.where(tl.abs(z) > 10.0, 1.0, 0.0)
        false_success += tl.where((z > 0) & (e_w > 0), 1.0, 0.0)
    n = n_pairs.to(tl.float64)
    if REDUCTION == "mean":
        tl.store(loss, tl.sum(total) / n)
    if REDUCTION == "sum":
        tl.store(loss, tl.sum(total))
    m_w = tl.sum(model_w) / n
    m_l = tl.sum(model_l) / n
    e_w = tl.sum(excess_w) / n
    e_l = tl.sum(excess_l) / n
    tl.static_assert(N_METRICS == 12)
    tl.store(metrics, tl.sum(accuracy) / n)
    tl.store(metrics + 1, -half_beta * e_w)
    tl.store(metrics + 2, -half_beta * e_l)
    tl.store(metrics + 3, -half_beta * (e_w - e_l))
    tl.store(metrics + 4, tl.sum(logit) / n)
    tl.store(metrics + 5, tl.sum(probability) / n)
    tl.store(metrics + 6, m_w)
    tl.store(metrics + 7, m_l)
    tl.store(metrics + 8, m_w - e_w)
    tl.store(metrics + 9, m_l - e_l)
    tl.store(metrics + 10, tl.sum(saturated) / n)
    tl.store(metrics + 11, tl.sum(false_success) / n)


@triton.jit
def gradient_kernel(
    # inputs, one pointer per arm; outputs
    pred_win, pred_lose, target_win, target_lose, grad_win, grad_lose,
    # coefficients (B, 2) of the error launch, gradient of the loss () or (B,)
    coefficients, grad_loss,
    # shapes: elements per sample, programs per sample
    numel, n_splits,
    # strides from one pair to the next, in elements
    pred_stride, target_stride, grad_stride,
    # constants
    SHARED_TARGET: tl.constexpr, PER_PAIR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss * coefficient * (pred - target)"""
    pair = tl.program_id(0) // n_splits
    split = tl.program_id(0) % n_splits
    row = pair.to(tl.int64)
    first = split.to(tl.int64) * BLOCK
    if PER_PAIR:
        scale = tl.load(grad_loss + row).to(tl.float64)
    else:
        scale = tl.load(grad_loss).to(tl.float64)
    scale_w = (tl.load(coefficients + row * 2) * scale).to(ACC)
    scale_l = (tl.load(coefficients + row * 2 + 1) * scale).to(ACC)
    at = tl.arange(0, BLOCK)
    inside = at < numel - first
    pred_at = row * pred_stride + first
    target_at = row * target_stride + first
    grad_at = row * grad_stride + first
    pw = tl.load(pred_win + pred_at + at, inside).to(ACC)
    pl = tl.load(pred_lose + pred_at + at, inside).to(ACC)
    tw = tl.load(target_win + target_at + at, inside).to(ACC)
    if SHARED_TARGET:
        t_l = tw
    else:
        t_l = tl.load(target_lose + target_at + at, inside).to(ACC)
    out = grad_win.dtype.element_ty
    tl.store(grad_win + grad_at + at, (scale_w * (pw - tw)).to(out), inside)
    tl.store(grad_lose + grad_at + at, (scale_l * (pl - t_l)).to(out), inside)


Arms = tuple[Tensor, Tensor]
"""(win, lose), each (B, ...) with the same strides; within a sample dense in one common element order."""


def blocks_per_split(numel: int) -> int:
    """How many blocks of a sample one program reads: one until the machine is full, more for large samples.

    A function of the sample's size only, never of B, so that a pair's sums do not depend on its batch.
    """
    return min(64, max(1, numel >> 20))


def launch_errors(
    pred: Arms, ref: Arms, target: Arms, *, beta: float, alpha: float, objective: str, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () or (B,), gradient coefficients (B, 2) float64, metrics (12,), in one launch."""
    pred_win = pred[0]
    n_pairs, numel = pred_win.shape[0], pred_win[0].numel()
    n_blocks = blocks_per_split(numel)
    n_splits = triton.cdiv(numel, BLOCK * n_blocks)
    double = torch.float64 in (pred_win.dtype, ref[0].dtype, target[0].dtype)
    value_dtype = torch.float64 if double else torch.float32
    device = pred_win.device
    loss = torch.empty(() if reduction != "none" else (n_pairs,), dtype=value_dtype, device=device)
    metrics = torch.empty(len(METRICS), dtype=value_dtype, device=device)
    # One allocation for slots (B, 4, splits) and pairs (B, 6).
    scratch = torch.empty(n_pairs * (4 * n_splits + 6), dtype=torch.float64, device=device)
    coefficients = torch.empty((n_pairs, 2), dtype=torch.float64, device=device)
    with torch.cuda.device_of(pred_win):
        errors_kernel[(n_pairs * n_splits,)](
            pred_win, pred[1], ref[0], ref[1], target[0], target[1],
            scratch, _counters(n_pairs, device),
            scratch[n_pairs * 4 * n_splits :], coefficients, loss, metrics,
            n_pairs, numel, n_splits, n_blocks,
            pred_win.stride(0), ref[0].stride(0), target[0].stride(0),
            0.5 * beta, alpha,
            HEAD=HEADS[objective], SHARED_TARGET=target[0] is target[1], REDUCTION=reduction,
            N_METRICS=len(METRICS), ACC=tl.float64 if double else tl.float32,
            BLOCK=BLOCK, SLOT_BLOCK=SLOT_BLOCK, PAIR_BLOCK=PAIR_BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, coefficients, metrics


def launch_gradient(pred: Arms, target: Arms, grad: Arms, coefficients: Tensor, grad_loss: Tensor) -> None:
    """Writes grad = grad_loss * coefficient * (pred - target), in one launch."""
    pred_win = pred[0]
    n_pairs, numel = pred_win.shape[0], pred_win[0].numel()
    n_splits = triton.cdiv(numel, BLOCK)
    double = torch.float64 in (pred_win.dtype, target[0].dtype)
    with torch.cuda.device_of(pred_win):
        gradient_kernel[(n_pairs * n_splits,)](
            pred_win, pred[1], target[0], target[1], grad[0], grad[1],
            coefficients, grad_loss,
            numel, n_splits,
            pred_win.stride(0), target[0].stride(0), grad[0].stride(0),
            SHARED_TARGET=target[0] is target[1], PER_PAIR=grad_loss.dim() == 1,
            ACC=tl.float64 if double else tl.float32, BLOCK=BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _counters(n_pairs: int, device: torch.device) -> Tensor:
    """1 + B zeros. The kernel leaves them zero, so one buffer per stream serves all launches on it.

    A CUDA graph gets a buffer of its own: graphs captured on one stream may be replayed side by side.
    """
    size = triton.next_power_of_2(1 + n_pairs)
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    return _stream_counters(size, device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream_counters(size: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
