"""The outbox: durable without a forwarder, across restarts, and handed over once, under the same ids."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.conftest import meet
from tests.forwarder.forwarders import ForwarderProcess, running, seqs, stored
from zmqbus import AsyncNode, BufferFull, Node, NotDurable, SetupError, Warned
from zmqbus.errors import JournalCorrupt, JournalLocked, JournalUnavailable, NoSpace
from zmqbus.journal import Cursor, Journal
from zmqbus.node.storing import outbox as outbox_module
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command
from zmqbus.protocol.frames import decode_batches

PATIENCE = 20.0


def wait_for(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def node(bus: str, path: Path, **options) -> Node:
    return Node("publisher", bus=bus, outbox=path / "outbox", **options)


def is_empty(path: Path) -> bool:
    """Whether all that is in the outbox has been delivered."""
    journal = Journal.open(str(path / "outbox"), now_ns=time.time_ns())
    try:
        return journal.cursors.all()["delivered"].offset == journal.durable_offset
    finally:
        journal.close(time.time_ns())


def test_durable_without_a_forwarder_is_on_the_local_disk(tmp_path: Path, bus: str) -> None:
    with node(bus, tmp_path) as publisher:
        for number in range(1, 51):
            assert publisher.publish("orders.new", number, durable=True, timeout=PATIENCE) == number
            assert seqs(tmp_path / "outbox", "orders.new", publisher.origin)[-1] == number
        publisher.publish("metrics.cpu", 0.5)
        publisher.flush(PATIENCE)
        assert {message.topic for message in stored(tmp_path / "outbox")} == {"orders.new"}


def test_a_stream_is_kept_whole_from_its_first_durable_message_on(tmp_path: Path, bus: str) -> None:
    with node(bus, tmp_path) as publisher:
        publisher.publish("a", "before")
        publisher.publish("a", "durable", durable=True)
        for number in range(3000):
            publisher.publish("a", number)
        publisher.publish("a", bytes(100_000))  # external
        publisher.publish("a", "h", headers={"k": 1})
        publisher.flush(PATIENCE)
        kept = seqs(tmp_path / "outbox", "a", publisher.origin)
        assert kept == list(range(kept[0], 3005))
        assert kept[0] in (1, 2)  # 1, if both left in one batch


def publish_and_die(path: Path, bus: str, count: int, told: Connection) -> None:
    """In a process: durable messages, and then kill -9."""
    publisher = node(bus, path)
    for number in range(count):
        publisher.publish("orders.new", number, durable=True, timeout=PATIENCE)
        if number % 7 == 0:
            publisher.publish("orders.large", os.urandom(20_000) + b"%d" % number, durable=True, timeout=PATIENCE)
    told.send(publisher.origin)
    os.kill(os.getpid(), signal.SIGKILL)


def lives_and_dies(path: Path, bus: str, count: int) -> int:
    """Origin of a publisher that was killed after `count` durable messages."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=publish_and_die, args=(path, bus, count, theirs))
    process.start()
    assert ours.poll(PATIENCE)
    origin: int = ours.recv()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    return origin


def test_a_later_run_hands_over_what_earlier_ones_left(tmp_path: Path, bus: str) -> None:
    first = lives_and_dies(tmp_path, bus, 100)
    second = lives_and_dies(tmp_path, bus, 30)
    with node(bus, tmp_path) as publisher:
        publisher.publish("orders.new", "third", durable=True, timeout=PATIENCE)
        with running(tmp_path / "journal", bus=bus):
            wait_for(lambda: len(stored(tmp_path / "journal")) == 100 + 15 + 30 + 5 + 1)
            journal = tmp_path / "journal"
            assert seqs(journal, "orders.new", first) == list(range(1, 101))
            assert seqs(journal, "orders.large", first) == list(range(1, 16))
            assert seqs(journal, "orders.new", second) == list(range(1, 31))
            assert seqs(journal, "orders.new", publisher.origin) == [1]
            before = [message.value for message in stored(journal, "orders.new") if message.origin == first]
            assert before == list(range(100))
            wait_for(lambda: publisher.statistics()["outbox_undelivered"] == 0)
    assert is_empty(tmp_path)


