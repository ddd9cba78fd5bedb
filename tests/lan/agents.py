"""Driving `agent.py` from a test: one `Agent` is one process with some nodes, here or on a host of a Lan.

    with Lan(hosts=2) as lan, Agents() as agents:
        a = agents.start(lan.hosts[0])
        a.open("a", bus=bus, key=str(key))
        a.subscribe("a", "ear", ["t.>"])
        wait_until(lambda: received(a.report("ear"), "t.x") == 100)

Every wait has a bound, after which the test fails and says what it waited for. On leaving, all agents are killed.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from tests.netns import Host

needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft: apt-get install nftables")

T = TypeVar("T")
PROGRAM = Path(__file__).with_name("agent.py")
PATIENCE_S = 40.0  # no wait of a healthy test comes near it
POLL_S = 0.03


class AgentError(Exception):
    """The agent's answer was an error: `kind` is its class, `text` its message."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Agent:
    """One process. Each verb of agent.py's Agent is a method here, by keyword arguments."""

    def __init__(self, host: Host | None) -> None:
        argv = [sys.executable, str(PROGRAM)]
        start = subprocess.Popen if host is None else host.popen
        self.process: subprocess.Popen[str] = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def tell(self, do: str, **arguments: Any) -> None:
        """Have something done; `answer` waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = PATIENCE_S) -> Any:
        """The answer to the first `tell` that has not been answered yet."""
        answer = self._answers.get(timeout=timeout)
        assert answer is not None, f"the agent ended with {self.process.wait()}"
        if "error" in answer:
            raise AgentError(answer["error"], answer["text"])
        return answer["ok"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have something done, and wait for it."""
        self.tell(do, **arguments)
        return self.answer()

    def open(self, node: str, **options: Any) -> dict[str, Any]:
        """Open a node; returns its origin and endpoints."""
        opened: dict[str, Any] = self.ask("open", node=node, options=options)
        return opened

    def peers(self, node: str) -> set[str]:
        """The names of a node's peers."""
        return {name for name, _, _ in self.ask("peers", node=node)}

    def report(self, ear: str = "ear") -> dict[str, Any]:
        """What a subscription has received and lost."""
        report: dict[str, Any] = self.ask("report", ear=ear)
        return report

    def events(self, node: str, kind: str, **facts: Any) -> list[dict[str, Any]]:
        """The events of one kind that have these facts."""
        wanted = {"kind": kind, **facts}
        return [event for event in self.ask("events", node=node) if wanted.items() <= event.items()]

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it the hard way, and reap it."""
        self.process.kill()
        self.process.wait()

    def release(self) -> None:
        """Kill it, if it still lives, and let go of its pipes."""
        self.kill()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # unsent input of one that is dead
                pipe.close()


class Agents:
    """All agents of a test; leaving kills them."""

    def __init__(self) -> None:
        self._agents: list[Agent] = []

    def start(self, host: Host | None = None) -> Agent:
        """One more process, on `host` or on this machine."""
        agent = Agent(host)
        self._agents.append(agent)
        return agent

    def start_all(self, hosts: Iterable[Host]) -> list[Agent]:
        """One process on each host."""
        return [self.start(host) for host in hosts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self._agents:
            agent.release()


def wait_until(condition: Callable[[], T], timeout: float = PATIENCE_S, told: Callable[[], Any] = str) -> T:
    """Wait until `condition()` is true, and return what it returned. On failure, `told()` says what was there."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s; {told()}"
        time.sleep(POLL_S)
    return result


def ranges(report: Mapping[str, Any], topic: str, origin: int | None = None) -> list[list[int]]:
    """What a report says was received of a stream, in the order in which it came: [[first, last], …]."""
    for each_topic, each_origin, received in report["streams"]:
        if each_topic == topic and origin in (None, each_origin):
            return list(received)
    return []


def account(report: Mapping[str, Any], topic: str, origin: int | None = None) -> list[list[int]]:
    """Received and lost ranges of a stream, joined where they touch; [[1, n]] is: all of it, each message once.

    Fails when anything came out of order, twice, with a wrong value, or was delivered and called lost.
    """
    assert report["wrong"] == []
    received = ranges(report, topic, origin)
    lost = [gap[2:] for gap in report["gaps"] if gap[0] == topic and origin in (None, gap[1])]
    for pieces in (received, lost):
        assert pieces == sorted(pieces), f"out of order: {pieces}"
    merged: list[list[int]] = []
    for first, last in sorted(received + lost):
        if merged and first <= merged[-1][1]:
            raise AssertionError(f"#{first} is there twice: received {received}, lost {lost}")
        if merged and first == merged[-1][1] + 1:
            merged[-1][1] = last
        else:
            merged.append([first, last])
    return merged


def wait_exact(agent: Agent, topic: str, last: int, *, first: int = 1, ear: str = "ear", origin: int | None = None,
               timeout: float = PATIENCE_S) -> dict[str, Any]:  # fmt: skip
    """Wait until all of a stream from `first` to `last` was received or reported as lost; returns the report."""
    report: dict[str, Any] = {}

    def settled() -> bool:
        nonlocal report
        report = agent.report(ear)
        known = account(report, topic, origin)
        return bool(known) and known[-1][1] >= last

    wait_until(settled, timeout, lambda: f"wanted #{last} of {topic}: {report}")
    assert account(report, topic, origin) == [[first, last]], report
    return report
