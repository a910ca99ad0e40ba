"""Kept indexes: files that are damaged are built anew, whatever is damaged in them."""

import os

import numpy as np
import pytest

from polydpo_fast.cache import load_or_build

ARRAYS = {"rows": np.arange(200, dtype=np.uint8), "ends": np.array([[3, 200]], dtype=np.int64)}


class Built(Exception):  # noqa: N818  # no error
    pass


def build():
    raise Built


@pytest.fixture
def kept(tmp_path):
    load_or_build("stamp", lambda: ARRAYS, tmp_path)
    (path,) = tmp_path.iterdir()
    return path


def is_what_was_kept(path):
    """Or False where it is to be built anew; nothing else may happen."""
    try:
        found = load_or_build("stamp", build, path.parent)
    except Built:
        return False
    assert found.keys() == ARRAYS.keys()
    assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    return True


def test_any_flipped_bit_and_any_cut(kept):
    content = kept.read_bytes()
    outcomes = set()
    for place in range(8 * len(content)):
        data = bytearray(content)
        data[place // 8] ^= 1 << place % 8
        kept.write_bytes(data)
        outcomes.add(is_what_was_kept(kept))
    assert outcomes == {True, False}  # times and attributes in a zip file say nothing
    for length in range(len(content)):
        kept.write_bytes(content[:length])
        assert not is_what_was_kept(kept)
    kept.write_bytes(content)
    assert is_what_was_kept(kept)


def test_what_a_check_does_not_like_is_built_anew(kept):
    assert load_or_build("stamp", build, kept.parent, lambda arrays: len(arrays["rows"]) == 200)
    for sound in (lambda arrays: False, lambda arrays: arrays["codes"].all()):
        with pytest.raises(Built):
            load_or_build("stamp", build, kept.parent, sound)


def test_pickles_are_not_read(kept):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(kept, rows=np.array([Trap()], dtype=object), stamp=np.array("stamp"))
    assert not is_what_was_kept(kept)


def test_what_others_may_have_put_there(kept):
    """A pipe is not waited for, and nothing is unpacked to more than the file has."""
    rows = np.zeros(1 << 22, np.int64)
    np.savez_compressed(kept, rows=rows, codes=rows, stamp=np.array("stamp"))
    assert kept.stat().st_size < 1 << 20
    assert not is_what_was_kept(kept)
    kept.unlink()
    os.mkfifo(kept)
    assert not is_what_was_kept(kept)
    kept.unlink()
    kept.symlink_to("/dev/zero")
    assert not is_what_was_kept(kept)


def test_an_interruption_right_after_an_index_was_kept_is_one(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(*names):
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_build("stamp", lambda: ARRAYS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
