"""The loss against eager PyTorch, Salesforce's formula and torch.compile, interleaved.

    polydpo-fast bench loss                                    # on the CPU
    python benchmarks/loss.py [--seconds S] [--json FILE]      # on a GPU, as `make gpu` does

In a round every way takes some steps in a row, in an order of its own, and the last of them count: after a copy of
256 MB, which leaves the caches full of what has yet to be written to memory, it takes about ten steps until what fits
in the caches is all there, as it is in a loop of such steps. On a GPU a step is
one replay of a CUDA graph, with nothing left in the L2 cache and again with what the last replay left there: the time
of the kernels, without Python's, and of beginning a replay, which `least` says: that of one kernel of one element. Host
time is measured apart.

Traffic: with S the bytes of one (2B, ...) tensor, a fused forward and backward must at least read the prediction, the
reference and the target and write the gradient: 4 S (8 bytes per element in bfloat16). Two launches of which the
second finds nothing in the cache move 6 S (12 bytes per element). `bytes` below is 4 S on a CPU, and on a GPU where the
three inputs fit in half of the L2 cache, since Hopper's two halves each keep what they read from the other; else 6 S;
3 S for a forward alone. What it is held against is the machine's copy bandwidth: 2 x 256 MB, more than caches hold,
copied in the same rounds; what fits in a CPU's caches may go beyond it.
Where dtypes are mixed, each tensor counts with its own.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import trainers
from timing import Measured, Times, cpu_and_wall, interleaved, row
from torch import Tensor

import polydpo_fast
from polydpo_fast.results_file import write

SHAPES = {
    "SD1.5": (8, 4, 64, 64),
    "SDXL": (8, 4, 128, 128),
    "SD3, FLUX": (4, 16, 128, 128),
    "Wan 480p": (2, 16, 21, 60, 104),
    "Wan 720p": (2, 16, 21, 90, 160),
}
STEPS, UNCOUNTED, ROUNDS = 5, 10, 20
COPIED = 2**28


class Job(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backward: bool = True
    compiled: tuple[str, ...] = ("torch.compile",)
    constants: torch.dtype | None = None  # of reference and target, where it is another than the policy's

    @property
    def dtypes(self) -> str:
        named = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.constants) if dtype is not None)
        return " and ".join(named)

    @property
    def case(self) -> str:
        return f"{self.name}, {self.dtypes}, {'forward and backward' if self.backward else 'forward'}"


def jobs(device: str) -> list[Job]:
    """What is measured, the most telling first: where time is short, the rest is left out. A case that comes a second
    time, with more compilers, takes the place of the first."""
    on_gpu, tuned = device != "cpu", ("torch.compile", "torch.compile, max-autotune")
    usual = tuned[:1] if on_gpu else tuned  # on a GPU to tune takes longer than all else of a case
    found = [Job(model, shape, torch.bfloat16, compiled=usual) for model, shape in SHAPES.items()]
    # What autocast leaves: the policy's prediction in float32, the reference's and the target as they were computed.
    found += [
        Job(model, SHAPES[model], torch.float32, compiled=usual, constants=torch.bfloat16)
        for model in ("SDXL", "Wan 480p")
    ]
    if on_gpu:
        every = (*tuned, "torch.compile, cooperative reductions")
        found += [Job(model, SHAPES[model], torch.bfloat16, compiled=every) for model in ("Wan 480p", "SDXL")]
    found += [Job(model, shape, torch.bfloat16, backward=False) for model, shape in SHAPES.items()]
    for model, numbers in {"SDXL": (1, 2, 4, 8, 16, 32), "SD1.5": (1, 8, 32), "Wan 480p": (4,)}.items():
        found += [Job(f"{model}, {n} pairs", (2 * n, *SHAPES[model][1:]), torch.bfloat16) for n in numbers]
    found += [
        Job(model, shape, dtype, compiled=usual)
        for dtype in (torch.float32, torch.float16)
        for model, shape in SHAPES.items()
    ]
    if not on_gpu:  # where what a pair costs, whatever its size, is a good part of the time
        found += [Job(f"{n} pairs of {size}", (2 * n, size), torch.bfloat16) for n, size in ((256, 1024), (1024, 256))]
    return found


COMPILED: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "torch.compile": lambda: torch.compile(trainers.eager, dynamic=False),
    # Without its own CUDA graphs: a step is captured in one here.
    "torch.compile, max-autotune": lambda: torch.compile(
        trainers.eager, dynamic=False, mode="max-autotune-no-cudagraphs"
    ),
    "torch.compile, cooperative reductions": lambda: torch.compile(
        trainers.eager, dynamic=False, options={"triton.cooperative_reductions": True}
    ),
}


def measure(job: Job, device: str, rounds: int = ROUNDS) -> tuple[list[Measured], list[dict[str, str]]]:
    """All ways and a copy of 256 MB; and the ways that failed, with their reasons."""
    tensors = drawn(job.shape, job.dtype, device, job.constants)
    torch._dynamo.reset()
    losses = {"ours": polydpo_fast.loss, "eager": trainers.eager, "Salesforce's formula": trainers.salesforce_loss}
    losses |= {name: COMPILED[name]() for name in job.compiled}

    def stepping(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            tensors[0].grad = None
            value = loss(*tensors)
            if job.backward:
                value.backward()

        return step

    ways, peaks, failed = {}, {}, []
    for name, loss in losses.items():
        step = stepping(loss)
        try:
            step()  # compiles
            peaks[name] = peak_bytes(step, tensors[0], device)
            ways[name] = step if device == "cpu" else captured(step)
        except Exception as error:
            if device == "cpu" or name not in job.compiled:
                raise
            failed.append(failure(job.case, name, error))
    source, destination = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    ways["copy"] = lambda: destination.copy_(source)
    times = interleaved(ways, rounds, STEPS, stopwatch(device), UNCOUNTED)
    facts = {
        "model": job.name,
        "shape": list(job.shape),
        "dtype": job.dtypes,
        "backward": job.backward,
        "bytes": moved(job, device),
    }
    if device != "cpu":
        facts["least"] = least(device)
    of_way = {name: {**facts, "peak_bytes": peak} for name, peak in peaks.items()}
    of_way["copy"] = {**facts, "bytes": 2 * COPIED}
    clock = "wall" if device == "cpu" else "gpu"
    return [Measured(job.case, name, times[name], name == "ours", clock, facts=of_way[name]) for name in times], failed


def failure(case: str, way: str, error: Exception) -> dict[str, str]:
    """A compiler that fails on this GPU is not to cost the figures of the others."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    print(f"{case}: {way} failed: {reason}", flush=True)
    return {"case": case, "way": way, "reason": reason}


