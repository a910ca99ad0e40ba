"""The loss on the CPU, beside eager PyTorch, Salesforce's formula and torch.compile: loss.py says what and how."""

import functools

import loss
import pytest
from timing import report

JOBS = {job.case: job for job in loss.jobs("cpu")}


@functools.cache
def measured(case):
    found, _ = loss.measure(JOBS[case], "cpu")  # on a CPU nothing may fail
    return {one.way: one for one in found}


@functools.cache
def host():
    found, _ = loss.host("cpu")
    return {one.way: one for one in found}


@pytest.mark.parametrize(
    ("case", "way"),
    [
        (job.case, way)
        for job in JOBS.values()
        for way in ("ours", *job.compiled, "eager", "Salesforce's formula", "copy")
    ],
)
def test_loss(benchmark, case, way):
    report(benchmark, measured(case)[way])


@pytest.mark.parametrize(
    "way", ["ours", "torch.compile", "eager", "Salesforce's formula", "an empty autograd.Function"]
)
def test_host_time(benchmark, way):
    report(benchmark, host()[way])
