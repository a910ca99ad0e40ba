"""`ParquetPairs` against what pyarrow's to_pylist gives."""

import contextlib
import json
import math
import os
import pickle
import shutil
import tarfile
import threading
import time
from decimal import Decimal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pairs import everything, plain, png
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polydpo_fast.data import PairLoader, open_source, parquet_index
from polydpo_fast.data import parquet as module
from polydpo_fast.data.arrow import Binary
from polydpo_fast.data.parquet import ParquetPairs
from polydpo_fast.data.reading import Readers
from polydpo_fast.data.source import PairError, SourceError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")


def pick_a_pic(rows, start=0):
    """A table of Pick-a-Pic V2's columns, but for those of the models; rows are (label_0, has_label)."""
    count = len(rows)
    return pa.table(
        {
            "are_different": pa.array([label != 0.5 for label, _ in rows]),
            "best_image_uid": pa.array(["x"] * count),
            "caption": pa.array([f"prompt {start + i}" for i in range(count)]),
            "has_label": pa.array([labelled for _, labelled in rows], pa.bool_()),
            "image_0_uid": pa.array([f"a{start + i}" for i in range(count)]),
            "image_1_uid": pa.array([f"b{start + i}" for i in range(count)]),
            "jpg_0": pa.array([b"zero %d" % (start + i) for i in range(count)], pa.binary()),
            "jpg_1": pa.array([b"one, longer %d" % (start + i) for i in range(count)], pa.binary()),
            "label_0": pa.array([label for label, _ in rows], pa.float64()),
            "label_1": pa.array([None if label is None else 1 - label for label, _ in rows], pa.float64()),
            "ranking_id": pa.array(range(start, start + count), pa.int64()),
        }
    )


def write(path, table, rows_per_group=4, **options):
    pq.write_table(table, path, row_group_size=rows_per_group, **options)
    return str(path)


SOME = [(1.0, True), (0.0, True), (0.5, True), (1.0, False), (None, True), (0.0, True), (math.nan, True), (1.0, None)]


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "shard.parquet", pick_a_pic(SOME), rows_per_group=3)


def expected(paths, ties, columns=()):
    """Row by row, in plain Python. [] per row group."""
    groups = []
    for path in paths:
        file, row = pq.ParquetFile(path), -1
        for number in range(file.num_row_groups):
            pairs = []
            for record in file.read_row_group(number).to_pylist():
                row += 1
                label = record["label_0"]
                if record["has_label"] is False or label is None or math.isnan(label):
                    continue
                if label == 0.5 and ties == "drop":
                    continue
                win, lose = record["jpg_0"], record["jpg_1"]
                if label == 0:
                    win, lose = lose, win
                extra = {name: record[name] for name in columns}
                key = f"{os.path.basename(path)}:{row}"
                pairs.append((key, win, lose, record["caption"], 0.5 if label == 0.5 else 1.0, "", extra))
            if pairs:
                groups.append(pairs)
        file.close()
    return groups


