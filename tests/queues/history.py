"""The events of queues that test processes write down: see tests/chaos/recording.py.

    recorder.record(Pushing("jobs.a", origin, 1, 20))             # before it is pushed
    recorder.record(Pushed("jobs.a", origin, 1, 20))              # after a durable push, or a flush, returned
    recorder.record(Closed(origin, remaining=0))                  # after close() returned
    recorder.record(Joining("worker-0001/1", lease=30.0))         # before it pulls
    recorder.record(Given("worker-0001/1", owner, 7, 1, "jobs.a", origin, 3))
    recorder.record(Handled("worker-0001/1", [job]))              # before it is acknowledged
    recorder.record(Confirmed("worker-0001/1", [job]))            # after that was confirmed

A **process** is one life of one role, `worker-0001`, and has the file of that name. Its nodes have that name as well,
so that whoever meets one knows which process it is. A **session** of a worker is what one `pull` opens.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from tests.chaos.recording import Event as _Event
from tests.chaos.recording import Format, HistoryError, Line, Recorder, merge


class Message(NamedTuple):
    """What was pushed."""

    queue: str
    origin: int
    seq: int

    def __str__(self) -> str:
        return f"{self.queue} {self.origin:x}#{self.seq}"


class Job(NamedTuple):
    """A message as a worker was given it: by which node, under which number of that node's deliveries."""

    owner: int
    delivery: int
    queue: str
    origin: int
    seq: int


class Pushing(_Event, tag="pushing", kw_only=False):
    """A producer is about to push these."""

    queue: str
    origin: int
    first: int
    last: int


class Refused(_Event, tag="refused", kw_only=False):
    """After all, these were not pushed: there was no room for them."""

    queue: str
    origin: int
    first: int
    last: int


class Pushed(_Event, tag="pushed", kw_only=False):
    """They are on a forwarder's disk: `push(durable=True)` returned, or `flush()`."""

    queue: str
    origin: int
    first: int
    last: int


class Closed(_Event, tag="closed", kw_only=False):
    """A producer has closed its node, which said that so many messages remained."""

    origin: int
    remaining: int


class Joining(_Event, tag="joining", kw_only=False):
    """A worker is about to pull: a session begins, all of whose jobs have that lease, in seconds."""

    session: str
    lease: float


class Met(_Event, tag="met", kw_only=False):
    """The node `owner`, from which a job came, is one of that process."""

    owner: int
    process: str


class Given(_Event, tag="given", kw_only=False):
    """A worker was given a job, for the `attempt`-th time."""

    session: str
    owner: int
    delivery: int
    attempt: int
    queue: str
    origin: int
    seq: int

    @property
    def job(self) -> Job:
        return Job(self.owner, self.delivery, self.queue, self.origin, self.seq)

    @property
    def message(self) -> Message:
        return Message(self.queue, self.origin, self.seq)


class Letter(_Event, tag="letter", kw_only=False):
    """And that job is the dead letter of a message."""

    job: Job
    queue: str
    origin: int
    seq: int
    attempts: int
    reason: str

    @property
    def message(self) -> Message:
        return Message(self.queue, self.origin, self.seq)


class Handled(_Event, tag="handled", kw_only=False):
    """A worker has done these, and is about to acknowledge them."""

    session: str
    jobs: list[Job]


class Confirmed(_Event, tag="confirmed", kw_only=False):
    """A worker was told that they are done for good."""

    session: str
    jobs: list[Job]


class Failing(_Event, tag="failing", kw_only=False):
    """A worker is about to say that a job is not done. `how`: "nack", "reject" or "return"."""

    session: str
    job: Job
    how: str


class Extending(_Event, tag="extending", kw_only=False):
    """A worker is about to ask for so many seconds more, for all that came in that delivery."""

    session: str
    owner: int
    delivery: int
    seconds: float


class Leaving(_Event, tag="leaving", kw_only=False):
    """A worker is about to end its session: what it has in hand is not done."""

    session: str


class Parted(_Event, tag="parted", kw_only=False):
    """A process no longer sees another, or its connection to it is broken."""

    process: str
    peer: str


class Killed(_Event, tag="killed", kw_only=False):
    """A process is about to be killed."""

    process: str


class Stopped(_Event, tag="stopped", kw_only=False):
    """A process is about to be stopped."""

    process: str


class Continued(_Event, tag="continued", kw_only=False):
    """It goes on."""

    process: str


Event: TypeAlias = (
    Pushing
    | Refused
    | Pushed
    | Closed
    | Joining
    | Met
    | Given
    | Letter
    | Handled
    | Confirmed
    | Failing
    | Extending
    | Leaving
    | Parted
    | Killed
    | Stopped
    | Continued
)
_format = Format(Event)
parse, load = _format.parse, _format.load

__all__ = [
    "Closed", "Confirmed", "Continued", "Event", "Extending", "Failing", "Given", "Handled", "HistoryError", "Job",
    "Joining", "Killed", "Leaving", "Letter", "Line", "Message", "Met", "Parted", "Pushed", "Pushing", "Recorder",
    "Refused", "Stopped", "load", "merge", "parse",
]  # fmt: skip
