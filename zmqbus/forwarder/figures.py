"""What a forwarder says of itself in STATISTICS: totals, how fast they grow, how quick the disk is. Knows no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

NOTE_PERIOD = 1.0  # seconds between two notes of the totals
NOTES_KEPT = 10  # so rates are over the last ten seconds


class Rates(NamedTuple):
    """Per second."""

    messages: float
    bytes: float


class Pace:
    """How fast totals have grown of late, by what they were noted to be."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self._notes: deque[tuple[float, int, int]] = deque([(now, 0, 0)], maxlen=NOTES_KEPT + 1)

    def note(self, now: float, messages: int, size: int) -> None:
        """Once every NOTE_PERIOD: the totals since the start."""
        self._notes.append((now, messages, size))

    def rates(self, now: float, messages: int, size: int) -> Rates:
        """From the oldest note to these totals, which are those of now."""
        at, messages_then, size_then = self._notes[0]
        seconds = max(now - at, 1e-3)
        return Rates((messages - messages_then) / seconds, (size - size_then) / seconds)


def median_and_longest_ms(seconds: Iterable[float]) -> tuple[float, float]:
    """In milliseconds; zeros, where there are none."""
    times = sorted(seconds)
    return (1e3 * times[len(times) // 2], 1e3 * times[-1]) if times else (0.0, 0.0)
