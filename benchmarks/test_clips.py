"""720p clips to normalised bfloat16 frames, (N, 3, T, 720, 1280), beside other ways: part of `make bench`.

Frames per second of CPU time, in interleaved rounds. The bound is FFmpeg's bare decoding, through PyAV, with nothing
done with the frames.
"""

import io
import statistics

import numpy as np
import pytest
import torch
from interleaved import cpu_seconds, report

import polydpo_fast

av = pytest.importorskip("av", reason="PyAV is not installed")

FRAMES = 32
ROUNDS = 7


def clip(height=720, width=1280):
    """H.264 at 3 Mb/s, 24 frames a second."""
    random = np.random.default_rng(0)
    still = random.normal(0, 20, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1)
    y, x = np.mgrid[:height, :width] / height
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 3_000_000
        stream.options = {"preset": "veryfast", "g": "48"}
        for index in range(FRAMES):
            waves = np.stack([np.sin(9 * x + index / 8), np.cos(7 * y + index / 5), np.sin(8 * x * y)], axis=-1)
            levels = (128 + 60 * waves + np.roll(still, 3 * index, axis=1)).clip(0, 255).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        yield from container.decode(video=0)


def ours(data):
    out = torch.zeros((2, 3, FRAMES, 720, 1280), dtype=torch.bfloat16)
    return lambda: polydpo_fast.decode_clips([data], [data], frames=FRAMES, out=out, threads=1)


def bare_decoding(data):
    return lambda: [sum(1 for _ in frames_of(data)) for _ in range(2)]


def pyav_and_torch(data):
    out = torch.zeros((2, 3, FRAMES, 720, 1280), dtype=torch.bfloat16)

    def run():
        for row in out:
            for k, frame in enumerate(frames_of(data)):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                row[:, k] = pixels.float().div(127.5).sub(1)

    return run


WAYS = {"ours": ours, "bare_decoding": bare_decoding, "pyav_and_torch": pyav_and_torch}


@pytest.fixture(scope="module")
def measured():
    """CPU seconds of a pair of clips, one per round."""
    torch.set_num_threads(1)
    data = clip()
    return cpu_seconds({name: way(data) for name, way in WAYS.items()}, ROUNDS)


@pytest.mark.parametrize("way", WAYS)
def test_clips(benchmark, measured, way):
    rate = 2 * FRAMES / statistics.median(measured[way])
    group = f"pair of 720p clips, {FRAMES} frames each: CPU time"
    report(benchmark, group, measured[way], **{"frames per CPU second": rate})
