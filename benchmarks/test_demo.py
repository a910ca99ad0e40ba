"""The demo as `make demo` runs it: its time and its figures."""

import json
import subprocess
import sys

from timing import Measured, cpu_and_wall, report


def test_demo(benchmark, tmp_path):
    command = [sys.executable, "-m", "polydpo_fast", "demo", "--out", str(tmp_path)]
    times = {name: [seconds] for name, seconds in cpu_and_wall(lambda: subprocess.run(command, check=True)).items()}
    figures = json.loads((tmp_path / "demo.json").read_text())
    del figures["curves"], times["cpu"]  # the time of another process
    report(benchmark, Measured("the demo", "ours", times, True, "wall", facts=figures))
