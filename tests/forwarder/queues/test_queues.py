"""What is pushed through a forwarder is given to workers from its journal, and never again once that was confirmed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarder_checks import Gate, ask
from tests.forwarder.forwarders import Running, running, stored
from tests.forwarder.queues.conftest import committed, figures, places, worker_of
from tests.node.conftest import drain, eventually, known_to, on_loop
from zmqbus import Node
from zmqbus.forwarder.queues import loading, stock
from zmqbus.protocol import commands
from zmqbus.protocol.commands import END


def push(node: Node, queue: str, *values: object) -> None:
    """And wait until it is on the forwarder's disk."""
    for value in values:
        node.push(queue, value)
    node.flush(SOON)


def first(node: Node, queue: str, value: object = "first") -> None:
    """The forwarder may not be known yet."""
    node.push(queue, value, durable=True, timeout=SOON)


# --- the way of a job ----------------------------------------------------------------------------


def test_jobs_wait_on_disk_for_a_worker_and_are_gone_when_done(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a", 0)
    push(node, "jobs.a", *range(1, 10))
    assert figures(forwarder, "jobs.a").waiting == 10
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=4)
        taken = worker.take(4)
        assert [(job.topic, job.seq, job.value, job.attempt) for job in taken] == [
            ("jobs.a", seq, seq - 1, 1) for seq in range(1, 5)
        ]
        assert worker.gets_nothing()
        assert worker.done(*taken, credit=100).refused == []
        worker.done(*worker.take(6))
        assert worker.gets_nothing()
    assert places(forwarder)["$queue jobs.a"] == 10
    told = figures(forwarder, "jobs.a")
    assert (told.waiting, told.in_flight, told.done, told.oldest_ns) == (0, 0, 10, 0)


def test_a_worker_that_is_there_gets_what_is_pushed_at_once(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1000)
        worker.done(*worker.take(1))
        for number in range(20):
            node.push("jobs.a", number)
            (job,) = worker.take(1)
            assert (job.value, worker.done(job).refused) == (number, [])


def test_what_is_done_is_done_after_a_restart_and_the_rest_is_not(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus) as forwarder:
        first(node, "jobs.a", 0)
        push(node, "jobs.a", *range(1, 100))
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=60)
            taken = worker.take(60)
            worker.done(*taken[3:30:2])
            worker.fail(*taken[40:42], delay_ms=0)
            finished = {job.value for job in taken[3:30:2]}
    with running(journal, bus=bus) as forwarder:
        eventually(lambda: figures(forwarder, "jobs.a").waiting == 100 - len(finished))
        assert figures(forwarder, "jobs.a").oldest_ns > 0
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=1000)
            rest = worker.take(100 - len(finished))
            assert sorted(job.value for job in rest) == [n for n in range(100) if n not in finished]
            assert {job.value: job.attempt for job in rest if job.attempt > 1} == {40: 2, 41: 2}
            worker.done(*rest)
    with running(journal, bus=bus) as forwarder, worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1000)
        assert worker.gets_nothing()
        eventually(lambda: places(forwarder)["$queue jobs.a"] == 100)


def test_nobody_is_told_that_a_job_is_done_before_that_is_on_disk(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=10)
        (job,) = worker.take(1)
        with Gate.closed() as gate:
            worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq)]))
            eventually(lambda: gate.waiting == 1)
            assert not worker._dealer.poll(300)
            gate.let_through(1000)
            assert worker.hear(commands.Settled).refused == []
    assert committed(forwarder)["$queue jobs.a"] == 1


def test_one_commit_is_for_all_that_was_said_meanwhile(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    push(node, "jobs.a", *range(50))
    push(node, "jobs.b", *range(50))
    with worker_of(forwarder) as worker:
        worker.join("jobs.*", credit=1000)
        jobs = worker.take(101)
        with Gate.closed() as gate:
            for job in jobs:
                worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq)]))
            eventually(lambda: gate.waiting == 1)
            eventually(lambda: figures(forwarder, "jobs.a").done + figures(forwarder, "jobs.b").done == 101)
            assert not worker._dealer.poll(100)
            gate.let_through(2)  # the one that was under way, and the next
            for _ in jobs:
                worker.hear(commands.Settled)


