"""What a process that runs for months says on stderr. A thread writes it: whoever reads slowly, or not at all, must not
hold up the bus. What waits is bounded; what does not fit is counted, and that is said."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import deque
from threading import Condition, Thread

import click

LINES_MAX = 1000  # waiting to be written
PATIENCE = 1.0  # seconds that a slow reader has for the rest of them in the end
CLEAR = "\r\x1b[K"


class Log:
    """Lines for people, and on a terminal one more at the bottom that changes."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines: deque[str] = deque()
        self._left_out = 0
        self._status = self._shown = ""
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="zmqbus stderr", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """Say something. Any thread; never waits for the reader."""
        with self._changed:
            if len(self._lines) < LINES_MAX:
                self._lines.append(text)
            else:
                self._left_out += 1
            self._changed.notify()

    def status(self, text: str) -> None:
        """What the last line of a terminal shows from now on; elsewhere nothing."""
        if self.on_terminal:
            with self._changed:
                self._status = text
                self._changed.notify()

    def close(self) -> None:
        """Have the rest written, if somebody reads it."""
        with self._changed:
            self._closed, self._status = True, ""
            self._changed.notify()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed or self._status != self._shown)
                lines, status, closed = [f"zmqbus: {text}\n" for text in self._lines], self._status, self._closed
                self._lines.clear()
                if self._left_out:
                    lines.append(f"zmqbus: {self._left_out:,} more lines are left out: nobody read them in time\n")
                    self._left_out = 0
            begin = CLEAR if self._shown and (lines or status != self._shown) else ""
            self._write(begin + "".join(lines) + self._fitted(status))
            self._shown = status
            if closed:
                return

    def _fitted(self, text: str) -> str:
        if not text:
            return ""
        with contextlib.suppress(OSError):
            text = text[: max(1, os.get_terminal_size(sys.stderr.fileno()).columns - 1)]
        return text

    def _write(self, text: str) -> None:
        """Past Python's buffer: its lock, held by a thread that waits for a reader, would not let the process end."""
        with contextlib.suppress(OSError):
            try:
                descriptor = sys.stderr.fileno()
            except (AttributeError, io.UnsupportedOperation):
                click.echo(text, nl=False, err=True)
                return
            data = text.encode(sys.stderr.encoding, "backslashreplace")
            while data:
                data = data[os.write(descriptor, data) :]
