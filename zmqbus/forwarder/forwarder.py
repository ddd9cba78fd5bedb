"""`Forwarder`: journal, node and log service brought together. One asyncio loop, the caller's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from zmqbus.errors import TopicError, ZmqbusError
from zmqbus.forwarder.figures import NOTE_PERIOD, Pace, median_and_longest_ms
from zmqbus.forwarder.inflow import Inflow
from zmqbus.forwarder.queues import Queues, take_up
from zmqbus.forwarder.queues.graves import dead_claims
from zmqbus.forwarder.readings import Readings
from zmqbus.journal import Commit, Journal, Retention
from zmqbus.net.clock import now, time_ns
from zmqbus.net.keys import BusKey
from zmqbus.node.config import Config
from zmqbus.node.engine import Engine
from zmqbus.node.events import AsyncEventStream, Event, Warned
from zmqbus.node.peers.links import Inbox
from zmqbus.node.peers.serving import Counters
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol import commands
from zmqbus.protocol.commands import PATTERNS_MAX, Command, QueueFigures
from zmqbus.protocol.members.peers import PeerLeft
from zmqbus.protocol.topics import check_pattern

CLOSE_TIMEOUT = 5.0
TOPICS_MAX = PATTERNS_MAX // 2  # each is claimed twice: dead letters have topics of their own


class Forwarder:
    """A node that journals the topics it claims: `async with Forwarder("/var/lib/zmqbus") as forwarder: …`.

    Args:
        journal: the directory of its journal, made if it does not exist. One forwarder at a time has it.
        topics: patterns of the topics it claims.
        bytes_max: bound of the journal, in bytes; None: the disk's.
        age_max: seconds for which messages are kept at least, and not much longer; None: for ever.
        on_full: what happens when there is no room and durable subscriptions still need the oldest messages:
            "reject" new ones, so that publishers wait, or "drop_oldest".
        name, bus, key, interface, peers, discovery: as of `Node`.

    Raises, on entering:
        JournalUnavailable, JournalLocked, JournalVersion, JournalCorrupt, NoSpace, JournalFailed: see each.
        SetupError, KeyFileError, AuthError: as of `Node`.
    """

    role = "forwarder"

    def __init__(
        self,
        journal: str | Path,
        *,
        topics: Sequence[str] = (">",),
        bytes_max: int | None = None,
        age_max: float | None = None,
        on_full: Literal["reject", "drop_oldest"] = "reject",
        name: str | None = None,
        bus: str = "default",
        key: str | Path | BusKey | None = None,
        interface: str | None = None,
        peers: Sequence[str] = (),
        discovery: Literal["mdns", "static", "both"] = "both",
    ) -> None:
        for pattern in topics:
            check_pattern(pattern)
        if not 0 < len(topics) <= TOPICS_MAX:
            raise TopicError(" ".join(topics[:5]), f"a forwarder claims 1 to {TOPICS_MAX} patterns; '>' is everything")
        self.topics = list(topics)
        self.claims = self.topics + dead_claims(topics)
        """What it was told to claim, and dead letters of that."""
        self.path = str(journal)
        self.journal = 0
        """The number of its journal, once open."""
        self._config = Config.make(name, bus, key, interface, peers, discovery, 0, None, 1, None, None)
        age_max_ns = None if age_max is None else int(age_max * 1e9)
        self._retention = Retention(bytes_max, age_max_ns, on_full == "drop_oldest")
        self._failure: asyncio.Future[None] | None = None
        self._noting: asyncio.TimerHandle | None = None
        self._counters: Counters = {}  # in the end
        self._store: Journal | None = None

    # --- life --------------------------------------------------------------------------------------

    async def open(self) -> Forwarder:
        """Recover the journal, and join the bus."""
        self._loop = loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        self._failure.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits
        self._store = journal = await asyncio.to_thread(
            Journal.open, self.path, now_ns=time_ns(), retention=self._retention
        )
        try:
            backlogs = take_up(journal)
        except BaseException:
            self._store = None
            await asyncio.to_thread(journal.close, time_ns())
            raise
        self.journal = journal.number
        self._pace = Pace(now())
        self._first = journal.durable_offset  # of what this run is given
        self._writing = Worker(loop, "zmqbus journal")
        self._reading = Worker(loop, "zmqbus log")
        self._engine = Engine(self._config, loop, self._turn_soon, self)
        self._inflow = Inflow(journal, self._engine, self.claims, loop, self._failed)
        self._committer = self._inflow.committer = Committer(
            journal, loop, self._writing, self._committed, self._inflow.room, self._failed
        )
        self._readings = Readings(journal, loop, self._reading, self._committer, self._warn)
        self._queues = self._inflow.queues = Queues(
            journal, loop, self._engine, self._committer, self._reading, self.topics, self._warn, self._failed
        )
        self._queues.on_forgotten = self._inflow.distrust
        try:
            self._queues.open(backlogs)
            await self._engine.open()
            self._engine.outlet.claimed(journal.number, dead_claims(self.topics))  # of what we publish ourselves
        except BaseException:
            await self._close_journal()
            raise
        self._note()
        self._inflow.start()
        return self

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Commit and acknowledge what was received, leave the bus, let go of the journal. May be called twice."""
        if self._store is None:
            return
        if self._noting is not None:
            self._noting.cancel()
        self._queues.stop()
        self._inflow.stop()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._committer.settle()
                    await self._queues.close()
            self._inflow.tell_now()
            self._engine.outlet.claimed(self.journal, [])
            await self._engine.close(timeout)
        finally:
            await self._close_journal()

    async def _close_journal(self) -> None:
        journal, self._store = self._store, None
        assert journal is not None
        self._queues.stop()
        await self._committer.close()
        self._readings.close()
        await asyncio.to_thread(self._reading.close)
        await asyncio.to_thread(self._writing.close)
        try:
            await asyncio.to_thread(journal.close, time_ns())
        finally:
            self._counters = self._counted(journal)

    async def failed(self) -> None:
        """Wait for the end that nobody wants: raises JournalFailed or JournalCorrupt when the journal is broken."""
        assert self._failure is not None
        await asyncio.shield(self._failure)

    async def __aenter__(self) -> Forwarder:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- facts -------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For people."""
        return self._config.name

    @property
    def origin(self) -> int:
        """The id of its node, new at every start."""
        return self._engine.origin

    @property
    def endpoints(self) -> dict[str, str]:
        """Where its node can be reached."""
        return self._engine.peering.endpoints

    def events(self) -> AsyncEventStream:
        """What happens from now on: PeerJoined, PeerLeft, Gap, Warned, …"""
        stream = AsyncEventStream(self._engine.forget_listener)
        self._engine.add_listener(stream)
        return stream

    @property
    def quarantined(self) -> list[str]:
        """Files into which torn tails were put when the journal was recovered. Nobody was promised what is in them."""
        return [] if self._store is None else list(self._store.quarantined)

    def statistics(self) -> Counters:
        """Figures since start, by name."""
        return {**self._engine.counters(), **self.counters()}

    def counters(self) -> Counters:
        """Of the journal."""
        return self._counters if self._store is None else self._counted(self._store)

    def _counted(self, journal: Journal) -> Counters:
        committer, retention = self._committer, self._retention
        time = now()
        taken = journal.durable_offset - self._first
        rates = self._pace.rates(time, taken, committer.bytes)
        median, longest = median_and_longest_ms(committer.sync_seconds)
        counters: Counters = {
            "uptime_s": time - self._pace.started_at,
            "journal_path": self.path,
            "journal_bytes": journal.bytes_used,
            "journal_bytes_max": retention.bytes_max or 0,
            "journal_age_max_s": (retention.age_max_ns or 0) / 1e9,
            "journal_on_full": "drop_oldest" if retention.drop_oldest else "reject",
            "journal_segments": len(journal.segments),
            "journal_first_offset": journal.first_offset,
            "journal_next_offset": journal.durable_offset,
            "journal_streams": len(journal.known),
            "journal_full": str(journal.full or ""),
            "journal_messages": taken,
            "journal_messages_per_s": rates.messages,
            "journal_bytes_in": committer.bytes,
            "journal_bytes_in_per_s": rates.bytes,
            "journal_unacked": journal.next_offset - journal.durable_offset,
            "cursors": len(journal.cursors.all()),
            "commits": committer.commits,
            "fsync_p50_ms": median,
            "fsync_max_ms": longest,
            "readings": len(self._readings),
        }
        if committer.committed_at is not None:
            counters["last_commit_s"] = time - committer.committed_at
        return counters

    def _note(self) -> None:
        journal = self._store
        if journal is not None:
            self._pace.note(now(), journal.durable_offset - self._first, self._committer.bytes)
            self._noting = self._loop.call_later(NOTE_PERIOD, self._note)

    def cursors(self) -> list[tuple[str, int, bool]]:
        """Name, offset, and whether somebody reads under it."""
        ours = self._queues.cursors()
        return [(name, *ours.get(name, (offset, busy))) for name, offset, busy in self._readings.cursors()]

    def queues(self) -> list[QueueFigures]:
        """What is to be done, by queue and group."""
        return self._queues.figures()

    # --- out ---------------------------------------------------------------------------------------

    def serve(self, inbox: Inbox, identity: bytes, origin: int, command: Command) -> bool:
        """Answer a command. False: it is not one of ours."""
        if isinstance(command.body, commands.Offer):
            self._inflow.offered(origin, command.body)
            return True
        return self._queues.serve(identity, origin, command) or self._readings.serve(inbox, identity, origin, command)

    def heard(self, event: Event) -> None:
        """Who is no longer there reads no more, and does no jobs."""
        self._queues.heard(event)
        if isinstance(event, PeerLeft):
            self._readings.left(event.peer.origin)

    # --- inside ------------------------------------------------------------------------------------

    def _committed(self, commit: Commit) -> None:
        if commit.refused:
            self._queues.refused()
        self._inflow.committed(commit)
        self._readings.grown()
        self._queues.grown()

    def _turn_soon(self) -> None:
        self._loop.call_soon(self._engine.outlet.flush_all)

    def _warn(self, reason: str) -> None:
        self._engine.emit(Warned(reason))

    def _failed(self, error: BaseException) -> None:
        assert self._failure is not None
        if not self._failure.done():
            self._failure.set_exception(error if isinstance(error, ZmqbusError) else ZmqbusError(repr(error)))
        self._queues.stop()
        self._inflow.stop()
