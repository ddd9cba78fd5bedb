"""Nodes on loopback, each test on a bus of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.forwarder.forwarders import Running, running


@pytest.fixture
def bus() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def node(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("node", bus=bus) as node:
        yield node


@pytest.fixture
def pair(bus: str) -> Iterator[tuple[zmqbus.Node, zmqbus.Node]]:
    """Two nodes that know each other."""
    with zmqbus.Node("a", bus=bus) as a, zmqbus.Node("b", bus=bus) as b:
        a.wait_for_peers(1, timeout=10)
        b.wait_for_peers(1, timeout=10)
        yield a, b


def drain(subscription: zmqbus.Subscription, count: int, timeout: float = 20.0) -> list[zmqbus.Message]:
    """The next `count` messages; fails when they do not come."""
    messages = []
    deadline = time.monotonic() + timeout
    while len(messages) < count:
        message = subscription.get(max(0.0, deadline - time.monotonic()))
        assert message is not None, f"{len(messages)} of {count} messages came, {subscription!r}"
        messages.append(message)
    return messages


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait until a condition holds that nothing tells of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


# --- the log ---------------------------------------------------------------------------------------


def on_loop(forwarder: Running, work: Callable[[], Any]) -> Any:
    """Have it done where the forwarder does its own work."""

    async def done() -> Any:
        return work()

    return forwarder.call(done())


def cursors(forwarder: Running) -> dict[str, int]:
    """Name and offset of each, as on disk."""
    return {name: offset for name, offset, _ in on_loop(forwarder, forwarder.forwarder.cursors)}


def known_to(*nodes: zmqbus.Node, forwarders: int = 1) -> None:
    """Wait until each of them knows so many forwarders."""
    for node in nodes:
        eventually(lambda node=node: sum(bool(peer.journal) for peer in node.peers()) == forwarders)


def publish(node: zmqbus.Node, topic: str, values: Any) -> None:
    """On disk when this returns."""
    for value in values:
        node.publish(topic, value)
    node.flush(20)


def values(subscription: zmqbus.Subscription, count: int) -> list[Any]:
    return [message.value for message in drain(subscription, count)]


def wait_for(events: zmqbus.EventStream, kind: type[Any], count: int = 1) -> list[Any]:
    found: list[Any] = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        event = events.get(max(0.0, deadline - time.monotonic()))
        assert event is not None, f"no {kind.__name__}"
        if isinstance(event, kind):
            found.append(event)
    return found


@pytest.fixture
def reader(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("reader", bus=bus) as node:
        yield node


@pytest.fixture
def writer(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("writer", bus=bus) as node:
        yield node


@pytest.fixture
def forwarder(bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node) -> Iterator[Running]:
    """One that both know."""
    with running(tmp_path / "journal", bus=bus, name="store") as store:
        known_to(writer, reader)
        yield store
