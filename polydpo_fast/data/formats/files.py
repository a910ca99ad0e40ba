"""Files by path, glob or address: local ones directly, all others through fsspec."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..source import SourceError, is_unicode
from . import remote
from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES
from .remote import parts_of

__all__ = ["BRACES", "File", "Location", "contents", "find", "names", "suffix_of_path"]

Location = str | os.PathLike[str]
_MAX_FILE = 1 << 30
BRACES = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST_DIGITS = 18
_MOST_NUMBERED = 1 << 20
_HUB_NAME = re.compile(r"\w[\w.-]*/(\w[\w.-]*)", re.ASCII)


@dataclass(frozen=True)
class File:
    """A file that was there when it was looked for.

    path: local, or an address with a protocol that fsspec knows, such as s3://bucket/shard.tar.
    size: in bytes.
    stamp: changes when the content does, as far as the storage tells: time of modification, ETag or the like.
    """

    path: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        return parts_of(self.path)[-1]

    @property
    def folder(self) -> str:
        """The folder that it is in; "" for the working folder."""
        return os.path.dirname(self.path) if self.is_local else "/".join([*parts_of(self.path)[:-1], ""])

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """The bytes from `start` on; fewer if the file has shrunk. Raises OSError, whose message may lack the path."""
        length = max(0, self.size - start) if length is None else length
        if not self.is_local:
            return remote.read(self.path, start, length)
        # Opened each time: a descriptor would be shared after a fork, and one per shard may be too many.
        with open(self.path, "rb", buffering=0) as file:
            parts = []
            while length > 0 and (part := os.pread(file.fileno(), length, start)):
                parts.append(part)
                start, length = start + len(part), length - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def open(self) -> Any:
        """A seekable binary file object."""
        return open(self.path, "rb") if self.is_local else remote.open_file(self.path)

    def open_to_skip(self) -> Any:
        """As `open`, for reading the file once, forwards, while passing over much of it."""
        return open(self.path, "rb") if self.is_local else remote.Skipping(self.path, self.size)

    def changed(self) -> bool:
        """Whether its size or stamp is another now. Raises OSError if it is gone."""
        if not self.is_local:
            return remote.has_changed(self.path, self.size, self.stamp)
        facts = os.stat(self.path)
        return (facts.st_size, str(facts.st_mtime_ns)) != (self.size, self.stamp)


def find(where: Location | Sequence[Location], suffixes: Sequence[str]) -> list[File]:
    """The files of a path, a glob, a folder (those with these suffixes), or a list of these; sorted by path.

    A list keeps its order. Raises SourceError if there are none.
    """
    if not isinstance(where, (str, os.PathLike)):
        return [file for one in where for file in find(one, suffixes)]
    place = _without_file_protocol(os.fspath(where))
    is_local = "://" not in place
    files = _find_local(place, suffixes) if is_local else []  # before the braces: folders may be named so
    if not files and not os.path.exists(os.path.expanduser(place)) and (numbered := _numbered(place)):
        return [file for one in numbered for file in find(one, suffixes)]
    if not is_local:
        files = [File(*found) for found in remote.find(place, suffixes)]
    if not files:
        raise SourceError(f"{place}: {_missing(os.path.expanduser(place), suffixes)}")
    return files


def _numbered(place: str) -> list[str]:
    """All names that shards-{000..123}.tar, WebDataset's notation, stands for; none without such braces."""
    found = BRACES.search(place)
    if found is None:
        return []
    first, last = found[1], found[2]
    if (digits := max(len(first), len(last))) > _MOST_DIGITS:  # Python itself refuses thousands
        short = f"{place[: found.start()]}{{...}}{place[found.end() :]}"
        raise SourceError(f"{short}: a number in the braces has {digits} digits; expected at most {_MOST_DIGITS}")
    if int(first) > int(last):
        raise SourceError(f"{place}: {found[0]} counts down; expected the smaller number first")
    if int(last) - int(first) >= _MOST_NUMBERED:
        raise SourceError(
            f"{place}: {found[0]} means {int(last) - int(first) + 1} files; expected at most {_MOST_NUMBERED}"
        )
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [f"{place[: found.start()]}{number}{place[found.end() :]}" for number in numbers]


