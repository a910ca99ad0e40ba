"""`pack`: what is written is what was read, and an interrupted run ends as one that was not."""

import fcntl
import io
import json
import os
import tarfile

import numpy as np
import pytest
from data.pairs import plain
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from polydpo_fast.cli import app
from polydpo_fast.data import open_source
from polydpo_fast.data import pack as packing
from polydpo_fast.data.formats.media import suffix_of
from polydpo_fast.data.formats.tar import PACK_STATE, TarPairs
from polydpo_fast.data.pack import bytes_of, pack
from polydpo_fast.data.source import Pair, PairError, Source, SourceError

BEGINNINGS = {
    "jpg": b"\xff\xd8\xff\xe0",
    "png": b"\x89PNG\r\n\x1a\n",
    "webp": b"RIFF\1\1\1\1WEBP",
    "avif": b"\0\0\0\x1cftypavif\0\0\0\0",
    "gif": b"GIF89a",
    "bmp": b"BM",
    "tif": b"II*\0",
    "jp2": b"\0\0\0\x0cjP  ",
    "ppm": b"P6",
    "qoi": b"qoif",
    "mp4": b"\0\0\0\x1cftypisom\0\0\0\0",
    "mov": b"\0\0\0\x14ftypqt  \0\0\0\0",
    "mkv": b"\x1aE\xdf\xa3\x9fB\x82\x88matroska",
    "webm": b"\x1aE\xdf\xa3\x9fB\x82\x84webm",
}


class Listed(Source):
    """The pairs of a list; those that are exceptions are raised."""

    kind = "list"
    fingerprint = "list:1"

    def __init__(self, pairs):
        self.pairs = list(pairs)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        if isinstance(self.pairs[index], Exception):
            raise self.pairs[index]
        return self.pairs[index]

    def position(self, index):
        return f"place {index}"


def image(number, size=100):
    return BEGINNINGS["jpg"] + number.to_bytes(4, "big") + bytes(size)


def many(count=20):
    """Sizes differ; two of them are bad."""
    pairs = [Pair(f"k.{n}", image(n, 37 * n), image(100 + n), f"prompt {n}", n / 4, "ab"[n % 2]) for n in range(count)]
    pairs[3] = PairError("gone", "lose")
    pairs[11] = Pair("k.11", image(11), b"<html>not here</html>")
    return Listed(pairs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
media = st.builds(
    lambda begin, rest: begin + rest, st.sampled_from(list(BEGINNINGS.values())), st.binary(max_size=1200)
)


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            Pair,
            key=texts.filter(bool),
            win=media,
            lose=media,
            prompt=texts,
            weight=st.floats(0, float(np.float32(1e30)), width=32),
            category=texts,
            extra=st.fixed_dictionaries({"model": texts, "n": st.integers() | st.none(), "weight": st.just("heavy")}),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda pair: pair.key,
    ),
    st.integers(1, 30_000),
)
def test_round_trip(tmp_path_factory, pairs, shard_size):
    folder = tmp_path_factory.mktemp("t")
    done = pack(Listed(pairs), folder, shard_size=shard_size)
    back = TarPairs(folder, columns=["model", "n"])
    assert (done.pairs, done.unreadable, done.next) == (len(pairs), 0, len(pairs))
    assert done.shards == len(back.blocks)
    for index, pair in enumerate(pairs):
        kept = {name: pair.extra[name] for name in ("model", "n")}
        assert plain(back[index]) == (*plain(pair)[:-1], kept)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            infos = list(tar)
        assert path.stat().st_size <= shard_size or len(infos) == 3
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}


