"""Where things are within a segment: by offset, by time, by topic, by stream. Disposable, rebuilt on any mismatch.

An index answers "start scanning here" and "do not bother with this segment". It may claim too much (a topic of which
nothing was kept after all), never too little, so that a wrong turn costs time and not messages. What is delivered
has been checked against the segment itself, never against an index.

    index file, next to its segment, named `.idx`; written once, when the segment is full
     0        8         12     16     32            40          48      52       56
     +--------+---------+------+------+-------------+-----------+-------+--------+
     | magic  | version | salt | uuid | base offset | next base | marks | topics |
     | 8s     | u32     | u32  | 16s  | u64         | u64       | u32   | u32    |
     +--------+---------+------+------+-------------+-----------+-------+--------+
     ( offset u64 | position u64 | max time before it, ns u64 )*             marks, about one in MARK_BYTES
     ( topic size u8 | topic | stream count u32 |
        ( origin u64 | first seq u64 | last seq u64 | first position u64 | last position u64 )* )*
     CRC-32 of all the above, seeded with the salt, u32
"""

from __future__ import annotations

import contextlib
import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple
from zlib import crc32

from zmqbus.errors import JournalCorrupt
from zmqbus.journal.records import FORMAT_VERSION, Batch, SegmentHeader
from zmqbus.journal.segment import SUFFIX, Scanner, Segment
from zmqbus.journal.storage import Storage, publish_file, read_file

INDEX_SUFFIX = ".idx"
INDEX_MAGIC = b"ZMQBUSX\n"
MARK_BYTES = 256 << 10  # between two marks; so a seek scans no more than this, some 0.2 ms

_HEAD = struct.Struct("<8sII16sQQII")
_MARK = struct.Struct("<QQQ")
_SPAN = struct.Struct("<QQQQQ")
_U32 = struct.Struct("<I")


class Mark(NamedTuple):
    """A record boundary."""

    offset: int
    position: int
    max_time_ns: int
    """The newest time of all records before it, in this and in earlier segments."""


class Span(NamedTuple):
    """Where a stream's records lie within one segment."""

    first_seq: int
    last_seq: int
    first_position: int
    last_position: int


class Index(ABC):
    """What one can ask about a segment."""

    marks: Sequence[Mark]

    def seek(self, offset: int) -> Mark | None:
        """The last mark at or before an offset."""
        at = bisect_right(self.marks, offset, key=_mark_offset)
        return self.marks[at - 1] if at else None

    def seek_time(self, time_ns: int) -> Mark | None:
        """The last mark before which everything is older than `time_ns`."""
        at = bisect_right(self.marks, time_ns - 1, key=_mark_time)
        return self.marks[at - 1] if at else None

    @abstractmethod
    def span(self, topic: bytes, origin: int) -> Span | None:
        """Where a stream's records are, or None if there are none."""

    @abstractmethod
    def matches(self, accept: Callable[[bytes], bool]) -> bool:
        """Whether any topic in the segment is accepted."""


class ActiveIndex(Index):
    """The index of the segment being written. Told of every record; cheap, for it is on the hot path."""

    def __init__(self, segment: Segment) -> None:
        self.marks: list[Mark] = []
        self.spans: dict[tuple[bytes, int], list[int]] = {}
        self.max_time_ns = segment.header.max_time_ns
        self._next_mark = 0

    def add(self, position: int, offset: int, topic: bytes, origin: int, first: int, last: int, time_ns: int) -> None:
        if position >= self._next_mark:
            self.marks.append(Mark(offset, position, self.max_time_ns))
            self._next_mark = position + MARK_BYTES
        span = self.spans.get((topic, origin))
        if span is not None:
            span[1] = last
            span[3] = position
        elif topic:  # a hole belongs to no stream
            self.spans[topic, origin] = [first, last, position, position]
        if time_ns > self.max_time_ns:
            self.max_time_ns = time_ns

    def add_batch(self, position: int, batch: Batch) -> None:
        self.add(
            position, batch.offset, batch.topic, batch.origin, batch.first_seq, batch.last_seq, batch.time_ns
        )  # fmt: skip

    def cut(self, position: int) -> None:
        """Forget boundaries of records that were not written after all."""
        while self.marks and self.marks[-1].position >= position:
            self.marks.pop()
        self._next_mark = position

    def span(self, topic: bytes, origin: int) -> Span | None:
        found = self.spans.get((topic, origin))
        return None if found is None else Span(*found)

    def matches(self, accept: Callable[[bytes], bool]) -> bool:
        return any(accept(topic) for topic in {topic for topic, _ in list(self.spans)})


