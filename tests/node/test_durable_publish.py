"""Durable publishing, over real sockets and onto real disks: acknowledged is on disk."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.conftest import SOON, claims, in_loop, meet, on
from tests.forwarder.forwarders import ForwarderProcess, Running, running, seqs, stored
from tests.node.conftest import drain, eventually
from zmqbus import AsyncNode, Gap, Node
from zmqbus.errors import NotDurable
from zmqbus.node.publishing import durability
from zmqbus.protocol.members.peers import Peer


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


# --- on disk -------------------------------------------------------------------------------------


def test_it_returns_when_the_message_is_on_disk_and_not_before(journal: Path, bus: str) -> None:
    with running(journal, bus=bus) as forwarder, Node("publisher", bus=bus) as node:
        for number in range(1, 21):
            value = {"number": number, "padding": "x" * (number * 3000)}  # some travel as a second part
            assert node.publish("a.b", value, durable=True, timeout=SOON) == number
            last = stored(journal)[-1]
            assert (last.topic, last.origin, last.seq, last.value) == ("a.b", node.origin, number, value)
        assert node.statistics()["messages_unacked"] == 0
        forwarder.close()
        assert seqs(journal, "a.b", node.origin) == list(range(1, 21))


@in_loop
async def test_async(journal: Path, bus: str) -> None:
    with running(journal, bus=bus):
        async with AsyncNode("publisher", bus=bus) as node:
            for number in range(1, 21):
                value = "x" * number * 3000
                assert await node.publish("a.b", value, durable=True, timeout=SOON) == number
                last = (await asyncio.to_thread(stored, journal))[-1]
                assert (last.origin, last.seq, last.value) == (node.origin, number, value)


def test_headers_bytes_and_large_values_arrive_as_they_were(journal: Path, bus: str) -> None:
    with running(journal, bus=bus), Node("publisher", bus=bus) as node:
        values = [b"\0" * 100, b"\xff" * 3_000_000, "text", None, {"map": [1, 2.5]}]
        for value in values:
            node.publish("a", value, headers={"k": 1}, durable=True, timeout=SOON)
            node.publish("a", value, durable=True, timeout=SOON)
        assert [message.value for message in stored(journal, "a")] == [value for value in values for _ in range(2)]


def test_a_burst_is_flushed_to_disk(journal: Path, bus: str) -> None:
    with running(journal, bus=bus), Node("publisher", bus=bus) as node:
        meet(node, "a", "b")
        for number in range(20_000):
            node.publish("a" if number % 3 else "b", b"%d" % number)
        node.flush(timeout=20)
        values = {message.value for message in stored(journal) if message.value != "first"}
        assert values == {b"%d" % number for number in range(20_000)}
        for topic in ("a", "b"):
            found = seqs(journal, topic, node.origin)
            assert found == list(range(1, len(found) + 1))


@in_loop
async def test_many_that_are_awaited_together_share_commits(journal: Path, bus: str) -> None:
    with running(journal, bus=bus) as forwarder:
        async with AsyncNode("publisher", bus=bus) as node:
            await node.publish("a", "first", durable=True, timeout=SOON)
            before = (await asyncio.to_thread(forwarder.statistics))["commits"]
            published = await asyncio.gather(*(node.publish("a", n, durable=True, timeout=20) for n in range(1000)))
            assert sorted(published) == list(range(2, 1002))
            after = (await asyncio.to_thread(forwarder.statistics))["commits"]
            assert after - before < 100
            assert await asyncio.to_thread(seqs, journal, "a", node.origin) == list(range(1, 1002))


def test_threads_that_wait_at_once_are_each_told(journal: Path, bus: str) -> None:
    with running(journal, bus=bus), Node("publisher", bus=bus) as node, ThreadPoolExecutor(8) as threads:
        meet(node, "a", "b")

        def publish(number: int) -> tuple[str, int]:
            topic = "ab"[number % 2]
            return topic, node.publish(topic, number, durable=True, timeout=20)

        published = sorted(threads.map(publish, range(400)))
        assert published == [("a", seq) for seq in range(2, 202)] + [("b", seq) for seq in range(2, 202)]


# --- nobody there --------------------------------------------------------------------------------


def test_without_a_forwarder_plain_publishing_is_as_it_was(bus: str) -> None:
    with Node("publisher", bus=bus, history_bytes=50_000, buffer_bytes=0) as node, Node("ear", bus=bus) as other:
        node.wait_for_peers(1, timeout=SOON)
        with other.subscribe("a") as subscription:
            for number in range(2000):
                node.publish("a", b"%1000d" % number)  # far more than history and buffer
            node.flush(timeout=5)
            drain(subscription, 2000)
        figures = node.statistics()
        assert (figures["messages_unacked"], figures["unacked_bytes_pinned"]) == (0, 0)
        assert figures["history_bytes"] <= 50_000
        assert node.close() == []


def test_nobody_who_claims_it(journal: Path, bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "CLAIM_PATIENCE", 0.4)
    with running(journal, bus=bus, topics=["other.>"]), Node("publisher", bus=bus) as node:
        with node.subscribe("a") as subscription:
            meet(node, "other.x")
            start = time.monotonic()
            with pytest.raises(NotDurable, match=re.escape("no forwarder on the bus claims a; start one")) as caught:
                node.publish("a", "x", durable=True)
            assert 0.4 <= time.monotonic() - start < 3
            assert (caught.value.unacked, caught.value.seq) == (1, 1)
            assert drain(subscription, 1)[0].value == "x"  # it was published
        assert node.statistics()["messages_unacked"] == 0
        node.flush(timeout=5)
        assert node.close() == []


@in_loop
async def test_nobody_who_claims_it_async(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "CLAIM_PATIENCE", 0.4)
    async with AsyncNode("publisher", bus=bus) as node:
        start = time.monotonic()
        with pytest.raises(NotDurable, match="no forwarder on the bus claims a"):
            await node.publish("a", "x", durable=True)
        assert 0.4 <= time.monotonic() - start < 3


@in_loop
async def test_who_is_cancelled_waits_no_longer(bus: str) -> None:
    """Nothing is left of those who give up again and again while nobody acknowledges."""
    async with AsyncNode("publisher", bus=bus) as node:
        outlet = node._engine.outlet
        outlet.claimed(7, ["a"])
        for _ in range(3):
            for waiting in (node.publish("a", "x", durable=True), node.flush()):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(waiting, 0.05)
        assert outlet.ledger.accounts["a"].waiting == []
        outlet.acked(7, [(b"a", 3)], False)


def test_a_timeout_shorter_than_the_patience_counts(bus: str) -> None:
    with Node("publisher", bus=bus) as node:
        start = time.monotonic()
        with pytest.raises(NotDurable, match="no forwarder"):
            node.publish("a", "x", durable=True, timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 2


def test_a_forwarder_that_comes_while_one_waits_is_in_time(journal: Path, bus: str) -> None:
    with Node("publisher", bus=bus) as node, ThreadPoolExecutor(1) as thread:
        waiting = on(thread, node.publish, "a", "x", durable=True, timeout=SOON)
        eventually(lambda: "a" in node._engine.outlet.ledger.accounts)
        with running(journal, bus=bus):
            assert waiting.result(SOON) == 1
            assert seqs(journal, "a", node.origin) == [1]


def test_what_was_published_before_it_came_is_journaled_from_the_first(journal: Path, bus: str) -> None:
    with Node("publisher", bus=bus) as node:
        for number in range(5000):
            node.publish("a", number)
        with running(journal, bus=bus):
            node.publish("a", "last", durable=True, timeout=SOON)
            assert seqs(journal, "a", node.origin) == list(range(1, 5002))


def test_what_is_in_no_history_any_more_when_it_comes_is_no_loss(journal: Path, bus: str) -> None:
    with Node("publisher", bus=bus, history_bytes=100_000) as node:
        for number in range(3000):
            node.publish("a", b"%100d" % number)
            if number % 10 == 0:
                node._engine.outlet.flush_all()  # in small batches
        forwarder = Running(journal, bus=bus)
        try:
            forwarder.open()
            events = forwarder.call(listen(forwarder))
            node.publish("a", "last", durable=True, timeout=SOON)
            found = seqs(journal, "a", node.origin)
            assert 1 < found[0] < 3000
            assert found == list(range(found[0], 3002))
            assert not [event for event in events if isinstance(event, Gap)]
        finally:
            forwarder.close()


async def listen(forwarder: Running) -> list[Any]:
    """The forwarder's events from now on, in a list that grows."""

    class Listener(list[Any]):
        put = list.append

        def close(self) -> None:
            pass

    events = Listener()
    forwarder.forwarder._engine.add_listener(events)
    return events


