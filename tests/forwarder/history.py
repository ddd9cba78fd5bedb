"""What test processes write down while messages travel: one JSON object per line, one file per life of a process.

    recorder = Recorder(folder / "publisher-1.jsonl")
    recorder.record(Sent("logs.a", origin, 1, digest(value)))    # before publish is called
    recorder.record(Acked("logs.a", origin, 1))                  # after it was said to be on disk
    history = load(folder.glob("*.jsonl"))                       # all of them, merged

**When to record** is what a verdict rests on. What a process is about to do it records before (`Sent`, `Opened`);
what it was told it records after (`Acked`, `Failed`, `Committed`); what it was given it records before it does
anything about it (`Consumed` before the commit that covers it). So a line that was never written only ever makes
the checker ask for less.

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
from typing import TypeAlias

import msgspec


class HistoryError(Exception):
    """The history itself is not one: the test is at fault, not what it tests."""


class _Event(msgspec.Struct, tag_field="event", kw_only=True):
    time_ns: int = 0


class Sent(_Event, tag="sent", kw_only=False):
    """A publisher is about to publish this."""

    topic: str
    origin: int
    seq: int
    value: str
    """What `digest` makes of the value."""


class Acked(_Event, tag="acked", kw_only=False):
    """A publisher was told that `first`..`seq` of its stream are on disk; without `first`, that `seq` is."""

    topic: str
    origin: int
    seq: int
    first: int | None = None


class Failed(_Event, tag="failed", kw_only=False):
    """A publisher was told that nobody knows about `first`..`seq` (NotDurable): they may be on disk or not."""

    topic: str
    origin: int
    seq: int
    first: int | None = None


class Journaled(_Event, tag="journaled", kw_only=False):
    """A message of the journal as it is in the end."""

    offset: int
    topic: str
    origin: int
    seq: int
    value: str


class Opened(_Event, tag="opened", kw_only=False):
    """A consumer is about to subscribe: a session begins. It lasts until the next one of this consumer in the file.

    `patterns` and `start` (the offset at which a consumer without a cursor begins) say what it is to be given.
    """

    consumer: str
    patterns: list[str] = msgspec.field(default_factory=lambda: [">"])
    start: int = 0


class Consumed(_Event, tag="consumed", kw_only=False):
    """A consumer was given this."""

    consumer: str
    offset: int
    topic: str
    origin: int
    seq: int
    value: str


class Committed(_Event, tag="committed", kw_only=False):
    """A consumer was told that its cursor is durable at `offset`, which is the next message it wants."""

    consumer: str
    offset: int


class Killed(_Event, tag="killed", kw_only=False):
    """A process was killed: for the reader of a report."""

    role: str


Event: TypeAlias = Sent | Acked | Failed | Journaled | Opened | Consumed | Committed | Killed


class Line(msgspec.Struct, frozen=True):
    """An event and where it was recorded."""

    event: Event
    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


def digest(value: bytes) -> str:
    """What stands for a value in a history."""
    return blake2b(value, digest_size=8).hexdigest()


class Recorder:
    """Appends events to a new file. Any thread may record: a line is one system call."""

    def __init__(self, path: Path | str, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._clock = clock

    def record(self, *events: Event) -> None:
        """Write down events that happened together; all of them carry the time of this call."""
        now = self._clock()
        for event in events:
            event.time_ns = now
        data = b"".join(_encode(event) + b"\n" for event in events)
        if os.write(self._fd, data) != len(data):
            raise OSError("a history could not be written: is the disk full?")

    def close(self) -> None:
        os.close(self._fd)


def parse(data: bytes, file: str = "history") -> list[Line]:
    """The events of one file, in order. What follows the last newline is torn off and dropped."""
    lines: list[Line] = []
    for number, text in enumerate(data.split(b"\n")[:-1], 1):
        try:
            event = _decode(text)
        except msgspec.MsgspecError as error:
            raise HistoryError(f"{file}:{number}: {error}: {text[:100]!r}") from error
        if lines and event.time_ns < lines[-1].event.time_ns:
            raise HistoryError(f"{file}:{number}: the time goes backwards: record under a lock, or in one thread")
        lines.append(Line(event, file, number))
    return lines


def merge(files: Iterable[list[Line]]) -> list[Line]:
    """The lines of all files by time; those of one file keep their order."""
    return sorted((line for lines in files for line in lines), key=lambda line: line.event.time_ns)


def load(paths: Iterable[Path]) -> list[Line]:
    """Everything that was recorded in these files, whose names must differ."""
    ordered = sorted(paths)
    files = {path.name: path.read_bytes() for path in ordered}
    if len(files) != len(ordered):
        raise HistoryError("two files of one history have the same name")
    return merge([parse(data, name) for name, data in files.items()])
