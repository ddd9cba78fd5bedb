"""The events of durable messaging that test processes write down: see tests/chaos/recording.py.

    recorder = Recorder(folder / "publisher-1.jsonl")
    recorder.record(Sent("logs.a", origin, 1, digest(value)))    # before publish is called
    recorder.record(Acked("logs.a", origin, 1))                  # after it was said to be on disk
    history = load(folder.glob("*.jsonl"))                       # all of them, merged

`Sent` and `Opened` are recorded before it is done, `Acked`, `Failed` and `Committed` after it was told, and `Consumed`
before the commit that covers it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from tests.chaos.recording import Event as _Event
from tests.chaos.recording import Format, HistoryError, Line, Recorder, digest, merge


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

_format = Format(Event)
parse, load = _format.parse, _format.load

__all__ = [
    "Acked", "Committed", "Consumed", "Event", "Failed", "HistoryError", "Journaled", "Killed", "Line", "Opened",
    "Recorder", "Sent", "digest", "load", "merge", "parse",
]  # fmt: skip
