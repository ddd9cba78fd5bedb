"""Reading the log by `subscribe(start=…)` and `subscribe(durable=…)`, against real forwarders: what is promised there."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.node.conftest import drain, eventually
from tests.node.forwarders import Hosted, Spawned
from zmqbus.protocol.streams.reading import WINDOW_BYTES


@pytest.fixture
def reader(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("reader", bus=bus) as node:
        yield node


@pytest.fixture
def writer(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("writer", bus=bus) as node:
        yield node


@pytest.fixture
def forwarder(bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node) -> Iterator[Hosted]:
    """One that both know."""
    with Hosted(tmp_path / "journal", bus=bus, name="store") as hosted:
        known_to(writer, reader)
        yield hosted


def known_to(*nodes: zmqbus.Node, forwarders: int = 1) -> None:
    """Wait until each of them knows so many forwarders."""
    for node in nodes:
        eventually(lambda node=node: sum(bool(peer.journal) for peer in node.peers()) == forwarders)


def publish(node: zmqbus.Node, topic: str, values: Any) -> None:
    """On disk when this returns."""
    for value in values:
        node.publish(topic, value)
    node.flush(20)


def values(subscription: zmqbus.Subscription, count: int) -> list[Any]:
    return [message.value for message in drain(subscription, count)]


def wait_for(events: zmqbus.EventStream, kind: type[Any], count: int = 1) -> list[Any]:
    found: list[Any] = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        event = events.get(max(0.0, deadline - time.monotonic()))
        assert event is not None, f"no {kind.__name__}"
        if isinstance(event, kind):
            found.append(event)
    return found


# --- where it begins -----------------------------------------------------------------------------


def test_from_the_first_message_and_then_what_comes(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a.x", range(5000))
    publish(writer, "b", range(10))
    subscription = reader.subscribe("a.>", start="first")
    messages = drain(subscription, 5000)
    assert [message.value for message in messages] == list(range(5000))
    assert [message.seq for message in messages] == list(range(1, 5001))
    assert [message.offset for message in messages] == list(range(5000))
    assert {(message.topic, message.origin, message.headers) for message in messages} == {("a.x", writer.origin, None)}
    assert subscription.get(0) is None
    writer.publish("a.y", {"late": b"x" * 50_000}, headers={"h": 1})
    late = drain(subscription, 1)[0]
    assert (late.value, late.headers, late.offset) == ({"late": b"x" * 50_000}, {"h": 1}, 5010)
    assert (subscription.lost, subscription.repaired, subscription.gaps) == (0, 0, [])
    assert subscription.patterns == ("a.>",)


def test_from_an_offset_within_a_batch(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(3000))
    assert values(reader.subscribe("a", start=1234), 3) == [1234, 1235, 1236]
    assert reader.subscribe("a", start=3000).get(0.2) is None


def test_from_a_time(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", ["before"])
    middle = datetime.now(UTC)
    publish(writer, "a", ["after"])
    assert values(reader.subscribe("a", start=middle), 1) == ["after"]
    assert values(reader.subscribe("a", start=middle.isoformat()), 1) == ["after"]
    assert values(reader.subscribe("a", start="-1h"), 2) == ["before", "after"]


def test_from_now_on(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", ["before"])
    plain, durable = reader.subscribe("a", start="last"), reader.subscribe("a", durable="name")
    publish(writer, "a", ["after"])
    assert values(plain, 1) == values(durable, 1) == ["after"]


def test_what_cannot_be_asked(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    for more in ({"history": 1}, {"observe": True}):
        for log in ({"start": "first"}, {"durable": "name"}):
            with pytest.raises(zmqbus.SetupError, match="history= and observe= are for live messages"):
                reader.subscribe("a", **more, **log)  # type: ignore[arg-type]
    with pytest.raises(zmqbus.SetupError, match="is not understood"):
        reader.subscribe("a", start="whenever")
    with pytest.raises(zmqbus.SetupError, match="without NUL"):
        reader.subscribe("a", durable="\0")
    with pytest.raises(zmqbus.SetupError, match="on_gap"):
        reader.subscribe("a", start="first", on_gap="cry")  # type: ignore[arg-type]
    with pytest.raises(zmqbus.TopicError):
        reader.subscribe("a..b", start="first")
    with pytest.raises(zmqbus.TopicError):
        reader.subscribe(start="first")
    with pytest.raises(zmqbus.LogUnavailable, match="offset 1,000 is not there yet: the journal ends at 0"):
        reader.subscribe("a", start=1000)
    for subscription in (reader.subscribe("a", start="first"), reader.subscribe("a")):
        with pytest.raises(zmqbus.SetupError, match="no cursor to commit"):
            subscription.commit()
    assert reader.subscribe("a").lag is None
    del subscription
    gc.collect()
    eventually(lambda: reader.statistics()["subscriptions"] == 0)


def test_with_no_forwarder_yet_it_waits_for_one(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    events = reader.events()
    begun = time.monotonic()
    subscription = reader.subscribe("a", "b", durable="name")
    assert time.monotonic() - begun < 2
    assert "nothing to read yet for a b as 'name'" in wait_for(events, zmqbus.Warned)[0].reason
    assert subscription.get(0.05) is None
    assert subscription.lag is None
    with Hosted(tmp_path / "journal", bus=bus, name="store") as hosted:
        wait_for(events, zmqbus.ForwarderUp)
        publish(writer, "a", range(10))  # perhaps before it is read: it was published after `subscribe`, and is owed
        assert values(subscription, 10) == list(range(10))
        subscription.commit(10)
        assert hosted.cursors() == {"name": 10}
    assert wait_for(events, zmqbus.ForwarderDown)[0].peer.name == "store"


# --- durable names, and what is committed ----------------------------------------------------------


def test_it_goes_on_where_it_left_off(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(2000))
    with reader.subscribe("a", durable="name", start="first") as subscription:
        assert values(subscription, 777) == list(range(777))
    assert forwarder.cursors() == {"name": 777}
    with reader.subscribe("a", durable="name", start="first") as subscription:  # `start` is for the first time only
        assert values(subscription, 1) == [777]
    subscription.close()  # twice
    assert forwarder.cursors() == {"name": 778}
    with pytest.raises(zmqbus.NodeClosed):
        subscription.get(0)


def test_after_an_exception_the_last_message_comes_again(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(2000))
    with pytest.raises(RuntimeError), reader.subscribe("a", durable="name", start="first") as subscription:
        for message in subscription:
            if message.value == 500:
                raise RuntimeError
    assert forwarder.cursors() == {"name": 500}
    assert values(reader.subscribe("a", durable="name"), 1) == [500]


@pytest.mark.parametrize("last", [0, 1, 300, 1999])
def test_left_by_break_and_collected_it_commits_all_but_the_last(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node, last: int
) -> None:
    publish(writer, "a", range(2000))
    for message in reader.subscribe("a", durable="name", start="first"):
        if message.value == last:
            break
    gc.collect()
    eventually(lambda: reader.statistics()["subscriptions"] == 0)
    assert forwarder.cursors() == {"name": last}


def test_commit_is_exact_and_takes_the_last_message_as_dealt_with(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(1000))
    subscription = reader.subscribe("a", durable="name", start="first")
    for count in (0, 1, 2, 500, 1000):
        drain(subscription, count - forwarder.cursors()["name"])
        subscription.commit(10)
        assert forwarder.cursors() == {"name": count}
    assert subscription.lag == 0


def test_it_commits_by_itself_while_it_consumes(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(300))
    subscription = reader.subscribe("a", durable="name", start="first")
    drain(subscription, 200)
    eventually(lambda: forwarder.cursors() == {"name": 199}, 5)  # the last has not been dealt with
    assert subscription.get() is not None
    eventually(lambda: forwarder.cursors() == {"name": 200}, 5)


def test_what_is_passed_over_is_committed_too(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    subscription = reader.subscribe("wanted", durable="name", start="first")
    publish(writer, "other", range(500))
    assert subscription.get(0.1) is None
    eventually(lambda: subscription.get(0.05) is None and forwarder.cursors() == {"name": 500}, 10)


def test_closing_the_node_ends_the_iteration_and_commits(bus: str, forwarder: Hosted, writer: zmqbus.Node) -> None:
    publish(writer, "a", range(10))
    node = zmqbus.Node("other", bus=bus)
    known_to(node)
    subscription = node.subscribe("a", durable="name", start="first")
    seen: list[int] = []

    def consume() -> None:
        seen.extend(message.value for message in subscription)

    thread = threading.Thread(target=consume)
    thread.start()
    eventually(lambda: len(seen) == 10)
    node.close()
    thread.join(10)
    assert not thread.is_alive()
    assert forwarder.cursors() == {"name": 10}  # the thread had asked for the next
    with pytest.raises(zmqbus.NodeClosed):
        subscription.get(0)
    with pytest.raises(zmqbus.NodeClosed):
        subscription.commit()


CONSUMER = """
import sys, time, zmqbus
bus, name, out = sys.argv[1:]
with zmqbus.Node("consumer", bus=bus) as node, open(out, "ab", buffering=0) as notes:
    for message in node.subscribe("a", durable=name, start="first"):
        notes.write(b"%d\\n" % message.value)
        if message.value % 20 == 0:
            time.sleep(0.001)  # so that there is something left after some commits
