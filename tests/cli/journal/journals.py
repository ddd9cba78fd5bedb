"""Journals to look into, damage to do to them, and what is left then."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from zmqbus.journal import Cursor, Journal, Reader
from zmqbus.protocol.frames import DATA, EXTERNAL, HEADER, HEADERS, RAW

START_NS = 1_785_466_800_123_456_789  # 2026-07-31T03:00:00.123456789Z
MINUTE_NS = 60 * 10**9
BATCHES = 60
MESSAGES = 2 * BATCHES
ORIGIN = 0xABCDEF


def payload(seq: int, values: list[Any], time_ns: int, headers: list[Any] | None = None) -> bytes:
    """A batch's frame after its topic."""
    body = values if headers is None else (values, headers)
    flags = 0 if headers is None else HEADERS
    return HEADER.pack(1, DATA, flags, len(values), ORIGIN, seq, time_ns) + msgspec.msgpack.encode(body)


def external(seq: int, time_ns: int) -> bytes:
    """The frame of one large value of bytes, which follows it."""
    return HEADER.pack(1, DATA, EXTERNAL | RAW, 1, ORIGIN, seq, time_ns)


def open_journal(path: Path) -> Journal:
    return Journal.open(str(path), now_ns=START_NS, segment_bytes=4096)


def make(path: Path) -> Path:
    """Sixty batches of two messages, a minute apart, over three topics and several segments; two cursors."""
    journal = open_journal(path)
    for n in range(BATCHES):
        seq, time_ns = 1 + 2 * (n // 3), START_NS + n * MINUTE_NS
        frame = payload(seq, [{"n": n, "text": "x" * 100}, f"line {n}"], time_ns)
        journal.append(b"logs.web%d" % (n % 3), ORIGIN, seq, 2, time_ns, frame)
        journal.commit(time_ns)
    journal.commit_cursors({"indexer": Cursor(100)})
    journal.commit_cursors({"slow\x1b[31m": Cursor(7)})
    journal.close(START_NS)
    return path


def add(path: Path, topic: bytes, frame: bytes, large: bytes | None = None, *, seq: int = 1, count: int = 1) -> None:
    """One batch more, an hour after the others."""
    journal = open_journal(path)
    journal.append(topic, ORIGIN, seq, count, START_NS + BATCHES * MINUTE_NS, frame, large)
    journal.commit(START_NS)
    journal.close(START_NS)


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.zbj"))


def flip(file: Path, at: int) -> None:
    """A bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def snapshot(path: Path) -> dict[str, bytes]:
    """All that is in a directory."""
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def readable(path: Path) -> set[int]:
    """The offsets that a forwarder could serve."""
    journal = open_journal(path)
    reader = Reader(journal)
    got: set[int] = set()
    try:
        while not reader.caught_up:
            for batch in reader.read():
                got |= set(range(batch.offset, batch.next_offset))
    finally:
        reader.close()
        journal.close(START_NS)
    return got


# --- damage ------------------------------------------------------------------------------------


def damage_meta(path: Path) -> None:
    flip(path / "meta", 3)


def lose_meta(path: Path) -> None:
    (path / "meta").unlink()


def damage_records(path: Path) -> None:
    flip(segments(path)[0], 1000)
    flip(segments(path)[2], 300)
    flip(segments(path)[2], 1500)


def damage_last(path: Path) -> None:
    flip(segments(path)[-1], 400)


def damage_header(path: Path) -> None:
    segments(path)[1].with_suffix(".idx").unlink()
    flip(segments(path)[1], 13)


def damage_cursors(path: Path) -> None:
    flip(next((path / "cursors").glob("*.zbj")), 100)


def lose_a_segment(path: Path) -> None:
    segments(path)[1].unlink()


def lose_the_end(path: Path) -> None:
    for file in segments(path)[2:]:
        file.unlink()


DAMAGES: list[Callable[[Path], None]] = [
    damage_meta, lose_meta, damage_records, damage_last, damage_header, damage_cursors, lose_a_segment, lose_the_end,
]  # fmt: skip


def tear(path: Path) -> None:
    """A record at the end that a crash has cut off."""
    add(path, b"torn", payload(1, ["never acknowledged"], START_NS))
    last = segments(path)[-1]
    data = last.read_bytes()
    end = data.rindex(b"never")
    last.write_bytes(data[:end] + bytes(len(data) - end))


def newer(path: Path) -> None:
    """As a later zmqbus would leave it."""
    text = b"zmqbus journal 99\nuuid " + b"0" * 32 + b"\n"
    (path / "meta").write_bytes(text + b"crc %08x\n" % crc32(text))


def newer_segment(path: Path) -> None:
    """Only the last segment: the first start of a later zmqbus has just begun one."""
    last = segments(path)[-1]
    data = bytearray(last.read_bytes())
    struct.pack_into("<I", data, 8, 99)
    struct.pack_into("<I", data, 68, crc32(bytes(data[:68])))
    last.write_bytes(data)


def owner_only(path: Path) -> bool:
    """Whether nobody else can read a file."""
    return os.stat(path).st_mode & 0o777 == 0o600
