"""The operator's tools: they tell the truth, and repair gives up nothing that is still good."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from zmqbus.errors import JournalCorrupt, JournalLocked, JournalUnavailable
from zmqbus.journal import Batch, Cursor, Journal, Reader
from zmqbus.journal.inspect import Finding, dump, export, info, repair, verify

BATCHES = 120


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of several segments, closed."""
    journal = start(tmp_path / "journal")
    for n in range(BATCHES):
        journal.append(
            b"logs.%d" % (n % 3), 7, 1 + n // 3, 1, n, b"message %d " % n + b"x" * 100, b"e" if n % 9 == 0 else None
        )
        journal.commit(n)
    journal.commit_cursors({"indexer": Cursor(100)})
    journal.commit_cursors({"slow": Cursor(3)})
    journal.close(0)
    return tmp_path / "journal"


def start(path: Path) -> Journal:
    return Journal.open(str(path), now_ns=0, segment_bytes=4096)


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.zbj"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def readable(path: Path) -> tuple[list[int], list[tuple[int, int]]]:
    """Offsets that can be read, and ranges reported as gone."""
    journal = start(path)
    reader = Reader(journal)
    got, gone = [], []
    try:
        while not reader.caught_up:
            for batch in reader.read():
                assert bytes(batch.payload).startswith(b"message %d " % batch.offset)
                got.append(batch.offset)
            gone += reader.dropped
    finally:
        reader.close()
        journal.close(0)
    return got, gone


def test_info(path: Path) -> None:
    before = snapshot(path)
    seen = info(str(path))
    assert (seen.first_offset, seen.next_offset, seen.streams) == (0, BATCHES, 3)
    assert len(seen.segments) == len(segments(path)) > 3
    assert seen.cursors == {"indexer": Cursor(100), "slow": Cursor(3)}
    assert seen.bytes_used == sum(file.stat().st_size for file in segments(path))
    assert len(seen.uuid) == 32
    assert seen.quarantined == ()
    assert snapshot(path) == before
    with pytest.raises(JournalUnavailable):
        info(str(path / "cursors"))
    with pytest.raises(JournalUnavailable):
        info(str(path / "missing"))


def test_reading_beside_a_working_forwarder(path: Path) -> None:
    journal = start(path)
    assert info(str(path)).next_offset == BATCHES
    assert list(verify(str(path))) == []
    with pytest.raises(JournalLocked):
        list(repair(str(path), now_ns=0))
    journal.close(0)


def test_dump(path: Path) -> None:
    before = snapshot(path)
    everything = list(dump(str(path)))
    assert [batch.offset for batch in everything if isinstance(batch, Batch)] == list(range(BATCHES))
    some = list(dump(str(path), start=60, accept=lambda topic: topic == b"logs.1"))
    assert [batch.offset for batch in some if isinstance(batch, Batch)] == list(range(61, BATCHES, 3))
    assert snapshot(path) == before


def test_export(path: Path) -> None:
    calls = []
    data = b"".join(export(str(path), progress=lambda done, total: calls.append((done, total))))
    assert calls[-1] == (BATCHES, BATCHES)
    frames, at = [], 0
    while at < len(data):
        size, external = struct.unpack_from("<II", data, at)
        frames.append((data[at + 8 : at + 8 + size], data[at + 8 + size : at + 8 + size + external]))
        at += 8 + size + external
    assert len(frames) == BATCHES
    assert frames[9] == (b"logs.0\0message 9 " + b"x" * 100, b"e")


def test_verify_a_sound_journal(path: Path) -> None:
    calls = []
    assert list(verify(str(path), progress=lambda done, total: calls.append((done, total)))) == []
    assert calls[-1][0] == calls[-1][1]


