"""Files of benchmarks' results.

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
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .atomic import write_atomically
from .info import collect, versions

__all__ = ["PEERS", "commit", "machine", "merge", "read_results", "suite", "write"]

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
