"""`DaliDecoder`: `decode_pairs` and `decode_clips` by NVIDIA DALI, whose decoders on a GPU are nvJPEG and NVDEC."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from typing_extensions import Buffer

from ...clips import DecodedClips, decode_clips
from ...decode import DecodedPairs, decode_pairs
from ...decoding.arguments import check_threads
from ...values import check_choice, check_count, is_number
from ...video import ClipSource
from . import clips, images
from .canary import CanaryError
from .engine import Engine

__all__ = ["CanaryError", "CppDecoder", "DaliDecoder", "Decoder", "choose_decoder"]


class Decoder(Protocol):
    """What decodes batches: the functions `polydpo_fast.decode_pairs` and `decode_clips`, or others like them."""

    @property
    def decode_pairs(self) -> Callable[..., DecodedPairs]: ...
    @property
    def decode_clips(self) -> Callable[..., DecodedClips]: ...


class CppDecoder:
    """`polydpo_fast.decode_pairs` and `decode_clips`, on the CPU."""

    decode_pairs = staticmethod(decode_pairs)
    decode_clips = staticmethod(decode_clips)


def choose_decoder(
    decoder: Literal["auto", "cpp", "dali"] = "auto",
    device: str | torch.device | None = None,
    threads: int | None = None,
) -> Decoder:
    """The decoder of that name.

    Args:
        decoder: "cpp", "dali", or "auto": DALI where the device is a CUDA one and nvidia-dali is installed, else C++.
        device: where pixels are wanted; None for the current CUDA device if there is one, else the CPU.
        threads: of DALI; as in `DaliDecoder`.

    Raises:
        ImportError: "dali", and nvidia-dali is not installed.
        ValueError: another name, no device; or "dali" on a device that is not there.
    """
    check_choice("decoder", decoder, ("auto", "cpp", "dali"))
    kind = None if device is None else _parse_device(device).type
    if decoder == "auto":
        # In this order: even to ask after CUDA may be too much, before a fork or after it.
        on_cuda = kind in (None, "cuda") and _has_cuda()
        decoder = "dali" if on_cuda and _is_installed() else "cpp"
    return DaliDecoder(device, threads) if decoder == "dali" else CppDecoder()


class DaliDecoder:
    """Decodes pairs by NVIDIA DALI (`pip install 'polydpo-fast[dali]'`), into tensors on its device.

    What DALI is given: JPEGs (baseline and progressive; grey, or YCbCr 4:4:4, 4:2:2, 4:2:0) whose markers are whole.
    The geometry is computed by the same code as for the C++ decoder, seeds draw the same crops and mirrors, and EXIF
    orientation is ours. All else goes through `polydpo_fast.decode_pairs`, pair by pair, and is then moved to the
    device: PNG (which DALI decodes on the CPU too, slower), CMYK, WebP and the like, and whatever looks damaged, so
    that errors are the same. An image that makes DALI fail costs its own pair the way through C++, and no other.

    DALI decodes; PyTorch crops, resizes by the C++ decoder's own filter, mirrors and normalises, on the device. So on
    DALI's CPU operators (libjpeg-turbo, as here) pixels are those of the C++ decoder, bit for bit, and resized ones
    within 0.1 levels of 255. nvJPEG's transform and upsampling are its own.

    What `strict=True` means here: the header and the limits are checked, and that every segment and restart up to the
    end-of-image marker is there, which finds most truncations. Flipped bits in the coded data, and a file that was cut
    off and ended anew, are found by the C++ decoder alone: DALI does not tell of them, and with `strict=False`
    `damaged` has those images alone that C++ decoded.

    The canary: nvJPEG's hardware decoder has returned wrong pixels on an H100 (pytorch/vision#9606). So the first pair
    and then one in `canary` is decoded by C++ too, and a `CanaryError` is raised where the mean of any tile of 16 x 16
    pixels differs by more than 8 levels of 255. A pair in which C++ finds damage is not compared.

    Each call waits for its batch to be done. One call at a time is in DALI; calls from several threads take turns.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None for the current CUDA device if there is one, else the CPU.
        threads: of DALI's, on a GPU no more than a batch has images, and of C++ for the rest; None for as many as
            processors this process may use.
        canary: one pair in so many is decoded again; None for never.
        hardware_load: the share, 0 to 1, of the images that nvJPEG gives to its hardware decoder, where there is one.

    Raises:
        ImportError: nvidia-dali is not installed.
        TypeError, ValueError: an argument has the wrong type or value, or there is no such device.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        threads: int | None = None,
        canary: int | None = 256,
        hardware_load: float = 0.65,
    ) -> None:
        _import_dali()
        self.device = _check_device(device)
        threads = check_threads(threads)
        if canary is not None:
            check_count("canary", canary, 2**62)
        if not is_number(hardware_load) or not 0 <= hardware_load <= 1:
            raise ValueError(f"hardware_load is {hardware_load!r}; expected a number from 0 to 1")
        self._engine = Engine(self.device, threads, canary, float(hardware_load))

    def __reduce__(self) -> tuple[Any, ...]:
        engine = self._engine
        return type(self), (self.device, engine.threads, engine.canary, engine.hardware_load)

    def decode_pairs(self, win: Sequence[Buffer], lose: Sequence[Buffer], **options: Any) -> DecodedPairs:
        """As `polydpo_fast.decode_pairs`, which has the same options; `pixels` are on this decoder's device, where
        `out` must be, and the rest of the result is on the CPU.

        `strict` is described with the class. `threads` are those of C++. With dtype="yuv420" all is done by C++.

        Raises:
            DecodeError, TypeError, ValueError: as `polydpo_fast.decode_pairs`.
            CanaryError: DALI's pixels are wrong.
        """
        return images.decode(self._engine, win, lose, options)

    def decode_clips(self, win: Sequence[ClipSource], lose: Sequence[ClipSource], **options: Any) -> DecodedClips:
        """As `polydpo_fast.decode_clips`, which has the same options, through NVDEC; `pixels` are on this decoder's
        device, where `out` must be.

        DALI is given undamaged, upright 8-bit 4:2:0 clips of limited range in BT.601 or BT.709, with square pixels,
        one video stream, without frames that are not shown, and of the size that their header tells; on a GPU
        progressive H.264 and HEVC whose parameters stay the same. Decoded, they take at most 4 GiB. The other pairs go
        through `polydpo_fast.decode_clips`. PyAV is needed for both: the frames are chosen by its timeline.
        The canary looks at the first frame and the last, in tiles of 32 x 32 pixels. Damage in the coded data is
        noticed by C++ alone.

        DALI converts all colours as BT.601, to 8 bits, and clips them before they are resized. Those of BT.709 are
        converted again: within 2 levels of 255 where BT.601 can show them too, up to 37 away where it cannot (pure
        green, magenta). NVDEC's chroma is taken to lie between the pixels, half a pixel to the right of where these
        streams have it.

        Raises:
            DecodeError, TypeError, ValueError: as `polydpo_fast.decode_clips`; and ValueError on the CPU for codecs
                other than VP8 and VP9, which DALI decodes on a GPU only.
            CanaryError: DALI's pixels are wrong.
            ImportError: PyAV is not installed.
        """
        return clips.decode(self._engine, win, lose, options)


def _check_device(device: str | torch.device | None) -> torch.device:
    """With its number, if it is a CUDA device."""
    if device is None:
        device = "cuda" if _has_cuda() else "cpu"
    found = _parse_device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:1', ...")
    if not _has_cuda():
        raise ValueError(f"device is {device!r}; but PyTorch finds no CUDA device here")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:1', ...") from None


def _has_cuda() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()  # ROCm calls itself cuda too


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no nvidia at all; or sys.modules says None
        return False


def _import_dali() -> None:
    try:
        from nvidia.dali import fn
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) and "dali" in f"{error.name}" else f" ({error})"
        raise ImportError(f"DaliDecoder needs NVIDIA DALI: pip install 'polydpo-fast[dali]'{why}") from None
    if not hasattr(fn.decoders, "video"):
        raise ImportError("DaliDecoder needs NVIDIA DALI 2.4 or later: pip install -U 'polydpo-fast[dali]'")
