"""`polydpo-fast demo`: a small diffusion model learns from preference pairs to write bold digits.

Everything is real but small: 1,797 scanned digits (scikit-learn's copy of the UCI set, no download), preference
pairs in Pick-a-Pic V2's Parquet schema, a class-conditional Diffusers UNet, and an ordinary Diffusers training
loop in which the batches come from a `PairLoader` and the loss from a `PairObjective`.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ._version import __version__
from .data import PairLoader
from .decode import decode_pairs
from .diffusion import PairObjective
from .functional import loss as preference_loss

__all__ = ["Settings", "run"]

SIZE = 8  # side of the images the model sees, that of the original scans
SCAN_SIZE = 32  # side of the JPEGs: decoding resizes
PAIRS = 2048
PRETRAIN_STEPS = 900
PRETRAIN_RATE = 4e-3
PRETRAIN_BATCH = 64
ALIGN_BATCH = 32  # pairs
ALIGN_RATE = 3e-6
SAMPLES = 400
SAMPLER_STEPS = 25
PROMPT = "a handwritten digit {}"


@dataclass(frozen=True)
class Settings:
    """What the user may choose; see `polydpo-fast demo --help`."""

    alpha: float = 0.0
    beta: float = 2000.0
    steps: int = 150
    seed: int = 0
    label_noise: float = 0.0
    device: str = "cpu"


@dataclass
class Curves:
    """One value per step of the alignment."""

    loss: list[float] = field(default_factory=list)
    implicit_accuracy: list[float] = field(default_factory=list)
    reward_margin: list[float] = field(default_factory=list)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Runs the demo, writes `pairs.parquet`, `demo.png` and `demo.json` to `folder`, returns the figures."""
    _require_packages()
    _check(settings)
    console = Console()
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder / "pairs.parquet"
    write_pairs(parquet, settings)
    digits = real_digits(settings.device)

    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        reference, scheduler = pretrain(digits, settings, progress)
        policy, curves = align(reference, scheduler, parquet, settings, progress)
        before = generate(reference, scheduler, settings, progress, "sampling the reference")
        after = generate(policy, scheduler, settings, progress, "sampling the policy")

    figures = {
        "settings": asdict(settings),
        **judge(before, after, digits),
        "implicit_accuracy_last_50_steps": _mean(curves.implicit_accuracy[-50:]),
        "loss_last_50_steps": _mean(curves.loss[-50:]),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"polydpo-fast": __version__, "torch": torch.__version__},
    }
    (folder / "demo.json").write_text(json.dumps({**figures, "curves": asdict(curves)}, indent=1) + "\n")
    draw(folder / "demo.png", before, after, curves, figures)
    _print_figures(console, figures, folder)
    return figures


# ------------------------------------------------------------------------------------------------- data


def ink(images: Tensor) -> Tensor:
    """The true reward: the mean darkness of the strokes, (N,), 0 for paper (1) and 1 for ink (-1) all over.

    What is lighter than a quarter does not count: a policy cannot win by greying the paper.
    """
    darkness = (1 - images.flatten(1)) / 2
    return (darkness * (darkness > 0.25)).mean(1)


