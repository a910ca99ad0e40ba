"""`polydpo-fast train` in several processes: DDP, FSDP, DeepSpeed."""

import contextlib
import math
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusion import pipelines
from diffusion.runs import lines, settings, two_processes, weights
from PIL import Image
from safetensors.torch import load_file

from polydpo_fast import demo
from polydpo_fast.diffusion import setup, sharding
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture
def of_processes(monkeypatch, unused_tcp_port):
    """An accelerator of one of several processes, of which there are no others."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=unused_tcp_port, OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield setup.new_accelerator()
    if torch.distributed.is_initialized():  # a training ends it
        torch.distributed.destroy_process_group()


def test_processes_wait_for_each_other_for_hours_but_not_in_a_step(of_processes, here, tmp_path):
    """One may have much to download, to encode or to render while the others are done; later a node may have gone."""
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout >= timedelta(hours=2)
    train(settings(here, tmp_path, steps=1))
    assert timedelta(minutes=10) < group.options._timeout <= timedelta(hours=1)


@pytest.fixture
def first_of_two(monkeypatch, unused_tcp_port):
    """This process is the first of two, on a port that it returns."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_PORT=unused_tcp_port, OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return unused_tcp_port


def test_processes_that_do_not_come_are_not_waited_for_for_hours(first_of_two, monkeypatch):
    """As where one node has no file of settings."""
    monkeypatch.setattr(setup, "_TO_JOIN", timedelta(milliseconds=100))
    message = r"not all processes have found each other, for which they have 0:00:00\.1.*: Timed out"
    with pytest.raises(TimeoutError, match=message):
        setup.new_accelerator()


def test_a_port_that_another_program_has_is_not_told_as_time_that_has_passed(first_of_two):
    with (
        socket.create_server(("127.0.0.1", first_of_two)),
        pytest.raises(TimeoutError, match=r"^not all processes have found each other.* a port that is free: .* in use"),
    ):
        setup.new_accelerator()


def test_gradients_are_in_memory_once(of_processes):
    """Not as they are, and again as they are summed: as much as the weights."""
    model = torch.nn.Linear(3, 5)
    given = of_processes.ddp_handler.to_kwargs() if of_processes.ddp_handler else {}  # as `prepare` takes it
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **given)
    wrapped(torch.randn(2, 3)).sum().backward()
    assert model.weight.grad.untyped_storage().data_ptr() == model.bias.grad.untyped_storage().data_ptr()


