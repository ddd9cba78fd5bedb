"""Jobs that came together: a JOB as it came, a delivery of it as its owner knows it, and the jobs made of its batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from typing import Any, Protocol

import msgspec

from zmqbus.node.work.queues.job import Job
from zmqbus.node.work.queues.tie import Fail, Tie
from zmqbus.protocol.frames import Batch

FORGOTTEN = "its handler let go of it, and neither acknowledged nor refused it"


class Holder(Protocol):
    """What a delivery needs of the hand that it came into. Any thread may call any of it."""

    patience: float
    """Seconds from when it came to when it is too late to begin with it."""
    failures: deque[tuple[Tie, Fail, tuple[int, int, int]]]

    def check(self) -> None:
        """Raises ForkedProcess in a forked child."""

    def stir(self, delivery: Delivery) -> None:
        """A delivery has something to be said of it."""

    def hasten(self) -> None:
        """What is to be said is to be said at once."""

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """It takes longer."""


class Parcel(msgspec.Struct, gc=False, eq=False):
    """A JOB, as it came."""

    tie: Tie
    deliveries: Sequence[tuple[int, int]]
    parts: Sequence[bytes]
    received: float


class Delivery:
    """Jobs that came together, and are known to their owner by one number."""

    __slots__ = (
        "__weakref__",
        "acked",
        "attempt",
        "clean",
        "deadline",
        "first",
        "hand",
        "last",
        "number",
        "origin",
        "received",
        "settled",
        "tie",
        "topic",
    )

    def __init__(self, hand: Holder, parcel: Parcel, number: int, attempt: int, batch: Batch, topic: str) -> None:
        self.hand = hand
        self.tie = parcel.tie
        self.received = parcel.received
        self.number = number
        self.attempt = attempt
        self.topic = topic
        self.origin = batch.origin
        self.first = batch.first
        self.last = batch.first + batch.count - 1
        self.deadline = parcel.received + hand.patience
        self.acked: list[int] = []
        self.clean = True
        self.settled: list[tuple[int, int]] = []

    def stir(self) -> None:
        """Something was acknowledged."""
        self.clean = False
        self.hand.stir(self)

    def failed(self, seq: int, how: str, delay_ms: int, reason: str) -> None:
        """A job is not done."""
        self.hand.check()
        self.fail(seq, seq, how, delay_ms, reason)
        self.hand.hasten()

    def fail(self, first: int, last: int, how: str, delay_ms: int, reason: str) -> None:
        """Jobs are not done: to be said."""
        self.settled.append((first, last))
        self.hand.failures.append((self.tie, Fail(how, delay_ms, reason), (self.number, first, last)))

    def extend(self, seconds: float) -> None:
        """It takes longer."""
        self.hand.check()
        self.hand.extend(self, seconds)  # what came with it and still waits goes to others in time nevertheless

    @property
    def open(self) -> list[tuple[int, int]]:
        """What is not settled: first and last of each range."""
        gaps, following = [], self.first
        for first, last in sorted([*self.settled, *ranges_of(self.acked[:])]):
            if first > following:
                gaps.append((following, first - 1))
            following = max(following, last + 1)
        return gaps if following > self.last else [*gaps, (following, self.last)]

    def __del__(self) -> None:
        if self.settled != [(self.first, self.last)] and not self.tie.gone and (left := self.open):
            for first, last in left:
                self.hand.failures.append((self.tie, Fail("nack", -1, FORGOTTEN), (self.number, first, last)))
            self.hand.hasten()


class Loaded:
    """A batch that is decoded, and how much of it has been handed out."""

    __slots__ = ("at", "delivery", "flawed", "headers", "time", "values")

    def __init__(
        self, delivery: Delivery, batch: Batch, values: list[Any], headers: Sequence[Any] | None, flawed: bool
    ) -> None:
        self.delivery = delivery
        self.time = batch.time_ns / 1e9
        self.values = values
        self.headers = headers
        self.flawed = flawed
        """Some of the values are the errors that they are not."""
        self.at = 0

    def jobs(self, most: int) -> tuple[Iterator[Job], Iterator[Any]]:
        """The next ones, and what they are drawn from."""
        at, delivery, values, headers = self.at, self.delivery, self.values, self.headers
        end = self.at = min(at + most, len(values))
        if end - at < len(values):
            values = values[at:end]
            headers = headers and headers[at:end]
        source = iter(values)
        jobs = map(
            Job,
            repeat(delivery.topic),
            source,
            count(delivery.first + at),
            repeat(delivery.origin),
            repeat(self.time),
            repeat(None) if headers is None else headers,
            repeat(delivery.attempt),
            repeat(delivery),
        )
        if not self.flawed:
            return jobs, source
        sound = iter([job for job in jobs if not isinstance(job.value, msgspec.ValidationError)])
        return sound, sound


def ranges_of(seqs: list[int]) -> list[tuple[int, int]]:
    """First and last of each run. Sorts them."""
    if len(seqs) == 1:
        return [(seqs[0], seqs[0])]
    if not seqs:
        return []
    seqs.sort()
    first = seqs[0]
    if seqs == list(range(first, first + len(seqs))):  # nearly always
        return [(first, seqs[-1])]
    ranges = []
    last = first
    for seq in seqs[1:]:
        if seq > last + 1:
            ranges.append((first, last))
            first = seq
        last = seq
    return [*ranges, (first, last)]
