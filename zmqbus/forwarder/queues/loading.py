"""Reading the journal for backlogs: what is to be given out next, and how much there is. On the loop; the worker reads.

`Loader` reads on for one backlog, a piece at a time, when it is asked to. `Survey` goes over the log once, for several:
after a start, nobody knows what lies between their places and the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple

from zmqbus.forwarder.queues.backlog import EVERYWHERE, Backlog
from zmqbus.forwarder.queues.tail import Tail
from zmqbus.journal import Batch as Stored
from zmqbus.journal import Journal, Reader
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.topics import Matcher

PIECE_BYTES = 64 * 1024  # of the journal's batches, between two looks whether that is enough
PIECES_MAX = 64  # of one read: what is on a topic may nearly all be another's, and others have their turn
READERS_MAX = 16  # that keep a file open, and a window of it, 1 MiB, in memory
FLAGS_AT = 3  # in a frame, behind its topic

Entry = tuple[int, Batch]
"""An offset, and what is there."""


class Room(NamedTuple):
    """How much is to be read, at most: one piece more than any of these."""

    bytes: int
    messages: int
    batches: int


class Piece(NamedTuple):
    """What came of a read."""

    entries: list[Entry]
    reached: int
    """All before it has been read."""
    dropped: list[tuple[int, int]]
    """Offsets that are no more."""


Then = Callable[[Backlog, Piece | None, BaseException | None], None]


class Loader:
    """One reader for each backlog that is read at present."""

    def __init__(self, journal: Journal, worker: Worker, then: Then) -> None:
        self._journal = journal
        self._worker = worker
        self._then = then
        self._readers: OrderedDict[Backlog, Reader] = OrderedDict()

    def load(self, backlog: Backlog, room: Room) -> None:
        """Read on for it, until about that is filled; `then` is called with what there was."""
        backlog.busy = True
        reader = self._readers.pop(backlog, None)
        if reader is None:
            accept = _accept([backlog])
            reader = Reader(self._journal, backlog.next, accept)
        self._readers[backlog] = reader
        queued = backlog.team is None
        self._worker.submit(_read, reader, queued, room, then=lambda p, e: self._done(backlog, reader, p, e))

    def close(self, backlog: Backlog) -> None:
        """It is not read any more, for now."""
        reader = self._readers.pop(backlog, None)
        if reader is not None and not backlog.busy:
            reader.close()

    def _done(self, backlog: Backlog, reader: Reader, piece: Piece | None, error: BaseException | None) -> None:
        backlog.busy = False
        if self._readers.get(backlog) is not reader:
            reader.close()
        elif len(self._readers) > READERS_MAX:
            reader.close()  # it goes on from where it is, should it be asked to
        self._then(backlog, piece, error)


def _read(reader: Reader, queued: bool, room: Room) -> Piece:
    """On the worker."""
    size, messages, batches = room
    entries: list[Entry] = []
    dropped: list[tuple[int, int]] = []
    for _ in range(PIECES_MAX):
        stored = reader.read(PIECE_BYTES)
        dropped += reader.dropped
        for one in stored:
            flags = _flags(one)
            if bool(flags & QUEUED) == queued:
                parts = [bytes(part) for part in (one.frame, one.external) if part is not None]
                batch = Batch(one.topic, flags, one.count, one.origin, one.first_seq, one.time_ns, tuple(parts))
                entries.append((one.offset, batch))
                size -= batch.size
                messages -= one.count
        if size <= 0 or messages <= 0 or len(entries) >= batches or reader.caught_up or not stored:
            break
    return Piece(entries, reader.offset, dropped)


class Survey:
    """Counts what is unread of some backlogs, up to the end of the journal."""

    def __init__(
        self,
        journal: Journal,
        worker: Worker,
        tail: Tail,
        backlogs: Collection[Backlog],
        then: Callable[[Survey, BaseException | None], None],
    ) -> None:
        """`then` is called when it has come to the end, or cannot go on."""
        self.backlogs = dict.fromkeys(backlogs)
        """Those that are not given up meanwhile."""
        self._journal = journal
        self._worker = worker
        self._tail = tail
        self._then = then
        self._reader = Reader(journal, min(backlog.next for backlog in backlogs), _accept(backlogs))
        self._step()

    def _step(self) -> None:
        self._worker.submit(_look, self._reader, then=self._looked)

    def _looked(self, found: list[tuple[int, Batch]] | None, error: BaseException | None) -> None:
        if error is None and found is not None:
            for offset, batch in found:
                for backlog in self._tail.backlogs(batch.topic, bool(batch.flags & QUEUED)):
                    if backlog in self.backlogs and offset >= backlog.next and backlog.concerns(batch):
                        backlog.skip(offset, batch)
            for backlog in self.backlogs:
                backlog.counted_to = max(backlog.counted_to, self._reader.offset)
            if not self._reader.caught_up and self.backlogs:
                self._step()
                return
            for backlog in self.backlogs:
                backlog.counted_to = EVERYWHERE
        self._reader.close()
        self._then(self, error)


def _look(reader: Reader) -> list[Entry]:
    """On the worker: headers only."""
    return [
        (one.offset, Batch(one.topic, _flags(one), one.count, one.origin, one.first_seq, one.time_ns, ()))
        for one in reader.read()
    ]


def _flags(stored: Stored) -> int:
    at = len(stored.topic) + FLAGS_AT
    return int.from_bytes(stored.frame[at : at + 2], "little")


def _accept(backlogs: Collection[Backlog]) -> Callable[[bytes], bool]:
    """Which topics are wanted."""
    topics = {backlog.topic.encode() for backlog in backlogs if backlog.team is None}
    patterns = [pattern for backlog in backlogs if backlog.team is not None for pattern in backlog.patterns]
    if not patterns:
        return topics.__contains__
    matches = Matcher(patterns).matches
    return lambda topic: topic in topics or matches(topic.decode(errors="replace"))
