"""For an operator at 3 a.m.: what is in a journal directory. Whether it is sound, and how to make it so: repair.py.

All of this only reads, takes no lock, and may be run beside a working forwarder, which writes, changes segments and
cursors, and removes the oldest segments meanwhile. What it is just writing is reported as an unfinished tail.
Long work reports to `progress(done, total)`.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from zmqbus.errors import JournalCorrupt, JournalUnavailable
from zmqbus.journal.index import ActiveIndex, Index, load_index
from zmqbus.journal.positions import CURSORS, Cursor, Streams, decode_cursors, recover_cursor
from zmqbus.journal.reader import Accept, Reader
from zmqbus.journal.records import FORMAT_VERSION, Batch
from zmqbus.journal.segment import (
    QUARANTINE,
    Scanner,
    Segment,
    find_headers,
    last_byte_written,
    load_segments,
    read_snapshot,
    segment_names,
)
from zmqbus.journal.storage import (
    META,
    TEMPORARY,
    Disk,
    Storage,
    in_use,
    os_errors,
    read_meta,
)

Progress = Callable[[int, int], None]
_EXPORT = struct.Struct("<II")
TRIES = 10  # to open files before a forwarder removes them: it does so at most every few milliseconds
_GLANCE_BYTES = 64 << 10  # that hold the first record of nearly every segment


class Finding(NamedTuple):
    """One thing `verify` noticed, or `repair` did or would do."""

    kind: Literal["damage", "torn", "note", "repaired", "planned"]
    path: str
    position: int
    offset: int | None
    text: str
    lost: int = 0
    """Messages, from `offset` on, that are gone."""

    def __str__(self) -> str:
        at = "" if self.offset is None else f", message offset {self.offset}"
        lost = f"; {self.lost} lost" if self.lost else ""
        return f"{self.kind}: {self.path} at byte {self.position}{at}: {self.text}{lost}"


class Info(NamedTuple):
    """What a journal holds, from its headers and its last segment alone."""

    path: str
    uuid: str
    version: int
    """Of the format."""
    holder: int | None
    """The process that holds the lock: its id, 0 if that is not known; None if nobody does."""
    segments: tuple[Segment, ...]
    first_offset: int
    next_offset: int
    oldest_ns: int | None
    """The time of the first message; None if there is none."""
    newest_ns: int | None
    """The newest time of any message that is, or was, in the journal."""
    bytes_used: int
    bytes_free: int
    """What the file system has left."""
    topics: dict[str, int]
    """How many streams are known of each topic. Their messages may have been removed."""
    streams: int
    cursors: dict[str, Cursor]
    quarantined: tuple[tuple[str, int], ...]
    """Files in quarantine, with their sizes."""
    tail: str | None
    """What is wrong with the bytes after the last good record, as of an unfinished write; None if there are none."""
    damage: JournalCorrupt | None
    """What is wrong with the last segment; the messages after it are not counted. Others are not looked at."""


class View:
    """A journal directory opened for reading only, as it is at this moment. It is a `Log` for Reader and fetch.

    Raises what opening it for work would raise, except that it minds neither the lock nor damage in the last segment.
    """

    def __init__(self, path: str, storage: Storage | None = None) -> None:
        self.path = path
        self._storage = storage or Disk()
        self.streams = Streams(path, 1 << 62)
        self.cursors: dict[str, Cursor] = {}
        self.tail: str | None = None
        """What stands after the last good record, not vouched for by any other; None if nothing does."""
        self.damage: JournalCorrupt | None = None
        """Why the last segment can be read up to `durable_offset` only, although there is more in it."""
        self.newest_ns = 0
        self.durable_offset = 0
        with os_errors("open", path):
            names = check_journal(self.storage, path)
            if META not in names:
                raise JournalCorrupt(f"{path}/{META}", 0, "the file is missing")
            self.uuid = read_meta(self.storage, path)
            if CURSORS in names:  # before the messages: no cursor passes what is not yet there
                self.cursors.update(newest_cursors(self.storage, path, self.uuid))
            self._segments = _load_log(self.storage, path, self.uuid)
            if self._segments:
                last = self._segments[-1]
                self.streams.restore(read_snapshot(self.storage, last))
                self.newest_ns = last.header.max_time_ns
                self._scan(last)

    @property
    def storage(self) -> Storage:
        return self._storage

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Without the oldest ones that a forwarder has removed since. Asks the directory, each time."""
        names = self.storage.list(self.path)
        while len(self._segments) > 1 and self._segments[0].name not in names:
            self._segments = self._segments[1:]
        return self._segments

    def index_of(self, segment: Segment) -> Index:
        if segment.next_base is None:
            return ActiveIndex(segment)  # empty: start at the segment's beginning
        return load_index(self.storage, segment, write=False)

    def batches(
        self, start: int = 0, accept: Accept | None = None, progress: Progress | None = None
    ) -> Iterator[Batch | Finding]:
        """Every batch from an offset on, in order; a Finding for each stretch of offsets that is no more.

        `progress` counts offsets here, those passed over as well.
        Raises JournalCorrupt at damage, after everything before it.
        """
        reader = Reader(self, start, accept)
        try:
            while self._segments and not reader.caught_up:
                found: list[Batch | Finding] = [*reader.read()]
                if reader.dropped:
                    found += (_no_more(self.path, first, last) for first, last in reader.dropped)
                    found.sort(key=lambda item: item.offset or 0)
                yield from found
                if progress is not None:
                    progress(reader.offset - start, self.durable_offset - start)
        finally:
            reader.close()
        if self.damage is not None:
            raise self.damage

    def oldest_ns(self) -> int | None:
        """The time of the first message, or None."""
        for segment in self.segments:
            try:
                fd = self.storage.open(segment.path)
            except FileNotFoundError:
                continue  # retention was quicker
            try:
                for limit in (min(_GLANCE_BYTES, segment.durable_end), segment.durable_end):
                    scanner = Scanner.whole(self.storage, fd, segment, limit)
                    while (batch := scanner.next()) is not None:
                        if batch.topic:  # it is no hole
                            return batch.time_ns
            finally:
                self.storage.close(fd)
        return None

    def _scan(self, segment: Segment) -> None:
        """Read the last segment to its end, for what is known from there alone."""
        fd = self.storage.open(segment.path)
        try:
            limit = segment.file_bytes
            scanner = Scanner.whole(self.storage, fd, segment, limit)
            while True:
                while (batch := scanner.next()) is not None:
                    self.streams.recover(batch)
                    self.newest_ns = max(self.newest_ns, batch.time_ns)
                end = scanner.position
                if last_byte_written(self.storage, fd, end, limit) == end:
                    break
                reason = scanner.bad or "the record is cut short"
                vouched = any(
                    header.durable_to > end
                    for header in find_headers(self.storage, fd, segment.header.salt, end + 8, limit)
                )
                if not vouched:
                    self.tail = reason
                    break
                # A forwarder may have finished it while we looked. What is vouched for by now is read anew.
                scanner = Scanner(self.storage, fd, segment.header.salt, end, scanner.next_offset, limit)
                if (batch := scanner.next()) is not None:
                    self.streams.recover(batch)
                    self.newest_ns = max(self.newest_ns, batch.time_ns)
                elif scanner.position == end:
                    self.damage = JournalCorrupt(segment.path, end, reason, scanner.next_offset)
                    break
            segment.durable_end = scanner.position
            self.durable_offset = scanner.next_offset
        finally:
            self.storage.close(fd)


