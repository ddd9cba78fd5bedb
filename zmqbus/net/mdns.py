"""One mDNS session: zeroconf on one set of addresses. The only file that imports zeroconf; judges nothing it hears.

Rules of this file:
1. Runs on the caller's asyncio loop. No callback is made from inside zeroconf, whose internals an exception or a
   slow callee would disturb: what it reports is noted, and looked at in the next turn of the loop.
2. Only the given addresses send, and only packets that arrive by them are heard.
3. Announcing takes more than a second and is not awaited; every task is kept, and ended by `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from zeroconf import (  # type: ignore[attr-defined]  # public names that its __all__ forgets
    DNSAddress,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSService,
    DNSText,
    Error,
    RecordUpdate,
    RecordUpdateListener,
    Zeroconf,
    current_time_millis,
)
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from zmqbus.net import clock
from zmqbus.net.interfaces import Address, is_loopback, local_addresses

SERVICE_TYPE = "_zmqbus._tcp.local."

ASKING_MAX = 16  # lookups under way for announcements that came incomplete; the next announcement asks again
ASK_MS = 3000
GOODBYE_PAUSES_S = (0.0, 0.05)  # zeroconf's own takes 0.25 s; a goodbye is a courtesy that nobody relies on
DEAF_S = 2.0  # our own announcement comes back within milliseconds, or never
# Before each packet of an announcement. Three at once against loss, as is usual; the last because receivers drop a
# packet equal to one of the last 0.8 s, and keep a replaced address beside the new until it is 1 s old, so that an
# announcement soon after another goes unheard, or is heard in part.
ANNOUNCE_PAUSES_S = (0.0, 0.225, 0.225, 0.9)

_QUERY = 0  # RFC 1035: the header flags of a question, record types, the class
_TYPE_A = 1
_TYPE_PTR = 12
_CLASS_IN = 1
_IP_MULTICAST_ALL = 49  # linux/in.h; the socket module does not name it


class Announcement(NamedTuple):
    """What an instance of our service type says of itself: complete, and not checked in any way."""

    instance: str
    """Its full name."""
    port: int
    addresses: tuple[str, ...]
    """IPv4, in no order, without those that its latest announcement replaced."""
    txt: Mapping[bytes, bytes | None]
    txt_size: int
    """Bytes of the TXT record."""


class Service(NamedTuple):
    """The service to announce."""

    instance: str
    """One DNS label, unique in the world: nobody checks for a conflict."""
    host: str
    """The same for the host name."""
    port: int
    txt: dict[bytes, bytes]


class Session:
    """The sockets, our service, our questions, and the records heard, for as long as the addresses stay the same.

    on_announced(Announcement): an instance announced itself, or did so again, or was remembered by `refresh`.
    on_goodbye(instance): an instance said goodbye.
    warn(source, text): trouble that does not end the session; `source` is the same for the same trouble.
    """

    def __init__(
        self,
        service: Service,
        addresses: Sequence[str],
        *,
        on_announced: Callable[[Announcement], None],
        on_goodbye: Callable[[str], None],
        warn: Callable[[str, str], None],
    ) -> None:
        self._info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{service.instance}.{SERVICE_TYPE}",
            port=service.port,
            properties=service.txt,
            server=f"{service.host}.local.",
            parsed_addresses=list(addresses),
        )
        self._addresses = tuple(addresses)
        self._on_announced = on_announced
        self._on_goodbye = on_goodbye
        self._warn = warn
        self._loop = asyncio.get_running_loop()
        self._aio: AsyncZeroconf | None = None
        self._listener = _Listener(self._note)
        self._announcing: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._noted: dict[str, bool] = {}  # instance -> whether it lives; looked at in the next turn of the loop
        self._announced_at = 0.0
        self._heard = False

    async def open(self) -> None:
        """Listen, then announce. Raises OSError, with everything closed again, if the network does not allow it."""
        self._aio = aio = AsyncZeroconf(interfaces=[])  # holds port 5353, has joined no group yet
        # From the first packet on: zeroconf remembers what it hears, and tells nobody of it a second time.
        aio.zeroconf.async_add_listener(self._listener, None)
        try:
            # Shielded, because whoever is cancelled in there cancels what `async_close` waits for.
            starting = asyncio.ensure_future(aio.zeroconf.async_wait_for_start())
            starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may fail unwatched
            await asyncio.shield(starting)
            self._confine(aio.zeroconf, local_addresses())
            await self._join(aio)
            if not aio.zeroconf.engine.senders:
                raise OSError("no address could join the multicast group")
            # On a LAN, unicast answers spare the others; but of several processes on one host any one may get them.
            self._ask_who(aio.zeroconf, unicast=not all(map(is_loopback, self._addresses)))
            # Registering by async_register_service would probe for a conflict of names first, and UUIDs have none:
            # the first announcement would leave 1.2 s later.
            aio.zeroconf.registry.async_add(self._info)
            self._announce(aio.zeroconf, then_ask=True)
        except Error as error:
            await self.close(goodbye=False)
            raise OSError(str(error) or type(error).__name__) from error
        except BaseException:
            await self.close(goodbye=False)
            raise

    async def refresh(self) -> None:
        """Report what is remembered, ask for the rest, announce."""
        assert self._aio is not None
        await self._join(self._aio)
        cache = self._aio.zeroconf.cache
        for pointer in cache.async_entries_with_name(SERVICE_TYPE):
            if not isinstance(pointer, DNSPointer) or pointer.alias.lower() == self._info.key:
                continue
            if self._remembered(pointer.alias) is not None:
                self._note(pointer.alias, True)
            else:
                # Not heard for two minutes, or SRV and A would be here still; the PTR alone lasts an hour. Were
                # it named as known in our question, its owner would keep silent, so forget it before asking.
                cache.async_remove_records([pointer])
        self._ask_who(self._aio.zeroconf, unicast=False)
        self._announce(self._aio.zeroconf, then_ask=False)

    def is_deaf(self) -> bool:
        """Whether we have heard no announcement since our last, not even that one, which should have come back."""
        return not self._heard and clock.now() - self._announced_at > DEAF_S

    async def close(self, *, goodbye: bool) -> None:
        """Stop; 50 ms later if with a goodbye. Safe at any stage of `open`, and twice."""
        aio, self._aio = self._aio, None
        if aio is None:
            return
        try:
            aio.zeroconf.async_remove_listener(self._listener)
            tasks = list(self._asking.values())
            if self._announcing is not None:
                tasks.append(self._announcing)  # else it would announce us once more after the goodbye
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Answers wait up to a second for others to join them. After the goodbye they would bring us back to life.
            aio.zeroconf.out_queue.queue.clear()
            aio.zeroconf.out_delay_queue.queue.clear()
            if goodbye and (out := aio.zeroconf.generate_unregister_all_services()) is not None:
                for pause in GOODBYE_PAUSES_S:
                    await asyncio.sleep(pause)
                    aio.zeroconf.async_send(out)
        finally:
            aio.zeroconf.registry.async_remove(self._info)  # what is not registered gets no goodbye
            await aio.async_close()

    def _confine(self, zeroconf: Zeroconf, local: Sequence[Address]) -> None:
        """Hear only what arrives by our addresses.

        Linux gives a socket bound to 0.0.0.0 every multicast group that any process of the host has joined on any
        interface, and every unicast packet to port 5353. A node on loopback would so hear strangers by way of,
        say, avahi's membership on eth0, and answer them there.
        """
        if sys.platform != "linux":
            return
        loopback = [address.interface for address in local if address.ip in self._addresses]
        try:
            for reader in zeroconf.engine.readers:  # at this point just the listening socket
                reader.sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
                if loopback and all(map(is_loopback, self._addresses)):
                    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, loopback[0].encode())
        except OSError as error:  # before Linux 5.7 the latter takes CAP_NET_RAW
            self._warn("confine", f"port 5353 cannot be confined to {', '.join(self._addresses)} here: {error}")

    async def _join(self, aio: AsyncZeroconf) -> None:
        """Join the multicast group on each interface, as far as not done; one that fails does not spoil the others."""
        interfaces = {address.ip: address.interface.partition(":")[0] for address in local_addresses()}
        sending: list[str] = [sender.sock_name[0] for sender in aio.zeroconf.engine.senders]
        for address in self._addresses:
            if address not in interfaces:
                self._warn(address, f"{address} is not an address of this machine now")
            elif interfaces[address] not in {interfaces.get(other) for other in sending}:  # one sends for them all
                try:
                    await aio.async_update_interfaces([*sending, address])
                except OSError as error:
                    self._warn(address, f"cannot use {address}: {error}")
                else:
                    sending.append(address)

    def _ask_who(self, zeroconf: Zeroconf, *, unicast: bool) -> None:
        """Ask who is there, naming ourselves and those we know, so that only the others answer.

        A ServiceBrowser would ask four times within 14 s. Among 200 nodes that name each other that was most of the
        traffic, and it is not needed where everyone announces anew every minute.
        """
        out = DNSOutgoing(_QUERY)
        question = DNSQuestion(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN)
        question.unicast = unicast
        out.add_question(question)
        now = current_time_millis()
        out.add_answer_at_time(self._info.dns_pointer(), 0)  # 0: for all of its TTL
        for pointer in zeroconf.cache.async_all_by_details(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN):
            if pointer != self._info.dns_pointer() and not pointer.is_stale(now):
                out.add_answer_at_time(pointer, now)
        zeroconf.async_send(out)

    def _announce(self, zeroconf: Zeroconf, *, then_ask: bool) -> None:
        async def send() -> None:
            for pause in ANNOUNCE_PAUSES_S:
                await asyncio.sleep(pause)
                zeroconf.async_send(zeroconf.generate_service_broadcast(self._info, None))
            if then_ask:  # once more, by multicast, for what was lost or went to another process of this host
                self._ask_who(zeroconf, unicast=False)

        def sent(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._warn("announce", f"announcing failed: {error!r}")

        if self._announcing is not None:
            self._announcing.cancel()
        self._announcing = self._loop.create_task(send())
        self._announcing.add_done_callback(sent)
        self._announced_at = clock.now()
        self._heard = False

    def _note(self, instance: str, lives: bool) -> None:
        """Called from inside zeroconf, which stores the records only after this: look in the next turn."""
        self._heard = True
        if instance.lower() == self._info.key:
            return
        if not self._noted:
            self._loop.call_soon(self._look_at_noted)
        self._noted[instance] = lives

    def _look_at_noted(self) -> None:
        noted, self._noted = self._noted, {}
        for instance, lives in noted.items():
            if self._aio is None:
                return
            if lives:
                self._look(instance, may_ask=True)
            else:
                self._on_goodbye(instance)

    def _look(self, instance: str, *, may_ask: bool) -> None:
        if (announcement := self._remembered(instance)) is not None:
            self._on_announced(announcement)
        elif may_ask and instance not in self._asking and len(self._asking) < ASKING_MAX:
            self._asking[instance] = self._loop.create_task(self._ask(instance))

    def _remembered(self, instance: str) -> Announcement | None:
        """What the cache holds of an instance; None while a record is missing."""
        assert self._aio is not None
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, instance)
        except Error:
            self._warn(instance, f"ignored the malformed instance name {instance}")
            return None
        if not info.load_from_cache(self._aio.zeroconf):
            return None
        # A replaced address lingers with a TTL of 1 s, so that load_from_cache still counts it in.
        records = self._aio.zeroconf.cache.async_all_by_details(info.server or "", _TYPE_A, _CLASS_IN)
        addresses = [socket.inet_ntoa(a.address) for a in records if isinstance(a, DNSAddress) and a.ttl > 1]
        return Announcement(info.name, info.port or 0, tuple(addresses), info.properties, len(info.text))

    async def _ask(self, instance: str) -> None:
        """Ask for the records of an announcement that came incomplete. No answer: no news."""
        assert self._aio is not None
        try:
            with contextlib.suppress(OSError, Error):
                if await AsyncServiceInfo(SERVICE_TYPE, instance).async_request(self._aio.zeroconf, ASK_MS):
                    self._look(instance, may_ask=False)
        finally:
            del self._asking[instance]


class _Listener(RecordUpdateListener):
    """Tells which instances of our service type the arriving records concern. Runs inside zeroconf: only notes."""

    def __init__(self, note: Callable[[str, bool], None]) -> None:
        self._note = note

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        for update in records:
            record = update.new
            if isinstance(record, DNSPointer):
                # Every announcement carries one, also when nothing in it is new. A TTL of 0 is a goodbye;
                # a record that merely ran out says nothing about its node.
                if record.name.lower() == SERVICE_TYPE and (record.ttl == 0 or not record.is_expired(now)):
                    self._note(record.alias, record.ttl != 0)
            elif update.old is not None or record.is_expired(now):
                continue
            elif isinstance(record, (DNSService, DNSText)):
                self._note_ours(record.name)
            elif isinstance(record, DNSAddress):
                for service in zc.cache.async_entries_with_server(record.name):
                    self._note_ours(service.name)

    def _note_ours(self, name: str) -> None:
        if name.lower().endswith(f".{SERVICE_TYPE}"):
            self._note(name, True)


class LogFunnel(logging.Handler):
    """Turns what zeroconf only logs, such as packets that cannot be sent, into warnings until `detach`."""

    def __init__(self, warn: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._warn = warn
        self._thread = threading.get_ident()
        logging.getLogger("zeroconf").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        # Ours run on the thread of our loop; another zeroconf of this process is not our concern.
        if threading.get_ident() == self._thread:
            self._warn(str(record.msg), record.getMessage())

    def detach(self) -> None:
        logging.getLogger("zeroconf").removeHandler(self)
