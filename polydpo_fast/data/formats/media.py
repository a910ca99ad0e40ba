"""Images and clips as files: what their suffixes and first bytes say."""

from __future__ import annotations

from typing_extensions import Buffer

__all__ = ["CLIP_SUFFIXES", "IMAGE_SUFFIXES", "suffix_of"]

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "jp2", "ppm", "tga", "qoi")
)
CLIP_SUFFIXES = frozenset(("mp4", "m4v", "mov", "mkv", "webm"))

_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP  ": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
    b"P5": "ppm",
    b"P6": "ppm",
    b"qoif": "qoi",
}
# The brands of ISO files that are images which nothing here decodes.
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def suffix_of(data: Buffer) -> str:
    """By the first bytes. Raises ValueError where they are of no image or clip that is known."""
    begin = bytes(memoryview(data).cast("B")[:64])
    for beginning, suffix in _BEGINNINGS.items():
        if begin.startswith(beginning):
            return suffix
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "webp"
    if begin[:4] == b"\x1aE\xdf\xa3":
        return "webm" if b"webm" in begin else "mkv"
    if begin[4:8] == b"ftyp":
        brand, others = begin[8:12], begin[16 : max(16, int.from_bytes(begin[:4], "big"))]
        if brand in (b"avif", b"avis") or (brand in _HEIF and b"avif" in others):
            return "avif"
        if brand not in _HEIF:
            return "mov" if brand == b"qt  " else "mp4"
    if begin[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # from before there were brands
        return "mov"
    if _is_tga(data):
        return "tga"
    raise ValueError(
        f"it is no image or clip that is known: it begins with {begin[:8].hex(' ')}" if begin else "it is empty"
    )


def _is_tga(data: Buffer) -> bool:
    """By its header, as it begins with no mark of its own."""
    whole = memoryview(data).cast("B")
    if len(whole) <= 18:
        return False
    _, palette, kind = whole[:3]
    width, height, depth = int.from_bytes(whole[12:14], "little"), int.from_bytes(whole[14:16], "little"), whole[16]
    has_palette = kind in (1, 9)
    return (
        kind in (1, 2, 3, 9, 10, 11)
        and palette == has_palette
        and (has_palette or not any(whole[3:8]))
        and width > 0
        and height > 0
        and depth in (8, 15, 16, 24, 32)
    )
