"""Histories: what test processes write down, one JSON object per line, one file per life of a process.

    recorder = Recorder(folder / "publisher-0001.jsonl")
    recorder.record(Sent(…), …)                                  # events: subclasses of `Event`, each with a tag
    lines = Format(Sent | Acked | …).load(folder.glob("*.jsonl"))  # all of them, merged

**When to record** is what a verdict rests on. What a process is about to do it records before; what it was told it
records after; what it was given it records before it does anything about it. So a line that was never written only
ever makes a checker ask for less.

**Torn lines.** A line is one write(2) with O_APPEND, so a recorder that is killed with -9 loses at most its last
line, or leaves a part of it. Bytes after the last newline of a file are dropped, as if the line had not been begun.
A line that ends in a newline and yet cannot be read is no accident of a kill: `HistoryError`. A file belongs to
one life of one process, since a torn line must stay the last one: `Recorder` refuses a file that exists.

**Time** is CLOCK_MONOTONIC in nanoseconds, taken when `record` is called, which is the same clock for all processes
of a machine, those in network namespaces included. `load` sorts by it; the lines of one file keep their order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec


class HistoryError(Exception):
    """The history itself is not one: the test is at fault, not what it tests."""


class Event(msgspec.Struct, tag_field="event", kw_only=True):
    """What can be recorded."""

    time_ns: int = 0


class Line(msgspec.Struct, frozen=True):
    """An event and where it was recorded."""

    event: Any
    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


_encode = msgspec.json.Encoder().encode


def digest(value: bytes) -> str:
    """What stands for a value in a history."""
    return blake2b(value, digest_size=8).hexdigest()


class Recorder:
    """Appends events to a new file. Any thread may record: a line is one system call, and time never goes backwards."""

    def __init__(self, path: Path | str, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._clock = clock
        self._turn = Lock()

    def record(self, *events: Event) -> None:
        """Write down events that happened together; all of them carry the time of this call."""
        with self._turn:
            now = self._clock()
            for event in events:
                event.time_ns = now
            data = b"".join(_encode(event) + b"\n" for event in events)
            if os.write(self._fd, data) != len(data):
                raise OSError("a history could not be written: is the disk full?")

    def close(self) -> None:
        os.close(self._fd)


class Format:
    """Reads histories of certain events."""

    def __init__(self, events: Any) -> None:
        """`events`: their union."""
        self._decode = msgspec.json.Decoder(events).decode

    def parse(self, data: bytes, file: str = "history") -> list[Line]:
        """The events of one file, in order. What follows the last newline is torn off and dropped."""
        lines: list[Line] = []
        for number, text in enumerate(data.split(b"\n")[:-1], 1):
            try:
                event = self._decode(text)
            except msgspec.MsgspecError as error:
                raise HistoryError(f"{file}:{number}: {error}: {text[:100]!r}") from error
            if lines and event.time_ns < lines[-1].event.time_ns:
                raise HistoryError(f"{file}:{number}: the time goes backwards: record under a lock, or in one thread")
            lines.append(Line(event, file, number))
        return lines

    def load(self, paths: Iterable[Path]) -> list[Line]:
        """Everything that was recorded in these files, whose names must differ."""
        ordered = sorted(paths)
        files = {path.name: path.read_bytes() for path in ordered}
        if len(files) != len(ordered):
            raise HistoryError("two files of one history have the same name")
        return merge([self.parse(data, name) for name, data in files.items()])


def merge(files: Iterable[list[Line]]) -> list[Line]:
    """The lines of all files by time; those of one file keep their order."""
    return sorted((line for lines in files for line in lines), key=lambda line: line.event.time_ns)
