"""720p clips to normalised bfloat16 frames beside other ways: part of `make bench`.

Frames per second of CPU time, in interleaved rounds, of 81 frames of H.264 at 3 and at 16 Mb/s. The bound is FFmpeg's
bare decoding, through PyAV, with nothing done with the frames; the floor of what is added to it is to write the 5.5 MB
of a frame. All write into memory that has been written before, except where the name says fresh. Ours reads local files
whose index is kept, as in every epoch but the first; of a clip in bytes the packets are looked through each time.
"""

import importlib
import io
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from finishing import finish
from timing import Measured, interleaved, report

import polydpo_fast

av = pytest.importorskip("av", reason="PyAV is not installed")

HEIGHT, WIDTH = 720, 1280
FRAMES = 81
ROUNDS = 7  # a slow phase of the machine may be as long as one
SPARSE, SPARSE_FPS, LONG = 16, 3, 121  # frames taken, at so many per second, of so many


@cache
def clip(megabits, frames=FRAMES, parameters=""):
    """H.264 of so many megabits per second, at 24 frames a second, with a keyframe every 2 seconds. At 3 x264 chooses
    no B-frames, at 16 it does."""
    random = np.random.default_rng(0)
    still = random.normal(0, 20, (HEIGHT // 4, WIDTH // 4, 3)).repeat(4, 0).repeat(4, 1)
    grain = random.integers(-6, 7, (2 * HEIGHT, 2 * WIDTH, 1))
    y, x = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", megabits * 1_000_000
        stream.options = {"preset": "veryfast", "g": "48", "x264-params": parameters}
        for index in range(frames):
            waves = np.stack([np.sin(9 * x + index / 8), np.cos(7 * y + index / 5), np.sin(8 * x * y)], axis=-1)
            levels = 128 + 60 * waves + np.roll(still, 3 * index, axis=1)
            if megabits > 3:  # or it would not take as many
                top, left = random.integers(0, HEIGHT), random.integers(0, WIDTH)
                levels += grain[top : top + HEIGHT, left : left + WIDTH]
            levels = levels.clip(0, 255).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@cache
def room(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).fill_(1)


@cache
def folder():
    return Path(tempfile.mkdtemp(prefix="clips-"))


@cache
def stored(data):
    path = folder() / f"{len(data)}.mp4"
    path.write_bytes(data)
    return path


def ours(data, **options):
    clip = stored(data)
    return polydpo_fast.decode_clips(
        [clip], [clip], **{"frames": FRAMES, "threads": 1, "cache": folder() / "indexes", **options}
    )


def ours_cthw(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH).view(2, 3, FRAMES, HEIGHT, WIDTH)
    return 2, lambda: ours(data, out=out)


def ours_tchw(data):
    return 2, lambda: ours(data, layout="TCHW", out=room(2, FRAMES, 3, HEIGHT, WIDTH))


def ours_without_out(data):
    return 2, lambda: ours(data)


def ours_into_fresh_memory(data):
    return 2, lambda: ours(data, out=torch.empty(2, 3, FRAMES, HEIGHT, WIDTH, dtype=torch.bfloat16))


def ours_yuv420(data):
    out = room(2, FRAMES, HEIGHT * 3 // 2, WIDTH, dtype=torch.uint8)
    return 2, lambda: ours(data, dtype="yuv420", out=out)


def ours_from_bytes(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)
    options = dict(frames=FRAMES, threads=1, layout="TCHW", out=out)
    return 2, lambda: polydpo_fast.decode_clips([data], [data], **options)


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        yield from container.decode(video=0)


def bare_decoding(data):
    return 1, lambda: sum(1 for _ in frames_of(data))


def only_writing(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)
    return 2, lambda: out.fill_(0.5)


def normalise(frames, out):
    for to, frame in zip(out, frames, strict=True):
        finish(frame, to)


def pyav_and_torch(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0]
    return 1, lambda: normalise((frame.to_ndarray(format="rgb24") for frame in frames_of(data)), out)


def decord2(data):
    decord = installed("decord")
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0]

    def run():
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        normalise(reader.get_batch(range(FRAMES)).asnumpy(), out)

    return 1, run


def spdl(data):
    spdl_io = installed("spdl.io")
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0]

    def run():
        frames = spdl_io.decode_packets(spdl_io.demux_video(data))
        normalise(spdl_io.to_numpy(spdl_io.convert_frames(frames)), out)

    return 1, run


def torchcodec(data):
    decoders = installed("torchcodec.decoders")
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0]

    def run():
        decoder = decoders.VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC")
        normalise((frame.numpy() for frame in decoder), out)

    return 1, run