def test_shards_are_filled_in_order(tmp_path):
    """As many pairs as fit: 20 KB of tar hold the end and 6 pairs of 3 KB."""
    pairs = [Pair(str(n), image(n), image(n)) for n in range(14)]
    pack(Listed(pairs), tmp_path, shard_size=20480)
    names = []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            names.append([name for name in tar.getnames() if name.endswith(".json")])
    assert names == [[f"{n:09d}.json" for n in range(a, b)] for a, b in ((0, 6), (6, 12), (12, 14))]
    assert sorted(contents(tmp_path)) == [
        "pack.json",
        "pairs-000000.tar",
        "pairs-000001.tar",
        "pairs-000002.tar",
        "unreadable.jsonl",
    ]


def test_pairs_that_cannot_be_read_are_written_down(tmp_path):
    seen = []
    done = pack(many(), tmp_path, shard_size=20480, progress=seen.append)
    assert (done.pairs, done.unreadable) == (18, 2)
    assert seen == list(range(1, 21))
    first, second = map(json.loads, (tmp_path / "unreadable.jsonl").read_text().splitlines())
    assert first == {"pair": 3, "position": "place 3", "arm": "lose", "error": "gone"}
    assert (second["pair"], second["arm"]) == (11, "lose")
    assert "begins with 3c 68 74 6d 6c" in second["error"]
    back = TarPairs(tmp_path)
    assert [back[i].key for i in range(18)] == [f"k.{n}" for n in range(20) if n not in (3, 11)]