# --- several -------------------------------------------------------------------------------------


def test_two_with_disjoint_claims_have_their_own(tmp_path: Path, bus: str) -> None:
    with (
        running(tmp_path / "1", bus=bus, topics=["a.>"]),
        running(tmp_path / "2", bus=bus, topics=["b.>"]),
        Node("publisher", bus=bus) as node,
    ):
        for number in range(50):
            node.publish(f"{'ab'[number % 2]}.x", number, durable=True, timeout=SOON)
        assert [message.value for message in stored(tmp_path / "1")] == list(range(0, 50, 2))
        assert [message.value for message in stored(tmp_path / "2")] == list(range(1, 50, 2))


def test_two_with_the_same_claim_both_have_everything(tmp_path: Path, bus: str) -> None:
    with (
        running(tmp_path / "1", bus=bus),
        running(tmp_path / "2", bus=bus, topics=["a"]),
        Node("publisher", bus=bus, acks=2) as node,
    ):
        for number in range(1, 11):
            node.publish("a", number, durable=True, timeout=SOON)
            assert seqs(tmp_path / "1", "a", node.origin)[-1] == number
            assert seqs(tmp_path / "2", "a", node.origin)[-1] == number


def test_one_acknowledgement_is_enough_unless_two_are_wanted(tmp_path: Path, bus: str) -> None:
    with (
        running(tmp_path / "1", bus=bus),
        ForwarderProcess(tmp_path / "2", bus=bus) as second,
        Node("one", bus=bus) as one,
        Node("two", bus=bus, acks=2) as two,
    ):
        meet(one, "a", forwarders=2)
        meet(two, "a", forwarders=2)
        second.stop()
        assert one.publish("a", "x", durable=True, timeout=5) == 2
        with pytest.raises(NotDurable, match="no acknowledgement"):
            two.publish("a", "y", durable=True, timeout=0.5)
        assert two.statistics()["messages_unacked"] == 1
        second.go_on()
        two.flush(timeout=SOON)
        for path in (tmp_path / "1", tmp_path / "2"):
            assert seqs(path, "a", two.origin) == [1, 2]
        eventually(lambda: seqs(tmp_path / "2", "a", one.origin) == [1, 2])


