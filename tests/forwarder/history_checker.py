"""Judges a history of durable messaging: what was sent, acknowledged, stored, delivered and committed.

    report = check(load(folder.glob("*.jsonl")))
    report.raise_if_broken()

Words. A *message* is (topic, origin, seq). A *stream* is (topic, origin). The *journal* is all `journaled` lines: one
forwarder's log at the end of the run, from offset 0 on (a history with retention, or of two forwarders, must be
brought into this form first). *Stored* means in the journal. A consumer's *session* begins with `opened`. A
consumer's *reach* is the highest of: its confirmed cursors, and one more than the highest offset it was given. Its
*first offset* is the smallest `start` of its sessions. It *wants* a topic that a pattern of its first session matches.

What is a violation, and what it is called:

- **lost**: (a) a message was acked and is not stored; (b) a message is stored at an offset from a consumer's first
  offset on and below its reach, on a topic it wants, and it never was consumed by it; (c) a message was consumed and
  is not stored, which means that it was shown before it was on disk.
- **unexpected**: a message was stored or consumed, and nobody sent it; or its value is not the one that was sent;
  or a consumer was given a topic that it does not want.
- **duplicated**: a message is stored at two offsets.
- **out of order**: (a) in the journal, a message of a stream follows one with a higher seq; (b) a consumer was given
  a message for the first time after it had been given a later one of the same stream. Repeats do not count: of a
  message stored twice, or delivered again, only the first occurrence has a place in the order.
- **offset reused**: one offset stood for two different messages, in whatever was seen of it by the journal or by any
  consumer at any time.
- **redelivered**: a consumer was given an offset below a cursor whose commit had been confirmed before the session
  of that delivery began. Deliveries from the cursor on may be repeated as often as need be (at least once); so may
  those below a cursor that was not confirmed, or was confirmed during the session.
- **hole**: a seq is missing from the journal between two stored ones of its stream, whether it was acked or not: a
  later one must not be accepted before it.
- **invented ack**: a message was acked or committed that cannot have been: an ack for what was never sent, or a
  cursor beyond the end of the journal.

A message that was sent and neither acked nor stored is nobody's fault, as is one that `failed` and yet is stored.
One fault may break several rules, and is then reported under each of them. What no system under test could do (two
values sent under one id, a delivery outside of any session) is a fault of the test: `HistoryError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from history import (
    Acked,
    Committed,
    Consumed,
    HistoryError,
    Journaled,
    Line,
    Opened,
    Sent,
)

from tests.chaos.verdict import Broken, Report, Violation
from zmqbus.protocol.topics import Matcher


class Kind(StrEnum):
    LOST = "lost"
    UNEXPECTED = "unexpected"
    DUPLICATED = "duplicated"
    OUT_OF_ORDER = "out of order"
    OFFSET_REUSED = "offset reused"
    REDELIVERED = "redelivered"
    HOLE = "hole"
    INVENTED_ACK = "invented ack"


class Message(NamedTuple):
    topic: str
    origin: int
    seq: int

    def __str__(self) -> str:
        return f"{self.topic} {self.origin:x}#{self.seq}"


Stream = tuple[str, int]


class _Session:
    """From an `opened` to the next one of the same consumer in the same file."""

    def __init__(self, event: Opened, confirmed: int) -> None:
        self.patterns = event.patterns
        self.start = event.start
        self.confirmed = confirmed
        """The highest cursor that was confirmed before it began."""


class _Consumer:
    """All that one durable name was given, in the order of time, by however many processes."""

    def __init__(self, name: str, first: Opened) -> None:
        self.name = name
        self.patterns = first.patterns
        self._matcher = Matcher(first.patterns)
        self._wanted: dict[str, bool] = {}
        self.first_offset = first.start
        self.cursor = 0
        self.reach = 0
        self.given: set[Message] = set()
        self.last: dict[Stream, int] = {}

    def wants(self, topic: str) -> bool:
        if topic not in self._wanted:
            self._wanted[topic] = self._matcher.matches(topic)
        return self._wanted[topic]


class _Judge:
    """Goes through the lines once, in order of time, and then asks what is missing."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.counts: Counter[str] = Counter()
        self.sent: dict[Message, str] = {}
        self.acked: dict[Message, Line] = {}
        self.acked_to: dict[Stream, int] = {}  # from 1 to here all of a stream is in `acked`
        self.stored: dict[Message, int] = {}
        self.meaning: dict[int, Message] = {}
        self.end = 0
        self.consumers: dict[str, _Consumer] = {}
        self.sessions: dict[tuple[str, str], _Session] = {}

    def found(self, kind: Kind, what: str) -> None:
        self.violations.append(Violation(kind, what))

    # --- what was sent and stored: known before anything is judged -----------------------------------

    def learn(self, lines: list[Line]) -> None:
        journaled: list[tuple[Journaled, Line]] = []
        for line in lines:
            event = line.event
            self.counts[type(event).__name__.lower()] += 1
            if isinstance(event, Sent):
                message = Message(event.topic, event.origin, event.seq)
                if self.sent.setdefault(message, event.value) != event.value:
                    raise HistoryError(f"{line}: {message} was sent with another value before")
            elif isinstance(event, Journaled):
                journaled.append((event, line))
        journaled.sort(key=lambda item: item[0].offset)
        last: dict[Stream, int] = {}
        for event, line in journaled:
            message = Message(event.topic, event.origin, event.seq)
            self.end = event.offset + 1
            self.means(event.offset, message, line)
            self.expects(message, event.value, line)
            if message in self.stored:
                self.found(
                    Kind.DUPLICATED, f"{line}: {message} is stored at {self.stored[message]} and at {event.offset}"
                )
                continue
            self.stored[message] = event.offset
            stream = message[:2]
            if event.seq < last.get(stream, 0):
                self.found(Kind.OUT_OF_ORDER, f"{line}: {message} is stored after #{last[stream]}")
            last[stream] = max(event.seq, last.get(stream, 0))

    def means(self, offset: int, message: Message, line: Line) -> None:
        """An offset was seen to stand for a message."""
        if (before := self.meaning.setdefault(offset, message)) != message:
            self.found(Kind.OFFSET_REUSED, f"{line}: offset {offset} is {message}, and elsewhere {before}")

    def expects(self, message: Message, value: str, line: Line) -> None:
        """A message was seen with a value."""
        if message not in self.sent:
            self.found(Kind.UNEXPECTED, f"{line}: nobody sent {message}")
        elif self.sent[message] != value:
            self.found(Kind.UNEXPECTED, f"{line}: {message} was sent as {self.sent[message]}, and here is {value}")

    # --- what happened, in order of time ----------------------------------------------------------------

    def follow(self, lines: list[Line]) -> None:
        for line in lines:
            event = line.event
            if isinstance(event, Acked):
                self.acknowledge(event, line)
            elif isinstance(event, Opened):
                consumer = self.consumers.setdefault(event.consumer, _Consumer(event.consumer, event))
                if consumer.patterns != event.patterns:
                    raise HistoryError(f"{line}: {event.consumer!r} had patterns {consumer.patterns} before")
                consumer.first_offset = min(consumer.first_offset, event.start)
                self.sessions[line.file, event.consumer] = _Session(event, consumer.cursor)
            elif isinstance(event, Consumed):
                self.consume(event, line)
            elif isinstance(event, Committed):
                self.session_of(event, line)
                consumer = self.consumers[event.consumer]
                consumer.cursor = max(consumer.cursor, event.offset)
                consumer.reach = max(consumer.reach, event.offset)
                if event.offset > self.end:
                    what = f"{line}: {event.consumer!r} committed {event.offset}, the journal ends at {self.end}"
                    self.found(Kind.INVENTED_ACK, what)

    def acknowledge(self, event: Acked, line: Line) -> None:
        """Note what is new in it: acks are often cumulative, and to look at 1..n each time would never end."""
        stream = event.topic, event.origin
        first = event.seq if event.first is None else event.first
        if first > event.seq:
            raise HistoryError(f"{line}: the range {first}..{event.seq} is empty")
        known = self.acked_to.get(stream, 0)
        if first <= known + 1:
            first = known + 1
            self.acked_to[stream] = max(known, event.seq)
        for seq in range(first, event.seq + 1):
            self.acked.setdefault(Message(*stream, seq), line)

    def session_of(self, event: Consumed | Committed, line: Line) -> _Session:
        session = self.sessions.get((line.file, event.consumer))
        if session is None:
            raise HistoryError(f"{line}: {event.consumer!r} has not opened a session in this file")
        return session

    def consume(self, event: Consumed, line: Line) -> None:
        session = self.session_of(event, line)
        consumer = self.consumers[event.consumer]
        message = Message(event.topic, event.origin, event.seq)
        self.means(event.offset, message, line)
        self.expects(message, event.value, line)
        if not consumer.wants(event.topic):
            self.found(Kind.UNEXPECTED, f"{line}: {consumer.name!r} did not ask for {message}")
        if event.offset < session.confirmed:
            what = f"{consumer.name!r} was given offset {event.offset}; its cursor was at {session.confirmed}"
            self.found(Kind.REDELIVERED, f"{line}: {what}")
        if message not in self.stored:
            self.found(Kind.LOST, f"{line}: {consumer.name!r} was given {message}, which is not in the journal")
        consumer.reach = max(consumer.reach, event.offset + 1)
        if message in consumer.given:
            self.counts["redeliveries"] += 1
            return
        consumer.given.add(message)
        stream = message[:2]
        if event.seq < consumer.last.get(stream, 0):
            what = f"{consumer.name!r} was given {message} after #{consumer.last[stream]}"
            self.found(Kind.OUT_OF_ORDER, f"{line}: {what}")
        consumer.last[stream] = max(event.seq, consumer.last.get(stream, 0))

    # --- what is missing ----------------------------------------------------------------------------------

    def conclude(self) -> None:
        for message, line in self.acked.items():
            if message not in self.sent:
                self.found(Kind.INVENTED_ACK, f"{line}: {message} was acked, but never sent")
            if message not in self.stored:
                self.found(Kind.LOST, f"{line}: {message} was acked, and is not in the journal")
        for consumer in self.consumers.values():
            for message, offset in self.stored.items():
                if consumer.first_offset <= offset < consumer.reach and message not in consumer.given:
                    if not consumer.wants(message.topic):
                        continue
                    what = f"{consumer.name!r} got as far as {consumer.reach}, and never was given {message}"
                    self.found(Kind.LOST, f"{what} at offset {offset}")
        streams: dict[Stream, list[int]] = {}
        for topic, origin, seq in self.stored:
            streams.setdefault((topic, origin), []).append(seq)
        for stream, seqs in streams.items():
            seqs.sort()
            for before, after in pairwise(seqs):
                if after != before + 1:
                    acked = sum(Message(*stream, seq) in self.acked for seq in range(before + 1, after))
                    what = f"{Message(*stream, before)} is followed by #{after} in the journal"
                    self.found(Kind.HOLE, f"{what}; of those between, {acked} were acked")


def check(lines: Iterable[Line]) -> Report:
    """Judge a whole history, in order of time as `load` returns it."""
    lines = list(lines)
    judge = _Judge()
    judge.learn(lines)
    judge.follow(lines)
    judge.conclude()
    return Report(judge.violations, judge.counts)


__all__ = ["Broken", "HistoryError", "Kind", "Report", "Violation", "check"]
