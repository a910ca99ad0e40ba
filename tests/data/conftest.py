"""Fixtures of several files of tests. No test keeps an index where the user's are."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shard(tmp_path):
    """The path of a file of Pick-a-Pic's columns, in row groups of three rows."""
    from data.parquet_files import SOME, pick_a_pic, write

    return write(tmp_path / "shard.parquet", pick_a_pic(SOME), rows_per_group=3)
