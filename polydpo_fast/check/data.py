"""Clips against PyAV, conversion of planes between backends; and the gates of all data, in levels of 255 for pixels."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .cases import Draw
from .report import Finding, must

__all__ = ["GATES", "clip", "missing", "picture", "planes"]

_FRAME_LEVELS = 0.53  # half of it is the rounding to bytes

GATES = {
    "pixels": "1 level of Pillow's",
    "pixels, lossless": "rounded once, alpha of 16 bits twice",
    "pixels, resized": "0.6 level of the filter",
    "resized in float32": "0.03 level of the filter",
    "normalised": "rounded once",
    "geometry": "that of the docs",
    "crops": "of the seed, of the pair",
    "threads, batch": "bit for bit",
    "planes of JPEG": "bit for bit RGB's",
    "masked": "zeros, no other touched",
    "damage": "refused",
    "damage let pass": "reported",
    "planes as stored": "equal to FFmpeg's",
    "frames": f"{_FRAME_LEVELS} level of BT.601, 709",
    "yuv420_to_rgb": "bit for bit",
    "colours": f"{_FRAME_LEVELS} level of the matrix",
    "each pair once": "on any number of ranks",
    "order": "the formula's",
    "resumed": "bit for bit",
    "a bad pair": "replaced and told",
    "runs": "no exception",
}

# The luma of red and of blue: ITU-R BT.601, BT.709, BT.2020, FCC 73.682 and SMPTE 240M.
_MATRICES = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "fcc": (0.3, 0.11),
    "smpte240m": (0.212, 0.087),
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def missing(*packages: str) -> str:
    """Why these checks cannot run here, or nothing."""
    if importlib.util.find_spec("polydpo_fast._C") is None:
        return "the C++ extension is not built"
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def clip(seed: int, number: int) -> Iterator[tuple[Finding, str]]:
    """A pair of MPEG-4 clips against the frames of a full decode. Needs PyAV."""
    import av

    from ..clips import decode_clips

    d = Draw(seed, number)
    height, width, count = 2 * d.integer(8, 30), 2 * d.integer(8, 30), d.integer(8, 14)
    matrix, mirrored = "bt601", d.deal("mirrored", (False, True))
    if d.deal("high", (True, False)):  # without a word about them, colours of 720 rows and more are those of HD
        height, width, matrix = 720, 16, "bt709"
    taken = d.integer(2, count // 2)
    encoded, expected = [], []
    for _ in range(2):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as output:
            stream = output.add_stream("mpeg4", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(count):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(d, height, width), format="rgb24")))
            output.mux(stream.encode())
        encoded.append(file.getvalue())
        with av.open(io.BytesIO(encoded[-1])) as container:
            expected.append([_stored(frame) for frame in container.decode(video=0)])
    what = f"{taken} of {count} frames of {height}x{width}"
    how: Any = dict(frames=taken, size=(height, width), start=0.0, resize=None)
    stored = decode_clips([encoded[0]], [encoded[1]], dtype="yuv420", **how).pixels
    pixels = decode_clips([encoded[0]], [encoded[1]], dtype=torch.uint8, hflip=float(mirrored), **how).pixels
    pixels = pixels.flip(-1) if mirrored else pixels
    for arm, frames in enumerate(expected):
        for index, planes_ in enumerate(frames[:taken]):
            same = np.array_equal(stored[arm, index].numpy().ravel(), np.concatenate([p.ravel() for p in planes_]))
            yield must("planes as stored", same), what
            levels = float(np.abs(pixels[arm, :, index].numpy() - _rgb(planes_, matrix)).max())
            yield Finding("frames", levels / _FRAME_LEVELS, levels), what


def planes(seed: int, number: int, device: str, backend: str) -> Iterator[tuple[Finding, str]]:
    """Stored planes to RGB on a device: against the plain PyTorch of the same on the CPU, and against the matrices."""
    from ..yuv import yuv420_to_rgb

    d = Draw(seed, number)
    images, height, width = d.integer(1, 3), 2 * d.integer(1, 20), 2 * d.integer(1, 20)
    stored = (256 * d.uniform(images, height * 3 // 2, width)).to(torch.uint8)
    flip = d.uniform(images) < 0.5
    dtype = d.deal("planes", (*_DTYPES, torch.uint8))
    expected = yuv420_to_rgb(stored, flip=flip, dtype=dtype, backend="reference")
    actual = yuv420_to_rgb(stored.to(device), flip=flip.to(device), dtype=dtype, backend=backend).cpu()
    ulps = 1 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 0  # the interpreter truncates
    difference = (actual.double() - expected.double()).abs()
    near = 2.0**-7 * expected.double().abs() * ulps
    same = bool((difference <= near).all())
    what = f"{images} of {height}x{width}"
    yield must("yuv420_to_rgb", same), f"{dtype}, {what}"

    matrix, full = d.deal("matrix", list(_MATRICES)), d.deal("range", (True, False))
    size = d.integer(1, height), d.integer(1, width)
    corners = [(d.integer(0, height - size[0]), d.integer(0, width - size[1])) for _ in range(images)]
    how: Any = dict(size=size, matrix=matrix, full_range=full, siting="left", dtype=torch.uint8, backend=backend)
    crop = torch.tensor(corners)
    pixels = yuv420_to_rgb(stored.to(device), flip=flip.to(device), crop=crop.to(device), **how).cpu().numpy()
    levels = 0.0
    for index, (top, left) in enumerate(corners):
        y, c = np.split(stored[index].numpy().ravel(), [height * width])
        ycc = [y.reshape(height, width), *c.reshape(2, height // 2, width // 2)]
        cut = _rgb(ycc, matrix, full)[:, top : top + size[0], left : left + size[1]]
        levels = max(levels, float(np.abs(pixels[index] - (cut[..., ::-1] if flip[index] else cut)).max()))
    yield Finding("colours", levels / _FRAME_LEVELS, levels), f"{matrix}, full_range={full}, {what}"


# ------------------------------------------------------------------------------------------------ pictures


def picture(d: Draw, height: int, width: int) -> np.ndarray:
    """A smooth picture with a little noise, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / d.between(3, 30) + d.between(0, 6)) * np.cos(y / d.between(3, 30)) for _ in "rgb"]
    noise = 8 * d.normal(height, width, 3).numpy()
    result: np.ndarray = (np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    return result


def _stored(frame: Any) -> list[np.ndarray]:
    """Y, Cb and Cr of a 4:2:0 frame of even sides."""
    result = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        result.append(rows[:, : plane.width].copy())
    return result


def _rgb(ycc: list[np.ndarray], matrix: str, full: bool = False) -> np.ndarray:
    """(3, H, W) levels in float64, from 16 to 235 or the full range; chroma on the left, interpolated linearly."""
    y, cb, cr = ycc
    height, width = y.shape
    at_y = np.clip((np.arange(height) - 0.5) / 2, 0, len(cb) - 1)
    at_x = np.clip(np.arange(width) / 2, 0, cb.shape[1] - 1)

    def upsampled(c: np.ndarray) -> np.ndarray:
        tall = np.stack([np.interp(at_y, np.arange(len(c)), column) for column in c.T], axis=1)
        wide = np.stack([np.interp(at_x, np.arange(c.shape[1]), row) for row in tall])
        return (wide - 128) * (1 if full else 255 / 224)

    blue, red = upsampled(cb), upsampled(cr)
    luma = y.astype(np.float64) if full else (y.astype(np.float64) - 16) * 255 / 219
    of_red, of_blue = _MATRICES[matrix]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    result: np.ndarray = np.stack([r, (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue), b]).clip(0, 255)
    return result
