"""When messages leave: at once at low rates, in batches in a burst, in order whoever publishes, bounded in bytes."""

from __future__ import annotations

import gc
import threading
import time

import pytest

import zmqbus
from tests.node.conftest import drain, eventually
from zmqbus.node.engine import FRAMES_QUEUED
from zmqbus.node.publishing import publisher as publishing


def test_at_a_low_rate_every_message_is_a_frame_and_waits_for_nothing(
    node: zmqbus.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node._engine.outlet, "_start_ticking", lambda: pytest.fail("nothing may wait for a tick"))
    subscription = node.subscribe("t")
    for number in range(20):
        node.publish("t", number)
        assert drain(subscription, 1)[0].value == number  # without this, it would be a burst
    assert node.statistics()["frames_sent"] == 20


def test_a_burst_is_sent_in_batches_and_its_end_needs_no_flush(node: zmqbus.Node) -> None:
    subscription = node.subscribe("t")
    for number in range(50_000):
        node.publish("t", number)
    assert [message.value for message in drain(subscription, 50_000)] == list(range(50_000))
    assert node.statistics()["frames_sent"] < 5000


def test_after_a_burst_messages_leave_at_once_again(node: zmqbus.Node) -> None:
    for number in range(10_000):
        node.publish("t", number)
    outlet = node._engine.outlet
    eventually(lambda: outlet.pace == publishing.EAGER)
    before = outlet.frames
    node.publish("t", "calm")
    assert outlet.frames == before + 1


@pytest.mark.parametrize("size", [10, 1000, 15_000])
def test_a_batch_is_bounded(node: zmqbus.Node, size: int) -> None:
    frames: list[bytes] = []
    broadcast = node._engine.outlet.broadcast
    send = broadcast._send_plain
    broadcast._send_plain = lambda frame, flags: (frames.append(frame), send(frame, flags))  # type: ignore[assignment]
    for _ in range(20_000_000 // size // 10):
        node.publish("t", bytes(size))
    node.flush()
    assert max(map(len, frames)) < publishing.BATCH_BYTES_MAX + 16 * 1024 + 300


def test_many_threads_on_one_topic_in_bursts_lose_swap_and_double_nothing(
    pair: tuple[zmqbus.Node, zmqbus.Node],
) -> None:
    """With a thread switch every few instructions, so that messages are drawn in one order and stored in another."""
    a, b = pair
    subscription = b.subscribe("t")
    seqs: dict[int, list[int]] = {}

    def work(number: int) -> None:
        publisher = a.publisher("t")
        seqs[number] = [
            publisher.send((number, n), {"h": n} if n % 50 == 7 else None) if n % 2 else a.publish("t", b"%d" % number)
            for n in range(3000)
        ]

    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        messages = drain(subscription, 18_000, 60)
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [message.seq for message in messages] == list(range(1, 18_001))
    for number, own in seqs.items():
        assert own == sorted(own)
        for n, seq in enumerate(own):
            message = messages[seq - 1]
            assert message.value == ([number, n] if n % 2 else b"%d" % number)
            assert message.headers == ({"h": n} if n % 50 == 7 else None)
    assert subscription.lost == 0


def test_several_threads_share_a_subscription(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    subscription = b.subscribe("t")
    got: list[int] = []

    def consume() -> None:
        while (message := subscription.get(10)) is not None and message.value >= 0:
            got.append(message.value)

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(20_000):
        a.publish("t", number)
    eventually(lambda: len(got) >= 20_000)
    for _ in threads:
        a.publish("t", -1)
    for thread in threads:
        thread.join(20)
    assert sorted(got) == list(range(20_000))


def test_a_thread_that_waits_for_messages_lets_the_engine_in(bus: str) -> None:
    """Nodes that come while it sleeps are connected at once, and closing ends its sleep."""
    with zmqbus.Node("waiting", bus=bus) as node:
        subscription = node.subscribe("t")
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.extend(message.value for message in subscription))
        thread.start()
        for number in range(5):
            with zmqbus.Node(f"newcomer {number}", bus=bus) as newcomer:
                newcomer.wait_for_subscribers("t", 1, 10)
                newcomer.publish("t", number)
        eventually(lambda: len(got) == 5)
        subscription.close()
        thread.join(10)
        assert not thread.is_alive()
    assert got == list(range(5))


def test_a_subscription_that_nobody_refers_to_is_closed(node: zmqbus.Node) -> None:
    node.publish("t", "before")
    for message in node.subscribe("t", history=1):
        assert message.value == "before"
        break
    gc.collect()
    eventually(lambda: node.statistics()["subscriptions"] == 0)


def test_what_waits_for_a_subscriber_that_does_not_read_is_bounded_in_bytes(bus: str) -> None:
    """Frames are counted by libzmq; ballast makes a large one count for many."""
    size = 8 * 1024 * 1024
    with zmqbus.Node("a", bus=bus, history_bytes=0) as a, zmqbus.Node("b", bus=bus) as b:
        subscription = b.subscribe("t")
        a.wait_for_subscribers("t", 1, 10)
        drained = threading.Thread(target=lambda: [a.publish("t", bytes(size)) for _ in range(12)])
        drained.start()
        eventually(lambda: a.statistics()["subscriber_stalls"] > 0)
        # On either side there is room for FRAMES_QUEUED * 256 KiB, and the one that went beyond.
        assert a.statistics()["bytes_published"] <= 2 * FRAMES_QUEUED * publishing.BALLAST_BYTES + 4 * size
        received = drain(subscription, 1)
        drained.join(30)
        assert not drained.is_alive()
        assert len(received[0].value) == size


def test_who_only_observes_is_neither_counted_nor_waited_for_and_is_told_what_it_missed(bus: str) -> None:
    with zmqbus.Node("a", bus=bus) as a, zmqbus.Node("b", bus=bus) as b, zmqbus.Node("tap", bus=bus) as tap:
        observer = tap.subscribe("t", observe=True)
        with pytest.raises(zmqbus.WaitTimeout):
            a.wait_for_subscribers("t", 1, 0.5)
        reader = b.subscribe("t")
        a.wait_for_subscribers("t", 1, 10)
        a.wait_for_subscribers("t", 2, 10, observers=True)
        a.publish("t", "first")
        assert drain(observer, 1)[0].value == "first"
        count = 200
        big = bytes(1024 * 1024)
        publishing_thread = threading.Thread(target=lambda: [a.publish("t", big) for _ in range(count)])
        publishing_thread.start()
        assert len(drain(reader, 1 + count)) == 1 + count  # while the observer reads nothing at all
        publishing_thread.join(30)
        assert a.close() == []  # the reader has all, and nobody else is waited for
        received, deadline = 1, time.monotonic() + 20
        while received + sum(gap.count for gap in observer.gaps) < 1 + count:
            assert time.monotonic() < deadline
            received += observer.get(0.1) is not None
        assert received + observer.lost == 1 + count
        assert observer.lost > 0
