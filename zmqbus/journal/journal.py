"""The journal: accepts each stream's batches exactly once and in order, and says when they are on disk.

The life of a batch: `append` judges and queues it; `write` hands all that is queued to the kernel and returns a
ticket; `sync(ticket)` puts it on disk; `finish(ticket)` makes it readable and says what may now be acknowledged.
Nothing is acknowledged, or shown to a reader, before its fdatasync has returned.

Who may call what, and when (there is no lock in here):
- *loop calls* (`append`, `write`, `finish`, `retire`, `heads`, …): from one thread. They do not wait for the disk,
  except after an error.
- *disk calls* (`sync`, `delete`, `resume`, `commit_cursors`): block; from one thread at a time, typically one
  worker thread, beside any loop call. They decide nothing: what they changed is taken over by the next `finish`.
- readers (reader.py): each from one thread at a time, beside everything else.
`close` and `commit` are for when nothing else runs. The journal asks no clock: callers pass `now_ns`, wall time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from zlib import crc32

from zmqbus.errors import JournalError, JournalFailed, JournalUnavailable, MessageTooLarge, NoSpace
from zmqbus.journal.index import ActiveIndex, Index, encode_index, index_name, load_index, write_index
from zmqbus.journal.positions import (
    KEEP_ALL,
    U64_MAX,
    Appended,
    Commit,
    Cursor,
    Cursors,
    Head,
    Retention,
    Stream,
    Streams,
    StreamSeq,
)
from zmqbus.journal.records import PADDING, PAYLOAD_BYTES_MAX, Batch, encode_head, encode_record, record_bytes
from zmqbus.journal.segment import (
    Segment,
    SegmentWriter,
    create_segment,
    load_segments,
    read_snapshot,
    recover_segment,
)
from zmqbus.journal.storage import Buffer, Directory, Disk, Storage, failed, os_errors, remove_file

SEGMENT_BYTES = 64 << 20
INDEX_CACHE = 4  # indexes of full segments kept in memory; at 10 k streams each is some 4 MB
SEGMENT_BYTES_MIN = 1 << 10
STREAMS_MAX = 1 << 20  # what is known of a stream costs some 300 bytes, and 40 in every segment header
SEQ_MAX = 1 << 62  # leaves room to add a count


class Ticket:
    """One write's way to the disk. Others may read `synced`, `size` in bytes, and `rotate`."""

    def __init__(self, writer: SegmentWriter, next_offset: int, now_ns: int) -> None:
        self.writer = writer
        self.position = writer.position
        self.size = 0
        self.next_offset = next_offset
        self.now_ns = now_ns
        self.heads: dict[Stream, int] = {}
        self.refused: list[StreamSeq] = []
        self.rotate = False
        self.victims: list[Segment] = []
        self.successor: SegmentWriter | NoSpace | None = None
        self.synced = False


_ACCEPTED = Appended.ACCEPTED  # looking up a member takes an Enum longer than all the rest of `append`
_Pending = tuple[Stream, int, int, int, int, Sequence[Buffer], int, int]


