"""Durable publishing: on the forwarder's disk, synced and acknowledged, beside the live rate and the disk's own limit.

Each round measures, one after the other, the live rate (one publisher, one subscriber, no forwarder), the disk with
nothing in between, and then zmqbus with a forwarder on that disk.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import roundtrip
from bench.child import Parent, rss_bytes
from bench.crew import Crew, Worker
from bench.pubsub import Contender
from bench.results import Budget, Line, Table, percentile

SIZE = 100
COUNT = 8_000_000  # with four publishers, each has its history full of them long before the end
IN_FLIGHT = 2000  # durable publishes one after the other
BATCH = 1000  # records to a sync, of the disk alone
ROUNDS = 2000
PAUSE = 0.0005  # seconds between two of them
QUICK = 20  # times fewer
CONNECT_S = 20.0
ACKED_S = 60.0
SHARE, RATE, LATENCY, PRESENCE = 0.6, 1.2e6, 2.5, 1.1  # budgets

Progress = Callable[[str], None]


def measure(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table. `directory`: on the disk to be measured."""
    count, flights, rounds = (number // (QUICK if quick else 1) for number in (COUNT, IN_FLIGHT, ROUNDS))
    live, raw_disk, raw_sync = [], [], []
    one, four, alone, apart, beside, raw_apart, raw_beside = [], [], [], [], [], [], []
    for number in range(runs):
        progress(f"durable: run {number + 1}/{runs}")
        live.append(live_rate(count))
        with scratch(directory) as path:
            rate, times = disk(path, count, flights)
        raw_disk.append(rate)
        raw_sync.append(percentile(times, 50))
        for publishers, rates in ((1, one), (4, four)):
            with scratch(directory) as path, Crew() as crew:
                rates.append(_pipelined(crew, path, publishers, count // publishers))
        with scratch(directory) as path, Crew() as crew:
            alone.append(percentile(_one_in_flight(crew, path, flights), 50))
        apart.append(percentile(_live_round_trip(rounds), 50))
        with scratch(directory) as path, Crew() as crew:
            bus = f"bench-{secrets.token_hex(4)}"
            forwarder = crew.start("bench.durable:forwarder", path=path, bus=bus)
            endpoint = forwarder.hear()["endpoint"]
            beside.append(percentile(_live_round_trip(rounds, bus, endpoint), 50))
        raw_apart.append(percentile(roundtrip.run("raw", rounds, PAUSE), 50))
        raw_beside.append(percentile(roundtrip.run("raw", rounds, PAUSE, listens=True), 50))
    return [
        Table(
            "durable publishing through a forwarder",
            [f"{SIZE} B; acknowledged after fdatasync; the live rate is that of one publisher and one subscriber"],
            [
                Line("pipelined, 1 publisher", "/s", one, live, "live", budget=Budget("ratio", at_least=SHARE)),
                Line("the same", "/s", one, raw_disk, f"disk, {BATCH} to a sync", budget=Budget("value", RATE)),
                Line("pipelined, 4 publishers", "/s", four, one, "1 publisher", budget=Budget("ratio", at_least=1.0)),
                Line("one in flight, p50", "µs", alone, raw_sync, "append, fdatasync", budget=_at_most(LATENCY)),
                Line("live round trip, p50", "µs", beside, apart, "no forwarder", budget=_at_most(PRESENCE)),
                Line("raw round trip, one more SUB", "µs", raw_beside, raw_apart, "no such"),
            ],
        )
    ]


def _at_most(ratio: float) -> Budget:
    return Budget("ratio", at_most=ratio)


class scratch:
    """A directory that is gone afterwards."""

    def __init__(self, parent: str | None) -> None:
        self._parent = parent

    def __enter__(self) -> str:
        self._path = tempfile.mkdtemp(prefix="zmqbus-bench-", dir=self._parent)
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def live_rate(count: int) -> float:
    """Messages/s from one publisher to one subscriber."""
    contender = Contender("live", "node", {"key": None, "by": "publish"})
    contender.run(SIZE, count, 1)
    return contender.rates[0]


def disk(directory: str, count: int, flights: int) -> tuple[float, list[float]]:
    """What this disk does with the same bytes: records/s in batches, and µs of each append with its sync."""
    record = os.urandom(SIZE + 8)
    descriptor = os.open(Path(directory, "raw"), os.O_CREAT | os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, 64 << 20)
        batch, position = record * BATCH, 0
        start = perf_counter()
        for _ in range(count // BATCH):
            position += os.pwrite(descriptor, batch, position % (48 << 20))
            os.fdatasync(descriptor)
        rate = count / (perf_counter() - start)
        times = []
        position = 64 << 20  # behind what was reserved: an append, as a log without preallocation does it
        for _ in range(flights):
            start = perf_counter()
            position += os.pwrite(descriptor, record, position)
            os.fdatasync(descriptor)
            times.append((perf_counter() - start) * 1e6)
    finally:
        os.close(descriptor)
    return rate, times


def _pipelined(crew: Crew, path: str, publishers: int, count: int) -> float:
    """Acknowledged messages/s, from the first publish to the last acknowledgement."""
    bus = f"bench-{secrets.token_hex(4)}"
    endpoint = crew.start("bench.durable:forwarder", path=path, bus=bus).hear()["endpoint"]
    workers = [
        crew.start("bench.durable:publisher", bus=bus, endpoint=endpoint, topic=f"bench.{number}", count=count)
        for number in range(publishers)
    ]
    for worker in workers:
        worker.hear()
    start = perf_counter()
    for worker in workers:
        worker.tell(go=True)
    for worker in workers:
        worker.hear(ACKED_S)
    return publishers * count / (perf_counter() - start)


def _one_in_flight(crew: Crew, path: str, flights: int) -> list[float]:
    bus = f"bench-{secrets.token_hex(4)}"
    endpoint = crew.start("bench.durable:forwarder", path=path, bus=bus).hear()["endpoint"]
    worker: Worker = crew.start("bench.durable:publisher", bus=bus, endpoint=endpoint, topic="bench.1", count=0)
    worker.hear()
    worker.tell(flights=flights)
    times: list[float] = worker.hear(ACKED_S)["times"]
    return times


def _live_round_trip(rounds: int, bus: str | None = None, endpoint: str | None = None) -> list[float]:
    """At a low rate; with a forwarder that claims both topics, if there is one."""
    more: dict[str, Any] = {"seed": endpoint} if endpoint is not None else {}
    return roundtrip.run("node", rounds, PAUSE, bus=bus or f"bench-{secrets.token_hex(4)}", **more)


# --- tasks ---------------------------------------------------------------------------------------


def forwarder(parent: Parent, path: str, bus: str) -> None:
    """A forwarder, until its parent is gone. Reports on request."""
    from zmqbus.forwarder import Forwarder
    from zmqbus.net.adapter import run_main

    async def run() -> None:
        async with Forwarder(path, bus=bus, interface="127.0.0.1", discovery="static") as forwarder:
            parent.tell(endpoint=forwarder.endpoints["inbox"])
            while (await asyncio.to_thread(parent.hear)) is not None:
                figures = forwarder.statistics()
                parent.tell(rss=rss_bytes(), offset=figures["journal_next_offset"], used=figures["journal_bytes"])

    run_main(run())


def publisher(parent: Parent, bus: str, endpoint: str, topic: str, count: int) -> None:
    """`publish` and then `flush`; or, if told so, one durable `publish` after the other."""
    from zmqbus import Node

    with Node("publisher", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_peers(1, CONNECT_S)
        value = bytes(SIZE)
        node.publish(topic, value, durable=True, timeout=CONNECT_S)
        parent.tell(ready=True)
        order = parent.hear()
        assert order is not None
        times = []
        for _ in range(order.get("flights", 0)):
            start = perf_counter()
            node.publish(topic, value, durable=True, timeout=ACKED_S)
            times.append((perf_counter() - start) * 1e6)
        publish = node.publish
        for _ in range(count):
            publish(topic, value)
        node.flush(ACKED_S)
        parent.tell(times=times)
        parent.hear()
