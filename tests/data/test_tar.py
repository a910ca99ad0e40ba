"""`TarPairs` against the standard library's tarfile, and against archives that mean no good."""

import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from data.pairs import everything, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from polydpo_fast.data import open_source
from polydpo_fast.data.formats.tar import TarPairs
from polydpo_fast.data.source import PairError, SourceError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members, form="pax", **kinds):
    """The bytes of a tar file of (name, contents)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            info.type = kinds.get(name.replace("/", "_"), tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(contents))
    return file.getvalue()


def sample(key, win=b"W", lose=b"L", **record):
    return [(f"{key}.win.jpg", win), (f"{key}.lose.png", lose), (f"{key}.json", json.dumps(record).encode())]


def header(name, size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000", prefix=b"", checksum=None):
    """One by hand, with a right sum unless told otherwise."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    return bytes(block)


def member(name, contents=b"", kind=b"0", **more):
    return header(name, b"%011o\0" % len(contents), kind, **more) + contents + bytes(-len(contents) % 512)


def pax(**records):
    lines = b""
    for name, value in records.items():
        rest = b" " + name.encode() + b"=" + value + b"\n"
        length = len(rest)
        while length != len(str(length)) + len(rest):
            length = len(str(length)) + len(rest)
        lines += str(length).encode() + rest
    return member(b"pax", lines, b"x")


END = bytes(1024)
PAIR = member(b"a.win.jpg", b"W") + member(b"a.lose.jpg", b"L")


def pairs_of(tmp_path, *shards, **options):
    for number, data in enumerate(shards):
        (tmp_path / f"s{number}.tar").write_bytes(data)
    return TarPairs(tmp_path, **options)


def attempt(source, index):
    try:
        return plain(source[index])[:3]
    except PairError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------- what is right


name_parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/.\0"), min_size=1, max_size=120)
keys = st.builds(
    lambda folders, base: "/".join([*folders, base]),
    st.lists(name_parts.map(lambda text: text + ".d"), max_size=2),
    name_parts,
)
records = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=["Cs"]), max_size=40)},
    optional={
        "weight": st.floats(0, 1e9, width=32),
        "category": st.sampled_from(["", "style", "caf\u00e9"]),
        "tags": st.lists(st.integers(), max_size=3),
    },
)
sizes = st.one_of(st.integers(0, 3), st.sampled_from([511, 512, 513, 5000]))


@settings(max_examples=60)
@given(
    st.dictionaries(keys, st.tuples(records, sizes, sizes), min_size=1, max_size=6),
    st.sampled_from(["gnu", "pax"]),
    st.randoms(use_true_random=False),
)
def test_round_trip(tmp_path_factory, expected, form, random):
    members = []
    for key, (record, win, lose) in expected.items():
        one = [*sample(key, random.randbytes(win), random.randbytes(lose), **record), (f"{key}.cls", b"3")]
        random.shuffle(one)
        members += one
    data = archive(members, form)
    source = pairs_of(tmp_path_factory.mktemp("t"), data, columns=["prompt"])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        contents = {info.name: tar.extractfile(info).read() for info in tar}
    assert len(source) == len(expected)
    for index, key in enumerate(expected):
        record = json.loads(contents[f"{key}.json"])
        assert plain(source[index]) == (
            key,
            contents[f"{key}.win.jpg"],
            contents[f"{key}.lose.png"],
            record["prompt"],
            record.get("weight", 1.0),
            record.get("category", ""),
            {"prompt": record["prompt"]},
        )
    names, numbers = source.categories
    assert [names[number] for number in numbers] == [r.get("category", "") for r, _, _ in expected.values()]


def test_ustar_prefixes_and_old_gnu_headers(tmp_path):
    """Long names in ustar are split; GNU tar keeps times where the rest of the name would be."""
    folder = "f" * 60
    data = archive(sample(f"{folder}/{folder}/k"), "ustar")
    assert data[345:348] == b"fff"
    assert pairs_of(tmp_path, data)[0].key == f"{folder}/{folder}/k"
    gnu = b"".join(member(n, b"x", magic=b"ustar  \0", prefix=b"01234567123\0") for n in (b"k.win.jpg", b"k.lose.jpg"))
    assert pairs_of(tmp_path, gnu + END)[0].key == "k"


