"""What the journal's files consist of, byte by byte. Pure functions on bytes: no files here.

A **segment file** is a header, a snapshot, and records up to the first byte that is not one. All little-endian.

    segment header, 72 bytes
     0        8        12       16                32            40           48
     +--------+--------+--------+-----------------+-------------+------------+-------------+
     | magic  |version | salt   | journal uuid    | base offset | created ns | max time ns |
     | 8s     | u32    | u32    | 16s             | u64         | u64        | u64         |
     +--------+--------+--------+-----------------+-------------+------------+-------------+
     56              64             68           72
     +---------------+--------------+------------+----------------------------+
     | snapshot size | snapshot CRC | header CRC | snapshot | zeros to 8      |
     | u64           | u32          | u32        |                            |
     +---------------+--------------+------------+----------------------------+

`salt` is random for every file and seeds every other checksum in it, so no record of another file, not even one
that was stored as a payload, can pass for one of this file. `max time ns` is the newest time of all records in
earlier segments. The snapshot of a message segment lists the stream heads as they were before its first record:
( topic size u8 | topic | origin u64 | last seq u64 )*.

    record, 64 bytes + topic + payload, padded with zeros to a multiple of 8
     0            4        7            8             12             16               20
     +------------+--------+------------+-------------+--------------+----------------+---------+
     | header CRC | marker | topic size | payload CRC | payload size | external size  | count   |
     | u32        | "zbr"  | u8         | u32         | u32          | u32            | u32     |
     +------------+--------+------------+-------------+--------------+----------------+---------+
     24            32           40         48          56        64
     +-------------+------------+----------+-----------+---------+-------+------+---------+-------+
     | base offset | durable to | origin   | first seq | time ns | topic | 0x00 | payload | zeros |
     | u64         | u64        | u64      | u64       | u64     |       |      |         |       |
     +-------------+------------+----------+-----------+---------+-------+------+---------+-------+

The header CRC covers everything from the marker to the 0x00 after the topic; so it vouches for the sizes, and no
size is believed before it. `topic 0x00 payload` lie together as they do on the wire: a batch is served as one
slice of the file. The last `external size` bytes of the payload are the batch's second frame, if it had one.
`durable to` is the position in this file up to which all bytes were known to be on disk when this was written.

A record without a topic carries no messages: with count 0 it is a **checkpoint** (only its `durable to` matters),
with count n it is a **hole**: n messages which a repair found destroyed and declared lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

import msgspec

FORMAT_VERSION = 1
MAGIC = b"ZMQBUSJ\n"
MARKER = b"zbr"
MARKER_AT = 4

SEGMENT_HEADER = struct.Struct("<8sII16sQQQQI")
SEGMENT_HEADER_BYTES = SEGMENT_HEADER.size + 4
RECORD_BODY = struct.Struct("<3sBIIIIQQQQQ")  # the fixed part without its leading CRC
RECORD_HEADER = struct.Struct("<I3sBIIIIQQQQQ")
RECORD_HEADER_BYTES = RECORD_HEADER.size
TOPIC_BYTES_MAX = 255  # one length byte in the record header
HEAD_BYTES_MAX = RECORD_HEADER_BYTES + TOPIC_BYTES_MAX + 1
PAYLOAD_BYTES_MAX = 1 << 30  # far above any message; keeps every size and count well inside u32
PADDING = [bytes(n) for n in range(8)]

_STREAM_TAIL = struct.Struct("<QQ")


class Batch(msgspec.Struct, frozen=True, gc=False):
    """1..n consecutive messages of one stream, as they were stored."""

    offset: int
    """Offset of its first message in this journal."""
    count: int
    topic: bytes
    origin: int
    first_seq: int
    time_ns: int
    frame: memoryview
    """The wire frame, verbatim: topic, 0x00, header, payload."""
    external: memoryview | None = None
    """The wire's second frame, verbatim, if there was one."""

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.count - 1

    @property
    def next_offset(self) -> int:
        return self.offset + self.count

    @property
    def size(self) -> int:
        """Bytes of both frames."""
        return len(self.frame) + (len(self.external) if self.external is not None else 0)

    @property
    def payload(self) -> memoryview:
        """The frame without topic and 0x00: wire header and payload."""
        return self.frame[len(self.topic) + 1 :]


