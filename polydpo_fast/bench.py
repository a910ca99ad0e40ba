"""Running the benchmarks, and keeping their results: `polydpo-fast bench`.

A file of results belongs to one machine:

    {"machine": {"name", "cpu", "processors", "memory_gib", "gpu", "system"},
     "suites": {NAME: {"commit", "date", "command", "versions": {...}, "rows": [ROW, ...],
                       "skipped": [{"case", "way", "reason"}, ...]}}}

A row says what was measured (`case`), how the work was done (`way`) and whether by this library (`ours`), on which
`clock` ("cpu", "wall" or "gpu"), and the `median`, `iqr` (interquartile range) and number of `rounds`, in seconds; the
medians of other clocks by their names; and figures of its suite's own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .atomic import write_atomically
from .info import collect, versions

__all__ = ["benchmarks_folder", "machine", "merge", "read_results", "run", "suite", "suites", "write"]

Row = dict[str, Any]

# Packages that figures are compared with; `make bench-peers` installs those that are not among the dependencies.
PEERS = (
    "opencv-python-headless",
    "simplejpeg",
    "imagecodecs",
    "spdl",
    "spdl-io",
    "nvidia-dali-cuda120",
    "decord2",
    "torchcodec",
    "webdataset",
    "mosaicml-streaming",
)


def benchmarks_folder() -> Path:
    """The benchmarks beside the package. Raises FileNotFoundError where only the package was installed."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "timing.py").exists():
        raise FileNotFoundError(
            f"the benchmarks are not at {folder}: they come with the source, not with the installed package. "
            "Clone the repository, and install it with pip install -e '.[bench]'"
        )
    return folder


def suites() -> list[str]:
    """Names of the suites that there are. Raises FileNotFoundError as `benchmarks_folder` does."""
    return sorted(path.stem.removeprefix("test_") for path in benchmarks_folder().glob("test_*.py"))


def run(names: Sequence[str] = (), out: Path | None = None, *, replace: bool = False, dirty: bool = False) -> Path:
    """Runs the suites (all of them if none is named) and merges their rows into a file of results; its path.

    `out` is the file: benchmarks/results/MACHINE.json if None, into which figures of a source that differs from its
    commit only go if `dirty`. The suites run one after the other, each in a process of its own, and each is kept as
    soon as it has ended. One that lacks ways which the file has, because a package is not installed or a test failed,
    goes to a file beside it, unless `replace`. Raises ValueError for a name that there is not, RuntimeError for suites
    that failed or were not put into the file.
    """
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"suite is {name!r}; expected one of {', '.join(known)}")
    if out is None and not dirty and (commit() or "").endswith("-dirty"):
        raise ValueError(
            "the source differs from its commit, so nobody could repeat these figures: commit first, "
            "or give --out FILE for figures of your own, or --dirty"
        )
    folder, failed = benchmarks_folder(), []
    path = out or folder / "results" / f"{machine()['name']}.json"
    refused = path.with_name(f"{path.name}.refused")
    path.parent.mkdir(parents=True, exist_ok=True)
    for kept in (path, refused):  # before hours are spent on what could not be put there
        if kept.exists():
            read_results(kept)
    for name in names or known:
        with tempfile.TemporaryDirectory() as work:
            raw = Path(work) / "raw.json"
            command = [sys.executable, "-m", "pytest", str(folder / f"test_{name}.py"), f"--benchmark-json={raw}"]
            command += ["--benchmark-columns=median,iqr", "--timeout=3600"]
            # Where nothing could be measured, what failed is to be seen, not this complaint.
            command += ["-W", "default::pytest_benchmark.logger.PytestBenchmarkWarning"]
            done = subprocess.run(command, cwd=folder.parent)
            found = json.loads(raw.read_text()) if raw.exists() and raw.stat().st_size else {"benchmarks": []}
        if done.returncode:
            failed.append(f"{name} (pytest's exit code {done.returncode})")
        rows = [benchmark["extra_info"] for benchmark in found["benchmarks"]]
        if not rows:
            continue
        measured = suite(rows, command_of(name), found["skipped"])
        lost = [] if replace else lost_ways(path, name, measured)
        target = refused if lost else path
        merge(target, {name: measured})
        if lost:
            failed.append(f"{name} (not put into {path.name}, which has more: {', '.join(lost)}; it is in {target})")
    if failed:
        raise RuntimeError(
            f"{'; '.join(failed)}. What else was measured is in {path}; "
            "`make bench-peers` installs what is missing, and --replace lets a run take the place of one that has more"
        )
    return path


