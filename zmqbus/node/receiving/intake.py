"""The receiving path: one subscription's socket, drained and tracked by whoever consumes it.

A message's way in: `take` gets a frame off the SUB socket; if it is simply the next of its stream, as nearly always,
its values are decoded by one C call and become messages, of which the first is returned and the others `items`, an
iterator; everything else goes through the tracker. No thread of its own, no queue between: the consumer takes what it
wants, and may sleep in the socket until there is something.

The engine speaks to an intake by `post` (work to be done by the consumer, in order), or comes through its gate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count, repeat
from math import ceil
from sys import maxsize
from typing import Any, Protocol

import msgspec

from zmqbus.errors import GapError, NodeClosed, RemoteProtocolError
from zmqbus.net.clock import now
from zmqbus.net.sockets import EVENTS, FD, NOBLOCK, RCVMORE, RCVTIMEO, Again, Source
from zmqbus.net.waker import WAKE_PREFIX
from zmqbus.node.receiving.decoding import Unpacker
from zmqbus.node.receiving.feed import Feed, Gate
from zmqbus.protocol.frames import (
    ASKS,
    BALLAST,
    DATA,
    EXTERNAL,
    HEAD,
    HEADER_BYTES,
    ORDER,
    QUEUED,
    Batch,
    parse_header,
)
from zmqbus.protocol.message import Message
from zmqbus.protocol.streams.stream import SETTLED, Fetch, Gap, Stream
from zmqbus.protocol.streams.tracking import Tracker

CALM = 0.1  # seconds without a message after which an empty socket is empty: not just waiting for the kernel
CALM_MAX = 3.0  # seconds after which it is so even if others never pause
GAPS_KEPT = 1000  # for a report at the end; the count of lost messages goes on


NO_STREAM = Stream("", (b"", 0), 0, 0, 0), b"\0", maxsize  # no frame is that long


class Driver(Protocol):
    """What an intake needs of its node. Called from the consumer's thread."""

    def fetch(self, intake: Intake, fetches: Sequence[Fetch]) -> None:
        """Send these, and post the answers."""

    def gap(self, gap: Gap) -> None:
        """Messages are lost to a subscription."""

    def settled(self, intake: Intake, origin: int) -> None:
        """All that a leaving origin owed is here, or known to be lost."""

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""

    def soon(self, work: Callable[[], object]) -> None:
        """Do this on the engine's loop."""


