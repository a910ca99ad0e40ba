"""`open_source`: what is no source of pairs is told."""

import re
from pathlib import Path

import pytest
from data.pairs import Tiny

from polydpo_fast.data import PairLoader, SourceError, open_source
from polydpo_fast.data import sources as sources_module


def test_empty_and_missing_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"the source has no pairs: \{'pairs': 0\}"):
        PairLoader(Tiny(0, blocks=[0]), 1)
    with pytest.raises(SourceError, match="no such file"):
        PairLoader(tmp_path / "none.parquet", 1)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(SourceError, match="files of several kinds: csv, jsonl; expected one"):
        PairLoader(tmp_path, 1)
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="files of several kinds: parquet, tar; expected one"):
        PairLoader(tmp_path, 1)
    (tmp_path / "c.txt").touch()
    with pytest.raises(SourceError, match=r"ends in .txt; expected .parquet, .tar"):
        PairLoader(tmp_path / "c.txt", 1)


def test_folders_of_something_else_are_told(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        SourceError, match=r"photos: the folder has no .parquet or .tar or .jsonl or .csv or .json in it$"
    ):
        PairLoader(tmp_path / "photos", 1)
    (tmp_path / "photos" / "a.JPG").touch()
    with pytest.raises(SourceError, match=r'in it; for files of images .* lines such as \{"win": "a.jpg", "lose": "b'):
        PairLoader(tmp_path / "photos", 1)
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).touch()
    with pytest.raises(
        SourceError, match=r"saved was written by save_to_disk .*; expected .*load_from_disk\('/.*saved'\)"
    ):
        PairLoader(tmp_path / "saved", 1)


def test_names_of_the_hub_are_told(tmp_path, monkeypatch):
    """By the command with which the configurations download one; paths that are wrong are no such names."""
    monkeypatch.chdir(tmp_path)
    recipe = (Path(__file__).parents[2] / "configs" / "sd15-pickapic.yaml").read_text()
    command = re.search("hf download .*", recipe)[0]
    name = command.split()[2]
    with pytest.raises(
        SourceError, match=f"{name}: no such .*, expected hf://datasets/{name}, or the folder .* `{command}` m"
    ):
        open_source(name)
    (tmp_path / "data").mkdir()
    for where in ("data/pickapic_v2", "pickapic/pairs.jsonl", "/pickapic/v2", "a/b/c", "pickapic_v2"):
        with pytest.raises(SourceError, match=r"no such file or folder [^;]*$"):
            open_source(where)


def test_a_storage_is_not_listed_twice(tmp_path, monkeypatch):
    """What kind of source it is, the names tell."""
    (tmp_path / "pairs.jsonl").write_text('{"win": "a.png", "lose": "b.png"}\n')
    monkeypatch.setattr(sources_module, "find", lambda *_: pytest.fail("listed"))
    for where in ("pairs.jsonl", "*.jsonl", "pair?.jsonl"):
        assert len(open_source(tmp_path / where)) == 1
    assert len(open_source([tmp_path / "pairs.jsonl"])) == 1
