"""`RecordPairs` over lists of mappings, over something like a `datasets.Dataset`, and over a real one."""

import inspect
import io
import math
import os
import pickle
import signal
import tarfile
import threading
import tracemalloc
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.pairs import everything, plain
from hypothesis import given
from hypothesis import strategies as st

from polydpo_fast.data import PairLoader, open_source
from polydpo_fast.data.formats.records import RecordPairs
from polydpo_fast.data.source import PairError, SourceError


def pick(row, label, labelled=True):
    """As in Pick-a-Pic."""
    images = {"jpg_0": b"zero %d" % row, "jpg_1": b"one %d" % row}
    return {**images, "label_0": label, "has_label": labelled, "caption": f"prompt {row}", "ranking_id": row}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_makes_the_fingerprint():
    reading, go_on, main = threading.Event(), threading.Event(), threading.main_thread()

    class Records(list):
        def __getitem__(self, row):
            if threading.current_thread() is not main:
                reading.set()
                go_on.wait(30)
            return super().__getitem__(row)

    source, made = RecordPairs(Records([pick(0, 1.0)])), []
    thread = threading.Thread(target=lambda: made.append(source.fingerprint))
    thread.start()
    assert reading.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os._exit(0 if source.fingerprint else 1)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join()
    assert made == [source.fingerprint]


def test_rows_without_a_label_however_it_is_written():
    for labelled in (False, 0, np.bool_(False), np.int64(0), "False", "0.0"):
        source = RecordPairs([pick(0, 0.0, labelled), pick(1, 1.0, np.bool_(True)), pick(2, 0.0, None)])
        assert [source[i].key for i in range(len(source))] == ["1", "2"]


labels = st.tuples(st.sampled_from([1.0, 0, 0.5, None, math.nan]), st.sampled_from([True, True, False, None]))


@given(rows=st.lists(labels, min_size=1, max_size=15), ties=st.sampled_from(["drop", "keep"]))
def test_pairs_are_those_of_a_walk_over_the_records(rows, ties):
    records = [pick(row, *facts) for row, facts in enumerate(rows)]
    oracle = []
    for row, record in enumerate(records):
        label = record["label_0"]
        if record["has_label"] is False or label is None or label != label or (label == 0.5 and ties == "drop"):
            continue
        win, lose = ("jpg_1", "jpg_0") if label == 0 else ("jpg_0", "jpg_1")
        weight = 0.5 if label == 0.5 else 1.0
        oracle.append((str(row), record[win], record[lose], record["caption"], weight, "", {"ranking_id": row}))
    if not oracle:
        with pytest.raises(SourceError, match="expected at least one pair"):
            RecordPairs(records, ties=ties)
        return
    source = RecordPairs(records, ties=ties, columns=["ranking_id"])
    assert everything(source) == oracle
    assert source.blocks.tolist() == [len(oracle)]
    assert [source.position(i) for i in range(len(source))] == [f"records[{key}]" for key, *_ in oracle]
    assert source.counts["rows"] == len(rows)
    assert source.counts["pairs"] == len(oracle)
    for index in (-1, len(oracle)):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.position(index)


def test_labels_that_cannot_be(tmp_path):
    with pytest.raises(SourceError, match=r"records, row 1: label_0 is 0.7; expected 1, 0"):
        RecordPairs([pick(0, 1.0), pick(1, 0.7)])
    with pytest.raises(SourceError, match=r"records, row 1: label_0 is '1'; expected a number"):
        RecordPairs([pick(0, 1.0), pick(1, "1")])
    with pytest.raises(SourceError, match=r"records, row 1: a tie"):
        RecordPairs([pick(0, 1.0), pick(1, 0.5)], ties="error")


