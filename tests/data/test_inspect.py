"""The command `polydpo-fast inspect`, on Parquet files with good, damaged and missing images."""

import io
import json
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from data.pairs import Tiny
from typer.testing import CliRunner

from polydpo_fast import ClipLimits, DecodeLimits
from polydpo_fast.cli import app
from polydpo_fast.data import LoaderError, PairLoader, open_source, read_ledger
from polydpo_fast.data.formats.records import RecordPairs
from polydpo_fast.data.ledger import options_as_json, options_of_json
from polydpo_fast.data.pack import pack
from polydpo_fast.data.replay import replay
from polydpo_fast.data.trial import check, sample, sampled_indices

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def encode(kind="JPEG", size=(96, 64), seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).resize(size).save(file, kind)
    return file.getvalue()


JPEG, PNG, WEBP = encode(), encode("PNG", (40, 80)), encode("WEBP")
CUT = JPEG[: len(JPEG) * 9 // 10] + b"\xff\xd9"
assert len(CUT) > 500


def table(rows, **columns):
    """rows: (jpg_0, jpg_1, label_0)"""
    first, second, label = zip(*rows, strict=True)
    return pa.table(
        {
            "jpg_0": pa.array(first, pa.binary()),
            "jpg_1": pa.array(second, pa.binary()),
            "label_0": pa.array(label, pa.float64()),
            "caption": ["p"] * len(rows),
            **columns,
        }
    )


GOOD = [(JPEG, PNG, 1.0), (JPEG, WEBP, 0.0), (JPEG, JPEG, 0.5), (JPEG, JPEG, None)]
BAD = [(CUT, JPEG, 1.0), (JPEG, None, 0.0), (b"<html>", JPEG, 0.0)]


@pytest.fixture
def good(tmp_path):
    pq.write_table(table(GOOD, kind=["dog", "[bold]cat\x1b[2J", "dog", "dog"]), tmp_path / "good.parquet")
    return str(tmp_path / "good.parquet")


@pytest.fixture
def bad(tmp_path):
    pq.write_table(table(GOOD + BAD), tmp_path / "bad.parquet", row_group_size=3)
    return str(tmp_path / "bad.parquet")


def run(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def rows_of(output):
    """What the tables say, by the first word of a line."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}


def test_counts_formats_sizes_and_pixels(good):
    code, output = run(good)
    assert code == 0
    rows = rows_of(output)
    assert rows["source"] == ["Parquet"]
    assert rows["ties"] == ["1"]
    assert rows["pairs"] == ["2"]
    assert "rows without a label" in output
    assert rows["JPEG"][:1] == ["2"]
    assert rows["JPEG"][3:7] == ["96", "x", "64", "(2)"]
    assert rows["PNG"][3:7] == ["40", "x", "80", "(1)"]
    assert rows["WebP"][0] == "1"
    assert float(rows["JPEG"][-1]) > 0
    assert "category" not in rows
    assert rows_of(run(good, "--ties", "keep")[1])["pairs"] == ["3"]


def test_categories_without_markup_and_control_sequences(good):
    code, output = run(good, "--category", "kind")
    assert code == 0
    assert "\x1b" not in output
    assert "[bold]cat\\x1b[2J" in output
    assert rows_of(output)["dog"] == ["1", "50.0%"]


@pytest.mark.parametrize("options", [["--sample", "0"], []], ids=["alone", "after a sample"])
def test_all_lists_what_cannot_be_decoded_once(bad, good, options):
    code, output = run(bad, "--all", *options)
    assert code == 1
    lines = [line for line in output.splitlines() if "bad.parquet, row" in line]
    assert sorted(line.partition("row ")[2].split(":")[0] for line in lines) == ["4", "5", "6"]
    text = "\n".join(lines)
    assert "row 4: win: " in text
    assert "jpg_1 has no bytes" in text
    assert "row 6: lose: " in text
    assert "3 of 5 pairs cannot be decoded" in output
    code, output = run(good, "--all")
    assert code == 0
    assert "0 of 2 pairs cannot be decoded" in output


def test_a_sample_with_bad_pairs_is_a_failure(bad):
    code, output = run(bad)
    assert code == 1
    assert "unknown" in output
    assert "row 4: win: " in output
    assert "0 x 0" not in output  # of the other arm, of which nothing was decoded
    assert rows_of(output)["JPEG"][:7][3:] == ["96", "x", "64", "(2)"]


def test_a_place_is_said_once(tmp_path):
    """Also where the error of the source has it."""
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "m.jsonl").write_text('{"win": "a.jpg", "lose": "a.jpg"}\n{"win": "a.jpg"}\n')
    with pytest.warns(RuntimeWarning, match="1 of 2 records are no pairs"):
        code, output = run(tmp_path / "m.jsonl", "--all", "--sample", "0")
    assert code == 1
    assert output.count("m.jsonl:2") == output.count("it has no lose") == 1
    with pytest.warns(RuntimeWarning, match="1 of 2 records are no pairs"):
        done = pack(open_source(tmp_path / "m.jsonl"), tmp_path / "out")
    assert (done.pairs, done.unreadable) == (1, 1)
    (line,) = (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()
    assert json.loads(line)["error"] == "it has no lose"


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.97])
def test_damage_at_the_end_of_an_image_is_found(cut):
    images = [(encode(kind, (256, 256), seed=1), kind) for kind in ("JPEG", "PNG")]
    for data, kind in images:
        damaged = data[: int(len(data) * cut)]
        source = RecordPairs([{"win": data, "lose": damaged}, {"win": data, "lose": data}])
        problems = [problem for _, some in check(source, range(2)) for problem in some]
        assert [(problem.index, problem.arm) for problem in problems] == [(0, "lose")], kind


def test_many_pairs_in_batches():
    records = [{"win": JPEG, "lose": CUT if i % 7 == 3 else PNG} for i in range(40)]
    done, bad = 0, []
    for more, problems in check(RecordPairs(records), range(40)):
        done += more
        bad += [problem.index for problem in problems]
    assert done == 40
    assert bad == [i for i in range(40) if i % 7 == 3]


def test_pairs_are_read_side_by_side():
    source = Tiny(40, slow=dict.fromkeys(range(40), 0.03), bad={7: "read", 9: "win"})
    began = time.monotonic()
    found = list(check(source, range(40)))
    assert time.monotonic() - began < 0.8, "of 1.2 s, one after the other"
    assert sum(done for done, _ in found) == 40
    assert sorted(problem.index for _, problems in found for problem in problems) == [7, 9]


def line_of(opened, index, key, **more):
    """As a loader writes it."""
    facts = {"position": opened.position(index) if index < len(opened) else "beyond", "arm": None, "error": "E"}
    return {"index": index, "key": key, "reason": "r", **facts, **more}


def test_the_ledger_is_replayed(bad, tmp_path):
    ledger, source = tmp_path / "ledger.jsonl", module_source(bad)
    lines = [
        line_of(source, 2, "bad.parquet:4"),
        line_of(source, 2, "bad.parquet:4", note="the same again"),
        line_of(source, 0, "bad.parquet:0"),
        line_of(source, 1, "bad.parquet:9"),
        line_of(source, 99, "x"),
        {"index": None, "position": "nowhere"},
        line_of(source, 3, "bad.parquet:5", position="elsewhere, row 5"),
        line_of(source, 4, "bad.parquet:6", position="moved since, row 6", source=source.fingerprint),
    ]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"index": 3, "ke')
    found = [(one.line["index"], one.bad, one.foreign) for one in replay(source, ledger)]
    assert found == [
        *((2, True, False), (0, False, False), (1, False, True), (99, False, True)),
        *((None, False, True), (3, False, True), (4, True, False)),
    ]
    outcomes = [one.outcome for one in replay(source, ledger)]
    assert outcomes[0].startswith("win: ")
    assert outcomes[1] == "it can be decoded"
    assert "another source, or opened with other options" in outcomes[5]
    code, output = run(bad, "--sample", "0", "--ledger", ledger)
    assert code == 1
    assert "2 of 3 pairs of the ledger are still bad" in output
    assert "4 of its lines are of another source" in output
    ledger.write_text(json.dumps(lines[2]) + "\n")
    assert run(bad, "--sample", "0", "--ledger", ledger)[0] == 0
    ledger.write_text(json.dumps({**lines[2], "key": ""}) + "\n")  # it could not be read then
    assert run(bad, "--sample", "0", "--ledger", ledger)[0] == 0
    code, output = run(bad, "--ledger", tmp_path / "none")
    assert code == 2
    assert len(output.splitlines()) == 1  # before anything is decoded


def test_a_model_is_no_data(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    code, output = run(tmp_path)
    assert code == 2
    assert "model_index.json of a pipeline; expected preference data" in " ".join(output.split())


@pytest.mark.parametrize("text", ["hello\nworld\n", '{"win": "a.png", "lose": "b.png"}\n', "[1, 2]\n", "[" * 100_000])
def test_what_is_no_ledger_is_an_error(good, tmp_path, text):
    (tmp_path / "other.jsonl").write_text(text)
    code, output = run(good, "--sample", "0", "--ledger", tmp_path / "other.jsonl")
    assert code == 2
    assert "other.jsonl is no ledger" in output


def test_a_ledger_of_a_source_with_other_options_is_told(tmp_path):
    """Its pairs have other numbers: with the ties dropped, pair 3 is another one, and fine."""
    rows = [(JPEG, PNG, 0.5), (JPEG, PNG, 1.0), (JPEG, PNG, 1.0), (CUT, PNG, 1.0), (JPEG, PNG, 1.0)] * 2
    path, ledger = tmp_path / "pairs.parquet", tmp_path / "bad.jsonl"
    pq.write_table(table(rows), path)
    kept = open_source(str(path), ties="keep")
    list(PairLoader(kept, 2, size=8, ledger=ledger, max_bad_rate=1.0))
    code, output = run(path, "--sample", "0", "--ledger", ledger)
    assert code == 1
    assert "2 of its lines are of another source, or of one that was opened with other options" in output
    code, output = run(path, "--sample", "0", "--ledger", ledger, "--ties", "keep")
    assert code == 1
    assert "2 of 2 pairs of the ledger are still bad" in output
    assert "another source" not in output


def test_a_ledger_is_replayed_with_the_loaders_own_options(tmp_path):
    rows = [(encode("PNG", (48, 48), seed), JPEG, 1.0) for seed in range(6)]
    rows[2] = (encode("PNG", (16, 16)), JPEG, 1.0)
    path, ledger = tmp_path / "pairs.parquet", tmp_path / "bad.jsonl"
    pq.write_table(table(rows), path)
    options = dict(size=(32, 40), resize=None, crop="random", dtype=torch.uint8, limits=DecodeLimits(bytes=1 << 20))
    list(PairLoader(path, 2, ledger=ledger, max_bad_rate=1.0, background=(1, 2, 3), threads=1, **options))
    (line,) = read_ledger(ledger)
    assert line["index"] == 2
    kept = options_of_json({name: value for name, value in line["decode"].items() if name != "seed"})
    assert kept == {**options, "background": (1, 2, 3)}
    (one,) = replay(open_source(path), ledger)
    assert one.bad
    assert one.outcome == f"win: {line['reason']}"
    ledger.write_text(json.dumps({**line, "decode": {"size": 8, "seed": 0}}) + "\n")
    (one,) = replay(open_source(path), ledger)
    assert (one.bad, one.outcome) == (False, "it can be decoded")
    ledger.write_text(json.dumps({**line, "decode": {"sise": 8}}) + "\n")
    (one,) = replay(open_source(path), ledger)
    assert one.bad
    assert "it cannot be tried again: " in one.outcome


def module_source(path):
    from polydpo_fast.data.formats.parquet import ParquetPairs

    return ParquetPairs(path)


def test_what_cannot_be_opened(tmp_path, good):
    (tmp_path / "no.parquet").write_bytes(b"no")
    for arguments, reason in (
        ([tmp_path / "none.parquet"], "no such file"),
        ([tmp_path / "no.parquet"], "no.parquet"),
        ([good, "--ties", "half"], "ties is 'half'"),
        ([good, "--category", "sort"], "sort; its columns are"),
    ):
        code, output = run(*arguments)
        assert code == 2
        assert reason in output


def test_a_column_of_weights(good, tmp_path):
    pq.write_table(table(GOOD, w=["a", "b", "c", "d"]), tmp_path / "w.parquet")
    code, output = run(tmp_path / "w.parquet", "--weight", "w")
    assert code == 2
    assert "w is string; expected numbers" in output
    assert run(good, "--weight", "label_0")[0] == 0
    path = tmp_path / "words.parquet"
    pq.write_table(table(GOOD, weight=["a", "b", "c", "d"], category=[["a"]] * 4), path)
    with pytest.warns(RuntimeWarning, match="(weight|category) is .*, and is not used"):
        assert run(path)[0] == 0
    assert run(path, "--weight", "", "--category", "")[0] == 0  # without a warning


def test_options_come_back_from_a_ledger_as_they_were():
    """A rate that is rounded, or limits of images, would decode other frames of a clip than the loader did."""
    clip = dict(size=(4, 6), dtype=torch.float16, frames=5, fps=Fraction(30000, 1001), limits=ClipLimits(frames=7))
    image = dict(size=8, dtype=torch.uint8, limits=DecodeLimits(), hflip=0.5)
    for options in (clip, image, {**image, "dtype": "yuv420"}):
        kept = json.loads(json.dumps(options_as_json({**options, "threads": 3, "cache": "x"})))
        again = options_of_json(kept)
        assert again == options
        assert {name: type(value) for name, value in again.items()} == {n: type(v) for n, v in options.items()}


def test_lists_of_shapes_and_colours_in_a_ledger(tmp_path):
    path, ledger = tmp_path / "pairs.parquet", tmp_path / "bad.jsonl"
    pq.write_table(table(BAD[:1]), path)
    size = (np.int64(8), np.int64(8))
    with pytest.raises(LoaderError):
        list(PairLoader(path, 1, ledger=ledger, size=size))
    (line,) = read_ledger(ledger)
    assert line["decode"]["size"] == [8, 8]
    (one,) = replay(open_source(path), ledger)
    assert one.outcome == f"win: {line['reason']}"


def test_a_line_of_a_folder_that_was_moved_is_known_by_its_key(bad, tmp_path):
    """An old one says nothing of the source's fingerprint."""
    source, ledger = module_source(bad), tmp_path / "ledger.jsonl"
    moved = [line_of(source, index, source[index].key, position=f"/old/bad.parquet, row {index}") for index in (0, 4)]
    moved.append({**moved[0], "index": 1})
    ledger.write_text("".join(json.dumps(line) + "\n" for line in moved))
    assert [(one.bad, one.foreign) for one in replay(source, ledger)] == [(False, False), (True, False), (False, True)]


def test_a_log_of_something_else_in_a_ledger(good, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    other = {"index": [1], "position": "x", "reason": "y"}
    ledger.write_text(json.dumps(other) + "\n")
    code, output = run(good, "--sample", "0", "--ledger", ledger)
    assert code == 2
    assert "is no ledger" in output
    source = module_source(good)
    ledger.write_text("".join(json.dumps(line) + "\n" for line in (other, line_of(source, 0, source[0].key))))
    assert [one.line["index"] for one in replay(source, ledger)] == [0]


@pytest.mark.parametrize("command", ["inspect", "pack"])
def test_errors_have_no_control_sequences(tmp_path, command):
    pq.write_table(pa.table({"\x1b[31mred\x1b]0;title\x07": [1]}), tmp_path / "c.parquet")
    out = [str(tmp_path / "out")] if command == "pack" else []
    result = CliRunner().invoke(app, [command, str(tmp_path / "c.parquet"), *out])
    assert result.exit_code == 2
    assert "\\x1b[31mred" in result.output
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


def test_several_files(good, bad):
    code, output = run(good, bad, "--sample", "0")
    assert code == 0
    assert rows_of(output)["pairs"] == ["7"]


def test_a_sample_of_parquet_reads_few_row_groups(tmp_path):
    rows = [(b"x", b"y", 1.0)] * 100
    pq.write_table(table(rows), tmp_path / "many.parquet", row_group_size=10)
    source = module_source(tmp_path / "many.parquet")
    indices = sampled_indices(source, 14)
    assert len(indices) == 14
    assert sorted({index // 10 for index in indices}) == [0, 3, 6, 9]
    assert sampled_indices(source, 1000) == list(range(100))
    records = RecordPairs([{"win": b"x", "lose": b"y"}] * 100)
    assert sampled_indices(records, 3) == [0, 49, 99]


def test_clips(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode())
    clip = file.getvalue()
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    source = RecordPairs([{"win": clip, "lose": path}, {"win": clip, "lose": clip[:200]}, {"win": JPEG, "lose": PNG}])
    found = sample(source, [0, 2])
    assert found.sizes["MP4"] == [len(clip)] * 2
    assert found.pixels["MP4"] == [(48, 64)] * 2
    assert found.problems == []
    problems = [problem for _, some in check(source, range(3)) for problem in some]
    assert [(problem.index, problem.arm) for problem in problems] == [(1, "lose")]
    # Of eight frames, nine are too many for the loader; `check` repeats them.
    ledger, clips = tmp_path / "bad.jsonl", RecordPairs([{"win": clip, "lose": path}] * 2)
    loader = PairLoader(clips, 1, frames=9, size=16, fps=Fraction(8), ledger=ledger, max_bad_rate=1.0, max_bad_run=1)
    with pytest.raises(LoaderError):
        next(iter(loader))
    one = next(replay(clips, ledger))
    assert one.bad
    assert one.line["decode"]["fps"] == "8"
    assert one.line["reason"] in one.outcome
