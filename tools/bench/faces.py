"""The sending and receiving loops that `pubsub` compares. Worker tasks: each runs in a process of its own.

Senders   tell their endpoint, wait for "go" (by then every receiver is connected), send `count` values of `size` bytes,
          tell how long that took; and at the end how much CPU the process used from "go" on.
Receivers tell when they are connected, then receive until all `count` are there; the rate counts from the first to
          the last. They tell what arrived, what was lost or repaired, and the CPU used from the first on.

The loops themselves are as plain as a user would write them, and as cheap: what a loop costs is not to be measured.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from time import perf_counter
from typing import Any

import zmq
import zmq.asyncio

from bench.child import Parent, cpu_s

TOPIC = "bench"
PROBE = b"?"  # sent by raw senders until everybody receives
PATIENCE_S = 60  # for all messages of a run; what is not there by then is lost
CONNECT_S = 20
CHUNK = 500  # values to a `send_many`: so many lines of 130 bytes are in 64 KiB of a file
QUEUED_BYTES_MAX = 32 * 1024 * 1024  # for each subscriber, as zmqbus has it


# --- raw pyzmq -----------------------------------------------------------------------------------


def raw_sender(parent: Parent, size: int, count: int, bounded: bool) -> None:
    """PUB and `send(bytes)`. Never drops: either without a limit, or it waits (XPUB_NODROP)."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        parent.tell(endpoint=_bind(socket, size, bounded))
        while parent.hear(0.01) is None:
            socket.send(PROBE)
        value, send = bytes(size), socket.send
        used, start = cpu_s(), perf_counter()
        for _ in range(count):
            send(value)
        parent.tell(seconds=perf_counter() - start)
        parent.hear()
        parent.tell(cpu_s=cpu_s() - used)


