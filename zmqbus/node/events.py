"""What happens on the bus, as seen by one node: a stream of small values for `node.events()`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock
from types import TracebackType
from typing import Protocol

import msgspec

from zmqbus.protocol.members.peers import DuplicateName, Peer, PeerJoined, PeerLeft
from zmqbus.protocol.streams.stream import Gap

EVENTS_MAX = 10_000  # waiting for one listener; a listener that does not listen loses the oldest
EARLY_MAX = 20  # warnings kept for the first listener: a start that goes wrong goes wrong in a few ways


class Warned(msgspec.Struct, frozen=True):
    """Something is wrong that does not stop the node: no mDNS, a peer with another key, undecodable bytes, …"""

    reason: str


class KeyMismatch(Warned, frozen=True):
    """A peer cannot be joined, because it has another bus key than this node, or only one of them has one."""


class Undelivered(msgspec.Struct, frozen=True):
    """What `close()` could not wait for: a subscriber that had not confirmed everything when time was up.

    With `unacked`, so many messages that no forwarder is known to have on disk (`peer` is "forwarder" then).
    """

    peer: str
    origin: int
    unacked: int = 0


class TopicInfo(msgspec.Struct, frozen=True):
    """One stream as its publisher knows it: `seq` of its last message, `bytes` sent on it so far."""

    topic: str
    origin: int
    node: str
    seq: int
    bytes: int


class ForwarderUp(msgspec.Struct, frozen=True):
    """A forwarder can be reached: what it claims is journaled, and what it has can be read."""

    peer: Peer


class ForwarderDown(msgspec.Struct, frozen=True):
    """A forwarder that was up is no longer there."""

    peer: Peer


class CaughtUp(msgspec.Struct, frozen=True):
    """A subscription to the log has come to the end of a journal: it has been handed all there was below `offset`.

    Told when that is so for the first time, and again whenever it had more than 8 MiB to catch up with.
    """

    forwarder: str
    journal: int
    offset: int


class LogGap(msgspec.Struct, frozen=True, gc=False):
    """Offsets `first` to `last` of a journal are no more, and a subscription to the log came to them: retention was
    quicker, or a repair declared them lost. Whose messages they were is not known."""

    forwarder: str
    journal: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many messages, of any topic."""
        return self.last - self.first + 1


class JobRefused(msgspec.Struct, frozen=True, gc=False):
    """A job was acknowledged, perhaps in vain: its lease had run out and another worker has it, or its owner or this
    worker was gone by then, so that it may be done once more."""

    topic: str
    origin: int
    seq: int
    attempt: int


Event = (
    PeerJoined | PeerLeft | ForwarderUp | ForwarderDown | DuplicateName | Gap | LogGap | CaughtUp | JobRefused | Warned
)


class Listener(Protocol):
    """Who is told of events, from any thread."""

    def put(self, event: Event) -> None:
        """Something happened."""

    def close(self) -> None:
        """The node is closed."""


class Listeners:
    """Who listens to one node. Any thread may call any of it.

    While a node starts nobody can listen yet, and what is wrong then is told only once: the first warnings are kept
    for whoever listens first.
    """

    def __init__(self) -> None:
        self.present: tuple[Listener, ...] = ()
        self._early: list[Warned] | None = []  # None: somebody has listened
        self._lock = Lock()

    def add(self, listener: Listener) -> None:
        """Tell it of every event from now on."""
        with self._lock:
            for event in self._early or ():
                listener.put(event)
            self._early = None
            self.present = (*self.present, listener)

    def forget(self, listener: Listener) -> None:
        """No longer."""
        with self._lock:
            self.present = tuple(other for other in self.present if other is not listener)

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        with self._lock:
            present = self.present
            if self._early is not None and isinstance(event, Warned) and len(self._early) < EARLY_MAX:
                self._early.append(event)
        for listener in present:
            listener.put(event)


class EventStream:
    """The events of one node from the call of `events()` on. An iterator; `get` returns None when there is none.

    The first stream of a node begins with the warnings of before, such as those of its start.

    Bounded: of more than 10,000 unread events the oldest are dropped, and counted in `dropped`.
    """

    def __init__(self, on_close: Callable[[EventStream], None]) -> None:
        self.dropped = 0
        self._events: deque[Event] = deque()
        self._changed = Condition()
        self._closed = False
        self._on_close = on_close

    def put(self, event: Event) -> None:
        """Called by the node, from any thread."""
        with self._changed:
            self._events.append(event)
            if len(self._events) > EVENTS_MAX:
                self._events.popleft()
                self.dropped += 1
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None when `timeout` seconds have passed, or the stream or its node is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed, timeout)
            return self._events.popleft() if self._events else None

    def close(self) -> None:
        """End the stream; what is in it already can still be read."""
        self._on_close(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        event = self.get()
        if event is None:
            raise StopIteration
        return event

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncEventStream:
    """The events of one node from the call of `events()` on: `async for event in node.events()`.

    Bounded: of more than 10,000 unread events the oldest are dropped, and counted in `dropped`.
    """

    def __init__(self, on_close: Callable[[AsyncEventStream], None]) -> None:
        self.dropped = 0
        self._on_close = on_close
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Called by the node."""
        self._events.append(event)
        if len(self._events) > EVENTS_MAX:
            self._events.popleft()
            self.dropped += 1
        self._changed.set()

    async def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None when `timeout` seconds have passed, or the stream or its node is closed."""
        try:
            async with asyncio.timeout(timeout):
                while not self._events and not self._closed:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """End the stream; what is in it already can still be read."""
        self._on_close(self)
        self._closed = True
        self._changed.set()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncEventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event
