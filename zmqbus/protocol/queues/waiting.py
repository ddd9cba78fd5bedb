"""What waits of one line, in which order it goes, and the line's figures. Bookkeeping only: the dispatcher decides.

What has been tried, or was held back, goes before what is fresh; it has waited longest. Fresh messages go in turn
between their producers, about CHUNK messages a turn, and in the order of each. What is down to its last attempt waits
apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from zmqbus.protocol.queues.letters import DEAD_PREFIX
from zmqbus.protocol.queues.work import Line, Run, Work, lowest_run, ones

CHUNK = 128  # messages to a delivery; of 100 bytes, 13 KB: worth a message of its own, and soon done


Cut = tuple[Work, int, int, Run | None]
"""A work, the index from which on, and the number of its messages that leave a line: of a run, or fresh without one."""


class Waiting:
    """One line."""

    __slots__ = (
        *("dead", "delayed", "done", "in_flight", "lasts", "limited", "line", "redelivered", "retries", "waiting"),
        *("works", "turns", "_fresh", "_quota"),
    )

    def __init__(self, line: Line) -> None:
        self.line = line
        self.limited = not line[1].startswith(DEAD_PREFIX)
        """Attempts are limited: beyond, there are dead letters."""
        self.works: dict[Work, None] = {}
        """Those with something unsettled, in the order in which they were added."""
        self.retries: deque[Run] = deque()
        """What goes first; may have runs with nothing left to do."""
        self.lasts: deque[Run] = deque()
        """The same for what is down to its last attempt, which is made alone."""
        self.waiting = self.in_flight = self.delayed = self.redelivered = self.done = self.dead = 0
        self._fresh: dict[int, deque[Work]] = {}  # by origin
        self.turns: deque[int] = deque()
        """The origins of which something waits that was not tried yet; the first is next."""
        self._quota = CHUNK  # what is left of its turn

    def add_fresh(self, work: Work) -> None:
        """Behind all that is fresh of its origin."""
        origin = work.batch.origin
        works = self._fresh.get(origin)
        if works is None:
            works = self._fresh[origin] = deque()
            self.turns.append(origin)
        works.append(work)

    def has_last(self) -> bool:
        """Whether something is down to its last attempt."""
        while self.lasts and not self.lasts[0].todo:
            self.lasts.popleft()
        return bool(self.lasts)

    def has_more(self) -> bool:
        """Whether anything else waits."""
        while self.retries and not self.retries[0].todo:
            self.retries.popleft()
        return bool(self.retries or self.turns)

    def cut_last(self) -> Cut:
        """Take one message, of those that `has_last` tells of."""
        run = self.lasts[0]
        start, _ = lowest_run(run.todo)
        run.todo ^= 1 << start
        return run.work, start, 1, run

    def cut(self, most: int) -> Cut:
        """Take at most so many messages that follow each other, of those that `has_more` tells of."""
        if self.retries:
            run = self.retries[0]
            start, count = _shortened(run.todo, most)
            run.todo ^= ones(count) << start
            return run.work, start, count, run
        works = self._fresh[self.turns[0]]
        work = works[0]
        start, count = (0, 1) if work.fresh == 1 else _shortened(work.fresh, most)
        work.fresh ^= ones(count) << start
        if not work.fresh:
            works.popleft()
        self._quota -= count
        if not works:
            del self._fresh[self.turns.popleft()]
            self._quota = CHUNK
        elif self._quota <= 0:
            self.turns.rotate(-1)
            self._quota = CHUNK
        return work, start, count, None

    def drop(self, origin: int, works: Collection[Work]) -> None:
        """Forget works of one origin, of which nothing is with a worker or delayed."""
        for queue in (self.retries, self.lasts):
            for run in queue:
                if run.work in works:
                    self.waiting -= run.todo.bit_count()
                    run.todo = 0
        if origin in self._fresh:
            self._fresh[origin] = kept = deque(work for work in self._fresh[origin] if work not in works)
            if not kept:
                del self._fresh[origin]
                self.turns.remove(origin)
                self._quota = CHUNK
        for work in works:
            self.waiting -= work.fresh.bit_count()
            work.fresh = 0
            del self.works[work]


def _shortened(bits: int, most: int) -> tuple[int, int]:
    """The lowest run. Cutting a batch costs as much as all of it, so what is little more than CHUNK stays whole."""
    start, count = lowest_run(bits)
    return start, min(count if count <= 2 * CHUNK else CHUNK, most)
