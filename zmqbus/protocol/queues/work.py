"""What a dispatcher takes in and gives out: works, deliveries, dead letters, figures. Values only.

Messages are never objects here. A **work** is a batch whose messages are each to be handled once; which of them are
meant is said by bits: bit 0 is the first message of the batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import msgspec

from zmqbus.protocol.frames import Batch

Line = tuple[str | None, str]
"""What waits together: (group, topic). No group (None): it was pushed, any team that pulls the topic may have it."""

NO_ATTEMPTS: dict[int, int] = {}  # what most works have, shared and never changed: a million of them may wait


class Team(NamedTuple):
    """Workers that share what each of them could do: they pull the same patterns in the name of the same group."""

    group: str
    patterns: tuple[str, ...]


class Work(msgspec.Struct, gc=False, eq=False):
    """One batch whose messages are each to be handled once. All but the first five fields are the dispatcher's own."""

    batch: Batch
    line: Line
    position: int
    """The owner's: where it keeps the batch."""
    done: int = 0
    """Bits of what is settled: done, or buried."""
    attempts: dict[int, int] = msgspec.field(default_factory=lambda: NO_ATTEMPTS)
    """By index, of what is not settled and has failed: how often."""
    fresh: int = 0
    """Bits of what waits and never failed, nor was held back."""
    touched: bool = False
    """Something of it has been delivered."""


class Run(msgspec.Struct, gc=False, eq=False):
    """Messages of one work that have been tried equally often."""

    work: Work
    todo: int
    """Their bits; fewer and fewer."""
    attempt: int
    """How many attempts count against them."""


class Delivery(Run, gc=False, eq=False):
    """Messages `first` to `last` of one work, given to one worker: it is their attempt number `attempt`.

    `todo` is what of it is not answered for. After the lease has run out it waits for another worker, and until that
    has it the answer is still welcome.
    """

    worker: Hashable
    number: int
    first: int
    last: int
    deadline: float
    live: bool = True
    """The lease runs."""


class Dead(NamedTuple):
    """A message that is to become a dead letter. It is settled when the dispatcher is told that it is `buried`."""

    work: Work
    seq: int
    attempts: int
    reason: str


class Figures(NamedTuple):
    """Of one line: what is where now, and what has become of messages so far.

    Every message that was added is waiting, in flight, delayed, done or dead.
    """

    line: Line
    waiting: int
    """Could be given to a worker at once."""
    in_flight: int
    """With a worker, whose lease runs."""
    delayed: int
    """Held back for a time."""
    redelivered: int
    """Deliveries that were not a message's first attempt."""
    done: int
    dead: int
    """Buried, or about to be."""
    workers: int
    """In all teams that pull it."""
    oldest: Work | None
    """The first to be added of those that are not settled."""


def ones(count: int) -> int:
    """The lowest `count` bits."""
    return (1 << count) - 1


def lowest_run(bits: int) -> tuple[int, int]:
    """Where the lowest ones among the bits, of which there is at least one, begin, and how many follow each other."""
    start = (bits & -bits).bit_length() - 1
    rest = bits >> start
    return start, (~rest & (rest + 1)).bit_length() - 1


def indexes(bits: int) -> Iterator[int]:
    """Which bits are set, from the lowest."""
    while bits:
        start, count = lowest_run(bits)
        yield from range(start, start + count)
        bits ^= ones(count) << start
