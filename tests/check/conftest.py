"""Runs of the checks that are short."""

import pytest

from polydpo_fast.check import run


@pytest.fixture
def few(monkeypatch):
    """A few cases of each kind, one of them large."""
    monkeypatch.setattr(run, "_CASES", (21, 21))
    monkeypatch.setattr(run, "_LEAST", 20)
    monkeypatch.setattr(run, "_INTERPRETED", (3, 3))
    monkeypatch.setattr(run, "_LEAST_SLOW", 2)
    monkeypatch.setattr(run, "_COMPILED", (2, 2))
    monkeypatch.setattr(run, "_IMAGES", (4, 4))
    monkeypatch.setattr(run, "_CLIPS", (1, 1))
