"""Connections: a `Link` is the DEALER to one peer's inbox, the `Inbox` our own ROUTER, a `Feed` a SUB to many PUBs,
the `Broadcast` our own PUB.

A link asks and gets answers, an inbox is asked and answers. What a command *means* is not known here. A feed is
connected and kept connected here, and read by somebody else. All of it runs on the engine's loop, but for the
broadcast, which runs wherever somebody publishes.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from threading import Lock

from zmqbus.errors import RemoteProtocolError, ZmqbusError
from zmqbus.net.adapter import FdWatch
from zmqbus.net.clock import now
from zmqbus.net.sockets import (
    EVENTS,
    LINGER,
    NOBLOCK,
    POLLOUT,
    SNDMORE,
    XPUB_NODROP,
    Again,
    Refused,
    Socket,
    SocketFactory,
    parse_monitor,
    plain_send,
)
from zmqbus.protocol.commands import Body, Command, Error, UnknownCommand, decode_command, encode_command

DRAIN_MAX = 64  # commands taken in a row before other work has its turn
REDIAL = (0.5, 1.5)  # seconds, after a failed handshake
PATIENCE = 0.5  # seconds that publishers wait for a full subscriber to read half its queue
GRUDGE_MIN, GRUDGE_MAX = 1.0, 32.0  # seconds for which they do not, after that was in vain; doubled each time
ZERO_COPY_MIN = 256 * 1024  # from here on a copy costs more than the thread with which pyzmq tracks what is lent

Answer = Callable[[Command | None], None]
"""Called once, with the answer, or with None when there is none in time."""


class Link:
    """The way to one peer's inbox. `origin` is unknown (None) until it has answered."""

    def __init__(
        self,
        factory: SocketFactory,
        loop: asyncio.AbstractEventLoop,
        endpoint: str,
        on_command: Callable[[Link, Command], None],
        on_garbage: Callable[[RemoteProtocolError], None],
        hello: Callable[[Link], bool],
    ) -> None:
        """`hello` is called until it returns True: at the first moment at which the peer can be reached."""
        self.endpoint = endpoint
        self.origin: int | None = None
        self.pub: str | None = None  # the peer's PUB, once known
        self.declared: set[int] = set()  # our subscriptions that this peer was told of
        self.refused: str | None = None  # why the handshake failed, if it did
        self.awaits_welcome = False  # it was sent a HELLO, and has not answered yet
        self._factory = factory
        self._loop = loop
        self._on_command = on_command
        self._on_garbage = on_garbage
        self._pending: dict[int, tuple[Answer, asyncio.TimerHandle]] = {}
        self._requests = 0
        self._hello: Callable[[Link], bool] | None = hello
        self._socket = factory.dealer()
        self._monitor = factory.handshake_monitor(self._socket) if factory.secure else None
        try:
            factory.connect(self._socket, endpoint)
        except ZmqbusError:
            self._close_socket(0)
            raise
        self._watch = FdWatch(loop, self._socket, self._drain)
        self._monitor_watch = FdWatch(loop, self._monitor, self._drain_monitor) if self._monitor else None

    @property
    def is_connected(self) -> bool:
        """Whether something could be sent to the peer now."""
        writable = bool(int(self._socket.get(EVENTS)) & POLLOUT)
        self._watch.check()  # looking at EVENTS takes the signal of what has arrived
        return writable

    def send(self, body: Body) -> bool:
        """Say something that needs no answer. False: the peer cannot be reached now."""
        return self._send(encode_command(body))

    def ask(self, body: Body, on_answer: Answer, timeout: float) -> bool:
        """Ask; `on_answer` is called later, in any case. False: the peer cannot be reached now, nothing is called."""
        self._requests += 1
        number = self._requests
        if not self._send(encode_command(body, number)):
            return False
        self._pending[number] = (on_answer, self._loop.call_later(timeout, self._answered, number, None))
        return True

    async def question(self, body: Body, timeout: float) -> Command | None:
        """Ask and wait for the answer; None when there is none within `timeout` seconds."""
        future: asyncio.Future[Command | None] = self._loop.create_future()

        def answered(command: Command | None) -> None:
            if not future.done():  # whoever waited may have given up
                future.set_result(command)

        return await future if self.ask(body, answered, timeout) else None

    def close(self, linger_ms: int = 0) -> None:
        """Let go of the peer. Questions that are still open get None."""
        self._watch.close()
        if self._monitor_watch is not None:
            self._monitor_watch.close()
        self._close_socket(linger_ms)
        for number in list(self._pending):
            self._answered(number, None)

    def _close_socket(self, linger_ms: int) -> None:
        if self._monitor is None:
            self._socket.close(linger_ms)
        else:
            self._socket.set(LINGER, linger_ms)
            self._factory.close_monitored(self._socket, self._monitor)

    def _send(self, parts: Sequence[bytes]) -> bool:
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart(parts, NOBLOCK)
        except Again:
            return False
        finally:
            self._watch.check()
        return True

    def _answered(self, number: int, command: Command | None) -> bool:
        entry = self._pending.pop(number, None)
        if entry is None:
            return False
        entry[1].cancel()
        entry[0](command)
        return True

    def _drain(self) -> bool:
        if self._hello is not None:  # the socket stirs when it is connected, too
            hello, self._hello = self._hello, None
            if not hello(self):
                self._hello = hello
        for _ in range(DRAIN_MAX):
            try:
                parts = self._socket.recv_multipart(NOBLOCK)
            except Again:
                return False
            try:
                command = decode_command(parts)
            except RemoteProtocolError as error:
                self._on_garbage(error)
                continue
            stranger = isinstance(command.body, Error) and command.body.code == "hello"
            if (
                not self._answered(command.request, command) or stranger
            ):  # by a reconnect: whatever was asked, HELLO first
                self._on_command(self, command)
            if self._socket.closed:
                return False
        return True

    def _drain_monitor(self) -> bool:
        assert self._monitor is not None
        try:
            while True:
                self._monitor.recv_multipart(NOBLOCK)
                self.refused = "its key does not fit ours"
        except Again:
            return False


