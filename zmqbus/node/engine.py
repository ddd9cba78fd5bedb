"""The engine of a node: an asyncio loop's worth of control work, written once for both faces.

It opens and closes the sockets, keeps the timers, serves fetches and statistics, and brings subscriptions and peers
together. No message passes through it: publishing is `publishing/`, on the caller's thread, receiving is
`receiving/`, on the consumer's. Unless said otherwise its methods belong to the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket as system
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

from zmqbus.errors import (
    ForkedProcess,
    NodeClosed,
    RemoteProtocolError,
    SetupError,
    TopicError,
    WaitTimeout,
    ZmqbusError,
)
from zmqbus.net.clock import now, time_ns
from zmqbus.net.sockets import SOURCES, Role, Socket, SocketFactory, parse_endpoint
from zmqbus.net.waker import Waker
from zmqbus.net.zap import ZapHandler, strangers_are_refused
from zmqbus.node import RELEASE
from zmqbus.node.config import Config
from zmqbus.node.events import Event, Listener, Listeners, TopicInfo, Undelivered, Warned
from zmqbus.node.peers.counting import count
from zmqbus.node.peers.links import Inbox, Link
from zmqbus.node.peers.peering import Peering
from zmqbus.node.peers.serving import Counters, Extension, Service
from zmqbus.node.peers.survey import survey
from zmqbus.node.publishing.broadcast import TRAIL_PERIOD, Broadcast
from zmqbus.node.publishing.durability import unacked
from zmqbus.node.publishing.outlet import STREAMS_MAX, Outlet
from zmqbus.node.publishing.publisher import TICK
from zmqbus.node.publishing.ticker import Ticker
from zmqbus.node.receiving.feed import Feed, Gate
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.receiving.repairs import fetch_all
from zmqbus.node.receiving.replays import Replays
from zmqbus.node.storing.outbox import Outbox
from zmqbus.node.work.queues.owner import Owner
from zmqbus.node.work.queues.workers import Workers
from zmqbus.node.work.requests.exchange import Exchange
from zmqbus.protocol import commands
from zmqbus.protocol.commands import BODY_BYTES_MAX, PATTERNS_MAX, SUBSCRIPTIONS_MAX, Body, Command
from zmqbus.protocol.members.peers import Peer, PeerJoined, PeerLeft
from zmqbus.protocol.streams.history import History
from zmqbus.protocol.streams.stream import Fetch, Gap
from zmqbus.protocol.topics import Matcher, check_pattern, covering_prefixes

HEARTBEAT_PERIOD = 1.0
IDLE_PERIOD = 0.1  # how often to look for streams that fell idle, whose HEAD is due
REGISTER_TIMEOUT = 8.0  # `subscribe` waits no longer for those who do not answer; silent, they are lost after 5
COMMAND_BYTES_MAX = BODY_BYTES_MAX + 4096  # what the inbox takes: also from a stranger, before it is refused
# Frames queued for a subscriber, and by it: 4 MiB of full batches on either side, and the kernel holds more. Not
# adapted to their size while in use: libzmq tells a sender of progress each half of the limit, so that after
# lowering it an empty queue may count as full for ever.
FRAMES_QUEUED = 64
WARDS_MAX = 1024  # who asks without being a peer never has a link
LINGER_MS = 500  # for what the kernel has not taken yet when a node closes


class Engine:
    """The control side of one node."""

    outlet: Outlet
    peering: Peering

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        in_turns: Callable[[], None] | None = None,
        extension: Extension | None = None,
    ) -> None:
        self.config = config
        self.origin = secrets.randbits(64) or 1
        self.intakes: dict[int, Intake] = {}
        self.refusal: ZmqbusError | None = NodeClosed(f"node {config.name!r} is not open")
        self.replays = Replays(self, loop)
        self.workers = Workers(self, loop)
        self.on_link_lost: list[Callable[[int], None]] = []
        """Told of a peer, by origin, to which a guarded link was lost: what was in flight, either way, may be lost.
        It may be dead, or there again in a moment, and then it is as if nothing had been."""
        self._wards: dict[int, None] = {}  # to be guarded when there is a link
        self._loop = loop
        self._in_turns = in_turns
        self._extension = extension
        self._forwarders: tuple[tuple[int, Callable[[str], bool]], ...] = ()  # origin, and whether it claims a topic
        self._factory = SocketFactory(config.key)
        self._zap: ZapHandler | None = None
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._listeners = Listeners()
        self._numbers = self._heartbeats = 0
        self._was_full = False  # the buffer of what is not acknowledged
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._warnings = 0

    # --- life ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Bind, prove that strangers are refused, and begin to look for peers.

        Raises:
            SetupError: the sockets cannot be bound.
            AuthError: the security self-test failed; nothing stays open.
        """
        try:
            await self._open()
        except BaseException:
            await self._shut()
            raise

    async def _open(self) -> None:
        config, factory = self.config, self._factory
        host = config.interface or "0.0.0.0"
        if config.key is not None:
            self._zap = ZapHandler(factory, config.key, self._loop)
        router = factory.router(frame_bytes_max=COMMAND_BYTES_MAX)
        pubs = {source: factory.pub(FRAMES_QUEUED, drops=source == "tap") for source in SOURCES}
        bound: list[tuple[Role, Socket]] = [("inbox", router), *pubs.items()]
        ports = {role: parse_endpoint(factory.bind(socket, host))[1] for role, socket in bound}
        self._own_pubs = {
            source: factory.bind_inproc(pub, f"{source}-{self.origin:016x}") for source, pub in pubs.items()
        }
        self._waker = Waker(factory, f"waker-{self.origin:016x}")
        self._ticker = Ticker(self._loop, TICK, lambda: self.outlet.tick())
        self._trail = Ticker(self._loop, TRAIL_PERIOD, lambda: self.outlet.tick_trail())
        broadcast = Broadcast(pubs, self._ticker.start, self._trail.start)
        history = History(config.history_bytes, config.buffer_bytes)
        self.outlet = Outlet(broadcast, self.origin, history, config.acks, self._ticker.start, self._in_turns)
        gives_out = config.outbox is None and self._extension is None
        self.jobs = Owner(self, self._loop, gives_out)
        self.requests = Exchange(self, self._loop, factory, config.name)
        self.on_link_lost += [self.jobs.lost, self.workers.lost, self.requests.lost]
        if config.key is not None:
            probe = "127.0.0.1" if host == "0.0.0.0" else host
            await strangers_are_refused(
                factory, config.key, {role: f"tcp://{probe}:{port}" for role, port in ports.items()}
            )
        place: dict[str, Any] = {"host": system.gethostname(), "pid": os.getpid(), "release": RELEASE}
        if (more := self._extension) is not None:
            place |= {"role": more.role, "claims": more.claims, "journal": more.journal}
        self.peering = Peering(
            self,
            self._loop,
            factory,
            origin=self.origin,
            bus=config.bus,
            who={"name": config.name, "epoch": time_ns(), **place},
            interface=config.interface,
            seeds=config.peers,
            mdns=config.mdns,
            ports=ports,
        )
        if config.outbox is not None:
            self._outbox = await Outbox.open(config, self.outlet, self._loop, self._offer, self.warn)
        self._inbox = Inbox(router, self._loop, self.peering.on_command, self.garbage)  # from now on it is read
        self._service = Service(
            self.origin,
            self.outlet,
            self._inbox,
            self.jobs,
            self._all_counters,
            self._extension,
            self._outbox,
        )
        self.refusal = None
        self.peering.brief[commands.Request] = self.requests.answering.requested
        if self._extension is None:
            self.peering.brief[commands.Done] = self.jobs.serve
        self.peering.start(self._inbox)
        self._heartbeat()
        self._announce_idle()

    def refuse(self) -> None:
        """Nothing can be published any more. Any thread."""
        if hasattr(self, "outlet"):
            self.outlet.refuse(NodeClosed(f"node {self.config.name!r} is closed"))

    async def close(self, timeout: float) -> list[Undelivered]:
        """Leave: drain for at most `timeout` seconds, then close everything."""
        if self.refusal is not None:
            return []
        self.refusal = NodeClosed(f"node {self.config.name!r} is closed")
        outlet = self.outlet
        outlet.refuse(self.refusal)
        outlet.flush_all()
        self.requests.close(self.refusal)
        deadline = now() + timeout
        try:
            while not outlet.push() and now() < deadline:
                await asyncio.sleep(TICK)
            await self.workers.leave(max(0.0, deadline - now()) / 2)
            while (self.jobs.left or ((self._forwarders or self._outbox) and unacked(outlet))) and now() < deadline:
                await asyncio.sleep(TICK)
            await self.requests.leave(max(0.0, deadline - now()))
            await self.replays.leave(self.refusal, max(0.0, deadline - now()))
            late = await self.peering.leave(max(0.0, deadline - now()))
            undelivered = [Undelivered(p.name, p.origin) for p in self.peering.peers() if p.origin in late]
            if count := unacked(outlet):
                undelivered.append(Undelivered("forwarder", 0, count))
            return undelivered + self.jobs.remaining()
        finally:  # also if whoever waits for it is cancelled
            for intake in list(self.intakes.values()):
                intake.close(self.refusal)
            self.replays.end(self.refusal)
            self.workers.end()
            await self._shut()
            for listener in self._listeners.present:
                listener.close()

    async def _shut(self) -> None:
        """Close whatever is open."""
        for timer in self._timers.values():
            timer.cancel()
        if hasattr(self, "peering"):
            await self.peering.close()
        if hasattr(self, "jobs"):
            self.jobs.close()
        if self._inbox is not None:
            self._inbox.close(LINGER_MS)
        if hasattr(self, "outlet"):
            self._ticker.cancel()
            self._trail.cancel()
            self.outlet.close(LINGER_MS)
        if self._outbox is not None:
            await self._outbox.close()
        if self._zap is not None:
            self._zap.close()
        if self._in_turns is None:  # a loop of our own, that has nothing else to do
            self._factory.close()
        else:
            done: asyncio.Future[None] = self._loop.create_future()
            Thread(target=self._close_factory, args=(done,), name="zmqbus close", daemon=True).start()
            await done

    def _close_factory(self, done: asyncio.Future[None]) -> None:
        self._factory.close()  # waits for the linger
        self.soon(done.set_result, None)

    def forked(self) -> None:
        """In a forked child: everything here is the parent's."""
        self.refusal = ForkedProcess()
        self.outlet.refuse(self.refusal)
        for intake in self.intakes.values():
            intake.forked(self.refusal)
        self.replays.forked(self.refusal)
        self.workers.forked(self.refusal)

    # --- timers ----------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        self._timers["heartbeat"] = self._loop.call_later(HEARTBEAT_PERIOD, self._heartbeat)
        self._heartbeats += 1
        self.outlet.heartbeat(self._heartbeats)
        self.jobs.look()
        history = self.outlet.history
        if history.full and not self._was_full:
            away = "" if self._forwarders else ", and none is on the bus"
            self.warn(f"publishers wait: {history.pinned_bytes:,} bytes are not acknowledged by forwarders{away}")
        self._was_full = history.full

    def _announce_idle(self) -> None:
        self._timers["idle"] = self._loop.call_later(IDLE_PERIOD, self._announce_idle)
        self.outlet.announce_idle()

    # --- subscriptions ---------------------------------------------------------------------------

    async def attach(
        self,
        patterns: Sequence[str],
        make: Callable[[int, Feed], Intake],
        wake: Callable[[], None] | None,
        internal: bool = False,
    ) -> Intake:
        """Open a subscription of the kind that `make` makes; done when every known publisher has registered it.

        `wake`: to be called when there is something to do. None: its consumer sleeps in the socket.
        `internal`: to reserved topics as well.
        """
        if not patterns:
            raise TopicError("", "give at least one pattern; '>' is everything")
        if len(patterns) > PATTERNS_MAX or len(self.intakes) >= SUBSCRIPTIONS_MAX:
            raise SetupError(
                f"at most {PATTERNS_MAX} patterns to a subscription, and {SUBSCRIPTIONS_MAX} subscriptions to a node"
            )
        for pattern in patterns:
            check_pattern(pattern, internal=internal)
        socket = self._factory.sub(FRAMES_QUEUED)
        for prefix in covering_prefixes(patterns):
            socket.subscribe(prefix)
        self._numbers += 1
        number, registry = self._numbers, self.peering.registry
        gate = Gate(wake) if wake is not None else self._gate(socket, number)
        intake = make(number, Feed(self._factory, self._loop, socket, gate, lambda: registry.attached(number)))
        self.intakes[intake.number] = intake
        intake.feed.connect(self._own_pubs[intake.source])
        intake.heads(self.origin, self.heads(intake.patterns), more=False)
        self.peering.connect(intake)
        try:
            registered = await registry.until(lambda: not registry.unregistered(intake), REGISTER_TIMEOUT)
        except BaseException:  # nobody will read it
            self.dispose(intake)
            raise
        if not registered:
            late = registry.unregistered(intake)
            names = ", ".join(peer.name for peer in self.peering.peers() if peer.origin in late)
            self.emit(Warned(f"no answer to SUBSCRIBE {' '.join(patterns[:5])} within {REGISTER_TIMEOUT:g} s: {names}"))
        return intake

    def _gate(self, socket: Socket, number: int) -> Gate:
        """To a socket that its reader sleeps in."""
        self._waker.attach(socket, number)
        gate = Gate(lambda: self._waker.wake(number) if gate.asleep else None)
        return gate

    async def unsubscribe(self, intake: Intake) -> None:
        """Close a subscription."""
        self.dispose(intake)

    def dispose(self, intake: Intake) -> None:
        """Close a subscription."""
        if self.intakes.pop(intake.number, None) is not None:
            self.peering.registry.withdraw(intake.number)
        intake.close()

    def sources(self, topic: str, origin: int) -> Sequence[int]:
        """Whom to ask for a repair, from any thread."""
        sources = [forwarder for forwarder, claims in self._forwarders if claims(topic)]
        if origin == self.origin or self.peering.joined(origin):
            sources.insert(0, origin)
        return sources

    def forwarders_changed(self) -> None:
        """A forwarder came or went, or claims other topics."""
        present = [peer for peer in self.peering.peers() if peer.journal]
        self.replays.forwarders(present)
        self._forwarders = tuple((peer.origin, Matcher(peer.claims).matches) for peer in present)
        # One that was killed and started again may be there twice: what its first life claimed is no more.
        for journal, peer in self.replays.present.items():
            self.outlet.claimed(journal, peer.claims)
        self.jobs.forwarders_changed()
        if self._outbox is not None:
            self._outbox.offer()

    def answer(self, identity: bytes, body: Body, request: int, parts: Sequence[bytes]) -> bool:
        """Send to whoever asked; b"" is one of our own workers."""
        if not identity:
            self.soon(self.workers.local, Command(request, body, list(parts)))
            return True
        return self._inbox is not None and self._inbox.answer(identity, body, request, parts)

    def _offer(self, offer: commands.Offer) -> None:
        """Tell every forwarder."""
        for forwarder, _ in self._forwarders:
            if (link := self.peering.links.get(forwarder)) is not None:
                link.send(offer)

    def warn(self, reason: str) -> None:
        self.emit(Warned(reason))

    # --- what intakes want, from the consumers' threads ------------------------------------------

    def fetch(self, intake: Intake, fetches: Sequence[Fetch]) -> None:
        """Send these, and tell the intake what comes of it."""
        self.soon(fetch_all, self.outlet, self.peering.links, intake, fetches, self.garbage)

    def gap(self, gap: Gap) -> None:
        """Messages are lost to a subscription."""
        self.emit(gap)

    def settled(self, intake: Intake, origin: int) -> None:
        """A subscription has all that a leaving peer owed it."""
        self.soon(self.peering.registry.settled, intake.number, origin)

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""
        self._warnings += 1
        self.emit(Warned(str(error)))

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the node
            self._loop.call_soon_threadsafe(work, *arguments)

    # --- what peers want -------------------------------------------------------------------------

    def heads(self, patterns: list[str]) -> list[tuple[bytes, int]]:
        """Topic and next seq of our streams that fit."""
        return self.outlet.heads(patterns)

    def serve(self, identity: bytes, origin: int, command: Command) -> None:
        """A command that is not about peering."""
        if not self.requests.serve(identity, origin, command):
            self._service.serve(identity, origin, command)

    def introduced(self, origin: int) -> None:
        """A peer answered HELLO."""
        if origin in self._wards:
            self.guard(origin)
        self.workers.attend(origin)

    def guard(self, origin: int) -> bool:
        """Have `on_link_lost` told of this peer from now on, or from when there is a link, until that is lost for good:
        ask for it each time that something depends on it. False: nothing can be sent to that peer now."""
        link = self.peering.links.get(origin)
        if link is not None:
            self._wards.pop(origin, None)
            return link.guard()
        self._wards[origin] = None
        if len(self._wards) > WARDS_MAX:
            del self._wards[next(iter(self._wards))]
        return False

    def link_lost(self, link: Link) -> None:
        """A guarded link broke, or was closed."""
        if link.origin is not None:
            for told in self.on_link_lost:
                told(link.origin)

    # --- questions -------------------------------------------------------------------------------

    async def peers(self) -> list[Peer]:
        """The joined peers."""
        return self.peering.peers()

    async def wait_for_peers(self, n: int, timeout: float | None) -> list[Peer]:
        """Wait until there are at least `n`."""
        if not await self.peering.registry.until(lambda: len(self.peering.peers()) >= n, timeout):
            raise WaitTimeout("peer(s)", len(self.peering.peers()), n, timeout or 0.0)
        return self.peering.peers()

    def _all_counters(self) -> Counters:
        return {**self.counters(), **(self._extension.counters() if self._extension is not None else {})}

    async def statistics(self) -> dict[str, int | float]:
        """Counters since start."""
        return self.counters()

    def counters(self) -> dict[str, int | float]:
        """Counters since start."""
        own = count(self.outlet, self.intakes.values(), self.replays, self.workers, self._service)
        more = self._outbox.counters() if self._outbox is not None else {}
        return {
            "peers": len(self.peering.peers()),
            **own,
            "warnings": self._warnings,
            **self.requests.counters(),
            **more,
        }

    async def topics(self, patterns: Sequence[str], timeout: float) -> list[TopicInfo]:
        """The streams of every peer and our own that fit. Peers that do not answer are warned of."""
        own = [(self.config.name, self.origin, self.outlet.topics(0, STREAMS_MAX))]
        return await survey(self.peering, own, patterns, timeout, self.warn)

    # --- events, from any thread -----------------------------------------------------------------

    def add_listener(self, listener: Listener) -> None:
        """Tell it of every event from now on; if it is the first, also of the first warnings."""
        self._listeners.add(listener)

    def forget_listener(self, listener: Listener) -> None:
        """No longer."""
        self._listeners.forget(listener)

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        self._listeners.emit(event)
        if isinstance(event, PeerJoined):
            self.workers.attend(event.peer.origin)
        elif isinstance(event, PeerLeft):
            self.workers.left(event.peer.origin)
            self.jobs.left_by(event.peer.origin)
            self.requests.lanes.drop(event.peer.origin)
        if self._extension is not None:
            self._extension.heard(event)