def _missing(place: str, suffixes: Sequence[str]) -> str:
    """Why nothing was found there."""
    wanted = " or ".join(suffixes)
    if not os.path.isdir(place):
        reason = f"no such file or folder (looked for {wanted})"
        on_hub = _HUB_NAME.fullmatch(place)
        if on_hub is None or place.lower().endswith((*suffixes,)) or os.path.exists(os.path.dirname(place)):
            return reason
        return (
            f"{reason}; if it is a data set of the Hugging Face hub, expected hf://datasets/{place}, or the folder "
            f"{on_hub[1]} that `hf download {place} --repo-type dataset --local-dir {on_hub[1]}` makes"
        )
    reason = f"the folder has no {wanted} in it"
    for _, _, inside in os.walk(place):
        if any(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES | CLIP_SUFFIXES for name in inside):
            return (
                f"{reason}; for files of images or clips write a manifest, pairs.jsonl, of lines such as "
                '{"win": "a.jpg", "lose": "b.jpg", "prompt": "..."}'
            )
    return reason


def contents(path: str) -> bytes | Path:
    """The bytes of an image or clip; of a local clip (told by its suffix) the path. Raises OSError or ValueError."""
    path = _without_file_protocol(path)
    if "://" in path:
        data = File(path, 0, "").read(0, _MAX_FILE + 1)
        size = len(data)
    else:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):  # a pipe would hang
            raise ValueError("it is no regular file")
        if path.rpartition(".")[2].lower() in CLIP_SUFFIXES:
            return Path(path)
        size = facts.st_size
        data = File(path, size, "").read() if size <= _MAX_FILE else b""
    if not size:
        raise ValueError("it is empty")
    if size > _MAX_FILE:
        raise ValueError(f"it has more than {_MAX_FILE} bytes")
    return data


def names(files: Sequence[File]) -> list[str]:
    """The ends of the files' paths, as short as keeps them different. They do not depend on where the files are kept.

    Raises SourceError if a file is given twice.
    """
    paths = [parts_of(file.path if "://" in file.path else os.path.abspath(file.path)) for file in files]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        tails = ["/".join(path[-depth:]) for path in paths]
        if len(set(tails)) == len(tails):
            return tails
    twice = next(tail for tail in tails if tails.count(tail) > 1) if paths else ""
    raise SourceError(f"{twice} is given twice")


def _find_local(place: str, suffixes: Sequence[str]) -> list[File]:
    place = os.path.expanduser(place)
    if os.path.isdir(place):
        found = _once(_walk(place, suffixes))
    elif os.path.exists(place):  # before globbing: its name may have brackets
        found = [place]
    else:
        found = _once(glob.glob(place, recursive=True))
    files = []
    for path in filter(os.path.isfile, found):
        facts = os.stat(path)
        path = os.path.abspath(path)  # a program may go to another folder while it is being read
        if not is_unicode(path):
            raise SourceError(f"{path!a}: the file's name is not UTF-8; expected one that is")
        files.append(File(path, facts.st_size, str(facts.st_mtime_ns)))
    return files


def _walk(place: str, suffixes: Sequence[str]) -> Iterator[str]:
    """The files with these suffixes in a folder and its subfolders, without hidden ones. Links are followed, and each
    folder is entered once."""
    seen = set()
    for folder, inside, names in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith((*suffixes,)):
                yield os.path.join(folder, name)


def _once(paths: Iterable[str]) -> list[str]:
    """Each file once, sorted: under its own name rather than a link's, in the first of the folders that lead to it."""
    real_folder = cache(os.path.realpath)
    found: dict[str, str] = {}
    for is_link, path in sorted((os.path.islink(path), path) for path in paths):
        folder, name = os.path.split(path)
        found.setdefault(os.path.realpath(path) if is_link else os.path.join(real_folder(folder), name), path)
    return sorted(found.values())


def suffix_of_path(path: str) -> str:
    """In lower case, without the dot."""
    return parts_of(path)[-1].rpartition(".")[2].lower()


def _without_file_protocol(address: str) -> str:
    protocol, _, path = address.partition("://")
    return path if protocol in ("file", "local") else address
