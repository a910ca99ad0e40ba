"""Splits of a data set by the names of its files, and shards that were not downloaded."""

import tarfile

import pytest
from data.parquet_files import SOME, pick_a_pic, write

from polydpo_fast.data import open_source
from polydpo_fast.data.formats.parquet import ParquetPairs
from polydpo_fast.data.source import SourceError


def test_splits_are_not_mixed_by_accident(tmp_path):
    for split in ("train", "test_unique"):
        write(tmp_path / f"{split}-00000-of-00001-abcd.parquet", pick_a_pic(SOME))
    with pytest.raises(SourceError, match=r"several splits: test_unique, train"):
        ParquetPairs(tmp_path)
    train = ParquetPairs(f"{tmp_path}/train-*.parquet")
    both = ParquetPairs([f"{tmp_path}/train-*.parquet", f"{tmp_path}/test_unique-*.parquet"])
    assert len(both) == 2 * len(train)
    with pytest.raises(SourceError, match=r"several splits: test_unique, train"):  # a list of folders lists no splits
        ParquetPairs([tmp_path])


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (("data/train.parquet", "data/test.parquet"), "test, train"),
        (("default/train/0000.parquet", "default/validation/0000.parquet"), "train, val"),
        (("train/a-00000-of-00001.parquet", "test/a-00000-of-00001.parquet"), "test, train"),
        (("Training_0.parquet", "eval-0.parquet", "extra.parquet"), "eval, train"),
        (("train-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"), "train, train_sft"),
        (("training/a.parquet", "partial-train/b.parquet", "constrain/test.parquet"), "test, train"),
        (("test/train_a.parquet", "train/train_a.parquet"), "test, train"),
        (("train2017/a.parquet", "val2017/a.parquet"), "train, val"),
        (("dev.parquet", "train.parquet"), "dev, train"),
        (("animals-00000-of-00001.parquet", "people-00000-of-00001.parquet"), "animals, people"),
        (("photos_train.parquet", "photos_test.parquet"), "test, train"),
        (("a/photos.train.parquet", "a/photos-validation-00.parquet"), "train, val"),
        (("photos_train_0.parquet", "photos_testing_1.parquet", "photos.parquet"), "test, train"),
        (("train/0.parquet", "train/1.parquet"), ""),
        (("flux.1-dev.parquet", "photos-train.parquet", "latest.parquet", "crash-test-cars.parquet"), ""),
        (("flux-dev/a.parquet", "sd3-test/a.parquet", "train/a.parquet"), ""),
        (("flux.1-dev/a.parquet", "val-unsplash/a.parquet", "test/a.parquet"), ""),
        (("dev.1-flux/a.parquet", "trainer/a.parquet", "train-dev/a.parquet", "testament.parquet"), ""),
        (("test/of/train.parquet", "test/of/latest.parquet", "test/of/retrain.parquet"), ""),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "more.parquet"), ""),
    ],
)
def test_splits_by_the_names_of_folders_and_files(tmp_path, paths, splits):
    """Of a folder whose own name says nothing, even where it does."""
    folder = tmp_path / "my-test-set"
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write(folder / path, pick_a_pic(SOME))
    if splits:
        with pytest.raises(SourceError, match=rf"several splits: {splits}, such as \S+ and \S+; expected .*as a list"):
            ParquetPairs(folder)
    else:
        ParquetPairs(folder)
    each = len(ParquetPairs(folder / paths[0]))
    assert len(ParquetPairs([folder / path for path in paths])) == each * len(paths)


def test_splits_of_shards_and_manifests(tmp_path):
    """HPDv2 has train.json and test.json in one folder; what is of another kind does not count."""
    texts = {"json": '[{"win": "a", "lose": "b"}]', "csv": "win,lose\na,b\n", "jsonl": '{"win": 1, "lose": 2}'}
    for kind, text in texts.items():
        folder = tmp_path / kind
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.{kind}").write_text(text)
        with pytest.raises(SourceError, match="several splits: test, train"):
            open_source(folder)
        assert len(open_source(str(folder / "train.*"))) == 1
    (tmp_path / "jsonl" / "test.jsonl").unlink()
    (tmp_path / "jsonl" / "eval").mkdir()
    (tmp_path / "jsonl" / "eval" / "train.jsonl").write_text(texts["jsonl"])
    with pytest.raises(SourceError, match="several splits: eval, train"):
        open_source(tmp_path / "jsonl")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", "train-0", "val-0")
    with pytest.raises(SourceError, match="several splits: train, val"):
        open_source(tmp_path / "shards")
    (tmp_path / "shards" / "val-0.tar").rename(tmp_path / "shards" / "more.tar")
    (tmp_path / "shards" / "test.json").write_text("[]")
    assert len(open_source(tmp_path / "shards")) == 2


def write_shards(folder, *names):
    for name in names:
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for arm in ("win", "lose"):
                shard.addfile(tarfile.TarInfo(f"{name}.{arm}.jpg"))


@pytest.mark.parametrize(
    "names",
    [("train-flux-dev-0", "train-sdxl-0"), ("animals-00000-of-00001", "people-00000-of-00001")],
)
def test_shards_that_are_of_no_splits(tmp_path, names):
    """But of models, and of what is in the pictures."""
    write_shards(tmp_path, *names)
    assert len(open_source(tmp_path)) == 2


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("where", "count", "first"),
    [
        ("", 2, "train-00001-of-00004-x.parquet"),
        ("train-*.parquet", 2, "train-00001-of-00004-x.parquet"),
        ("train-0000[23]-*", 1, "train-00003-of-00004-x.parquet"),
        ("train-0000[02]-*", 0, ""),
        ("train-00002-of-00004-x.parquet", 0, ""),
        ("train-{00002..00002}-of-00004-x.parquet", 0, ""),
    ],
)
def test_shards_that_were_not_downloaded_are_told(tmp_path, recwarn, where, count, first, listed):
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00004-x.parquet", pick_a_pic(SOME))
    ParquetPairs([tmp_path / where] if listed else tmp_path / where)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == bool(count)
    for text in told:
        assert f": {count} files are not there" in text
        assert text.endswith(f"; the first is {first}")
