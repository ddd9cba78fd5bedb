"""Where an owner's workers are served: what they say goes to the dispatcher, what it decides goes to them.

Both owners have one: the publisher, and the forwarder. They add what there is to do, and see to what became of it;
`on_outcome` is called after each change. All of it runs on the engine's loop, but `deliver`: whoever holds the `gate`
may add something to the dispatcher and deliver it. What else that leads to is done on the loop, soon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from threading import RLock
from typing import NamedTuple, Protocol

from zmqbus.errors import RemoteProtocolError, TopicError
from zmqbus.net.clock import now
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Body, Command, Error, QueueFigures
from zmqbus.protocol.frames import cut_batch
from zmqbus.protocol.queues.dispatcher import Dispatcher
from zmqbus.protocol.queues.work import Delivery, Team
from zmqbus.protocol.topics import check_pattern

TAKE = 64  # deliveries in a row before other work has its turn
JOB_BYTES = 1024 * 1024  # of batches in one JOB, unless the first is larger
WORKERS_MAX = 4096
GONE = "its worker is gone"
SAID = (commands.Join, commands.Done, commands.Fail, commands.Extend, commands.Leave)  # by workers

Worker = tuple[int, int]
"""Origin, and its number there."""
Jobs = Sequence[tuple[int, int, int]]
"""Delivery, first and last seq of each."""


class Host(Protocol):
    """What is needed of the engine. Any thread."""

    def answer(self, identity: bytes, body: Body, request: int, parts: Sequence[bytes]) -> bool:
        """Send to a worker; b"" is one of our own. False: it cannot be reached."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop."""


class Joined(NamedTuple):
    """A worker."""

    identity: bytes
    request: int
    team: Team


