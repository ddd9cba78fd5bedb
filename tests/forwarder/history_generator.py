"""Histories to try the checker on: a bus that keeps every promise, with restless publishers and consumers.

`Bus(seed)` lives a while and is then a list of recorded lines, which a test may spoil before it asks for the verdict.
All follows from the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from history import Acked, Committed, Consumed, Event, Failed, Journaled, Killed, Opened, Sent, digest, merge, parse
from history_checker import Report, check
from msgspec.json import encode
from msgspec.structs import replace

TOPICS = ["logs.a", "logs.b", "metrics.cpu"]
PATTERNS = [[">"], ["logs.*"], ["metrics.cpu", "logs.b"]]


class Publisher:
    """One origin on one topic; `accepted` and `acked` are how far the forwarder and the publisher's answers are."""

    def __init__(self, file: str, topic: str, origin: int) -> None:
        self.file, self.topic, self.origin = file, topic, origin
        self.sent = self.accepted = self.acked = 0


class Subscriber:
    """A durable name: where it reads, where its cursor is on disk, and the file of the process that has it now."""

    def __init__(self, name: str, patterns: list[str], start: int) -> None:
        self.name, self.patterns, self.start = name, patterns, start
        self.position = self.cursor = start
        self.lives = 0
        self.file = ""

    def wants(self, topic: str) -> bool:
        return self.patterns == [">"] or topic in self.patterns or ("logs.*" in self.patterns and topic[:5] == "logs.")


class Bus:
    """A forwarder that keeps every promise, and everybody around it."""

    def __init__(self, seed: int, steps: int = 120) -> None:
        self.rng = rng = Random(seed)
        self.lines: list[tuple[str, Event]] = []
        self.journal: list[Journaled] = []
        self.lives = 0
        self.publishers = [self.new_publisher() for _ in range(rng.randint(1, 4))]
        self.subscribers: list[Subscriber] = []
        for _ in range(steps):
            rng.choice([self.publish, self.publish, self.accept, self.accept, self.answer, self.consume, self.life])()
        for publisher in self.publishers:
            self.give_up(publisher)
        self.lines += [("journal", event) for event in self.journal]

    def note(self, file: str, event: Event) -> None:
        self.lines.append((file, event))

    def new_publisher(self) -> Publisher:
        self.lives += 1
        return Publisher(f"publisher-{self.lives}", self.rng.choice(TOPICS), self.rng.getrandbits(64))

    def publish(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            p = self.rng.choice(self.publishers)
            p.sent += 1
            self.note(p.file, Sent(p.topic, p.origin, p.sent, digest(b"%d %d" % (p.origin, p.sent))))

    def accept(self) -> None:
        p = self.rng.choice(self.publishers)
        for _ in range(self.rng.randint(0, p.sent - p.accepted)):
            p.accepted += 1
            value = digest(b"%d %d" % (p.origin, p.accepted))
            self.journal.append(Journaled(len(self.journal), p.topic, p.origin, p.accepted, value))

    def answer(self) -> None:
        p = self.rng.choice(self.publishers)
        if p.accepted > p.acked:
            first, p.acked = p.acked + 1, self.rng.randint(p.acked + 1, p.accepted)
            self.note(p.file, Acked(p.topic, p.origin, p.acked, first if first < p.acked else None))

    def give_up(self, p: Publisher) -> None:
        """Close in good order (NotDurable for what was not acked), or be killed."""
        if self.rng.random() < 0.5 and p.sent > p.acked:
            self.note(p.file, Failed(p.topic, p.origin, p.sent, p.acked + 1))
        else:
            self.note("test", Killed(p.file))

    def consume(self) -> None:
        if not self.subscribers:
            return
        s = self.rng.choice(self.subscribers)
        for _ in range(self.rng.randint(0, 12)):
            while s.position < len(self.journal) and not s.wants(self.journal[s.position].topic):
                s.position += 1
            if s.position < len(self.journal):
                m = self.journal[s.position]
                self.note(s.file, Consumed(s.name, m.offset, m.topic, m.origin, m.seq, m.value))
                s.position += 1
        if self.rng.random() < 0.5:
            s.cursor = s.position
            if self.rng.random() < 0.7:  # else it was killed, or cut off, before it was told
                self.note(s.file, Committed(s.name, s.cursor))

    def life(self) -> None:
        rng = self.rng
        choice = rng.random()
        if choice < 0.3 and len(self.subscribers) < 3:
            start = rng.choice([0, len(self.journal)])
            s = Subscriber(f"consumer {len(self.subscribers)}", rng.choice(PATTERNS), start)
            self.subscribers.append(s)
            self.open(s)
        elif choice < 0.6 and self.subscribers:
            s = rng.choice(self.subscribers)
            self.note("test", Killed(s.file))
            self.open(s)
        elif choice < 0.7 and self.subscribers:  # the forwarder comes back: the session goes on from the cursor
            s = rng.choice(self.subscribers)
            s.position = s.cursor
        elif choice < 0.8:
            p = rng.choice(self.publishers)
            self.give_up(p)
            self.publishers.remove(p)
            self.publishers.append(self.new_publisher())

    def open(self, s: Subscriber) -> None:
        if s.lives == 0 or self.rng.random() < 0.7:  # a new process; or the same one opens another session
            s.lives += 1
            s.file = f"{s.name}, life {s.lives}"
        s.position = s.cursor
        self.note(s.file, Opened(s.name, s.patterns, s.start))

    # --- for those who spoil it -----------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for time_ns, (file, event) in enumerate(self.lines):
            event.time_ns = time_ns
            files[file] = files.get(file, b"") + encode(event) + b"\n"
        return files

    def verdict(self) -> Report:
        return check(merge([parse(data, file) for file, data in self.files().items()]))

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
