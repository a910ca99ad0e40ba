"""Files that are written whole: to results, stores and folders of images."""

import errno
import os

import pytest

from polydpo_fast.atomic import write_atomically


def test_ranks_with_the_same_number_of_process_write_under_different_names(tmp_path, monkeypatch):
    """In containers of two nodes all are often number 1."""
    replace, renamed = os.replace, []

    def noted(part, path):
        if len(renamed) < 2:
            renamed.append(part)
        if len(renamed) == 1:
            write_atomically(tmp_path / "store.json", b"second")  # the other rank, before this one's file has its name
        replace(part, path)

    monkeypatch.setattr(os, "replace", noted)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    write_atomically(tmp_path / "store.json", b"first")
    assert len(set(renamed)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that after a crash of the machine it is whole or absent; and where there is no room nothing is left."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda part, path: done.append("named") or replace(part, path))
    write_atomically(tmp_path / "shard", b"12345")
    assert done == [5, "named"]

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("shard", "other"):
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / name, b"6")
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]
    assert (tmp_path / "shard").read_bytes() == b"12345"
