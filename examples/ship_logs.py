"""Ship a log file, line by line, as it grows: `python examples/ship_logs.py /var/log/syslog`.

Run one on each machine; with a key (`zmqbus keygen bus.key`) pass it as a second argument.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import zmqbus


def follow(path: Path) -> Iterator[str]:
    """Lines as they are appended; begins anew when the file is rotated."""
    file = path.open(errors="replace")
    file.seek(0, 2)
    while True:
        line = file.readline()
        if line:
            yield line.rstrip("\n")
            continue
        time.sleep(0.2)
        if path.stat().st_ino != Path(f"/proc/self/fd/{file.fileno()}").stat().st_ino:
            file.close()
            file = path.open(errors="replace")


def main() -> None:
    path = Path(sys.argv[1])
    key = sys.argv[2] if len(sys.argv) > 2 else None
    host, stem = (re.sub(r"[^\w-]+", "_", part) for part in (socket.gethostname(), path.stem))
    with zmqbus.Node(f"{host}-{stem}", key=key) as node:
        ship = node.publisher(f"logs.{host}.{stem}").send
        for line in follow(path):
            ship(line)


if __name__ == "__main__":
    main()
