"""Reading the log while forwarders come, go, lose something and are full: nothing twice, nothing skipped in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.forwarder.forwarders import ForwarderProcess, Running, running
from tests.node.conftest import cursors, drain, eventually, known_to, on_loop, publish, values, wait_for
from zmqbus.forwarder.readings import Readings
from zmqbus.journal import Journal
from zmqbus.net.sockets import SocketFactory
from zmqbus.protocol.streams.reading import WINDOW_BYTES

# --- forwarders come and go -------------------------------------------------------------------------


def test_a_forwarder_is_killed_and_comes_back(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    """Within one subscription nothing comes twice and nothing is missing, with a cursor or without one."""
    events = reader.events()
    with ForwarderProcess(tmp_path / "journal", bus=bus, name="store") as store:
        known_to(writer, reader)
        plain = reader.subscribe("a", start="first")
        durable = reader.subscribe("a", durable="name", start="first")
        seen: list[list[int]] = [[], []]
        published = 0
        for _ in range(3):
            publish(writer, "a", range(published, published + 20_000))
            published += 20_000
            for subscription, mine in zip((plain, durable), seen, strict=True):
                mine += values(subscription, 5000)
            store.kill()
            for number in range(published, published + 100):
                writer.publish("a", number)
            published += 100
            store.start()
            writer.flush(30)
        for subscription, mine in zip((plain, durable), seen, strict=True):
            mine += values(subscription, published - len(mine))
            assert mine == list(range(published))
            assert (subscription.lost, subscription.get(0)) == (0, None)
        durable.commit(10)
        store.kill()  # what was committed is on disk
        store.start()
        durable.close()
        known_to(reader)
        publish(writer, "a", ["after"])
        assert values(reader.subscribe("a", durable="name"), 1) == ["after"]
        wait_for(events, zmqbus.ForwarderDown, 3)


def test_a_commit_waits_for_a_forwarder_that_is_away(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    with ForwarderProcess(tmp_path / "journal", bus=bus, name="store") as store:
        known_to(writer, reader)
        publish(writer, "a", range(100))
        subscription = reader.subscribe("a", durable="name", start="first")
        drain(subscription, 50)
        store.kill()
        with pytest.raises(zmqbus.WaitTimeout, match="for 1 cursor"):
            subscription.commit(0.5)
        store.start()
        subscription.commit(20)
        subscription.close()
        assert values(reader.subscribe("a", durable="name"), 1) == [50]


def test_what_comes_off_the_disk_when_the_forwarder_has_left(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nobody to send it to, and that is no error."""
    problems: list[Any] = []
    begun, left = threading.Event(), threading.Event()
    load, shut = Readings._load, SocketFactory.close

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert left.wait(20)
        return load(*arguments)

    def close(factory: SocketFactory) -> None:
        left.set()
        time.sleep(0.2)  # as if there were something to linger for
        shut(factory)

    forwarder._loop.set_exception_handler(lambda loop, context: problems.append(context))
    publish(writer, "a", range(10))
    monkeypatch.setattr(Readings, "_load", slow)
    subscription = reader.subscribe("a", start="first")
    assert begun.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(SocketFactory, "close", close)
        forwarder.close()
    assert problems == []
    assert subscription.get(0) is None


@pytest.mark.parametrize("forgets", ["reading", "node"])
def test_a_reading_that_the_forwarder_knows_no_more_is_asked_for_again(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node, forgets: str
) -> None:
    """As after a broken connection, of which nobody tells."""
    publish(writer, "a", range(10))
    subscription = reader.subscribe("a", durable="name", start="first")
    assert values(subscription, 10) == list(range(10))
    store = forwarder.forwarder
    if forgets == "reading":
        on_loop(forwarder, lambda: [store._readings._end(one) for one in list(store._readings._readings.values())])
    else:
        on_loop(forwarder, store._engine.peering._guests.clear)
        on_loop(forwarder, lambda: [store._readings._end(one) for one in list(store._readings._readings.values())])
    publish(writer, "a", range(10, 20))
    assert values(subscription, 10) == list(range(10, 20))
    subscription.commit(10)
    assert cursors(forwarder) == {"name": 20}


@pytest.fixture
def two(bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node) -> Iterator[tuple[Running, Running]]:
    """Both claim b.>."""
    with (
        running(tmp_path / "one", bus=bus, name="one", topics=["a.>", "b.>"]) as one,
        running(tmp_path / "two", bus=bus, name="two", topics=["b.>", "c.>"]) as other,
    ):
        known_to(writer, reader, forwarders=2)
        yield one, other