labels = st.tuples(st.sampled_from([1.0, 0.0, 0.5, None, math.nan]), st.sampled_from([True, True, True, False, None]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables=st.lists(st.tuples(st.lists(labels, max_size=12), st.integers(1, 5)), min_size=1, max_size=4),
    ties=st.sampled_from(["drop", "keep"]),
    large=st.booleans(),
    data=st.data(),
)
@example(tables=[([], 1), (SOME, 2), ([(0.5, True)] * 3, 1)], ties="drop", large=False, data=None)
def test_pairs_are_those_of_a_walk_over_the_rows(tmp_path, tables, ties, large, data):
    folder = tmp_path / "tables"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = []
    for number, (rows, size) in enumerate(tables):
        table = pick_a_pic(rows, start=100 * number)
        if large:
            table = table.set_column(6, "jpg_0", table.column("jpg_0").cast(pa.large_binary()))
        paths.append(write(folder / f"{number}.parquet", table, rows_per_group=size))
    oracle = expected(paths, ties, ["ranking_id", "are_different"])
    flat = [pair for group in oracle for pair in group]
    if not flat:
        with pytest.raises(SourceError, match="expected at least one pair"):
            ParquetPairs(folder, ties=ties)
        return
    for _ in range(2):  # without and with the kept index
        source = ParquetPairs(folder, ties=ties, columns=["ranking_id", "are_different"], memory_bytes=0)
        assert len(source) == len(flat)
        assert source.blocks.tolist() == [len(group) for group in oracle]
        order = list(range(len(flat))) if data is None else data.draw(st.permutations(range(len(flat))))
        for index in order:
            assert plain(source[index]) == flat[index]
        every = [row for rows, _ in tables for row in rows]
        nothing = [label is None or math.isnan(label) or has is False for label, has in every]
        assert source.counts == {
            "files": len(tables),
            "rows": len(every),
            "rows without a label": sum(nothing),
            "ties": sum(label == 0.5 and not none for (label, _), none in zip(every, nothing, strict=True)),
            "pairs": len(flat),
        }
    for index in (-1, len(flat)):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.position(index)


def test_a_tie_can_be_an_error(shard):
    with pytest.raises(SourceError, match=r"shard.parquet, row 2: a tie"):
        ParquetPairs(shard, ties="error")
    with pytest.raises(ValueError, match="ties is 'half'"):
        ParquetPairs(shard, ties="half")


def test_who_wins_is_in_the_fingerprint(tmp_path):
    """Also where neither the sizes nor the statistics of the file change."""
    path = tmp_path / "x.parquet"
    found = set()
    for labels in ([1.0, 0.0] * 4, [0.0, 1.0] * 4):
        write(path, pick_a_pic([(label, True) for label in labels]), rows_per_group=8)
        found.add((path.stat().st_size, ParquetPairs(path).fingerprint))
    assert len(found) == 2
    assert len({size for size, _ in found}) == 1


@pytest.mark.parametrize("label", [0.25, 2.0, -1.0, math.inf])
def test_another_label_names_file_and_row(tmp_path, label):
    path = write(tmp_path / "odd.parquet", pick_a_pic([*SOME, (label, False), (label, True)]))
    with pytest.raises(SourceError, match=rf"odd.parquet, row 9: label_0 is {label:g}; expected 1, 0"):
        ParquetPairs(path)


def test_labels_may_be_integers_but_not_text(tmp_path):
    table = pick_a_pic([(1.0, True), (0.0, True)])
    position = table.column_names.index("label_0")
    for kind, fine in ((pa.int64(), True), (pa.float16(), True), (pa.bool_(), True), (pa.string(), False)):
        changed = table.set_column(position, "label_0", table.column("label_0").cast(kind))
        path = write(tmp_path / f"{kind}.parquet", changed)
        if fine:
            assert [bytes(pair.win) for pair in map(ParquetPairs(path).__getitem__, range(2))] == [
                b"zero 0",
                b"one, longer 1",
            ]
        else:
            with pytest.raises(SourceError, match="label_0 is string; expected numbers"):
                ParquetPairs(path)


def image(data, path="x.png"):
    return {"bytes": data, "path": path}


def test_structs_of_bytes_and_path(tmp_path):
    chosen = [image(b"good 0"), image(None), None, image(b"good 3"), image(b"")]
    rejected = [image(b"bad 0"), image(b"bad 1"), image(b"bad 2"), None, image(b"bad 4")]
    table = pa.table({"prompt": ["a", "b", "c", "d", None], "chosen": chosen, "rejected": rejected})
    source = ParquetPairs(write(tmp_path / "preferences.parquet", table, rows_per_group=2))
    assert len(source) == 5
    assert plain(source[0]) == ("preferences.parquet:0", b"good 0", b"bad 0", "a", 1.0, "", {})
    for index, arm, name in ((1, "win", "chosen"), (2, "win", "chosen"), (3, "lose", "rejected"), (4, "win", "chosen")):
        with pytest.raises(PairError, match=rf"^{arm}: {name} has no bytes") as caught:
            source[index]
        assert caught.value.arm == arm


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(4),
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_binary(),
        pa.binary(),
        pa.binary_view(),
        pa.string_view(),
        pa.string(),
    ],
)
def test_kinds_of_columns(tmp_path, kind):
    """Images of any binary type; text as a dictionary, as pandas' categories are stored."""
    of_text = pa.types.is_string_view(kind) or pa.types.is_dictionary(kind)
    fine = not (pa.types.is_string(kind) or of_text)
    table = pa.table(
        {
            "win": pa.array([b"aaaa", None, b"bbbb"], pa.binary()).cast(kind if fine else pa.binary()),
            "lose": pa.array(["cccc", "dddd", "eeee"], kind if pa.types.is_string(kind) else pa.string()),
            "prompt": pa.array(["p", "q", "p"]).cast(kind if of_text else pa.string()),
        }
    )
    if not pa.types.is_string(kind):
        table = table.set_column(1, "lose", table.column("lose").cast(pa.binary()))
    path = write(tmp_path / "kinds.parquet", table)
    if pa.types.is_string(kind):
        with pytest.raises(SourceError, match="lose is string; expected binary, or a struct with bytes"):
            ParquetPairs(path)
        return
    source = ParquetPairs(path)
    assert [plain(source[i])[1:4] for i in (0, 2)] == [(b"aaaa", b"cccc", "p"), (b"bbbb", b"eeee", "p")]
    with pytest.raises(PairError, match="win has no bytes"):
        source[1]


