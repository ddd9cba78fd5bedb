"""Jobs of this node's own: what it pushed, held until some worker has done it, and what groups share of its messages.

A forwarder that claims a topic owns what is pushed there from then on. What was waiting here and never given out is
handed over: it is withdrawn, and forwarders may fetch the stream from there on only. What was given out stays ours
until it is settled. So nothing is given out by both.

Published messages are shared among a group's workers as long as no forwarder claims their topic: a group begins when
its first worker joins, is kept for a while when its last is gone, and has a bound on what waits for it.

`add` is called by whoever publishes, under the publishers' lock, and so is `hand_out`, without it: where no work is
under way, a job leaves on the thread that pushed it. Everything else belongs to the engine's loop. What both are at is
touched by who holds the gate of the desk; if somebody takes both, the gate comes before the publishers' lock.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple, Protocol

from zmqbus.errors import SetupError, TopicError, ZmqbusError
from zmqbus.net.clock import now, time_ns
from zmqbus.node.events import Undelivered
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.publishing.publisher import Publisher
from zmqbus.node.work.queues.desk import Desk, team_of
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command, QueueFigures
from zmqbus.protocol.frames import HEADER, HEADERS, QUEUED, Batch
from zmqbus.protocol.queues.dispatcher import AT_ONCE
from zmqbus.protocol.queues.letters import DEAD_PREFIX, DUE, due_of, letter
from zmqbus.protocol.queues.work import NO_ATTEMPTS, Team, Work
from zmqbus.protocol.topics import Matcher

JOBS_PER_BATCH = 128  # of a queue: what one worker is given at a time
GROUP_BYTES_MAX = 64 * 1024 * 1024  # of published messages that wait for groups
GROUP_PATIENCE = 30.0  # seconds for which a group is kept without workers


class Host(Protocol):
    """What is needed of the engine."""

    outlet: Outlet

    def answer(self, identity: bytes, body: commands.Body, request: int, parts: Sequence[bytes]) -> bool:
        """Send to a worker; b"" is one of our own. False: it cannot be reached."""

    def guard(self, origin: int) -> bool:
        """Say so when the connection to a node breaks."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop, from any thread."""

    def warn(self, reason: str) -> None:
        """Tell whoever listens to events."""


