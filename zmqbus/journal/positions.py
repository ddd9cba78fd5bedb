"""How far everyone has come: streams on their way in, cursors on their way out; and so, what may be removed.

`Streams` is the dedup state, in memory only: it lives on disk as the records and snapshots it is rebuilt from.
`Cursors` are named offsets, each with a little data of its owner's; they live in `cursors/`, a log of the same format
as the messages' (segment.py): record topic = name, first seq = offset, payload = data; snapshot = all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from zmqbus.errors import JournalCorrupt, JournalFailed, NoSpace
from zmqbus.journal.records import TOPIC_BYTES_MAX, Batch, decode_heads, encode_heads, encode_record
from zmqbus.journal.segment import (
    Segment,
    SegmentWriter,
    create_segment,
    load_segments,
    read_snapshot,
    recover_segment,
)
from zmqbus.journal.storage import TEMPORARY, Directory, failed, remove_file

U64_MAX = (1 << 64) - 1


class Appended(Enum):
    """What became of a batch that was handed to `Journal.append`."""

    ACCEPTED = "accepted"
    """In order: queued. It may be acknowledged once a `finish` names its stream with this seq or a later one."""
    DUPLICATE = "duplicate"
    """All of it was accepted before. Dropped; acknowledge what `head` calls durable."""
    OVERLAP = "overlap"
    """Its beginning was accepted before, its end not. Dropped: hand over the part from `expected` on."""
    GAP = "gap"
    """Earlier messages are missing. Dropped: fetch from `expected` on; if they are lost, append with `allow_gap`."""


class StreamSeq(NamedTuple):
    """A stream and a seq of it."""

    topic: bytes
    origin: int
    seq: int


class Head(NamedTuple):
    """How far a stream has come: the last seq accepted, and the last seq on disk (0: none)."""

    topic: bytes
    origin: int
    accepted: int
    durable: int


class Commit(NamedTuple):
    """What a finished ticket means for the publishers."""

    acked: list[StreamSeq]
    """Per stream: everything up to and including this seq is on disk."""
    refused: list[StreamSeq]
    """Per stream: accepted batches from this seq on were dropped, for there is no room. They must be sent again."""


class Stream:
    """accepted >= written >= durable; each step is a call: append, write, finish."""

    __slots__ = ("accepted", "durable", "origin", "topic", "topic_nul", "written")

    def __init__(self, topic: bytes, origin: int, seq: int) -> None:
        self.topic = topic
        self.topic_nul = topic + b"\0"
        self.origin = origin
        self.accepted = self.written = self.durable = seq


class Streams:
    """The last seqs of every stream, which is all it takes to accept each message once and in order."""

    def __init__(self, directory: str, streams_max: int) -> None:
        self.known: dict[tuple[bytes, int], Stream] = {}
        self._directory = directory
        self._streams_max = streams_max

    def add(self, topic: bytes, origin: int) -> Stream:
        """A stream that was not known. Raises NoSpace when there are too many, ValueError."""
        if not 0 < len(topic) <= TOPIC_BYTES_MAX or b"\0" in topic or not 0 <= origin <= U64_MAX:
            raise ValueError(f"no stream can have topic {topic!r} and origin {origin}")
        if len(self.known) >= self._streams_max:
            raise NoSpace(self._directory, f"it keeps track of {self._streams_max:,} streams already")
        stream = self.known[bytes(topic), origin] = Stream(bytes(topic), origin, 0)
        return stream

    def head(self, topic: bytes, origin: int) -> Head:
        stream = self.known.get((topic, origin))
        if stream is None:
            return Head(topic, origin, 0, 0)
        return Head(topic, origin, stream.accepted, stream.durable)

    def heads(self, accept: Callable[[bytes], bool] | None) -> Iterator[Head]:
        for stream in list(self.known.values()):
            if accept is None or accept(stream.topic):
                yield Head(stream.topic, stream.origin, stream.accepted, stream.durable)

    def forget(self, topic: bytes, origin: int) -> bool:
        stream = self.known.get((topic, origin))
        if stream is None or stream.accepted != stream.durable:
            return False
        del self.known[topic, origin]
        return True

    def refuse(self, streams: Iterable[Stream]) -> list[StreamSeq]:
        """Take back what was accepted but not written, as if it had never come. Returns the seqs expected anew."""
        refused: list[StreamSeq] = []
        for stream in dict.fromkeys(streams):
            stream.accepted = stream.written
            refused.append(StreamSeq(stream.topic, stream.origin, stream.written + 1))
            if not stream.written:
                del self.known[stream.topic, stream.origin]
        return refused

    def snapshot(self) -> bytes:
        """For a segment header. Safe beside `append`: copying the dict is one C call, and `written` stands still."""
        return encode_heads((s.topic, s.origin, s.written) for s in list(self.known.values()) if s.written)

    def restore(self, snapshot: bytes) -> None:
        for topic, origin, seq in decode_heads(snapshot):
            self.known[topic, origin] = Stream(topic, origin, seq)

    def recover(self, batch: Batch) -> None:
        """Learn from a record found at recovery."""
        if not batch.topic:
            return  # a hole: whose messages they were is not known
        stream = self.known.get((batch.topic, batch.origin))
        if stream is None:
            self.known[batch.topic, batch.origin] = Stream(batch.topic, batch.origin, batch.last_seq)
        else:
            stream.accepted = stream.written = stream.durable = batch.last_seq


# --- cursors -------------------------------------------------------------------------------------

CURSORS = "cursors"
CURSOR_FILE_BYTES = 256 << 10  # preallocated: cursors can be committed, and so space be freed, on a full disk
CURSOR_DATA_BYTES_MAX = 64 << 10
CURSORS_MAX = 10_000
_REMOVED = U64_MAX  # an offset that no message can have
_ENTRY = struct.Struct("<QI")


class Cursor(NamedTuple):
    """A named reader's position: the offset it reads next, and what else its owner wants kept with it."""

    offset: int
    data: bytes = b""


