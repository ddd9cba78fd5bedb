"""All streams of a node: their pace, their history, and what is told of them when they are idle."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import islice
from math import inf
from threading import Lock

from zmqbus.errors import ForkedProcess, TooManyStreams
from zmqbus.net.clock import now, sleep, time_ns
from zmqbus.node.publishing.broadcast import Broadcast
from zmqbus.node.publishing.durability import wait_for_room
from zmqbus.node.publishing.publisher import EAGER, GATHER, TICK, TURN, Keeper, Publisher
from zmqbus.protocol import frames
from zmqbus.protocol.streams.acks import Ledger
from zmqbus.protocol.streams.history import Fetched, History, fetch
from zmqbus.protocol.streams.ring import BATCH_MESSAGES_MAX, ROOM_MIN
from zmqbus.protocol.topics import Matcher, encode_topic

BURST = 32  # sends within BURST_NS that make a burst
BURST_NS = 1_000_000
TURN_MESSAGES_MAX = 2048  # published without a turn of the loop: a millisecond or two
CALM = 8  # messages per tick below which a burst is over
STREAMS_MAX = 100_000  # about 1.5 KiB each, and 16 KiB more for one that ever filled a batch

HEADS_PER_HEARTBEAT = 64  # repeated each second, so that the loss of a HEAD is made good too


class Outlet:
    """All streams of one node, and their history.

    Args:
        broadcast: takes the frames.
        start_ticking: asks for a call of `tick` every TICK, until it returns True.
        in_turns: asyncio: asks for one `flush_all` in this turn of the loop.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        origin: int,
        history: History,
        acks: int,
        start_ticking: Callable[[], None],
        in_turns: Callable[[], None] | None,
    ) -> None:
        self.origin = origin
        self.lock = Lock()
        self.history = history
        self.ledger = Ledger(history, acks)
        self.publishers: dict[str, Publisher] = {}
        self.broadcast = broadcast
        self.backlog = broadcast.backlog
        self.pace = EAGER if in_turns is None else TURN
        self.refusal: Exception | None = None
        """Why nothing more can be published."""
        self.closed = False
        self.outbox: Keeper | None = None
        self.on_opened: Callable[[Publisher], None] = lambda publisher: None
        """Told of every new stream, under the lock."""
        self.messages = self.frames = self.bytes = 0
        self.crowded: list[None] = []
        """asyncio: not empty when publishers should let the loop have its turn."""
        self.share = BATCH_MESSAGES_MAX
        """asyncio: what each of the streams that gather may gather, so that it is not too much for one turn."""
        self._start_ticking = start_ticking
        self._in_turns = in_turns
        self._gathering: list[Publisher] = []
        self._noisy: deque[Publisher] = deque()  # sent something, HEAD to follow
        self._quiet: OrderedDict[Publisher, None] = OrderedDict()  # whose HEAD is repeated, the next first
        self._window_ns = 0
        self._window_frames = 0
        self._tick_messages = 0

    def publisher(self, topic: str, *, internal: bool = False) -> Publisher:
        """The publisher for a topic, made on first use; `internal` ones may be reserved topics.

        Raises:
            TopicError, TooManyStreams, NodeClosed
        """
        publisher = self.publishers.get(topic)
        if publisher is None:
            encoded = encode_topic(topic, internal=internal)
            with self.lock:
                if self.refusal is not None:
                    raise self.refusal
                if len(self.publishers) >= STREAMS_MAX and topic not in self.publishers:
                    raise TooManyStreams(STREAMS_MAX)
                if (publisher := self.publishers.get(topic)) is None:
                    publisher = Publisher(self, topic, encoded)
                    self.ledger.opened(topic, publisher.shelf)
                    self.publishers[topic] = publisher
                    self.on_opened(publisher)
        return publisher

    # --- what publishers call, under the lock ------------------------------------------------------

    def expect(self, publisher: Publisher) -> None:
        """A stream gathers: to be flushed by the next tick, or at the end of this turn."""
        self._gathering.append(publisher)
        if self._in_turns is not None:
            self.share = max(ROOM_MIN, 2 * TURN_MESSAGES_MAX // len(self._gathering))
            if len(self._gathering) == 1:
                self._in_turns()
            elif len(self._gathering) >= TURN_MESSAGES_MAX:
                self.crowded.append(None)

    def make_room(self, publisher: Publisher | None = None, timeout: float = inf) -> None:
        """Wait, for no longer than the broadcast's patience, until the backlog is sent. Not in asyncio.

        A publisher whose stream forwarders are to acknowledge then waits until the buffer has room for more.
        Takes the lock itself.
        """
        if self.pace == TURN:
            return
        deadline = now() + timeout
        while not self.push() and now() < deadline:
            sleep(TICK / 2)
        if publisher is not None and self.history.full:
            wait_for_room(self, publisher, inf)

    def count(self, size: int, count: int, time: int) -> None:
        """A frame of `count` messages was sent at `time`. Is this a burst?"""
        self.messages += count
        self.frames += 1
        self.bytes += size
        if self.pace == TURN:
            if self.backlog or self.history.full or self.messages - self._tick_messages >= TURN_MESSAGES_MAX:
                self.crowded.append(None)
        elif self.pace == EAGER:
            if time - self._window_ns > BURST_NS:
                self._window_ns = time
                self._window_frames = 0
            self._window_frames += 1
            if self._window_frames > BURST:
                self.pace = GATHER
                self._tick_messages = self.messages
                self._start_ticking()

    def woken(self, publisher: Publisher) -> None:
        """A stream is no longer quiet: a HEAD is to follow when it is again."""
        self._quiet.pop(publisher, None)
        self._noisy.append(publisher)

    # --- the rest takes the lock itself ----------------------------------------------------------

    def flush_all(self) -> None:
        """Send everything that has been gathered."""
        with self.lock:
            self._flush_gathering()
            self._tick_messages = self.messages
            self.crowded[:] = [None] if self.backlog or self.history.full else []

    def _flush_gathering(self) -> None:
        gathering, self._gathering = self._gathering, []
        for publisher in gathering:
            publisher.flush()

    def tick(self) -> bool:
        """Every TICK of a burst, or while there is a backlog. Returns whether that is over."""
        with self.lock:
            self._flush_gathering()
            self.broadcast.push()
            calm = self.messages - self._tick_messages < CALM
            self._tick_messages = self.messages
            if calm and not self.backlog:
                if self.pace == GATHER:
                    self.pace = EAGER
                    self._window_frames = 0
                return True
            return False

    def push(self) -> bool:
        """Try to send all that waits. Returns whether it is gone."""
        with self.lock:
            self.broadcast.send_trail()
            return self.broadcast.push()

    def tick_trail(self) -> bool:
        """Every TRAIL_PERIOD while something is published. Returns whether that is over."""
        with self.lock:
            return self.broadcast.tick_trail()

    def heads(self, patterns: list[str]) -> list[tuple[bytes, int]]:
        """For HEADS: of each stream that fits, topic and the next seq to be sent."""
        matches = Matcher(patterns).matches
        with self.lock:
            return [(p.prefix[:-1], p.following) for p in self.publishers.values() if matches(p.topic)]

    def oldest(self, topic: bytes) -> int:
        """The first message of a stream that the history has; one past the last, if it has none."""
        with self.lock:
            publisher = self.publishers.get(topic.decode(errors="replace"))
            if publisher is None:
                return 1
            entries = publisher.shelf.entries
            return entries[0][0] if entries else publisher.following

    def fetch(self, topic: bytes, first: int, last: int, bytes_max: int) -> Fetched:
        """For FETCH: what the history holds."""
        with self.lock:
            publisher = self.publishers.get(topic.decode(errors="replace"))
            return fetch(publisher.shelf.entries, first, last, bytes_max) if publisher else Fetched([], last)

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
            self.broadcast.send_live((header,))
            for publisher in list(islice(self._quiet, HEADS_PER_HEARTBEAT)):
                publisher.send_head()
                self._quiet.move_to_end(publisher)
            for publisher in self._unacked():
                publisher.send_head()

    def _unacked(self) -> list[Publisher]:
        """Streams of which an acknowledgement is due, and may have been lost on its way: a HEAD asks for it again."""
        owing = (
            publisher
            for topic, account in self.ledger.accounts.items()
            if account.claimants and account.durable < (publisher := self.publishers[topic]).sent and account.unacked
        )
        return list(islice(owing, HEADS_PER_HEARTBEAT))

    # --- forwarders --------------------------------------------------------------------------------

    def claimed(self, journal: int, patterns: Sequence[str]) -> None:
        """A forwarder is there, and claims these topics."""
        with self.lock:
            self.ledger.claimed(journal, patterns, {topic: p.shelf for topic, p in self.publishers.items()})

    def acked(self, journal: int, heads: Sequence[tuple[bytes, int]], full: bool) -> None:
        """A forwarder acknowledges what it has on disk."""
        with self.lock:
            self.ledger.acked(journal, [(topic.decode(errors="replace"), seq) for topic, seq in heads], full)

    def refuse(self, reason: Exception) -> None:
        """Nothing can be published any more, but what has been is still sent: by a `flush_all` that is to follow.

        A thread that publishes without end may hold the lock nearly all the time. It is told before we ask for it.
        """
        self.refusal = reason
        if isinstance(reason, ForkedProcess):
            self.lock = Lock()  # in the child: the old one may be held by a thread that is not here
            for publisher in self.publishers.values():
                publisher.full = 0  # so that the next `send` finds out

    def close(self, linger_ms: int) -> None:
        """Close the socket; what it holds is still sent for `linger_ms`."""
        with self.lock:
            self.closed = True
            self.broadcast.close(linger_ms)
