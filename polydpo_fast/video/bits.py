"""Bits, one number after another: so the headers of all codecs are read."""

from __future__ import annotations

__all__ = ["MOST_HEADER", "Bits"]

MOST_HEADER = 1 << 12  # bytes of parameter sets that are looked at


class Bits:
    """A unit's bits, from the left. Raises ValueError beyond the end. escaped: with emulation prevention bytes."""

    def __init__(self, unit: bytes, escaped: bool = True) -> None:
        data = unit[:MOST_HEADER].replace(b"\0\0\3", b"\0\0") if escaped else unit
        self._number, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("the parameters are cut off")
        return self._number >> self._left & ((1 << count) - 1)

    def golomb(self, count: int = 1) -> int:
        """The last of so many numbers in Golomb's code, ue(v). Those with a sign, se(v), are as long."""
        value = 0
        for _ in range(count):
            zeros = 0
            while not self.take(1):
                zeros += 1
            value = (1 << zeros) - 1 + self.take(zeros)
        return value
