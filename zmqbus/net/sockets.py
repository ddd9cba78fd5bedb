"""The only place that makes, binds or connects ZeroMQ sockets, and therefore the place that keeps strangers out.

Rule 1: nothing else in zmqbus calls `bind` or `connect` on a socket (a test greps for it).
Rule 2: without a bus key everything stays on this machine: 127.0.0.0/8 and inproc, nothing else.
Rule 3: with a bus key every TCP socket is CURVE. Servers enforce a non-empty ZAP domain, so that nobody is admitted
        unless our own handler (zap.py) says so: not while it is missing, stopped or broken either. All three of
        CURVE, ZAP_DOMAIN and ZAP_ENFORCE_DOMAIN are needed; they are read back before every bind.
Rule 4: every socket has every limit set at creation. libzmq's own defaults (endless linger, unlimited messages,
        30 s handshakes) are for trusted networks.

One factory, one context, one I/O thread per node: nodes sharing a process share nothing, inproc names included.
What a role may do: PUB and ROUTER bind (server), SUB and DEALER connect (client). IPv4 only.

What is *not* set, and why: ZMTP heartbeats. A heartbeat on a connecting SUB with a finite RCVHWM aborts the whole
process when the application stalls (libzmq #3937, #4767, #4830), and turned an 8 s link loss into lost messages that
TCP alone would have carried. Liveness is the application's heartbeat on PUB; TCP keepalive and TCP_MAXRT clear up.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from ipaddress import IPv4Address
from typing import Any, Literal, TypeAlias, get_args

import zmq

from zmqbus.errors import AuthError, SetupError
from zmqbus.net.keys import BusKey, CurvePair

__all__ = [
    "FRAME_BYTES_MAX",
    "SOURCES",
    "SUBSCRIPTION_BYTES_MAX",
    "ZAP_DOMAIN",
    "Pubs",
    "Role",
    "Socket",
    "SocketFactory",
    "Source",
    "parse_endpoint",
    "parse_monitor",
]

# What the layer above needs of libzmq to send and receive on sockets made here. Plain ints: as flags of an enum, `|`
# alone takes longer than sending.
Again = zmq.Again
Refused = zmq.ZMQError
NOBLOCK = int(zmq.NOBLOCK)
SNDMORE = int(zmq.SNDMORE)
FD = int(zmq.FD)
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)
POLLOUT = int(zmq.POLLOUT)
LINGER = int(zmq.LINGER)
RCVMORE = int(zmq.RCVMORE)
RCVHWM = int(zmq.RCVHWM)
RCVTIMEO = int(zmq.RCVTIMEO)
SNDHWM = int(zmq.SNDHWM)
XPUB_NODROP = int(zmq.XPUB_NODROP)

Socket: TypeAlias = "zmq.Socket[bytes]"
Source = Literal["pub", "tap", "trail"]
"""What a SUB hears of a node: its PUB, the one for those who only look on, or the one for those who are in no hurry."""
SOURCES: tuple[Source, ...] = get_args(Source)
Pubs = Mapping[Source, str]
"""The endpoint of each."""
Role = Literal["inbox"] | Source
"""The endpoints that a node binds: its ROUTER, the inbox, and its PUBs."""

ZAP_DOMAIN = b"zmqbus"
FRAME_BYTES_MAX = (64 << 20) + (64 << 10)  # the largest message, 64 MiB, and 64 KiB for what is wrapped around it
SUBSCRIPTION_BYTES_MAX = 64 * 1024  # all that a PUB ever receives is subscriptions, well below this
COMMAND_FRAMES_MAX = 1000  # high-water mark of each peer's command pipe, either way; counts whole messages
SUBSCRIPTIONS_WAITING_MAX = 65_536  # per subscriber, until our PUB is next used; beyond, they wait at the subscriber
SOCKETS_MAX = 16_384  # per node: a DEALER for each peer, a SUB for each subscription; 'ulimit -n' comes first
MONITOR_EVENTS_MAX = 10_000  # unread events a monitor holds before it freezes the context; about 3 MB
BACKLOG = 512  # a whole LAN may boot, and dial us, at once; libzmq's 100 overflows
BRIEF = 4096  # bytes of a frame below which a copy costs less than a view of it
HANDSHAKE_MS = 3_000  # whoever has not finished by then is cut; libzmq's 30 s invites floods of idle connections
CONNECT_TIMEOUT_MS = 2_000  # then try anew: the kernel's own two minutes are for wide-area links
TCP_MAXRT_MS = 15_000  # survives a link that is away for 8 s; a host that is gone frees its pipe after this

_COMMON: dict[int, int] = {
    zmq.LINGER: 0,  # whoever closes a socket decides whether to wait; forgetting must not hang the exit
    zmq.IPV6: 0,
    zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
    zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS,
    zmq.BACKLOG: BACKLOG,
    # TCP_USER_TIMEOUT to Linux. It also cuts off a consumer stalled at its high-water mark for that long (its TCP
    # window is shut): it reconnects once it reads again, and what had not reached it is a gap to repair.
    zmq.TCP_MAXRT: TCP_MAXRT_MS,
    # Finds idle peers that vanished: first probe after 5 s, then every 3 s until TCP_MAXRT is over.
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 5,
    zmq.TCP_KEEPALIVE_INTVL: 3,
    zmq.TCP_KEEPALIVE_CNT: 4,
}

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

NO_KEY = "without a bus key zmqbus stays on this machine: create one with 'zmqbus keygen FILE' and pass --key-file/key="


class SocketFactory:
    """Makes one node's sockets, and binds and connects them under one security policy.

    `key`: the bus key, or None for a node that stays on this machine. `frame_bytes_max`: the largest frame
    accepted from a peer, in bytes; a peer that sends a larger one is disconnected.

    The factory's own methods may be called from any thread; each socket is used by one thread at a time.
    """

    def __init__(self, key: BusKey | None, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._key = key
        self._frame_bytes_max = frame_bytes_max
        self._pid = os.getpid()
        self._monitor_numbers = itertools.count(1)
        self._monitored: weakref.WeakSet[Socket] = weakref.WeakSet()
        # libzmq spreads reconnects by up to one interval on top of this base, unless RECONNECT_IVL_MAX is set, which
        # switches that off. A base drawn per process keeps a LAN from redialling a restarted peer in step.
        self._reconnect_ms = 100 + secrets.randbelow(101)
        _keep_freed_memory()
        self._context: zmq.Context[Socket] = zmq.Context()
        self._context.set(zmq.IO_THREADS, 1)
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)

    @property
    def secure(self) -> bool:
        """True with a bus key: TCP is CURVE. False: loopback only."""
        return self._key is not None

    # --- making sockets ------------------------------------------------------------------------

    def pub(self, frames_max: int, *, drops: bool = False) -> Socket:
        """A PUB to bind. `frames_max`: frames held for each subscriber.

        At `frames_max` for any subscriber, `send` raises `zmq.Again` and sends to nobody (XPUB_NODROP): the
        publisher decides what to drop, and for whom to wait, instead of losing frames silently. With `drops` it
        does lose them, for that subscriber.
        """
        socket = self._server(zmq.PUB, frame_bytes_max=SUBSCRIPTION_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, frames_max)
        socket.setsockopt(zmq.XPUB_NODROP, not drops)
        # A PUB takes subscriptions in only when it is used. At the default of 1000, the first message after an idle
        # time would miss a subscriber's 1001st subscription.
        socket.setsockopt(zmq.RCVHWM, SUBSCRIPTIONS_WAITING_MAX)
        return socket

    def router(self, *, frames_max: int = COMMAND_FRAMES_MAX, frame_bytes_max: int | None = None) -> Socket:
        """A ROUTER to bind: a node's inbox. `frames_max`: messages held for, and from, each peer.

        `send` to a peer that is gone raises EHOSTUNREACH, and at `frames_max` `zmq.Again`: never a silent drop.
        `frame_bytes_max`: the largest frame accepted here, if smaller than the factory's. It is also what each
        stranger can make us hold for HANDSHAKE_MS before being refused, so smaller is better.
        """
        limit = self._frame_bytes_max if frame_bytes_max is None else min(frame_bytes_max, self._frame_bytes_max)
        socket = self._server(zmq.ROUTER, frame_bytes_max=limit)
        socket.setsockopt(zmq.SNDHWM, frames_max)
        socket.setsockopt(zmq.RCVHWM, frames_max)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over the routing id of a living peer
        return socket

    def dealer(self, *, frames_max: int = COMMAND_FRAMES_MAX) -> Socket:
        """A DEALER to connect to one peer's inbox. `frames_max`: messages held, each way.

        It holds nothing for a peer that is not there (IMMEDIATE): until the handshake is done, and again from the
        moment the connection breaks, `send` raises `zmq.Again`. When the connection breaks, everything in flight is
        dropped: commands not yet on the wire, and *answers already received but not yet read*. Each reconnect is a
        fresh start, so whoever sends commands repeats them by their own timer. Reconnecting itself is automatic,
        except after a failed handshake: see `handshake_monitor`.
        """
        socket = self._client(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, frames_max)
        socket.setsockopt(zmq.RCVHWM, frames_max)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        return socket

    def sub(self, frames_max: int) -> Socket:
        """A SUB to connect to PUBs. `frames_max`: frames held unread from each publisher, 0 for no limit.

        Subscriptions survive reconnects. By inproc the two sides' limits add up (a publisher's and ours).
        """
        socket = self._client(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, frames_max)
        socket.setsockopt(zmq.SNDHWM, 0)  # subscriptions are sent like messages: the 1001st would be lost silently
        return socket

    def _server(self, kind: int, *, frame_bytes_max: int) -> Socket:
        socket = self._socket(kind, frame_bytes_max)
        if self._key is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._key.server.secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        return socket

    def _client(self, kind: int) -> Socket:
        socket = self._socket(kind, self._frame_bytes_max)
        if self._key is not None:
            _set_client_pair(socket, self._key.client, self._key.server.public)
        return socket

    def _socket(self, kind: int, frame_bytes_max: int) -> Socket:
        try:
            socket: Socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            if error.errno == errno.EMFILE:
                raise SetupError(
                    "out of file descriptors or sockets: raise 'ulimit -n', or close subscriptions"
                ) from None
            raise
        for option, value in _COMMON.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
        socket.setsockopt(zmq.RECONNECT_IVL, self._reconnect_ms)
        return socket

    # --- binding and connecting ----------------------------------------------------------------

    def bind(self, socket: Socket, host: str, port: int = 0) -> str:
        """Bind a PUB or ROUTER to an IPv4 address of this machine; the answer is the actual `tcp://host:port`.

        `port` 0 takes any free one. Raises AuthError for anything but loopback without a key, and SetupError when
        the port is in use or the address is not ours.
        """
        address = _parse_host(host)
        self._require_permitted(address)
        if _literal(address) is None:
            raise SetupError(f"cannot bind to {host!r}: give one of this machine's IPv4 addresses")
        if not 0 <= port <= 65535:
            raise SetupError(f"cannot bind to port {port}: ports are 0 (any free one) to 65535")
        self._require_curve(socket, server=True)
        try:
            socket.bind(f"tcp://{address}:{port}")
        except zmq.ZMQError as error:
            raise SetupError(_why_not_bound(address, port, error)) from None
        return bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def bind_inproc(self, socket: Socket, name: str) -> str:
        """Bind to `inproc://name`, within this factory's context; returns that endpoint. CURVE has no part in it."""
        endpoint = f"inproc://{name}"
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise SetupError(f"cannot bind to {endpoint}: {error.strerror}") from None
        return endpoint

    def connect(self, socket: Socket, endpoint: str) -> None:
        """Connect a SUB or DEALER to `tcp://host:port` or `inproc://name`. Returns at once; connecting goes on.

        Connecting twice to the same endpoint is once. A host *name* (only with a key) is looked up by libzmq's one
        I/O thread at each attempt, which stalls the node's other traffic while DNS is slow: prefer addresses.
        Raises AuthError for anything but loopback without a key, and SetupError for a malformed endpoint.
        """
        if endpoint.startswith("inproc://"):
            socket.connect(endpoint)
            return
        host, port = parse_endpoint(endpoint)
        self._require_permitted(host)
        self._require_curve(socket, server=False)
        socket.connect(f"tcp://{host}:{port}")

    def disconnect(self, socket: Socket, endpoint: str) -> None:
        """Undo `connect`; no error when not connected. What this peer sent and was not yet read is dropped."""
        if not endpoint.startswith("inproc://"):
            host, port = parse_endpoint(endpoint)
            endpoint = f"tcp://{host}:{port}"
        try:
            socket.disconnect(endpoint)
        except zmq.ZMQError as error:
            if error.errno not in (errno.ENOENT, zmq.ENOTCONN):
                raise

    def _require_permitted(self, host: str) -> None:
        if self._key is None:
            address = _literal(host)
            if address is None or not address.is_loopback:
                raise AuthError(f"{host} is not on this machine: {NO_KEY}")

    def _require_curve(self, socket: Socket, *, server: bool) -> None:
        """Read back what keeps strangers out, so that a socket made elsewhere or altered since is never exposed."""
        if self._key is None:
            return
        protected = socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
        if server and protected:
            protected = (
                socket.getsockopt(zmq.CURVE_SERVER) == 1
                and bytes(socket.getsockopt(zmq.ZAP_DOMAIN)).rstrip(b"\0") == ZAP_DOMAIN
                and socket.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
            )
        if not protected:
            raise AuthError(f"{socket!r} is not protected by CURVE: make it with this factory")

    # --- watching handshakes -------------------------------------------------------------------

    def handshake_monitor(self, socket: Socket, *, outcome: bool = False) -> Socket:
        """A PAIR that tells of `socket`'s failed handshakes and nothing else; see `parse_monitor`. For clients.

        With `outcome` also of HANDSHAKE_SUCCEEDED, and DISCONNECTED after that.

        After HANDSHAKE_FAILED_AUTH or …_PROTOCOL libzmq never dials that endpoint again: `disconnect`, then
        `connect` after a pause. …_NO_DETAIL (the connection broke off, or nobody answered in time: a peer that is
        closing, starting or stalled) is no verdict: libzmq dials anew by itself. But a peer with *another bus key*
        just hangs up, and so shows as …_NO_DETAIL at every attempt.

        Read it to the end whenever it stirs: one that is left unread for MONITOR_EVENTS_MAX events freezes the
        whole context. Close both with `close_monitored`; closing only the PAIR freezes the context as well.
        """
        both = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        return self._monitor(socket, _HANDSHAKE_FAILED | both if outcome else _HANDSHAKE_FAILED)

    def close_monitored(self, socket: Socket, monitor: Socket, linger_ms: int | None = None) -> None:
        """Close a socket and its monitor, in the one order that cannot freeze the context.

        What is unsent is tried for another `linger_ms` (None: the socket's own LINGER, 0 unless changed), in the
        background; `close` of the factory waits for that.
        """
        if not socket.closed:
            socket.disable_monitor()
            socket.close(linger_ms)
        monitor.close()

    def probe(self, endpoint: str, role: Role, pair: CurvePair | None) -> tuple[Socket, Socket]:
        """For the security self-test: a client that dials as `pair` (None: without CURVE), and its monitor.

        The monitor also tells HANDSHAKE_SUCCEEDED. The one way past rule 3; nothing is ever sent on such a socket.
        """
        if self._key is None:
            raise AuthError("a node without a bus key has no strangers to probe for")
        host, port = parse_endpoint(endpoint)
        socket = self._socket(zmq.DEALER if role == "inbox" else zmq.SUB, self._frame_bytes_max)
        if pair is not None:
            _set_client_pair(socket, pair, self._key.server.public)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)  # a stranger may be cut off before it learns why: ask again, soon
        monitor = self._monitor(socket, _HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket.connect(f"tcp://{host}:{port}")
        return socket, monitor

    def _monitor(self, socket: Socket, events: int) -> Socket:
        name = f"inproc://zmqbus-monitor-{next(self._monitor_numbers)}"
        monitor: Socket = self._context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.setsockopt(zmq.RCVHWM, MONITOR_EVENTS_MAX)
        socket.monitor(name, events)
        self._monitored.add(socket)
        monitor.connect(name)
        return monitor

    # --- the end -------------------------------------------------------------------------------

    def close(self, linger_ms: int = 0) -> None:
        """Close what sockets are still open and end the context. May be called twice.

        Waits at most `linger_ms` for unsent messages of those, and what their own linger says for sockets closed
        before. No other thread may be using one of the sockets. In a forked child it does nothing: the sockets and
        their I/O thread are the parent's.
        """
        if os.getpid() != self._pid or self._context.closed:
            return
        for socket in list(self._monitored):
            if not socket.closed:
                socket.disable_monitor()  # before its PAIR goes: see close_monitored
        self._context.destroy(linger=linger_ms)


@cache  # once for the process
def _keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 16 MiB of freed memory, instead of returning it to the system at once.

    Otherwise each message of more than 32 pages is memory mapped anew, and smaller ones shrink and grow the heap, so
    that its pages are faulted in again: at 64 KiB a third of a receiver's time. Freeing one mapped block raises both
    thresholds to its size and twice that (mallopt(3), "dynamic mmap threshold"), unless whoever runs the program has
    set them. The block itself is never touched. Other mallocs do nothing of the kind, and take no harm.
    """
    bytes(8 << 20)


def plain_send(socket: Socket) -> Callable[[bytes, int], object]:
    """`socket.send(data, flags)` without pyzmq's look at options that only other socket types have: half its time."""
    send: Callable[[bytes, int], object] = super(zmq.Socket, socket).send
    return send


def plain_recv(socket: Socket, flags: int = NOBLOCK) -> Callable[[], list[bytes | memoryview]]:
    """`socket.recv_multipart(flags, copy=False)` in half the time, each frame as what it holds."""
    recv: Callable[[int, bool], Any] = super(zmq.Socket, socket).recv

    def frames() -> list[bytes | memoryview]:
        frame = recv(flags, False)
        taken = [frame.bytes if len(frame) < BRIEF else frame.buffer]
        while frame.more:
            frame = recv(NOBLOCK, False)
            taken.append(frame.buffer)
        return taken

    return frames


def plain_recv_from(socket: Socket) -> Callable[[], tuple[bytes, list[bytes | memoryview]]]:
    """The same for a ROUTER, without waiting: who it is from, and the frames."""
    recv: Callable[..., Any] = super(zmq.Socket, socket).recv

    def frames() -> tuple[bytes, list[bytes | memoryview]]:
        identity = recv(NOBLOCK)
        frame = recv(NOBLOCK, False)
        taken = [frame.bytes if len(frame) < BRIEF else frame.buffer]
        while frame.more:
            frame = recv(NOBLOCK, False)
            taken.append(frame.buffer)
        return identity, taken

    return frames


# --- reading endpoints: they come from users and, by HELLO and mDNS, from peers ----------------


@lru_cache(maxsize=8192)  # of the same peers again and again; an error is not remembered
def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """`tcp://host:port` as (host, port): an IPv4 literal ("localhost" is 127.0.0.1) or a host name, and 1..65535.

    Raises SetupError for everything else, such as libzmq's `tcp://source;target:port`, or IPv6.
    """
    match = re.fullmatch(r"tcp://([^:]*):([0-9]{1,5})", endpoint)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise SetupError(f"bad endpoint {endpoint!r}: expected tcp://HOST:PORT, with an IPv4 address or a host name")
    return _parse_host(match[1]), int(match[2])


def _parse_host(host: str) -> str:
    """An IPv4 literal or a host name, as it may be handed to libzmq. Raises SetupError for anything else."""
    if host.lower() == "localhost":
        return "127.0.0.1"  # never asked of a resolver
    if _literal(host) is not None:
        return host
    # A name's last label is not a number (RFC 3696): resolvers read 127.1 or 0x7f000001 as addresses.
    if len(host) <= 253 and re.fullmatch(r"([A-Za-z0-9_-]{1,63}\.)*(?![0-9])[A-Za-z0-9_-]{1,63}", host):
        return host
    raise SetupError(f"bad host {host!r}: expected an IPv4 address or a host name (IPv6 is not supported)")


def _literal(host: str) -> IPv4Address | None:
    try:
        return IPv4Address(host)
    except ValueError:
        return None


# --- monitors and options ----------------------------------------------------------------------


def parse_monitor(frames: Sequence[bytes]) -> tuple[str, str, int]:
    """What a monitor received: event name ("HANDSHAKE_FAILED_AUTH", …), endpoint, and the event's value.

    The value is a ZAP status code (400: refused) for …_AUTH, a ZMQ_PROTOCOL_ERROR_… number for …_PROTOCOL, and an
    errno for …_NO_DETAIL. Raises ValueError when it is not a monitor's message.
    """
    if len(frames) != 2 or len(frames[0]) != 6:
        raise ValueError(f"not a monitor's message: {len(frames)} frames")
    event, value = struct.unpack("=HI", frames[0])  # native order: it never leaves the process
    return zmq.Event(event).name or str(event), frames[1].decode("utf-8", "replace"), value


def _set_client_pair(socket: Socket, pair: CurvePair, server_public: bytes) -> None:
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)


def _why_not_bound(host: str, port: int, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another program: choose another port, or 0 for any free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: choose one of its interfaces' IPv4 addresses"
    if error.errno == errno.EACCES:
        return f"no permission to bind port {port} on {host}: choose a port above 1023"
    return f"cannot bind to {host}:{port}: {error.strerror}"
