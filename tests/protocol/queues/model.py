"""What a dispatcher has to do, said once more and as simply as can be: message by message, whatever that costs.

The model does not choose who gets what. It says of each delivery whether it may be, and after `take` whether anything
was left undone that could have been done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.dispatcher import Dispatcher
from zmqbus.protocol.queues.work import Delivery, Figures, Line, Team, Work

LINES: list[Line] = [(None, "jobs.a"), (None, "jobs.b"), ("g", "logs.x"), ("h", "logs.x"), (None, "$dead.jobs.a")]
TEAMS = {
    Team("g", ("jobs.>", "logs.>")): {(None, "jobs.a"), (None, "jobs.b"), ("g", "logs.x")},
    Team("g", ("jobs.a",)): {(None, "jobs.a")},
    Team("h", ("jobs.b", "logs.*", "$dead.>")): {(None, "jobs.b"), ("h", "logs.x"), (None, "$dead.jobs.a")},
}

WAITING, DELAYED, FLYING, DYING, DONE = "waiting", "delayed", "flying", "dying", "done"


@dataclass(eq=False)
class Message:
    """One message."""

    work: Work
    seq: int
    attempts: int = 0
    """That count."""
    state: str = WAITING
    fresh: bool = True
    until: float = 0.0
    """When it is DELAYED."""
    holder: int | None = None
    """The delivery whose answer would be accepted: it is FLYING, or expired and WAITING."""


@dataclass(eq=False)
class Worker:
    """One worker."""

    team: Team
    lease: float
    granted: int = 0
    sent: int = 0
    silent: bool = False


@dataclass(eq=False)
class Given:
    """A delivery that was taken."""

    worker: str
    delivery: Delivery
    first: int
    last: int
    attempt: int
    messages: list[Message]
    deadline: float


@dataclass
class Tally:
    """Of one line, since the beginning."""

    done: int = 0
    dead: int = 0
    redelivered: int = 0


@dataclass
class Model:
    """All of it."""

    attempts_max: int
    now: float = 100.0
    workers: dict[str, Worker] = field(default_factory=dict)
    works: dict[Work, list[Message]] = field(default_factory=dict)
    given: dict[int, Given] = field(default_factory=dict)
    tallies: dict[Line, Tally] = field(default_factory=dict)
    touched: set[Work] = field(default_factory=set)
    lived: dict[tuple[Message, int], str] = field(default_factory=dict)
    """Which worker has had a message under an attempt that counted."""

    # --- questions -------------------------------------------------------------------------------

    def limited(self, message: Message) -> bool:
        return not message.work.line[1].startswith("$dead.")

    def is_last(self, message: Message) -> bool:
        """Its next attempt, or the one it is in, is the last."""
        return self.limited(message) and message.attempts + 1 >= self.attempts_max

    def messages(self, line: Line, state: str) -> list[Message]:
        return [m for work, ms in self.works.items() if work.line == line for m in ms if m.state == state]

    def hand(self, worker: str) -> list[Message]:
        return [
            message
            for given in self.given.values()
            if given.worker == worker
            for message in given.messages
            if message.state == FLYING and message.holder == given.delivery.number
        ]

    def able(self, name: str) -> bool:
        worker = self.workers[name]
        return worker.sent < worker.granted and not worker.silent and not any(map(self.is_last, self.hand(name)))

    # --- what happens ----------------------------------------------------------------------------

    def add(self, work: Work, due: dict[int, float]) -> None:
        messages = []
        self.tallies.setdefault(work.line, Tally())
        for index in range(work.batch.count):
            message = Message(work, work.batch.first + index, work.attempts.get(index, 0))
            if work.done >> index & 1:
                message.state = DONE
            elif self.limited(message) and message.attempts >= self.attempts_max:
                self.die(message)
            elif due.get(index, 0.0) > self.now:
                self.delay(message, due[index])
            message.fresh = message.state == WAITING and not message.attempts
            messages.append(message)
        self.works[work] = messages

    def join(self, name: str, team: Team, lease: float, credit: int) -> None:
        if name in self.workers and self.workers[name].team != team:
            self.leave(name, counted=True)
        worker = self.workers.setdefault(name, Worker(team, lease))
        worker.lease = lease
        self.grant(name, credit)

    def grant(self, name: str, credit: int) -> None:
        if name in self.workers:
            worker = self.workers[name]
            worker.granted = max(worker.granted, credit)
            worker.silent = False

    def leave(self, name: str, counted: bool) -> None:
        if self.workers.pop(name, None) is None:
            return
        for number in [number for number, given in self.given.items() if given.worker == name]:
            given = self.given.pop(number)
            for message in given.messages:
                if message.holder == number:
                    message.holder = None
                    if message.state == FLYING and counted:
                        self.failed(message, given.attempt)
                    elif message.state == FLYING:
                        self.returned([message], given.attempt)

    def answer(self, name: str, number: int, first: int, last: int) -> tuple[list[Message], bool]:
        """Whom the answer is accepted for; and whether that is everything it names."""
        if name not in self.workers:
            return [], False
        self.workers[name].silent = False
        given = self.given.get(number)
        if given is None or given.worker != name:
            return [], False
        named = [m for m in given.messages if first <= m.seq <= last]
        accepted = [m for m in named if m.holder == number]
        for message in accepted:
            message.holder = None
        return accepted, bool(accepted) and len(accepted) == last - first + 1

    def done(self, message: Message) -> None:
        assert message.state in (FLYING, WAITING)
        message.state = DONE
        self.tallies[message.work.line].done += 1

    def failed(self, message: Message, attempt: int, until: float = 0.0) -> None:
        message.attempts = attempt
        if self.limited(message) and attempt >= self.attempts_max:
            self.die(message)
        elif until > self.now:
            self.delay(message, until)
        else:
            self.wait(message)

    def wait(self, message: Message) -> None:
        message.state, message.fresh = WAITING, False

    def delay(self, message: Message, until: float) -> None:
        message.state, message.until, message.fresh = DELAYED, until, False

    def die(self, message: Message) -> None:
        message.state, message.holder = DYING, None
        self.tallies[message.work.line].dead += 1

    def back_off(self, attempt: int) -> float:
        return [1.0, 2.0, 4.0, 8.0, 16.0, 32.0][attempt - 1] if attempt <= 6 else 60.0

    def pass_time(self, now: float) -> None:
        self.now = now
        for given in self.given.values():
            for message in given.messages:
                if message.holder == given.delivery.number and message.state == FLYING and given.deadline <= now:
                    self.failed(message, given.attempt)
                    self.workers[given.worker].silent = True
        for messages in self.works.values():
            for message in messages:
                if message.state == DELAYED and message.until <= now:
                    self.wait(message)

    def unsent(self, number: int) -> None:
        given = self.given[number]
        self.workers[given.worker].sent -= len(given.messages)
        for message in given.messages:
            self.lived.pop((message, given.attempt))
            message.holder = None
            if given.attempt > 1:
                self.tallies[message.work.line].redelivered -= 1
            self.wait(message)

    def untouched(self, line: Line, origin: int) -> list[Work]:
        """The newest works of an origin, as far back as nothing became of any message."""
        works: list[Work] = []
        for work in [w for w in reversed(self.works) if w.line == line and w.batch.origin == origin]:
            if work in self.touched or any(m.attempts or m.state == DONE for m in self.works[work]):
                break
            works.insert(0, work)
        return works

    def drop(self, work: Work) -> None:
        """It was never here."""
        for message in self.works.pop(work):
            message.holder = None

    def forget(self, line: Line) -> None:
        """There was never such a line."""
        for work in [work for work in self.works if work.line == line]:
            self.drop(work)
        self.tallies.pop(line, None)

    # --- what it says of the dispatcher ----------------------------------------------------------

    def taken(self, delivery: Delivery) -> None:
        """May this be, after all deliveries before?"""
        name, work, line = str(delivery.worker), delivery.work, delivery.work.line
        worker = self.workers[name]
        messages = self.works[work][delivery.first - work.batch.first : delivery.last + 1 - work.batch.first]
        assert [m.seq for m in messages] == list(range(delivery.first, delivery.last + 1)) != []
        assert line in TEAMS[worker.team]
        assert self.able(name)
        assert delivery.number not in self.given
        self.touched.add(work)
        assert delivery.deadline == self.now + worker.lease
        assert delivery.todo == sum(1 << m.seq - work.batch.first for m in messages)
        for message in messages:
            assert message.state == WAITING
            assert message.attempts + 1 == delivery.attempt
            before = self.lived.get((message, delivery.attempt))
            assert before is None, f"{before} and {name} under attempt {delivery.attempt}"
        waiting = self.messages(line, WAITING)
        if any(map(self.is_last, messages)):
            assert len(messages) == 1
            assert not self.hand(name), "the last attempt is not alone"
        elif any(m.fresh for m in messages):
            assert all(m.fresh or self.is_last(m) for m in waiting), "fresh before what has waited longer"
            older = [m for m in waiting if m.fresh and m.work.batch.origin == work.batch.origin]
            assert older[: len(messages)] == messages, "not in the order in which it was pushed"
        assert len(messages) <= 256
        worker.sent += len(messages)
        assert worker.sent <= worker.granted
        for message in messages:
            message.state, message.fresh, message.holder = FLYING, False, delivery.number
            self.lived[message, delivery.attempt] = name
            if delivery.attempt > 1:
                self.tallies[line].redelivered += 1
        self.given[delivery.number] = Given(
            *(name, delivery, delivery.first, delivery.last, delivery.attempt, messages, delivery.deadline)
        )

    def returned(self, messages: list[Message], attempt: int) -> None:
        """The attempt did not count, so there may be another of that number."""
        for message in messages:
            self.lived.pop((message, attempt))
            message.attempts = attempt - 1
            self.wait(message)

    def nothing_left_undone(self) -> None:
        """After `take` without a bound."""
        for team, lines in TEAMS.items():
            waiting = [m for line in lines for m in self.messages(line, WAITING)]
            last = [m for m in waiting if self.is_last(m)]
            able = [name for name, worker in self.workers.items() if worker.team == team and self.able(name)]
            if last:
                assert all(map(self.hand, able)), "a worker with nothing in hand, and a last attempt that waits"
            if len(waiting) > len(last):
                assert len(able) <= bool(last), "workers with credit, and messages that wait"

    def agrees(self, dispatcher: Dispatcher) -> None:
        """Whether the figures are as they should be."""
        figures = dispatcher.figures(self.now)
        assert {f.line for f in figures} == set(self.tallies)
        for line in LINES:
            waiting = len(self.messages(line, WAITING))
            pulled = any(line in TEAMS[worker.team] for worker in self.workers.values())
            assert (dispatcher.waiting(line), dispatcher.is_pulled(line)) == (waiting, pulled)
        for figure in figures:
            line, tally = figure.line, self.tallies[figure.line]
            assert figure == Figures(
                line,
                *(len(self.messages(line, state)) for state in (WAITING, FLYING, DELAYED)),
                *(tally.redelivered, tally.done, tally.dead),
                sum(line in TEAMS[worker.team] for worker in self.workers.values()),
                next(
                    (
                        work
                        for work, messages in self.works.items()
                        if work.line == line and any(m.state != DONE for m in messages)
                    ),
                    None,
                ),
            )

    def attempts_agree(self) -> None:
        """What the works say of failures is what an owner will know after a restart."""
        for work, messages in self.works.items():
            assert work.attempts == {
                m.seq - work.batch.first: m.attempts
                for m in messages
                if m.attempts and m.state != DONE and m.state != DYING
            } | {index: n for index, n in work.attempts.items() if messages[index].state == DYING}
            assert work.done == sum(1 << m.seq - work.batch.first for m in messages if m.state == DONE)


def work_of(line: Line, origin: int, first: int, count: int, done: int, attempts: dict[int, int]) -> Work:
    """A batch to be done."""
    batch = Batch(line[1].encode(), QUEUED if line[0] is None else 0, count, origin, first, 0, (b"",))
    return Work(batch, line, first, done, attempts) if attempts else Work(batch, line, first, done)
