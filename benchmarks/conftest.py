import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def threads():
    """A suite that measures one thread leaves the others theirs."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