def test_what_json_cannot_hold(tmp_path):
    """Half of a pair of surrogates is no text, and NaN no JSON: the first costs the pair, the second becomes null."""
    extra = {"x": float("nan"), "y": [np.float32("inf"), {"z": np.array([1.0, np.nan])}], "t": "é"}
    prompts = ["a \ud83d b", "good \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
    done = pack(Listed([Pair(f"{i}", image(1), image(2), p, extra=extra) for i, p in enumerate(prompts)]), tmp_path)
    assert (done.pairs, done.unreadable) == (1, 1)
    with tarfile.open(tmp_path / "pairs-000000.tar") as shard:
        text = shard.extractfile("000000001.json").read().decode()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (record["x"], record["y"], record["t"]) == (None, [None, {"z": [1.0, None]}], "é")
    assert TarPairs(tmp_path)[0].prompt == "good \U0001f600"


def test_a_record_that_no_shard_may_have_costs_its_pair(tmp_path):
    """And not all pairs of its shard, which could not be opened any more."""
    most = 1 << 24
    pairs = [Pair(f"{i}", image(1), image(2), p) for i, p in enumerate(("x" * most, "good"))]
    done = pack(Listed(pairs), tmp_path)
    assert (done.pairs, done.unreadable) == (1, 1)
    assert f"expected at most {most}" in (tmp_path / "unreadable.jsonl").read_text()
    assert TarPairs(tmp_path)[0].prompt == "good"


class Stop(BaseException):
    """Like an interrupt from the keyboard."""


@pytest.mark.parametrize("at", [0, 3, 4, 7, 12, 19])
def test_interrupted_by_the_source(tmp_path, at):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pack(many(), whole, shard_size=20480)
    broken = many()
    broken.pairs[at] = RuntimeError("the storage is on fire")
    with pytest.raises(RuntimeError, match="on fire"):
        pack(broken, parted, shard_size=20480)
    assert not list(parted.glob("*.part"))
    asked = []
    source = many()
    reading = source.pairs
    source.__class__ = type(
        "Watched", (Listed,), {"__getitem__": lambda self, i: asked.append(i) or Listed.__getitem__(self, i)}
    )
    assert pack(source, parted, shard_size=20480).next == len(reading)
    assert contents(parted) == contents(whole)
    if at > 12:
        assert asked[0] == 0  # which is compared
        assert min(asked[1:]) > 0


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_any_step_of_a_commit(tmp_path, monkeypatch, call, when):
    """Each of them in turn, one after the other on the same folder, until none is left."""
    pack(many(), tmp_path / "whole", shard_size=20480)
    genuine = getattr(os, call)
    stops = 0
    for countdown in range(1, 100):
        left = countdown

        def flaky(*args):
            nonlocal left
            left -= 1
            if left == 0 and when == "before":
                raise Stop
            genuine(*args)
            if left == 0:
                raise Stop

        monkeypatch.setattr(packing.os, call, flaky)
        folder = tmp_path / f"parted{countdown}"
        try:
            pack(many(), folder, shard_size=20480)
            break
        except Stop:
            stops += 1
        monkeypatch.setattr(packing.os, call, genuine)
        pack(many(), folder, shard_size=20480)
        assert contents(folder) == contents(tmp_path / "whole")
    assert stops >= 6


def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """After a crash of the machine, shards and lists that the state counts are whole."""
    on_disk, named, fsync, replace = {}, [], os.fsync, os.replace

    def noted(file):
        fsync(file)
        facts = os.fstat(file)
        on_disk[facts.st_ino] = facts.st_size

    def checked(part, path):
        known = [path.with_name(packing.UNREADABLE)] if path.name == PACK_STATE else []
        for file in (part, *(one for one in known if one.exists())):
            assert on_disk.get(file.stat().st_ino) == file.stat().st_size, file
        named.append(path.name)
        replace(part, path)

    source = many()
    source.pairs[2] = PairError("its file is gone")
    monkeypatch.setattr(packing.os, "fsync", noted)
    monkeypatch.setattr(packing.os, "replace", checked)
    pack(source, tmp_path, shard_size=20480)
    assert len(named) > 6
    assert (tmp_path / packing.UNREADABLE).stat().st_size > 0


def test_a_folder_that_is_not_packed_to_its_end_is_no_source(tmp_path):
    source = many()
    source.pairs[15] = RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"):
        pack(source, tmp_path, shard_size=20480)
    assert len(list(tmp_path.glob("*.tar"))) > 0
    with pytest.raises(SourceError, match="is not packed to its end; pack it again"):
        open_source(tmp_path)
    pack(many(), tmp_path, shard_size=20480)
    assert len(open_source(tmp_path)) == 18  # two of them cannot be read


def test_category_and_weight_are_no_further_columns(tmp_path):
    """Of Parquet they would be lost to the pair's own, which are "" and 1."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        dict(chosen=image(i), rejected=image(i + 9), prompt="p", weight=0.25, category="xy"[i % 2]) for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    command = ["pack", str(tmp_path / "pairs.parquet"), str(tmp_path / "out")]
    for name in ("category", "weight"):
        result = CliRunner().invoke(app, [*command, "--columns", name])
        assert result.exit_code == 2
        assert f"expected --{name} {name}" in result.output
    result = CliRunner().invoke(app, [*command, "--category", "category", "--weight", "weight"])
    assert result.exit_code == 0, result.output
    packed = open_source(tmp_path / "out")
    assert [(packed[i].category, packed[i].weight) for i in range(4)] == [("x", 0.25), ("y", 0.25)] * 2


def test_what_is_done_is_not_done_again(tmp_path):
    first = pack(many(), tmp_path)
    before = contents(tmp_path)
    again = many()
    again.pairs[1:] = [RuntimeError("read again")] * (len(again) - 1)  # the first one is compared
    assert pack(again, tmp_path) == first
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_is_not_continued_with_other_columns_or_content(tmp_path, stopped):
    """Of which the fingerprint says nothing; half of the shards would lack them."""

    def source(**extra):
        return Listed([Pair(f"{n}", image(n), image(n), extra=extra) for n in range(20)])

    begun = source(a=1)
    if stopped:
        begun.pairs[15] = RuntimeError("stop")
        with pytest.raises(RuntimeError, match="stop"):
            pack(begun, tmp_path, shard_size=20480)
    else:
        pack(begun, tmp_path, shard_size=20480)
    before = contents(tmp_path)
    others = [source(b=1), source(), source(a=1), source(a=1)]
    others[2].pairs[0] = PairError("gone")
    others[3].pairs[0] = Pair("0", image(0), image(1), extra={"a": 1})
    for other, reason in zip(others, ["was begun with other columns"] * 2 + ["gone", "pair 0 is another"], strict=True):
        with pytest.raises(SourceError, match=reason):
            pack(other, tmp_path, shard_size=20480)
        assert contents(tmp_path) == before
    assert pack(source(a=1), tmp_path, shard_size=20480).pairs == 20
    assert TarPairs(tmp_path, columns=["a"])[19].extra == {"a": 1}


def test_out_is_a_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out in ("s3://bucket/pairs", "memory://pairs", "https://host/pairs"):
        with pytest.raises(ValueError, match="expected a folder of this machine"):
            pack(many(), out)
    assert list(tmp_path.iterdir()) == []
    pack(many(), "~/out")
    assert len(TarPairs(tmp_path / "home" / "out")) == 18


def test_the_command_refuses_to_write_into_the_folder_that_it_reads(tmp_path, monkeypatch):
    """Its shards would be read as a part of it the next time. A shell leaves a ~ in quotes as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pack(many(), tmp_path / "data")
    for out in (*(f"{tmp_path}/{out}" for out in ("data/again", "data", "other/../data/x")), "~/data", "~/data/again"):
        for source in (str(tmp_path / "data"), "~/data"):
            run = CliRunner().invoke(app, ["pack", source, out])
            assert run.exit_code == 2
            assert "of which all is read" in run.output.replace("\n", " ")
    assert len(open_source(tmp_path / "data")) == 18
    run = CliRunner().invoke(app, ["pack", str(tmp_path / "data" / "*.tar"), str(tmp_path / "data" / "again")])
    assert run.exit_code == 0, run.output


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path, monkeypatch):
    """Which would keep it full. What is buffered finds no room either when the file is closed."""

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 3000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    genuine = open

    def opened(path, mode="r"):
        return io.BufferedWriter(Full(path, "w"), 2000) if str(path).endswith("finished.part") else genuine(path, mode)

    monkeypatch.setattr(packing, "open", opened, raising=False)
    with pytest.raises(OSError, match="No space left"):
        pack(many(), tmp_path)
    assert sorted(contents(tmp_path)) == ["pack.json", "unreadable.jsonl"]