@cache
def least(device: str) -> float:
    """Seconds of a replay of one kernel of one element, below which no way can go."""
    times = interleaved({"": captured(torch.zeros(1, device=device).zero_)}, ROUNDS, STEPS, stopwatch(device), 1)
    return statistics.median(times[""]["gpu"])


def moved(job: Job, device: str) -> int:
    """Bytes: what is read and written at least, see above."""
    own, other = job.dtype.itemsize, (job.constants or job.dtype).itemsize
    elements = math.prod(job.shape)
    inputs = elements * (own + 2 * other)
    if not job.backward:
        return inputs
    # The gradient; and prediction and target once more, where the first launch cannot have left them in the L2 cache,
    # half of which holds what is kept twice.
    again = own + other if device != "cpu" and inputs > l2_bytes(device) // 2 else 0
    return inputs + elements * (own + again)


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, constants: torch.dtype | None = None
) -> list[Tensor]:
    """Prediction, reference and target."""
    random = torch.Generator().manual_seed(0)
    pred, nudge, target = (torch.randn(shape, generator=random) for _ in range(3))
    tensors = [pred.to(device, dtype), *(x.to(device, constants or dtype) for x in (pred + 1e-2 * nudge, target))]
    tensors[0].requires_grad_()
    return tensors


def stopwatch(device: str) -> Callable[[Callable[[], object]], dict[str, float]]:
    """A function that gives the seconds that a call takes, by clock."""
    if device == "cpu":
        return cpu_and_wall
    flush = torch.zeros(2**26, device=device)

    def gpu(run: Callable[[], object]) -> dict[str, float]:
        cold, warm, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        # 256 MB are read, more than an L2 cache has: nothing of the last step is left in it, nor anything that were to
        # be written back. Four times, 1 GB, which at 5 TB/s takes 0.2 ms: in that time the host queues all that
        # follows, so that what it takes to launch is not in the times.
        for _ in range(4):
            flush.sum()
        cold.record()
        run()
        warm.record()
        run()
        end.record()
        end.synchronize()
        return {"gpu": cold.elapsed_time(warm) / 1e3, "gpu, warm L2": warm.elapsed_time(end) / 1e3}

    return gpu


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same as the replay of a CUDA graph, captured on a stream of its own: one that failed spoils no other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes that PyTorch's CPU allocator gave (positive) and took back (negative) in a call, in their order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True, profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def peak_bytes(run: Callable[[], object], pred: Tensor, device: str) -> int:
    """Most bytes that a step holds at a time beyond its inputs, its gradient included."""
    pred.grad = None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    held = peak = 0
    for change in allocations(run):
        held += change
        peak = max(peak, held)
    # A large gradient of ours lies in memory that PyTorch's allocator knows nothing of.
    if pred.grad is not None and not pred.grad.untyped_storage().resizable():
        peak += pred.grad.nbytes
    return peak