def published(features):
    """A schema as the `datasets` library writes it: of Arrow's types, with its own in the metadata."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"Image": image, "timestamp[ns]": pa.timestamp("ns"), "binary": pa.binary(), "float64": pa.float64()}
    schema = pa.schema([(name, kinds.get(kind) or pa.type_for_alias(kind)) for name, kind in features.items()])
    described = {
        name: {"_type": kind} if kind == "Image" else {"dtype": kind, "_type": "Value"}
        for name, kind in features.items()
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": described}})})


# yuvalkirstain/pickapic_v1 and _v2, of their cards; data-is-better-together/open-image-preferences-v1-binarized, of
# which prompt, chosen and rejected count.
PICK_A_PIC = {
    **{"are_different": "bool", "best_image_uid": "string", "caption": "string", "created_at": "timestamp[ns]"},
    **{"has_label": "bool", "image_0_uid": "string", "image_0_url": "string", "image_1_uid": "string"},
    **{"image_1_url": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "label_1": "float64"},
    **{"model_0": "string", "model_1": "string", "ranking_id": "int64", "user_id": "int64"},
    **{"num_example_per_prompt": "int64", "__index_level_0__": "int64"},
}
PREFERENCES = {
    "prompt": "string",
    "chosen": "Image",
    "rejected": "Image",
    "chosen_model": "string",
    "evolution": "string",
}


def test_shards_as_they_are_published(tmp_path):
    rows = [
        {
            **dict.fromkeys(PICK_A_PIC),
            "jpg_0": b"zero %d" % i,
            "jpg_1": b"one %d" % i,
            "caption": f"prompt {i}",
            "has_label": label is not None,
            "label_0": label,
            "label_1": None if label is None else 1 - label,
            "are_different": label != 0.5,
            "created_at": 1_600_000_000_123_456_000 + i * 1000,  # microseconds, as they are there
            "user_id": 10 + i,
            "__index_level_0__": i,
        }
        for i, label in enumerate([1.0, 0.0, 0.5, None])
    ]
    table = pa.Table.from_pylist(rows, published(PICK_A_PIC))
    write(tmp_path / "train-00000-of-00001-b66ac786bf6fb553.parquet", table, rows_per_group=3)
    columns = ["created_at", "user_id", "__index_level_0__"]
    source = ParquetPairs(tmp_path / "train-*.parquet", ties="keep", columns=columns, category="user_id")
    assert [plain(source[i])[1:6] for i in range(3)] == [
        (b"zero 0", b"one 0", "prompt 0", 1.0, "10"),
        (b"one 1", b"zero 1", "prompt 1", 1.0, "11"),
        (b"zero 2", b"one 2", "prompt 2", 0.5, "12"),
    ]
    assert source.counts == {"files": 1, "rows": 4, "rows without a label": 1, "ties": 1, "pairs": 3}
    assert source[1].extra["user_id"] == 11
    assert (source[1].extra["created_at"].year, source[1].extra["created_at"].microsecond) == (2020, 123457)

    rows = [
        {
            "prompt": f"prompt {i}",
            "chosen": image(b"good %d" % i, None),
            "rejected": image(b"bad %d" % i),
            "chosen_model": "dev",
            "evolution": ["quality", "simplified"][i % 2],
        }
        for i in range(4)
    ]
    write(tmp_path / "cleaned-00000-of-00001.parquet", pa.Table.from_pylist(rows, published(PREFERENCES)))
    source = ParquetPairs(tmp_path / "cleaned-*.parquet", category="evolution", columns=["chosen_model"])
    assert [plain(source[i])[1:] for i in (0, 3)] == [
        (b"good 0", b"bad 0", "prompt 0", 1.0, "quality", {"chosen_model": "dev"}),
        (b"good 3", b"bad 3", "prompt 3", 1.0, "simplified", {"chosen_model": "dev"}),
    ]


def test_unknown_columns_are_listed_beside_those_expected(tmp_path):
    path = write(tmp_path / "other.parquet", pa.table({"image": [b"x"], "text": ["y"]}))
    with pytest.raises(SourceError, match=r"has the columns image, text; expected jpg_0, jpg_1, label_0, caption; or"):
        ParquetPairs(path)


@pytest.mark.parametrize("options", [{"columns": ["modle"]}, {"category": "modle"}, {"weight": "modle"}])
def test_a_column_that_is_not_there(shard, options):
    with pytest.raises(SourceError, match=r"modle; its columns are are_different, best_image_uid"):
        ParquetPairs(shard, **options)


@pytest.mark.parametrize("name", ["weight", "category"])
def test_a_column_that_is_asked_for_by_its_usual_name_is_there(tmp_path, shard, name):
    """As under any other name; also where the file was opened, and its index kept, without being asked."""
    unasked = ParquetPairs(shard)
    assert (unasked[0].weight, unasked[0].category) == (1.0, "")
    with pytest.raises(SourceError, match=rf"shard\.parquet .*{name}; its columns are are_different"):
        ParquetPairs(shard, **{name: name})
    table = pick_a_pic([(1.0, True)] * 3)
    path = write(tmp_path / "wrong.parquet", table.append_column(name, [[["x"]] * 3]))
    with pytest.warns(RuntimeWarning, match="is not used"):
        ParquetPairs(path)
    with pytest.raises(SourceError, match=rf"{name} is list"):
        ParquetPairs(path, **{name: name})
    path = write(tmp_path / "right.parquet", table.append_column(name, [[3, 4, 5]]))
    asked = ParquetPairs(path, **{name: name})
    assert (asked[1].weight, asked[1].category) == ((4.0, "") if name == "weight" else (1.0, "4"))
    assert asked.fingerprint == ParquetPairs(path).fingerprint
    with pytest.raises(SourceError, match=name):
        ParquetPairs([path, shard], **{name: name})
    assert ParquetPairs([path, shard])[1].weight == asked[1].weight


def test_arguments_are_checked(shard):
    with pytest.raises(TypeError, match="columns is 'caption'; expected a list"):
        ParquetPairs(shard, columns="caption")
    with pytest.raises(ValueError, match="memory_bytes is -1"):
        ParquetPairs(shard, memory_bytes=-1)
    with pytest.raises(SourceError, match="caption is string; expected numbers"):
        ParquetPairs(shard, weight="caption")
    with pytest.raises(ValueError, match="columns has jpg_1, an image of the pair"):
        ParquetPairs(shard, columns=["ranking_id", "jpg_1"])


def test_files_of_other_columns_are_refused(tmp_path, shard):
    other = write(tmp_path / "other.parquet", pa.table({"win": [b"x"], "lose": [b"y"]}))
    with pytest.raises(SourceError, match=r"other.parquet has win and lose; the first file jpg_0 and jpg_1"):
        ParquetPairs([shard, other])
    with pytest.raises(SourceError, match=r"other.parquet does not have caption"):
        ParquetPairs([other, shard], columns=["caption"])


def test_splits_are_not_mixed_by_accident(tmp_path):
    for split in ("train", "test_unique"):
        write(tmp_path / f"{split}-00000-of-00001-abcd.parquet", pick_a_pic(SOME))
    with pytest.raises(SourceError, match=r"several splits: test_unique, train"):
        ParquetPairs(tmp_path)
    train = ParquetPairs(f"{tmp_path}/train-*.parquet")
    both = ParquetPairs([f"{tmp_path}/train-*.parquet", f"{tmp_path}/test_unique-*.parquet"])
    assert len(both) == 2 * len(train)


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
def test_shards_that_were_not_downloaded_are_told(tmp_path, recwarn, where, count, first):
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00004-x.parquet", pick_a_pic(SOME))
    ParquetPairs(tmp_path / where)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == bool(count)
    for text in told:
        assert f": {count} files are not there" in text
        assert text.endswith(f"; the first is {first}")


def test_parquet_files_beside_what_datasets_says_of_them(tmp_path):
    """`download_and_prepare` writes such folders, and `save_to_disk` others, with Arrow's files."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    write(folder / "train.parquet", pick_a_pic([(1.0, True)] * 3))
    for name in ("dataset_info.json", "state.json", "dataset_dict.json"):
        (folder / name).write_text("{}")
        assert len(open_source(folder)) == 3
    (folder / "train.parquet").unlink()
    with pytest.raises(SourceError, match="was written by save_to_disk"):
        open_source(folder)


