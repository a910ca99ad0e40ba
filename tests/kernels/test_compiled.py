"""The kernels as they are compiled for a GPU, run instruction by instruction where there is none.

In a process of its own: in this one Triton interprets their source. What it runs there are the tests of the options and
of the frames, those of compiled.py, and under `make test-heavy` those of the loss, for each generation of GPUs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the tests themselves")


def emulate(files: list[str], capability: str, expected: int) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "triton or compiled"]
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in files)],
        env={**os.environ, "EMULATED_GPU": "1", "EMULATED_CAPABILITY": capability},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= expected


def test_the_kernels_of_the_loss():
    emulate(["kernels/compiled.py", "test_options.py"], "90", 45)


def test_the_kernel_of_the_frames():
    emulate(["kernels/test_yuv.py"], "90", 60)


@pytest.mark.heavy
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_everything_on(capability):
    emulate(["kernels/compiled.py", "test_options.py", "test_loss.py", "kernels/test_yuv.py"], capability, 300)