class _Nothing(torch.autograd.Function):
    """What autograd itself costs: saves three tensors, returns an empty scalar and an empty gradient."""

    @staticmethod
    def forward(ctx, pred, ref, target):
        ctx.save_for_backward(pred, ref, target)
        return pred.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None


HOST = "host time, 16 elements"


def host(device: str, calls: int = 3000) -> tuple[list[Measured], list[dict[str, str]]]:
    """Wall time of a forward and backward on 16 elements: of ours, the others, and an autograd.Function that does
    nothing; and what failed, with its reason."""
    tensors = drawn((2, 2, 2, 2), torch.float32, device)
    torch._dynamo.reset()
    losses = {"ours": polydpo_fast.loss, "an empty autograd.Function": _Nothing.apply, "eager": trainers.eager}
    losses |= {"Salesforce's formula": trainers.salesforce_loss}
    failed = []
    try:
        compiled = COMPILED["torch.compile"]()
        compiled(*tensors).backward()
        losses["torch.compile"] = compiled
    except Exception as error:
        if device == "cpu":
            raise
        failed.append(failure(HOST, "torch.compile", error))
    times: dict[str, Times] = {name: {"wall": []} for name in losses}
    for call in range(calls):
        for name, loss in losses.items():
            tensors[0].grad = None
            begin = time.perf_counter()
            loss(*tensors).backward()
            if call >= calls // 10:
                times[name]["wall"].append(time.perf_counter() - begin)
    return [Measured(HOST, name, kept, name == "ours", "wall") for name, kept in times.items()], failed


def printed(rows: list[dict], device: str) -> None:
    print(f"\nMilliseconds ({device}); times of ours")
    columns = ("", "ours", "torch.compile", "eager", "GB/s", "of a copy")
    table = [columns]
    for case in dict.fromkeys(found["case"] for found in rows):
        of = {found["way"]: found for found in rows if found["case"] == case}
        ours = of["ours"]["median"]
        if "copy" not in of:
            table.append((case, f"{1e3 * ours:.3f}", *[""] * 4))
            continue
        rate, copy = (of[way]["bytes"] / of[way]["median"] for way in ("ours", "copy"))
        peers = (of[way]["median"] if way in of else math.nan for way in ("torch.compile", "eager"))
        ratios = (f"{1e3 * t:.3f} ({t / ours:.1f}x)" for t in peers)
        table.append((case, f"{1e3 * ours:.3f}", *ratios, f"{rate / 1e9:.1f}", f"{rate / copy:.0%}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        print(first.ljust(widths[0]), *(x.rjust(n) for x, n in zip(others, widths[1:], strict=True)), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further measurement after that")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    begin = time.monotonic()
    found, skipped = host(options.device)
    cases = {HOST: [row(measured) for measured in found]}
    for job in jobs(options.device):
        if time.monotonic() - begin > options.seconds:
            known = [found["way"] for found in cases.get(job.case, ())]
            ways = [way for way in job.compiled if way not in known] if known else [""]
            reason = f"no time was left of {options.seconds:.0f} s"
            skipped += [{"case": job.case, "way": way, "reason": reason} for way in ways]
        else:
            print(job.case, flush=True)
            found, failed = measure(job, options.device)
            cases[job.case] = [row(measured) for measured in found]
            skipped += [one for one in failed if one not in skipped]
        rows = [found for of_case in cases.values() for found in of_case]
        if options.json:  # what was measured is kept if the process is stopped
            write(options.json, {"rows": rows, "skipped": skipped})
    printed(rows, options.device)
    for case, way, reason in (one.values() for one in skipped):
        print(f"not measured: {case}{way and ', '}{way}: {reason}")


if __name__ == "__main__":
    main()
