"""Opening a node: what keeps it shut, what it is warned of, how soon it takes part. In this process, on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from tests.lan.agents import Agents, wait_until
from tests.node.conftest import eventually
from zmqbus import AsyncNode, AuthError, BusKey, Node, PeerLeft, Warned
from zmqbus.net import zap
from zmqbus.node import engine, events
from zmqbus.node.peers import hearing, registry
from zmqbus.node.peers.links import Link
from zmqbus.protocol import commands
from zmqbus.protocol.streams import tracking

# --- the self-test: a node that lets strangers in does not open ----------------------------------


def open_sync(**options: Any) -> None:
    Node(**options).close()


def open_async(**options: Any) -> None:
    async def run() -> None:
        node = AsyncNode(**options)
        await node.open()
        await node.close()

    asyncio.run(run())


def held() -> tuple[list[str], int]:
    """The threads of nodes, and the file descriptors of this process."""
    return [each.name for each in threading.enumerate() if "zmqbus" in each.name], len(os.listdir("/proc/self/fd"))


def refuses(opening: Callable[..., None], match: str) -> None:
    """Nothing stays open either, not even a port that waits."""
    options = {"key": BusKey.generate(), "interface": "127.0.0.1", "discovery": "static"}
    with pytest.raises(AuthError, match=match):
        opening(**options)
    wait_until(lambda: held()[0] == [], 10, held)
    before = held()
    with pytest.raises(AuthError, match=match):
        opening(**options)
    wait_until(lambda: held()[0] == [] and held()[1] <= before[1], 10, held)


both_faces = pytest.mark.parametrize("opening", [open_sync, open_async])


@both_faces
def test_a_node_whose_handler_admits_everybody_does_not_open(
    opening: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def admit(request: Sequence[bytes], client_public: bytes) -> list[bytes]:
        return [request[0], b"", zap.VERSION, request[3], b"200", b"OK", zap.USER_ID, b""]

    monkeypatch.setattr(zap, "answer", admit)
    refuses(opening, "a stranger with a key of its own was let in")


@both_faces
@pytest.mark.parametrize("role", ["inbox", "pub", "tap", "trail"])
def test_each_of_its_sockets_is_tested(
    opening: Callable[..., None], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = zap._verdict
    tested = []

    async def lenient(factory: Any, endpoint: str, tested_role: str, pair: Any) -> bool:
        tested.append(tested_role)
        return await verdict(factory, endpoint, tested_role, pair) or tested_role == role  # type: ignore[arg-type]

    monkeypatch.setattr(zap, "_verdict", lenient)
    refuses(opening, "a stranger without a key was let in")
    assert sorted(tested) == sorted(2 * 3 * ["inbox", "pub", "tap", "trail"])


# --- warnings of the start -----------------------------------------------------------------------


def warnings_of(node: Node) -> list[str]:
    with node.events() as stream:
        return [event.reason for event in iter(lambda: stream.get(0), None) if isinstance(event, Warned)]


def test_warnings_of_the_start_are_kept_for_the_first_listener(bus: str) -> None:
    with Node("a", bus=bus, discovery="static") as node:
        for number in range(events.EARLY_MAX + 5):
            node._engine.emit(Warned(f"trouble {number}"))
        assert warnings_of(node) == [f"trouble {number}" for number in range(events.EARLY_MAX)]
        node._engine.emit(Warned("later"))
        assert warnings_of(node) == []


def test_what_mdns_cannot_do_is_told_to_who_listens_later(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zmqbus.net import mdns

    async def fail(self: mdns.Session) -> None:
        raise OSError("the port is taken")

    monkeypatch.setattr(mdns.Session, "open", fail)
    with Node("a", bus=bus) as node:
        (warning,) = wait_until(lambda: warnings_of(node))
        assert "the port is taken" in warning


@pytest.mark.parametrize("other", ["no key", "another key"])
def test_nodes_that_cannot_join_say_what_the_handshake_tells(bus: str, other: str) -> None:
    keyed = Node("keyed", bus=bus, key=BusKey.generate(), interface="127.0.0.1")
    key = BusKey.generate() if other == "another key" else None
    with keyed, Node("other", bus=bus, key=key, interface="127.0.0.1") as node:
        streams = {each: each.events() for each in (keyed, node)}
        reasons = {}
        for each, stream in streams.items():
            event = stream.get(10)
            assert isinstance(event, Warned)
            reasons[each] = event.reason
        assert f"cannot join {node.endpoints['inbox']} on bus {bus!r}" in reasons[keyed]
        assert f"cannot join {keyed.endpoints['inbox']} on bus {bus!r}" in reasons[node]
        if other == "no key":
            assert "it has no bus key" in reasons[keyed] or "another bus key, or none" in reasons[keyed]
            assert "a bus key, and this node has none (pass it one" in reasons[node]
        else:
            assert all("it has another bus key, or none" in reason for reason in reasons.values())
        for stream in streams.values():  # once, not at every attempt
            assert stream.get(2) is None


@pytest.mark.parametrize("closing", [True, False])
def test_one_broken_handshake_is_no_verdict_and_a_series_is(bus: str, closing: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        options = {"key": BusKey.generate(), "interface": "127.0.0.1", "discovery": "static", "peers": [endpoint]}
        with Node("a", bus=bus, **options) as node:
            stream = node.events()
            server.settimeout(10)
            connection = server.accept()[0]
            if closing:
                server.close()  # first: a second attempt might already be waiting there, and be broken off as well
            connection.close()
            if closing:
                assert stream.get(2) is None
            else:
                while (event := stream.get(0)) is None:
                    server.accept()[0].close()
                assert isinstance(event, Warned)
                assert endpoint in event.reason


# --- how soon it takes part ----------------------------------------------------------------------


def test_the_first_message_does_not_wait_for_its_stream_to_fall_idle(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, a subscriber is owed what is published, also while its SUB is still being connected."""
    attach = hearing.Hearing.attach

    def slowly(self: hearing.Hearing, origin: int, link: Link) -> None:
        asyncio.get_running_loop().call_later(0.5, attach, self, origin, link)

    with Node("resident", bus=bus) as resident, resident.subscribe("hello") as subscription:
        monkeypatch.setattr(hearing.Hearing, "attach", slowly)
        monkeypatch.setattr(engine, "IDLE_PERIOD", 60.0)  # no HEAD by itself
        monkeypatch.setattr(tracking, "SOFT_DELAY", 60.0)  # and HEADS are not believed at once
        with Node("newcomer", bus=bus) as newcomer:
            interests = newcomer._engine.peering.registry._interests  # registered: it counts only when it is connected
            eventually(lambda: any(one.subscriptions for origin, one in interests.items() if origin != newcomer.origin))
            newcomer.publish("hello", "world")
            began_at = time.monotonic()
            message = subscription.get(10)
            assert message is not None
            assert message.value == "world"
            assert subscription.repaired == 1
            assert time.monotonic() - began_at < 4


