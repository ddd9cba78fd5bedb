"""The consumer's end of a subscription to the log: LOGs in, messages out, and how far they have been dealt with.

A message's way in: the engine's thread puts a LOG into `queue`; whoever consumes takes it out, and one C call makes a
batch of it into messages, of which the first is returned and the others are `items`. The lock of `bell` is held by
whoever takes, for one batch; the engine needs it only to wake a sleeper.

**What has been dealt with.** A message has been when its consumer asks for the next one. A consumer is known by a token
(its thread, or its task). As long as there is only one, it is the `owner`, takes from `items` without a word, and what
it has in hand is simply the last message taken. From the moment another one asks they share: `items` yields nothing
more, each message is taken under the lock, and noted as held by who took it. Nothing that somebody holds is ever
committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from itertools import count, repeat
from operator import length_hint
from sys import maxsize
from threading import Condition
from typing import Any, NamedTuple, Protocol

import msgspec

from zmqbus.errors import GapError, LogGapError, NodeClosed, RemoteProtocolError
from zmqbus.node.events import CaughtUp, Event, LogGap
from zmqbus.node.receiving.decoding import Checked, Unpacker
from zmqbus.protocol.commands import Log
from zmqbus.protocol.frames import DATA, EXTERNAL, HEADER_BYTES, ORDER, QUEUED, Batch, parse_header
from zmqbus.protocol.message import Message
from zmqbus.protocol.starts import Start
from zmqbus.protocol.streams.merging import Merging, Met, Span
from zmqbus.protocol.streams.reading import Reading
from zmqbus.protocol.streams.stream import Gap

GAPS_KEPT = 1000  # for a report at the end; the count of lost messages goes on
DROPPED = -1  # as the size of a batch: there is none, the offsets are no more

NO_STREAM = Met("", (b"", 0), 0, 0, 0), b"\0", maxsize  # no frame is that long


class Position(NamedTuple):
    """How far a subscription is in one forwarder's log. Offsets are those of its journal."""

    forwarder: str
    journal: int
    begin: int
    """Where it began."""
    next: int
    """Behind what was handed out."""
    dealt: int
    """Before this offset everything has been dealt with: what is committed, or soon will be."""
    end: int
    """Of the journal, as last heard."""


class Driver(Protocol):
    """What a replay needs of its node. Called from the consumer's thread."""

    def emit(self, event: Event) -> None:
        """Something happened."""

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""

    def grant(self, reading: Reading) -> None:
        """So much of a reading has been consumed that its forwarder should hear of it. On the engine's loop, soon."""


class Piece:
    """A LOG that came. What lies before offset `floor` is not wanted."""

    __slots__ = ("floor", "log", "part", "reading")

    def __init__(self, reading: Reading, log: Log, part: bytes, floor: int) -> None:
        self.reading, self.log, self.part, self.floor = reading, log, part, floor

    @property
    def is_news(self) -> bool:
        """Whether it only says how far things are."""
        return not self.part and not self.log.dropped


NO_PIECE = Piece(Reading(0, (), "", Start(0), 0, 0, True), Log(0, 0, 0, 0), b"", 0)
NOBODY = object()  # the owner, once several consumers share


