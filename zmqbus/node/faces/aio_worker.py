"""What `AsyncNode.pull` returns: jobs, out of all queues that fit. Taken on the node's own loop, settled anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from datetime import datetime
from types import TracebackType
from typing import Any

from zmqbus.errors import ForkedProcess, NodeClosed
from zmqbus.net.clock import now
from zmqbus.node.faces.aio_subscription import SHIFT, AsyncHome
from zmqbus.node.faces.worker import CLOSE_TIMEOUT
from zmqbus.node.publishing.publisher import TICK
from zmqbus.node.work.queues.hand import Hand
from zmqbus.node.work.queues.job import Job


class AsyncWorker:
    """See `Worker`.

        async for job in node.pull("jobs.resize"): ...
        async with node.pull("jobs.resize") as worker: ...
        worker = await node.pull("jobs.resize")

    Tasks may share one. Other threads may settle its jobs.
    """

    def __init__(
        self,
        node: AsyncHome,
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
        self._asked = (credit, lease, value_type, start)
        self._opening: asyncio.Task[Hand] | None = None
        self._hand: Hand | None = None
        self._closed = False
        self._takers = _Takers()
        self._rest_at = 0.0

    async def get(self, timeout: float | None = None) -> Job | None:
        """The next job; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            NodeClosed: the worker was closed before this call.
        """
        deadline = None if timeout is None else now() + timeout
        hand = self._hand or await self._open()
        if hand is None:
            return None
        for job in hand.items:
            return job
        if hand.closed is not None:
            raise hand.closed
        return await self._take(hand, deadline)

    def __aiter__(self) -> AsyncIterator[Job]:
        return self._jobs()

    async def _jobs(self) -> AsyncGenerator[Job, None]:
        hand = self._hand or await self._open()
        while hand is not None:
            for job in hand.items:
                yield job
            following = await self._take(hand, None)
            if following is None:
                return
            yield following

    async def __anext__(self) -> Job:
        job = await self.get()
        if job is None:
            raise StopAsyncIteration
        return job

    async def _take(self, hand: Hand, deadline: float | None) -> Job | None:
        """Wait for a job. It is taken after the last await, so that a task that is cancelled takes none with it."""
        loop = self._node._home()
        if now() >= self._rest_at:
            await asyncio.sleep(0)
            self._rest_at = now() + SHIFT
        while True:
            with hand.lock:
                job = hand.take()
                if job is None:
                    hand.rest()
                elif self._takers.waiting:
                    if hand.empty:
                        hand.dry(now())
                    else:
                        self._takers.ring()  # one was woken for all that came
            if job is not None:
                return job
            if hand.closed is not None:
                self._takers.ring()  # each tells the next
                if isinstance(hand.closed, ForkedProcess):
                    raise hand.closed
                return None
            if deadline is not None and now() >= deadline:
                return None
            await self._takers.wait(loop, None if deadline is None else max(TICK, deadline - now()))
            self._rest_at = now() + SHIFT

    async def _open(self) -> Hand | None:
        """Ask for jobs. None: it was closed meanwhile. Goes on when its caller is cancelled."""
        if self._closed:
            raise NodeClosed("the worker is closed")
        if self._opening is None:
            self._opening = self._node._home().create_task(self._join())
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())  # not to be reported
        await asyncio.wait([self._opening])
        return None if self._closed else self._opening.result()

    async def _join(self) -> Hand:
        credit, lease, value_type, start = self._asked
        takers = self._takers
        self._hand = await self._node._at_home().workers.open(
            self._queue,
            group=self._group,
            credit=credit,
            lease=lease,
            value_type=value_type,
            start=start,
            wake=takers.ring,
        )
        self._hand.is_awaited = lambda: bool(takers.waiting)
        return self._hand

    async def _opened(self) -> AsyncWorker:
        if await self._open() is None:
            raise NodeClosed("the worker was closed while it was opened")
        return self

    async def flush(self, timeout: float | None = None) -> None:
        """See `Worker.flush`."""
        engine = self._node._at_home()
        if self._hand is not None:
            await engine.workers.flush(self._hand, timeout)

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
        """See `Worker.credit`."""
        return self._hand.window.size if self._hand else 0

    @property
    def received(self) -> int:
        """See `Worker.received`."""
        return self._hand.jobs if self._hand else 0

    @property
    def refused(self) -> int:
        """See `Worker.refused`."""
        return self._hand.refused + self._hand.lost if self._hand else 0

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """See `Worker.close`."""
        await self._end(timeout, patient=True)

    async def _end(self, timeout: float, patient: bool) -> None:
        self._closed = True
        if self._hand is not None:
            if self._hand.forked is None:
                self._node._home()
                await self._node._engine.workers.close(self._hand, timeout, patient=patient)
        elif self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])

    def __del__(self) -> None:
        hand = getattr(self, "_hand", None)
        if hand is not None and hand.closed is None:  # `async for …`, left by break
            self._node._engine.soon(self._node._engine.workers.abandon, hand)

    def __await__(self) -> Generator[Any, Any, AsyncWorker]:
        return self._opened().__await__()

    async def __aenter__(self) -> AsyncWorker:
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(CLOSE_TIMEOUT, patient=kind is None)

    def __repr__(self) -> str:
        state = self._hand.state() if self._hand else "not open"
        return f"<AsyncWorker {self._queue} in {self._group} of {self._node.name}: {state}>"


class _Takers:
    """The tasks that wait for jobs. The node holds this, and not the worker, which so can be collected."""

    def __init__(self) -> None:
        self.waiting: dict[asyncio.Future[None], None] = {}

    def ring(self) -> None:
        """Have one of them look, the first that came. It has the next one look if there is more."""
        while self.waiting:
            future = next(iter(self.waiting))
            del self.waiting[future]
            if not future.done():
                future.set_result(None)
                return

    async def wait(self, loop: asyncio.AbstractEventLoop, timeout: float | None) -> None:
        """Until there may be something to take, or for so long."""
        future: asyncio.Future[None] = loop.create_future()
        self.waiting[future] = None
        timer = None if timeout is None else loop.call_later(timeout, _finish, future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.ring()  # what this one was woken for
            raise
        finally:
            self.waiting.pop(future, None)
            if timer is not None:
                timer.cancel()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
