"""Files that are elsewhere: on the web, in a bucket, or wherever else fsspec reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..source import SourceError

__all__ = ["Found", "Skipping", "find", "has_changed", "open_file", "parts_of", "patiently", "read"]

T = TypeVar("T")
_WEB = ("http://", "https://")
_LEAST_AHEAD, _MOST_AHEAD = 1 << 17, 1 << 22  # bytes that are fetched beyond what is asked for
_REQUESTS = 16  # at once, for facts about files
_PAUSES_S = (0.2, 1.0)  # before each new attempt
_TOO_SOON = (408, 425, 429)  # statuses of a web server that may pass, like those from 500 on
# By S3 and Google, the web, Azure, the Hugging Face hub, disks.
_STAMPS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "blob_id", "mtime", "created")
_trying = threading.local()


class Found(NamedTuple):
    """path: an address, with its protocol. size: in bytes. stamp: as in `File`; "" if the storage tells none."""

    path: str
    size: int
    stamp: str


def read(address: str, start: int, length: int) -> bytes:
    """The bytes from `start` on; fewer if the file ends before. Raises OSError, without the address in its message."""
    try:
        data = patiently(lambda: bytes(_part(_filesystem(address)[0], address, start, start + length)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {error}") from error
    except (OSError, ImportError, SourceError):
        raise
    except Exception as error:  # the storages' clients have exceptions of their own
        raise OSError(str(error) or type(error).__name__) from error
    if len(data) > length:
        raise OSError("its server sends the whole file when it is asked for a part")
    return data


def open_file(address: str) -> Any:
    """A seekable binary file object."""
    return _filesystem(address)[0].open(address, "rb")


def has_changed(address: str, size: int, stamp: str) -> bool:
    """Whether it has another size or stamp now. Raises OSError if it is gone."""
    info = _info(_filesystem(address)[0], address)
    return (info.get("size"), _stamp(info)) != (size, stamp)


def find(place: str, suffixes: Sequence[str]) -> list[Found]:
    """The files of an address, a glob, or a folder (searched for these suffixes); in order of path."""
    filesystem, inner = _filesystem(place)
    try:
        if any(c in place for c in ("*[" if _is_web(place) else "*?[")):
            found = sorted(filesystem.glob(place))
        elif not place.endswith("/") and parts_of(place)[-1].lower().endswith((*suffixes,)):
            found = [place]  # isdir would ask a web server for all of it
        elif filesystem.isdir(place):
            found = _within(filesystem, place, suffixes)
        else:
            found = [place] if filesystem.exists(place) else _nothing(filesystem, place)
        with ThreadPoolExecutor(_REQUESTS) as pool:
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
        files.append(Found(address, int(info["size"]), _stamp(info)))
    return files


class Skipping:
    """A remote file that is read forwards, without fetching much of what is passed over, or anything twice.

    Each request reads somewhat ahead: further and further while reads lie close together, so that a file of small
    members takes few requests, and little again after a large member was passed over.
    """

    def __init__(self, address: str, size: int) -> None:
        self._address, self._size, self._at = address, size, 0
        self._begin, self._data, self._ahead = 0, b"", _LEAST_AHEAD

    def __enter__(self) -> Skipping:
        return self

    def __exit__(self, *_: object) -> None:
        self._data = b""

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, length: int) -> bytes:
        parts = []
        while length > 0 and self._at < self._size:
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
        wanted = min(max(length, self._ahead), self._size - self._at)
        self._begin, self._data = self._at, read(self._address, self._at, wanted)


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns. Where it fails in a way that may pass, as networks do, it is tried again, twice."""
    if getattr(_trying, "now", False):  # within a larger read, which is tried again as a whole
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
    """Whether the trouble is of the network or the server, and may be over soon, rather than of the file."""
    is_gone = isinstance(error, FileNotFoundError)
    while type(error) in (OSError, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec calls whatever it met on the web a missing file
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in _TOO_SOON or status >= 500
    # By name: the clients may not be installed, and Python 3.10 has two TimeoutErrors.
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if "Timeout" in names or "Credential" in names:  # a server that hangs has been waited for already
        return False
    if is_gone:
        return "Connect" in names
    if type(error) is OSError:  # pyarrow's, of a damaged file, has no number
        return error.errno is not None
    lasting = (PermissionError, MemoryError, ValueError, TypeError, LookupError, ImportError, NotImplementedError)
    return not isinstance(error, lasting)


def _within(filesystem: Any, place: str, suffixes: Sequence[str]) -> list[str]:
    return sorted(path for path in filesystem.find(place) if path.lower().endswith((*suffixes,)))


def _nothing(filesystem: Any, place: str) -> list[str]:
    """Nothing is there; raises FileNotFoundError if the storage says more than that, as of a private repository."""
    try:
        filesystem.info(place)
    except FileNotFoundError as error:
        if str(error) not in place:
            raise
    return []


def _part(filesystem: Any, path: str, start: int, end: int) -> Any:
    from fsspec.spec import AbstractFileSystem

    if not filesystem.async_impl and type(filesystem).cat_file is AbstractFileSystem.cat_file:
        # It opens the file, and would read a block ahead: 50 MB, with some storages.
        return filesystem.cat_file(path, start=start, end=end, cache_type="none", block_size=_LEAST_AHEAD)
    return filesystem.cat_file(path, start=start, end=end)


def _info(filesystem: Any, path: str) -> Mapping[str, Any]:
    try:
        info: Mapping[str, Any] = patiently(lambda: filesystem.info(path))
        return info
    except FileNotFoundError as error:  # whatever a web server answered; its cause says what it was
        raise FileNotFoundError(f"no such file: {error.__cause__ or error}") from error


def _stamp(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")


def _filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the address's path in it."""
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
        raise SourceError(
            f"{address}: {error}. pip install 'polydpo-fast[remote]' has HTTP, S3 and the Hugging Face hub"
        ) from error
    except Exception as error:  # an unknown protocol, a package or an address that it needs, whatever it raises
        raise SourceError(f"{address}: {error or type(error).__name__}") from error


def _outer(address: str, inner: str) -> str:
    """What the file system leaves out of its paths: the protocol, and perhaps a host."""
    address = address.rstrip("/")
    if inner and address.endswith(inner):
        return address.removesuffix(inner)
    return f"{address.partition('://')[0]}://"


def parts_of(path: str) -> list[str]:
    """The folders and the name of a path or an address; on the web without the query, which may be a signature."""
    if _is_web(path):
        path = path.partition("?")[0]
    return path.rstrip("/").split("/")


def _is_web(address: str) -> bool:
    return address.startswith(_WEB)
