"""Group commit: writes what has been appended, has it synced by a thread, and says what may be acknowledged.

One sync is under way at a time; what is appended meanwhile goes into the next. The first to be appended waits LINGER
for others, unless somebody waits for it (`urgent`), or much has come already: so a forwarder costs those who publish at
a low rate, and the disk, next to nothing. A small commit on a disk that has lately been as quick as a change of threads
is synced here and now; once it was not, the thread waits for it again. Beside that, on the thread: retention, looking
for room on a full disk, and moving cursors. A failed disk is the end: `on_failure` is told, once, and nothing more is
written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from zmqbus.errors import JournalError
from zmqbus.journal import Commit, Cursor, Journal, Ticket
from zmqbus.net.clock import now, time_ns
from zmqbus.node.storing.worker import Worker

LINGER = 0.005  # seconds: nobody waits, and less than what one notices
LINGER_BYTES = 1 << 20  # at which a commit is worth its while
QUICK = 0.0005  # seconds: such a disk is waited for by the loop itself,
QUICK_BYTES = 64 * 1024  # for a commit no larger than this,
QUICK_SYNCS = 16  # after so many such syncs in a row
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
        self._loop = loop
        self._worker = worker
        self._on_commit = on_commit
        self._on_full = on_full
        self._on_failure = on_failure
        self._busy = False
        self._urgent = False
        self._quick_syncs = 0
        self._lingering: asyncio.TimerHandle | None = None
        self._failed = False
        self._maintenance = loop.create_task(self._maintain())

    @property
    def is_busy(self) -> bool:
        """Whether a sync is under way."""
        return self._busy

    def pump(self, urgent: bool = True) -> None:
        """Something was appended: write it, now or soon; if a sync is under way, after that."""
        if self._busy:
            self._urgent = self._urgent or urgent
        elif self._failed:
            return
        elif urgent or self._journal.buffered_bytes >= LINGER_BYTES:
            self._write()
        elif self._lingering is None and self._journal.buffered_bytes:
            self._lingering = self._loop.call_later(LINGER, self._write)

    def _write(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._busy or self._failed:
            return
        self._urgent = False
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

    async def commit_cursors(self, cursors: Mapping[str, Cursor | None], *, forward: bool = False) -> None:
        """Move cursors; on disk when this returns. `forward`: those that are further on already stay where they are.

        Raises:
            NoSpace, JournalFailed, ValueError
        """
        await self._worker.do(self._commit_forward if forward else self._journal.commit_cursors, cursors)

    async def settle(self) -> None:
        """Wait until all that has been appended is on disk."""
        while (self._busy or self._journal.buffered_bytes) and not (self._failed or self.full):
            self.pump()
            await self._worker.do(lambda: None)

    async def close(self) -> None:
        """Stop; a sync that is under way is waited for. The journal's own `close` commits what is left."""
        self._maintenance.cancel()
        if self._lingering is not None:
            self._lingering.cancel()
        self._failed = True  # nothing more is written
        await self._worker.do(lambda: None)

    # --- inside ------------------------------------------------------------------------------------

    def _commit_forward(self, cursors: Mapping[str, Cursor | None]) -> None:
        """On the worker, so that it is compared with what was committed just before."""
        there = self._journal.cursors.all()
        ahead = {
            name: cursor
            for name, cursor in cursors.items()
            if cursor is None or name not in there or cursor.offset > there[name].offset
        }
        if ahead:
            self._journal.commit_cursors(ahead)

    def _sync(self, ticket: Ticket) -> None:
        self._busy = True
        small = ticket.size <= QUICK_BYTES and not ticket.rotate
        if small and self._quick_syncs >= QUICK_SYNCS and not self._worker.waiting:
            try:
                seconds = self._timed_sync(ticket)
            except JournalError as error:
                self._fail(error)
            else:
                self._synced(ticket, seconds, None)
            return
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
        self._quick_syncs = self._quick_syncs + 1 if seconds < QUICK else 0
        try:
            commit = self._journal.finish(ticket)
        except JournalError as failure:
            self._fail(failure)
            return
        if commit.acked:
            self.committed_at = now()
        self.pump(self._urgent)  # first: the disk has nothing to do
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
