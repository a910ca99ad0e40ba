"""The index that is kept of a Parquet file, and the fingerprint of what is in it."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from data.pairs import everything
from data.parquet_files import SOME, pa, pick_a_pic, write

from polydpo_fast.data.formats import parquet_index
from polydpo_fast.data.formats.parquet import ParquetPairs


def test_who_wins_is_in_the_fingerprint(tmp_path):
    """Also where neither the sizes nor the statistics of the file change."""
    path = tmp_path / "x.parquet"
    found = set()
    for labels in ([1.0, 0.0] * 4, [0.0, 1.0] * 4):
        write(path, pick_a_pic([(label, True) for label in labels]), rows_per_group=8)
        found.add((path.stat().st_size, ParquetPairs(path).fingerprint))
    assert len(found) == 2
    assert len({size for size, _ in found}) == 1


def test_the_fingerprint_is_that_of_a_copy_elsewhere(tmp_path, shard):
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    copy = shutil.copy(shard, elsewhere / "shard.parquet")
    os.utime(copy, (1, 1))
    print_of = ParquetPairs(shard).fingerprint
    assert ParquetPairs(copy).fingerprint == print_of
    assert ParquetPairs(elsewhere, columns=["ranking_id"]).fingerprint == print_of
    renamed = shutil.copy(shard, elsewhere / "other.parquet")
    prints = {
        print_of,
        ParquetPairs(shard, ties="keep").fingerprint,
        ParquetPairs(shard, weight="ranking_id").fingerprint,
        ParquetPairs(renamed).fingerprint,
        ParquetPairs([shard, renamed]).fingerprint,
        ParquetPairs([renamed, shard]).fingerprint,
        ParquetPairs(write(copy, pick_a_pic(SOME[::-1]), rows_per_group=3)).fingerprint,
    }
    assert len(prints) == 7


def test_the_index_is_kept_per_file_and_renewed(tmp_path, monkeypatch):
    built = []
    build = parquet_index._build_index
    monkeypatch.setattr(parquet_index, "_build_index", lambda file, kind: built.append(file.name) or build(file, kind))
    cache = tmp_path / "elsewhere"
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "ab":
        write(folder / f"{name}.parquet", pick_a_pic(SOME))
    ParquetPairs(folder, cache=cache)
    assert sorted(built) == ["a.parquet", "b.parquet"]
    assert len(list(cache.iterdir())) == 2
    ParquetPairs(folder, cache=cache, ties="keep", columns=["ranking_id"])
    assert len(built) == 2
    write(folder / "b.parquet", pick_a_pic([(0.0, True)] * 9))
    source = ParquetPairs(folder, cache=cache)
    assert built[2:] == ["b.parquet"]
    assert bytes(source[len(source) - 1].win) == b"one, longer 8"


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": np.ones(len(SOME) - 1, dtype=np.uint8)},
        {"verdict": np.full(len(SOME), 9, dtype=np.uint8)},
        {"verdict": np.ones(len(SOME), dtype=np.float64)},
        {"groups": np.array([-1, len(SOME) + 1])},
        {"codes": np.full(len(SOME), 1)},
        {"schema": None},
    ],
)
def test_a_kept_index_that_cannot_be_is_renewed(tmp_path, shard, change):
    options = dict(category="best_image_uid", cache=tmp_path / "kept")
    want = everything(ParquetPairs(shard, **options))
    (path,) = (tmp_path / "kept").iterdir()
    with np.load(path) as stored:
        arrays = {name: value for name, value in {**stored, **change}.items() if value is not None}
    np.savez(path, **arrays)
    assert everything(ParquetPairs(shard, **options)) == want
    with np.load(path) as stored:
        assert "schema" in stored
        assert all(not np.array_equal(stored[name], value) for name, value in change.items())


def test_only_the_columns_of_the_labels_are_read_at_opening(tmp_path, monkeypatch):
    table = pick_a_pic([(1.0, True)] * 10)
    large = pa.array([os.urandom(100_000)] * 10, pa.binary())
    large = table.set_column(table.column_names.index("jpg_0"), "jpg_0", large)
    path = write(tmp_path / "large.parquet", large, use_dictionary=False)
    before = int(Path("/proc/self/io").read_text().split()[1])
    ParquetPairs(path)
    assert int(Path("/proc/self/io").read_text().split()[1]) - before < 300_000, "of a megabyte"


def test_memory_per_pair(tmp_path):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True), (0.0, True)] * 5000), rows_per_group=1000)
    source = ParquetPairs(path)
    assert len(pickle.dumps(source)) < 6 * len(source)