def test_other_folders_and_sources_are_refused(tmp_path):
    pack(many(), tmp_path / "a", shard_size=20480)
    other = many()
    other.fingerprint = "list:2"
    with pytest.raises(SourceError, match=r"was begun with source list:1; now it is list:2 \(.* ties\); expected"):
        pack(other, tmp_path / "a", shard_size=20480)
    with pytest.raises(SourceError, match="was begun with shard_size 20480; now it is 20481; expected the same"):
        pack(many(), tmp_path / "a", shard_size=20481)
    (tmp_path / "a" / "pairs-000001.tar").unlink()
    with pytest.raises(SourceError, match=r"pairs-000001\.tar is missing"):
        pack(many(), tmp_path / "a", shard_size=20480)
    (tmp_path / "a" / "pack.json").write_text("{")
    with pytest.raises(SourceError, match=r"pack\.json is damaged"):
        pack(many(), tmp_path / "a", shard_size=20480)
    (tmp_path / "a" / "pack.json").unlink()
    with pytest.raises(SourceError, match=r"has tar files, but no pack\.json"):
        pack(many(), tmp_path / "a", shard_size=20480)
    (tmp_path / "b").mkdir()
    with open_folder(tmp_path / "b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another process is packing into it"):
            pack(many(), tmp_path / "b")
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="shard_size is"):
            pack(many(), tmp_path / "b", shard_size=size)


def open_folder(path):
    class Handle:
        def __enter__(self):
            self.handle = os.open(path, os.O_RDONLY)
            return self.handle

        def __exit__(self, *_):
            os.close(self.handle)

    return Handle()


