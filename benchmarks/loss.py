"""Forward and backward of the loss against eager PyTorch and torch.compile, interleaved: `make bench-loss`.

    python benchmarks/loss.py [--device cpu|cuda] [--rounds N] [--json FILE]

In a round every way takes a few steps in a row, the first of them unmeasured, and the order changes: what a way finds
in the caches and in the allocator is its own, as in a training loop, not what the one before left. On a GPU a step is
one replay of a CUDA graph, with nothing left in the L2 cache: the time of the kernels, without Python's. Host time is
measured apart.

Traffic: with S the bytes of one (2B, ...) tensor, a fused forward and backward must at least read the prediction, the
reference and the target and write the gradient: 4 S (8 bytes per element in bfloat16). Two passes that find nothing in
the cache move 6 S (12 bytes per element), which is what the GPU kernels do. GB/s below counts 4 S on a CPU and 6 S on a
GPU; its share is that of the machine's copy bandwidth: 2 x 256 MB, more than caches hold, copied in the same rounds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trainers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import polydpo_fast

SHAPES = {
    "SD1.5": (8, 4, 64, 64),
    "SDXL": (8, 4, 128, 128),
    "FLUX": (4, 16, 128, 128),
    "Wan 480p": (2, 16, 21, 60, 104),
    "Wan 720p": (2, 16, 21, 90, 160),
}


STEPS = 5
COPIED = 2**28


def step(loss: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    tensors[0].grad = None
    loss(*tensors).backward()


def stopwatch(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that gives the seconds that a call takes."""
    if device == "cpu":

        def seconds(run: Callable[[], object]) -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return seconds

    flushed = torch.empty(2**28, dtype=torch.uint8, device=device)

    def gpu_seconds(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()  # nothing of the last step is left in the L2 cache
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return gpu_seconds


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each way, and of a copy of 256 MB, over interleaved rounds."""
    random = torch.Generator().manual_seed(0)
    pred, nudge, target = (torch.randn(shape, generator=random) for _ in range(3))
    tensors = [x.to(device, dtype) for x in (pred, pred + 1e-2 * nudge, target)]
    tensors[0].requires_grad_()
    source, destination = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(trainers.eager, dynamic=False)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: step(polydpo_fast.loss, tensors),
        "torch.compile": lambda: step(compiled, tensors),
        "eager": lambda: step(trainers.eager, tensors),
    }
    if device != "cpu":
        ways = {name: captured(way) for name, way in ways.items()}
    ways["copy"] = lambda: destination.copy_(source)
    seconds = stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        order = list(ways.items())
        for name, way in order[round_ % len(ways) :] + order[: round_ % len(ways)]:
            block = [seconds(way) for _ in range(2 if name == "copy" else STEPS + 1)]
            if round_ > 0:
                times[name] += block[1:]
    return {name: statistics.median(values) for name, values in times.items()}


class _Nothing(torch.autograd.Function):
    """What autograd itself costs: saves three tensors, returns an empty scalar and an empty gradient."""

    @staticmethod
    def forward(ctx, pred, ref, target):
        ctx.save_for_backward(pred, ref, target)
        return pred.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None, None


def host_microseconds(device: str, calls: int = 3000) -> tuple[float, float]:
    """Wall time of a forward and backward on 16 elements: ours, and of an autograd.Function that does nothing."""
    tensors = [torch.randn(2, 4, 2, 2, device=device) for _ in range(3)]
    tensors[0].requires_grad_()
    times: list[list[float]] = [[], []]
    for call in range(calls):
        for loss, kept in zip((polydpo_fast.loss, _Nothing.apply), times, strict=True):
            begin = time.perf_counter()
            step(loss, tensors)
            if call >= calls // 10:
                kept.append(time.perf_counter() - begin)
    ours, nothing = (1e6 * statistics.median(kept) for kept in times)
    return ours, nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the medians, with hardware and versions, to this file")
    options = parser.parse_args()
    passes = 4 if options.device == "cpu" else 6

    table = Table(title=f"Forward + backward, milliseconds ({options.device})", title_justify="left")
    for column in ("model", "shape", "dtype", "ours", "torch.compile", "eager", "GB/s", "of a copy"):
        table.add_column(column, justify="left" if column in ("model", "shape", "dtype") else "right")
    rows = []
    jobs = [(name, shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.bfloat16, torch.float32)]
    for name, shape, dtype in track(jobs, description="measuring"):
        times = measure(shape, dtype, options.device, options.rounds)
        size = torch.Size(shape).numel() * dtype.itemsize
        rows.append({"model": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "seconds": times})
        table.add_row(
            name,
            "x".join(map(str, shape)),
            rows[-1]["dtype"],
            f"{1e3 * times['ours']:.3f}",
            *(f"{1e3 * times[k]:.3f} ({times[k] / times['ours']:.1f}x)" for k in ("torch.compile", "eager")),
            f"{passes * size / times['ours'] / 1e9:.1f}",
            f"{passes * size / times['ours'] / (2 * COPIED / times['copy']):.0%}",
        )
    Console(width=130).print(table)
    ours, nothing = host_microseconds(options.device)
    print(f"host: {ours:.0f} us a forward and backward of 16 elements; of an empty autograd.Function: {nothing:.0f} us")
    if options.json:
        machine = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor() or "cpu"
        head = {"device": options.device, "machine": machine, "threads": torch.get_num_threads()}
        versions = {"torch": torch.__version__, "polydpo-fast": polydpo_fast.__version__}
        options.json.write_text(json.dumps({**head, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
