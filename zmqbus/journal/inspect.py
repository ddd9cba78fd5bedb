"""For an operator at 3 a.m.: what is in a journal directory, is it sound, and how to make it so again.

`info`, `verify`, `dump` and `export` only read, take no lock, and may be run beside a working forwarder: what it is
just writing is then reported as an unfinished tail. `repair` takes the lock. It never destroys: each file it replaces
is copied to `quarantine/` first, and every message it has to give up is declared lost, by offset, with a hole record.
Long work reports to `progress(done, total)`.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Literal, NamedTuple

from zmqbus.errors import JournalCorrupt, JournalUnavailable
from zmqbus.journal.index import ActiveIndex, Index, index_identity, index_name, load_index
from zmqbus.journal.positions import CURSORS, Cursor, Streams, decode_cursors, encode_cursors, recover_cursor
from zmqbus.journal.reader import Accept, Reader
from zmqbus.journal.records import (
    Batch,
    SegmentHeader,
    decode_segment_header,
    encode_record,
    encode_segment_header,
)
from zmqbus.journal.segment import (
    QUARANTINE,
    Scanner,
    Segment,
    find_headers,
    last_byte_written,
    load_segment,
    load_segments,
    quarantine,
    read_snapshot,
    segment_name,
    segment_names,
)
from zmqbus.journal.storage import (
    META,
    Directory,
    Disk,
    Storage,
    encode_meta,
    os_errors,
    publish_file,
    read_file,
    read_meta,
    remove_file,
)

Progress = Callable[[int, int], None]
_EXPORT = struct.Struct("<II")


class Finding(NamedTuple):
    """One thing `verify` noticed or `repair` did."""

    kind: Literal["damage", "torn", "note", "repaired"]
    path: str
    position: int
    offset: int | None
    text: str

    def __str__(self) -> str:
        at = "" if self.offset is None else f", message offset {self.offset}"
        return f"{self.kind}: {self.path} at byte {self.position}{at}: {self.text}"


class Info(NamedTuple):
    """What a journal holds, from its headers and its last segment alone."""

    path: str
    uuid: str
    segments: tuple[Segment, ...]
    first_offset: int
    next_offset: int
    bytes_used: int
    streams: int
    cursors: dict[str, Cursor]
    quarantined: tuple[str, ...]


class View:
    """A journal directory opened for reading only, as it is at this moment. It is a `Log` for Reader and fetch."""

    def __init__(self, path: str, storage: Storage | None = None) -> None:
        self.path = path
        self._storage = storage or Disk()
        self.streams = Streams(path, 1 << 62)
        self.cursors: dict[str, Cursor] = {}
        self.tail: str | None = None
        """What stands after the last good record; None if nothing does."""
        with os_errors("open", path):
            if META not in self.storage.list(path):
                raise JournalUnavailable(path, "there is no journal in it")
            self.uuid = read_meta(self.storage, path)
            self.segments = load_segments(self.storage, path, self.uuid)
            self.durable_offset = 0
            if self.segments:
                self.streams.restore(read_snapshot(self.storage, self.segments[-1]))
                self.durable_offset, self.tail = self._scan_last(self.segments[-1], self.streams.recover)
            with contextlib.suppress(FileNotFoundError):
                if logs := load_segments(self.storage, f"{path}/{CURSORS}", self.uuid):
                    self.cursors.update(decode_cursors(read_snapshot(self.storage, logs[-1])))
                    self._scan_last(logs[-1], lambda batch: recover_cursor(self.cursors, batch))

    @property
    def storage(self) -> Storage:
        return self._storage

    def index_of(self, segment: Segment) -> Index:
        if segment.next_base is None:
            return ActiveIndex(segment)  # empty: start at the segment's beginning
        return load_index(self.storage, segment, write=False)

    def _scan_last(self, segment: Segment, on_batch: Callable[[Batch], None]) -> tuple[int, str | None]:
        fd = self.storage.open(segment.path)
        try:
            scanner = Scanner.whole(self.storage, fd, segment, segment.file_bytes)
            while (batch := scanner.next()) is not None:
                on_batch(batch)
            segment.durable_end = scanner.position
            if last_byte_written(self.storage, fd, scanner.position, segment.file_bytes) == scanner.position:
                return scanner.next_offset, None
            return scanner.next_offset, scanner.bad
        finally:
            self.storage.close(fd)


def info(path: str, storage: Storage | None = None) -> Info:
    """What is in a journal. Raises what opening it for work would raise, except that it does not mind the lock."""
    view = View(path, storage)
    quarantined: tuple[str, ...] = ()
    if QUARANTINE in view.storage.list(path):
        quarantined = tuple(sorted(view.storage.list(f"{path}/{QUARANTINE}")))
    return Info(
        path=path,
        uuid=view.uuid.hex(),
        segments=view.segments,
        first_offset=view.segments[0].base_offset if view.segments else 0,
        next_offset=view.durable_offset,
        bytes_used=sum(segment.file_bytes for segment in view.segments),
        streams=len(view.streams.known),
        cursors=view.cursors,
        quarantined=quarantined,
    )


def dump(
    path: str, storage: Storage | None = None, *, start: int = 0, accept: Accept | None = None
) -> Iterator[Batch | Finding]:
    """Every batch from an offset on, in order; a Finding for each stretch of offsets that is no more.

    Raises JournalCorrupt at damage, after everything before it.
    """
    view = View(path, storage)
    reader = Reader(view, start, accept)
    try:
        while view.segments and not reader.caught_up:
            batches = reader.read()
            for first, last in reader.dropped:
                yield Finding("note", path, 0, first, f"messages {first} to {last} are no more")
            yield from batches
    finally:
        reader.close()


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
    end = View(path, storage).durable_offset
    for batch in dump(path, storage, start=start, accept=accept):
        if isinstance(batch, Batch):
            external = b"" if batch.external is None else batch.external
            yield b"".join((_EXPORT.pack(len(batch.frame), len(external)), batch.frame, external))
            if progress is not None:
                progress(batch.next_offset, max(end, batch.next_offset))


# --- verify --------------------------------------------------------------------------------------


def verify(path: str, storage: Storage | None = None, progress: Progress | None = None) -> Iterator[Finding]:
    """Check every byte that matters. Yields nothing for a sound journal. Does not stop at the first damage."""
    storage = storage or Disk()
    with os_errors("verify", path):
        try:
            uuid: bytes | None = read_meta(storage, path)
        except JournalCorrupt as error:
            yield _finding(error)
            uuid = None
        except FileNotFoundError:
            yield Finding("damage", f"{path}/{META}", 0, None, "the file is missing")
            uuid = None
        end = None
        for directory in (path, f"{path}/{CURSORS}"):
            with contextlib.suppress(FileNotFoundError):
                names = segment_names(storage.list(directory))
                for number, name in enumerate(names):
                    following = int(names[number + 1][:-4]) if number + 1 < len(names) else None
                    if directory != path and following is not None:
                        continue  # an older cursor file, about to be removed
                    if progress is not None:
                        progress(number, len(names))
                    salvage = Salvage(storage, directory, name, uuid, following)
                    yield from salvage.findings
                    if directory == path:
                        end = salvage.next_offset
                    else:
                        for cursor, (offset, _) in _cursors_of(salvage).items():
                            if end is not None and offset > end:
                                text = f"messages that cursor {cursor!r} has passed are gone (it is at {offset})"
                                yield Finding("damage", salvage.path, 0, end, text)
        if progress is not None:
            progress(1, 1)


class Salvage:
    """Everything that is still good in one segment file, whatever state it is in. Reads it twice, changes nothing."""

    def __init__(self, storage: Storage, directory: str, name: str, uuid: bytes | None, following: int | None) -> None:
        self.storage = storage
        self.path = f"{directory}/{name}"
        self.findings: list[Finding] = []
        self.segment: Segment | None = None
        self.snapshot: bytes | None = None
        self.next_offset = self.base_offset = int(name[:-4])
        self._following = following
        try:
            self.segment = load_segment(storage, directory, name, uuid)
            self.segment.next_base = following
            self.snapshot = read_snapshot(storage, self.segment)
        except JournalCorrupt as error:
            self.findings.append(_finding(error))
            if self.segment is None:
                self.segment = self._from_index(directory, name)
        if self.segment is not None:
            for _ in self.batches(self.findings):
                pass

    def _from_index(self, directory: str, name: str) -> Segment | None:
        """A stand-in for a destroyed header: the index file repeats the salt, without which no record can be read."""
        with contextlib.suppress(OSError):
            data = read_file(self.storage, f"{directory}/{index_name(name)}")
            if (found := index_identity(data)) is not None and found.base_offset == self.base_offset:
                fd = self.storage.open(self.path)
                try:
                    segment = Segment(directory, name, found, self.storage.size(fd))
                finally:
                    self.storage.close(fd)
                segment.next_base = self._following
                return segment
        return None

    @property
    def damaged(self) -> bool:
        return any(finding.kind == "damage" for finding in self.findings)

    def batches(self, findings: list[Finding] | None = None) -> Iterator[Batch | int]:
        """The good batches in order, and for what lies destroyed between them the number of messages lost."""
        if self.segment is None:
            # Without the header there is no salt, and no record can be told from noise. No offset may be used twice:
            # a message takes a byte or more, so there were no more messages than bytes.
            end = self._following
            fd = self.storage.open(self.path)
            try:
                yield (end - self.base_offset) if end is not None else self.storage.size(fd)
            finally:
                self.storage.close(fd)
            return
        fd = self.storage.open(self.path)
        try:
            yield from self._batches(fd, self.segment, findings if findings is not None else [])
        finally:
            self.storage.close(fd)

    def _batches(self, fd: int, segment: Segment, findings: list[Finding]) -> Iterator[Batch | int]:
        scanner = Scanner.whole(self.storage, fd, segment, segment.file_bytes)
        salt, limit, following = segment.header.salt, segment.file_bytes, self._following
        while True:
            while (following is None or scanner.next_offset < following) and (batch := scanner.next()) is not None:
                yield batch
            bad, expected = scanner.position, scanner.next_offset
            self.next_offset = expected
            written = last_byte_written(self.storage, fd, bad, limit)
            if expected == following or (following is None and written == bad):
                return
            proof, lost_to, resumed = following is not None, following or expected, False
            for header in find_headers(self.storage, fd, salt, bad + 8, limit):
                proof = proof or header.durable_to > bad
                if not resumed:
                    lost_to = max(lost_to, header.next_offset)
                again = Scanner(self.storage, fd, salt, header.position, header.base_offset, limit)
                if not resumed and header.base_offset >= expected and (batch := again.next()) is not None:
                    scanner, lost_to, resumed = again, batch.offset, True
                if resumed and proof:
                    break
            reason = scanner.bad if not resumed else "records are destroyed"
            if not proof:
                findings.append(Finding("torn", segment.path, bad, expected, "an unfinished tail, never acknowledged"))
                return
            text = reason or "the segment ends before its last message"
            findings.append(Finding("damage", segment.path, bad, expected, f"{text}; {lost_to - expected} lost"))
            if lost_to > expected:
                yield lost_to - expected
            self.next_offset = lost_to
            if not resumed:
                return
            assert batch is not None
            yield batch


def _cursors_of(salvage: Salvage) -> dict[str, Cursor]:
    cursors = dict(decode_cursors(salvage.snapshot or b""))
    for batch in salvage.batches():
        if isinstance(batch, Batch):
            recover_cursor(cursors, batch)
    return cursors


# --- repair --------------------------------------------------------------------------------------


def repair(
    path: str, storage: Storage | None = None, *, now_ns: int, progress: Progress | None = None
) -> Iterator[Finding]:
    """Make a damaged journal usable: keep every good record, declare the rest lost. Yields what was found and done.

    Torn tails are left to the next start, which knows what to do with them. Raises JournalLocked while in use.
    """
    storage = storage or Disk()
    with os_errors("repair", path):
        yield from _repair_meta(storage, path)
    directory = Directory.acquire(storage, path, create=False)
    try:
        with os_errors("repair", path):
            yield from _repair_segments(directory, now_ns, progress)
    finally:
        directory.release()


def _repair_meta(storage: Storage, path: str) -> Iterator[Finding]:
    """The identity is in every segment's header too."""
    try:
        read_meta(storage, path)
        return
    except FileNotFoundError:
        pass
    except JournalCorrupt:
        _quarantine_file(storage, path, META)
    uuids = set()
    for name in segment_names(storage.list(path)):
        with contextlib.suppress(JournalCorrupt):
            uuids.add(load_segment(storage, path, name, None).header.uuid)
    if len(uuids) != 1:
        raise JournalUnavailable(path, f"{META} is unusable and its segments name {len(uuids)} journals, not one")
    publish_file(storage, path, META, [encode_meta(uuids.pop())], durable=True)
    yield Finding("repaired", f"{path}/{META}", 0, None, "written anew from the segments' headers")


