"""Reading the log back: one consumer, from the first message on, beside the live rate of the same run.

The journal is filled through a forwarder, by one publisher, in batches as a burst makes them; then a fresh process
reads all of it. What is read was just written, and so in the page cache: as it is for whoever is a little behind.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from itertools import islice
from time import perf_counter

from bench.child import Parent
from bench.crew import Crew
from bench.durable import ACKED_S, CONNECT_S, QUICK, SIZE, live_rate, scratch
from bench.results import Budget, Line, Table

COUNT = 2_000_000
SHARE = 0.6

Progress = Callable[[str], None]


def measure(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table. `directory`: on the disk to be measured."""
    count = COUNT // (QUICK if quick else 1)
    live: list[float] = []
    rates: dict[str, list[float]] = {"Node": [], "AsyncNode": []}
    lost = 0
    for number in range(runs):
        progress(f"readback: run {number + 1}/{runs}")
        live.append(live_rate(count // 2))
        for face, task in (("Node", "reader"), ("AsyncNode", "async_reader")):
            bus = f"bench-{secrets.token_hex(4)}"
            with scratch(directory) as path, Crew() as crew:
                endpoint = crew.start("bench.durable:forwarder", path=path, bus=bus).hear()["endpoint"]
                filler = crew.start("bench.durable:publisher", bus=bus, endpoint=endpoint, topic="bench.1", count=count)
                filler.hear()
                filler.tell(go=True)
                filler.hear(ACKED_S)
                report = crew.start(f"bench.readback:{task}", bus=bus, endpoint=endpoint, count=count + 1).hear()
                rates[face].append(report["rate"])
                lost += report["lost"]
    lines = [
        Line(f"{face}, from the first on", "/s", rates[face], live, "live", budget=budget, lost=lost)
        for face, budget in (("Node", Budget("ratio", at_least=SHARE)), ("AsyncNode", None))
    ]
    return [Table("reading the log back", [f"{SIZE} B, {count:,} messages, one consumer"], lines)]


# --- tasks ---------------------------------------------------------------------------------------


def reader(parent: Parent, bus: str, endpoint: str, count: int) -> None:
    """`for message in node.subscribe(…, start="first")`."""
    from zmqbus import Node

    with Node("reader", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_peers(1, CONNECT_S)
        start = perf_counter()
        subscription = node.subscribe("bench.>", start="first")
        for _message in islice(subscription, count - 1):
            pass
        last = subscription.get(CONNECT_S)
        rate = count / (perf_counter() - start)
        parent.tell(rate=rate, lost=subscription.lost + count - 1 - (last.offset or 0 if last is not None else 0))
        parent.hear()


def async_reader(parent: Parent, bus: str, endpoint: str, count: int) -> None:
    """`async for message in node.subscribe(…, start="first")`."""
    import asyncio

    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode("reader", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
            await node.wait_for_peers(1, CONNECT_S)
            start = perf_counter()
            subscription = await node.subscribe("bench.>", start="first")
            left = count
            async for _message in subscription:
                left -= 1
                if not left:
                    break
            parent.tell(rate=count / (perf_counter() - start), lost=subscription.lost + left)
            await asyncio.to_thread(parent.hear)

    asyncio.run(run())
