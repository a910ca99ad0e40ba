"""PairObjective and its references with models that DDP and FSDP have wrapped: two processes equal one."""

import copy
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.training_utils import EMAModel
from diffusion.tiny import PAIRS, build
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from polydpo_fast.diffusion import PairObjective, adapters_off, ema_weights, frozen_copy

STEPS = 3


def start(reference):
    """The policy, and what belongs to the reference."""
    model, *_ = build("sd15")
    policy = copy.deepcopy(model)
    torch.manual_seed(1)
    if reference == "adapters_off":
        policy.requires_grad_(False)
        policy.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    else:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return policy, model


def reference_of(name, policy, model):
    """policy: as it is wrapped."""
    if name == "adapters_off":
        return adapters_off
    if name == "frozen_copy":
        return frozen_copy(model)
    ema = EMAModel(policy.parameters())
    with torch.no_grad():
        for weight in ema.shadow_params:
            weight.mul_(0.9)
    return lambda model: ema_weights(model, ema)


def steps(policy, reference, pairs):
    """Of these pairs, the first arms of the batch being the winners'."""
    _, latents, conditioning, scheduler = build("sd15")
    rows = torch.tensor([*pairs, *(pair + PAIRS for pair in pairs)])
    text = conditioning["encoder_hidden_states"][list(pairs)]
    objective = PairObjective(scheduler, reference=reference, beta=500.0)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        seeds = [10 * step + pair for pair in pairs]
        loss, _ = objective(policy, latents[rows], {"encoder_hidden_states": text}, seeds=seeds)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(model):
    return DistributedDataParallel(model)


def compiled_ddp(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


def fsdp1(model):
    blocks = ModuleWrapPolicy({type(model.down_blocks[1])})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True, auto_wrap_policy=blocks)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.down_blocks, *model.up_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(wrap, policy):
    """All weights."""
    if wrap is fsdp1:
        with FullyShardedDataParallel.summon_full_params(policy):
            named = {name: value.detach().clone() for name, value in policy.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in named.items()}
    named = {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in policy.named_parameters()}
    return {name: p.full_tensor() if wrap is fsdp2 else p.detach() for name, p in named.items()}


REFERENCES = ("frozen_copy", "adapters_off", "ema_weights")
CASES = [
    *((ddp, name) for name in REFERENCES),
    *((fsdp1, name) for name in REFERENCES[:2]),
    *((fsdp2, name) for name in REFERENCES),
]


def work(rank, port, folder, cases):
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for wrap, name in cases:
        policy, model = start(name)
        policy = wrap(policy)
        steps(policy, reference_of(name, policy, model), [rank])
        weights = whole(wrap, policy)
        if rank == 0:
            torch.save(weights, folder / f"{wrap.__name__}-{name}.pt")
    said = {}
    refused = ((fsdp1, frozen_copy), (fsdp2, frozen_copy), (fsdp1, lambda model: ema_weights(model, None).__enter__()))
    for wrap, function in refused:
        try:
            function(wrap(start("")[0]))
        except ValueError as error:
            said[f"{wrap.__name__} {function.__name__}"] = str(error)
    torch.save(said, folder / f"said-{rank}.pt")
    dist.destroy_process_group()


def two_processes(folder, cases):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, folder, cases), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return two_processes(tmp_path_factory.mktemp("sharded"), CASES)


@pytest.mark.parametrize(("wrap", "name"), CASES, ids=[f"{wrap.__name__}-{name}" for wrap, name in CASES])
def test_steps_equal_those_of_one_process(trained, wrap, name):
    policy, model = start(name)
    before = {key: value.detach().clone() for key, value in policy.named_parameters()}
    steps(policy, reference_of(name, policy, model), range(PAIRS))
    ours = torch.load(trained / f"{wrap.__name__}-{name}.pt")
    wanted = dict(policy.named_parameters())
    assert ours.keys() == wanted.keys()
    difference = sum((ours[key] - wanted[key]).norm() ** 2 for key in ours) ** 0.5
    moved = sum((wanted[key] - before[key]).norm() ** 2 for key in ours) ** 0.5
    # Float32's rounding of logits of some tens, over three steps.
    assert difference <= 1e-3 * moved
    assert moved > 1e-3


@pytest.mark.heavy
@pytest.mark.parametrize("name", REFERENCES)
def test_compiled_models_too(tmp_path, name):
    """What was compiled with adapters or averages is not used without them."""
    case = compiled_ddp, name
    test_steps_equal_those_of_one_process(two_processes(tmp_path, [case]), *case)


def test_what_cannot_be_sharded_is_refused(trained):
    for rank in range(2):
        assert torch.load(trained / f"said-{rank}.pt") == {
            "fsdp1 frozen_copy": (
                copies := "model is sharded by FSDP; expected the copy to be made before, and to be sharded itself"
            ),
            "fsdp2 frozen_copy": copies,
            "fsdp1 <lambda>": (
                "model is within FullyShardedDataParallel; expected fully_shard (FSDP2), or a frozen_copy"
            ),
        }
