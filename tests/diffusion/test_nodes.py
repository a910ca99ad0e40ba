"""Processes on several nodes: what they must have in common, and what they are told where they have not."""

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusion.runs import lines, settings, weights, write_prompts
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.data.ledger import read_ledger
from polydpo_fast.diffusion import together
from polydpo_fast.diffusion.settings_file import write_settings
from polydpo_fast.diffusion.train import train

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture
def in_three(monkeypatch):
    """Calls a function in three threads, that stand for processes, with an accelerator and the number of each.

    Returns what each returned or raised.
    """
    local, barrier, told = threading.local(), threading.Barrier(3, timeout=10), {}

    def gather_object(mine):
        told[local.number] = mine[0]
        barrier.wait()
        every = [told[number] for number in range(3)]
        barrier.wait()
        return every

    monkeypatch.setattr(accelerate.utils, "gather_object", gather_object)

    def called(function):
        def process(number):
            local.number = number
            try:
                return function(SimpleNamespace(num_processes=3, is_main_process=number == 0), number)
            except Exception as error:
                return error

        with ThreadPoolExecutor(3) as threads:
            return list(threads.map(process, range(3)))

    return called


def test_what_one_process_cannot_do_ends_all(in_three):
    def work(accelerator, number):
        with together.together(accelerator):
            if number == 1:
                raise FileNotFoundError("/data: there is no such folder")
        return "went on"

    first, second, third = in_three(work)
    assert isinstance(second, FileNotFoundError)
    assert str(first) == str(third)
    assert str(first).startswith("process 1 of 3, on ")
    assert str(first).endswith(": /data: there is no such folder")
    assert isinstance(first, ValueError)


def test_what_all_can_do_is_done(in_three):
    def work(accelerator, number):
        with together.together(accelerator):
            pass
        together.check_same(accelerator, {"steps": 3, "size": (1, 2)})
        return number

    assert in_three(work) == [0, 1, 2]


