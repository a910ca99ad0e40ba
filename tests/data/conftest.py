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


@pytest.fixture(scope="session")
def decoder():
    """DALI's on the CPU, whose every pair is a canary."""
    from polydpo_fast.data import DaliDecoder
    from polydpo_fast.data.dali import decoder as dali

    if not dali._is_installed():
        pytest.skip("nvidia-dali is not installed")
    return DaliDecoder("cpu", threads=2, canary=1)


@pytest.fixture
def in_cpp(monkeypatch):
    """Counts the pairs of images that go through C++ for DALI; canaries among them."""
    from polydpo_fast import decode_pairs
    from polydpo_fast.data.dali import images as dali_images

    seen = []
    monkeypatch.setattr(
        dali_images, "decode_pairs", lambda win, *a, **k: seen.append(len(win)) or decode_pairs(win, *a, **k)
    )
    return seen


@pytest.fixture(scope="session")
def clips():
    """Of VP9, which DALI decodes on a CPU too; and one of H.264."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from clip_oracle import encode

    vp9 = dict(codec="libvpx-vp9")
    return {
        "small": encode(count=30, **vp9, container="webm"),
        "other": encode(count=40, height=96, width=80, rate=30, **vp9),
        "709": encode(count=4, height=720, width=96, **vp9),
        "h264": encode(count=5),
    }
