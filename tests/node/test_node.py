"""Nodes with real sockets on loopback: what `Node` promises, one promise a test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import zmqbus
from tests.node.conftest import drain, eventually

VALUES = [
    "text",
    "häß ☃ \U0001f600",
    "",
    b"",
    b"\x00\xff" * 50,
    0,
    -(2**63),
    2**64 - 1,
    1.5,
    float("inf"),
    True,
    None,
    [],
    {},
    [1, ["a", {"b": None}]],
    {"k": b"v", "n": {"deep": [1.0]}},
    {1: 2},
    "x" * 20_000,
    b"y" * 100_000,
    {"big": b"z" * 40_000},
]


def test_values_round_trip_exactly(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("t.>")
    for number, value in enumerate(VALUES, 1):
        assert a.publish("t.x", value, headers={"n": number} if number % 3 == 0 else None) == number
    for number, (value, message) in enumerate(zip(VALUES, drain(subscription, len(VALUES)), strict=True), 1):
        assert message.value == value
        assert type(message.value) is type(value)
        assert (message.topic, message.seq, message.origin) == ("t.x", number, a.origin)
        assert message.headers == ({"n": number} if number % 3 == 0 else None)
        assert message.offset is None


def test_a_burst_arrives_whole_and_in_order(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("burst")
    for number in range(50_000):
        a.publish("burst", number)
    assert [message.value for message in drain(subscription, 50_000)] == list(range(50_000))
    assert subscription.lost == 0


def test_the_value_is_what_it_was_when_published(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("mutable")
    value: dict[str, int] = {}
    buffer = bytearray(b"aaaa")
    for number in range(2000):  # enough for a burst, in which messages are gathered before they are sent
        value["n"] = number
        a.publish("mutable", value)
    a.publish("mutable", buffer)
    buffer[:] = b"bbbb"
    received = drain(subscription, 2001)
    assert [message.value["n"] for message in received[:-1]] == list(range(2000))
    assert received[-1].value == b"aaaa"


@pytest.mark.parametrize(
    "value",
    [object(), {1j}, 2**64, "\ud800", {"deep": [object()]}],
    ids=["object", "complex", "integer", "surrogate", "deep"],
)
def test_an_unpackable_value_raises_at_publish_and_names_its_type(
    pair: tuple[zmqbus.Node, zmqbus.Node], value: object
) -> None:
    a, b = pair
    subscription = b.subscribe("t")
    with pytest.raises(zmqbus.UnsupportedValue, match=type(value).__name__):
        a.publish("t", value)
    assert a.publish("t", "next") == 1  # nothing was published, no seq was spent
    assert drain(subscription, 1)[0].value == "next"


@pytest.mark.parametrize("headers", [{"x": object()}, {1: "x"}, ["x"]], ids=["value", "key", "list"])
def test_bad_headers_raise_at_publish(pair: tuple[zmqbus.Node, zmqbus.Node], headers: dict[str, object]) -> None:
    with pytest.raises(zmqbus.UnsupportedValue):
        pair[0].publish("t", 1, headers=headers)


def test_an_oversized_value_raises(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    with pytest.raises(zmqbus.MessageTooLarge, match="67,108,865"):
        pair[0].publish("t", b"x" * (64 * 1024 * 1024 + 1))


@pytest.mark.parametrize("topic", ["", "a..b", "a b", "$sys", "a.*", ">", "x" * 256, "a\0b"], ids=repr)
def test_a_bad_topic_raises(pair: tuple[zmqbus.Node, zmqbus.Node], topic: str) -> None:
    with pytest.raises(zmqbus.TopicError):
        pair[0].publish(topic, 1)
    with pytest.raises(zmqbus.TopicError):
        pair[0].publisher(topic)


@pytest.mark.parametrize("pattern", ["", "a..b", "a.>.b", "a b", "x*"], ids=repr)
def test_a_bad_pattern_raises(pair: tuple[zmqbus.Node, zmqbus.Node], pattern: str) -> None:
    with pytest.raises(zmqbus.TopicError):
        pair[0].subscribe(pattern)


def test_no_pattern_raises(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    with pytest.raises(zmqbus.TopicError, match="at least one"):
        pair[0].subscribe()


def test_patterns_select_by_token(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("s.*.temp", "exact")
    for topic in ("s.1.temp", "s.10.temp", "s.1.hum", "s.temp", "exact", "exact.not", "exactly", "s.1.temp.x"):
        a.publish(topic, topic)
    a.publish("s.end.temp", "end")
    seen = []
    while not seen or seen[-1] != "end":
        seen.append(drain(subscription, 1)[0].value)
    assert sorted(seen[:-1]) == ["exact", "s.1.temp", "s.10.temp"]


def test_a_node_receives_its_own_messages(node: zmqbus.Node) -> None:
    with node.subscribe("self.>") as subscription:
        node.publish("self.x", 1)
        assert drain(subscription, 1)[0].value == 1


def test_history_delivers_what_came_before(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    for number in range(1, 31):
        a.publish("past", number)
    subscription = b.subscribe("past", history=10)
    assert [message.value for message in drain(subscription, 10)] == list(range(21, 31))
    a.publish("past", 31)
    assert drain(subscription, 1)[0].seq == 31
    assert subscription.lost == 0


def test_without_history_only_what_follows_is_delivered(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    a.publish("past", "before")
    subscription = b.subscribe("past")
    a.publish("past", "after")
    assert drain(subscription, 1)[0].value == "after"


class Reading(msgspec.Struct):
    sensor: str
    celsius: float


def test_a_typed_subscription_decodes_into_the_type(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("r", type=Reading)
    a.publish("r", Reading("north", 3.5))
    a.publish("r", {"sensor": "south", "celsius": 4.0})
    assert [m.value for m in drain(subscription, 2)] == [Reading("north", 3.5), Reading("south", 4.0)]


def test_a_value_that_does_not_fit_raises_in_its_place_and_loses_no_other(
    pair: tuple[zmqbus.Node, zmqbus.Node],
) -> None:
    a, b = pair
    subscription = b.subscribe("r", type=int)
    out = a.publisher("r")
    for value in (1, "two", 3):
        out.send(value)
    assert drain(subscription, 1)[0].value == 1
    with pytest.raises(zmqbus.DecodeError, match="#2") as caught:
        subscription.get(5)
    assert (caught.value.topic, caught.value.seq) == ("r", 2)
    assert drain(subscription, 1)[0].value == 3


def test_get_returns_none_when_nothing_comes(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    subscription = pair[1].subscribe("quiet")
    assert subscription.get(timeout=0) is None
    assert subscription.get(timeout=0.02) is None


def test_closing_a_subscription_ends_its_iteration(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("x")
    seen: list[object] = []
    consumer = threading.Thread(target=lambda: seen.extend(message.value for message in subscription))
    consumer.start()
    a.publish("x", 1)
    eventually(lambda: seen == [1])
    subscription.close()
    consumer.join(5)
    assert not consumer.is_alive()
    with pytest.raises(zmqbus.NodeClosed):
        subscription.get(0)
    subscription.close()  # twice is once


def test_peers_events_and_waiting(bus: str) -> None:
    with zmqbus.Node("first", bus=bus) as first:
        events = first.events()
        assert first.peers() == []
        with pytest.raises(zmqbus.WaitTimeout, match=r"waited 0\.01 s for 1 peer"):
            first.wait_for_peers(1, timeout=0.01)
        with zmqbus.Node("second", bus=bus) as second:
            assert [peer.name for peer in first.wait_for_peers(1, timeout=10)] == ["second"]
            joined = events.get(5)
            assert isinstance(joined, zmqbus.PeerJoined)
            assert joined.peer.origin == second.origin
            assert joined.peer.pid == os.getpid()
        left = events.get(5)
        assert isinstance(left, zmqbus.PeerLeft)
        assert (left.peer.origin, left.reason) == (second.origin, "bye")
        assert first.peers() == []
    assert events.get() is None  # closed with its node


def test_wait_for_subscribers_counts_those_the_topic_fits(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    with pytest.raises(zmqbus.WaitTimeout):
        a.wait_for_subscribers("logs.web", 1, timeout=0.01)
    subscriptions = [b.subscribe("logs.>"), b.subscribe("logs.web"), b.subscribe("other")]
    assert a.wait_for_subscribers("logs.web", 2, timeout=5) == 2
    subscriptions[0].close()
    a.publish("logs.web", 1)
    assert drain(subscriptions[1], 1)[0].value == 1
    assert a.wait_for_subscribers("logs.web", 1, timeout=5) == 1


def test_what_is_published_when_a_peer_has_joined_is_owed_to_it(bus: str) -> None:
    with zmqbus.Node("early", bus=bus) as early:
        events = early.events()
        with zmqbus.Node("late", bus=bus) as late, late.subscribe("greeting") as subscription:
            assert isinstance(events.get(10), zmqbus.PeerJoined)
            early.wait_for_subscribers("greeting", 1, timeout=10)
            for number in range(10):
                early.publish("greeting", number)
            assert [message.value for message in drain(subscription, 10)] == list(range(10))


def test_publishing_from_many_threads_keeps_each_streams_order(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("threads.>")
    seqs: dict[int, list[int]] = {}

    def work(number: int) -> None:
        own = a.publisher(f"threads.own{number}")
        seqs[number] = [a.publish("threads.shared", (number, turn)) for turn in range(2000) if own.send(turn)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_topic: dict[str, list[zmqbus.Message]] = {}
    for message in drain(subscription, 24_000):
        by_topic.setdefault(message.topic, []).append(message)
    assert all([m.seq for m in messages] == list(range(1, len(messages) + 1)) for messages in by_topic.values())
    shared = by_topic["threads.shared"]
    for number in range(6):  # publish() returned the seq that its message really had
        assert seqs[number] == [m.seq for m in shared if m.value[0] == number]


def test_close_is_bounded_and_names_who_did_not_confirm(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("never.consumed")
    a.wait_for_subscribers("never.consumed", 1, 5)
    a.publish("never.consumed", 1)
    undelivered = a.close(timeout=0.2)
    assert subscription.get(5) is not None
    assert [(late.peer, late.origin) for late in undelivered] == [(b.name, b.origin)]
    assert a.close() == []
    with pytest.raises(zmqbus.NodeClosed):
        a.publish("t", 1)
    with pytest.raises(zmqbus.NodeClosed):
        a.subscribe("t")


def test_close_waits_until_subscribers_have_all(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("work")
    got: list[int] = []
    consumer = threading.Thread(target=lambda: got.extend(m.value for m in iter(lambda: subscription.get(5), None)))
    consumer.start()
    for number in range(20_000):
        a.publish("work", number)
    assert a.close(timeout=10) == []
    subscription_end = b.publish("work", 20_000)
    assert subscription_end == 1
    eventually(lambda: len(got) == 20_001)
    subscription.close()
    consumer.join(5)
    assert got == list(range(20_001))


def test_what_was_received_outlives_its_publisher(
    pair: tuple[zmqbus.Node, zmqbus.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqbus.node.peers.registry.LEAVE_PATIENCE", 0.1)
    a, b = pair
    events = b.events()
    subscription = b.subscribe("testament")
    a.publish("testament", "here")
    assert drain(subscription, 1)[0].value == "here"  # so that what follows is received, and needs no repair
    for number in range(5000):
        a.publish("testament", number)
    a.close(timeout=0.3)
    assert isinstance(events.get(10), zmqbus.PeerLeft)
    assert [message.value for message in drain(subscription, 5000)] == list(range(5000))
    assert subscription.lost == 0


def test_a_stopped_subscriber_costs_others_nothing_and_gets_an_exact_account(bus: str, tmp_path: Path) -> None:
    """It is stopped under load, its queues overflow, it goes on: all is repaired, or reported to the message."""
    script = f"""
