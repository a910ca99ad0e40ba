"""Images to the VAE's input, (N, 3, 1024, 1024) normalised in 16 bits, beside everybody else's way: `make bench`.

CPU time of one thread per image, in interleaved rounds: the ways of a source take turns, three calls each, of which the
last two count, so that a slow phase of the machine is everybody's, and what is in the caches and the heap is a way's
own. `make bench-peers` installs the peers beside the project and runs this with them.

Bare libjpeg-turbo decodes the same file to RGB rows and does nothing with them. Codecs that stop at RGB are finished
with care, into memory that is there; Diffusers' recipe is as its scripts have it. The images are synthetic.
"""

import ctypes
import functools
import importlib
import io
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from finishing import as_the_scripts, finish
from PIL import Image
from timing import Measured, interleaved, report

import polydpo_fast

SIDE = 1024
IMAGES = 4  # of a batch; even
ROUNDS = 5
CALLS = 2  # of a way in a row that count, after one that does not


def photograph(side):
    """Smooth shapes and grain: 1.5 bits per pixel at quality 92."""
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y + x), np.sin(20 * (x * x + y * y))], axis=-1)
    return _image(128 + 60 * waves, side, grain=4)


def dense(side):
    """Grain everywhere, as strong in every block: 3.3 bits per pixel, hard work for an entropy decoder."""
    return _image(np.full((side, side, 3), 128.0), side, grain=12)


def _image(values, side, grain):
    values = values + np.random.default_rng(0).normal(0, grain, (side, side, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **({"quality": 92, **options} if format == "JPEG" else options))
    return file.getvalue()


SOURCES = {
    "photograph": lambda: encoded(photograph(SIDE)),
    "photograph, progressive": lambda: encoded(photograph(SIDE), progressive=True),
    "dense": lambda: encoded(dense(SIDE)),
    "dense, progressive": lambda: encoded(dense(SIDE), progressive=True),
    "2048 x 2048 resized": lambda: encoded(photograph(2 * SIDE)),
    "photograph, PNG": lambda: encoded(photograph(SIDE), "PNG"),
    "dense, PNG": lambda: encoded(dense(SIDE), "PNG"),
}

# ------------------------------------------------------------------------------------------------- the ways
# Each takes the bytes of an image and returns a function that makes a batch of it.


def ours(data):
    out = torch.empty((IMAGES, 3, SIDE, SIDE), dtype=torch.bfloat16)
    arm = [data] * (IMAGES // 2)
    return lambda: polydpo_fast.decode_pairs(arm, arm, out=out, threads=1)


def bare_libjpeg(data):
    if data[:2] != b"\xff\xd8":
        pytest.skip("libjpeg decodes JPEG only")
    library = _compiled()
    library.decode.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    row = ctypes.create_string_buffer(3 * Image.open(io.BytesIO(data)).width)

    def run():
        for _ in range(IMAGES):
            library.decode(data, len(data), row)

    return run


@functools.cache
def _compiled():
    source = Path(__file__).with_name("bare_libjpeg.c")
    library = Path(tempfile.mkdtemp()) / "bare_libjpeg.so"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "libjpeg"], capture_output=True, text=True, check=True)
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", source, "-o", library, *flags.stdout.split()], check=True)
    return ctypes.CDLL(str(library))


def pillow_decoding_alone(data):
    def run():
        for _ in range(IMAGES):
            Image.open(io.BytesIO(data)).load()

    return run


def batch_of(load):
    """A batch of what a codec gives, (H, W, 3) bytes."""
    out = torch.empty((IMAGES, 3, SIDE, SIDE), dtype=torch.bfloat16)

    def run():
        for to in out:
            finish(load(), to)

    return run


def diffusers_recipe(data):
    """Pillow, ToTensor, Normalize, stack: what Diffusers' training scripts do."""

    def load():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return as_the_scripts(np.array(image))

    return lambda: torch.stack([load() for _ in range(IMAGES)]).to(torch.bfloat16)


def opencv(data):
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(1)

    def load():
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image.shape[0] != SIDE:
            image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        return image

    return batch_of(load)


def jpeg_module(name, decoder):
    def way(data):
        decode = getattr(pytest.importorskip(name), decoder)
        if data[:2] != b"\xff\xd8":
            pytest.skip(f"{name}.{decoder} decodes JPEG only")
        if decode(data).shape[0] != SIDE:
            pytest.skip(f"{name} does not resize")
        return batch_of(lambda: decode(data))

    way.__name__ = name
    return way


def spdl(data):
    try:
        io_module = importlib.import_module("spdl.io")
        io_module.demux_image(data)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"spdl.io does not load: {' '.join(str(error).split())[:200]}")
    options = {} if Image.open(io.BytesIO(data)).size == (SIDE, SIDE) else dict(scale_width=SIDE, scale_height=SIDE)
    description = io_module.get_video_filter_desc(pix_fmt="rgb24", **options)

    def load():
        frames = io_module.decode_packets(io_module.demux_image(data), filter_desc=description)
        return io_module.to_numpy(io_module.convert_frames(frames))

    return batch_of(load)


def dali(data):
    """NVIDIA DALI's CPU operators. Its own normalisation, to float16, takes longer than PyTorch's."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    image = np.frombuffer(data, np.uint8)
    resized = Image.open(io.BytesIO(data)).size != (SIDE, SIDE)
    out = torch.empty((IMAGES, 3, SIDE, SIDE), dtype=torch.bfloat16)

    # Not ahead of time in the background: that would be on the other ways' bill.
    options = dict(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False, exec_dynamic=False)

    @pipeline_def(batch_size=IMAGES, num_threads=1, device_id=None, **options)
    def pipeline():
        pixels = fn.decoders.image(fn.external_source(source=lambda: [image] * IMAGES, batch=True), device="cpu")
        return fn.resize(pixels, size=(SIDE, SIDE), antialias=True) if resized else pixels

    pipe = pipeline()
    pipe.build()

    def run():
        (batch,) = pipe.run()
        for index, to in enumerate(out):
            finish(np.asarray(batch.at(index)), to)

    return run


def dali_decoder(data):
    """The same with our geometry, into bfloat16; PNG goes through C++."""
    pytest.importorskip("nvidia.dali")
    from polydpo_fast.data.dali.decoder import DaliDecoder

    decoder, arm = DaliDecoder("cpu", threads=1, canary=None), [data] * (IMAGES // 2)
    out = torch.empty((IMAGES, 3, SIDE, SIDE), dtype=torch.bfloat16)
    return lambda: decoder.decode_pairs(arm, arm, out=out)


WAYS = [
    *(ours, bare_libjpeg, pillow_decoding_alone, diffusers_recipe, opencv),
    *(jpeg_module("simplejpeg", "decode_jpeg"), jpeg_module("imagecodecs", "jpeg8_decode")),
    *(spdl, dali, dali_decoder),
]
OURS = ("ours", "dali_decoder")


@functools.cache
def measured(source):
    """Of each way its times per image, or the reason why it was skipped."""
    torch.set_num_threads(1)
    data, runs, skipped = SOURCES[source](), {}, {}
    for way in WAYS:
        try:
            runs[way.__name__] = way(data)
        except pytest.skip.Exception as reason:
            skipped[way.__name__] = str(reason)
    times = interleaved(runs, ROUNDS, CALLS, uncounted=1)
    return skipped | {name: Measured(source, name, times[name], name in OURS, per=IMAGES) for name in runs}


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
@pytest.mark.parametrize("source", SOURCES)
def test_decode(benchmark, source, way):
    found = measured(source)[way]
    if isinstance(found, str):
        pytest.skip(found)
    report(benchmark, found)
