"""The footprint of a node that has nothing to do: memory, CPU, and what it takes to get there.

Three nodes in three processes, so that each has two peers; each is one sample. Beside it the raw thing: a process
with a PUB and a SUB socket of pyzmq.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from statistics import mean
from time import perf_counter, sleep

from bench.child import Parent, cpu_s, rss_bytes
from bench.crew import TOOLS, Crew
from bench.results import Budget, Line, Table

NODES = 3
WATCH_S = 20.0
WATCH_QUICK_S = 3.0
SETTLE_S = 3.0  # announcements after the start are over
PEERS_S = 20.0
MIB = 1024 * 1024
RSS_MIB, CPU_PERCENT, IMPORT_MS = 45.0, 0.5, 250.0

Progress = Callable[[str], None]


def measure(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table."""
    watch = WATCH_QUICK_S if quick else WATCH_S
    table = Table("idle node with two peers", [f"mean of {NODES} nodes for {watch:.0f} s; raw: pyzmq, PUB and SUB"])
    rss = Line("resident memory", "MiB", budget=Budget("value", at_most=RSS_MIB), raw_name="pyzmq", comparable=False)
    cpu = Line("CPU of one core", "%", budget=Budget("value", at_most=CPU_PERCENT), raw_name="pyzmq", comparable=False)
    opening = Line("Node(…)", "ms")
    importing = Line(
        "from zmqbus import Node", "ms", budget=Budget("value", at_most=IMPORT_MS), raw_name="pyzmq", comparable=False
    )
    for number in range(runs):
        progress(f"idle: run {number + 1}/{runs}")
        importing.raw.append(_import_ms("import zmq"))
        importing.ours.append(_import_ms("from zmqbus import Node"))
        bus = f"bench-{secrets.token_hex(4)}"
        with Crew() as crew:
            raw = crew.start("bench.idle:raw", watch=watch)
            nodes = [crew.start("bench.idle:node", bus=bus, watch=watch) for _ in range(NODES)]
            got = [node.hear() for node in nodes]
            beside = raw.hear()
            for node in nodes:
                node.tell(end=True)
            for node in nodes:
                node.end()
        for line, name in ((rss, "rss_mib"), (cpu, "cpu_percent"), (opening, "open_ms")):
            line.ours.append(mean(report[name] for report in got))
            if name in beside:
                line.raw.append(beside[name])
    table.lines = [rss, cpu, importing, opening]
    return [table]


def _import_ms(statement: str) -> float:
    """In a fresh interpreter; its own start does not count. Modules are compiled before, as they are once installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    program = f"import time; start = time.perf_counter(); {statement}; print((time.perf_counter() - start) * 1e3)"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            cwd=TOOLS,
            env=environment,
        )
    return float(done.stdout)


# --- tasks ---------------------------------------------------------------------------------------


def node(parent: Parent, bus: str, watch: float) -> None:
    """An idle node."""
    from zmqbus import Node

    start = perf_counter()
    with Node(bus=bus, interface="127.0.0.1") as node:
        opened = (perf_counter() - start) * 1e3
        node.wait_for_peers(NODES - 1, PEERS_S)
        sleep(SETTLE_S)
        _watch(parent, watch, open_ms=opened)
        parent.hear()


def raw(parent: Parent, watch: float) -> None:
    """Idle sockets."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PUB) as pub, context.socket(zmq.SUB) as sub:
        port = pub.bind_to_random_port("tcp://127.0.0.1")
        sub.subscribe(b"")
        sub.connect(f"tcp://127.0.0.1:{port}")
        sleep(SETTLE_S)
        _watch(parent, watch)


def _watch(parent: Parent, watch: float, **more: float) -> None:
    used, start = cpu_s(), perf_counter()
    sleep(watch)
    percent = (cpu_s() - used) / (perf_counter() - start) * 100
    parent.tell(rss_mib=rss_bytes() / MIB, cpu_percent=percent, **more)
