"""The formats, pinned byte by byte: a journal written by any version must stay readable by all later ones."""

from __future__ import annotations

from zlib import crc32

import pytest

from zmqbus.errors import JournalCorrupt, JournalVersion
from zmqbus.journal.positions import Cursor, decode_cursors, encode_cursors
from zmqbus.journal.records import (
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    decode_heads,
    decode_segment_header,
    encode_heads,
    encode_record,
    encode_segment_header,
    padded,
    record_bytes,
)
from zmqbus.journal.storage import Disk, encode_meta, read_meta

SALT = 0x01020304
UUID = bytes(range(16))

GOLDEN_HEADER = (
    "5a 4d 51 42 55 53 4a 0a  01 00 00 00  04 03 02 01  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f"
    "0c 00 00 00 00 00 00 00  0d 00 00 00 00 00 00 00  0e 00 00 00 00 00 00 00  12 00 00 00 00 00 00 00"
    "HEADS_CRC  HEADER_CRC  01 61  07 00 00 00 00 00 00 00  09 00 00 00 00 00 00 00  00 00 00 00 00 00"
)
GOLDEN_RECORD = (
    "HEADER_CRC  7a 62 72  03  PAYLOAD_CRC  05 00 00 00  02 00 00 00  04 00 00 00"
    "0c 00 00 00 00 00 00 00  80 00 00 00 00 00 00 00  07 00 00 00 00 00 00 00"
    "0a 00 00 00 00 00 00 00  0e 00 00 00 00 00 00 00  61 2e 62 00  68 65 61 78 79  00 00 00 00 00 00 00"
)


def test_segment_header_golden() -> None:
    heads = encode_heads([(b"a", 7, 9)])
    assert len(heads) == 18
    data = encode_segment_header(salt=SALT, uuid=UUID, base_offset=12, created_ns=13, max_time_ns=14, snapshot=heads)
    crcs = {"HEADS_CRC": crc32(heads, SALT), "HEADER_CRC": crc32(data[:68])}
    assert data == unhex(GOLDEN_HEADER, crcs)
    header = decode_segment_header(data)
    assert header == SegmentHeader(1, SALT, UUID, 12, 13, 14, 18, crcs["HEADS_CRC"])
    assert isinstance(header, SegmentHeader)
    assert header.data_start == len(data) == 96


def test_record_golden() -> None:
    data = encode_record(
        SALT,
        topic=b"a.b",
        base_offset=12,
        count=4,
        durable_to=128,
        origin=7,
        first_seq=10,
        time_ns=14,
        payload=(b"hea", b"xy"),
        external_bytes=2,
    )
    crcs = {"HEADER_CRC": crc32(data[4:68], SALT), "PAYLOAD_CRC": crc32(b"heaxy", SALT)}
    assert data == unhex(GOLDEN_RECORD, crcs)
    assert len(data) == record_bytes(3, 5) == 80


def test_checksum_constants() -> None:
    """The golden vectors above take their CRCs from zlib: so pin what CRC that is."""
    assert crc32(b"123456789") == 0xCBF43926
    assert crc32(b"heaxy", SALT) == 0x1918BBD0


@pytest.mark.parametrize("size", range(17))
def test_padding(size: int) -> None:
    assert padded(size) % 8 == 0
    assert 0 <= padded(size) - size < 8
    assert record_bytes(1, size) == padded(64 + 1 + 1 + size)


def test_heads_and_cursors_round_trip() -> None:
    heads = [(b"a", 0, 1), (b"x" * 255, 2**64 - 1, 2**62)]
    assert list(decode_heads(encode_heads(heads))) == heads
    cursors = {"indexer": Cursor(5, b""), "ü": Cursor(2**62, b"state")}
    assert dict(decode_cursors(encode_cursors(cursors))) == cursors


def test_segment_header_checks_every_bit() -> None:
    good = encode_segment_header(salt=SALT, uuid=UUID, base_offset=12, created_ns=13, max_time_ns=14, snapshot=b"")
    for bit in range(SEGMENT_HEADER_BYTES * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        assert isinstance(decode_segment_header(bytes(data)), str)


def test_meta_golden(tmp_path) -> None:
    data = encode_meta(UUID)
    assert data == b"zmqbus journal 1\nuuid 000102030405060708090a0b0c0d0e0f\ncrc 4cccdb88\n"
    (tmp_path / "meta").write_bytes(data)
    assert read_meta(Disk(), str(tmp_path)) == UUID
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "meta").write_bytes(damaged)
        with pytest.raises(JournalCorrupt):
            read_meta(Disk(), str(tmp_path))


def test_meta_of_a_newer_version(tmp_path) -> None:
    text = b"zmqbus journal 2\nuuid whatever it is by then\n"
    (tmp_path / "meta").write_bytes(text + b"crc %08x\n" % crc32(text))
    with pytest.raises(JournalVersion) as caught:
        read_meta(Disk(), str(tmp_path))
    assert (caught.value.found, caught.value.supported) == (2, 1)


def unhex(text: str, crcs: dict[str, int]) -> bytes:
    for name, value in crcs.items():
        text = text.replace(name, value.to_bytes(4, "little").hex())
    return bytes.fromhex(text)
