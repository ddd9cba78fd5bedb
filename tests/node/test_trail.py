"""The trail: who is in no hurry gets all that the others get, a little later, and nobody who waits waits for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import zmqbus
from tests.forwarder.forwarders import running, seqs
from tests.node.conftest import eventually, known_to
from zmqbus.net.sockets import POLLIN, SOURCES, Socket, SocketFactory, Source
from zmqbus.node.publishing import broadcast as broadcasting
from zmqbus.node.publishing.broadcast import TRAIL_BYTES, TRAIL_FRAMES, TRAIL_IDLE, Broadcast

ROOM = 200  # frames for each subscriber, here and there


class Heard:
    """A broadcast without any timer, and a SUB at each of its PUBs."""

    def __init__(self, factory: SocketFactory) -> None:
        self.stalls = self.starts = 0
        pubs = {source: factory.pub(ROOM, drops=source == "tap") for source in SOURCES}
        self.broadcast = Broadcast(pubs, self._stalled, self._started)
        self.broadcast.trailed = self.broadcast.observed = True
        self.subs: dict[Source, Socket] = {}
        for source, pub in pubs.items():
            sub = self.subs[source] = factory.sub(ROOM)
            sub.subscribe(b"")
            factory.connect(sub, factory.bind_inproc(pub, source))
        self.broadcast.admit()

    def _stalled(self) -> None:
        self.stalls += 1

    def _started(self) -> None:
        self.starts += 1

    def fill_trail(self) -> list[bytes]:
        """Until a frame has to wait. Returns all, as the PUB has them."""
        frames: list[bytes] = []
        while not self.broadcast.backlog:
            self.broadcast.send((b"%d" % len(frames),), True)
            frames += self.at("pub")
            self.at("tap")
        return frames

    def at(self, source: Source) -> list[bytes]:
        """What has come there since the last look. An inproc socket has it as soon as it is sent."""
        frames: list[bytes] = []
        while self.subs[source].poll(0, POLLIN):
            frames.append(self.subs[source].recv())
        return frames


@pytest.fixture
def heard() -> Iterator[Heard]:
    factory = SocketFactory(None)
    heard = Heard(factory)
    yield heard
    heard.broadcast.close(0)
    for sub in heard.subs.values():
        sub.close(0)
    factory.close()


def test_what_is_in_no_hurry_waits_for_the_timer(heard: Heard) -> None:
    for frame in (b"1", b"2"):
        heard.broadcast.send((frame,), False)
        assert heard.at("pub") == heard.at("tap") == [frame]
    assert heard.at("trail") == []
    assert heard.starts == 1
    assert not heard.broadcast.tick_trail()
    assert heard.at("trail") == [b"1", b"2"]


def test_what_is_in_a_hurry_takes_along_what_waits(heard: Heard) -> None:
    heard.broadcast.send((b"1",), False)
    heard.broadcast.send((b"2", b"of two parts"), True)
    assert heard.at("trail") == [b"1", b"2", b"of two parts"]
    heard.broadcast.send((b"3",), False)
    heard.broadcast.send_trail()
    assert heard.at("trail") == [b"3"]


def test_much_does_not_wait(heard: Heard) -> None:
    for number in range(TRAIL_FRAMES):
        assert heard.at("trail") == []
        heard.broadcast.send((b"%d" % number,), False)
    assert len(heard.at("trail")) == TRAIL_FRAMES
    heard.broadcast.send((bytes(TRAIL_BYTES // 2),), False)
    assert heard.at("trail") == []
    heard.broadcast.send((b"head", bytes(TRAIL_BYTES // 2)), False)
    assert len(heard.at("trail")) == 3


def test_what_is_for_those_who_listen_now_does_not_trail(heard: Heard) -> None:
    heard.broadcast.send_live((b"heartbeat",))
    heard.broadcast.send_trail()
    assert heard.at("pub") == heard.at("tap") == [b"heartbeat"]
    assert heard.at("trail") == []
    assert heard.starts == 0


def test_the_timer_ends_when_nothing_comes_and_begins_again(heard: Heard) -> None:
    heard.broadcast.send((b"1",), False)
    for _ in range(TRAIL_IDLE):
        assert not heard.broadcast.tick_trail()
    heard.broadcast.send((b"2",), False)
    for _ in range(TRAIL_IDLE):
        assert not heard.broadcast.tick_trail()
    assert heard.broadcast.tick_trail()
    assert heard.starts == 1
    heard.broadcast.send((b"3",), False)
    assert heard.starts == 2


def test_without_anybody_there_nothing_is_kept_for_it(heard: Heard) -> None:
    heard.broadcast.trailed = False
    heard.broadcast.send((b"1",), False)
    heard.broadcast.send_trail()
    assert heard.at("trail") == []
    assert heard.starts == 0


def test_who_is_full_at_the_trail_is_waited_for_and_then_left_behind(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast = heard.broadcast
    live = heard.fill_trail()
    assert heard.stalls == broadcast.stalls == 1
    broadcast.send((b"behind",), False)
    assert heard.at("pub") == [], "what is published after it waits as well"
    assert not broadcast.push()
    monkeypatch.setattr(broadcasting, "PATIENCE", -1.0)
    assert broadcast.push()
    assert heard.at("pub") == [b"behind"]
    broadcast.send_trail()
    assert heard.at("trail") == live[:-1], "the last was for everybody else"


def test_there_is_room_again_at_the_trail(heard: Heard) -> None:
    live = heard.fill_trail()
    heard.broadcast.send((b"behind",), True)
    assert not heard.broadcast.push()
    assert heard.at("trail") == live[:-1]
    assert heard.broadcast.push()
    assert heard.at("pub") == [b"behind"]
    assert heard.at("trail") == [live[-1], b"behind"]


# --- beside a forwarder ----------------------------------------------------------------------------


@pytest.fixture
def untimed(bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[zmqbus.Node]:
    """A node whose trail has no timer, beside a forwarder."""
    monkeypatch.setattr(broadcasting.Broadcast, "tick_trail", lambda self: True)
    with running(tmp_path / "journal", bus=bus), zmqbus.Node("writer", bus=bus) as node:
        known_to(node)
        node.wait_for_subscribers("t", 1, 20)
        yield node


def test_a_durable_message_does_not_wait_for_the_timer(untimed: zmqbus.Node) -> None:
    for number in range(100):
        untimed.publish("t", number, durable=True, timeout=20)


def test_flush_does_not_wait_for_the_timer(untimed: zmqbus.Node) -> None:
    for number in range(10):
        untimed.publish("t", number)
        untimed.flush(20)


def test_a_job_does_not_wait_for_the_timer(untimed: zmqbus.Node) -> None:
    with untimed.pull("jobs") as worker:
        for number in range(10):
            untimed.push("jobs", number)
            job = worker.get(20)
            assert job is not None
            assert job.value == number
            job.ack()


def test_close_takes_along_what_waits(bus: str, tmp_path: Path, untimed: zmqbus.Node) -> None:
    with zmqbus.Node("leaving", bus=bus) as node:
        known_to(node)
        node.wait_for_subscribers("t", 1, 20)
        origin = node.origin
        for number in range(5):
            node.publish("t", number)
        assert node.close() == []
    eventually(lambda: seqs(tmp_path / "journal", "t", origin) == [1, 2, 3, 4, 5])


def test_what_nobody_waits_for_is_journaled_soon(bus: str, tmp_path: Path) -> None:
    with running(tmp_path / "journal", bus=bus) as forwarder, zmqbus.Node("writer", bus=bus) as node:
        known_to(node)
        node.wait_for_subscribers("t", 1, 20)
        node.publish("t", 1)
        eventually(lambda: forwarder.statistics()["journal_next_offset"] == 1)
        assert node.statistics()["subscriber_stalls"] == 0


def test_of_a_node_without_a_trail_the_pub_is_heard(bus: str, tmp_path: Path) -> None:
    """Whoever implements the protocol need not have one."""
    with zmqbus.Node("plain", bus=bus, discovery="static") as node:
        node._engine.peering._ports["trail"] = 0
        with running(tmp_path / "journal", bus=bus, peers=[node.endpoints["inbox"]]):
            node.publish("t", 1, durable=True, timeout=20)
