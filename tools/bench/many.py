"""Many nodes on one machine that start together: how long until every one sees every other, and at what cost.

Several nodes share a process, each with its own threads, sockets and mDNS, as if it were alone.
"""

from __future__ import annotations

import contextlib
import resource
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic

from bench.child import Parent, cpu_s, rss_bytes
from bench.crew import Crew
from bench.results import Budget, Line, Table

NODES = 100
NODES_QUICK = 12
NODES_PER_PROCESS = 10
COMPLETE_S = 60.0
MIB = 1024 * 1024

Progress = Callable[[str], None]


def measure(nodes: int, runs: int, progress: Progress) -> list[Table]:
    """One table for `nodes` nodes."""
    table = Table(f"{nodes} nodes on one machine, started together", [f"{NODES_PER_PROCESS} nodes in each process"])
    complete = Line("nodes that see all others", "nodes", budget=Budget("value", at_least=nodes))
    fewest = Line("peers seen by the node that sees fewest", "nodes", budget=Budget("value", at_least=nodes - 1))
    duration = Line("first Node(…) until all see all", "s")
    after = Line("last Node(…) open until all see all", "s")
    cpu = Line("CPU, all processes", "s")
    rss = Line("resident memory per node", "MiB")
    shares = [len(range(nodes)[first : first + NODES_PER_PROCESS]) for first in range(0, nodes, NODES_PER_PROCESS)]
    for number in range(runs):
        progress(f"{nodes} nodes: run {number + 1}/{runs}")
        bus = f"bench-{secrets.token_hex(4)}"
        with Crew() as crew:
            workers = [crew.start("bench.many:nodes", bus=bus, count=share, total=nodes) for share in shares]
            for worker in workers:
                worker.hear()
            for worker in workers:
                worker.tell(go=True)
            got = [worker.hear(2 * COMPLETE_S + 60) for worker in workers]
            for worker in workers:
                worker.tell(end=True)
            for worker in workers:
                worker.end()
        seen = [peers for report in got for peers in report["peers"]]
        complete.ours.append(sum(peers >= nodes - 1 for peers in seen))
        fewest.ours.append(min(seen))
        done = max(report["complete_at"] for report in got)
        duration.ours.append(done - min(report["start_at"] for report in got))
        after.ours.append(done - max(report["open_at"] for report in got))
        cpu.ours.append(sum(report["cpu_s"] for report in got))
        rss.ours.append(sum(report["rss"] for report in got) / nodes / MIB)
    table.lines = [complete, fewest, duration, after, cpu, rss]
    return [table]


def nodes(parent: Parent, bus: str, count: int, total: int) -> None:
    """`count` nodes of `total`."""
    from zmqbus import Node, WaitTimeout

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parent.tell(ready=True)
    parent.hear()
    used, start = cpu_s(), monotonic()  # the same clock in all processes
    opened: list[Node] = []
    with ExitStack() as stack:
        for _ in range(count):
            opened.append(Node(f"node-{secrets.token_hex(3)}", bus=bus, interface="127.0.0.1"))
            stack.callback(opened[-1].close)
        open_at = monotonic()
        deadline = open_at + COMPLETE_S
        for node in opened:
            with contextlib.suppress(WaitTimeout):
                node.wait_for_peers(total - 1, max(0.0, deadline - monotonic()))
        complete_at = monotonic()
        parent.tell(
            start_at=start,
            open_at=open_at,
            complete_at=complete_at,
            peers=[len(node.peers()) for node in opened],
            cpu_s=cpu_s() - used,
            rss=rss_bytes(),
        )
        parent.hear()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda node: node.close(timeout=1.0), opened))
