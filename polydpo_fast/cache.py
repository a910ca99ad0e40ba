"""Indexes that are expensive to build, kept in files: of tar shards, of Parquet labels, of clips' keyframes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

__all__ = ["Arrays", "cache_folder", "load_or_build"]

Arrays = Mapping[str, np.ndarray]

_MOST_BYTES = 4 << 30  # in a folder: the indexes of a million clips and more
_ROUNDS = 512  # how many files are stored, on average, before those of a folder are counted: there may be many
_ABANDONED_S = 24 * 3600.0  # after which nobody writes to a file any more


def cache_folder() -> Path:
    """`$POLYDPO_FAST_CACHE`, or `polydpo_fast` in the user's cache folder (`$XDG_CACHE_HOME`, ~/.cache)."""
    chosen = os.environ.get("POLYDPO_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polydpo_fast"


def load_or_build(
    stamp: str,
    build: Callable[[], Arrays],
    folder: str | os.PathLike[str] | None = None,
    sound: Callable[[Arrays], bool] = lambda _: True,
) -> Arrays:
    """The arrays that were stored under this stamp before, or those that `build` returns, which are stored.

    stamp: everything that the arrays depend on: format version, path, size, time of modification.
    folder: where they are kept; `cache_folder()` if None. If it cannot be written to, they are built again the next
    time. A file that is damaged or has another stamp is built anew. No pickles are read. Once a folder holds more than
    4 GiB, the oldest files are removed.
    sound: whether stored arrays can belong to this stamp; if it says no or raises, they are built anew.
    """
    path = Path(folder or cache_folder()) / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception):  # zipfile and numpy have many for a file that is damaged
        # Opened here: numpy leaves open what is no zip file.
        with open(path, "rb", opener=_open_plainly) as kept, np.load(kept, allow_pickle=False) as stored:
            if any(member.compress_type != zipfile.ZIP_STORED for member in stored.zip.infolist()):
                raise ValueError("it is compressed, which ours are not, and may be larger than the file by any factor")
            arrays = {name: stored[name] for name in stored.files}
        if arrays.pop("stamp").item() == stamp and sound(arrays):
            return arrays
    built = build()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: other processes may be writing the same.
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **{**built, "stamp": np.array(stamp)})  # type: ignore[arg-type]  # of the stubs
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):  # it may have been renamed already
                os.unlink(name)
            raise
        if secrets.randbelow(_ROUNDS) == 0:
            _prune(path.parent, _MOST_BYTES)
    return built


def _open_plainly(path: str, flags: int) -> int:
    """Others may write to the folder: of a pipe or a device nothing is read, nor waited for."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is no regular file")
    return handle


def _prune(folder: Path, most: int) -> None:
    """Removes the oldest indexes until the others have at most so many bytes, and what was never finished.

    Other processes may do the same, or read: a file that is gone is built again, one that is open stays readable.
    """
    kept, now = [], time.time()
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                if re.fullmatch(r"[0-9a-f]{32}\.npz", entry.name):
                    kept.append((facts.st_mtime_ns, facts.st_size, entry.path))
                elif re.fullmatch(r"tmp\w+\.part", entry.name) and now - facts.st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)
    total = sum(size for _, size, _ in kept)
    for _, size, name in sorted(kept):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            os.unlink(name)
        total -= size
