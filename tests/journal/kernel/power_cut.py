"""A real file system whose power can be cut, for tests: ext4 on a loop device on a disk that this module plays.

    with RecordedDisk(tmp_path) as disk:             # skips the test where it cannot be mounted
        disk.watch(history)                          # a file that processes append to: what they were promised, when
        child = subprocess.Popen([…, disk.path])     # any program that keeps its files there
        …
        recording = disk.recording()
    for cut in recording.cuts(seed, count):
        with mounted(cut.image, folder) as path:     # ext4 recovers; then it is the program's turn
            …                                        # judge it by cut.promised[history]

**What a power cut leaves behind.** A disk may keep what it was given in a volatile cache and write it down in any
order, until it is told to flush. So the states that a power cut can leave are: everything that was written before the
last completed flush, and of the writes since then any part, in any order. fdatasync(2) on ext4 ends in a flush of
the device, so what it covered is in every one of these states; that is the whole basis of an acknowledgement.

**Why the image is not copied while it is in use.** A copy takes time. Block 1 would be copied as it was at one moment
and block 2 as it was some milliseconds later, when a flush may have come between them: a state with the later write
and without the earlier one, which no power cut can leave. Such a copy accuses the innocent. Stopping the writer with
SIGSTOP does not help, since the kernel's own threads (jbd2, write-back) go on, and since a process in fdatasync
stops only after it, so that the states in the midst of a sync, the interesting ones, are never seen. Freezing the
file system flushes it. Therefore the disk is played here: a FUSE file, on which the loop device does its reads,
writes and flushes one after another, and which notes each of them. Afterwards every moment of the run can be cut,
as often as need be, with every fate of what was in the cache, and the same again from the same seed.

**That nothing in between falsifies it.** The loop device writes through the page cache of the FUSE file, which is
write-through (no FUSE_WRITEBACK_CACHE): a write has been noted when it completes. A flush reaches us as FUSE_FSYNC,
provided that the device reports a write cache, which `RecordedDisk` checks. It is noted before it is answered, so
before any fdatasync that rests on it returns. The watched files are read before each operation is noted; so a line
found there was written after the flush it rests on was noted, and must hold in every cut from there on.

Blocks are torn at 4 KiB and not below: that is what disks write as a unit, and ext4 relies on it. Tearing within
512 bytes, and losing names that ext4 happens to keep, is what the simulated disk is for.
Mount points are below the test's own folder, loop devices are released with the mount; both also after an exception.
Only a test run that is killed by a signal leaves them behind: `umount` them, the device last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from random import Random
from types import TracebackType
from typing import NamedTuple, Self

import pytest

BLOCK = 4096
IMAGE_BYTES = 16 << 20  # small, as every cut writes one; ext4 with a journal of 1024 blocks fits with room to spare
FATES = ("kept", "dropped", "torn", "torn", "torn")
_MOUNT_TIMEOUT_S = 30

_libc = ctypes.CDLL(None, use_errno=True)


class Write(NamedTuple):
    position: int
    data: bytes


FLUSH = None
Operation = Write | None


class Cut(NamedTuple):
    """A disk as the power cut left it."""

    image: bytes
    promised: dict[Path, bytes]
    """What the watched files held when the last operation that this state may contain was noted."""
    label: str
    unflushed: int
    """How many writes were in the disk's cache."""


class Recording:
    """All that a disk was told to do."""

    def __init__(self, base: bytes, operations: list[Operation], notes: list[tuple[int, Path, bytes]]) -> None:
        self._base = base
        self._operations = operations
        self._notes = notes
        self.flushes = sum(operation is FLUSH for operation in operations)

    def __len__(self) -> int:
        return len(self._operations)

    def cuts(self, seed: int, count: int) -> Iterator[Cut]:
        """`count` power cuts at random moments, in the order of time. The same seed cuts the recording the same way."""
        rng = Random(seed)
        moments = sorted(rng.randint(1, len(self._operations)) for _ in range(count))
        platter = bytearray(self._base)
        cache: list[Write] = []
        promised: dict[Path, bytes] = {}
        notes = iter([*self._notes, (1 << 62, Path(), b"")])
        note = next(notes)
        done = 0
        for number, moment in enumerate(moments):
            for operation in self._operations[done:moment]:
                if operation is None:
                    _apply(platter, cache)
                    cache = []
                else:
                    cache.append(operation)
            done = moment
            while note[0] < moment:  # noted before the operation that is the last one of this cut
                promised[note[1]] = promised.get(note[1], b"") + note[2]
                note = next(notes)
            fate = rng.choice(FATES)
            image = bytearray(platter)
            _apply(image, _survivors(cache, fate, rng))
            label = f"seed {seed}, cut {number} after operation {moment}, {fate}"
            yield Cut(bytes(image), dict(promised), label, len(cache))


