"""The demo's parts, and all of it at a size that takes seconds. That it learns is shown by `make demo`."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from polydpo_fast import demo


def test_pairs_follow_pick_a_pic_and_prefer_more_ink(tmp_path):
    path = tmp_path / "pairs.parquet"
    demo.write_pairs(path, demo.Settings())
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == demo.PAIRS
    assert {"jpg_0", "jpg_1", "label_0", "label_1", "caption", "are_different", "best_image_uid"} <= set(rows[0])
    for row in rows[:100]:
        papers = [np.asarray(Image.open(io.BytesIO(row[column])), dtype=float) for column in ("jpg_0", "jpg_1")]
        darkness = [(255 - paper).mean() for paper in papers]
        assert row["label_0"] + row["label_1"] == 1
        assert (darkness[0] > darkness[1]) == (row["label_0"] > row["label_1"])
        assert row["best_image_uid"] == row["image_0_uid" if row["label_0"] else "image_1_uid"]
    wins = sum(row["label_0"] for row in rows)
    assert 0.4 * len(rows) < wins < 0.6 * len(rows)  # the winner's column is no hint


def test_label_noise_flips_its_share(tmp_path):
    right = {}
    for noise in (0.0, 0.3):
        path = tmp_path / f"{noise}.parquet"
        demo.write_pairs(path, demo.Settings(label_noise=noise))
        rows = pq.read_table(path).to_pylist()[:300]
        first, second = (demo.ink(demo.decode([row[arm] for row in rows])) for arm in ("jpg_0", "jpg_1"))
        right[noise] = ((first > second) == torch.tensor([r["label_0"] == 1 for r in rows])).float().mean().item()
    assert right[0.0] == 1
    assert 0.6 < right[0.3] < 0.8


def test_ink_is_monotone_and_blind_to_grey_paper():
    images = torch.full((4, 1, 8, 8), 1.0)
    images[1, :, 2:4] = -1.0
    images[2, :, 2:6] = -1.0
    images[3] = 0.6  # greyed paper
    ink = demo.ink(images)
    assert ink[0] == ink[3] == 0
    assert ink.tolist()[1:3] == [0.25, 0.5]


@pytest.mark.parametrize(("wins", "low", "high"), [(0, 0.0, 0.0370), (50, 0.4038, 0.5962), (100, 0.9630, 1.0)])
def test_wilson_interval(wins, low, high):
    """Against published values for n = 100 (Wilson 1927; e.g. Agresti and Coull 1998)."""
    assert demo.wilson_interval(wins, 100) == pytest.approx((low, high), abs=1e-4)


# PyTorch warns that the schedule's step precedes the optimiser's when a test runs two steps.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_whole_demo_at_a_small_size(tmp_path, monkeypatch):
    for name, value in dict(PAIRS=64, PRETRAIN_STEPS=3, PRETRAIN_BATCH=8, ALIGN_BATCH=8, SAMPLES=40).items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "SAMPLER_STEPS", 2)
    figures = demo.run(demo.Settings(steps=10, alpha=1.0, label_noise=0.1), tmp_path)
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["win_rate"] == figures["win_rate"]
    assert 0 <= saved["win_rate_95"][0] <= saved["win_rate"] <= saved["win_rate_95"][1] <= 1
    assert len(saved["curves"]["loss"]) == 10
    assert saved["settings"]["alpha"] == 1.0
    # At the first step the policy is the reference: log 2 + alpha/2, and every pair a tie.
    assert saved["curves"]["loss"][0] == pytest.approx(0.6931472 + 0.5, abs=1e-4)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("L").getcolors()) > 50
