"""Latency of request and reply: a question to another process, and its answer. One at a time, so that nothing batches.

As for `roundtrip`, at a low rate every round begins with sleeping threads and cold caches; back to back is what most
benchmarks show. Beside it the same bytes through a raw DEALER and ROUTER, on blocking sockets.

How the responder is made, and what that costs: `inline`, its function runs on the node's own thread; `threads`, on one
of its pool; `loop`, by `for request in node.respond(…)` on the main thread.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from time import perf_counter, sleep

import zmq

from bench.child import Parent
from bench.crew import Crew
from bench.results import Budget, Line, Table, percentile

ROUNDS = 2000
ROUNDS_QUICK = 200
WARM_UP = 100  # rounds before those that count
PAUSES = {"low rate": 0.0005, "back to back": 0.0}  # seconds between rounds
SIZE = 100
BUDGET = 1.5
ANSWER_S = 20.0
RESPONDERS = {"inline": "Node, inline", "threads": "Node, threads", "loop": "Node, loop", "async": "AsyncNode"}

Progress = Callable[[str], None]


def measure(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table, lines for each kind of responder, pace, and percentile."""
    table = Table("request and reply, one at a time", [f"{SIZE} B each way"])
    rounds = ROUNDS_QUICK if quick else ROUNDS
    for pace, pause in PAUSES.items():
        raw: list[list[float]] = []
        ours: dict[str, list[list[float]]] = {kind: [] for kind in RESPONDERS}
        for number in range(runs):
            progress(f"request, {pace}: run {number + 1}/{runs}")
            raw.append(run_raw(rounds, pause))
            for kind, times in ours.items():
                times.append(run(kind, rounds, pause))
        for kind, label in RESPONDERS.items():
            for percent in (50, 99):
                budgeted = percent == 50 and kind == "inline" and pause > 0
                table.lines.append(
                    Line(
                        label=f"{label}, {pace}, p{percent}",
                        unit="µs",
                        ours=[percentile(times, percent) for times in ours[kind]],
                        raw=[percentile(times, percent) for times in raw],
                        raw_name="pyzmq DEALER/ROUTER",
                        budget=Budget("ratio", at_most=BUDGET) if budgeted else None,
                    )
                )
    return [table]


def run_raw(rounds: int, pause: float) -> list[float]:
    """Microseconds of each round."""
    with Crew() as crew:
        endpoint = crew.start("bench.request:raw_responder").hear()["endpoint"]
        times: list[float] = crew.start(
            "bench.request:raw_requester", endpoint=endpoint, rounds=rounds, pause=pause
        ).hear()["times"]
        return times


def run(kind: str, rounds: int, pause: float) -> list[float]:
    """The same with zmqbus, for one kind of responder."""
    bus = f"bench-{secrets.token_hex(4)}"
    asks = "async_requester" if kind == "async" else "requester"
    with Crew() as crew:
        endpoint = crew.start(f"bench.request:{kind}_responder", bus=bus).hear()["endpoint"]
        times: list[float] = crew.start(
            f"bench.request:{asks}", bus=bus, endpoint=endpoint, rounds=rounds, pause=pause
        ).hear()["times"]
        return times


# --- tasks: raw pyzmq ----------------------------------------------------------------------------


def raw_responder(parent: Parent) -> None:
    """A ROUTER that sends back what it gets, until it is killed with its crew."""
    router = zmq.Context().socket(zmq.ROUTER)
    parent.tell(endpoint=f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
    while True:
        router.send_multipart(router.recv_multipart())


def raw_requester(parent: Parent, endpoint: str, rounds: int, pause: float) -> None:
    """A DEALER."""
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(endpoint)
    value = bytes(SIZE)
    times = []
    for _ in range(WARM_UP + rounds):
        sleep(pause)
        start = perf_counter()
        dealer.send(value)
        dealer.recv()
        times.append((perf_counter() - start) * 1e6)
    parent.tell(times=times[WARM_UP:])


# --- tasks: zmqbus -------------------------------------------------------------------------------


def _same(value: object) -> object:
    return value


def inline_responder(parent: Parent, bus: str) -> None:
    """A function on the node's own thread."""
    from zmqbus import Node

    with Node("responder", bus=bus, interface="127.0.0.1", discovery="static") as node:
        node.responder("echo", inline=True)(_same)
        parent.tell(endpoint=node.endpoints["inbox"])
        parent.hear()


def threads_responder(parent: Parent, bus: str) -> None:
    """A function on a thread of the responder's pool."""
    from zmqbus import Node

    with Node("responder", bus=bus, interface="127.0.0.1", discovery="static") as node:
        node.responder("echo")(_same)
        parent.tell(endpoint=node.endpoints["inbox"])
        parent.hear()


def loop_responder(parent: Parent, bus: str) -> None:
    """`for request in requests: request.reply(…)`."""
    from zmqbus import Node

    with (
        Node("responder", bus=bus, interface="127.0.0.1", discovery="static") as node,
        node.respond("echo") as requests,
    ):
        parent.tell(endpoint=node.endpoints["inbox"])
        for request in requests:
            request.reply(request.value)


def async_responder(parent: Parent, bus: str) -> None:
    """A coroutine function."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode("responder", bus=bus, interface="127.0.0.1", discovery="static") as node:

            @node.responder("echo")
            async def echo(value: object) -> object:
                return value

            parent.tell(endpoint=node.endpoints["inbox"])
            await asyncio.sleep(3600)

    asyncio.run(run())


def requester(parent: Parent, bus: str, endpoint: str, rounds: int, pause: float) -> None:
    """`node.request`."""
    from zmqbus import Node

    with Node("requester", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_responders("echo", 1, ANSWER_S)
        value = bytes(SIZE)
        times = []
        for _ in range(WARM_UP + rounds):
            sleep(pause)
            start = perf_counter()
            answer = node.request("echo", value, timeout=ANSWER_S)
            times.append((perf_counter() - start) * 1e6)
            assert answer == value
        parent.tell(times=times[WARM_UP:])


def async_requester(parent: Parent, bus: str, endpoint: str, rounds: int, pause: float) -> None:
    """`await node.request`."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode("requester", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
            await node.wait_for_responders("echo", 1, ANSWER_S)
            value = bytes(SIZE)
            times = []
            for _ in range(WARM_UP + rounds):
                await asyncio.sleep(pause)
                start = perf_counter()
                answer = await node.request("echo", value, timeout=ANSWER_S)
                times.append((perf_counter() - start) * 1e6)
                assert answer == value
            parent.tell(times=times[WARM_UP:])

    asyncio.run(run())