def _apply(image: bytearray, writes: list[Write]) -> None:
    for position, data in writes:
        image[position : position + len(data)] = data


def _survivors(cache: list[Write], fate: str, rng: Random) -> list[Write]:
    if fate == "kept":
        return cache
    if fate == "dropped":
        return []
    chance = rng.choice((0.1, 0.5, 0.9))
    return [
        Write(write.position + at, write.data[at : at + BLOCK])
        for write in cache
        for at in range(0, len(write.data), BLOCK)
        if rng.random() < chance
    ]


# --- the disk that is played: one FUSE file --------------------------------------------------------

_IN = struct.Struct("<IIQQIIIHH")  # size, opcode, unique, node, uid, gid, pid, extension, padding
_OUT = struct.Struct("<IiQ")  # size, error, unique
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_TRANSFER = struct.Struct("<QQIIQII")  # handle, position, size, flags, lock owner, flags, padding
_INIT = struct.Struct("<IIIIHHIIHHII6I")
GETATTR, SETATTR, OPEN, READ, WRITE, RELEASE, FSYNC = 3, 4, 14, 15, 16, 18, 20
FLUSH_HANDLE, INIT = 25, 26
SILENT = frozenset({2, 36, 42})  # FORGET, INTERRUPT and BATCH_FORGET have no answer
MAX_WRITE = 128 << 10
KEEP_CACHE = 2


class _PlayedDisk(threading.Thread):
    """Answers the kernel's requests for the one file, in the order in which they come."""

    def __init__(self, fuse: FileIO, base: bytes) -> None:
        super().__init__(name="played disk", daemon=True)
        self._fuse = fuse
        self._now = bytearray(base)
        self.operations: list[Operation] = []
        self.notes: list[tuple[int, Path, bytes]] = []
        self.watched: list[Path] = []
        self._open: dict[Path, int] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                try:
                    request = os.read(self._fuse.fileno(), MAX_WRITE + 4096)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        continue  # the request was withdrawn
                    if error.errno == errno.ENODEV:
                        return  # unmounted
                    raise
                size, opcode, unique, *_ = _IN.unpack_from(request)
                answer = self._answer(opcode, request[_IN.size : size])
                if opcode in SILENT:
                    continue
                body, code = (answer, 0) if isinstance(answer, bytes) else (b"", -answer)
                os.write(self._fuse.fileno(), _OUT.pack(_OUT.size + len(body), code, unique) + body)
        except BaseException as error:  # the test fails on it when it leaves the disk
            self.failure = error
            self._fuse.close()  # so that nobody waits for answers that will not come
        finally:
            for fd in self._open.values():
                os.close(fd)

    def _answer(self, opcode: int, body: bytes) -> bytes | int:
        if opcode == WRITE:
            _, position, size, *_ = _TRANSFER.unpack_from(body)
            data = body[_TRANSFER.size : _TRANSFER.size + size]
            self._note(Write(position, data))
            self._now[position : position + size] = data
            return struct.pack("<II", size, 0)
        if opcode == FSYNC:
            self._note(FLUSH)
            return b""
        if opcode == READ:
            _, position, size, *_ = _TRANSFER.unpack_from(body)
            return bytes(self._now[position : position + size])
        if opcode in (GETATTR, SETATTR):
            mode = stat.S_IFREG | 0o600
            size = len(self._now)
            attributes = _ATTRIBUTES.pack(1, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, BLOCK, 0)
            return struct.pack("<QII", 3600, 0, 0) + attributes
        if opcode == OPEN:
            return struct.pack("<QII", 1, KEEP_CACHE, 0)
        if opcode in (RELEASE, FLUSH_HANDLE):
            return b""
        if opcode == INIT:
            big_writes = 1 << 5
            return _INIT.pack(7, 31, 1 << 17, big_writes, 16, 12, MAX_WRITE, 1, 0, 0, 0, 0, *[0] * 6)
        return errno.ENOSYS

    def _note(self, operation: Operation) -> None:
        for path in self.watched:
            if path not in self._open:
                with contextlib.suppress(FileNotFoundError):
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if path in self._open and (data := os.read(self._open[path], 1 << 24)):
                self.notes.append((len(self.operations), path, data))
        self.operations.append(operation)


