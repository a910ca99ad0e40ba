"""What an image or a clip may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .values import check_count, is_number, plain

__all__ = ["ClipLimits", "DecodeLimits"]


@dataclass(frozen=True)
class DecodeLimits:
    """What an image may cost; more is refused before memory is allocated for it.

    pixels: height times width. Of what Pillow decodes, no more than twice PIL.Image.MAX_IMAGE_PIXELS either, which is
        Pillow's own limit (179 million); it warns from half of that on.
    bytes: of the compressed image.
    scans: of a progressive JPEG; each is a pass over all coefficients, so a small file can cost minutes.
    decoded: bytes of memory that a decoder may take for one image besides its rows: the coefficients of a progressive
        JPEG, the inflated data of a PNG.
    chunk: bytes of one of a PNG's chunks that holds no pixels, such as a colour profile or a text.
    """

    pixels: int = 1 << 27
    bytes: int = 1 << 28
    scans: int = 100
    decoded: int = 1 << 30
    chunk: int = 1 << 23

    def __post_init__(self) -> None:
        for name in ("pixels", "bytes", "scans", "decoded", "chunk"):
            count = check_count(f"limits.{name}", getattr(self, name), 2**30 if name == "scans" else 2**62)
            object.__setattr__(self, name, count)


@dataclass(frozen=True)
class ClipLimits:
    """What a clip may cost; more is refused before memory is allocated for it.

    pixels: height times width of a frame.
    bytes: of the compressed clip.
    frames: in the stream, also of those that are not used.
    timeout_s: seconds of work that one clip may take; looked at between two frames.
    streams: in the file: of video, sound, text and whatever else.
    """

    pixels: int = 1 << 24
    bytes: int = 1 << 32
    frames: int = 1 << 20
    timeout_s: float = 120.0
    streams: int = 100

    def __post_init__(self) -> None:
        for name, most in (("pixels", 2**62), ("bytes", 2**62), ("frames", 2**62), ("streams", 2**30)):
            object.__setattr__(self, name, check_count(f"limits.{name}", getattr(self, name), most))
        if not is_number(self.timeout_s) or not 0 <= self.timeout_s < math.inf:
            raise ValueError(f"limits.timeout_s is {self.timeout_s!r}; expected seconds >= 0")
        object.__setattr__(self, "timeout_s", plain(self.timeout_s))