def scans() -> tuple[list[bytes], Tensor]:
    """The digits as JPEG scans, dark ink on white paper, and what they show, (1797,)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    encoded = []
    for image in bunch.images:
        paper = Image.fromarray((255 - image * (255 / 16)).round().astype(np.uint8))
        file = io.BytesIO()
        paper.resize((SCAN_SIZE, SCAN_SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        encoded.append(file.getvalue())
    return encoded, torch.from_numpy(bunch.target)


def decode(encoded: list[bytes]) -> Tensor:
    """Scans as the model sees them: (N, 1, SIZE, SIZE) in [-1, 1]; grey, so one channel is enough."""
    return decode_pairs(encoded, encoded, size=SIZE, dtype=torch.float32).pixels[: len(encoded), :1]


def real_digits(device: str) -> tuple[Tensor, Tensor]:
    """All digits, (1797, 1, SIZE, SIZE), and their classes."""
    encoded, classes = scans()
    return decode(encoded).to(device), classes.to(device)


def write_pairs(path: Path, settings: Settings) -> None:
    """Preference pairs in Pick-a-Pic V2's schema: two scans of the same digit, the one with more ink preferred."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded, classes = scans()
    weight = ink(decode(encoded))
    random = torch.Generator().manual_seed(settings.seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < PAIRS:
        first, second = torch.randint(len(encoded), (2,), generator=random).tolist()
        if classes[first] != classes[second] or abs(weight[first] - weight[second]) < 0.02:
            continue  # another digit, or hardly a difference
        label = float(weight[first] > weight[second])
        if torch.rand((), generator=random) < settings.label_noise:
            label = 1 - label
        names = f"digit-{first}", f"digit-{second}"
        rows.append(
            {
                "jpg_0": encoded[first],
                "jpg_1": encoded[second],
                "label_0": label,
                "label_1": 1 - label,
                "caption": PROMPT.format(int(classes[first])),
                "are_different": True,
                "has_label": True,
                "image_0_uid": names[0],
                "image_1_uid": names[1],
                "best_image_uid": names[int(label == 0)],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


# ------------------------------------------------------------------------------------------------ models


def pretrain(digits: tuple[Tensor, Tensor], settings: Settings, progress: Progress) -> tuple[Any, Any]:
    """A class-conditional UNet that predicts the noise, trained on the real digits, and its scheduler."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(settings.seed)
    model = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=10,
    ).to(settings.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=PRETRAIN_RATE, total_steps=PRETRAIN_STEPS)
    random = torch.Generator().manual_seed(settings.seed + 1)
    images, classes = digits
    task = progress.add_task("pre-training on real digits", total=PRETRAIN_STEPS, note="")
    for step in range(PRETRAIN_STEPS):
        chosen = torch.randint(len(images), (PRETRAIN_BATCH,), generator=random)
        noise = torch.randn((PRETRAIN_BATCH, *images.shape[1:]), generator=random).to(settings.device)
        timesteps = torch.randint(1000, (PRETRAIN_BATCH,), generator=random).to(settings.device)
        noisy = scheduler.add_noise(images[chosen], noise, timesteps)
        error = (model(noisy, timesteps, class_labels=classes[chosen]).sample - noise).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        schedule.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        progress.update(task, advance=1, note=f"error {error.item():.3f}")
    return average, scheduler


def align(reference: Any, scheduler: Any, parquet: Path, settings: Settings, progress: Progress) -> tuple[Any, Curves]:
    """The part that a user replaces in a script of their own: an ordinary Diffusers DPO loop."""
    policy = copy.deepcopy(reference).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=ALIGN_RATE, weight_decay=0.0)
    objective = PairObjective(scheduler, reference=reference, beta=settings.beta, alpha=settings.alpha)
    random = torch.Generator().manual_seed(settings.seed + 2)
    curves = Curves()
    task = progress.add_task("aligning to preferences", total=settings.steps, note="")
    loader = PairLoader(parquet, ALIGN_BATCH, seed=settings.seed, size=SIZE, dtype=torch.float32)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(epochs, settings.steps):
        pixels = batch.pixels[:, :1].to(settings.device)
        classes = torch.tensor([int(prompt.split()[-1]) for prompt in batch.prompts], device=settings.device)
        seeds = torch.randint(2**63 - 1, (len(batch),), generator=random)
        loss, metrics = objective(policy, pixels, {"class_labels": classes}, seeds=seeds)

        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        curves.loss.append(loss.item())
        curves.implicit_accuracy.append(metrics["implicit_accuracy"].item())
        curves.reward_margin.append(metrics["reward_margin"].item())
        progress.update(task, advance=1, note=f"loss {loss.item():.3f}")
    return policy.eval(), curves


@torch.no_grad()
def generate(model: Any, scheduler: Any, settings: Settings, progress: Progress, title: str) -> Tensor:
    """SAMPLES images, (N, 1, SIZE, SIZE); image i shows digit i % 10 and starts from noise i of the seed."""
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(SAMPLER_STEPS)
    random = torch.Generator().manual_seed(settings.seed + 3)
    images = torch.randn((SAMPLES, 1, SIZE, SIZE), generator=random).to(settings.device)
    classes = (torch.arange(SAMPLES) % 10).to(settings.device)
    task = progress.add_task(title, total=SAMPLER_STEPS, note="")
    for timestep in sampler.timesteps:
        noise = model(images, timestep, class_labels=classes).sample
        images = sampler.step(noise, timestep, images).prev_sample
        progress.update(task, advance=1)
    return images.clamp(-1, 1).cpu()


# --------------------------------------------------------------------------------------------- judgement


def judge(before: Tensor, after: Tensor, digits: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Win rate of the policy over the reference by the true reward, and how legible both write."""
    from sklearn.svm import SVC

    images, classes = (x.cpu() for x in digits)
    classifier = SVC().fit(images.flatten(1).numpy(), classes.numpy())
    asked = (torch.arange(len(before)) % 10).numpy()
    wins = int((ink(after) > ink(before)).sum())
    low, high = wilson_interval(wins, len(before))
    return {
        "samples": len(before),
        "win_rate": wins / len(before),
        "win_rate_95": [low, high],
        "ink_real": float(ink(images).mean()),
        "ink_before": float(ink(before).mean()),
        "ink_after": float(ink(after).mean()),
        "legible_before": float(classifier.score(before.flatten(1).numpy(), asked)),
        "legible_after": float(classifier.score(after.flatten(1).numpy(), asked)),
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95%."""
    share, z = successes / trials, 1.959964
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def draw(path: Path, before: Tensor, after: Tensor, curves: Curves, figures: dict[str, Any]) -> None:
    """The same 40 digits before and after, and the curves of the alignment."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.55, 1))
    for column, (title, images) in enumerate((("before: reference", before), ("after: aligned", after))):
        axes = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        framed = torch.nn.functional.pad(images[:40, 0], (1, 1, 1, 1), value=1.0)
        side = SIZE + 2
        sheet = framed.reshape(4, 10, side, side).permute(0, 2, 1, 3).reshape(4 * side, 10 * side)
        axes.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        key = "before" if column == 0 else "after"
        axes.set_title(
            f"{title}   ink {figures[f'ink_{key}']:.3f}, legible {figures[f'legible_{key}']:.0%}", fontsize=10
        )
        axes.axis("off")
    shown = (
        ("loss", curves.loss, math.log(2)),
        ("implicit accuracy", curves.implicit_accuracy, 0.5),
        ("reward margin", curves.reward_margin, 0.0),
    )
    for column, (title, values, start) in enumerate(shown):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        axes.plot(values, color="0.8", linewidth=0.8)
        axes.plot(_smooth(values), color="#0072b2", linewidth=1.8)
        axes.axhline(start, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
    low, high = figures["win_rate_95"]
    figure.suptitle(
        f"The policy writes bolder than its reference in {figures['win_rate']:.1%} of {figures['samples']} samples "
        f"(95% interval {low:.1%} to {high:.1%})"
    )
    figure.savefig(path, dpi=130)


def _print_figures(console: Console, figures: dict[str, Any], folder: Path) -> None:
    low, high = figures["win_rate_95"]
    table = Table(title="The policy against its reference, same seeds and digits", title_justify="left")
    table.add_column("")
    table.add_column("reference", justify="right")
    table.add_column("policy", justify="right")
    table.add_row("ink (true reward)", f"{figures['ink_before']:.3f}", f"{figures['ink_after']:.3f}")
    table.add_row("legible digits", f"{figures['legible_before']:.1%}", f"{figures['legible_after']:.1%}")
    table.add_row("win rate", "", f"{figures['win_rate']:.1%}")
    table.add_row("  95% interval", "", f"{low:.1%} to {high:.1%}")
    console.print(table)
    console.print(f"{figures['seconds']} s; picture and figures: {folder / 'demo.png'}, {folder / 'demo.json'}")


def _smooth(values: list[float]) -> list[float]:
    """The mean of the last 20 at each."""
    return [_mean(values[max(0, i - 19) : i + 1]) for i in range(len(values))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _check(settings: Settings) -> None:
    """What only the alignment would find, after minutes."""
    try:
        x = torch.zeros(2, 1, device=settings.device)
        preference_loss(x, x, x, beta=settings.beta, alpha=settings.alpha)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"the demo cannot run with these settings: {str(error).splitlines()[0]}") from None


def _require_packages() -> None:
    missing = []
    for module, package in (
        ("diffusers", "diffusers"),
        ("pyarrow", "pyarrow"),
        ("PIL", "Pillow"),
        ("sklearn", "scikit-learn"),
        ("matplotlib", "matplotlib"),
    ):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise SystemExit(f"the demo needs {', '.join(missing)}; install with: pip install 'polydpo-fast[demo]'")