class SegmentHeader(NamedTuple):
    """The decoded head of a segment file."""

    version: int
    salt: int
    uuid: bytes
    base_offset: int
    created_ns: int
    max_time_ns: int
    snapshot_bytes: int
    snapshot_crc: int

    @property
    def data_start(self) -> int:
        return padded(SEGMENT_HEADER_BYTES + self.snapshot_bytes)


def padded(size: int) -> int:
    """`size` rounded up to a multiple of 8."""
    return (size + 7) & ~7


def record_bytes(topic_bytes: int, payload_bytes: int) -> int:
    """Size of a record on disk, padding included."""
    return (RECORD_HEADER_BYTES + topic_bytes + payload_bytes + 8) & ~7


def encode_segment_header(
    *, salt: int, uuid: bytes, base_offset: int, created_ns: int, max_time_ns: int, snapshot: bytes
) -> bytes:
    """Header, snapshot and padding: everything that comes before the first record."""
    fixed = SEGMENT_HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        salt,
        uuid,
        base_offset,
        created_ns,
        max_time_ns,
        len(snapshot),
        crc32(snapshot, salt),
    )
    head = fixed + crc32(fixed).to_bytes(4, "little") + snapshot
    return head + PADDING[-len(head) & 7]


def decode_segment_header(data: bytes) -> SegmentHeader | str:
    """The header at the start of `data`, or what is wrong with it. The version is for the caller to judge."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return "the segment header is cut short"
    fixed = data[: SEGMENT_HEADER.size]
    magic, *fields = SEGMENT_HEADER.unpack(fixed)
    if magic != MAGIC:
        return "this is no segment of a zmqbus journal"
    if crc32(fixed) != int.from_bytes(data[SEGMENT_HEADER.size : SEGMENT_HEADER_BYTES], "little"):
        return "the segment header does not fit its checksum"
    return SegmentHeader(*fields)


def encode_heads(heads: Iterable[tuple[bytes, int, int]]) -> bytes:
    """The snapshot of stream heads: (topic, origin, last seq) each."""
    pack = _STREAM_TAIL.pack
    parts: list[bytes] = []
    for topic, origin, seq in heads:
        parts += (len(topic).to_bytes(1, "little"), topic, pack(origin, seq))
    return b"".join(parts)


def decode_heads(snapshot: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The stream heads of a snapshot whose CRC has been checked."""
    at = 0
    while at < len(snapshot):
        end = at + 1 + snapshot[at]
        origin, seq = _STREAM_TAIL.unpack_from(snapshot, end)
        yield snapshot[at + 1 : end], origin, seq
        at = end + _STREAM_TAIL.size


def encode_record(
    salt: int,
    *,
    topic: bytes,
    base_offset: int,
    count: int,
    durable_to: int,
    origin: int = 0,
    first_seq: int = 0,
    time_ns: int = 0,
    payload: Sequence[bytes | bytearray | memoryview] = (),
    external_bytes: int = 0,
) -> bytes:
    """One whole record as one piece of bytes; for everything but the hot path, which is `encode_head`."""
    size = sum(map(len, payload))
    crc = payload_crc(payload, salt)
    head = encode_head(
        salt, topic + b"\0", crc, size, external_bytes, count, base_offset, durable_to, origin, first_seq, time_ns
    )
    return b"".join((head, *payload, PADDING[-(len(head) + size) & 7]))


def encode_head(
    salt: int,
    topic_nul: bytes,
    crc: int,
    size: int,
    external_bytes: int,
    count: int,
    base_offset: int,
    durable_to: int,
    origin: int,
    first_seq: int,
    time_ns: int,
) -> bytes:
    """A record up to its payload. `topic_nul` is the topic with its 0x00; `crc` and `size` are the payload's."""
    body = (
        RECORD_BODY.pack(
            MARKER,
            len(topic_nul) - 1,
            crc,
            size,
            external_bytes,
            count,
            base_offset,
            durable_to,
            origin,
            first_seq,
            time_ns,
        )
        + topic_nul
    )
    return crc32(body, salt).to_bytes(4, "little") + body


def payload_crc(parts: Iterable[bytes | bytearray | memoryview], salt: int) -> int:
    """CRC-32 of the parts put end to end."""
    for part in parts:
        salt = crc32(part, salt)
    return salt
