"""A node that publishes and repairs, written from docs/protocol.md with pyzmq and msgpack alone: ours hears it."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

from zmqbus import Node, Subscription
from zmqbus.protocol.streams.stream import Gap

ORIGIN = 0xF0E1D2C3B4A59687
HELLO, WELCOME, BYE, SUBSCRIBE, HEADS, FETCH, BATCHES = 1, 2, 3, 4, 6, 7, 8
DATA, HEAD, HEARTBEAT = 1, 2, 3
TOPIC = b"t.x"


def frame(first: int, payload: bytes = b"", *, count: int = 1, flags: int = 0, kind: int = DATA, **more: Any) -> bytes:
    topic, version, origin = more.get("topic", TOPIC), more.get("version", 1), more.get("origin", ORIGIN)
    return topic + b"\0" + struct.pack("<BBHIQQQ", version, kind, flags, count, origin, first, 10**18) + payload


def command(code: int, request: int, body: dict[str, Any], *parts: bytes) -> bytes:
    packed = msgpack.packb(body)
    sizes = b"".join(struct.pack("<I", len(part)) for part in parts)
    return b"".join((struct.pack("<BBQII", code, 1, request, len(parts), len(packed)), sizes, packed, *parts))


class Foreign:
    """Answers commands on a thread; its PUB belongs to the test."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.dealer = self.context.socket(zmq.DEALER)
        self.pub = self.context.socket(zmq.XPUB)
        self.pub.rcvtimeo = 20_000
        self.inbox_port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.pub_port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.inbox = f"tcp://127.0.0.1:{self.inbox_port}"
        self.heads: dict[bytes, int] = {}  # what it says its streams' next seqs are
        self.held: dict[int, bytes] = {}  # frames of TOPIC, by seq
        self.fetches: list[tuple[int, int]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def introduction(self) -> dict[str, Any]:
        return {
            "origin": ORIGIN,
            "name": "foreign",
            "bus": "default",
            "epoch": time.time_ns(),
            "inbox": [self.inbox],
            "pub_port": self.pub_port,
            "host": "elsewhere",
            "pid": 1,
            "release": "0",
        }

    def join(self, inbox: str) -> None:
        """Say HELLO in turn: then both have met."""
        self.dealer.connect(inbox)
        self.dealer.send(command(HELLO, 1, self.introduction()))

    def publish(self, *parts: bytes) -> None:
        self.pub.send_multipart(parts)

    def beat(self) -> None:
        self.publish(frame(1, kind=HEARTBEAT, count=0, topic=b"$hb"))

    def serve(self) -> None:
        while not self.ended.is_set():
            if self.router.poll(20):
                identity, asked = self.router.recv_multipart()
                asks, _, request, number, _ = struct.unpack_from("<BBQII", asked)
                assert not number
                for code, answer, batches in self.answers(asks, msgpack.unpackb(asked[18:])):
                    self.router.send_multipart([identity, command(code, request, answer, *batches)])

    def answers(self, command: int, body: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], list[bytes]]]:
        if command == HELLO:
            yield WELCOME, self.introduction(), []
            for subscription in body.get("subscriptions", []):
                yield HEADS, {"id": subscription["id"], "heads": list(self.heads.items())}, []
        elif command == SUBSCRIBE:
            yield HEADS, {"id": body["id"], "heads": list(self.heads.items())}, []
        elif command == FETCH:
            self.fetches.append((body["first"], body["last"]))
            batches = [self.held[seq] for seq in sorted(self.held) if body["first"] <= seq <= body["last"]]
            here = batches if body["topic"] == TOPIC else []
            yield BATCHES, {name: body[name] for name in ("topic", "origin", "first", "last")}, here
        elif command == BYE:
            yield BYE, {}, []

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.context.destroy(linger=0)


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    made = Foreign()
    made.heads[TOPIC] = 5
    yield made
    made.close()


@pytest.fixture
def subscription(foreign: Foreign) -> Iterator[Subscription]:
    """Of a node that has joined the foreign one, whose PUB is connected."""
    with Node("ours", interface="127.0.0.1", discovery="static", peers=[foreign.inbox]) as node:
        foreign.join(node.endpoints["inbox"])
        (peer,) = node.wait_for_peers(1, timeout=20)
        assert (peer.origin, peer.name, peer.host) == (ORIGIN, "foreign", "elsewhere")
        while foreign.pub.recv() != b"\1$hb\0":
            pass
        foreign.beat()
        with node.subscribe("t.>") as made:
            assert {foreign.pub.recv()[:7] for _ in range(2)} == {b"\1t.", b"\1$wake\0"}
            yield made