def test_images_are_bytes_or_paths_or_mappings_of_them(tmp_path):
    image, clip = tmp_path / "a.png", tmp_path / "a.MP4"
    image.write_bytes(b"image")
    clip.write_bytes(b"clip")
    records = [
        {"win": b"bytes", "lose": bytearray(b"array")},
        {"win": memoryview(b"view"), "lose": np.frombuffer(b"numbers", np.uint8)},
        {"win": {"bytes": b"first", "path": str(image)}, "lose": {"path": str(image)}},
        {"win": str(image), "lose": image},
        {"win": str(clip), "lose": {"bytes": None, "path": clip}},
    ]
    source = RecordPairs(records)
    assert [plain(source[i])[1:3] for i in range(4)] == [
        (b"bytes", b"array"),
        (b"view", b"numbers"),
        (b"first", b"image"),
        (b"image", b"image"),
    ]
    assert source[4].win == clip
    assert source[4].lose == clip
    assert source[0].prompt == ""


def test_an_image_through_fsspec():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/images/a.jpg", b"far away")
    try:
        source = RecordPairs([{"win": "memory://images/a.jpg", "lose": b"x"}, {"win": "memory://gone", "lose": b"x"}])
        assert bytes(source[0].win) == b"far away"
        with pytest.raises(PairError, match=r"^win: win "):
            source[1]
    finally:
        memory.rm("/images", recursive=True)


def pil(*_):
    return pytest.importorskip("PIL.Image").new("RGB", (2, 2))


BAD = [
    ({"win": None}, "win", "win is missing"),
    ({"win": b""}, "win", "win has no bytes"),
    ({"lose": {"bytes": None, "path": None}}, "lose", "lose is missing"),
    ({"lose": "/nowhere/at all.png"}, "lose", "lose is at /nowhere/at all.png: No such file"),
    ({"lose": "/dev/null"}, "lose", "lose is at /dev/null: it is no regular file"),
    ({"lose": 7}, "lose", "lose is a int; expected bytes"),
    ({"win": np.zeros((2, 2, 3), np.uint8)}, "win", r"win is an array of shape \(2, 2, 3\)"),
    ({"win": pil}, "win", r"win is a PIL image; expected the bytes.*Image\(decode=False\)"),
    ({"prompt": 7}, None, "prompt is a int; expected text"),
    ({"w": "1"}, None, "w is '1'; expected a number"),
    ({"w": -1}, None, "w is -1; expected a number"),
    ({"w": math.nan}, None, "w is nan; expected a number"),
]


@pytest.mark.parametrize(("change", "arm", "reason"), BAD, ids=lambda value: None)
def test_a_bad_record_is_an_error_of_its_pair(change, arm, reason):
    good = {"win": b"w", "lose": b"l", "prompt": "p", "w": 2}
    change = {name: value() if value is pil else value for name, value in change.items()}
    source = RecordPairs([good, {**good, **change}, good], weight="w")
    with pytest.raises(PairError, match=rf"^{arm}: {reason}" if arm else f"^{reason}") as caught:
        source[1]
    assert caught.value.arm == arm
    assert plain(source[2]) == ("2", b"w", b"l", "p", 2.0, "", {})


def test_records_that_fail_or_are_none():
    class Odd(list):
        def __getitem__(self, row):
            if row == 1:
                raise RuntimeError("the disk is gone")
            return super().__getitem__(row)

    good = {"win": b"w", "lose": b"l", "kind": "x"}
    source = RecordPairs(Odd([good, good, [1, 2], {"win": b"w", "lose": b"l"}]), columns=["kind"])
    for index, reason in (
        (1, r"RuntimeError: the disk is gone"),
        (2, r"it is a list; expected a mapping"),
        (3, r"it does not have kind"),
    ):
        with pytest.raises(PairError, match=reason):
            source[index]
    with pytest.raises(SourceError, match=r"records\[1\]: RuntimeError: the disk is gone"):
        RecordPairs(Odd([good, good]), category="kind")


def test_a_first_record_that_lacks_its_image_does_not_refuse_the_others():
    source = RecordPairs([{"win": None, "lose": b"l"}, {"win": b"w", "lose": b"l"}])
    assert bytes(source[1].win) == b"w"


