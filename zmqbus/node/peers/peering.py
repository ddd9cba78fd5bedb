"""Who is there and how to reach them: discovery, HELLO and WELCOME, links, and heartbeats.

The decisions are `Membership`'s; this performs them with sockets. All of it runs on the engine's loop.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from zmqbus.errors import AuthError, RemoteProtocolError, SetupError
from zmqbus.net.clock import now
from zmqbus.net.discovery import Discovery, Found, Warnings, to_dial
from zmqbus.net.interfaces import AddressWatch, NetworkNews
from zmqbus.net.sockets import SOURCES, Role, SocketFactory, parse_endpoint
from zmqbus.node.events import Event, KeyMismatch, Warned
from zmqbus.node.peers.hearing import Hearing
from zmqbus.node.peers.introduction import introduced
from zmqbus.node.peers.links import Inbox, Link
from zmqbus.node.peers.registry import ASK_AGAIN, Registry, Streams
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.work.queues.owner import Owner
from zmqbus.node.work.requests.exchange import Exchange
from zmqbus.protocol import commands
from zmqbus.protocol.commands import PEERS_PER_HELLO, Command, Hello, Welcome
from zmqbus.protocol.frames import VERSION
from zmqbus.protocol.members.membership import Membership
from zmqbus.protocol.members.peers import (
    Dial,
    DuplicateName,
    Forget,
    Greet,
    HangUp,
    Output,
    Peer,
    PeerChanged,
    PeerJoined,
    PeerLeft,
    State,
)

HELLO_TIMEOUT = 10.0
WELCOME_PATIENCE = 0.2  # for answers to HELLO that are under way when the node ends
STALLED, CATCH_UP = 1.0, 0.25  # so late a timer means that nothing ran; then read what has arrived, first
GUESTS_MAX = 8192  # who said HELLO: peers, and clients that only ask; the oldest has to say it again
ADDRESS_POLL = 2.0  # where the system does not tell of changes
STIRRED = 0.05  # changes come in groups: a link goes up, then gets its address
REFRESH_MIN, REFRESH_MAX = 30.0, 60.0  # how often to announce and browse anew
REFRESH_SOON = 2.0  # after a peer fell silent


class Host(Streams, Protocol):
    """What peering needs of its engine."""

    intakes: dict[int, Intake]
    jobs: Owner
    requests: Exchange

    def forwarders_changed(self) -> None:
        """A forwarder came or went, or claims other topics."""

    def emit(self, event: Event) -> None:
        """Something happened."""

    def introduced(self, origin: int) -> None:
        """A peer answered HELLO: it can be asked for things, perhaps once more."""

    def serve(self, identity: bytes, origin: int, command: Command) -> None:
        """A command of a peer that is not about peering."""

    def link_lost(self, link: Link) -> None:
        """The connection of a link that is guarded broke, or was closed."""


class Peering:
    """The peers of one node. `who` are the fields of HELLO that others fill in: name, epoch, host, pid, services …"""

    def __init__(
        self,
        host: Host,
        loop: asyncio.AbstractEventLoop,
        factory: SocketFactory,
        *,
        origin: int,
        bus: str,
        who: dict[str, Any],
        interface: str | None,
        seeds: Iterable[str],
        mdns: bool,
        ports: dict[Role, int],
    ) -> None:
        self.origin = origin
        self.inbox: Inbox  # set when the node opens
        self.links: dict[int, Link] = {}  # by origin: peers that answered
        self.brief: dict[type[commands.Body], Callable[[bytes, int, Command], object]] = {}
        """Who is to answer these commands, which others wait for most, before anybody else is asked."""
        self._host = host
        self._loop = loop
        self._factory = factory
        self._bus = bus
        self._ports = ports
        self.who = who
        self._membership = members = Membership(origin, name=who["name"], seeds=seeds, jitter=random.random)
        self.registry = Registry(
            origin, loop, host, self.links, host.intakes, lambda: members.joined, self.joined, self._took_leave
        )
        self._dialled: dict[str, Link] = {}  # by endpoint
        self._guests: dict[bytes, int] = {}  # by routing identity on our inbox
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._warnings = Warnings(lambda reason: host.emit(Warned(reason)))
        self._mismatches = Warnings(lambda reason: host.emit(KeyMismatch(reason)))
        self._refresh_at = 0.0
        self._news: NetworkNews | None = None
        self._poll_soon: asyncio.TimerHandle | None = None
        self._addresses = AddressWatch(interface)
        self._discovery: Discovery | None = None
        if mdns:
            self._discovery = Discovery(
                bus=bus,
                origin=origin,
                inbox_port=ports["inbox"],
                pub_port=ports["pub"],
                epoch=who["epoch"],
                addresses=self._addresses.addresses,
                on_found=self._found,
                on_gone=lambda origin: None,  # anyone can forge a goodbye; heartbeats and BYE tell
                on_warning=lambda reason: host.emit(Warned(reason)),
            )
        self._hearing = Hearing(factory, loop, host.intakes, self._heard, self._garbage)

    def start(self, inbox: Inbox) -> None:
        """Begin to look for others, and to be found."""
        self.inbox = self.registry.inbox = inbox
        if self._discovery is not None:
            self._spawn(self._discovery.start())
        self._refresh_at = now() + random.uniform(REFRESH_MIN, REFRESH_MAX)
        self._perform(self._membership.tick(now()))
        self._tell_trouble()
        try:
            self._news = NetworkNews()
        except OSError:
            self._every(ADDRESS_POLL, self._poll_addresses)
        else:
            self._loop.add_reader(self._news.fileno(), self._network_stirs)
        self._every(ADDRESS_POLL, self._refresh)
        self._every(ASK_AGAIN, self.registry.ask_again)

    @property
    def endpoints(self) -> dict[str, str]:
        """Our inbox and PUB, at the first of our present addresses. From any thread."""
        address = next(iter(self._addresses.addresses), "127.0.0.1")
        return {"inbox": f"tcp://{address}:{self._ports['inbox']}", "pub": f"tcp://{address}:{self._ports['pub']}"}

    def connect(self, intake: Intake) -> None:
        """Connect a new subscription to every publisher, and have it registered there."""
        self._hearing.lead(intake)
        self.registry.declare(intake)

    # --- questions -------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """The joined peers."""
        return self._membership.peers()

    def joined(self, origin: int) -> bool:
        """Whether a peer can be asked now."""
        link = self.links.get(origin)
        return link is not None and self._membership.state(origin) is State.JOINED

    # --- what membership decides -----------------------------------------------------------------

    def _perform(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            match output:
                case Dial(endpoint=endpoint):
                    # A peer that has our HELLO is busy, as when a whole LAN boots, and would be busier with another.
                    if (link := self._dialled.get(endpoint)) is None or not link.is_answering:
                        self._dial(endpoint)
                case Greet(endpoint=endpoint):
                    if (link := self._dialled.get(endpoint)) is not None:
                        self._hello(link)
                case HangUp(endpoint=endpoint):
                    if (link := self._dialled.pop(endpoint, None)) is not None:
                        self._drop(link)
                case Forget(origin=origin):
                    self._forget(origin)
                case PeerJoined(peer=peer):
                    if peer.journal:
                        self._host.forwarders_changed()
                    for intake in self._host.intakes.values():
                        intake.sources_changed()
                    self._host.emit(output)
                case PeerLeft(peer=peer, reason=reason):
                    if peer.journal:
                        self._host.forwarders_changed()
                    self._left(peer, reason)
                    self._host.emit(output)
                case PeerChanged(peer=peer):
                    if peer.journal:
                        self._host.forwarders_changed()
                    if peer.origin in self.links:
                        self._hearing.attach(peer.origin, self.links[peer.origin])
                case DuplicateName():
                    self._host.emit(output)
        self.registry.changed()
        self._rearm()

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._membership.next_timer()
        self._due = now() if due is None else due
        self._timer = None if due is None else self._loop.call_later(max(0.001, due - now()), self._tick)

    def _tick(self) -> None:
        late = self._timer is not None and now() - self._due > STALLED
        self._timer = None
        if late:
            # This process was stopped, or the machine asleep. What came in meanwhile counts before what did not.
            self._due = now() + CATCH_UP
            self._timer = self._loop.call_later(CATCH_UP, self._tick)
            return
        self._perform(self._membership.tick(now()))

    def _dial(self, endpoint: str) -> None:
        old = self._dialled.pop(endpoint, None)
        if old is not None:
            self._drop(old)
        # Without a key nearly all handshakes succeed: a monitor only where one seems not to have.
        on_refused = self._mismatch if self._factory.secure or (old is not None and old.origin is None) else None
        try:
            hear, garbage, hello, lost = self._on_answer, self._garbage, self._hello, self._host.link_lost
            link = Link(self._factory, self._loop, endpoint, hear, garbage, hello, on_refused, lost)
        except (SetupError, AuthError) as error:
            self._warnings.say(endpoint, f"cannot dial {endpoint}: {error}")
            return
        self._dialled[endpoint] = link

    def _mismatch(self, link: Link, why: str) -> None:
        self._mismatches.say(link.endpoint, f"cannot join {link.endpoint} on bus {self._bus!r}: {why}")

    def _drop(self, link: Link) -> None:
        if link.origin is not None and self.links.get(link.origin) is link:
            del self.links[link.origin]
        link.close()

    def _forget(self, origin: int) -> None:
        self._hearing.detach(origin)
        self.registry.forget(origin)
        self._host.requests.forget(origin)
        for identity in [identity for identity, guest in self._guests.items() if guest == origin]:
            del self._guests[identity]
        for intake in self._host.intakes.values():
            intake.forget(origin)

    def _left(self, peer: Peer, reason: str) -> None:
        if reason == "silent":
            self._refresh_at = min(self._refresh_at, now() + REFRESH_SOON * random.uniform(0.5, 1.5))
            self._hearing.reattach(peer.origin)
        else:
            for intake in self._host.intakes.values():
                intake.origin_gone(peer.origin)

    # --- HELLO and WELCOME -----------------------------------------------------------------------

    def _introduction(self, kind: type[Hello], **more: Any) -> Hello:
        inbox = [f"tcp://{address}:{self._ports['inbox']}" for address in self._addresses.addresses[:64]]
        known = self._membership.known_endpoints(PEERS_PER_HELLO)
        ports: dict[str, Any] = {f"{source}_port": self._ports[source] for source in SOURCES}
        return kind(origin=self.origin, bus=self._bus, inbox=inbox, peers=known, **ports, **self.who, **more)

    def _hello(self, link: Link) -> bool:
        """Introduce ourselves and all our subscriptions. False: not connected yet."""
        wanted = self.registry.wanted(link)
        hello = self._introduction(Hello, subscriptions=wanted)
        if not link.ask(hello, lambda command: self._welcomed(link, command), HELLO_TIMEOUT):
            return False
        link.awaits_welcome = True
        link.services = hello.services
        link.declared = {subscribed.id for subscribed in wanted}
        return True

    def _welcomed(self, link: Link, command: Command | None) -> None:
        link.awaits_welcome = False
        if command is None or self._dialled.get(link.endpoint) is not link:
            return
        body = command.body
        if isinstance(body, commands.Error):
            self._warnings.say(link.endpoint, f"{link.endpoint} refused us: {body.reason}")
            return
        if not isinstance(body, Welcome):
            self._garbage(RemoteProtocolError(f"{link.endpoint}: {type(body).__name__} in answer to HELLO"))
            return
        host = parse_endpoint(link.endpoint)[0]
        ports = {"pub": body.pub_port, "tap": body.tap_port, "trail": body.trail_port}
        link.pubs = {source: f"tcp://{host}:{ports[source] or body.pub_port}" for source in SOURCES}
        endpoints = self._candidates(body) or [link.endpoint]  # what it says may not be reachable: it was dialled here
        outputs = self._membership.welcomed(introduced(body, endpoints, link.pubs["pub"]), link.endpoint, now())
        taken = self._membership.state(body.origin) in (State.SEEN, State.JOINED)
        if taken and HangUp(link.endpoint) not in outputs:
            link.origin = body.origin
            self.links[body.origin] = link
            self._hearing.attach(body.origin, link)
            for intake in self._host.intakes.values():
                intake.sources_changed()  # it may have joined before this link stood: by a heartbeat, back from silence
        self._perform(outputs)
        if link.origin is not None:
            self.registry.introduced(link)
            self._host.introduced(link.origin)
            self._host.requests.introduced(link)
            if body.journal:
                self._host.forwarders_changed()  # what is read there may have to be asked for again
        self._hints(body)

    def _greeted(self, identity: bytes, command: Command, body: Hello) -> None:
        if body.bus != self._bus:
            self.inbox.answer(identity, commands.Error("bus", f"this is bus {self._bus!r}"), command.request)
            return
        if not body.version_min <= VERSION <= body.version_max:
            error = commands.Error("version", f"this node speaks version {VERSION} only")
            self.inbox.answer(identity, error, command.request)
            return
        if body.origin != self.origin:
            for stale in [key for key, guest in self._guests.items() if guest == body.origin]:
                del self._guests[stale]
            self._guests[identity] = body.origin
            if len(self._guests) > GUESTS_MAX:
                guest = self._guests.pop(next(iter(self._guests)))
                if self._membership.state(guest) not in (State.SEEN, State.JOINED, State.LOST):
                    self.registry.forget(guest)
        if body.journal:
            self._host.jobs.greeted(body.origin, body.journal, body.claims)
        self.inbox.answer(identity, self._introduction(Welcome), command.request)
        self._host.requests.heard(body)
        self.registry.on_hello(identity, body.origin, command.request, body.subscriptions)
        endpoints = self._candidates(body)
        if endpoints:
            pub = f"tcp://{parse_endpoint(endpoints[0])[0]}:{body.pub_port}"
            self._perform(self._membership.greeted(introduced(body, endpoints, pub), now()))
        self._hints(body)

    def _candidates(self, body: Hello) -> list[str]:
        """Of the endpoints a peer says it has, those to dial, the best first."""
        return [] if self._is_surprise(body) else to_dial(body.inbox, self._addresses.local)

    def _is_surprise(self, body: Hello) -> bool:
        """It came by a network, and we thought that there was none: what that peer calls loopback is not ours."""
        from_here = body.host == self.who["host"] and all(inbox.startswith("tcp://127.") for inbox in body.inbox)
        if from_here or not self._addresses.is_behind:
            return False
        self._network_stirs(0.0)
        return True

    def _hints(self, body: Hello) -> None:
        """Whom a peer knows."""
        outputs: list[Output] = []
        for origin, endpoint in () if self._is_surprise(body) else body.peers:
            if self._membership.state(origin) is State.JOINED:
                continue  # no news: among n nodes that boot together nearly all of n³ hints
            if to_dial([endpoint], self._addresses.local):
                outputs += self._membership.hint(origin, endpoint, now())
        self._perform(outputs)

    def _found(self, found: Found) -> None:
        """mDNS: somebody announced itself."""
        inboxes = to_dial([f"tcp://{host}:{found.inbox_port}" for host in found.host_addresses], self._addresses.local)
        if inboxes:
            self._perform(self._membership.hint(found.origin, inboxes[0], now(), also=tuple(inboxes[1:])))

    # --- commands --------------------------------------------------------------------------------

    def on_command(self, identity: bytes, command: Command) -> None:
        """A command came in on the inbox."""
        body, origin = command.body, self._guests.get(identity)
        if origin is None and isinstance(body, commands.Request) and self.joined(body.origin):
            origin = body.origin  # a lane
        if origin is not None and (serve := self.brief.get(type(body))) is not None:
            serve(identity, origin, command)
        elif isinstance(body, Hello) and not isinstance(body, Welcome):
            self._greeted(identity, command, body)
        elif origin is None:
            self.inbox.answer(identity, commands.Error("hello", "say HELLO first"), command.request)
        elif not self.registry.on_command(identity, origin, command):
            self._host.serve(identity, origin, command)

    def _on_answer(self, link: Link, command: Command) -> None:
        """Something came back that no question waits for."""
        body = command.body
        if isinstance(body, commands.Heads) and link.origin is not None:
            self.registry.on_heads(link.origin, body)
        elif isinstance(body, commands.Error) and body.code == "hello":
            self._hello(link)  # it lost sight of us, perhaps by a reconnect

    def _took_leave(self, origin: int) -> None:
        self._perform(self._membership.bye(origin, now()))

    # --- heartbeats --------------------------------------------------------------------------------

    def _heard(self, origin: int) -> None:
        if outputs := self._membership.heard(origin, now()):
            self._perform(outputs)
            self._resubscribe(origin)

    def _resubscribe(self, origin: int) -> None:
        """A peer is back from silence: hear from it what was missed."""
        if (link := self.links.get(origin)) is not None:
            for intake in self._host.intakes.values():
                self.registry.subscribe(link, intake)

    # --- the network under us --------------------------------------------------------------------

    def _network_stirs(self, delay: float = STIRRED) -> None:
        """An interface or address has changed, and more of it may be about to."""
        if self._news is not None:
            self._news.clear()
        if self._poll_soon is None:
            self._poll_soon = self._loop.call_later(delay, self._poll_addresses)

    def _poll_addresses(self) -> None:
        self._poll_soon = None
        before = set(self._addresses.addresses)
        addresses = self._addresses.poll()
        if addresses is not None:
            self._tell_trouble()
            if self._discovery is not None:
                self._spawn(self._discovery.set_addresses(addresses))
            if not before.issubset(addresses):  # connections may be from one that is gone
                self._hearing.reattach()
            for link in list(self._dialled.values()):  # say where we are now, over fresh connections
                self._dial(link.endpoint)

    def _refresh(self) -> None:
        """Now and then: announce and browse anew, and see whether news of the network were missed."""
        if now() >= self._refresh_at:
            self._refresh_at = now() + random.uniform(REFRESH_MIN, REFRESH_MAX)
            self._poll_addresses()
            if self._discovery is not None:
                self._spawn(self._discovery.refresh())

    def _tell_trouble(self) -> None:
        if (trouble := self._addresses.trouble) is not None:
            self._host.emit(Warned(trouble))

    def _garbage(self, error: RemoteProtocolError) -> None:
        self._host.emit(Warned(str(error)))

    def _every(self, seconds: float, work: Callable[[], None]) -> None:
        slot = len(self._timers)

        def again() -> None:
            self._timers[slot] = self._loop.call_later(seconds, again)
            work()

        self._timers.append(self._loop.call_later(seconds, again))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let go of everything."""
        self._cancel_timers()
        if self._news is not None:
            self._loop.remove_reader(self._news.fileno())
            self._news.close()
        if self._discovery is not None:
            await self._discovery.close()
            self._cancel_timers()  # meanwhile others came and went
        for task in list(self._tasks):
            task.cancel()
        self.registry.close()
        for link in list(self._dialled.values()):
            link.close(linger_ms=100)
        self._dialled.clear()
        self.links.clear()
        self._hearing.close()

    async def leave(self, timeout: float) -> list[int]:
        """Say BYE to everybody; returns who had not confirmed to have all within `timeout` seconds."""
        began = now()  # whom we have just introduced ourselves to counts us in, and so must hear of the end
        answered = lambda: not any(link.is_answering for link in self._dialled.values())  # noqa: E731
        await self.registry.until(answered, min(timeout, WELCOME_PATIENCE))
        return await self.registry.leave(max(0.0, began + timeout - now()))

    def _cancel_timers(self) -> None:
        for timer in (*self._timers, self._timer, self._poll_soon):
            if timer is not None:
                timer.cancel()
