"""A SUB to many PUBs: kept connected on the engine's loop, and read by whoever consumes, perhaps on another thread."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from zmqbus.net.adapter import FdWatch
from zmqbus.net.clock import now
from zmqbus.net.sockets import NOBLOCK, Again, Socket, SocketFactory, parse_monitor

DRAIN_MAX = 64  # events taken in a row before other work has its turn
REDIAL = (0.5, 1.5)  # seconds, after a failed handshake


class Gate:
    """To a SUB, which belongs to whoever reads it, and whose reader may sleep in it. The engine comes to visit."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake`: a reader that is `asleep` is to look again, soon."""
        self.wake = wake
        self.asleep = False  # set by the reader before it looks at `wanted`, so that no wake-up is missed
        self.wanted = False
        self.lock = Lock()  # held by whoever uses the socket
        self._door = Lock()  # held by a guest who waits, so that the reader lets it in first

    def enter(self, until: float | None) -> bool:
        """The reader's way in; it releases `lock` afterwards. False: another was there until then (None: no limit)."""
        if self.wanted:
            with self._door:
                pass
        return self.lock.acquire(timeout=-1 if until is None else max(0.0, until - now()))

    @contextmanager
    def visit(self) -> Iterator[None]:
        """The engine's way in and out."""
        with self._door:
            self.wanted = True
            self.wake()
            with self.lock:
                self.wanted = False
                yield
        self.wake()  # the visit may have taken the signal of what has arrived


class Feed:
    """A SUB's connections. Whoever reads it may be another thread: so the engine goes through the gate.

    A failed handshake ends libzmq's own attempts for good; here the endpoint is dialled again after a pause.
    """

    def __init__(
        self,
        factory: SocketFactory,
        loop: asyncio.AbstractEventLoop,
        socket: Socket,
        gate: Gate,
        on_attached: Callable[[], None],
    ) -> None:
        self.socket = socket
        self.gate = gate
        self.attached: set[str] = set()
        """Endpoints whose connection stands: what they send from now on arrives, unless a queue is full."""
        self.rescue: Callable[[list[bytes]], None] = lambda parts: None
        """Takes the message that was in the way of closing a connection."""
        self._factory = factory
        self._loop = loop
        self._on_attached = on_attached
        self._endpoints: set[str] = set()
        self._monitor = factory.handshake_monitor(socket, outcome=True)
        self._watch = FdWatch(loop, self._monitor, self._drain)

    def connect(self, endpoint: str) -> None:
        """Receive from one more PUB."""
        self._endpoints.add(endpoint)
        with self.gate.visit():
            if not self.socket.closed:
                self._factory.connect(self.socket, endpoint)

    def disconnect(self, endpoint: str) -> None:
        """No longer receive from a PUB."""
        self._endpoints.discard(endpoint)
        self.attached.discard(endpoint)
        with self.gate.visit():
            if not self.socket.closed:
                # Who has looked at EVENTS has had libzmq take out the first part of the next message. Should that be
                # one of this connection, and have a second part, closing it now would end the process (fq.cpp, !_more).
                with contextlib.suppress(Again):
                    self.rescue(self.socket.recv_multipart(NOBLOCK))
                self._factory.disconnect(self.socket, endpoint)

    def close(self) -> None:
        """Let go of all. On a visit."""
        self._watch.close()
        self._endpoints.clear()
        self._factory.close_monitored(self.socket, self._monitor)

    def _drain(self) -> bool:
        for _ in range(DRAIN_MAX):
            try:
                event, endpoint, _ = parse_monitor(self._monitor.recv_multipart(NOBLOCK))
            except Again:
                return False
            if event == "HANDSHAKE_SUCCEEDED":
                self.attached.add(endpoint)
                self._on_attached()
            else:
                self.attached.discard(endpoint)
                if event != "DISCONNECTED" and event != "HANDSHAKE_FAILED_NO_DETAIL":
                    self._loop.call_later(random.uniform(*REDIAL), self._redial, endpoint)
        return True

    def _redial(self, endpoint: str) -> None:
        if endpoint in self._endpoints and endpoint not in self.attached:
            self.disconnect(endpoint)
            self.connect(endpoint)
