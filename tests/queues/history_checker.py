"""Judges a history of queues: what was pushed, given to workers, done, and what became of the rest.

    report = check(load(folder.glob("*.jsonl")))
    report.raise_if_broken()

Words. A *message* is (queue, origin, seq). An *owner* is a node that gives out jobs: one life of a forwarder, or a
producer's node. It numbers its *deliveries* in the order in which it sends them, so that of two that were given to
workers by one owner it is known which was sent first, whenever they were begun. A message that a worker returned before
it had begun it was not given. The *place* of an owner is the role whose process it is: the forwarder's lives are one.
A message is *handled* when a worker had done it and was about to acknowledge it, or when its dead letter was given to a
worker.

When a delivery was sent is not recorded; but it was not before the message was pushed, nor before its worker joined,
nor before an earlier delivery of its owner was sent. The latest of these is its *sent after*.

What is a violation, and what it is called:

- **lost**: (a) a message was pushed, which was said to be on a forwarder's disk, and it never was handled; (b) a
  producer closed its node, and more of what it had pushed was never handled than it said remained.
- **shared**: one owner gave a message to two sessions of workers under one attempt, or twice to one, and the first
  had not returned it before the second was given it.
- **repeated**: one owner gave a message again, and there was no cause for it. A cause is, of the session that had it
  before, and before it was given again: it was about to say that the job had failed, or to return it; it was about to
  leave; its process was killed; or the lease may have run out, counted from when the delivery was sent after (of an
  extended one, also from when it was extended); or it and the owner had parted: one of them was stopped for as long as
  silent nodes are waited for, or noticed that the other was gone (which may have been written down late). There is no
  cause for which two places give out the same message.
- **redelivered**: a message was given after its ack was confirmed: by the owner that confirmed it, in a later delivery
  than the confirmed one, or by a later life of its place. Or in the same way after its dead letter was given by the
  owner that had written it (by a later life, if that one had time to write down that the message is dead).
- **attempts**: of one owner's deliveries of a message, a later one has a lower attempt; or a later life of a forwarder
  gave it with a lower one than an earlier life that had time to write it down. Or a message had more than five.
- **buried**: there is a dead letter of a message that no worker rejected, and that had not been tried five times.
- **unexpected**: a message was given, or is a dead letter, that nobody pushed.

What is pushed and is not known to be kept is nobody's fault when it is lost, as is what a producer without forwarder
had when it was killed. Which owner gives out a message, in which order, and how often it is done after it was given
again for good reason, is not judged. A fault of the test is a `HistoryError`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import StrEnum
from itertools import combinations, pairwise
from typing import NamedTuple

from tests.chaos.verdict import Broken, Report, Violation
from tests.queues.history import (
    Closed,
    Confirmed,
    Continued,
    Extending,
    Failing,
    Given,
    Handled,
    HistoryError,
    Job,
    Joining,
    Killed,
    Leaving,
    Letter,
    Line,
    Message,
    Met,
    Parted,
    Pushed,
    Pushing,
    Refused,
    Stopped,
)

ATTEMPTS_MAX = 5
DEAD_PREFIX = "$dead."
SECOND = 1_000_000_000
SILENT = 4 * SECOND  # a node that was stopped for so long may be taken for lost; 5 s is what nodes wait
TOLD_LATE = 10 * SECOND  # after which who has seen that somebody is gone has written it down
ROUNDED = SECOND // 1000  # off a lease, which is told in ms
WRITTEN = 2 * SECOND  # after which a forwarder has written down which attempt it is


class Kind(StrEnum):
    LOST = "lost"
    SHARED = "shared"
    REPEATED = "repeated"
    REDELIVERED = "redelivered"
    ATTEMPTS = "attempts"
    BURIED = "buried"
    UNEXPECTED = "unexpected"


class Place(NamedTuple):
    """Of an owner."""

    role: str
    life: int


class _Delivery:
    """A message in a worker's hands."""

    def __init__(self, event: Given, line: Line, session: _Session) -> None:
        self.event, self.line, self.session = event, line, session
        self.number = event.delivery
        self.sent_after = 0
        self.failing = self.returning = 0  # when
        self.handled = False

    def __str__(self) -> str:
        e = self.event
        return f"{e.message}, attempt {e.attempt} in delivery {e.delivery} of {e.owner:x}, to {e.session} ({self.line})"


