"""PairLoader on clips, of every source: the frames are those that `decode_clips` gives for the same files."""

import csv
import io
import json
import tarfile

import pytest
import torch
from clip_oracle import encode

from polydpo_fast import decode_clips, yuv420_to_rgb
from polydpo_fast.data import PairLoader, open_source, read_ledger
from polydpo_fast.data.pack import pack

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT = 6
CLIPS = dict(frames=5, size=(32, 48), dtype=torch.uint8, threads=1)


@pytest.fixture(scope="module")
def clips():
    """Pairs of clips, all different: (winner, loser)."""
    made = [encode(count=9, height=40 + 2 * i, width=64 + 4 * i, codec="mpeg4") for i in range(2 * COUNT)]
    return [*zip(made[:COUNT], made[COUNT:], strict=True)]


@pytest.fixture
def folder(tmp_path, clips):
    for i, arms in enumerate(clips):
        for arm, data in zip(("win", "lose"), arms, strict=True):
            (tmp_path / f"{i}.{arm}.mp4").write_bytes(data)
    return tmp_path


def rows():
    return [{"win": f"{i}.win.mp4", "lose": f"{i}.lose.mp4", "prompt": f"clip {i}"} for i in range(COUNT)]


def parquet(folder, clips):
    images = [{"bytes": win, "path": "x.mp4"} for win, _ in clips], [{"bytes": lose} for _, lose in clips]
    table = pa.table({"chosen": images[0], "rejected": images[1], "prompt": [f"clip {i}" for i in range(COUNT)]})
    pq.write_table(table, folder / "clips.parquet", row_group_size=4)
    return folder / "clips.parquet"


def tar(folder, clips):
    with tarfile.open(folder / "clips.tar", "w") as shard:
        for i, (win, lose) in enumerate(clips):
            for name, data in ((f"{i}.win.mp4", win), (f"{i}.lose.mp4", lose), (f"{i}.txt", f"clip {i}".encode())):
                facts = tarfile.TarInfo(name)
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
    return folder / "clips.tar"


def jsonl(folder, clips):
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder / "clips.jsonl"


def table(folder, clips):
    with open(folder / "clips.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "win", "lose"])
        writer.writeheader()
        writer.writerows(rows())
    return folder / "clips.csv"


def bytes_in_memory(folder, clips):
    return [{"win": win, "lose": lose, "prompt": f"clip {i}"} for i, (win, lose) in enumerate(clips)]


def paths_in_memory(folder, clips):
    return [{**row, "win": str(folder / row["win"]), "lose": folder / row["lose"]} for row in rows()]


def packed(folder, clips):
    pack(open_source(jsonl(folder, clips)), folder / "packed")
    return folder / "packed"


SOURCES = [parquet, tar, jsonl, table, bytes_in_memory, paths_in_memory, packed]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [dict(layout="TCHW"), dict(dtype="yuv420", size=(32, 48), resize=None)], ids=str)
def test_every_source_carries_clips(folder, clips, source, options):
    options = {**CLIPS, **options}
    loader = PairLoader(source(folder, clips), 4, shuffle=False, last="pad", **options)
    got = list(loader)
    assert [len(batch) for batch in got] == [4, 4]
    for batch, part in zip(got, (clips[:4], clips[4:]), strict=True):
        rows = [*range(len(part)), *range(4, 4 + len(part))]
        want = decode_clips(*zip(*part, strict=True), **options)
        assert torch.equal(batch.pixels[rows], want.pixels)
        assert batch.original_size[rows].tolist() == want.original_size.tolist()
        assert batch.crop_top_left[rows].tolist() == want.crop_top_left.tolist()
        assert [batch.matrix[row] for row in rows] == list(want.matrix)
        assert [batch.full_range[row] for row in rows] == list(want.full_range)
    assert [prompt for batch in got for prompt in batch.prompts] == [*(f"clip {i}" for i in range(COUNT)), "", ""]