def installed(name):
    """The module, or the test is skipped. Some bring no FFmpeg, and fail only when they are used."""
    try:
        module = importlib.import_module(name)
        if name == "spdl.io":
            module.demux_video(clip(3))
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{name} does not load: {' '.join(str(error).split())[:200]}")
    return module


WAYS = (
    ours_cthw,
    ours_tchw,
    ours_yuv420,
    ours_without_out,
    ours_into_fresh_memory,
    ours_from_bytes,
    bare_decoding,
    only_writing,
    pyav_and_torch,
    decord2,
    spdl,
    torchcodec,
)


@cache
def measured(megabits):
    """Of each way that is installed."""
    torch.set_num_threads(1)
    frames, ways = {}, {}
    for way in WAYS:
        with suppress(pytest.skip.Exception):
            clips, ways[way.__name__] = way(clip(megabits))
            frames[way.__name__] = clips * FRAMES
    times, case = interleaved(ways, ROUNDS), f"720p at {megabits} Mb/s"
    return {name: Measured(case, name, times[name], name.startswith("ours"), per=frames[name]) for name in ways}


@pytest.mark.parametrize("megabits", [3, 16])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_clips(benchmark, way, megabits):
    way(clip(megabits))  # or it is skipped, with the reason
    report(benchmark, measured(megabits)[way.__name__])


@cache
def measured_on_threads(megabits, threads):
    """Wall time of a pair: a thread to a clip."""
    data, out = clip(megabits), room(2, FRAMES, 3, HEIGHT, WIDTH)
    torch.set_num_threads(1)

    def bare():
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda _: sum(1 for _ in frames_of(data)), range(2)))

    ways = {"ours": lambda: ours(data, layout="TCHW", out=out, threads=threads), "bare_decoding": bare}
    times = interleaved(ways, ROUNDS)
    case = f"a pair of 720p clips at {megabits} Mb/s, {threads} thread(s)"
    return {name: Measured(case, name, times[name], name == "ours", "wall", 2 * FRAMES) for name in ways}


