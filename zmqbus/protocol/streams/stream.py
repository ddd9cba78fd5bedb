"""What a tracker keeps of each stream, and what it says about it. Values only."""

from __future__ import annotations

from collections import deque

import msgspec

from zmqbus.protocol.frames import Batch


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Messages `first` to `last` of a stream are lost to this subscription: no history that answers has them."""

    topic: str
    origin: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many messages."""
        return self.last - self.first + 1


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """Ask node `source` for messages `first` to `last` of (topic, origin)."""

    source: int
    topic: bytes
    origin: int
    first: int
    last: int


# A stream with a hole is in exactly one of these places; a settled one in none.
SETTLED = 0
QUEUED = 1  # to be asked for as soon as there is room in flight
ASKED = 2  # a Fetch is on its way; `due` is when to stop waiting
PARKED = 3  # waits until `due`: for data that may still arrive, for a source to come back, or before a new try

# What most streams have, shared: a hundred thousand of them may be settled at once.
NOTHING_HELD: deque[Batch] = deque(maxlen=0)
NOBODY_LACKS: dict[int, int] = {}


class Stream(msgspec.Struct, gc=False, eq=False):
    """One stream, as one subscription sees it. While `place` is SETTLED, `target` equals `next`."""

    topic: str
    key: tuple[bytes, int]
    next: int
    """The seq to be delivered next."""
    target: int
    """One past the highest seq known to exist."""
    owed: int
    """What is not to be had is a loss from here on; before, it is history that would have been nice to have."""
    place: int = SETTLED
    held: deque[Batch] = msgspec.field(default_factory=lambda: NOTHING_HELD)  # beyond `next`, in order
    lacks: dict[int, int] = msgspec.field(default_factory=lambda: NOBODY_LACKS)  # source -> lacks all before this
    asked: Fetch | None = None
    due: float = 0.0
    tries: int = 0  # failures in a row
    since: float = 0.0  # when the hole was noticed, or last grew smaller
    soft: bool = False  # parked until the socket is empty: the hole is known only from beside the data path
