"""Running commands: as processes, in this one, and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pytest
from click.testing import CliRunner

from zmqbus.cli.group import cli
from zmqbus.cli.shell.bus import Watch, settle
from zmqbus.node.faces.node import Node

PATIENCE = 60.0  # for a process, on a machine with other work to do
SETTLING = (
    "views",
    "forwarder.asking",
    "work.dead",
    "work.queues",
    "work.request",
)  # those that look for nodes for so long


def finish(process: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[int, str, str]:
    """Exit code, output and remarks of a process that ends by itself."""
    out, err = process.communicate(timeout=patience)
    assert "Traceback" not in err
    return process.returncode, out, err


def run(*args: str, text: str | bytes | None = None, others: int = 0) -> tuple[int, str, str]:
    """The same for a command in this process. What it takes for nodes to be found lasts until it has met `others`."""

    def patiently(node: Node, watch: Watch, seconds: float) -> None:
        settle(node, watch, seconds)
        node.wait_for_peers(others, PATIENCE)
        watch.poll()

    with pytest.MonkeyPatch.context() as patch:
        for name in SETTLING:
            patch.setattr(f"zmqbus.cli.{name}.settle", patiently)
        result = CliRunner().invoke(cli, list(args), input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


class Terminal:
    """`zmqbus …` on a terminal of its own; what it shows is in `shown`. Ended with the block, if it still runs."""

    def __init__(self, *args: str, columns: int = 100, **environment: str) -> None:
        self._fd, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (30, columns))
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zmqbus", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color"}
            | environment,
            process_group=0,
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def read(self, timeout: float = 0.05) -> bool:
        """Take in what it shows. False: it has ended."""
        if select.select([self._fd], [], [], timeout)[0]:
            try:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # how a terminal says that the other side is closed
                return False
        return True

    def until(self, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until it shows this."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            meanwhile()
            assert self.read() or text in self.shown, self.shown

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it has shown in all."""
        while self.read(PATIENCE):
            pass
        assert "Traceback" not in self.shown
        assert "Exception" not in self.shown
        assert "Task was destroyed" not in self.shown
        return self.process.wait(PATIENCE), self.shown


def plain(shown: str) -> str:
    """Without control sequences and carriage returns."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "")
