"""Where there is no GPU, the Triton kernels run under Triton's interpreter: it must be asked for before import.

Or, with EMULATED_GPU in the environment, compiled for one that kernels/emulated.py stands in for.

A machine with a GPU may have pytest and nothing else: what its plugins and Hypothesis would do is left out there.
"""

import importlib.util
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("EMULATED_GPU") else "1"
if os.environ.get("EMULATED_GPU"):
    sys.path.append(str(Path(__file__).parent / "kernels"))
    import emulated

    emulated.install()


def skipping_hypothesis() -> dict[str, ModuleType]:
    """What test modules import of Hypothesis, where it is not installed; tests with @given are skipped."""

    class Anything(ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name)

        def __call__(self, *args, **kwargs):
            return self

    def given(*args, **kwargs):
        def skipped(test):
            def skip():
                pytest.skip("hypothesis is not installed")

            return skip

        return skipped

    absent, strategies = Anything("hypothesis"), Anything("hypothesis.strategies")
    absent.given, absent.strategies = given, strategies
    absent.settings = lambda *args, **kwargs: lambda test: test
    return {"hypothesis": absent, "hypothesis.strategies": strategies}


STANDING_IN = skipping_hypothesis() if importlib.util.find_spec("hypothesis") is None else {}
sys.modules.update(STANDING_IN)  # until all tests are imported: PyTorch has uses of its own for Hypothesis
if not STANDING_IN:
    import hypothesis

    # The interpreter's and the compiler's first calls are slow; what is found is printed so that it can be repeated.
    hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run here."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def unused_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--share", default="0/1", help="1/4: every fourth test, from the second on; run by `make gpu`")
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed: tests take what they take")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in STANDING_IN:
        sys.modules.pop(name, None)
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = items[share::shares]
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
