"""Nodes on loopback, each test on a bus of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator

import pytest

import zmqbus


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