def raw_receiver(parent: Parent, endpoint: str, size: int, count: int, bounded: bool) -> None:
    """SUB and `recv()`."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        _connect(socket, endpoint, size, bounded)
        recv = socket.recv
        recv()
        parent.tell(ready=True)
        while recv() == PROBE:
            pass
        used, start = cpu_s(), perf_counter()
        received = 0
        with _patience():
            for received in range(1, count):  # noqa: B007
                recv()
        _tell_received(parent, count, received + 1, perf_counter() - start, cpu_s() - used)


def raw_async_sender(parent: Parent, size: int, count: int, bounded: bool) -> None:
    """zmq.asyncio: `await socket.send(bytes)`."""

    async def run() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as socket:
            parent.tell(endpoint=_bind(socket, size, bounded))
            while parent.hear(0) is None:
                await socket.send(PROBE)
                await asyncio.sleep(0.01)
            value = bytes(size)
            used, start = cpu_s(), perf_counter()
            for _ in range(count):
                while True:
                    try:
                        await socket.send(value)
                        break
                    except zmq.Again:  # bounded, and full: a PUB always claims that it can send, so there is no waiting
                        await asyncio.sleep(0.0005)
            parent.tell(seconds=perf_counter() - start)
            await asyncio.to_thread(parent.hear)
            parent.tell(cpu_s=cpu_s() - used)

    asyncio.run(run())


def raw_async_receiver(parent: Parent, endpoint: str, size: int, count: int, bounded: bool) -> None:
    """zmq.asyncio: `await socket.recv()`."""

    async def run() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            _connect(socket, endpoint, size, bounded)
            await socket.recv()
            parent.tell(ready=True)
            while await socket.recv() == PROBE:
                pass
            used, start = cpu_s(), perf_counter()
            received = 0
            try:
                async with asyncio.timeout(PATIENCE_S):
                    for received in range(1, count):  # noqa: B007
                        await socket.recv()
            except TimeoutError:
                pass
            _tell_received(parent, count, received + 1, perf_counter() - start, cpu_s() - used)

    asyncio.run(run())


def _bind(socket: zmq.Socket[Any], size: int, bounded: bool) -> str:
    socket.sndhwm = _frames_max(size, bounded)
    socket.linger = 0
    if bounded:
        socket.setsockopt(zmq.XPUB_NODROP, 1)
    return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def _connect(socket: zmq.Socket[Any], endpoint: str, size: int, bounded: bool) -> None:
    socket.rcvhwm = _frames_max(size, bounded)
    socket.linger = 0
    socket.subscribe(b"")
    socket.connect(endpoint)


def _frames_max(size: int, bounded: bool) -> int:
    return max(8, min(65536, QUEUED_BYTES_MAX // (size + 256))) if bounded else 0


# --- zmqbus --------------------------------------------------------------------------------------


def node_sender(parent: Parent, bus: str, key: str | None, size: int, count: int, receivers: int, by: str) -> None:
    """By `node.publish(topic, value)`, `node.publisher(topic).send(value)`, or its `.send_many(values)`."""
    from zmqbus import Node

    with Node("sender", bus=bus, key=key, interface="127.0.0.1", discovery="static") as node:
        parent.tell(endpoint=node.endpoints["inbox"])
        parent.hear()
        node.wait_for_subscribers(TOPIC, receivers, CONNECT_S)
        value = bytes(size)
        used, start = cpu_s(), perf_counter()
        if by == "send_many":
            many = node.publisher(TOPIC).send_many
            values = [value] * CHUNK
            for _ in range(count // CHUNK):
                many(values)
            many(values[: count % CHUNK])
        elif by == "send":
            send = node.publisher(TOPIC).send
            for _ in range(count):
                send(value)
        else:
            publish = node.publish
            for _ in range(count):
                publish(TOPIC, value)
        node.flush()
        parent.tell(seconds=perf_counter() - start)
        parent.hear()
        parent.tell(cpu_s=cpu_s() - used)


def node_receiver(parent: Parent, bus: str, key: str | None, endpoint: str, count: int) -> None:
    """`for message in subscription`."""
    from zmqbus import Node

    with Node("receiver", bus=bus, key=key, interface="127.0.0.1", discovery="static", peers=[endpoint]) as node:
        node.wait_for_peers(1, CONNECT_S)
        subscription = node.subscribe(TOPIC)
        parent.tell(ready=True)
        next(subscription)
        used, start = cpu_s(), perf_counter()
        with _patience():
            for _message in islice(subscription, count - 1):
                pass
        seconds, used = perf_counter() - start, cpu_s() - used
        received = int(node.statistics()["messages_received"])
        _tell_received(parent, count, received, seconds, used, subscription.repaired)
        parent.hear()


def async_node_sender(
    parent: Parent, bus: str, key: str | None, size: int, count: int, receivers: int, by: str
) -> None:
    """By `await node.publish(topic, value)`, `node.publisher(topic).send(value)`, or its `.send_many(values)`."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode("sender", bus=bus, key=key, interface="127.0.0.1", discovery="static") as node:
            parent.tell(endpoint=node.endpoints["inbox"])
            await asyncio.to_thread(parent.hear)
            await node.wait_for_subscribers(TOPIC, receivers, CONNECT_S)
            value = bytes(size)
            used, start = cpu_s(), perf_counter()
            publisher = node.publisher(TOPIC)
            if by == "send_many":
                values = [value] * CHUNK
                for _ in range(count // CHUNK):
                    await publisher.send_many(values)
                await publisher.send_many(values[: count % CHUNK])
            elif by == "send":
                for _ in range(count):
                    await publisher.send(value)
            else:
                for _ in range(count):
                    await node.publish(TOPIC, value)
            await node.flush()
            parent.tell(seconds=perf_counter() - start)
            await asyncio.to_thread(parent.hear)
            parent.tell(cpu_s=cpu_s() - used)

    asyncio.run(run())


def async_node_receiver(parent: Parent, bus: str, key: str | None, endpoint: str, count: int) -> None:
    """`async for message in subscription`."""
    from zmqbus import AsyncNode

    async def run() -> None:
        async with AsyncNode(
            "receiver", bus=bus, key=key, interface="127.0.0.1", discovery="static", peers=[endpoint]
        ) as node:
            await node.wait_for_peers(1, CONNECT_S)
            subscription = await node.subscribe(TOPIC)
            parent.tell(ready=True)
            await anext(subscription)
            used, start = cpu_s(), perf_counter()
            left = count - 1
            try:
                async with asyncio.timeout(PATIENCE_S):
                    async for _message in subscription:
                        left -= 1
                        if not left:
                            break
            except TimeoutError:
                pass
            seconds, used = perf_counter() - start, cpu_s() - used
            _tell_received(parent, count, count - left, seconds, used, subscription.repaired)
            await asyncio.to_thread(parent.hear)

    asyncio.run(run())


# --- both ----------------------------------------------------------------------------------------


class _OutOfPatience(Exception):
    pass


@contextmanager
def _patience() -> Iterator[None]:
    """Ends a loop that waits for what does not come. By a signal, so that the loop need not look at a clock."""

    def out_of_patience(*_: object) -> None:
        raise _OutOfPatience

    signal.signal(signal.SIGALRM, out_of_patience)
    signal.alarm(PATIENCE_S)
    try:
        yield
    except _OutOfPatience:
        pass
    finally:
        signal.alarm(0)


def _tell_received(parent: Parent, count: int, received: int, seconds: float, used: float, repaired: int = 0) -> None:
    parent.tell(received=received, lost=count - received, repaired=repaired, seconds=seconds, cpu_s=used)
