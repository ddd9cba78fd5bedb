"""A forwarder with a large journal: its memory while that is written, and its way back after it was killed.

A publisher fills the journal through the forwarder, on many topics. Then the forwarder is killed, and started again on
the same directory, with a publisher that waits for its first acknowledgement.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from time import perf_counter

from bench.child import Parent
from bench.crew import Crew
from bench.durable import CONNECT_S, scratch
from bench.results import Budget, Line, Table

JOURNAL_BYTES = 2 << 30
STREAMS = 10_000
QUICK = 20  # times less of both
SIZE = 1000
MIB = 1024 * 1024
RSS_MIB, FIRST_ACK_MS = 150.0, 1000.0
FILLED_S = 280.0

Progress = Callable[[str], None]


def measure(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table. `directory`: on the disk to be measured."""
    scale = QUICK if quick else 1
    rss = Line("memory at the end", "MiB", budget=Budget("value", at_most=RSS_MIB))
    half = Line("memory half-way", "MiB")
    first_ack = Line("killed: from its start to the first ack", "ms", budget=Budget("value", at_most=FIRST_ACK_MS))
    opening = Line("of which interpreter, imports and recovery", "ms")
    for number in range(runs):
        progress(f"recovery: run {number + 1}/{runs}")
        bus = f"bench-{secrets.token_hex(4)}"
        with scratch(directory) as path:
            with Crew() as crew:
                forwarder = crew.start("bench.durable:forwarder", path=path, bus=bus)
                endpoint = forwarder.hear()["endpoint"]
                filler = crew.start(
                    "bench.recovery:filler",
                    bus=bus,
                    endpoint=endpoint,
                    total=JOURNAL_BYTES // scale,
                    streams=STREAMS // scale,
                )
                for line in (half, rss):
                    filler.hear(FILLED_S)
                    forwarder.tell(report=True)
                    line.ours.append(forwarder.hear()["rss"] / MIB)
                    filler.tell(go=True)
            with Crew() as crew:
                start = perf_counter()
                forwarder = crew.start("bench.durable:forwarder", path=path, bus=bus)
                endpoint = forwarder.hear()["endpoint"]
                opening.ours.append((perf_counter() - start) * 1e3)
                publisher = crew.start("bench.durable:publisher", bus=bus, endpoint=endpoint, topic="bench.0", count=0)
                publisher.hear()
                first_ack.ours.append((perf_counter() - start) * 1e3)
    gib = JOURNAL_BYTES / scale / (1 << 30)
    title = f"a forwarder with a journal of {gib:.3g} GiB, {STREAMS // scale:,} streams"
    return [Table(title, [f"messages of {SIZE} B"], [half, rss, opening, first_ack])]


# --- tasks ---------------------------------------------------------------------------------------


def filler(parent: Parent, bus: str, endpoint: str, total: int, streams: int) -> None:
    """Publishes `total` bytes on `streams` topics in turn; reports when half, and when all of it is on disk."""
    from zmqbus import Node

    with Node("filler", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_peers(1, CONNECT_S)
        node.publish("bench.0", b"", durable=True, timeout=CONNECT_S)
        value = bytes(SIZE)
        topics = [f"bench.{number}" for number in range(streams)]
        in_a_row = 20  # of each topic: a few make a batch
        rounds = max(2, total // (SIZE * in_a_row * streams))
        for number in range(1, rounds + 1):
            for topic in topics:
                for _ in range(in_a_row):
                    node.publish(topic, value)
            if number in (rounds // 2, rounds):
                node.flush(FILLED_S)
                parent.tell(published=number * streams * in_a_row)
                parent.hear()