class Cursors:
    """The named cursors of a journal, and their file. `commit` is a disk call; reading may be done beside it."""

    def __init__(self, directory: Directory, *, now_ns: int) -> None:
        self._storage = storage = directory.storage
        self._uuid = directory.uuid
        self._path = f"{directory.path}/{CURSORS}"
        self._cursors: dict[str, Cursor] = {}
        self._now_ns = now_ns
        self.quarantined: str | None = None
        if CURSORS not in storage.list(directory.path):
            storage.mkdir(self._path)
        storage.sync_directory(directory.path)
        for name in storage.list(self._path):
            if name.endswith(TEMPORARY):
                remove_file(storage, f"{self._path}/{name}")
        storage.sync_directory(self._path)
        segments = load_segments(storage, self._path, self._uuid)
        if not segments:
            self._count = 0
            self._writer = self._create(0, {})
            return
        self._cursors = dict(decode_cursors(read_snapshot(storage, segments[-1])))
        self._writer, self._count, self.quarantined = recover_segment(
            storage, segments[-1], CURSOR_FILE_BYTES, lambda _, batch: recover_cursor(self._cursors, batch)
        )
        for segment in segments[:-1]:  # a newer one holds a snapshot of all that they hold
            remove_file(storage, segment.path)
        storage.sync_directory(self._path)

    def all(self) -> Mapping[str, Cursor]:
        """Every cursor by name, as committed. The mapping is replaced, never changed."""
        return self._cursors

    def slowest(self) -> int:
        """The smallest offset any cursor is at; beyond every message if there are none."""
        return min((cursor.offset for cursor in self._cursors.values()), default=U64_MAX)

    def check(self, last: Segment, end: int) -> None:
        """Raise JournalCorrupt if a cursor stands beyond the end: then messages that were on disk are gone."""
        for name, cursor in self._cursors.items():
            if cursor.offset > end:
                reason = f"messages that cursor {name!r} has passed are gone (it is at {cursor.offset})"
                raise JournalCorrupt(last.path, last.durable_end, reason, end)

    def commit(self, changes: Mapping[str, Cursor | None]) -> None:
        """Set cursors, or remove those given as None; on disk when this returns. Raises NoSpace, JournalFailed."""
        if self._writer.failure is not None:
            raise self._writer.failure
        after = dict(self._cursors)
        records: list[bytes] = []
        for name, cursor in changes.items():
            _check_cursor(name, cursor)
            if cursor is None:
                after.pop(name, None)
            else:
                after[name] = cursor
            records.append(self._encode(name, cursor, self._count + len(records)))
        if len(after) > CURSORS_MAX:
            raise NoSpace(self._path, f"it keeps {CURSORS_MAX:,} cursors already: remove those out of use")
        size = sum(map(len, records))
        if self._writer.position + size > self._writer.capacity:
            self._rotate(after)
        else:
            self._writer.write(records, size)
            self._count += len(records)
            self._writer.sync(self._writer.position)
        self._cursors = after

    def close(self) -> None:
        self._writer.close()

    def _encode(self, name: str, cursor: Cursor | None, count: int) -> bytes:
        return encode_record(
            self._writer.segment.header.salt,
            topic=name.encode(),
            base_offset=count,
            count=1,
            durable_to=self._writer.synced,
            first_seq=_REMOVED if cursor is None else cursor.offset,
            payload=(b"" if cursor is None else cursor.data,),
        )

    def _rotate(self, cursors: Mapping[str, Cursor]) -> None:
        """Begin a new file whose snapshot is the state to be committed; then the old one is of no more use."""
        old = self._writer
        try:
            self._writer = self._create(self._count + 1, cursors)
            self._count += 1
            old.close()
            remove_file(self._storage, old.segment.path)
            self._storage.sync_directory(self._path)
        except JournalFailed as error:
            old.failure = error
            raise
        except OSError as error:
            self._writer.failure = failed("unlink", old.segment.path, error)
            raise self._writer.failure from error

    def _create(self, base_offset: int, cursors: Mapping[str, Cursor]) -> SegmentWriter:
        return create_segment(
            self._storage,
            self._path,
            uuid=self._uuid,
            base_offset=base_offset,
            snapshot=encode_cursors(cursors),
            created_ns=self._now_ns,
            max_time_ns=0,
            file_bytes=CURSOR_FILE_BYTES,
        )


