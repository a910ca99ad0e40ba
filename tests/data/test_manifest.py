"""`ManifestPairs` against the json and csv modules on the same files."""

import csv
import io
import itertools
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data.pairs import plain
from hypothesis import given, settings
from hypothesis import strategies as st

from polydpo_fast.data import LoaderError, PairLoader, read_ledger
from polydpo_fast.data.formats import indexed, manifest_records
from polydpo_fast.data.formats import manifest as module
from polydpo_fast.data.formats.fields import parse_json
from polydpo_fast.data.formats.manifest import ManifestPairs
from polydpo_fast.data.source import PairError, SourceError


@pytest.fixture
def folder(tmp_path):
    """a.jpg to f.jpg, that hold their own names."""
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path


def lines(path, *records, end="\n"):
    path.write_bytes(b"".join(json.dumps(record).encode() + end.encode() for record in records))
    return path


def arms(source):
    return [
        (bytes(pair.win).decode(), bytes(pair.lose).decode()) for pair in map(source.__getitem__, range(len(source)))
    ]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
rows = st.lists(
    st.fixed_dictionaries(
        {"win": st.sampled_from(["a.jpg", "b.jpg"]), "lose": st.sampled_from(["c.jpg", "./d.jpg"]), "prompt": texts},
        optional={
            "weight": st.floats(0, 1e6, width=32),
            "category": st.sampled_from(["", "people", "\u98a8\u666f"]),
            "note": texts,
        },
    ),
    min_size=1,
    max_size=12,
)


def check(source, expected, numbers, name):
    assert len(source) == len(expected)
    for index, (record, number) in enumerate(zip(expected, numbers, strict=True)):
        assert plain(source[index]) == (
            f"{name}:{number}",
            record["win"][-5:-4].encode(),
            record["lose"][-5:-4].encode(),
            record["prompt"],
            float(record.get("weight") or 1.0) if record.get("weight") in (None, "") else float(record["weight"]),
            record.get("category", ""),
            {"prompt": record["prompt"]},
        )
        assert source.position(index).endswith((f"{name}:{number}", f"{name}: record {number}"))
    names, codes = source.categories
    assert [names[code] for code in codes] == [record.get("category", "") for record in expected]


def test_records_with_the_columns_of_tables(folder):
    """As Parquet and records have them; and in CSV, where all is text."""
    columns = ["jpg_0", "jpg_1", "label_0", "has_label", "caption"]
    rows = [
        ("a.jpg", "b.jpg", label, has, f"p{i}")
        for i, (label, has) in enumerate([(1, True), (0, True), (0.5, True), (None, None), (1.0, False), (0.0, None)])
    ]
    lines(folder / "pick.jsonl", *(dict(zip(columns, row, strict=True)) for row in rows))
    table = [",".join("" if value is None else str(value) for value in row) for row in rows]
    (folder / "pick.csv").write_text("\n".join([",".join(columns), *table]))
    for name in ("pick.jsonl", "pick.csv"):
        source = ManifestPairs(folder / name, ties="keep")
        pairs = [source[i] for i in range(len(source))]
        assert [(bytes(pair.win), pair.prompt, pair.weight) for pair in pairs] == [
            *((b"a", "p0", 1.0), (b"b", "p1", 1.0), (b"a", "p2", 0.5), (b"b", "p5", 1.0)),
        ], name
        assert len(ManifestPairs(folder / name)) == 3
    lines(folder / "oip.jsonl", {"chosen": "b.jpg", "rejected": "a.jpg", "prompt": "p"})
    (folder / "oip.csv").write_text("chosen,rejected,prompt\nb.jpg,a.jpg,p\n")
    for name in ("oip.jsonl", "oip.csv"):
        assert plain(ManifestPairs(folder / name)[0])[1:4] == (b"b", b"a", "p")