def _repair_segments(directory: Directory, now_ns: int, progress: Progress | None) -> Iterator[Finding]:
    storage, path = directory.storage, directory.path
    cursors: dict[str, Cursor] = {}
    with contextlib.suppress(FileNotFoundError):
        cursors = yield from _repair_cursors(directory, now_ns)
    names = segment_names(storage.list(path))
    streams = Streams(path, 1 << 62)
    max_time_ns = 0
    for number, name in enumerate(names):
        if progress is not None:
            progress(number, len(names))
        following = int(names[number + 1][:-4]) if number + 1 < len(names) else None
        salvage = Salvage(storage, path, name, directory.uuid, following)
        if salvage.snapshot is not None and salvage.segment is not None:
            streams.known.clear()
            streams.restore(salvage.snapshot)
            max_time_ns = max(max_time_ns, salvage.segment.header.max_time_ns)
        beyond = 0  # cursors stand on messages which are gone without a trace: no offset may be used twice
        if following is None and cursors:
            beyond = max(0, max(cursor.offset for cursor in cursors.values()) - salvage.next_offset)
        if salvage.damaged or beyond:
            yield from salvage.findings
            created_ns = salvage.segment.header.created_ns if salvage.segment is not None else now_ns
            head = _encode_header(directory, salvage.base_offset, streams.snapshot(), created_ns, max_time_ns)
            _quarantine_file(storage, path, name)
            publish_file(storage, path, name, _rewritten(head, salvage, beyond), durable=True)
            remove_file(storage, f"{path}/{index_name(name)}")
            yield Finding("repaired", salvage.path, 0, None, "good records kept, the rest declared lost")
            salvage = Salvage(storage, path, name, directory.uuid, following)
        for batch in salvage.batches():
            if isinstance(batch, Batch):
                streams.recover(batch)
                max_time_ns = max(max_time_ns, batch.time_ns)
    if progress is not None:
        progress(len(names), len(names))