class RecordedDisk:
    """A context manager: `path` is an empty ext4 file system, and everything that its disk is told is recorded."""

    def __init__(self, folder: Path, image_bytes: int = IMAGE_BYTES) -> None:
        self.path = folder / "disk"
        self._device = folder / "device"
        self._image = folder / "base.ext4"
        self._image_bytes = image_bytes
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._cleanup as unless_done:
            self._base = _new_file_system(self._image, self._image_bytes)
            self.path.mkdir()
            self._device.touch()
            try:  # a plain file first: if that cannot be mounted, it is not our disk's fault
                _mount(self._image, self.path)
            except NotMounted as error:
                pytest.skip(f"loop mounts are not permitted here: {error}")
            _unmount(self.path)
            try:
                fuse = open("/dev/fuse", "r+b", buffering=0)
            except OSError as error:
                pytest.skip(f"the disk of this test is a FUSE file, and FUSE cannot be used here: {error}")
            unless_done.callback(fuse.close)
            options = f"fd={fuse.fileno()},rootmode={stat.S_IFREG:o},user_id=0,group_id=0"
            if _libc.mount(b"zmqbus-test", bytes(self._device), b"fuse", 0, options.encode()):
                pytest.skip(f"mounting a FUSE file is not permitted here: {os.strerror(ctypes.get_errno())}")
            self._played = _PlayedDisk(fuse, self._base)
            self._played.start()
            unless_done.callback(self._played.join, _MOUNT_TIMEOUT_S)
            unless_done.callback(_unmount, self._device)
            _mount(self._device, self.path)
            unless_done.callback(_unmount, self.path)
            self._check_flushes()
            self._cleanup = unless_done.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()
        if self._played.failure is not None:
            raise self._played.failure

    def watch(self, path: Path) -> None:
        """From now on note what is appended to this file, and when. It need not exist yet. It must lie elsewhere: a
        disk that waits for a file of its own waits for ever."""
        self._played.watched = [*self._played.watched, path]

    def __len__(self) -> int:
        """How many writes and flushes the disk has seen."""
        return len(self._played.operations)

    def recording(self) -> Recording:
        """All of it so far."""
        operations = list(self._played.operations)
        notes = [note for note in list(self._played.notes) if note[0] < len(operations)]
        return Recording(self._base, operations, notes)

    def _check_flushes(self) -> None:
        """A device that reported no write cache would get no flushes, and nothing could be told from its silence."""
        device = Path(os.path.realpath(f"/sys/dev/block/{os.major(d := self.path.stat().st_dev)}:{os.minor(d)}"))
        assert (device / "queue" / "write_cache").read_text().strip() == "write back"
        assert (device / "loop" / "dio").read_text().strip() == "0"


# --- mounting --------------------------------------------------------------------------------------


class NotMounted(AssertionError):
    """ext4 could not be mounted. Of a cut image: then the kernel or this file is at fault, not what is tested."""


@contextlib.contextmanager
def mounted(image: bytes, folder: Path) -> Iterator[Path]:
    """A file system after the power has come back, mounted, which is when ext4 replays its own journal."""
    path = folder / "cut"
    path.mkdir(exist_ok=True)
    # A new file each time: mount(8) takes up a loop device that is still attached to the same file, as one may be for
    # a while after umount, and with it what that device has in its page cache, blocks of the image before.
    # In memory where that can be, since its syncs need not wait for a real disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else folder
    handle, name = tempfile.mkstemp(dir=memory, prefix="zmqbus-test-", suffix=".ext4")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        _mount(Path(name), path)
        try:
            yield path
        finally:
            _unmount(path)
    finally:
        os.unlink(name)


def _new_file_system(image: Path, size: int) -> bytes:
    if os.getuid() != 0:
        pytest.skip("mounting a loop device needs root")
    with image.open("wb") as file:
        file.truncate(size)
    # Nothing lazy: what ext4 would do later in the background would only blur the recording.
    lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    command = ["mkfs.ext4", "-q", "-b", str(BLOCK), "-J", "size=4", "-m", "0", "-N", "256", "-E", lazy, str(image)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_MOUNT_TIMEOUT_S)
    except FileNotFoundError:
        pytest.skip("mkfs.ext4 is not installed")
    return image.read_bytes()


def _mount(image: Path, path: Path) -> None:
    command = ["mount", "-t", "ext4", "-o", "loop,noatime", str(image), str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_MOUNT_TIMEOUT_S)
    if done.returncode:
        raise NotMounted(done.stderr.strip())


def _unmount(path: Path) -> None:
    done = subprocess.run(["umount", str(path)], check=False, capture_output=True, timeout=_MOUNT_TIMEOUT_S)
    if done.returncode:  # something still has a file open there: let it go as soon as that is closed
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True, timeout=_MOUNT_TIMEOUT_S)
