"""Group commit: writes what has been appended, has it synced by a thread, and says what may be acknowledged.

One sync is under way at a time; what is appended meanwhile goes into the next. No timer: an idle disk is used at once.
Beside that, on the same thread: retention, looking for room on a full disk, and moving cursors. A failed disk is the
end: `on_failure` is told, once, and nothing more is written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from zmqbus.errors import JournalError
from zmqbus.journal import Commit, Cursor, Journal, Ticket
from zmqbus.net.clock import now, time_ns
from zmqbus.node.storing.worker import Worker

LOOK = 1.0  # seconds between looks: for room while there is none, and whether the last commit can be vouched for
RETENTION_LOOKS = 30  # so many of them between two for what is too old
SYNCS_KEPT = 1000  # times of the last syncs, for statistics


class Committer:
    """Drives a journal's way to the disk. On the loop; `worker` does the waiting."""

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        worker: Worker,
        on_commit: Callable[[Commit], None],
        on_full: Callable[[bool], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`on_full`: there is no room any more (True), or again (False)."""
        self.commits = 0
        self.bytes = 0
        """Written so far: wire headers and payloads."""
        self.committed_at: float | None = None
        """When messages were last made durable, monotonic seconds."""
        self.sync_seconds: deque[float] = deque(maxlen=SYNCS_KEPT)
        """How long the last syncs took."""
        self.full = False
        self._journal = journal
        self._worker = worker
        self._on_commit = on_commit
        self._on_full = on_full
        self._on_failure = on_failure
        self._busy = False
        self._failed = False
        self._maintenance = loop.create_task(self._maintain())

    def pump(self) -> None:
        """Something was appended: write it, unless a sync is under way. Then it is written after that."""
        if self._busy or self._failed:
            return
        before = self._journal.buffered_bytes
        try:
            ticket = self._journal.write(time_ns())
        except JournalError as error:
            self._fail(error)
        else:
            if ticket is not None:
                if not ticket.refused:
                    self.bytes += before - self._journal.buffered_bytes
                self._sync(ticket)

    def check_room(self) -> None:
        """After an append or a commit: has the journal become full?"""
        if self._journal.full is not None and not self.full:
            self.full = True
            self._on_full(True)

    async def commit_cursors(self, cursors: Mapping[str, Cursor | None]) -> None:
        """Move cursors; on disk when this returns. Raises NoSpace, JournalFailed, ValueError."""
        await self._worker.do(self._journal.commit_cursors, cursors)

    async def close(self) -> None:
        """Stop; a sync that is under way is waited for. The journal's own `close` commits what is left."""
        self._maintenance.cancel()
        self._failed = True  # nothing more is written
        await self._worker.do(lambda: None)

    # --- inside ------------------------------------------------------------------------------------

    def _sync(self, ticket: Ticket) -> None:
        self._busy = True
        self._worker.submit(self._timed_sync, ticket, then=lambda seconds, error: self._synced(ticket, seconds, error))

    def _timed_sync(self, ticket: Ticket) -> float:
        start = now()
        self._journal.sync(ticket)
        return now() - start

    def _synced(self, ticket: Ticket, seconds: float, error: BaseException | None) -> None:
        self._busy = False
        if error is not None:
            self._fail(error)
            return
        self.commits += 1
        self.sync_seconds.append(seconds)
        try:
            commit = self._journal.finish(ticket)
        except JournalError as failure:
            self._fail(failure)
            return
        if commit.acked:
            self.committed_at = now()
        self.pump()  # first: the disk has nothing to do
        self._on_commit(commit)
        self.check_room()

    async def _maintain(self) -> None:
        journal, looks, commits = self._journal, 0, -1
        try:
            while True:
                await asyncio.sleep(LOOK)
                looks += 1
                if self.full or looks % RETENTION_LOOKS == 0:
                    if victims := journal.retire(time_ns()):
                        await self._worker.do(journal.delete, victims)
                    if self.full and await self._worker.do(journal.resume):
                        self.full = False
                        self._on_full(False)
                elif (
                    commits == self.commits and not self._busy and (ticket := journal.checkpoint(time_ns())) is not None
                ):
                    self._sync(ticket)
                commits = self.commits
        except JournalError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            self._on_failure(error)
