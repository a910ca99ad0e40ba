"""The fused preference loss: one launch for errors, head, loss and metrics, one for the gradient.

Traffic per element of the (2B, ...) tensors, in units of the element size: the error launch reads the
prediction, the reference and the target (3), the gradient launch reads the prediction and the target and
writes the gradient (3). In bfloat16 that is 12 bytes; a target shared by both arms is read once per pair.

Determinism: a sample is cut into splits whose number depends on its size alone. Each split stores its partial
sums in a slot; the last split of a pair to arrive adds the slots in order, and the last pair to arrive adds the
pairs in order. Who is last changes from run to run, what is added in which order does not. So the result is
the same bit for bit, and a pair's value does not depend on the batch it stands in. (What is added first across lanes
depends on the kernel, and there is one for addresses and strides that are multiples of 16 and one for others: the last
bits of a float64 result may differ where a batch of one pair is aligned otherwise than a larger one.)

Precision: elements are converted to ACC (float32, or float64 for float64 inputs), each lane adds a handful of
terms in ACC, and everything above a lane (across lanes, splits, pairs, and the head) is float64. That is a few
operations per thousand elements, so it is affordable also where float64 runs at 1/64 of the float32 rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydpo_fast.backends import INTERPRETING
from polydpo_fast.layout import PAIR_COLUMNS, Column, arms, empty_dense_like, pairs_in
from polydpo_fast.metrics import METRICS
from polydpo_fast.objectives import OBJECTIVES

from .counters import counters_of

# 1024 elements per arm and iteration over 128 threads: 8 each, one 128-bit load for 16-bit types.
BLOCK = 1024
NUM_WARPS = 2 if torch.version.hip else 4
SLOT_BLOCK = 512
PAIR_BLOCK = 64
# Registers of the error kernel on NVIDIA's GPUs. Left alone, their assembler stops at 64 and waits for one arm before
# it loads the other: with 80, all loads of an iteration are under way at once (of masks and float32 most).
MAX_REGISTERS = 80
# Programs for a large sample. With that many registers six share an SM: 132 SMs run 792 at once.
LARGE_SPLITS = 768
# Partial sums of a split: m D and (m - r) D, of the winner and of the loser; and with a mask the elements.
SUMS = tl.constexpr(4)

# Triton's interpreter runs plain functions, and refuses jitted ones that do not see triton.language.
_jit_head = (lambda head: head) if INTERPRETING else triton.jit
HEADS = {name: _jit_head(objective.head) for name, objective in OBJECTIVES.items()}

COLUMNS = tl.constexpr(PAIR_COLUMNS)
MEANS = tl.constexpr(len(METRICS))
# fmt: off
(LOSS, IMPLICIT_ACCURACY, REWARD_WIN, REWARD_LOSE, REWARD_MARGIN, LOGIT_MEAN, P_MEAN, SATURATED, FALSE_SUCCESS,
 REF_MSE_WIN, REF_MSE_LOSE, MODEL_MSE_WIN, MODEL_MSE_LOSE, EXCESS_WIN, EXCESS_LOSE, ELEMENTS, GRAD_WIN, GRAD_LOSE) = (
    tl.constexpr(column.value) for column in Column
)
# fmt: on


# Triton makes a constant of an integer argument that is 1, which has no dtype and would compile a kernel of its own.
@triton.jit(do_not_specialize=["n_pairs", "n_splits", "n_blocks", "ref_error_arm", "ref_error_stride"])
def errors_kernel(
    # inputs, one pointer per arm; ref_*, mask, ref_error, beta, alpha and weight may be None
    pred_win, pred_lose, ref_win, ref_lose, target_win, target_lose, mask, ref_error, beta, alpha, weight,
    # scratch: partial sums (B, splits, 4), with a mask (B, splits) elements after them, and arrival counters (1 + B)
    # that are zero before and after
    slots, counters,
    # outputs: pairs (B, 18), loss () or (B,), metrics (12,)
    pairs, loss, metrics,
    # shapes: pairs, elements per sample, splits per sample, blocks per split
    n_pairs, numel, n_splits, n_blocks,
    # strides from one pair to the next, in elements; of ref_error from one arm to the other too
    pred_stride, ref_stride, target_stride, mask_stride, ref_error_arm, ref_error_stride,
    # parameters: beta and a1 hold where the tensors beta and alpha are None
    beta_value: tl.float64, a1: tl.float64, a2: tl.float64, a3: tl.float64, a4: tl.float64,
    keep: tl.float64, flip: tl.float64, margin: tl.float64, sft_weight: tl.float64,
    # constants
    HEAD: tl.constexpr, REF: tl.constexpr, SHARED_TARGET: tl.constexpr, REDUCTION: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
):  # fmt: skip
    """HEAD: None for the errors alone. REF: "pred" (ref_* given), "error" (ref_error given) or "none"."""
    pair = tl.program_id(0) // n_splits
    split = tl.program_id(0) % n_splits
    row = pair.to(tl.int64)
    first = split.to(tl.int64) * n_blocks * BLOCK
    pred_at = row * pred_stride + first
    ref_at = row * ref_stride + first
    target_at = row * target_stride + first
    mask_at = row * mask_stride + first

    # Model error and excess error, m D and (m - r) D, of the winner and of the loser.
    model_w = tl.zeros([BLOCK], ACC)
    excess_w = tl.zeros([BLOCK], ACC)
    model_l = tl.zeros([BLOCK], ACC)
    excess_l = tl.zeros([BLOCK], ACC)
    elements = tl.zeros([BLOCK], tl.int32)
    left = numel - first
    lane = tl.arange(0, BLOCK)
    for block in range(n_blocks):
        at = block * BLOCK + lane
        inside = at < left
        pred_w = tl.load(pred_win + pred_at + at, inside, 0.0).to(ACC)
        pred_l = tl.load(pred_lose + pred_at + at, inside, 0.0).to(ACC)
        target_w = tl.load(target_win + target_at + at, inside, 0.0).to(ACC)
        if SHARED_TARGET:
            target_l = target_w
        else:
            target_l = tl.load(target_lose + target_at + at, inside, 0.0).to(ACC)
        dw = pred_w - target_w
        dl = pred_l - target_l
        if mask is not None:
            # After loading everything: loads that depend on the mask would be narrow. What is masked may be NaN.
            kept = tl.load(mask + mask_at + at, inside, 0) != 0
            elements += kept.to(tl.int32)
            dw = tl.where(kept, dw, 0.0)
            dl = tl.where(kept, dl, 0.0)
        model_w += dw * dw
        model_l += dl * dl
        if REF == "pred":
            # The gradient does not need the reference: leave the cache to the others.
            ref_w = tl.load(ref_win + ref_at + at, inside, 0.0, eviction_policy="evict_first").to(ACC)
            ref_l = tl.load(ref_lose + ref_at + at, inside, 0.0, eviction_policy="evict_first").to(ACC)
            # (p - t)^2 - (r - t)^2 = (p - r) ((p - t) + (r - t)): no subtraction of nearly equal sums.
            ew = (pred_w - ref_w) * (dw + (ref_w - target_w))
            el = (pred_l - ref_l) * (dl + (ref_l - target_l))
            if mask is not None:
                ew = tl.where(kept, ew, 0.0)
                el = tl.where(kept, el, 0.0)
            excess_w += ew
            excess_l += el

    # One reduction of all four, into four neighbours.
    sums = tl.join(tl.join(model_w, model_l).to(tl.float64), tl.join(excess_w, excess_l).to(tl.float64))
    arm, kind = tl.arange(0, 2)[:, None], tl.arange(0, 2)[None, :]
    slot = row * n_splits + split
    tl.store(slots + slot * SUMS + 2 * kind + arm, tl.sum(sums, 0))
    counts = slots + n_pairs.to(tl.int64) * n_splits * SUMS
    if mask is not None:
        tl.store(counts + slot, tl.sum(elements).to(tl.float64))

    # The barrier orders this program's stores before its arrival; acq_rel orders them for the last one. AMD's barrier
    # does not wait for stores: there the four sums and the arrival are the first wave's, which waits for its own (held
    # by a test of the compiled layout).
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + 1 + pair, 1, sem="acq_rel")
    if arrived == n_splits - 1:
        tl.store(counters + 1 + pair, 0)
        _finish_pair(
            slots + row * n_splits * SUMS, counts + row * n_splits, pairs + row * COLUMNS, loss + row,
            mask, ref_error, beta, alpha, weight, pair, n_pairs, numel, n_splits, ref_error_arm, ref_error_stride,
            beta_value, a1, a2, a3, a4, keep, flip, margin, sft_weight, HEAD, REF, REDUCTION, SLOT_BLOCK,
        )  # fmt: skip
        if HEAD is not None:
            tl.debug_barrier()
            finished = tl.atomic_add(counters, 1, sem="acq_rel")
            if finished == n_pairs - 1:
                tl.store(counters, 0)
                _finish_batch(pairs, loss, metrics, n_pairs, REDUCTION, PAIR_BLOCK)


@triton.jit
def _finish_pair(
    slots, counts, out, loss, mask, ref_error, beta, alpha, weight,
    pair, n_pairs, numel, n_splits, ref_error_arm, ref_error_stride,
    beta_value, a1, a2, a3, a4, keep, flip, margin, sft_weight,
    HEAD: tl.constexpr, REF: tl.constexpr, REDUCTION: tl.constexpr, SLOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a pair's slots, applies the head, stores what the batch and the gradient need."""
    size = tl.full([], 1.0, tl.float64) * numel  # also where numel is 1, which Triton makes a constant
    if mask is not None:
        size = tl.sum(_sum_rows(counts, n_splits, 1, 1, SLOT_BLOCK))
    sums = _sum_rows(slots, n_splits, SUMS, SUMS, SLOT_BLOCK) / size
    model_w, model_l = _pick(sums, 0, SUMS), _pick(sums, 1, SUMS)
    if REF == "pred":
        excess_w, excess_l = _pick(sums, 2, SUMS), _pick(sums, 3, SUMS)
    elif REF == "error":
        known = ref_error + pair.to(tl.int64) * ref_error_stride
        excess_w = model_w - tl.load(known).to(tl.float64)
        excess_l = model_l - tl.load(known + ref_error_arm).to(tl.float64)
    else:
        excess_w = model_w
        excess_l = model_l
    tl.store(out + MODEL_MSE_WIN, model_w)
    tl.store(out + MODEL_MSE_LOSE, model_l)
    tl.store(out + EXCESS_WIN, excess_w)
    tl.store(out + EXCESS_LOSE, excess_l)
    tl.store(out + ELEMENTS, size)
    if HEAD is not None:
        b = beta_value
        if beta is not None:
            b = tl.load(beta + pair).to(tl.float64)
        first_alpha = a1
        if alpha is not None:
            first_alpha = tl.load(alpha + pair).to(tl.float64)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + pair).to(tl.float64)
        logit = -0.5 * b * (excess_w - excess_l)
        # An infinite error is no evidence of a preference.
        logit = tl.where(tl.abs(logit) == float("inf"), float("nan"), logit)
        z = logit - margin
        # Stable sigmoid and softplus of z and -z from e = exp(-|z|) <= 1.
        e = tl.exp(-tl.abs(z))
        u = 1.0 + e
        p = tl.where(z >= 0, 1.0, e) / u
        q = tl.where(z >= 0, e, 1.0) / u
        # log1p(e) without libdevice: the rounding of 1 + e cancels between log(u) and u - 1.
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        nlp = tl.where(z >= 0, log1p, log1p - z)
        nlq = tl.where(z >= 0, log1p + z, log1p)
        kept, kept_slope = HEAD(z, p, q, nlp, nlq, b, first_alpha, a2, a3, a4)
        flipped, flipped_slope = HEAD(-z, q, p, nlq, nlp, b, first_alpha, a2, a3, a4)
        value = w * (keep * kept + flip * flipped + sft_weight * model_w)
        slope = keep * kept_slope - flip * flipped_slope

        # dL/dpred_w = slope dz/dm_w dm_w/dpred = slope (-beta/2) (2/D) (pred - target), the loser's with +.
        scale = w / size
        if REDUCTION == "mean":
            scale = scale / n_pairs.to(tl.float64)
        tl.store(out + GRAD_WIN, scale * (2.0 * sft_weight - slope * b))
        tl.store(out + GRAD_LOSE, scale * slope * b)
        tl.store(out + LOSS, value)
        if REDUCTION == "none":
            tl.store(loss, value)

        # The metrics, which are not of z but of the logit.
        reward_w = -0.5 * b * excess_w
        reward_l = -0.5 * b * excess_l
        e = tl.exp(-tl.abs(logit))
        tl.store(out + IMPLICIT_ACCURACY, tl.where(logit > 0, 1.0, tl.where(logit == 0, 0.5, 0.0)))
        tl.store(out + REWARD_WIN, reward_w)
        tl.store(out + REWARD_LOSE, reward_l)
        tl.store(out + REWARD_MARGIN, reward_w - reward_l)
        tl.store(out + LOGIT_MEAN, logit)
        tl.store(out + P_MEAN, tl.where(logit >= 0, 1.0, e) / (1.0 + e))
        tl.store(out + SATURATED, tl.where(tl.abs(logit) > 10.0, 1.0, 0.0))
        tl.store(out + FALSE_SUCCESS, tl.where((logit > 0) & (excess_w > 0), 1.0, 0.0))
        tl.store(out + REF_MSE_WIN, model_w - excess_w)
        tl.store(out + REF_MSE_LOSE, model_l - excess_l)


