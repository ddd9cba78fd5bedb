"""Who responds to which service, and whom to ask next. Decides by what it was told; knows no sockets and no clock.

Several threads may ask at a time: what changes or looks through its tables is done under a lock that its owner passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

NAMES_MAX = 8192  # nodes whose names and services are kept; then those heard of first are forgotten


class Responders:
    """The services of all nodes that said HELLO, and how many requests of ours each has to answer.

    The next to be asked is who has fewest of them; among equals, who was asked longest ago.
    """

    def __init__(self, me: int, lock: AbstractContextManager[object]) -> None:
        self._me = me
        self._lock = lock
        self._names: dict[int, str] = {}
        self._services: dict[int, frozenset[str]] = {}
        self._by_service: dict[str, dict[int, None]] = {}
        self._open: dict[int, int] = {}
        self._turns: dict[int, int] = {}
        self._turn = 0

    def heard(self, origin: int, name: str, services: Iterable[str]) -> bool:
        """A node introduced itself, or said its services anew. Returns whether that changes who responds to what."""
        with self._lock:
            self._names[origin] = name
            if len(self._names) > NAMES_MAX:
                self._forget(next(other for other in self._names if other != self._me))
            return self._serves(origin, services)

    def serves(self, origin: int, services: Iterable[str]) -> bool:
        """From now on a node responds to these, and to no others. Returns whether that is news."""
        with self._lock:
            return self._serves(origin, services)

    def _serves(self, origin: int, services: Iterable[str]) -> bool:
        before, after = self._services.get(origin, frozenset()), frozenset(services)
        if before == after:
            return False
        for service in before - after:
            there = self._by_service[service]
            del there[origin]
            if not there:
                del self._by_service[service]
        for service in after - before:
            self._by_service.setdefault(service, {})[origin] = None
        if after:
            self._services[origin] = after
        else:
            del self._services[origin]
        return True

    def forget(self, origin: int) -> None:
        """A node will not come back, or only anew."""
        with self._lock:
            self._forget(origin)

    def _forget(self, origin: int) -> None:
        self._serves(origin, ())
        self._names.pop(origin, None)
        self._turns.pop(origin, None)

    def name(self, origin: int) -> str:
        """What a node is called; of one that nothing is known of, its origin."""
        return self._names.get(origin) or f"{origin:016x}"

    def of(self, service: str) -> list[int]:
        """All that respond to a service."""
        return list(self._by_service.get(service, ()))

    def choose(self, service: str, can_be_asked: Callable[[int], bool]) -> int | None:
        """Whom to ask next; it counts as asked until the request has `ended`. None: there is nobody."""
        with self._lock:
            best, best_rank = None, (0, 0)
            for origin in self._by_service.get(service, ()):
                rank = (self._open.get(origin, 0), self._turns.get(origin, 0))
                if (best is None or rank < best_rank) and can_be_asked(origin):
                    best, best_rank = origin, rank
            if best is not None:
                self._turn += 1
                self._turns[best] = self._turn
                self._open[best] = best_rank[0] + 1
            return best

    def load(self, origin: int) -> int:
        """How many requests a node has to answer."""
        return self._open.get(origin, 0)

    def ended(self, origin: int) -> None:
        """A request is answered, could not be sent, or nobody waits for the answer any more."""
        with self._lock:
            left = self._open[origin] - 1
            if left:
                self._open[origin] = left
            else:
                del self._open[origin]
