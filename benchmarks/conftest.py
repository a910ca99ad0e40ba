from pathlib import Path

import pytest
import torch

SKIPPED: list[dict[str, str]] = []  # of this run, with their reasons


@pytest.fixture(scope="module", autouse=True)
def threads():
    """A suite that measures one thread leaves the others theirs."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def pytest_collection_modifyitems(items):
    """The first test of a case measures all of it, which takes minutes: the tests' own limit is not for these."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped:
        way = item.callspec.params.get("way", "") if hasattr(item, "callspec") else ""
        reason = report.longrepr[2].removeprefix("Skipped: ")
        SKIPPED.append({"case": item.name, "way": getattr(way, "__name__", way), "reason": reason})
    return report


@pytest.hookimpl(optionalhook=True)  # of pytest-benchmark
def pytest_benchmark_update_json(output_json):
    output_json["skipped"] = SKIPPED
