"""What `Node.pull` returns: jobs, out of all queues that fit. Taken and settled on the caller's own threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from types import TracebackType
from typing import Any

from zmqbus.errors import ForkedProcess, NodeClosed
from zmqbus.net.clock import now
from zmqbus.node.faces.subscription import Home
from zmqbus.node.work.queues.hand import Hand
from zmqbus.node.work.queues.job import Job

CLOSE_TIMEOUT = 2.0


class Worker:
    """Jobs of the topics that fit, each handed to one worker only. An iterator and a context manager.

    Any thread may take jobs, several share them, and any may settle them, in any order. A worker that nobody refers to
    any more is closed; the jobs that somebody still has may be settled nevertheless.
    """

    def __init__(
        self,
        node: Home,
        queue: str,
        group: str,
        credit: int | None,
        lease: float,
        value_type: Any,
        start: str | int | datetime | None,
    ) -> None:
        self._node = node
        self._queue = queue
        self._group = group
        workers = node._engine.workers
        self._hand: Hand = node._call(
            workers.open(queue, group=group, credit=credit, lease=lease, value_type=value_type, start=start)
        )

    def get(self, timeout: float | None = None) -> Job | None:
        """The next job; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            NodeClosed: the worker was closed before this call.
        """
        for job in self._hand.items:
            return job
        if self._hand.closed is not None:
            raise self._hand.closed
        return self._take(timeout)

    def __iter__(self) -> Iterator[Job]:
        hand = self._hand
        while True:
            yield from hand.items
            job = self._take(None)
            if job is None:
                return
            yield job

    def __next__(self) -> Job:
        job = self.get()
        if job is None:
            raise StopIteration
        return job

    def _take(self, timeout: float | None) -> Job | None:
        hand = self._hand
        until = None if timeout is None else now() + timeout
        while True:
            with hand.lock:
                job = hand.take()
                if job is not None:
                    return job
                if hand.closed is not None:
                    if isinstance(hand.closed, ForkedProcess):
                        raise hand.closed
                    return None
                left = None if until is None else until - now()
                if left is not None and left <= 0:
                    hand.rest()
                    return None
                hand.sleep(left)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was acknowledged so far is settled: its owner knows, and a forwarder has it on disk.

        Raises:
            NotSettled: it is not after `timeout` seconds, or some of what was acknowledged since the last call never
                will be, and is done once more.
            NodeClosed: the node has been closed.
        """
        self._node._call(self._node._engine.workers.flush(self._hand, timeout))

    @property
    def queue(self) -> str:
        """The topic or pattern."""
        return self._queue

    @property
    def group(self) -> str:
        """Its name."""
        return self._group

    @property
    def credit(self) -> int:
        """How many unfinished jobs it may have now."""
        return self._hand.window.size

    @property
    def received(self) -> int:
        """Jobs that came so far."""
        return self._hand.jobs

    @property
    def refused(self) -> int:
        """Jobs that were acknowledged in vain, because they were another worker's by then, or their owner is gone."""
        return self._hand.refused + self._hand.lost

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Take no more jobs. Those that were not begun go back to their owners at once; those that were may be finished
        within `timeout` seconds, and are taken as failed after that. May be called twice.
        """
        self._end(timeout, patient=True)

    def _end(self, timeout: float, patient: bool) -> None:
        if self._hand.forked is None and not self._node._closed:
            with contextlib.suppress(NodeClosed):
                self._node._call(self._node._engine.workers.close(self._hand, timeout, patient=patient))

    def __del__(self) -> None:
        hand = getattr(self, "_hand", None)
        if hand is not None and hand.closed is None:  # `for job in node.pull(…)`, left by break
            self._node._engine.soon(self._node._engine.workers.abandon, hand)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception nobody may be left to finish what this thread has in hand.
        self._end(CLOSE_TIMEOUT, patient=kind is None)

    def __repr__(self) -> str:
        return f"<Worker {self._queue} in {self._group} of {self._node.name}: {self._hand.state()}>"
