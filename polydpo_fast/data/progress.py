"""How far a loader has come: the epoch, and what was yielded of it."""

from __future__ import annotations

import warnings

__all__ = ["Progress"]


class Progress:
    """Of a loader of so many pairs.

    epoch, position: after what was yielded last. begin: where the workers of a DataLoader began to take turns.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self.epoch = self.position = self.begin = 0
        self._is_resumed = False  # the next pass goes on at the position
        self._begins_anew = False  # it does not, because somebody said so
        self._has_warned = False
        self._pass = 0  # the number of the one whose progress this is

    def set_epoch(self, epoch: int) -> None:
        self._begins_anew = True
        if epoch != self.epoch:
            self._move_to(epoch, 0, 0, False)

    def resume(self, epoch: int, position: int, begin: int) -> None:
        self._move_to(epoch, position, begin, True)

    def begin_pass(self, is_worker: bool) -> int:
        """The number of a pass that begins at the epoch's start, or where it is resumed."""
        if not self._is_resumed:
            if self.position and not self._begins_anew and not is_worker:
                self._warn_of_the_beginning()
            self.position = self.begin = 0
        self._is_resumed = self._begins_anew = False
        self._pass += 1
        return self._pass

    def advance(self, number: int, position: int) -> None:
        """That pass came so far; it says nothing any more once another one has begun."""
        if number == self._pass:
            self.position = position

    def end_pass(self, number: int) -> None:
        """That pass is complete, and the next epoch follows."""
        if number == self._pass:
            self.set_epoch(self.epoch + 1)

    def _move_to(self, epoch: int, position: int, begin: int, is_resumed: bool) -> None:
        self.epoch, self.position, self.begin, self._is_resumed = epoch, position, begin, is_resumed
        self._pass += 1

    def _warn_of_the_beginning(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"epoch {self.epoch} was left at position {self.position} of {self._pairs}, and begins again "
                "with the same batches; loader.load_state_dict(loader.state_dict()) goes on where it was left, "
                f"loader.set_epoch({self.epoch + 1}) with the next epoch, and set_epoch({self.epoch}) says that it is "
                "meant so",
                UserWarning,
                stacklevel=4,
            )
