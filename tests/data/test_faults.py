"""PairLoader on files that are damaged, cut off, deleted or replaced while it reads them."""

import io
import os
import random
import struct
import tarfile

import image_oracle as oracle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data.pairs import Tiny, png, which
from image_oracle import picture

from polydpo_fast.data import LoaderError, Pair, PairLoader, Source, open_source, read_ledger
from polydpo_fast.data.formats.parquet import ParquetPairs

TINY = dict(size=2, dtype=torch.uint8, max_bad_rate=1.0, max_bad_run=10**6, prefetch=1, readers=1)


def shards(folder, count=4, each=10, first=0):
    """Pairs of numbered pixels in shards; pair i is in shard i // each."""
    for number in range(count):
        with tarfile.open(folder / f"{number}.tar", "w") as shard:
            for i in range(number * each, (number + 1) * each):
                for name, data in (
                    (f"{i:04}.win.png", png(first + i, 0, 0)),
                    (f"{i:04}.lose.png", png(first + i, 0, 1)),
                ):
                    facts = tarfile.TarInfo(name)
                    facts.size = len(data)
                    shard.addfile(facts, io.BytesIO(data))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    """By a shard of the same size and form with other pairs in it."""
    folder = path.parent / "other"
    folder.mkdir()
    shards(folder, count=4, first=100)
    stored = (folder / path.name).read_bytes().replace(b".win.png", b".los.png")
    path.write_bytes(stored)


def swap(path):
    """By one with the same names and sizes, in which each winner is the loser."""
    stored = path.read_bytes().replace(b".win.png", b".tmp.png").replace(b".lose.png", b".win.png\0")
    path.write_bytes(stored.replace(b".tmp.png\0", b".lose.png"))


@pytest.mark.parametrize(
    ("change", "lost"),
    [(truncate, range(20, 30)), (os.unlink, range(20, 30)), (replace, range(20, 30)), (swap, range(20, 30))],
)
def test_a_shard_that_changes_in_the_middle_costs_its_own_pairs(tmp_path, change, lost):
    shards(tmp_path)
    loader = PairLoader(tmp_path, 2, shuffle=False, ledger=tmp_path / "bad.jsonl", **TINY)
    got = []
    for step, batch in enumerate(loader):
        if step == 2:  # what is read ahead by now is of the first shard
            change(tmp_path / "2.tar")
        numbers, arms = which(batch.pixels)
        assert numbers[:2] == numbers[2:] == batch.index.tolist()
        assert arms == [0, 0, 1, 1]
        got += numbers[:2]
    bad = {line["index"] for line in read_ledger(tmp_path / "bad.jsonl")}
    assert bad == set(lost)
    for position, number in enumerate(got):
        assert (number == position) == (position not in bad)
        assert number not in bad
    assert all("2.tar" in line["position"] for line in read_ledger(tmp_path / "bad.jsonl"))


