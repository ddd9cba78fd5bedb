"""A thin asyncio adapter for ZeroMQ sockets: watch one socket's FD on a loop, drain the socket when it stirs.

The rule everything here exists for: **`zmq.FD` is edge-triggered in what it means.** It does not say "a message is
waiting"; it says "libzmq has told this socket something since you last looked". Every call on the socket looks
(send, recv, connect, reading EVENTS), and looking takes the signal back, whether or not a message came with it. So:

1. On readiness, receive until EAGAIN. What is left unread raises no new signal.
2. After *any other* call on the socket from the loop's thread (a send, a connect, …), ask EVENTS: that call may have
   taken the signal of a message that is still waiting. That is `check()`.
3. A watch that misses one edge sleeps until the next message comes, perhaps forever. When in doubt, `check()`.

The same signal says that the socket has become writable (a connection is up, a full pipe has room again). So that it
is not lost either, `drain` is called for that too.

The watch does not know what is received: `drain` does. Runs on the loop's thread only. Close the watch before its
socket: a closed socket's FD number may already belong to somebody else.

Other threads may use the socket, if each use, by whomever, holds one and the same lock. What they do takes signals,
too: afterwards they call `check_from_afar()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from threading import Lock
from typing import Any, TypeVar

import zmq

__all__ = ["FdWatch", "new_loop", "run_main"]

# getsockopt with plain ints: `socket.EVENTS` is twice as slow (7 µs against 3 µs).
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)

T = TypeVar("T")

RETRY_S = 0.01  # pause after a drain that raised: a drain that always raises costs 100 reports a second, not a core


def new_loop() -> asyncio.AbstractEventLoop:
    """For a node's own thread, or process, not running yet: uvloop's where there is one, which takes an eighth off a
    job's way to a worker and back. (An `AsyncNode` lives on its user's loop, whichever that is.)
    """
    try:
        import uvloop
    except ImportError:  # it is not made for Windows, nor for every interpreter
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_main(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on such a loop."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


class FdWatch:
    """Calls `drain` whenever `socket` may have something to receive, or has become writable.

    `drain()` receives until `zmq.Again`, or until a budget of its own, and returns True when it stopped on its
    budget: it is then called again by `call_soon`, after other work had its turn. It must accept being called when
    nothing is waiting. It may close the watch. See also `stirred`.

    An exception in `drain` goes to the loop's exception handler; the watch lives on and calls `drain` again.
    """

    __slots__ = ("_again", "_closed", "_drain", "_fd", "_lock", "_loop", "_socket", "_writable")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        drain: Callable[[], bool | None],
        lock: Lock | None = None,
    ) -> None:
        """`lock`: of the socket, where other threads use it as well. Not held when `drain` is called."""
        self._loop = loop
        self._lock = lock or Lock()
        self._socket = socket
        self._drain = drain
        self._closed = False
        self._writable = False  # when EVENTS was last read
        self._again: asyncio.Handle | None = None  # the drain that is already scheduled, if any
        self._fd = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._run)
        self.check()  # the signal of what arrived before us may have been taken already

    def check(self) -> None:
        """Call after every send, connect or other use of the socket outside `drain`. About 3 µs."""
        if self._again is None and not self._closed and self.stirred():
            self._again = self._loop.call_soon(self._run_again)

    def check_from_afar(self) -> None:
        """The same after a use by another thread, which does not hold the lock any more."""
        try:
            with self._lock:
                stirred = int(self._socket.getsockopt(_EVENTS)) & _POLLIN
            if stirred:
                self._loop.call_soon_threadsafe(self.check)
        except (zmq.ZMQError, RuntimeError):  # it, or the loop, has been closed
            pass

    def close(self) -> None:
        """Stop watching. May be called twice. The socket is the caller's to close, after this."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _run_again(self) -> None:
        self._again = None
        self._run()

    def _run(self) -> None:
        """The FD stirred, or it is time to look again."""
        if self._again is not None:
            # A drain is scheduled. The loop watches by level, so take the signal back, or it would spin until then.
            self.stirred()
            return
        if self._closed:
            return
        try:
            more = self._drain()
        except Exception as error:
            self._report("drain failed", error)
            if not self._closed:
                # Not check(): what made it raise may still be waiting, and must not take the whole loop.
                self._again = self._loop.call_later(RETRY_S, self._run_again)
            return
        if self._closed:
            return
        if more:
            self._again = self._loop.call_soon(self._run_again)
        elif more is not None:
            self.check()  # drain may have sent on the socket after its last recv

    def stirred(self) -> bool:
        """Look: is there something to receive, or has the socket become writable since the last look? A drain whose
        last use of the socket this was, and that was told no, returns None: then nobody has to look again."""
        try:
            with self._lock:
                events = int(self._socket.getsockopt(_EVENTS))
        except zmq.ZMQError as error:  # the socket was closed, or its context terminated, under us
            self.close()
            self._report("socket closed before its watch", error)
            return False
        was_writable, self._writable = self._writable, bool(events & _POLLOUT)
        return bool(events & _POLLIN) or (self._writable and not was_writable)

    def _report(self, what: str, error: Exception) -> None:
        context = {"message": f"zmqbus FdWatch: {what}", "exception": error, "watch": repr(self)}
        self._loop.call_exception_handler(context)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "scheduled" if self._again is not None else "waiting"
        return f"<FdWatch fd={self._fd} {state}>"
