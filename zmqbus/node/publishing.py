"""The sending path: publish, batch, transmit, remember. Any thread may publish; one lock orders them all.

A message's way out: `Publisher.send` appends it to its stream's batch; `flush` packs the batch into one frame, gives it
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
from itertools import islice
from math import inf
from threading import Lock
from typing import Any

from zmqbus.errors import ForkedProcess, MessageTooLarge, TooManyStreams, UnsupportedValue
from zmqbus.net.clock import now, sleep, time_ns
from zmqbus.net.sockets import NOBLOCK, SNDHWM, SNDMORE, XPUB_NODROP, Again, Socket
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
SEND_BYTES_MAX = 32 * 1024 * 1024  # queued for one subscriber
SAMPLE_BYTES = 2 * 1024 * 1024  # after so many, or 256 frames, the limit is adapted to their size
FRAMES_MIN, FRAMES_MAX = 8, 65_536  # bounds of the socket's own limit, which counts frames

HEADS_PER_HEARTBEAT = 64  # repeated each second, so that the loss of a HEAD is made good too

EAGER, GATHER, TURN = range(3)


class Publisher:
    """One topic of one node, ready for hot loops: `node.publisher("logs.web1").send(value)`."""

    __slots__ = (
        "_acquire",
        "_base",
        "_chunks",
        "_count",
        "_head_at",
        "_headers",
        "_out",
        "_prefix",
        "_quiet",
        "_release",
        "_size",
        "_values",
        "entries",
        "sent_bytes",
        "topic",
    )

    def __init__(self, out: Outlet, topic: str, encoded: bytes) -> None:
        self.topic = topic
        self.entries: deque[Entry] = deque()  # this stream's part of the history
        self.sent_bytes = 0
        self._prefix = encoded + b"\0"
        self._out = out
        self._acquire, self._release = out.lock.acquire, out.lock.release
        self._base = 0  # seq of the last flushed message
        self._count = 0  # messages in the batch that is being gathered: chunks, then values
        self._size = 0  # bytes of the large ones among them
        self._values: list[bytes | str] = []  # packed all at once by one C call
        self._chunks: list[bytes] = []  # already packed: what could have failed, or changed before the flush
        self._headers: list[bytes] | None = None
        self._quiet = True  # not waiting for a HEAD
        self._head_at = 0

    def send(self, value: object, headers: dict[str, Any] | None = None) -> int:
        """Publish a value; returns its seq, the same as `Node.publish`.

        Raises:
            UnsupportedValue: it cannot be carried by msgpack.
            MessageTooLarge: it is larger than 64 MiB.
            NodeClosed: the node has been closed.
        """
        out = self._out
        kind = value.__class__
        if kind is bytes or (kind is str and value.isascii()):  # type: ignore[attr-defined]
            packed = None
            size = len(value)  # type: ignore[arg-type]
        else:
            packed = encode_value(value)
            size = len(packed)
        self._acquire()
        try:
            if headers is not None or size >= EXTERNAL_BYTES_MIN:
                seq = self._put_special(value, packed, size, headers)
            else:
                if packed is None:
                    self._values.append(value)  # type: ignore[arg-type]
                else:
                    if self._values:
                        self._fold()
                    self._chunks.append(packed)
                if self._headers is not None:
                    self._headers.append(b"\xc0")
                count = self._count = self._count + 1
                seq = self._base + count
                if size > SMALL:
                    self._size += size
                if count == 1:
                    out.urge(self)
                elif count >= BATCH_MESSAGES_MAX or self._size >= BATCH_BYTES_MAX:
                    self.flush()
        finally:
            self._release()
        if out.backlog:
            out.make_room()
        return seq

    @property
    def seq(self) -> int:
        """Seq of the last message published."""
        return self._base + self._count

    def _put_special(self, value: Any, packed: bytes | None, size: int, headers: dict[str, Any] | None) -> int:
        """A message with headers, or one so large that it travels alone and uncopied. Under the lock."""
        if size > MESSAGE_BYTES_MAX:
            raise MessageTooLarge(size, MESSAGE_BYTES_MAX)
        packed_headers = None
        if headers is not None:
            if not isinstance(headers, dict) or not all(isinstance(key, str) for key in headers):
                raise UnsupportedValue(headers, "headers are a dict with str keys")
            packed_headers = encode_value(headers)
        if size >= EXTERNAL_BYTES_MIN:
            self.flush()
            self._count = 1
            if packed_headers is not None:
                body = b"\x92\x91" + (packed or encode_value(value)) + b"\x91" + packed_headers
                self._transmit(frames.EXTERNAL | frames.HEADERS, b"", body)
            elif value.__class__ is bytes:
                self._transmit(frames.EXTERNAL | frames.RAW, b"", value)
            else:
                self._transmit(frames.EXTERNAL, b"", b"\x91" + (packed or encode_value(value)))
            return self._base
        if self._headers is None:
            self._headers = [b"\xc0"] * self._count
        self._headers.append(packed_headers or b"\xc0")
        self._fold()
        self._chunks.append(packed or encode_value(value))
        self._count += 1
        self._size += size + len(packed_headers or b"")
        seq = self._base + self._count
        if self._count == 1:
            self._out.urge(self)
        elif self._count >= BATCH_MESSAGES_MAX or self._size >= BATCH_BYTES_MAX:
            self.flush()
        return seq

    def _fold(self) -> None:
        if self._values:
            self._chunks.append(frames.array_body(self._values))
            self._values = []

    def flush(self) -> None:
        """Send what has been gathered. Under the lock."""
        count = self._count
        if not count:
            return
        if not self._chunks:
            payload = encode_values(self._values)
            self._values = []
        else:
            self._fold()
            payload = b"".join((frames.array_header(count), *self._chunks))
            self._chunks = []
        flags = 0
        if self._headers is not None:
            payload = b"".join((b"\x92", payload, frames.array_header(count), *self._headers))
            self._headers = None
            flags = frames.HEADERS
        self._transmit(flags, payload)

    def _transmit(self, flags: int, payload: bytes, external: bytes | None = None) -> None:
        out = self._out
        count, first = self._count, self._base + 1
        self._count = self._size = 0
        self._base += count
        time = time_ns()
        frame = frames.encode_frame(self._prefix, frames.DATA, flags, count, out.origin, first, time, payload)
        parts = (frame,) if external is None else (frame, external)
        out.history.append(self.entries, first, first + count, parts)
        size = len(frame) if external is None else len(frame) + len(external)
        self.sent_bytes += size
        out.transmit(parts, size, count, time)
        if self._quiet:
            self._quiet = False
            out.woken(self)

    def reset(self, lock: Lock) -> None:
        """Nothing will be sent any more; so that the next `send` finds out at once."""
        self._acquire, self._release = lock.acquire, lock.release
        self._count = self._size = 0
        self._values, self._chunks, self._headers = [], [], None

    def head_if_idle(self) -> bool:
        """Send a HEAD if nothing was sent since the last look. Under the lock. Returns whether it is quiet now."""
        if self._head_at != self._base:
            self._head_at = self._base
            return False
        self.send_head()
        self._quiet = True
        return True

    def send_head(self) -> None:
        """Say how far this stream has come, on its own topic, behind all that was sent. Under the lock."""
        out = self._out
        out.transmit(
            (frames.encode_frame(self._prefix, frames.HEAD, 0, 0, out.origin, self._base + 1, time_ns()),), 0, 0, 0
        )


class Outlet:
    """All streams of one node, their PUB socket and their history."""

    def __init__(self, socket: Socket, origin: int, history_bytes: int, in_turns: Callable[[], None] | None) -> None:
        """`in_turns`: asyncio: asks for one `flush_all` in this turn of the loop."""
        self.origin = origin
        self.lock = Lock()
        self.history = History(history_bytes)
        self.publishers: dict[str, Publisher] = {}
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
        self._sampled = (0, 0)
        self._frames_max = 0
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
        if self._pace == EAGER:
            publisher.flush()
            return
        if self._refusal is not None:
            self._check()
        self._dirty.append(publisher)
        if self._pace == TURN and len(self._dirty) == 1 and self._in_turns is not None:
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
        if not self.frames & 0xFF or self.bytes - self._sampled[0] > SAMPLE_BYTES:
            self._adapt()
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
            self._socket.send(parts[1], NOBLOCK, copy=False)
        except Again:  # it must follow its first part, whoever misses it
            self._socket.set(XPUB_NODROP, 0)
            self._socket.send(parts[1], NOBLOCK, copy=False)
            self._socket.set(XPUB_NODROP, 1)

    def _adapt(self) -> None:
        """Turn the byte budget into the socket's limit, which counts frames."""
        sent, frames_sent = self._sampled
        self._sampled = (self.bytes, self.frames)
        mean = (self.bytes - sent) // max(1, self.frames - frames_sent) + 256
        wanted = max(FRAMES_MIN, min(FRAMES_MAX, SEND_BYTES_MAX // mean))
        if not self._frames_max // 2 < wanted <= self._frames_max:
            self._frames_max = wanted
            self._socket.set(SNDHWM, wanted)

    # --- the rest takes the lock itself ----------------------------------------------------------

    def flush_all(self) -> None:
        """Send everything that has been gathered."""
        with self.lock:
            self._flush_dirty()

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for publisher in dirty:
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

    def make_room(self) -> None:
        """Wait, for no longer than PATIENCE, until the backlog is sent. In asyncio a caller awaits that instead."""
        while self._pace != TURN and not self.push():
            sleep(TICK / 2)

    def push(self) -> bool:
        """Try to send the backlog. Returns whether it is gone, as it is after PATIENCE at the latest."""
        with self.lock:
            self._push(now())
            return not self.backlog

    def _push(self, time: float) -> None:
        lossy = time - self._stalled_at > PATIENCE or time < self._no_patience_until
        try:
            if lossy:
                self._socket.set(XPUB_NODROP, 0)
                if time >= self._no_patience_until:
                    recent = time - self._no_patience_until < 2 * GRUDGE_MAX
                    self._grudge = min(GRUDGE_MAX, self._grudge * 2) if recent else GRUDGE_MIN
                    self._no_patience_until = time + self._grudge
            while self.backlog:
                self._send(self.backlog[0])
                self.backlog.popleft()
        except Again:
            pass
        finally:
            if lossy:
                self._socket.set(XPUB_NODROP, 1)

    def heads(self, patterns: list[str]) -> list[tuple[bytes, int]]:
        """For HEADS: of each stream that fits, topic and the next seq to be sent."""
        matches = Matcher(patterns).matches
        with self.lock:
            return [(p._prefix[:-1], p._base + 1) for p in self.publishers.values() if matches(p.topic)]

    def fetch(self, topic: bytes, first: int, last: int, bytes_max: int) -> Fetched:
        """For FETCH: what the history holds."""
        with self.lock:
            publisher = self.publishers.get(topic.decode(errors="replace"))
            return fetch(publisher.entries, first, last, bytes_max) if publisher else Fetched([], last)

    def topics(self, skip: int, most: int) -> list[tuple[bytes, int, int]]:
        """For STATISTICS: (topic, last seq, bytes) of streams in order of first use."""
        with self.lock:
            publishers = islice(self.publishers.values(), skip, skip + most)
            return [(p._prefix[:-1], p.seq, p.sent_bytes) for p in publishers]

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
            self.lock = Lock()
        for publisher in self.publishers.values():
            publisher.reset(self.lock)
        self.publishers = {}

    def close(self, linger_ms: int) -> None:
        """Close the socket; what it holds is still sent for `linger_ms`."""
        with self.lock:
            self._socket.close(linger_ms)

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal
