"""Files by path, glob or address: local ones directly, all others through fsspec."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES
from .source import SourceError, is_unicode

__all__ = ["File", "Location", "contents", "find", "find_one_split", "names", "suffix_of_path"]

Location = str | os.PathLike[str]
T = TypeVar("T")
_MAX_FILE = 1 << 30
_BRACES = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST_DIGITS = 18
_MOST_NUMBERED = 1 << 20
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")  # as the package datasets names them
# Folders and files begin with such a word, or files end with one, and perhaps numbers. A dev that ends a name is none:
# FLUX.1-dev is a model.
_SPLIT = re.compile(
    r"(?:(?<![^/])|(?<=[-_.])(?!dev)(?=[a-z]+[-_.\d]*\.\w+$))"
    r"(train|val|test|eval|dev(?=/|(?:\.\w+)?$))(?:ing|id|idation|uation)?(?=[-_.\d/]|$)",
    re.ASCII,
)
_HUB_NAME = re.compile(r"\w[\w.-]*/(\w[\w.-]*)", re.ASCII)
_WEB = ("http://", "https://")
_LEAST_AHEAD, _MOST_AHEAD = 1 << 17, 1 << 22  # bytes that are fetched beyond what is asked for
_ASKING = 16  # questions to a storage at once
_PAUSES_S = (0.2, 1.0)  # before what a network failed to give is asked for again
_TOO_SOON = (408, 425, 429)  # answers of a web server that will be another one later, as those from 500 on
_trying = threading.local()
# What storages call it: S3 and Google, the web, Azure, the Hugging Face hub, disks.
_STAMPS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "blob_id", "mtime", "created")


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
        return _parts(self.path)[-1]

    @property
    def folder(self) -> str:
        """The one that it is in, "" for the working folder."""
        return os.path.dirname(self.path) if self.is_local else "/".join([*_parts(self.path)[:-1], ""])

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """Those bytes; fewer where the file has become shorter. Raises OSError where it cannot be read; who asks for
        them says of which file."""
        length = max(0, self.size - start) if length is None else length
        if not self.is_local:
            end = start + length
            try:
                data = self.patiently(lambda: bytes(_part(self._filesystem(), self.path, start, end)))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"no such file: {error}") from error
            except (OSError, ImportError, SourceError):
                raise
            except Exception as error:  # the storages' clients have exceptions of their own
                raise OSError(str(error) or type(error).__name__) from error
            if len(data) > length:
                raise OSError("its server sends the whole file, also where a part of it is asked for")
            return data
        # Opened each time: a descriptor would be shared after a fork, and one per shard may be too many.
        with open(self.path, "rb", buffering=0) as file:
            parts = []
            while length > 0 and (part := os.pread(file.fileno(), length, start)):
                parts.append(part)
                start, length = start + len(part), length - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def open(self) -> Any:
        """A seekable binary file object."""
        if self.is_local:
            return open(self.path, "rb")
        return self._filesystem().open(self.path, "rb")

    def open_to_skip(self) -> Any:
        """As `open`, for going through the file once, forwards, while passing over much of it."""
        return open(self.path, "rb") if self.is_local else _Skipping(self)

    def changed(self) -> bool:
        """Whether another file is there now, by its size and stamp. Raises OSError where there is none."""
        if self.is_local:
            facts = os.stat(self.path)
            return (facts.st_size, str(facts.st_mtime_ns)) != (self.size, self.stamp)
        info = _info(self._filesystem(), self.path)
        return (info.get("size"), _stamp(info)) != (self.size, self.stamp)

    def patiently(self, read: Callable[[], T]) -> T:
        """What `read` makes of the file. A network fails now and then: of a remote file it is tried again, twice."""
        return read() if self.is_local else _patiently(read)

    def _filesystem(self) -> Any:
        return _filesystem(self.path)[0]


class _Skipping:
    """A remote file of which nothing is fetched twice, and what is passed over hardly at all.

    A part is fetched from where it is asked for, and somewhat more. That grows while little lies between two parts, so
    that a file of small members takes few requests; it is small again after a large member was passed over.
    """

    def __init__(self, file: File) -> None:
        self._file, self._at = file, 0
        self._begin, self._data, self._ahead = 0, b"", _LEAST_AHEAD

    def __enter__(self) -> _Skipping:
        return self

    def __exit__(self, *_: object) -> None:
        self._data = b""

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, length: int) -> bytes:
        parts = []
        while length > 0 and self._at < self._file.size:
            if not self._begin <= self._at < self._begin + len(self._data):
                self._fetch(length)
            part = self._data[self._at - self._begin :][:length]
            if not part:  # the file has become shorter
                break
            parts.append(part)
            self._at, length = self._at + len(part), length - len(part)
        return b"".join(parts)

    def _fetch(self, length: int) -> None:
        passed_over = self._at - self._begin - len(self._data)
        is_near = 0 <= passed_over < self._ahead
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if is_near else _LEAST_AHEAD
        wanted = min(max(length, self._ahead), self._file.size - self._at)
        self._begin, self._data = self._at, self._file.read(self._at, wanted)


def find(where: Location | Sequence[Location], suffixes: Sequence[str]) -> list[File]:
    """The files that a path, a glob, a folder (searched for these suffixes) or a list of them means; in order of path.

    A list keeps its order. Raises SourceError where there are none.
    """
    if not isinstance(where, (str, os.PathLike)):
        return [file for one in where for file in find(one, suffixes)]
    place = _without_file_protocol(os.fspath(where))
    is_local = "://" not in place
    files = _find_local(place, suffixes) if is_local else []  # before the braces: folders may be named so
    if not files and not os.path.exists(os.path.expanduser(place)) and (numbered := _numbered(place)):
        return [file for one in numbered for file in find(one, suffixes)]
    if not is_local:
        files = _find_remote(place, suffixes)
    if not files:
        raise SourceError(f"{place}: {_missing(os.path.expanduser(place), suffixes)}")
    return files


def find_one_split(where: Location | Sequence[Location], suffixes: Sequence[str]) -> list[File]:
    """As `find`; but datasets come with their training and test files in one folder, which nobody wants to train on
    together. Raises SourceError for these, unless they are in a list."""
    files = find(where, suffixes)
    if isinstance(where, (str, os.PathLike)):
        _check_splits(os.fspath(where), files)
        _warn_of_missing(os.fspath(where), files)
    return files


def _check_splits(place: str, files: Sequence[File]) -> None:
    parts = [_parts(file.path) for file in files]
    common = len([*itertools.takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))])
    shards: dict[str, str] = {}
    splits: dict[str, str] = {}  # for each the first of its files
    for path in ("/".join(part[common:]) for part in parts):
        # Shards in tar files may be named after anything, such as what is in the pictures.
        if path.lower().endswith(".parquet") and (found := _SHARD.fullmatch(path.rpartition("/")[2])):
            shards.setdefault(found["split"], path)
        if words := _SPLIT.findall(path.lower()):
            # test/train_a is of the test files, whichever of the two words is the folder's
            splits.setdefault(next((word for word in words if word != "train"), "train"), path)
    for one in (shards, splits if "train" in splits else {}):
        if len(one) > 1:
            raise SourceError(
                f"{place} has files of several splits: {', '.join(sorted(one))}, such as "
                f"{' and '.join(sorted(one.values())[:2])}; expected a folder or glob of one; to take all, give them "
                "as a list"
            )


def _warn_of_missing(place: str, files: Sequence[File]) -> None:
    """A download that is not finished has fewer shards than their names say. Of a glob those count that it means."""
    given = _parts(place)[-1]
    if _BRACES.search(given):  # which means just these
        return
    is_glob = any(c in given for c in "*?[")
    there: dict[tuple[str, ...], dict[int, re.Match[str]]] = {}
    for file in files:
        if file.name != given and (found := _SHARD.fullmatch(file.name)):
            there.setdefault((file.folder, found["split"], found["count"]), {})[int(found["number"])] = found
    for (_, _, count), shards in there.items():
        some = next(iter(shards.values()))
        before, after = some[0][: some.start("number")], some[0][some.end("number") :]
        absent = [f"{before}{n:05}{after}" for n in range(int(count)) if n not in shards]
        if absent := [name for name in absent if not is_glob or fnmatch.fnmatchcase(name, given)]:
            warnings.warn(
                f"{place}: {len(absent)} files are not there, though the names of the others say so; the first is "
                f"{absent[0]}",
                RuntimeWarning,
                stacklevel=4,
            )


def _numbered(place: str) -> list[str]:
    """Of shards-{000..123}.tar all names, as WebDataset writes it; none where there are no such braces."""
    found = _BRACES.search(place)
    if found is None:
        return []
    first, last = found[1], found[2]
    if (digits := max(len(first), len(last))) > _MOST_DIGITS:  # Python itself refuses some thousands
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
        reason = f"no such file, or no {wanted} in it"
        on_hub = _HUB_NAME.fullmatch(place)
        if on_hub is None or place.lower().endswith((*suffixes,)) or os.path.exists(os.path.dirname(place)):
            return reason
        return (
            f"{reason}; if it is a data set of the Hugging Face hub, expected the folder {on_hub[1]} that "
            f"`hf download {place} --repo-type dataset --local-dir {on_hub[1]}` makes"
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
    """Of an image or a clip; for clips in local files (by their suffix) the path. Raises OSError or ValueError."""
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
    """Of the files, all different: the last parts of their paths, as many as that takes, without saying where they are.

    Raises SourceError where a file is given twice.
    """
    paths = [_parts(file.path if "://" in file.path else os.path.abspath(file.path)) for file in files]
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
    """The files of these suffixes in a folder and those within, but for hidden ones. Links are followed, and each
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
    """Each file once, sorted: under its own name if that is among the paths, else by the first link to it."""
    real_folder = cache(os.path.realpath)
    found: dict[str, str] = {}
    for is_link, path in sorted((os.path.islink(path), path) for path in paths):
        folder, name = os.path.split(path)
        found.setdefault(os.path.realpath(path) if is_link else os.path.join(real_folder(folder), name), path)
    return sorted(found.values())


def _find_remote(place: str, suffixes: Sequence[str]) -> list[File]:
    filesystem, inner = _filesystem(place)
    try:
        if any(c in place for c in ("*[" if _is_web(place) else "*?[")):
            found = sorted(filesystem.glob(place))
        elif not place.endswith("/") and _parts(place)[-1].lower().endswith((*suffixes,)):
            found = [place]  # isdir would ask a web server for all of it
        elif filesystem.isdir(place):
            found = _within(filesystem, place, suffixes)
        else:
            found = [place] if filesystem.exists(place) else []
        with ThreadPoolExecutor(_ASKING) as pool:
            facts = list(pool.map(partial(_info, filesystem), found))
            if found == [place] and facts[0].get("type") == "directory":  # Spark makes folders named so
                found = _within(filesystem, place, suffixes)
                facts = list(pool.map(partial(_info, filesystem), found))
    except Exception as error:  # the storages' clients have exceptions of their own
        raise SourceError(f"{place}: {error or type(error).__name__}") from error
    outer = _outer(place, inner)
    files = []
    for path, info in zip(found, facts, strict=True):
        if info.get("type") == "directory":  # which a glob finds too
            continue
        if info.get("size") is None:
            raise SourceError(f"{path}: its size is not known, so that it cannot be read in parts")
        address = path if "://" in path else outer + (path.lstrip("/") if outer.endswith("://") else path)
        files.append(File(address, int(info["size"]), _stamp(info)))
    return files


