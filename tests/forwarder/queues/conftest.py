"""Forwarders with workers of plain sockets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.forwarder.forwarders import PATIENCE_S, ForwarderProcess, Running
from tests.node.conftest import eventually
from tests.node.queues.raw_worker import RawWorker
from zmqbus import Node
from zmqbus.protocol import commands
from zmqbus.protocol.commands import QueueFigures

Joins = Callable[..., RawWorker]


def worker_of(forwarder: Running) -> RawWorker:
    """One that is connected, and has not joined."""
    return RawWorker(forwarder.forwarder.endpoints["inbox"], forwarder.forwarder._config.bus)


def worker_at(forwarder: ForwarderProcess, bus: str) -> RawWorker:
    """The same, of one in a process of its own."""
    with Node("look", bus=bus) as node:
        eventually(lambda: any(peer.origin == forwarder.origin for peer in node.peers()), PATIENCE_S)
        (inbox,) = [peer.inbox for peer in node.peers() if peer.origin == forwarder.origin]
    return RawWorker(inbox, bus)


def figures(forwarder: Running, topic: str, group: str = "") -> QueueFigures:
    """Of one queue, or of a group."""

    async def ask() -> list[QueueFigures]:
        return forwarder.forwarder.queues()

    found = [one for one in forwarder.call(ask()) if (one.topic, one.group) == (topic, group)]
    return found[0] if found else QueueFigures("")


def places(forwarder: Running) -> dict[str, int]:
    """Where each cursor is, in truth."""

    async def ask() -> list[tuple[str, int, bool]]:
        return forwarder.forwarder.cursors()

    return {name: offset for name, offset, _ in forwarder.call(ask())}


def committed(forwarder: Running) -> dict[str, int]:
    """And on disk."""
    store = forwarder.forwarder._store
    assert store is not None
    return {name: cursor.offset for name, cursor in store.cursors.all().items()}


def begin(
    worker: RawWorker,
    *patterns: str,
    group: str = "workers",
    credit: int = 0,
    offset: int = commands.END,
    time_ns: int = 0,
) -> None:
    """Join with a place to begin at."""
    worker.say(commands.Join(1, list(patterns), group, 30_000, credit, offset, time_ns))


@pytest.fixture
def node(bus: str) -> Node:  # type: ignore[misc]
    """Who pushes."""
    with Node("producer", bus=bus) as node:
        yield node
