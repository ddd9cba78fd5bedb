"""How many unfinished jobs a worker may have. Knows no clock and no owners; callers pass what they measured.

What was asked for is kept to. Where nothing was, the window adapts: a worker that runs dry although it was sent all it
may have, and was quick with it, may have twice as much; one whose jobs wait too long for their turn, so much less. So
a fast one has enough to bridge the way to the owner and back, and a slow one does not sit on what others could do.
"""

from __future__ import annotations

START = 8
MOST = 2048
BYTES = 16 * 1024 * 1024  # and about so much may wait, where that is fewer
WAIT = 0.1  # seconds for which a job should wait for its turn, at the most


class Window:
    """Of one worker, in jobs."""

    def __init__(self, asked: int | None) -> None:
        self.adapts = asked is None
        self.most = MOST
        self._weight = 0.0  # bytes of a job, lately
        self.size = START if asked is None else asked

    def share(self, owners: int) -> int:
        """Of each of so many owners that have jobs."""
        return max(1, self.size // max(1, owners))

    def weigh(self, size: int, jobs: int) -> None:
        """So many jobs came, of so many bytes in all."""
        if self.adapts:
            self._weight += (size / jobs - self._weight) / 8 if self._weight else size / jobs
            self.most = min(MOST, max(1, int(BYTES / max(1.0, self._weight))))
            self.size = min(self.size, self.most)

    def dry(self, took: float, least: int) -> bool:
        """Somebody wants more, and all that may be sent was, the last so many seconds ago. True: the window grew.

        `least`: all of it is in hands, unfinished, and less than so many would bring nothing. Then who wants more can
        do more, however slow the others are. 0: it is done with.
        """
        if not self.adapts or self.size >= self.most or (took > WAIT / 2 and not least):
            return False
        self.size = min(self.most, max(self.size * 2, least))
        return True

    def waited(self, seconds: float, busy: int) -> bool:
        """A job had its turn so late, with so many others begun and not finished. True: the window shrank."""
        if not self.adapts or seconds <= WAIT:
            return False
        before = self.size
        self.size = min(before, max(1, busy + int((before - busy) * WAIT / seconds)))
        return self.size < before
