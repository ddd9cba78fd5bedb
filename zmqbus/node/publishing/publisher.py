"""One topic's stream: publish, gather, pack, transmit, remember. Any thread may publish; one lock orders what is sent.

A message's way out: `Publisher.send` either transmits it at once, or gathers it; a flush packs what is gathered into
one frame, which goes to the `Broadcast` and to the history. Which of both is the question of pace:

- `EAGER`: every message at once. So at low rates.
- `GATHER`: after more than BURST sends within a millisecond, until a batch is full or the next tick of 1 ms.
- `TURN`: asyncio; once per turn of the loop.

When a subscriber's queue is full, frames wait in the `Broadcast`'s backlog, and their publishers with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import count, islice
from math import inf
from threading import Lock
from typing import Any, Protocol

from msgspec import Raw

from zmqbus.errors import MessageTooLarge, UnsupportedValue
from zmqbus.net.clock import now, sleep, time_ns
from zmqbus.node.publishing.broadcast import Broadcast
from zmqbus.protocol import frames
from zmqbus.protocol.frames import EXTERNAL_BYTES_MIN, MESSAGE_BYTES_MAX, encode_value, encode_values
from zmqbus.protocol.streams.history import History, Shelf
from zmqbus.protocol.streams.ring import BATCH_MESSAGES_MAX, Ring

BATCH_BYTES_MAX = 128 * 1024
SMALL = BATCH_BYTES_MAX // BATCH_MESSAGES_MAX  # messages up to this size cannot fill a batch before their number does
TICK = 0.001
ASK_PERIOD = 0.5  # seconds: forwarders are attentive for a second after they were asked

# Queues are limited in frames. For each of these that a large message has in bytes an empty frame follows it, so
# that they are limited in bytes too.
BALLAST_BYTES = 2 * BATCH_BYTES_MAX

NIL = b"\xc0"  # msgpack's

EAGER, GATHER, TURN = range(3)


class Keeper(Protocol):
    """A disk of ours. All under the lock."""

    def keep(self, publisher: Publisher) -> None:
        """From now on what is published on this stream goes there as well."""

    def add(self, publisher: Publisher, first: int, count: int, time: int, parts: tuple[bytes, ...]) -> None:
        """A batch of such a stream was sent."""


class Jobs(Protocol):
    """Gives what is published to workers."""

    def add(self, publisher: Publisher, parts: tuple[bytes, ...], at_once: bool) -> None:
        """A batch was sent. Under the lock. `at_once`: `hand_out` follows."""

    def hand_out(self) -> None:
        """Give out what there is."""


class Streams(Protocol):
    """What a publisher needs of its outlet; all but `make_room` under `lock`."""

    lock: Lock
    origin: int
    pace: int
    refusal: Exception | None
    closed: bool
    history: History
    broadcast: Broadcast
    share: int
    outbox: Keeper | None

    @property
    def backlog(self) -> Sized:
        """Frames that wait for full subscribers."""

    def expect(self, publisher: Publisher) -> None:
        """It gathers: to be flushed by the next tick, or at the end of this turn."""

    def woken(self, publisher: Publisher) -> None:
        """It is no longer quiet: a HEAD is to follow when it is again."""

    def count(self, size: int, count: int, time: int) -> None:
        """A frame of `count` messages was sent at `time`."""

    def make_room(self, publisher: Publisher | None = None) -> None:
        """Wait until the backlog is sent, and what the forwarders have not acknowledged fits the buffer."""


class Publisher(Ring):
    """One topic of one node, ready for hot loops: `node.publisher("logs.web1").send(value)`.

    While messages gather, `send` takes no lock. A message draws its seq from a counter, which cannot give one twice,
    and goes into that seq's slot of the ring. Who flushes takes the slots from the first unsent seq on, up to one that
    was drawn and is not filled yet; whoever fills that looks at `full` after it, as every sender does, and flushes if
    nobody is going to. No slot is filled before its last content was sent: seqs below `full` are at most half a ring
    ahead of what was sent, and the others wait for the lock.
    """

    __slots__ = (
        "_asked_at",
        "_externals",
        "_head_at",
        "_headers",
        "_out",
        "_quiet",
        "_size",
        "asks",
        "flags",
        "full",
        "jobs",
        "kept",
        "most",
        "prefix",
        "sent_bytes",
        "seqs",
        "shelf",
        "topic",
    )

    def __init__(self, out: Streams, topic: str, encoded: bytes) -> None:
        super().__init__()
        self.topic = topic
        self.prefix = encoded + b"\0"
        self._asked_at = -inf
        self.asks = False  # for an acknowledgement, as soon as what is gathered is sent
        self.kept = False  # in the outbox
        self.flags = 0  # of every batch: QUEUED, where they are jobs
        self.jobs: Jobs | None = None  # who gives them out
        self.most = BATCH_MESSAGES_MAX  # messages in a batch
        self.shelf = Shelf()  # this stream's part of the history
        self.sent_bytes = 0
        self._out = out
        self.seqs = count(1)  # gives no seq twice, whoever draws
        self.full = 0  # while messages gather, to be flushed by a tick or turn: the first seq too many. Else 0
        self._headers: dict[int, Raw] = {}
        self._externals: dict[int, tuple[int, bytes]] = {}  # too large to be packed with others: flags, payload
        self._size = 0  # bytes gathered, not counting the small ones, nor exactly: it only says when to flush
        self._quiet = True  # no HEAD is to follow
        self._head_at = 0

    def send(self, value: object, headers: dict[str, Any] | None = None) -> int:
        """Publish a value; returns its seq, the same as `Node.publish`.

        Raises:
            UnsupportedValue: it cannot be carried by msgpack.
            MessageTooLarge: it is larger than 64 MiB.
            NodeClosed: the node has been closed.
        """
        if headers is not None:
            return self._send_large(value, headers)
        kind = type(value)
        if kind is bytes or (kind is str and value.isascii()):  # type: ignore[attr-defined]
            item: Any = value
            size = len(item)
            full = self.full
            if full and size <= SMALL:  # the most frequent case; `Node.publish` repeats it
                seq = next(self.seqs)
                if seq >= full:
                    return self.send_late(seq, item, size)
                self.ring[seq & self.mask] = item
                if not self.full:
                    self.flush_to(seq + 1)
                return seq
        else:
            packed = encode_value(value)
            size = len(packed)
            item = Raw(packed)
        if size >= EXTERNAL_BYTES_MIN:
            return self._send_large(value, None)
        if not self.full:
            return self._send(item, size)
        seq = next(self.seqs)
        if seq >= self.full:
            return self.send_late(seq, item, size)
        self.ring[seq & self.mask] = item
        self._size += size
        if not self.full or self._size >= BATCH_BYTES_MAX:
            self.flush_to(seq + 1)
        return seq

    def send_many(self, values: Iterable[object]) -> int:
        """Publish many values, each as a message of its own; returns the seq of the last one, 0 if there is none.

        Where values come in numbers, as lines of a file do, this costs a fraction of as many calls of `send`.

        Raises:
            As `send`, of the first value that cannot be published. Those before it have been.
        """
        seq, rest = 0, iter(values)
        while chunk := list(islice(rest, self.most)):
            try:
                payload = encode_values(chunk)
            except Exception:  # whatever it is: it is found out below, and told of the value that it concerns
                payload = b""
            if 0 < len(payload) <= BATCH_BYTES_MAX:
                seq = self._send_packed(payload, len(chunk))
            else:
                for value in chunk:
                    seq = self.send(value)
        return seq

    def _send_packed(self, payload: bytes, number: int) -> int:
        """A whole batch."""
        out = self._out
        with out.lock:
            if out.refusal is not None:
                raise out.refusal
            seqs = list(islice(self.seqs, number))  # by one call, so that nobody draws one of these in between
            first = seqs[0]
            self._wait_for(first - 1)
            self._transmit(0, payload, first, number)
            if self.full:
                self.full = self.sent + 1 + min(self.room, out.share)
        if out.backlog or out.history.full:
            out.make_room(self)
        return first + number - 1

    def send_without_wait(self, value: object, headers: dict[str, Any] | None = None) -> int:
        """As `send`, for who has waited until there was room: does not wait for more if this fills the buffer."""
        packed = encode_value(value)
        if headers is not None or len(packed) >= EXTERNAL_BYTES_MIN:
            return self._send_large(value, headers, patient=False)
        return self._send(Raw(packed), len(packed), patient=False)

    @property
    def seq(self) -> int:
        """Seq of the last message published. Under the lock."""
        return self.end() - 1

    @property
    def following(self) -> int:
        """The first seq that is not sent yet. Under the lock."""
        return self.sent + 1

    def _send(self, item: bytes | str | Raw, size: int, patient: bool = True) -> int:
        """A message while nothing gathers: at low rates it leaves at once, and that is what a round trip waits for."""
        out = self._out
        with out.lock:
            if out.refusal is not None:
                raise out.refusal
            seq = next(self.seqs)
            if out.pace == EAGER and seq == self.sent + 1:
                time = time_ns()
                header = frames.HEADER.pack(frames.VERSION, frames.DATA, self.flags, 1, out.origin, seq, time)
                parts = (self.prefix + header + encode_values((item,)),)
                out.broadcast.send(parts, not patient or self.flags > 0)
                self._transmitted(parts, len(parts[0]), 1, time, True)
            else:
                self._put(seq, item, size)
        if self.jobs is not None:
            self.jobs.hand_out()
        if out.backlog or out.history.full:
            out.make_room(self if patient else None)
        return seq

    def send_late(self, seq: int, item: bytes | str | Raw, size: int) -> int:
        """A message whose seq was drawn when the batch was full already."""
        out = self._out
        with out.lock:
            if out.closed and out.refusal is not None:
                raise out.refusal
            self._put(seq, item, size)
        if out.backlog or out.history.full:
            out.make_room(self)
        return seq

    def _send_large(self, value: object, headers: dict[str, Any] | None, patient: bool = True) -> int:
        """A message that is large, or has headers."""
        packed_headers = b""
        if headers is not None:
            if not isinstance(headers, dict) or not all(isinstance(key, str) for key in headers):
                raise UnsupportedValue(headers, "headers are a dict with str keys")
            packed_headers = encode_value(headers)
        raw = type(value) is bytes and len(value) >= EXTERNAL_BYTES_MIN and headers is None
        packed: Any = value if raw else encode_value(value)
        size = len(packed) + len(packed_headers)
        if size > MESSAGE_BYTES_MAX:
            raise MessageTooLarge(size, MESSAGE_BYTES_MAX)
        out = self._out
        with out.lock:
            if out.refusal is not None:
                raise out.refusal
            seq = next(self.seqs)
            if size < EXTERNAL_BYTES_MIN:
                self._headers[seq] = Raw(packed_headers)
            elif raw:
                self._externals[seq] = frames.EXTERNAL | frames.RAW, packed
            elif packed_headers:
                both = b"".join((b"\x92\x91", packed, b"\x91", packed_headers))
                self._externals[seq] = frames.EXTERNAL | frames.HEADERS, both
            else:
                self._externals[seq] = frames.EXTERNAL, b"\x91" + packed
            self._put(seq, Raw(packed if size < EXTERNAL_BYTES_MIN else NIL), size)
        if out.backlog or out.history.full:
            out.make_room(self if patient else None)
        return seq

    def _put(self, seq: int, item: bytes | str | Raw, size: int) -> None:
        """Fill a slot under the lock, and send it or see to it that it will be sent."""
        out = self._out
        if seq >= (self.full or self.sent + 1 + self.room):
            self._flush(self.full)
        self._wait_for(seq - self.room)
        self.ring[seq & self.mask] = item
        self._size += size
        if out.pace == EAGER or out.refusal is not None or self._externals or self._size >= BATCH_BYTES_MAX:
            self._flush()
        elif not self.full:
            out.expect(self)
            self.full = self.sent + 1 + min(self.room, out.share)

    def _wait_for(self, seq: int) -> None:
        """Send everything up to `seq`. Under the lock, which may be released in between."""
        while self.sent < seq:
            self._flush()
            if self.sent < seq:  # another thread has drawn a seq, and not got round to filling its slot
                self._out.lock.release()
                sleep(TICK / 10)
                self._out.lock.acquire()

    def flush_to(self, end: int) -> None:
        """A message before `end` was stored: a batch is full, or the tick that was to flush it has passed."""
        out = self._out
        with out.lock:
            if out.closed and out.refusal is not None:
                raise out.refusal
            self._flush(end if self.full else 0)  # what may lie behind it has nobody else if nothing gathers
        if out.backlog or out.history.full:
            out.make_room(self)

    def send_now(self) -> None:
        """Send what is gathered."""
        with self._out.lock:
            self.flush()

    def flush(self) -> None:
        """Send what is stored. What follows is seen to anew. Under the lock."""
        self.full = 0  # first: who fills a slot that we do not see yet sees this
        self._flush()
        if self.asks:
            self.asks = False
            self.ask()

    def expect(self) -> None:
        """Be flushed at the end of this turn, if that is not so already. Under the lock."""
        if not self.full:
            self._out.expect(self)
            self.full = self.sent + 1 + min(self.room, self._out.share)

    def _flush(self, end: int = 0) -> None:
        """Send what is stored: before `end`, if that is thought to be all there; or else up to the first empty slot."""
        out = self._out
        first = self.sent + 1
        if self._headers or self._externals:
            end = self.end()
            self._send_mixed(first, self.upto(end))
        else:
            values = self.upto(end or self.end())
            try:
                payload = encode_values(values)
            except TypeError:  # an empty slot
                values = self.upto(self.end())
                payload = encode_values(values)
            end = first + len(values)
            if values:
                self._transmit(0, payload, first, end - first)
        if end > first:
            self._size = 0
            self.clear(first, end)
            if end == self.full == first + self.room and self.room < self.most:
                self.grow()  # no slot is being filled now: all below `full` is sent, and others wait for the lock
        if self.full:  # nothing gathers any more when the node is closing: so a thread that publishes on is told
            self.full = end + min(self.room, out.share) if out.refusal is None else 0

    def _send_mixed(self, first: int, values: list[Any]) -> None:
        """What is too large goes by itself."""
        end = first + len(values)
        for seq in sorted(seq for seq in self._externals if seq < end):
            self._send_batch(first, values[: seq - first])
            self._transmit(*self._externals.pop(seq), first=seq)
            del values[: seq - first + 1]
            first = seq + 1
        self._send_batch(first, values)

    def _send_batch(self, first: int, values: list[Any]) -> None:
        if not values:
            return
        flags, payload = 0, encode_values(values)
        if self._headers:
            headers = [self._headers.pop(seq, None) for seq in range(first, first + len(values))]
            if any(headers):
                flags, payload = frames.HEADERS, encode_values((Raw(payload), headers))
        self._transmit(flags, payload, first, len(values))

    def _transmit(self, flags: int, payload: bytes, first: int, count: int = 1) -> None:
        out = self._out
        time = time_ns()
        flags |= self.flags
        frame = self.prefix + frames.HEADER.pack(frames.VERSION, frames.DATA, flags, count, out.origin, first, time)
        parts = (frame, payload) if flags & frames.EXTERNAL else (frame + payload,)
        out.broadcast.send(parts, flags >= frames.QUEUED)
        self._transmitted(parts, len(frame) + len(payload), count, time)

    def _transmitted(self, parts: tuple[bytes, ...], size: int, count: int, time: int, at_once: bool = False) -> None:
        """The next `count` messages were sent. All that need not be done before is done here."""
        out = self._out
        first = self.sent + 1
        self.sent += count
        self.sent_bytes += size
        out.history.append(self.shelf, first, first + count, parts)
        if self.kept and out.outbox is not None:
            out.outbox.add(self, first, count, time, parts)
        if self.jobs is not None:
            self.jobs.add(self, parts, at_once)
        if size >= BALLAST_BYTES:
            ballast = (frames.encode_frame(self.prefix, frames.BALLAST, 0, 0, out.origin, 0, time),)
            for _ in range(size // BALLAST_BYTES):
                out.broadcast.send(ballast, False)
        if self._quiet:
            self._quiet = False
            out.woken(self)
        out.count(size, count, time)

    def head_if_idle(self) -> bool:
        """Send a HEAD if nothing was sent since the last look. Under the lock. Returns whether it is quiet now."""
        if self._head_at != self.sent:
            self._head_at = self.sent
            return False
        self.send_head()
        self._quiet = True
        return True

    def ask(self) -> None:
        """Somebody waits for an acknowledgement: tell forwarders so, if that is news to them. Under the lock."""
        self._out.broadcast.send_trail()
        time = now()
        if time >= self._asked_at + ASK_PERIOD:
            self._asked_at = time
            self.send_head(frames.ASKS)

    def send_head(self, flags: int = 0) -> None:
        """Say how far this stream has come, on its own topic, behind all that was sent. Under the lock."""
        out = self._out
        frame = frames.encode_frame(self.prefix, frames.HEAD, flags, 0, out.origin, self.following, time_ns())
        out.broadcast.send((frame,), True)
