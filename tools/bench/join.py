"""Joining: until a message has gone from a newcomer to a node that was there, and one back.

Each join is a fresh process that finds the resident by mDNS alone. Its clock stops when the resident's answer is in
the newcomer's hands: `Node`, `subscribe`, `wait_for_subscribers`, `publish`, `get`. It starts twice: right before
`Node(…)` (`import zmqbus` is done; what that defers, zeroconf first of all, is not), and when the node, bound and
tested, begins to announce itself; the budget is on the latter. On one host by loopback; and, with a bus key, between
two network namespaces joined by a bridge.
"""

from __future__ import annotations

import importlib.util
import secrets
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import ModuleType

from bench.child import Parent
from bench.crew import Crew, Popen
from bench.results import Budget, Line, Table

JOINS_PER_RUN = 4
BUDGET_MS = 50.0
ANSWER_S = 20.0
NETNS = Path(__file__).resolve().parents[2] / "tests" / "netns.py"

Progress = Callable[[str], None]


def measure(namespaces: bool, key: str, runs: int, progress: Progress) -> list[Table]:
    """One table. `key`: file of a bus key. `namespaces`: measure between two hosts too, where that is permitted."""
    table = Table("joining: until both sides have a message of the other")
    joins = JOINS_PER_RUN * runs
    table.notes.append(f"{joins} joins, one after the other; the median, least and greatest")
    table.lines += _joins(
        "same host", joins, None, ("127.0.0.1", subprocess.Popen), ("127.0.0.1", subprocess.Popen), progress
    )
    if not namespaces:
        return [table]
    with ExitStack() as stack:
        try:
            lan = stack.enter_context(_netns().Lan(hosts=2))
        except (ImportError, OSError) as error:
            table.notes.append(f"not measured between two hosts: {error}")
            return [table]
        except BaseException as error:
            if type(error).__name__ != "Skipped":  # pytest's, a BaseException: namespaces are not permitted here
                raise
            table.notes.append(f"not measured between two hosts: {error}")
            return [table]
        here, there = lan.hosts
        table.lines += _joins(
            "two hosts, bus key", joins, key, (here.address, here.popen), (there.address, there.popen), progress
        )
    return [table]


def _netns() -> ModuleType:
    """tests/netns.py, which is no package."""
    spec = importlib.util.spec_from_file_location("netns", NETNS)
    if spec is None or spec.loader is None or not NETNS.exists():
        raise ImportError(f"no {NETNS}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _joins(
    where: str,
    joins: int,
    key: str | None,
    resident: tuple[str, Popen],
    newcomer: tuple[str, Popen],
    progress: Progress,
) -> list[Line]:
    bus = f"bench-{secrets.token_hex(4)}"
    announced, total, opened = [], [], []
    with Crew() as crew:
        crew.start("bench.join:resident", resident[1], bus=bus, key=key, interface=resident[0]).hear()
        for number in range(joins):
            progress(f"join, {where}: {number + 1}/{joins}")
            joiner = crew.start(
                "bench.join:newcomer", newcomer[1], bus=bus, key=key, interface=newcomer[0], number=number
            )
            times = joiner.hear()
            announced.append(times["announced_ms"])
            total.append(times["total_ms"])
            opened.append(times["open_ms"])
            joiner.end()
    return [
        Line(f"{where}, from announcing", "ms", announced, budget=Budget("value", at_most=BUDGET_MS)),
        Line(f"{where}, from before Node(…)", "ms", total),
        Line(f"{where}, of that Node(…)", "ms", opened),
    ]


# --- tasks ---------------------------------------------------------------------------------------


def resident(parent: Parent, bus: str, key: str | None, interface: str) -> None:
    """Answers every newcomer, until it is killed with its crew."""
    from zmqbus import Node

    with Node("resident", bus=bus, key=key, interface=interface) as node, node.subscribe("hello") as subscription:
        parent.tell(ready=True)
        for message in subscription:
            node.publish("welcome", message.value)


def newcomer(parent: Parent, bus: str, key: str | None, interface: str, number: int) -> None:
    """Joins once, and leaves when told."""
    from zmqbus import Node
    from zmqbus.net.discovery import Discovery

    announcing = []
    begin = Discovery.start

    async def noted(self: Discovery) -> None:
        announcing.append(perf_counter())
        await begin(self)

    Discovery.start = noted  # type: ignore[method-assign]
    start = perf_counter()
    with Node(f"newcomer-{number}", bus=bus, key=key, interface=interface) as node:
        opened = perf_counter()
        with node.subscribe("welcome") as subscription:
            node.wait_for_subscribers("hello", 1, ANSWER_S)
            node.publish("hello", number)
            answer = subscription.get(ANSWER_S)
            if answer is None or answer.value != number:
                raise TimeoutError(f"the resident answered {answer}")
            end = perf_counter()
            parent.tell(
                announced_ms=(end - announcing[0]) * 1e3,
                total_ms=(end - start) * 1e3,
                open_ms=(opened - start) * 1e3,
            )
            parent.hear()
