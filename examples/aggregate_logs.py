"""Collect everybody's log lines into one file for each topic: `python examples/aggregate_logs.py logs/ [bus.key]`.

Says what it missed: a gap is a range of lines that no shipper has in memory any more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import zmqbus

OPEN_MAX = 64  # files open at a time; there may be any number of topics
NAME_MAX = 200  # characters of a file name; a topic may be longer


class Files:
    """Files to append to, by topic. Those used last are kept open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open: dict[str, TextIO] = {}

    def append(self, topic: str, line: object) -> None:
        """One line more."""
        name = quote(topic, safe="")[:NAME_MAX] + ".log"  # a topic may hold a slash, a file name may not
        file = self._open.pop(name, None) or (self._folder / name).open("a", encoding="utf-8", buffering=1)
        self._open[name] = file  # the last of them now
        if len(self._open) > OPEN_MAX:
            self._open.pop(next(iter(self._open))).close()
        print(line, file=file)

    def close(self) -> None:
        """All of them."""
        for file in self._open.values():
            file.close()


def main() -> None:
    key = sys.argv[2] if len(sys.argv) > 2 else None
    files = Files(Path(sys.argv[1]))
    with zmqbus.Node("aggregator", key=key) as node, node.subscribe("logs.>", history=1000) as lines:
        events = node.events()
        try:
            for line in lines:
                files.append(line.topic, line.value)
                while (event := events.get(0)) is not None:
                    if isinstance(event, zmqbus.Gap):
                        missed = f"{event.count} lines of {event.topic}: {event.first} to {event.last}"
                        print(f"missed {missed}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"{lines.repaired} repaired, {lines.lost} lost", file=sys.stderr)
        finally:
            files.close()


if __name__ == "__main__":
    main()
