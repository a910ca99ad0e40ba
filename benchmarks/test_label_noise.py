"""What alpha is for: the demo's alignment to labels of which some are flipped, judged by pairs that are labelled right.

Each cell is the mean over the seeds, each of which has a reference, pairs and samples of its own. The gain of ink, the
true reward, is that of the policy's samples over those of its reference, from the same noise.
"""

import statistics
import time
from functools import cache

import pytest
import torch
from rich.progress import Progress
from timing import Measured, report

from polydpo_fast import demo
from polydpo_fast.data import PairLoader
from polydpo_fast.diffusion import PairObjective

SEEDS = range(3)
NOISE = (0.0, 0.2, 0.4)
ALPHA = (0.0, 2.0, 8.0)
OTHER = 1000  # by how much the seed of the pairs that judge differs
BATCH = 512

SILENT = Progress(disable=True)


@cache
def reference(seed):
    """The model, its scheduler, and the mean ink of its samples."""
    settings = demo.Settings(seed=seed)
    model, scheduler = demo.pretrain(demo.real_digits("cpu"), settings, SILENT)
    return model, scheduler, demo.ink(demo.generate(model, scheduler, settings, SILENT, ""))


@torch.no_grad()
def accuracy(policy, seed, beta, folder):
    """The share of right decisions over pairs that the training had not, with labels that are right."""
    model, scheduler, _ = reference(seed)
    demo.write_pairs(folder / "judges.parquet", demo.Settings(seed=seed + OTHER))
    objective = PairObjective(scheduler, reference=model, beta=beta)
    found = []
    for batch in PairLoader(folder / "judges.parquet", BATCH, size=demo.SIZE, dtype=torch.float32):
        classes = torch.tensor([int(prompt.split()[-1]) for prompt in batch.prompts])
        condition = {"class_labels": classes}
        _, metrics = objective(policy, batch.pixels[:, :1], condition, seeds=torch.arange(BATCH))
        found.append(metrics["implicit_accuracy"].item())
    return statistics.mean(found)


@pytest.mark.parametrize("alpha", ALPHA)
@pytest.mark.parametrize("noise", NOISE)
def test_label_noise(benchmark, tmp_path, noise, alpha):
    seconds, accuracies, gains = [], [], []
    for seed in SEEDS:
        settings = demo.Settings(seed=seed, label_noise=noise, alpha=alpha)
        model, scheduler, ink = reference(seed)
        demo.write_pairs(tmp_path / "pairs.parquet", settings)
        began = time.process_time()
        policy, _ = demo.align(model, scheduler, tmp_path / "pairs.parquet", settings, SILENT)
        seconds.append(time.process_time() - began)
        accuracies.append(accuracy(policy, seed, settings.beta, tmp_path))
        gains.append((demo.ink(demo.generate(policy, scheduler, settings, SILENT, "")) - ink).mean().item())
    facts = {"noise": noise, "alpha": alpha, "accuracies": accuracies, "gains": gains}
    report(
        benchmark,
        Measured(f"{noise:.0%} of the labels flipped", f"alpha {alpha:g}", {"cpu": seconds}, True, facts=facts),
    )
