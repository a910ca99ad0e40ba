"""Trainings in half precision and with torch.compile: the policy begins as its reference."""

import importlib
import math
import sys

import pytest
import torch
import torch._inductor.config
from accelerate.state import AcceleratorState
from diffusion import pipelines
from diffusion.runs import equal, lines, settings, weights
from safetensors.torch import load_file

from polydpo_fast.diffusion import predict, setup
from polydpo_fast.diffusion import train as training
from polydpo_fast.diffusion.families import LORA_FILE
from polydpo_fast.diffusion.train import NotFiniteError, train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_trained_is_whole_and_the_rest_in_half_precision(here, tmp_path, lora):
    """All weights in float32, where a step of 1e-8 is not lost; beside adapters nothing has to be."""
    run = settings(here, tmp_path, mixed_precision="bf16", lora_rank=lora)
    pipe = setup.set_up(run, setup.accelerator_of(run)).pipe
    assert pipe.unet.dtype == (torch.bfloat16 if lora else torch.float32)
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.heavy), 2])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own look at it
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")  # PyTorch's too
def test_regions_that_are_compiled(tmp_path, monkeypatch, lora):
    """Names within the model have no trace of it: not in the result, and not in a checkpoint of adapters."""
    model, data = pipelines.save("sd3", tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    given = dict(model=str(model), data=str(data), lora_rank=lora, beta=100.0, checkpoint_every=1, resume="latest")
    train(settings(tmp_path, tmp_path / "plain", steps=2, **given))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        patch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        for steps in (1, 2):
            AcceleratorState._reset_state(reset_partial_state=True)
            train(settings(tmp_path, tmp_path / "compiled", steps=steps, **given))
    name = LORA_FILE if lora else "transformer/diffusion_pytorch_model.safetensors"
    plain, compiled = (load_file(tmp_path / run / name) for run in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "rounds"), [("bf16", True), ("no", False)])
def test_compiled_graphs_round_alike(here, tmp_path, monkeypatch, precision, rounds):
    """With gradients and without; that the loss then begins at log 2 is for the heavy tests."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with torch._inductor.config.patch(emulate_precision_casts=False, layout_optimization=True):
        setup.accelerator_of(settings(here, tmp_path, mixed_precision=precision))
        assert torch._inductor.config.emulate_precision_casts == rounds
        assert not torch._inductor.config.layout_optimization


def test_what_the_environment_says_to_the_compiler_is_left_to_what_comes_after_a_training(monkeypatch):
    """Also where a training is the first to import it."""
    monkeypatch.setattr(torch._inductor, "config", torch._inductor.config)  # put back at the end
    monkeypatch.delitem(sys.modules, "torch._inductor.config")
    monkeypatch.setenv("TORCHINDUCTOR_LAYOUT_OPTIMIZATION", "0")
    with setup.inductor_as_before():
        importlib.import_module("torch._inductor.config").layout_optimization = False
    assert not importlib.import_module("torch._inductor.config").layout_optimization


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_policy_begins_at_its_reference(here, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with torch._inductor.config.patch(emulate_precision_casts=False):
        train(settings(here, tmp_path / "out", steps=1, mixed_precision="bf16"))
    assert lines(tmp_path / "out")[0]["loss"] == torch.tensor(math.log(2)).item()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_policy_learns_what_it_would_learn_otherwise(here, tmp_path, monkeypatch):
    """By inductor, which has no gradients for half of a UNet where it lays out images with their channels last."""
    change = dict(steps=2, beta=100.0, adam_epsilon=1e-3)
    train(settings(here, tmp_path / "plain", **change))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    train(settings(here, tmp_path / "compiled", **change))
    for plain, compiled in zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True):
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    before = load_file(here / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    plain, compiled = (weights(tmp_path / run) for run in ("plain", "compiled"))
    moved = sum((plain[name] - before[name]).norm() ** 2 for name in plain) ** 0.5
    assert sum((plain[name] - compiled[name]).norm() ** 2 for name in plain) ** 0.5 < 1e-2 * moved


def test_mixed_precision_begins_at_the_reference(here, tmp_path):
    """Also where all weights are trained: the reference computes as the policy does."""
    pictures = dict(validation_prompts=["ab"], validation_steps=1)  # of weights in float32 and text in bfloat16
    train(settings(here, tmp_path / "full", steps=1, mixed_precision="bf16", **pictures))
    train(settings(here, tmp_path / "lora", steps=1, mixed_precision="bf16", lora_rank=2))
    for run in ("full", "lora"):
        assert lines(tmp_path / run)[0]["loss"] == torch.tensor(math.log(2)).item()
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "full").values())


@pytest.fixture
def float16_on_cpus(monkeypatch):
    """Accelerate has it on GPUs alone; PyTorch's autocast and GradScaler are there. Called with the initial scale."""
    import accelerate

    class Float16(accelerate.Accelerator):
        def __init__(self, *, mixed_precision, **options):
            AcceleratorState._reset_state(reset_partial_state=True)
            super().__init__(mixed_precision="no", **options)
            self.state._mixed_precision, self.native_amp = mixed_precision, True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=initial[0])

    initial = []
    monkeypatch.setattr(accelerate, "Accelerator", Float16)
    return initial.append


