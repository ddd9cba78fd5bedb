"""Those who read the log: from an offset, a time or a cursor on, filtered, within their credit, and then what comes.

A reading belongs to one connection of one node. It ends by UNREAD, when the connection is gone, when its cursor is
taken over, or with an ERROR that says why. Whoever does not get what it expects asks anew from where it is: nothing is
remembered here of a reading that has ended, except its cursor. Files are read by the worker, in pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from zmqbus.errors import JournalCorrupt, JournalError, NoSpace, TopicError
from zmqbus.journal import Batch, Cursor, Journal, Reader, find_time
from zmqbus.net.clock import now
from zmqbus.node.peers.links import Inbox
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.fetching import answer_fetch
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol import commands
from zmqbus.protocol.commands import END, LOG_BATCHES_MAX, Command, Error, Log
from zmqbus.protocol.topics import Matcher, check_pattern

LOG_BYTES = 1024 * 1024  # of batches in one LOG, unless the first is larger
READINGS_MAX = 4096  # each keeps a file open
PROGRESS_PERIOD = 1.0  # seconds between two LOGs that only say how far the reading has come

Packed = tuple[Log, bytes]


class Reading:
    """One reader of the log."""

    def __init__(self, inbox: Inbox, identity: bytes, origin: int, command: Command, body: commands.Read) -> None:
        self.key = (origin, body.id)
        self.cursor = body.cursor
        self.credit = body.credit
        self.reader: Reader | None = None  # until it is known where to begin
        self.busy = False
        self.identity = identity
        self.progress: Log | None = None  # over what is not wanted: worth telling, but not each time
        self.told = 0  # `next` of the last LOG
        self.told_at = 0.0
        self._inbox = inbox
        self._request = command.request

    def send(self, body: commands.Body, part: bytes = b"") -> bool:
        """False: the connection is gone, or nobody reads from it."""
        self.progress, self.told_at = None, now()
        if isinstance(body, Log):
            self.told = body.next
        return self._inbox.answer(self.identity, body, self._request, [part] if part else ())


class Readings:
    """All of them, and what else concerns the log: FETCH by stream, and COMMIT."""

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        worker: Worker,
        committer: Committer,
        warn: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._worker = worker
        self._committer = committer
        self._warn = warn
        self._readings: dict[tuple[int, int], Reading] = {}
        self._holders: dict[str, Reading] = {}  # of cursors
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._readings)

    def serve(self, inbox: Inbox, identity: bytes, origin: int, command: Command) -> bool:
        """Answer a command of the node `origin`. False: it is not one of ours."""
        match command.body:
            case commands.Fetch() as body:
                self._spawn(answer_fetch(self._journal, self._worker, inbox, identity, command.request, body))
            case commands.Read() as body:
                self._begin(Reading(inbox, identity, origin, command, body), body)
            case commands.Credit(id=number) as body:
                reading = self._readings.get((origin, number))
                if reading is None or reading.identity != identity:  # or it belongs to a connection that is gone
                    self._end(reading)
                    inbox.answer(identity, Error("reading", f"there is no reading {number}"), command.request)
                else:
                    reading.credit += body.bytes
                    self._tell(reading, bool(body.bytes))
                    self._step(reading)
            case commands.Unread(id=number):
                self._end(self._readings.get((origin, number)))
            case commands.Commit() as body:
                self._commit(inbox, identity, origin, command.request, body)
            case _:
                return False
        return True

    def grown(self) -> None:
        """There is more on disk than there was."""
        for reading in list(self._readings.values()):
            self._step(reading)

    def left(self, origin: int) -> None:
        """A node is no longer there; should it be back, it asks anew."""
        for key, reading in list(self._readings.items()):
            if key[0] == origin:
                self._end(reading)

    def cursors(self) -> list[tuple[str, int, bool]]:
        """Name, offset, and whether somebody reads under it."""
        return [(name, c.offset, name in self._holders) for name, c in self._journal.cursors.all().items()]

    def close(self) -> None:
        """No more of it."""
        for task in self._tasks:
            task.cancel()
        for reading in list(self._readings.values()):
            self._end(reading)

    # --- reading -----------------------------------------------------------------------------------

    def _begin(self, reading: Reading, body: commands.Read) -> None:
        try:
            for pattern in body.patterns:
                check_pattern(pattern)
            if len(self._readings) >= READINGS_MAX and reading.key not in self._readings:
                raise TopicError("", f"this forwarder serves {READINGS_MAX} readings already")
        except TopicError as error:
            reading.send(Error("read", str(error)))
            return
        self._end(self._readings.get(reading.key))
        self._readings[reading.key] = reading
        if reading.cursor:
            if (holder := self._holders.get(reading.cursor)) is not None:
                holder.send(Error("taken", f"another subscription reads as {reading.cursor!r} now"))
                self._end(holder)
            self._holders[reading.cursor] = reading
        self._spawn(self._open(reading, body))

    async def _open(self, reading: Reading, body: commands.Read) -> None:
        try:
            start = await self._start(reading, body)
        except (JournalError, ValueError) as error:
            reading.send(Error("corrupt" if isinstance(error, JournalCorrupt) else "read", str(error)[:1000]))
            self._end(reading)
            return
        if self._readings.get(reading.key) is reading:
            matches = Matcher(body.patterns).matches
            reading.reader = Reader(self._journal, start, lambda topic: matches(topic.decode(errors="replace")))
            journal = self._journal
            if reading.send(Log(reading.key[1], journal.number, start, journal.durable_offset)):
                self._step(reading)
            else:
                self._end(reading)

    async def _start(self, reading: Reading, body: commands.Read) -> int:
        """The offset to read from. A cursor that is not known begins there, and on disk."""
        journal = self._journal
        if reading.cursor and (known := journal.cursors.all().get(reading.cursor)) is not None:
            return known.offset
        start = journal.durable_offset if body.offset == END else body.offset or journal.first_offset
        if body.time_ns:
            start = await self._worker.do(find_time, journal, body.time_ns)
        if start > journal.durable_offset:
            raise ValueError(f"offset {start:,} is not there yet: the journal ends at {journal.durable_offset:,}")
        if reading.cursor:
            await self._committer.commit_cursors({reading.cursor: Cursor(start)}, forward=True)
            start = journal.cursors.all().get(reading.cursor, Cursor(start)).offset  # another may have been quicker
        return start

    def _tell(self, reading: Reading, if_due: bool) -> None:
        """Say how far it is: what has been passed over, and where the journal ends now."""
        if reading.reader is not None and (reading.progress is not None or not if_due):
            reached = reading.told if reading.progress is None else reading.progress.next
            reading.send(Log(reading.key[1], self._journal.number, reached, self._journal.durable_offset))

    def _step(self, reading: Reading) -> None:
        """Send more, if there is more, and it may."""
        reader = reading.reader
        if reader is not None and not reading.busy and reading.credit > 0 and not reader.caught_up:
            reading.busy = True
            size = min(reading.credit, LOG_BYTES)
            self._worker.submit(self._load, reading, reader, size, then=lambda p, e: self._loaded(reading, p, e))

    def _load(self, reading: Reading, reader: Reader, size: int) -> list[Packed]:
        """On the worker."""
        before = reader.offset
        batches = reader.read(size)
        return _pack(reading.key[1], self._journal, batches, before, reader.offset, reader.dropped)

    def _loaded(self, reading: Reading, packed: list[Packed], error: BaseException | None) -> None:
        reading.busy = False
        if reading.reader is None or self._readings.get(reading.key) is not reading:
            self._close_reader(reading)
            return
        if error is not None:
            reason = str(error) if isinstance(error, JournalError) else repr(error)
            self._warn(f"a reading had to end: {reason}")
            reading.send(Error("corrupt" if isinstance(error, JournalCorrupt) else "journal", reason[:1000]))
            self._end(reading)
            return
        for log, part in packed:
            if not log.batches and not log.dropped and now() < reading.told_at + PROGRESS_PERIOD:
                reading.progress = log
            elif not reading.send(log, part):
                self._end(reading)
                return
            reading.credit -= len(part)
        self._step(reading)

    def _end(self, reading: Reading | None) -> None:
        if reading is None:
            return
        if self._readings.get(reading.key) is reading:
            del self._readings[reading.key]
        if self._holders.get(reading.cursor) is reading:
            del self._holders[reading.cursor]
        if not reading.busy:
            self._close_reader(reading)

    def _close_reader(self, reading: Reading) -> None:
        if reading.reader is not None:
            reading.reader.close()
            reading.reader = None

    # --- the rest ----------------------------------------------------------------------------------

    def _commit(self, inbox: Inbox, identity: bytes, origin: int, request: int, body: commands.Commit) -> None:
        holder = self._holders.get(body.cursor)
        refusal: Error | None = None
        if holder is not None and holder.key != (origin, body.id):
            refusal = Error("taken", f"cursor {body.cursor!r} is held by another reading")
        elif holder is None and body.id:
            refusal = Error("reading", f"there is no reading {body.id} with cursor {body.cursor!r}")
        elif body.forget and body.cursor not in self._journal.cursors.all():
            refusal = Error("cursor", f"there is no cursor {body.cursor!r}")
        if refusal is not None:
            inbox.answer(identity, refusal, request)
        else:
            self._spawn(self._move(inbox, identity, request, body))

    async def _move(self, inbox: Inbox, identity: bytes, request: int, body: commands.Commit) -> None:
        # A reader may have been taken over, and have read on without hearing of it: it takes back nothing of what was
        # committed meanwhile.
        forward = bool(body.id)
        try:
            cursor = None if body.forget else Cursor(body.offset)
            await self._committer.commit_cursors({body.cursor: cursor}, forward=forward)
        except (NoSpace, ValueError) as error:
            inbox.answer(identity, Error("cursor", str(error)[:1000]), request)
        except JournalError as error:
            inbox.answer(identity, Error("journal", str(error)[:1000]), request)
        else:
            inbox.answer(identity, body, request)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pack(
    number: int, journal: Journal, batches: list[Batch], start: int, end: int, dropped: list[tuple[int, int]]
) -> list[Packed]:
    """As LOGs that no receiver refuses for their size. There is one at least."""
    packed: list[Packed] = []
    entries: list[tuple[int, int, int]] = []
    parts: list[memoryview] = []
    size = 0

    def close(following: int) -> None:
        log = Log(number, journal.number, following, journal.durable_offset, entries, [] if packed else dropped)
        packed.append((log, b"".join(parts)))

    for batch in batches:
        if entries and (size + batch.size > 2 * LOG_BYTES or len(entries) == LOG_BATCHES_MAX):
            close(batch.offset)
            entries, parts, size = [], [], 0
        external = 0 if batch.external is None else len(batch.external)
        entries.append((batch.offset, len(batch.frame), external))
        parts.append(batch.frame)
        if batch.external is not None:
            parts.append(batch.external)
        size += batch.size
    if entries or dropped or end > start:
        close(end)
    return packed