def _no_more(path: str, first: int, last: int) -> Finding:
    return Finding("note", path, 0, first, f"messages {first} to {last} are no more", last - first + 1)


def check_journal(storage: Storage, path: str) -> list[str]:
    """The names in a directory. Raises JournalUnavailable if they are not those of a journal, sound or not."""
    names = storage.list(path)
    if META not in names:
        with contextlib.suppress(OSError):
            if META in storage.list(f"{path}/.."):
                raise JournalUnavailable(path, "it is a part of the journal above it: name that directory")
        if not segment_names(names):
            raise JournalUnavailable(path, "there is no journal in it")
    return names


def newest_cursors(storage: Storage, path: str, uuid: bytes) -> dict[str, Cursor]:
    """The cursors of a journal. Raises JournalCorrupt if their file is damaged before its records."""
    folder = f"{path}/{CURSORS}"
    for left in reversed(range(TRIES)):
        cursors: dict[str, Cursor] = {}
        try:
            for segment in load_segments(storage, folder, uuid)[-1:]:
                cursors.update(decode_cursors(read_snapshot(storage, segment)))
                fd = storage.open(segment.path)
                try:
                    scanner = Scanner.whole(storage, fd, segment, segment.file_bytes)
                    while (batch := scanner.next()) is not None:
                        recover_cursor(cursors, batch)
                finally:
                    storage.close(fd)
            return cursors
        except FileNotFoundError:
            if not left:
                raise
    return {}