def _within(filesystem: Any, place: str, suffixes: Sequence[str]) -> list[str]:
    return sorted(path for path in filesystem.find(place) if path.lower().endswith((*suffixes,)))


def _info(filesystem: Any, path: str) -> Mapping[str, Any]:
    try:
        info: Mapping[str, Any] = _patiently(lambda: filesystem.info(path))
        return info
    except FileNotFoundError as error:  # whatever a web server answered: that is the cause
        raise FileNotFoundError(f"no such file: {error.__cause__ or error}") from error


def _patiently(read: Callable[[], T]) -> T:
    if getattr(_trying, "now", False):  # a part of what is tried again as a whole
        return read()
    _trying.now = True
    try:
        for pause_s in _PAUSES_S:
            try:
                return read()
            except Exception as error:  # the storages' clients have exceptions of their own
                if not _may_pass(error):
                    raise
            time.sleep(pause_s)
        return read()
    finally:
        _trying.now = False


def _may_pass(error: BaseException) -> bool:
    """Whether it is the network's or the server's trouble, of a moment, and not the file's."""
    is_gone = isinstance(error, FileNotFoundError)
    while type(error) in (OSError, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # of the web everything that kept from asking is called so
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in _TOO_SOON or status >= 500
    # By names: the clients need not be there, and Python 3.10 has two TimeoutErrors.
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if "Timeout" in names or "Credential" in names:  # who hangs was waited for already
        return False
    if is_gone:
        return "Connect" in names
    if type(error) is OSError:  # pyarrow's, of a damaged file, has no number
        return error.errno is not None
    lasting = (PermissionError, MemoryError, ValueError, TypeError, LookupError, ImportError, NotImplementedError)
    return not isinstance(error, lasting)


def _part(filesystem: Any, path: str, start: int, end: int) -> Any:
    from fsspec.spec import AbstractFileSystem

    if not filesystem.async_impl and type(filesystem).cat_file is AbstractFileSystem.cat_file:
        # This one opens the file, and would read a block ahead: of 50 MB, with some storages.
        return filesystem.cat_file(path, start=start, end=end, cache_type="none", block_size=_LEAST_AHEAD)
    return filesystem.cat_file(path, start=start, end=end)


def _stamp(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")


def _parts(path: str) -> list[str]:
    """Of a path or an address; without what follows a ? on the web, which may be a signature that is soon another."""
    if _is_web(path):
        path = path.partition("?")[0]
    return path.rstrip("/").split("/")


def suffix_of_path(path: str) -> str:
    """In small letters, without its dot."""
    return _parts(path)[-1].rpartition(".")[2].lower()


def _outer(address: str, inner: str) -> str:
    """What a file system leaves out of its paths: the protocol, and perhaps a host."""
    address = address.rstrip("/")
    if inner and address.endswith(inner):
        return address.removesuffix(inner)
    return f"{address.partition('://')[0]}://"


def _is_web(address: str) -> bool:
    return address.startswith(_WEB)


def _without_file_protocol(address: str) -> str:
    protocol, _, path = address.partition("://")
    return path if protocol in ("file", "local") else address


def _filesystem(address: str) -> tuple[Any, str]:
    """And what it calls the address."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError(f"reading {address} needs fsspec: pip install 'polydpo-fast[remote]'") from None
    if "::" in address:
        raise SourceError(f"{address} is a chain of protocols; expected one")
    try:
        filesystem, path = url_to_fs(address)
        return filesystem, path
    except ImportError as error:
        raise SourceError(f"{address}: {error}. pip install 'polydpo-fast[remote]' has HTTP and S3") from error
    except Exception as error:  # an unknown protocol, a package or an address that it needs, whatever it raises
        raise SourceError(f"{address}: {error or type(error).__name__}") from error
