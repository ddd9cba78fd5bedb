"""How many unfinished jobs a worker may have. Knows no clock and no owners; callers pass what they measured.

What was asked for is kept to. Where nothing was, the window adapts: a worker that runs dry although it was sent all it
may have, and was quick with it, may have twice as much; one whose jobs wait too long for their turn, so much less. So
a fast one has enough to bridge the way to the owner and back, and a slow one does not sit on what others could do.
"""

from __future__ import annotations

START = 8
MOST = 2048
WAIT = 0.1  # seconds for which a job should wait for its turn, at the most


class Window:
    """Of one worker, in jobs."""

    def __init__(self, asked: int | None) -> None:
        self.adapts = asked is None
        self.size = START if asked is None else asked

    def share(self, owners: int) -> int:
        """Of each of so many owners that have jobs."""
        return max(1, self.size // max(1, owners))

    def dry(self, took: float) -> bool:
        """All that may be sent was, and is begun, so many seconds after the last of it came. True: the window grew."""
        if not self.adapts or took > WAIT / 2 or self.size >= MOST:
            return False
        self.size = min(MOST, self.size * 2)
        return True

    def waited(self, seconds: float, busy: int) -> bool:
        """A job had its turn so late, with so many others begun and not finished. True: the window shrank."""
        if not self.adapts or seconds <= WAIT:
            return False
        before = self.size
        self.size = min(before, max(1, busy + int((before - busy) * WAIT / seconds)))
        return self.size < before