class Journal:
    """A directory of segments with one writer. Open it with `Journal.open`."""

    def __init__(
        self, directory: Directory, now_ns: int, segment_bytes: int, retention: Retention, streams_max: int
    ) -> None:
        if retention.bytes_max is not None:  # it works in whole segments: a small journal needs small ones
            segment_bytes = min(segment_bytes, retention.bytes_max // 4)
        self._directory = directory
        self.storage = directory.storage
        self._segment_bytes = max(segment_bytes, SEGMENT_BYTES_MIN)
        self._retention = retention
        self._streams = Streams(directory.path, streams_max)
        self.known = self._streams.known
        """What is known of each stream; not to be changed."""
        self.number = int.from_bytes(directory.uuid[:8], "little") or 1
        """Of this journal, for ever, and of no other."""
        self._pending: list[_Pending] = []
        self._tickets: deque[Ticket] = deque()
        self._indexes: dict[int, Index] = {}
        self._rotating = False
        self._checkpointed = False
        self._failure: JournalError | None = None
        self.full: NoSpace | None = None
        """Why nothing is accepted at present, or None. See `resume`."""
        self.buffered_bytes = 0
        """Payload bytes appended but not written: what a caller has to bound."""
        self.quarantined: list[str] = []
        """Files into which opening the journal has put torn tails."""
        self.segments: tuple[Segment, ...] = load_segments(self.storage, directory.path, directory.uuid)
        self.durable_offset = 0
        """Messages before this offset are on disk, and may be read."""
        self._writer = self._recover(now_ns)
        try:
            self.cursors = Cursors(directory, now_ns=now_ns)
            self.cursors.check(self.segments[-1], self.durable_offset)
        except BaseException:
            self._writer.close()
            raise
        if self.cursors.quarantined is not None:
            self.quarantined.append(self.cursors.quarantined)
        self.next_offset = self._written_offset = self.durable_offset  # of the next message that is accepted

    @classmethod
    def open(
        cls,
        path: str,
        *,
        now_ns: int,
        storage: Storage | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        retention: Retention = KEEP_ALL,
        streams_max: int = STREAMS_MAX,
    ) -> Journal:
        """Open, and make if need be, the journal in a directory; recover it; hold its lock until `close`.

        Raises JournalUnavailable, JournalLocked, JournalVersion, JournalCorrupt, NoSpace or JournalFailed.
        """
        directory = Directory.acquire(storage or Disk(), path)
        try:
            with os_errors("open", path):
                return cls(directory, now_ns, segment_bytes, retention, streams_max)
        except BaseException:
            directory.release()
            raise

    # --- loop calls: the way in ------------------------------------------------------------------

    def append(
        self,
        topic: bytes,
        origin: int,
        first_seq: int,
        count: int,
        time_ns: int,
        parts: Buffer | Sequence[Buffer],
        external: Buffer | None = None,
        *,
        allow_gap: bool = False,
    ) -> Appended:
        """Judge a batch and, if it is what its stream needs next, queue it for the next `write`.

        `parts`: wire header and payload, in one or several buffers, which must not change before `write`;
        `external`: the second wire frame. Raises NoSpace while the journal is full (nothing was accepted),
        JournalFailed when it is broken, MessageTooLarge, ValueError for numbers that no stream can have.
        """
        if self._failure is not None:
            raise self._failure
        stream = self.known.get((topic, origin))
        expected = 1 if stream is None else stream.accepted + 1
        if first_seq != expected:
            if first_seq + count <= expected:
                return Appended.DUPLICATE
            if first_seq < expected:
                return Appended.OVERLAP
            if not allow_gap:
                return Appended.GAP
        if self.full is not None:
            raise self.full
        if not (0 < count <= PAYLOAD_BYTES_MAX and 0 < first_seq <= SEQ_MAX and 0 <= time_ns <= U64_MAX):
            raise ValueError(f"no batch can have first seq {first_seq}, count {count} and time {time_ns}")
        if isinstance(parts, (bytes, memoryview, bytearray)):
            parts = (parts,)
        external_bytes = 0
        if external is not None:
            parts = (*parts, external)
            external_bytes = len(external)
        size = sum(map(len, parts))
        if size > PAYLOAD_BYTES_MAX:
            raise MessageTooLarge(size, PAYLOAD_BYTES_MAX)
        if stream is None:
            stream = self._streams.add(topic, origin)
        stream.accepted = first_seq + count - 1
        self._pending.append((stream, self.next_offset, first_seq, count, time_ns, parts, size, external_bytes))
        self.next_offset += count
        self.buffered_bytes += size
        return _ACCEPTED

    def expected(self, topic: bytes, origin: int) -> int:
        """The seq that `append` would accept next from a stream."""
        return self.head(topic, origin).accepted + 1

    def head(self, topic: bytes, origin: int) -> Head:
        """How far one stream has come; zeros if nothing is known of it."""
        return self._streams.head(topic, origin)

    def heads(self, accept: Callable[[bytes], bool] | None = None) -> Iterator[Head]:
        """How far every stream (on topics that `accept` takes) has come."""
        return self._streams.heads(accept)

    def forget(self, topic: bytes, origin: int) -> bool:
        """Drop the dedup state of a stream whose publisher is known to be gone for good; its messages stay, but
        `fetch` no longer finds them. False, and nothing is forgotten, while some are on the way to the disk."""
        return self._streams.forget(topic, origin)

    def write(self, now_ns: int) -> Ticket | None:
        """Hand everything queued to the kernel, in one go; the ticket covers it once it is synced and finished.

        None when nothing is queued, or while a segment change is under way (until that ticket is finished).
        Raises JournalFailed. When there is no room, the ticket's `finish` names what was refused.
        """
        self._check()
        if self._rotating or not self._pending:
            return None
        writer, index = self._writer, self._index
        salt, durable_to, position = writer.segment.header.salt, writer.synced, writer.position
        ticket = Ticket(writer, self._written_offset, now_ns)
        heads = ticket.heads
        buffers: list[Buffer] = []
        next_offset, taken = self._written_offset, 0
        for stream, offset, first_seq, count, time_ns, parts, size, external_bytes in self._pending:
            total = record_bytes(len(stream.topic), size)
            if position + total > writer.capacity and (taken or not writer.is_empty):
                ticket.rotate = self._rotating = True
                break
            crc = salt
            for part in parts:
                crc = crc32(part, crc)
            head = encode_head(
                salt, stream.topic_nul, crc, size, external_bytes, count, offset, durable_to,
                stream.origin, first_seq, time_ns,
            )  # fmt: skip
            last_seq = first_seq + count - 1
            index.add(position, offset, stream.topic, stream.origin, first_seq, last_seq, time_ns)
            buffers.append(head)
            buffers += parts
            if padding := -(len(head) + size) & 7:
                buffers.append(PADDING[padding])
            heads[stream] = last_seq
            position += total
            next_offset = offset + count
            taken += 1
        if buffers:
            try:
                with self._watched():
                    writer.write(buffers, position - writer.position)
            except NoSpace as error:
                index.cut(writer.position)
                ticket.rotate = self._rotating = False
                heads.clear()
                ticket.refused = self._refuse(error)
            else:
                ticket.size = position - ticket.position
                ticket.position, ticket.next_offset = position, next_offset
                self._written_offset = next_offset
                self._checkpointed = False
                for stream, seq in heads.items():
                    stream.written = seq
                del self._pending[:taken]
                self.buffered_bytes = sum(item[6] for item in self._pending) if self._pending else 0
        if ticket.rotate:
            ticket.victims = self.retire(now_ns)
        self._tickets.append(ticket)
        return ticket

    def checkpoint(self, now_ns: int) -> Ticket | None:
        """Write a record that vouches for everything before it: from then on damage there cannot pass for a torn
        tail. For idle moments. None when something is queued or under way, or a checkpoint is the last record."""
        self._check()
        writer = self._writer
        if self._pending or self._tickets or self._checkpointed or writer.is_empty:
            return None
        salt = writer.segment.header.salt
        record = encode_record(salt, topic=b"", base_offset=self._written_offset, count=0, durable_to=writer.synced)
        try:
            with self._watched():
                writer.write([record], len(record))
        except NoSpace:
            return None  # it was a courtesy
        self._checkpointed = True
        ticket = Ticket(writer, self._written_offset, now_ns)
        self._tickets.append(ticket)
        return ticket

    def finish(self, ticket: Ticket) -> Commit:
        """Take over what a synced ticket (and any written before it) achieved. Only now may it be acknowledged."""
        self._check()
        if not ticket.synced or ticket not in self._tickets:
            raise RuntimeError("finish() before sync(), or twice: there is nothing to acknowledge")
        acked: dict[Stream, int] = {}
        refused: list[StreamSeq] = []
        done = None
        while done is not ticket:
            done = self._tickets.popleft()
            acked.update(done.heads)
            refused += done.refused
        ticket.writer.segment.durable_end = ticket.position
        self.durable_offset = ticket.next_offset
        for stream, seq in acked.items():
            stream.durable = seq
        if ticket.rotate:
            self._rotating = False
            if isinstance(ticket.successor, SegmentWriter):
                self._install(ticket.successor)
            else:
                refused += self._refuse(ticket.successor or NoSpace(self._directory.path, "no new segment"))
        return Commit([StreamSeq(s.topic, s.origin, seq) for s, seq in acked.items()], refused)

    def retire(self, now_ns: int) -> list[Segment]:
        """Decide which segments retention removes, and stop serving them. Hand the result to `delete`.

        Happens by itself at each change of segments; call it now and then for the sake of age, and when `full`.
        """
        room_for = self._segment_bytes if self._rotating or self.full is not None else 0
        victims = self._retention.victims(
            self.segments, self.cursors.slowest(), now_ns, room_for=room_for, full=self.full is not None
        )
        self.segments = self.segments[len(victims) :]
        return victims

    # --- disk calls ------------------------------------------------------------------------------

    def sync(self, ticket: Ticket) -> None:
        """Put on disk what a ticket covers; change segments if the ticket asks for it. Raises JournalFailed."""
        self._check()
        with self._watched():
            ticket.writer.sync(ticket.position)
            if ticket.rotate:
                self.delete(ticket.victims)
                ticket.successor = self._rotate(ticket)
        ticket.synced = True

    def delete(self, victims: Iterable[Segment]) -> None:
        """Remove what `retire` chose, oldest first, each durably before the next, so that no crash leaves a hole."""
        self._check()
        for segment in victims:
            self._indexes.pop(segment.base_offset, None)
            with self._watched("unlink", segment.path):
                remove_file(self.storage, f"{segment.directory}/{index_name(segment.name)}")
                remove_file(self.storage, segment.path)
                self.storage.sync_directory(segment.directory)

    def resume(self) -> bool:
        """After NoSpace: look whether there is room again, and if so, accept again."""
        self._check()
        if self.full is not None and not self._retention.exceeded_by(self.bytes_used + self._segment_bytes):
            with self._watched("statvfs", self._directory.path):
                if self.storage.free_bytes(self._directory.path) >= self._segment_bytes and self._writer.reserve():
                    self.full = None
        return self.full is None

    def commit_cursors(self, cursors: Mapping[str, Cursor | None]) -> None:
        """Set (or, with None, remove) named cursors: on disk when this returns. Raises NoSpace, JournalFailed,
        ValueError for an offset beyond what is on disk."""
        self._check()
        for name, cursor in cursors.items():
            if cursor is not None and not 0 <= cursor.offset <= self.durable_offset:
                raise ValueError(f"cursor {name!r} at {cursor.offset}: the journal ends at {self.durable_offset}")
        with self._watched():
            self.cursors.commit(cursors)

    # --- when nothing else runs ------------------------------------------------------------------

    def commit(self, now_ns: int) -> Commit:
        """write, sync and finish until nothing is queued. For callers without a worker thread."""
        acked: dict[tuple[bytes, int], StreamSeq] = {}
        refused: list[StreamSeq] = []
        while True:
            ticket = self.write(now_ns) or (self._tickets[-1] if self._tickets else None)
            if ticket is None:
                return Commit(list(acked.values()), refused)
            if not ticket.synced:
                self.sync(ticket)
            done = self.finish(ticket)
            acked.update((head[:2], head) for head in done.acked)
            refused += done.refused

    def close(self, now_ns: int) -> None:
        """Commit what is queued, vouch for all of it, let go of the lock. A failed journal is only let go of."""
        try:
            if self._failure is None:
                self.commit(now_ns)
                if self.checkpoint(now_ns) is not None:
                    self.commit(now_ns)
        finally:
            self._failure = self._failure or JournalUnavailable(self._directory.path, "it has been closed")
            self._writer.close()
            self.cursors.close()
            self._directory.release()

    # --- facts -----------------------------------------------------------------------------------

    @property
    def first_offset(self) -> int:
        """Offset of the oldest message still kept."""
        return self.segments[0].base_offset

    @property
    def bytes_used(self) -> int:
        """Bytes of all segments, preallocated ones included."""
        return sum(segment.file_bytes for segment in self.segments)

    def index_of(self, segment: Segment) -> Index:
        """The index of a segment, from a small cache. Raises JournalCorrupt, OSError."""
        if (index := self._indexes.get(segment.base_offset)) is None:
            self._keep_index(segment, index := load_index(self.storage, segment))
        return index

    # --- inside ----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _watched(self, operation: str = "", path: str = "") -> Iterator[None]:
        """A failure in here is for good."""
        try:
            yield
        except JournalFailed as error:
            self._failure = error
            raise
        except OSError as error:
            self._failure = failed(operation, path, error)
            raise self._failure from error

    def _refuse(self, reason: NoSpace) -> list[StreamSeq]:
        """Drop what is queued but not written, as if it had never been accepted."""
        self.full = reason
        refused = self._streams.refuse(item[0] for item in self._pending)
        self._pending.clear()
        self.buffered_bytes = 0
        self.next_offset = self._written_offset
        return refused

    def _rotate(self, ticket: Ticket) -> SegmentWriter | NoSpace:
        """Begin a new segment: the old one is on disk as a whole, which the new one's existence will vouch for."""
        writer, old = ticket.writer, ticket.writer.segment
        if self._retention.exceeded_by(self.bytes_used + self._segment_bytes):
            return NoSpace(self._directory.path, f"its limit is {self._retention.bytes_max:,} bytes")
        try:
            successor = self._create(ticket.next_offset, ticket.now_ns, self._index.max_time_ns)
        except NoSpace as error:
            return error
        writer.seal()
        write_index(self.storage, old, encode_index(self._index, old, ticket.next_offset))
        return successor

    def _create(self, base_offset: int, now_ns: int, max_time_ns: int) -> SegmentWriter:
        return create_segment(
            self.storage,
            self._directory.path,
            uuid=self._directory.uuid,
            base_offset=base_offset,
            snapshot=self._streams.snapshot(),
            created_ns=now_ns,
            max_time_ns=max_time_ns,
            file_bytes=self._segment_bytes,
        )

    def _keep_index(self, segment: Segment, index: Index) -> None:
        """Cache an index, and forget older ones, but never the active segment's."""
        self._indexes[segment.base_offset] = index
        for base in list(self._indexes)[:-INDEX_CACHE]:
            if base != self._writer.segment.base_offset:
                self._indexes.pop(base, None)

    def _install(self, writer: SegmentWriter) -> None:
        self._writer.segment.next_base = writer.segment.base_offset
        self._writer.close()
        self._writer = writer
        self._index = ActiveIndex(writer.segment)
        self._keep_index(writer.segment, self._index)
        self.segments = (*self.segments, writer.segment)

    def _recover(self, now_ns: int) -> SegmentWriter:
        """Take up the last segment where it ends, or make the first."""
        if not self.segments:
            writer = self._create(0, now_ns, 0)
            self.segments = (writer.segment,)
            self._index = self._indexes[0] = ActiveIndex(writer.segment)
            return writer
        segment = self.segments[-1]
        self._streams.restore(read_snapshot(self.storage, segment))
        index = self._index = self._indexes[segment.base_offset] = ActiveIndex(segment)

        def on_record(position: int, batch: Batch) -> None:
            index.add_batch(position, batch)
            self._streams.recover(batch)

        writer, self.durable_offset, torn = recover_segment(self.storage, segment, self._segment_bytes, on_record)
        if torn is not None:
            self.quarantined.append(torn)
        return writer