def command_of(name: str) -> str:
    """The command that measures the suite as it is measured now: with the peers, if they are on the path."""
    peers = benchmarks_folder().parent / "build" / "peers"
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(entry and Path(entry).resolve() == peers.resolve() for entry in path):
        return f"make bench-peers SUITES={name}"
    return f"polydpo-fast bench {name}"


def suite(rows: Iterable[Row], command: str, skipped: Iterable[dict[str, str]] = ()) -> dict[str, Any]:
    """A suite of a file of results, measured now and by this code."""
    known = collect()
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
        "versions": {**known["versions"], **versions(PEERS), **known["decoder"]},
        "rows": list(rows),
        "skipped": list(skipped),
    }


def lost_ways(path: Path, name: str, measured: dict[str, Any]) -> list[str]:
    """Of the suite in the file the ways that it would lose if this took its place, with the number of their cases."""
    kept = read_results(path)["suites"].get(name) if path.exists() else None
    lost = _names(kept) - _names(measured) if kept else set()
    return [f"{way} ({count} of its cases)" for way, count in sorted(Counter(way for _, way in lost).items())]


def _names(suite: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["case"], row["way"]) for row in suite["rows"]}


def merge(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Puts suites into a file of results, in place of those of the same names; the file is replaced as a whole."""
    kept = read_results(path)["suites"] if path.exists() else {}
    results = {"machine": machine(), "suites": dict(sorted({**kept, **measured}.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, results)


def write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())


def read_results(path: Path) -> dict[str, Any]:
    """A file of results. Raises ValueError if it is something else."""
    try:
        results = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if wrong := _wrong(results):
        raise ValueError(f"{path} is no file of results: {wrong}")
    return dict(results)


def _wrong(results: Any) -> str:
    """What makes this no file of results, or nothing."""
    if not isinstance(results, dict) or not all(isinstance(results.get(x), dict) for x in ("machine", "suites")):
        return "it lacks machine or suites"
    for name, suite in results["suites"].items():
        if not isinstance(suite, dict) or not isinstance(suite.get("versions", {}), dict):
            return f"suite {name} is {type(suite).__name__}; expected an object with rows, and with versions in another"
        rows = suite.get("rows")
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            return f"suite {name} lacks rows of case, way, median, iqr and rounds"
    return ""


def _is_row(row: Any) -> bool:
    kinds: dict[str, Any] = {"case": str, "way": str, "median": (int, float), "iqr": (int, float), "rounds": int}
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def commit() -> str | None:
    """The commit, with "-dirty" if the source was changed since (not results, pages); None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    written = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    changed = git("status", "--porcelain", "--untracked-files=no", ":/", *written)
    return f"{head}-dirty" if head and changed else head


def machine() -> dict[str, Any]:
    """This machine; its name is made of its processors and its GPU, not of its owner's name for it."""
    cpu = _first("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or platform.machine()
    memory = _first("/proc/meminfo", r"MemTotal:\s*(\d+) kB")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processors = len(os.sched_getaffinity(0))
    name = gpu or f"{cpu} {processors} processors"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{'gpu' if gpu else 'cpu'} {name}".lower()).strip("-"),
        "cpu": cpu,
        "processors": processors,
        "memory_gib": round(int(memory) / 2**20) if memory else None,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def _first(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found[1].strip() if found else None
