"""Running the benchmarks, keeping their results, and comparing two files of them: `polydpo-fast bench`.

A file of results belongs to one machine:

    {"machine": {"name", "cpu", "processors", "memory_gib", "gpu", "system"},
     "suites": {NAME: {"commit", "date", "command", "versions": {...}, "rows": [ROW, ...]}}}

A row says what was measured (`case`), how the work was done (`way`; ours are called "ours..."), on which `clock`
("cpu", "wall" or "gpu"), and the `median`, `iqr` (interquartile range) and number of `rounds`, in seconds; the medians
of other clocks by their names; and figures of its suite's own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .info import collect

__all__ = ["Change", "benchmarks_folder", "compare", "machine", "merge", "read_results", "run", "suites"]

Row = dict[str, Any]


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


def run(names: Sequence[str] = (), out: Path | None = None, arguments: Sequence[str] = ()) -> Path:
    """Runs the suites (all of them if none is named) and merges their rows into a file of results; its path.

    `out` is the file: benchmarks/results/MACHINE.json if None. `arguments` go to pytest. The suites run one after
    the other, each in a process of its own, and each is kept as soon as it has ended. Raises ValueError for a name that
    there is not, RuntimeError for suites that failed.
    """
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"suite is {name!r}; expected one of {', '.join(known)}")
    folder, failed = benchmarks_folder(), []
    path = out or folder / "results" / f"{machine()['name']}.json"
    for name in names or known:
        with tempfile.TemporaryDirectory() as work:
            raw = Path(work) / "raw.json"
            command = [sys.executable, "-m", "pytest", str(folder / f"test_{name}.py"), f"--benchmark-json={raw}"]
            command += ["--benchmark-columns=median,iqr", "--timeout=3600"]
            # Where nothing could be measured, what failed is to be seen, not this complaint.
            command += ["-W", "default::pytest_benchmark.logger.PytestBenchmarkWarning", *arguments]
            done = subprocess.run(command, cwd=folder.parent)
            rows = rows_of(json.loads(raw.read_text())) if raw.exists() and raw.stat().st_size else []
        if rows:
            merge(path, {name: suite(rows, f"polydpo-fast bench {name}")})
        if done.returncode:
            failed.append(f"{name} (pytest's exit code {done.returncode})")
    if failed:
        raise RuntimeError(f"suites failed: {', '.join(failed)}; what was measured is in {path}")
    return path


def rows_of(raw: dict[str, Any]) -> list[Row]:
    """The rows in what pytest-benchmark wrote."""
    return [benchmark["extra_info"] for benchmark in raw["benchmarks"]]


def suite(rows: Iterable[Row], command: str) -> dict[str, Any]:
    """A suite of a file of results, measured now and by this code."""
    known = collect()
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
        "versions": {**known["versions"], **known["decoder"]},
        "rows": list(rows),
    }


def merge(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Puts suites into a file of results, in place of those of the same names; the file is replaced as a whole."""
    kept = read_results(path)["suites"] if path.exists() else {}
    results = {"machine": machine(), "suites": dict(sorted({**kept, **measured}.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def read_results(path: Path) -> dict[str, Any]:
    """A file of results. Raises ValueError if it is something else."""
    try:
        results = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not {"machine", "suites"} <= results.keys():
        raise ValueError(f"{path} is no file of results: it lacks machine or suites")
    return results


def commit() -> str | None:
    """The commit of the source, with "-dirty" if it was changed since, but for results; None without a repository."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)benchmarks/results")
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


class Change(NamedTuple):
    """What became of one of our ways between two runs: times its former time, on a machine as fast as then."""

    suite: str
    case: str
    way: str
    ratio: float  # above 1 is slower
    noise: float  # what the ratio may be off 1 by chance
    bytes: tuple[int, int] | None  # the peaks of memory, which have no noise

    @property
    def slower(self) -> bool:
        grown = self.bytes is not None and self.bytes[1] > self.bytes[0] * 1.01
        return self.ratio > 1 + self.noise or grown

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + self.noise) and not self.slower


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Our ways that both files of results have.

    Times of one machine drift from hour to hour. So each of ours is held against the peers that were measured in turns
    with it: their common change is the machine's, and is taken out. The noise is three standard errors of all medians
    that take part (of a median over n rounds: 0.93 IQR / sqrt(n), as for a normal distribution), and 5% at least.
    """
    changes = []
    for name in before["suites"].keys() & after["suites"].keys():
        old, new = (_by_case(results["suites"][name]["rows"]) for results in (before, after))
        for case in old.keys() & new.keys():
            common = old[case].keys() & new[case].keys()
            drifts = [_ratio(old[case][way], new[case][way]) for way in common if not way.startswith("ours")]
            drift = math.exp(statistics.mean(math.log(ratio) for ratio, _ in drifts)) if drifts else 1.0
            of_drift = math.hypot(*(error for _, error in drifts)) / len(drifts) if drifts else 0.0
            for way in common:
                if not way.startswith("ours"):
                    continue
                ratio, error = _ratio(old[case][way], new[case][way])
                noise = max(0.05, 3 * math.hypot(error, of_drift))
                rows = old[case][way], new[case][way]
                peaks = (rows[0]["peak_bytes"], rows[1]["peak_bytes"]) if all("peak_bytes" in r for r in rows) else None
                changes.append(Change(name, case, way, ratio / drift, noise, peaks))
    return sorted(changes, key=lambda change: -change.ratio / (1 + change.noise))


def _by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["way"]] = row
    return cases


def _ratio(old: Row, new: Row) -> tuple[float, float]:
    """Of two medians, and its relative standard error."""
    errors = (0.93 * row["iqr"] / math.sqrt(row["rounds"]) / row["median"] for row in (old, new))
    return new["median"] / old["median"], math.hypot(*errors)
