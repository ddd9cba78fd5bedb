"""The forwarder's subscription: batches off the socket, in order and once, into the journal. Nothing is decoded.

A gap ends in a repair or in an exact `Gap`, as for every subscriber; only then a later batch is accepted behind it.
What is pushed is accepted when its queue is known, which is somebody else's business: until then nothing is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from zmqbus.errors import RemoteProtocolError
from zmqbus.forwarder.queues.tail import Tail
from zmqbus.journal import Appended, Journal
from zmqbus.node.receiving.feed import Feed
from zmqbus.node.receiving.intake import NO_STREAM, Driver, Intake
from zmqbus.protocol.frames import HEADER_BYTES, QUEUED, Batch
from zmqbus.protocol.message import Message
from zmqbus.protocol.streams.stream import Gap, Stream
from zmqbus.protocol.streams.tracking import Tracker

# Appended and not yet written: beyond that the socket is left alone. Enough to keep a disk busy that takes 10 ms to
# sync, and so little that memory is used again while a cache has it: with 32 MiB it is 20 MiB more, and no faster.
UNWRITTEN_BYTES_MAX = 4 * 1024 * 1024
TURN_BATCHES = 64  # taken before other work has its turn
EVERYTHING = 2**62  # as history: all that publishers still have

ENOUGH = Message("", None, 0, 0, 0.0)  # for `take`, which looks for more until it has a message


class JournalTracker(Tracker):
    """Tracks what is journaled, from where the journal has it; and notices when an acknowledgement is due again."""

    def __init__(
        self,
        patterns: Iterable[str],
        sources: Callable[[str, int], Sequence[int]],
        journal: Journal,
        due: Callable[[bytes, int, int], None],
    ) -> None:
        """`due`: everything up to this seq of a stream is on disk, and its publisher may not have heard of it."""
        super().__init__(patterns, sources, history=EVERYTHING, resume=journal.expected, patient=True)
        self._journal = journal
        self._due = due

    def observe_head(self, topic: bytes, origin: int, following: int, now: float) -> None:
        super().observe_head(topic, origin, following, now)
        if self._journal.head(topic, origin).durable >= following - 1:  # else it will hear of it
            self._due(topic, origin, following - 1)

    def heads(self, origin: int, heads: Iterable[tuple[bytes, int]], more: bool, now: float) -> None:
        heads = list(heads)
        super().heads(origin, heads, more, now)
        for topic, _ in heads:
            if (durable := self._journal.head(topic, origin).durable) > 0:
                self._due(topic, origin, durable)


class Ingest(Intake):
    """`take` appends to the journal what there is, and returns None when that is all."""

    def __init__(
        self,
        number: int,
        patterns: Sequence[str],
        feed: Feed,
        driver: Driver,
        tracker: Tracker,
        journal: Journal,
        tail: Tail,
    ) -> None:
        super().__init__(number, patterns, feed, driver, tracker, source="trail")
        self.unknown: bytes | None = None
        """A topic that something was pushed on, and that is no queue yet. It is to be made one, or to be refused."""
        self._unknown: tuple[Stream, Batch] | None = None  # what was
        self._refused: set[bytes] = set()
        self._journal = journal
        self._tail = tail
        self.taken = 0
        """Batches that the last `take` appended."""
        self.has_more = False
        """Whether it left some, because others shall have their turn."""
        self.asked = False
        """Somebody waits for an acknowledgement. To be reset by who has seen to it."""
        self._holes: dict[tuple[bytes, int], int] = {}  # one past what was declared lost, for the next batch

    def take(self, patience_ms: int) -> Message | None:
        """Append what is there. Raises NoSpace, JournalFailed."""
        self.taken = 0
        enough = super().take(patience_ms)
        self.has_more = enough is not None
        return enough

    def met(self, refused: bool = False) -> None:
        """The unknown topic is a queue now. `refused`: it cannot be one, so that nothing of it is accepted."""
        assert self._unknown is not None
        stream, batch = self._unknown
        self.unknown = self._unknown = None
        if refused:
            self._refused.add(batch.topic)
        else:
            self._append(stream, batch)

    def distrust(self) -> None:
        """Queues may be unknown that were known."""
        self._stream, self._head, self._body = NO_STREAM

    @property
    def is_behind(self) -> bool:
        """Whether the disk has to catch up first."""
        return self._journal.buffered_bytes > UNWRITTEN_BYTES_MAX

    def _on_asked(self) -> None:
        self.asked = True

    def _decode(self, stream: Stream, frame: bytes, size: int, first: int, time_ns: int) -> Message | None:
        payload = memoryview(frame)[self._body - HEADER_BYTES :]
        topic, origin = stream.key
        if size >= len(payload) - HEADER_BYTES:  # as in `parse_header`: nobody else looks at what is journaled verbatim
            stream.next = stream.target = first
            self._driver.garbage(
                RemoteProtocolError(f"{stream.topic}: {size} values cannot be in {len(payload)} bytes")
            )
            return None
        try:
            appended: Appended | None = self._journal.append(topic, origin, first, size, time_ns, payload)
        except ValueError:
            appended = None
        if appended is not Appended.ACCEPTED:
            self._append(stream, Batch(topic, self._flags, size, origin, first, time_ns, (frame,)))
        elif self._tail.watched:
            self._tell(Batch(topic, self._flags, size, origin, first, time_ns, (frame,)))
        return self._accepted(size)

    @property
    def _flags(self) -> int:
        """Of the frames that `_decode` is for."""
        return int.from_bytes(self._head[-2:], "little")

    def _tell(self, batch: Batch) -> None:
        """It was appended."""
        if self._tail.add(self._journal.next_offset - batch.count, batch):
            self.asked = True  # workers are waiting

    def _decode_batch(self, topic: str, batch: Batch, skip: int) -> Message | None:
        stream = self.tracker.streams[batch.topic, batch.origin]
        assert stream is not None
        if batch.flags & QUEUED and batch.topic not in self._tail.queues:
            self.distrust()  # so that what follows comes by here as well
            if batch.topic in self._refused:
                return self._accepted(0)
            self.unknown, self._unknown = batch.topic, (stream, batch)
            return ENOUGH
        self._append(stream, batch)
        return self._accepted(batch.count)

    def _accepted(self, count: int) -> Message | None:
        self.messages += count
        self.taken += 1
        return None if self.taken < TURN_BATCHES and not self.is_behind else ENOUGH

    def _append(self, stream: Stream, batch: Batch, allow_gap: bool = False) -> None:
        frame, *external = batch.parts
        payload = memoryview(frame)[len(batch.topic) + 1 :]
        topic, origin, first, count, time_ns = batch.topic, batch.origin, batch.first, batch.count, batch.time_ns
        try:
            appended = self._journal.append(
                topic, origin, first, count, time_ns, payload, *external, allow_gap=allow_gap
            )
        except ValueError as error:  # no journal counts that far
            self._driver.garbage(RemoteProtocolError(f"{stream.topic}: {error}"))
            self._lost(Gap(stream.topic, origin, first, batch.end - 1))
            return
        if appended is Appended.ACCEPTED:
            if self._tail.watched:
                self._tell(batch)
        elif appended is Appended.GAP:
            if self._journal.full is not None:  # what is missing was refused a moment ago, and will come again
                raise self._journal.full
            # Known to be lost, and reported; or it was published before we came, and is in no history any more.
            lost = max(self._holes.pop(stream.key, 0), stream.owed)
            expected = self._journal.expected(batch.topic, batch.origin)
            if batch.first > max(lost, expected):
                self._lost(Gap(stream.topic, batch.origin, max(lost, expected), batch.first - 1))
            self._append(stream, batch, allow_gap=True)
        elif appended is Appended.OVERLAP:  # somebody has cut the stream into other batches than before
            expected = self._journal.expected(batch.topic, batch.origin)
            self._driver.garbage(RemoteProtocolError(f"batch {batch.first} of {stream.topic} was cut anew"))
            self._lost(Gap(stream.topic, batch.origin, expected, batch.end - 1))

    def _lost(self, gap: Gap) -> None:
        self._holes[gap.topic.encode(), gap.origin] = gap.last + 1
        super()._lost(gap)
