"""No test keeps an index where the user's are."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
