"""Everything that a GPU can show, on a machine with PyTorch, NumPy, Triton, pytest and no network: `make gpu`.

Builds the C++ extension if it can, runs the tests that are marked gpu, those of the kernels and the checks side by side
(compiling kernels is what takes their time), then the benchmark of the losses alone, within 8 minutes. Writes
gpu-NAME.json and gpu-NAME.log to $OUT, or to benchmarks/results/. What could not run, and why, is in both.

Exits with 0 if all that ran passed, 1 if something failed, 3 if there is no GPU or no PyTorch. Of the Python that runs
it only the standard library is needed.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
LIMIT_S = 480
COUNTS = ("tests", "failures", "errors", "skipped")
NO_GPU = 3

PROBE = """
import json, platform, subprocess, sys
found = {"python": platform.python_version(), "torch": None, "gpu": None}
try:  # clocks and power decide what a figure means
    asked = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    line = subprocess.check_output(["nvidia-smi", "--query-gpu=" + ",".join(asked), "--format=csv,noheader"], text=True)
    found |= zip(asked, line.splitlines()[0].split(", "), strict=True)
except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
    pass  # another maker's GPU, or none
try:
    import torch
except ImportError as error:
    print(json.dumps(found))
    sys.exit()
found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError as error:
    found["triton"] = None
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "sm": f"{gpu.major}.{gpu.minor}",
              "processors": gpu.multi_processor_count}
print(json.dumps(found))
"""
IMPORT = """
import importlib.util, polydpo_fast
print(polydpo_fast.__file__, polydpo_fast.available_backends("cuda"))
if importlib.util.find_spec("triton"):
    import polydpo_fast.kernels.pair_loss
"""
CHECK = """
import json, sys, torch
from polydpo_fast.check import check
torch.ones(1, device="cuda")  # with others beside it, to begin takes seconds, which are not the check's
report = check(device="cuda", seconds=110.0, progress=print)  # compiling each case's kernels takes most of it
found = report.as_json()
open(sys.argv[1], "w").write(found)
print(found)
if not report.passed:
    told = json.loads(found)
    sys.exit("; ".join(told["broken"] + told["unfinished"]) or "nothing was checked")
"""
RESULTS = """
import json, sys
from polydpo_fast.results_file import machine, suite
found = json.load(open(sys.argv[1]))
print(json.dumps({"machine": machine(), "suites": {"loss": suite(found["rows"], "make gpu", found["skipped"])}}))
"""
PYTEST_INI = """[pytest]
markers =
    gpu: needs a CUDA or ROCm device
    heavy: takes minutes
filterwarnings =
    ignore
