"""What is pushed is given to workers by the node that pushed it, and kept until it is done."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import zmqbus
from tests.node.queues.raw_worker import RawWorker
from tests.node.test_node import eventually


@pytest.fixture
def node(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("owner", bus=bus, discovery="static") as node:
        yield node


def worker_of(node: zmqbus.Node) -> RawWorker:
    return RawWorker(node.endpoints["inbox"], node._engine.config.bus)


def left(node: zmqbus.Node) -> int:
    return node._engine.jobs.left


def test_jobs_wait_for_a_worker_and_are_gone_when_done(node: zmqbus.Node) -> None:
    assert [node.push("jobs.a", n) for n in range(10)] == list(range(1, 11))
    with worker_of(node) as worker:
        worker.join("jobs.a", credit=4)
        first = worker.take(4)
        assert [(job.seq, job.value, job.attempt, job.topic) for job in first] == [
            (seq, seq - 1, 1, "jobs.a") for seq in range(1, 5)
        ]
        assert worker.gets_nothing()
        assert worker.done(*first[:2], credit=7).refused == []
        rest = worker.take(3)
        assert [job.value for job in rest] == [4, 5, 6]
        worker.done(*first[2:], *rest, credit=100)
        worker.done(*worker.take(3))
        assert left(node) == 0
        assert worker.gets_nothing()


def test_every_kind_of_value_and_its_headers(node: zmqbus.Node) -> None:
    values = ["ä", b"\0", None, {"a": [1, 2.5]}, b"x" * 100_000, "y" * 20_000, 7]
    with worker_of(node) as worker:
        worker.join("jobs.>", credit=1000)
        for number, value in enumerate(values):
            node.push("jobs.mixed", value, headers={"n": number} if number % 2 else None)
        jobs = worker.take(len(values))
        assert [job.value for job in jobs] == values
        assert [job.headers for job in jobs] == [{"n": n} if n % 2 else None for n in range(len(values))]
        worker.done(*jobs)
        assert left(node) == 0


def test_what_is_pushed_can_be_observed(bus: str) -> None:
    with (
        zmqbus.Node("owner", bus=bus, discovery="static") as node,
        zmqbus.Node("other", bus=bus, discovery="static", peers=[node.endpoints["inbox"]]) as other,
        other.subscribe("jobs.>") as subscription,
    ):
        node.wait_for_subscribers("jobs.a", timeout=10)
        node.push("jobs.a", 1)
        message = subscription.get(10)
        assert message is not None
        assert message.value == 1
        assert left(node) == 1
        with worker_of(node) as worker:
            worker.join("jobs.a", credit=1)
            worker.done(*worker.take(1))


def test_a_job_that_failed_is_tried_again_and_then_a_dead_letter(node: zmqbus.Node) -> None:
    with worker_of(node) as worker:
        worker.join("jobs.a", "$dead.jobs.a", credit=100)
        node.push("jobs.a", {"bad": 1}, headers={"own": 2})
        for attempt in range(1, 6):
            (job,) = worker.take(1)
            assert (job.topic, job.attempt) == ("jobs.a", attempt)
            worker.fail(job, delay_ms=1, reason="it cannot be done")
        (dead,) = worker.take(1)
        assert (dead.topic, dead.value, dead.attempt) == ("$dead.jobs.a", {"bad": 1}, 1)
        assert dead.headers == {
            "own": 2,
            "$reason": "it cannot be done",
            "$attempts": 5,
            "$origin": node.origin,
            "$seq": 1,
            "$queue": "jobs.a",
        }
        for _ in range(7):  # dead letters are never given up
            worker.fail(dead, delay_ms=1)
            (dead,) = worker.take(1)
        worker.done(dead)
        assert left(node) == 0


def test_a_rejected_job_is_a_dead_letter_at_once(node: zmqbus.Node) -> None:
    with worker_of(node) as worker:
        worker.join("jobs.a", credit=100)
        node.push("jobs.a", 1)
        worker.fail(*worker.take(1), how="reject", reason="not for me")
        assert worker.gets_nothing()
        assert left(node) == 1
        worker.join("$dead.>", credit=1, number=2)
        (dead,) = worker.take(1)
        assert dead.headers is not None
        assert (dead.headers["$reason"], dead.headers["$attempts"]) == ("not for me", 1)


def test_jobs_whose_lease_has_run_out_go_to_another(node: zmqbus.Node) -> None:
    node.push_many("jobs.a", range(10))
    with worker_of(node) as gone, worker_of(node) as other:
        gone.join("jobs.a", credit=10, lease_ms=300)
        assert len(gone.take(10)) == 10
        other.join("jobs.a", credit=100)
        jobs = other.take(10)
        assert sorted(job.value for job in jobs) == list(range(10))
        assert {job.attempt for job in jobs} == {2}


def test_a_late_answer_of_an_older_attempt_is_refused(node: zmqbus.Node) -> None:
    node.push("jobs.a", 1)
    with worker_of(node) as slow, worker_of(node) as other:
        slow.join("jobs.a", credit=1, lease_ms=100)
        (old,) = slow.take(1)
        other.join("jobs.a", credit=1)
        (new,) = other.take(1)
        assert new.attempt == 2
        assert slow.done(old).refused == [(old.delivery, 1, 1)]
        assert other.done(new).refused == []
        assert left(node) == 0


def test_a_delayed_job_waits(node: zmqbus.Node) -> None:
    with worker_of(node) as worker:
        worker.join("jobs.a", credit=10)
        node.push("jobs.a", "later", delay=0.5)
        node.push("jobs.a", "now")
        (job,) = worker.take(1)
        assert job.value == "now"
        (job,) = worker.take(1)
        assert job.value == "later"
        assert job.headers is not None
        assert job.headers["$due"] > 0


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), "1s", True])
def test_a_delay_is_a_number_of_seconds(node: zmqbus.Node, delay: float) -> None:
    with pytest.raises(zmqbus.SetupError, match="delay="):
        node.push("jobs.a", 1, delay=delay)
    assert left(node) == 0


def test_one_worker_of_each_group_gets_what_is_published(node: zmqbus.Node) -> None:
    node.publish("logs.a", "before")
    with worker_of(node) as one, worker_of(node) as two, worker_of(node) as other:
        one.join("logs.>", group="indexers", credit=1)
        two.join("logs.>", group="indexers", credit=1)
        other.join("logs.>", group="others", credit=10)
        eventually(lambda: len(node._engine.jobs._desk.workers) == 3)
        node.publish("logs.a", 1)
        node.publish("logs.b", 2)
        assert {one.take(1)[0].value, two.take(1)[0].value} == {1, 2}
        assert [job.value for job in other.take(2)] == [1, 2]


def test_a_producer_without_room_waits_or_says_so(bus: str) -> None:
    with zmqbus.Node("owner", bus=bus, discovery="static", history_bytes=1, buffer_bytes=100_000) as node:
        with pytest.raises(zmqbus.BufferFull):
            collections.deque((node.push("jobs.a", b"x" * 1000, timeout=0.05) for _ in range(1000)), 0)
        pushed = left(node)
        assert 50 < pushed < 200
        with worker_of(node) as worker:
            worker.join("jobs.a", credit=1000)
            worker.done(*worker.take(pushed))
            assert node.push("jobs.a", 1, timeout=5) == pushed + 1
            worker.done(*worker.take(1))


def test_close_waits_for_workers_and_says_what_remains(bus: str) -> None:
    node = zmqbus.Node("owner", bus=bus, discovery="static")
    node.push_many("jobs.a", range(3))
    node.push("jobs.b", 1)
    with worker_of(node) as worker:
        worker.join("jobs.a", credit=2)
        worker.done(*worker.take(2))
        assert node.close(timeout=0.3) == [
            zmqbus.Undelivered("queue jobs.a", 0, 1),
            zmqbus.Undelivered("queue jobs.b", 0, 1),
        ]


def test_a_batch_that_cannot_be_cut_keeps_back_nothing_else(node: zmqbus.Node) -> None:
    broken = node._engine.outlet.publisher("jobs.a")
    node.push_many("jobs.a", range(3))
    with broken._out.lock:  # as a foreign publisher's may be: it says that it holds two values, and does not
        broken._transmit(0, b"\x91\x01", 4, 2)
        next(broken.seqs), next(broken.seqs)
    with worker_of(node) as worker:
        worker.join("jobs.a", credit=4)
        assert [job.value for job in worker.take(3)] == [0, 1, 2]


def test_what_a_group_gives_up_is_a_dead_letter_as_well(node: zmqbus.Node) -> None:
    with worker_of(node) as worker:
        worker.join("logs.>", group="indexers", credit=10)
        worker.join("$dead.>", credit=10, number=2)
        eventually(lambda: len(node._engine.jobs._desk.workers) == 2)
        node.publish("logs.a", "bad")
        worker.fail(*worker.take(1), how="reject", reason="malformed")
        (dead,) = worker.take(1)
        assert (dead.topic, dead.value) == ("$dead.logs.a", "bad")
        assert dead.headers is not None
        assert dead.headers["$group"].startswith("indexers")
        worker.done(dead, number=2)
        assert left(node) == 0


def test_a_job_that_dies_while_its_node_closes_remains(bus: str) -> None:
    """There can be no letter any more, so it is not as good as done."""
    node = zmqbus.Node("owner", bus=bus, discovery="static")
    node.push_many("jobs.a", range(2))
    with worker_of(node) as worker, ThreadPoolExecutor(1) as thread:
        worker.join("jobs.a", credit=2)
        first, second = worker.take(2)
        closing = thread.submit(node.close, 4.0)
        eventually(lambda: node._engine.refusal is not None)
        worker.fail(first, how="reject")
        worker.done(second)
        assert closing.result(20) == [zmqbus.Undelivered("queue jobs.a", 0, 1)]
