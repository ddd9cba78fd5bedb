"""`Queues`: all that a forwarder does for workers. On the engine's loop.

A queue is met when its first message comes in, and a group when its first worker does. Either is written down, as a
cursor, before anything else happens with it, and is there from then on, until it is forgotten.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from zmqbus.errors import JournalCorrupt, JournalError, NoSpace, TopicError
from zmqbus.forwarder.queues.backlog import PATTERNS_BYTES_MAX, Backlog
from zmqbus.forwarder.queues.graves import Funeral, Graves, dead_claims
from zmqbus.forwarder.queues.kept import GROUP_PREFIX, QUEUE_PREFIX, Kept, cursor_name, decode
from zmqbus.forwarder.queues.rivals import Rivals
from zmqbus.forwarder.queues.scribe import Scribe
from zmqbus.forwarder.queues.stock import Stock
from zmqbus.journal import Cursor, Journal, find_time
from zmqbus.net.clock import now, time_ns
from zmqbus.node.engine import Engine
from zmqbus.node.events import Event
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.worker import Worker
from zmqbus.node.work.queues.desk import Desk, Joined, check_join
from zmqbus.protocol import commands
from zmqbus.protocol.commands import END, Command, Error, QueueFigures
from zmqbus.protocol.members.peers import PeerChanged, PeerJoined, PeerLeft
from zmqbus.protocol.queues.work import Dead
from zmqbus.protocol.topics import Matcher

PERIOD = 1.0  # seconds between two looks at what comes about with time


class Queues:
    """The queues and groups of one journal."""

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        committer: Committer,
        reading: Worker,
        claims: Sequence[str],
        warn: Callable[[str], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`reading`: the thread that reads the log; `claims`: without those for the sake of dead letters."""
        self.on_forgotten: Callable[[], None] = lambda: None
        """Told when some queue is no more: the next message of it has to be announced anew."""
        self._journal = journal
        self._loop = loop
        self._engine = engine
        self._committer = committer
        self._reading = reading
        self._warn = warn
        self._on_failure = on_failure
        self._rivals = Rivals(journal.number, [*claims, *dead_claims(claims)])
        self._funeral: Funeral | None = None  # of those that died by what a worker is saying
        self._tasks: set[asyncio.Task[None]] = set()
        self._founding: dict[str, asyncio.Task[None]] = {}
        self._erasing: dict[str, asyncio.Task[None]] = {}
        self._joining: dict[tuple[int, int], tuple[str, bytes, Command]] = {}  # who waits for that
        self._timer: asyncio.TimerHandle | None = None
        self._segment = 0  # the last, when cursors were moved on
        self._stopped = self._closed = False
        self._scribe = Scribe(journal, committer, loop, warn, on_failure)
        self._graves = Graves(journal, engine, dead_claims(claims), warn, self._buried)
        self._desk = desk = Desk(engine, loop, self._outcome)
        self._dispatcher = desk.dispatcher
        desk.settle = self._settle
        self._stock = stock = Stock(journal, reading, desk.dispatcher, warn, self._give_out)
        self.tail = stock.tail
        """To be told what is appended."""

    # --- life --------------------------------------------------------------------------------------

    def open(self, backlogs: Iterable[Backlog]) -> None:
        """Go on with what an earlier life has left. Before anybody can say anything."""
        for backlog in backlogs:
            self._stock.open(backlog)
        self._stock.survey(self._stock.backlogs.values())
        self._engine.on_link_lost.append(self._lost)
        self._look()

    def stop(self) -> None:
        """Nothing more is given out. What workers say is still heard."""
        self._stopped = True
        self._desk.close()
        for task in (*self._tasks, *self._founding.values()):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def close(self) -> None:
        """After `stop`: write down what is not written, and tell who waits for it. Nothing is heard any more."""
        await self._scribe.settle()
        self._closed = True
        self._stock.close()

    # --- what comes in -----------------------------------------------------------------------------

    async def found(self, topic: bytes) -> None:
        """A message was pushed on this topic, and is not appended yet: there is to be a queue, on disk. Raises
        NoSpace, JournalFailed, and ValueError if no queue can have that name."""
        kept = Kept(topic.decode())
        await self._erased(cursor_name(kept))
        if topic not in self.tail.queues:
            backlog = Backlog(kept, self._journal.durable_offset)
            await self._committer.commit_cursors({backlog.name: backlog.cursor(backlog.next)})
            self._judge(backlog)
            self._stock.begin(backlog)

    def refused(self) -> None:
        """Some of what was appended last is not, after all. Before anything else is."""
        self.tail.cut(self._journal.next_offset)

    def grown(self) -> None:
        """There is more on disk than there was."""
        if self.tail.watched:
            fresh = self._stock.grown()
            self._graves.look()
            if fresh:
                self._give_out()
            else:
                self._stock.feed()
            if self._segment != self._journal.segments[-1].base_offset:
                self._keep_up()

    # --- what peers want ---------------------------------------------------------------------------

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """Answer a command. False: it is not one of ours."""
        match command.body:
            case commands.Join() if self._stopped:
                self._answer(identity, command, Error("join", "this forwarder is leaving"))
            case commands.Join() as body:
                self._join(identity, origin, command, body)
            case commands.Done() | commands.Fail() if self._closed:
                pass  # it gets no answer, and is told to JOIN when we are back
            case commands.Done() | commands.Fail() | commands.Extend() | commands.Leave() as body:
                self._desk.serve(identity, origin, command)
                if isinstance(body, commands.Leave):
                    self._joining.pop((origin, body.id), None)
                    self._stock.muster(self._desk.teams)
                self._stock.feed()
            case commands.Read(cursor=name) if _is_ours(name):
                self._answer(identity, command, Error("read", f"a reading cannot be named {name!r}: workers pull that"))
            case commands.Commit(cursor=name) as commit if _is_ours(name):
                self._commit(identity, command, commit)
            case _:
                return False
        return True

    def heard(self, event: Event) -> None:
        """Something happened, perhaps to a peer."""
        if self._closed:
            return
        match event:
            case PeerJoined(peer=peer) | PeerChanged(peer=peer):
                changed = self._rivals.met(peer)
            case PeerLeft(peer=peer, reason=reason):
                changed = self._rivals.left(peer, reason, now())
                self._lost(peer.origin)
            case _:
                return
        if changed:
            self._yield()

    def _lost(self, origin: int) -> None:
        """A node is gone, or what was on its way to it: its jobs go to others."""
        if not self._closed:
            for worker in [worker for worker in self._joining if worker[0] == origin]:
                del self._joining[worker]
            self._desk.lost(origin)
            self._stock.muster(self._desk.teams)
            self._stock.feed()

    def _join(self, identity: bytes, origin: int, command: Command, body: commands.Join) -> None:
        """A group is written down before its first worker gets anything."""
        try:
            check_join(body)
            if len(" ".join(body.patterns).encode()) > PATTERNS_BYTES_MAX:
                raise TopicError(body.patterns[0], f"the patterns of a group have {PATTERNS_BYTES_MAX:,} bytes at most")
        except TopicError as error:
            self._answer(identity, command, Error("join", str(error)[:1000]))
            return
        self._joining.pop((origin, body.id), None)  # what it said before
        name = cursor_name(Kept("", body.group, body.patterns))
        if name in self._stock.backlogs or all(pattern.startswith("$") for pattern in body.patterns):
            self._admit(identity, origin, command)  # what is reserved is never published
            return
        self._joining[origin, body.id] = name, identity, command
        if name not in self._founding:
            task = self._founding[name] = self._loop.create_task(self._found_group(body))
            task.add_done_callback(partial(self._founded, name))

    def _founded(self, name: str, task: asyncio.Task[None]) -> None:
        """Whoever waited for a group may join it, unless it has left or joined another meanwhile."""
        del self._founding[name]
        if task.cancelled():
            return
        error = task.exception()
        for worker, (whose, identity, command) in list(self._joining.items()):
            if whose == name:
                del self._joining[worker]
                if error is None:
                    self._admit(identity, worker[0], command)
                else:
                    self._answer(identity, command, Error("join", str(error)[:1000]))
        if error is not None and not isinstance(error, NoSpace | ValueError | JournalCorrupt):
            self._on_failure(error)

    async def _found_group(self, body: commands.Join) -> None:
        journal = self._journal
        name = cursor_name(Kept("", body.group, body.patterns))
        await self._erased(name)
        if name in self._stock.backlogs:
            return
        start, since_ns = journal.durable_offset, 0
        if body.time_ns:
            start = await self._reading.do(find_time, journal, body.time_ns)
        elif body.offset == END:
            since_ns = time_ns()
        else:
            start = body.offset or journal.first_offset
        if start > journal.durable_offset:
            raise ValueError(f"offset {start:,} is not there yet: the journal ends at {journal.durable_offset:,}")
        backlog = Backlog(Kept("", body.group, body.patterns, since_ns), start)
        await self._committer.commit_cursors({backlog.name: backlog.cursor(start)})
        self._judge(backlog)
        self._stock.open(backlog)
        self._stock.survey([backlog])

    def _admit(self, identity: bytes, origin: int, command: Command) -> None:
        self._engine.guard(origin)
        self._desk.serve(identity, origin, command)
        self._stock.muster(self._desk.teams)
        self._stock.feed()

    def _commit(self, identity: bytes, command: Command, body: commands.Commit) -> None:
        backlog = self._stock.backlogs.get(body.cursor)
        if backlog is None:
            self._answer(identity, command, Error("cursor", f"there is no cursor {body.cursor!r}"))
        elif not body.forget:
            self._answer(identity, command, Error("cursor", f"only workers move {body.cursor!r}"))
        elif backlog.wanted:
            self._answer(identity, command, Error("taken", f"there are workers for {body.cursor!r}"))
        else:
            self._forget(identity, command, backlog)

    def _forget(self, identity: bytes, command: Command, backlog: Backlog) -> None:
        """A queue or group is to be no more. What comes after that is of another one of that name."""
        state = backlog.cursor(self._journal.durable_offset)
        self._stock.forget(backlog)
        self._scribe.forget(backlog)
        self.on_forgotten()
        self._erasing[backlog.name] = self._spawn(self._erase(identity, command, backlog, state))

    async def _erase(self, identity: bytes, command: Command, backlog: Backlog, state: Cursor) -> None:
        """The same on disk. If that cannot be, it is there again as it was."""
        try:
            await self._committer.commit_cursors({backlog.name: None})
        except JournalError as error:
            again = Backlog(decode(state.data), state.offset)
            again.committed = backlog.committed
            self._judge(again)
            self._stock.open(again)
            self._stock.survey([again])
            self._stock.feed()
            self._scribe.note(again)
            self._answer(identity, command, Error("journal", str(error)[:1000]))
        else:
            self._answer(identity, command, command.body)
        finally:
            del self._erasing[backlog.name]

    async def _erased(self, name: str) -> None:
        """Whoever founds one of this name waits until it is known whether there is one."""
        if (erasing := self._erasing.get(name)) is not None:
            await asyncio.wait([erasing])

    def _answer(self, identity: bytes, command: Command, body: commands.Body) -> None:
        self._engine.answer(identity, body, command.request, ())

    # --- what there is to do, and what became of it ------------------------------------------------

    def _give_out(self) -> None:
        """There is more to do."""
        self._desk.deliver()
        self._outcome()
        self._stock.feed()

    def _outcome(self) -> None:
        """Something is done, has failed, or is dead."""
        dispatcher = self._dispatcher
        self._funeral = None
        if dispatcher.dead:
            dead, dispatcher.dead = dispatcher.dead, []
            self._funeral = self._graves.bury(dead)
        for work in dispatcher.finished:
            if (backlog := self._stock.of(work.line)) is not None:
                backlog.settled(work)
        dispatcher.finished.clear()
        for line in dispatcher.changed:
            if (backlog := self._stock.of(line)) is not None:
                self._scribe.note(backlog)
        dispatcher.changed.clear()

    def _settle(self, joined: Joined, settled: commands.Settled) -> None:
        """Tell a worker when what it said is on disk, and so are the letters of what it gave up."""
        self._outcome()
        funeral = self._funeral

        def tell() -> None:
            self._desk.say_settled(joined, settled)

        if funeral is None or not funeral.left:
            self._scribe.then(tell)
        else:
            funeral.then.append(lambda: self._scribe.then(tell))

    def _buried(self, dead: Dead) -> None:
        self._dispatcher.buried(dead)
        self._outcome()

    # --- several forwarders ------------------------------------------------------------------------

    def _judge(self, backlog: Backlog) -> None:
        """Of a new one: is it ours to give out?"""
        backlog.rival = self._rivals.over(backlog.patterns)
        if backlog.rival:
            self._warn(_overruled(backlog.rival, [backlog.name]))

    def _yield(self) -> None:
        """Another forwarder gives some of it out in our place, or no longer does."""
        told: dict[str, list[str]] = {}
        for backlog in self._stock.backlogs.values():
            rival = self._rivals.over(backlog.patterns)
            if rival != backlog.rival:
                self._stock.yield_to(backlog, rival)
                if rival:
                    told.setdefault(rival, []).append(backlog.name)
        for rival, names in told.items():
            self._warn(_overruled(rival, names))
        self._give_out()

    # --- now and then ------------------------------------------------------------------------------

    def _look(self) -> None:
        self._timer = self._loop.call_later(PERIOD, self._look)
        self._desk.look(self._engine.guard)
        self._stock.muster(self._desk.teams)
        self._stock.look()
        if self._rivals.tick(now()):
            self._yield()
        self._keep_up()

    def _keep_up(self) -> None:
        """Cursors that hold a segment of which they want nothing are moved on."""
        end, begins = self._journal.durable_offset, [segment.base_offset for segment in self._journal.segments]
        self._segment = begins[-1]
        for backlog in self._stock.backlogs.values():
            if bisect_right(begins, backlog.committed) < bisect_right(begins, backlog.place(end)):
                self._scribe.note(backlog)

    # --- figures -----------------------------------------------------------------------------------

    def cursors(self) -> dict[str, tuple[int, bool]]:
        """Of each, where it really is, and whether there are workers for it."""
        end = self._journal.durable_offset
        return {name: (backlog.place(end), backlog.wanted) for name, backlog in self._stock.backlogs.items()}

    def figures(self) -> list[QueueFigures]:
        """What is to be done."""
        teams = Counter(joined.team for joined in self._desk.workers.values())
        matchers = {team: Matcher(team.patterns).matches for team in teams}
        found: dict[str, QueueFigures] = {}
        for name, backlog in self._stock.backlogs.items():
            if backlog.team is None:
                workers = sum(teams[team] for team, matches in matchers.items() if matches(backlog.topic))
            else:
                workers = teams[backlog.team]
            topic = " ".join(backlog.patterns)[:255]
            found[name] = QueueFigures(
                topic, backlog.group, backlog.unread, workers=workers, oldest_ns=backlog.oldest_ns
            )
        for line in self._dispatcher.figures(now()):
            if (its := self._stock.of(line.line)) is not None:
                figures = found[its.name]
                figures.waiting += line.waiting
                figures.in_flight += line.in_flight
                figures.delayed += line.delayed
                figures.redelivered += line.redelivered
                figures.done += line.done
                figures.dead += line.dead
        return list(found.values())

    # --- the rest ----------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def take_up(journal: Journal) -> list[Backlog]:
    """What an earlier life has left. Raises JournalCorrupt."""
    backlogs = []
    for name, cursor in journal.cursors.all().items():
        if _is_ours(name):
            try:
                backlogs.append(Backlog(decode(cursor.data), cursor.offset))
            except (ValueError, TopicError) as error:
                raise JournalCorrupt(journal.segments[-1].directory, 0, f"cursor {name!r}: {error}") from None
    return backlogs


def _is_ours(name: str) -> bool:
    return name.startswith((QUEUE_PREFIX, GROUP_PREFIX))


def _overruled(rival: str, names: list[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"forwarder {rival} claims the same topics, and gives out {some}: what is of that here waits until that one is "
        "gone; better let each claim its own"
    )
