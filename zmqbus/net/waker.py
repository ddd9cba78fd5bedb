"""Wakes a thread that sleeps in poll()."""

from __future__ import annotations

import contextlib
import os
import sys


class Waker:
    """A file descriptor that becomes readable by `wake()` and stays so until `clear()`. Any thread may call either."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.fd = self._write = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fd, self._write = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write, False)

    def wake(self) -> None:
        """Make the sleeper return from poll()."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._write, b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        """Be ready to be woken again. Call it when `fd` is readable: otherwise it costs an exception."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def __del__(self) -> None:  # not earlier: a wake() into a descriptor that is somebody else's by then would hurt
        os.close(self.fd)
        if self._write != self.fd:
            os.close(self._write)