def test_every_kind_of_frame_is_heard(foreign: Foreign, subscription: Subscription) -> None:
    foreign.publish(frame(5, msgpack.packb(["one"])))
    foreign.publish(frame(6, msgpack.packb([1, {"k": b"v"}, None]), count=3))
    foreign.publish(frame(9, msgpack.packb([[b"a", 2.5], [{"h": 1}, None]]), count=2, flags=1))
    foreign.publish(frame(11, flags=2), msgpack.packb(["external"]))
    foreign.publish(frame(12, flags=3), msgpack.packb([["with headers"], [{"h": 2}]]))
    foreign.publish(frame(13, flags=6), b"raw")
    foreign.publish(frame(1, msgpack.packb(["began later"]), topic=b"t.new"))
    got = [subscription.get(timeout=20) for _ in range(10)]
    assert [(m.topic, m.seq, m.value, m.headers) for m in got if m is not None] == [
        ("t.x", 5, "one", None),
        ("t.x", 6, 1, None),
        ("t.x", 7, {"k": b"v"}, None),
        ("t.x", 8, None, None),
        ("t.x", 9, b"a", {"h": 1}),
        ("t.x", 10, 2.5, None),
        ("t.x", 11, "external", None),
        ("t.x", 12, "with headers", {"h": 2}),
        ("t.x", 13, b"raw", None),
        ("t.new", 1, "began later", None),
    ]
    assert all(m is not None and (m.origin, m.time) == (ORIGIN, 1e9) for m in got)


def test_gaps_are_fetched_and_what_is_not_held_is_reported(foreign: Foreign, subscription: Subscription) -> None:
    foreign.held = {7: frame(7, msgpack.packb([7])), 8: frame(8, msgpack.packb([8]))}
    foreign.publish(frame(9, msgpack.packb([9])))
    assert [m.seq for m in (subscription.get(timeout=20) for _ in range(3)) if m is not None] == [7, 8, 9]
    assert foreign.fetches == [(5, 8)]
    assert (subscription.repaired, subscription.lost) == (2, 2)
    assert subscription.gaps == [Gap("t.x", ORIGIN, 5, 6)]
    foreign.held = {10: frame(10, msgpack.packb([10]))}
    foreign.publish(frame(11, kind=HEAD, count=0))  # the last one was lost
    message = subscription.get(timeout=20)
    assert message is not None
    assert message.seq == 10


@pytest.mark.parametrize(
    "refused",
    [
        frame(5, flags=6, version=2),  # of a later version
        frame(5, flags=0x46),  # a later flag
        frame(5, kind=77),  # a later kind
        frame(5, flags=6, count=2),
        frame(4, flags=6),  # a duplicate with more parts than it may have
        b"no frame",
    ],
    ids=range(6),
)
def test_parts_behind_a_frame_that_is_not_understood_are_not_frames(
    foreign: Foreign, subscription: Subscription, refused: bytes
) -> None:
    """They are somebody's value, which would choose what it is taken for."""
    topic = b"t.x\0" if refused == b"no frame" else b""
    forged = frame(1, msgpack.packb(["forged by a value"]), topic=b"t.forged")
    foreign.publish(topic + refused, forged, forged)
    foreign.publish(frame(5, msgpack.packb(["honest"])))
    message = subscription.get(timeout=20)
    assert message is not None
    assert (message.topic, message.value) == ("t.x", "honest")


@pytest.mark.parametrize("size", [1, 4, 60, 3000])
@pytest.mark.parametrize("start", [b"\0", b"$wake\0", b"t.x\0", b"\xff"])
def test_frames_of_any_beginning_harm_nobody_who_subscribed_to_everything(
    foreign: Foreign, start: bytes, size: int
) -> None:
    with Node("ours", interface="127.0.0.1", discovery="static", peers=[foreign.inbox]) as node:
        foreign.join(node.endpoints["inbox"])
        node.wait_for_peers(1, timeout=20)
        with node.subscribe(">") as subscription:
            while foreign.pub.recv() != b"\1":
                pass
            foreign.publish(start + bytes(size))
            foreign.publish(frame(5, msgpack.packb(["one"])))
            foreign.publish(start + b"\1" * size)
            foreign.publish(frame(6, msgpack.packb(["two"])))
            assert [message.value for _ in range(2) if (message := subscription.get(20)) is not None] == ["one", "two"]