def test_what_is_delivered_is_not_offered_again(tmp_path: Path, bus: str) -> None:
    lives_and_dies(tmp_path, bus, 20)
    with running(tmp_path / "journal", bus=bus):
        with node(bus, tmp_path) as publisher:
            wait_for(lambda: len(stored(tmp_path / "journal")) == 23)
            wait_for(lambda: publisher.statistics()["outbox_undelivered"] == 0)
        assert is_empty(tmp_path)
    with running(tmp_path / "other", bus=bus) as other, node(bus, tmp_path) as publisher:
        publisher.publish("orders.new", "next", durable=True)
        publisher.wait_for_peers(1, PATIENCE)
        wait_for(lambda: len(stored(tmp_path / "other")) == 1)
        assert other.statistics()["journal_streams"] == 1


def test_a_forwarder_killed_in_mid_delivery_gets_the_rest_once(tmp_path: Path, bus: str) -> None:
    origin = lives_and_dies(tmp_path, bus, 200)
    with node(bus, tmp_path), ForwarderProcess(tmp_path / "journal", bus=bus) as forwarder:
        for _ in range(3):
            forwarder.kill()
            forwarder.start()
        for topic, count in (("orders.new", 200), ("orders.large", 29)):
            wait_for(lambda topic=topic, count=count: len(seqs(tmp_path / "journal", topic, origin)) >= count)
        assert seqs(tmp_path / "journal", "orders.new", origin) == list(range(1, 201))
        assert seqs(tmp_path / "journal", "orders.large", origin) == list(range(1, 30))


def test_messages_beyond_the_history_come_from_the_disk(tmp_path: Path, bus: str) -> None:
    with node(bus, tmp_path, history_bytes=100_000) as publisher:
        publisher.publish("a", 0, durable=True)
        for number in range(1, 5000):
            publisher.publish("a", b"%d" % number + bytes(200))
        publisher.flush(PATIENCE)
        assert publisher.statistics()["unacked_bytes_pinned"] == 0
        with running(tmp_path / "journal", bus=bus):
            wait_for(lambda: len(stored(tmp_path / "journal")) == 5000)
            assert seqs(tmp_path / "journal", "a", publisher.origin) == list(range(1, 5001))


def test_a_full_outbox_says_so_and_goes_on_when_there_is_room(tmp_path: Path, bus: str) -> None:
    options = {"outbox_bytes": 400_000, "history_bytes": 10_000, "buffer_bytes": 50_000}
    with node(bus, tmp_path, **options) as publisher, publisher.events() as events:
        accepted = 0
        problem: NotDurable | BufferFull | None = None
        while problem is None and accepted < 100:
            try:
                publisher.publish("a", os.urandom(10_000), durable=True, timeout=3.0)
                accepted += 1
            except (NotDurable, BufferFull) as error:
                problem = error
        assert 10 < accepted < 60
        assert "room" in str(problem)
        warned = [event.reason for event in iter(lambda: events.get(0), None) if isinstance(event, Warned)]
        assert any("full" in reason for reason in warned)
        with running(tmp_path / "journal", bus=bus):
            publisher.wait_for_peers(1, PATIENCE)
            publisher.flush(PATIENCE)
            last = publisher.publish("a", "after", durable=True, timeout=PATIENCE)
            wait_for(lambda: seqs(tmp_path / "journal", "a", publisher.origin) == list(range(1, last + 1)))