def test_two_processes_equal_one_with_twice_the_batch(here, tmp_path, unused_tcp_port):
    """On the demo's digits, in Pick-a-Pic's columns, through `accelerate launch`."""
    one, two, digits = tmp_path / "one", tmp_path / "two", tmp_path / "digits.parquet"
    demo.write_pairs(digits, demo.Settings())
    change = dict(data=str(digits), steps=3, beta=500.0, optimizer="adamw", adam_epsilon=1e-3)
    change |= dict(validation_data=str(here / "pairs.parquet"), validation_pairs=10)  # five batches of two pairs
    train(settings(here, one, batch_size=4, **change))
    prompts = dict(validation_prompts=["ab", "c", "d"], validation_every=3, validation_steps=1)
    code, said = two_processes(settings(here, two, checkpoint_every=2, **change, **prompts), tmp_path, unused_tcp_port)
    assert code == 0, said
    before = load_file(here / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    alone, together = weights(one), weights(two)
    assert alone.keys() == together.keys()
    for name in alone:
        assert (together[name] - alone[name]).norm() <= 1e-5 * alone[name].norm() + 1e-9, name
    # There is something to compare: what was learned is a hundred times what may differ.
    moved = sum((alone[name] - before[name]).norm() ** 2 for name in alone) ** 0.5
    assert moved > 1e-3 * sum(value.norm() ** 2 for value in before.values()) ** 0.5
    assert lines(two)[0]["loss"] == torch.tensor(math.log(2)).item()
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["implicit_accuracy"] == b["implicit_accuracy"]
    assert ["validation_loss" in line for line in lines(one)] == [False, False, True]
    for name in ("validation_loss", "validation_implicit_accuracy", "validation_reward_margin"):
        assert lines(one)[-1][name] == pytest.approx(lines(two)[-1][name], rel=1e-4)
    assert len(list((two / "checkpoint-3").glob("random_states_*.pkl"))) == 2
    with Image.open(two / "validation" / "000003.png") as sheet:
        assert sheet.size == (32, 32)
        assert np.asarray(sheet)[16:, 16:].min() == 255  # three pictures, and nothing


@pytest.mark.heavy
def test_two_processes_with_lora_stop_together_and_resume(here, tmp_path, unused_tcp_port):
    one, two = tmp_path / "one", tmp_path / "two"
    change = dict(beta=500.0, adam_epsilon=1e-3, lora_rank=2, accumulation=2, checkpoint_every=2)
    train(settings(here, one, batch_size=4, steps=6, **change))
    for steps in (3, 6):
        run = settings(here, two, steps=steps, resume="latest", **change)
        code, said = two_processes(run, tmp_path, unused_tcp_port)
        assert code == 0, said
    alone, together = (load_file(run / "checkpoint-6" / "adapters.safetensors") for run in (one, two))
    for name in alone:
        assert (together[name] - alone[name]).norm() <= 1e-4 * alone[name].norm() + 1e-7, name


def fsdp2(blocks="ResnetBlock2D"):
    """As `accelerate launch` tells it to processes."""
    return {
        **dict(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="false"),
        **dict(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP=blocks),
        **dict(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="true"),
    }


def sharded(run, folder, port, told):
    """Two processes on CPUs, through Accelerate's FSDP2 or DeepSpeed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(port), str(Path(__file__).with_name("sharded_on_cpus.py")), "train"]
    write_settings(run, folder / "sharded.yaml")
    command = [*launch, "--config", str(folder / "sharded.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **told}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_pictures(folder, steps):
    for step in steps:
        pictures = [Image.open(folder / run / "validation" / f"{step:06d}.png") for run in ("one", "two")]
        one, two = (np.asarray(picture).astype(int) for picture in pictures)
        assert abs(one - two).max() <= 1
        assert one.std() > 1


def assert_same_weights(folder, lora):
    name = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    alone, together = (load_file(folder / run / name) for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for key in alone:
        assert (together[key] - alone[key]).norm() <= 1e-4 * alone[key].norm() + 1e-7, key


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "blocks"), [("sd15", "ResnetBlock2D"), ("flux", "FluxTransformerBlock")])
def test_sharded_in_half_precision_the_reference_computes_as_the_policy(tmp_path, unused_tcp_port, family, blocks):
    """FSDP computes in bfloat16 alone, where autocast keeps some layers in float32."""
    model, data = pipelines.save(family, tmp_path), pipelines.write_pairs(tmp_path / "pairs.parquet", 4)
    change = dict(model=str(model), data=str(data), mixed_precision="bf16", steps=2, batch_size=1, beta=500.0)
    sharded(settings(tmp_path, tmp_path / "out", **change), tmp_path, unused_tcp_port, fsdp2(blocks))
    first, second = lines(tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["reward_win"], first["reward_lose"]) == (0.0, 0.0)
    assert second["loss"] != first["loss"]


@pytest.mark.parametrize(
    ("kind", "fsdp2", "change", "message"),
    [
        (
            "FSDP",
            False,
            {},
            "all weights are trained under FSDP, .*; expected FSDP's version 2, or mixed_precision 'no'",
        ),
        (
            "DEEPSPEED",
            False,
            {},
            "all weights are trained under DEEPSPEED, whose rounding the reference would not have",
        ),
        (
            "FSDP",
            True,
            dict(reference_errors="x"),
            "reference_errors is 'x'; .* they are rounded otherwise than the po",
        ),
        ("FSDP", True, {}, None),
        ("FSDP", True, dict(ema=0.9, validation_prompts=["x"]), None),
        (
            "FSDP",
            False,
            dict(lora_rank=2),
            "adapters are of another dtype than the rest, and FSDP's version 1 takes one",
        ),
        ("DEEPSPEED", False, dict(lora_rank=2, validation_prompts=["x"]), None),
        ("FSDP", False, dict(loss={"reference_free": True}), None),
        ("MULTI_GPU", False, {}, None),
    ],
)
def test_a_reference_that_would_round_otherwise_is_refused(here, tmp_path, kind, fsdp2, change, message):
    run = settings(here, tmp_path, **change)
    for precision in ("bf16", "no"):
        accelerator = SimpleNamespace(distributed_type=DistributedType[kind], mixed_precision=precision, is_fsdp2=fsdp2)
        refused = message is not None and precision == "bf16"
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            sharding.check_sharding(run, accelerator)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("FSDP", dict(ema=0.9), "ema is 0.9, under FSDP; expected FSDP's version 2, or 0"),
        ("DEEPSPEED", dict(ema=0.9), "ema is 0.9, under DEEPSPEED; expected"),
        ("FSDP", dict(validation_prompts=["x"]), "validation_prompts are given, under FSDP; expected FSDP's version 2"),
        ("FSDP2", dict(optimizer="adamw8bit"), "optimizer is 'adamw8bit', which takes no weights that FSDP2 has shard"),
        ("FSDP2", dict(optimizer="adafactor"), "optimizer is 'adafactor', which takes no weights"),
    ],
)
def test_what_sharding_does_not_allow_is_refused(here, tmp_path, kind, change, message):
    fsdp2 = kind == "FSDP2"
    distributed = DistributedType["FSDP" if fsdp2 else kind]
    accelerator = SimpleNamespace(distributed_type=distributed, mixed_precision="no", is_fsdp2=fsdp2)
    with pytest.raises(ValueError, match=message):
        sharding.check_sharding(settings(here, tmp_path, lora_rank=2, **change), accelerator)


@pytest.mark.heavy
@pytest.mark.parametrize("lora", [0, 2])
def test_sharded_processes_equal_one_with_twice_the_batch(here, tmp_path, unused_tcp_port, lora):
    """Through Accelerate's FSDP2, stopped and resumed in between; averages and pictures too."""
    change = dict(beta=500.0, adam_epsilon=1e-3, learning_rate=1e-4, lora_rank=lora, checkpoint_every=2, ema=0.9)
    change |= dict(validation_prompts=["ab", "c", "d"], validation_every=2, validation_steps=2)
    change |= dict(validation_data=str(here / "pairs.parquet"), validation_pairs=6)
    train(settings(here, tmp_path / "one", batch_size=4, **change))
    for steps in (2, 4):
        run = settings(here, tmp_path / "two", steps=steps, resume="latest", **change)
        sharded(run, tmp_path, unused_tcp_port, fsdp2())
    # It was sharded: a process has its part alone.
    assert len(list((tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a.get("validation_loss", 0) == pytest.approx(b.get("validation_loss", 0), rel=1e-4)
    assert "validation_loss" in lines(tmp_path / "two")[-1]
    assert_same_pictures(tmp_path, (2, 4))
    assert_same_weights(tmp_path, lora)


@pytest.mark.heavy
def test_sharded_and_compiled_there_are_pictures_too(here, tmp_path, unused_tcp_port):
    change = dict(steps=1, learning_rate=1e-9, validation_prompts=["ab", "c", "d"], validation_steps=2)
    train(settings(here, tmp_path / "one", **change))
    compiled = {**fsdp2(), "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    sharded(settings(here, tmp_path / "two", **change), tmp_path, unused_tcp_port, compiled)
    assert_same_pictures(tmp_path, (1,))


@pytest.mark.heavy
@pytest.mark.parametrize(("stage", "lora"), [("2", 0), ("2", 2), ("3", 0), ("3", 2)])
def test_deepspeed_equals_one_process_with_twice_the_batch(here, tmp_path, unused_tcp_port, stage, lora):
    """It clips where the settings say so, and tells the norm."""
    pytest.importorskip("deepspeed")
    change = dict(beta=500.0, adam_epsilon=1e-3, learning_rate=1e-3, lora_rank=lora, accumulation=2)
    change |= dict(max_grad_norm=0.01, checkpoint_every=2, schedule="constant_with_warmup", warmup=1)
    change |= dict(validation_prompts=["ab", "c", "d"], validation_every=2, validation_steps=2)
    train(settings(here, tmp_path / "one", batch_size=4, **change))
    told = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=stage, DS_ACCELERATOR="cpu")
    told["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"
    for steps in (2, 4):
        run = settings(here, tmp_path / "two", steps=steps, resume="latest", **change)
        sharded(run, tmp_path, unused_tcp_port, told)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert_same_pictures(tmp_path, (2, 4))
    assert_same_weights(tmp_path, lora)


def test_what_fsdp_and_deepspeed_are_told(here, tmp_path):
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    run = settings(here, tmp_path, batch_size=3, accumulation=2, max_grad_norm=0.5)
    for kind in (MixedPrecision, MixedPrecisionPolicy):
        plugin = SimpleNamespace(mixed_precision_policy=kind(torch.bfloat16, torch.bfloat16))
        sharding.set_sharding(run, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}})
    sharding.set_sharding(run, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert plugin.deepspeed_config == {
        **dict(train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2, gradient_clipping=0.5),
        "zero_optimization": {"stage": 2},
    }