def test_a_folder_with_braces_in_its_name(tmp_path):
    folder = tmp_path / "run{0..1}"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.parquet", pick_a_pic([(1.0, True)] * 3))
    for place, pairs in ((folder, 6), (folder / "a.parquet", 3), (folder / "*.parquet", 6)):
        assert len(open_source(str(place))) == pairs
    with pytest.raises(SourceError, match=r"run0/c\.parquet: no such file"):
        open_source(f"{folder}/c.parquet")


@pytest.mark.parametrize("names", [{"weight": "w", "category": "kind"}, {}])
def test_weight_and_category(tmp_path, names):
    table = pick_a_pic([(1.0, True), (0.5, True), (None, True), (0.0, True), (0.0, True), (1.0, True)])
    weights = [2.0, 3.0, 1.0, None, -1.0, 0.0]
    kinds = ["dog", "cat", "never", None, "dog", "Ünï"]
    table = table.append_column(names.get("weight", "weight"), [weights])
    table = table.append_column(names.get("category", "category"), pa.array(kinds).dictionary_encode())
    first = write(tmp_path / "0.parquet", table)
    second = write(tmp_path / "1.parquet", table.slice(4))
    for _ in range(2):
        source = ParquetPairs([first, second], ties="keep", **names)
        texts, codes = source.categories
        assert texts == ("", "cat", "dog", "Ünï")
        assert [texts[code] for code in codes] == ["dog", "cat", "", "dog", "Ünï", "dog", "Ünï"]
        assert [source[i].weight for i in (0, 1, 2, 4)] == [2.0, 1.5, 1.0, 0.0]
        assert [source[i].category for i in (0, 1, 4)] == ["dog", "cat", "Ünï"]
        with pytest.raises(PairError, match=r"row 4: w(eight)? is -1.0; expected a number >= 0"):
            source[3]
    plain_source = ParquetPairs(first, category=None, weight=None)
    assert plain_source.categories[0] == ("",)
    assert [plain_source[i].weight for i in range(4)] == [1.0] * 4
    assert source.fingerprint != ParquetPairs([first, second], ties="keep", category=None, weight=None).fingerprint


