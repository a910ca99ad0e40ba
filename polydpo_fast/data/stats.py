"""What a loader counts, for people."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LoaderStats"]


@dataclass
class LoaderStats:
    """What a loader did so far, and what it waited for. Times in seconds of wall clock.

    pairs: yielded. bad: pairs that could not be read or decoded.
    waiting_for_source_s: decoding stood still because pairs were not there yet.
    decoding_s: spent decoding.
    waiting_for_consumer_s: finished batches stood in the queue, and it was full, or they were the last of the epoch.
    waiting_for_loader_s: the consumer waited for a batch.
    """

    pairs: int = 0
    bad: int = 0
    waiting_for_source_s: float = 0.0
    decoding_s: float = 0.0
    waiting_for_consumer_s: float = 0.0
    waiting_for_loader_s: float = 0.0

    @property
    def bottleneck(self) -> str:
        """ "reading", "decoding", or "model": which of them the others wait for."""
        if self.waiting_for_consumer_s > self.waiting_for_loader_s:
            return "model"
        return "reading" if self.waiting_for_source_s > self.decoding_s else "decoding"
