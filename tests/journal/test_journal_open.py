"""Directories that cannot be used, disks that are full, limits of the process: one clear error each."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from zmqbus.errors import (
    JournalCorrupt,
    JournalError,
    JournalLocked,
    JournalUnavailable,
    JournalVersion,
    NoSpace,
)
from zmqbus.journal import Appended, Cursor, Journal, Reader, Retention
from zmqbus.journal.records import encode_segment_header
from zmqbus.journal.storage import encode_meta

A = b"logs.a"


def start(path: Path, **options) -> Journal:
    return Journal.open(str(path), now_ns=0, **{"segment_bytes": 4096, **options})


def test_a_new_journal_is_private(tmp_path: Path) -> None:
    journal = start(tmp_path / "new")
    journal.append(A, 1, 1, 1, 0, b"x")
    journal.commit(0)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]}
    journal.close(0)
    assert {modes.pop("new"), modes.pop("cursors")} == {0o700}
    assert set(modes.values()) == {0o600}
    assert "LOCK" in modes
    assert "meta" in modes


def test_an_empty_directory_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    start(tmp_path / "empty").close(0)
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_a_directory_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(JournalUnavailable, match=r"letter\.txt"):
        start(tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o755


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalUnavailable, match="Not a directory"):
        start(tmp_path / "file")
    with pytest.raises(JournalUnavailable, match="No such file"):
        start(tmp_path / "missing" / "journal")


def test_locked(tmp_path: Path) -> None:
    first = start(tmp_path / "journal")
    with pytest.raises(JournalLocked) as caught:
        start(tmp_path / "journal")
    assert caught.value.holder == os.getpid()
    first.close(0)
    start(tmp_path / "journal").close(0)


def test_not_writable() -> None:
    """As an ordinary user: root may write anywhere."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from zmqbus.journal import Journal\n"
        "from zmqbus.errors import JournalUnavailable\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "try: Journal.open(sys.argv[1], now_ns=0)\n"
        "except JournalUnavailable as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:  # pytest's own are closed to other users
        os.chmod(parent, 0o555)
        start(Path(parent, "journal")).close(0)
        for name in ("journal", "new"):
            result = subprocess.run(
                [sys.executable, "-c", code, f"{parent}/{name}", os.getcwd()],
                capture_output=True,
                text=True,
                check=False,
            )
            assert "Permission denied" in result.stdout, result.stderr
        os.chmod(parent, 0o700)


def test_newer_version(tmp_path: Path) -> None:
    journal = start(tmp_path / "journal")
    journal.append(A, 1, 1, 1, 0, b"x")
    journal.close(0)
    segment = next((tmp_path / "journal").glob("*.zbj"))
    before = segment.read_bytes()
    newer = bytearray(
        encode_segment_header(salt=1, uuid=bytes(16), base_offset=0, created_ns=0, max_time_ns=0, snapshot=b"")
    )
    newer[8] = 2
    newer[68:72] = crc32(newer[:68]).to_bytes(4, "little")
    segment.write_bytes(newer)
    with pytest.raises(JournalVersion) as caught:
        start(tmp_path / "journal")
    assert caught.value.found == 2
    assert segment.read_bytes() == newer
    segment.write_bytes(before)
    text = encode_meta(bytes(16)).replace(b"journal 1", b"journal 9").rpartition(b"crc ")[0]
    (tmp_path / "journal" / "meta").write_bytes(text + b"crc %08x\n" % crc32(text))
    with pytest.raises(JournalVersion, match="upgrade"):
        start(tmp_path / "journal")