def test_several_queues_and_a_pattern(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    for number in range(30):
        node.push(f"jobs.{'abc'[number % 3]}", number)
        node.publish("jobs.published", number)
    push(node, "other", "x")
    with worker_of(forwarder) as only, worker_of(forwarder) as rest:
        only.join("jobs.b", credit=1000)
        jobs = only.take(10)
        assert {job.topic for job in jobs} == {"jobs.b"}
        only.done(*jobs)
        rest.join(">", credit=1000)
        jobs = rest.take(22)
        assert sorted(job.topic for job in jobs) == ["jobs.a"] * 11 + ["jobs.c"] * 10 + ["other"]
        rest.done(*jobs)
        assert only.gets_nothing()
        assert rest.gets_nothing()


@pytest.mark.parametrize("live", [True, False])
def test_every_kind_of_value_and_its_headers(forwarder: Running, node: Node, live: bool) -> None:
    values = ["ä", b"\0", None, {"a": [1, 2.5]}, b"x" * 100_000, "y" * 20_000, 7]
    first(node, "jobs.a")
    with worker_of(forwarder) as worker:
        if live:
            worker.join("jobs.a", credit=1000)
            worker.done(*worker.take(1))
        for number, value in enumerate(values):
            node.push("jobs.a", value, headers={"n": number} if number % 2 else None)
        if not live:
            node.flush(SOON)
            worker.join("jobs.a", credit=1000)
            worker.done(*worker.take(1))
        jobs = worker.take(len(values))
        assert [job.value for job in jobs] == values
        assert [job.headers for job in jobs] == [{"n": n} if n % 2 else None for n in range(len(values))]
        worker.done(*jobs)


def test_who_subscribes_sees_it_and_takes_nothing_away(forwarder: Running, node: Node, bus: str) -> None:
    with Node("observer", bus=bus) as observer, observer.subscribe("jobs.>") as subscription:
        node.wait_for_subscribers("jobs.a", 2, timeout=SOON)
        first(node, "jobs.a", "x")
        assert [message.value for message in drain(subscription, 1)] == ["x"]
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        assert [job.value for job in worker.take(1)] == ["x"]


def test_a_delayed_job_waits_and_holds_up_nobody(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus) as forwarder, worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=100)
        first(node, "jobs.a")
        start = time.time()
        node.push("jobs.a", "later", delay=1.5)
        push(node, "jobs.a", "now")
        worker.done(*worker.take(2))
        assert figures(forwarder, "jobs.a").delayed == 1
    with running(journal, bus=bus) as forwarder, worker_of(forwarder) as worker:  # also over a restart
        worker.join("jobs.a", credit=100)
        (job,) = worker.take(1)
        assert (job.value, job.attempt) == ("later", 1)
        assert time.time() >= start + 1.5
        worker.done(job)


# --- workers that fail ---------------------------------------------------------------------------


def test_a_job_whose_lease_has_run_out_goes_to_another_and_the_late_answer_is_refused(
    forwarder: Running, node: Node
) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as slow, worker_of(forwarder) as other:
        slow.join("jobs.a", credit=1, lease_ms=100)
        (old,) = slow.take(1)
        other.join("jobs.a", credit=1)
        (new,) = other.take(1)
        assert (old.attempt, new.attempt) == (1, 2)
        assert slow.done(old).refused == [(old.delivery, 1, 1)]
        assert other.done(new).refused == []
    assert figures(forwarder, "jobs.a").redelivered == 1


