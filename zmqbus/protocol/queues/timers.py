"""What is due at a time, in steps. Knows no clock: callers pass `now`, monotonic seconds.

Times are rounded up to the next step, so that however many things there are, those that are due together are together
at once: a heap of times, not of things. Adding and removing costs the same with a million of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from math import ceil
from typing import Generic, TypeVar

STEPS = 64  # to a second: nobody minds a wait of 16 ms more, and a step is exact in binary

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Timers(Generic[K, T]):
    """Things by the time they are due, and at one time by key."""

    def __init__(self) -> None:
        self._steps: list[int] = []  # a heap; those that nothing is due at any more are void
        self._due: dict[int, dict[K, T]] = {}

    def at(self, due: float) -> dict[K, T]:
        """What is due then, by key. To put something in, at once."""
        step = ceil(due * STEPS)
        things = self._due.get(step)
        if things is None:
            things = self._due[step] = {}
            heappush(self._steps, step)
        return things

    def remove(self, due: float, key: K) -> None:
        """Something that was put in at `due` is not due any more."""
        step = ceil(due * STEPS)
        things = self._due[step]
        del things[key]
        if not things:
            del self._due[step]
            if len(self._steps) > 100 + 2 * len(self._due):  # mostly void
                self._steps = list(self._due)
                heapify(self._steps)

    def over(self, now: float) -> list[T]:
        """Take out what is due, the earliest first."""
        out: list[T] = []
        while self._steps and self._steps[0] <= now * STEPS:
            out += self._due.pop(heappop(self._steps), {}).values()
        return out

    def next(self) -> float | None:
        """When something will be due."""
        while self._steps and self._steps[0] not in self._due:
            heappop(self._steps)
        return self._steps[0] / STEPS if self._steps else None

    def entries(self) -> Iterator[tuple[float, K, T]]:
        """All there is, in no order: when it is due, its key and itself."""
        for step, things in self._due.items():
            for key, thing in things.items():
                yield step / STEPS, key, thing