def test_verify_finds_all_damage_and_touches_nothing(path: Path) -> None:
    files = segments(path)
    flip(files[0], 300)
    flip(files[2], 500)
    flip(files[2], 1500)
    before = snapshot(path)
    found = list(verify(str(path)))
    assert [(finding.kind, Path(finding.path)) for finding in found] == [
        ("damage", files[0]), ("damage", files[2]), ("damage", files[2]),
    ]  # fmt: skip
    assert [finding.position <= at for finding, at in zip(found, (300, 500, 1500), strict=True)] == [True] * 3
    assert "1 lost" in str(found[0])
    assert snapshot(path) == before


@pytest.mark.parametrize(("which", "at"), [(0, 100), (0, 1000), (0, 3000), (1, 200), (1, 1000), (-1, 200), (-1, 400)])
def test_repair_keeps_every_good_record(path: Path, which: int, at: int) -> None:
    file = segments(path)[which]
    flip(file, at)
    damaged = file.read_bytes()
    with pytest.raises(JournalCorrupt):
        readable(path)
    found = list(repair(str(path), now_ns=0))
    assert [finding.kind for finding in found] == ["damage", "repaired"]
    assert [copy.read_bytes() for copy in (path / "quarantine").iterdir()] == [damaged]
    lost = found[0].offset
    assert readable(path) == ([n for n in range(BATCHES) if n != lost], [(lost, lost)])
    assert list(verify(str(path))) == []
    assert list(repair(str(path), now_ns=0)) == []


def test_repair_of_a_segment_header_with_its_index(path: Path) -> None:
    flip(segments(path)[1], 20)
    assert [finding.kind for finding in repair(str(path), now_ns=0)][-1] == "repaired"
    assert readable(path) == (list(range(BATCHES)), [])


@pytest.mark.parametrize("which", [1, -1])
def test_repair_of_a_segment_header_without_index(path: Path, which: int) -> None:
    file = segments(path)[which]
    first = int(file.stem)
    file.with_suffix(".idx").unlink(missing_ok=True)
    flip(file, 13)
    assert [finding.kind for finding in repair(str(path), now_ns=0)][-1] == "repaired"
    got, gone = readable(path)
    following = int(segments(path)[which + 1].stem) if which != -1 else 1 << 62
    assert got == [n for n in range(BATCHES) if not first <= n < following]
    assert gone[0][0] == first
    journal = start(path)
    assert journal.durable_offset >= BATCHES, "no offset is used twice"
    journal.close(0)


def test_repair_of_dedup_state(path: Path) -> None:
    """A destroyed snapshot is rebuilt from the segments before it."""
    flip(segments(path)[-1], 80)
    assert [finding.kind for finding in repair(str(path), now_ns=0)][-1] == "repaired"
    assert readable(path) == (list(range(BATCHES)), [])
    journal = start(path)
    assert [head.durable for head in journal.heads()] == [BATCHES // 3] * 3
    journal.close(0)


def test_repair_of_meta_and_cursors(path: Path) -> None:
    flip(path / "meta", 3)
    flip(next((path / "cursors").glob("*.zbj")), 100)
    with pytest.raises(JournalCorrupt):
        start(path)
    found = list(repair(str(path), now_ns=0))
    assert [finding.kind for finding in found].count("repaired") == 2
    assert len(list((path / "quarantine").iterdir())) == 1
    assert len(list((path / "cursors" / "quarantine").iterdir())) == 1
    assert readable(path) == (list(range(BATCHES)), [])
    assert list(info(str(path)).cursors.values()) == [Cursor(3)]


def test_repair_when_messages_behind_a_cursor_are_gone(path: Path) -> None:
    for file in segments(path)[2:]:
        file.unlink()
    with pytest.raises(JournalCorrupt, match="cursor 'indexer'"):
        start(path)
    assert [finding.kind for finding in verify(str(path))] == ["damage"]
    left = int(segments(path)[1].stem)
    assert [finding.kind for finding in repair(str(path), now_ns=0)] == ["repaired"]
    got, gone = readable(path)
    assert got == list(range(got[-1] + 1))
    assert got[-1] >= left
    assert gone == [(got[-1] + 1, 99)]
    assert isinstance(next(iter(dump(str(path), start=got[-1] + 1))), Finding)