NAMED = {"jpg_0": "a.jpg", "jpg_1": "b.jpg"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"path1": "a.jpg", "path2": "b.jpg", "chosen": "path1"}, ("a", "b")),
        ({"path1": "a.jpg", "path2": "b.jpg", "chosen": "c.jpg", "rejected": "d.jpg"}, ("a", "b")),
        ({"file_path": ["a.jpg", "b.jpg"], "rank": [2, 1], "rejected": None}, ("b", "a")),
        ({"file_path": ["a.jpg", "b.jpg"], "rank": [2, 1], "chosen": "the first"}, ("b", "a")),
        ({"file_path": "folder", "chosen": "c.jpg", "rejected": "d.jpg"}, ("c", "d")),
        ({"win": None, "lose": None, "path1": "a.jpg", "path2": "b.jpg"}, ("a", "b")),
        ({**NAMED, "label_0": 0, "chosen": "jpg_1", "rejected": "jpg_0"}, ("b", "a")),
        ({**NAMED, "chosen": "c.jpg", "rejected": "d.jpg"}, ("c", "d")),
    ],
)
def test_fields_that_are_none_of_the_layouts_do_no_harm(folder, record, expected):
    assert arms(ManifestPairs(lines(folder / "m.jsonl", record))) == [expected]


def test_rows_without_a_label_however_it_is_written(folder):
    """Also where the label is text."""
    unlabelled = [{"label_0": "1", "has_label": has} for has in (False, 0, 0.0, "false", "0.0", " False")]
    unlabelled += [{"label_0": label} for label in ("nan", "NaN", float("nan"), "", None)]
    lines(folder / "m.jsonl", *({**NAMED, **one} for one in unlabelled), {**NAMED, "label_0": "0", "has_label": "1.0"})
    assert arms(ManifestPairs(folder / "m.jsonl")) == [("b", "a")]
    text = "a.jpg,b.jpg,1,0.0\na.jpg,b.jpg,1,false\na.jpg,b.jpg,nan,\na.jpg,b.jpg,0,1.0\na.jpg,b.jpg,1,\n"
    (folder / "m.csv").write_text("jpg_0,jpg_1,label_0,has_label\n" + text)
    assert arms(ManifestPairs(folder / "m.csv")) == [("b", "a"), ("a", "b")]


names = st.sampled_from(["a", "b", "a:", '":', '"', "{", "\\"])
values = st.recursive(
    st.text(st.sampled_from('a":{} \\'), max_size=6) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.lists(st.tuples(names, inner), max_size=3).map(tuple),
    max_leaves=5,
)


def written(value, colon):
    """JSON, with a tuple for an object, whose names may come twice."""
    if isinstance(value, tuple):
        return "{" + ", ".join(json.dumps(name) + colon + written(inner, colon) for name, inner in value) + "}"
    return "[" + ", ".join(written(v, colon) for v in value) + "]" if isinstance(value, list) else json.dumps(value)


def has_twice(value):
    if isinstance(value, tuple):
        inside = [name for name, _ in value]
        return len(set(inside)) < len(inside) or any(has_twice(inner) for _, inner in value)
    return isinstance(value, list) and any(map(has_twice, value))


@settings(max_examples=300)
@given(st.lists(st.tuples(names, values), max_size=4).map(tuple), st.sampled_from([":", ": ", " : ", "\t\n:", "  :"]))
def test_names_that_come_twice_are_found(record, colon):
    data = written(record, colon).encode()
    if has_twice(record):
        with pytest.raises(ValueError, match="twice"):
            parse_json(data)
    else:
        assert parse_json(data) == json.loads(data)


def test_the_index_of_other_rules_is_not_taken(folder, monkeypatch):
    """A version before this one took records that are refused now."""
    manifest = folder / "m.jsonl"
    manifest.write_text('{"win": "a.jpg", "lose": "b.jpg", "a": 1, "a": 2}\n')
    with monkeypatch.context() as before:
        before.setattr(indexed, "_RULES", 0)
        before.setattr(manifest_records, "parse_json", json.loads)
        fingerprint = ManifestPairs(manifest).fingerprint
    with pytest.raises(SourceError, match="it has 'a' twice"):
        ManifestPairs(manifest)
    monkeypatch.setattr(indexed, "_RULES", 2)
    monkeypatch.setattr(manifest_records, "parse_json", json.loads)
    assert ManifestPairs(manifest).fingerprint == fingerprint  # of the same pairs: trainings are resumed