"""


class Run:
    """Runs parts, one after the other or side by side, each with what is left of the time."""

    def __init__(self, log: Path) -> None:
        self._begin = time.monotonic()
        self._log = log
        self._lock = threading.Lock()
        WORK.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (WORK, ROOT / "tests", ROOT / "benchmarks"))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",  # what a part has said by the time it is ended is seen
            "POLYDPO_FAST_CACHE": str(WORK / "cache"),
        }
        self._environment.pop("TRITON_INTERPRET", None)
        self.parts: dict[str, dict] = {}

    @property
    def left_s(self) -> float:
        return LIMIT_S - (time.monotonic() - self._begin)

    def part(
        self,
        name: str,
        command: list[str],
        limit_s: float,
        needs: tuple[str, ...] = (),
        folder: Path | None = None,
    ) -> str | None:
        """The output, or None if it could not run, failed or took too long. `parts` says which.

        It runs in WORK: in ROOT, Python would find the source there before what was built.
        """
        limit_s = min(limit_s, self.left_s)
        absent = [package for package in needs if importlib.util.find_spec(package) is None]
        if absent:
            return self.skip(name, f"{', '.join(absent)} not installed")
        if limit_s < 5:
            return self.skip(name, f"no time was left of {LIMIT_S} s")
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder or WORK,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        late = False
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        seconds = round(time.monotonic() - begin, 1)
        self._write(f"\n===== {name}: {' '.join(command) if len(command) < 20 else command[0]}\n{output}")
        result = {"status": "passed" if process.returncode == 0 else "failed", "seconds": seconds}
        lines = [line for line in output.splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "no output"
        if late:
            result |= {"status": "failed", "reason": f"took more than {limit_s:.0f} s: {last}"}
        elif process.returncode:
            result["reason"] = f"exit code {process.returncode}: {last}"
        self.parts[name] = result
        self._say(name)
        return output if result["status"] == "passed" else None

    def skip(self, name: str, reason: str) -> None:
        self.parts[name] = {"status": "not run", "reason": reason}
        self._say(name)

    def _say(self, name: str) -> None:
        part = self.parts[name]
        took = f" in {part['seconds']} s" if "seconds" in part else ""
        reason = f": {part['reason']}" if "reason" in part else ""
        line = f"{name}: {part['status']}{took}{reason}"
        self._write(f"----- {line}\n")
        print(line, flush=True)

    def _write(self, text: str) -> None:
        with self._lock, self._log.open("a") as log:
            log.write(text)


def main() -> int:
    begin = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    package = WORK / "polydpo_fast"
    package.mkdir(parents=True)
    # What an installation has: polydpo_fast, with kernels/ as polydpo_fast.kernels, and the extension if it is built.
    for path in (ROOT / "polydpo_fast").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    log = WORK / "log"
    run = Run(log)

    found = run.part("machine", [sys.executable, "-c", PROBE], 150)  # PyTorch may be read for the first time
    machine = told(found) if found else {"gpu": None, "torch": None}
    gpu = machine["gpu"]
    lacking = "there is no CUDA or ROCm device" if machine["torch"] else "PyTorch cannot be imported"
    if found is None:
        lacking = f"PyTorch failed: {run.parts['machine']['reason']}"
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(WORK), "--build-temp", str(WORK / "o")]
    run.part("C++ extension", build, 120, ("setuptools", "pybind11"), folder=ROOT)
    extension = run.parts["C++ extension"]
    if extension["status"] == "failed":  # the GPU's kernels do not need it
        extension["status"] = "not run"
    run.part("import", [sys.executable, "-c", IMPORT], 60)

    results = {}
    if gpu is not None and run.parts["import"]["status"] == "passed":
        results = on_gpu(run)
    else:
        for name in ("gpu tests", "tests of the kernels", "check", "benchmark of the losses"):
            run.skip(name, lacking if gpu is None else "the import failed")

    target = Path(os.environ.get("OUT") or (ROOT / "benchmarks" / "results" if gpu else WORK))
    target.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", (gpu or "none").lower()).strip("-")
    report = {
        "machine": {**machine, **results.pop("machine", {})},
        "commit": commit(),
        "seconds": round(time.monotonic() - begin, 1),
        "parts": run.parts,
        "suites": {},
        **results,
    }
    part = target / f"{name}.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, target / f"{name}.json")
    shutil.copyfile(log, target / f"{name}.log")
    print(f"{gpu or lacking}, {report['seconds']} s; results: {target / name}.json, .log")
    if gpu is None:
        return NO_GPU
    return 1 if any(part["status"] == "failed" for part in run.parts.values()) else 0


def on_gpu(run: Run) -> dict:
    """The parts that need a GPU; what they wrote."""
    checked = WORK / "check.json"
    jobs = [("check", [sys.executable, "-c", CHECK, str(checked)], 150)]
    xmls: dict[str, list[Path]] = {}

    def add_tests(name: str, files: list[Path], options: list[str], limit_s: float, shares: int) -> None:
        usable = []
        for path in files:
            absent = missing_imports(path)
            if absent:
                run.skip(f"{name}: {path.relative_to(ROOT)}", f"{', '.join(absent)} not installed")
            else:
                usable.append(str(path))
        xmls[name] = [WORK / f"{name.replace(' ', '-')}-{share}.xml" for share in range(shares)]
        for share, xml in enumerate(xmls[name] if usable else ()):
            command = [*pytest, *usable, *options, f"--share={share}/{shares}", f"--junitxml={xml}"]
            jobs.append((name if shares == 1 else f"{name}, {share + 1} of {shares}", command, limit_s))

    ini = WORK / "pytest.ini"
    ini.write_text(PYTEST_INI)
    pytest = [sys.executable, "-m", "pytest", "-v", "-c", str(ini), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors"]  # a file that cannot be imported keeps no other from running
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    add_tests("gpu tests", marked, ["-m", "gpu"], 200, 1)
    kernels = [ROOT / "tests" / f"{name}.py" for name in ("test_loss", "test_options", "kernels/test_yuv")]
    add_tests("tests of the kernels", kernels, [], 250, max(1, min(8, len(os.sched_getaffinity(0)) // 2)))

    def do(job: tuple[str, list[str], float]) -> None:
        name, command, limit_s = job
        run.part(name, command, limit_s, ("pytest",) if "pytest" in command else ())

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(do, jobs))
    results = {name: counted(written) for name, of in xmls.items() if (written := [x for x in of if x.exists()])}
    for name, found in results.items():
        for failed in found["failed"]:
            print(f"{name}: {failed}", flush=True)
    if checked.exists():
        results["check"] = json.loads(checked.read_text())

    written = WORK / "loss.json"
    benchmark = [sys.executable, str(ROOT / "benchmarks" / "loss.py"), "--device", "cuda", "--json", str(written)]
    # One more case may begin when its time is up; what was measured is to be kept in any case.
    seconds = max(20.0, run.left_s - 90)
    table = run.part("benchmark of the losses", [*benchmark, "--seconds", f"{seconds:.0f}"], run.left_s - 20)
    if table:
        print(table)
    if written.exists():
        found = run.part("results", [sys.executable, "-c", RESULTS, str(written)], 60)
        results |= told(found) if found else {}
    return results


def told(output: str) -> dict:
    """The JSON object of the last line that is one: warnings may stand behind it."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def missing_imports(path: Path) -> list[str]:
    """Packages that a test module imports and that are not installed. Without Hypothesis its own tests are skipped."""
    names = sorted(set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)))
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"polydpo_fast", "hypothesis"}
    return [name for name in names if name not in ours and importlib.util.find_spec(name) is None]


def counted(xmls: list[Path]) -> dict:
    """Of JUnit files: numbers of tests, and the names and messages of those that failed."""
    suites = [ElementTree.parse(xml).getroot().find("testsuite") for xml in xmls]
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in COUNTS}
    failed = [
        f"{case.get('classname')}.{case.get('name')}: {(element.get('message') or '')[:300]}"
        for suite in suites
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        for element in case.iter(kind)
    ]
    return {**counts, "failed": failed}


def commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
