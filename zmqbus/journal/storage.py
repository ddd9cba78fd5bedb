"""The seam between the journal and the file system, and the directory with its lock and identity.

Every file call of the journal is one method of `Storage`.

Tests put another `Storage` in its place: one that fails the n-th call, or a simulated disk whose power is cut.
So no other file of this folder may call `os`. The methods do what the system calls of the same name do, raise
OSError as they do, and promise no more: a write may be short, and nothing is durable before its sync.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from posixpath import dirname
from typing import Protocol, TypeAlias
from zlib import crc32

from zmqbus.errors import (
    JournalCorrupt,
    JournalFailed,
    JournalLocked,
    JournalUnavailable,
    JournalVersion,
    NoSpace,
)
from zmqbus.journal.records import FORMAT_VERSION

Buffer: TypeAlias = bytes | bytearray | memoryview

DIRECTORY_MODE = 0o700  # messages are private to whoever runs the forwarder
FILE_MODE = 0o600
TEMPORARY = ".tmp"  # suffix of files that have not been renamed to what they will be
IOV_MAX = 1024  # buffers per pwritev(2); Linux and BSD agree
OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # full disk, quota, RLIMIT_FSIZE


class Storage(Protocol):
    """What the journal needs of a file system. Paths are absolute or relative to the working directory."""

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        """Open a file and return its descriptor. `create`: make it (0600) if it is missing, keep it if not."""

    def close(self, fd: int) -> None: ...

    def pread(self, fd: int, size: int, position: int) -> bytes:
        """Up to `size` bytes at `position`; fewer only at the end of the file."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], position: int) -> int:
        """Write at most IOV_MAX buffers at `position`. Returns how many bytes were taken: perhaps not all."""

    def fdatasync(self, fd: int) -> None:
        """Contents and size of the file are durable."""

    def fsync(self, fd: int) -> None:
        """Contents and all metadata of the file are durable."""

    def truncate(self, fd: int, size: int) -> None: ...

    def allocate(self, fd: int, size: int) -> None:
        """Reserve blocks for the first `size` bytes; the file grows to at least that, reading as zeros."""

    def size(self, fd: int) -> int: ...

    def rename(self, old: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def mkdir(self, path: str) -> None:
        """Make the directory, or take over an existing one, readable by its owner only (0700)."""

    def sync_directory(self, path: str) -> None:
        """The names in the directory (creations, renames, unlinks) are durable."""

    def list(self, path: str) -> list[str]: ...

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file without waiting, and leave our process id in the file.
        False when somebody else holds it."""

    def locked(self, fd: int) -> bool:
        """Whether somebody else holds the exclusive lock of an open file."""

    def free_bytes(self, path: str) -> int:
        """Bytes an ordinary user may still write to the file system of `path`."""

    def random(self, size: int) -> bytes: ...


class Disk:
    """The real thing."""

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        flags = os.O_RDWR if write else os.O_RDONLY
        if create:
            flags |= os.O_CREAT
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, size: int, position: int) -> bytes:
        data = os.pread(fd, size, position)
        if len(data) == size or not data:
            return data
        parts = [data]  # a signal or the 2 GiB limit of read(2) cut it short, or it is the end of the file
        got = len(data)
        while got < size and (data := os.pread(fd, size - got, position + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], position: int) -> int:
        return os.pwritev(fd, buffers, position)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        try:
            os.mkdir(path, DIRECTORY_MODE)
        except FileExistsError:
            os.chmod(path, DIRECTORY_MODE)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def list(self, path: str) -> list[str]:
        return os.listdir(path)

    def lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with contextlib.suppress(OSError):  # the id is for the eyes of an operator only
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return True

    def locked(self, fd: int) -> bool:
        # There is no asking without taking it for an instant; shared, so that two who ask do not see each other.
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False

    def free_bytes(self, path: str) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def random(self, size: int) -> bytes:
        return os.urandom(size)


# --- built on the seam ---------------------------------------------------------------------------


def out_of_space(error: OSError) -> bool:
    """Whether an OSError means "no room" (which passes) rather than "broken" (which does not)."""
    return error.errno in OUT_OF_SPACE


def failed(operation: str, path: str, error: OSError) -> JournalFailed:
    return JournalFailed(operation, path, error.errno, error.strerror or str(error))


def write_all(storage: Storage, fd: int, buffers: Sequence[Buffer], position: int) -> int:
    """Write every buffer at `position` and return the position after the last. Goes on after short writes."""
    for start in range(0, len(buffers), IOV_MAX):
        chunk = buffers[start : start + IOV_MAX]
        wanted = sum(map(len, chunk))
        written = storage.pwritev(fd, chunk, position)
        position += written
        while written < wanted:  # the next attempt either goes on or says why not (ENOSPC, EFBIG, EIO)
            rest = memoryview(b"".join(chunk))[written:]
            more = storage.pwritev(fd, [rest], position)
            if more <= 0:
                raise OSError(errno.EIO, "write made no progress")
            position += more
            written += more
    return position


def read_file(storage: Storage, path: str) -> bytes:
    fd = storage.open(path)
    try:
        return storage.pread(fd, storage.size(fd), 0)
    finally:
        storage.close(fd)


def publish_file(storage: Storage, directory: str, name: str, pieces: Iterable[Buffer], *, durable: bool) -> None:
    """Make `name` appear with these contents at once or not at all: temporary file, (sync,) rename, (sync)."""
    path = f"{directory}/{name}"
    fd = storage.open(path + TEMPORARY, write=True, create=True)
    try:
        storage.truncate(fd, 0)
        position = 0
        for piece in pieces:
            position = write_all(storage, fd, [piece], position)
        if durable:
            storage.fsync(fd)
    finally:
        storage.close(fd)
    storage.rename(path + TEMPORARY, path)
    if durable:
        storage.sync_directory(directory)


def remove_file(storage: Storage, path: str) -> None:
    """Unlink; that it is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        storage.unlink(path)


# --- the directory -------------------------------------------------------------------------------

META = "meta"
LOCK = "LOCK"
_UNUSABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.EISDIR})