# --- subscribing beside peers that do not answer -------------------------------------------------


def test_subscribe_waits_for_a_stopped_peer_until_it_is_lost(bus: str, agents: Agents) -> None:
    stopped = agents.start()
    stopped.open("stopped", bus=bus)
    with Node("a", bus=bus) as node:
        node.wait_for_peers(1, 10)
        stream = node.events()
        stopped.signal(signal.SIGSTOP)
        try:
            node.subscribe("t").close()
        finally:
            stopped.signal(signal.SIGCONT)
        left = list(iter(lambda: stream.get(0), None))
        assert [event.reason for event in left if isinstance(event, PeerLeft)] == ["silent"]
        assert not any(isinstance(event, Warned) for event in left)  # gone is gone: nothing is owed


def test_subscribe_names_the_peers_that_live_and_do_not_answer(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "REGISTER_TIMEOUT", 1.0)
    with Node("mute", bus=bus) as mute, Node("a", bus=bus) as node:
        node.wait_for_peers(1, 10)
        mute.wait_for_peers(1, 10)
        monkeypatch.setattr(mute._engine.peering.registry, "on_command", partial(_swallow, registry.Registry))
        stream = node.events()
        node.subscribe("t.>").close()
        event = stream.get(0)
        assert isinstance(event, Warned)
        assert event.reason == "no answer to SUBSCRIBE t.> within 1 s: mute"


def _swallow(_: object, identity: bytes, origin: int, command: commands.Command) -> bool:
    return isinstance(command.body, commands.Subscribe | commands.Bye)
