"""Pairs that are bad: they are counted and written down, until there are too many for a training to go on."""

from __future__ import annotations

from .plan import Plan
from .reading import LoaderError
from .source import PairError
from .stats import LoaderStats

__all__ = ["BadPairs"]

_RATE_AFTER = 100  # pairs, before a share of bad ones says anything
_RATE_OF = 10_000  # pairs that it is a share of, if the source has so many: bad ones come together, in a damaged shard


class BadPairs:
    """The bad pairs of one pass. Runs of pairs that cannot be read and of pairs that cannot be decoded are counted
    apart, because all pairs of a batch are read before any is decoded.

    last: what was wrong with the last one, and where.
    """

    def __init__(self, plan: Plan, stats: LoaderStats) -> None:
        self._plan, self._stats = plan, stats
        self.last = ""
        self._seen, self._bad = 0, 0
        self._unread, self._undecoded = 0, 0  # in a row
        self._unread_blocks: set[int] = set()  # of that run: all pairs of a block that cannot be read count as one
        self._failed: dict[int, str] = {}  # what failed, of a source of no more than max_bad_run pairs

    def count_seen(self) -> None:
        """A pair was asked for, be it bad or not."""
        self._seen += 1

    def end_unread_run(self) -> None:
        self._unread = 0
        self._unread_blocks.clear()

    def end_undecoded_run(self) -> None:
        self._undecoded = 0

    def add_unread(self, position: int, index: int, error: Exception, lost_block: int | None) -> None:
        """lost_block: the one of which no pair can be read. Raises LoaderError if it is one bad pair too many."""
        if lost_block is None:
            self._unread += 1
        else:
            self._unread += lost_block not in self._unread_blocks
            self._unread_blocks.add(lost_block)
        self._add(position, index, "", error, self._unread)

    def add_undecoded(self, position: int, index: int, key: str, error: PairError) -> None:
        """Raises LoaderError if it is one bad pair too many."""
        self._undecoded += 1
        self._add(position, index, key, error, self._undecoded)

    def _add(self, position: int, index: int, key: str, error: Exception, run: int) -> None:
        """run: how many pairs in a row have this kind of trouble, with this one."""
        plan = self._plan
        self._bad += 1
        self._stats.bad += 1
        where = plan.source.position(index)
        arm, reason = (error.arm, error.reason) if isinstance(error, PairError) else (None, f"{error}")
        reason = reason.removeprefix(f"{where}: ")  # sources that read text say it themselves
        if plan.ledger.is_kept:
            plan.ledger.add(
                key=key,
                arm=arm,
                position=where,
                index=index,
                error=type(error).__name__,
                reason=reason,
                epoch=plan.epoch,
                step_position=position,
                rank=plan.rank,
                source=plan.source.fingerprint,
                decode={**plan.options, "seed": plan.seed_at(position)},
            )
        self.last = f"{key} ({where}): {reason}" if key else f"{where}: {reason}"
        if len(plan.source) <= plan.max_bad_run:
            self._failed.setdefault(index, self.last)
        self._raise_if_too_many(run)

    def _raise_if_too_many(self, run: int) -> None:
        plan, pairs, last = self._plan, len(self._plan.source), f"the last was {self.last}"
        if run > plan.max_bad_run and len(self._failed) == pairs:
            raise LoaderError(
                f"all {pairs} pairs of the source failed; the first was {next(iter(self._failed.values()))}"
            )
        if run > plan.max_bad_run:
            raise LoaderError(f"{run} pairs in a row are bad, more than {plan.max_bad_run} (max_bad_run); {last}")
        enough = self._seen >= _RATE_AFTER or not plan.max_bad_rate
        if enough and self._bad > plan.max_bad_rate * max(self._seen, min(pairs, _RATE_OF)):
            raise LoaderError(
                f"{self._bad} of {self._seen} pairs are bad, more than {plan.max_bad_rate:.1%} (max_bad_rate); {last}"
            )
