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

A pair with a NaN error makes the means NaN and counts as neither right nor saturated in the shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["METRICS", "pair_metrics"]

METRICS = (
    "implicit_accuracy",
    "reward_win",
    "reward_lose",
    "reward_margin",
    "logit_mean",
    "p_mean",
    "model_mse_win",
    "model_mse_lose",
    "ref_mse_win",
    "ref_mse_lose",
    "saturated",
    "false_success",
)
"""Names of the metrics, in the order in which the kernels store them."""


def pair_metrics(model_error: Tensor, excess_error: Tensor, logit: Tensor, half_beta: float) -> dict[str, Tensor]:
    """The metrics of a batch of B pairs as 0-dim tensors.

    model_error: (2, B), the policy's errors m of the winners and of the losers.
    excess_error: (2, B), m - r.
    logit: (B,).
    """
    model_error, excess_error, logit = model_error.detach(), excess_error.detach(), logit.detach()
    reward = -half_beta * excess_error
    ref_error = model_error - excess_error
    correct = (logit > 0).to(logit.dtype) + 0.5 * (logit == 0).to(logit.dtype)
    false_success = (logit > 0) & (excess_error[0] > 0)
    per_pair = (
        correct,
        reward[0],
        reward[1],
        reward[0] - reward[1],
        logit,
        torch.sigmoid(logit),
        model_error[0],
        model_error[1],
        ref_error[0],
        ref_error[1],
        (logit.abs() > 10).to(logit.dtype),
        false_success.to(logit.dtype),
    )
    return dict(zip(METRICS, torch.stack(per_pair).mean(dim=1).unbind(), strict=True))
