"""The operator's tools: they tell the truth, and repair gives up nothing that is still good."""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from zmqbus.errors import JournalCorrupt, JournalLocked, JournalUnavailable
from zmqbus.journal import Batch, Cursor, Journal, Reader, Retention
from zmqbus.journal.inspect import Finding, View, dump, export, info
from zmqbus.journal.repair import repair, verify
from zmqbus.journal.storage import Disk

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
    assert (seen.oldest_ns, seen.newest_ns) == (0, BATCHES - 1)
    assert seen.topics == {"logs.0": 1, "logs.1": 1, "logs.2": 1}
    assert (seen.holder, seen.tail, seen.damage) == (None, None, None)
    assert snapshot(path) == before
    with pytest.raises(JournalUnavailable):
        info(str(path / "cursors"))
    with pytest.raises(JournalUnavailable):
        info(str(path / "missing"))


def test_reading_beside_a_working_forwarder(path: Path) -> None:
    journal = start(path)
    assert info(str(path)).next_offset == BATCHES
    assert info(str(path)).holder == os.getpid()
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
    assert [finding.kind for finding in repair(str(path), now_ns=0)] == ["damage", "repaired"]
    got, gone = readable(path)
    assert got == list(range(got[-1] + 1))
    assert got[-1] >= left
    assert gone == [(got[-1] + 1, 99)]
    assert isinstance(next(iter(dump(str(path), start=got[-1] + 1))), Finding)


# --- what a repair would do is what it does --------------------------------------------------------


def damage_meta(path: Path) -> None:
    flip(path / "meta", 3)


def damage_records(path: Path) -> None:
    flip(segments(path)[0], 1000)
    flip(segments(path)[2], 300)
    flip(segments(path)[2], 1500)


def damage_header(path: Path) -> None:
    segments(path)[1].with_suffix(".idx").unlink()
    flip(segments(path)[1], 13)


def damage_last(path: Path) -> None:
    flip(segments(path)[-1], 400)


def damage_cursors(path: Path) -> None:
    flip(next((path / "cursors").glob("*.zbj")), 100)


def remove_what_a_cursor_has_passed(path: Path) -> None:
    for file in segments(path)[2:]:
        file.unlink()