class DataFrame:
    """As that of pandas: a length in rows, and columns by their names."""

    def __len__(self):
        return 1

    def __getitem__(self, name):
        return {"win": [b"w"], "lose": [b"l"]}[name]


class Streaming:
    """As an IterableDataset of the package datasets."""

    def __iter__(self):
        return iter([{"win": b"w", "lose": b"l"}])

    def take(self, count):
        return self


@pytest.mark.parametrize(
    ("records", "error", "reason"),
    [
        (Streaming(), TypeError, "records is a Streaming; .* a streaming dataset has none: load it with"),
        ([], SourceError, "records is empty"),
        (DataFrame(), TypeError, r"records is a DataFrame, which has no records\[0\]; .*frame.to_dict\('records'\)"),
        ([1], SourceError, r"records\[0\] is a int; expected a mapping"),
        ([{"a": 1, "b": 2}], SourceError, r"records\[0\] has the columns a, b; expected jpg_0, jpg_1"),
        ([{"win": pil, "lose": b""}], SourceError, r"records\[0\]: win is a PIL image"),
        (
            {"train": [], "test": []},
            TypeError,
            r"records is a dict of train, test; expected a sequence of mappings: .* sets, records\['train'\]",
        ),
        (iter([]), TypeError, "expected a sequence of mappings, with a length"),
        ("records", TypeError, "records is a str"),
    ],
)
def test_what_is_no_sequence_of_pairs(records, error, reason):
    if isinstance(records, list) and records and isinstance(records[0], dict):
        records = [{name: value() if value is pil else value for name, value in records[0].items()}]
    with pytest.raises(error, match=reason):
        RecordPairs(records)


def test_names_of_columns_are_checked():
    records = [{"win": b"w", "lose": b"l"}]
    for options in ({"columns": ["kind"]}, {"category": "kind"}, {"weight": "kind"}):
        with pytest.raises(SourceError, match=r"records\[0\] does not have kind; it has win, lose"):
            RecordPairs(records, **options)
    for name in ("category", "weight"):  # asked for, it is to be there
        with pytest.raises(SourceError, match=rf"records\[0\] does not have {name}; it has win, lose"):
            RecordPairs(records, **{name: name})
    with pytest.raises(PairError, match="it does not have weight"):
        RecordPairs([{**records[0], "weight": 1}, records[0]], weight="weight")[1]
    with pytest.raises(TypeError, match="columns is 'win'"):
        RecordPairs(records, columns="win")
    with pytest.raises(ValueError, match="columns has win"):
        RecordPairs(records, columns=["win"])
    with pytest.raises(ValueError, match="ties is None"):
        RecordPairs(records, ties=None)


def test_weight_and_category_are_taken_where_they_are_there():
    image = {"win": b"w", "lose": b"l"}
    records = [{**image, "weight": 2, "category": "cat"}, {**image, "weight": None, "category": None}, image]
    source = RecordPairs(records)
    assert [source[i].weight for i in range(3)] == [2.0, 1.0, 1.0]
    assert [source[i].category for i in range(3)] == ["cat", "", ""]
    assert [source.categories[0][code] for code in source.categories[1]] == ["cat", "", ""]
    bare = RecordPairs(records, weight=None, category=None)
    assert [(bare[i].weight, bare[i].category) for i in range(3)] == [(1.0, "")] * 3
    assert RecordPairs([image]).fingerprint == RecordPairs([image], weight=None, category=None).fingerprint
    with pytest.raises(SourceError, match="does not have kind"):
        RecordPairs(records, category="kind")
    for weight in (1e39, 1e-60, 10**400):
        with pytest.raises(PairError, match=r"weight is .*; expected 0, or a number that float32 can hold"):
            RecordPairs([{**image, "weight": weight}])[0]