def test_sizes_in_binary_and_in_pax_headers(tmp_path):
    binary = header(b"k.win.jpg", b"\x80" + (3).to_bytes(11, "big")) + b"abc" + bytes(509)
    overridden = pax(size=b"4", path=b"k.lose.jpg") + header(b"other") + b"defg" + bytes(508)
    pair = pairs_of(tmp_path, binary + overridden + END)[0]
    assert (bytes(pair.win), bytes(pair.lose)) == (b"abc", b"defg")


def test_text_members_links_folders_and_strays(tmp_path):
    data = archive(
        [
            ("a/", b""),
            ("README", b"no key"),
            ("a/k.txt", "\ufeffein Pr\u00fcfstein\r\n".encode()),
            ("a/k.WIN.MP4", b"W"),
            ("a/link.win.jpg", b""),
            ("a/.hidden", b"?"),
            ("a/k.lose.webm", b"L"),
            ("a/k.json", b'{"weight": 2, "category": "x", "prompt": null}'),
        ],
        **{"a_": tarfile.DIRTYPE, "a_link.win.jpg": tarfile.SYMTYPE},
    )
    source = pairs_of(tmp_path, data)
    assert plain(source[0]) == ("a/k", b"W", b"L", "ein Pr\u00fcfstein", 2.0, "x", {})
    assert source.counts["samples"] == source.counts["pairs"] == 1


@pytest.mark.parametrize(
    ("record", "winner"),
    [
        ({"label_0": 1, "label_1": 0}, 0),
        ({"label_0": 0.0, "label_1": 1.0}, 1),
        ({"label_0": 0.5, "label_1": 0.5}, "tie"),
        ({"label_0": 0.4}, 1),
        ({"label_1": 0.4}, 0),
        ({"label": 0}, 0),
        ({"label": 1}, 1),
        ({"preferred": 1}, 1),
        ({"preferred": 0.5}, "tie"),
        ({"label": None, "label_0": 1}, 0),
        ({"prompt": "nobody looked at them"}, None),
        (None, None),
    ],
)
def test_numbered_arms_are_told_apart_by_their_label(tmp_path, record, winner):
    members = [("k.0.jpg", b"zero"), ("k.1.jpg", b"one")]
    if record is not None:
        members.append(("k.json", json.dumps({**record, "weight": 3}).encode()))
    data = archive([*members, *sample("other")])
    source = pairs_of(tmp_path, data)
    assert source.counts["ties"] == (winner == "tie")
    assert source.counts.get("without label", 0) == (winner is None)
    if winner in (0, 1):
        assert [bytes(source[0].win), bytes(source[0].lose)] == [[b"zero", b"one"][winner], [b"one", b"zero"][winner]]
        assert (len(source), source[0].weight) == (2, 3.0)
    else:
        assert [source[i].key for i in range(len(source))] == ["other"]
        kept = pairs_of(tmp_path, data, ties="keep")
        assert len(kept) == 1 + (winner == "tie")
        if winner == "tie":
            assert (bytes(kept[0].win), kept[0].weight) == (b"zero", 1.5)
            assert kept.fingerprint != source.fingerprint
            with pytest.raises(SourceError, match=r"s0\.tar at byte 0: a tie"):
                pairs_of(tmp_path, data, ties="error")


@pytest.mark.parametrize(
    "label", [{"label": 2}, {"label": True}, {"label_0": -1}, {"preferred": "first"}, {"preferred": 0.3}]
)
def test_labels_that_mean_nothing_are_refused(tmp_path, label):
    name = next(iter(label))
    with pytest.raises(SourceError, match=rf"s0\.tar: sample 'k': {name} is"):
        pairs_of(tmp_path, archive([("k.0.jpg", b""), ("k.1.jpg", b""), ("k.json", json.dumps(label).encode())]))


def test_incomplete_samples_are_counted_and_left_out(tmp_path):
    data = archive([("a.win.jpg", b""), *sample("b"), ("c.0.jpg", b""), ("c.lose.jpg", b""), ("d.json", b"{}")])
    source = pairs_of(tmp_path, data)
    assert [source[i].key for i in range(len(source))] == ["b"]
    assert source.counts == {"files": 1, "samples": 3, "incomplete": 2, "ties": 0, "pairs": 1}
    with pytest.raises(SourceError, match="no pairs found; 1 files, 1 samples, 1 incomplete"):
        pairs_of(tmp_path, archive([("a.win.jpg", b"")]))