DAMAGES = [damage_meta, damage_records, damage_header, damage_last, damage_cursors, remove_what_a_cursor_has_passed]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_pretending_tells_what_repair_does_and_touches_nothing(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    before = snapshot(path)
    plan = list(repair(str(path), now_ns=0, pretend=True))
    assert snapshot(path) == before
    assert [finding for finding in plan if finding.kind != "planned"] == list(verify(str(path)))
    done = list(repair(str(path), now_ns=0))
    for planned, finding in zip(plan, done, strict=True):
        if planned.kind == "planned":
            assert finding.text.startswith(planned.text)
            assert finding == planned._replace(kind="repaired", text=finding.text)
        else:
            assert finding == planned
    assert list(verify(str(path))) == []
    lost = {offset for finding in done for offset in range(finding.offset or 0, (finding.offset or 0) + finding.lost)}
    got, gone = readable(path)
    assert {offset for first, last in gone for offset in range(first, last + 1)} == lost
    assert set(got) == set(range(BATCHES if damage is not remove_what_a_cursor_has_passed else got[-1] + 1)) - lost


def test_pretending_minds_no_lock_and_repair_in_use_does_nothing(path: Path) -> None:
    journal = start(path)
    damage_meta(path)
    before = snapshot(path)
    assert [finding.kind for finding in repair(str(path), now_ns=0, pretend=True)] == ["damage", "planned"]
    with pytest.raises(JournalLocked) as caught:
        list(repair(str(path), now_ns=0))
    assert caught.value.holder == os.getpid()
    assert snapshot(path) == before
    journal.close(0)


def test_damage_in_the_last_segment_ends_a_dump_with_an_error(path: Path) -> None:
    damage_last(path)
    view = View(str(path))
    assert view.damage is not None
    batches = view.batches()
    got = [next(batches) for _ in range(view.durable_offset)]
    assert [batch.offset for batch in got if isinstance(batch, Batch)] == list(range(view.durable_offset))
    with pytest.raises(JournalCorrupt):
        next(batches)
    assert view.durable_offset < BATCHES
    seen = info(str(path))
    assert seen.damage is not None
    assert seen.damage.offset == view.durable_offset


def test_what_is_no_journal_at_all(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name in ("missing", "other", "other/notes.txt"):
        for tool in (verify, lambda path: repair(path, now_ns=0), lambda path: repair(path, now_ns=0, pretend=True)):
            with pytest.raises(JournalUnavailable):
                list(tool(str(tmp_path / name)))
    assert snapshot(tmp_path / "other") == {str(tmp_path / "other" / "notes.txt"): b"mine"}
    (path / "meta").unlink()
    with pytest.raises(JournalCorrupt, match="the file is missing"):
        info(str(path))
    with pytest.raises(JournalCorrupt, match="the file is missing"):
        dump(str(path))


# --- beside a forwarder, at any moment ---------------------------------------------------------------


def test_beside_one_who_writes_rotates_commits_and_removes(tmp_path: Path) -> None:
    """Thousands of commits, each of which may fall anywhere into what the tools are doing."""
    path = tmp_path / "busy"
    journal = Journal.open(str(path), now_ns=0, segment_bytes=4096, retention=Retention(bytes_max=64 << 10))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for n in range(4000):
                journal.append(b"logs.%d" % (n % 3), 7, 1 + n // 3, 1, n, b"message %d " % n + b"x" * (n % 500))
                journal.commit(n)
                if n % 3 == 0:
                    journal.commit_cursors({"follower": Cursor(journal.durable_offset, b"x" * 500)})
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=work)
    writer.start()
    rounds = 0
    last = 0
    try:
        while writer.is_alive():
            rounds += 1
            assert [finding for finding in verify(str(path)) if finding.kind == "damage"] == []
            seen = info(str(path))
            assert seen.damage is None
            assert all(cursor.offset <= seen.next_offset for cursor in seen.cursors.values())
            assert "follower" in seen.cursors or last < 3  # which are read first
            assert seen.next_offset >= last
            end = last = seen.next_offset
            expected = None
            for item in dump(str(path)):
                assert item.offset is not None
                assert expected is None or item.offset == expected
                expected = item.offset + (item.count if isinstance(item, Batch) else item.lost)
            assert expected is None or expected >= end
    finally:
        writer.join()
        if not failures:
            journal.close(0)
    assert failures == []
    assert rounds > 3
    assert info(str(path)).first_offset > 0


# --- beside a forwarder, at the worst moments -------------------------------------------------------


class Meddled(Disk):
    """The disk, and a forwarder that does something just before the n-th call of one kind."""

    def __init__(self, call: str, number: int, deed: Callable[[], None]) -> None:
        self._call, self._left, self._deed = call, number, deed

    def _count(self, call: str) -> None:
        if call == self._call:
            self._left -= 1
            if not self._left:
                self._deed()

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        self._count("open")
        return super().open(path, write=write, create=create)

    def pread(self, fd: int, size: int, position: int) -> bytes:
        self._count("pread")
        return super().pread(fd, size, position)

    def list(self, path: str) -> list[str]:
        self._count("list")
        return super().list(path)

    @property
    def done(self) -> bool:
        return self._left <= 0


def half_written(path: Path) -> Callable[[], None]:
    """Make the last record half there. Returns how the forwarder finishes it, and writes another after its sync."""
    journal = start(path)
    last = segments(path)[-1]
    sound = last.read_bytes()
    end = len(sound.rstrip(b"\0"))
    journal.append(b"logs.0", 7, 1 + BATCHES // 3, 1, 0, b"message %d " % BATCHES + b"x" * 100)
    journal.commit(0)
    one = last.read_bytes()
    journal.append(b"logs.1", 7, 1 + BATCHES // 3, 1, 0, b"message %d " % (BATCHES + 1) + b"x" * 100)
    journal.commit(0)
    journal.commit_cursors({"indexer": Cursor(BATCHES + 2)})
    two = last.read_bytes()
    journal.close(0)
    assert end < len(one.rstrip(b"\0")) < len(two.rstrip(b"\0"))
    middle = (end + len(one.rstrip(b"\0"))) // 2
    last.write_bytes(one[:middle] + bytes(len(one) - middle))

    def finish() -> None:
        last.write_bytes(two)

    return finish


def test_a_record_that_is_finished_while_one_looks_is_no_damage(path: Path) -> None:
    finish = half_written(path)
    torn = path.parent / "torn"
    shutil.copytree(path, torn)
    number = 0
    seen = set()
    while True:
        number += 1
        for name, tool in (("verify", verify), ("view", lambda path, disk: [View(path, disk)])):
            shutil.rmtree(path)
            shutil.copytree(torn, path)
            disk = Meddled("pread", number, finish)
            result = list(tool(str(path), disk))
            if name == "verify":
                kinds = [finding.kind for finding in result if finding.path.endswith(".zbj")]
                assert set(kinds) <= {"torn"}, (number, result)
                seen |= set(kinds)
            else:
                assert result[0].damage is None, number
        if not disk.done:
            break
    assert number > 10


@pytest.mark.parametrize("call", ["open", "pread", "list"])
def test_segments_that_are_removed_while_one_looks(path: Path, call: str) -> None:
    whole = path.parent / "whole"
    shutil.copytree(path, whole)
    kept = int(segments(path)[2].stem)

    def retire() -> None:
        for file in segments(path)[:2]:
            file.with_suffix(".idx").unlink()
            file.unlink()

    def read(path: str, disk: Disk) -> list[Batch | Finding]:
        return list(View(path, disk).batches())

    number = 0
    done = True
    while done:
        number += 1
        done = False
        for tool in (verify, lambda path, disk: [info(path, disk)], read):
            shutil.rmtree(path)
            shutil.copytree(whole, path)
            disk = Meddled(call, number, retire)
            result = list(tool(str(path), disk))
            done = done or disk.done
            if tool is verify:
                assert result == []
            elif tool is read:
                offsets = []
                for item in result:  # read, or told that they are gone
                    size = item.count if isinstance(item, Batch) else item.lost
                    offsets += range(item.offset, item.offset + size)
                assert offsets == list(range(offsets[0], BATCHES))
                assert offsets[0] <= kept
    assert number > 3
