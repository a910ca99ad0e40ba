"""Processes: killed ones that go on, and several that share the pairs."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from data.loading import TINY, expected
from data.pairs import FORMS, Tiny, fill_folder, which

from polydpo_fast.data import PairLoader, open_source, read_ledger

fork = multiprocessing.get_context("fork")


def train(source, log, ledger, batch):
    """What a training script does: go on where the log ends, and write down each step."""
    loader = PairLoader(source, batch, seed=11, ledger=ledger, max_bad_rate=1.0, **TINY)
    lines = read_lines(log)
    if lines:
        loader.load_state_dict(lines[-1]["state"])
    with open(log, "ab", buffering=0) as file:
        if lines and not log.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # a line that was cut off
        while loader.epoch < 2:
            for pairs in loader:
                line = {
                    "index": pairs.index.tolist(),
                    "pixels": which(pairs.pixels)[0][:batch],
                    "state": loader.state_dict(),
                }
                file.write(json.dumps(line).encode() + b"\n")
                time.sleep(0.003)  # so that it is not at its end before the last kill


def read_lines(log):
    lines = []
    if log.exists():
        for line in log.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.heavy)])
def test_killed_at_any_moment_nothing_is_lost_or_comes_twice(tmp_path, kills):
    size, chance = 150 * kills, random.Random(kills)
    bad = {i: chance.choice(["read", "win", "lose"]) for i in chance.sample(range(size), size // 100)}
    source, log = Tiny(size, bad), tmp_path / "log"
    done = killed = 0
    while True:
        process = fork.Process(target=train, args=(source, log, tmp_path / "ledger", 4))
        process.start()
        if killed < kills:
            # Not before it went on, so that it ends some day.
            while process.is_alive() and len(read_lines(log)) <= done:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.1)
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        done = len(read_lines(log))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    lines = read_lines(log)
    want = [i for epoch in (0, 1) for i in expected(size, 11, epoch, bad, group=4)]
    assert [i for line in lines for i in line["index"]] == want
    assert [i for line in lines for i in line["pixels"]] == want
    assert killed == kills
    assert {line["index"] for line in read_ledger(tmp_path / "ledger")} == set(bad)


def follow(folder):
    """A rank of a training that torchrun has started."""
    torch.distributed.init_process_group("gloo")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(PairLoader(Tiny(100, {5: "read", 50: "win"}), 4, seed=3, last="pad", **TINY))
    accelerator.register_for_checkpointing(loader)
    got = []
    for number, batch in enumerate(loader):
        got.append(batch.index.tolist())
        total = batch.ok.sum()
        torch.distributed.all_reduce(total)  # hangs if a rank has fewer steps
        if number == 2:
            accelerator.save_state(str(folder / "state"))
            break
    accelerator.wait_for_everyone()  # one of them writes
    accelerator.load_state(str(folder / "state"))
    for batch in loader:
        got.append(batch.index.tolist())
        torch.distributed.all_reduce(batch.ok.sum())
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(got))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_under_torchrun_share_the_pairs(tmp_path, world):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    got = [i for step in zip(*parts, strict=True) for part in step for i in part]
    assert got == expected(100, 3, 0, {5, 50}, "pad", 4 * world)


@pytest.mark.heavy
@pytest.mark.parametrize("form", [None, *FORMS])
def test_twenty_epochs_leave_nothing_behind(tmp_path, form):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    source = Tiny(2000, {7: "win", 8: "read"})
    if form is not None:
        fill_folder(tmp_path, range(2000))
        source = open_source(tmp_path / form)
    loader = PairLoader(source, 8, **{**TINY, "size": 64})
    before = threading.active_count()
    seen = []
    for _ in range(22):
        for batch in loader:
            assert len(batch) == 8
        seen.append((resident(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    memory, descriptors, threads = zip(*seen[2:], strict=True)
    assert len(set(descriptors)) == 1
    assert set(threads) == {before}
    assert max(memory) - memory[0] < 16 << 20  # 22 epochs of 2,000 pairs: a leak of 400 bytes per pair shows


if __name__ == "__main__":
    follow(Path(sys.argv[1]))
