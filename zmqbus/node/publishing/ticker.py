"""A timer that any thread may start, and that ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Ticker:
    """From `start` on calls `work` every `period` seconds, until that returns True. On the loop's thread."""

    __slots__ = ("_loop", "_period", "_timer", "_work")

    def __init__(self, loop: asyncio.AbstractEventLoop, period: float, work: Callable[[], bool]) -> None:
        self._loop = loop
        self._period = period
        self._work = work
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Any thread. It goes on if it is ticking already."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._begin)

    def cancel(self) -> None:
        """End it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._period, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self._work():
            self._begin()
