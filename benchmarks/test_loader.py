"""PairLoader on 1024px JPEG pairs in the page cache, beside decoding alone and other loaders: part of `make bench`.

Pairs per second, and per second of CPU time, in interleaved rounds (but for what forks), with one thread that decodes.
The bound is `decode_pairs` on bytes that are in memory already. Diffusers' DPO script: rows of the Parquet file as
`datasets` gives them, Pillow, ToTensor and Normalize, in float32, a DataLoader with two workers, whose CPU time is
counted too. WebDataset and MosaicML's streaming read shards of their own kinds, one after the other, and decode by
Pillow; torch finishes with care, in bfloat16, into memory that is there. streaming imports torchvision for datasets
that are not used here; where that is missing, empty names stand in for it while streaming is imported. Then how long a
source of a million pairs takes to its first batch.
"""

import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finishing import as_the_scripts, finish
from PIL import Image
from test_decode import photograph
from timing import Measured, interleaved, report

import polydpo_fast
from polydpo_fast.data import PairLoader, open_source

# WebDataset and streaming leave files for the garbage collector to close.
# Pillow's bytes are not copied once more only to be writable.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:The given NumPy array is not writable:UserWarning",
)

PAIRS = 96  # of an epoch, whose first batch waits for everything
BATCH = 4
ROUNDS = 9
MILLION = 1_000_000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same pairs as Parquet in Pick-a-Pic's columns and as a WebDataset shard, and the index of both, built."""
    folder = tmp_path_factory.mktemp("pairs")
    os.environ["POLYDPO_FAST_CACHE"] = str(folder / "cache")
    picture = photograph(1024)
    images = []
    for number in range(16):
        file = io.BytesIO()
        Image.fromarray(np.roll(np.asarray(picture), 61 * number, axis=(0, 1))).save(file, "JPEG", quality=92)
        images.append(file.getvalue())
    rows = [
        {
            "jpg_0": images[i % 16],
            "jpg_1": images[(i + 5) % 16],
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "caption": f"a picture {i}",
            "has_label": True,
        }
        for i in range(PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=16)
    with tarfile.open(folder / "pairs.tar", "w") as shard:
        for i, row in enumerate(rows):
            win, lose = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
            for name, data in (
                (f"{i:06}.win.jpg", row[win]),
                (f"{i:06}.lose.jpg", row[lose]),
                (f"{i:06}.txt", row["caption"].encode()),
            ):
                facts = tarfile.TarInfo(name)
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
    for name in ("pairs.parquet", "pairs.tar"):
        open_source(folder / name)
    return folder


def decoding_alone(files):
    source = open_source(files / "pairs.tar")
    pairs = [source[i] for i in range(PAIRS)]
    out = torch.zeros((2 * BATCH, 3, 1024, 1024), dtype=torch.bfloat16)

    def run():
        for i in range(0, PAIRS, BATCH):
            part = pairs[i : i + BATCH]
            polydpo_fast.decode_pairs([p.win for p in part], [p.lose for p in part], out=out, threads=1)

    return run


def loading(files, name):
    loader = PairLoader(files / name, BATCH, size=1024, threads=1)
    assert len(loader) == PAIRS // BATCH

    def run():
        for batch in loader:
            assert len(batch) == BATCH

    return run


class ScriptsRows(torch.utils.data.Dataset):
    """Diffusers' DPO script's pipeline, as one can see it do: two images of a row, each transformed, stacked."""

    def __init__(self, path):
        self.rows = pq.read_table(path).to_pylist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        names = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        images = (Image.open(io.BytesIO(row[name])).convert("RGB") for name in names)
        return torch.cat([as_the_scripts(np.array(image)) for image in images]), row["caption"]


def the_scripts_pipeline(files):
    rows = ScriptsRows(files / "pairs.parquet")

    def run():
        loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, num_workers=2)
        for pixels, _ in loader:
            assert torch.cat(pixels.chunk(2, dim=1)).shape == (2 * BATCH, 3, 1024, 1024)

    return run


def finisher():
    """A function that makes a batch of as many pairs of Pillow's images."""
    out = torch.zeros((2 * BATCH, 3, 1024, 1024), dtype=torch.bfloat16)

    def run(pairs):
        for number, pair in enumerate(pairs):
            for to, image in zip(out[number::BATCH], pair, strict=True):
                finish(np.asarray(image), to)  # RGB as it is

    return run


def webdataset_and_torch(files):
    """The shard through WebDataset's own pipeline, to the same tensors."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    make = finisher()

    def run():
        rows = webdataset.WebDataset(str(files / "pairs.tar"), shardshuffle=False, empty_check=False).decode("pil")
        for pairs in rows.to_tuple("win.jpg", "lose.jpg").batched(BATCH, collation_fn=None):
            make(pairs)

    return run


def streaming_and_torch(files):
    """The same images in a shard of MosaicML's streaming, as bytes, through its dataset to the same tensors."""
    streaming = import_streaming()
    folder = str(files / "mds")
    source = open_source(files / "pairs.tar")
    with streaming.MDSWriter(out=folder, columns={"win": "bytes", "lose": "bytes", "prompt": "str"}) as shard:
        for pair in map(source.__getitem__, range(PAIRS)):
            shard.write({"win": bytes(pair.win), "lose": bytes(pair.lose), "prompt": pair.prompt})
    rows, make = streaming.StreamingDataset(local=folder, batch_size=BATCH), finisher()

    def run():
        batch = []
        for row in rows:
            batch.append([Image.open(io.BytesIO(row[arm])) for arm in ("win", "lose")])
            if len(batch) == BATCH:
                make(batch)
                batch.clear()

    return run


