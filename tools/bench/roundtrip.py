"""Latency: a message there and, published anew, back. One at a time, so that nothing batches.

At a low rate, with a pause between rounds, every round begins with sleeping threads and cold caches, as real ones do;
back to back is what most benchmarks show.

Two processes: "ping" publishes on one topic and waits on the other, "pong" sends back what it gets. Pong runs until
it is killed with its crew.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from time import perf_counter, sleep
from typing import Any

import zmq
import zmq.asyncio

from bench.child import Parent
from bench.crew import Crew
from bench.results import Budget, Line, Table, percentile

ROUNDS = 2000
ROUNDS_QUICK = 200
WARM_UP = 100  # rounds before those that count
PAUSES = {"low rate": 0.0005, "back to back": 0.0}  # seconds between rounds
SIZE = 100
BUDGET = 1.3
ANSWER_S = 20.0
PROBE_MS = 50

Progress = Callable[[str], None]
FACES = {"sync": ("raw", "node", "pyzmq PUB/SUB"), "async": ("raw_async", "async_node", "zmq.asyncio PUB/SUB")}


def measure(faces: Iterable[str], runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table, lines for each of `faces` ("sync", "async") and pace."""
    table = Table("round trip: publish, receive, publish back, receive", [f"{SIZE} B"])
    rounds = ROUNDS_QUICK if quick else ROUNDS
    for face in faces:
        for pace, pause in PAUSES.items():
            raw, ours = [], []
            for number in range(runs):
                progress(f"round trip, {face}, {pace}: run {number + 1}/{runs}")
                raw.append(run(FACES[face][0], rounds, pause))
                ours.append(run(FACES[face][1], rounds, pause, bus=f"bench-{secrets.token_hex(4)}"))
            for percent in (50, 99):
                budgeted = face == "sync" and percent == 50 and pause > 0
                table.lines.append(
                    Line(
                        label=f"{'Node' if face == 'sync' else 'AsyncNode'}, {pace}, p{percent}",
                        unit="µs",
                        ours=[percentile(times, percent) for times in ours],
                        raw=[percentile(times, percent) for times in raw],
                        raw_name=FACES[face][2],
                        budget=Budget("ratio", at_most=BUDGET) if budgeted else None,
                    )
                )
    return [table]


def run(face: str, rounds: int, pause: float, listens: bool = False, **arguments: Any) -> list[float]:
    """Microseconds of each round.

    `arguments`: for zmqbus, the bus; `seed`: the inbox of a forwarder on it. `listens`: for raw sockets, whether a
    third process subscribes to both as well.
    """
    with Crew() as crew:
        pong = crew.start(f"bench.roundtrip:{face}_pong", **arguments)
        endpoint = pong.hear()["endpoint"]
        ping = crew.start(f"bench.roundtrip:{face}_ping", endpoint=endpoint, rounds=rounds, pause=pause, **arguments)
        if not arguments:  # a raw pong must be told where to connect to
            own = ping.hear()["endpoint"]
            if listens:
                crew.start("bench.roundtrip:raw_listener", endpoints=[endpoint, own]).hear()
            pong.tell(endpoint=own)
        times: list[float] = ping.hear()["times"]
        return times


# --- tasks: raw pyzmq ----------------------------------------------------------------------------


def _sockets(context: Any) -> tuple[Any, Any, str]:
    pub, sub = context.socket(zmq.PUB), context.socket(zmq.SUB)
    pub.linger = sub.linger = 0
    sub.subscribe(b"")
    return pub, sub, f"tcp://127.0.0.1:{pub.bind_to_random_port('tcp://127.0.0.1')}"


def raw_pong(parent: Parent) -> None:
    """Blocking sockets."""
    pub, sub, endpoint = _sockets(zmq.Context())
    parent.tell(endpoint=endpoint)
    order = parent.hear()
    assert order is not None
    sub.connect(order["endpoint"])
    while True:
        pub.send(sub.recv())


def raw_listener(parent: Parent, endpoints: list[str]) -> None:
    """One more subscriber, which does nothing with what it gets."""
    sub = zmq.Context().socket(zmq.SUB)
    sub.subscribe(b"")
    for endpoint in endpoints:
        sub.connect(endpoint)
    parent.tell(ready=True)
    while True:
        sub.recv()