def test_weight_and_category_in_some_of_the_files(tmp_path):
    table = pick_a_pic([(1.0, True)] * 3)
    paths = [
        write(tmp_path / "0.parquet", table),
        write(tmp_path / "1.parquet", table.append_column("category", [[7, None, 5]])),
        write(tmp_path / "2.parquet", table.append_column("weight", [[7, None, 5]])),
        write(tmp_path / "3.parquet", table.append_column("category", [["7", "", None]])),
    ]
    for _ in range(2):  # from the kept index, too
        source = ParquetPairs(paths)
        pairs = [source[i] for i in range(12)]
        assert [pair.category for pair in pairs] == ["", "", "", "7", "", "5", "", "", "", "7", "", ""]
        assert [pair.weight for pair in pairs] == [1.0] * 6 + [7.0, 1.0, 5.0] + [1.0] * 3
        texts, codes = source.categories
        assert [texts[code] for code in codes] == [pair.category for pair in pairs]
    assert ParquetPairs(paths[0]).fingerprint == ParquetPairs(paths[0], category=None, weight=None).fingerprint


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("weight", ["a", "b", "c"], "weight is string, and is not used; expected numbers, or weight=None"),
        ("weight", [True, False, None], "weight is bool, and is not used"),
        ("weight", [Decimal("1.5")] * 3, r"weight is decimal128\(2, 1\), and is not used"),
        ("category", [["a"], ["b"], []], "category is list.*, and is not used; expected text or integers"),
        ("category", [1.5, 2.0, None], "category is double, and is not used"),
        ("category", [b"\xff"] * 3, "category is binary, and is not used"),
    ],
)
def test_a_weight_or_category_of_another_kind_is_not_used(tmp_path, name, values, expected):
    """Nobody asked for it. Under another name, which has to be given, it is refused."""
    table = pick_a_pic([(1.0, True)] * 3)
    path = write(tmp_path / "0.parquet", table.append_column(name, [values]))
    for _ in range(2):  # from the kept index, too
        with pytest.warns(RuntimeWarning, match=rf"0\.parquet: {expected}"):
            source = ParquetPairs(path)
        assert [(source[i].weight, source[i].category) for i in range(3)] == [(1.0, "")] * 3
    assert source.fingerprint == ParquetPairs(path, **{name: None}).fingerprint
    good = write(tmp_path / "1.parquet", table.append_column(name, [[1, 2, 3]]))
    with pytest.warns(RuntimeWarning, match=rf"0\.parquet: {expected}"):
        assert ParquetPairs([good, path])[1].weight == 1.0
    other = write(tmp_path / "other.parquet", table.append_column("other", [values]))
    if values[0] == b"\xff":
        with pytest.raises(SourceError, match=r"other\.parquet: other is no text: .*; expected text or integers"):
            ParquetPairs(other, category="other")
    elif values[0] != 1.5:  # numbers are made text
        wanted = {"weight": "other is .*; expected numbers", "category": "other is .*; expected text or integers"}
        with pytest.raises(SourceError, match=rf"other\.parquet: {wanted[name]}"):
            ParquetPairs(other, **{name: "other"})


@pytest.mark.parametrize("value", [1e39, 1e300, 1e-60])
def test_weights_that_float32_cannot_hold_are_refused(tmp_path, value):
    table = pick_a_pic([(1.0, True)] * 3).append_column("weight", [[3.4e38, 1e-44, value]])
    source = ParquetPairs(write(tmp_path / "pairs.parquet", table))
    assert [np.float32(source[i].weight) for i in (0, 1)] == [np.float32(3.4e38), np.float32(1e-44)]
    with pytest.raises(PairError, match=r"row 2: weight is 1e[-+]\d+; expected 0, or a number that float32 can hold"):
        source[2]


def test_a_row_group_that_grows_without_bound_is_refused(tmp_path, monkeypatch):
    """A value that the file has once stands in all of its rows."""
    monkeypatch.setattr(module, "_LEAST_BOUND", 1 << 22)
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([os.urandom(1 << 16)]))
    table = pa.table({"win": many, "lose": pa.array([b"small"] * 2000)})
    options = dict(store_schema=False, dictionary_pagesize_limit=1 << 20)
    path = write(tmp_path / "bomb.parquet", table, rows_per_group=2000, **options)
    assert os.path.getsize(path) < 1 << 17
    source = ParquetPairs(path)
    most = pa.default_memory_pool().max_memory()
    with pytest.raises(
        PairError, match=r"row group 0: it has \d+ bytes in the file of \d+, and more than \d+"
    ) as caught:
        source[0]
    assert caught.value.whole_block
    assert pa.default_memory_pool().max_memory() < most + (1 << 25), "of 131 MB"
    few = write(tmp_path / "few.parquet", table.slice(0, 40), rows_per_group=40, **options)
    assert len(ParquetPairs(few)[39].win) == 1 << 16
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20000, np.int32)), pa.array(["x" * (1 << 16)]))
    table = pa.table({"win": [b"w"] * 20000, "lose": [b"l"] * 20000, "category": texts})
    path = write(tmp_path / "texts.parquet", table, rows_per_group=20000, **options)
    most = pa.default_memory_pool().max_memory()
    assert ParquetPairs(path).categories[0] == ("x" * (1 << 16),)
    assert pa.default_memory_pool().max_memory() < most + (1 << 25), "of 1.3 GB"


