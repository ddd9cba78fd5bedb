"""The tail of the journal: what was appended lately and concerns a queue or group, until it is on disk.

So those whose workers keep up need not read it. Whoever appends tells every batch, one after the other; `watched` says
whether that is of any use. On the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from zmqbus.forwarder.queues.backlog import Backlog
from zmqbus.protocol.frames import QUEUED, Batch

TOPICS_MAX = 20_000  # whose groups are remembered


class Tail:
    """Which backlogs there are, by topic, and what they are about to get."""

    def __init__(self) -> None:
        self.queues: dict[bytes, Backlog] = {}
        """By topic."""
        self.groups: list[Backlog] = []
        self._groups_of: dict[bytes, list[Backlog]] = {}
        self._batches: deque[tuple[int, Batch]] = deque()

    @property
    def watched(self) -> bool:
        """Whether anything can concern anybody."""
        return bool(self.queues or self.groups)

    def open(self, backlog: Backlog) -> None:
        """From now on there is this one, too."""
        if backlog.team is None:
            self.queues[backlog.topic.encode()] = backlog
        else:
            self.groups.append(backlog)
            self._groups_of.clear()

    def close(self, backlog: Backlog) -> None:
        """It is no more."""
        if backlog.team is None:
            del self.queues[backlog.topic.encode()]
        else:
            self.groups.remove(backlog)
            self._groups_of.clear()

    def backlogs(self, topic: bytes, queued: bool) -> list[Backlog]:
        """Whom a batch concerns: what was pushed is of one queue, what was published of every group that pulls it."""
        if queued:
            queue = self.queues.get(topic)
            return [] if queue is None else [queue]
        found = self._groups_of.get(topic)
        if found is None:
            if len(self._groups_of) >= TOPICS_MAX:
                self._groups_of.clear()
            text = topic.decode(errors="replace")
            found = self._groups_of[topic] = [group for group in self.groups if group.matches(text)]
        return found

    def add(self, offset: int, batch: Batch) -> bool:
        """It was appended. Returns whether workers wait for it."""
        backlogs = self.backlogs(batch.topic, bool(batch.flags & QUEUED))
        if not backlogs:
            return False
        self._batches.append((offset, batch))
        return any(backlog.wanted for backlog in backlogs)

    def cut(self, end: int) -> None:
        """What is at this offset and later was refused after all."""
        while self._batches and self._batches[-1][0] >= end:
            self._batches.pop()

    def take(self, end: int) -> Iterator[tuple[int, Batch]]:
        """What is on disk by now: all before this offset."""
        while self._batches and self._batches[0][0] < end:
            yield self._batches.popleft()