class Replay:
    """One subscription's messages out of the log. Unless said otherwise, call with the lock of `bell` held."""

    def __init__(
        self,
        patterns: list[str],
        driver: Driver,
        *,
        value_type: Any,
        raise_gaps: bool,
        wake: Callable[[], None] | None,
        abandoned: Callable[[Hashable], bool],
    ) -> None:
        """`wake`: to be called when there is something to do; None: its consumers sleep on `bell`.

        `abandoned`: whether a consumer has gone and what it holds is nobody's.
        """
        self.patterns = patterns
        self.readings: list[Reading] = []
        """One for each journal. The engine's to extend."""
        self.queue: deque[Piece | Exception] = deque()
        self.items: Iterator[Message] = iter(())
        """For the owner, without the lock: the rest of the batch it is at."""
        self.owner: Hashable | None = None
        self.closed: Exception | None = None
        """Why there is no more."""
        self.bell = Condition()
        self.merging = Merging()
        self.gaps: deque[Gap] = deque(maxlen=GAPS_KEPT)
        self.lost = self.messages = 0
        self._driver = driver
        self._wake = wake
        self._abandoned = abandoned
        self._asleep = 0
        self._unpacker = Unpacker(value_type)
        self._raises = raise_gaps
        self._errors: deque[GapError] = deque()  # to be raised, each in its place
        self._shared = False
        self._holds: dict[Hashable, tuple[Reading, int]] = {}  # by consumer: the offset it is at work on
        # The LOG, and in it the batch, that is being handed out; offsets from `_begin` to before `_end`.
        self._piece = NO_PIECE
        self._entries: Iterator[tuple[int, int, int]] = iter(())
        self._at = 0
        self._messages: Iterator[Message] = iter(())
        self._source: Iterator[Any] | None = None
        self._begin = self._end = 0
        self._dealt = -1  # before this offset even the owner's last message has been dealt with
        self._rest: deque[tuple[Met, Batch, int, Span]] = deque()  # parts of a batch that lie apart
        self._stream, self._head, self._body = NO_STREAM

    # --- the engine's side: without the lock -------------------------------------------------------

    def put(self, piece: Piece) -> None:
        """A LOG came."""
        if piece.is_news and self.queue:
            with self.bell:  # a consumer that is away needs to hear that once
                for last in reversed(self.queue):
                    if isinstance(last, Exception) or not last.is_news:
                        break
                    if last.reading is piece.reading:
                        last.log = piece.log
                        return
        self.queue.append(piece)
        self.wake()

    def fail(self, error: Exception) -> None:
        """When what came has been consumed, there is no more."""
        self.queue.append(error)
        self.wake()

    def wake(self) -> None:
        """Have sleepers look. Also after `stop`."""
        if self._wake is not None:
            self._wake()
        elif self._asleep:
            with self.bell:
                self.bell.notify_all()

    def stop(self, reason: Exception) -> None:
        """There is no more, now. After NodeClosed not even of the batch that is decoded; else the rest of that."""
        with self.bell:
            if isinstance(reason, NodeClosed):
                self.items = self._messages = iter(())  # `_source` still says how far they were handed out
                self._rest.clear()
            if self.closed is None or isinstance(reason, NodeClosed):
                self.closed = reason
                self.queue.clear()
        self.wake()

    def forked(self, reason: Exception) -> None:
        """In a forked child: it is all the parent's."""
        self.bell = Condition()  # the old one may be held by a thread that is not here
        self.items = iter(())
        self.closed = reason

    # --- how far things are ------------------------------------------------------------------------

    @property
    def lag(self) -> int | None:
        """Offsets between what was handed out and the ends of the journals, as last told; None: not known. No lock."""
        known = [reading for reading in self.readings if reading.next is not None]
        return sum(max(0, r.end - self._position(r)) for r in known) if known else None

    @property
    def positions(self) -> list[Position]:
        """The same for each journal that has told. Takes the lock itself."""
        with self.bell:
            known = [reading for reading in self.readings if reading.next is not None]
            return [Position(r.name, r.journal, r.begin, self._position(r), self.dealt_with(r), r.end) for r in known]

    def dealt_with(self, reading: Reading) -> int:
        """The offset before which everything has been dealt with: what may be committed."""
        at = self._position(reading)
        if self._source is not None and not self._shared and self._piece.reading is reading and at > self._dealt:
            at = max(self._begin, at - 1)
        return min([at, *(held for whose, held in self._holds.values() if whose is reading)])

    def release(self, token: Hashable) -> None:
        """This consumer has dealt with what it was handed."""
        self._holds = {t: held for t, held in self._holds.items() if t is not token and not self._abandoned(t)}
        if self.owner is token or self._abandoned(self.owner):
            self._dealt = self._position(self._piece.reading)

    def _position(self, reading: Reading) -> int:
        """Before this offset everything was handed out."""
        if self._source is not None and self._piece.reading is reading:
            return self._end - length_hint(self._source)
        return reading.passed

    # --- the consumer's side -----------------------------------------------------------------------

    def take(self, token: Hashable) -> Message | None:
        """The next message; if the consumer is the owner, the others of its batch are `items` then. None: there is
        none now, or no more (see `closed`).

        Raises:
            GapError: messages are lost, and the subscription is to raise then.
            DecodeError: the next value does not fit the type.
        """
        self._asked_by(token)
        while True:
            if self._errors:
                raise self._errors.popleft()
            if self._source is not None:
                if self._shared:
                    # Noted before it is taken: a value that does not fit its type raises.
                    self._holds[token] = self._piece.reading, self._end - length_hint(self._source)
                for message in self._messages:
                    return message
                self._holds.pop(token, None)
                if isinstance(self.closed, NodeClosed):
                    return None
                self._source = None
                self._piece.reading.passed = max(self._piece.reading.passed, self._end)
            if self.closed is not None or not (self._rest_of_batch() or self._next_batch()):
                return None

    def sleep(self, timeout: float | None) -> None:
        """Wait until there may be something to take. Lets go of the lock meanwhile."""
        self._asleep += 1  # before looking: what comes later wakes us
        try:
            if not self.queue and self.closed is None:
                self.bell.wait(timeout)
        finally:
            self._asleep -= 1

    def _asked_by(self, token: Hashable) -> None:
        """A consumer asks for more: what it was handed before has been dealt with."""
        if self.owner is None:
            self.owner = token
        elif not self._shared and self.owner is not token:
            if self._abandoned(self.owner):
                self.owner = token
            else:
                if self._source is not None:
                    self._recall()
                    reading = self._piece.reading
                    if (held := self.dealt_with(reading)) < self._position(reading):
                        self._holds[self.owner] = reading, held
                self._shared = True
                self.owner = NOBODY
                self.items = iter(())
        if self._shared and self._holds:
            self.release(token)

    # --- inside ------------------------------------------------------------------------------------

    def _recall(self) -> None:
        """Take back the rest of the batch from the owner, who may be in the middle of `items`: it is to ask as well."""
        if isinstance(self._source, Checked):
            self._messages = self._source = self._source.move()
        else:
            self._messages = self._source = iter(list(self._messages))

    def _next_batch(self) -> bool:
        """Go to the next batch with something new in it. False: there is none now."""
        while True:
            piece = self._piece
            blob, reading = piece.part, piece.reading
            view = memoryview(blob)
            for offset, size, external in self._entries:
                at = self._at
                body = at + self._body
                # The same stream as before, in its order, from the same journal: nearly always.
                if offset >= piece.floor and blob.startswith(self._head, at) and size > self._body and not external:
                    number, origin, first, time_ns = ORDER.unpack_from(blob, body - ORDER.size)
                    stream = self._stream
                    if first == stream.next and origin == stream.key[1] and stream.journal == reading.journal:
                        try:
                            values = self._unpacker.plain(view[body : at + size])
                        except (msgspec.MsgspecError, ValueError, RecursionError):
                            values = []
                        if len(values) == number and number:
                            self._at = at + size
                            stream.next = first + number
                            source = iter(values)
                            messages = map(
                                Message,
                                repeat(stream.topic),
                                source,
                                count(first),
                                repeat(origin),
                                repeat(time_ns / 1e9),
                                repeat(None),
                                count(offset),
                            )
                            self._begin_batch(messages, source, offset, offset + number)
                            return True
                if size == DROPPED:
                    self._dropped(reading, max(offset, piece.floor), external)
                else:
                    self._at = at + size + external
                    self._examine(blob[at : at + size], blob[at + size : self._at], offset)
                if self._errors or self._rest_of_batch():
                    return True
            if not self._finish() and not self._begin_piece():
                return False

    def _begin_batch(self, messages: Iterator[Message], source: Iterator[Any], begin: int, end: int) -> None:
        self.messages += end - begin
        self._messages, self._source, self._begin, self._end, self._dealt = messages, source, begin, end, -1
        if not self._shared:
            self.items = messages

    def _begin_piece(self) -> bool:
        """Take the next LOG out of the queue. False: there is none."""
        if not self.queue:
            return False
        piece = self.queue.popleft()
        if isinstance(piece, Exception):
            self.closed = piece
            self.queue.clear()
            return False
        self._piece, self._at = piece, 0
        entries = piece.log.batches
        if piece.log.dropped:
            entries = sorted([*entries, *((first, DROPPED, last) for first, last in piece.log.dropped)])
        self._entries = iter(entries)
        return True

    def _finish(self) -> bool:
        """The LOG has been handed out. False: that was so before."""
        piece = self._piece
        if piece is NO_PIECE:
            return False
        self._piece, self._entries = NO_PIECE, iter(())
        reading, log = piece.reading, piece.log
        caught_up, wants = reading.consumed(log, len(piece.part))
        if log.next >= reading.end:
            self.merging.caught_up(reading.journal)
            self._report()
        if caught_up:
            self._driver.emit(CaughtUp(reading.name, reading.journal, log.next))
        if wants:
            self._driver.grant(reading)
        return True

    def _examine(self, frame: bytes, external: bytes, offset: int) -> None:
        """Any batch: what of it is new goes to `_rest`."""
        piece = self._piece
        try:
            cut, kind, flags, size, origin, first, time_ns = parse_header(frame)
            if kind != DATA or bool(flags & EXTERNAL) != bool(external):
                raise RemoteProtocolError(f"LOG: a frame of kind {kind} that cannot be in it, at offset {offset}")
            skip = min(max(piece.floor - offset, 0), size)
            if skip == size:
                return
            topic = frame[:cut]
            stream, fresh = self.merging.observe(piece.reading.journal, topic, origin, first + skip, first + size)
        except (RemoteProtocolError, UnicodeDecodeError) as error:
            broken = error if isinstance(error, RemoteProtocolError) else RemoteProtocolError(f"LOG: {error}")
            self._driver.garbage(broken)
            self._dropped(piece.reading, offset, offset)
            return
        self._report()
        batch = Batch(topic, flags, size, origin, first, time_ns, (frame, external) if external else (frame,))
        self._rest.extend((stream, batch, offset, span) for span in fresh)
        if not flags & ~QUEUED:
            self._stream, self._head, self._body = stream, frame[: cut + 5], cut + 1 + HEADER_BYTES

    def _rest_of_batch(self) -> bool:
        """Go to the next part of the batch that was examined. False: there is none."""
        while self._rest:
            stream, batch, offset, (first, end) = self._rest.popleft()
            skip, stop = first - batch.first, end - batch.first
            try:
                messages, source = self._unpacker.unpack(
                    stream.topic, batch, skip, stop if end < batch.end else None, offset
                )
            except RemoteProtocolError as error:
                self._driver.garbage(error)
                self._lost(Gap(stream.topic, batch.origin, first, end - 1))
            else:
                self._begin_batch(messages, source, offset + skip, offset + stop)
                return True
        return False

    def _dropped(self, reading: Reading, first: int, last: int) -> None:
        """These offsets are no more."""
        if last < first:
            return
        self.merging.excuse(reading.journal)
        self.lost += last - first + 1
        self._driver.emit(LogGap(reading.name, reading.journal, first, last))
        if self._raises:
            self._errors.append(LogGapError(reading.name, reading.journal, first, last))

    def _report(self) -> None:
        if self.merging.lost:
            gaps, self.merging.lost = self.merging.lost, []
            for gap in gaps:
                self._lost(gap)

    def _lost(self, gap: Gap) -> None:
        self.lost += gap.count
        self.gaps.append(gap)
        self._driver.emit(gap)
        if self._raises:
            self._errors.append(GapError(gap.topic, gap.origin, gap.first, gap.last))

    def state(self) -> str:
        """For people."""
        lag = self.lag
        return (
            f"{self.messages} read, {self.lost} lost, {'lag unknown' if lag is None else f'{lag} behind'}"
            f"{', closed' if self.closed is not None else ''}"
        )