class Retention(NamedTuple):
    """What may be removed. Only whole, full segments, oldest first, and never what a cursor has not passed unless
    `drop_oldest`. With `bytes_max` reached and nothing to remove, the journal accepts nothing more."""

    bytes_max: int | None = None
    """Bound of all segments together, in bytes."""
    age_max_ns: int | None = None
    """How long a segment is kept after it was full."""
    drop_oldest: bool = False

    def exceeded_by(self, size: int) -> bool:
        return self.bytes_max is not None and size > self.bytes_max

    def victims(
        self, segments: Sequence[Segment], slowest: int, now_ns: int, *, room_for: int, full: bool
    ) -> list[Segment]:
        """The segments to remove, oldest first. `slowest`: where the slowest cursor is; `room_for`: bytes about to
        be needed; `full`: the disk is, so that the oldest must go if anything may."""
        total = sum(segment.file_bytes for segment in segments) + room_for
        victims: list[Segment] = []
        for segment, after in pairwise(segments):
            over = self.exceeded_by(total) or (full and self.drop_oldest and not victims)
            old = self.age_max_ns is not None and after.header.created_ns < now_ns - self.age_max_ns
            if not (over or old) or (after.base_offset > slowest and not self.drop_oldest):
                break
            victims.append(segment)
            total -= segment.file_bytes
        return victims


KEEP_ALL = Retention()


def _check_cursor(name: str, cursor: Cursor | None) -> None:
    encoded = name.encode()
    if not 0 < len(encoded) <= TOPIC_BYTES_MAX or b"\0" in encoded:
        raise ValueError(f"bad cursor name {name!r}: 1 to {TOPIC_BYTES_MAX} bytes of UTF-8 without NUL")
    if cursor is not None and not (0 <= cursor.offset < _REMOVED and len(cursor.data) <= CURSOR_DATA_BYTES_MAX):
        raise ValueError(f"cursor {name!r}: bad offset {cursor.offset}, or more than {CURSOR_DATA_BYTES_MAX:,} bytes")


def recover_cursor(cursors: dict[str, Cursor], batch: Batch) -> None:
    """Repeat one commit found in the cursors' file."""
    name = batch.topic.decode()
    if batch.first_seq == _REMOVED:
        cursors.pop(name, None)
    elif name:
        cursors[name] = Cursor(batch.first_seq, bytes(batch.payload))


def encode_cursors(cursors: Mapping[str, Cursor]) -> bytes:
    """( name size u8 | name | offset u64 | data size u32 | data )*"""
    parts: list[bytes] = []
    for name, cursor in cursors.items():
        encoded = name.encode()
        parts += (
            len(encoded).to_bytes(1, "little"),
            encoded,
            _ENTRY.pack(cursor.offset, len(cursor.data)),
            cursor.data,
        )
    return b"".join(parts)


def decode_cursors(snapshot: bytes) -> Iterator[tuple[str, Cursor]]:
    at = 0
    while at < len(snapshot):
        end = at + 1 + snapshot[at]
        offset, size = _ENTRY.unpack_from(snapshot, end)
        data = end + _ENTRY.size
        yield snapshot[at + 1 : end].decode(), Cursor(offset, snapshot[data : data + size])
        at = data + size
