"""Running the benchmarks: `polydpo-fast bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results_file import commit, machine, merge, read_results, suite

__all__ = ["benchmarks_folder", "run", "suites"]


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
            command += ["--benchmark-columns=median,iqr"]
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


def lost_ways(path: Path, name: str, measured: dict[str, Any]) -> list[str]:
    """Of the suite in the file the ways that it would lose if this took its place, with the number of their cases."""
    kept = read_results(path)["suites"].get(name) if path.exists() else None
    lost = _names(kept) - _names(measured) if kept else set()
    return [f"{way} ({count} of its cases)" for way, count in sorted(Counter(way for _, way in lost).items())]


def _names(suite: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["case"], row["way"]) for row in suite["rows"]}
