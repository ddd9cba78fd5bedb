"""Writes down how far backlogs have come: one commit at a time, for all that have changed; what comes meanwhile goes
into the next. Who did something is told when the commit that holds it is on disk, and not before. On the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zmqbus.errors import JournalError, NoSpace
from zmqbus.forwarder.queues.backlog import Backlog
from zmqbus.journal import Journal
from zmqbus.node.storing.committer import Committer

NO_ROOM_PERIOD = 1.0  # seconds until a commit is tried again for which the disk had no room


class Scribe:
    """Group commit of cursors."""

    def __init__(
        self,
        journal: Journal,
        committer: Committer,
        loop: asyncio.AbstractEventLoop,
        warn: Callable[[str], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._journal = journal
        self._committer = committer
        self._loop = loop
        self._warn = warn
        self._on_failure = on_failure
        self._changed: dict[Backlog, None] = {}
        self._writing: dict[Backlog, None] = {}  # those of the commit that is under way
        self._then: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._has_warned = False

    def note(self, backlog: Backlog) -> None:
        """Something of it is to be written down."""
        self._changed[backlog] = None
        self._stir()

    def then(self, work: Callable[[], None]) -> None:
        """Do this when all that was noted is on disk."""
        self._then.append(work)
        self._stir()

    def forget(self, backlog: Backlog) -> None:
        """It is no more. A commit that has no room is tried again without it."""
        self._changed.pop(backlog, None)
        self._writing.pop(backlog, None)

    async def settle(self) -> None:
        """Wait until all is written that was noted."""
        while self._task is not None:
            await asyncio.wait([self._task])

    def close(self) -> None:
        """Nothing more is written."""
        if self._task is not None:
            self._task.cancel()

    def _stir(self) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._changed or self._then:
                changed, self._changed = self._changed, {}
                self._writing = changed
                then, self._then = self._then, []
                end = self._journal.durable_offset
                cursors = {backlog.name: backlog.cursor(end) for backlog in changed}
                try:
                    if cursors:
                        await self._committer.commit_cursors(cursors)
                except NoSpace as error:
                    self._changed = changed | self._changed
                    self._then = then + self._then
                    if not self._has_warned:
                        self._warn(f"what workers have done cannot be confirmed: {error}")
                    self._has_warned = True
                    await asyncio.sleep(NO_ROOM_PERIOD)
                    continue
                self._has_warned = False
                for backlog in changed:
                    backlog.committed = cursors[backlog.name].offset
                for work in then:
                    work()
        except (JournalError, ValueError) as error:
            self._on_failure(error)
        finally:
            self._task = None