@contextlib.contextmanager
def os_errors(operation: str, path: str) -> Iterator[None]:
    """Turn an OSError into the JournalError that says whose fault it is."""
    try:
        yield
    except OSError as error:
        if out_of_space(error):
            raise NoSpace(path, f"cannot {operation} it: {error.strerror}; free some space") from error
        if error.errno in _UNUSABLE:
            raise JournalUnavailable(error.filename or path, f"cannot {operation} it: {error.strerror}") from error
        raise failed(operation, path, error) from error


def encode_meta(uuid: bytes) -> bytes:
    """The file `meta`: three lines an operator can read. The first and the last keep their form in all versions."""
    text = f"zmqbus journal {FORMAT_VERSION}\nuuid {uuid.hex()}\n"
    return f"{text}crc {crc32(text.encode()):08x}\n".encode()


def read_meta(storage: Storage, path: str) -> bytes:
    """The journal's uuid, from the file `meta` in the directory `path`. Raises JournalCorrupt, JournalVersion."""
    data = read_file(storage, f"{path}/{META}")
    text, _, crc = data.rpartition(b"crc ")
    if crc != b"%08x\n" % crc32(text):
        raise JournalCorrupt(f"{path}/{META}", 0, "the file does not fit its checksum")
    title, _, rest = text.partition(b"\n")
    version = title.removeprefix(b"zmqbus journal ")
    if not version.isdigit():
        raise JournalCorrupt(f"{path}/{META}", 0, "this is not the meta file of a zmqbus journal")
    if int(version) > FORMAT_VERSION:
        raise JournalVersion(path, int(version), FORMAT_VERSION)
    return bytes.fromhex(rest.decode().removeprefix("uuid ").strip())


class Directory:
    """A journal directory that this process holds the lock of."""

    def __init__(self, storage: Storage, path: str, uuid: bytes, lock_fd: int) -> None:
        self.storage = storage
        self.path = path
        self.uuid = uuid
        self._lock_fd = lock_fd

    @classmethod
    def acquire(cls, storage: Storage, path: str, *, create: bool = True) -> Directory:
        """Lock a directory and learn its identity; make it a journal first, if it is missing or empty.

        On return its names are on disk, and no temporary files are left in it.
        """
        with os_errors("open", path):
            names = _prepare(storage, path) if create else storage.list(path)
            if META not in names and not create:
                raise JournalUnavailable(path, "there is no journal in it")
            lock_fd = storage.open(f"{path}/{LOCK}", write=True, create=True)
            try:
                if not storage.lock(lock_fd):
                    raise JournalLocked(path, _holder(storage, lock_fd) or None)
                if META not in storage.list(path):
                    publish_file(storage, path, META, [encode_meta(storage.random(16))], durable=True)
                uuid = read_meta(storage, path)
                for name in storage.list(path):
                    if name.endswith(TEMPORARY):  # never held a record: those come after the rename
                        remove_file(storage, f"{path}/{name}")
                # A process that was killed between a rename and its sync has left names only the cache knows of.
                storage.sync_directory(path)
            except BaseException:
                storage.close(lock_fd)
                raise
        return cls(storage, path, uuid, lock_fd)

    def release(self) -> None:
        if self._lock_fd >= 0:
            self.storage.close(self._lock_fd)
            self._lock_fd = -1


def in_use(storage: Storage, path: str) -> int | None:
    """The id of the process that holds a journal's lock, 0 if that is not known; None if nobody holds it."""
    try:
        fd = storage.open(f"{path}/{LOCK}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _holder(storage, fd) if storage.locked(fd) else None
    finally:
        storage.close(fd)


def _holder(storage: Storage, lock_fd: int) -> int:
    text = storage.pread(lock_fd, 20, 0).strip()
    return int(text) if text.isdigit() else 0


def _prepare(storage: Storage, path: str) -> list[str]:
    """See that a directory exists which is a journal or may become one. Returns the names in it."""
    try:
        names = storage.list(path)
    except FileNotFoundError:
        names = []
    if META in names:
        return names
    if others := sorted(name for name in names if name not in (LOCK, META + TEMPORARY)):
        if any(name.endswith(".zbj") for name in others):
            raise JournalCorrupt(f"{path}/{META}", 0, "the file is missing")
        raise JournalUnavailable(path, f"it is no journal but holds other files ({others[0]}, …): use an empty one")
    storage.mkdir(path)
    storage.sync_directory(dirname(path.rstrip("/")) or ("/" if path.startswith("/") else "."))
    return names