def test_a_damaged_row_group_costs_its_own_pairs(tmp_path):
    rows = [
        {"jpg_0": png(i, 0, 0), "jpg_1": png(i, 0, 1), "label_0": 1.0, "label_1": 0.0, "caption": f"{i}"}
        for i in range(40)
    ]
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        file.write(bytes(column.total_compressed_size // 3))
    loader = PairLoader(path, 2, shuffle=False, ledger=tmp_path / "bad.jsonl", **TINY)
    got = [number for batch in loader for number in which(batch.pixels)[0][:2]]
    bad = {line["index"] for line in read_ledger(tmp_path / "bad.jsonl")}
    assert bad == set(range(10, 20))
    assert [i for i in range(40) if got[i] != i] == list(range(10, 20))
    assert not bad & set(got)


def row_groups(path, groups, each, bad=()):
    """Pairs of numbered pixels in row groups; of the bad ones the winner is none."""
    rows = [
        {"win": b"no image" if i in bad else png(i % 256, i // 256, 0), "lose": png(i % 256, i // 256, 1)}
        for i in range(groups * each)
    ]
    schema = pa.schema([("win", pa.binary()), ("lose", pa.binary())])
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, row_group_size=each, compression="none", use_dictionary=False)


def test_a_damaged_row_group_alone_in_its_window_ends_no_training(tmp_path):
    """It counts once among bad pairs in a row, and no replacement is looked for in it."""
    path = tmp_path / "pairs.parquet"
    row_groups(path, 3, 60)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 40)
    alone = 0
    for epoch in range(6):
        loader = PairLoader(path, 10, window=2, size=2, dtype=torch.uint8, max_bad_rate=1.0)
        loader.set_epoch(epoch)
        alone += loader._order()(np.arange(120, 180)).tolist()[0] in range(60, 120)
        got = [number for batch in loader for number in which(batch.pixels)[0][:10]]
        assert len(got) == 180
        assert not set(range(60, 120)) & set(got)
        assert loader.stats.bad == 60
    assert 1 <= alone < 6


class Wrapped(Source):
    """Somebody's own, around another: it says nothing of blocks."""

    kind = "wrapped"

    def __init__(self, inner):
        self.inner = inner

    @property
    def fingerprint(self):
        return self.inner.fingerprint

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]

    def position(self, index):
        return self.inner.position(index)


def test_a_damaged_row_group_within_a_source_of_ones_own(tmp_path):
    path = tmp_path / "pairs.parquet"
    row_groups(path, 5, 20)
    with open(path, "r+b") as file:
        file.seek(pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset)
        file.write(b"\xff" * 40)
    loader = PairLoader(Wrapped(ParquetPairs(path)), 5, **TINY)
    got = [number for batch in loader for number in which(batch.pixels)[0][:5]]
    assert len(got) == 100
    assert not set(range(20, 40)) & set(got)
    assert loader.stats.bad >= 20


def test_files_that_are_gone_are_told_with_the_reason(tmp_path):
    """Of fewer row groups than bad pairs in a row are borne, and each counts once."""
    path = tmp_path / "pairs.parquet"
    row_groups(path, 5, 20)
    source = ParquetPairs(path)
    path.unlink()
    with pytest.raises(LoaderError, match="No such file or directory"):
        list(PairLoader(source, 5, size=2, dtype=torch.uint8))


def test_too_little_memory_for_a_window_is_told_once(tmp_path):
    path = tmp_path / "pairs.parquet"
    row_groups(path, 8, 20)
    size = ParquetPairs(path)._read(ParquetPairs(path)._blocks[0]).size
    enough = open_source(path, memory_bytes=4 * size + size // 2)
    assert len(list(PairLoader(enough, 16, window=4, size=2, dtype=torch.uint8))) == 10
    little = open_source(path, memory_bytes=3 * size + size // 2)
    with pytest.warns(RuntimeWarning, match=r"holds 3 row groups .* while 4 are shuffled together") as caught:
        assert len(list(PairLoader(little, 16, window=4, size=2, dtype=torch.uint8))) == 10
    assert len(caught) == 1
    assert len(list(PairLoader(little, 16, shuffle=False, size=2, dtype=torch.uint8))) == 10


def test_replacements_are_of_the_row_groups_that_are_in_memory(tmp_path, monkeypatch):
    path, bad = tmp_path / "pairs.parquet", set(range(5, 320, 10))
    row_groups(path, 16, 20, bad)
    size = ParquetPairs(path)._read(ParquetPairs(path)._blocks[0]).size

    def indices(world_size, rank, reads):
        source = ParquetPairs(path, memory_bytes=8 * size + size // 2)  # of two windows
        read = source._read
        monkeypatch.setattr(source, "_read", lambda block: reads.append(block.number) or read(block))
        options = {**TINY, "window": 4, "world_size": world_size, "rank": rank}
        return [batch.index.tolist() for batch in PairLoader(source, 16 // world_size, **options)]

    reads = []
    got = [index for batch in indices(1, 0, reads) for index in batch]
    assert sorted(reads) == list(range(16)), "each once"
    halves = [indices(2, rank, []) for rank in range(2)]
    assert [index for pair in zip(*halves, strict=True) for half in pair for index in half] == got
    order = PairLoader(path, 16, window=4, **TINY)._order()(np.arange(320)).tolist()
    for position, (index, planned) in enumerate(zip(got, order, strict=True)):
        assert index not in bad
        assert planned in bad or index == planned
        window = order[position // 80 * 80 : position // 80 * 80 + 80]
        assert index in window


def defects():
    """Ways to damage an image of 64 x 64 pixels, of each kind that is decoded otherwise, so that it must be refused."""
    image, chance = picture(64, 64), random.Random(1)
    jpeg, png_ = oracle.jpeg(image), oracle.png(image)
    yield from (b"", b"\xff", b"<!DOCTYPE html>", b"GIF89a", bytes(1000), jpeg[:3], png_[:8], b"RIFF....WEBPVP8 ")
    kinds = [jpeg, png_, oracle.written(np.asarray(image), 2, 8, interlace=True)]
    kinds += [oracle.jpeg(image.convert(mode)) for mode in ("L", "CMYK")]
    kinds += [oracle.jpeg(image, progressive=True), oracle.jpeg(image, restart_marker_blocks=3)]
    kinds += [oracle.file(image, form) for form in ("WEBP", "GIF", "BMP", "TIFF")]
    yield from (data[: chance.randrange(len(data))] for data in kinds for _ in range(8))
    header = png_.index(b"IHDR") + 4
    for height, width in ((2**31 - 1, 2**31 - 1), (0, 64), (65500, 65500)):
        yield png_[:header] + struct.pack(">II", width, height) + png_[header + 8 :]
    frame = jpeg.index(b"\xff\xc0") + 5
    yield jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :]
    middle = len(jpeg) // 2
    yield jpeg[:middle] + bytes(byte ^ 0x5A for byte in jpeg[middle : middle + 60]) + jpeg[middle + 60 :]
    colours = oracle.chunk(b"PLTE", bytes(9))
    yield oracle.written(np.full((8, 8), 200), 3, 8, colours, interlace=False)  # a colour that its palette lacks
    yield from (oracle.bomb(4, 4, bytes(length)) for length in (20, 5_000_000))  # of 52 bytes
    for _ in range(40):  # a checksum each: no flipped bit is unnoticed
        at = chance.randrange(8, len(png_))
        yield png_[:at] + bytes([png_[at] ^ 1 << chance.randrange(8)]) + png_[at + 1 :]


class Damaged(Tiny):
    """Every tenth pair has an arm with a defect."""

    def __init__(self, size):
        super().__init__(size)
        self.defects = list(defects())

    def is_bad(self, index):
        return index % 10 == 3

    def __getitem__(self, index):
        pair = super().__getitem__(index)
        if not self.is_bad(index):
            return pair
        arms = [pair.win, pair.lose]
        arms[index // 10 % 2] = self.defects[index // 10 % len(self.defects)]
        return Pair(pair.key, *arms)


@pytest.mark.parametrize("size", [1500, pytest.param(10_000, marks=pytest.mark.heavy)])
def test_every_defect_of_the_decoder(tmp_path, size):
    source = Damaged(size)
    loader = PairLoader(source, 10, seed=1, ledger=tmp_path / "bad.jsonl", **TINY)
    got = []
    for batch in loader:
        numbers, arms = which(batch.pixels)
        assert numbers[:10] == numbers[10:] == batch.index.tolist()
        assert arms == [0] * 10 + [1] * 10
        got += numbers[:10]
    bad = {i for i in range(size) if source.is_bad(i)}
    lines = list(read_ledger(tmp_path / "bad.jsonl"))
    assert {line["index"] for line in lines} == bad
    assert not bad & set(got)
    assert set(range(size)) - bad <= set(got)
    assert {line["arm"] for line in lines} == {"win", "lose"}
    assert all((line["arm"] == "lose") == bool(line["index"] // 10 % 2) for line in lines)


def test_files_that_are_missing_are_named(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}-w.png").write_bytes(png(i, 0, 0))
        (tmp_path / f"{i}-l.png").write_bytes(png(i, 0, 1))
    lines = [f'{{"win": "{i}-w.png", "lose": "{i}-l.png", "prompt": "p"}}' for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "5-l.png").unlink()
    source = open_source(tmp_path / "pairs.jsonl")
    loader = PairLoader(source, 4, shuffle=False, ledger=tmp_path / "bad.jsonl", **TINY)
    got = [number for batch in loader for number in which(batch.pixels)[0][:4]]
    assert [i for i in range(8) if got[i] != i] == [5]
    (line,) = list(read_ledger(tmp_path / "bad.jsonl"))
    assert (line["index"], line["arm"]) == (5, "lose")
    assert "5-l.png" in line["reason"]
    assert "pairs.jsonl" in line["position"]
