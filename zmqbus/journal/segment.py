"""One segment file: creating, scanning, recovering and appending. Knows records, not what they mean.

Policies that live here, and only here:
- A segment appears under its name only when its header is on disk; the name is on disk before a record is written.
- Scanning trusts nothing it has not checked, and stops at the first byte that does not fit.
- Torn or corrupt: a bad record at p is damage, and refused, if any later record header of the file says that the
  bytes up to beyond p were already on disk when it was written. Else it is the tail that a crash tore off, which
  nobody was promised: it is copied to `quarantine/`, and cut.
- A failed write or sync is never retried: the writer is poisoned. Only "no room" is survived, by cutting the file
  back to its last good end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

from zmqbus.errors import JournalCorrupt, JournalFailed, JournalVersion, NoSpace
from zmqbus.journal.records import (
    FORMAT_VERSION,
    HEAD_BYTES_MAX,
    MARKER,
    MARKER_AT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Batch,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
)
from zmqbus.journal.storage import Buffer, Storage, failed, out_of_space, publish_file, write_all

SUFFIX = ".zbj"
NAME_DIGITS = 20  # enough for any u64, so that names sort as offsets do
WINDOW_BYTES = 1 << 20  # how much a scan holds in memory, unless one record is larger
QUARANTINE = "quarantine"


class Segment:
    """What is known of one segment file. `durable_end` and `next_base` grow as the writer goes on."""

    __slots__ = ("base_offset", "directory", "durable_end", "file_bytes", "header", "name", "next_base", "path")

    def __init__(self, directory: str, name: str, header: SegmentHeader, file_bytes: int) -> None:
        self.directory = directory
        self.name = name
        self.path = f"{directory}/{name}"
        self.header = header
        self.base_offset = header.base_offset
        self.file_bytes = file_bytes
        self.durable_end = file_bytes
        """Bytes from here on are not to be looked at: not yet on disk, or not there."""
        self.next_base: int | None = None
        """Base offset of the following segment; None while this one is the last."""

    def __repr__(self) -> str:
        return f"Segment({self.name}, durable_end={self.durable_end}, next_base={self.next_base})"


def segment_name(base_offset: int) -> str:
    return f"{base_offset:0{NAME_DIGITS}d}{SUFFIX}"


def segment_names(names: Sequence[str]) -> list[str]:
    """Those of a directory's names that are segments, oldest first."""
    return sorted(
        name for name in names if name.endswith(SUFFIX) and len(name) == NAME_DIGITS + 4 and name[:-4].isdigit()
    )


def load_segment(storage: Storage, directory: str, name: str, uuid: bytes | None) -> Segment:
    """Read and check a segment's header. `uuid`: the journal it must belong to, or None if any will do."""
    path = f"{directory}/{name}"
    fd = storage.open(path)
    try:
        header = decode_segment_header(storage.pread(fd, SEGMENT_HEADER_BYTES, 0))
        file_bytes = storage.size(fd)
    finally:
        storage.close(fd)
    if isinstance(header, str):
        raise JournalCorrupt(path, 0, header)
    if header.version > FORMAT_VERSION:
        raise JournalVersion(path, header.version, FORMAT_VERSION)
    if uuid is not None and header.uuid != uuid:
        raise JournalCorrupt(path, 16, "this segment belongs to another journal")
    if segment_name(header.base_offset) != name:
        raise JournalCorrupt(path, 32, f"the file's name does not fit its base offset {header.base_offset}")
    return Segment(directory, name, header, file_bytes)


def load_segments(storage: Storage, directory: str, uuid: bytes) -> tuple[Segment, ...]:
    """All segments of a log, oldest first, headers checked. Their records are not looked at."""
    segments = tuple(load_segment(storage, directory, name, uuid) for name in segment_names(storage.list(directory)))
    for segment, after in pairwise(segments):
        segment.next_base = after.base_offset
    return segments


def read_snapshot(storage: Storage, segment: Segment) -> bytes:
    """The snapshot at the head of a segment, checked."""
    fd = storage.open(segment.path)
    try:
        snapshot = storage.pread(fd, segment.header.snapshot_bytes, SEGMENT_HEADER_BYTES)
    finally:
        storage.close(fd)
    if len(snapshot) != segment.header.snapshot_bytes:
        raise JournalCorrupt(segment.path, SEGMENT_HEADER_BYTES, "the snapshot is cut short", segment.base_offset)
    if crc32(snapshot, segment.header.salt) != segment.header.snapshot_crc:
        raise JournalCorrupt(
            segment.path, SEGMENT_HEADER_BYTES, "the snapshot does not fit its checksum", segment.base_offset
        )
    return snapshot