@pytest.mark.parametrize(("lora", "exponent"), [(0, 15), (2, 19)])
def test_float16_skips_what_overflows_and_goes_on(here, tmp_path, float16_on_cpus, lora, exponent):
    """A step that overflows changes neither weights nor schedule nor averages, and halves the scale."""
    float16_on_cpus(2.0**exponent)
    options = dict(mixed_precision="fp16", lora_rank=lora, ema=0.9, beta=500.0)
    options |= dict(schedule="constant_with_warmup", warmup=7)
    out = tmp_path / "out"
    train(settings(here, out, steps=8, checkpoint_every=4, **options))
    norms = [line["grad_norm"] for line in lines(out)]
    skipped = norms.count(None)
    assert 1 <= skipped <= 6
    first = next(step for step, norm in enumerate(norms) if norm is not None)  # later ones may overflow once more
    assert first >= 1
    assert [line["loss"] for line in lines(out)][: first + 1] == [torch.tensor(math.log(2)).item()] * (first + 1)
    assert lines(out)[-1]["loss"] != lines(out)[0]["loss"]
    assert lines(out)[-1]["learning_rate"] == pytest.approx(1e-3 * (8 - skipped) / 7)
    checkpoint = out / "checkpoint-8"
    assert torch.load(checkpoint / "scaler.pt")["scale"] == 2.0 ** (exponent - skipped)
    average = torch.load(checkpoint / "custom_checkpoint_2.pkl", weights_only=False)
    assert average["optimization_step"] == 8 - skipped
    trained = load_file(checkpoint / ("adapters.safetensors" if lora else "model.safetensors"))
    assert all(value.dtype == torch.float32 for value in trained.values())
    # And the scale is resumed.
    resumed = dict(resume=str(out / "checkpoint-4"), checkpoint_every=4)
    train(settings(here, tmp_path / "broken", steps=8, **resumed, **options))
    again = load_file(tmp_path / "broken" / "checkpoint-8" / ("adapters.safetensors" if lora else "model.safetensors"))
    assert equal(trained, again)


def test_float16_that_overflows_for_ever_stops(here, tmp_path, monkeypatch, float16_on_cpus):
    """Else no step would ever be taken, and nothing be said of it."""
    make = training.objective_of

    def spoiled(model, *inputs):
        result = predict(model, *inputs)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(training, "objective_of", lambda *given, **more: make(*given, **more, forward=spoiled))
    float16_on_cpus(2.0**-22)
    with pytest.raises(NotFiniteError, match="the gradient is not finite at step 3, though the losses are"):
        train(settings(here, tmp_path / "out", steps=8, mixed_precision="fp16"))
