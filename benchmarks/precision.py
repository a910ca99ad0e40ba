"""How much of a logit survives: `make precision`.

Latents of SD1.5's size, beta 5000, the policy one small step from its reference, as in the first thousands of steps.
Each formula gets the same rounded tensors; the truth is computed from them in float64.
"""

from collections.abc import Callable

import torch
import trainers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import polydpo_fast

PAIRS, SHAPE, STEP = 256, (4, 64, 64), 0.002
BF16, F32 = torch.bfloat16, torch.float32


def logits_of_ours(pred: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    return polydpo_fast.pair_errors(pred, ref, target).logit(5000.0)


FORMULAS: list[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = [
    ("Salesforce's script (in the inputs' dtype)", trainers.salesforce),
    ("Diffusers' SD1.5 script (in float32)", trainers.diffusers_sd15),
    ("polydpo_fast", logits_of_ours),
]


def main() -> None:
    random = torch.Generator().manual_seed(0)
    pred, step, target = (torch.randn(2 * PAIRS, *SHAPE, generator=random) for _ in range(3))
    table = Table(title=f"{PAIRS} pairs of {SHAPE}, beta 5000", title_justify="left")
    for column in (
        "policy",
        "reference, target",
        "formula",
        "mean |logit|",
        "mean error",
        "largest",
        "wrong sign",
        "no sign",
    ):
        table.add_column(column, justify="left" if column == "formula" else "right")
    for policy_dtype, other_dtype in ((BF16, BF16), (F32, BF16), (F32, F32)):
        batch = pred.to(policy_dtype), (pred + STEP * step).to(other_dtype), target.to(other_dtype)
        truth = trainers.salesforce(*(x.double() for x in batch))
        for name, formula in FORMULAS:
            logits = formula(*batch).double()
            error = (logits - truth).abs()
            wrong = (logits * truth < 0).double().mean()
            none = (logits == 0).double().mean()
            table.add_row(
                *(str(dtype).removeprefix("torch.") for dtype in (policy_dtype, other_dtype)),
                name,
                f"{truth.abs().mean():.2f}",
                f"{error.mean():.1e}",
                f"{error.max():.1e}",
                f"{wrong:.0%}",
                f"{none:.0%}",
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
