"""Commands on the wire: a `Link` is the DEALER to one peer's inbox, the `Inbox` our own ROUTER.

A link asks and gets answers, an inbox is asked and answers. What a command *means* is not known here. All of it runs
on the engine's loop, but `Link.say` and `Inbox.answer`, which any thread may call: to wake the loop for them would take
about as long as the way to the peer. So each use of a socket holds its lock.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from math import inf
from threading import Lock, get_ident

from zmqbus.errors import RemoteProtocolError, ZmqbusError
from zmqbus.net.adapter import FdWatch
from zmqbus.net.sockets import (
    EVENTS,
    LINGER,
    NOBLOCK,
    POLLOUT,
    SNDMORE,
    Again,
    Pubs,
    Refused,
    Socket,
    SocketFactory,
    parse_monitor,
    plain_recv,
    plain_recv_from,
    plain_send,
)
from zmqbus.protocol.commands import Body, Command, Error, UnknownCommand, decode_command, encode_command

DRAIN_MAX = 64  # commands taken in a row before other work has its turn
HANG_UPS_WITHIN = 2.0  # seconds between two, for a verdict: libzmq dials again within 0.4
MECHANISM_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: one of the two has no key
PASS_KEY = "pass it one: key= or --key-file"

ZERO_COPY_MIN = 64 * 1024  # bytes of a frame from which lending it costs less than a copy

Answer = Callable[[Command | None], None]
"""Called once, with the answer, or with None when there is none in time. What is followed: each time, and with None
when the link is closed."""


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
        on_refused: Callable[[Link, str], None] | None,
        on_lost: Callable[[Link], None] | None = None,
    ) -> None:
        """`hello` is called until it returns True: at the first moment at which the peer can be reached.

        `on_refused` is told why a handshake failed, as far as that can be known; None saves the monitor for it.
        `on_lost`: see `guard`.
        """
        self.endpoint = endpoint
        self.origin: int | None = None
        self.pubs: Pubs | None = None  # of the peer, once known
        self.declared: set[int] = set()  # our subscriptions that this peer was told of
        self.services: list[str] = []  # of ours, likewise
        self.awaits_welcome = False  # it was sent a HELLO, and has not answered yet
        self._factory = factory
        self._loop = loop
        self._on_command = on_command
        self._on_garbage = on_garbage
        self._pending: dict[int, tuple[Answer, asyncio.TimerHandle]] = {}
        self._followed: dict[int, Answer] = {}
        self._requests = 0
        self._hello: Callable[[Link], bool] | None = hello
        self._on_refused = on_refused
        self._on_lost = on_lost
        self._guarded = False
        self._broken_off_at = -inf
        self._socket = factory.dealer()
        self._lock = Lock()
        self._home = get_ident()
        self._put, self._take = putter(self._socket), plain_recv(self._socket)
        self._monitor: Socket | None = None
        self._monitor_watch: FdWatch | None = None
        if on_refused is not None:
            self._monitor = factory.handshake_monitor(self._socket, outcome=True)
        try:
            factory.connect(self._socket, endpoint)
        except ZmqbusError:
            self._close_socket(0)
            raise
        self._watch = FdWatch(loop, self._socket, self._drain, self._lock)
        if self._monitor is not None:
            self._monitor_watch = FdWatch(loop, self._monitor, self._drain_monitor)

    @property
    def is_connected(self) -> bool:
        """Whether something could be sent to the peer now."""
        with self._lock:
            writable = bool(int(self._socket.get(EVENTS)) & POLLOUT)
        self._watch.check()  # looking at EVENTS takes the signal of what has arrived
        return writable

    @property
    def is_answering(self) -> bool:
        """Whether the answer to our HELLO is under way."""
        return self.awaits_welcome and self.is_connected

    @property
    def is_guarded(self) -> bool:
        """Whether `on_lost` is told; see `guard`."""
        return self._guarded

    def guard(self) -> bool:
        """Have `on_lost` told whenever the connection breaks from now on, and when this is closed. False: nothing can
        be sent now, so that there may be no connection to lose.

        It means that what was in flight may be lost, either way, and not that the peer is dead, or stays away: libzmq
        dials again by itself. The monitor for it costs 16 KiB and two descriptors, so it is made where it is wanted.
        """
        if self._socket.closed:
            return False
        if self._monitor is None:
            with self._lock:
                self._monitor = self._factory.handshake_monitor(self._socket, outcome=True)
            self._monitor_watch = FdWatch(self._loop, self._monitor, self._drain_monitor)
        self._guarded = True
        return self.is_connected  # looked at last: a connection that broke just before the monitor stood shows here

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

    def follow(self, body: Body, on_answer: Answer, parts: Sequence[bytes] = ()) -> int:
        """Ask for what is answered again and again. Returns the request, for `say` and `unfollow`; 0: the peer cannot
        be reached now, and nothing is called."""
        self._requests += 1
        number = self._requests
        if not self._send(encode_command(body, number, parts)):
            return 0
        self._followed[number] = on_answer
        return number

    def say(self, body: Body, number: int) -> bool:
        """Say something about what is followed, so that objections come to it. Any thread. False: the peer cannot be
        reached."""
        return self._send(encode_command(body, number))

    def unfollow(self, number: int) -> None:
        """What still comes as an answer to it is ignored."""
        self._followed.pop(number, None)

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
        followed, self._followed = self._followed, {}
        for on_answer in followed.values():
            on_answer(None)
        self._lost()

    def _lost(self) -> None:
        if self._guarded and self._on_lost is not None:
            self._on_lost(self)

    def _close_socket(self, linger_ms: int) -> None:
        with self._lock:
            if self._monitor is None:
                self._socket.close(linger_ms)
            else:
                self._socket.set(LINGER, linger_ms)
                self._factory.close_monitored(self._socket, self._monitor)

    def _send(self, frame: bytes) -> bool:
        try:
            with self._lock:
                if self._socket.closed:
                    return False
                self._put(frame)
        except Again:
            return False
        finally:
            _check(self._watch, self._home)
        return True

    def _answered(self, number: int, command: Command | None) -> bool:
        if (on_answer := self._followed.get(number)) is not None:
            on_answer(command)
            return True
        entry = self._pending.pop(number, None)
        if entry is None:
            return False
        entry[1].cancel()
        entry[0](command)
        return True

    def _drain(self) -> bool | None:
        if self._hello is not None:  # the socket stirs when it is connected, too
            hello, self._hello = self._hello, None
            if not hello(self):
                self._hello = hello
        for turn in range(DRAIN_MAX):
            if turn and not self._watch.stirred():  # half of what it costs to have `recv` raise
                return None
            try:
                with self._lock:
                    frames = self._take()
            except Again:
                return False
            try:
                command = decode_command(frames[0]) if len(frames) == 1 else decode_frames(frames)
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
        while not self._monitor.closed:
            try:
                event, _, value = parse_monitor(self._monitor.recv_multipart(NOBLOCK))
            except Again:
                break
            if event == "DISCONNECTED":
                self._lost()
            if self._on_refused is None or not event.startswith("HANDSHAKE_FAILED"):
                continue
            if event == "HANDSHAKE_FAILED_NO_DETAIL":
                # It hung up. So does, once, a peer that is closing; one that stands still is cut off after 3 s.
                last, self._broken_off_at = self._broken_off_at, self._loop.time()
                if self._broken_off_at - last > HANG_UPS_WITHIN:
                    continue
            self._on_refused(self, _why_refused(event, value, self._factory.secure))
        return False


def _why_refused(event: str, value: int, have_key: bool) -> str:
    """What a failed handshake says about the peer."""
    if event == "HANDSHAKE_FAILED_NO_DETAIL":
        if have_key:
            return "it breaks off every handshake, so that it has another bus key, or none"
        return f"it breaks off every handshake: it seems to have a bus key, and this node has none ({PASS_KEY})"
    if value == MECHANISM_MISMATCH:
        if have_key:
            return "it has no bus key, and this node has one"
        return f"it has a bus key, and this node has none ({PASS_KEY})"
    if event == "HANDSHAKE_FAILED_AUTH":
        return f"it does not admit our key (status {value})"
    return f"the handshake failed ({event}, {value:#x}): is that a zmqbus node?"


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
        self._lock = Lock()
        self._home = get_ident()
        self._on_command = on_command
        self._on_garbage = on_garbage
        self._put, self._take = putter(socket), plain_recv_from(socket)
        self._draining = False
        self._watch = FdWatch(loop, socket, self._drain, self._lock)

    def answer(self, identity: bytes, body: Body, request: int, batches: Sequence[bytes] = ()) -> bool:
        """Send to whoever asked. Any thread. False: gone, or not reading its answers; it will ask again if it still
        wants to."""
        frame = encode_command(body, request, batches)
        try:
            with self._lock:
                if self._socket.closed:
                    return False  # what waited for a disk may come late
                self._put(frame, identity)
        except Refused as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        finally:
            if not self._draining:  # which looks when it is done with a command
                _check(self._watch, self._home)
        return True

    def close(self, linger_ms: int) -> None:
        """Stop listening. The socket is closed as well; what it was given is still sent for `linger_ms`."""
        self._watch.close()
        with self._lock:
            self._socket.close(linger_ms)

    def _drain(self) -> bool | None:
        for _ in range(DRAIN_MAX):
            self._draining = True
            try:
                if not self._take_in():
                    return False
            finally:
                self._draining = False
            if not self._watch.stirred():
                return None
        return True

    def _take_in(self) -> bool:
        try:
            with self._lock:
                identity, frames = self._take()
        except Again:
            return False
        try:
            command = decode_command(frames[0]) if len(frames) == 1 else decode_frames(frames)
        except UnknownCommand as error:
            self.answer(identity, Error("unknown", str(error)), error.request)
        except RemoteProtocolError as error:
            self._on_garbage(error)
            self.answer(identity, Error("protocol", str(error)), 0)
        else:
            self._on_command(identity, command)
        return True


def _check(watch: FdWatch, home: int) -> None:
    """After a use of its socket, by whichever thread."""
    if get_ident() == home:
        watch.check()
    else:
        watch.check_from_afar()


def putter(socket: Socket) -> Callable[..., None]:
    """Sends a command's frame, behind an identity if there is one, without waiting."""
    plain = plain_send(socket)

    def put(frame: bytes, identity: bytes = b"") -> None:
        if identity:
            plain(identity, NOBLOCK | SNDMORE)
        if len(frame) < ZERO_COPY_MIN:
            plain(frame, NOBLOCK)
        else:
            socket.send(frame, NOBLOCK, copy=False)

    return put


def decode_frames(frames: Sequence[bytes | memoryview]) -> Command:
    """See `decode_command`."""
    if len(frames) != 1:
        raise RemoteProtocolError(f"command: {len(frames)} frames, not one")
    return decode_command(frames[0])
