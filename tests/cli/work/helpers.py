"""What the tests of work share: owners to ask, and forwarders to wait for."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import zmqbus
from tests.cli.commands import PATIENCE
from zmqbus.node.faces.asking import own_queues

Start = Callable[..., "subprocess.Popen[str]"]
WAIT = ("--wait", "500ms")


def until(condition: Callable[[], object]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def figures(node: zmqbus.Node, queue: str, group: str = "") -> Any:
    """What a node says of its queue; None: nothing."""
    return next((one for one in own_queues(node) if (one.topic, one.group) == (queue, group)), None)


def said(process: subprocess.Popen[str], words: str) -> str:
    """The next line on its stderr with these words."""
    assert process.stderr is not None
    while words not in (line := process.stderr.readline()):
        assert line, f"it ended with {process.wait(PATIENCE)}, and did not say {words!r}"
    return line


def rejected(node: zmqbus.Node, queue: str, reason: str = "no") -> None:
    """All that waits in its queue becomes dead letters."""
    with node.pull(queue) as worker:
        while (job := worker.get(0.5)) is not None:
            job.reject(reason)
