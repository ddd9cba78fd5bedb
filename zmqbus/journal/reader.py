"""Following the log, and looking up ranges of one stream. Reads files; changes nothing.

A reader sees only what is on disk (`durable_end`, `durable_offset`), hands out batches verbatim, checks every byte it
hands out, and raises JournalCorrupt rather than pass over one that does not fit. It may run beside the writer and
beside retention: a segment that is deleted under it can still be read to its end; one that is gone before it was
opened is reported in `dropped`. Memory: one window of the file, or one record.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Protocol

from zmqbus.errors import JournalCorrupt
from zmqbus.journal.index import Index, Mark, Span, damage
from zmqbus.journal.records import Batch, encode_heads
from zmqbus.journal.segment import Scanner, Segment, read_snapshot
from zmqbus.journal.storage import Storage, failed, os_errors

READ_BYTES = 1 << 20
SCAN_BYTES_MAX = 8 << 20  # one call passes over no more of what is not wanted; a few milliseconds
TOPIC_CACHE = 10_000  # verdicts of `accept` that are remembered

Accept = Callable[[bytes], bool]


class Log(Protocol):
    """What there is to read: a Journal, or a directory opened for inspection."""

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    @property
    def durable_offset(self) -> int: ...

    @property
    def storage(self) -> Storage: ...

    def index_of(self, segment: Segment) -> Index: ...


class Reader:
    """Reads batches in offset order from a starting point on, and then follows the tail.

    The batch that contains `start` is handed out whole: its first messages may lie before `start`. `accept` says
    which topics are wanted; segments without any are passed over unread. Close it: it holds a file open.
    """

    def __init__(self, log: Log, start: int = 0, accept: Accept | None = None) -> None:
        self._log = log
        self._accept = None if accept is None else _remembering(accept)
        self._segment: Segment | None = None
        self._scanner: Scanner | None = None
        self._fd = -1
        self.offset = start
        """Where the next `read` goes on: commit this as a cursor once all that was read has been dealt with."""
        self.dropped: list[tuple[int, int]] = []
        """Ranges of offsets (first, last) that the last `read` came to and which are no more: removed by retention,
        or declared lost by a repair."""

    @property
    def caught_up(self) -> bool:
        """Whether everything on disk has been read or passed over. While it is False, read again."""
        return self.offset >= self._log.durable_offset

    def read(self, bytes_max: int = READ_BYTES) -> list[Batch]:
        """The next batches, of about `bytes_max` bytes together, and at least one if there is one within reach. An
        empty list does not mean the end: see `caught_up`. Raises JournalCorrupt, and again if called again."""
        self.dropped = []
        try:
            return self._read(bytes_max)
        except OSError as error:
            raise failed("read", self._segment.path if self._segment is not None else "journal", error) from error

    def _read(self, bytes_max: int) -> list[Batch]:
        batches: list[Batch] = []
        budget = SCAN_BYTES_MAX
        while bytes_max > 0 and budget > 0 and not self.caught_up:
            if self._scanner is None and not self._open():
                continue
            scanner, segment, offset = self._scanner, self._segment, self.offset
            assert scanner is not None
            assert segment is not None
            scanner.limit = segment.durable_end
            before = scanner.position
            stop = before + budget
            while bytes_max > 0 and (batch := scanner.next(stop)) is not None:
                if batch.offset + batch.count <= offset:
                    continue  # before the start
                if batch.topic:
                    batches.append(batch)
                    bytes_max -= len(batch.frame) if batch.external is None else batch.size
                else:
                    self.dropped.append((max(batch.offset, offset), batch.next_offset - 1))
            budget -= scanner.position - before
            self.offset = max(offset, scanner.next_offset)
            if scanner.next_offset == segment.next_base:
                self.close()
            elif scanner.bad is not None or (segment.next_base is not None and scanner.position >= scanner.limit):
                if batches:
                    break  # hand out what is good; the next call comes back here and raises
                raise damage(segment, scanner)
        return batches

    def close(self) -> None:
        """Let go of the open segment. Reading may go on after it."""
        if self._fd >= 0:
            self._log.storage.close(self._fd)
        self._fd, self._segment, self._scanner = -1, None, None

    def _open(self) -> bool:
        """Go to the segment that holds `offset`. False if it holds nothing that is wanted, or has just gone."""
        segments = self._log.segments
        first = segments[0].base_offset
        if self.offset < first:
            self.dropped.append((self.offset, first - 1))
            self.offset = first
        segment = segments[bisect_right(segments, self.offset, key=_base_offset) - 1]
        try:
            mark = None
            if self.offset > segment.base_offset or (self._accept is not None and segment.next_base is not None):
                with contextlib.suppress(JournalCorrupt):  # no index then: scan, up to the damage
                    index = self._log.index_of(segment)
                    if segment.next_base is not None and self._accept and not index.matches(self._accept):
                        self.offset = segment.next_base
                        return False
                    mark = index.seek(self.offset)
            self._fd = self._log.storage.open(segment.path)
        except FileNotFoundError:
            if segment in self._log.segments:
                raise JournalCorrupt(segment.path, 0, "the segment is missing", segment.base_offset) from None
            return False  # retention was quicker
        self._segment = segment
        self._scanner = _scanner(self._log, self._fd, segment, mark, self._accept)
        return True


def find_time(log: Log, time_ns: int) -> int:
    """Offset of the first batch whose time (its publisher's, Unix ns) is this or later; the end if there is none."""
    segments = log.segments
    at = max(bisect_left(segments, time_ns, key=_max_time_before) - 1, 0)
    for segment in segments[at:]:
        with os_errors("read", segment.path):
            mark = log.index_of(segment).seek_time(time_ns)
            fd = log.storage.open(segment.path)
            try:
                scanner = _scanner(log, fd, segment, mark, None)
                while (batch := scanner.next()) is not None:
                    if batch.time_ns >= time_ns and batch.topic:
                        return batch.offset
                if scanner.bad is not None:
                    raise damage(segment, scanner)
            finally:
                log.storage.close(fd)
    return log.durable_offset


def fetch(log: Log, topic: bytes, origin: int, first: int, last: int, bytes_max: int = READ_BYTES) -> list[Batch]:
    """The stored batches of one stream that hold any of the seqs `first`..`last`, in order, verbatim.

    About `bytes_max` bytes: ask again from the last one's `last_seq` + 1 on. What is missing from the answer before
    its last batch is not in this journal, nor is anything if the answer is empty. Raises JournalCorrupt.
    """
    batches: list[Batch] = []
    while first <= last and bytes_max > 0:
        with os_errors("read", "journal"):
            segments = log.segments
            # Heads only grow: the seq can only be in the last segment that began when the stream's head was below it.
            at = bisect_left(segments, first, key=lambda segment: _head_before(log, segment, topic, origin)) - 1
            segment = segments[max(at, 0)]
            span = log.index_of(segment).span(topic, origin)
            if span is None or span.last_seq < first:
                break
            found = _fetch_from(log, segment, span, topic, origin, first, last, bytes_max)
        if not found:
            break
        batches += found
        bytes_max -= sum(batch.size for batch in found)
        first = found[-1].last_seq + 1
    return batches


def _fetch_from(
    log: Log, segment: Segment, span: Span, topic: bytes, origin: int, first: int, last: int, bytes_max: int
) -> list[Batch]:
    """What one segment has of a stream's range."""
    batches: list[Batch] = []
    fd = log.storage.open(segment.path)
    try:
        marks = [mark for mark in list(log.index_of(segment).marks) if mark.position <= span.last_position]
        low, high = 0, len(marks)  # halve the way: a stream's seqs grow with the position
        while low < high:
            middle = (low + high) // 2
            end = marks[middle + 1].position if middle + 1 < len(marks) else span.last_position + 1
            scanner = _scanner(log, fd, segment, marks[middle], topic.__eq__)
            while (batch := scanner.next(end)) is not None and batch.origin != origin:
                pass
            if batch is None or batch.first_seq > first:  # none here says nothing: look further to the left
                high = middle
            else:
                low = middle + 1
        scanner = _scanner(log, fd, segment, marks[low - 1] if low else None, topic.__eq__)
        while bytes_max > 0 and (batch := scanner.next(span.last_position + 1)) is not None:
            if batch.topic != topic or batch.origin != origin or batch.last_seq < first:
                continue
            if batch.first_seq > last:
                break
            batches.append(batch)
            bytes_max -= batch.size
        if scanner.bad is not None:
            raise damage(segment, scanner)
    finally:
        log.storage.close(fd)
    return batches


def _scanner(log: Log, fd: int, segment: Segment, mark: Mark | None, accept: Accept | None) -> Scanner:
    if mark is None:
        mark = Mark(segment.base_offset, segment.header.data_start, 0)
    salt, limit = segment.header.salt, segment.durable_end
    return Scanner(log.storage, fd, salt, mark.position, mark.offset, limit, accept)


def _head_before(log: Log, segment: Segment, topic: bytes, origin: int) -> int:
    """A stream's last seq before a segment, from its snapshot; 0 if unknown. Searched for as bytes: unpacking ten
    thousand entries takes milliseconds, and a chance match could only make a fetch find less."""
    snapshot = read_snapshot(log.storage, segment)
    key = encode_heads([(topic, origin, 0)])[:-8]
    at = snapshot.find(key)
    return -1 if at < 0 else int.from_bytes(snapshot[at + len(key) : at + len(key) + 8], "little")


def _remembering(accept: Accept) -> Accept:
    """`accept` with a memory: patterns are costlier to match than a dict is to ask."""
    verdicts: dict[bytes, bool] = {}

    def remembered(topic: bytes) -> bool:
        verdict = verdicts.get(topic)
        if verdict is None:
            if len(verdicts) >= TOPIC_CACHE:
                verdicts.clear()
            verdict = verdicts[topic] = bool(accept(topic))
        return verdict

    return remembered


def _base_offset(segment: Segment) -> int:
    return segment.base_offset


def _max_time_before(segment: Segment) -> int:
    return segment.header.max_time_ns