def test_who_leaves_returns_what_it_had_and_no_attempt_counts(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as leaver, worker_of(forwarder) as other:
        leaver.join("jobs.a", credit=1)
        leaver.take(1)
        leaver.say(commands.Leave(1))
        other.join("jobs.a", credit=1)
        assert [job.attempt for job in other.take(1)] == [1]


def test_who_is_gone_loses_what_it_had(forwarder: Running, node: Node, bus: str) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as other:
        with Node("worker", bus=bus) as gone:
            known_to(gone)
            ask(gone, forwarder, commands.Stats())  # it is introduced
            link = gone._engine.peering.links[forwarder.forwarder.origin]
            gone._engine.soon(link.send, commands.Join(9, ["jobs.a"], "workers", 60_000, 5))
            eventually(lambda: figures(forwarder, "jobs.a").in_flight == 1)
        other.join("jobs.a", credit=1)
        (job,) = other.take(1)
        assert job.attempt == 2
        other.done(job)


WORKER = """
import sys, zmqbus
with zmqbus.Node("worker", bus=sys.argv[1]) as node, node.pull("jobs.a", credit=2, lease=600) as worker:
    print(worker.get(30).value, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_worker_had_goes_to_another_at_once(forwarder: Running, node: Node, bus: str) -> None:
    first(node, "jobs.a")
    push(node, "jobs.a", "second")
    with (
        worker_of(forwarder) as other,
        subprocess.Popen(
            [sys.executable, "-c", WORKER, bus], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        other.join("jobs.a", credit=10)
        assert other.gets_nothing()
        process.kill()
        start = time.monotonic()
        jobs = other.take(2)
        assert time.monotonic() < start + 4, "its lease runs for ten minutes, and its silence would tell after 5 s"
        assert [(job.value, job.attempt) for job in jobs] == [("first", 2), ("second", 2)]
        assert other.done(*jobs).refused == []


def test_nobody_speaks_for_another_worker(forwarder: Running, node: Node) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as worker, worker_of(forwarder) as thief:
        worker.join("jobs.a", credit=1)
        (job,) = worker.take(1)
        thief.say(commands.Done(1, [(job.delivery, 1, 1)]))
        assert thief.hear(commands.Error).code == "worker"
        assert worker.done(job).refused == []


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (commands.Join(1, [], "g", 1000), "at least one"),
        (commands.Join(1, ["a..b"], "g", 1000), "is empty"),
        (commands.Join(1, ["a"], "two words", 1000), "no white space"),
        (commands.Join(1, ["a"], "g\0", 1000), "no control characters"),
        (commands.Join(1, ["a"], "g", 1000, 0, 10**6), "is not there yet"),
        (commands.Join(1, ["x" * 250 + f".{n}" for n in range(20)], "g", 1000), "4,096 bytes at most"),
    ],
    ids=["nothing", "pattern", "group", "control", "offset", "long"],
)
def test_what_cannot_be_pulled_is_refused(forwarder: Running, join: commands.Join, reason: str) -> None:
    with worker_of(forwarder) as worker:
        worker.say(join)
        error = worker.hear(commands.Error)
        assert error.code == "join"
        assert reason in error.reason
        worker.join("a", credit=1, number=2)
    assert not [name for name in places(forwarder) if name.startswith("$group") and name != "$group workers a"]


# --- more than fits in memory --------------------------------------------------------------------


def test_whatever_is_done_in_whatever_order_each_job_is_given_out_once(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZMQBUS_SEED=n: the same again."""
    seed = int(os.environ.get("ZMQBUS_SEED") or secrets.randbits(16))
    print(f"ZMQBUS_SEED={seed}")
    rng = Random(seed)
    monkeypatch.setattr(stock, "SCATTER_BYTES_MAX", 100)  # so that it has to be read in many pieces
    monkeypatch.setattr(stock, "MESSAGES_MAX", 500)
    first(node, "jobs.a", -1)
    for start in range(0, 3000, 100):
        if rng.random() < 0.7:
            node.push_many("jobs.a", range(start, start + 100))
        else:
            for number in range(start, start + 100):
                node.push("jobs.a", number)
        for number in range(10):
            node.publish("noise", number)
    node.flush(SOON)
    with worker_of(forwarder) as one, worker_of(forwarder) as two:
        credit, got = {one: 300, two: 50}, []
        for worker in (one, two):
            worker.join("jobs.a", credit=credit[worker])
        in_hand: list[tuple[object, object]] = []
        while len(got) < 3001:
            for worker in (one, two):
                while worker._dealer.poll(5):
                    worker._next(0)
                in_hand += [(worker, job) for job in worker.jobs]
                worker.jobs = []
            rng.shuffle(in_hand)
            answered, in_hand = in_hand[: 1 + len(in_hand) // 2], in_hand[1 + len(in_hand) // 2 :]
            for worker in (one, two):
                jobs = [job for owner, job in answered if owner is worker]
                credit[worker] += len(jobs)
                ranges = [(job.delivery, job.seq, job.seq) for job in jobs]  # type: ignore[attr-defined]
                worker.say(commands.Done(1, ranges, credit[worker]))
                got += [job.value for job in jobs]  # type: ignore[attr-defined]
        assert sorted(got) == list(range(-1, 3000))
        eventually(lambda: figures(forwarder, "jobs.a").done == 3001)
        assert (figures(forwarder, "jobs.a").waiting, figures(forwarder, "jobs.a").redelivered) == (0, 0)
        eventually(lambda: "$queue jobs.a" in committed(forwarder))


def test_a_worker_with_large_jobs_in_hand_does_not_starve_others(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is with workers, who take their time; more is loaded for those who would begin."""
    monkeypatch.setattr(stock, "AHEAD_BYTES", 100_000)
    monkeypatch.setattr(stock, "AHEAD_BYTES_MIN", 100)
    first(node, "jobs.a", b"x" * 60_000)
    for _ in range(9):
        push(node, "jobs.a", b"x" * 60_000)
    with worker_of(forwarder) as one, worker_of(forwarder) as two:
        one.join("jobs.a", credit=6)
        assert len(one.take(6)) == 6
        two.join("jobs.a", credit=4)
        assert len(two.take(4)) == 4


def test_more_jobs_wait_for_their_time_than_may_be_loaded(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what is behind them waits, and that is said."""
    monkeypatch.setattr(stock, "SCATTER_BYTES_MAX", 100)
    monkeypatch.setattr(loading, "PIECE_BYTES", 1)
    events = forwarder.forwarder.events()
    first(node, "jobs.a")
    due = time.monotonic() + 6
    for _ in range(100):
        node.push("jobs.a", "later", delay=due - time.monotonic(), durable=True, timeout=SOON)
    push(node, "jobs.a", "behind")
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1000)
        worker.done(*worker.take(1))
        eventually(lambda: any("wait for their time" in str(event) for event in events._events))
        assert worker.gets_nothing(100)
        assert 10 < figures(forwarder, "jobs.a").delayed < 100
        got: Counter[object] = Counter()
        while got.total() < 101:
            jobs = worker.take(1) + worker.jobs
            worker.jobs = []
            worker.done(*jobs)
            got.update(job.value for job in jobs)
        assert got == {"later": 100, "behind": 1}
    assert sum("wait for their time" in str(event) for event in events._events) == 1


# --- the journal ---------------------------------------------------------------------------------


SEGMENTS = {"bytes_max": 4 << 16}  # in segments of 64 KiB


def fill(node: Node, topic: str, kilobytes: int) -> None:
    for _ in range(kilobytes // 10):
        node.publish(topic, b"x" * 10_000, durable=True, timeout=SOON)


def test_what_is_not_done_is_not_removed_and_what_is_done_is(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus, **SEGMENTS) as forwarder:
        first(node, "jobs.a")
        fill(node, "noise", 150)
        assert stored(journal)[0].offset == 0
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=1)
            worker.done(*worker.take(1))
        fill(node, "noise", 300)
        eventually(lambda: committed(forwarder)["$queue jobs.a"] > 10)
        fill(node, "noise", 100)
        assert stored(journal)[0].offset > 0


def test_what_nobody_pulls_holds_nothing_but_itself(journal: Path, bus: str, node: Node) -> None:
    """A queue without workers, of which nothing is left, moves on with the journal."""
    with running(journal, bus=bus, **SEGMENTS) as forwarder:
        first(node, "jobs.a")
        with worker_of(forwarder) as worker:
            worker.join("jobs.>", credit=1)
            worker.done(*worker.take(1))
            worker.say(commands.Leave(1))
        fill(node, "noise", 150)
        eventually(lambda: committed(forwarder)["$queue jobs.a"] > 1)
    with running(journal, bus=bus, **SEGMENTS) as forwarder:  # nor does it after a restart
        fill(node, "noise", 300)
        eventually(lambda: min(committed(forwarder).values()) > 20)
        fill(node, "noise", 100)
        assert stored(journal)[0].offset > 10


def test_a_queue_can_be_forgotten_and_begins_anew(forwarder: Running, node: Node) -> None:
    meet(node, "a")
    push(node, "jobs.a", *range(10))
    assert ask(node, forwarder, commands.Commit("$queue jobs.b", 0, forget=True)) == commands.Error(
        "cursor", "there is no cursor '$queue jobs.b'"
    )
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=2)
        worker.take(2)
        refusal = ask(node, forwarder, commands.Commit("$queue jobs.a", 0, forget=True))
        assert refusal == commands.Error("taken", "there are workers for '$queue jobs.a'")
        worker.say(commands.Leave(1))
        eventually(lambda: figures(forwarder, "jobs.a").workers == 0)
    refusal = ask(node, forwarder, commands.Commit("$queue jobs.a", 5))
    assert refusal == commands.Error("cursor", "only workers move '$queue jobs.a'")
    forget = commands.Commit("$queue jobs.a", 0, forget=True)
    assert ask(node, forwarder, forget) == forget
    assert "$queue jobs.a" not in committed(forwarder)
    push(node, "jobs.a", "new")
    assert committed(forwarder)["$queue jobs.a"] == 11
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=100)
        assert [job.value for job in worker.take(1)] == ["new"]
        assert worker.gets_nothing()


