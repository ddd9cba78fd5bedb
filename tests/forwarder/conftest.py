"""Forwarders on loopback, each test on a bus of its own, and publishers that meet them."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.forwarders import ForwarderProcess, Running, running
from tests.node.conftest import eventually
from tests.node.test_aio import run
from zmqbus import AsyncNode, Node

SOON = 15.0  # seconds for what takes a moment when nodes have yet to meet, and no healthy test waits for


@pytest.fixture
def bus() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def forwarder(journal: Path, bus: str) -> Iterator[Running]:
    """One that claims everything."""
    with running(journal, bus=bus, name="forwarder") as forwarder:
        yield forwarder


@pytest.fixture
def stoppable(journal: Path, bus: str) -> Iterator[ForwarderProcess]:
    """A forwarder in a process of its own, which claims everything."""
    with ForwarderProcess(journal, bus=bus, name="forwarder") as forwarder:
        yield forwarder


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run_it(*arguments: Any, **options: Any) -> None:
        run(test(*arguments, **options))

    return run_it


def claims(node: Node | AsyncNode, topic: str) -> int:
    """How many forwarders the node knows to claim a topic."""
    account = node._engine.outlet.ledger.accounts.get(topic)
    return len(account.claimants) if account is not None else 0


def meet(node: Node, *topics: str, forwarders: int = 1) -> None:
    """Publish the first message on each topic, and wait until the forwarders claim it and have it."""
    for topic in topics:
        node.publish(topic, "first")
        eventually(lambda topic=topic: claims(node, topic) == forwarders)  # type: ignore[misc]
    node.flush(timeout=SOON)


def on(thread: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Have it done on another thread, and see that it has begun to wait."""
    begun = threading.Event()

    def do() -> Any:
        begun.set()
        return work(*arguments, **options)

    future = thread.submit(do)
    assert begun.wait(5)
    return future
