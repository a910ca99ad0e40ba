"""How much of a logit survives: `make precision`.

Latents of SD1.5's size, beta 5000, errors around 0.1 as a trained model has them, and the policy one small step from
its reference, as in the first thousands of steps.
Each formula gets the same rounded tensors; the truth is computed from them in float64.
"""

from collections.abc import Callable

import torch
import trainers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import polydpo_fast

PAIRS, SHAPE, STEP, ERROR = 256, (4, 64, 64), 0.01, 0.3  # a root mean square, as the step is
DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)]


def logits_of_ours(pred: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    return polydpo_fast.pair_errors(pred, ref, target).logit(5000.0)


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Salesforce's script (in the inputs' dtype)": trainers.salesforce,
    "Diffusers' SD1.5 script (in float32)": trainers.diffusers_sd15,
    "polydpo_fast": logits_of_ours,
}


def batch(policy: torch.dtype, other: torch.dtype) -> list[Tensor]:
    """Prediction, reference and target."""
    random = torch.Generator().manual_seed(0)
    pred, step, error = (torch.randn(2 * PAIRS, *SHAPE, generator=random) for _ in range(3))
    return [pred.to(policy), (pred + STEP * step).to(other), (pred + ERROR * error).to(other)]


def survival(formula: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> dict[str, float]:
    """Of the formula's logits against those in float64."""
    truth = trainers.salesforce(*(x.double() for x in tensors))
    logits = formula(*tensors).double()
    error = (logits - truth).abs()
    return {
        "mean |logit|": truth.abs().mean().item(),
        "mean error": error.mean().item(),
        "largest error": error.max().item(),
        "wrong sign": (logits * truth < 0).double().mean().item(),
        "no sign": (logits == 0).double().mean().item(),
    }


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    table = Table(title=f"{PAIRS} pairs of {SHAPE}, beta 5000", title_justify="left")
    for column in ("policy", "reference, target", "formula", "|logit|", "error", "largest", "wrong sign", "no sign"):
        table.add_column(column, justify="left" if column == "formula" else "right")
    for dtypes in DTYPES:
        tensors = batch(*dtypes)
        for title, formula in FORMULAS.items():
            size, error, largest, wrong, none = survival(formula, tensors).values()
            figures = (f"{size:.2f}", f"{error:.1e}", f"{largest:.1e}", f"{wrong:.0%}", f"{none:.0%}")
            table.add_row(*map(name, dtypes), title, *figures)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