def test_keys_with_dots_are_told(tmp_path):
    """WebDataset's key ends at the first dot of a name: v1.5_0.win.png is a "5_0.win.png" of v1."""
    dotted = [(f"d.x/v1.5_{n}.{arm}", b"") for n in range(2) for arm in ("win.png", "LOSE.MP4", "seg.png", "json")]
    told = r"4 arms passed over for a further dot in their names \(a key ends at the first one\)"
    with pytest.raises(SourceError, match=f"no pairs found; 1 files, {told}"):
        pairs_of(tmp_path, archive(dotted))
    source = pairs_of(tmp_path, archive([*dotted, *sample("b")]))
    assert [source[i].key for i in range(len(source))] == ["b"]
    assert [number for name, number in source.counts.items() if "further dot" in name] == [4]


def test_a_key_that_begins_as_bzip2_does(tmp_path):
    assert pairs_of(tmp_path, archive(sample("BZh9")))[0].key == "BZh9"


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_arms_that_are_links_are_told(tmp_path, kind):
    """GNU tar stores a file that has two names, as the same image in two pairs may, as a link the second time."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.win.jpg", "a.lose.jpg", "b.win.jpg"):
            tar.addfile(tarfile.TarInfo(name))
        for name in ("b.lose.jpg", "b.json", "b.cls"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.win.jpg"
            tar.addfile(link)
    source = pairs_of(tmp_path, file.getvalue())
    assert [source[i].key for i in range(len(source))] == ["a"]
    (told,) = [count for name, count in source.counts.items() if "links (tar --hard-dereference" in name]
    assert (told, source.counts["incomplete"]) == (1, 1)


def test_shards_by_their_numbers(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number:02}.tar").write_bytes(archive(sample(f"k{number}")))
    source = open_source(f"{tmp_path}/s-{{00..02}}.tar")
    assert [source[i].key for i in range(len(source))] == ["k0", "k1", "k2"]
    assert len(open_source(f"{tmp_path}/s-{{01..01}}.tar")) == 1
    with pytest.raises(SourceError, match=r"s-03\.tar: no such file"):
        open_source(f"{tmp_path}/s-{{00..03}}.tar")
    with pytest.raises(SourceError, match=r"\{3\.\.1\} counts down; expected the smaller number first"):
        open_source(f"{tmp_path}/s-{{3..1}}.tar")
    with pytest.raises(SourceError, match=r"\{0\.\.1048576\} means 1048577 files; expected at most 1048576"):
        open_source(f"{tmp_path}/s-{{0..1048576}}.tar")
    with pytest.raises(
        SourceError, match=r"s-\{\.\.\.\}\.tar: a number in the braces has 5000 digits; expected at most"
    ):
        open_source(f"{tmp_path}/s-{{0..{'9' * 5000}}}.tar")


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")
    try:
        with open(path, "wb") as file:
            file.write(archive(sample("k")))
    except OSError:
        pytest.skip("the file system has no such names")
    with pytest.raises(SourceError, match=r"caf\\udce9\.tar': the file's name is not UTF-8"):
        open_source(path)


def test_shards_blocks_and_keys(tmp_path):
    first, second = archive([*sample("a"), *sample("b")]), archive([*sample("c"), *sample("d"), *sample("e")])
    source = pairs_of(tmp_path, first, archive([("readme", b"")]), second)
    assert source.blocks.tolist() == [2, 3]
    assert [source[i].key for i in range(5)] == list("abcde")
    assert source.position(2) == f"{tmp_path}/s2.tar at byte 0"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]
    restarting = pairs_of(tmp_path, first, second, first)
    assert [restarting[i].key for i in range(7)] == ["s0/a", "s0/b", "s1/c", "s1/d", "s1/e", "s2/a", "s2/b"]
    with pytest.raises(SourceError, match="given twice"):
        TarPairs([tmp_path / "s0.tar", tmp_path / "s0.tar"])


def test_fingerprint_is_of_the_contents_not_of_the_place(tmp_path):
    first, second = archive([*sample("a"), *sample("b")]), archive([*sample("c", b"123")])
    (tmp_path / "x").mkdir()
    (tmp_path / "y" / "z").mkdir(parents=True)
    source, moved = pairs_of(tmp_path / "x", first, second), pairs_of(tmp_path / "y" / "z", first, second)
    assert source.fingerprint == moved.fingerprint
    os.utime(tmp_path / "x" / "s0.tar", (1, 1))
    assert TarPairs(tmp_path / "x").fingerprint == source.fingerprint
    for other in (archive([*sample("a"), *sample("k")]), archive([*sample("a", category="n"), *sample("b")])):
        assert len(other) == len(first)
        assert pairs_of(tmp_path / "x", other, second).fingerprint != source.fingerprint


def test_what_is_said_of_the_pairs_is_in_the_fingerprint(tmp_path):
    """Labels, prompts and texts: all of the same length, so that no member moves."""

    def shard(label, prompt, text):
        images = [("a.0.jpg", b"zero"), ("a.1.jpg", b"one")]
        return archive([*images, ("a.json", json.dumps(dict(label_0=label, p=prompt)).encode()), ("a.txt", text)])

    first = shard(0, "a cat", b"cat")
    found = {pairs_of(tmp_path, first).fingerprint}
    for other in (shard(1, "a cat", b"cat"), shard(0, "a dog", b"cat"), shard(0, "a cat", b"dog")):
        assert len(other) == len(first)
        found.add(pairs_of(tmp_path, other).fingerprint)
    assert len(found) == 4


def test_the_fingerprint_stays_what_it_was(tmp_path):
    """States of loaders, checkpoints and stores hold it. Computed by the code from before rows had a checksum."""
    images = [("d.0.jpg", b"0"), ("d.1.jpg", b"1"), ("d.json", b'{"label_0": 0.5}'), ("d.txt", b"t")]
    shards = (
        archive([*sample("a", prompt="p"), *sample("b", category="n")]),
        archive([*sample("c", b"123", weight=2), *images]),
    )
    assert pairs_of(tmp_path, *shards, ties="keep").fingerprint == "tar:6e89d1dc4c6cd88c26952aa7c3a100ab"
    assert pairs_of(tmp_path, *shards).fingerprint == "tar:ccf347bd4df4851bd5b389c2817025de"


@pytest.mark.parametrize("labelled", [False, 0])
def test_samples_without_a_label_are_left_out(tmp_path, labelled):
    """As rows of Pick-a-Pic that were made samples: 0 and 0 is no tie there."""
    images = [(f"{key}.{arm}.jpg", b"image") for key in "ab" for arm in "01"]
    record = dict(label_0=0, label_1=0, has_label=labelled)
    members = [*images[:2], ("a.json", json.dumps(record).encode()), *images[2:], ("b.json", b'{"label_0": 1}')]
    source = pairs_of(tmp_path, archive(members), ties="keep")
    assert [source[i].key for i in range(len(source))] == ["b"]
    assert source.counts["without label"] == 1


def test_a_shard_is_found_by_any_case_of_its_suffix_and_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "A.TAR").write_bytes(archive(sample("a")))
    monkeypatch.chdir(tmp_path)
    for where in ("up", "up/A.TAR"):
        source = TarPairs(where)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            assert bytes(source[0].win) == b"W"


def test_links_to_folders_are_followed_once(tmp_path):
    """Each pair would come twice, or, of a folder within itself, forty times."""
    for folder in ("v2", ".hidden"):
        (tmp_path / "all" / folder).mkdir(parents=True)
        (tmp_path / "all" / folder / f"{folder}.tar").write_bytes(archive(sample(folder)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.TAR").write_bytes(archive(sample("x")))
    for name, to in (("latest", "v2"), ("loop", "."), ("v2/loop", "../v2"), ("more", "../elsewhere")):
        (tmp_path / "all" / name).symlink_to(to, target_is_directory=True)
    source = TarPairs(tmp_path / "all")
    assert sorted(source[i].key for i in range(len(source))) == ["v2", "x"]
    assert source.position(0).startswith(str(tmp_path / "all" / "latest" / "v2.tar"))


def test_a_file_with_several_names_is_read_once(tmp_path):
    """Under its own, if the folder has that; also through a folder that is a link."""
    folder, elsewhere = tmp_path / "all", tmp_path / "elsewhere"
    for place, key in ((folder, "m"), (folder / "v2", "v"), (elsewhere, "x")):
        place.mkdir()
        (place / f"{key}.tar").write_bytes(archive(sample(key)))
    for name, to in (
        ("a", "m"),
        ("n", "m"),
        ("b", "../elsewhere/x"),
        ("c", "../elsewhere/x"),
        ("d", "v2/v"),
        ("e", "no"),
    ):
        (folder / f"{name}.tar").symlink_to(f"{to}.tar")
    (folder / "latest").symlink_to("v2", target_is_directory=True)
    source = TarPairs(folder)
    found = [(source.position(i).split(" at ")[0], source[i].key) for i in range(len(source))]
    assert found == [(f"{folder}/{name}.tar", key) for name, key in (("b", "x"), ("latest/v", "v"), ("m", "m"))]


def test_a_file_that_a_glob_finds_by_several_names_is_read_once(tmp_path):
    """As in a folder: under its own name, else by the first link to it."""
    (tmp_path / "v2").mkdir()
    for name in ("m", "v2/v"):
        (tmp_path / f"{name}.tar").write_bytes(archive(sample(name[-1])))
    for name, to in (("a.tar", "m.tar"), ("b.tar", "v2/v.tar"), ("c.tar", "v2/v.tar"), ("d.tar", "no.tar")):
        (tmp_path / name).symlink_to(to)
    (tmp_path / "latest").symlink_to("v2", target_is_directory=True)
    for pattern, expected in (
        ("*.tar", {"b.tar": "v", "m.tar": "m"}),
        ("[ac].tar", {"a.tar": "m", "c.tar": "v"}),
        ("**/*.tar", {"latest/v.tar": "v", "m.tar": "m"}),
    ):
        source = TarPairs(f"{tmp_path}/{pattern}")
        found = {source.position(i).split(" at ")[0]: source[i].key for i in range(len(source))}
        assert found == {f"{tmp_path}/{name}": key for name, key in expected.items()}


def test_the_index_is_kept_and_built_anew_when_the_shard_changes(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    data = archive([*sample("a"), *sample("b", category="n")])
    source = pairs_of(tmp_path, data, cache=cache)
    calls = []
    scan = TarPairs._scan
    monkeypatch.setattr(TarPairs, "_scan", lambda *args: calls.append(1) or scan(*args))
    again = TarPairs(tmp_path / "s0.tar", cache=cache)
    assert not calls
    assert everything(again) == everything(source)
    assert again.counts == source.counts
    (tmp_path / "s0.tar").write_bytes(archive(sample("c")))
    assert TarPairs(tmp_path / "s0.tar", cache=cache)[0].key == "c"
    assert calls == [1]
    (file,) = (f for f in cache.iterdir() if b"1" in np.load(f)["notes"].tobytes() and len(np.load(f)["rows"]) == 1)
    with np.load(file) as stored:
        arrays = dict(stored)
    for field, value in (("start", 512 * 10**6), ("start", -512), ("blocks", 2**31), ("category", 7)):
        rows = arrays["rows"].copy()
        rows[field] = value
        np.savez(file, **{**arrays, "rows": rows})
        assert TarPairs(tmp_path / "s0.tar", cache=cache)[0].key == "c"
        assert calls.pop() == 1
    assert calls == [1]


def test_memory_per_pair(tmp_path):
    """What stays, and what opening takes for a moment."""
    pairs = 1500
    for part in range(2):
        members = [one for i in range(pairs // 2) for one in sample(f"{part} {i}", b"w", b"l", category=f"c{i % 3}")]
        (tmp_path / f"{part}.tar").write_bytes(archive(members))
    TarPairs(tmp_path)
    tracemalloc.start()
    try:
        source = TarPairs(tmp_path)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == pairs
    assert TarPairs.row.itemsize == 29
    assert stays < 29 * pairs + 60_000  # and what is there once
    assert peak < 2.5 * 29 * pairs + 150_000


def test_remote_shards_read_the_same(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    data = archive([*sample("a", os.urandom(3000), prompt="p"), *sample("b", category="c")])
    memory = fsspec.filesystem("memory")
    memory.pipe("/shards/s0.tar", data)
    try:
        local = pairs_of(tmp_path, data)
        remote = pickle.loads(pickle.dumps(TarPairs("memory://shards/*.tar")))
        assert everything(remote) == everything(local)
        assert remote.fingerprint == local.fingerprint
        memory.rm("/shards/s0.tar")
        with pytest.raises(PairError, match=r"memory://shards/s0\.tar at byte 0"):
            remote[0]
    finally:
        memory.store.clear()


def test_columns_come_along_and_misspelt_ones_are_refused(tmp_path):
    data = archive([*sample("a", model="x", deep={"n": [1]}), *sample("b")])
    source = pairs_of(tmp_path, data, columns=["model", "deep"])
    assert [source[i].extra for i in range(2)] == [{"model": "x", "deep": {"n": [1]}}, {"model": None, "deep": None}]
    with pytest.raises(SourceError, match=r"columns has 'modle', which no record has; expected some of: deep, model"):
        pairs_of(tmp_path, data, columns=["modle"])
    with pytest.raises(TypeError, match="columns is 'model'"):
        pairs_of(tmp_path, data, columns="model")
    with pytest.raises(ValueError, match="ties is 'both'; expected one of 'drop'"):
        pairs_of(tmp_path, data, ties="both")


# ---------------------------------------------------------------------------------------------- what is wrong


def test_categories_are_in_order_of_their_names(tmp_path):
    """The same in every process, whatever order they are met in: shares of an epoch go by their numbers."""
    names = [f"{c}{n}" for c in "qbzam" for n in range(4)]
    shards = [archive([one for n in part for one in sample(n, category=n)]) for part in (names[::2], names[1::2])]
    source = pairs_of(tmp_path, *shards)
    found, codes = source.categories
    assert found == (*sorted(names),)
    assert [found[code] for code in codes] == [source[i].category for i in range(20)] == names[::2] + names[1::2]


def test_one_bad_json_is_the_trouble_of_its_pair(tmp_path):
    bad = [b"{", b"[1]", b'{"prompt": 7.5}', b'{"weight": -1}', b'{"weight": NaN}', b'{"category": []}', b"\xff"]
    bad += [b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"weight": 1e400}']
    members = []
    for number, text in enumerate(bad):
        members += [(f"{number}.win.jpg", b""), (f"{number}.lose.jpg", b""), (f"{number}.json", text)]
    source = pairs_of(
        tmp_path, archive([*members, *sample("good"), ("t.0.jpg", b""), ("t.1.jpg", b""), ("t.json", b"{")])
    )
    assert len(source) == len(bad) + 2
    for index in [*range(len(bad)), len(bad) + 1]:
        with pytest.raises(PairError, match=r"s0\.tar at byte \d+: "):
            source[index]
    assert source[len(bad)].key == "good"


@pytest.mark.parametrize("at", [0, 1])
def test_a_bad_json_makes_no_category(tmp_path, at):
    """Which would have as many turns as each of the others where categories are balanced."""
    members = [sample(key, category="it") for key in "ab"]
    members.insert(at, [*sample("x")[:2], ("x.json", b"{")])
    source = pairs_of(tmp_path, archive([one for some in members for one in some]))
    assert source.categories[0] == ("it",)
    assert [source[index].category for index in range(3) if index != at] == ["it", "it"]
    assert pairs_of(tmp_path, archive(members[at])).categories[0] == ("",)


def test_what_a_remote_shard_says_of_its_pairs_is_not_another_thing_later(tmp_path):
    """Names and sizes are the same; only the winner is another one, or the prompt."""
    memory = pytest.importorskip("fsspec").filesystem("memory")

    def shard(label, prompt):
        arms = [("k.0.jpg", b"A"), ("k.1.jpg", b"B"), ("k.json", b'{"label": %d}' % label), ("k.txt", prompt)]
        return archive([*arms, *sample("z")])

    memory.pipe("/later.tar", shard(0, b"cat"))
    source = TarPairs("memory://later.tar")
    assert (bytes(source[0].win), source[0].prompt) == (b"A", "cat")
    for changed in (shard(1, b"cat"), shard(0, b"dog")):
        memory.pipe("/later.tar", changed)
        with pytest.raises(PairError, match=r"later\.tar at byte 0: the shard has changed"):
            source[0]
        assert source[1].key == "z"
    memory.pipe("/later.tar", shard(0, b"cat"))
    assert (bytes(source[0].win), source[0].prompt) == (b"A", "cat")


def test_a_remote_shard_with_something_else_in_the_place_of_a_pair(tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    first = archive([*sample("a"), *sample("b")])
    memory.pipe("/else.tar", first)
    source = TarPairs("memory://else.tar")
    for other in (
        bytes(len(first)),
        archive([("a.win.jpg", b"W"), ("b.lose.png", b"L"), ("a.json", b"{}")]) + bytes(4096),
        archive([(f"{n}.cls", b"3") for n in range(8)]),
        archive([("a.win.jpg", b"W" * 9000)]),
        os.urandom(len(first)),
    ):
        memory.pipe("/else.tar", other)
        with pytest.raises(PairError, match=r"else\.tar at byte 0: the shard has changed or is damaged"):
            source[0]


def test_a_prompt_in_another_encoding_is_told(tmp_path):
    source = pairs_of(tmp_path, archive([("a.win.jpg", b""), ("a.lose.jpg", b""), ("a.txt", b"gr\xfcn")]))
    with pytest.raises(PairError, match="sample 'a': its txt is not UTF-8"):
        source[0]


def test_a_shard_replaced_after_opening(tmp_path):
    """Each pair is either the one that it was, or an error that names shard and byte."""
    first = archive([*sample("a"), *sample("b"), *sample("c")])
    source = pairs_of(tmp_path, first)
    for other in (
        archive([*sample("a"), *sample("x"), *sample("c")]),
        archive([("a.txt", b""), *sample("b"), *sample("c")]),
        archive([*sample("a"), ("b.win.jpg", b""), ("b.cls", b""), ("b.json", b"{}")]),
        archive([*sample("a"), *sample("b", b"W" * 600)]),
        first[:4000],
        b"",
        os.urandom(len(first)),
    ):
        (tmp_path / "s0.tar").write_bytes(other)
        found = [attempt(source, index) for index in range(3)]
        right = [(key, b"W", b"L") for key in "abc"]
        wrong = [f"s0.tar at byte {index * 3072}: " for index in range(3)]
        assert all(f == r or w in f for f, r, w in zip(found, right, wrong, strict=True))
        assert found != right
    (tmp_path / "s0.tar").unlink()
    with pytest.raises(PairError, match=r"s0\.tar at byte 0: .*No such file"):
        source[0]


def test_a_shard_cut_off_anywhere_loses_its_last_sample_and_says_so(tmp_path):
    whole = archive([*sample("a", b"1" * 700), *sample("b", b"2" * 700), *sample("c")])
    shown = {"a": 3584 + 1536, "b": 7168 + 1024}  # where the first member of the next sample is whole
    for length in range(600, 10240 + 1, 172):
        expected = [key for key, end in shown.items() if length >= end]
        if expected:
            with pytest.warns(RuntimeWarning, match=r"cut off, so that at least the last sample is .*s0\.tar$"):
                source = pairs_of(tmp_path, whole[:length])
            assert source.counts["files cut off"] == 1
            assert [source[i].key for i in range(len(source))] == expected
        else:
            with pytest.raises(SourceError, match=r"1 files cut off|ends before its first member"):
                pairs_of(tmp_path, whole[:length])
    assert len(pairs_of(tmp_path, whole)) == 3
    for _ in range(2):  # from the kept index, too
        with pytest.warns(RuntimeWarning, match=r"missing: .*s1\.tar and 1 others$"):
            pairs_of(tmp_path, whole, whole[:6000], whole[:9000])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip.compress(PAIR + END), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + PAIR, "compressed with zstd"),
        (b"PK\x03\x04" + PAIR, "no tar header at byte 0"),
        (b"", "ends before its first member"),
        (b"<html>", "ends before its first member"),
        (PAIR[:512] + b"?" * 1024, "no tar header at byte 1024"),
        (header(b"a.win.jpg", checksum=1) + PAIR, "no tar header at byte 0"),
        (header(b"a.win.jpg", b"-0000000001\0") + PAIR + END, "number b'-0000000001"),
        (header(b"a.win.jpg", b"0x000000001\0") + PAIR + END, "number b'0x"),
        (header(b"a.win.jpg", b"1_000000001\0") + PAIR + END, "number b'1_"),
        (header(b"a.win.jpg", b"\xff" * 12) + PAIR + END, r"number b'\\xff"),
        (PAIR + header(b"a.win.jpg", b"\x80" + b"\xff" * 11), "no pairs found; .*1 files cut off"),
        (pax(size=b"-512") + PAIR + END, "number b'-512'"),
        (pax(size=b"9" * 5000) + PAIR + END, "number b'9999"),
        (pax(path=b"a\0b.win.jpg") + PAIR + END, "zero byte"),
        (pax(path=b"\xff.win.jpg") + PAIR + END, "not UTF-8"),
        (pax(**{"GNU.sparse.major": b"1"}) + PAIR + END, "sparse member at byte 0"),
        (member(b"pax", b"30 path=short\n", b"x") + PAIR + END, "a record that is not one"),
        (member(b"pax", b"0 path=a\n", b"x") + PAIR + END, "a record that is not one"),
        (member(b"pax", b"x path=a\n", b"x") + PAIR + END, "number b'x'"),
        (member(b"pax", b"5 a=b", b"x") + PAIR + END, "a record that is not one"),
        (member(b"pax", b"14 path=a.jpg\n", b"g") + PAIR + END, "global header"),
        (pax(comment=b"only") + END, "header without a member at byte 0"),
        (header(b"long", b"%011o\0" % (1 << 30), b"L") + PAIR + END, "a header of 1073741824 bytes"),
        (header(b"a.win.jpg", b"%011o\0" % 512, b"S") + bytes(512) + PAIR + END, "sparse member"),
        (header(b"a.win.jpg", b"%011o\0" % 512, b"1") + bytes(512) + PAIR + END, "a link, folder or device of 512"),
        (member(b"\xe4.win.jpg", b"W") + PAIR + END, "not UTF-8"),
        (member(b"a.win.png", b"W") + PAIR + END, "two members 'win', the second at byte 1024"),
        (PAIR + member(b"b.win.jpg") + PAIR + END, "sample 'a' comes twice, not in one piece, at byte 2560"),
        (PAIR + END + PAIR + END, "goes on after its end, at byte 2048"),
        (PAIR + END + bytes(1 << 21), "goes on after its end"),
        (header(b"a.json", b"%011o\0" % ((1 << 24) + 1)) + bytes((1 << 24) + 512), "expected at most 16777216"),
    ],
    # By their bytes they would be megabytes, and others in each process: gzip writes the time.
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_is_no_sound_shard_is_refused(tmp_path, data, reason):
    with pytest.raises(SourceError, match=rf"s0\.tar: .*{reason}"):
        pairs_of(tmp_path, data)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"V", b"M", b"D", b"Z"])
def test_what_is_no_file_is_passed_over(tmp_path, kind):
    data = member(b"z.win.jpg", b"" if kind in b"12346" else b"x" * 600, kind) + PAIR + END
    source = pairs_of(tmp_path, data)
    assert [source[i].key for i in range(len(source))] == ["a"]


def test_a_huge_sparse_file_is_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "s0.tar"
    with open(path, "wb") as file:
        file.write(header(b"a.win.jpg", b"\x80" + (5 << 30).to_bytes(11, "big")))
        file.seek(5 << 30, os.SEEK_CUR)
        file.write(member(b"a.lose.jpg") + END)
    with pytest.raises(SourceError, match="sample 'a' has 5368710144 bytes; expected at most 4294967296"):
        TarPairs(path)


@settings(max_examples=150)
@given(st.data())
def test_damaged_headers_never_do_more_than_raise(tmp_path_factory, data):
    """Sums of headers are mended after the damage, so that it gets past them."""
    form = data.draw(st.sampled_from(["gnu", "pax", "ustar"]))
    key = "k" * data.draw(st.sampled_from([1, 90 if form == "ustar" else 150]))
    whole = bytearray(archive([*sample(key, b"w" * 600), *sample("z")], form))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 4 * 512 - 1))
        whole[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b"0123456789xLgS\0\x80\xff"))))
    for start in range(0, len(whole), 512):
        block = whole[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            whole[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    folder = tmp_path_factory.mktemp("t")
    try:
        source = pairs_of(folder, bytes(whole))
    except SourceError:
        return
    for index in range(len(source)):
        assert isinstance(attempt(source, index), (tuple, str))
