"""How a command is asked to stop: by Ctrl-C, SIGTERM or SIGHUP. And how one that minds is stopped by Ctrl-Z.

Rule 1: a signal only leaves a note. A command acts on it where it looks for it (`check`), which whatever waits does
every PEEK seconds. So a signal never lands in the middle of anything, to leave it half done.
Rule 2: LEAVE_MAX seconds after the first the process ends, however far it is. So there is no need for a second one,
and that is ignored. Only what others rely on has the time it needs (`handed_to`), until a second one comes.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from zmqbus.net.clock import now, sleep

PEEK = 0.25  # seconds: how often whatever waits looks at what else has happened
LEAVE_MAX = 2.5  # seconds from the first signal to the end
SHOW_CURSOR = b"\x1b[?25h"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_asked = 0  # the first of these signals that came
_suspend = False  # Ctrl-Z came


class Stopped(KeyboardInterrupt):
    """A command was asked to stop, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def check() -> None:
    """Raise Stopped, if the command was asked to stop."""
    if _asked:
        raise Stopped(_asked)


def asked() -> bool:
    """Whether the command was asked to stop."""
    return bool(_asked)


def rest(seconds: float) -> None:
    """Sleep; raises Stopped soon after the command was asked to stop."""
    until = now() + seconds
    while (left := until - now()) > 0:
        check()
        sleep(min(left, PEEK))
    check()


def prepare() -> None:
    """For this process: signals that stop commands in an orderly way, and output that takes any text."""
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may be ASCII; topics need not
    signal.signal(signal.SIGALRM, _overdue)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _asked:
        _asked = number
        signal.setitimer(signal.ITIMER_REAL, LEAVE_MAX)
        if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"\r  \r")  # over the ^C that the terminal has printed


def _overdue(number: int, frame: FrameType | None) -> NoReturn:
    for stream in (sys.__stdout__, sys.__stderr__):
        fd = stream.fileno() if stream is not None else -1
        if fd >= 0 and os.isatty(fd) and select.select([], [fd], [], 0)[1]:
            os.write(fd, SHOW_CURSOR)  # a live table or a bar may have hidden it
    os._exit(128 + _asked)


def conclude(code: int) -> NoReturn:
    """The command has ended, and so does the process."""
    if _asked:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)  # without taking apart what is still under way
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


@contextlib.contextmanager
def handed_to(on_signal: Callable[[bool], None]) -> Iterator[None]:
    """Here nobody looks for a note: `on_signal(False)` is called, in the main thread, when one of these signals comes.

    With the second one, `on_signal(True)`, the LEAVE_MAX seconds begin. Raises Stopped if one has come already.
    """
    came = False

    def hand_over(number: int, frame: FrameType | None) -> None:
        nonlocal came
        again, came = came, True
        if again:
            _note(number, frame)
        on_signal(again)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, hand_over)
        check()
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Ctrl-Z ------------------------------------------------------------------------------------


@contextlib.contextmanager
def suspendable() -> Iterator[None]:
    """Here Ctrl-Z also only leaves a note: whoever holds something that others wait for lets go of it first."""
    if signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTSTP, _note_suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _note_suspend(number: int, frame: FrameType | None) -> None:
    global _suspend
    _suspend = True


def suspended() -> bool:
    """Whether Ctrl-Z came."""
    return _suspend


def suspend() -> None:
    """Stop the process now; returns when it goes on (`fg`, SIGCONT)."""
    global _suspend
    ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, ours)
    _suspend = False
