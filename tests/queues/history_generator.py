"""Histories to try the checker on: a bus that keeps every promise, with restless producers and workers.

`Bus(seed)` lives a while and is then a list of recorded lines, which a test may spoil before it asks for the verdict.
Half of them have a forwarder. All follows from the seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from msgspec.json import encode
from msgspec.structs import replace

from tests.chaos.recording import merge
from tests.chaos.verdict import Report
from tests.queues.history import (
    Closed,
    Confirmed,
    Continued,
    Event,
    Extending,
    Failing,
    Given,
    Handled,
    Job,
    Joining,
    Killed,
    Leaving,
    Letter,
    Message,
    Met,
    Parted,
    Pushed,
    Pushing,
    Stopped,
    parse,
)
from tests.queues.history_checker import ATTEMPTS_MAX, check

QUEUES = ["jobs.a", "jobs.b"]
SECOND = 1_000_000_000
LEASES = [0.5, 600.0]


class Delivery:
    """What a worker was sent."""

    def __init__(self, owner: Owner, session: Session, message: Message, attempt: int, until: float) -> None:
        self.owner, self.session, self.message, self.attempt, self.until = owner, session, message, attempt, until
        owner.number += 1
        self.number = owner.number
        self.begun = False

    @property
    def job(self) -> Job:
        return Job(self.owner.origin, self.number, *self.message)


class Session:
    """One pull of one process."""

    def __init__(self, process: str, name: str, lease: float) -> None:
        self.process, self.name, self.lease = process, name, lease
        self.hand: list[Delivery] = []


class Owner:
    """A node that gives out jobs."""

    def __init__(self, process: str, origin: int) -> None:
        self.process, self.origin = process, origin
        self.number = 0
        self.waiting: deque[tuple[Message, int]] = deque()  # and how many attempts count against it
        self.held: dict[int, Delivery] = {}
        self.known: set[str] = set()  # processes that have met it


class Producer:
    """One origin."""

    def __init__(self, process: str, origin: int, owner: Owner | None) -> None:
        self.process, self.origin = process, origin
        self.owner = owner or Owner(process, origin)
        self.pushed = dict.fromkeys(QUEUES, 0)
        self.told = dict.fromkeys(QUEUES, 0)


class Bus:
    """Everybody around a queue or two, where all promises are kept."""

    def __init__(self, seed: int, steps: int = 200) -> None:
        self.rng = rng = Random(seed)
        self.lines: list[tuple[str, Event]] = []
        self.now = 0.0
        self.lives = 0
        self.letters: dict[Message, tuple[Message, int, str]] = {}
        self.alive: list[Owner] = []
        self.forwarder = self.new_owner("forwarder") if seed % 2 else None
        self.sessions: list[Session] = []
        self.producers = [self.new_producer() for _ in range(rng.randint(1, 3))]
        for _ in range(3):
            self.join()
        deeds = [self.push, self.push, self.deliver, self.deliver, self.begin, self.begin, self.begin, self.work,
                 self.work, self.work, self.work, self.pass_, self.life]  # fmt: skip
        for _ in range(steps):
            rng.choice(deeds)()
        self.settle()

    def note(self, file: str, *events: Event) -> None:
        self.now += self.rng.uniform(0.0001, 0.01)
        for event in events:
            event.time_ns = int(self.now * SECOND)
            self.lines.append((file, event))

    def new_life(self, role: str) -> str:
        self.lives += 1
        return f"{role}-{self.lives:04}"

    # --- owners and producers ---------------------------------------------------------------------------

    def new_owner(self, role: str) -> Owner:
        owner = Owner(self.new_life(role), self.rng.getrandbits(64))
        self.alive.append(owner)
        return owner

    def new_producer(self) -> Producer:
        producer = Producer(self.new_life("producer"), self.rng.getrandbits(64), self.forwarder)
        if producer.owner not in self.alive:
            self.alive.append(producer.owner)
        return producer

    def push(self) -> None:
        p = self.rng.choice(self.producers)
        queue, count = self.rng.choice(QUEUES), self.rng.randint(1, 5)
        first = p.pushed[queue] + 1
        last = p.pushed[queue] = p.pushed[queue] + count
        self.note(p.process, Pushing(queue, p.origin, first, last))
        p.owner.waiting.extend((Message(queue, p.origin, seq), 0) for seq in range(first, last + 1))
        if p.owner is self.forwarder and self.rng.random() < 0.6:
            self.note(p.process, Pushed(queue, p.origin, p.told[queue] + 1, last))
            p.told[queue] = last

    def restart(self) -> None:
        """The forwarder's: what was in workers' hands waits again, and they know nothing of it yet."""
        old = self.forwarder
        assert old is not None
        self.now += self.rng.choice((0.0, 2.5))
        self.note("director", Killed(old.process))
        self.alive.remove(old)
        self.forwarder = new = self.new_owner("forwarder")
        new.waiting = old.waiting
        for delivery in old.held.values():
            new.waiting.appendleft((delivery.message, delivery.attempt - 1))
        for producer in self.producers:
            producer.owner = new

    # --- workers ----------------------------------------------------------------------------------------

    def join(self) -> None:
        process = self.new_life("worker")
        for number in range(self.rng.choice((1, 1, 2))):
            session = Session(process, f"{process}/{number}", self.rng.choice(LEASES))
            self.sessions.append(session)
            self.note(process, Joining(session.name, session.lease))

    def deliver(self) -> None:
        owner = self.rng.choice(self.alive)
        for _ in range(self.rng.randint(1, 6)):
            if owner.waiting and self.sessions:
                message, attempts = owner.waiting.popleft()
                session = self.rng.choice(self.sessions)
                delivery = Delivery(owner, session, message, attempts + 1, self.now + session.lease)
                owner.held[owner.number] = delivery
                session.hand.append(delivery)
                if session.process not in owner.known:
                    owner.known.add(session.process)
                    self.note(session.process, Met(owner.origin, owner.process))

    def owner_of(self, delivery: Delivery) -> Owner | None:
        """Who waits for an answer."""
        owner = delivery.owner
        return owner if owner in self.alive and owner.held.get(delivery.number) is delivery else None

    def begin(self) -> None:
        for session in self.rng.sample(self.sessions, len(self.sessions)):
            fresh = [delivery for delivery in session.hand if not delivery.begun]
            if fresh:
                delivery = fresh[0]
                if self.rng.random() < 0.1 and (owner := self.owner_of(delivery)) is not None:  # not begun, returned
                    session.hand.remove(delivery)
                    self.give_back(owner, delivery)
                    return
                delivery.begun = True
                job = delivery.job
                given: list[Event] = [Given(session.name, job.owner, job.delivery, delivery.attempt, *delivery.message)]
                if delivery.message in self.letters:
                    message, attempts, reason = self.letters[delivery.message]
                    given.append(Letter(job, *message, attempts, reason))
                self.note(session.process, *given)
                return

    def give_back(self, owner: Owner, delivery: Delivery) -> None:
        del owner.held[delivery.number]
        owner.waiting.appendleft((delivery.message, delivery.attempt - 1))

    def failed(self, owner: Owner, delivery: Delivery, reason: str, dead: bool = False) -> None:
        del owner.held[delivery.number]
        message = delivery.message
        if message.queue.startswith("$") or not (dead or delivery.attempt == ATTEMPTS_MAX):
            owner.waiting.append((message, delivery.attempt))
            return
        letter = Message(f"$dead.{message.queue}", owner.origin, len(self.letters) + 1)
        self.letters[letter] = message, delivery.attempt, reason
        owner.waiting.append((letter, 0))

    def work(self) -> None:
        """Of what was begun, something is done."""
        begun = [d for session in self.sessions for d in session.hand if d.begun]
        if not begun:
            return
        delivery = self.rng.choice(begun)
        session, owner = delivery.session, self.owner_of(delivery)
        job, draw = delivery.job, self.rng.random()
        if draw < 0.1:
            self.note(session.process, Extending(session.name, job.owner, job.delivery, 1.0))
            if owner is not None:
                delivery.until = self.now + 1.0
            return
        session.hand.remove(delivery)
        if draw < 0.6:
            self.note(session.process, Handled(session.name, [job]))
            if owner is not None:
                del owner.held[delivery.number]
                if self.rng.random() < 0.8:
                    self.note(session.process, Confirmed(session.name, [job]))
        else:
            how = self.rng.choice(("nack", "nack", "reject", "return"))
            self.note(session.process, Failing(session.name, job, how))
            if owner is not None:
                if how == "return":
                    self.give_back(owner, delivery)
                else:
                    self.failed(owner, delivery, how, dead=how == "reject")

    # --- what happens ----------------------------------------------------------------------------------

    def pass_(self) -> None:
        """Time does. A worker may still begin what its lease has run out for, and hand it in, while nobody has it."""
        self.now += self.rng.uniform(0, 0.6)
        for owner in self.alive:
            for delivery in [d for d in owner.held.values() if d.until <= self.now]:
                if self.rng.random() < 0.7:
                    self.failed(owner, delivery, "the lease ran out")

    def lose(self, session: Session) -> None:
        """What a session had goes to others."""
        self.sessions.remove(session)
        for owner in self.alive:
            for delivery in [d for d in owner.held.values() if d.session is session]:
                self.failed(owner, delivery, "the worker is gone")

    def life(self) -> None:
        rng = self.rng
        draw = rng.random()
        if draw < 0.2:
            self.join()
        elif draw < 0.4 and self.sessions:
            process = rng.choice(self.sessions).process
            self.note("director", Killed(process))
            for session in [s for s in self.sessions if s.process == process]:
                self.lose(session)
        elif draw < 0.5 and self.sessions:
            session = rng.choice(self.sessions)
            self.note(session.process, Leaving(session.name))
            self.lose(session)
        elif draw < 0.6 and self.sessions:
            self.stop(rng.choice(self.sessions))
        elif draw < 0.7 and self.sessions:
            self.part(rng.choice(self.sessions))
        elif draw < 0.85:
            if self.forwarder is not None:
                self.restart()
        else:
            producer = rng.choice(self.producers)
            self.producers.remove(producer)
            self.producers.append(self.new_producer())
            if rng.random() < 0.5 and producer.owner is not self.forwarder:
                left = len(producer.owner.waiting) + len(producer.owner.held)
                self.note(producer.process, Closed(producer.origin, left))
            else:
                self.note("director", Killed(producer.process))
            if producer.owner is not self.forwarder:
                self.alive.remove(producer.owner)

    def stop(self, session: Session) -> None:
        """For so long that its owner gives it up; it goes on with what it has, in vain."""
        self.note("director", Stopped(session.process))
        self.now += 6.0
        for owner in self.alive:
            for delivery in [d for d in owner.held.values() if d.session.process == session.process]:
                self.failed(owner, delivery, "the worker is gone")
        self.deliver()
        self.note("director", Continued(session.process))

    def part(self, session: Session) -> None:
        """An owner does not hear of it any more, for whatever reason."""
        owner = self.rng.choice(self.alive)
        for delivery in [d for d in owner.held.values() if d.session.process == session.process]:
            self.failed(owner, delivery, "the worker is gone")
        self.deliver()
        self.note(owner.process, Parted(owner.process, session.process))

    def settle(self) -> None:
        """All that is left is done by one last worker, and those who have pushed it close."""
        for session in list(self.sessions):
            self.note(session.process, Leaving(session.name))
            self.lose(session)
        process = self.new_life("worker")
        last = Session(process, f"{process}/0", 600.0)
        self.sessions = [last]
        self.note(process, Joining(last.name, last.lease))
        while any(owner.waiting or owner.held for owner in self.alive):
            self.deliver()
            self.begin()
            self.work()
        for producer in self.producers:
            self.note(producer.process, Closed(producer.origin, 0))

    # --- for those who spoil it -----------------------------------------------------------------------

    def verdict(self) -> Report:
        files: dict[str, bytes] = {}
        for file, event in sorted(self.lines, key=lambda line: line[1].time_ns):
            files[file] = files.get(file, b"") + encode(event) + b"\n"
        return check(merge([parse(data, file) for file, data in files.items()]))

    def places(self, kind: type, where: Callable[..., bool] = lambda event: True) -> list[int]:
        return [n for n, (_, event) in enumerate(self.lines) if isinstance(event, kind) and where(event)]

    def pick(self, kind: type, where: Callable[..., bool] = lambda event: True) -> int:
        places = self.places(kind, where)
        if not places:
            raise NotApplicable
        return self.rng.choice(places)

    def change(self, place: int, **changes: object) -> None:
        file, event = self.lines[place]
        self.lines[place] = file, replace(event, **changes)


class NotApplicable(Exception):
    """This history cannot be spoilt in this way."""
