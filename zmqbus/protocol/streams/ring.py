"""Where a stream's messages gather: one slot for each seq that is not sent yet. Knows no locks; its user has one.

    sent ┐                                    ┌ sent + room: nothing may be stored beyond
         ▼                                    ▼
    ─────┬───┬───┬───┬───┬───┬───┬───┬───┬────┬───
     old │ a │ b │ c │   │ e │   │   │   │    │        slot of seq = ring[seq & mask]
    ─────┴───┴───┴───┴───┴───┴───┴───┴───┴────┴───
                       ▲
                       └ end: drawn by somebody who has not got round to storing it, or not drawn at all

The ring has twice `room` slots, so that a straggler that stores `sent + room` never meets one that was sent just now.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

# A third of a millisecond's work at full speed. Each batch costs its two sides some ten microseconds and two wake-ups,
# however small it is: in batches of 1024 a message takes three quarters of the time that it takes in batches of 256.
BATCH_MESSAGES_MAX = 1024
ROOM_MIN = 16  # most streams never gather more: 300 bytes each. Four to the third power times this is the most

EMPTY = object()  # no message. Cannot be packed: that is how a hole in a batch is noticed, at no cost
_EMPTIES = [EMPTY] * (2 * BATCH_MESSAGES_MAX)


class Ring:
    """The messages after `sent`, the last seq that was sent."""

    __slots__ = ("mask", "ring", "room", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.room = ROOM_MIN
        """How many messages it holds at most."""
        self.ring: list[Any] = [EMPTY] * (2 * ROOM_MIN)
        self.mask = 2 * ROOM_MIN - 1

    def end(self) -> int:
        """One past the last message of those that follow `sent` without a hole."""
        first, ring = self.sent + 1, self.ring
        start = first & self.mask
        with suppress(ValueError):
            return first + ring.index(EMPTY, start, start + self.room) - start
        if start > self.room:  # around the end
            with suppress(ValueError):
                return first + ring.index(EMPTY, 0, start - self.room) + len(ring) - start
        return first + self.room

    def upto(self, end: int) -> list[Any]:
        """What is in the slots from `sent + 1` to before `end`."""
        start, stop = (self.sent + 1) & self.mask, end & self.mask
        return self.ring[start:stop] if start <= stop else self.ring[start:] + self.ring[:stop]

    def clear(self, first: int, end: int) -> None:
        """Empty the slots of `first` to before `end`: they are sent."""
        start, stop = first & self.mask, end & self.mask
        if start <= stop:
            self.ring[start:stop] = _EMPTIES[: stop - start]
        else:
            self.ring[start:] = _EMPTIES[: len(self.ring) - start]
            self.ring[:stop] = _EMPTIES[:stop]

    def grow(self) -> None:
        """Hold four times as many from now on. Only while every slot is empty."""
        self.room *= 4
        self.ring = [EMPTY] * (2 * self.room)
        self.mask = 2 * self.room - 1
