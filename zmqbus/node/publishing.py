"""The sending path: publish, batch, transmit, remember. Any thread may publish; one lock orders them all.

A message's way out: `Publisher.send` adds it to its stream's batch; `flush` packs the batch into one frame, gives it
to the PUB socket and to the history. When to flush is the question of pace:

- `EAGER`: every message at once. So at low rates.
- `GATHER`: after more than BURST sends within a millisecond, until a batch is full or the next tick of 1 ms.
- `TURN`: asyncio; once per turn of the loop.

A full subscriber. The PUB socket is bounded, and refuses (XPUB_NODROP) when a matching subscriber's queue is full.
The frame then waits in the backlog, and the caller with it: that paces a publisher to consumers that are nearly fast
enough. But no longer than PATIENCE: then the frame goes to everybody else, that subscriber misses it and repairs it
from the history; libzmq counts it out until it has read half its queue, so one that has stopped costs no more. For
one that is alive but hopelessly slow, publishers do not wait again for a while, longer each time (GRUDGE).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count, islice
from math import inf
from threading import Lock
from typing import Any

from msgspec import Raw

from zmqbus.errors import ForkedProcess, MessageTooLarge, TooManyStreams, UnsupportedValue
from zmqbus.net.clock import now, sleep, time_ns
from zmqbus.net.sockets import NOBLOCK, SNDMORE, XPUB_NODROP, Again, Socket
from zmqbus.protocol import frames
from zmqbus.protocol.frames import EXTERNAL_BYTES_MIN, MESSAGE_BYTES_MAX, encode_value, encode_values
from zmqbus.protocol.history import Entry, Fetched, History, fetch
from zmqbus.protocol.topics import Matcher, encode_topic

BATCH_MESSAGES_MAX = 256
BATCH_BYTES_MAX = 64 * 1024
SMALL = BATCH_BYTES_MAX // BATCH_MESSAGES_MAX  # messages up to this size cannot fill a batch before their number does
BURST = 32  # sends within BURST_NS that make a burst
BURST_NS = 1_000_000
CALM = 8  # messages per tick below which a burst is over
TICK = 0.001
PATIENCE = 0.5  # seconds that publishers wait for a full subscriber to read half its queue
GRUDGE_MIN, GRUDGE_MAX = 1.0, 32.0  # seconds for which they do not, after that was in vain; doubled each time
STREAMS_MAX = 100_000  # about 1 KiB each

ZERO_COPY_MIN = 256 * 1024  # from here on a copy costs more than the thread with which pyzmq tracks what is lent
HEADS_PER_HEARTBEAT = 64  # repeated each second, so that the loss of a HEAD is made good too

NIL = b"\xc0"  # msgpack's

EAGER, GATHER, TURN = range(3)


class Publisher:
    """One topic of one node, ready for hot loops: `node.publisher("logs.web1").send(value)`.

    Without a lock, in the ordinary case of a burst: a message draws its seq from a counter and is stored under it,
    each in one indivisible step. `flush` takes what is stored up to the first seq that is drawn but not stored yet;
    whoever stores that one sees to the rest.
    """

    __slots__ = (
        "_draw",
        "_externals",
        "_flushed",
        "_full",
        "_head_at",
        "_headers",
        "_out",
        "_quiet",
        "_size",
        "_values",
        "dirty",
        "entries",
        "prefix",
        "sent_bytes",
        "topic",
    )

    def __init__(self, out: Outlet, topic: str, encoded: bytes) -> None:
        self.topic = topic
        self.prefix = encoded + b"\0"
        self.entries: deque[Entry] = deque()  # this stream's part of the history
        self.sent_bytes = 0
        self.dirty = False  # will be flushed by the next tick, or turn
        self._out = out
        self._draw = count(1).__next__
        self._values: dict[int, bytes | str | Raw] = {}  # by seq: gathered, and packed by one C call
        self._headers: dict[int, Raw] = {}
        self._externals: dict[int, tuple[int, bytes]] = {}  # too large to be packed with others: flags, payload
        self._flushed = 0  # seq of the last message sent
        self._full = BATCH_MESSAGES_MAX  # the seq that fills a batch
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
        kind = value.__class__
        if headers is not None:
            seq = self._store(value, None, headers)
        elif kind is bytes or (kind is str and value.isascii()):  # type: ignore[attr-defined]
            size = len(value)  # type: ignore[arg-type]
            if size < EXTERNAL_BYTES_MIN:
                seq = self._draw()
                self._values[seq] = value  # type: ignore[assignment]
                if size > SMALL:
                    self._size += size
                if self.dirty and seq < self._full and self._size < BATCH_BYTES_MAX:
                    return seq
            else:
                seq = self._store(value, value if kind is bytes else None, None)  # type: ignore[arg-type]
        else:
            packed = encode_value(value)
            size = len(packed)
            if size < EXTERNAL_BYTES_MIN:
                seq = self._draw()
                self._values[seq] = Raw(packed)
                if size > SMALL:
                    self._size += size
                if self.dirty and seq < self._full and self._size < BATCH_BYTES_MAX:
                    return seq
            else:
                seq = self._store(value, packed, None)
        self._stored(seq)
        return seq

    @property
    def seq(self) -> int:
        """Seq of the last message published."""
        return self._flushed + len(self._values)

    @property
    def following(self) -> int:
        """The first seq that is not sent yet. Under the lock."""
        return self._flushed + 1

    def _store(self, value: object, packed: bytes | None, headers: dict[str, Any] | None) -> int:
        """A message that is large, or has headers. `packed` is the value itself when that is to travel raw."""
        packed_headers = b""
        if headers is not None:
            if not isinstance(headers, dict) or not all(isinstance(key, str) for key in headers):
                raise UnsupportedValue(headers, "headers are a dict with str keys")
            packed_headers = encode_value(headers)
        if packed is None:
            packed = encode_value(value)
        size = len(packed) + len(packed_headers)
        if size > MESSAGE_BYTES_MAX:
            raise MessageTooLarge(size, MESSAGE_BYTES_MAX)
        external = None
        if size >= EXTERNAL_BYTES_MIN:
            if packed_headers:
                both = b"".join((b"\x92\x91", packed, b"\x91", packed_headers))
                external = frames.EXTERNAL | frames.HEADERS, both
            elif packed is value:
                external = frames.EXTERNAL | frames.RAW, packed
            else:
                external = frames.EXTERNAL, b"\x91" + packed
        with self._out.lock:
            seq = self._draw()
            if external is not None:
                self._externals[seq] = external
                packed = NIL  # stands in for it
            elif packed_headers:
                self._headers[seq] = Raw(packed_headers)
            self._size += size
            self._values[seq] = Raw(packed)
        return seq

    def _stored(self, seq: int) -> None:
        """A message was stored: see to it that it is sent."""
        out = self._out
        with out.lock:
            if out._pace == EAGER and seq == self._flushed + 1 and len(self._values) == 1 and not self._externals:
                self._send_batch(seq, [self._values.pop(seq)])  # at low rates, and what a round trip waits for
                self._size = 0
                self._full = seq + BATCH_MESSAGES_MAX
            elif seq >= self._full or self._size >= BATCH_BYTES_MAX or self._externals:
                self.flush()
            if self._values and not self.dirty:
                out.urge(self)
        if out.backlog:
            out.make_room()

    def flush(self) -> None:
        """Send what is stored, up to the first seq that is drawn but not stored. Under the lock."""
        first = self._flushed + 1
        values: list[bytes | str | Raw] = []
        with suppress(KeyError):  # there; what was taken before is in the list
            values.extend(map(self._values.pop, range(first, first + len(self._values))))
        end = first + len(values)
        for seq in sorted(seq for seq in self._externals if seq < end) if self._externals else ():
            self._send_batch(first, values[: seq - first])
            self._transmit(*self._externals.pop(seq), first=seq)
            del values[: seq - first + 1]
            first = seq + 1
        self._send_batch(first, values)
        self._size = 0
        self._full = self._flushed + BATCH_MESSAGES_MAX

    def _send_batch(self, first: int, values: list[bytes | str | Raw]) -> None:
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
        external = flags & frames.EXTERNAL
        frame = frames.encode_frame(
            self.prefix, frames.DATA, flags, count, out.origin, first, time, b"" if external else payload
        )
        parts = (frame, payload) if external else (frame,)
        self._flushed = first + count - 1
        out.history.append(self.entries, first, first + count, parts)
        size = len(frame) + len(payload) if external else len(frame)
        self.sent_bytes += size
        out.transmit(parts, size, count, time)
        if self._quiet:
            self._quiet = False
            out.woken(self)

    def reset(self) -> None:
        """Nothing will be sent any more; so that the next `send` finds out at once."""
        self.dirty = False
        self._values.clear()

    def head_if_idle(self) -> bool:
        """Send a HEAD if nothing was sent since the last look. Under the lock. Returns whether it is quiet now."""
        if self._head_at != self._flushed:
            self._head_at = self._flushed
            return False
        self.send_head()
        self._quiet = True
        return True

    def send_head(self) -> None:
        """Say how far this stream has come, on its own topic, behind all that was sent. Under the lock."""
        out = self._out
        frame = frames.encode_frame(self.prefix, frames.HEAD, 0, 0, out.origin, self.following, time_ns())
        out.transmit((frame,), 0, 0, 0)


class Outlet:
    """All streams of one node, their PUB socket and their history."""

    def __init__(self, socket: Socket, origin: int, history_bytes: int, in_turns: Callable[[], None] | None) -> None:
        """`in_turns`: asyncio: asks for one `flush_all` in this turn of the loop."""
        self.origin = origin
        self.lock = Lock()
        self.history = History(history_bytes)
        self.publishers: dict[str, Publisher] = {}
        self.find = self.publishers.get  # bound once: this is called for every message
        self.backlog: deque[tuple[bytes, ...]] = deque()
        self._noisy: deque[Publisher] = deque()  # sent something, HEAD to follow
        # Set by the engine: from now on call `tick` every TICK, until it returns True.
        self.start_ticking: Callable[[], None] = lambda: None
        self.messages = self.frames = self.bytes = self.stalls = self.dropped_at = 0
        self._socket = socket
        self._pace = EAGER if in_turns is None else TURN
        self._in_turns = in_turns
        self._dirty: list[Publisher] = []
        self._window_ns = 0
        self._window_frames = 0
        self._tick_messages = 0
        self._stalled_at = 0.0
        self._no_patience_until = -inf
        self._grudge = GRUDGE_MIN
        self._refusal: Exception | None = None
        self._quiet: OrderedDict[Publisher, None] = OrderedDict()  # whose HEAD is repeated, the next first

    def publisher(self, topic: str) -> Publisher:
        """The publisher for a topic, made on first use.

        Raises:
            TopicError, TooManyStreams, NodeClosed
        """
        publisher = self.publishers.get(topic)
        if publisher is None:
            encoded = encode_topic(topic)
            with self.lock:
                self._check()
                if len(self.publishers) >= STREAMS_MAX and topic not in self.publishers:
                    raise TooManyStreams(STREAMS_MAX)
                publisher = self.publishers.setdefault(topic, Publisher(self, topic, encoded))
        return publisher

    # --- pace, under the lock --------------------------------------------------------------------

    def urge(self, publisher: Publisher) -> None:
        """A stream has something to send."""
        self._check()
        if self._pace == EAGER:
            publisher.flush()
        if self._pace != EAGER or publisher.seq >= publisher.following:  # else all of it is sent
            publisher.dirty = True
            self._dirty.append(publisher)
            if self._in_turns is not None and len(self._dirty) == 1:
                self._in_turns()

    def transmit(self, parts: tuple[bytes, ...], size: int, count: int, time: int) -> None:
        """Give a frame to the PUB socket, behind all that wait already."""
        if self._refusal is not None:
            self._check()
        if self.backlog:
            self.backlog.append(parts)
        else:
            try:
                self._send(parts)
            except Again:
                self._stalled_at = now()
                self.stalls += 1
                self.backlog.append(parts)
                self.start_ticking()
        self.messages += count
        self.frames += 1
        self.bytes += size
        if self._pace == EAGER and count:
            if time - self._window_ns > BURST_NS:
                self._window_ns = time
                self._window_frames = 0
            self._window_frames += 1
            if self._window_frames > BURST:
                self._pace = GATHER
                self._tick_messages = self.messages
                self.start_ticking()

    def woken(self, publisher: Publisher) -> None:
        """A stream is no longer quiet: a HEAD is to follow when it is again."""
        self._quiet.pop(publisher, None)
        self._noisy.append(publisher)

    def _send(self, parts: tuple[bytes, ...]) -> None:
        if len(parts) == 1:
            self._socket.send(parts[0], NOBLOCK)
            return
        self._socket.send(parts[0], NOBLOCK | SNDMORE)
        try:
            self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
        except Again:  # it must follow its first part, whoever misses it
            self._socket.set(XPUB_NODROP, 0)
            self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
            self._socket.set(XPUB_NODROP, 1)

    # --- the rest takes the lock itself ----------------------------------------------------------

    def flush_all(self) -> None:
        """Send everything that has been gathered."""
        with self.lock:
            self._flush_dirty()

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for publisher in dirty:
            publisher.dirty = False  # first: what is stored from here on is urged anew
            publisher.flush()

    def tick(self) -> bool:
        """Every TICK of a burst, or while there is a backlog. Returns whether that is over."""
        with self.lock:
            self._flush_dirty()
            if self.backlog:
                self._push(now())
            calm = self.messages - self._tick_messages < CALM
            self._tick_messages = self.messages
            if calm and not self.backlog:
                if self._pace == GATHER:
                    self._pace = EAGER
                    self._window_frames = 0
                return True
            return False

    def make_room(self, timeout: float = inf) -> None:
        """Wait, for no longer than PATIENCE, until the backlog is sent. In asyncio a caller awaits that instead."""
        deadline = now() + timeout
        while self._pace != TURN and not self.push() and now() < deadline:
            sleep(TICK / 2)

    def push(self) -> bool:
        """Try to send the backlog. Returns whether it is gone, as it is after PATIENCE at the latest."""
        with self.lock:
            self._push(now())
            return not self.backlog

    def _push(self, time: float) -> None:
        if self.backlog and (time - self._stalled_at > PATIENCE or time < self._no_patience_until):
            if time >= self._no_patience_until:
                recent = time - self._no_patience_until < 2 * GRUDGE_MAX
                self._grudge = min(GRUDGE_MAX, self._grudge * 2) if recent else GRUDGE_MIN
                self._no_patience_until = time + self._grudge
            self._socket.set(XPUB_NODROP, 0)
            self._send(self.backlog.popleft())  # one frame is enough: whoever is full misses it, and counts itself out
            self._socket.set(XPUB_NODROP, 1)
            self._stalled_at = time
        with suppress(Again):
            while self.backlog:
                self._send(self.backlog[0])
                self.backlog.popleft()

    def heads(self, patterns: list[str]) -> list[tuple[bytes, int]]:
        """For HEADS: of each stream that fits, topic and the next seq to be sent."""
        matches = Matcher(patterns).matches
        with self.lock:
            return [(p.prefix[:-1], p.following) for p in self.publishers.values() if matches(p.topic)]

    def fetch(self, topic: bytes, first: int, last: int, bytes_max: int) -> Fetched:
        """For FETCH: what the history holds."""
        with self.lock:
            publisher = self.publishers.get(topic.decode(errors="replace"))
            return fetch(publisher.entries, first, last, bytes_max) if publisher else Fetched([], last)

    def topics(self, skip: int, most: int) -> list[tuple[bytes, int, int]]:
        """For STATISTICS: (topic, last seq, bytes) of streams in order of first use."""
        with self.lock:
            publishers = islice(self.publishers.values(), skip, skip + most)
            return [(p.prefix[:-1], p.seq, p.sent_bytes) for p in publishers]

    def announce_idle(self) -> None:
        """Called a few times a second: HEADs for streams that have fallen idle since the last call."""
        with self.lock:
            for _ in range(len(self._noisy)):
                publisher = self._noisy.popleft()
                if publisher.head_if_idle():
                    self._quiet[publisher] = None
                    self._quiet.move_to_end(publisher, last=False)
                else:
                    self._noisy.append(publisher)

    def heartbeat(self, number: int) -> None:
        """Called once a second: the heartbeat, and again the HEADs of streams, the longest unrepeated first."""
        with self.lock:
            header = frames.encode_frame(
                frames.HEARTBEAT_PREFIX, frames.HEARTBEAT, 0, 0, self.origin, number, time_ns()
            )
            self.transmit((header,), 0, 0, 0)
            for publisher in list(islice(self._quiet, HEADS_PER_HEARTBEAT)):
                publisher.send_head()
                self._quiet.move_to_end(publisher)

    def refuse(self, reason: Exception | None) -> None:
        """From now on nothing can be published: closed, or in a forked child (where the lock may be held for ever)."""
        self._refusal = reason
        if isinstance(reason, ForkedProcess):
            self.lock = Lock()  # the old one may have been held by a thread that is not here
        for publisher in self.publishers.values():
            publisher.reset()
        self.publishers.clear()

    def close(self, linger_ms: int) -> None:
        """Close the socket; what it holds is still sent for `linger_ms`."""
        with self.lock:
            self._socket.close(linger_ms)

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal
