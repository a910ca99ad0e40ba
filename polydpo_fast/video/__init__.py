"""One clip through PyAV, for `decode_clips` and for DALI: when its frames are shown, and those that are asked of it.

`clip` opens a clip, indexes it and decodes; `file` has its bytes as files; `mp4` and `matroska` look through the
container before FFmpeg does; `bitstream` tells what the bits do and PyAV does not, codec by codec: `h26x` (H.264 and
HEVC), `av1` and `mpeg4`, which read them by `bits`; `timeline` says when frames are shown, and chooses those of a pair.
"""

from .bitstream import may_be_fields, may_change
from .clip import Clip, aspect_of, orientation, require_av, siting_of, words_of
from .file import Source, open_regular
from .timeline import TooShortError, plan

__all__ = [
    "Clip",
    "Source",
    "TooShortError",
    "aspect_of",
    "may_be_fields",
    "may_change",
    "open_regular",
    "orientation",
    "plan",
    "require_av",
    "siting_of",
    "words_of",
]