class SealedIndex(Index):
    """The index of a full segment, as bytes: ten thousand streams would take tens of milliseconds, and megabytes, to
    unpack, and all one wants is one stream, or the topics."""

    def __init__(self, data: bytes, marks: list[Mark], topics: dict[bytes, tuple[int, int]]) -> None:
        self._data = data
        self._topics = topics  # each with its part of the data
        self.marks = marks

    def span(self, topic: bytes, origin: int) -> Span | None:
        start, end = self._topics.get(topic, (0, 0))
        for candidate, *span in _SPAN.iter_unpack(self._data[start:end]):
            if candidate == origin:
                return Span(*span)
        return None

    def matches(self, accept: Callable[[bytes], bool]) -> bool:
        return any(map(accept, self._topics))


def _mark_offset(mark: Mark) -> int:
    return mark.offset


def _mark_time(mark: Mark) -> int:
    return mark.max_time_ns


def index_name(segment_name: str) -> str:
    return segment_name.removesuffix(SUFFIX) + INDEX_SUFFIX


def encode_index(index: ActiveIndex, segment: Segment, next_base: int) -> bytes:
    header = segment.header
    by_topic: dict[bytes, list[bytes]] = {}
    for (topic, origin), span in index.spans.items():
        by_topic.setdefault(topic, []).append(_SPAN.pack(origin, *span))
    parts = [
        _HEAD.pack(
            INDEX_MAGIC,
            FORMAT_VERSION,
            header.salt,
            header.uuid,
            header.base_offset,
            next_base,
            len(index.marks),
            len(by_topic),
        )
    ]
    parts += [_MARK.pack(*mark) for mark in index.marks]
    for topic, spans in by_topic.items():
        parts += (len(topic).to_bytes(1, "little"), topic, _U32.pack(len(spans)), *spans)
    data = b"".join(parts)
    return data + _U32.pack(crc32(data, header.salt))


def decode_index(data: bytes, segment: Segment) -> SealedIndex | None:
    """The index in `data` if it is intact and that of this very segment, else None."""
    header = segment.header
    if len(data) < _HEAD.size + 4 or crc32(data[:-4], header.salt) != _U32.unpack(data[-4:])[0]:
        return None
    *identity, next_base, mark_count, topic_count = _HEAD.unpack_from(data)
    if identity != [INDEX_MAGIC, FORMAT_VERSION, header.salt, header.uuid, header.base_offset]:
        return None
    if next_base != segment.next_base:
        return None
    at = _HEAD.size + mark_count * _MARK.size
    marks = [Mark(*mark) for mark in _MARK.iter_unpack(data[_HEAD.size : at])]
    topics: dict[bytes, tuple[int, int]] = {}
    for _ in range(topic_count):
        start = at + 1 + data[at]
        topic = data[at + 1 : start]
        (streams,) = _U32.unpack_from(data, start)
        start += _U32.size
        at = start + streams * _SPAN.size
        topics[topic] = start, at
    return SealedIndex(data, marks, topics)


def index_identity(data: bytes) -> SegmentHeader | None:
    """What an intact index file tells about its segment's header, should that be destroyed; no snapshot, though."""
    if len(data) < _HEAD.size + 4:
        return None
    magic, version, salt, uuid, base_offset, _, _, _ = _HEAD.unpack_from(data)
    if magic != INDEX_MAGIC or crc32(data[:-4], salt) != _U32.unpack(data[-4:])[0]:
        return None
    return SegmentHeader(version, salt, uuid, base_offset, 0, 0, 0, crc32(b"", salt))


def write_index(storage: Storage, segment: Segment, data: bytes) -> None:
    """Put an encoded index beside its segment. Failing to is no harm: it will be rebuilt when it is needed."""
    with contextlib.suppress(OSError):
        publish_file(storage, segment.directory, index_name(segment.name), [data], durable=False)


def load_index(storage: Storage, segment: Segment, *, write: bool = True) -> Index:
    """The index of a full segment: from its file, or by scanning the segment, and then (if `write`) written anew."""
    assert segment.next_base is not None
    index: Index | None = None
    with contextlib.suppress(OSError):
        index = decode_index(read_file(storage, f"{segment.directory}/{index_name(segment.name)}"), segment)
    if index is None:
        index = built = build_index(storage, segment)
        if write:
            write_index(storage, segment, encode_index(built, segment, segment.next_base))
    return index


def build_index(storage: Storage, segment: Segment) -> ActiveIndex:
    """Scan a full segment. Raises JournalCorrupt where it is damaged."""
    index = ActiveIndex(segment)
    fd = storage.open(segment.path)
    try:
        scanner = Scanner.whole(storage, fd, segment, segment.durable_end)
        while scanner.next_offset != segment.next_base:
            batch = scanner.next()
            if batch is None:
                raise damage(segment, scanner)
            index.add_batch(scanner.record_at, batch)
    finally:
        storage.close(fd)
    return index


def damage(segment: Segment, scanner: Scanner) -> JournalCorrupt:
    """The error for a scan that ended before the segment's last message."""
    reason = scanner.bad or "the segment ends before its last message"
    return JournalCorrupt(segment.path, min(scanner.position, scanner.limit), reason, scanner.next_offset)
