"""A thread for what waits for the disk: one thing after the other, results back on the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
_Task = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any, BaseException | None], None]]


class Worker:
    """Does what it is given in order. Not a pool: the journal's disk calls exclude each other."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self.waiting = 0
        """Tasks whose `then` has not been called."""
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any, then: Callable[[T, BaseException | None], None]) -> None:
        """Do `work(*arguments)` on the thread, and then call `then(result, error)` on the loop."""
        self.waiting += 1
        self._tasks.put((work, arguments, then))

    async def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """The same, for who waits."""
        future: asyncio.Future[T] = self._loop.create_future()

        def then(result: T, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.submit(work, *arguments, then=then)
        return await future

    def close(self) -> None:
        """Do what has been given, and end. Blocks until then."""
        self._tasks.put(None)
        self._thread.join()

    async def end(self) -> None:
        """The same, but the loop goes on meanwhile."""
        await self.do(lambda: None)
        self.close()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            work, arguments, then = task
            result, error = None, None
            try:
                result = work(*arguments)
            except BaseException as raised:  # whatever it is, it is for the loop to deal with
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._done, then, result, error)
            del task, work, arguments, then, result, error  # keep nothing alive while waiting

    def _done(
        self, then: Callable[[Any, BaseException | None], None], result: object, error: BaseException | None
    ) -> None:
        self.waiting -= 1
        then(result, error)
