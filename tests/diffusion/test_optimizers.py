"""Optimizers, schedules and learning rates of a training."""

import math
import sys

import pytest
import torch
from diffusion.runs import equal, lines, settings, weights
from safetensors.torch import load_file

from polydpo_fast.diffusion.optimizers import learning_rate, new_optimizer
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_optimizers_are_those_of_the_scripts(here, tmp_path):
    """AdamW by the defaults of Diffusers' (--adam_beta1, --max_grad_norm ...), Adafactor as Diffusion-DPO's has it."""
    rate, weights = 3e-4, [torch.nn.Parameter(torch.zeros(2))]
    usual = settings(here, tmp_path)
    group = new_optimizer(weights, usual, rate).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (rate, (0.9, 0.999), 1e-8, 0.01)
    assert usual.max_grad_norm == 1.0
    of_a_step = settings(here, tmp_path, learning_rate=None, batch_size=2, accumulation=3)
    assert learning_rate(of_a_step, processes=4) == pytest.approx(24e-8)
    own = settings(here, tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    group = new_optimizer(weights, own, rate).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)
    fixed = new_optimizer(weights, settings(here, tmp_path, optimizer="adafactor", weight_decay=0.1), rate)
    theirs = dict(lr=rate, weight_decay=0.1, clip_threshold=1.0, scale_parameter=False, relative_step=False)
    assert {name: fixed.param_groups[0][name] for name in theirs} == theirs


@pytest.mark.parametrize(("name", "kind"), [("adamw8bit", "AdamW8bit"), ("paged_adamw8bit", "PagedAdamW8bit")])
def test_optimizers_of_eight_bits_are_asked_for(here, tmp_path, monkeypatch, name, kind):
    """The arguments are those of torch's AdamW, which stands in here."""
    made = []

    class Eight(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            made.append((type(self).__name__, options))

    module = type(sys)("bitsandbytes.optim")
    for one in ("AdamW8bit", "PagedAdamW8bit"):
        setattr(module, one, type(one, (Eight,), {}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", type(sys)("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    options = dict(steps=2, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=0.1)
    train(settings(here, tmp_path / "eight", optimizer=name, **options))
    assert made == [(kind, dict(lr=1e-3, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1))]
    train(settings(here, tmp_path / "whole", **options))
    assert equal(weights(tmp_path / "eight"), weights(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_optimizers_of_eight_bits_where_they_are_installed(here, tmp_path, name):
    """They learn nearly what AdamW does, and resume to the bit."""
    pytest.importorskip("bitsandbytes")
    options = dict(batch_size=4, beta=100.0, checkpoint_every=2, optimizer=name)
    train(settings(here, tmp_path / "whole", **options))
    train(settings(here, tmp_path / "broken", steps=2, **options))
    train(settings(here, tmp_path / "broken", resume="latest", **options))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    train(settings(here, tmp_path / "adamw", **{**options, "optimizer": "adamw"}))
    before = load_file(here / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = [
        torch.cat([(weights(tmp_path / run)[k] - before[k]).flatten() for k in before]) for run in ("whole", "adamw")
    ]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.95


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        (dict(schedule="linear", warmup=2, accumulation=2), lambda n: n / 2 if n < 2 else (6 - n) / 4),
        (dict(schedule="cosine"), lambda n: (1 + math.cos(math.pi * n / 6)) / 2),
        (
            dict(schedule="cosine_with_restarts", cycles=2),
            lambda n: (1 + math.cos(math.pi * (n % 3) / 3)) / 2 if n < 6 else 0,
        ),
        (dict(schedule="polynomial", power=2.0), lambda n: 1e-4 + (1 - 1e-4) * (1 - n / 6) ** 2),  # down to 1e-7
    ],
    ids=lambda value: value["schedule"] if isinstance(value, dict) else "",
)
def test_schedules_of_the_learning_rate(here, tmp_path, change, rate):
    """What is written after a step is the rate of the next, as Diffusers' scripts have it."""
    train(settings(here, tmp_path / "out", steps=6, batch_size=1, **change))
    rates = [line["learning_rate"] for line in lines(tmp_path / "out")]
    assert rates == pytest.approx([1e-3 * rate(n) for n in range(1, 7)], abs=1e-9)


@pytest.mark.parametrize(
    ("change", "rate"), [(dict(accumulation=3), 6e-8), (dict(lora_rank=2), 1e-5), (dict(learning_rate=0.0), 0.0)]
)
def test_learning_rates_are_the_published_ones(here, tmp_path, change, rate):
    train(settings(here, tmp_path / "out", steps=1, **{"learning_rate": None, "seed": 2**62, **change}))
    assert lines(tmp_path / "out")[0]["learning_rate"] == pytest.approx(rate, rel=1e-12)
