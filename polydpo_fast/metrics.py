"""What a trainer logs about a batch of pairs, computed on the device without a host synchronisation.

All values are means over the pairs of the batch, detached. z is the logit, r_a = -beta/2 (m_a - r_a) the
implicit reward of arm a (Wallace et al. 2023, section 4), m and r the policy's and the reference's errors.

    implicit_accuracy   share of pairs with z > 0; a tie (z = 0) counts 1/2
    reward_win/lose     implicit reward of the winner and of the loser
    reward_margin       reward_win - reward_lose
    logit_mean          z, the argument of the sigmoid
    p_mean              sigmoid(z), the policy's probability of the label
    model_mse_win/lose  m, the policy's denoising error
    ref_mse_win/lose    r, the reference's denoising error
    saturated           share of pairs with |z| > 10, where the sigmoid has no slope left
    false_success       share of pairs with z > 0 although the winner's error grew (the loser's grew more)

Under reference_free the reference's errors are 0; the margin of the loss is not part of z.
A pair with a NaN error makes the means NaN and counts as neither right nor saturated in the shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["METRICS", "pair_metrics", "unpacked"]

METRICS = (
    "implicit_accuracy",
    "reward_win",
    "reward_lose",
    "reward_margin",
    "logit_mean",
    "p_mean",
    "saturated",
    "false_success",
    "ref_mse_win",
    "ref_mse_lose",
    "model_mse_win",
    "model_mse_lose",
)
"""Names of the metrics, in the order in which the kernels store them (`layout.Column`)."""


def unpacked(metrics: Tensor) -> dict[str, Tensor]:
    """The metrics by name, from the tensor that a kernel stored them in."""
    return dict(zip(METRICS, metrics.unbind(), strict=True))


def pair_metrics(
    errors: tuple[Tensor, Tensor, Tensor, Tensor], logit: Tensor, beta: float | Tensor
) -> dict[str, Tensor]:
    """The metrics of a batch of B pairs as 0-dim tensors, from its `PairErrors`, logits (B,) and beta."""
    model_win, model_lose, excess_win, excess_lose = (x.detach() for x in errors)
    logit = logit.detach()
    reward_win, reward_lose = -0.5 * beta * excess_win, -0.5 * beta * excess_lose
    per_pair = (
        (logit > 0).to(logit.dtype) + 0.5 * (logit == 0).to(logit.dtype),
        reward_win,
        reward_lose,
        reward_win - reward_lose,
        logit,
        torch.sigmoid(logit),
        (logit.abs() > 10).to(logit.dtype),
        ((logit > 0) & (excess_win > 0)).to(logit.dtype),
        model_win - excess_win,
        model_lose - excess_lose,
        model_win,
        model_lose,
    )
    means = [x.to(model_win.dtype).mean() for x in per_pair]
    return dict(zip(METRICS, means, strict=True))
