"""JPEG pairs to the VAE's input, one thread, CPU time: `make bench`.

The peer is the recipe of Diffusers' training scripts: Pillow, ToTensor, Normalize, stack.
"""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

import polydpo_fast

PAIRS = 4


def picture(side):
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * (x * x + y * y))], axis=-1)
    values = 128 + 60 * waves + random.normal(0, 4, (side, side, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def jpeg(side, progressive):
    file = io.BytesIO()
    picture(side).save(file, "JPEG", quality=92, progressive=progressive)
    return file.getvalue()


def ours(data):
    out = torch.empty((2 * PAIRS, 3, 1024, 1024), dtype=torch.bfloat16)
    return lambda: polydpo_fast.decode_pairs([data] * PAIRS, [data] * PAIRS, out=out, threads=1)


def diffusers_recipe(data):
    def load():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if image.size != (1024, 1024):
            image = image.resize((1024, 1024), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (pixels - 0.5) / 0.5

    def run():
        torch.set_num_threads(1)
        return torch.stack([load() for _ in range(2 * PAIRS)]).to(torch.bfloat16)

    return run


def pillow_decode_only(data):
    def run():
        for _ in range(2 * PAIRS):
            Image.open(io.BytesIO(data)).load()

    return run


@pytest.mark.parametrize("source", ["1024 baseline", "1024 progressive", "2048 baseline"])
@pytest.mark.parametrize("way", [ours, diffusers_recipe, pillow_decode_only])
def test_decode(benchmark, way, source):
    side, kind = source.split()
    run = way(jpeg(int(side), kind == "progressive"))
    benchmark.group = f"{source}, {2 * PAIRS} images"
    benchmark._timer = time.process_time  # CPU time: wall time on a shared machine says little
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