def test_extra_columns_that_json_cannot_hold(tmp_path):
    numbers = {"score": np.float32(0.5), "box": np.arange(2)}
    pack(Listed([Pair("k", image(0), image(1), extra=numbers)]), tmp_path / "a")
    assert TarPairs(tmp_path / "a", columns=["score", "box"])[0].extra == {"score": 0.5, "box": [0, 1]}
    with pytest.raises(SourceError, match="extra holds a bytes, which JSON cannot"):
        pack(Listed([Pair("k", image(0), image(1), extra={"x": b""})]), tmp_path / "b")


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_suffixes_by_the_first_bytes(suffix):
    assert suffix_of(memoryview(BEGINNINGS[suffix] + bytes(9))) == suffix


@pytest.mark.parametrize("data", [b"", b"\0" * 99, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"%PDF", b"\x80"])
def test_what_is_no_image(data):
    with pytest.raises(ValueError, match="it is empty" if not data else "no image or clip that is known"):
        suffix_of(data)


def test_real_images_and_their_suffixes():
    image = pytest.importorskip("PIL.Image")
    for form, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TGA", "tga"),
    ):
        file = io.BytesIO()
        image.new("RGB", (4, 4)).save(file, form)
        assert suffix_of(file.getvalue()) == suffix
        image.new("L", (4, 4)).convert("P" if form != "JPEG" else "L").save(file := io.BytesIO(), form)
        assert suffix_of(file.getvalue()) == suffix


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 500 * 10**6),
        ("1GB", 10**9),
        ("2GiB", 2**31),
        ("1.5 kb", 1500),
        ("3k", 3000),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "0", "1e9", "0.5"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="expected bytes, such as 500MB"):
        bytes_of(text)


def test_the_command(tmp_path):
    for name, data in (("a.jpg", image(1)), ("b.mp4", BEGINNINGS["mp4"] + b"clip")):
        (tmp_path / name).write_bytes(data)
    record = {"win": "a.jpg", "lose": "b.mp4", "prompt": "p", "category": "c", "model": "m"}
    (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
    run = CliRunner().invoke(app, ["pack", str(tmp_path / "m.jsonl"), str(tmp_path / "out"), "--columns", "model"])
    assert run.exit_code == 0, run.output
    assert run.output.splitlines()[-1] == f"{tmp_path / 'out'}: 1 pairs in 1 shard"
    pair = TarPairs(tmp_path / "out", columns=["model"])[0]
    assert plain(pair) == ("m.jsonl:1", image(1), BEGINNINGS["mp4"] + b"clip", "p", 1.0, "c", {"model": "m"})
    (tmp_path / "m.jsonl").write_text(json.dumps({**record, "win": "gone.jpg"}) + "\n")
    run = CliRunner().invoke(app, ["pack", str(tmp_path / "m.jsonl"), str(tmp_path / "new")])
    assert run.exit_code == 1
    assert "1 could not be read" in run.output
    for arguments in (["out"], ["bad", "--shard-size", "big"], ["bad", "--ties", "both"]):
        run = CliRunner().invoke(app, ["pack", str(tmp_path / "m.jsonl"), str(tmp_path / arguments[0]), *arguments[1:]])
        assert run.exit_code == 2


def test_the_command_takes_several_sources(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(1))
    for name in ("m", "n"):
        (tmp_path / f"{name}.jsonl").write_text('{"win": "a.jpg", "lose": "a.jpg", "weight": 2}\n')
    sources = [str(tmp_path / "m.jsonl"), str(tmp_path / "n.jsonl")]
    run = CliRunner().invoke(app, ["pack", *sources, str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert [TarPairs(tmp_path / "out")[i].key for i in range(2)] == ["m.jsonl:1", "n.jsonl:1"]


def test_the_folder_can_be_opened_as_it_is(tmp_path):
    pack(many(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ".json", ".jsonl"}
    source = open_source(tmp_path)
    assert isinstance(source, TarPairs)
    assert len(source) == 18
