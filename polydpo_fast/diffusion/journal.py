"""The metrics of a training: kept on the device until they are written, for all processes together."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Journal", "NotFiniteError"]


_SHOWN = 32  # keys in a message
_LEAST_SCALE = 2.0**-24  # of float16's gradients, 40 steps that overflowed after each other below the first one


class NotFiniteError(ArithmeticError):
    """A loss, or the norm of a step's gradient, is NaN or infinite. keys: of the pairs whose it is."""

    def __init__(self, step: int, keys: Sequence[str], everything: bool, what: Literal["loss", "gradient"]) -> None:
        shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        if what == "loss":
            more = " (all of the batch: the weights may have diverged before)" if everything else ""
            super().__init__(f"the loss is not finite at step {step}, of the pairs {shown}{more}")
        else:
            super().__init__(f"the gradient is not finite at step {step}, though the losses are, of the pairs {shown}")
        self.step, self.keys = step, tuple(keys)


class Journal:
    """Keeps losses and metrics on the device until they are written, so that a step does not wait for the device."""

    def __init__(self, accelerator: Any, file: Path, done: int) -> None:
        self._accelerator, self._file = accelerator, file
        self._entries: list[tuple[int, list[str], Tensor, dict[str, Tensor]]] = []
        self._began = time.perf_counter()
        if accelerator.is_main_process:  # what came after the checkpoint comes again
            lines = _lines(file) if done and file.exists() else []
            file.write_text("".join(f"{line}\n" for step, line in lines if step <= done))

    def add(self, step: int, keys: list[str], losses: Tensor, metrics: dict[str, Tensor]) -> None:
        self._entries.append((step, keys, losses, metrics))

    def write(self, epoch: int, learning_rate: float, more: Callable[[], Mapping[str, float]] = dict) -> str:
        """The means since it was called last, of all processes, to the file and the trackers; returns a note of them.

        more: further values of this step, which all processes are asked for once it is known to be finite.

        Raises NotFiniteError, in all processes.
        """
        entries, self._entries = self._entries, []
        steps = len({step for step, *_ in entries})
        # Those of the last forward of a step have the norm of the gradient too.
        columns = {"loss": [losses.mean() for _, _, losses, _ in entries]}
        for _, _, _, metrics in entries:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
        means = torch.stack([torch.stack([v.float() for v in values]).mean() for values in columns.values()])
        finite = torch.stack([self._finite(losses, metrics) for _, _, losses, metrics in entries])
        if self._accelerator.mixed_precision == "fp16":  # whose scaler leaves out what overflows, and halves itself
            scaler = self._accelerator.scaler  # DeepSpeed has its own
            if scaler is None or scaler.get_scale() >= _LEAST_SCALE:
                finite[:, 1] = True
        # One exchange: numbers of all processes, and whether any has a loss or a gradient that is none.
        every = self._accelerator.gather(torch.cat((means, (~finite).any().float()[None]))[None]).double().cpu()
        if every[:, -1].any():
            self._stop(entries, finite.tolist())
        values = dict(zip(columns, every[:, :-1].mean(0).tolist(), strict=True))
        now = time.perf_counter()
        pairs = sum(len(keys) for _, keys, _, _ in entries) * self._accelerator.num_processes
        values.update(learning_rate=learning_rate, pairs_per_s=pairs / (now - self._began))
        self._began = now
        values.update(more())
        step = entries[-1][0]
        self._accelerator.log(values, step=step)
        if self._accelerator.is_main_process:
            with self._file.open("a") as file:
                # A gradient that overflowed in float16 has no norm that JSON could say.
                finite_or_none = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, "epoch": epoch, "steps": steps, **finite_or_none}) + "\n")
        return ", ".join(
            f"{kind}loss {values[f'{name}loss']:.4f}, accuracy {values[f'{name}implicit_accuracy']:.3f}"
            for kind, name in (("", ""), ("validation ", "validation_"))
            if f"{name}loss" in values
        )

    @staticmethod
    def _finite(losses: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """(2,): whether the losses are, and the gradient, if this was the last forward of a step."""
        return torch.stack([x.isfinite().all() for x in (losses, metrics.get("grad_norm", losses))])

    def _stop(self, entries: Sequence[tuple[int, list[str], Tensor, Any]], finite: list[list[bool]]) -> None:
        from accelerate.utils import gather_object

        found: list[tuple[int, Literal["loss", "gradient"], list[str], bool]] = []
        for (step, keys, losses, _), (losses_are, gradient_is) in zip(entries, finite, strict=True):
            if not losses_are:
                fine = losses.isfinite().tolist()
                bad = [key for key, good in zip(keys, fine, strict=True) if not good]
                found = [(step, "loss", bad, not any(fine))]
            elif not gradient_is:
                found = [(step, "gradient", [key for one, keys, *_ in entries if one == step for key in keys], False)]
            if found:
                break
        found = gather_object(found)
        first = min(step for step, *_ in found)
        # A loss explains the gradient, which is not finite in all processes then.
        found = [one for one in found if one[0] == first]
        found = [one for one in found if one[1] == "loss"] or found
        keys = [key for *_, keys, _ in found for key in keys]
        raise NotFiniteError(first, keys, all(whole for *_, whole in found), found[0][1])


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a file of metrics, with their steps; without a last one that a crash has cut off.

    Raises ValueError for any other line that is none.
    """
    lines = file.read_text(errors="replace").splitlines()
    result = []
    for number, line in enumerate(lines, 1):
        try:
            result.append((int(json.loads(line)["step"]), line))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{file}:{number}: no line of metrics: {error}; expected the file as it was written"
                ) from error
    return result
