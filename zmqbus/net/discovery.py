"""Finding nodes of one bus by mDNS. It only hints: whoever is found must still be dialled, and proves itself by key.

Every node announces one DNS-SD service (RFC 6762, RFC 6763) and listens for those of others:

    PTR  _zmqbus._tcp.local.              -> <instance>._zmqbus._tcp.local.
    SRV  <instance>._zmqbus._tcp.local.   -> <host>.local., port of the inbox (ROUTER)
    A    <host>.local.                    -> each IPv4 address of the node
    TXT  txtvers=1  id=<origin, 16 hex digits>  pub=<port of PUB>  pv=<protocol version>  bus=<name>  epoch=<n>

`<instance>` and `<host>` are random UUIDs, so nobody need probe for conflicts: the announcement leaves at once and
the others know the newcomer within milliseconds. They dial it; it need not wait for answers.

Rules of this file:
1. It judges what mdns.py hears: what comes from the network is believed only after `_validated`; the rest is ignored,
   with a warning that strangers cannot make into a flood.
2. Trouble with the network is a warning, never an exception, and is tried again by `refresh`.
3. It has no timer: the caller says when to `refresh`, and jitters.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, NamedTuple

from zmqbus.errors import SetupError
from zmqbus.net import clock
from zmqbus.net.interfaces import Address, best_candidate, is_loopback
from zmqbus.net.sockets import parse_endpoint

if TYPE_CHECKING:
    from zmqbus.net.mdns import Announcement, LogFunnel, Session

TXT_VERSION = 1
PROTOCOL_VERSION = 1

BUS_BYTES_MAX = 63  # fits one DNS label, should it ever have to become one
TXT_BYTES_MAX = 1024  # ours has about 120; room for fields of later versions
ADDRESSES_MAX = 16  # of one peer; more is nonsense or an attack
KNOWN_MAX = 4096  # instances whose goodbye we can name; beyond it the oldest is forgotten, which loses only a hint
WARN_AGAIN_S = 600.0  # the same trouble is told once in this time
WARNINGS_PER_MINUTE = 10  # strangers on the LAN can provoke warnings, so all of them together are limited
WARNED_MAX = 256
WARNING_CHARACTERS_MAX = 300

_HEX16 = re.compile(rb"[0-9a-f]{16}")
_NUMBER = re.compile(rb"0|[1-9][0-9]{0,19}")


class Found(NamedTuple):
    """A node of our bus as it announces itself. Nothing here is proven."""

    origin: int
    """Its random 64-bit id."""
    host_addresses: tuple[str, ...]
    """Its IPv4 addresses, in numerical order; `interfaces.best_candidate` says which to dial."""
    inbox_port: int
    pub_port: int
    epoch: int
    version: int
    """The protocol version it prefers."""


def check_bus(bus: str) -> str:
    """Return `bus` if it can name a bus: 1 to 63 bytes of UTF-8, no control characters. Else raise SetupError."""
    try:
        size = len(bus.encode())
    except UnicodeEncodeError:
        raise SetupError(f"bus name {bus!r} is not valid Unicode") from None
    if not 1 <= size <= BUS_BYTES_MAX:
        raise SetupError(f"bus name {bus!r} is {size} bytes long; use 1 to {BUS_BYTES_MAX}")
    if any(unicodedata.category(character) == "Cc" for character in bus):
        raise SetupError(f"bus name {bus!r} contains a control character")
    return bus


def to_dial(endpoints: Sequence[str], local: Sequence[Address]) -> list[str]:
    """Of the endpoints at which a peer says its inbox is, those to dial, the best first; see `best_candidate`.

    What is no endpoint, or not of a kind known here, is left out.
    """
    ports: dict[str, int] = {}
    for endpoint in endpoints:
        with contextlib.suppress(SetupError):
            host, port = parse_endpoint(endpoint)
            ports.setdefault(host, port)
    return [f"tcp://{host}:{ports[host]}" for host in best_candidate(list(ports), local)]


class Discovery:
    """Announces this node and reports others of the same bus. All methods belong to one running asyncio loop.

    on_found(Found): a node announced itself, or did so again, or is still remembered at a `refresh`. The caller sorts
    out what is new to it, and bounds how many it dials: a stranger can announce thousands.
    on_gone(origin): a node said goodbye. Only a hint: anyone can forge one, and a crashed node says none.
    on_warning(text): one line for a person; limited in number.
    Raises SetupError when `bus` cannot be a bus's name.
    """

    def __init__(
        self,
        *,
        bus: str,
        origin: int,
        inbox_port: int,
        pub_port: int,
        epoch: int,
        addresses: Sequence[str],
        on_found: Callable[[Found], None],
        on_gone: Callable[[int], None],
        on_warning: Callable[[str], None],
    ) -> None:
        # Imported where a node does use mDNS: zeroconf takes tens of milliseconds and 5 MB.
        from zmqbus.net import mdns

        self._mdns = mdns
        self._bus = check_bus(bus).encode()
        self._origin = origin
        self._addresses = tuple(addresses)
        self._on_found = on_found
        self._on_gone = on_gone
        self._warnings = Warnings(on_warning, "mDNS: ")
        self._inbox_port = inbox_port
        self._txt = {
            b"txtvers": b"%d" % TXT_VERSION,
            b"id": b"%016x" % origin,
            b"pub": b"%d" % pub_port,
            b"pv": b"%d" % PROTOCOL_VERSION,
            b"bus": self._bus,
            b"epoch": b"%d" % epoch,
        }
        # Names last as long as this object, so that after a change of address peers see the same node moved.
        self._instance = uuid.uuid4().hex
        self._host = uuid.uuid4().hex
        self._known: dict[str, int] = {}  # instance, lower case -> origin; oldest first
        self._session: Session | None = None
        self._log: LogFunnel | None = None
        self._lock = asyncio.Lock()  # one change of the session at a time
        self._started = False
        self._closed = False

    async def start(self) -> None:
        """Begin to listen, then announce. If the network does not allow it: a warning, and `refresh` tries again."""
        async with self._lock:
            if self._started or self._closed:
                return
            self._started = True
            self._log = self._mdns.LogFunnel(self._warnings.say)
            await self._open()

    async def refresh(self) -> None:
        """Announce again, ask anew, report what is remembered: after a partition, for a lost peer, now and then."""
        async with self._lock:
            if not self._started or self._closed:
                return
            if self._session is not None and self._session.is_deaf():
                self._warnings.say(
                    "deaf",
                    f"this node hears no announcement on {', '.join(self._addresses)}, not even its own: does a "
                    "firewall drop UDP port 5353? Peers can also be named by their endpoints",
                )
                await self._shut(goodbye=False)
            if self._session is None:
                await self._open()
            else:
                await self._session.refresh()

    async def set_addresses(self, addresses: Sequence[str]) -> None:
        """Use these addresses from now on; [] while there is no network. Peers see the same node moved."""
        async with self._lock:
            unchanged = set(addresses) == set(self._addresses)
            self._addresses = tuple(addresses)
            if not self._started or self._closed or (unchanged and self._session is not None):
                return
            # No goodbye: the node lives on, and its next announcement replaces the old addresses.
            await self._shut(goodbye=False)
            await self._open()

    async def close(self) -> None:
        """Say goodbye and stop; takes about 50 ms, with a network or without. No callback is made after it began."""
        self._closed = True
        async with self._lock:
            await self._shut(goodbye=True)
            if self._log is not None:
                self._log.detach()
                self._log = None

    async def _open(self) -> None:
        """Open a session on the present addresses, if there are any and the network allows it."""
        if not self._addresses:
            return
        session = self._mdns.Session(
            self._mdns.Service(self._instance, self._host, self._inbox_port, self._txt),
            self._addresses,
            on_announced=self._examine,
            on_goodbye=self._forget,
            warn=self._warnings.say,
        )
        try:
            await session.open()
        except OSError as error:
            self._warnings.say("open", f"no discovery on {', '.join(self._addresses)}: {error}")
        else:
            self._session = session

    async def _shut(self, *, goodbye: bool) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close(goodbye=goodbye)

    def _examine(self, announcement: Announcement) -> None:
        """Report who announced itself if it is, by all signs, another node of our bus that we may dial."""
        if self._closed or announcement.txt.get(b"bus", self._bus) != self._bus:
            return
        try:
            found = self._near(_validated(announcement))
            if found.origin == self._origin:
                raise ValueError("it uses the id of this very node")
        except ValueError as error:
            self._warnings.say(announcement.instance, f"ignored the announcement of {announcement.instance}: {error}")
            return
        name = announcement.instance.lower()
        if name not in self._known and len(self._known) >= KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[name] = found.origin
        self._on_found(found)

    def _near(self, found: Found) -> Found:
        """A node on loopback leaves the machine for nobody."""
        if not all(map(is_loopback, self._addresses)):
            return found
        near = tuple(filter(is_loopback, found.host_addresses))
        if not near:
            raise ValueError("it is not on loopback, and this node is")
        return found._replace(host_addresses=near)

    def _forget(self, instance: str) -> None:
        origin = self._known.pop(instance.lower(), None)
        # A stranger may announce a peer's id and then say goodbye under its own name: the peer is not gone.
        if origin is not None and not self._closed and origin not in self._known.values():
            self._on_gone(origin)


class Warnings:
    """Passes warnings to a person: each source once in ten minutes, and not too many in all."""

    def __init__(self, on_warning: Callable[[str], None], prefix: str = "") -> None:
        self._on_warning = on_warning
        self._prefix = prefix
        self._told_at: dict[str, float] = {}  # source -> when, oldest first
        self._recent: list[float] = []  # when those of the last minute were told

    def say(self, source: str, text: str) -> None:
        now = clock.now()
        self._recent = [at for at in self._recent if now - at < 60.0]
        if now - self._told_at.get(source, -WARN_AGAIN_S) < WARN_AGAIN_S or len(self._recent) >= WARNINGS_PER_MINUTE:
            return
        self._told_at.pop(source, None)
        if len(self._told_at) >= WARNED_MAX:
            del self._told_at[next(iter(self._told_at))]
        self._told_at[source] = now
        self._recent.append(now)
        # Names from strangers end up in here, and it may be shown on a terminal.
        self._on_warning(self._prefix + "".join(c if c.isprintable() else "?" for c in text[:WARNING_CHARACTERS_MAX]))


def _validated(announcement: Announcement) -> Found:
    """What an announcement says. Raises ValueError, saying what is wrong, unless every field of it is sound."""
    txt = announcement.txt
    if announcement.txt_size > TXT_BYTES_MAX:
        raise ValueError(f"its TXT record is {announcement.txt_size} bytes long")
    if txt.get(b"txtvers") != b"%d" % TXT_VERSION:
        raise ValueError(f"its txtvers is not {TXT_VERSION}")
    if txt.get(b"bus") is None:
        raise ValueError("it names no bus")
    origin = txt.get(b"id") or b""
    if not _HEX16.fullmatch(origin):
        raise ValueError("its id is not 16 hexadecimal digits")
    pub_port = _number(txt, b"pub", 1, 0xFFFF)
    version = _number(txt, b"pv", 1, 0xFF)
    epoch = _number(txt, b"epoch", 0, 0xFFFF_FFFF_FFFF_FFFF)
    if not announcement.port:
        raise ValueError("it has no port")
    hosts = sorted(ip for ip in map(IPv4Address, announcement.addresses) if _is_host(ip))[:ADDRESSES_MAX]
    if not hosts:
        raise ValueError("it has no usable IPv4 address")
    return Found(int(origin, 16), tuple(map(str, hosts)), announcement.port, pub_port, epoch, version)


def _number(txt: Mapping[bytes, bytes | None], key: bytes, low: int, high: int) -> int:
    digits = txt.get(key) or b""
    if not _NUMBER.fullmatch(digits) or not low <= int(digits) <= high:
        raise ValueError(f"its {key.decode()} is not a number from {low} to {high}")
    return int(digits)


def _is_host(ip: IPv4Address) -> bool:
    return not (ip.is_unspecified or ip.is_multicast or ip.is_reserved)  # reserved includes broadcast
