"""The engine's end of workers: JOIN to every peer that may have jobs, and what is said about them afterwards.

Each worker is a `Hand`, and has a tie to each peer. Whether a peer still knows a tie only shows when it is spoken to:
so it is, every two seconds, by a DONE of nothing, unless it was heard of. Who does not know it answers by an error, and
is joined again. All of it runs on the engine's loop, unless it says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial
from math import inf
from typing import Any, Protocol

from zmqbus.errors import NodeClosed, NotSettled, RemoteProtocolError, SetupError
from zmqbus.net.clock import now, time_ns
from zmqbus.node.events import Event, JobRefused, Warned
from zmqbus.node.peers.peering import Peering
from zmqbus.node.work.queues.delivery import Delivery, Parcel
from zmqbus.node.work.queues.hand import Hand
from zmqbus.node.work.queues.tie import Done, Tie, Wire
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Body, Command, Error, Job, Settled
from zmqbus.protocol.starts import Start, parse_start
from zmqbus.protocol.topics import check_pattern

ROUND = 2.0  # seconds between looks for ties that have broken unnoticed
LATE = 0.002  # seconds for which what is acknowledged gathers, while there is more to do
STUMBLE = 0.02  # seconds, before what could not be said is said again
LAST_WORDS = 0.5  # seconds for their answers, when a worker ends
BROKEN = 0.5  # seconds after a connection broke, when it may be there again
WORKERS_MAX = 1024
CREDIT_MAX = 1_000_000
GROUP_BYTES_MAX = 255
LEASE_MAX = 7 * 86400.0
BARRING = ("unexpected", "unknown")  # codes of errors of a peer that gives out no jobs
CLOSED = "its worker was closed before it was settled"


class Jobs(Protocol):
    """This node's own jobs."""

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command of a worker."""


class Host(Protocol):
    """What is needed of the engine."""

    origin: int
    peering: Peering

    @property
    def jobs(self) -> Jobs:
        """Once it is open."""

    def guard(self, origin: int) -> bool:
        """Say so when the connection to a node breaks."""

    def emit(self, event: Event) -> None:
        """Something happened."""

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop. Any thread."""