@pytest.mark.parametrize("source", [parquet, tar, jsonl, table])
def test_clips_that_lie_elsewhere(folder, clips, source):
    fsspec = pytest.importorskip("fsspec")
    local = source(folder, clips)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/elsewhere/clips", recursive=True)
    try:
        remote = PairLoader(f"memory://elsewhere/clips/{local.name}", 3, **CLIPS)
        for there, here in zip(remote, PairLoader(local, 3, **CLIPS), strict=True):
            assert there.keys == here.keys
            assert torch.equal(there.pixels, here.pixels)
    finally:
        memory.rm("/elsewhere", recursive=True)


def test_bad_clips_are_replaced_and_written_down(folder, clips):
    (folder / "1.win.mp4").write_bytes(clips[1][0][:300])
    (folder / "3.lose.mp4").unlink()
    (folder / "4.lose.mp4").write_bytes(encode(count=3, codec="mpeg4"))  # too short
    loader = PairLoader(jsonl(folder, clips), 2, shuffle=False, ledger=folder / "bad.jsonl", max_bad_rate=1.0, **CLIPS)
    batches = list(loader)
    index = [i for batch in batches for i in batch.index.tolist()]
    assert [i for i in range(COUNT) if index[i] == i] == [0, 2, 5]
    wins, loses = (torch.cat([batch.pixels[rows] for batch in batches]) for rows in (slice(2), slice(2, 4)))
    want = decode_clips(*zip(*(clips[i] for i in index), strict=True), **CLIPS)
    assert torch.equal(torch.cat((wins, loses)), want.pixels)
    lines = {line["index"]: line for line in read_ledger(folder / "bad.jsonl")}
    assert {i: line["arm"] for i, line in lines.items()} == {1: "win", 3: "lose", 4: "lose"}
    assert "3.lose.mp4" in lines[3]["reason"]


def test_planes_come_with_what_their_samples_mean():
    """Also those of a pair that took the place of another, and where there is none."""
    kinds = [("bt709", True), ("bt2020", False), ("bt601", True), ("bt601", False)]
    params = {"bt709": "bt709", "bt2020": "bt2020nc", "bt601": "smpte170m"}
    made = [
        encode(4, 32, 48, **{"x264-params": f"colormatrix={params[matrix]}:fullrange={'on' if full else 'off'}"})
        for matrix, full in kinds
    ]
    records = [{"win": made[i], "lose": made[i + 1]} for i in (0, 1, 2)]
    records.insert(1, {"win": made[3], "lose": made[3][:200]})
    options = dict(frames=2, size=(32, 48), resize=None, dtype="yuv420", threads=1, max_bad_rate=1.0)
    (batch,) = PairLoader(records, 5, shuffle=False, last="pad", **options)
    index = batch.index.tolist()
    assert index[0::2] == [0, 2, -1]
    first = [{0: 0, 2: 1, 3: 2}.get(i, 0) for i in index]
    want = [kinds[i] for i in first] + [kinds[i + 1] for i in first]
    assert index[1] in (0, 2, 3)
    want[4] = want[9] = ("bt709", False)
    assert [*zip(batch.matrix, batch.full_range, strict=True)] == want
    seen = [row for row in range(10) if row % 5 < 4]
    shown = yuv420_to_rgb(
        batch.pixels, matrix=batch.matrix, full_range=batch.full_range, siting="left", dtype=torch.uint8
    )
    arms = [records[i][arm] for arm in ("win", "lose") for i in index[:4]]
    rgb = decode_clips(arms, arms, frames=2, size=(32, 48), resize=None, dtype=torch.uint8, threads=1).pixels[:8]
    assert (shown[seen].int() - rgb.int()).abs().max() <= 1  # as `decode_clips` promises of planes
    moved = batch.to("meta")
    assert (moved.matrix, moved.full_range) == (batch.matrix, batch.full_range)
