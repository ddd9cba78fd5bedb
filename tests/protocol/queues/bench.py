"""A dispatcher to play with, by short calls, and what it gives out as short text."""

from __future__ import annotations

from collections import Counter

from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.dispatcher import Dispatcher
from zmqbus.protocol.queues.work import Delivery, Figures, Line, Team, Work

QUEUE: Line = (None, "q")
TEAM = Team("workers", ("q",))
MUCH = 1000


class Bench:
    """A dispatcher with everything that happens at time `now`; one queue, one team that pulls it, unless told else."""

    def __init__(self, *, attempts_max: int = 5) -> None:
        self.now = 100.0
        self.dispatcher = Dispatcher(attempts_max=attempts_max)
        self.heads: Counter[tuple[Line, int]] = Counter()
        self.last: dict[str, Delivery] = {}

    def push(self, count: int = 1, *, line: Line = QUEUE, origin: int = 1, delay: float = 0.0) -> Work:
        first = self.heads[line, origin] + 1
        self.heads[line, origin] += count
        work = Work(Batch(line[1].encode(), QUEUED, count, origin, first, 0, (b"",)), line, first)
        self.dispatcher.add(work, self.now, dict.fromkeys(range(count), self.now + delay) if delay else {})
        return work

    def join(self, *names: str, credit: int = MUCH, lease: float = 30.0, team: Team = TEAM) -> None:
        for name in names:
            self.dispatcher.join(name, team, lease, credit, self.now)

    def take(self, most: int = MUCH) -> str:
        """What goes out: worker, seqs and attempt; "ann 1-3#1, bob 4#2"."""
        out = self.dispatcher.take(self.now, most)
        self.last.update({str(delivery.worker): delivery for delivery in out})
        return ", ".join(map(shown, out))

    def done(self, name: str, *seqs: int, of: Delivery | None = None) -> bool:
        """Of the last delivery to that worker, or another: all, one seq, or from and to. So do the others."""
        return self.dispatcher.done(*self._job(name, seqs, of), self.now)

    def fail(self, name: str, *seqs: int, delay: float | None = 0.0, of: Delivery | None = None) -> bool:
        return self.dispatcher.fail(*self._job(name, seqs, of), self.now, delay=delay, reason="no")

    def give_back(self, name: str, *seqs: int, of: Delivery | None = None) -> bool:
        return self.dispatcher.give_back(*self._job(name, seqs, of), self.now)

    def reject(self, name: str, *seqs: int, of: Delivery | None = None) -> bool:
        return self.dispatcher.reject(*self._job(name, seqs, of), self.now, "bad")

    def _job(self, name: str, seqs: tuple[int, ...], of: Delivery | None) -> tuple[str, int, int, int]:
        delivery = of or self.last[name]
        first, last = (seqs[0], seqs[-1]) if seqs else (delivery.first, delivery.last)
        return name, delivery.number, first, last

    def at(self, now: float) -> Bench:
        self.now = 100.0 + now
        self.dispatcher.tick(self.now)
        return self

    def timer(self) -> float | None:
        due = self.dispatcher.next_timer()
        return None if due is None else due - 100.0

    def figures(self, line: Line = QUEUE) -> Figures:
        return next(figures for figures in self.dispatcher.figures(self.now) if figures.line == line)

    def counts(self, line: Line = QUEUE) -> dict[str, int]:
        """Of the figures what is not zero."""
        figures = self.figures(line)._asdict()
        return {name: n for name, n in figures.items() if n and name not in ("line", "workers", "oldest")}

    def dead(self) -> list[tuple[int, int, str]]:
        return [(dead.seq, dead.attempts, dead.reason) for dead in self.dispatcher.dead]


def shown(delivery: Delivery) -> str:
    first, last = delivery.first, delivery.last
    return f"{delivery.worker} {first if first == last else f'{first}-{last}'}#{delivery.attempt}"
