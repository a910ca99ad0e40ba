"""What the YCbCr of images and clips means, in the fixed point of the kernels."""

from __future__ import annotations

__all__ = ["MATRICES", "fixed_point"]

# The luma of pure red and of pure blue: ITU-R BT.601, BT.709 and BT.2020, and two of old American television.
MATRICES = {
    **{"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)},
    **{"fcc": (0.30, 0.11), "smpte240m": (0.212, 0.087)},
}


def fixed_point(matrix: str, full_range: bool) -> list[int]:
    """What is taken off Y, then the factors, times 65536: of Y, of Cr in R, of -Cb and -Cr in G, of Cb in B."""
    if matrix == "bt601" and full_range:  # JPEG's, libjpeg's numbers: from five decimal places
        return [0, 65536, 91881, 22554, 46802, 116130]
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    red_cr, blue_cb = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    factors = (luma, red_cr, blue_cb * blue / green, red_cr * red / green, blue_cb)
    return [0 if full_range else 16, *(round(65536 * factor) for factor in factors)]
