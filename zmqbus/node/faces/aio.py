"""The asyncio face: `AsyncNode`. The same engine, on the caller's own loop, and no thread.

Publishing gathers what one turn of the loop publishes and sends it at the end of the turn. Consuming drains the
subscription's socket in the consumer's own task. Both let the loop have its turn every few milliseconds, however much
there is to do. Cancelling a task that waits for a message loses nothing: a message is taken only after the last await.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncGenerator, Iterable, Sequence
from datetime import datetime
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from zmqbus.errors import NodeClosed, SetupError, WrongLoop
from zmqbus.net.clock import now
from zmqbus.net.keys import BusKey
from zmqbus.node.config import Config
from zmqbus.node.engine import Engine
from zmqbus.node.events import AsyncEventStream, TopicInfo, Undelivered
from zmqbus.node.faces.aio_subscription import AsyncLogSubscription, AsyncSubscription
from zmqbus.node.faces.aio_worker import AsyncWorker
from zmqbus.node.faces.node import CLOSE_TIMEOUT, NOT_LIVE
from zmqbus.node.faces.requests.aio import AsyncRequesting
from zmqbus.node.publishing import durability
from zmqbus.node.publishing.durability import room
from zmqbus.node.publishing.publisher import SMALL, TICK, Publisher
from zmqbus.node.work.queues.owner import delayed
from zmqbus.protocol.members.peers import Peer


class AsyncPublisher:
    """One topic of one node, ready for hot loops: `await publisher.send(value)`."""

    def __init__(self, node: AsyncNode, publisher: Publisher) -> None:
        self._node = node
        self._publisher = publisher
        self._send = publisher.send
        self._crowded = node._crowded
        self.topic = publisher.topic

    async def send(self, value: object, headers: dict[str, Any] | None = None) -> int:
        """Publish a value; returns its seq, the same as `AsyncNode.publish`."""
        seq = self._send(value, headers)
        if self._crowded:
            await self._node._give_way(self._publisher)
        return seq

    async def send_many(self, values: Iterable[object]) -> int:
        """See `Publisher.send_many`."""
        seq = self._publisher.send_many(values)
        if self._crowded:
            await self._node._give_way(self._publisher)
        return seq


class AsyncNode(AsyncRequesting):
    """`Node` for asyncio: `async with AsyncNode("web1") as node: await node.publish("logs.web1", "…")`.

    Takes the same arguments and raises the same errors as `Node`, on entering or at `await node.open()`. Belongs to the
    loop it was opened on.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        bus: str = "default",
        key: str | Path | BusKey | None = None,
        interface: str | None = None,
        peers: Sequence[str] = (),
        discovery: Literal["mdns", "static", "both"] = "both",
        history_bytes: int | None = None,
        buffer_bytes: int | None = None,
        acks: int = 1,
        outbox: str | Path | None = None,
        outbox_bytes: int | None = None,
    ) -> None:
        self._config = Config.make(
            name, bus, key, interface, peers, discovery, history_bytes, buffer_bytes, acks, outbox, outbox_bytes
        )
        self._crowded: list[None] = []
        self._publishers: dict[str, Publisher] = {}
        self._queues: set[str] = set()
        self._opened: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> AsyncNode:
        """Bind, and begin to look for others. Of a node that is open: nothing.

        Raises:
            NodeClosed: it was closed; make a new one.
        """
        if self._opened is not None:
            self._ready()
            return self
        loop = self._loop = asyncio.get_running_loop()

        def in_turns() -> None:
            loop.call_soon(self._turn)

        engine = Engine(self._config, loop, in_turns)
        await engine.open()
        self._opened = engine
        self._guard = _guard(engine)
        await anext(self._guard)
        _nodes[engine] = self._guard
        self._crowded = engine.outlet.crowded
        self._publishers = engine.outlet.publishers
        return self

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise NodeClosed(f"node {self._config.name!r} is not open: use 'async with', or await open()")
        return self._opened

    def _ready(self) -> Engine:
        engine = self._engine
        if engine.refusal is not None:
            raise engine.refusal
        return engine

    def _at_home(self) -> Engine:
        """Ready, and on the node's own loop."""
        engine = self._ready()
        self._home()
        return engine

    def _home(self) -> asyncio.AbstractEventLoop:
        """The running loop, which is the node's."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop and self._loop is not None:
            raise WrongLoop(self.name)
        return loop

    def _turn(self) -> None:
        """Once per turn of the loop in which something was published."""
        self._engine.outlet.flush_all()

    async def _give_way(self, publisher: Publisher | None = None, timeout: float = inf) -> None:
        """Let the loop do its other work; wait while a subscriber is full, within the publisher's patience, and while
        the forwarders that are to acknowledge this stream have too much to catch up with."""
        deadline = now() + timeout
        await asyncio.sleep(0)
        outlet = self._engine.outlet
        while not outlet.push() and now() < deadline:
            await asyncio.sleep(TICK)
        if publisher is not None and outlet.history.full:
            await room(outlet, publisher, inf)

    # --- publish ---------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        value: object,
        *,
        headers: dict[str, Any] | None = None,
        durable: bool = False,
        timeout: float | None = None,
    ) -> int:
        """See `Node.publish`. What one turn of the loop publishes is sent together, at its end.

        Many durable publishes may be awaited at once: together they need hardly more time than one.
        """
        try:
            publisher = self._publishers[topic]
        except KeyError:
            publisher = self._at_home().outlet.publisher(topic)
        if durable:
            return await durability.durably_published(self._at_home().outlet, publisher, value, headers, timeout)
        if timeout is not None:
            await room(self._at_home().outlet, publisher, timeout)
            seq = publisher.send_without_wait(value, headers)
            if self._crowded:
                await self._give_way()
            return seq
        # As in `Node.publish`.
        if headers is None and type(value) is bytes and len(value) <= SMALL and publisher.full:
            seq = next(publisher.seqs)
            if seq < publisher.full:
                publisher.ring[seq & publisher.mask] = value
            else:
                publisher.send_late(seq, value, 0)
        else:
            seq = publisher.send(value, headers)
        if self._crowded:
            await self._give_way(publisher)
        return seq

    def publisher(self, topic: str) -> AsyncPublisher:
        """See `Node.publisher`."""
        return AsyncPublisher(self, self._ready().outlet.publisher(topic))

    async def flush(self, timeout: float | None = None) -> None:
        """See `Node.flush`."""
        self._at_home().outlet.flush_all()
        await self._give_way(timeout=inf if timeout is None else timeout)
        await durability.all_durable(self._engine.outlet, timeout)

    # --- queues ----------------------------------------------------------------------------------

    async def push(
        self,
        queue: str,
        value: object,
        *,
        headers: dict[str, Any] | None = None,
        durable: bool = False,
        delay: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """See `Node.push`."""
        if queue not in self._queues:
            self._at_home().jobs.publisher(queue)
            self._queues.add(queue)
        if delay is not None:
            headers = delayed(headers, delay)
        return await self.publish(queue, value, headers=headers, durable=durable, timeout=timeout)

    async def push_many(self, queue: str, values: Iterable[object]) -> int:
        """See `Node.push_many`."""
        return await AsyncPublisher(self, self._at_home().jobs.publisher(queue)).send_many(values)

    # --- subscribe -------------------------------------------------------------------------------

    def subscribe(
        self,
        *patterns: str,
        type: Any = None,
        history: int = 0,
        start: str | int | datetime | None = None,
        durable: str | None = None,
        on_gap: Literal["skip", "raise"] = "skip",
        observe: bool = False,
    ) -> AsyncSubscription:
        """See `Node.subscribe`; the result can be iterated, entered, or awaited."""
        if start is None and durable is None:
            return AsyncSubscription(self, patterns, type, history, on_gap, observe)
        if history or observe:
            raise SetupError(NOT_LIVE)
        return AsyncLogSubscription(self, patterns, type, start, durable, on_gap)

    # --- queues ----------------------------------------------------------------------------------

    def pull(
        self,
        queue: str,
        *,
        group: str = "workers",
        credit: int | None = None,
        lease: float = 30.0,
        type: Any = None,
        start: str | int | datetime | None = None,
    ) -> AsyncWorker:
        """See `Node.pull`; the result can be iterated, entered, or awaited."""
        return AsyncWorker(self, queue, group, credit, lease, type, start)

    # --- the bus ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For people."""
        return self._config.name

    @property
    def origin(self) -> int:
        """The random 64-bit id of this node, new at every start."""
        return self._engine.origin

    @property
    def endpoints(self) -> dict[str, str]:
        """Where this node can be reached: {"inbox": "tcp://…", "pub": "tcp://…"}."""
        return self._engine.peering.endpoints

    def peers(self) -> list[Peer]:
        """The other nodes that are on the bus now. Does not wait."""
        return self._ready().peering.peers()

    async def wait_for_peers(self, n: int = 1, timeout: float | None = None) -> list[Peer]:
        """See `Node.wait_for_peers`."""
        return await self._at_home().wait_for_peers(n, timeout)

    async def wait_for_subscribers(
        self, topic: str, n: int = 1, timeout: float | None = None, *, observers: bool = False
    ) -> int:
        """See `Node.wait_for_subscribers`."""
        return await self._at_home().peering.registry.wait_for_subscribers(topic, n, timeout, observers)

    async def topics(self, *patterns: str, timeout: float = 2.0) -> list[TopicInfo]:
        """See `Node.topics`."""
        return await self._at_home().topics(patterns, timeout)

    def events(self) -> AsyncEventStream:
        """See `Node.events`."""
        stream = AsyncEventStream(self._ready().forget_listener)
        self._engine.add_listener(stream)
        return stream

    def statistics(self) -> dict[str, int | float]:
        """Counters since start, by name. Does not wait."""
        return self._ready().counters()

    # --- the end ---------------------------------------------------------------------------------

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> list[Undelivered]:
        """See `Node.close`."""
        if self._opened is None or self._opened.refusal is not None:
            return []
        engine = self._at_home()
        try:
            return await engine.close(timeout)
        finally:
            await self._guard.aclose()

    async def __aenter__(self) -> AsyncNode:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "not open" if self._opened is None else "closed" if self._opened.refusal else "open"
        return f"<AsyncNode {self.name} on bus {self._config.bus}: {state}>"


_nodes: dict[Engine, AsyncGenerator[None, None]] = {}
"""Those that are open, with what asyncio.run closes before it closes their loop."""


async def _guard(engine: Engine) -> AsyncGenerator[None, None]:
    """Closes a node that nobody has closed. Its sockets, if left to the garbage collector, might block it for ever."""
    try:
        yield
    finally:
        _nodes.pop(engine, None)
        if engine.refusal is None:
            await engine.close(0.0)
            warnings.warn(f"node {engine.config.name!r} was not closed", ResourceWarning, stacklevel=2, source=engine)


def _after_fork() -> None:
    """In a forked child: the sockets belong to the parent."""
    for engine in _nodes:
        engine.forked()


os.register_at_fork(after_in_child=_after_fork)