import sys, zmqbus
with zmqbus.Node("slow", bus={bus!r}) as node, node.subscribe("load") as subscription:
    print("ready", flush=True)
    received = 0
    for message in subscription:
        received += 1
        if message.value == "end": break
    lost = sum(gap.count for gap in subscription.gaps)
    print(received, lost, subscription.lost, subscription.repaired, flush=True)
"""
    with zmqbus.Node("pub", bus=bus, history_bytes=8_000_000) as node, node.subscribe("load") as quick:
        slow = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        try:
            assert slow.stdout is not None
            assert slow.stdout.readline() == "ready\n"
            node.wait_for_subscribers("load", 2, 10)
            os.kill(slow.pid, signal.SIGSTOP)
            payload = b"x" * 4000
            sent = 0
            for _ in range(30_000):  # 120 MB: more than the queues and the history together
                sent = node.publish("load", payload)
                while quick.get(0) is not None:
                    pass
            os.kill(slow.pid, signal.SIGCONT)
            sent = node.publish("load", "end")
            received, lost, counted, repaired = map(int, slow.stdout.readline().split())
        finally:
            slow.kill()
            slow.wait()
            slow.stdout.close()  # type: ignore[union-attr]
        assert received + lost == sent
        assert lost == counted
        assert quick.lost == 0
        assert lost > 0
        assert repaired > 0


@contextlib.contextmanager
def losing(node: zmqbus.Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the wire swallow all that the node publishes on topic t in the meantime."""
    with monkeypatch.context() as patch:
        node.flush(5)  # what was published before has gone
        broadcast = node._engine.outlet.broadcast
        send = broadcast._send_plain

        def swallow(frame: bytes, flags: int) -> None:
            if not frame.startswith(b"t\0\1\1"):
                send(frame, flags)

        patch.setattr(broadcast, "_send_plain", swallow)
        yield
        node.flush(5)


