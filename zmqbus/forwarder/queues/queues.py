"""`Queues`: all that a forwarder does for workers. On the engine's loop.

A queue is met when its first message comes in, and a group when its first worker does. Either is written down, as a
cursor, before anything else happens with it, and is there from then on, until it is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from zmqbus.errors import JournalCorrupt, JournalError, NoSpace, TopicError
from zmqbus.forwarder.queues.backlog import EVERYWHERE, MESSAGES_MAX, PATTERNS_BYTES_MAX, WORKS_MAX, Backlog
from zmqbus.forwarder.queues.graves import Funeral, Graves, dead_claims
from zmqbus.forwarder.queues.kept import GROUP_PREFIX, QUEUE_PREFIX, Kept, cursor_name, decode
from zmqbus.forwarder.queues.loading import Loader, Piece, Survey
from zmqbus.forwarder.queues.rivals import Rivals
from zmqbus.forwarder.queues.scribe import Scribe
from zmqbus.forwarder.queues.tail import Tail
from zmqbus.journal import Commit, Journal, find_time
from zmqbus.net.clock import now, time_ns
from zmqbus.node.engine import Engine
from zmqbus.node.events import Event
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.worker import Worker
from zmqbus.node.work.queues.desk import Desk, Joined, check_join
from zmqbus.protocol import commands
from zmqbus.protocol.commands import END, Command, Error, QueueFigures
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.members.peers import PeerChanged, PeerJoined, PeerLeft
from zmqbus.protocol.queues.dispatcher import AT_ONCE
from zmqbus.protocol.queues.letters import due_of
from zmqbus.protocol.queues.work import Dead, Line, Team, Work

AHEAD_BYTES = 4 * 1024 * 1024  # loaded of one backlog: some tens of thousands of small jobs
AHEAD_BYTES_MIN = 16 * 1024
LOADED_BYTES = 64 * 1024 * 1024  # of all: each has its share
IN_HAND_BYTES = 64 * 1024 * 1024  # of one, where all that is loaded is with workers, and more of them wait
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
        """`reading`: the thread that reads the log."""
        self.tail = Tail()
        """To be told what is appended."""
        self.on_forgotten: Callable[[], None] = lambda: None
        """Told when some queue is no more: the next message of it has to be announced anew."""
        self._journal = journal
        self._loop = loop
        self._engine = engine
        self._committer = committer
        self._reading = reading
        self._warn = warn
        self._on_failure = on_failure
        self._rivals = Rivals(journal.number, claims)
        self._backlogs: dict[str, Backlog] = {}
        self._by_line: dict[str, Backlog] = {}  # groups, by what lines call them
        self._behind: dict[Backlog, None] = {}  # wanted, and to be read from the disk
        self._teams: set[Team] = set()
        self._share = AHEAD_BYTES  # of each of those that are wanted
        self._funeral: Funeral | None = None  # of those that died by what a worker is saying
        self._surveys: set[Survey] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._founding: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = self._closed = False
        self._loader = Loader(journal, reading, self._loaded)
        self._scribe = Scribe(journal, committer, loop, warn, on_failure)
        self._graves = Graves(journal, engine, dead_claims(claims), warn, self._buried)
        self._desk = desk = Desk(loop, engine.answer, self._outcome)
        self._dispatcher = desk.dispatcher
        desk.settle = self._settle

    # --- life --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take up what an earlier life has left. Before anybody can say anything. Raises JournalCorrupt."""
        journal = self._journal
        for name, cursor in journal.cursors.all().items():
            if name.startswith((QUEUE_PREFIX, GROUP_PREFIX)):
                try:
                    self._open(Backlog(decode(cursor.data), cursor.offset))
                except (ValueError, TopicError) as error:
                    raise JournalCorrupt(journal.segments[-1].directory, 0, f"cursor {name!r}: {error}") from None
        if self._backlogs:
            self._survey(list(self._backlogs.values()))
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
        for backlog in self._backlogs.values():
            self._loader.close(backlog)

    # --- what comes in -----------------------------------------------------------------------------

    def knows(self, topic: bytes) -> bool:
        """Whether a message pushed on this topic may be appended."""
        return topic in self.tail.queues

    async def found(self, topic: bytes) -> None:
        """A message was pushed on this topic, and is not appended yet: there is to be a queue, on disk. Raises
        NoSpace, JournalFailed, and ValueError if no queue can have that name."""
        if topic not in self.tail.queues:
            backlog = Backlog(Kept(topic.decode()), self._journal.durable_offset)
            await self._committer.commit_cursors({backlog.name: backlog.cursor(backlog.next)})
            backlog.live, backlog.counted_to = True, EVERYWHERE
            self._open(backlog)
            self._want(backlog)

    def grown(self, commit: Commit) -> None:
        """There is more on disk than there was."""
        if commit.refused:
            self.tail.cut(self._journal.next_offset)
        if not self.tail.watched:
            return
        time, fresh = now(), False
        for offset, batch in self.tail.take(self._journal.durable_offset):
            for backlog in self.tail.backlogs(batch.topic, bool(batch.flags & QUEUED)):
                if not backlog.concerns(batch):
                    continue
                if backlog.live and backlog.wanted and not backlog.rival and self._has_room(backlog):
                    self._take_in(backlog, offset, batch, time)
                    fresh = True
                    continue
                if backlog.live:
                    backlog.live = False
                    backlog.next = offset
                    if backlog.wanted and not backlog.rival:
                        self._behind[backlog] = None
                if backlog.counted_to == EVERYWHERE:
                    backlog.skip(offset, batch)
        self._graves.look()
        if fresh:
            self._desk.deliver()
            self._outcome()
        self._feed()

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
                    self._muster()
                self._feed()
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
                self._desk.lost(peer.origin)
                self._muster()
                self._feed()
            case _:
                return
        if changed:
            self._yield()

    def _join(self, identity: bytes, origin: int, command: Command, body: commands.Join) -> None:
        """A group is written down before its first worker gets anything."""
        try:
            check_join(body)
            if len(" ".join(body.patterns).encode()) > PATTERNS_BYTES_MAX:
                raise TopicError(body.patterns[0], f"the patterns of a group have {PATTERNS_BYTES_MAX:,} bytes at most")
        except TopicError as error:
            self._answer(identity, command, Error("join", str(error)[:1000]))
            return
        name = cursor_name(Kept("", body.group, body.patterns))
        if name in self._backlogs or all(pattern.startswith("$") for pattern in body.patterns):
            self._admit(identity, origin, command)  # what is reserved is never published
            return
        task = self._founding.get(name)
        if task is None:
            task = self._founding[name] = self._loop.create_task(self._found_group(body))
            task.add_done_callback(lambda _: self._founding.pop(name, None))

        def founded(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                return
            if (error := task.exception()) is None:
                self._admit(identity, origin, command)
                return
            self._answer(identity, command, Error("join", str(error)[:1000]))
            if not isinstance(error, NoSpace | ValueError | JournalCorrupt):
                self._on_failure(error)

        task.add_done_callback(founded)

    async def _found_group(self, body: commands.Join) -> None:
        journal = self._journal
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
        self._open(backlog)
        self._survey([backlog])

    def _admit(self, identity: bytes, origin: int, command: Command) -> None:
        self._desk.serve(identity, origin, command)
        self._muster()
        self._feed()

    def _commit(self, identity: bytes, command: Command, body: commands.Commit) -> None:
        backlog = self._backlogs.get(body.cursor)
        if backlog is None:
            self._answer(identity, command, Error("cursor", f"there is no cursor {body.cursor!r}"))
        elif not body.forget:
            self._answer(identity, command, Error("cursor", f"only workers move {body.cursor!r}"))
        elif backlog.wanted:
            self._answer(identity, command, Error("taken", f"there are workers for {body.cursor!r}"))
        else:
            self._spawn(self._forget(identity, command, backlog))

    async def _forget(self, identity: bytes, command: Command, backlog: Backlog) -> None:
        """A queue or group is to be no more. What comes after that is of another one of that name."""
        del self._backlogs[backlog.name]
        self.tail.close(backlog)
        self._scribe.forget(backlog)
        self._loader.close(backlog)
        for line in backlog.lines:
            self._dispatcher.forget(line)
        if backlog.team is not None:
            del self._by_line[backlog.team.group]
        for survey in self._surveys:
            survey.backlogs.pop(backlog, None)
        self.on_forgotten()
        try:
            await self._committer.commit_cursors({backlog.name: None})
        except JournalError as error:
            self._answer(identity, command, Error("journal", str(error)[:1000]))
        else:
            self._answer(identity, command, command.body)

    def _answer(self, identity: bytes, command: Command, body: commands.Body) -> None:
        self._engine.answer(identity, body, command.request, ())

    # --- what there is to do -----------------------------------------------------------------------

    def _open(self, backlog: Backlog) -> None:
        self._backlogs[backlog.name] = backlog
        self.tail.open(backlog)
        if backlog.team is not None:
            self._by_line[backlog.team.group] = backlog
        backlog.rival = self._rivals.over(backlog.patterns)

    def _of(self, line: Line) -> Backlog | None:
        group, topic = line
        return self.tail.queues.get(topic.encode()) if group is None else self._by_line.get(group)

    def _muster(self) -> None:
        """Workers came or went."""
        teams = self._desk.teams
        if teams != self._teams:
            self._teams = teams
            for backlog in self._backlogs.values():
                self._want(backlog)
            wanted = sum(backlog.wanted for backlog in self._backlogs.values())
            self._share = max(AHEAD_BYTES_MIN, min(AHEAD_BYTES, LOADED_BYTES // max(1, wanted)))

    def _want(self, backlog: Backlog) -> None:
        if backlog.team is None:
            backlog.wanted = self._dispatcher.is_pulled((None, backlog.topic))
        else:
            backlog.wanted = backlog.team in self._teams
        if backlog.wanted and not backlog.live and not backlog.rival:
            self._behind[backlog] = None
        else:
            self._behind.pop(backlog, None)
            self._loader.close(backlog)

    def _feed(self) -> None:
        """Have more loaded, where it is wanted and there is room."""
        for backlog in list(self._behind):
            if not backlog.busy and not backlog.broken and self._has_room(backlog, 2):
                size = max(self._share - backlog.bytes, AHEAD_BYTES_MIN)
                self._loader.load(backlog, size, MESSAGES_MAX - backlog.messages)

    def _has_room(self, backlog: Backlog, parts: int = 1) -> bool:
        """Whether more of it may be loaded; with `parts`, whether less than one part of what may be is."""
        if backlog.messages * parts >= MESSAGES_MAX or len(backlog.works) * parts >= WORKS_MAX:
            return False
        if backlog.bytes * parts < self._share:
            return True
        return backlog.bytes < IN_HAND_BYTES and not any(map(self._dispatcher.waiting, backlog.lines))

    def _loaded(self, backlog: Backlog, piece: Piece | None, error: BaseException | None) -> None:
        if self._backlogs.get(backlog.name) is not backlog:
            return
        if error is not None or piece is None:
            backlog.broken = True
            self._warn(f"{backlog.name} cannot go on: {error}")
            return
        time = now()
        for offset, batch in piece.entries:
            if backlog.concerns(batch):
                self._take_in(backlog, offset, batch, time)
        backlog.next = max(backlog.next, piece.reached)
        for first, last in piece.dropped:
            self._warn(f"{backlog.name}: offsets {first:,} to {last:,} are no more, and with them what was of it there")
        if backlog.next >= self._journal.durable_offset:
            backlog.live = True
            self._behind.pop(backlog, None)
            self._loader.close(backlog)
        self._desk.deliver()
        self._outcome()
        self._feed()

    def _take_in(self, backlog: Backlog, offset: int, batch: Batch, time: float) -> None:
        work = backlog.load(offset, batch)
        if work is not None:
            self._add(work, time)

    def _add(self, work: Work, time: float) -> None:
        due = due_of(work.batch, time, time_ns()) if work.line[0] is None else AT_ONCE
        self._dispatcher.add(work, time, due)

    def _survey(self, backlogs: list[Backlog]) -> None:
        """Find out how much there is of them, and whether there is anything."""
        self._surveys.add(Survey(self._journal, self._reading, self.tail, backlogs, self._surveyed))

    def _surveyed(self, survey: Survey, error: BaseException | None) -> None:
        self._surveys.discard(survey)
        if error is not None:
            self._warn(f"what waits of {len(survey.backlogs)} queues and groups was not counted: {error}")
            return
        for backlog in survey.backlogs:
            if not backlog.busy and not backlog.live:
                if not backlog.unread:
                    backlog.live = True
                elif backlog.first_unread is not None:
                    backlog.next = max(backlog.next, backlog.first_unread[0])
            self._want(backlog)

    # --- what became of it -------------------------------------------------------------------------

    def _outcome(self) -> None:
        """Something is done, has failed, or is dead."""
        dispatcher = self._dispatcher
        self._funeral = None
        if dispatcher.dead:
            dead, dispatcher.dead = dispatcher.dead, []
            self._funeral = self._graves.bury(dead)
        for work in dispatcher.finished:
            if (backlog := self._of(work.line)) is not None and work.position in backlog.works:
                backlog.settled(work)
        dispatcher.finished.clear()
        for line in dispatcher.changed:
            if (backlog := self._of(line)) is not None:
                self._scribe.note(backlog)
        dispatcher.changed.clear()

    def _settle(self, joined: Joined, settled: commands.Settled) -> None:
        """Tell a worker when what it said is on disk, and so are the letters of what it gave up."""
        funeral = self._funeral

        def tell() -> None:
            self._desk.say_settled(joined, settled)

        if funeral is None or not funeral.left:
            self._scribe.then(tell)
        else:
            funeral.then.append(lambda: self._scribe.then(tell))

    def _buried(self, dead: Dead) -> None:
        if self._of(dead.work.line) is not None:
            self._dispatcher.buried(dead)
            self._outcome()

    # --- several forwarders ------------------------------------------------------------------------

    def _yield(self) -> None:
        """Another forwarder gives some of it out in our place, or no longer does."""
        told: dict[str, list[str]] = {}
        for backlog in self._backlogs.values():
            rival = self._rivals.over(backlog.patterns)
            if rival != backlog.rival:
                backlog.rival = rival
                self._want(backlog)
                if rival:
                    told.setdefault(rival, []).append(backlog.name)
                    self._park(backlog)
                else:
                    parked, backlog.parked = backlog.parked, []
                    for work in parked:
                        self._add(work, now())
        for rival, names in told.items():
            self._warn(_overruled(rival, names))
        self._desk.deliver()
        self._feed()

    def _park(self, backlog: Backlog) -> None:
        """Take back what nobody was given yet."""
        for line in backlog.lines:
            for origin in {work.batch.origin for work in backlog.works.values() if work.line == line}:
                backlog.parked += self._dispatcher.withdraw(line, origin)

    # --- now and then ------------------------------------------------------------------------------

    def _look(self) -> None:
        self._timer = self._loop.call_later(PERIOD, self._look)
        self._muster()
        if self._rivals.tick(now()):
            self._yield()
        segments, end = self._journal.segments, self._journal.durable_offset
        begins = [segment.base_offset for segment in segments[1:]]
        for backlog in self._backlogs.values():
            if begins and backlog.committed < begins[-1]:
                place = backlog.place(end)
                if any(backlog.committed < begin <= place for begin in begins):
                    self._scribe.note(backlog)  # it holds a segment of which it wants nothing

    # --- figures -----------------------------------------------------------------------------------

    def cursors(self) -> dict[str, tuple[int, bool]]:
        """Of each, where it really is, and whether there are workers for it."""
        end = self._journal.durable_offset
        return {name: (backlog.place(end), backlog.wanted) for name, backlog in self._backlogs.items()}

    def figures(self) -> list[QueueFigures]:
        """What is to be done."""
        found = {name: self._begun(backlog) for name, backlog in self._backlogs.items()}
        for line in self._dispatcher.figures(now()):
            if (backlog := self._of(line.line)) is not None:
                figures = found[backlog.name]
                figures.waiting += line.waiting + line.delayed
                figures.in_flight += line.in_flight
                figures.delayed += line.delayed
                figures.redelivered += line.redelivered
                figures.done += line.done
                figures.dead += line.dead
                figures.workers = max(figures.workers, line.workers)
        return list(found.values())

    def _begun(self, backlog: Backlog) -> QueueFigures:
        oldest = 0
        if backlog.works:
            oldest = next(iter(backlog.works.values())).batch.time_ns
        elif backlog.first_unread is not None:
            oldest = backlog.first_unread[1]
        topic = " ".join(backlog.patterns)[:255]
        return QueueFigures(topic, backlog.group, waiting=backlog.unread, oldest_ns=oldest)

    # --- the rest ----------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_ours(name: str) -> bool:
    return name.startswith((QUEUE_PREFIX, GROUP_PREFIX))


def _overruled(rival: str, names: list[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"forwarder {rival} claims the same topics, and gives out {some}: what is of that here waits until that one is "
        "gone; better let each claim its own"
    )
