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


def wait_for(path: Path) -> BinaryIO:
    """The file, as soon as there is one."""
    while True:
        try:
            return path.open("rb")
        except FileNotFoundError:
            time.sleep(POLL)


def read_lines(file: BinaryIO) -> Iterator[str]:
    """The whole lines from our place on; one that is still being written is left for later."""
    while (line := file.readline()).endswith(b"\n"):
        yield line.decode(errors="replace").rstrip("\r\n")
    file.seek(-len(line), os.SEEK_CUR)


def tail(file: BinaryIO) -> bytes:
    """What stands before our place."""
    place = file.tell()
    return os.pread(file.fileno(), min(place, TAIL), max(0, place - TAIL))


def follow(path: Path) -> Iterator[str]:
    """Lines as they are appended. When the file is rotated or truncated, what is new is read from its beginning."""
    was_there = path.exists()
    file = wait_for(path)
    if was_there:
        file.seek(0, os.SEEK_END)
    before = tail(file)
    while True:
        if tail(file) != before:  # truncated, and perhaps written to again
            file.seek(0)
        yield from read_lines(file)
        before = tail(file)
        time.sleep(POLL)
        try:
            rotated = not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:  # moved away; until there is a new one, the old one may still grow
            rotated = False
        if rotated:
            yield from read_lines(file)
            file.close()
            file = wait_for(path)
            before = b""


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
