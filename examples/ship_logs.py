"""Ship a log file, line by line, as it grows: `python examples/ship_logs.py /var/log/syslog`.

Run one on each machine; with a key (`zmqbus keygen bus.key`) pass it as a second argument. The file may be rotated,
truncated, or not there for a while.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zmqbus

POLL = 0.2  # seconds
TAIL = 64  # bytes before our place, by which we see that the file is still the same
BLOCK = 1024 * 1024  # bytes read at a time


def wait_for(path: Path) -> BinaryIO:
    """The file, as soon as there is one."""
    while True:
        try:
            return path.open("rb")
        except FileNotFoundError:
            time.sleep(POLL)


def end_of(file: BinaryIO) -> tuple[int, bytes]:
    """A place in the file, and what stands before it."""
    size = os.fstat(file.fileno()).st_size
    return size, os.pread(file.fileno(), min(size, TAIL), max(0, size - TAIL))


def follow(path: Path) -> Iterator[str]:
    """Whole lines as they are appended. When the file is rotated or truncated, what is new is read from its beginning.

    What stands before our place is read anew each time, together with what comes after it: if it is not the same any
    more, the file was truncated, and perhaps written to again.
    """
    was_there = path.exists()
    file = wait_for(path)
    place, before = end_of(file) if was_there else (0, b"")
    last = False  # another file has taken its place: what it has is all that there will be
    while True:
        data = os.pread(file.fileno(), len(before) + BLOCK, place - len(before))
        if not data.startswith(before):
            place, before = 0, b""
            continue
        data = data[len(before) :]
        if len(data) < BLOCK or b"\n" in data:  # else it is a very long line, which is cut
            data = data[: data.rfind(b"\n") + 1]
        if data:
            for line in data.removesuffix(b"\n").split(b"\n"):
                yield line.decode(errors="replace").rstrip("\r")
            place, before = place + len(data), (before + data)[-TAIL:]
            continue
        if last:
            file.close()
            file = wait_for(path)
            place, before, last = 0, b"", False
            continue
        time.sleep(POLL)
        with contextlib.suppress(FileNotFoundError):  # moved away; until there is a new one, the old one may still grow
            last = not os.path.samestat(path.stat(), os.fstat(file.fileno()))


def main() -> None:
    path = Path(sys.argv[1])
    key = sys.argv[2] if len(sys.argv) > 2 else None
    host, stem = (re.sub(r"[^\w-]+", "_", part) for part in (socket.gethostname(), path.stem))
    with zmqbus.Node(f"{host}-{stem}", key=key) as node:
        ship = node.publisher(f"logs.{host}.{stem}").send
        for line in follow(path):
            ship(line)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
