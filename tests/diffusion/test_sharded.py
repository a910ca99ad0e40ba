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
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from polydpo_fast.diffusion import PairObjective, adapters_off, ema_weights, frozen_copy
from polydpo_fast.diffusion.checkpoints import WholeAverages
from polydpo_fast.diffusion.sharding import sums_in_float32

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
    if name == "errors":
        return None
    ema = EMAModel(policy.parameters())
    with torch.no_grad():
        for weight in ema.shadow_params:
            weight.mul_(0.9)
    return lambda model: ema_weights(model, ema)


def steps(policy, reference, pairs, model):
    """Of these pairs, the first arms of the batch being the winners'. Without a reference, by the model's errors."""
    _, latents, conditioning, scheduler = build("sd15")
    rows = torch.tensor([*pairs, *(pair + PAIRS for pair in pairs)])
    text = conditioning["encoder_hidden_states"][list(pairs)]
    objective = PairObjective(scheduler, reference=reference, beta=500.0)
    ahead = PairObjective(scheduler, reference=model)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        seeds = [10 * step + pair for pair in pairs]
        given = latents[rows], {"encoder_hidden_states": text}
        errors = ahead.reference_errors(None, *given, seeds=seeds) if reference is None else None
        loss, _ = objective(policy, *given, seeds=seeds, ref_error=errors)
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


REFERENCES = ("frozen_copy", "adapters_off", "errors", "ema_weights")
CASES = [
    *((ddp, name) for name in REFERENCES),
    *((fsdp1, name) for name in REFERENCES[:3]),
    *((fsdp2, name) for name in REFERENCES),
]


def averages():
    """Of a sharded model: their state for a checkpoint, and what is there when twice as much was loaded."""
    ema = EMAModel(fsdp2(start("")[0]).parameters(), foreach=True)
    state = WholeAverages(ema).state_dict()
    twice = {**state, "shadow_params": [2 * average for average in state["shadow_params"]], "optimization_step": 7}
    WholeAverages(ema).load_state_dict(twice)
    return state["shadow_params"], [average.full_tensor() for average in ema.shadow_params], ema.optimization_step


def half_precision():
    """The gradient of 512 forwards, each of which adds 1, and a timestep as the model gets it."""

    class Sum(torch.nn.Linear):
        def forward(self, x, timestep):
            self.timestep = timestep
            return super().forward(x.to(self.weight.dtype))

    accelerates = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    model = fully_shard(
        Sum(2, 2, bias=False), mesh=init_device_mesh("cpu", (2,)), mp_policy=sums_in_float32(accelerates)
    )
    for number in range(512):
        model.set_requires_gradient_sync(number == 511)
        model(torch.ones(1, 2), timestep=torch.tensor(999.4)).sum().backward()
    return model.weight.grad.full_tensor(), model.timestep


def work(rank, port, folder, cases):
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for wrap, name in cases:
        policy, model = start(name)
        policy = wrap(policy)
        steps(policy, reference_of(name, policy, model), [rank], model)
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
    torch.save(averages(), folder / f"averages-{rank}.pt")
    torch.save(half_precision(), folder / f"half-{rank}.pt")
    dist.barrier()
    # All that was asked for is written. Once in some dozens of runs a thread of Gloo's was still there while its group
    # was destroyed, and C++ ended the process: "terminate called without an active exception".
    os._exit(0)


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
    steps(policy, reference_of(name, policy, model), range(PAIRS), model)
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


def test_averages_are_whole_in_checkpoints(trained):
    """So that one process may go on from what two have written."""
    wanted = [weight.detach() for weight in start("")[0].parameters()]
    for rank in range(2):
        saved, loaded, step = torch.load(trained / f"averages-{rank}.pt")
        assert [type(average) for average in saved] == [torch.Tensor] * len(wanted)
        assert all(map(torch.equal, saved, wanted))
        assert all(torch.equal(average, 2 * weight) for average, weight in zip(loaded, wanted, strict=True))
        assert step == 7


def test_gradients_are_summed_in_float32(trained):
    """In bfloat16 256 and 1 are 256, and 999.4 is 1000."""
    for rank in range(2):
        gradient, timestep = torch.load(trained / f"half-{rank}.pt")
        assert torch.equal(gradient, torch.full((2, 2), 512.0))
        assert torch.equal(timestep, torch.tensor(999.4))