@pytest.mark.parametrize("first", [0, 1])
def test_the_nan_of_a_data_frame_is_nothing(first):
    """As null is in Parquet, but for weights, where it may be a mistake."""
    nan = float("nan")
    rows = [("cat", "a"), (nan, np.float64("nan")), (None, None), ("", "")]
    records = [{"win": b"w", "lose": b"l", "prompt": prompt, "category": category} for prompt, category in rows]
    records = records[first:] + records[:first]
    source = RecordPairs(records)
    found = [(source[i].prompt, source[i].category) for i in range(4)]
    assert found[-first:] + found[:-first] == [("cat", "a")] + [("", "")] * 3
    assert source.categories[0] == ("", "a")
    with pytest.raises(PairError, match="weight is nan"):
        RecordPairs([{**records[0], "weight": nan}])[0]


@pytest.mark.parametrize(
    ("name", "value"), [("weight", "high"), ("weight", True), ("category", ["a"]), ("category", 1.5)]
)
def test_a_weight_or_category_of_another_kind_is_not_used(name, value):
    records = [{"win": b"w", "lose": b"l", name: value, "other": value}] * 2
    with pytest.warns(RuntimeWarning, match=rf"records\[0\]: {name} is .*, and is not used; expected .*{name}=None"):
        source = RecordPairs(records)
    assert (source[0].weight, source[0].category) == (1.0, "")
    assert source.fingerprint == RecordPairs(records, **{name: None}).fingerprint
    if name == "weight":
        with pytest.raises(PairError, match=r"other is .*; expected a number >= 0"):
            RecordPairs(records, weight="other")[0]


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a", np.zeros(2)])
def test_categories_that_are_lists_are_refused(value):
    image = {"win": b"w", "lose": b"l"}
    for name in ("kind", "category"):
        with pytest.raises(SourceError, match=rf"records\[1\]: {name} is of type .*; expected text or integers"):
            RecordPairs([{**image, name: "a"}, {**image, name: value}], category=name)


def test_categories():
    kinds = ["dog", None, 7, "dog", "never"]
    records = [{**pick(i, 1.0 if kind != "never" else None), "kind": kind} for i, kind in enumerate(kinds)]
    source = RecordPairs(records, category="kind")
    names, codes = source.categories
    assert names == ("", "7", "dog")
    assert [names[code] for code in codes] == ["dog", "", "7", "dog"]
    assert [source[i].category for i in range(4)] == ["dog", "", "7", "dog"]
    assert RecordPairs(records).categories[0] == ("",)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def records(last=b"last", count=40):
        return [{**pick(i, float(i % 2)), "kind": "a"} for i in range(count - 1)] + [{**pick(99, 1.0), "jpg_0": last}]

    base = RecordPairs(records()).fingerprint
    assert RecordPairs(tuple(records())).fingerprint == base
    assert pickle.loads(pickle.dumps(RecordPairs(records()))).fingerprint == base
    labels = records()
    labels[17]["label_0"] = 0.0
    others = [
        RecordPairs(records(b"other")),
        RecordPairs(records(count=41)),
        RecordPairs(labels),
        RecordPairs(records(), ties="keep"),
        RecordPairs(records(), weight="ranking_id"),
        RecordPairs(records(), category="kind"),
    ]
    assert len({base, *(source.fingerprint for source in others)}) == 7
    prints = []
    for folder in ("a", "b"):
        place = tmp_path / folder
        place.mkdir()
        (place / "clip.mp4").write_bytes(b"clip")
        (place / "image.png").write_bytes(b"image")
        prints.append(RecordPairs([{"win": place / "clip.mp4", "lose": place / "image.png"}]).fingerprint)
    assert prints[0] == prints[1]


# -------------------------------------------------------------------------------------------- datasets.Dataset


@dataclass
class Image:
    decode: bool = True