@pytest.mark.parametrize("way", ["ours", "bare_decoding"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("megabits", [3, 16])
def test_pairs_on_threads(benchmark, way, megabits, threads):
    report(benchmark, measured_on_threads(megabits, threads)[way])


# ------------------------------------------------------------------------------------------------------ sparsely


def sparsely(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[:, :SPARSE].contiguous()
    options = dict(frames=SPARSE, fps=SPARSE_FPS, start=0.0, layout="TCHW", out=out)
    return lambda: ours(data, **options)


def in_a_row(data):
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[:, :SPARSE].contiguous()
    return lambda: ours(data, frames=SPARSE, layout="TCHW", out=out)


def by_decoding_all(data):
    return lambda: [sum(1 for _ in frames_of(data)) for _ in range(2)]


def sparsely_by_decord2(data):
    decord = installed("decord")
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0, :SPARSE]
    indices = [24 // SPARSE_FPS * k for k in range(SPARSE)]

    def run():
        for _ in range(2):
            reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
            normalise(reader.get_batch(indices).asnumpy(), out)

    return run


def sparsely_by_torchcodec(data):
    decoders = installed("torchcodec.decoders")
    out = room(2, FRAMES, 3, HEIGHT, WIDTH)[0, :SPARSE]
    indices = [24 // SPARSE_FPS * k for k in range(SPARSE)]

    def run():
        for _ in range(2):
            decoder = decoders.VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC")
            normalise(decoder.get_frames_at(indices).data.numpy(), out)

    return run


SPARSELY = {
    "ours, sparsely": sparsely,
    "ours, successive ones in the middle": in_a_row,
    "all frames, bare decoding": by_decoding_all,
    "decord2, sparsely": sparsely_by_decord2,
    "torchcodec, sparsely": sparsely_by_torchcodec,
}
# Of the second, three frames of four are such that no other is made from them.
SPARSE_CLIPS = {"": "", ", with B-frames": "bframes=3:b-adapt=0:b-pyramid=none"}


@cache
def measured_sparsely(kind):
    data, ways = clip(3, LONG, SPARSE_CLIPS[kind]), {}
    torch.set_num_threads(1)
    for name, way in SPARSELY.items():
        with suppress(pytest.skip.Exception):
            ways[name] = way(data)
    times = interleaved(ways, ROUNDS)
    case = f"{SPARSE} of {LONG} frames of both clips of a pair{kind}"
    return {name: Measured(case, name, times[name], name.startswith("ours")) for name in ways}


@pytest.mark.parametrize("way", SPARSELY)
@pytest.mark.parametrize("kind", SPARSE_CLIPS)
def test_sparse_frames(benchmark, way, kind):
    SPARSELY[way](clip(3, LONG, SPARSE_CLIPS[kind]))  # or it is skipped, with the reason
    report(benchmark, measured_sparsely(kind)[way])


# ------------------------------------------------------------------------------------------------------ on a GPU


def cpp_and_a_copy(data):
    clips = [stored(data)] * 4
    out = room(8, FRAMES, 3, HEIGHT, WIDTH).pin_memory()
    options = dict(frames=FRAMES, layout="TCHW", out=out, cache=folder() / "indexes")
    return lambda: polydpo_fast.decode_clips(clips, clips, **options).pixels.cuda()


def planes_and_a_kernel(data):
    clips = [stored(data)] * 4
    out = room(8, FRAMES, HEIGHT * 3 // 2, WIDTH, dtype=torch.uint8).pin_memory()
    options = dict(frames=FRAMES, dtype="yuv420", out=out, cache=folder() / "indexes")

    def run():
        batch = polydpo_fast.decode_clips(clips, clips, **options)
        colours = dict(matrix=batch.matrix, full_range=batch.full_range, siting="left")
        return polydpo_fast.yuv420_to_rgb(batch.pixels.cuda(), **colours)

    return run


def nvdec_through_dali(data):
    pytest.importorskip("nvidia.dali")
    from polydpo_fast.data.dali.decoder import DaliDecoder

    decoder, clips = DaliDecoder("cuda", canary=None), [stored(data)] * 4
    out = torch.empty(8, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.bfloat16, device="cuda")
    options = dict(frames=FRAMES, layout="TCHW", out=out, cache=folder() / "indexes")
    return lambda: decoder.decode_clips(clips, clips, **options)


ON_A_GPU = (cpp_and_a_copy, planes_and_a_kernel, nvdec_through_dali)


@cache
def measured_on_a_gpu(megabits):
    ways = {}
    for way in ON_A_GPU:
        with suppress(pytest.skip.Exception):
            run = way(clip(megabits))
            ways[way.__name__] = lambda run=run: (run(), torch.cuda.synchronize())
    times = interleaved(ways, ROUNDS)
    case = f"four pairs of 720p clips at {megabits} Mb/s, to a GPU"
    return {name: Measured(case, name, times[name], True, "wall", 8 * FRAMES) for name in ways}


@pytest.mark.gpu
@pytest.mark.parametrize("way", ON_A_GPU, ids=lambda way: way.__name__)
@pytest.mark.parametrize("megabits", [3, 16])
def test_clips_to_a_gpu(benchmark, way, megabits):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    way(clip(megabits))  # or it is skipped, with the reason
    report(benchmark, measured_on_a_gpu(megabits)[way.__name__])
