import pytest
import torch


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """A folder with a pipeline of SD1.5's kind, and 16 pairs."""
    from diffusion import pipelines

    folder = tmp_path_factory.mktemp("sd15")
    pipelines.save("sd15", folder)
    pipelines.write_pairs(folder / "pairs.parquet", 16)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps the precision of a process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