class Desk:
    """Serves workers."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, on_outcome: Callable[[], None]) -> None:
        self.dispatcher = Dispatcher()
        self.gate = RLock()
        """Held by whoever is at the dispatcher, or at what depends on it."""
        self.workers: dict[Worker, Joined] = {}
        self.settle: Callable[[Joined, commands.Settled], None] = self._settle
        """Told what became of what a worker said. To be replaced by who has to write it down before the worker hears of
        it: in place of `on_outcome`."""
        self._loop = loop
        self._answer = host.answer
        self._soon = host.soon
        self._on_outcome = on_outcome
        self._timer: asyncio.TimerHandle | None = None
        self._due = inf  # when the timer goes off, or is about to be set to
        self._goes_on = False
        self._closed = False

    @property
    def teams(self) -> set[Team]:
        """Those that have a worker."""
        return {joined.team for joined in self.workers.values()}

    # --- what workers say --------------------------------------------------------------------------

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command of a worker. False: it is none."""
        body = command.body
        if not isinstance(body, SAID):
            return False
        worker = (origin, body.id)
        with self.gate:
            joined = self.workers.get(worker)
            if isinstance(body, commands.Join):
                self._join(identity, worker, command.request, body)
            elif joined is not None and joined.identity == identity:
                self._hear(worker, joined, body)
            elif not isinstance(body, commands.Leave):
                error = Error("worker", f"there is no worker {body.id} of yours: JOIN first")
                self._answer(identity, error, command.request, ())
        return True

    def _hear(self, worker: Worker, joined: Joined, body: Body) -> None:
        dispatcher, time = self.dispatcher, now()
        match body:
            case commands.Done():
                refused = [job for job in body.done if not dispatcher.done(worker, *job, time)]
                self._heard(worker, joined, body.credit, body.done, refused)
            case commands.Fail():
                refused = [job for job in body.jobs if not self._fail(worker, body, job, time)]
                self._heard(worker, joined, body.credit, body.jobs, refused)
            case commands.Extend():
                dispatcher.extend(worker, body.delivery, body.lease_ms / 1000, time)
            case commands.Leave():
                self.leave(worker, None)
        self.deliver()

    def _fail(self, worker: Worker, body: commands.Fail, job: tuple[int, int, int], time: float) -> bool:
        match body.how:
            case "return":
                return self.dispatcher.give_back(worker, *job, time)
            case "reject":
                return self.dispatcher.reject(worker, *job, time, body.reason or "rejected")
            case _:  # what a later version may say, too: it is not done
                delay = None if body.delay_ms < 0 else body.delay_ms / 1000
                return self.dispatcher.fail(worker, *job, time, delay=delay, reason=body.reason or "not done")

    def _heard(
        self, worker: Worker, joined: Joined, credit: int, jobs: Jobs, refused: list[tuple[int, int, int]]
    ) -> None:
        if credit:
            self.dispatcher.grant(worker, credit)
        if jobs:
            self.settle(joined, commands.Settled(worker[1], refused))

    def _settle(self, joined: Joined, settled: commands.Settled) -> None:
        self.say_settled(joined, settled)
        self._on_outcome()

    def say_settled(self, joined: Joined, settled: commands.Settled) -> None:
        """Tell a worker."""
        self._answer(joined.identity, settled, joined.request, ())

    def _join(self, identity: bytes, worker: Worker, request: int, body: commands.Join) -> None:
        try:
            check_join(body)
            if len(self.workers) >= WORKERS_MAX and worker not in self.workers:
                raise TopicError("", f"{WORKERS_MAX} workers are served already")
        except TopicError as error:
            self._answer(identity, Error("join", str(error)), request, ())
            return
        known = self.workers.get(worker)
        if known is not None and known.identity != identity:
            self.leave(worker, GONE)  # it has connected anew, and forgotten what it had
        self.workers[worker] = Joined(identity, request, team_of(body))
        self.dispatcher.join(worker, team_of(body), body.lease_ms / 1000, body.credit, now())
        self.deliver()

    def leave(self, worker: Worker, reason: str | None) -> None:
        """A worker is no longer there; without a reason, it said so itself."""
        with self.gate:
            if self.workers.pop(worker, None) is not None:
                self.dispatcher.leave(worker, now(), reason)
                self._on_outcome()

    def lost(self, origin: int) -> None:
        """All the workers of a node are gone."""
        gone = [worker for worker in self.workers if worker[0] == origin]
        for worker in gone:
            self.leave(worker, GONE)
        if gone:
            self.deliver()

    def look(self, guard: Callable[[int], bool]) -> None:
        """Now and then. `guard`: have it told when the connection to a node breaks; False: it cannot be, for now.

        Who took jobs and died before it was met the other way round as well is never missed as a peer. That there is no
        way to it any more shows when it is sent something: a JOB of nothing will do.
        """
        gone = [
            worker
            for worker, joined in self.workers.items()
            if joined.identity and not guard(worker[0]) and not self._send_job(worker, [], [])
        ]
        for worker in gone:
            self.leave(worker, GONE)
        if gone:
            self.deliver()

    # --- what they are sent ------------------------------------------------------------------------

    def deliver(self) -> None:
        """Send what may be sent, and see to the next time. Any thread."""
        with self.gate:
            if self._closed:
                return
            deliveries = self.dispatcher.take(now(), TAKE)
            by_worker: dict[Worker, list[Delivery]] = {}
            for delivery in deliveries:
                worker: Worker = delivery.worker  # type: ignore[assignment]  # ours
                by_worker.setdefault(worker, []).append(delivery)
            for worker, theirs in by_worker.items():
                self._send(worker, theirs)
            if len(deliveries) == TAKE and not self._goes_on:
                self._goes_on = True
                self._soon(self._go_on)
            due = self.dispatcher.next_timer()
            if due is not None and due < self._due:  # one that goes off too soon is set anew then
                self._due = due
                self._soon(self._set_timer)

    def _go_on(self) -> None:
        self._goes_on = False
        self.deliver()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed and self._due < inf:
            self._timer = self._loop.call_later(max(0.0, self._due - now()), self._tick)

    def _tick(self) -> None:
        with self.gate:
            self._timer, self._due = None, inf
            self.dispatcher.tick(now())
            self._see_to_it()

    def _see_to_it(self) -> None:
        with self.gate:
            self._on_outcome()
            self.deliver()

    def _send(self, worker: Worker, deliveries: list[Delivery]) -> None:
        going: list[Delivery] = []
        parts: list[bytes] = []
        size = 0
        for at, delivery in enumerate(deliveries):
            batch = delivery.work.batch
            try:
                if delivery.first != batch.first or delivery.last != batch.first + batch.count - 1:
                    batch = cut_batch(batch, delivery.first, delivery.last)
            except RemoteProtocolError as error:  # whoever sent it: nobody can do it
                self.dispatcher.unsent(delivery, now(), unfit=str(error))
                self._soon(self._see_to_it)
            else:
                going.append(delivery)
                parts += batch.parts
                size += len(batch.parts[-1])
            if going and (size >= JOB_BYTES or at == len(deliveries) - 1):
                if not self._send_job(worker, going, parts):
                    for unsent in (*going, *deliveries[at + 1 :]):
                        self.dispatcher.unsent(unsent, now())
                    self._soon(self._unreachable, worker, self.workers[worker])
                    return
                going, parts, size = [], [], 0

    def _unreachable(self, worker: Worker, joined: Joined) -> None:
        """It reads nothing, or is no longer there: should it be back, it is told to JOIN again. What it has is not
        known to be unbegun; perhaps that is what it died of."""
        if self.workers.get(worker) is joined:
            self.leave(worker, GONE)
            self.deliver()

    def _send_job(self, worker: Worker, deliveries: list[Delivery], parts: list[bytes]) -> bool:
        joined = self.workers[worker]
        body = commands.Job(worker[1], [(delivery.number, delivery.attempt) for delivery in deliveries])
        return self._answer(joined.identity, body, joined.request, parts)

    # --- the rest ----------------------------------------------------------------------------------

    def figures(self) -> list[QueueFigures]:
        """For STATISTICS."""
        with self.gate:
            lines = self.dispatcher.figures(now())
        return [
            QueueFigures(
                topic=figures.line[1],
                group=(figures.line[0] or "").partition(" ")[0],
                waiting=figures.waiting,
                in_flight=figures.in_flight,
                delayed=figures.delayed,
                redelivered=figures.redelivered,
                done=figures.done,
                dead=figures.dead,
                workers=figures.workers,
                oldest_ns=figures.oldest.batch.time_ns if figures.oldest is not None else 0,
            )
            for figures in lines
        ]

    def close(self) -> None:
        """Nothing is given out any more. What workers say is still heard."""
        with self.gate:
            self._closed = True
        if self._timer is not None:
            self._timer.cancel()


def check_join(body: commands.Join) -> None:
    """Raise TopicError unless that can be pulled, in that name."""
    if not body.patterns:
        raise TopicError("", "a worker pulls at least one topic or pattern")
    for pattern in body.patterns:
        check_pattern(pattern, internal=True)
    if not body.group.isprintable() or " " in body.group:
        raise TopicError(body.group, "the name of a group has no white space and no control characters")


def team_of(body: commands.Join) -> Team:
    """Who pulls the same by the same name. The name has the patterns in it: of others it would be another's share."""
    return Team(" ".join((body.group, *body.patterns)), tuple(body.patterns))
