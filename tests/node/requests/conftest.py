"""Nodes that ask, nodes that answer, and responders in processes of their own, to be killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Appends a line "NAME VALUE" to a file for each request that it begins with, and answers with its name; a request for
# "hang" is never answered.
RESPONDER = """
import sys, time, zmqbus
bus, name, path = sys.argv[1:]
with zmqbus.Node(name, bus=bus) as node, node.respond("work") as requests:
    print(node.origin, flush=True)
    for request in requests:
        with open(path, "a") as file:
            print(name, request.value, file=file)
        if request.value != "hang":
            request.reply(name)
"""


class Process:
    """A responder to "work"."""

    def __init__(self, bus: str, name: str, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RESPONDER, bus, name, path], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.origin = int(self.process.stdout.readline())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture
def start(bus: str, tmp_path: Any) -> Iterator[Callable[[str], Process]]:
    """Starts responders by name; what they begin with is in the file `done` of `tmp_path`."""
    (tmp_path / "done").touch()
    started: list[Process] = []

    def start(name: str) -> Process:
        started.append(Process(bus, name, str(tmp_path / "done")))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        assert each.process.stdout is not None
        each.process.stdout.close()


def out_of_time(node: Any) -> bool:
    """Whether requests have come to this node, and nobody waits for an answer to any of them any more."""
    there = list(node._engine.requests.answering._open)
    return bool(there) and all(one.is_late for one in there)


class Asked(threading.Thread):
    """A request under way on a thread of its own."""

    def __init__(self, ask: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.outcome: Any = None
        self._ask = lambda: ask(*arguments, **options)
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._ask()
        except Exception as error:
            self.outcome = error

    def result(self, timeout: float = 20.0) -> Any:
        """What came of it: a value, or the error that was raised."""
        self.join(timeout)
        assert not self.is_alive(), "it still waits"
        return self.outcome
