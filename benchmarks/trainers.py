"""The losses of published training scripts, as formulas: what benchmarks compare with and conformance tests hold us to.

All take halves: winners, then losers.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss


def _errors(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (x - target).pow(2).mean(dim=tuple(range(1, x.dim()))).chunk(2)


def salesforce(pred: Tensor, ref: Tensor, target: Tensor, beta: float = 5000.0) -> Tensor:
    """Diffusion-DPO's own script: errors in the dtype of the inputs, beta with the 1/2. Logits (B,)."""
    model_win, model_lose = _errors(pred, target)
    ref_win, ref_lose = _errors(ref, target)
    return -0.5 * beta * ((model_win - model_lose) - (ref_win - ref_lose))


def diffusers_sd15(pred: Tensor, ref: Tensor, target: Tensor, beta: float = 2500.0) -> Tensor:
    """Diffusers' SD1.5 script: errors in float32, beta without the 1/2. Logits (B,)."""
    return beta * diffusers_margin(pred, ref, target)


def diffusers_margin(pred: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """What that script calls the logits: the difference of the error differences, without beta."""

    def difference(x: Tensor) -> Tensor:
        errors = mse_loss(x.float(), target.float(), reduction="none")
        win, lose = errors.mean(dim=list(range(1, errors.dim()))).chunk(2)
        return win - lose

    return difference(ref) - difference(pred)


def eager(pred: Tensor, ref: Tensor, target: Tensor, beta: float = 5000.0) -> Tensor:
    """The careful version of the usual fifteen lines, in float32: the baseline of the benchmarks. Loss ().

    By F.mse_loss, as Diffusers' scripts, which is faster than Salesforce's own square; the target is cast once.
    """
    return -logsigmoid(0.5 * beta * diffusers_margin(pred, ref, target.float())).mean()


def salesforce_loss(pred: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """The loss of that script, errors in the dtype of the inputs. Loss ()."""
    return -logsigmoid(salesforce(pred, ref, target)).mean()
