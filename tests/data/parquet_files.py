"""Parquet files of Pick-a-Pic's columns, for tests. Needs pyarrow."""

import math
import os
import time

import pytest

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


def counted_reads(source, monkeypatch, slow=0.0):
    reads, read = [], source._read

    def counting(block):
        reads.append((block.file, block.number))
        time.sleep(slow)
        return read(block)

    monkeypatch.setattr(source, "_read", counting)
    return reads
