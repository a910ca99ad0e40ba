"""How the cost grows: of the loss with the size of a sample and the number of pairs, of decoding with pixels, threads
and batch, of loading with the size of the source and the number of ranks.

Every case has the same two facts: `curve`, and `at`, where on it.
"""

import functools
import io
import json
import statistics
import subprocess
import sys

import loss
import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import encoded, photograph
from timing import Measured, interleaved, report

import polydpo_fast

ELEMENTS = [10**n for n in range(3, 9)]
PAIRS = [1, 2, 4, 8, 16, 32, 64]


def stepping(tensors):
    def step():
        tensors[0].grad = None
        polydpo_fast.loss(*tensors).backward()

    return step


def loss_of(curve, at, shape):
    """Forward and backward in bfloat16, and a copy of the same number of bytes."""
    tensors = loss.drawn(shape, torch.bfloat16, "cpu")
    moved = 4 * 2 * tensors[0].numel()
    source = torch.ones(moved // 2, dtype=torch.uint8)
    destination = torch.empty_like(source)
    ways = {"ours": stepping(tensors), "copy": lambda: destination.copy_(source)}
    times = interleaved(ways, rounds=5, calls=5, uncounted=10)
    facts = {"curve": curve, "at": at, "bytes": moved}
    return {way: Measured(f"{curve} {at}", way, times[way], way == "ours", "wall", facts=facts) for way in ways}


@functools.cache
def loss_by_elements(elements):
    return loss_of("loss, one pair, elements per sample", elements, (2, elements))


@functools.cache
def loss_by_pairs(pairs):
    return loss_of("loss, 65,536 elements per sample, pairs", pairs, (2 * pairs, 4, 128, 128))


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("way", ["ours", "copy"])
def test_loss_by_elements(benchmark, elements, way):
    report(benchmark, loss_by_elements(elements)[way])


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("way", ["ours", "copy"])
def test_loss_by_pairs(benchmark, pairs, way):
    report(benchmark, loss_by_pairs(pairs)[way])


def decoding(data, pairs, threads):
    side = Image.open(io.BytesIO(data)).width
    arm, out = [data] * pairs, torch.empty((2 * pairs, 3, side, side), dtype=torch.bfloat16)
    return lambda: polydpo_fast.decode_pairs(arm, arm, size=side, out=out, threads=threads)


@functools.cache
def decoded():
    """All curves of decoding in the same rounds, by curve and place."""
    pictures = {side: encoded(photograph(side)) for side in (128, 256, 512, 1024, 2048, 4096)}
    places = {
        **{("decoding, one thread, side of the image", side): (pictures[side], 1, 1) for side in pictures},
        **{("decoding, 8 pairs of 1024 x 1024, threads", n): (pictures[1024], 8, n) for n in (1, 2, 4, 8)},
        **{("decoding, two threads, pairs of 1024 x 1024", n): (pictures[1024], n, 2) for n in (1, 2, 4, 8, 16)},
    }
    times = interleaved({place: decoding(*what) for place, what in places.items()}, rounds=7, calls=2, uncounted=1)
    found = {}
    for (curve, at), (data, pairs, _) in places.items():
        facts = {"curve": curve, "at": at, "encoded_bytes": len(data)}
        measured = Measured(f"{curve} {at}", "ours", times[curve, at], True, "wall", 2 * pairs, facts)
        found[curve, at] = measured
    return found


@pytest.mark.parametrize("side", [128, 256, 512, 1024, 2048, 4096])
def test_decoding_by_pixels(benchmark, side):
    report(benchmark, decoded()["decoding, one thread, side of the image", side])


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_decoding_by_threads(benchmark, threads):
    report(benchmark, decoded()["decoding, 8 pairs of 1024 x 1024, threads", threads])


@pytest.mark.parametrize("pairs", [1, 2, 4, 8, 16])
def test_decoding_by_pairs(benchmark, pairs):
    report(benchmark, decoded()["decoding, two threads, pairs of 1024 x 1024", pairs])


LOADING = """
import json, resource, sys, time
import torch
from polydpo_fast.data import PairLoader
path, world, batches = sys.argv[1], int(sys.argv[2]), 40
def used():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
cpu, wall = used(), time.perf_counter()
loader = PairLoader(path, 8, size=8, dtype=torch.uint8, threads=1, rank=world // 2, world_size=world)
iterator = iter(loader)
next(iterator)
first = used() - cpu, time.perf_counter() - wall
cpu, wall, count = used(), time.perf_counter(), 0
for _ in zip(range(batches), iterator):
    count += 8
print(json.dumps([*first, (used() - cpu) / count, (time.perf_counter() - wall) / count]))
"""


def manifest(folder, pairs):
    with open(folder / "square.png", "wb") as file:
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(file, "PNG")
    path = folder / "pairs.jsonl"
    line = json.dumps({"win": "square.png", "lose": "square.png", "prompt": "a square"}) + "\n"
    path.write_text(line * pairs)
    return path


def loaded(path, curve, at, world, folder):
    """In fresh processes, with the index in its cache: to the first batch, and per pair of the batches that follow."""
    command = [sys.executable, "-c", LOADING, str(path), str(world)]
    environment = {"POLYDPO_FAST_CACHE": str(folder / "cache"), "PYTHONPATH": ":".join(sys.path)}
    runs = []
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        runs.append(json.loads(done.stdout))
    cpu, wall, pair_cpu, pair_wall = (list(values) for values in zip(*runs[1:], strict=True))
    facts = {"curve": curve, "at": at, "seconds per pair": statistics.median(pair_cpu)}
    facts["wall seconds per pair"] = statistics.median(pair_wall)
    return Measured(f"{curve} {at}", "ours", {"wall": wall, "cpu": cpu}, True, "wall", facts=facts)


@pytest.mark.parametrize("pairs", [10**3, 10**4, 10**5, 10**6])
def test_loading_by_pairs(benchmark, tmp_path, pairs):
    curve = "loader, first batch, pairs in the source"
    report(benchmark, loaded(manifest(tmp_path, pairs), curve, pairs, 1, tmp_path))


@pytest.mark.parametrize("world", [1, 4, 16, 64, 256])
def test_loading_by_ranks(benchmark, tmp_path, world):
    curve = "loader, first batch of 100,000 pairs, ranks"
    report(benchmark, loaded(manifest(tmp_path, 10**5), curve, world, world, tmp_path))