def raw_ping(parent: Parent, endpoint: str, rounds: int, pause: float) -> None:
    """Blocking sockets."""
    pub, sub, own = _sockets(zmq.Context())
    sub.connect(endpoint)
    parent.tell(endpoint=own)
    value = bytes(SIZE)
    while not sub.poll(PROBE_MS):
        pub.send(value)
    while sub.poll(PROBE_MS):  # all answers to what was sent to find out whether it is connected
        sub.recv()
    times = []
    for _ in range(WARM_UP + rounds):
        sleep(pause)
        start = perf_counter()
        pub.send(value)
        sub.recv()
        times.append((perf_counter() - start) * 1e6)
    parent.tell(times=times[WARM_UP:])


def raw_async_pong(parent: Parent) -> None:
    """zmq.asyncio."""

    async def run() -> None:
        pub, sub, endpoint = _sockets(zmq.asyncio.Context())
        parent.tell(endpoint=endpoint)
        order = parent.hear()
        assert order is not None
        sub.connect(order["endpoint"])
        while True:
            await pub.send(await sub.recv())

    asyncio.run(run())


def raw_async_ping(parent: Parent, endpoint: str, rounds: int, pause: float) -> None:
    """zmq.asyncio."""

    async def run() -> None:
        pub, sub, own = _sockets(zmq.asyncio.Context())
        sub.connect(endpoint)
        parent.tell(endpoint=own)
        value = bytes(SIZE)
        while not await sub.poll(PROBE_MS):
            await pub.send(value)
        while await sub.poll(PROBE_MS):
            await sub.recv()
        times = []
        for _ in range(WARM_UP + rounds):
            await asyncio.sleep(pause)
            start = perf_counter()
            await pub.send(value)
            await sub.recv()
            times.append((perf_counter() - start) * 1e6)
        parent.tell(times=times[WARM_UP:])

    asyncio.run(run())


# --- tasks: zmqbus -------------------------------------------------------------------------------


def node_pong(parent: Parent, bus: str, seed: str | None = None) -> None:
    """`for message in subscription: publish`."""
    from zmqbus import Node

    peers = [] if seed is None else [seed]
    with Node("pong", bus=bus, interface="127.0.0.1", discovery="static", peers=peers) as node:
        subscription = node.subscribe("ping")
        parent.tell(endpoint=node.endpoints["inbox"])
        for message in subscription:
            node.publish("pong", message.value)


def node_ping(parent: Parent, bus: str, endpoint: str, rounds: int, pause: float, seed: str | None = None) -> None:
    """`publish`, then `get`."""
    from zmqbus import Node

    with Node("ping", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_peers(1, ANSWER_S)
        subscription = node.subscribe("pong")
        node.wait_for_subscribers("ping", 1 if seed is None else 2, ANSWER_S)
        value = bytes(SIZE)
        times = []
        for _ in range(WARM_UP + rounds):
            sleep(pause)
            start = perf_counter()
            node.publish("ping", value)
            answer = subscription.get(ANSWER_S)
            times.append((perf_counter() - start) * 1e6)
            if answer is None:
                raise TimeoutError("no answer from pong")
        parent.tell(times=times[WARM_UP:])


def async_node_pong(parent: Parent, bus: str) -> None:
    """`async for message in subscription: await publish`."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with (
            AsyncNode("pong", bus=bus, interface="127.0.0.1", discovery="static") as node,
            node.subscribe("ping") as subscription,
        ):
            parent.tell(endpoint=node.endpoints["inbox"])
            async for message in subscription:
                await node.publish("pong", message.value)

    asyncio.run(run())


def async_node_ping(parent: Parent, bus: str, endpoint: str, rounds: int, pause: float) -> None:
    """`await publish`, then `await get`."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode("ping", bus=bus, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
            await node.wait_for_peers(1, ANSWER_S)
            async with node.subscribe("pong") as subscription:
                await node.wait_for_subscribers("ping", 1, ANSWER_S)
                value = bytes(SIZE)
                times = []
                for _ in range(WARM_UP + rounds):
                    await asyncio.sleep(pause)
                    start = perf_counter()
                    await node.publish("ping", value)
                    answer = await subscription.get(ANSWER_S)
                    times.append((perf_counter() - start) * 1e6)
                    if answer is None:
                        raise TimeoutError("no answer from pong")
                parent.tell(times=times[WARM_UP:])

    asyncio.run(run())