class _Session:
    """One `pull`."""

    def __init__(self, event: Joining, process: str) -> None:
        self.name, self.process = event.session, process
        self.joined, self.lease = event.time_ns, int(event.lease * SECOND) - ROUNDED
        self.left = 0
        self.extended: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        """By owner and delivery: when, and for how long."""


class _Judge:
    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.counts: Counter[str] = Counter()
        self.pushing: dict[Message, int] = {}  # when
        self.pushed: dict[Message, Line] = {}
        self.closed: dict[int, tuple[int, Line]] = {}
        self.sessions: dict[str, _Session] = {}
        self.places: dict[int, Place] = {}
        self.given: dict[int, list[_Delivery]] = defaultdict(list)  # by owner
        self.jobs: dict[tuple[str, Job], _Delivery] = {}
        self.latest: dict[Job, _Delivery] = {}
        self.confirmed: dict[Message, list[_Delivery]] = defaultdict(list)
        self.letters: dict[Message, list[tuple[Letter, _Delivery]]] = defaultdict(list)
        self.rejected: set[Message] = set()
        self.handled: set[Message] = set()
        self.killed: dict[str, int] = {}
        self.stops: dict[str, list[tuple[int, int]]] = defaultdict(list)  # from, to
        self.partings: dict[tuple[str, str], list[int]] = defaultdict(list)

    def found(self, kind: Kind, what: str) -> None:
        self.violations.append(Violation(kind, what))

    # --- what happened, in order of time ----------------------------------------------------------------

    def follow(self, lines: list[Line]) -> None:
        for line in lines:
            event = line.event
            self.counts[type(event).__name__.lower()] += 1
            match event:
                case Pushing():
                    for seq in range(event.first, event.last + 1):
                        message = Message(event.queue, event.origin, seq)
                        if self.pushing.setdefault(message, event.time_ns) != event.time_ns:
                            raise HistoryError(f"{line}: {message} was pushed before")
                case Refused():
                    for seq in range(event.first, event.last + 1):
                        if self.pushing.pop(Message(event.queue, event.origin, seq), None) is None:
                            raise HistoryError(f"{line}: {event.queue} {seq} was never pushed")
                case Pushed():
                    for seq in range(event.first, event.last + 1):
                        message = Message(event.queue, event.origin, seq)
                        if message not in self.pushing:
                            raise HistoryError(f"{line}: {message} was never pushed")
                        self.pushed.setdefault(message, line)
                case Closed():
                    self.closed[event.origin] = event.remaining, line
                case Joining():
                    if event.session in self.sessions:
                        raise HistoryError(f"{line}: there was a session {event.session!r} before")
                    self.sessions[event.session] = _Session(event, line.file.removesuffix(".jsonl"))
                case Met():
                    role, _, life = event.process.rpartition("-")
                    self.places[event.owner] = Place(role, int(life))
                case Killed():
                    self.killed[event.process] = event.time_ns
                case Stopped():
                    self.stops[event.process].append((event.time_ns, 1 << 63))
                case Continued():
                    began, _ = self.stops[event.process].pop()
                    self.stops[event.process].append((began, event.time_ns))
                case Parted():
                    self.partings[event.process, event.peer].append(event.time_ns)
                case _:
                    self.work(event, line)

    def work(self, event: Given | Letter | Handled | Confirmed | Failing | Extending | Leaving, line: Line) -> None:
        """What a worker says."""
        if isinstance(event, Letter):
            if (delivery := self.latest.get(event.job)) is None:
                raise HistoryError(f"{line}: that letter was not given")
            self.letters[event.message].append((event, delivery))
            self.handled.add(event.message)
            if event.message not in self.pushing:
                self.found(Kind.UNEXPECTED, f"{line}: nobody pushed {event.message}, and there is a letter of it")
            return
        session = self.sessions.get(event.session)
        if session is None:
            raise HistoryError(f"{line}: {event.session!r} has not begun")
        match event:
            case Given():
                self.give(event, line, session)
            case Handled():
                for job in event.jobs:
                    self.had(session, job, line).handled = True
                    self.handled.add(Message(*job[2:]))
            case Confirmed():
                for job in event.jobs:
                    delivery = self.had(session, job, line)
                    if not delivery.handled:
                        raise HistoryError(f"{line}: {job} was not handled")
                    self.confirmed[Message(*job[2:])].append(delivery)
            case Failing():
                delivery = self.had(session, event.job, line)
                if event.how == "return":
                    delivery.returning = event.time_ns
                delivery.failing = event.time_ns
                if event.how == "reject":
                    self.rejected.add(delivery.event.message)
            case Extending():
                until = event.time_ns + int(event.seconds * SECOND)
                session.extended[event.owner, event.delivery].append((event.time_ns, until))
            case Leaving():
                session.left = event.time_ns

    def had(self, session: _Session, job: Job, line: Line) -> _Delivery:
        delivery = self.jobs.get((session.name, job))
        if delivery is None:
            raise HistoryError(f"{line}: {session.name} was not given {job}")
        return delivery

    def give(self, event: Given, line: Line, session: _Session) -> None:
        delivery = _Delivery(event, line, session)
        if (before := self.jobs.get((session.name, event.job))) is not None:
            self.found(Kind.SHARED, f"{delivery}; it had {before}")
            return
        self.jobs[session.name, event.job] = self.latest[event.job] = delivery
        self.given[event.owner].append(delivery)
        if event.message not in self.pushing and not event.queue.startswith(DEAD_PREFIX):
            self.found(Kind.UNEXPECTED, f"{line}: nobody pushed {event.message}, and {event.session} was given it")
        if event.attempt > ATTEMPTS_MAX and not event.queue.startswith(DEAD_PREFIX):
            self.found(Kind.ATTEMPTS, f"{delivery}: that is too often")

    # --- the verdict ---------------------------------------------------------------------------------------

    def conclude(self) -> None:
        histories: dict[Message, list[_Delivery]] = defaultdict(list)
        for deliveries in self.given.values():
            deliveries.sort(key=lambda delivery: delivery.number)
            latest = 0
            for delivery in deliveries:
                pushed = self.pushing.get(delivery.event.message, 0)
                latest = delivery.sent_after = max(latest, pushed, delivery.session.joined)
                histories[delivery.event.message].append(delivery)
        for message, all_of_it in histories.items():
            by_owner: dict[int, list[_Delivery]] = defaultdict(list)
            for delivery in all_of_it:
                by_owner[delivery.event.owner].append(delivery)
            for its in by_owner.values():
                for before, after in pairwise(its):
                    self.compare(before, after)
            for one, other in combinations(by_owner, 2):
                self.compare_owners(by_owner[one], by_owner[other])
            self.afterwards(message, all_of_it)
        for message, letters in self.letters.items():
            for letter, delivery in letters:
                if letter.attempts < ATTEMPTS_MAX and message not in self.rejected:
                    what = f"{message} is dead after {letter.attempts} attempts: {letter.reason}"
                    self.found(Kind.BURIED, f"{delivery}: {what}")
        self.find_lost()

    def compare(self, before: _Delivery, after: _Delivery) -> None:
        """Two deliveries of one message by one owner, of those that are known the one after the other."""
        self.counts["again"] += 1
        one, other = before.event.attempt, after.event.attempt
        if other < one:
            self.found(Kind.ATTEMPTS, f"{after}; before, it was {before}")
        returned = 0 < before.returning < after.event.time_ns
        if other == one and not returned:
            self.found(Kind.SHARED, f"{after}; it was {before}, and not returned")
        elif not self.cause(before, after):
            self.found(Kind.REPEATED, f"{after}; it was {before}, and there was no cause")

    def cause(self, before: _Delivery, after: _Delivery) -> str:
        """For which it was given again."""
        session, time = before.session, after.event.time_ns
        if 0 < before.failing < time:
            return self.because("failed")
        if 0 < session.left < time:
            return self.because("left")
        if self.killed.get(session.process, time) < time:
            return self.because("killed")
        if time - before.sent_after >= session.lease or any(
            until <= time for _, until in session.extended[before.event.owner, before.number]
        ):
            return self.because("expired")
        if self.parted(session.process, before.event.owner, before.sent_after, time):
            return self.because("parted")
        return ""

    def because(self, cause: str) -> str:
        self.counts[f"again because {cause}"] += 1
        return cause

    def parted(self, worker: str, owner: int, since: int, until: int) -> bool:
        """Whether a worker's process and an owner may have lost each other."""
        place = self.places.get(owner)
        process = f"{place.role}-{place.life:04}" if place is not None else ""
        for began, ended in (*self.stops[worker], *self.stops[process]):
            if ended >= since and began + SILENT <= min(until, ended):
                return True
        told = (*self.partings[worker, process], *self.partings[process, worker])
        return any(since <= time <= until + TOLD_LATE for time in told)

    def compare_owners(self, one: list[_Delivery], other: list[_Delivery]) -> None:
        """All deliveries of one message by two owners."""
        place_one, place_other = (self.places.get(its[0].event.owner) for its in (one, other))
        if place_one is None or place_other is None:  # nobody has lived long enough to say who that is
            self.counts["again by somebody"] += 1
            return
        (role_one, life_one), (role_other, life_other) = place_one, place_other
        if role_one != role_other or life_one == life_other:
            self.found(Kind.REPEATED, f"{other[0]}; and another owner gave {one[0]}")
            return
        self.counts["again because the owner started anew"] += 1
        earlier, later = (one, other) if life_one < life_other else (other, one)
        known = max((d.event.attempt for d in earlier if self.was_written(d)), default=0)
        for delivery in later:
            if delivery.event.attempt < known:
                self.found(Kind.ATTEMPTS, f"{delivery}; an earlier life of {role_one} was at {known}")

    def afterwards(self, message: Message, deliveries: list[_Delivery]) -> None:
        """Nothing is to be given when it is settled."""
        for end in self.confirmed.get(message, ()):
            for delivery in deliveries:
                if self.is_later(delivery, end):
                    self.found(Kind.REDELIVERED, f"{delivery}; it was confirmed as done: {end}")
        for _, end in self.letters.get(message, ()):
            if end.event.origin != end.event.owner:  # written by an earlier life, which may have come no further
                continue
            for delivery in deliveries:
                if self.is_later(delivery, end) and (delivery.event.owner == end.event.owner or self.was_written(end)):
                    self.found(Kind.REDELIVERED, f"{delivery}; it was dead: {end}")

    def is_later(self, delivery: _Delivery, end: _Delivery) -> bool:
        """Whether it was sent after the other one, by the same place."""
        one, other = delivery.event.owner, end.event.owner
        if one == other:
            return delivery.number > end.number
        mine, its = self.places.get(one), self.places.get(other)
        return mine is not None and its is not None and mine.role == its.role and mine.life > its.life

    def was_written(self, delivery: _Delivery) -> bool:
        """Whether its owner had the time to write down what had happened before it."""
        if (place := self.places.get(delivery.event.owner)) is None:
            return False
        process = f"{place.role}-{place.life:04}"
        ends = [self.killed.get(process, 1 << 63)]
        ends += [began for began, ended in self.stops[process] if ended > delivery.event.time_ns]
        return delivery.event.time_ns + WRITTEN < min(ends)

    def find_lost(self) -> None:
        for message, line in self.pushed.items():
            if message not in self.handled:
                self.found(Kind.LOST, f"{line}: {message} was on a forwarder's disk, and was never handled")
        pushed_by: dict[int, list[Message]] = defaultdict(list)
        for message in self.pushing:
            pushed_by[message.origin].append(message)
        for origin, (remaining, line) in self.closed.items():
            lacking = [message for message in pushed_by[origin] if message not in self.handled]
            if len(lacking) > remaining:
                some = ", ".join(map(str, lacking[:3]))
                what = f"{len(lacking)} messages were never handled, and {remaining} remained"
                self.found(Kind.LOST, f"{line}: {what}: {some}")


def check(lines: Iterable[Line]) -> Report:
    """Judge a whole history, in order of time as `load` returns it.

    Beside events, the report counts messages given `again`, and why.
    """
    judge = _Judge()
    judge.follow(list(lines))
    judge.conclude()
    return Report(judge.violations, judge.counts)


__all__ = ["Broken", "HistoryError", "Kind", "Report", "Violation", "check"]