def test_paths_in_the_place_of_images_are_told(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"win": pa.array([{"bytes": None, "path": "a.png"}], kind), "lose": [b"l"]})
    with pytest.raises(
        PairError, match=r"win has no bytes; paths are not followed: embed .* \.jsonl or \.csv manifest"
    ):
        ParquetPairs(write(tmp_path / "struct.parquet", table))[0]
    table = pa.table({"win": ["a.png"], "lose": ["b.png"]})
    with pytest.raises(SourceError, match=r"win is string; .*; for paths of files write a \.jsonl or \.csv manifest"):
        ParquetPairs(write(tmp_path / "text.parquet", table))


def test_the_bytes_are_views_that_outlive_the_source(tmp_path):
    path = write(tmp_path / "one.parquet", pick_a_pic([(0.0, True)] * 50), rows_per_group=50)
    source = ParquetPairs(path)
    pairs = [source[i] for i in range(50)]
    for pair in pairs:
        assert isinstance(pair.win, memoryview)
        assert pair.win.readonly
        assert pair.win.format == "B"
    address = [np.frombuffer(pair.win, np.uint8).ctypes.data for pair in pairs]
    assert np.diff(address).tolist() == [len(pair.win) for pair in pairs[:-1]], "one behind the other: not copied"
    del source
    assert [bytes(pair.win) for pair in pairs] == [b"one, longer %d" % i for i in range(50)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_views_into_slices_and_chunks(kind):
    values = [b"a", None, b"", b"four", b"fifth", None, b"7"]
    if pa.types.is_struct(kind):
        structs = [{"bytes": value} if value is not None or row == 1 else None for row, value in enumerate(values)]
        whole = pa.array(structs, kind)
    else:
        whole = pa.array(values, kind)
    column = Binary(pa.chunked_array([whole.slice(1, 3), whole.slice(0, 0), whole.slice(3), whole[:0]], kind))
    found = [column.get(row) for row in range(7)]
    expected_views = [*values[1:4], *values[3:]]
    assert [None if view is None else bytes(view) for view in found] == expected_views
    with pytest.raises(IndexError):
        column.get(7)


def counted_reads(source, monkeypatch, slow=0.0):
    reads, read = [], source._read

    def counting(block):
        reads.append((block.file, block.number))
        time.sleep(slow)
        return read(block)

    monkeypatch.setattr(source, "_read", counting)
    return reads


def test_a_row_group_is_read_once_and_evicted_by_size(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 40), rows_per_group=10)
    source = ParquetPairs(path)
    size = source._read(source._blocks[0]).size
    source = ParquetPairs(path, memory_bytes=size * 5 // 2)
    reads = counted_reads(source, monkeypatch)
    for index in (0, 1, 9, 10, 0, 20):  # 0 and 1; then 2 comes for 1, which was used longest ago
        source[index]
    assert [number for _, number in reads] == [0, 1, 2]
    source[5]
    assert [number for _, number in reads] == [0, 1, 2]
    source[15]
    assert [number for _, number in reads] == [0, 1, 2, 1]


def test_threads_share_a_read_and_do_not_wait_for_others(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 40), rows_per_group=10)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch, slow=0.2)
    found, started = {}, time.perf_counter()

    def get(index):
        found[index] = plain(source[index])

    threads = [threading.Thread(target=get, args=(index,)) for index in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert time.perf_counter() - started < 0.7, "four reads of 0.2 s each, side by side"
    assert found == dict(enumerate(chain(*expected([path], "drop"))))


def test_one_read_that_hangs_costs_the_pairs_that_waited_for_it(tmp_path, monkeypatch):
    """Another thread reads the row group again: for the rest of it, and for the next pass."""
    images = [{"win": png(i, 0, 0), "lose": png(i, 0, 1)} for i in range(80)]
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pa.Table.from_pylist(images), rows_per_group=20))
    read, hung, let_go = source._read, [], threading.Event()

    def once(block):
        if block.number == 1 and not hung:
            hung.append(block.number)
            let_go.wait(60)
        return read(block)

    monkeypatch.setattr(source, "_read", once)
    loader = PairLoader(source, 4, size=2, dtype=torch.uint8, shuffle=False, timeout_s=0.3, max_bad_rate=1.0)
    try:
        got = [i for batch in loader for i in batch.index.tolist()]
        lost = [i for i in range(80) if got[i] != i]
        assert 1 <= len(lost) <= 4, "as many as threads read"
        assert set(lost) <= set(range(20, 40))
        assert loader.stats.bad == len(lost)
        assert [i for batch in loader for i in batch.index.tolist()] == list(range(80))
        assert loader.stats.bad == len(lost)
    finally:
        let_go.set()