class Within:
    """Stands for a link to this node's own jobs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._requests = 0
        self._followed: dict[int, Callable[[Command | None], None]] = {}

    def follow(self, body: Body, on_answer: Callable[[Command | None], None]) -> int:
        """See `Wire`."""
        self._requests += 1
        self._followed[self._requests] = on_answer
        self.say(body, self._requests)
        return self._requests

    def say(self, body: Body, number: int) -> bool:
        """See `Wire`."""
        self._host.jobs.serve(b"", self._host.origin, Command(number, body, []))
        return True

    def unfollow(self, number: int) -> None:
        """See `Wire`."""
        self._followed.pop(number, None)

    def answered(self, command: Command) -> None:
        """Something comes back."""
        if (on_answer := self._followed.get(command.request)) is not None:
            on_answer(command)


class Pull:
    """What one worker asked for."""

    def __init__(self, number: int, pattern: str, group: str, lease: float, start: Start, hand: Hand) -> None:
        self.number = number
        self.pattern = pattern
        self.group = group
        self.lease = lease
        self.start = start
        self.hand = hand
        self.timer: asyncio.TimerHandle | None = None  # for what is to be said a little later
        self.watch: asyncio.TimerHandle | None = None  # for leases of jobs that wait
        self.troubles: dict[int, str] = {}  # by owner: what was last warned of


class Workers:
    """All workers of one node."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        within = Within(host)
        self.local: Callable[[Command], None] = within.answered
        """Takes what our own workers are answered."""
        self._within = within
        self._host = host
        self._loop = loop
        self._pulls: dict[Hand, Pull] = {}
        self._numbers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._past = dict.fromkeys(("jobs_received", "jobs_refused", "acks_lost"), 0)

    def counters(self) -> dict[str, int | float]:
        """Counters since start."""
        past, hands = self._past, self._pulls
        return {
            "workers": len(hands),
            "jobs_received": past["jobs_received"] + sum(hand.jobs for hand in hands),
            "jobs_refused": past["jobs_refused"] + sum(hand.refused for hand in hands),
            "acks_lost": past["acks_lost"] + sum(hand.lost for hand in hands),
        }

    # --- life ----------------------------------------------------------------------------------------

    async def open(
        self,
        queue: str,
        *,
        group: str,
        credit: int | None,
        lease: float,
        value_type: Any,
        start: str | int | datetime | None,
        wake: Callable[[], None] | None = None,
    ) -> Hand:
        """Ask every peer for jobs.

        Raises:
            SetupError, TopicError: see `Node.pull`.
        """
        check_pattern(queue, internal=True)
        check_group(group)
        if isinstance(lease, bool) or not isinstance(lease, int | float) or not 0 < lease < inf:
            raise SetupError(f"lease={lease!r}: use a number of seconds, more than 0")
        if credit is not None and (
            isinstance(credit, bool) or not isinstance(credit, int) or not 1 <= credit <= CREDIT_MAX
        ):
            raise SetupError(f"credit={credit!r}: use a whole number of jobs, 1 to {CREDIT_MAX:,}; None: as is best")
        begin = parse_start(start, time_ns())
        if len(self._pulls) >= WORKERS_MAX:
            raise SetupError(f"at most {WORKERS_MAX} workers to a node")
        self._numbers += 1
        lease = min(float(lease), LEASE_MAX)
        hand = Hand(lease, credit, value_type, self, wake)
        pull = Pull(self._numbers, queue, group, lease, begin, hand)
        self._pulls[hand] = pull
        if self._timer is None:
            self._timer = self._loop.call_later(ROUND, self._round)
        for origin in self._owners():
            self._attend(pull, origin)
        return hand

    async def close(self, hand: Hand, timeout: float, *, patient: bool = True) -> None:
        """Take no more jobs, give back those that were not begun, and wait until the others are settled.

        `patient`: wait also for those that are still being worked on.
        """
        pull = self._pulls.get(hand)
        if pull is None:
            return
        deadline = now() + timeout
        hand.stop(NodeClosed("the worker is closed"))
        self.report(hand)
        until = self._host.peering.registry.until
        try:
            if patient:  # and then there is to be time for the answers
                await until(lambda: not hand.unfinished, timeout - min(LAST_WORDS, timeout / 4))
            hand.give_up(CLOSED)
            self.report(hand)
            await until(lambda: not self._open(hand), max(0.0, deadline - now()))
        except NodeClosed:
            pass
        finally:
            self._dispose(pull)

    def abandon(self, hand: Hand) -> None:
        """The same, for one that nobody refers to any more. Jobs of it may be in somebody's hands."""
        if (pull := self._pulls.get(hand)) is not None:
            task = self._loop.create_task(self.close(hand, pull.lease))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def leave(self, timeout: float) -> None:
        """The node is about to close."""
        await asyncio.gather(*(self.close(hand, timeout) for hand in list(self._pulls)))

    def end(self) -> None:
        """The node closes."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._closing:
            task.cancel()
        for hand, pull in list(self._pulls.items()):
            hand.stop(NodeClosed("the node is closed"))
            self._dispose(pull)

    def forked(self, reason: Exception) -> None:
        """In a forked child: it is all the parent's."""
        for hand in self._pulls:
            hand.fork(reason)

    async def flush(self, hand: Hand, timeout: float | None) -> None:
        """Wait until all that was acknowledged is settled.

        Raises:
            NotSettled: it is not, within `timeout` seconds; or it was found, since the last call, that some never will.
        """
        self.report(hand)
        with hand.saying:
            goals = [(tie, tie.asked) for tie in hand.ties.values()]
        await self._host.peering.registry.until(
            lambda: all(tie.gone or tie.answered >= asked for tie, asked in goals), timeout
        )
        open_still = sum(tie.unsettled for tie, asked in goals if not tie.gone and tie.answered < asked)
        lost, hand.unreported = hand.unreported, 0
        if open_still:
            raise NotSettled(open_still + lost, f"their owners did not answer within {timeout or 0.0:g} s")
        if lost:
            raise NotSettled(lost, "they were another worker's by then, or their owner is gone (see JobRefused events)")

    def _open(self, hand: Hand) -> bool:
        return any(not tie.gone and tie.answered < tie.asked for tie in hand.ties.values())

    def _dispose(self, pull: Pull) -> None:
        hand = pull.hand
        if self._pulls.pop(hand, None) is None:
            return
        for timer in (pull.timer, pull.watch):
            if timer is not None:
                timer.cancel()
        with hand.saying:
            for tie in hand.ties.values():
                if not tie.gone:
                    tie.wire.say(commands.Leave(tie.number), tie.request)
                    hand.lose(tie)
                    hand.lost += self._tell(hand, tie.abandon())
        for key, count in (("jobs_received", hand.jobs), ("jobs_refused", hand.refused), ("acks_lost", hand.lost)):
            self._past[key] += count

    # --- what hands want: from any thread ------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        self._host.emit(event)

    def garbage(self, error: RemoteProtocolError) -> None:
        """An owner sent something undecodable."""
        self._host.garbage(error)

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop."""
        self._host.soon(work, *arguments)

    # --- what there is to say ------------------------------------------------------------------------

    def report_later(self, hand: Hand) -> None:
        """Say what is done, when it is a little more."""
        pull = self._pulls.get(hand)
        if pull is not None and pull.timer is None:
            pull.timer = self._loop.call_later(LATE, self._report_late, pull)

    def _report_late(self, pull: Pull) -> None:
        pull.timer = None
        self.report(pull.hand)

    def report(self, hand: Hand) -> None:
        """Say what is done and what is not, and how much more may be sent."""
        with hand.saying:
            is_said = self._say(hand)
        if not is_said and (pull := self._pulls.get(hand)) is not None and pull.timer is None:
            pull.timer = self._loop.call_later(STUMBLE, self._report_late, pull)
        self._host.peering.registry.changed()

    def report_here(self, hand: Hand) -> bool:
        """The same on any thread, where somebody waits for it and for nothing else: so the engine need not be woken.
        False: somebody else is at it, or the worker is about to end.
        """
        if not hand.saying.acquire(blocking=False):
            return False
        try:
            if hand.closed is not None:
                return False
            is_said = self._say(hand, here=True)
        finally:
            hand.saying.release()
        if not is_said:
            self.soon(self.report, hand)
        return True

    def _say(self, hand: Hand, here: bool = False) -> bool:
        """False: not to all. `here`: not on the loop, and in haste: who may still send much is told later of more."""
        touched = hand.collect()
        for tie in touched:
            if tie.gone:
                hand.lost += self._tell(hand, tie.abandon())
        owners, is_said = 0, True
        for tie in list(hand.ties.values()):
            if not tie.gone and (tie in touched or tie.received >= tie.granted or tie.is_behind):
                if here and 2 * (tie.granted - tie.finished) > hand.window.size:
                    tie.compose(0)
                else:
                    owners = owners or hand.owners
                    tie.compose(hand.credit(tie, owners))
                is_said &= not tie.is_behind or (not (here and tie.wire is self._within) and tie.speak())
        return is_said

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """Ask for more time."""
        tie = delivery.tie
        if not tie.gone:
            tie.wire.say(commands.Extend(tie.number, delivery.number, max(1, round(seconds * 1000))), tie.request)

    # --- owners --------------------------------------------------------------------------------------

    def attend(self, origin: int) -> None:
        """A peer has joined, or has said WELCOME again."""
        for pull in self._pulls.values():
            self._attend(pull, origin)

    def lost(self, origin: int) -> None:
        """The connection to a peer broke, or the way from it to us: it may know us no more."""
        if self._pulls:
            self._loop.call_later(BROKEN, self.attend, origin)

    def left(self, origin: int) -> None:
        """A peer is no longer there."""
        for hand, pull in self._pulls.items():
            if (tie := hand.ties.get(origin)) is not None:
                if not tie.gone:
                    self._lose(hand, tie)
                del hand.ties[origin]
            pull.troubles.pop(origin, None)

    def _attend(self, pull: Pull, origin: int) -> None:
        """See to it that an owner knows this worker."""
        peering = self._host.peering
        wire: Wire | None = self._within
        if origin != self._host.origin:
            # Only who has come to us, too, would notice soon if this process died.
            wire = peering.links[origin] if peering.joined(origin) else None
        if wire is None or pull.hand.closed is not None:
            return
        tie = pull.hand.ties.get(origin)
        if tie is None or tie.gone or tie.wire is not wire:
            self._join(pull, origin, wire)
        else:
            self._ping(pull.hand, tie)

    def _owners(self) -> list[int]:
        """Ourselves, and the peers."""
        return [self._host.origin, *self._host.peering.links]

    def _join(self, pull: Pull, origin: int, wire: Wire) -> None:
        hand = pull.hand
        if (old := hand.ties.get(origin)) is not None and not old.gone:
            self._lose(hand, old)
        names = {peer.origin: peer.name for peer in self._host.peering.peers()}
        tie = Tie(pull.number, origin, names.get(origin, f"{origin:016x}"), wire)
        if old is not None and old.wire is wire:
            wire.say(
                commands.Leave(pull.number), old.request
            )  # should it know the old one: that had another count of jobs
        tie.last_heard = now()
        body = commands.Join(
            pull.number,
            [pull.pattern],
            pull.group,
            max(1, round(pull.lease * 1000)),
            hand.first_credit(tie),
            pull.start.offset,
            pull.start.time_ns,
        )
        tie.request = wire.follow(body, partial(self._answered, pull, tie))
        tie.gone = not tie.request  # until the next round
        hand.ties[origin] = tie  # as soon as something can be said to it
        self._host.guard(origin)

    def _ping(self, hand: Hand, tie: Tie) -> None:
        """Who knows nothing of it says so. And if somebody waits here for a job, its owner is to know: a lease may have
        run out meanwhile, of one that another thread or task is at."""
        tie.wire.say(commands.Done(tie.number, credit=tie.granted if hand.is_awaited() else 0), tie.request)

    def _round(self) -> None:
        """While there are workers."""
        self._timer = self._loop.call_later(ROUND, self._round) if self._pulls else None
        for pull in list(self._pulls.values()):
            for origin in self._owners():
                tie = pull.hand.ties.get(origin)
                if tie is None or (not tie.barred and tie.last_heard <= now() - ROUND):
                    self._attend(pull, origin)

    def _answered(self, pull: Pull, tie: Tie, command: Command | None) -> None:
        hand = pull.hand
        if command is None:  # the link was closed
            self._lose(hand, tie)
            return
        body = command.body
        tie.last_heard = now()
        if isinstance(body, Job):
            hand.put(Parcel(tie, body.deliveries, command.batches, tie.last_heard))
            if pull.watch is None:
                pull.watch = self._loop.call_later(hand.patience, self._watch, pull)
        elif isinstance(body, Settled):
            with hand.saying:
                refused = tie.settled(body.refused)
                hand.refused += self._tell(hand, refused)
            self._host.peering.registry.changed()
        elif isinstance(body, Error):
            self._refused(pull, tie, body)

    def _refused(self, pull: Pull, tie: Tie, error: Error) -> None:
        self._lose(pull.hand, tie)
        if error.code == "worker":
            self._attend(pull, tie.origin)
        elif error.code in BARRING:
            tie.barred = True
        elif error.code != "hello" and pull.troubles.get(tie.origin) != error.reason:  # after "hello" it says WELCOME
            pull.troubles[tie.origin] = error.reason
            self.emit(Warned(f"{tie.name} gives no jobs of {pull.pattern}: {error.reason}"))

    def _watch(self, pull: Pull) -> None:
        """Jobs that wait too long are given back."""
        due = pull.hand.expire()
        pull.watch = None if due is None else self._loop.call_later(max(0.001, due - now()), self._watch, pull)

    def _lose(self, hand: Hand, tie: Tie) -> None:
        with hand.saying:
            hand.lose(tie)
            count = self._tell(hand, tie.abandon())
            hand.lost += count
        if count:
            self.emit(Warned(f"{tie.name} is gone: {count:,} acknowledged job(s) of it may be done once more"))
        self._host.peering.registry.changed()

    def _tell(self, hand: Hand, done: list[Done]) -> int:
        """Acknowledged in vain. Returns how many."""
        count = 0
        for delivery, first, last in done:
            count += last - first + 1
            for seq in range(first, last + 1):
                self.emit(JobRefused(delivery.topic, delivery.origin, seq, delivery.attempt))
        hand.unreported += count
        return count


def check_group(group: object) -> None:
    """Raises SetupError unless a group can have that name."""
    try:
        sound = isinstance(group, str) and 0 < len(group.encode()) <= GROUP_BYTES_MAX and group.split() == [group]
    except UnicodeEncodeError:
        sound = False
    if not sound or "\0" in str(group):
        raise SetupError(f"group={group!r}: use a name of 1 to {GROUP_BYTES_MAX} bytes of UTF-8, without whitespace")