"""


def test_a_consumer_that_is_killed_loses_nothing(
    bus: str, tmp_path: Path, forwarder: Hosted, writer: zmqbus.Node
) -> None:
    """At least once: what was not committed comes again, and only that."""
    notes = tmp_path / "notes"
    notes.touch()
    count, kills = 60_000, 3
    publish(writer, "a", range(count))
    starts: list[int] = []
    for life in range(kills + 1):
        before = len(notes.read_text().split())
        starts.append(before)
        process = subprocess.Popen([sys.executable, "-c", CONSUMER, bus, "name", str(notes)])
        try:
            if life < kills:
                committed = forwarder.cursors().get("name", 0)
                eventually(lambda b=before: len(notes.read_text().split()) > b + 100)
                if life == 1:  # once after a commit
                    eventually(lambda c=committed: forwarder.cursors()["name"] > c)
            else:
                eventually(lambda: notes.read_text().endswith(f"{count - 1}\n"))
        finally:
            process.kill()
            process.wait(30)
        cursor = forwarder.cursors()["name"]
        seen = [int(line) for line in notes.read_text().split()]
        assert set(range(cursor)) <= set(seen), "committed, and never handed out"
    for start, end in zip(starts, [*starts[1:], len(seen)], strict=True):
        life_seen = seen[start:end]
        assert life_seen == list(range(life_seen[0], life_seen[0] + len(life_seen))), "in order, without a hole"
    assert set(seen) == set(range(count))


def test_a_second_consumer_takes_over(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(2000))
    first = writer.subscribe("a", durable="name", start="first")
    assert values(first, 50) == list(range(50))
    first.commit(10)
    assert values(first, 10) == list(range(50, 60))
    second = reader.subscribe("a", durable="name")
    assert values(second, 100) == list(range(50, 150))
    with pytest.raises(zmqbus.SubscriptionTaken, match="another consumer reads as 'name' now") as taken:
        for message in first:
            assert message.value < 2000  # what was decoded already
    assert taken.value.name == "name"
    with pytest.raises(zmqbus.SubscriptionTaken):
        first.get(0)
    with pytest.raises(zmqbus.SubscriptionTaken):
        first.commit(10)
    first.close()
    second.commit(10)
    assert forwarder.cursors() == {"name": 150}
    waiting = threading.Thread(target=lambda: pytest.raises(zmqbus.SubscriptionTaken, list, second))
    drain(second, 1850)
    waiting.start()
    third = reader.subscribe("a", durable="name")
    waiting.join(10)
    assert not waiting.is_alive()
    third.close()


def test_threads_that_share_one_hold_back_what_they_are_at_work_on(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(3000))
    subscription = reader.subscribe("a", durable="name", start="first")
    taken, resume = threading.Event(), threading.Event()
    by_slow: list[int] = []
    rest: list[list[int]] = [[], []]

    def slow() -> None:
        for message in subscription:
            by_slow.append(message.value)
            taken.set()
            if not resume.is_set():
                resume.wait(30)

    def quick(mine: list[int]) -> None:
        for message in subscription:
            mine.append(message.value)

    threads = [threading.Thread(target=slow), *(threading.Thread(target=quick, args=(mine,)) for mine in rest)]
    threads[0].start()
    assert taken.wait(10)
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: sum(map(len, rest)) == 2999)
    subscription.commit(10)
    assert forwarder.cursors() == {"name": by_slow[0]} == {"name": 0}
    resume.set()
    eventually(lambda: forwarder.cursors() == {"name": 3000}, 10)  # all have asked for the next
    subscription.close()
    for thread in threads:
        thread.join(10)
    assert sorted([*by_slow, *rest[0], *rest[1]]) == list(range(3000))


def test_who_only_looked_first_hands_on_what_was_decoded(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(1000))
    subscription = reader.subscribe("a", durable="name", start="first")
    assert drain(subscription, 1)[0].value == 0  # by this thread
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.extend(message.value for message in subscription))
    thread.start()
    eventually(lambda: len(seen) == 999)
    assert seen == list(range(1, 1000))
    subscription.commit(10)  # by this thread: its message is dealt with
    assert forwarder.cursors() == {"name": 1000}
    subscription.close()
    thread.join(10)


# --- forwarders come and go -------------------------------------------------------------------------


def test_a_forwarder_is_killed_and_comes_back(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    """Within one subscription nothing comes twice and nothing is missing, with a cursor or without one."""
    events = reader.events()
    with Spawned(tmp_path / "journal", bus=bus, name="store") as store:
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
    with Spawned(tmp_path / "journal", bus=bus, name="store") as store:
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


@pytest.mark.parametrize("forgets", ["reading", "node"])
def test_a_reading_that_the_forwarder_knows_no_more_is_asked_for_again(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node, forgets: str
) -> None:
    """As after a broken connection, of which nobody tells."""
    publish(writer, "a", range(10))
    subscription = reader.subscribe("a", durable="name", start="first")
    assert values(subscription, 10) == list(range(10))
    store = forwarder.forwarder
    if forgets == "reading":
        forwarder.call(lambda: [store._readings._end(one) for one in list(store._readings._readings.values())])
    else:
        forwarder.call(store._engine.peering._guests.clear)
        forwarder.call(lambda: [store._readings._end(one) for one in list(store._readings._readings.values())])
    publish(writer, "a", range(10, 20))
    assert values(subscription, 10) == list(range(10, 20))
    subscription.commit(10)
    assert forwarder.cursors() == {"name": 20}


@pytest.fixture
def two(bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node) -> Iterator[tuple[Hosted, Hosted]]:
    """Both claim b.>."""
    with (
        Hosted(tmp_path / "one", bus=bus, name="one", topics=["a.>", "b.>"]) as one,
        Hosted(tmp_path / "two", bus=bus, name="two", topics=["b.>", "c.>"]) as other,
    ):
        known_to(writer, reader, forwarders=2)
        yield one, other


def test_two_forwarders_with_overlapping_claims(
    bus: str, two: tuple[Hosted, Hosted], writer: zmqbus.Node, reader: zmqbus.Node
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
    assert [hosted.cursors() for hosted in two] == [{"name": 4001}, {"name": 4001}]


def test_a_forwarder_that_has_only_the_end_takes_nothing_away(bus: str, tmp_path: Path, reader: zmqbus.Node) -> None:
    """The one that came later may be read first: what comes late from the other comes all the same."""
    with zmqbus.Node("writer", bus=bus, history_bytes=0) as writer:
        with Hosted(tmp_path / "one", bus=bus, name="one") as one:
            known_to(writer, reader)
            publish(writer, "a", range(3000))
            with Hosted(tmp_path / "two", bus=bus, name="two") as two:
                known_to(writer, reader, forwarders=2)
                writer.wait_for_subscribers("a", 2, 10)
                publish(writer, "a", range(3000, 4000))
                eventually(lambda: two.store.durable_offset >= 1000)
                eventually(lambda: one.store.durable_offset == 4000)
                subscription = reader.subscribe("a", start="first")
                assert sorted(values(subscription, 4000)) == list(range(4000))
                assert subscription.get(0.5) is None
                assert subscription.lost == 0


# --- losses ---------------------------------------------------------------------------------------------


def segments(hosted: Hosted) -> list[Path]:
    return sorted(Path(hosted.forwarder.path).glob("*.zbj"))


def drop_oldest(hosted: Hosted, bytes_max: int) -> int:
    """Retention comes by. Returns the first offset that is left."""

    def drop() -> int:
        journal = hosted.store
        journal._retention = journal._retention._replace(bytes_max=bytes_max, drop_oldest=True)
        journal.delete(journal.retire(time.time_ns()))
        journal._retention = journal._retention._replace(bytes_max=None)
        return int(journal.first_offset)

    return int(hosted.call(drop))


@pytest.mark.parametrize("on_gap", ["skip", "raise"])
def test_retention_that_is_quicker_is_reported(
    bus: str, tmp_path: Path, writer: zmqbus.Node, reader: zmqbus.Node, on_gap: Any
) -> None:
    events = reader.events()
    with Hosted(tmp_path / "journal", bus=bus, name="store", segment_bytes=1 << 20) as store:
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
        assert store.cursors() == {"name": left}


def test_a_damaged_journal_is_an_error_and_nothing_is_skipped(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
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
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
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
                    assert forwarder.cursors() == {"name": 24}
    assert got == [100 * batch + n if n != 7 else 10 * batch + 8 for batch in range(3) for n in range(10)]
    assert forwarder.cursors() == {"name": 30}


# --- how far it is -----------------------------------------------------------------------------------------


def test_lag_and_caught_up(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
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
    publish(writer, "a", [blob] * 100)
    drain(subscription, 100)
    assert subscription.get(0.05) is None
    assert [event.offset for event in wait_for(events, zmqbus.CaughtUp)] == [4600]


def test_what_is_read_ahead_is_bounded_and_the_end_is_known_nevertheless(
    forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node
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


def test_a_value_larger_than_the_window(forwarder: Hosted, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
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


def test_a_forked_child_is_told(bus: str, forwarder: Hosted, writer: zmqbus.Node) -> None:
    publish(writer, "a", range(10))
    done = subprocess.run([sys.executable, "-c", FORKER, bus], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [0, 1]
    assert forwarder.cursors() == {"name": 1}
