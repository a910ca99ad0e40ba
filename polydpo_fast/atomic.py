"""Files that are there as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["part_of", "write_atomically"]


def part_of(path: Path, which: str) -> Path:
    """The name of a file until it is whole. It begins otherwise: programs take what begins as 00000.png does for it."""
    return path.with_name(f".{path.name}.{which}.part")


def write_atomically(path: Path, data: bytes) -> None:
    """Into a file beside it, which is on the disk before it takes its place."""
    part = part_of(path, secrets.token_hex(8))  # other processes, in containers often of the same number, may write it
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
