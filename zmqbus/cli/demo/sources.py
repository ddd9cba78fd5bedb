"""What the demo ships: the log files of this machine, or readings of its counters. Looks at files only."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LOGS = Path("/var/log")
COUNTERS = ("stat", "meminfo", "vmstat", "net/dev", "diskstats", "interrupts", "loadavg")  # in /proc
FILES_MAX = 8
VISITED_MAX = 10_000  # entries of /var/log that are looked at
SAMPLE_BYTES = 4096  # that tell text from anything else
COUNTED_BYTES = 4 * 1024 * 1024  # of a file, to say how many lines it has; it may be large


class Source(NamedTuple):
    """A file, how many bytes and lines it has for now, and the topic its lines go to."""

    path: Path
    bytes: int
    lines: str
    topic: str


def is_text(path: Path) -> bool:
    """Whether this is a regular, readable file with lines of text in it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            sample = file.read(SAMPLE_BYTES)
        sample.decode()
    except OSError:
        return False
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # the sample may end within a character
            return False
    return b"\n" in sample and b"\0" not in sample


def find_logs(directory: Path = LOGS) -> list[Path]:
    """The largest text files below a directory; links are not followed."""
    found = []
    visited = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            visited += 1
            path = Path(folder, name)
            if not path.is_symlink() and is_text(path):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_size, path))
        if visited > VISITED_MAX:
            break
    return [path for _, path in sorted(found, reverse=True)[:FILES_MAX]]


def find_counters() -> list[Path]:
    """This machine's own counters, each reading of which is new."""
    return [path for name in COUNTERS if is_text(path := Path("/proc", name))][: FILES_MAX // 2]


def token(text: str) -> str:
    """A text as one token of a topic."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:60] or "file"


def sources(paths: Sequence[Path], host: str) -> list[Source]:
    """What to ship, and where to: `logs.<host>.<file>`, no two to the same topic."""
    found: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        below = path.relative_to(LOGS) if path.is_relative_to(LOGS) else Path(path.name)
        name = unique = token(str(below).removesuffix(".log"))
        number = 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        with open(path, "rb") as file:
            data = file.read(COUNTED_BYTES)
        size = max(len(data), path.stat().st_size)  # counters have none
        lines = data.count(b"\n")
        found.append(Source(path, size, f"{lines:,}{'+' * (size > len(data))}", f"logs.{token(host)}.{unique}"))
    return found