def test_where_two_are_wanted_and_one_is_there(journal: Path, bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "CLAIM_PATIENCE", 0.4)
    with running(journal, bus=bus), Node("publisher", bus=bus, acks=2) as node:
        node.publish("a", "first")
        eventually(lambda: claims(node, "a") == 1)
        with pytest.raises(NotDurable, match="2 forwarders are to have it, and 1 on the bus claim a"):
            node.publish("a", "x", durable=True)


# --- leaving -------------------------------------------------------------------------------------


def test_close_waits_for_acknowledgements_that_come(journal: Path, bus: str) -> None:
    with running(journal, bus=bus):
        node = Node("publisher", bus=bus)
        meet(node, "a")
        for number in range(20_000):
            node.publish("a", number)
        assert node.close(timeout=SOON) == []
        assert seqs(journal, "a", node.origin) == list(range(1, 20_002))


def test_of_two_lives_of_a_forwarder_the_later_one_claims(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed and started again is there twice, until its first life is found out."""
    with Node("publisher", bus=bus) as node, ThreadPoolExecutor(1) as thread:
        lives = [
            Peer(origin=1, inbox="tcp://127.0.0.1:1", epoch=1, claims=("b",), journal=7),
            Peer(origin=2, inbox="tcp://127.0.0.1:2", epoch=2, claims=(">",), journal=7),
        ]
        engine = node._engine
        ledger = engine.outlet.ledger
        engine.outlet.claimed(7, [">"])
        waiting = on(thread, node.publish, "a", "x", durable=True)
        eventually(lambda: "a" in ledger.accounts and bool(ledger.accounts["a"].waiting))
        for present in (lives, lives[::-1]):
            monkeypatch.setattr(engine.peering, "peers", lambda present=present: present)
            node._loop.call_soon_threadsafe(engine.forwarders_changed)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), node._loop).result(SOON)
            assert ledger.accounts["a"].claimants == {7}
            assert not waiting.done()
        engine.outlet.acked(7, [(b"a", 1)], False)
        assert waiting.result(SOON) == 1
        monkeypatch.undo()