def _load_log(storage: Storage, directory: str, uuid: bytes) -> tuple[Segment, ...]:
    """As load_segments, beside a forwarder that removes files after they were listed."""
    for _ in range(TRIES):
        try:
            return load_segments(storage, directory, uuid)
        except FileNotFoundError:
            continue
    return load_segments(storage, directory, uuid)


def info(path: str, storage: Storage | None = None) -> Info:
    """What is in a journal. Raises as View does."""
    view = View(path, storage)
    storage = view.storage
    segments = view.segments
    first_offset = segments[0].base_offset if segments else 0
    with os_errors("open", path):
        return Info(
            path=path,
            uuid=view.uuid.hex(),
            version=max((segment.header.version for segment in segments), default=FORMAT_VERSION),
            holder=in_use(storage, path),
            segments=segments,
            first_offset=first_offset,
            next_offset=view.durable_offset,
            oldest_ns=view.oldest_ns(),
            newest_ns=view.newest_ns if view.durable_offset > first_offset else None,
            bytes_used=sum(segment.file_bytes for segment in segments),
            bytes_free=storage.free_bytes(path),
            topics=_topics(view.streams),
            streams=len(view.streams.known),
            cursors=view.cursors,
            quarantined=tuple(_quarantined(storage, path)),
            tail=view.tail,
            damage=view.damage,
        )


def _topics(streams: Streams) -> dict[str, int]:
    counts: dict[str, int] = {}
    for topic, _ in streams.known:
        text = topic.decode(errors="backslashreplace")
        counts[text] = counts.get(text, 0) + 1
    return dict(sorted(counts.items()))


def _quarantined(storage: Storage, path: str) -> Iterator[tuple[str, int]]:
    for folder in (path, f"{path}/{CURSORS}"):
        if folder != path and CURSORS not in storage.list(path):
            continue
        if QUARANTINE not in storage.list(folder):
            continue
        for name in sorted(storage.list(f"{folder}/{QUARANTINE}")):
            if not name.endswith(TEMPORARY):  # what a copy left that found no room
                fd = storage.open(f"{folder}/{QUARANTINE}/{name}")
                try:
                    yield f"{folder}/{QUARANTINE}/{name}", storage.size(fd)
                finally:
                    storage.close(fd)


def dump(
    path: str, storage: Storage | None = None, *, start: int = 0, accept: Accept | None = None
) -> Iterator[Batch | Finding]:
    """Every batch, in order: see `View.batches`."""
    return View(path, storage).batches(start, accept)


def export(
    path: str,
    storage: Storage | None = None,
    *,
    start: int = 0,
    accept: Accept | None = None,
    progress: Progress | None = None,
) -> Iterator[bytes]:
    """The batches as pieces of one flat file: ( frame size u32 | external size u32 | frame | external )*, where frame
    and external are the wire's (docs/protocol.md). `progress` counts messages here. Raises as `dump` does."""
    view = View(path, storage)
    for batch in view.batches(start, accept):
        if isinstance(batch, Batch):
            external = b"" if batch.external is None else batch.external
            yield b"".join((_EXPORT.pack(len(batch.frame), len(external)), batch.frame, external))
            if progress is not None:
                progress(batch.next_offset, view.durable_offset)