# --- scanning ------------------------------------------------------------------------------------


class Scanner:
    """Walks the records of an open segment file from a record boundary on, checking every one.

    `position` is where the next record starts and `next_offset` what its base offset must be. `accept` may name
    the topics wanted: of others only the header is read and checked. Memory: one window, or one record.
    """

    __slots__ = (
        "_accept", "_fd", "_salt", "_storage", "_view", "_window", "_window_at",
        "bad", "durable_to", "limit", "next_offset", "position", "record_at",
    )  # fmt: skip

    def __init__(
        self,
        storage: Storage,
        fd: int,
        salt: int,
        position: int,
        next_offset: int,
        limit: int,
        accept: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._storage = storage
        self._fd = fd
        self._salt = salt
        self._accept = accept
        self._window = b""
        self._view = memoryview(b"")
        self._window_at = 0
        self.position = position
        self.record_at = position
        """Where the batch that `next` returned last starts."""
        self.next_offset = next_offset
        self.limit = limit
        self.durable_to = 0
        """The highest `durable to` of any record passed so far."""
        self.bad: str | None = None
        """Why `next` stopped at `position`; None if it simply reached `limit`."""

    @classmethod
    def whole(cls, storage: Storage, fd: int, segment: Segment, limit: int) -> Scanner:
        """A scanner over all records of a segment."""
        header = segment.header
        return cls(storage, fd, header.salt, header.data_start, segment.base_offset, limit)

    def next(self, stop: int | None = None) -> Batch | None:
        """The next accepted batch (or hole), or None at `limit`, at a bad record, or when `position` >= `stop`."""
        salt, accept = self._salt, self._accept
        self.bad = None
        if stop is None or stop > self.limit:
            stop = self.limit
        while self.position < stop:
            at = self.position
            i = at - self._window_at
            if i < 0 or i + HEAD_BYTES_MAX > len(self._window):
                self._fill(at, WINDOW_BYTES)
                i = 0
            if len(self._window) - i < RECORD_HEADER_BYTES:
                return self._stop("the record is cut short")
            (
                head_crc, marker, topic_bytes, crc, size, external_bytes,
                count, base, durable_to, origin, first_seq, time_ns,
            ) = RECORD_HEADER.unpack_from(self._window, i)  # fmt: skip
            frame_at = i + RECORD_HEADER_BYTES
            payload_at = frame_at + topic_bytes + 1
            if marker != MARKER or crc32(self._view[i + MARKER_AT : payload_at], salt) != head_crc:
                return self._stop("the record header does not fit its checksum")
            if base != self.next_offset:
                return self._stop(f"the record has offset {base} where {self.next_offset} must follow")
            end = payload_at + size - i  # of the contents, relative to the record
            if at + end > self.limit:
                return self._stop("the record is cut short")
            topic = self._window[frame_at : payload_at - 1]
            wanted = accept is None or not topic or accept(topic)
            if wanted:
                if i + end > len(self._window):
                    self._fill(at, max(WINDOW_BYTES, end))
                    frame_at, payload_at, i = frame_at - i, payload_at - i, 0
                    if end > len(self._window):
                        return self._stop("the record is cut short")
                end += i
                if crc32(self._view[payload_at:end], salt) != crc:
                    return self._stop("the payload does not fit its checksum")
                end -= i
            self.position = (at + end + 7) & ~7
            self.next_offset = base + count
            if durable_to > self.durable_to:
                self.durable_to = durable_to
            if wanted and count:
                self.record_at = at
                view = self._view
                split = i + end - external_bytes
                external = view[split : i + end] if external_bytes else None
                return Batch(base, count, topic, origin, first_seq, time_ns, view[frame_at:split], external)
        return None

    def _fill(self, at: int, size: int) -> None:
        self._window = self._storage.pread(self._fd, min(size, self.limit - at), at)
        self._view = memoryview(self._window)
        self._window_at = at

    def _stop(self, reason: str) -> Batch | None:
        self.bad = reason
        return None


class FoundHeader(NamedTuple):
    """A record header met outside the chain of records."""

    position: int
    durable_to: int
    base_offset: int
    next_offset: int


def find_headers(storage: Storage, fd: int, salt: int, position: int, limit: int) -> Iterator[FoundHeader]:
    """Every intact record header in a stretch of bytes, whether or not the rest of its record is intact."""
    position = (position + 7) & ~7
    while position < limit:
        window = storage.pread(fd, min(WINDOW_BYTES + HEAD_BYTES_MAX, limit - position), position)
        if not window:
            return
        at = window.find(MARKER, MARKER_AT)
        while at != -1 and at - MARKER_AT < WINDOW_BYTES:
            start = at - MARKER_AT
            if not start & 7 and start + RECORD_HEADER_BYTES <= len(window):
                fields = RECORD_HEADER.unpack_from(window, start)
                end = start + RECORD_HEADER_BYTES + fields[2] + 1
                if end <= len(window) and crc32(window[at:end], salt) == fields[0]:
                    yield FoundHeader(position + start, fields[8], fields[7], fields[7] + fields[6])
            at = window.find(MARKER, at + 1)
        position += WINDOW_BYTES


def last_byte_written(storage: Storage, fd: int, position: int, limit: int) -> int:
    """Position after the last byte that is not zero in [position, limit); `position` if there is none."""
    end = position
    while position < limit:
        window = storage.pread(fd, min(WINDOW_BYTES, limit - position), position)
        if not window:
            break
        if kept := len(window.rstrip(b"\0")):
            end = position + kept
        position += len(window)
    return end


# --- recovery ------------------------------------------------------------------------------------


def recover_segment(
    storage: Storage, segment: Segment, file_bytes: int, on_record: Callable[[int, Batch], None]
) -> tuple[SegmentWriter, int, str | None]:
    """Make the last segment of a log good again, durable, and ready to go on with.

    Returns its writer, the next offset, and the file in quarantine if a torn tail was put there. Calls
    `on_record(position, batch)` for every batch in it. Raises JournalCorrupt when known-durable bytes are
    damaged; then nothing was changed. May be interrupted by a crash anywhere and be run again.
    """
    fd = storage.open(segment.path, write=True)
    try:
        return _recover(storage, segment, fd, max(file_bytes, 2 * segment.header.data_start), on_record)
    except BaseException:
        storage.close(fd)
        raise


def _recover(
    storage: Storage, segment: Segment, fd: int, capacity: int, on_record: Callable[[int, Batch], None]
) -> tuple[SegmentWriter, int, str | None]:
    limit = storage.size(fd)
    scanner = Scanner.whole(storage, fd, segment, limit)
    while (batch := scanner.next()) is not None:
        on_record(scanner.record_at, batch)
    end = scanner.position
    quarantined = None
    if scanner.bad is not None:
        refuse_damage(storage, segment, fd, scanner)
        written = last_byte_written(storage, fd, end, limit)
        if written > end:
            quarantined = quarantine(storage, segment.directory, segment.name, fd, end, written)
            storage.truncate(fd, end)
    try:
        storage.allocate(fd, capacity)
    except OSError as error:
        if not out_of_space(error):  # no room to reserve now: writing will say so when it comes to it
            raise
    # What no later record vouches for may live in the page cache only, on pages that the kernel counts as clean
    # since an fsync of the previous process failed. Writing it again makes the sync below mean what it says.
    rewrite(storage, fd, max(scanner.durable_to, segment.header.data_start), min(end, limit))
    storage.fsync(fd)
    segment.durable_end = end
    segment.file_bytes = max(limit, capacity)
    return SegmentWriter(storage, segment, fd, end, capacity), scanner.next_offset, quarantined


def refuse_damage(storage: Storage, segment: Segment, fd: int, scanner: Scanner) -> None:
    """Raise JournalCorrupt if the bad record at which `scanner` stopped was known to be on disk."""
    limit = storage.size(fd)
    for header in find_headers(storage, fd, segment.header.salt, scanner.position + 8, limit):
        if header.durable_to > scanner.position:
            raise JournalCorrupt(segment.path, scanner.position, scanner.bad or "", scanner.next_offset)


def quarantine(storage: Storage, directory: str, name: str, fd: int, position: int, end: int) -> str:
    """Copy a stretch of an open file to a new file in `quarantine/`, durably. Returns its path."""
    folder = f"{directory}/{QUARANTINE}"
    if QUARANTINE not in storage.list(directory):
        storage.mkdir(folder)
        storage.sync_directory(directory)
    taken = set(storage.list(folder))
    stem = copy = f"{name}.{position}"
    number = 1
    while copy in taken:
        number += 1
        copy = f"{stem}.{number}"
    windows = (
        storage.pread(fd, min(WINDOW_BYTES, end - at), at) for at in range(position, end, WINDOW_BYTES)
    )  # read one at a time, as they are written
    publish_file(storage, folder, copy, windows, durable=True)
    return f"{folder}/{copy}"


def rewrite(storage: Storage, fd: int, position: int, end: int) -> None:
    while position < end:
        data = storage.pread(fd, min(WINDOW_BYTES, end - position), position)
        if not data:
            return
        position = write_all(storage, fd, [data], position)


# --- writing -------------------------------------------------------------------------------------


def create_segment(
    storage: Storage,
    directory: str,
    *,
    uuid: bytes,
    base_offset: int,
    snapshot: bytes,
    created_ns: int,
    max_time_ns: int,
    file_bytes: int,
) -> SegmentWriter:
    """Make a new, empty segment, on disk under its name when this returns. Raises NoSpace (and leaves nothing)
    or JournalFailed. The file is preallocated to `file_bytes` beyond its header."""
    name = segment_name(base_offset)
    path = f"{directory}/{name}"
    salt = int.from_bytes(storage.random(4), "little")
    head = encode_segment_header(
        salt=salt,
        uuid=uuid,
        base_offset=base_offset,
        created_ns=created_ns,
        max_time_ns=max_time_ns,
        snapshot=snapshot,
    )
    capacity = max(file_bytes, 2 * len(head))  # as in recovery; a huge snapshot must not leave a segment without room
    fd = -1
    try:
        fd = storage.open(path + ".tmp", write=True, create=True)
        storage.truncate(fd, 0)
        storage.allocate(fd, capacity)
        write_all(storage, fd, [head], 0)
    except OSError as error:
        if fd >= 0:
            storage.close(fd)
        with contextlib.suppress(OSError):
            storage.unlink(path + ".tmp")
        if out_of_space(error):
            raise NoSpace(directory, f"no room for a new segment of {capacity:,} bytes") from error
        raise failed("create", path, error) from error
    try:
        storage.fsync(fd)
        storage.rename(path + ".tmp", path)
        storage.sync_directory(directory)
    except OSError as error:
        storage.close(fd)
        raise failed("create", path, error) from error
    header = decode_segment_header(head)
    assert isinstance(header, SegmentHeader)
    segment = Segment(directory, name, header, capacity)
    segment.durable_end = header.data_start
    return SegmentWriter(storage, segment, fd, header.data_start, capacity)


class SegmentWriter:
    """The open end of a segment. `sync` may run in another thread beside `write`; two of the same may not."""

    __slots__ = ("_fd", "_storage", "capacity", "failure", "position", "segment", "synced")

    def __init__(self, storage: Storage, segment: Segment, fd: int, position: int, capacity: int) -> None:
        self._storage = storage
        self._fd = fd
        self.segment = segment
        self.position = position
        """Where the next record goes."""
        self.synced = position
        """Bytes before this are on disk."""
        self.capacity = capacity
        self.failure: JournalFailed | None = None
        """Set once a write or sync has failed; from then on every call raises it."""

    @property
    def is_empty(self) -> bool:
        """Whether no record was written yet."""
        return self.position == self.segment.header.data_start

    def write(self, buffers: Sequence[Buffer], size: int) -> None:
        """Write `size` bytes of whole records. Raises NoSpace (nothing of them remains) or JournalFailed."""
        if self.failure is not None:
            raise self.failure
        try:
            write_all(self._storage, self._fd, buffers, self.position)
        except OSError as error:
            if not out_of_space(error):
                raise self._poison("write", error) from error
            try:
                self._storage.truncate(self._fd, self.position)
                self._storage.fsync(self._fd)
            except OSError as second:
                raise self._poison("truncate", second) from second
            raise NoSpace(self.segment.directory, error.strerror or "no space left on device") from error
        self.position += size

    def sync(self, position: int) -> None:
        """Put everything written before `position` on disk. Blocks. Raises JournalFailed, for good."""
        if self.failure is not None:
            raise self.failure
        if position <= self.synced:
            return
        try:
            self._storage.fdatasync(self._fd)
        except OSError as error:
            raise self._poison("fdatasync", error) from error
        self.synced = position

    def reserve(self) -> bool:
        """Preallocate the rest of the segment anew, after NoSpace. False when there is still no room."""
        try:
            self._storage.allocate(self._fd, self.capacity)
        except OSError as error:
            if out_of_space(error):
                return False
            raise self._poison("fallocate", error) from error
        return True

    def seal(self) -> None:
        """Give the unused part of a full, synced segment back. Losing this to a crash does no harm."""
        try:
            self._storage.truncate(self._fd, self.position)
        except OSError as error:
            raise self._poison("truncate", error) from error
        self.segment.file_bytes = self.position

    def close(self) -> None:
        if self._fd >= 0:
            self._storage.close(self._fd)
            self._fd = -1

    def _poison(self, operation: str, error: OSError) -> JournalFailed:
        self.failure = failed(operation, self.segment.path, error)
        return self.failure