class Queue:
    """What is pushed on one topic."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.works: deque[Work] = deque()
        """Ours, in order, from the first that is not settled on."""
        self.end = 1
        """One past the last message that was ever ours: forwarders get nothing before it."""
        self.handed = False
        """To a forwarder, from `end` on."""


class Group(NamedTuple):
    """Workers that share published messages."""

    matches: Callable[[str], bool]
    works: set[Work]


class Owner:
    """Gives out this node's jobs."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, gives_out: bool) -> None:
        """`gives_out`: False, where there is an outbox: what is pushed waits for a forwarder then."""
        self._host = host
        self._outlet = host.outlet
        self._loop = loop
        self._gives_out = gives_out
        self._desk = desk = Desk(host, loop, self._settle)
        self._gate = desk.gate
        self._dispatcher = desk.dispatcher
        self._pushed: list[Publisher] = []  # grows in other threads
        self._queues: dict[str, Queue] = {}
        self._groups: dict[Team, Group] = {}
        self._members: Counter[Team] = Counter()
        self._farewells: dict[Team, asyncio.TimerHandle] = {}
        self._group_bytes = 0
        self._overflowing: set[Team] = set()
        self._fresh: deque[tuple[Publisher, Batch]] = deque()
        self._pumping = False
        self._journalists: set[int] = set()  # origins of forwarders, joined or not yet

    # --- from any thread -------------------------------------------------------------------------

    def publisher(self, queue: str) -> Publisher:
        """A topic that is a queue of this node from now on.

        Raises:
            TopicError, TooManyStreams, NodeClosed
        """
        if len(queue.encode(errors="replace")) + len(DEAD_PREFIX) > 255:
            raise TopicError(queue, f"a queue's name has at most {255 - len(DEAD_PREFIX)} bytes")
        return self._as_queue(self._outlet.publisher(queue))

    def _as_queue(self, publisher: Publisher) -> Publisher:
        with self._outlet.lock:
            if not publisher.flags & QUEUED:
                publisher.flush()
                publisher.flags |= QUEUED
                publisher.most = JOBS_PER_BATCH
                if self._gives_out:
                    self._pushed.append(publisher)
                    ledger = self._outlet.ledger
                    ledger.settled(ledger.account(publisher.topic, publisher.shelf), publisher.sent)
                    publisher.jobs = self
        return publisher

    def add(self, publisher: Publisher, parts: tuple[bytes, ...], at_once: bool) -> None:
        """A batch of a queue, or of a topic that groups share, was sent. Under the lock.

        `at_once`: whoever says that calls `hand_out` as soon as it has let go of the lock.
        """
        if publisher.flags & QUEUED and not self._gives_out:
            return
        account = self._outlet.ledger.accounts.get(publisher.topic)
        if account is None or not account.claimants:
            self._fresh.append((publisher, batch_of(publisher, parts)))
            if not self._pumping and not at_once:
                self._pumping = True
                self._host.soon(self.pump)

    def hand_out(self) -> None:
        """Give out what has been pushed, on this thread, unless somebody else is at it."""
        if not self._fresh:
            return
        if self._gate.acquire(blocking=False):
            try:
                self._take_in()
                self._desk.deliver()
            finally:
                self._gate.release()
        else:
            self._host.soon(self.pump)

    # --- what is pushed and published --------------------------------------------------------------

    def pump(self) -> None:
        """Give out what has been pushed."""
        with self._gate:
            self._take_in()
            self._desk.deliver()

    def _take_in(self) -> None:
        self._pumping = False
        time = now()
        while self._fresh:
            publisher, batch = self._fresh.popleft()
            if batch.flags & QUEUED:
                self._push(self._queues.get(publisher.topic) or self._queue(publisher), batch, time)
            else:
                self._share(publisher, batch, time)

    def _queue(self, publisher: Publisher) -> Queue:
        queue = self._queues.get(publisher.topic)
        if queue is None:
            queue = self._queues[publisher.topic] = Queue(publisher)
        return queue

    def _push(self, queue: Queue, batch: Batch, time: float) -> None:
        if batch.first >= queue.end:  # else it was taken back from a forwarder that let go of it just now
            work = Work(batch, (None, queue.publisher.topic), batch.first, 0, NO_ATTEMPTS)
            queue.end = batch.first + batch.count
            queue.works.append(work)
            self._dispatcher.add(work, time, due_of(batch, time, time_ns()) if batch.flags & HEADERS else AT_ONCE)

    def _share(self, publisher: Publisher, batch: Batch, time: float) -> None:
        for team, group in self._groups.items():
            if group.matches(publisher.topic):
                if self._group_bytes + batch.size > GROUP_BYTES_MAX:
                    if team not in self._overflowing:
                        self._overflowing.add(team)
                        self._host.warn(
                            f"group {team.group}: too much waits for it, it misses some of {publisher.topic}"
                        )
                    continue
                work = Work(batch, (team.group, publisher.topic), batch.first)
                group.works.add(work)
                self._group_bytes += batch.size
                self._dispatcher.add(work, time)

    # --- workers ---------------------------------------------------------------------------------

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command of a worker. False: it is none."""
        if type(command.body) is commands.Join:
            self._host.guard(origin)
            self._welcome(team_of(command.body))
        return self._desk.serve(identity, origin, command)

    def lost(self, origin: int) -> None:
        """The connection to a node is gone: what its workers had goes to others."""
        self._desk.lost(origin)

    def left_by(self, origin: int) -> None:
        """A peer is no longer there."""
        self._journalists.discard(origin)
        self._desk.lost(origin)

    def _welcome(self, team: Team) -> None:
        """A group exists from its first worker on."""
        if (farewell := self._farewells.pop(team, None)) is not None:
            farewell.cancel()
        if team not in self._groups:
            matches = Matcher(team.patterns).matches
            with self._gate, self._outlet.lock:
                self._groups[team] = Group(matches, set())
                for publisher in self._outlet.publishers.values():
                    if publisher.jobs is None and matches(publisher.topic):
                        publisher.jobs = self
            self._outlet.on_opened = self._opened

    def _opened(self, publisher: Publisher) -> None:
        """A stream begins. Under the lock."""
        if any(group.matches(publisher.topic) for group in list(self._groups.values())):
            publisher.jobs = self

    def look(self) -> None:
        """Now and then: groups without workers come to an end."""
        self._desk.look(self._host.guard)
        present = self._desk.teams
        for team in self._groups:
            if team not in present and team not in self._farewells:
                self._farewells[team] = self._loop.call_later(GROUP_PATIENCE, self._forget, team)

    def _forget(self, team: Team) -> None:
        del self._farewells[team]
        with self._gate:
            group = self._groups.pop(team)
            self._group_bytes -= sum(work.batch.size for work in group.works)
            for line in {work.line for work in group.works}:
                self._dispatcher.forget(line)

    # --- what became of it -------------------------------------------------------------------------

    def _settle(self) -> None:
        """Something is done, or dead."""
        dispatcher = self._dispatcher
        dying, dispatcher.dead = dispatcher.dead, []
        for dead in dying:
            try:
                topic, value, headers = letter(dead)
                self._as_queue(self._outlet.publisher(topic, internal=True)).send_without_wait(value, headers)
            except ZmqbusError as error:  # the node may be closing: the message remains
                self._host.warn(f"{dead.work.line[1]}: no dead letter could be kept ({error}): {dead.reason}")
                if dead.work.line[0] is None:
                    continue  # it was pushed, and is not done: it remains
            dispatcher.buried(dead)
        queues: dict[str, Queue] = {}
        for work in dispatcher.finished:
            group, topic = work.line
            if group is None:
                queues[topic] = self._queues[topic]
            else:
                self._finished(work)
        dispatcher.finished.clear()
        for queue in queues.values():
            self._advance(queue)

    def _finished(self, work: Work) -> None:
        for team, group in self._groups.items():
            if team.group == work.line[0]:
                group.works.discard(work)
                self._group_bytes -= work.batch.size
                self._overflowing.discard(team)

    def _advance(self, queue: Queue) -> None:
        """What is settled from the beginning on need not be kept."""
        works = queue.works
        while works and not left_of(works[0]):
            works.popleft()
        with self._outlet.lock:
            ledger, publisher = self._outlet.ledger, queue.publisher
            reached = works[0].batch.first if works else queue.end
            ledger.settled(ledger.account(publisher.topic, publisher.shelf), reached - 1)

    # --- forwarders --------------------------------------------------------------------------------

    def forwarders_changed(self) -> None:
        """Some topics may be claimed now, others no longer."""
        with self._gate:
            queues = list(map(self._queue, self._pushed))
            claimed = set(filter(self._is_claimed, queues))
            for queue in queues:
                if queue not in claimed:
                    self._take_back(queue)  # before what was pushed since it has not been claimed, which comes after it
            self._take_in()
            for queue in claimed:
                if not queue.handed:
                    self._hand_over(queue)
            self._desk.deliver()

    def _is_claimed(self, queue: Queue) -> bool:
        publisher, ledger = queue.publisher, self._outlet.ledger
        with self._outlet.lock:
            return bool(ledger.account(publisher.topic, publisher.shelf).claimants)

    def _hand_over(self, queue: Queue) -> None:
        for work in self._dispatcher.withdraw((None, queue.publisher.topic), self._outlet.origin, queue.end):
            queue.end = min(queue.end, work.batch.first)
        while queue.works and queue.works[-1].batch.first >= queue.end:
            queue.works.pop()
        queue.handed = True
        self._advance(queue)
        with self._outlet.lock:
            ledger, publisher = self._outlet.ledger, queue.publisher
            ledger.handed(ledger.account(publisher.topic, publisher.shelf), queue.end - 1)

    def _take_back(self, queue: Queue) -> None:
        """No forwarder is to have it any more: what none has acknowledged is ours again, or for the first time."""
        queue.handed = False
        publisher, outlet = queue.publisher, self._outlet
        with outlet.lock:
            durable = outlet.ledger.account(publisher.topic, publisher.shelf).durable
            entries = [entry for entry in publisher.shelf.entries if entry[0] > max(durable, queue.end - 1)]
        time = now()
        for _, _, parts, _ in entries:
            if (batch := batch_of(publisher, parts)).flags & QUEUED:
                self._push(queue, batch, time)

    def greeted(self, origin: int, journal: int, claims: Sequence[str]) -> None:
        """A forwarder said HELLO. It may ask for what it claims as soon as it has our WELCOME, joined or not."""
        self._journalists.add(origin)
        self._outlet.claimed(journal, claims)
        self.forwarders_changed()

    def floor(self, topic: bytes, origin: int) -> int:
        """Where a stream begins for a peer. Forwarders do not get what was given out by us."""
        if origin not in self._journalists:
            return 1
        queue = self._queues.get(topic.decode(errors="replace"))
        return queue.end if queue is not None and queue.handed else 1

    # --- the end -----------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Messages that were pushed, are ours, and are not settled."""
        with self._gate:
            taken_in = sum(left_of(work) for queue in self._queues.values() for work in queue.works)
        return taken_in + sum(batch.count for _, batch in list(self._fresh))

    def remaining(self) -> list[Undelivered]:
        """What no worker has done, by queue."""
        with self._gate:
            self._take_in()
            counts = [(topic, sum(map(left_of, queue.works))) for topic, queue in self._queues.items()]
        return [Undelivered(f"queue {topic}", 0, count) for topic, count in counts if count]

    def figures(self) -> list[QueueFigures]:
        """For STATISTICS."""
        return self._desk.figures()

    def close(self) -> None:
        """Nothing is given out any more."""
        for timer in self._farewells.values():
            timer.cancel()
        self._desk.close()


def left_of(work: Work) -> int:
    """Messages of it that are not settled."""
    return work.batch.count - work.done.bit_count()


def batch_of(publisher: Publisher, parts: tuple[bytes, ...]) -> Batch:
    """What was sent, as a batch."""
    _, _, flags, count, origin, first, time_ns = HEADER.unpack_from(parts[0], len(publisher.prefix))
    return Batch(publisher.prefix[:-1], flags, count, origin, first, time_ns, parts)


def delayed(headers: dict[str, Any] | None, delay: float) -> dict[str, Any] | None:
    """Headers that have a job wait for so many seconds."""
    if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < inf:
        raise SetupError(f"delay={delay!r}: use a number of seconds, 0 or more")
    return {**(headers or {}), DUE: time_ns() + int(delay * 1e9)} if delay else headers
