"""One clip through PyAV, for `decode_clips` and for DALI: when its frames are shown, and those that are asked of it.

`clip` decodes the frames that are wanted. It knows where they are from `index`, which is made of the packets, or was
kept. Both open the clip by `opening`: within the limits, its bytes as a file of `file`, once `mp4` or `matroska` has
looked through the container. `bitstream` tells what the bits do and PyAV does not, codec by codec: `h26x` (H.264 and
HEVC), `av1` and `mpeg4`, which read them by `bits`; `form` tells of what shape frames are, and how they are turned.
`timeline` says when frames are shown, and chooses those of a pair.
"""

from .bitstream import may_be_fields, may_change
from .clip import Clip
from .file import ClipSource, open_regular
from .form import aspect_of, orientation, siting_of
from .opening import require_av, words_of
from .timeline import TooShortError, choose_times

__all__ = [
    "Clip",
    "ClipSource",
    "TooShortError",
    "aspect_of",
    "choose_times",
    "may_be_fields",
    "may_change",
    "open_regular",
    "orientation",
    "require_av",
    "siting_of",
    "words_of",
]