def test_an_old_acknowledgement_after_a_newer_one(tmp_path: Path, bus: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a forwarder gives it when it is asked by a HEAD that was long under way."""
    with node(bus, tmp_path) as publisher:
        publisher.publish("a", 1, durable=True)
        with running(tmp_path / "journal", bus=bus) as forwarder:
            for number in range(2, 6):
                publisher.publish("a", number)
            wait_for(lambda: publisher.statistics()["outbox_undelivered"] == 0)

            async def tell() -> None:
                link = forwarder.forwarder._engine.peering.links[publisher.origin]
                link.send(commands.Ack(forwarder.forwarder.journal, publisher.origin, [(b"a", 3)]))
                link.send(commands.Ack(forwarder.forwarder.journal, publisher.origin, [(b"b", 7)]))

            forwarder.call(tell())
            heads = publisher._engine._outbox._heads  # type: ignore[union-attr]
            wait_for(lambda: (b"b", publisher.origin) in heads)
            assert heads[b"a", publisher.origin] == {forwarder.forwarder.journal: 5}
    assert caplog.records == []


def test_two_nodes_cannot_have_the_same_outbox(tmp_path: Path, bus: str) -> None:
    with node(bus, tmp_path), pytest.raises(JournalLocked, match=f"in use by process {os.getpid()}"):
        node(bus, tmp_path)
    with node(bus, tmp_path) as again:  # and the failed attempt left nothing open
        again.publish("a", 1, durable=True)


def test_an_outbox_that_cannot_be_used(tmp_path: Path, bus: str) -> None:
    (tmp_path / "outbox").write_text("a file")
    with pytest.raises(JournalUnavailable):
        node(bus, tmp_path)
    with pytest.raises(SetupError, match="outbox_bytes"):
        Node(bus=bus, outbox=tmp_path / "other", outbox_bytes=0)


def test_in_asyncio(tmp_path: Path, bus: str) -> None:
    async def run() -> int:
        async with AsyncNode(bus=bus, outbox=tmp_path / "outbox") as publisher:
            done = await asyncio.gather(
                *(publisher.publish("a", n, durable=True, timeout=PATIENCE) for n in range(500))
            )
            assert done == list(range(1, 501))
            return publisher.origin

    origin = asyncio.run(run())
    assert seqs(tmp_path / "outbox", "a", origin) == list(range(1, 501))


def test_what_was_published_before_the_first_durable_message_is_not_taken_for_acknowledged(
    tmp_path: Path, bus: str
) -> None:
    """The outbox acknowledges it, as it does all that comes before a message it has. So it has to have it."""
    with (
        ForwarderProcess(tmp_path / "journal", bus=bus) as forwarder,
        node(bus, tmp_path, history_bytes=0) as publisher,
    ):
        meet(publisher, "a")
        forwarder.stop()
        for number in range(5):
            publisher.publish("a", number)
        publisher.publish("a", "durable", durable=True, timeout=PATIENCE)
        publisher.flush(PATIENCE)
        assert seqs(tmp_path / "outbox", "a", publisher.origin) == [2, 3, 4, 5, 6, 7]
        forwarder.go_on()
        wait_for(lambda: publisher.statistics()["outbox_undelivered"] == 0)
        journaled = seqs(tmp_path / "journal", "a", publisher.origin)
        assert journaled in ([2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7])  # 1 came before the claim, or just after it


def test_the_disk_does_not_answer_for_what_is_in_memory(tmp_path: Path, bus: str) -> None:
    """What a FETCH is not given, its sender takes for lost."""
    with node(bus, tmp_path, history_bytes=10_000) as publisher, Node("asker", bus=bus) as asker:
        for number in range(50):
            publisher.publish("a", b"%1000d" % number)
            publisher.flush()
        outlet = publisher._engine.outlet
        outlet.claimed(7, ["a"])
        outlet.acked(7, [(b"a", 50)], False)  # so the outbox need not have them
        publisher.publish("a", "durable", durable=True, timeout=PATIENCE)
        assert seqs(tmp_path / "outbox", "a", publisher.origin) == [51]
        in_memory = [first for first, *_ in outlet.publishers["a"].shelf.entries]
        assert 1 < in_memory[0] < 50
        asker.wait_for_peers(1, PATIENCE)

        async def fetch(first: int) -> Command | None:
            link = asker._engine.peering.links[publisher.origin]
            return await link.question(commands.Fetch(b"a", publisher.origin, first, 51), PATIENCE)

        found: list[int] = []
        first = 1
        while first <= 51:
            answer = asyncio.run_coroutine_threadsafe(fetch(first), asker._loop).result(PATIENCE)
            assert answer is not None
            assert isinstance(answer.body, commands.Batches)
            assert answer.body.last >= first
            found += [batch.first for batch in decode_batches(answer.batches)]
            first = answer.body.last + 1
        assert found == in_memory


def test_forwarders_may_be_behind_one_another(tmp_path: Path, bus: str) -> None:
    """What the slower one acknowledges, another has already."""

    async def run() -> None:
        async with AsyncNode(bus=bus, outbox=tmp_path / "outbox") as publisher:
            await publisher.publish("a", 1, durable=True, timeout=PATIENCE)
            outbox = publisher._engine._outbox
            assert outbox is not None
            for journal, seq in ((7, 10), (8, 5), (7, 9), (8, 10)):
                outbox.delivered(journal, publisher.origin, [(b"a", seq), (b"b", seq)])

    asyncio.run(run())


def test_an_outbox_that_was_full_goes_on_behind_what_forwarders_took_meanwhile(tmp_path: Path, bus: str) -> None:
    async def run() -> None:
        async with AsyncNode(bus=bus, outbox=tmp_path / "outbox", history_bytes=0) as publisher:
            await publisher.publish("a", 1, durable=True, timeout=PATIENCE)
            engine = publisher._engine
            outbox, outlet = engine._outbox, engine.outlet
            assert outbox is not None
            outbox._committer.full = True
            outbox._room(True)
            await publisher.publish("a", 2)
            outlet.flush_all()
            outlet.claimed(7, ["a"])
            outlet.acked(7, [(b"a", 2)], False)  # and so it is in no history
            outbox._committer.full = False
            outbox._room(False)
            assert await publisher.publish("a", 3, durable=True, timeout=PATIENCE) == 3
            assert seqs(tmp_path / "outbox", "a", publisher.origin) == [1, 3]

    asyncio.run(run())


def test_an_outbox_without_room_for_its_cursor_tries_again(
    tmp_path: Path, bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with AsyncNode(bus=bus, outbox=tmp_path / "outbox") as publisher:
            await publisher.publish("a", 1, durable=True, timeout=PATIENCE)
            outbox = publisher._engine._outbox
            assert outbox is not None
            commit, tries = outbox._committer.commit_cursors, 0

            async def commit_cursors(cursors: Mapping[str, Cursor | None]) -> None:
                nonlocal tries
                tries += 1
                if tries < 3:
                    raise NoSpace("outbox", "for a test")
                await commit(cursors)

            monkeypatch.setattr(outbox._committer, "commit_cursors", commit_cursors)
            outbox.delivered(7, publisher.origin, [(b"a", 1)])
            async with asyncio.timeout(PATIENCE):
                while publisher.statistics()["outbox_undelivered"]:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_what_is_left_and_cannot_be_read_is_told_of(tmp_path: Path, bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> dict[tuple[bytes, int], int]:
        raise JournalCorrupt("segment", 7, "for a test", 0)

    monkeypatch.setattr(outbox_module, "_leftovers", damaged)

    async def run() -> None:
        async with AsyncNode(bus=bus, outbox=tmp_path / "outbox") as publisher, publisher.events() as events:
            async with asyncio.timeout(PATIENCE):
                async for event in events:
                    if isinstance(event, Warned) and "for a test" in event.reason:
                        break
            await publisher.publish("a", 1, durable=True, timeout=PATIENCE)

    asyncio.run(run())


def test_close_waits_for_the_disk_and_does_not_call_undelivered_what_is_on_it(tmp_path: Path, bus: str) -> None:
    publisher = node(bus, tmp_path)
    publisher.publish("a", 0, durable=True, timeout=PATIENCE)
    for number in range(1, 1000):
        publisher.publish("a", number)
    assert publisher.close(timeout=PATIENCE) == []
    journal = Journal.open(str(tmp_path / "outbox"), now_ns=time.time_ns())
    assert {stream.accepted for stream in journal.known.values()} == {1000}
    journal.close(time.time_ns())


FORGETFUL = """
import sys, zmqbus
node = zmqbus.Node("forgetful", bus=sys.argv[1], outbox=sys.argv[2])
node.publish("a", 0, durable=True)
for number in range(1, 1000):
    node.publish("a", number)
print(node.origin)
"""


def test_a_script_that_just_ends_leaves_everything_on_the_disk(tmp_path: Path, bus: str) -> None:
    program = [sys.executable, "-c", FORGETFUL, bus, str(tmp_path / "outbox")]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert seqs(tmp_path / "outbox", "a", int(ended.stdout)) == list(range(1, 1001))


def test_who_says_hello_while_the_outbox_is_being_opened_is_answered_after_that(
    tmp_path: Path, bus: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its port may have been that of another, whom they still look for."""
    real = outbox_module.Outbox.open
    early: list[AsyncNode] = []

    async def slow(*arguments: Any) -> outbox_module.Outbox:
        endpoint = arguments[3].__self__.peering.endpoints["inbox"]
        early.append(await AsyncNode("early", bus=bus, peers=[endpoint], discovery="static").open())
        await asyncio.sleep(0.3)  # it has dialled, and said HELLO
        return await real(*arguments)

    async def run() -> None:
        monkeypatch.setattr(outbox_module.Outbox, "open", slow)
        try:
            async with AsyncNode(bus=bus, outbox=tmp_path / "outbox", discovery="static") as publisher:
                await publisher.wait_for_peers(1, PATIENCE)
        finally:
            for one in early:
                await one.close()

    asyncio.run(run())
    assert caplog.records == []
