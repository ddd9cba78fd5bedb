"""Failing file calls on a real file system: reads and look-ups too, which the simulated disk lets pass.

Each of the first 200 calls of a working life fails once: with EIO, with ENOSPC, or (a write) by taking only half. What
may follow is one of the journal's own errors, and nothing else; what may be lost is nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from zmqbus.errors import JournalCorrupt, JournalError
from zmqbus.journal import Appended, Cursor, Journal, Reader, fetch, find_time, journal, positions, segment, storage
from zmqbus.journal.storage import Buffer, Disk

CALLS = 200
TOPICS = (b"logs.a", b"logs.b")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 400)
    monkeypatch.setattr(positions, "CURSOR_FILE_BYTES", 256)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: thousands of files are made, and no platter matters here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="zmqbus-test-") as path:
        yield Path(path)


class FaultyDisk(Disk):
    """The real disk, of which call number `at` fails. Does not wait for the platter, as the power stays on."""

    def __init__(self, at: int = 0, fault: str = "") -> None:
        self.at = at
        self.fault = fault
        self.calls: list[str] = []

    def count(self, name: str) -> bool:
        """Whether this call is the one; raises what it fails with."""
        self.calls.append(name)
        if len(self.calls) != self.at:
            return False
        if self.fault != "short":
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code))
        return True

    def pwritev(self, fd: int, buffers: Sequence[Buffer], position: int) -> int:
        if self.count("pwritev"):
            data = b"".join(buffers)
            return os.pwrite(fd, data[: len(data) // 2], position)
        return super().pwritev(fd, buffers, position)

    def fdatasync(self, fd: int) -> None:
        self.count("fdatasync")

    def fsync(self, fd: int) -> None:
        self.count("fsync")

    def sync_directory(self, path: str) -> None:
        self.count("sync_directory")


def counted(name: str) -> Callable[..., Any]:
    def method(self: FaultyDisk, *args: Any, **options: Any) -> Any:
        self.count(name)
        return getattr(Disk, name)(self, *args, **options)

    return method


for _name in ("open", "pread", "truncate", "allocate", "size", "rename", "unlink", "mkdir", "list", "free_bytes"):
    setattr(FaultyDisk, _name, counted(_name))


class Life:
    """What a process does with a journal, and what it was promised. Ends at the first error that is for good."""

    def __init__(self) -> None:
        self.acked: dict[bytes, int] = dict.fromkeys(TOPICS, 0)
        self.cursor = 0
        self.errors: list[JournalError] = []

    def live(self, disk: Disk, path: str) -> None:
        opened: Journal | None = None
        try:
            opened = Journal.open(path, now_ns=1, storage=disk, segment_bytes=1)
            self.work(opened)
        except JournalError as error:
            self.errors.append(error)
        finally:
            if opened is not None:
                try:
                    opened.close(1)
                except JournalError as error:
                    self.errors.append(error)

    def work(self, opened: Journal) -> None:
        reader = Reader(opened)
        for turn in range(14):
            topic = TOPICS[turn % 2]
            if opened.full is not None:
                opened.resume()
            seq = opened.expected(topic, 7)
            try:
                assert opened.append(topic, 7, seq, 2, turn, value(topic, seq)) is Appended.ACCEPTED
            except JournalError as error:
                self.errors.append(error)
                if opened.full is None:
                    raise
            commit = opened.commit(turn)
            for stream in commit.acked:
                self.acked[stream.topic] = stream.seq
            try:
                for batch in reader.read():
                    assert bytes(batch.payload) == value(batch.topic, batch.first_seq)
                if turn % 3 == 2:
                    cursor = max(reader.offset, opened.cursors.all().get("c", Cursor(0)).offset)
                    opened.commit_cursors({"c": Cursor(cursor, b"state" * 30)})
                    self.cursor = cursor
                for batch in fetch(opened, topic, 7, 1, seq):
                    assert bytes(batch.payload) == value(topic, batch.first_seq)
                find_time(opened, turn)
            except JournalError as error:  # a read that failed says nothing of the writer
                self.errors.append(error)
                reader.close()
                reader = Reader(opened)
        reader.close()


def value(topic: bytes, seq: int) -> bytes:
    return b"%s from #%d on " % (topic, seq) + b"x" * (seq * 17 % 90)


def check(path: str, life: Life) -> None:
    """A restart with a sound disk: everything that was promised is there."""
    opened = Journal.open(path, now_ns=1, storage=FaultyDisk(), segment_bytes=1)
    try:
        reader, last = Reader(opened), dict.fromkeys(TOPICS, 0)
        while not reader.caught_up:
            for batch in reader.read():
                assert batch.first_seq == last[batch.topic] + 1
                assert bytes(batch.payload) == value(batch.topic, batch.first_seq)
                last[batch.topic] = batch.last_seq
        for topic, seq in life.acked.items():
            assert last[topic] >= seq
        cursor = opened.cursors.all().get("c", Cursor(0)).offset
        assert life.cursor <= cursor <= opened.durable_offset
    finally:
        opened.close(1)


def calls_of(life: int, folder: Path) -> list[str]:
    """What is called when nothing fails."""
    for _ in range(life):
        Life().live(disk := FaultyDisk(), str(folder / f"dry-{life}"))
    assert len(disk.calls) >= CALLS, "the life is too short"
    return disk.calls[:CALLS]


def fail_each_call(fault: str, life: int, folder: Path) -> int:
    """Returns how many of the failures were noticed."""
    noticed, before = 0, Life()
    if life == 2:
        before.live(FaultyDisk(), str(folder / "before"))
        assert not before.errors
    for call, name in enumerate(calls_of(life, folder), 1):
        if fault == "short" and name != "pwritev":
            continue
        path = str(folder / str(call))
        now = Life()
        if life == 2:
            shutil.copytree(folder / "before", path)
            now.acked, now.cursor = {**before.acked}, before.cursor
        disk = FaultyDisk(call, fault)
        try:
            now.live(disk, path)
            assert disk.calls[call - 1] == name, "the two lives are not the same"
            assert not any(isinstance(error, JournalCorrupt) for error in now.errors)
            assert "\n" not in "".join(map(str, now.errors))
            check(path, now)
        except Exception as error:
            error.add_note(f"call {call} ({name}) failed with {fault}; after that: {now.errors}")
            raise
        noticed += bool(now.errors)
    return noticed


@pytest.mark.parametrize("life", [1, 2])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short"])
def test_each_of_the_first_200_calls_fails_once(fault: str, life: int, folder: Path) -> None:
    """In the first life of a journal, and in its second, which begins with recovery."""
    noticed = fail_each_call(fault, life, folder)
    if fault == "short":
        assert noticed == 0, "a short write is no error"
    else:
        assert noticed > CALLS * 0.7, "only what is disposable, an index, may fail unnoticed"


def test_the_calls_are_of_every_kind(folder: Path) -> None:
    seen = {*calls_of(1, folder), *calls_of(2, folder)}
    # free_bytes is asked for after NoSpace only, and locked by inspectors. To lock and to close has nothing to lose.
    assert seen == {name for name in vars(Disk) if name[0] != "_"} - {"close", "lock", "locked", "random", "free_bytes"}


def ignoring_errors(disk: Disk, fd: int, buffers: Sequence[Buffer], position: int) -> int:
    try:
        return storage.write_all(disk, fd, buffers, position)
    except OSError:
        return position + sum(map(len, buffers))


def believing_short_writes(disk: Disk, fd: int, buffers: Sequence[Buffer], position: int) -> int:
    disk.pwritev(fd, buffers, position)
    return position + sum(map(len, buffers))


@pytest.mark.parametrize(("bug", "fault"), [(ignoring_errors, "EIO"), (believing_short_writes, "short")])
def test_deliberate_bugs_are_seen(
    bug: Callable[..., int], fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "write_all", bug)
    with pytest.raises((AssertionError, JournalCorrupt)):
        fail_each_call(fault, 1, folder)


def test_a_kernel_that_takes_and_gives_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short reads and short writes are no errors: the whole life goes by a few bytes at a time."""
    real_pread, real_pwritev = os.pread, os.pwritev
    monkeypatch.setattr(os, "pread", lambda fd, size, position: real_pread(fd, min(size, 7), position))
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, position: real_pwritev(fd, [b"".join(buffers)[:11]], position)
    )
    life = Life()
    for _ in range(2):
        life.live(FaultyDisk(), str(tmp_path / "journal"))
        check(str(tmp_path / "journal"), life)
    assert life.errors == []
    assert life.acked == {TOPICS[0]: 28, TOPICS[1]: 28}