class Intake:
    """One subscription's receiving end. `take` and what is posted run inside the gate."""

    def __init__(
        self,
        number: int,
        patterns: Sequence[str],
        feed: Feed,
        driver: Driver,
        tracker: Tracker,
        *,
        value_type: Any = None,
        raise_gaps: bool = False,
        source: Source = "pub",
    ) -> None:
        """`source`: which of their PUBs it is to be connected to."""
        self.number = number
        self.source = source
        self.patterns = list(patterns)
        self.feed = feed
        feed.rescue = lambda parts: self.post(lambda: self._take_in(parts))
        self.socket = feed.socket
        self._recv = self.socket.recv
        self.gate = feed.gate
        self.items: Iterator[Message] = iter(())
        """Messages decoded and not yet consumed; may be advanced outside the gate."""
        self.gaps: deque[Gap] = deque(maxlen=GAPS_KEPT)
        self.messages = 0
        self.closed: Exception | None = None
        self.tracker = tracker
        self.before_close: Callable[[], None] = lambda: None  # on the engine's thread, while the socket is still there
        self._driver = driver
        self._inbox: deque[Callable[[], None]] = deque()
        self._decoder = Unpacker(value_type)
        self._raise_gaps = raise_gaps
        self._leaving: set[int] = set()
        self._afterwards: list[Callable[[], object]] = []  # when the socket is empty, and stays so
        self._calm_mark, self._calm_at, self._calm_by = -1, 0.0, 0.0
        self._forgetting: set[int] = set()
        self._patience_ms = -1  # what RCVTIMEO is set to
        # How the frames of the last ordinary stream begin, up to their flags, and where their values do.
        self._stream, self._head, self._body = NO_STREAM

    # --- the engine's side -----------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """Readable when something may have arrived; edge-triggered."""
        return int(self.socket.get(FD))

    def post(self, work: Callable[[], None]) -> None:
        """Have the consumer do this before it looks at the socket again."""
        self._inbox.append(work)
        self.gate.wake()

    def heads(self, origin: int, heads: list[tuple[bytes, int]], more: bool) -> None:
        """HEADS arrived. Done here and now: `subscribe` waits for it, and the consumer may not be there yet."""
        with self.gate.visit():
            self._forgetting.discard(origin)  # it is back; what it published meanwhile is told here
            self.tracker.heads(origin, heads, more, now())

    def fetched(self, asked: Fetch, last: int, batches: Sequence[Batch]) -> None:
        """BATCHES arrived."""
        self.post(lambda: self.tracker.fetched(asked, last, batches, now()))

    def refused(self, asked: Fetch) -> None:
        """A Fetch came to nothing."""
        self.post(lambda: self.tracker.refused(asked, now()))

    def sources_changed(self) -> None:
        """A node that may be asked for repairs has come (back)."""
        self.post(lambda: self.tracker.sources_changed(now()))

    def origin_leaving(self, origin: int) -> bool:
        """A publisher said BYE, after its last HEADS. True: all of it is here; else `settled` is told when it is."""
        with self.gate.visit():
            if not self.tracker.behind(origin):
                return True
        self.post(lambda: self._leaving.add(origin))
        return False

    def origin_gone(self, origin: int) -> None:
        """A publisher is no longer there to be asked."""
        self.post(lambda: self.tracker.origin_gone(origin, now()))

    def forget(self, origin: int) -> None:
        """A publisher will not come back. What it sent and was received is delivered before."""
        self._forgetting.add(origin)
        self.post(lambda: self._when_drained(lambda: self._forget(origin)))

    def when_drained(self, work: Callable[[], object]) -> None:
        """Do this on the engine's loop when all that the socket holds has been taken out of it."""
        self.post(lambda: self._when_drained(lambda: self._driver.soon(work)))

    def close(self, reason: Exception | None = None) -> None:
        """No more messages. What is decoded already can still be consumed."""
        with self.gate.visit():
            if self.closed is None:
                self.closed = reason or NodeClosed("the subscription is closed")
                self.before_close()
                self.feed.close()

    def forked(self, reason: Exception) -> None:
        """In a forked child: the socket is the parent's."""
        self.gate = Gate(lambda: None)  # the old one may be held by a thread that is not here
        self.items = iter(())
        self.closed = reason

    # --- the consumer's side ---------------------------------------------------------------------

    def take(self, patience_ms: int) -> Message | None:
        """The next message; the others of its batch are `items` then. Inside the gate.

        None: none came within `patience_ms` (0: does not wait, -1: no limit), or the engine wants in; then look again.

        Raises:
            GapError: messages are lost, and the subscription is to raise then.
            DecodeError: the next value does not fit the type.
        """
        message: Message | None
        for message in self.items:  # left by another thread
            return message
        if self.closed is not None:
            return None
        tracker = self.tracker
        streams = tracker.streams
        gate = self.gate
        while True:
            if self._inbox:
                self._work()
            if tracker.ready:
                if (message := self._take_ready()) is not None:
                    return message
                continue
            try:
                # While no stream has a hole and nobody waits for an empty socket, it does not matter when it is that.
                if not patience_ms or tracker.unsettled or self._leaving or self._afterwards:
                    frame: bytes = self._recv(NOBLOCK)
                else:
                    if patience_ms != self._patience_ms:
                        self.socket.set(RCVTIMEO, patience_ms)
                        self._patience_ms = patience_ms
                    gate.asleep = True  # before looking whether anybody wants anything: who comes later wakes us
                    try:
                        if gate.wanted or self._inbox:
                            return None
                        frame = self._recv()
                    finally:
                        gate.asleep = False
            except Again:
                if self._drained():
                    continue
                if not patience_ms:
                    return None
                left_ms, due = patience_ms, self.timer()
                if due is not None:
                    due_ms = max(0, ceil((due - now()) * 1000))
                    left_ms = due_ms if left_ms < 0 else min(left_ms, due_ms)
                if (slept := self._doze(left_ms)) is None:
                    return None
                frame = slept
            if frame.startswith(self._head) and len(frame) > self._body:  # the same stream as before, nearly always
                stream = self._stream
                size, origin, first, time_ns = ORDER.unpack_from(frame, self._body - ORDER.size)
                if first == stream.next and origin == stream.key[1] and stream.place == SETTLED and size:
                    stream.next = stream.target = first + size
                    if (message := self._decode(stream, frame, size, first, time_ns)) is not None:
                        return message
                    continue
            try:
                cut, kind, flags, size, origin, first, time_ns = parse_header(frame)
                if kind == DATA:
                    parts = (frame,) if not flags & EXTERNAL else (frame, self._external())
                    key = (frame[:cut], origin)
                    known = streams.get(key)
                    if known is None and key in streams:
                        continue  # not wanted
                    if known is not None and known.place == SETTLED and known.next == first:
                        known.next = known.target = first + size
                        if not flags & ~QUEUED:
                            self._stream, self._head, self._body = known, frame[: cut + 5], cut + 1 + HEADER_BYTES
                        batch = Batch(key[0], flags, size, origin, first, time_ns, parts)
                        if (message := self._decode_batch(known.topic, batch, 0)) is not None:
                            return message
                        continue
                    tracker.observe(Batch(key[0], flags, size, origin, first, time_ns, parts), now())
                    self._repair(drained=False)
                elif kind == HEAD:
                    tracker.observe_head(frame[:cut], origin, first, now())
                    self._repair(drained=False)
                    if flags & ASKS:
                        self._on_asked()
                elif kind != BALLAST:
                    self._drop_parts()
            except RemoteProtocolError as error:
                if frame.startswith(WAKE_PREFIX):
                    return None
                self._drop_parts()
                self._driver.garbage(error)

    def _doze(self, patience_ms: int) -> bytes | None:
        """Wait in the socket, but not longer than until something has to be done even if nothing arrives."""
        self.socket.set(RCVTIMEO, patience_ms)
        self._patience_ms = patience_ms
        self.gate.asleep = True
        try:
            return None if self.gate.wanted or self._inbox else self._recv()
        except Again:
            return None
        finally:
            self.gate.asleep = False

    def calm(self) -> None:
        """Take back the FD's signal when nobody reads the socket now: a loop would spin on it."""
        if self.closed is None:
            self.socket.get(EVENTS)

    def state(self) -> str:
        """For people."""
        tracker = self.tracker
        return (
            f"{self.messages} received, {tracker.repaired} repaired, {tracker.lost} lost"
            f"{', closed' if self.closed is not None else ''}"
        )

    def timer(self) -> float | None:
        """When to look again even if nothing arrives."""
        due = self.tracker.timer()
        return due if not self._afterwards or (due is not None and due < self._calm_at) else self._calm_at

    # --- inside ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._repair(drained=False)

    def _drained(self) -> bool:
        """The socket is empty. Returns whether there is more to do nevertheless."""
        self._repair(drained=True)
        if self._leaving:
            for origin in [origin for origin in self._leaving if not self.tracker.behind(origin)]:
                self._leaving.discard(origin)
                self._driver.settled(self, origin)
        if self._afterwards and not self.tracker.ready:
            if self.messages != self._calm_mark:
                self._calm_mark, self._calm_at = self.messages, min(now() + CALM, self._calm_by)
            if now() >= self._calm_at:
                afterwards, self._afterwards = self._afterwards, []
                for work in afterwards:
                    work()
        return bool(self.tracker.ready or self._inbox)

    def _on_asked(self) -> None:
        """Somebody waits for an acknowledgement: none of our business, unless we give such."""

    def _when_drained(self, work: Callable[[], object]) -> None:
        if not self._afterwards:
            self._calm_by = now() + CALM_MAX
        self._afterwards.append(work)

    def _forget(self, origin: int) -> None:
        if origin not in self._forgetting:
            return
        self._forgetting.discard(origin)
        self.tracker.forget(origin)
        self._stream, self._head, self._body = NO_STREAM  # it may be one that is no longer tracked

    def _repair(self, drained: bool) -> None:
        fetches = self.tracker.repairs(now(), drained)
        if fetches:
            self._driver.fetch(self, fetches)

    def _take_ready(self) -> Message | None:
        item = self.tracker.ready.popleft()
        if isinstance(item, Gap):
            self._lost(item)
            return None
        stream, batch, skip = item
        return self._decode_batch(stream.topic, batch, skip)

    def _lost(self, gap: Gap) -> None:
        self.gaps.append(gap)
        self._driver.gap(gap)
        if self._raise_gaps:
            raise GapError(gap.topic, gap.origin, gap.first, gap.last)

    def _decode(self, stream: Stream, frame: bytes, size: int, first: int, time_ns: int) -> Message | None:
        """The ordinary batch, without making a Batch of it. Returns its first message."""
        body = self._body
        try:
            values = self._decoder.plain(frame[body:] if size == 1 else memoryview(frame)[body:])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            values = []
        topic, origin = stream.topic, stream.key[1]
        if len(values) != size:
            batch = Batch(stream.key[0], 0, size, origin, first, time_ns, (frame,))
            return self._decode_batch(topic, batch, 0)
        self.messages += size
        if size == 1:
            return Message(topic, values[0], first, origin, time_ns / 1e9)
        self.items = map(Message, repeat(topic), values, count(first), repeat(origin), repeat(time_ns / 1e9))
        return next(self.items)

    def _decode_batch(self, topic: str, batch: Batch, skip: int) -> Message | None:
        try:
            self.items = self._decoder.unpack(topic, batch, skip)[0]
        except RemoteProtocolError as error:
            self._driver.garbage(error)
            self.tracker.lost += batch.count - skip
            self._lost(Gap(topic, batch.origin, batch.first + skip, batch.end - 1))
            return None
        self.messages += batch.count - skip
        return next(self.items)

    def _take_in(self, parts: list[bytes]) -> None:
        """A message that somebody else has taken out of the socket: the one before all that are in it."""
        frame, *external = parts
        try:
            cut, kind, flags, size, origin, first, time_ns = parse_header(frame)
            if kind == DATA and bool(flags & EXTERNAL) == any(external):
                self.tracker.observe(Batch(frame[:cut], flags, size, origin, first, time_ns, tuple(parts[:2])), now())
            elif kind == HEAD:
                self.tracker.observe_head(frame[:cut], origin, first, now())
        except RemoteProtocolError as error:
            if not frame.startswith(WAKE_PREFIX):
                self._driver.garbage(error)

    def _external(self) -> bytes:
        if not self.socket.get(RCVMORE):
            raise RemoteProtocolError("frame: the external value is missing")
        value: bytes = self.socket.recv(NOBLOCK)
        self._drop_parts()
        if not value:
            raise RemoteProtocolError("frame: the external value is empty")
        return value

    def _drop_parts(self) -> None:
        """What follows a frame that is not understood is somebody's value, and not to be taken for a frame."""
        while self.socket.get(RCVMORE):
            self.socket.recv(NOBLOCK)