def test_meta_missing(tmp_path: Path) -> None:
    start(tmp_path / "journal").close(0)
    (tmp_path / "journal" / "meta").unlink()
    with pytest.raises(JournalCorrupt, match="meta is damaged"):
        start(tmp_path / "journal")


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """256 KiB of tmpfs."""
    path = tmp_path / "tiny"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_disk_full_and_freed(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqbus.journal.positions.CURSOR_FILE_BYTES", 8192)
    journal = start(tiny_disk / "journal", segment_bytes=32 << 10)
    acked, seq, refused = 0, 0, []
    while journal.full is None:
        seq += 1
        assert journal.append(A, 1, seq, 1, 0, bytes([seq % 251]) * 900) is Appended.ACCEPTED
        if seq % 5 == 0:
            commit = journal.commit(0)
            acked = max([acked, *(head.seq for head in commit.acked)])
            refused += commit.refused
    assert refused[0].seq == acked + 1 == journal.expected(A, 1)
    with pytest.raises(NoSpace):
        journal.append(A, 1, acked + 1, 1, 0, b"x")
    assert not journal.resume()
    reader = Reader(journal)
    seen = []
    while not reader.caught_up:
        seen += [(batch.first_seq, bytes(batch.payload)) for batch in reader.read()]
    reader.close()
    assert seen == [(n, bytes([n % 251]) * 900) for n in range(1, acked + 1)]
    journal.commit_cursors({"works on a full disk": Cursor(acked)})
    journal.close(0)
    journal = start(tiny_disk / "journal", segment_bytes=32 << 10, retention=Retention(age_max_ns=0))
    assert journal.durable_offset == acked
    journal.delete(journal.retire(1))
    assert journal.append(A, 1, acked + 1, 1, 0, b"there is room again") is Appended.ACCEPTED
    assert journal.commit(0).acked[0].seq == acked + 1
    journal.close(0)


def test_opening_on_a_full_disk(tiny_disk: Path) -> None:
    (tiny_disk / "ballast").write_bytes(bytes(250 << 10))
    with pytest.raises(NoSpace, match="full"):
        start(tiny_disk / "journal", segment_bytes=64 << 10)
    (tiny_disk / "ballast").unlink()
    start(tiny_disk / "journal", segment_bytes=64 << 10).close(0)


def _missing_parent(path: Path) -> None:
    pass


def _a_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("x")


def _other_files(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "letter.txt").write_text("dear")


def _sound(path: Path) -> None:
    path.parent.mkdir()
    journal = start(path)
    for seq in range(1, 20):
        journal.append(A, 1, seq, 1, 0, b"x" * 500)
        journal.commit(0)
    journal.close(0)


def _damaged(name: str, at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        _sound(path)
        file = min(path.glob(name))
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return damage


def _gone(name: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        _sound(path)
        sorted(path.glob(name))[-1].unlink()

    return remove


def _newer(path: Path) -> None:
    _sound(path)
    text = encode_meta(bytes(16)).replace(b"journal 1", b"journal 9").rpartition(b"crc ")[0]
    (path / "meta").write_bytes(text + b"crc %08x\n" % crc32(text))


def _held(path: Path) -> None:
    _sound(path)
    held.append(start(path))


held: list[Journal] = []


@pytest.mark.parametrize(
    ("prepare", "error", "remedy"),
    [
        (_missing_parent, JournalUnavailable, "No such file or directory"),
        (_a_file, JournalUnavailable, "Not a directory"),
        (_other_files, JournalUnavailable, "use an empty one"),
        (_held, JournalLocked, "stop it, or choose another directory"),
        (_newer, JournalVersion, "upgrade zmqbus"),
        (_damaged("meta", 20), JournalCorrupt, "zmqbus journal repair"),
        (_damaged("*.zbj", 9), JournalCorrupt, "zmqbus journal repair"),
        (_damaged("*.zbj", 30), JournalCorrupt, "zmqbus journal repair"),
        (_damaged("cursors/*.zbj", 20), JournalCorrupt, "zmqbus journal repair"),
        (_gone("meta"), JournalCorrupt, "zmqbus journal repair"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_one_clear_line(
    prepare: Callable[[Path], None], error: type[JournalError], remedy: str, tmp_path: Path
) -> None:
    """Whoever starts a forwarder on it reads one line: which directory or file, what is wrong, what to do."""
    path = tmp_path / "data" / "journal"
    prepare(path)
    try:
        with pytest.raises(error) as caught:
            start(path)
    finally:
        while held:
            held.pop().close(0)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert remedy in line
    assert len(line.replace(str(path), "")) < 250
    assert caught.value.directory.startswith(str(path))


def test_a_read_only_file_system(tiny_disk: Path) -> None:
    start(tiny_disk / "journal").close(0)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True, capture_output=True)
    for path in (tiny_disk / "journal", tiny_disk / "new"):
        with pytest.raises(JournalUnavailable, match="Read-only file system") as caught:
            start(path)
        assert "\n" not in str(caught.value)
        assert str(tiny_disk) in str(caught.value)


def test_file_size_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: refused like a full disk, and what was accepted before is kept."""
    journal = start(tmp_path / "journal")
    journal.append(A, 1, 1, 1, 0, b"before")
    journal.commit(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        journal.append(A, 1, 2, 1, 0, bytes(20_000))  # a record larger than a segment: the file has to grow
        commit = journal.commit(0)
        assert [head.seq for head in commit.refused] == [2]
        assert journal.full is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal.resume()
    assert journal.append(A, 1, 2, 1, 0, bytes(20_000)) is Appended.ACCEPTED
    assert [head.seq for head in journal.commit(0).acked] == [2]
    journal.close(0)
    journal = start(tmp_path / "journal")
    assert journal.head(A, 1).durable == 2
    journal.close(0)


def test_killed_processes_lose_nothing_acknowledged(tmp_path: Path) -> None:
    """A writer is killed with SIGKILL over and over; what it had reported is there every time."""
    acked = 0
    for life in range(25):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                journal = start(tmp_path / "journal")
                while True:
                    for _ in range(5):
                        journal.append(A, 1, journal.expected(A, 1), 1, 0, b"x" * 100)
                    commit = journal.commit(0)
                    os.write(write_end, commit.acked[0].seq.to_bytes(8, "little"))
            finally:
                os._exit(1)
        os.close(write_end)
        for _ in range(1 + life % 7):
            acked = int.from_bytes(os.read(read_end, 8), "little")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while last := os.read(read_end, 8):
            acked = int.from_bytes(last, "little")
        os.close(read_end)
        journal = start(tmp_path / "journal")
        assert journal.head(A, 1).durable >= acked > 0
        reader = Reader(journal)
        seqs = []
        while not reader.caught_up:
            seqs += [batch.first_seq for batch in reader.read()]
        reader.close()
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) >= acked
        journal.close(0)
