"""Running the benchmarks, keeping their results, and comparing two files of them: `polydpo-fast bench`.

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
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .info import collect, versions

__all__ = [
    "Change",
    "Comparison",
    "benchmarks_folder",
    "compare",
    "machine",
    "merge",
    "read_results",
    "run",
    "suites",
    "write",
]

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
    """JSON, into a file beside it that then takes its place: nobody ever finds half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


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


ALONE = 1.0  # taken for noise where no peer tells a slower way from a slower machine: worse is then above twice

# What else than the time is compared, and what its ratio may be off 1 by chance.
FACTS = {
    "gpu, warm L2": 0.1,
    "peak_bytes": 0.01,
    "peak MB": 0.1,
    "bytes of memory per pair": 0.2,
    "seconds to build the index": ALONE,
    "seconds to resume": ALONE,
    "seconds per pair": ALONE,
    "microseconds with noise given": ALONE,
    "mean error": ALONE,
    "win_rate": 0.02,
    "legible_after": 0.05,
}
MORE_IS_BETTER = ("win_rate", "legible_after")


class Change(NamedTuple):
    """What became of one of our ways between two runs."""

    suite: str
    case: str
    way: str
    what: str  # "time", on a machine as fast as before; or one of FACTS
    ratio: float  # above 1 is worse
    noise: float  # what the ratio may be off 1 by chance

    @property
    def worse(self) -> bool:
        return not self.ratio <= 1 + self.noise  # what is no number any more is worse

    @property
    def better(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)


class Comparison(NamedTuple):
    """Of two files of results: what both have of ours, what only the former has, and what else to know of the two."""

    changes: list[Change]
    vanished: list[str]
    warnings: list[str]

    @property
    def worse(self) -> bool:
        return bool(self.vanished) or any(change.worse for change in self.changes)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Our ways in two files of results.

    Times of one machine drift from hour to hour. So each of ours is held against the peers that were measured in turns
    with it, or in the same suite if its case has none: the median of their changes is the machine's, and is taken out.
    The noise is three standard errors of the medians that take part (of one over n rounds: 0.93 IQR / sqrt(n), as for
    a normal distribution) and of how far the peers' changes lie apart, and 5% at least.
    """
    changes, vanished = [], []
    for name, suite in before["suites"].items():
        if name not in after["suites"]:
            vanished.append(f"{name}: the whole suite")
            continue
        old, new = _by_case(suite["rows"]), _by_case(after["suites"][name]["rows"])
        vanished += [f"{name}: {case}: {way}" for case, way in sorted(old.keys() - new.keys())]
        common = [key for key in old if key in new]
        ours = [key for key in common if old[key].get("ours") or new[key].get("ours")]
        drifts = {key: _ratio(old[key], new[key]) for key in common if key not in ours}
        for key in ours:
            beside = [drift for (case, _), drift in drifts.items() if case == key[0]]
            drift, of_drift = _drift(beside or drifts.values())
            ratio, error = _ratio(old[key], new[key])
            changes.append(Change(name, *key, "time", ratio / drift, max(0.05, 3 * math.hypot(error, of_drift))))
            for fact, noise in FACTS.items():
                if fact in old[key] and fact in new[key]:
                    figures = new[key][fact], old[key][fact]
                    worse = _quotient(*(reversed(figures) if fact in MORE_IS_BETTER else figures))
                    changes.append(Change(name, *key, fact, worse, noise))
    changes.sort(key=lambda change: (not change.worse, -change.ratio / (1 + change.noise)))
    warnings = [] if changes else ["nothing was judged: the files have no row in common that is marked as ours"]
    return Comparison(changes, vanished, warnings + _differences(before, after))


def _by_case(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row["case"], row["way"]): row for row in rows}


def _quotient(new: float, old: float) -> float:
    return 1.0 if new == old else new / old if old else math.inf


def _ratio(old: Row, new: Row) -> tuple[float, float]:
    """Of two medians, and its relative standard error."""
    errors = (
        _quotient(0.93 * row["iqr"] / math.sqrt(row["rounds"]), row["median"]) for row in (old, new) if row["iqr"]
    )
    return _quotient(new["median"], old["median"]), math.hypot(*errors)


def _drift(peers: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """What the machine changed by, as peers show it, and its relative standard error; one odd peer changes little."""
    sound = [(ratio, error) for ratio, error in peers if 0 < ratio < math.inf and error < math.inf]
    if not sound:
        return 1.0, ALONE / 3
    drift = statistics.median(ratio for ratio, _ in sound)
    apart = 1.48 * statistics.median(abs(ratio / drift - 1) for ratio, _ in sound)  # a standard deviation
    return drift, math.hypot(apart, statistics.median(error for _, error in sound) / math.sqrt(len(sound)))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of machines, and of versions of what both were measured with."""
    found = _changed(before["machine"], after["machine"])
    for name in before["suites"].keys() & after["suites"].keys():
        found += _changed(*(results["suites"][name].get("versions", {}) for results in (before, after)))
    return list(dict.fromkeys(found))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    common = [what for what in before if what in after and before[what] != after[what]]
    return [f"{what}: {before[what]} before, {after[what]} after" for what in common]
