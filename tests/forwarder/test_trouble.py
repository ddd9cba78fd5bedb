"""Forwarders that stand still, are killed, or have no room: what was accepted arrives, once; nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.conftest import SOON, in_loop, meet, on
from tests.forwarder.forwarders import ForwarderProcess, Running, running, seqs, stored
from tests.node.conftest import eventually
from zmqbus import AsyncNode, Node, Undelivered
from zmqbus.errors import BufferFull, NotDurable
from zmqbus.journal import Cursor, Journal, Retention
from zmqbus.protocol import commands

# --- standing still ------------------------------------------------------------------------------


def test_the_outcome_is_unknown_while_it_stands_still_and_good_in_the_end(
    journal: Path, bus: str, stoppable: ForwarderProcess
) -> None:
    with Node("publisher", bus=bus) as node:
        meet(node, "a")
        stoppable.stop()
        start = time.monotonic()
        with pytest.raises(NotDurable, match=re.escape("no acknowledgement within 0.5 s")) as caught:
            node.publish("a", "x", durable=True, timeout=0.5)
        assert 0.5 <= time.monotonic() - start < 3
        assert (caught.value.unacked, caught.value.seq) == (1, 2)
        assert node.statistics()["messages_unacked"] == 1
        with pytest.raises(NotDurable) as caught:
            node.flush(timeout=0.2)
        assert (caught.value.unacked, caught.value.seq) == (1, None)
        stoppable.go_on()
        node.flush(timeout=SOON)
        assert node.statistics()["messages_unacked"] == 0
        assert [(message.seq, message.value) for message in stored(journal, "a")] == [(1, "first"), (2, "x")]


@in_loop
async def test_the_same_async(journal: Path, bus: str, stoppable: ForwarderProcess) -> None:
    async with AsyncNode("publisher", bus=bus) as node:
        await node.publish("a", "first", durable=True, timeout=SOON)
        stoppable.stop()
        with pytest.raises(NotDurable, match="no acknowledgement within"):
            await node.publish("a", "x", durable=True, timeout=0.5)
        with pytest.raises(NotDurable) as caught:
            await node.flush(timeout=0.2)
        assert caught.value.unacked == 1
        cancelled = asyncio.create_task(node.publish("a", "y", durable=True))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()
        stoppable.go_on()
        await node.flush(timeout=SOON)
        found = [message.value for message in await asyncio.to_thread(stored, journal, "a")]
        assert found in (["first", "x"], ["first", "x", "y"])


def test_flush_waits_for_all_that_is_claimed_and_nothing_else(journal: Path, bus: str) -> None:
    with (
        ForwarderProcess(journal, bus=bus, topics=["a.>", "b"]) as forwarder,
        Node("publisher", bus=bus) as node,
        ThreadPoolExecutor(1) as thread,
    ):
        meet(node, "a.x", "a.y", "b")
        node.publish("free", "before")
        forwarder.stop()
        for topic in ("a.x", "a.y", "b", "free"):
            for number in range(50):
                node.publish(topic, number)
        with pytest.raises(NotDurable) as caught:
            node.flush(timeout=0.3)
        assert caught.value.unacked == 150
        waiting = on(thread, node.flush)
        forwarder.go_on()
        waiting.result(SOON)
        assert len(stored(journal)) == 153
        assert {message.topic for message in stored(journal)} == {"a.x", "a.y", "b"}


def test_when_the_buffer_is_full_nothing_is_accepted_and_nothing_accepted_is_lost(
    journal: Path, bus: str, stoppable: ForwarderProcess
) -> None:
    with (
        Node("publisher", bus=bus, history_bytes=20_000, buffer_bytes=50_000) as node,
        ThreadPoolExecutor(1) as thread,
    ):
        meet(node, "a")
        stoppable.stop()
        accepted = 1

        def publish_without_end() -> None:
            nonlocal accepted
            while True:
                assert node.publish("a", b"%1000d" % accepted, timeout=0.3) == accepted + 1
                accepted += 1

        with pytest.raises(BufferFull, match="are they running") as caught:
            publish_without_end()
        assert caught.value.topic == "a"
        assert caught.value.waiting > 50_000
        assert 20 < accepted < 200
        start = time.monotonic()
        with pytest.raises(BufferFull):
            node.publish("a", "more", durable=True, timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 2
        assert node.statistics()["messages_unacked"] == accepted - 1
        waiting = on(thread, node.publish, "a", "patient")
        time.sleep(0.2)
        assert not waiting.done()
        stoppable.go_on()
        assert waiting.result(SOON) == accepted + 1
        node.flush(timeout=SOON)
        found = stored(journal, "a")
        assert [message.seq for message in found] == list(range(1, accepted + 2))
        assert found[-1].value == "patient"
        assert node.statistics()["unacked_bytes_pinned"] == 0


@pytest.mark.parametrize("durable", [False, True])
def test_a_full_buffer_keeps_nobody_longer_than_the_timeout(
    bus: str, stoppable: ForwarderProcess, durable: bool
) -> None:
    """Not even the one whose message fills it."""
    with Node("publisher", bus=bus, history_bytes=0, buffer_bytes=0) as node:
        meet(node, "a")
        stoppable.stop()
        start = time.monotonic()
        try:
            assert node.publish("a", "x", durable=durable, timeout=0.3) == 2
        except NotDurable:
            assert durable
        assert time.monotonic() - start < 2
        with pytest.raises(BufferFull):
            node.publish("a", "y", durable=durable, timeout=0.3)
        assert time.monotonic() - start < 4


@in_loop
async def test_a_full_buffer_async(journal: Path, bus: str, stoppable: ForwarderProcess) -> None:
    async with AsyncNode("publisher", bus=bus, history_bytes=20_000, buffer_bytes=50_000) as node:
        await node.publish("a", "first", durable=True, timeout=SOON)
        stoppable.stop()
        accepted = 1

        async def publish_without_end() -> None:
            nonlocal accepted
            while True:
                await node.publish("a", b"%1000d" % accepted, timeout=0.3)
                accepted += 1

        with pytest.raises(BufferFull):
            await publish_without_end()
        assert 20 < accepted < 300
        waiting = asyncio.create_task(node.publish("a", "patient"))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        stoppable.go_on()
        assert await asyncio.wait_for(waiting, SOON) == accepted + 1
        await node.flush(timeout=SOON)
        assert await asyncio.to_thread(seqs, journal, "a", node.origin) == list(range(1, accepted + 2))


def test_what_nobody_claims_does_not_wait_for_room(journal: Path, bus: str) -> None:
    with (
        ForwarderProcess(journal, bus=bus, topics=["a"]) as forwarder,
        Node("publisher", bus=bus, history_bytes=0, buffer_bytes=0) as node,
    ):
        meet(node, "a")
        forwarder.stop()
        node.publish("a", "x", timeout=0.3)
        start = time.monotonic()
        for number in range(1000):
            node.publish("free", number)
            node.publish("free", number, timeout=5)
        assert time.monotonic() - start < 5
        forwarder.go_on()
        node.flush(timeout=SOON)
        assert seqs(journal, "a", node.origin) == [2]  # the first was in no history when the claim came


# --- killed --------------------------------------------------------------------------------------


def test_what_a_killed_forwarder_had_not_acknowledged_comes_to_the_next_once(
    journal: Path, bus: str, stoppable: ForwarderProcess
) -> None:
    with Node("publisher", bus=bus, history_bytes=10_000) as node:
        meet(node, "a", "b")
        stoppable.stop()
        for number in range(300):
            node.publish("a", b"%100d" % number)
            node.publish("b", b"%100d" % number)
        stoppable.kill()
        stoppable.start()
        node.flush(timeout=SOON)
        for topic in ("a", "b"):
            assert seqs(journal, topic, node.origin) == list(range(1, 302))
        assert node.statistics()["messages_unacked"] == 0


def test_killed_again_and_again_while_one_publishes(journal: Path, bus: str, stoppable: ForwarderProcess) -> None:
    """Whatever was acknowledged is there, and everything is there once in the end."""
    acked: list[int] = []
    over = threading.Event()
    with Node("publisher", bus=bus, history_bytes=50_000) as node:
        meet(node, "a")

        def publish() -> None:
            while not over.is_set():
                for _ in range(20):
                    node.publish("a", b"x" * 200)
                with contextlib.suppress(NotDurable):
                    acked.append(node.publish("a", b"d" * 200, durable=True, timeout=0.2))

        publisher = threading.Thread(target=publish)
        publisher.start()
        try:
            for _ in range(4):
                count = len(acked)
                eventually(lambda count=count: len(acked) > count + 20)  # type: ignore[misc]
                stoppable.kill()
                known = list(acked)
                assert set(known) <= set(seqs(journal, "a", node.origin))
                stoppable.start()
        finally:
            over.set()
            publisher.join(20)
        assert not publisher.is_alive()
        node.flush(timeout=SOON)
        assert seqs(journal, "a", node.origin) == list(range(1, node._publishers["a"].sent + 1))


def test_a_forwarder_that_comes_back_with_other_claims_lets_go_of_those_who_wait(
    journal: Path, bus: str, stoppable: ForwarderProcess
) -> None:
    with Node("publisher", bus=bus) as node, ThreadPoolExecutor(1) as thread:
        meet(node, "a")
        stoppable.stop()
        waiting = on(thread, node.publish, "a", "x", durable=True)
        eventually(lambda: bool(node._engine.outlet.ledger.accounts["a"].waiting))
        stoppable.kill()
        with running(journal, bus=bus, topics=["b"]), pytest.raises(NotDurable, match="no longer claims"):
            waiting.result(SOON)


# --- leaving -------------------------------------------------------------------------------------


def test_close_says_what_nobody_has_acknowledged_and_does_not_wait_for_ever(
    bus: str, stoppable: ForwarderProcess
) -> None:
    node = Node("publisher", bus=bus)
    meet(node, "a")
    stoppable.stop()
    for number in range(7):
        node.publish("a", number)
    start = time.monotonic()
    undelivered = node.close(timeout=0.5)
    assert time.monotonic() - start < 4
    assert Undelivered("forwarder", 0, unacked=7) in undelivered


@in_loop
async def test_close_async(bus: str, stoppable: ForwarderProcess) -> None:
    node = AsyncNode("publisher", bus=bus)
    await node.open()
    await node.publish("a", "first", durable=True, timeout=SOON)
    stoppable.stop()
    for number in range(7):
        await node.publish("a", number)
    start = time.monotonic()
    undelivered = await node.close(timeout=0.5)
    assert time.monotonic() - start < 4
    assert Undelivered("forwarder", 0, unacked=7) in undelivered


# --- no room -------------------------------------------------------------------------------------


SMALL = 400_000  # bytes of a journal that is soon full


def make_journal(path: Path) -> None:
    """A small journal in which a cursor at its beginning keeps everything."""
    made = Journal.open(str(path), now_ns=time.time_ns(), retention=Retention(SMALL))
    made.commit_cursors({"slow": Cursor(0)})
    made.close(time.time_ns())


def fill(node: Node) -> None:
    """Publish until there is no room."""

    def publish_without_end() -> None:
        while True:
            node.publish("a", b"x" * 2000, durable=True, timeout=5)

    with pytest.raises(NotDurable, match="no room"):
        publish_without_end()


def flushes(node: Node) -> bool:
    """Whether all that it published is on disk now."""
    try:
        node.flush(timeout=5)
    except NotDurable:
        return False
    return True


def make_room(node: Node, forwarder: Running) -> None:
    """Forget the cursor that keeps everything."""

    async def forget() -> Any:
        link = node._engine.peering.links[forwarder.forwarder.origin]
        answer = await link.question(commands.Commit("slow", 0, forget=True), 5.0)
        return answer and answer.body

    answer = asyncio.run_coroutine_threadsafe(forget(), node._loop).result(SOON)
    assert answer == commands.Commit("slow", 0, forget=True)


def test_a_full_journal_is_told_of_at_once_and_goes_on_when_there_is_room(journal: Path, bus: str) -> None:
    make_journal(journal)
    with (
        running(journal, bus=bus, bytes_max=SMALL) as forwarder,
        Node("publisher", bus=bus) as node,
    ):
        meet(node, "a")
        fill(node)
        start = time.monotonic()
        for _ in range(20):
            with pytest.raises(NotDurable, match="no room"):
                node.publish("a", b"x" * 2000, durable=True)  # without a timeout
        with pytest.raises(NotDurable, match="no room") as caught:
            node.flush()
        assert time.monotonic() - start < 3
        unacked = caught.value.unacked
        assert unacked >= 20
        assert forwarder.statistics()["journal_full"]
        with Node("newcomer", bus=bus) as newcomer:  # who comes now is told as well
            start = time.monotonic()
            with pytest.raises(NotDurable, match="no room"):
                newcomer.publish("b", "x", durable=True, timeout=SOON)
            assert time.monotonic() - start < 5
            make_room(node, forwarder)
            eventually(lambda: flushes(node) and flushes(newcomer))  # the forwarder has to look for room first
            assert node.publish("a", "after", durable=True, timeout=SOON)
            found = seqs(journal, "a", node.origin)
            assert found == list(range(found[0], node._publishers["a"].sent + 1))  # retention has taken the oldest
            assert seqs(journal, "b", newcomer.origin) == [1]
        assert node.statistics()["messages_unacked"] == 0