def _repair_cursors(directory: Directory, now_ns: int) -> Generator[Finding, None, dict[str, Cursor]]:
    """Cursors whose last commits are destroyed stand further back: some messages will be delivered again."""
    storage, folder = directory.storage, f"{directory.path}/{CURSORS}"
    cursors: dict[str, Cursor] = {}
    for name in segment_names(storage.list(folder))[-1:]:
        salvage = Salvage(storage, folder, name, directory.uuid, None)
        cursors = _cursors_of(salvage)
        if salvage.damaged:
            yield from salvage.findings
            base_offset = salvage.next_offset + 1
            head = _encode_header(directory, base_offset, encode_cursors(cursors), now_ns, 0)
            _quarantine_file(storage, folder, name)
            publish_file(storage, folder, segment_name(base_offset), [head], durable=True)
            remove_file(storage, salvage.path)
            storage.sync_directory(folder)
            yield Finding("repaired", salvage.path, 0, None, f"written anew with {len(cursors)} cursors")
    return cursors


def _encode_header(directory: Directory, base_offset: int, snapshot: bytes, created_ns: int, max_time_ns: int) -> bytes:
    return encode_segment_header(
        salt=int.from_bytes(directory.storage.random(4), "little"),
        uuid=directory.uuid,
        base_offset=base_offset,
        created_ns=created_ns,
        max_time_ns=max_time_ns,
        snapshot=snapshot,
    )


