"""All the backlogs of a journal, and what of them the dispatcher has: enough for the workers there are, and no more.

What comes in while workers keep up goes straight to them, once it is on disk; what does not fit stays there, and is
read when there is room again. So memory does not grow with what waits. On the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from zmqbus.forwarder.queues.backlog import EVERYWHERE, MESSAGES_MAX, SCATTER_BYTES_MAX, Backlog
from zmqbus.forwarder.queues.loading import Loader, Piece, Room, Survey
from zmqbus.forwarder.queues.tail import Tail
from zmqbus.journal import Journal
from zmqbus.net.clock import now, time_ns
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol.frames import QUEUED
from zmqbus.protocol.queues.dispatcher import AT_ONCE, Dispatcher
from zmqbus.protocol.queues.letters import due_of
from zmqbus.protocol.queues.work import Line, Team, Work

AHEAD_BYTES = 4 * 1024 * 1024  # loaded of one backlog: some tens of thousands of small jobs
AHEAD_BYTES_MIN = 16 * 1024
LOADED_BYTES = 64 * 1024 * 1024  # of all together: each that is wanted has its share
IN_HAND_BYTES = 64 * 1024 * 1024  # of one, where all that is loaded is with workers and they would take more


class Stock:
    """What there is to do."""

    def __init__(
        self,
        journal: Journal,
        worker: Worker,
        dispatcher: Dispatcher,
        warn: Callable[[str], None],
        on_more: Callable[[], None],
    ) -> None:
        """`worker`: reads. `on_more`: there is more to be given out."""
        self.tail = Tail()
        """To be told what is appended."""
        self.backlogs: dict[str, Backlog] = {}
        """By name."""
        self._journal = journal
        self._worker = worker
        self._dispatcher = dispatcher
        self._warn = warn
        self._on_more = on_more
        self._groups: dict[str, Backlog] = {}  # by what lines call them
        self._teams: Collection[Team] = ()
        self._share = AHEAD_BYTES  # of each that is wanted
        self._behind: dict[Backlog, None] = {}  # wanted, and to be read from the disk
        self._stuck: set[Backlog] = set()  # of which that was said
        self._loader = Loader(journal, worker, self._loaded)
        self._surveys: set[Survey] = set()
        self._unknown: list[Backlog] = []  # to be surveyed when all that the tail does not know of is on disk

    # --- which there are ---------------------------------------------------------------------------

    def open(self, backlog: Backlog) -> None:
        """From now on there is this one, too."""
        self.backlogs[backlog.name] = backlog
        backlog.known_from = self._journal.next_offset
        self.tail.open(backlog)
        if backlog.team is not None:
            self._groups[backlog.team.group] = backlog
        self._want(backlog)

    def begin(self, backlog: Backlog) -> None:
        """As `open`, of one that nothing was ever appended of."""
        backlog.live, backlog.counted_to = True, EVERYWHERE
        self.open(backlog)

    def forget(self, backlog: Backlog) -> None:
        """It is no more."""
        del self.backlogs[backlog.name]
        self.tail.close(backlog)
        self._behind.pop(backlog, None)
        self._stuck.discard(backlog)
        self._loader.close(backlog)
        for line in backlog.lines:
            self._dispatcher.forget(line)
        if backlog.team is not None:
            del self._groups[backlog.team.group]
        self._unknown = [other for other in self._unknown if other is not backlog]
        for survey in self._surveys:
            survey.backlogs.pop(backlog, None)

    def of(self, line: Line) -> Backlog | None:
        """The one that a line belongs to."""
        group, topic = line
        return self.tail.queues.get(topic.encode()) if group is None else self._groups.get(group)

    def close(self) -> None:
        """Nothing is read any more."""
        for backlog in self.backlogs.values():
            self._loader.close(backlog)

    # --- who wants it ------------------------------------------------------------------------------

    def muster(self, teams: Collection[Team]) -> None:
        """These have workers."""
        if teams == self._teams:
            return
        self._teams = teams
        for backlog in self.backlogs.values():
            self._want(backlog)
        wanted = sum(backlog.wanted for backlog in self.backlogs.values())
        self._share = max(AHEAD_BYTES_MIN, min(AHEAD_BYTES, LOADED_BYTES // max(1, wanted)))

    def yield_to(self, backlog: Backlog, rival: str) -> None:
        """Another forwarder gives it out in our place; or, if that is "", does no longer."""
        backlog.rival = rival
        self._want(backlog)
        if rival:
            for line in backlog.lines:
                for origin in {work.batch.origin for work in backlog.works.values() if work.line == line}:
                    backlog.parked += self._dispatcher.withdraw(line, origin)
        else:
            parked, backlog.parked = backlog.parked, []
            self._add(parked, now())

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

    # --- from the tail -----------------------------------------------------------------------------

    def grown(self) -> bool:
        """There is more on disk than there was. Returns whether there is more to be given out."""
        self._survey_known()
        time, fresh = now(), False
        for offset, batch in self.tail.take(self._journal.durable_offset):
            for backlog in self.tail.backlogs(batch.topic, bool(batch.flags & QUEUED)):
                if not backlog.concerns(batch):
                    continue
                if backlog.counted_to == EVERYWHERE:
                    backlog.skip(offset, batch)
                if backlog.live and backlog.wanted and not backlog.rival and self._has_room(backlog):
                    self._add(backlog.load(offset, batch), time)
                    fresh = True
                elif backlog.live:
                    backlog.live = False
                    backlog.next = offset
                    self._want(backlog)
        return fresh

    # --- from the disk -----------------------------------------------------------------------------

    def feed(self) -> None:
        """Have more read, where it is wanted and there is room."""
        for backlog in list(self._behind):
            ready = not backlog.busy and not backlog.broken and backlog.next < self._journal.durable_offset
            if ready and self._has_room(backlog, 2):
                size = max(self._share - backlog.bytes, AHEAD_BYTES_MIN)
                room = Room(size, MESSAGES_MAX - backlog.messages, (SCATTER_BYTES_MAX - backlog.scatter) // 5)
                self._loader.load(backlog, room)

    def look(self) -> None:
        """Now and then: say of a backlog, once, that it is as scattered as may be, so that nothing more is loaded."""
        for backlog in self._behind:
            if backlog not in self._stuck and not self._has_room(backlog) and not self._waits(backlog):
                self._stuck.add(backlog)
                self._warn(
                    f"{backlog.name}: {backlog.messages:,} messages are with workers or wait for their time, and that "
                    "is as many as may be: what is behind them waits until some are done"
                )

    def _waits(self, backlog: Backlog) -> bool:
        """Whether something of it could be given out at once."""
        return any(map(self._dispatcher.waiting, backlog.lines))

    def _has_room(self, backlog: Backlog, parts: int = 1) -> bool:
        """Whether more of it may be loaded; with `parts`, while there is something to give out, not before less than
        one part of what may be is."""
        if not backlog.works:
            return True
        waits = self._waits(backlog)
        if not waits:
            parts = 1
        if backlog.messages * parts >= MESSAGES_MAX or backlog.scatter * parts >= SCATTER_BYTES_MAX:
            return False
        return backlog.bytes * parts < self._share or (not waits and backlog.bytes < IN_HAND_BYTES)

    def _loaded(self, backlog: Backlog, piece: Piece | None, error: BaseException | None) -> None:
        if self.backlogs.get(backlog.name) is not backlog:
            return
        if error is not None or piece is None:
            backlog.broken = True
            self._warn(f"{backlog.name} cannot go on: {error}")
            return
        time = now()
        for offset, batch in piece.entries:
            if backlog.concerns(batch):
                works = backlog.load(offset, batch)
                if backlog.rival:
                    backlog.parked += works
                else:
                    self._add(works, time)
        backlog.next = max(backlog.next, piece.reached)
        for first, last in piece.dropped:
            self._warn(f"{backlog.name}: offsets {first:,} to {last:,} are no more, and with them what was of it there")
        if backlog.next >= max(self._journal.durable_offset, backlog.known_from):
            backlog.live = True
            self._want(backlog)
        self._on_more()

    def _add(self, works: Iterable[Work], time: float) -> None:
        for work in works:
            due = due_of(work.batch, time, time_ns()) if work.line[0] is None else AT_ONCE
            self._dispatcher.add(work, time, due)

    # --- how much there is -------------------------------------------------------------------------

    def survey(self, backlogs: Collection[Backlog]) -> None:
        """Find out how much there is of them, and whether there is anything."""
        self._unknown += backlogs
        self._survey_known()

    def _survey_known(self) -> None:
        if self._unknown and self._journal.durable_offset >= max(backlog.known_from for backlog in self._unknown):
            backlogs, self._unknown = self._unknown, []
            self._surveys.add(Survey(self._journal, self._worker, self.tail, backlogs, self._surveyed))

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
