"""Worker processes, seen from the parent. Real ones, fresh for every run, each doing one task of child.py's kind.

    with Crew() as crew:
        sender = crew.start("bench.faces:raw_sender", size=100, count=1000)
        endpoint = sender.hear()["endpoint"]
        sender.tell(go=True)

Nothing waits for ever, and nothing stays behind: every `hear` has a timeout, every worker a limit on its life, and
leaving the crew kills and reaps all that are left, also after an error or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TOOLS = Path(__file__).resolve().parent.parent
LIFE_S = 300.0  # no worker lives longer, whatever becomes of its parent
HEAR_S = 90.0  # no single step of a run takes longer
END_S = 15.0  # to close down by itself when asked to

Popen = Callable[..., "subprocess.Popen[bytes]"]


class WorkerFailed(Exception):
    """A worker reported an error, ended early, or did not answer in time. The message says which, and the task."""


class Worker:
    """One process."""

    def __init__(self, task: str, arguments: dict[str, Any], popen: Popen) -> None:
        self.task = task
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")]))
        self._process = popen(
            [sys.executable, "-m", "bench.child", task, str(LIFE_S), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends the workers
        )
        self._received = b""

    def tell(self, **order: Any) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self.task}: ended early") from None

    def hear(self, timeout: float = HEAR_S) -> dict[str, Any]:
        """The next report.

        Raises:
            WorkerFailed: there is none within `timeout` seconds, or it is of an error.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], timeout)[0]:
                raise WorkerFailed(f"{self.task}: silent for {timeout:.0f} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise WorkerFailed(f"{self.task}: ended early (exit status {self._process.wait(END_S)})")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        report: dict[str, Any] = json.loads(line)
        if "error" in report:
            raise WorkerFailed(f"{self.task}: {report['error']}")
        return report

    def end(self, timeout: float = END_S) -> None:
        """Let it close down: its stdin ends. Killed if that takes longer than `timeout` seconds."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def kill(self) -> None:
        """End it at once, and reap it."""
        self._process.kill()
        self._process.wait(END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that nobody read
                    pipe.close()


class Crew:
    """The workers of one run."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def start(self, task: str, popen: Popen = subprocess.Popen, **arguments: Any) -> Worker:
        """Start a worker. `popen`: starts the process elsewhere, such as in a network namespace."""
        worker = Worker(task, arguments, popen)
        self._workers.append(worker)
        return worker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