def test_slow_reads_are_not_multiplied(tmp_path, monkeypatch):
    """Each time a thread is given up another one may begin the same read: three at a time, not one for each thread."""
    images = [{"win": png(i, 0, 0), "lose": png(i, 0, 1)} for i in range(40)]
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pa.Table.from_pylist(images), rows_per_group=40))
    read, lock, now, most = source._read, threading.Lock(), [0], [0]

    def slow(block):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(1.0)
        try:
            return read(block)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(source, "_read", slow)
    options = dict(size=2, dtype=torch.uint8, timeout_s=0.15, readers=6, max_bad_rate=1.0, max_bad_run=40)
    got = [i for batch in PairLoader(source, 4, **options) for i in batch.index.tolist()]
    assert len(got) == 40
    assert 2 <= most[0] <= 3


def test_a_read_that_takes_longer_than_a_thread_may_wait_is_begun_anew(tmp_path, monkeypatch):
    """Also where the one that hangs is no loader's, so that nobody gives it up."""
    source = ParquetPairs(write(tmp_path / "pairs.parquet", pick_a_pic([(1.0, True)] * 8)))
    read, entered, let_go = source._read, threading.Event(), threading.Event()

    def slow(block):
        if threading.current_thread().name == "stranger":
            entered.set()
            let_go.wait(60)
        return read(block)

    monkeypatch.setattr(source, "_read", slow)
    stranger = threading.Thread(target=lambda: source[0], name="stranger")
    stranger.start()
    assert entered.wait(30)
    readers = Readers(source, False, 1, 0.2)
    try:
        first, second = readers.ask(1), readers.ask(2)
        for reading in (first, second):
            readers.wait(reading, lambda: None)
        assert "more than 0.2 s" in str(first.error)
        assert bytes(second.pair.win) == b"zero 2"
    finally:
        let_go.set()
        stranger.join()
        readers.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_reads(tmp_path, monkeypatch):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    source[7]
    reading, go_on, read = threading.Event(), threading.Event(), source._read

    def slow(block):
        reading.set()
        if threading.current_thread() is not threading.main_thread():
            go_on.wait(30)
        return read(block)

    monkeypatch.setattr(source, "_read", slow)
    thread = threading.Thread(target=lambda: source[0])
    thread.start()
    assert reading.wait(30)
    child = os.fork()
    if child == 0:  # its copy of the lock is held by a thread that it does not have
        os._exit(0 if bytes(source[0].win) == b"zero 0" and bytes(source[7].win) == b"zero 7" else 1)
    deadline = time.monotonic() + 60
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    go_on.set()
    thread.join()
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done
    assert status == 0