class Fake:
    """What is used of a `datasets.Dataset`."""

    def __init__(self, records, features, kind=None):
        self.records, self.features, self.format = records, features, {"type": kind}
        self.whole = 0  # records read whole

    def __len__(self):
        return len(self.records)

    def with_format(self, kind):
        return Fake(self.records, self.features, kind)

    def cast_column(self, name, feature):
        return Fake(self.records, {**self.features, name: feature}, self.format["type"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return [record[key] for record in self.records]
        self.whole += 1
        decoded = {name for name, feature in self.features.items() if getattr(feature, "decode", False)}
        return {
            name: pil() if name in decoded else value if self.format["type"] != "torch" else np.array(value)
            for name, value in self.records[key].items()
        }


def test_decoding_is_switched_off_and_only_labels_are_read_at_opening():
    records = [{**pick(i, float(i % 2)), "jpg_0": {"bytes": b"struct %d" % i, "path": None}} for i in range(50)]
    fake = Fake(records, {"jpg_0": Image(), "jpg_1": None, "label_0": None}, "torch")
    source = RecordPairs(fake, category="ranking_id")
    assert source._records.whole == 1
    assert plain(source[1]) == ("1", b"struct 1", b"one 1", "prompt 1", 1.0, "1", {})
    assert plain(source[2]) == ("2", b"one 2", b"struct 2", "prompt 2", 1.0, "2", {})


def test_a_transform_of_ones_own_is_left_alone():
    fake = Fake([{"win": b"w", "lose": b"l"}], {"win": Image()}, "custom")
    with pytest.raises(SourceError, match="win is a PIL image"):
        RecordPairs(fake)


def png(level):
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("category", "bytes_per_pair"), [(None, 5), ("ranking_id", 6)])
def test_memory_per_pair(category, bytes_per_pair):
    class Endless:
        """As much of nothing as of a dataset that lies on a disk."""

        def __len__(self):
            return 20_000

        def __getitem__(self, row):
            return {**pick(row % 7, float(row % 2)), "ranking_id": str(row % 3)}

    tracemalloc.start()
    try:
        source = RecordPairs(Endless(), category=category)
        stays, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 20_000
    assert stays < bytes_per_pair * len(source) + 60_000  # and what is there once


def test_a_real_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [png(level) for level in range(6)]
    table = {
        "jpg_0": [{"bytes": image, "path": None} for image in images],
        "jpg_1": images[::-1],
        "label_0": [1.0, 0.0, 0.5, None, 1.0, 0.0],
        "has_label": [True, True, True, True, False, True],
        "caption": list("abcdef"),
    }
    dataset = datasets.Dataset.from_dict(table).cast_column("jpg_0", datasets.Image())
    assert not isinstance(dataset[0]["jpg_0"], (bytes, dict)), "it would be decoded"
    oracle = [(0, images[0], images[5]), (1, images[4], images[1]), (5, images[0], images[5])]
    for view in (dataset, dataset.with_format("numpy")):
        source = RecordPairs(view)
        assert [(int(p.key), bytes(p.win), bytes(p.lose)) for p in map(source.__getitem__, range(3))] == oracle
        assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
    turned = RecordPairs(dataset.select([5, 1]))
    assert [turned[i].prompt for i in range(2)] == ["f", "b"]
    with pytest.raises(
        TypeError, match=r"records is a DatasetDict of train; expected a sequence .*, records\['train'\]"
    ):
        RecordPairs(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match="records is a IterableDataset"):
        RecordPairs(dataset.to_iterable_dataset())


@pytest.mark.parametrize("where", ["records", "m.jsonl", "*-of-00002.parquet", "s.tar"])
def test_warnings_of_what_is_opened_name_the_line_that_opens_it(tmp_path, where):
    records = [{"win": b"w", "lose": b"l", "weight": "high"}]
    (tmp_path / "m.jsonl").write_text('{"win": "a.png", "lose": "b.png"}\n{}\n')
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train-00000-of-00002.parquet")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.win.png", "a.lose.png", "b.win.png"):
            tar.addfile(tarfile.TarInfo(name))
    os.truncate(tmp_path / "s.tar", 3 * 512)
    given = records if where == "records" else f"{tmp_path}/{where}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        open_source(given)
        PairLoader(given, batch_size=1, size=2)
        lines = {inspect.currentframe().f_lineno - n for n in (1, 2)}
    assert {(warning.filename, warning.lineno) for warning in told} == {(__file__, line) for line in lines}