def test_what_the_wire_loses_is_repaired_in_order(
    pair: tuple[zmqbus.Node, zmqbus.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    subscription = b.subscribe("t")
    a.publish("t", 0)
    with losing(a, monkeypatch):
        for number in range(1, 4):
            a.publish("t", number)
    for number in range(4, 6):
        a.publish("t", number)
    assert [message.value for message in drain(subscription, 6)] == list(range(6))
    assert (subscription.repaired, subscription.lost) == (3, 0)


def test_a_lost_last_message_is_noticed_too(
    pair: tuple[zmqbus.Node, zmqbus.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    subscription = b.subscribe("t")
    with losing(a, monkeypatch):
        a.publish("t", "last")
    assert drain(subscription, 1)[0].value == "last"
    assert subscription.repaired == 1


def test_gaps_raise_when_asked_to(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with zmqbus.Node("a", bus=bus, history_bytes=0) as a, zmqbus.Node("b", bus=bus) as b:
        b.wait_for_peers(1, 10)
        events = b.events()
        subscription = b.subscribe("t", on_gap="raise")
        a.wait_for_subscribers("t", 1, 10)
        eventually(lambda: bool(subscription._intake.feed.attached))  # nothing could be repaired from no history
        a.publish("t", 1)
        with losing(a, monkeypatch):
            for number in range(2, 5):
                a.publish("t", number)
        a.publish("t", 5)
        assert drain(subscription, 1)[0].value == 1
        with pytest.raises(zmqbus.GapError) as caught:
            subscription.get(5)
        assert (caught.value.topic, caught.value.origin, caught.value.first, caught.value.last) == ("t", a.origin, 2, 4)
        assert drain(subscription, 1)[0].seq == 5  # it can go on
        assert subscription.gaps == [zmqbus.Gap("t", a.origin, 2, 4)]
        gap = next(event for event in iter(lambda: events.get(5), None) if isinstance(event, zmqbus.Gap))
        assert gap.count == 3


def test_two_nodes_of_one_name_are_told_of(bus: str) -> None:
    with zmqbus.Node("twin", bus=bus) as one:
        events = one.events()
        with zmqbus.Node("twin", bus=bus) as two:
            found = next(e for e in iter(lambda: events.get(10), None) if isinstance(e, zmqbus.DuplicateName))
            assert found.name == "twin"
            assert set(found.origins) == {one.origin, two.origin}


def test_nodes_of_another_bus_are_not_seen(bus: str) -> None:
    with zmqbus.Node("a", bus=bus) as a, zmqbus.Node("b", bus=bus + "x") as b, zmqbus.Node("c", bus=bus) as c:
        assert [peer.name for peer in a.wait_for_peers(1, 10)] == ["c"]
        assert [peer.name for peer in c.wait_for_peers(1, 10)] == ["a"]
        assert b.peers() == []


def test_static_peers_find_everyone_through_one(bus: str) -> None:
    with zmqbus.Node("hub", bus=bus, discovery="static") as hub:
        seed = [hub.endpoints["inbox"]]
        with (
            zmqbus.Node("x", bus=bus, discovery="static", peers=seed) as x,
            zmqbus.Node("y", bus=bus, discovery="static", peers=seed) as y,
        ):
            for node in (hub, x, y):
                node.wait_for_peers(2, timeout=10)
            assert {peer.name for peer in x.peers()} == {"hub", "y"}
            assert {peer.name for peer in y.peers()} == {"hub", "x"}


def test_a_forked_child_is_told_and_the_parent_goes_on(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("fork")
    publisher = a.publisher("fork")
    publisher.send(0)
    pid = os.fork()
    if pid == 0:  # the child reports by its exit code only
        code = 0
        for attempt in (
            lambda: a.publish("fork", 1),
            lambda: publisher.send(1),
            lambda: subscription.get(0.1),
            lambda: a.peers(),
            lambda: a.subscribe("x"),
        ):
            try:
                attempt()
            except zmqbus.ForkedProcess:
                code += 1
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    publisher.send(2)
    assert [message.value for message in drain(subscription, 2)] == [0, 2]


@pytest.mark.parametrize("closing", ["", "node.close()"], ids=["forgotten", "closed"])
def test_exit_never_hangs_and_delivers(pair: tuple[zmqbus.Node, zmqbus.Node], closing: str, bus: str) -> None:
    subscription = pair[0].subscribe("last.words")
    script = f"""
import zmqbus
node = zmqbus.Node(bus={bus!r})
node.wait_for_subscribers("last.words", 1, 10)
for number in range(500): node.publish("last.words", number)
{closing}
"""
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script])
    try:
        assert [message.value for message in drain(subscription, 500)] == list(range(500))
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"interface": "203.0.113.9"}, "203.0.113.9"),
        ({"interface": "nosuch0"}, "nosuch0"),
        ({"peers": "tcp://127.0.0.1:1"}, "list of endpoints"),
        ({"peers": ["127.0.0.1:1"]}, "127.0.0.1:1"),
        ({"peers": ["tcp://127.0.0.1:99999"]}, "99999"),
        ({"discovery": "magic"}, "magic"),
        ({"bus": ""}, "bus name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"history_bytes": -1}, "history_bytes"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_is_wrong(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(zmqbus.SetupError, match=says):
        zmqbus.Node(**arguments)  # type: ignore[arg-type]


def test_without_a_key_a_node_stays_on_this_machine(bus: str) -> None:
    with pytest.raises(zmqbus.ZmqbusError, match="keygen"):
        zmqbus.Node(bus=bus, discovery="static", peers=["tcp://192.0.2.1:5000"]).close()


@pytest.fixture
def key(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bus.key"
    zmqbus.BusKey.generate().save(path)
    return path


def test_with_a_key_nodes_meet_and_talk(bus: str, key: Path) -> None:
    common = {"bus": bus, "key": key, "interface": "127.0.0.1"}
    with zmqbus.Node("a", **common) as a, zmqbus.Node("b", **common) as b:
        subscription = b.subscribe("secret")
        a.wait_for_subscribers("secret", 1, 10)
        a.publish("secret", "psst")
        assert drain(subscription, 1)[0].value == "psst"


def test_a_wrong_key_is_kept_out_and_told(bus: str, key: Path) -> None:
    with zmqbus.Node("a", bus=bus, key=key, interface="127.0.0.1") as a:
        events = a.events()
        with zmqbus.Node("b", bus=bus, key=zmqbus.BusKey.generate(), interface="127.0.0.1") as b:
            warned = next(event for event in iter(lambda: events.get(20), None) if isinstance(event, zmqbus.Warned))
            assert "key" in warned.reason
            assert a.peers() == b.peers() == []


def test_statistics_count(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("t")
    for _ in range(10):
        a.publish("t", b"x")
    drain(subscription, 10)
    assert a.statistics()["messages_published"] == 10
    assert b.statistics()["messages_received"] == 10
    assert b.statistics()["peers"] == 1


def test_a_type_that_no_value_can_become_is_refused_at_once(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    """Also where values come out of the log, or as jobs."""

    class One(msgspec.Struct):
        n: int

    class Other(msgspec.Struct):
        n: str

    a, _ = pair
    for subscribe in (
        lambda: a.subscribe("t", type=One | Other),
        lambda: a.subscribe("t", type=One | Other, start="first"),
        lambda: a.pull("t", type=One | Other),
    ):
        with pytest.raises(zmqbus.SetupError, match=r"One.*Struct.*use one that msgspec can decode"):
            subscribe()
    assert a.subscribe("t", type=One).get(0) is None