def test_no_descriptor_is_kept(shard):
    def descriptors():
        return sum("parquet" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    source = ParquetPairs(shard)
    pair = source[0]
    assert descriptors() == 0
    assert bytes(pair.win) == b"zero 0"


def test_pickling_keeps_the_pairs_and_leaves_the_row_groups(tmp_path):
    path = write(tmp_path / "many.parquet", pick_a_pic([(1.0, True)] * 400), rows_per_group=100)
    source = ParquetPairs(path)
    cold = pickle.dumps(source)
    expected_pairs = everything(source)
    assert len(pickle.dumps(source)) == len(cold)
    again = pickle.loads(cold)
    assert everything(again) == expected_pairs
    assert again.fingerprint == source.fingerprint


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


def test_keys_are_unique_where_names_are_not(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "0.parquet", pick_a_pic(SOME))
    source = ParquetPairs([tmp_path / "a", tmp_path / "b"])
    keys = [source[i].key for i in range(len(source))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "a/0.parquet:0"
    assert source.position(0) == f"{tmp_path}/a/0.parquet, row 0"


# ---------------------------------------------------------------------------------------------------- damage


def test_names_like_globs(tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    write(folder / "b*[0]?.parquet", pick_a_pic(SOME))
    assert bytes(ParquetPairs(folder)[0].win) == b"zero 0"
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/odd/b[0].parquet", (folder / "b*[0]?.parquet").read_bytes())
    try:
        assert bytes(ParquetPairs("memory://odd")[0].win) == b"zero 0"
    finally:
        memory.rm("/odd", recursive=True)


def test_files_that_are_no_parquet(tmp_path, shard):
    content = Path(shard).read_bytes()
    damaged = {
        "empty": b"",
        "short": b"PAR1",
        "text": b"<html>404</html>" * 10,
        "cut": content[: len(content) // 2],
        "footer": content[:-8][: -int.from_bytes(content[-8:-4], "little")].ljust(len(content) - 8, b"\xff")
        + content[-8:],
        "length": content[:-8] + b"\xff\xff\xff\x7fPAR1",
    }
    for name, data in damaged.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=f"{name}.parquet"):
            ParquetPairs(path)


def test_a_damaged_row_group_costs_its_own_pairs_only(tmp_path, monkeypatch):
    path = write(tmp_path / "bad.parquet", pick_a_pic([(1.0, True)] * 12), rows_per_group=4, compression="snappy")
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(file.schema_arrow.names.index("jpg_0"))
        begin = min(p for p in (chunk.dictionary_page_offset, chunk.data_page_offset) if p)
        length = chunk.total_compressed_size
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * length)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch)
    for index in range(12):
        if 4 <= index < 8:
            with pytest.raises(PairError, match=r"bad.parquet, row group 1: ") as caught:
                source[index]
            assert caught.value.arm is None
        else:
            assert bytes(source[index].win) == b"zero %d" % index
    assert [number for _, number in reads] == [0, 1, 2], "a failure is not tried again"
    monkeypatch.setattr(module, "_FORGET_S", 0.01)
    source = ParquetPairs(path)
    reads = counted_reads(source, monkeypatch)
    for _ in range(2):
        with pytest.raises(PairError):
            source[4]
        time.sleep(0.02)
    assert [number for _, number in reads] == [1, 1], "but after a while"


def test_any_flipped_byte_is_an_error_or_gives_a_pair(tmp_path):
    """Never another exception, never a hang."""
    path = write(tmp_path / "flip.parquet", pick_a_pic(SOME), rows_per_group=4)
    content = Path(path).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        data = bytearray(content)
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(data)
        try:
            source = ParquetPairs(path)
        except SourceError as error:
            outcomes.add("source" if "flip.parquet" in str(error) else "a source without its name")
            continue
        for index in range(len(source)):
            try:
                source[index]
                outcomes.add("pair")
            except PairError:
                outcomes.add("error")
    assert outcomes == {"source", "pair", "error"}


def test_a_file_that_has_changed_since(tmp_path):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    source[0]
    write(path, pick_a_pic([(0.0, True)] * 8), rows_per_group=4)
    with pytest.raises(PairError, match=r"row group 1: .*has been changed since it was opened"):
        source[4]
    os.unlink(path)
    fresh = pickle.loads(pickle.dumps(source))
    with pytest.raises(PairError, match=r"shard.parquet, row group 0: .*No such file"):
        fresh[0]
    with pytest.raises(SourceError, match="no such file"):
        ParquetPairs(path)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source, opened = ParquetPairs(path), module.open_parquet

    @contextlib.contextmanager
    def replaced(file):
        with opened(file) as parquet:
            yield parquet
        write(path, pick_a_pic([(0.0, True)] * 9), rows_per_group=4)

    monkeypatch.setattr(module, "open_parquet", replaced)
    with pytest.raises(PairError, match="has been changed since it was opened"):
        source[0]


def test_a_file_that_is_truncated_later(tmp_path):
    path = write(tmp_path / "shard.parquet", pick_a_pic([(1.0, True)] * 8), rows_per_group=4)
    source = ParquetPairs(path)
    facts = os.stat(path)
    os.truncate(path, facts.st_size // 2)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(PairError, match="row group 0"):
        source[0]


def test_text_that_is_not_utf8_costs_one_pair(tmp_path):
    table = pa.table({"win": [b"a", b"b"], "lose": [b"c", b"d"], "prompt": pa.array([b"fine", b"\xff\xfe"])})
    binary = table.schema.get_field_index("prompt")
    text = pa.StringArray.from_buffers(2, *table.column("prompt").chunk(0).buffers()[1:])
    source = ParquetPairs(write(tmp_path / "text.parquet", table.set_column(binary, "prompt", text)))
    assert source[0].prompt == "fine"
    with pytest.raises(PairError, match="utf-8"):
        source[1]


# ------------------------------------------------------------------------------------------------- the index


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


def test_more_rows_than_a_file_can_hold_are_refused(tmp_path):
    count = 2_000_000
    table = pa.table({"win": pa.nulls(count, pa.binary()), "lose": pa.nulls(count, pa.binary())})
    path = write(tmp_path / "bomb.parquet", table, rows_per_group=count)
    with pytest.raises(SourceError, match="says that it has 2000000 rows"):
        ParquetPairs(path)


# ---------------------------------------------------------------------------------------------------- elsewhere


def test_through_fsspec(shard):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
    try:
        source, local = ParquetPairs("memory://bucket/"), ParquetPairs(shard)
        assert everything(source) == everything(local)
        assert source.fingerprint == local.fingerprint
        assert source.position(0) == "memory://bucket/shard.parquet, row 0"
        fresh = pickle.loads(pickle.dumps(source))
        memory.rm("/bucket/shard.parquet")
        with pytest.raises(PairError, match="row group 0"):
            fresh[0]
        memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
        with pytest.raises(PairError, match="has been changed"):
            fresh[0]
    finally:
        memory.rm("/bucket", recursive=True)


def test_what_a_network_failed_to_give_is_tried_again(shard, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/shard.parquet", Path(shard).read_bytes())
    try:
        source = ParquetPairs("memory://bucket/shard.parquet")
        with monkeypatch.context() as patch:
            patch.setattr(module.File, "open", lambda self: (_ for _ in ()).throw(TimeoutError("slow")))
            patch.setattr("polydpo_fast.data.remote._PAUSES_S", (0.0,))
            with pytest.raises(PairError, match="row group 0: slow"):
                source[0]
        assert bytes(source[0].win) == b"zero 0"
    finally:
        memory.rm("/bucket", recursive=True)