def test_a_fact_that_differs_is_told_by_all(in_three):
    found = in_three(lambda accelerator, number: together.check_same(accelerator, {"a": 1, "steps": 5 + number // 2}))
    assert {str(error) for error in found} == {
        "steps is 5 in process 0 and 6 in process 2; expected the same on all nodes"
    }
    assert all(isinstance(error, ValueError) for error in found)


def test_a_folder_that_is_not_shared_is_told_by_all(in_three, tmp_path):
    for folders, fine in (("aaa", True), ("aab", False)):
        found = in_three(
            lambda accelerator, number, folders=folders: together.check_shared(
                accelerator, "output", tmp_path / folders[number] / "run"
            )
        )
        if fine:
            assert found == [None] * 3
        else:
            assert all("does not see what process 0 writes" in str(error) for error in found)
            assert "where process 2 does" in str(found[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def words(here, folder, command, **change):
    """Of a command, with small work to do."""
    write_settings(settings(here, folder / "run", latents="mode", **change), folder / "run.yaml")
    if command == "geneval":
        prompts = write_prompts(folder / "prompts.jsonl", "a dog", "a cat")
        return ["geneval", str(here / "pipeline"), prompts, str(folder / "out"), "--samples", "1", "--steps", "1"]
    out = [] if command == "train" else [str(folder / "out")]
    return [command, *out, "--config", str(folder / "run.yaml")]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "train",
            [
                *("mixed_precision", "batch_size", "accumulation", "steps", "seed", "loader", "vae", "model"),
                *("model's scheduler", "data"),
            ],
        ),
        ("cache", ["batch_size", "vae", "decoding", "seed", "--store", "--shard-pairs", "data"]),
        ("reference", ["prompt_dropout", "vae", "model", "model's scheduler", "--draws", "--shard-pairs", "data"]),
        ("geneval", ["prompts", "samples", "seed", "size", "guidance", "vae", "weights"]),
    ],
)
def test_commands_compare_what_their_processes_work_with(here, tmp_path, monkeypatch, command, names):
    compared = set()

    def differs(accelerator, value):
        if not isinstance(value, dict):
            return [value]
        compared.update(value)
        return [value, {**value, names[-1]: "another"} if names[-1] in value else value]

    monkeypatch.setattr(together, "of_all", differs)
    result = CliRunner().invoke(app, words(here, tmp_path, command))
    assert compared >= set(names)
    assert result.exit_code == 2, result.output
    message = f"{names[-1]} is .* in process 0 and 'another' in process 1; expected the same on all nodes"
    assert re.search(message, result.output), result.output
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("change", [{"guidance": 3.0}, {"size_conditioning": "own"}, {"size": 19}])
def test_what_does_not_fit_the_model_of_one_node_is_told_to_all(here, tmp_path, monkeypatch, change):
    """Where another node has another model, which it may fit."""
    told = []
    monkeypatch.setattr(together, "of_all", lambda accelerator, value: told.append(value) or [value])
    with pytest.raises(ValueError, match=r"guidance is 3\.0|size_conditioning is 'own'|size is") as caught:
        train(settings(here, tmp_path / "run", **change))
    assert told[-1] is not None
    assert str(caught.value) in told[-1]


@pytest.mark.parametrize("command", ["train", "cache", "reference", "geneval"])
def test_commands_refuse_folders_that_are_not_shared(here, tmp_path, monkeypatch, command):
    def unseen(accelerator, value):
        return [True, False] if value is True else [value]

    monkeypatch.setattr(together, "of_all", unseen)
    result = CliRunner().invoke(app, words(here, tmp_path, command, checkpoint_every=1))
    assert result.exit_code == 2, result.output
    name, folder = ("output", "run") if command == "train" else ("out", "out")
    assert f"{name} is '{tmp_path / folder}', where process 1 does not see what process 0 writes" in result.output


def two_nodes(runs, folders, port):
    """Two launchers, each with settings, a working folder and a process of its own, on CPUs.

    Returns the exit status of each, and what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    nodes = []
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        write_settings(run, folder / "node.yaml")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        launch += ["--machine_rank", str(number), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        launch += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["-m", "polydpo_fast", "train", "--config", str(folder / "node.yaml")]
        with open(folder / "said", "w") as said:
            nodes.append(subprocess.Popen(launch, cwd=folder, env=environment, stdout=said, stderr=said))
    try:
        return [(node.wait(120), (folder / "said").read_text()) for node, folder in zip(nodes, folders, strict=True)]
    finally:
        for node in nodes:
            node.terminate()  # and with it its processes, which outlive a launcher that is killed


@pytest.mark.parametrize("command", ["cache", "reference"])
def test_nothing_is_written_to_a_store_that_is_complete(here, tmp_path, monkeypatch, command):
    """On nodes that may only read it."""
    assert CliRunner().invoke(app, words(here, tmp_path, command)).exit_code == 0

    def written(*arguments, **options):
        raise OSError("Read-only file system")

    monkeypatch.setattr(Path, "touch", written)
    monkeypatch.setattr(together, "of_all", lambda accelerator, value: [value, value])
    result = CliRunner().invoke(app, words(here, tmp_path, command))
    assert result.exit_code == 0, result.output


@pytest.mark.heavy
def test_two_nodes_equal_one_process(here, tmp_path, unused_tcp_port):
    """With data in other places, bad pairs and a shared ledger; stopped, and resumed by one process."""
    rows = pq.read_table(here / "pairs.parquet").to_pylist()
    for row in (2, 7, 11):
        rows[row]["jpg_1"] = b"none"
    nodes = [tmp_path / name for name in ("one", "two")]
    for node in nodes:
        node.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), node / "bad.parquet")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    change = dict(beta=500.0, adam_epsilon=1e-3, accumulation=2, checkpoint_every=3, ema=0.9)

    def of(node, ledger, output, **more):
        loader = {"ledger": str(tmp_path / ledger), "max_bad_rate": 0.5}
        return settings(here, output, data=str(node / "bad.parquet"), loader=loader, **change, **more)

    train(of(nodes[0], "alone.jsonl", alone, batch_size=4, steps=5))
    runs = [of(node, "shared.jsonl", shared, batch_size=2, steps=3, resume="latest") for node in nodes]
    for code, said in two_nodes(runs, nodes, unused_tcp_port):
        assert code == 0, said
    train(of(nodes[0], "shared.jsonl", shared, batch_size=4, steps=5, resume="latest"))
    for a, b in zip(lines(alone), lines(shared), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = weights(alone), weights(shared)
    for name in one:
        assert (two[name] - one[name]).norm() <= 1e-5 * one[name].norm() + 1e-9, name
    # What was bad is in the ledger of all; a run that is stopped has looked at pairs that it asks for again.
    bad = [{line["index"] for line in read_ledger(tmp_path / f"{run}.jsonl")} for run in ("alone", "shared")]
    assert bad == [{2, 7, 11}] * 2


@pytest.mark.heavy
def test_nodes_with_other_data_do_not_train_apart(here, tmp_path, unused_tcp_port):
    runs, nodes = [], [tmp_path / name for name in ("one", "two")]
    rows = pq.read_table(here / "pairs.parquet")
    for number, node in enumerate(nodes):
        node.mkdir()
        pq.write_table(rows.slice(number, 8), node / "pairs.parquet")
        runs.append(settings(here, tmp_path / "run", data=str(node / "pairs.parquet")))
    for code, said in two_nodes(runs, nodes, unused_tcp_port):
        assert code != 0
        assert "data is 'parquet:" in said
        assert "expected the same on all nodes" in said
    assert not (tmp_path / "run").exists()
