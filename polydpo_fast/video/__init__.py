"""One clip through PyAV, for `decode_clips` and for DALI: when its frames are shown, and those that are asked of it.

`clip` opens a clip, indexes it and decodes; `file` has its bytes as files; `mp4` and `matroska` look through the
container before FFmpeg does; `bitstream` reads of the codecs' bits what PyAV does not tell; `timeline` says when frames
are shown, and chooses those of a pair.
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
