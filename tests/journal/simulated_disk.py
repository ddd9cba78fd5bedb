"""A disk in memory that forgets what was not synced: dropped, reordered and torn writes, lost names, failing calls.

It is harsher than any real file system: every 512-byte sector of every write since the last sync of its file may or
may not have reached the disk, alone; every name made, moved or removed since the last sync of its directory
likewise; and a file whose name is lost is gone, synced or not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from posixpath import dirname, join
from random import Random

SECTOR = 512


class PowerCut(BaseException):
    """Nothing may catch this: the machine is off."""


class Inode:
    """A file: what programs see (`cache`), what is on the platter (`disk`), and what happened in between."""

    def __init__(self, disk: bytes = b"") -> None:
        self.cache = bytearray(disk)
        self.disk = bytes(disk)
        self.pending: list[tuple[int, bytes] | int] = []  # writes, and new sizes

    def survivor(self, rng: Random, keep: float) -> bytes:
        """What is on the platter after a power cut: each sector of each pending write made it with chance `keep`."""
        disk = bytearray(self.disk)
        for op in self.pending:
            if isinstance(op, int):
                if rng.random() < keep:
                    _resize(disk, op)
                continue
            position, data = op
            at = 0
            while at < len(data):
                size = min(SECTOR - (position + at) % SECTOR, len(data) - at)
                if rng.random() < keep:
                    if len(disk) < position + at:
                        _resize(disk, position + at)
                    disk[position + at : position + at + size] = data[at : at + size]
                at += size
        return bytes(disk)


def _resize(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


class Folder:
    """A directory: names now, names on the platter, and the changes in between, each of them atomic."""

    def __init__(self) -> None:
        self.names: dict[str, Inode | Folder] = {}
        self.disk: dict[str, Inode | Folder] = {}
        self.pending: list[Callable[[dict[str, Inode | Folder]], None]] = []

    def change(self, step: Callable[[dict[str, Inode | Folder]], None]) -> None:
        step(self.names)
        self.pending.append(step)


class SimulatedDisk:
    """A `Storage`. `calls` counts every call that changes something or could fail; see `plan`."""

    def __init__(self, rng: Random, root: Folder | None = None) -> None:
        self._rng = rng
        self._root = root or Folder()
        self._files: dict[int, Inode] = {}
        self._locked: dict[int, Inode] = {}
        self._next_fd = 3
        self.calls = 0
        self.trace: list[str] = []
        self.plan: dict[int, str] = {}
        """Call number → "cut" (power fails there), "short" (a write takes only half), or an errno name."""
        self.bytes_max: int | None = None

    # --- what happens to machines ---------------------------------------------------------------

    def killed(self) -> SimulatedDisk:
        """The same disk as the next process finds it: no open files, no locks, but the page cache is whole."""
        return SimulatedDisk(self._rng, self._root)

    def power_cut(self) -> SimulatedDisk:
        """The same disk after power has failed and come back."""
        keep = self._rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        copies: dict[int, Inode] = {}

        def survive(folder: Folder) -> Folder:
            names = dict(folder.disk)
            for step in folder.pending:
                if self._rng.random() < keep:
                    step(names)
            after = Folder()
            for name, node in names.items():
                if isinstance(node, Folder):
                    after.disk[name] = survive(node)
                else:
                    if id(node) not in copies:
                        copies[id(node)] = Inode(node.survivor(self._rng, keep))
                    after.disk[name] = copies[id(node)]
            after.names = dict(after.disk)
            return after

        return SimulatedDisk(self._rng, survive(self._root))

    def files(self, path: str) -> dict[str, bytes]:
        """Contents of a directory's files, as programs see them."""
        return {name: bytes(node.cache) for name, node in self._folder(path).names.items() if isinstance(node, Inode)}

    def put(self, path: str, data: bytes) -> None:
        """Place a file, durably, behind everybody's back."""
        folder = self._folder(dirname(path))
        folder.names[path.rpartition("/")[2]] = folder.disk[path.rpartition("/")[2]] = Inode(data)

    # --- the Storage methods --------------------------------------------------------------------

    def open(self, path: str, *, write: bool = False, create: bool = False) -> int:
        self._enter("open", path)
        folder, name = self._folder(dirname(path)), path.rpartition("/")[2]
        if name not in folder.names:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            inode = Inode()
            folder.change(lambda names: names.__setitem__(name, inode))
        node = folder.names[name]
        assert isinstance(node, Inode)
        self._next_fd += 1
        self._files[self._next_fd] = node
        return self._next_fd

    def close(self, fd: int) -> None:
        self._files.pop(fd)
        self._locked.pop(fd, None)

    def pread(self, fd: int, size: int, position: int) -> bytes:
        return bytes(self._files[fd].cache[position : position + size])

    def pwritev(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], position: int) -> int:
        data = b"".join(buffers)
        action = self._enter("pwritev", f"{fd} at {position}, {len(data)} bytes")
        inode = self._files[fd]
        if action == "short":
            data = data[: len(data) // 2]
        grows = max(0, position + len(data) - len(inode.cache))
        if self.bytes_max is not None and grows > self.free_bytes(""):
            data = data[: len(data) - grows + self.free_bytes("")]
            if not data:
                raise OSError(errno.ENOSPC, "no space left on device")
        if len(inode.cache) < position:
            _resize(inode.cache, position)
        inode.cache[position : position + len(data)] = data
        inode.pending.append((position, data))
        self._leave()
        return len(data)

    def fdatasync(self, fd: int) -> None:
        inode = self._files[fd]
        try:
            self._enter("fdatasync", str(fd))
        except OSError:
            # What Linux does: some of it reached the disk, all of it now counts as clean, and stays in the cache.
            inode.disk = inode.survivor(self._rng, 0.5)
            inode.pending.clear()
            raise
        inode.disk = _applied(inode)
        inode.pending.clear()
        self._leave()

    fsync = fdatasync

    def truncate(self, fd: int, size: int) -> None:
        self._enter("truncate", f"{fd} to {size}")
        inode = self._files[fd]
        _resize(inode.cache, size)
        inode.pending.append(size)
        self._leave()

    def allocate(self, fd: int, size: int) -> None:
        self._enter("allocate", f"{fd} to {size}")
        inode = self._files[fd]
        if size > len(inode.cache):
            if self.bytes_max is not None and size - len(inode.cache) > self.free_bytes(""):
                raise OSError(errno.ENOSPC, "no space left on device")
            _resize(inode.cache, size)
            inode.pending.append(size)
        self._leave()

    def size(self, fd: int) -> int:
        return len(self._files[fd].cache)

    def rename(self, old: str, new: str) -> None:
        self._enter("rename", f"{old} → {new}")
        folder, old, new = self._folder(dirname(old)), old.rpartition("/")[2], new.rpartition("/")[2]
        inode = folder.names[old]

        def step(names: dict[str, Inode | Folder]) -> None:
            names.pop(old, None)
            names[new] = inode

        folder.change(step)
        self._leave()

    def unlink(self, path: str) -> None:
        self._enter("unlink", path)
        folder, name = self._folder(dirname(path)), path.rpartition("/")[2]
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        folder.change(lambda names: names.pop(name, None) and None)
        self._leave()

    def mkdir(self, path: str) -> None:
        self._enter("mkdir", path)
        parent, name = self._folder(dirname(path)), path.rpartition("/")[2]
        if name not in parent.names:
            folder = Folder()
            parent.change(lambda names: names.__setitem__(name, folder))
        self._leave()

    def sync_directory(self, path: str) -> None:
        self._enter("sync_directory", path)
        folder = self._folder(path)
        folder.disk = dict(folder.names)
        folder.pending.clear()
        self._leave()

    def list(self, path: str) -> list[str]:
        return sorted(self._folder(path).names)

    def lock(self, fd: int) -> bool:
        if self._files[fd] in self._locked.values():
            return False
        self._locked[fd] = self._files[fd]
        return True

    def locked(self, fd: int) -> bool:
        return self._files[fd] in self._locked.values()

    def free_bytes(self, path: str) -> int:
        if self.bytes_max is None:
            return 1 << 40
        return self.bytes_max - self._used(self._root)

    def random(self, size: int) -> bytes:
        return self._rng.randbytes(size)

    # --- inside ---------------------------------------------------------------------------------

    def _used(self, folder: Folder) -> int:
        return sum(self._used(n) if isinstance(n, Folder) else len(n.cache) for n in folder.names.values())

    def _folder(self, path: str) -> Folder:
        folder = self._root
        for part in path.strip("/").split("/"):
            if part:
                node = folder.names.get(part)
                if not isinstance(node, Folder):
                    raise FileNotFoundError(errno.ENOENT, "no such directory", path)
                folder = node
        return folder

    def _enter(self, operation: str, detail: str) -> str | None:
        self.calls += 1
        self.trace.append(f"{self.calls} {operation} {detail}")
        action = self.plan.get(self.calls)
        if action == "cut" and self._rng.random() < 0.5:
            raise PowerCut
        if action is None or action in ("cut", "short"):
            return action
        raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)), join("/", detail))

    def _leave(self) -> None:
        if self.plan.get(self.calls) == "cut":  # it was done, and then the lights went out
            raise PowerCut


def _applied(inode: Inode) -> bytes:
    """The platter after a successful sync: pending writes reach it, but no page the kernel believes to be clean."""
    disk = bytearray(inode.disk)
    for op in inode.pending:
        if isinstance(op, int):
            _resize(disk, op)
        else:
            position, data = op
            if len(disk) < position:
                _resize(disk, position)
            disk[position : position + len(data)] = data
    return bytes(disk)