@triton.jit
def _sum_rows(table, n_rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The sums of the first COLUMNS columns of a table in memory: (COLUMNS,), its rows added in order."""
    columns = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, n_rows, ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        # .cg: other programs wrote these; this one's L1 cache must not answer.
        total += tl.load(table + rows.to(tl.int64) * stride + columns, rows < n_rows, 0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _pick(values, index: tl.constexpr, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0.0))


@triton.jit
def _finish_batch(pairs, loss, metrics, n_pairs, REDUCTION: tl.constexpr, PAIR_BLOCK: tl.constexpr):
    """Adds the pairs: the reduced loss, and the metrics."""
    columns = tl.arange(0, 16)
    sums = _sum_rows(pairs, n_pairs, COLUMNS, 16, PAIR_BLOCK)
    means = sums / n_pairs.to(tl.float64)
    if REDUCTION == "mean":
        tl.store(loss + columns, means, columns == 0)
    if REDUCTION == "sum":
        tl.store(loss + columns, sums, columns == 0)
    tl.store(metrics + columns - 1, means, (columns > 0) & (columns <= MEANS))


@triton.jit(do_not_specialize=["n_splits", "coefficients_stride", "grad_loss_stride"])
def gradient_kernel(
    # inputs, one pointer per arm; mask may be None; outputs
    pred_win, pred_lose, target_win, target_lose, mask, grad_win, grad_lose,
    # gradient coefficients (B, 2), by rows of any stride; gradient of the loss () or (B,)
    coefficients, grad_loss,
    # shapes: elements per sample, programs per sample
    numel, n_splits,
    # strides from one pair to the next, in elements
    pred_stride, target_stride, mask_stride, grad_stride, coefficients_stride, grad_loss_stride,
    # constants
    SHARED_TARGET: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss * coefficient * (pred - target), 0 where masked"""
    # From the last to the first: what the error launch read last may still be in the L2 cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = index // n_splits
    split = index % n_splits
    row = pair.to(tl.int64)
    first = split.to(tl.int64) * BLOCK
    scale = tl.load(grad_loss + row * grad_loss_stride).to(tl.float64)
    scale_w = (tl.load(coefficients + row * coefficients_stride).to(tl.float64) * scale).to(ACC)
    scale_l = (tl.load(coefficients + row * coefficients_stride + 1).to(tl.float64) * scale).to(ACC)
    at = tl.arange(0, BLOCK)
    inside = at < numel - first
    pred_at = row * pred_stride + first
    target_at = row * target_stride + first
    grad_at = row * grad_stride + first
    pred_w = tl.load(pred_win + pred_at + at, inside, 0.0).to(ACC)
    pred_l = tl.load(pred_lose + pred_at + at, inside, 0.0).to(ACC)
    target_w = tl.load(target_win + target_at + at, inside, 0.0).to(ACC)
    if SHARED_TARGET:
        target_l = target_w
    else:
        target_l = tl.load(target_lose + target_at + at, inside, 0.0).to(ACC)
    gw = scale_w * (pred_w - target_w)
    gl = scale_l * (pred_l - target_l)
    if mask is not None:
        kept = tl.load(mask + row * mask_stride + first + at, inside, 0) != 0
        gw = tl.where(kept, gw, 0.0)
        gl = tl.where(kept, gl, 0.0)
    out = grad_win.dtype.element_ty
    if out == tl.bfloat16:  # from float64 in two steps: Triton's interpreter has no other way
        gw = gw.to(tl.float32)
        gl = gl.to(tl.float32)
    tl.store(grad_win + grad_at + at, gw.to(out), inside)
    tl.store(grad_lose + grad_at + at, gl.to(out), inside)


def blocks_per_split(numel: int) -> int:
    """How many blocks of a sample one program reads: one until the machine is full, more for large samples.

    A function of the sample's size only, never of B, so that a pair's sums do not depend on its batch. More for large
    samples, because the program that arrives last adds all slots, waiting for memory once in SLOT_BLOCK of them, while
    nothing else runs.
    """
    return min(64, max(1, round(numel / (LARGE_SPLITS * BLOCK))))


def register_bound(double: bool, *, hip: bool) -> dict[str, int]:
    """An option to launch or compile the error kernel with. Float64 needs more; AMD's compiler has no such option."""
    return {} if double or hip else {"maxnreg": MAX_REGISTERS}


def launch_errors(
    pred: list[Tensor],
    ref: list[Tensor],
    target: list[Tensor],
    ref_error: Tensor | None,
    mask: Tensor | None,
    beta: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor | None,
    parameters: Sequence[float],
    objective: str | None,
    layout: str,
    reduction: str,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () or (B,), metrics (12,), pairs (B, 18), in one launch.

    Lists hold one tensor of both arms or one for each, dense in one element order within a sample. mask: (B or 1, ...)
    uint8, in that order. ref_error: (2, B). parameters: beta, four alphas, keep, flip, margin, sft_weight.
    Without an objective only the pairs' columns from model_mse_win to elements are written.
    """
    device = pred[0].device
    n_pairs = pairs_in(pred)
    numel = pred[0].numel() // pred[0].shape[0]
    n_blocks = blocks_per_split(numel)
    n_splits = triton.cdiv(numel, BLOCK * n_blocks)
    value_dtype = torch.float64 if double else torch.float32
    loss = torch.empty((n_pairs,) if reduction == "none" else (), dtype=value_dtype, device=device)
    metrics = torch.empty(len(METRICS), dtype=value_dtype, device=device)
    pairs = torch.empty((n_pairs, PAIR_COLUMNS), dtype=torch.float64, device=device)
    slots = torch.empty(n_pairs * n_splits * (SUMS.value + (mask is not None)), dtype=torch.float64, device=device)
    pred_win, pred_lose = arms(pred, layout, n_pairs)
    ref_win, ref_lose = arms(ref, layout, n_pairs) if ref else (None, None)
    target_win, target_lose = arms(target, layout, n_pairs)
    beta, alpha, weight = (None if x is None else x.contiguous() for x in (beta, alpha, weight))
    with torch.cuda.device_of(pred_win):
        errors_kernel[(n_pairs * n_splits,)](
            pred_win, pred_lose, ref_win, ref_lose, target_win, target_lose, mask, ref_error, beta, alpha, weight,
            slots, counters_of(n_pairs, device),
            pairs, loss, metrics,
            n_pairs, numel, n_splits, n_blocks,
            pred_win.stride(0), 0 if ref_win is None else ref_win.stride(0), target_win.stride(0),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            *((0, 0) if ref_error is None else ref_error.stride()),
            *parameters,
            HEAD=None if objective is None else HEADS[objective],
            REF="pred" if ref else "none" if ref_error is None else "error",
            SHARED_TARGET=target_win is target_lose, REDUCTION=reduction, ACC=tl.float64 if double else tl.float32,
            BLOCK=BLOCK, SLOT_BLOCK=SLOT_BLOCK, PAIR_BLOCK=PAIR_BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True, **register_bound(double, hip=bool(torch.version.hip)),
        )  # fmt: skip
    return loss, metrics, pairs


def launch_gradient(
    pred: list[Tensor],
    target: list[Tensor],
    mask: Tensor | None,
    coefficients: Tensor,
    grad_loss: Tensor,
    layout: str,
    double: bool,
) -> list[Tensor]:
    """grad_loss * coefficient * (pred - target), in one launch.

    coefficients: (B, columns), of which the last two are those of winner and loser. grad_loss: () or (B,).
    """
    grad = [empty_dense_like(x) for x in pred]
    n_pairs = pairs_in(pred)
    numel = pred[0].numel() // pred[0].shape[0]
    n_splits = triton.cdiv(numel, BLOCK)
    coefficients = coefficients[:, -2:]
    pred_win, pred_lose = arms(pred, layout, n_pairs)
    target_win, target_lose = arms(target, layout, n_pairs)
    grad_win, grad_lose = arms(grad, layout, n_pairs)
    with torch.cuda.device_of(pred_win):
        gradient_kernel[(n_pairs * n_splits,)](
            pred_win, pred_lose, target_win, target_lose, mask, grad_win, grad_lose,
            coefficients, grad_loss,
            numel, n_splits,
            pred_win.stride(0), target_win.stride(0),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            grad_win.stride(0), coefficients.stride(0), grad_loss.stride(0) if grad_loss.dim() else 0,
            SHARED_TARGET=target_win is target_lose, ACC=tl.float64 if double else tl.float32, BLOCK=BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return grad
