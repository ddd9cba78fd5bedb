"""A worker as one owner of jobs knows it: how to speak to it, what it may send, and what is yet to be said to it.

Bookkeeping only, on the engine's loop. A tie that broke is not mended: there is another one then, and what was not
settled by the first is the owner's to give out again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import NamedTuple, Protocol, TypeVar

from zmqbus.protocol import commands
from zmqbus.protocol.commands import DELIVERIES_MAX, Body, Command

T = TypeVar("T")


class Fail(NamedTuple):
    """Why jobs are not done; see FAIL."""

    how: str
    delay_ms: int
    reason: str


class Wire(Protocol):
    """What leads to an owner: a link, or what stands for one to our own jobs."""

    def follow(self, body: Body, on_answer: Callable[[Command | None], None]) -> int:
        """Ask for what is answered again and again. 0: it cannot be reached."""

    def say(self, body: Body, number: int) -> bool:
        """Say something about it. False: it cannot be reached."""

    def unfollow(self, number: int) -> None:
        """Ignore what still comes."""


class Origin(Protocol):
    """What is to be known of a delivery if acknowledging it should be in vain."""

    number: int
    attempt: int
    topic: str
    origin: int


Job = tuple[int, int, int]
"""Number of the delivery, first and last seq."""
Done = tuple[Origin, int, int]
"""The same, with what is to be known of it."""


class Tie:
    """To one owner."""

    def __init__(self, number: int, origin: int, name: str, wire: Wire) -> None:
        self.number = number
        """The worker's id."""
        self.origin = origin
        self.name = name
        self.wire = wire
        self.request = 0
        self.gone = False
        self.barred = False
        """There is no sense in asking again before its owner has said WELCOME anew."""
        self.granted = 0
        """How many jobs may have been sent in all,"""
        self.received = 0
        """how many came, as far as they are counted,"""
        self.finished = 0
        """and how many of these are this worker's no more."""
        self.was_short = False
        """When it was granted more, all that it had been before had come; and nothing has since."""
        self.last_job = self.last_heard = -inf
        self.done: list[Done] = []
        self.fails: dict[Fail, list[Job]] = {}
        self.asked = self.answered = 0
        """DONEs and FAILs, and how many of them are answered, which happens in their order."""
        self._unsaid: deque[Body] = deque()
        self._unsettled: deque[tuple[list[Job], list[Done]]] = deque()

    def add(self, done: Iterable[Done]) -> None:
        """These are acknowledged."""
        for entry in done:
            self.done.append(entry)
            self.finished += entry[2] - entry[1] + 1

    def fail(self, fail: Fail, job: Job) -> None:
        """These are not done."""
        self.fails.setdefault(fail, []).append(job)
        self.finished += job[2] - job[1] + 1

    @property
    def is_behind(self) -> bool:
        """Something could not be said yet."""
        return bool(self._unsaid)

    @property
    def unsettled(self) -> int:
        """Jobs that were acknowledged and of which no more is known."""
        return sum(last - first + 1 for done in self._acknowledged() for _, first, last in done)

    def compose(self, credit: int) -> None:
        """Put into words what there is to say, and that so much may have been sent (0: as before)."""
        bodies: list[commands.Done | commands.Fail] = []
        for fail, jobs in self.fails.items():
            for part in _parts(jobs):
                bodies.append(commands.Fail(self.number, part, *fail))
                self._unsettled.append((part, []))
        for done in _parts(self.done) if self.done else ():
            jobs = [(origin.number, first, last) for origin, first, last in done]
            bodies.append(commands.Done(self.number, jobs))
            self._unsettled.append((jobs, done))
        self.asked += len(bodies)
        if credit:
            if not bodies:
                bodies.append(commands.Done(self.number))
            bodies[-1].credit = credit
        self.done, self.fails = [], {}
        self._unsaid += bodies

    def speak(self) -> bool:
        """Say what is unsaid. False: the owner cannot be reached now."""
        while self._unsaid:
            if not self.wire.say(self._unsaid[0], self.request):
                return False
            self._unsaid.popleft()
        return True

    def settled(self, refused: Iterable[Job]) -> list[Done]:
        """A SETTLED came: of the first that is not answered, or of that which it refuses something of. Returns those
        acknowledged jobs that it refuses."""
        if not self._unsettled:
            return []
        self.answered += 1
        late = set(map(tuple, refused))
        for at, (jobs, done) in enumerate(self._unsettled):
            if not late.isdisjoint(jobs):
                del self._unsettled[at]
                return [entry for entry, job in zip(done, jobs, strict=False) if job in late]
        self._unsettled.popleft()
        return []

    def abandon(self) -> list[Done]:
        """It is gone. Returns what was acknowledged and is not settled."""
        self.gone = True
        self.wire.unfollow(self.request)
        lost = [entry for done in self._acknowledged() for entry in done]
        self._unsettled.clear()
        self._unsaid.clear()
        self.done, self.fails = [], {}
        return lost

    def _acknowledged(self) -> Iterable[list[Done]]:
        return [*(done for _, done in self._unsettled), self.done]


def _parts(entries: list[T]) -> Iterable[list[T]]:
    """What fits into one command each."""
    if len(entries) <= DELIVERIES_MAX:
        return (entries,)
    return (entries[at : at + DELIVERIES_MAX] for at in range(0, len(entries), DELIVERIES_MAX))