def _rewritten(head: bytes, salvage: Salvage, beyond: int) -> Iterator[bytes]:
    """A whole segment file from what could be saved. It is synced before it appears, so every record may say that
    all before it was on disk."""
    header = decode_segment_header(head)
    assert isinstance(header, SegmentHeader)
    yield head
    position, offset = len(head), salvage.base_offset
    for item in chain(salvage.batches(), [beyond] if beyond else []):
        if isinstance(item, int):
            item = Batch(offset, item, b"", 0, 0, 0, memoryview(b"\0"))
        record = encode_record(
            header.salt,
            topic=item.topic,
            base_offset=item.offset,
            count=item.count,
            durable_to=position,
            origin=item.origin,
            first_seq=item.first_seq,
            time_ns=item.time_ns,
            payload=(item.payload,) if item.external is None else (item.payload, item.external),
            external_bytes=0 if item.external is None else len(item.external),
        )
        yield record
        position += len(record)
        offset = item.next_offset


def _quarantine_file(storage: Storage, directory: str, name: str) -> str:
    fd = storage.open(f"{directory}/{name}")
    try:
        return quarantine(storage, directory, name, fd, 0, storage.size(fd))
    finally:
        storage.close(fd)


def _finding(error: JournalCorrupt) -> Finding:
    return Finding("damage", error.path, error.position, error.offset, error.reason)