def import_streaming():
    pytest.importorskip("transformers")  # first, so that it does not take the stand-in for torchvision
    stand_in = {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name, content in stand_in.items():
                patch.setitem(sys.modules, name, types.ModuleType(name))
                sys.modules[name].__dict__.update(content)
        return pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")


WAYS = {
    "decoding_alone": decoding_alone,
    "ours_parquet": lambda files: loading(files, "pairs.parquet"),
    "ours_tar": lambda files: loading(files, "pairs.tar"),
    "the_scripts_pipeline": the_scripts_pipeline,
    "webdataset_and_torch": webdataset_and_torch,
    "streaming_and_torch": streaming_and_torch,
}
OURS = ("decoding_alone", "ours_parquet", "ours_tar")


def stopwatch(run):
    """CPU seconds of this process, its threads, and its children that have ended; and those of the wall."""

    def used():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    cpu, wall = used(), time.perf_counter()
    run()
    return {"cpu": used() - cpu, "wall": time.perf_counter() - wall}


@pytest.fixture(scope="module")
def measured(files):
    torch.set_num_threads(1)
    ways, missing = {}, {}
    for name, way in WAYS.items():
        try:
            ways[name] = way(files)
        except pytest.skip.Exception as reason:
            missing[name] = str(reason)
    # Last what forks: the memory that it shares for a moment costs others a page fault per page when they write next.
    forks = {name: ways.pop(name) for name in ("the_scripts_pipeline",)}
    times = interleaved(ways, ROUNDS, stopwatch=stopwatch) | interleaved(forks, ROUNDS, stopwatch=stopwatch)
    return {
        name: Measured("1024px JPEG pairs", name, found, name in OURS, per=PAIRS) for name, found in times.items()
    } | missing


@pytest.mark.parametrize("way", WAYS)
def test_loading(benchmark, measured, way):
    if isinstance(measured[way], str):
        pytest.skip(measured[way])
    report(benchmark, measured[way])


FIRST_BATCH = """
import json, resource, sys, time
import torch
from polydpo_fast.data import PairLoader
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
memory, began = resident(), time.perf_counter()
loader = PairLoader(sys.argv[1], 8, size=8, dtype=torch.uint8, threads=1)
opened = time.perf_counter() - began
index = resident() - memory
one = iter(loader)
next(one)
first = time.perf_counter() - began
state = loader.state_dict() | {"position": 500_000}
del one
began = time.perf_counter()
loader.load_state_dict(state)
next(iter(loader))
print(json.dumps([opened, first, time.perf_counter() - began, index / len(loader.source)]))
"""


def million(folder, kind):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(picture, "PNG")
    data = picture.getvalue()
    if kind == "parquet":
        part = 50_000
        table = pa.table(
            {
                "jpg_0": pa.array([data] * part, pa.binary()),
                "jpg_1": pa.array([data] * part, pa.binary()),
                "label_0": pa.array(np.arange(part) % 2, pa.float64()),
                "label_1": pa.array((np.arange(part) + 1) % 2, pa.float64()),
                "caption": pa.array(["a square"] * part),
            }
        )
        for number in range(MILLION // part):
            pq.write_table(table, folder / f"{number:03}.parquet", row_group_size=1000, use_dictionary=False)
        return folder
    if kind == "tar":
        for number in range(20):
            with tarfile.open(folder / f"{number:03}.tar", "w") as shard:
                for pair in range(MILLION // 20):
                    for arm in ("win", "lose"):
                        facts = tarfile.TarInfo(f"{pair:05}.{arm}.png")
                        facts.size = len(data)
                        shard.addfile(facts, io.BytesIO(data))
        return folder
    path = folder / "pairs.jsonl"
    (folder / "square.png").write_bytes(data)
    with open(path, "w") as file:
        for number in range(MILLION):
            file.write(json.dumps({"win": "square.png", "lose": "square.png", "prompt": f"square {number}"}) + "\n")
    return path


@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
def test_a_million_pairs(benchmark, tmp_path, kind):
    """Seconds to the first batch with the index in its cache, and to one in the middle of the epoch after resuming."""
    where = million(tmp_path, kind)
    environment = {**os.environ, "POLYDPO_FAST_CACHE": str(tmp_path / "cache")}

    def run():
        out = subprocess.run(
            [sys.executable, "-c", FIRST_BATCH, str(where)], capture_output=True, text=True, check=True, env=environment
        )
        return json.loads(out.stdout)

    began = time.perf_counter()
    run()
    built = time.perf_counter() - began
    opened, first, resumed, index = zip(*(run() for _ in range(3)), strict=True)
    facts = {
        "seconds to build the index": built,
        "seconds to open": statistics.median(opened),
        "seconds to resume": statistics.median(resumed),
        "bytes of memory per pair": statistics.median(index),
    }
    report(benchmark, Measured(f"a million pairs, {kind}", "ours", {"wall": list(first)}, True, "wall", facts=facts))
