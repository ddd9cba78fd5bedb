"""Durable groups: each published message is for one worker of each; they keep their place, whoever is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarder_checks import Gate, ask
from tests.forwarder.forwarders import Running, running
from tests.forwarder.queues.conftest import begin, committed, figures, places, worker_of
from tests.node.conftest import eventually
from tests.node.queues.raw_worker import RawWorker
from zmqbus import Node
from zmqbus.protocol import commands


def publish(node: Node, topic: str, *values: object) -> None:
    for value in values:
        node.publish(topic, value)
    node.flush(SOON)


def joined(forwarder: Running, *names: str) -> None:
    """The groups are there."""
    eventually(lambda: all(f"$group {name}" in places(forwarder) for name in names))


def take_in(enough: Callable[[], bool], *workers: RawWorker) -> None:
    """Jobs, until these are enough; and what else comes within a moment."""
    deadline = time.monotonic() + SOON
    while not enough():
        assert time.monotonic() < deadline
        for worker in workers:
            worker._next(20)
    while any(worker._next(100) for worker in workers):
        pass


def test_each_message_is_for_one_worker_of_each_group(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    with worker_of(forwarder) as one, worker_of(forwarder) as two, worker_of(forwarder) as other:
        one.join("logs.>", group="indexers", credit=1)
        two.join("logs.>", group="indexers", credit=1)
        other.join("logs.>", group="others", credit=10)
        joined(forwarder, "indexers logs.>", "others logs.>")
        publish(node, "logs.a", 1)
        publish(node, "logs.b", 2)
        publish(node, "metrics", 3)
        jobs = one.take(1) + two.take(1)
        assert {job.value for job in jobs} == {1, 2}
        assert [job.value for job in other.take(2)] == [1, 2]
        for worker in (one, two, other):
            assert worker.gets_nothing()
        assert figures(forwarder, "logs.>", "indexers").in_flight == 2


def test_a_group_begins_where_it_is_first_named(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    publish(node, "logs.a", "before")
    with worker_of(forwarder) as worker:
        worker.join("logs.>", credit=10)
        joined(forwarder, "workers logs.>")
        publish(node, "logs.a", "after")
        assert [job.value for job in worker.take(1)] == ["after"]


def test_what_was_published_before_a_group_was_named_is_not_for_it_though_it_comes_later(
    forwarder: Running, bus: str, node: Node
) -> None:
    """The forwarder meets a publisher, and takes what that has in its history."""
    meet(node, "logs.a")
    with worker_of(forwarder) as worker, Node("other", bus=f"{bus}-elsewhere", discovery="static") as stranger:
        stranger.publish("logs.b", "old")
        time_ns = time.time_ns()
        worker.join("logs.>", credit=10)
        joined(forwarder, "workers logs.>")
        publisher = stranger._publishers["logs.b"]
        (entry,) = publisher.shelf.entries
        assert time_ns > 0
        late = forwarder.forwarder._inflow._ingest
        assert late is not None

        async def take() -> None:
            late.heads(stranger.origin, [(b"logs.b", 1)], False)
            late._take_in([*entry[2]])
            forwarder.forwarder._inflow._look_now()

        forwarder.call(take())
        publish(node, "logs.a", "new")
        assert [job.value for job in worker.take(1)] == ["new"]
        eventually(lambda: places(forwarder)["$group workers logs.>"] == 2)
        assert worker.gets_nothing()


def test_a_group_can_begin_at_the_beginning_an_offset_or_a_time(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    publish(node, "logs.a", 1, 2)
    then = time.time_ns()
    publish(node, "logs.a", 3)
    publish(node, "noise", "x")
    publish(node, "logs.b", 4)
    for group, start, values in (
        ("a", {"offset": 0}, ["first", 1, 2, 3, 4]),
        ("b", {"offset": 2}, [2, 3, 4]),
        ("c", {"time_ns": then}, [3, 4]),
    ):
        with worker_of(forwarder) as worker:
            begin(worker, "logs.>", group=group, credit=100, **start)
            jobs = worker.take(len(values))
            assert sorted(map(str, (job.value for job in jobs))) == sorted(map(str, values))
            assert [job.value for job in jobs if job.topic == "logs.a"] == values[:-1]
            worker.done(*jobs)
            assert worker.gets_nothing()
            eventually(lambda group=group: places(forwarder)[f"$group {group} logs.>"] == 6)  # type: ignore[misc]


def test_a_group_that_begins_within_a_batch(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    node.publisher("logs.a").send_many(range(10))
    node.flush(SOON)
    with worker_of(forwarder) as worker:
        begin(worker, "logs.a", credit=100, offset=8)
        assert [job.value for job in worker.take(3)] == [7, 8, 9]


def test_a_group_keeps_its_place_with_nobody_present_and_over_restarts(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus) as forwarder:
        meet(node, "logs.a")
        with worker_of(forwarder) as worker:
            worker.join("logs.>", credit=2)
            joined(forwarder, "workers logs.>")
            publish(node, "logs.a", *range(10))
            jobs = worker.take(2)
            worker.done(jobs[1])
        publish(node, "logs.a", *range(10, 20))
        eventually(lambda: committed(forwarder)["$group workers logs.>"] == 1)
    with running(journal, bus=bus) as forwarder:
        publish(node, "logs.a", *range(20, 30))
        eventually(lambda: figures(forwarder, "logs.>", "workers").waiting == 29)
        with worker_of(forwarder) as worker:
            begin(worker, "logs.>", credit=100)  # where it would begin says nothing any more
            jobs = worker.take(29)
            assert [job.value for job in jobs] == [0, *range(2, 30)]
            worker.done(*jobs)
            assert worker.gets_nothing()


def test_who_pulls_other_patterns_is_another_group(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    with worker_of(forwarder) as one, worker_of(forwarder) as two:
        one.join("logs.>", credit=10)
        two.join("logs.*", credit=10)
        joined(forwarder, "workers logs.>", "workers logs.*")
        publish(node, "logs.a", 1)
        assert [job.value for job in (*one.take(1), *two.take(1))] == [1, 1]


def test_what_is_pushed_is_for_one_worker_whatever_its_group(forwarder: Running, node: Node) -> None:
    node.push("jobs.a", -1, durable=True, timeout=SOON)
    with worker_of(forwarder) as one, worker_of(forwarder) as two:
        one.join("jobs.a", group="a", credit=1000)
        two.join("jobs.*", group="b", credit=1000)
        for number in range(20):
            node.push("jobs.a", number)
        node.flush(SOON)
        eventually(lambda: figures(forwarder, "jobs.a").in_flight == 21)
        take_in(lambda: len(one.jobs) + len(two.jobs) == 21, one, two)
        assert sorted(job.value for job in (*one.jobs, *two.jobs)) == list(range(-1, 20))
        assert one.jobs
        assert two.jobs


def test_pushed_and_published_on_one_topic(forwarder: Running, bus: str, node: Node) -> None:
    """Whatever others do there, jobs are jobs."""
    with Node("other", bus=bus) as other, worker_of(forwarder) as one, worker_of(forwarder) as two:
        meet(node, "mixed")
        for worker, group in ((one, "a"), (two, "b")):
            worker.join("mixed", group=group, credit=100)
        joined(forwarder, "a mixed", "b mixed")
        other.push("mixed", "job", durable=True, timeout=SOON)
        publish(node, "mixed", "news")
        eventually(lambda: figures(forwarder, "mixed").in_flight == 1)
        values = lambda: [{job.value for job in worker.jobs} for worker in (one, two)]  # noqa: E731
        take_in(lambda: "job" in set.union(*values()) and "news" in set.intersection(*values()), one, two)
        got = values()
        assert got in ([{"job", "news", "first"}, {"news"}], [{"news"}, {"job", "news"}], [{"job", "news"}, {"news"}])


def test_what_a_worker_says_while_its_group_is_written_down_counts(forwarder: Running, node: Node) -> None:
    """JOBs answer the JOIN that it said last; and who has left meanwhile gets none."""
    meet(node, "logs.a")
    with worker_of(forwarder) as worker, worker_of(forwarder) as leaver, Gate.closed() as gate:
        worker.say(commands.Join(1, ["logs.>"], "g", 30_000, 10), 7)
        leaver.say(commands.Join(1, ["logs.>"], "g", 30_000, 10), 7)
        leaver.say(commands.Leave(1), 7)
        worker.say(commands.Leave(1), 7)
        worker.say(commands.Join(1, ["logs.>"], "g", 30_000, 5), 8)
        eventually(lambda: gate.waiting == 1)
        queues = forwarder.forwarder._queues
        eventually(lambda: [*queues._joining] == [(worker.origin, 1)])
        gate.let_through(1000)
        joined(forwarder, "g logs.>")
        eventually(lambda: [(one.request) for one in queues._desk.workers.values()] == [8])
        publish(node, "logs.a", 1)
        worker.take(1)
        assert leaver.gets_nothing()
    assert not queues._joining


def test_what_is_on_its_way_to_the_disk_when_a_group_is_named(forwarder: Running, node: Node) -> None:
    """It was appended when nobody wanted it, and cannot be read yet."""
    meet(node, "logs.a")
    with worker_of(forwarder) as worker, Gate.closed() as gate:
        begin(worker, "logs.>", credit=10, offset=0)
        eventually(lambda: gate.waiting == 1)
        node.publish("logs.a", 1)
        store = forwarder.forwarder._store
        assert store is not None
        eventually(lambda: store.next_offset == 2)
        gate.let_through(1)
        assert [job.value for job in worker.take(1)] == ["first"]
        assert worker.gets_nothing(300)
        gate.let_through(1000)
        assert [job.value for job in worker.take(1)] == [1]
        eventually(lambda: figures(forwarder, "logs.>", "workers").in_flight == 2)
        assert figures(forwarder, "logs.>", "workers").waiting == 0


def test_a_group_can_be_forgotten(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    with worker_of(forwarder) as worker:
        worker.join("logs.>", credit=1)
        joined(forwarder, "workers logs.>")
        publish(node, "logs.a", 1)
        worker.take(1)
        forget = commands.Commit("$group workers logs.>", 0, forget=True)
        assert isinstance(ask(node, forwarder, forget), commands.Error)
        worker.say(commands.Leave(1))
        eventually(lambda: ask(node, forwarder, forget) == forget)
    assert not committed(forwarder)
    with worker_of(forwarder) as worker:
        worker.join("logs.>", credit=10)
        joined(forwarder, "workers logs.>")
        publish(node, "logs.a", 2)
        assert [job.value for job in worker.take(1)] == [2]


def test_who_pulls_dead_letters_alone_founds_no_group(forwarder: Running, node: Node) -> None:
    """Nothing is ever published there; the cursor would be one more for nothing."""
    meet(node, "a")
    with worker_of(forwarder) as worker:
        worker.join("$dead.jobs.a", credit=1)
        eventually(lambda: len(forwarder.forwarder._queues._desk.workers) == 1)
    assert not committed(forwarder)