def test_the_pairs_of_a_list_are_not_worked_out_for_each_of_them(folder, monkeypatch):
    source = ManifestPairs(lines(folder / "m.jsonl", {"file_path": ["a.jpg", "b.jpg"] * 100, "rank": [*range(200)]}))
    monkeypatch.setattr(module.itertools, "combinations", lambda *_: pytest.fail("worked out"))
    assert bytes(source[0].win) == b"a"


@settings(max_examples=60)
@given(
    rows,
    st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_json_lines(tmp_path_factory, expected, end, bom, ascii_only, last_end):
    folder = tmp_path_factory.mktemp("t")
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    text = end.join(json.dumps(record, ensure_ascii=ascii_only) for record in expected) + end * last_end
    (folder / "m.jsonl").write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    numbers = range(1, 1 + end.count("\n") * len(expected), end.count("\n"))
    check(ManifestPairs(folder, columns=["prompt"]), expected, numbers, "m.jsonl")


@settings(max_examples=60)
@given(rows, st.sampled_from([None, 1, 4]), st.booleans(), st.booleans())
def test_json_lists(tmp_path_factory, expected, indent, bom, ascii_only):
    """Characters of two to four bytes, escapes among them, move every place that follows."""
    folder = tmp_path_factory.mktemp("t")
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    text = json.dumps(expected, indent=indent, ensure_ascii=ascii_only)
    (folder / "m.json").write_bytes(b"\xef\xbb\xbf" * bom + b" " * bom + text.encode() + b"\n")
    check(ManifestPairs(folder, columns=["prompt"]), expected, range(1, len(expected) + 1), "m.json")


@settings(max_examples=80)
@given(rows, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_tables(tmp_path_factory, expected, end, bom, quoted):
    folder = tmp_path_factory.mktemp("t")
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    header = ["prompt", "win", "category", "lose", "weight", "note"]
    file = io.StringIO(newline="")
    # Some versions of the csv module write carriage returns without quotes, and cannot read them.
    quoted = quoted or any("\r" in str(value) for record in expected for value in record.values())
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(file, header, restval="", lineterminator=end, quoting=quoting)
    writer.writeheader()
    numbers = []
    for record in expected:
        numbers.append(file.getvalue().count("\n") + 1)
        writer.writerow(record)
        file.write(end)  # an empty line
    (folder / "m.csv").write_bytes(b"\xef\xbb\xbf" * bom + file.getvalue().encode())
    oracle = list(csv.DictReader(io.StringIO(file.getvalue(), newline=""), strict=True))
    assert [row["prompt"] for row in oracle] == [record["prompt"] for record in expected]
    check(ManifestPairs(folder / "m.csv", columns=["prompt"]), oracle, numbers, "m.csv")


def test_empty_prompts_and_captions(folder):
    """In a table nothing is an empty text; in JSON an empty prompt is one."""
    (folder / "m.csv").write_text("win,lose,prompt,caption\na.jpg,b.jpg,,a cat\nb.jpg,a.jpg,a dog,x\nc.jpg,a.jpg,,\n")
    source = ManifestPairs(folder / "m.csv", columns=["prompt"])
    assert [source[index].prompt for index in range(3)] == ["a cat", "a dog", ""]
    record = {"win": "a.jpg", "lose": "b.jpg", "caption": "a cat"}
    source = ManifestPairs(lines(folder / "m.jsonl", {**record, "prompt": ""}, {**record, "prompt": None}))
    assert [pair.prompt for pair in (source[0], source[1])] == ["", "a cat"]


def test_clips_in_local_files_are_paths(tmp_path):
    for name in ("a.mp4", "b.MKV"):
        (tmp_path / name).write_bytes(b"clip")
    source = ManifestPairs(
        lines(tmp_path / "m.jsonl", {"win": "a.mp4", "lose": "b.MKV"}, {"win": "a.mp4", "lose": "c.mov"})
    )
    assert (source[0].win, source[0].lose) == (tmp_path / "a.mp4", tmp_path / "b.MKV")
    with pytest.raises(PairError, match=r"lose: c\.mov: .*No such file") as caught:
        source[1]
    assert caught.value.arm == "lose"


def test_hpdv3(folder):
    (folder / "m.json").write_text(json.dumps([{"path1": "b.jpg", "path2": "a.jpg", "prompt": "p", "confidence": 0.9}]))
    source = ManifestPairs(folder / "m.json", columns=["confidence"])
    assert plain(source[0]) == ("m.json:1", b"b", b"a", "p", 1.0, "", {"confidence": 0.9})


@given(st.lists(st.sampled_from([-1, 0, 1, 2.5]), min_size=2, max_size=6), st.booleans())
def test_ranked_files_become_all_their_pairs(tmp_path_factory, scores, ranks):
    folder = tmp_path_factory.mktemp("t")
    names = "abcdef"[: len(scores)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    record = {"file_path": list(names), "human_preference": scores, "prompt": "p", "category": "c", "weight": 4}
    if ranks:
        record = {"image_path": list(names), "rank": [-score for score in scores], "weight": 4}
    (folder / "m.json").write_text(json.dumps([record, {"win": "a", "lose": "b"}]))
    score_of = dict(zip(names, scores, strict=True))
    better = {(a, b) for a, b in itertools.permutations(names, 2) if score_of[a] > score_of[b]}
    equal = {(a, b) for a, b in itertools.combinations(names, 2) if score_of[a] == score_of[b]}
    dropped, kept = (ManifestPairs(folder / "m.json", ties=ties) for ties in ("drop", "keep"))
    assert sorted(arms(dropped)[:-1]) == sorted(better)
    assert sorted(arms(kept)[:-1]) == sorted(better | equal)
    assert dropped.counts["ties"] == kept.counts["ties"] == len(equal)
    pairs = [kept[i] for i in range(len(kept))]
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert all(
        p.weight == (2.0 if (bytes(p.win).decode(), bytes(p.lose).decode()) in equal else 4.0) for p in pairs[:-1]
    )
    if equal:
        with pytest.raises(SourceError, match=r"m\.json: record 1: a tie"):
            ManifestPairs(folder / "m.json", ties="error")


def test_keys_of_records_and_of_ranked_ones(folder):
    ranked = {"file_path": ["a.jpg", "b.jpg", "c.jpg"], "human_preference": [0, 1, 2], "key": "r"}
    manifest = lines(
        folder / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg", "key": "k"}, ranked, {"win": "a.jpg", "lose": "b.jpg"}
    )
    source = ManifestPairs(manifest)
    assert [source[i].key for i in range(len(source))] == ["k", "r#1-0", "r#2-0", "r#2-1", "m.jsonl:3"]
    lines(folder / "n.jsonl", {"win": "a.jpg", "lose": "b.jpg", "key": "k"})
    with pytest.raises(SourceError, match=r"n\.jsonl:1: its key is that of .*m\.jsonl:1"):
        ManifestPairs([folder / "m.jsonl", folder / "n.jsonl"])


def test_several_manifests_of_one_name(folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        lines(folder / name / "m.jsonl", {"win": "../a.jpg", "lose": "../b.jpg"})
    source = ManifestPairs([folder / "x", folder / "y"])
    assert [source[i].key for i in (0, 1)] == ["x/m.jsonl:1", "y/m.jsonl:1"]
    assert source.blocks.tolist() == [2]
    assert pickle.loads(pickle.dumps(source))[1].key == "y/m.jsonl:1"


def test_root(folder):
    (folder / "in").mkdir()
    manifest = lines(
        folder / "in" / "m.jsonl",
        {"win": "a.jpg", "lose": "in/../b.jpg"},
        {"win": str(folder / "a.jpg"), "lose": "b.jpg"},
        {"win": "a.jpg", "lose": f"in/../../{folder.name}/b.jpg"},
        {"win": "a.jpg", "lose": "file:///etc/hostname"},
    )
    fenced = ManifestPairs(manifest, root=folder)
    assert plain(fenced[0])[1:3] == (b"a", b"b")
    for index, arm in ((1, "win"), (2, "lose"), (3, "lose")):
        with pytest.raises(PairError, match="it is not within root") as caught:
            fenced[index]
        assert caught.value.arm == arm
    free = ManifestPairs(manifest)
    with pytest.raises(PairError, match=r"win: a\.jpg: .*No such file"):
        free[0]
    lines(folder / "in" / "m.jsonl", {"win": str(folder / "a.jpg"), "lose": "../b.jpg"})
    assert plain(ManifestPairs(manifest)[0])[1:3] == (b"a", b"b")


def test_paths_in_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines(folder / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg"})
    assert plain(ManifestPairs("m.jsonl")[0])[1:3] == (b"a", b"b")
    sources = [ManifestPairs("m.jsonl", root=root) for root in (".", None)]
    monkeypatch.chdir("/")  # as a training may do later
    assert [plain(source[0])[1:3] for source in sources] == [(b"a", b"b")] * 2


def test_files_that_cannot_be_read(folder):
    os.mkfifo(folder / "pipe.jpg")
    names = ["gone.jpg", "pipe.jpg", ".", "a\0b.jpg", "nothing://a.jpg"]
    source = ManifestPairs(lines(folder / "m.jsonl", *({"win": "a.jpg", "lose": name} for name in names)))
    for index, reason in enumerate(["No such file", "no regular file", "no regular file", "null byte", "nothing"]):
        with pytest.raises(PairError, match=rf"lose: .*{reason}"):
            source[index]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.jsonl", '{"win": "a"}', r"m\.jsonl:1: it has no lose"),
        ("m.jsonl", '{"win": "", "lose": "b"}', r"m\.jsonl:1: it has no win"),
        ("m.jsonl", '{"win": ["a"], "lose": "b"}', r"m\.jsonl:1: win is of type list; expected text"),
        (
            "m.jsonl",
            '{"prompt": "x"}',
            r"m\.jsonl:1: it has prompt; expected win and lose, .*, path1 and path2 \(the better first\)",
        ),
        ("m.jsonl", '{"win": "a", "lose": "b", "weight": "x"}', r"m\.jsonl:1: weight is 'x'; expected a number"),
        ("m.jsonl", '{"win": "a", "lose": "b", "weight": -1}', r"m\.jsonl:1: weight is -1; expected a number >= 0"),
        ("m.jsonl", '{"win": "a", "lose": "b", "weight": 1e39}', r"m\.jsonl:1: weight is 1e\+39; expected 0, or a num"),
        ("m.jsonl", '{"win": "a", "lose": "b", "weight": 1e-60}', r"m\.jsonl:1: weight is 1e-60; expected 0, or a nu"),
        ("m.csv", "win,lose,weight\na,b,3.5e38\n", r"m\.csv:2: weight is 3.5e\+38; expected 0, or a number that fl"),
        ("m.jsonl", '{"win": "a", "lose": "b", "win": "c"}', r"m\.jsonl:1: it has 'win' twice"),
        ("m.jsonl", '{"jpg_0": "a", "jpg_1": "b", "label_0": 2}', r"m\.jsonl:1: label_0 is 2; expected 1, 0, or 0.5"),
        ("m.jsonl", '{"win": "a", "lose": "\\ud800"}', r"m\.jsonl:1: lose is not Unicode text"),
        ("m.jsonl", b'{"win": "\xe4", "lose": "b"}', r"m\.jsonl:1: it is not UTF-8"),
        ("m.jsonl", "{" + " " * (1 << 24), r"m\.jsonl:1: it has more than 16777216 bytes"),
        ("m.jsonl", "{" + '"a":{' * 100_000, r"m\.jsonl:1: it is not JSON that can be read: too deeply nested"),
        ("m.jsonl", "", r"m\.jsonl: it is no manifest"),
        ("m.jsonl", "win,lose\na,b\n", r"m\.jsonl: it is no manifest: it begins neither"),
        ("m.json", "[]", r"m\.json: no pairs found"),
        ("m.json", "[", r"m\.json: record 1: it is not JSON"),
        ("m.json", '[{"win": "a", "lose": "b"}', r"m\.json: record 1: it is followed by neither"),
        ("m.json", '[{"win": "a", "lose": "b"},]', r"m\.json: record 2: it is not JSON"),
        ("m.json", '[{"win": "a", "lose": "b"}] x', r"m\.json: record 1: it is followed by neither"),
        ("m.json", "[1]", r"m\.json: record 1: it is a JSON int"),
        ("m.json", "[" * 100_000, r"m\.json: record 1: it is too deeply nested"),
        ("m.json", '[{"file_path": "a", "rank": [1]}]', "file_path is not a list of files"),
        ("m.json", '[{"file_path": ["a", ""], "rank": [1, 2]}]', "file_path is not a list of files"),
        ("m.json", '[{"file_path": ["a", "b"], "rank": [1]}]', "rank is not a list of 2 numbers"),
        ("m.json", '[{"file_path": ["a", "b"], "rank": [1, NaN]}]', "rank is not a list of 2 numbers"),
        ("m.json", '[{"file_path": ["a", "b"]}]', "rank is not a list of 2 numbers"),
        ("m.json", '[{"file_path": ["a"], "rank": [1]}]', "file_path has 1 files; expected 2 to 256"),
        ("m.json", json.dumps([{"file_path": ["a"] * 257, "rank": [1] * 257}]), "file_path has 257 files"),
        ("m.jsonl", '{"win": "a"}\n[1]\n', r"m\.jsonl:1: it has no lose"),
        ("m.jsonl", '{"win": "a", "lose": "b"}\n{' + " " * (1 << 24), r"m\.jsonl:2: it has more than 16777216 bytes"),
        (
            "m.jsonl",
            '{"win": "a", "lose": "b"}\n{"jpg_0": "a", "jpg_1": "b", "label_0": 2}',
            r"m\.jsonl:2: label_0 is 2",
        ),
        ("m.csv", "", r"m\.csv: no pairs found"),
        (
            "m.csv",
            "won,lost\na,b\n",
            r"m\.csv:1: the header is \['won', 'lost'\]; expected win, lose, .* path2 \(the better first\)",
        ),
        ("m.csv", "win,lose,win\n", r"m\.csv:1: the header is \['win', 'lose', 'win'\]; .* all different$"),
        ("m.csv", "win;lose;prompt\na;b;c\n", r"m\.csv:1: the header is .*, and commas between them, not ';'$"),
        ("m.csv", "win\tlose\na\tb\n", r"m\.csv:1: the header is .*, and commas between them, not '\\t'$"),
        ("m.csv", 'win,lose\na,b\n"a,b\n', r"m\.csv:3: unexpected end of data"),
        ("m.csv", 'win,lose\n"a" b,c\n', r"m\.csv:2: "),
        ("m.csv", b"win,lose\na,\xe4\n", r"m\.csv:2: it is not UTF-8"),
        ("m.csv", 'win,lose\n"' + "a" * 200_000 + '",b\n', r"m\.csv:2: field larger than field limit"),
    ],
)
def test_bad_records_are_refused_with_their_place(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=reason):
        ManifestPairs(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "begin", "bad", "reason"),
    [
        ("m.jsonl", "", b'{"win": "a"', "it is not JSON"),
        ("m.jsonl", "", b'{"prompt": "x"}', "it has prompt; expected win and lose"),
        ("m.jsonl", "", b'{"win": "a.jpg", "lose": "b.jpg", "weight": NaN}', "weight is nan; expected a number >= 0"),
        ("m.jsonl", "", b'{"win": "\xe4", "lose": "b.jpg"}', "it is not UTF-8"),
        ("m.csv", "win,lose\n", b"a.jpg,b.jpg,c", "it has 3 fields; expected 2"),
        ("m.csv", "win,lose\n", b'"a\nb",', "it has no lose"),
        ("m.csv", "win,lose\n", b"a.jpg,\xe4", "it is not UTF-8"),
        ("m.json", "[", b'{"win": "a"}', "it has no lose"),
        ("m.json", "[", b'{"file_path": ["a", "b"], "rank": [1]}', "rank is not a list of 2 numbers"),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_bad_record_is_a_bad_pair(folder, name, begin, bad, reason, at):
    """Opening says so, also where the index was kept; a loader leaves it out; and it makes no category of its own."""
    good = [json.dumps({"win": f"{c}.jpg", "lose": "f.jpg", "category": "it"}) for c in "abcd"]
    if name == "m.csv":
        good = [f"{c}.jpg,f.jpg" for c in "abcd"]
    records = [record.encode() for record in good]
    records.insert(at, bad)
    end = b",\n" if name == "m.json" else b"\n"
    (folder / name).write_bytes(begin.encode() + end.join(records) + b"]" * (name == "m.json"))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=rf"^1 of 5 records are no pairs; the first is .*{reason}"):
            source = ManifestPairs(folder / name)
    assert len(source) == source.counts["records"] == 5
    assert source.counts["bad records"] == 1
    assert source.categories[0] == (("",) if name == "m.csv" else ("it",))
    for index in range(5):
        if index == at:
            with pytest.raises(PairError, match=reason) as error:
                source[index]
            assert str(error.value).startswith(source.position(index))
        else:
            assert bytes(source[index].win).decode() == "abcd"[index - (index > at)]


def test_the_place_of_a_bad_record_is_said_once(folder, tmp_path):
    manifest = folder / "m.jsonl"
    manifest.write_text('{"win": "a.jpg"}\n' + json.dumps({"win": "a.jpg", "lose": "b.jpg"}) + "\n")
    with pytest.warns(RuntimeWarning, match="records are no pairs"):
        source = ManifestPairs(manifest)
    with pytest.raises(LoaderError, match=r"all 2 pairs") as error:
        list(
            PairLoader(
                source, 1, size=8, shuffle=False, max_bad_run=2, max_bad_rate=1.0, ledger=tmp_path / "ledger.jsonl"
            )
        )
    assert str(error.value).count("m.jsonl:") == 1
    reasons = {line["position"]: line["reason"] for line in read_ledger(tmp_path / "ledger.jsonl")}
    assert reasons[source.position(0)].startswith("it has no lose")


def test_a_manifest_that_changed_after_opening(folder):
    manifest = lines(folder / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg"}, {"win": "a.jpg", "lose": "b.jpg"})
    source = ManifestPairs(manifest)
    lines(manifest, {"win": "b.jpg", "lose": "a.jpg"}, {"win": "a.jpg", "lose": "b.jpg"})
    with pytest.raises(PairError, match=r"m\.jsonl:1: the manifest has changed"):
        source[0]
    assert plain(source[1])[1:3] == (b"a", b"b")
    assert plain(ManifestPairs(manifest)[0])[1:3] == (b"b", b"a")
    assert ManifestPairs(manifest).fingerprint != source.fingerprint


def test_the_index_is_kept(folder, monkeypatch):
    (folder / "m.csv").write_text("prompt,win,lose\np,a.jpg,b.jpg\n")
    first = ManifestPairs(folder / "m.csv")
    monkeypatch.setattr(ManifestPairs, "_scan", None)
    again = ManifestPairs(folder / "m.csv", columns=["prompt"])
    assert plain(again[0]) == (*plain(first[0])[:-1], {"prompt": "p"})
    assert again.fingerprint == first.fingerprint
    assert again.counts == first.counts == {"files": 1, "records": 1, "ties": 0, "pairs": 1}
    assert ManifestPairs.row.itemsize == 35


def test_memory_per_pair(tmp_path):
    """What stays, and what opening takes for a moment: the rows, those that were read, and their keys."""
    pairs = 50_000
    for part in range(2):
        records = ({"win": "a", "lose": "b", "key": f"{part} {i}", "category": f"c{i % 3}"} for i in range(pairs // 2))
        lines(tmp_path / f"{part}.jsonl", *records)
    ManifestPairs(tmp_path)
    tracemalloc.start()
    try:
        source = ManifestPairs(tmp_path)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == pairs
    assert stays < 38 * pairs  # 35, and what is there once
    assert peak < 2.5 * 35 * pairs


def test_a_kept_index_of_another_record_costs_its_pair(folder, tmp_path_factory):
    manifest = lines(folder / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg"}, {"win": "c.jpg", "lose": "d.jpg"})
    cache = tmp_path_factory.mktemp("kept")
    ManifestPairs(manifest, cache=cache)
    (path,) = cache.iterdir()
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["rows"]["second"][0] = 7
    np.savez(path, **arrays)
    source = ManifestPairs(manifest, cache=cache)
    with pytest.raises(PairError, match=r"m\.jsonl:1: "):
        source[0]
    assert plain(source[1])[1:3] == (b"c", b"d")


def test_fingerprint_does_not_say_where(folder):
    sources = []
    for name in ("x", "y"):
        (folder / name).mkdir()
        sources.append(ManifestPairs(lines(folder / name / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg"}), root=folder))
    assert sources[0].fingerprint == sources[1].fingerprint


def test_remote(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("a.jpg", "b.jpg", "c.mp4"):
        memory.pipe(f"/top/images/{name}", name.encode())
    records = [
        {"win": "images/a.jpg", "lose": "memory://top/images/c.mp4"},
        {"win": "images/x.jpg", "lose": "images/b.jpg"},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    memory.pipe("/top/m.jsonl", text)
    memory.pipe("/m.jsonl", text.replace(b"images/", b"top/images/").replace(b"top/top", b"top"))
    (tmp_path / "m.jsonl").write_bytes(text)
    try:
        for where, root in (("memory://top/m.jsonl", None), ("memory://m.jsonl", None)):
            source = ManifestPairs(where, root=root)
            assert plain(source[0])[1:3] == (b"a.jpg", b"c.mp4")
            with pytest.raises(PairError, match=r"win: .*images/x\.jpg"):
                source[1]
        mixed = ManifestPairs(tmp_path / "m.jsonl", root="memory://top/")
        with pytest.raises(PairError, match=r"win: images/x\.jpg"):
            mixed[1]
        with pytest.raises(PairError, match="not within root, memory://top/"):
            mixed[0]
        assert isinstance(ManifestPairs(tmp_path / "m.jsonl").position(0), str)
    finally:
        memory.store.clear()


@pytest.mark.parametrize("name", ["./a.jpg", "../top/a.jpg", "x/../../top/./a.jpg"])
def test_dots_in_remote_paths_mean_what_they_do_in_local_ones(name):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/bucket/top/a.jpg", b"a")
    memory.pipe("/bucket/top/m.jsonl", json.dumps({"win": name, "lose": "a.jpg"}).encode())
    try:
        assert bytes(ManifestPairs("memory://bucket/top/m.jsonl")[0].win) == b"a"
    finally:
        memory.store.clear()


def test_path_objects(folder):
    assert isinstance(ManifestPairs(Path(lines(folder / "m.jsonl", {"win": "a.jpg", "lose": "b.jpg"})))[0].win, bytes)
