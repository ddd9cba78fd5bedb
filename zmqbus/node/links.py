"""Commands over sockets: a `Link` is the DEALER to one peer's inbox, the `Inbox` is our own ROUTER.

A link asks and gets answers; an inbox is asked and answers. Both run on the engine's loop. What a command *means*
is not known here.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence

from zmqbus.errors import RemoteProtocolError
from zmqbus.net.adapter import FdWatch
from zmqbus.net.sockets import NOBLOCK, Again, Refused, Socket, SocketFactory
from zmqbus.protocol.commands import Body, Command, Error, UnknownCommand, decode_command, encode_command

DRAIN_MAX = 64  # commands taken in a row before other work has its turn

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
        self._factory = factory
        self._loop = loop
        self._on_command = on_command
        self._on_garbage = on_garbage
        self._pending: dict[int, tuple[Answer, asyncio.TimerHandle]] = {}
        self._requests = 0
        self._hello: Callable[[Link], bool] | None = hello
        self._socket = factory.dealer()
        self._monitor = factory.handshake_monitor(self._socket) if factory.secure else None
        factory.connect(self._socket, endpoint)
        self._watch = FdWatch(loop, self._socket, self._drain)
        self._monitor_watch = FdWatch(loop, self._monitor, self._drain_monitor) if self._monitor else None

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

    def close(self, linger_ms: int = 0) -> None:
        """Let go of the peer. Questions that are still open get None."""
        self._watch.close()
        if self._monitor is not None and self._monitor_watch is not None:
            self._monitor_watch.close()
            self._factory.close_monitored(self._socket, self._monitor)
        else:
            self._socket.close(linger_ms)
        for number in list(self._pending):
            self._answered(number, None)

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
            if not self._answered(command.request, command):
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
