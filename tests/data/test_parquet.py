"""`ParquetPairs` against what pyarrow's to_pylist gives."""

import json
import math
import pickle
import shutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from data.pairs import everything, plain
from data.parquet_files import SOME, expected, pa, pick_a_pic, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polydpo_fast.data import open_source
from polydpo_fast.data.formats.parquet import ParquetPairs
from polydpo_fast.data.source import PairError, SourceError

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


def test_keys_are_unique_where_names_are_not(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "0.parquet", pick_a_pic(SOME))
    source = ParquetPairs([tmp_path / "a", tmp_path / "b"])
    keys = [source[i].key for i in range(len(source))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "a/0.parquet:0"
    assert source.position(0) == f"{tmp_path}/a/0.parquet, row 0"


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
