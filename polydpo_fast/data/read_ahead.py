"""Pairs one after the other, some of them read ahead: for whoever goes through a source once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .source import Pair, PairError, Source

__all__ = ["read_ahead"]

_READERS, _AHEAD = 4, 8


def read_ahead(source: Source, indices: Iterable[int]) -> Generator[tuple[int, Pair | PairError], None, None]:
    """The pairs, in order, read by a few threads a few at a time. Nothing more than PairError is caught."""

    def read(index: int) -> Pair | PairError:
        try:
            return source[index]
        except PairError as error:
            return error

    readers = ThreadPoolExecutor(_READERS)
    waiting: deque[tuple[int, Future[Pair | PairError]]] = deque()
    try:
        for index in indices:
            waiting.append((index, readers.submit(read, index)))
            if len(waiting) == _AHEAD:
                first, reading = waiting.popleft()
                yield first, reading.result()
        while waiting:
            first, reading = waiting.popleft()
            yield first, reading.result()
    finally:
        readers.shutdown(cancel_futures=True)
