"""The row groups that were read last, shared by the threads that read pairs."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..reading import was_given_up
from ..source import PairError
from .arrow import Binary

__all__ = ["RowGroup", "RowGroups"]

_MOST_READS = 3  # of one row group at a time
_LOOK_S = 0.05  # between two looks of a waiting thread at whether the reading one was given up


@dataclass(frozen=True)
class RowGroup:
    """images, others: columns by name, the latter as chunked arrays of pyarrow. size: in bytes."""

    images: Mapping[str, Binary]
    others: Mapping[str, Any]
    size: int


class _Entry:
    """One row group: itself, or who is reading it, or why it could not be read."""

    def __init__(self) -> None:
        self.group: RowGroup | None = None
        self.reader: threading.Thread | None = None  # that the others wait for
        self.reading = 0  # threads, with those that were given up
        self.error = ""
        self.until = 0.0  # time.monotonic(), before which nobody tries again after an error


class _Memory:
    """The entries of one process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.changed = threading.Condition()  # its lock guards the entries
        self.entries: OrderedDict[tuple[int, int], _Entry] = OrderedDict()


class RowGroups:
    """The row groups that were read last, of up to `limit` bytes in all.

    Of the threads that ask for the same one, one reads it and the others wait. No lock is held during a read: if the
    reading thread is given up, because its storage hangs, another one reads the row group again. A copy, by fork or
    pickle, begins empty.

    window: how many are shuffled together; a warning says if the limit holds fewer.
    """

    def __init__(self, limit: int, window: int = 0) -> None:
        self._limit, self.window = limit, window
        self._warned = False
        self._memory = _Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._limit, self.window)

    def get(self, key: tuple[int, int], read: Callable[[], RowGroup], forget_s: float) -> RowGroup:
        """The row group of that key, from memory or from `read`. Raises PairError where it cannot be read.

        forget_s: how long a failure is remembered: the other pairs of the row group then fail at once.
        """
        memory = self._memory
        if memory.process != os.getpid():  # another thread may have held the lock when the process was forked
            memory = self._memory = _Memory()
        me = threading.current_thread()
        with memory.changed:
            entry = memory.entries.setdefault(key, _Entry())
            memory.entries.move_to_end(key)
            if (group := self._wait(memory, entry, me)) is not None:
                return group
        error = ""
        try:
            group = read()
        except PairError as failure:
            error = failure.reason
            raise
        finally:
            with memory.changed:
                entry.reading -= 1
                if entry.reader is me:  # it was not given up in the meantime
                    entry.reader, entry.error = None, error
                    entry.until = time.monotonic() + forget_s if error else 0.0
                entry.group = entry.group or group
                held = self._evict(memory)
                memory.changed.notify_all()
        if held < self.window and not self._warned:
            self._warned = True
            warnings.warn(
                f"memory_bytes is {self._limit}, which holds {held} row groups such as the last one, of {group.size} "
                f"bytes, while {self.window} are shuffled together: they are read again and again; expected "
                f"memory_bytes={self.window * group.size} and some more, or a loader with a smaller window",
                RuntimeWarning,
                stacklevel=2,
            )
        return group

    def _wait(self, memory: _Memory, entry: _Entry, me: threading.Thread) -> RowGroup | None:
        """The row group, once another thread has read it; None if this thread has to."""
        while entry.group is None:
            if time.monotonic() < entry.until:
                raise PairError(entry.error, whole_block=True)
            reader = entry.reader
            nobody = reader is None or was_given_up(reader) or not reader.is_alive()
            # Threads that were given up may just be slow: more of them would take memory, and the storage's time.
            if nobody and entry.reading < _MOST_READS:
                entry.reader, entry.reading = me, entry.reading + 1
                return None
            if was_given_up(me):  # it waited for too long: the next thread may start another read
                entry.reader = None
                raise PairError("its row group was being read for too long by another thread")
            memory.changed.wait(_LOOK_S)
        return entry.group

    def _evict(self, memory: _Memory) -> int:
        """Drops the oldest, down to the limit. Returns how many are left; at least `window` if none had to go."""
        loaded = [(key, entry.group.size) for key, entry in memory.entries.items() if entry.group is not None]
        size = sum(size for _, size in loaded)
        left = len(loaded)
        for old, freed in loaded[:-1]:
            if size <= self._limit:
                break
            del memory.entries[old]
            size, left = size - freed, left - 1
        return left if left < len(loaded) else max(left, self.window)
