"""Reading the log by `subscribe(start=…)` and `subscribe(durable=…)`, against real forwarders."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

import zmqbus
from tests.forwarder.forwarders import Running, running
from tests.node.conftest import cursors, drain, eventually, known_to, publish, values, wait_for

# --- where it begins -----------------------------------------------------------------------------


def test_from_the_first_message_and_then_what_comes(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
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


def test_from_an_offset_within_a_batch(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(3000))
    assert values(reader.subscribe("a", start=1234), 3) == [1234, 1235, 1236]
    assert reader.subscribe("a", start=3000).get(0.2) is None


def test_from_a_time(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", ["before"])
    middle = datetime.now(UTC)
    publish(writer, "a", ["after"])
    assert values(reader.subscribe("a", start=middle), 1) == ["after"]
    assert values(reader.subscribe("a", start=middle.isoformat()), 1) == ["after"]
    assert values(reader.subscribe("a", start="-1h"), 2) == ["before", "after"]


def test_from_now_on(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", ["before"])
    plain, durable = reader.subscribe("a", start="last"), reader.subscribe("a", durable="name")
    publish(writer, "a", ["after"])
    assert values(plain, 1) == values(durable, 1) == ["after"]


def test_what_cannot_be_asked(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
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
    with running(tmp_path / "journal", bus=bus, name="store") as hosted:
        wait_for(events, zmqbus.ForwarderUp)
        publish(writer, "a", range(10))  # perhaps before it is read: it was published after `subscribe`, and is owed
        assert values(subscription, 10) == list(range(10))
        subscription.commit(10)
        assert cursors(hosted) == {"name": 10}
    assert wait_for(events, zmqbus.ForwarderDown)[0].peer.name == "store"


# --- durable names, and what is committed ----------------------------------------------------------


def test_it_goes_on_where_it_left_off(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(2000))
    with reader.subscribe("a", durable="name", start="first") as subscription:
        assert values(subscription, 777) == list(range(777))
    assert cursors(forwarder) == {"name": 777}
    with reader.subscribe("a", durable="name", start="first") as subscription:  # `start` is for the first time only
        assert values(subscription, 1) == [777]
    subscription.close()  # twice
    assert cursors(forwarder) == {"name": 778}
    with pytest.raises(zmqbus.NodeClosed):
        subscription.get(0)


def test_after_an_exception_the_last_message_comes_again(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(2000))

    def consume() -> None:
        with reader.subscribe("a", durable="name", start="first") as subscription:
            for message in subscription:
                if message.value == 500:
                    raise RuntimeError

    with pytest.raises(RuntimeError):
        consume()
    assert cursors(forwarder) == {"name": 500}
    assert values(reader.subscribe("a", durable="name"), 1) == [500]


@pytest.mark.parametrize("last", [0, 1, 300, 1999])
def test_left_by_break_and_collected_it_commits_all_but_the_last(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node, last: int
) -> None:
    publish(writer, "a", range(2000))
    for message in reader.subscribe("a", durable="name", start="first"):
        if message.value == last:
            break
    gc.collect()
    eventually(lambda: reader.statistics()["subscriptions"] == 0)
    assert cursors(forwarder) == {"name": last}


def test_commit_is_exact_and_takes_the_last_message_as_dealt_with(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
) -> None:
    publish(writer, "a", range(1000))
    subscription = reader.subscribe("a", durable="name", start="first")
    for count in (0, 1, 2, 500, 1000):
        drain(subscription, count - cursors(forwarder)["name"])
        subscription.commit(10)
        assert cursors(forwarder) == {"name": count}
    assert subscription.lag == 0


def test_it_says_where_it_is(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(1000))
    [store] = [peer for peer in reader.peers() if peer.journal]

    def at(following: int, dealt: int) -> list[zmqbus.Position]:
        return [zmqbus.Position(store.name, store.journal, 10, following, dealt, 1000)]

    with reader.subscribe("a", durable="name", start=10) as subscription:
        assert subscription.positions == at(10, 10)
        drain(subscription, 300)
        assert subscription.positions == at(310, 309)  # the last has not been dealt with
        subscription.commit(10)
        assert subscription.positions == at(310, 310)
        drain(subscription, 690)
        assert subscription.positions == at(1000, 999)
    assert reader.subscribe("a").positions == []


def test_it_commits_by_itself_while_it_consumes(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(300))
    subscription = reader.subscribe("a", durable="name", start="first")
    drain(subscription, 200)
    eventually(lambda: cursors(forwarder) == {"name": 199}, 5)  # the last has not been dealt with
    assert subscription.get() is not None
    eventually(lambda: cursors(forwarder) == {"name": 200}, 5)


def test_what_is_passed_over_is_committed_too(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    subscription = reader.subscribe("wanted", durable="name", start="first")
    publish(writer, "other", range(500))
    assert subscription.get(0.1) is None
    eventually(lambda: subscription.get(0.05) is None and cursors(forwarder) == {"name": 500}, 10)


def test_closing_the_node_ends_the_iteration_and_commits(bus: str, forwarder: Running, writer: zmqbus.Node) -> None:
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
    assert cursors(forwarder) == {"name": 10}  # the thread had asked for the next
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
    bus: str, tmp_path: Path, forwarder: Running, writer: zmqbus.Node
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
                committed = cursors(forwarder).get("name", 0)
                eventually(lambda b=before: len(notes.read_text().split()) > b + 100)
                if life == 1:  # once after a commit
                    eventually(lambda c=committed: cursors(forwarder)["name"] > c)
            else:
                eventually(lambda: notes.read_text().endswith(f"{count - 1}\n"))
        finally:
            process.kill()
            process.wait(30)
        cursor = cursors(forwarder)["name"]
        seen = [int(line) for line in notes.read_text().split()]
        assert set(range(cursor)) <= set(seen), "committed, and never handed out"
    for start, end in zip(starts, [*starts[1:], len(seen)], strict=True):
        life_seen = seen[start:end]
        assert life_seen == list(range(life_seen[0], life_seen[0] + len(life_seen))), "in order, without a hole"
    assert set(seen) == set(range(count))


def test_a_second_consumer_takes_over(forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node) -> None:
    publish(writer, "a", range(2000))
    first = writer.subscribe("a", durable="name", start="first")
    assert values(first, 50) == list(range(50))
    first.commit(10)
    assert values(first, 10) == list(range(50, 60))
    second = reader.subscribe("a", durable="name")
    assert values(second, 100) == list(range(50, 150))
    with pytest.raises(zmqbus.SubscriptionTaken, match="another consumer reads as 'name' now") as taken:
        list(first)  # of what was decoded already there may be some
    assert taken.value.name == "name"
    with pytest.raises(zmqbus.SubscriptionTaken):
        first.get(0)
    with pytest.raises(zmqbus.SubscriptionTaken):
        first.commit(10)
    first.close()
    second.commit(10)
    assert cursors(forwarder) == {"name": 150}
    drain(second, 1850)
    told: list[zmqbus.SubscriptionTaken] = []

    def wait() -> None:
        try:
            second.get()
        except zmqbus.SubscriptionTaken as error:
            told.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    third = reader.subscribe("a", durable="name")
    waiting.join(10)
    assert len(told) == 1
    third.close()


def test_threads_that_share_one_hold_back_what_they_are_at_work_on(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
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
        mine.extend(message.value for message in subscription)

    threads = [threading.Thread(target=slow), *(threading.Thread(target=quick, args=(mine,)) for mine in rest)]
    threads[0].start()
    assert taken.wait(10)
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: sum(map(len, rest)) == 2999)
    subscription.commit(10)
    assert cursors(forwarder) == {"name": by_slow[0]} == {"name": 0}
    resume.set()
    eventually(lambda: cursors(forwarder) == {"name": 3000}, 10)  # all have asked for the next
    subscription.close()
    for thread in threads:
        thread.join(10)
    assert sorted([*by_slow, *rest[0], *rest[1]]) == list(range(3000))


def test_who_only_looked_first_hands_on_what_was_decoded(
    forwarder: Running, writer: zmqbus.Node, reader: zmqbus.Node
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
    assert cursors(forwarder) == {"name": 1000}
    subscription.close()
    thread.join(10)