class Gate:
    """To a SUB, which belongs to whoever reads it, and whose reader may sleep in it. The engine comes to visit."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake`: a reader that is `asleep` is to look again, soon."""
        self.wake = wake
        self.asleep = False  # set by the reader before it looks at `wanted`, so that no wake-up is missed
        self.wanted = False
        self._lock = Lock()
        self._door = Lock()  # held by a guest who waits, so that the reader lets it in first

    def enter(self, until: float | None) -> bool:
        """The reader's way in; `leave` afterwards. False: another reader was there until then (None: no limit)."""
        if self.wanted:
            with self._door:
                pass
        return self._lock.acquire(timeout=-1 if until is None else max(0.0, until - now()))

    def leave(self) -> None:
        """The reader's way out."""
        self._lock.release()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """The engine's way in and out."""
        with self._door:
            self.wanted = True
            self.wake()
            with self._lock:
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


class Inbox:
    """Our ROUTER: hands out (identity, command), takes answers."""

    def __init__(
        self,
        socket: Socket,
        loop: asyncio.AbstractEventLoop,
        on_command: Callable[[bytes, Command], None],
        on_garbage: Callable[[RemoteProtocolError], None],
    ) -> None:
        self._socket = socket
        self._on_command = on_command
        self._on_garbage = on_garbage
        self._watch = FdWatch(loop, socket, self._drain)

    def answer(self, identity: bytes, body: Body, request: int, batches: Sequence[bytes] = ()) -> bool:
        """Send to whoever asked. False: gone, or not reading its answers; it will ask again if it still wants to."""
        try:
            self._socket.send_multipart([identity, *encode_command(body, request, batches)], NOBLOCK, copy=False)
        except Refused as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        finally:
            self._watch.check()
        return True

    def close(self) -> None:
        """Stop listening. The socket is closed as well."""
        self._watch.close()
        self._socket.close(0)

    def _drain(self) -> bool:
        for _ in range(DRAIN_MAX):
            try:
                identity, *parts = self._socket.recv_multipart(NOBLOCK)
            except Again:
                return False
            try:
                command = decode_command(parts)
            except UnknownCommand as error:
                self.answer(identity, Error("unknown", str(error)), error.request)
                continue
            except RemoteProtocolError as error:
                self._on_garbage(error)
                self.answer(identity, Error("protocol", str(error)), 0)
                continue
            self._on_command(identity, command)
        return True


class Broadcast:
    """Our PUB: a frame goes to every subscriber that wants it. One thread at a time, by the publishers' lock.

    A full subscriber. The socket is bounded, and refuses (XPUB_NODROP) when a matching subscriber's queue is full. The
    frame then waits in the backlog, and its publisher with it: that paces publishers to consumers that are nearly fast
    enough. But no longer than PATIENCE: then the frame goes to everybody else, that subscriber misses it and repairs
    it from the history; libzmq counts it out until it has read half its queue, so one that has stopped costs no more.
    For one that is alive but hopelessly slow, publishers do not wait again for a while, longer each time (GRUDGE).
    """

    def __init__(self, socket: Socket, on_stall: Callable[[], None]) -> None:
        """`on_stall`: a frame has to wait; now `push` from time to time, until it returns True."""
        self.backlog: deque[tuple[bytes, ...]] = deque()
        self.stalls = 0
        self._on_stall = on_stall
        self._socket = socket
        self._send_plain = plain_send(socket)
        self._stalled_at = 0.0
        self._no_patience_until = -inf
        self._grudge = GRUDGE_MIN

    def send(self, parts: tuple[bytes, ...]) -> None:
        """Send a frame, behind all that wait already."""
        if self.backlog:
            self.backlog.append(parts)
            return
        try:
            if len(parts) == 1:
                self._send_plain(parts[0], NOBLOCK)
            else:
                self._send(parts)
        except Again:
            self.backlog.append(parts)
            self.stalls += 1
            self._stalled_at = now()
            self._on_stall()

    def push(self) -> bool:
        """Try to send the backlog. Returns whether it is gone, as it is after PATIENCE at the latest."""
        if not self.backlog:
            return True
        time = now()
        if time - self._stalled_at > PATIENCE or time < self._no_patience_until:
            if time >= self._no_patience_until:
                recent = time - self._no_patience_until < 2 * GRUDGE_MAX
                self._grudge = min(GRUDGE_MAX, self._grudge * 2) if recent else GRUDGE_MIN
                self._no_patience_until = time + self._grudge
            self._socket.set(XPUB_NODROP, 0)
            self._send(self.backlog.popleft())  # one frame is enough: whoever is full misses it, and counts itself out
            self._socket.set(XPUB_NODROP, 1)
            self._stalled_at = time
        try:
            while self.backlog:
                self._send(self.backlog[0])
                self.backlog.popleft()
        except Again:
            return False
        return True

    def close(self, linger_ms: int) -> None:
        """Close the socket; what it holds is still sent for `linger_ms`, what waits for it is not."""
        self.backlog.clear()
        self._socket.close(linger_ms)

    def _send(self, parts: tuple[bytes, ...]) -> None:
        if len(parts) == 1:
            self._send_plain(parts[0], NOBLOCK)
            return
        self._socket.send(parts[0], NOBLOCK | SNDMORE)
        try:
            self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
        except Again:  # it must follow its first part, whoever misses it
            self._socket.set(XPUB_NODROP, 0)
            self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
            self._socket.set(XPUB_NODROP, 1)