def test_two_forwarders_with_overlapping_claims(
    bus: str, two: tuple[Running, Running], writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    for round_ in range(2):
        for topic in ("a.x", "b.x", "c.x"):
            publish(writer, topic, range(1000 * round_, 1000 * round_ + 1000))
    subscription = reader.subscribe(">", durable="name", start="first")
    by_topic: dict[str, list[int]] = {"a.x": [], "b.x": [], "c.x": []}
    for message in drain(subscription, 6000):
        by_topic[message.topic].append(message.value)
    assert all(sorted(found) == list(range(2000)) for found in by_topic.values())
    assert by_topic["a.x"] == by_topic["c.x"] == list(range(2000))
    eventually(lambda: subscription.get(0.05) is None and subscription.lag == 0)
    assert subscription.lost == 0
    publish(writer, "b.x", ["once"])
    assert values(subscription, 1) == ["once"]
    assert subscription.get(1) is None
    subscription.commit(10)
    eventually(lambda: [cursors(hosted) for hosted in two] == [{"name": 4001}, {"name": 4001}])


def test_a_forwarder_that_has_only_the_end_takes_nothing_away(bus: str, tmp_path: Path, reader: zmqbus.Node) -> None:
    """The one that came later may be read first: what comes late from the other comes all the same."""
    with (
        zmqbus.Node("writer", bus=bus, history_bytes=0) as writer,
        running(tmp_path / "one", bus=bus, name="one") as one,
    ):
        known_to(writer, reader)
        publish(writer, "a", range(3000))
        with running(tmp_path / "two", bus=bus, name="two") as two:
            known_to(writer, reader, forwarders=2)
            writer.wait_for_subscribers("a", 2, 10)
            publish(writer, "a", range(3000, 4000))
            eventually(lambda: two.forwarder._store.durable_offset >= 1000)
            eventually(lambda: one.forwarder._store.durable_offset == 4000)
            subscription = reader.subscribe("a", start="first")
            assert sorted(values(subscription, 4000)) == list(range(4000))
            assert subscription.get(0.5) is None
            assert subscription.lost == 0


# --- losses ---------------------------------------------------------------------------------------------


def segments(store: Running) -> list[Path]:
    return sorted(store.path.glob("*.zbj"))


def drop_oldest(store: Running, bytes_max: int) -> int:
    """Retention comes by. Returns the first offset that is left."""

    def drop() -> int:
        journal = store.forwarder._store
        journal._retention = journal._retention._replace(bytes_max=bytes_max, drop_oldest=True)
        journal.delete(journal.retire(time.time_ns()))
        journal._retention = journal._retention._replace(bytes_max=None)
        return int(journal.first_offset)

    return int(on_loop(store, drop))


@pytest.mark.parametrize("on_gap", ["skip", "raise"])
def test_retention_that_is_quicker_is_reported(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node, on_gap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = reader.events()
    monkeypatch.setattr(Journal, "open", partial(Journal.open, segment_bytes=1 << 20))
    with running(tmp_path / "journal", bus=bus, name="store") as store:
        known_to(writer, reader)
        blob = b"x" * 1000
        for _ in range(30):
            publish(writer, "a", [blob] * 1000)
        assert len(segments(store)) > 20
        subscription = reader.subscribe("a", start="first", on_gap=on_gap)  # the window is 8 MiB: it stops there
        first = drain(subscription, 1)
        eventually(lambda: len(first) == 1 and subscription._replay.readings[0].next > 7000)  # type: ignore[attr-defined]
        left = drop_oldest(store, bytes_max=5 << 20)
        assert left > 15_000
        seqs = [first[0].seq]
        gaps: list[zmqbus.GapError] = []
        while seqs[-1] < 30_000:
            try:
                message = subscription.get(20)
            except zmqbus.LogGapError as gap:
                gaps.append(gap)
            else:
                assert message is not None
                seqs.append(message.seq)
        told = wait_for(events, zmqbus.LogGap)
        assert told[0].forwarder == "store"
        missing = sum(gap.count for gap in told)
        assert len(seqs) + missing == 30_000
        assert subscription.lost == missing
        behind = next(before for before, after in pairwise(seqs) if after != before + 1)  # the seq is one more
        assert (told[0].first, told[0].last) == (behind, left - 1)
        assert subscription.gaps == []  # one loss is told once
        assert [(gap.first, gap.last) for gap in gaps] == ([(told[0].first, told[0].last)] if on_gap == "raise" else [])
        # Who begins with the first message there is has lost nothing.
        fresh = reader.subscribe("a", start="first", durable="name")
        assert drain(fresh, 1)[0].offset == left
        assert fresh.lost == 0
        assert cursors(store) == {"name": left}


def test_a_damaged_journal_is_an_error_and_nothing_is_skipped(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", ["good"])
    publish(writer, "a", ["MARK" * 10])
    publish(writer, "a", ["behind"])
    (segment,) = segments(forwarder)
    with segment.open("r+b") as file:
        at = file.read().index(b"MARK")
        file.seek(at)
        file.write(b"mark")
    subscription = reader.subscribe("a", durable="name", start="first")
    assert values(subscription, 1) == ["good"]
    for _ in range(2):
        with pytest.raises(zmqbus.LogUnavailable, match="damaged") as damaged:
            subscription.get(20)
    assert (damaged.value.forwarder, damaged.value.code) == ("store", "corrupt")
    with pytest.raises(zmqbus.LogUnavailable):
        list(subscription)
    subscription.close()
    with pytest.raises(zmqbus.NodeClosed):
        subscription.get()


def test_values_that_do_not_fit_raise_in_their_place(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    for batch in range(3):
        publish(writer, "a", [100 * batch + n if n != 7 else "seven" for n in range(10)])
    with reader.subscribe("a", type=int, durable="name", start="first") as subscription:
        got: list[Any] = []
        while len(got) < 30:
            try:
                message = subscription.get(20)
            except zmqbus.DecodeError as error:
                got.append(error.seq)
            else:
                assert message is not None
                got.append(message.value)
                if message.value == 203:
                    subscription.commit(10)
                    assert cursors(forwarder) == {"name": 24}
    assert got == [100 * batch + n if n != 7 else 10 * batch + 8 for batch in range(3) for n in range(10)]
    assert cursors(forwarder) == {"name": 30}


# --- how far it is -----------------------------------------------------------------------------------------


def test_lag_and_caught_up(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(2500))
    events = reader.events()
    subscription = reader.subscribe("a", start="first")
    eventually(lambda: subscription.lag == 2500)
    drain(subscription, 1000)
    assert subscription.lag == 1500
    drain(subscription, 1500)
    assert subscription.lag == 0
    assert subscription.get(0) is None
    caught_up = wait_for(events, zmqbus.CaughtUp)[0]
    assert (caught_up.forwarder, caught_up.journal, caught_up.offset) == ("store", forwarder.forwarder.journal, 2500)
    publish(writer, "a", range(2000))  # a small batch is no news
    drain(subscription, 2000)
    assert subscription.get(0.05) is None
    blob = b"x" * 100_000
    publish(writer, "a", [blob] * 300)  # it reads a window of it ahead, and may be at the end of then: more is to come
    drain(subscription, 300)
    assert subscription.get(0.05) is None
    assert [event.offset for event in wait_for(events, zmqbus.CaughtUp)] == [4800]


def test_what_is_read_ahead_is_bounded_and_the_end_is_known_nevertheless(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    blob = b"x" * 10_000
    publish(writer, "a", [blob] * 4000)
    subscription = reader.subscribe("a", start="first")
    eventually(lambda: ahead(subscription) >= WINDOW_BYTES)
    publish(writer, "b", range(1000))  # not wanted, and the reading has no credit
    eventually(lambda: subscription.lag == 5000, 10)
    assert ahead(subscription) < WINDOW_BYTES + 3 * 1024 * 1024
    assert len(drain(subscription, 4000)) == 4000
    assert ahead(subscription) < 2 * 1024 * 1024


def ahead(subscription: zmqbus.Subscription) -> int:
    reading = subscription._replay.readings[0]  # type: ignore[attr-defined]
    return int(reading.received_bytes - reading.consumed_bytes)


def test_a_value_larger_than_the_window(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    large = os.urandom(WINDOW_BYTES + 1_000_000)
    publish(writer, "a", [large, "small", large])
    assert values(reader.subscribe("a", start="first"), 3) == [large, "small", large]


# --- processes -----------------------------------------------------------------------------------------------

FORKER = """
import json, os, sys, zmqbus
with zmqbus.Node("forker", bus=sys.argv[1]) as node:
    node.wait_for_peers(1, 10)
    subscription = node.subscribe("a", durable="name", start="first")
    subscription.get(20)
    child = os.fork()
    if not child:
        told = []
        for use in (lambda: subscription.get(0), lambda: next(iter(subscription)), subscription.commit):
            try:
                use()
            except zmqbus.ForkedProcess:
                told.append(True)
        subscription.close()
        os._exit(0 if told == [True] * 3 else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    subscription.commit(10)
    print(json.dumps([code, subscription.get(20).value]))
"""


def test_a_forked_child_is_told(bus: str, forwarder: Running, writer: zmqbus.Node) -> None:
    publish(writer, "a", range(10))
    done = subprocess.run([sys.executable, "-c", FORKER, bus], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [0, 1]
    assert cursors(forwarder) == {"name": 1}


def test_who_is_gone_reads_no_more(forwarder: Running, writer: zmqbus.Node, bus: str) -> None:
    """Its cursor is nobody's then: it may be forgotten, and status does not say that somebody reads."""

    def held() -> dict[str, bool]:
        async def ask() -> dict[str, bool]:
            return {name: is_read for name, _, is_read in forwarder.forwarder.cursors()}

        return forwarder.call(ask())

    with zmqbus.Node("leaves", bus=bus) as node:
        known_to(node)
        subscription = node.subscribe("a", durable="left")
        assert held() == {"left": True}, subscription  # which would close itself if nothing referred to it
    eventually(lambda: held() == {"left": False})
    program = (
        "import sys, zmqbus\n"
        f"node = zmqbus.Node('killed', bus={bus!r})\n"
        "node.wait_for_peers(2, 20)\n"
        "subscription = node.subscribe('a', durable='killed')\n"
        "print('reading', flush=True)\n"
        "subscription.get(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        eventually(lambda: held() == {"left": False, "killed": True})
        process.kill()
    eventually(lambda: held() == {"left": False, "killed": False})
