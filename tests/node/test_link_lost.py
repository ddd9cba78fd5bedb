"""The notice that a connection to a peer is lost: at once, only where it is wanted, and also when we hang up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import zmqbus
from tests.node.conftest import eventually
from zmqbus.net.sockets import SocketFactory
from zmqbus.node.peers.links import Link

PEER = """
import sys, zmqbus
with zmqbus.Node("peer", bus=sys.argv[1]) as node:
    print(node.origin, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def peer(bus: str) -> Iterator[subprocess.Popen[str]]:
    """A node in a process of its own, which ends with its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, bus], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


def on_loop(node: zmqbus.Node, work: Any) -> Any:
    """Have it done on the engine's thread."""

    async def done() -> Any:
        return work()

    return node._call(done())


def guarded(node: zmqbus.Node, origin: int) -> tuple[list[tuple[int, float]], threading.Event]:
    """Where losses of that peer are noted: origin and time."""
    node.wait_for_peers(1, timeout=20)
    lost: list[tuple[int, float]] = []
    told = threading.Event()
    node._engine.on_link_lost.append(lambda origin: (lost.append((origin, time.monotonic())), told.set()))  # type: ignore[func-returns-value]
    assert on_loop(node, lambda: node._engine.guard(origin))
    return lost, told


def test_a_killed_peer_is_noticed_at_once(node: zmqbus.Node, peer: subprocess.Popen[str]) -> None:
    """Not by its silence, which takes 5 s."""
    assert peer.stdout is not None
    origin = int(peer.stdout.readline())
    lost, told = guarded(node, origin)
    began = time.monotonic()
    os.kill(peer.pid, signal.SIGKILL)
    assert told.wait(10)
    assert lost[0][0] == origin
    assert lost[0][1] - began < 4.0
    assert [peer.origin for peer in node.peers()] == [origin], "so far it only fell silent"


def test_a_stopped_peer_is_not_lost(node: zmqbus.Node, peer: subprocess.Popen[str]) -> None:
    """Its connection stands: it may go on with what it has."""
    assert peer.stdout is not None
    lost, told = guarded(node, int(peer.stdout.readline()))
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        assert not told.wait(1.5)
    finally:
        os.kill(peer.pid, signal.SIGCONT)
    assert lost == []


def test_a_peer_that_leaves_is_lost_too(bus: str, node: zmqbus.Node) -> None:
    with zmqbus.Node("peer", bus=bus) as peer:
        lost, told = guarded(node, peer.origin)
    assert told.wait(10)
    assert {origin for origin, _ in lost} == {peer.origin}
    eventually(lambda: not on_loop(node, lambda: node._engine.guard(peer.origin)))


def test_who_is_not_linked_yet_is_guarded_when_he_is(bus: str) -> None:
    """As a worker may be who asked for jobs before we had dialled him."""
    alone: dict[str, Any] = {"bus": bus, "discovery": "static"}
    with zmqbus.Node("a", **alone) as a, zmqbus.Node("b", **alone) as b:
        lost: list[int] = []
        a._engine.on_link_lost.append(lost.append)
        assert not on_loop(a, lambda: a._engine.guard(b.origin))
        with zmqbus.Node("c", peers=[a.endpoints["inbox"], b.endpoints["inbox"]], **alone):
            a.wait_for_peers(2, timeout=20)
            b.wait_for_peers(2, timeout=20)
            assert lost == []
            b.close()
            eventually(lambda: b.origin in lost)


def test_hanging_up_is_a_loss_and_without_a_guard_nobody_is_told(
    pair: tuple[zmqbus.Node, zmqbus.Node],
) -> None:
    a, b = pair
    lost: list[int] = []
    a._engine.on_link_lost.append(lost.append)

    def dial_anew() -> None:
        a._engine.peering._dial(a._engine.peering.links[b.origin].endpoint)

    def link() -> Link | None:
        return a._engine.peering.links.get(b.origin)

    first = link()
    on_loop(a, dial_anew)
    assert lost == []
    eventually(lambda: link() not in (None, first))
    assert on_loop(a, lambda: a._engine.guard(b.origin))
    on_loop(a, dial_anew)
    assert lost == [b.origin]


def test_a_connection_that_is_back_at_once_was_lost_nevertheless() -> None:
    """Whoever looks only at whether it stands now would miss it: what was in flight is gone."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        lost, came = [], asyncio.Event()
        factory = SocketFactory(None)
        first, second = factory.router(), factory.router()
        endpoint = factory.bind(first, "127.0.0.1")
        port = int(endpoint.rpartition(":")[2])
        link = Link(factory, loop, endpoint, print, print, lambda link: came.set() or True, None, lost.append)  # type: ignore[arg-type, func-returns-value]
        await asyncio.wait_for(came.wait(), 10)
        assert link.guard()
        first.close(0)
        deadline = time.monotonic() + 10
        while link._socket.poll(0, 2):  # until it is gone
            assert time.monotonic() < deadline
        while True:  # the port may be taken for a moment yet
            try:
                factory.bind(second, "127.0.0.1", port)
                break
            except zmqbus.SetupError:
                assert time.monotonic() < deadline
        assert link._socket.poll(10_000, 2)  # and there again; the loop has seen neither
        assert lost == []
        async with asyncio.timeout(10):
            while not lost:
                await asyncio.sleep(0.001)
        assert lost == [link]
        link.close()
        assert lost == [link, link]
        factory.close()

    asyncio.run(main())