def test_no_reader_takes_the_place_of_workers(forwarder: Running, node: Node) -> None:
    meet(node, "a")
    for name in ("$queue jobs.a", "$group g a"):
        answer = ask(node, forwarder, commands.Read(5, ["a"], 1000, name))
        assert isinstance(answer, commands.Error)
        assert "workers" in answer.reason
    assert committed(forwarder) == {}


def test_a_queue_is_written_down_before_its_first_message(forwarder: Running, node: Node) -> None:
    meet(node, "a")
    store = forwarder.forwarder._store
    assert store is not None
    with Gate.closed() as gate:
        node.push("jobs.a", 1)
        node.publish("a", "behind")
        eventually(lambda: gate.waiting == 1)
        time.sleep(0.1)
        assert on_loop(forwarder, lambda: store.next_offset) == 1, "nothing is appended before that is on disk"
        gate.let_through(1)
        eventually(lambda: on_loop(forwarder, lambda: store.next_offset) == 3)
        assert "$queue jobs.a" in store.cursors.all()
        gate.let_through(1000)
        node.flush(SOON)


def test_a_queue_for_which_there_is_no_cursor_is_refused_and_others_go_on(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zmqbus.forwarder import inflow
    from zmqbus.journal import positions

    meet(node, "a")
    events = forwarder.forwarder.events()
    monkeypatch.setattr(inflow, "REFUSED_PERIOD", 1.0)
    monkeypatch.setattr(positions, "CURSORS_MAX", 0)
    for number in range(5):
        node.push("jobs.a", number)
        node.publish("a", number, durable=True, timeout=SOON)
    reasons = [event.reason for event in events._events if hasattr(event, "reason") and "jobs.a" in str(event)]
    assert len(reasons) == 1
    assert "nothing that is pushed on jobs.a is accepted" in reasons[0]
    assert not stored(forwarder.path, "jobs.a")
    monkeypatch.setattr(positions, "CURSORS_MAX", 10)
    node.flush(SOON)  # it is tried again
    assert [message.value for message in stored(forwarder.path, "jobs.a")] == list(range(5))
    assert END not in committed(forwarder).values()
