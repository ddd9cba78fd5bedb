"""Workers against an owner that does what the test says: what they say to it, and when."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import zmqbus
from tests.node.conftest import eventually, wait_for
from tests.node.queues.scripted import ScriptedOwner, owning
from zmqbus.node.peers.links import Link
from zmqbus.node.work.queues import workers
from zmqbus.protocol import commands
from zmqbus.protocol.commands import END

NS = 1_000_000_000


@pytest.fixture
def owner(bus: str) -> Iterator[ScriptedOwner]:
    with owning(bus) as owner:
        yield owner


@pytest.fixture
def node(bus: str, owner: ScriptedOwner) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("worker", bus=bus, peers=[owner.inbox], discovery="static") as node:
        node.wait_for_peers(1, timeout=10)
        yield node


def pull(node: zmqbus.Node, owner: ScriptedOwner, **how: Any) -> zmqbus.Worker:
    """A worker that the owner knows."""
    before = len(owner.joins)
    worker = node.pull("jobs", **how)
    owner.wait_for(lambda: len(owner.joins) > before)
    return worker


def take(worker: zmqbus.Worker, count: int) -> list[zmqbus.Job]:
    jobs = [worker.get(10) for _ in range(count)]
    assert all(job is not None for job in jobs)
    return jobs  # type: ignore[return-value]


def covered(jobs: list[tuple[int, int, int]]) -> list[int]:
    """The seqs."""
    return sorted(seq for _, first, last in jobs for seq in range(first, last + 1))


# --- what is asked for -----------------------------------------------------------------------------


def test_what_a_worker_asks_for(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    node.pull("logs.*.>", group="indexers", credit=5, lease=2.5, start="first").close()
    node.pull("$dead.jobs").close()
    owner.wait_for(lambda: len(owner.joins) == 2)
    (_, _, asked), (_, _, plain) = owner.joins
    assert (asked.patterns, asked.group, asked.credit, asked.lease_ms) == (["logs.*.>"], "indexers", 5, 2500)
    assert (asked.offset, asked.time_ns) == (0, 0)
    assert (plain.patterns, plain.group, plain.lease_ms) == (["$dead.jobs"], "workers", 30_000)
    assert (plain.offset, plain.time_ns) == (END, 0)
    assert plain.id != asked.id


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"queue": "a..b"}, zmqbus.TopicError, "empty"),
        ({"queue": "a.>.b"}, zmqbus.TopicError, "last"),
        ({"lease": 0}, zmqbus.SetupError, "lease=0"),
        ({"lease": float("nan")}, zmqbus.SetupError, "lease=nan"),
        ({"lease": float("inf")}, zmqbus.SetupError, "lease=inf"),
        ({"lease": True}, zmqbus.SetupError, "lease=True"),
        ({"lease": "30"}, zmqbus.SetupError, "lease='30'"),
        ({"credit": 0}, zmqbus.SetupError, "credit=0"),
        ({"credit": -1}, zmqbus.SetupError, "credit=-1"),
        ({"credit": 1.5}, zmqbus.SetupError, "credit=1.5"),
        ({"credit": True}, zmqbus.SetupError, "credit=True"),
        ({"credit": 10**9}, zmqbus.SetupError, "credit=1000000000"),
        ({"group": ""}, zmqbus.SetupError, "group=''"),
        ({"group": "a b"}, zmqbus.SetupError, "group='a b'"),
        ({"group": "a\n"}, zmqbus.SetupError, "group="),
        ({"group": "a\0"}, zmqbus.SetupError, "group="),
        ({"group": "ä" * 128}, zmqbus.SetupError, "group="),
        ({"group": "\ud800"}, zmqbus.SetupError, "group="),
        ({"group": None}, zmqbus.SetupError, "group=None"),
        ({"start": "yesterday"}, zmqbus.SetupError, "start='yesterday'"),
    ],
)
def test_what_cannot_be_asked_for(node: zmqbus.Node, wrong: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says.replace(".", r"\.")):
        node.pull(**{"queue": "jobs", **wrong})
    assert node.statistics()["workers"] == 0


# --- jobs ------------------------------------------------------------------------------------------


def test_a_job_is_the_message_and_its_attempt(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    before = time.time()
    owner.give("a", {"b": [1, b"x"]}, topic="jobs", attempt=3, headers=[None, {"k": "v"}])
    first, second = take(worker, 2)
    assert (first.topic, first.queue, first.value, first.headers) == ("jobs", "jobs", "a", None)
    assert (first.seq, first.origin, first.attempt) == (1, owner.origin, 3)
    assert before - 1 < first.time < time.time() + 1
    assert (second.seq, second.value, second.headers) == (2, {"b": [1, b"x"]}, {"k": "v"})
    assert not first.settled
    assert repr(first) == f"<Job jobs {owner.origin:016x}#1 attempt 3>"
    first.ack()
    assert first.settled
    assert "settled" in repr(first)


@pytest.mark.parametrize("way", ["get", "iterate", "next"])
def test_jobs_come_in_their_order_each_once(node: zmqbus.Node, owner: ScriptedOwner, way: str) -> None:
    worker = pull(node, owner, credit=1000)
    for at in range(0, 600, 200):
        owner.give(*range(at, at + 200))
    values = []
    jobs = iter(worker)
    for _ in range(600):
        job = worker.get(10) if way == "get" else next(jobs) if way == "iterate" else next(worker)
        assert job is not None
        values.append(job.value)
        job.ack()
    assert values == list(range(600))
    worker.flush(10)
    assert sum(last - first + 1 for _, first, last in owner.done) == 600
    assert worker.get(0) is None
    assert worker.received == 600


def test_jobs_of_any_size(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """A value of its own part, and an array that is too short for its header."""
    worker = pull(node, owner)
    with node.events() as events:
        delivery, seq = owner.give(1, 2, raw=b"\x91\xa3abc")
        owner.give("x" * 100_000)
        assert take(worker, 1)[0].value == "x" * 100_000
        assert "1 values where the header says 2" in wait_for(events, zmqbus.Warned)[0].reason
    fail = owner.wait_for(lambda: owner.of(commands.Fail))[0]
    assert (fail.jobs, fail.how) == ([(delivery, seq, seq + 1)], "reject")


# --- settling --------------------------------------------------------------------------------------


def test_acknowledged_in_any_order_and_each_once(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100)
    number, _ = owner.give(*range(10))
    jobs = take(worker, 10)
    for at in (7, 2, 0, 1, 9, 3):
        jobs[at].ack()
    worker.flush(10)
    assert {delivery for delivery, _, _ in owner.done} == {number}
    assert covered(owner.done) == [1, 2, 3, 4, 8, 10]
    for settle in (jobs[0].ack, jobs[0].nack, jobs[0].reject, lambda: jobs[0].extend(1)):
        with pytest.raises(zmqbus.JobSettled, match="settled already") as caught:
            settle()
    assert (caught.value.topic, caught.value.origin, caught.value.seq) == ("jobs", owner.origin, 1)
    for at in (8, 4, 6, 5):
        jobs[at].ack()
    worker.flush(10)
    assert covered(owner.done) == list(range(1, 11)), "each was said once"


def test_what_is_said_of_a_job_that_is_not_done(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100)
    number, _ = owner.give(*range(6))
    jobs = take(worker, 6)
    jobs[0].nack()
    jobs[1].nack(delay=0, reason="later")
    jobs[2].nack(delay=1.5)
    jobs[3].reject("never")
    jobs[4].reject("x" * 5000)
    jobs[5].extend(7.5)
    owner.wait_for(lambda: sum(len(fail.jobs) for fail in owner.of(commands.Fail)) == 5)
    said = {fail.jobs[0][1]: (fail.how, fail.delay_ms, fail.reason) for fail in owner.of(commands.Fail)}
    assert said[1] == ("nack", -1, "")
    assert said[2] == ("nack", 0, "later")
    assert said[3] == ("nack", 1500, "")
    assert said[4] == ("reject", -1, "never")
    assert said[5] == ("reject", -1, "x" * 1000)
    extend = owner.wait_for(lambda: owner.of(commands.Extend))[0]
    assert (extend.delivery, extend.lease_ms) == (number, 7500)
    for wrong in (-1, float("nan"), float("inf"), "1", True):
        with pytest.raises(zmqbus.SetupError, match="delay="):
            jobs[5].nack(delay=wrong)  # type: ignore[arg-type]
        with pytest.raises(zmqbus.SetupError, match="seconds="):
            jobs[5].extend(wrong)  # type: ignore[arg-type]
    assert not jobs[5].settled
    jobs[5].ack()


def test_the_end_of_a_block_says_it(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100)
    owner.give(*range(5))
    jobs = take(worker, 5)
    with jobs[0]:
        pass
    with pytest.raises(ZeroDivisionError), jobs[1]:
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), jobs[2]:
        raise KeyboardInterrupt
    with jobs[3] as job:
        job.reject("no")
    with pytest.raises(ZeroDivisionError), jobs[4]:
        _ = jobs[4].ack() or 1 / 0  # type: ignore[func-returns-value]
    worker.flush(10)
    assert sorted((first, last) for _, first, last in owner.done) == [(1, 1), (5, 5)]
    said = {fail.jobs[0][1]: (fail.how, fail.reason) for fail in owner.of(commands.Fail)}
    assert said == {
        2: ("nack", "ZeroDivisionError: division by zero"),
        3: ("return", "KeyboardInterrupt"),
        4: ("reject", "no"),
    }


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_any_exception_is_a_reason(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Of what a file name has in it, of none, and of one that cannot be had. They are said, and what follows them."""
    worker = pull(node, owner, credit=100)
    owner.give(*range(5))
    jobs = take(worker, 5)
    for job, error in zip(jobs, (OSError("a\udcffb"), ValueError(), Mute(), OSError("€" * 2000)), strict=False):
        with pytest.raises(type(error)), job:
            raise error
    jobs[4].ack()
    worker.flush(10)
    said = {fail.jobs[0][1]: fail.reason for fail in owner.of(commands.Fail)}
    assert said == {1: "OSError: a?b", 2: "ValueError", 3: "Mute", 4: f"OSError: {'€' * 991}"}
    assert covered(owner.done) == [5]


def test_an_idle_worker_says_at_once_what_it_has_done(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timer has to run out for it: neither when it asks for more, nor when it does not, nor when another asks."""
    monkeypatch.setattr(workers, "LATE", 1000.0)
    worker = pull(node, owner)
    owner.give(1)
    take(worker, 1)[0].ack()
    owner.wait_for(lambda: len(owner.done) == 1)

    owner.give(2, 3)
    first, second = take(worker, 2)
    thread = threading.Thread(target=worker.get)
    thread.start()
    eventually(lambda: worker._hand._asleep == 1)
    second.ack()
    owner.wait_for(lambda: len(owner.done) == 2)
    first.ack()
    owner.wait_for(lambda: len(owner.done) == 3)
    owner.give("for the thread")
    thread.join()

    for timeout in (0.0, 30.0):  # looks, or waits, with something in hand, and something to say
        worker.flush(10)
        before = len(owner.done)
        owner.give(4, 5)
        take(worker, 1)[0].ack()
        in_hand = take(worker, 1)[0]
        thread = threading.Thread(target=worker.get, args=(timeout,))
        thread.start()
        owner.wait_for(lambda before=before: len(owner.done) == before + 1)
        in_hand.ack()
    worker.close()
    thread.join()


def test_a_busy_worker_says_soon_what_it_has_done(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Though there is more to do, and nobody asks for that."""
    worker = pull(node, owner, credit=100)
    owner.give(*range(50))
    take(worker, 1)[0].ack()
    owner.wait_for(lambda: owner.done == [(1, 1, 1)], timeout=5)


def test_one_word_for_many(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=10_000)
    for _ in range(50):
        owner.give(*range(100))
    for job in take(worker, 5000):
        job.ack()
    worker.flush(10)
    assert sum(last - first + 1 for _, first, last in owner.done) == 5000
    assert len(owner.done) < 500
    assert len(owner.of(commands.Done)) < 200


def test_flush_waits_for_the_owner(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    worker.flush(0)
    owner.settles = False
    owner.give(1, 2)
    for job in take(worker, 2):
        job.ack()
    with pytest.raises(zmqbus.NotSettled, match="2 acknowledged") as caught:
        worker.flush(0.1)
    assert caught.value.unsettled == 2
    owner.wait_for(lambda: covered(owner.done) == [1, 2])
    identity, request, join = owner.joins[-1]
    for _ in owner.of(commands.Done):
        owner.answer(identity, commands.Settled(join.id), request)
    worker.flush(10)


def test_what_cannot_be_said_is_said_later(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pull(node, owner, credit=100)
    owner.give(*range(3))
    jobs = take(worker, 3)
    with monkeypatch.context() as patched:
        patched.setattr(Link, "say", lambda self, body, number: False)
        jobs[0].ack()
        jobs[1].nack()
        with pytest.raises(zmqbus.NotSettled):
            worker.flush(0.1)
    owner.wait_for(lambda: owner.done == [(1, 1, 1)])
    owner.wait_for(lambda: owner.credit == 102)
    assert [fail.jobs for fail in owner.of(commands.Fail)] == [[(1, 2, 2)]]
    jobs[2].ack()
    worker.flush(10)


def test_a_refused_acknowledgement_is_told(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.settles = False
    _, first = owner.give(1, 2, 3, attempt=2)
    with node.events() as events:
        for job in take(worker, 3):
            job.ack()
        identity, request, join = owner.joins[-1]
        owner.wait_for(lambda: sum(last - first + 1 for _, first, last in owner.done) == 3)
        for done in owner.of(commands.Done):
            owner.answer(identity, commands.Settled(join.id, done.done), request)
        told = wait_for(events, zmqbus.JobRefused, 3)
    assert told == [zmqbus.JobRefused("jobs", owner.origin, first + at, 2) for at in range(3)]
    assert worker.refused == 3
    assert node.statistics()["jobs_refused"] == 3
    with pytest.raises(zmqbus.NotSettled, match="JobRefused") as caught:
        worker.flush(10)
    assert caught.value.unsettled == 3
    worker.flush(10)  # it was said


def test_a_job_that_is_forgotten_has_failed(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Else it would take up credit until its lease is over, and nobody would say why it is done again."""
    worker = pull(node, owner, credit=3)
    number, _ = owner.give("a", "b", "c")
    jobs = take(worker, 3)
    jobs[1].ack()
    del jobs
    assert worker.get(0) is None
    gc.collect()
    owner.wait_for(lambda: owner.of(commands.Fail))
    fails = owner.of(commands.Fail)
    assert [job for fail in fails for job in fail.jobs] == [(number, 1, 1), (number, 3, 3)]
    assert {fail.how for fail in fails} == {"nack"}
    assert "let go of it" in fails[0].reason
    owner.wait_for(lambda: owner.credit == 6)


# --- types -----------------------------------------------------------------------------------------


class Task(msgspec.Struct):
    n: int


def test_what_does_not_fit_is_rejected_and_the_rest_goes_on(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, type=Task, credit=100)
    with node.events() as events:
        owner.give({"n": 1}, {"n": "two"}, {"n": 3}, {}, {"n": 5})
        owner.give({"n": "none"}, {"n": "of"}, {"n": "these"})
        owner.give({"n": 9})
        jobs = take(worker, 4)
        warned = wait_for(events, zmqbus.Warned, 5)
    assert [(job.seq, job.value) for job in jobs] == [(1, Task(1)), (3, Task(3)), (5, Task(5)), (9, Task(9))]
    assert f"jobs {owner.origin:016x}#2 was rejected" in warned[0].reason
    assert "Expected `int`, got `str`" in warned[0].reason
    for job in jobs:
        job.ack()
    worker.flush(10)
    fails = owner.of(commands.Fail)
    assert sorted(job[1] for fail in fails for job in fail.jobs) == [2, 4, 6, 7, 8]
    assert {fail.how for fail in fails} == {"reject"}
    assert all("does not fit the type" in fail.reason for fail in fails)


# --- credit ----------------------------------------------------------------------------------------


def test_credit_is_the_sum_of_what_may_be_unfinished(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=5)
    assert owner.credit == 5
    owner.give(*range(5))
    jobs = take(worker, 5)
    jobs[3].ack()
    owner.wait_for(lambda: owner.credit == 6)
    jobs[0].nack()
    jobs[1].reject()
    owner.wait_for(lambda: owner.credit == 8)
    owner.give(*range(3))
    for job in [jobs[2], jobs[4], *take(worker, 3)]:
        job.ack()
    owner.wait_for(lambda: owner.credit == 13)
    assert worker.credit == 5


def test_several_owners_share_what_was_given(bus: str, owner: ScriptedOwner) -> None:
    """The unfinished jobs of all are what is limited, as far as they have any."""
    with owning(bus, "second") as second, owning(bus, "idle") as idle:
        peers = [owner.inbox, second.inbox, idle.inbox]
        with zmqbus.Node("w", bus=bus, peers=peers, discovery="static") as node:
            node.wait_for_peers(3, timeout=10)
            worker = node.pull("jobs", credit=6)
            for each in (owner, second, idle):
                each.wait_for(lambda each=each: each.joins)
                assert each.credit == 6
            owner.give(*range(6))
            second.give(*range(6))
            for job in take(worker, 12):
                job.ack()
            for each in (owner, second):
                each.wait_for(lambda each=each: each.credit == 6 + 3)
            assert idle.credit == 6
            time.sleep(1.1)  # the second has no more
            owner.give(*range(3))
            for job in take(worker, 3):
                job.ack()
            owner.wait_for(lambda: owner.credit == 9 + 6)


def test_credit_grows_while_a_worker_runs_dry(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    sent = 0
    deadline = time.monotonic() + 20
    while owner.credit < 2048 + sent - 2048 or worker.credit < 2048:
        assert time.monotonic() < deadline, worker
        if owner.credit > sent:
            count = owner.credit - sent
            owner.give(*range(count))
            sent += count
        while (job := worker.get(0.001)) is not None:
            job.ack()
    assert owner.credit <= sent + 2048


def test_credit_does_not_grow_for_what_the_owner_does_not_use(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    before = worker.credit
    for _ in range(20):
        owner.give(1)
        take(worker, 1)[0].ack()
        worker.flush(10)
        assert worker.get(0) is None
    assert worker.credit == before


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.02, 2, 8), (0.3, 1, 1)])
def test_a_slow_worker_has_few(node: zmqbus.Node, owner: ScriptedOwner, seconds: float, least: int, most: int) -> None:
    """About what it does in a tenth of a second, at least one. The owner always has more."""
    worker = pull(node, owner)
    stop = threading.Event()

    def feed() -> None:
        sent = 0
        while not stop.is_set():
            if (count := owner.credit - sent) > 0:
                owner.give(*range(count))
                sent += count
            time.sleep(0.001)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        until = time.monotonic() + max(1.0, 12 * seconds)
        while time.monotonic() < until:
            with take(worker, 1)[0]:
                time.sleep(seconds)
        while worker.credit < least:  # whoever had no turn for a while has less
            take(worker, 1)[0].ack()
    finally:
        stop.set()
        thread.join()
    assert least <= worker.credit <= most, worker
    unfinished = worker._hand.unfinished
    assert unfinished <= 2 * most


def test_a_worker_that_has_become_slow_gives_back_what_it_cannot_do(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    sent = 0
    while worker.credit < 256:
        if (count := owner.credit - sent) > 0:
            owner.give(*range(count))
            sent += count
        while (job := worker.get(0.001)) is not None:
            job.ack()
    worker.flush(10)
    _, seq = owner.give(*range(60))
    for _ in range(4):
        owner.give(*range(40))
    with take(worker, 1)[0]:
        time.sleep(1.2)
    while (job := worker.get(0)) is not None and not owner.of(commands.Fail):
        job.ack()
    fails = owner.wait_for(lambda: owner.of(commands.Fail))
    assert {fail.how for fail in fails} == {"return"}
    back = covered([job for fail in fails for job in fail.jobs])
    assert back == list(range(seq + 220 - len(back), seq + 220)), "the last that came"
    assert worker.credit < 64


def test_who_gathers_many_before_they_are_done_gets_them(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """However long that takes: a hundred rows, for one transaction."""
    worker = pull(node, owner)
    sent = 0
    rows = []
    while len(rows) < 100:
        if (count := owner.credit - sent) > 0:
            owner.give(*range(count))
            sent += count
        if (job := worker.get(0.02)) is not None:
            rows.append(job)
            time.sleep(0.01)
    for job in rows:
        job.ack()
    worker.flush(10)


def test_an_owner_that_is_new_is_asked_for_more_as_well(bus: str, owner: ScriptedOwner) -> None:
    """It was granted little at first, because it need not have had anything."""
    with (
        owning(bus, "new") as new,
        zmqbus.Node("w", bus=bus, peers=[owner.inbox, new.inbox], discovery="static") as node,
    ):
        node.wait_for_peers(2, timeout=10)
        worker = pull(node, owner)
        new.wait_for(lambda: new.joins)
        worker._hand.window.size = 1000
        count = new.credit
        assert count < 100
        new.give(*range(count))
        jobs = take(worker, count)
        time.sleep(0.1)  # it is not because it was quick
        assert worker.get(0) is None
        new.wait_for(lambda: new.credit >= 1000)
        for job in jobs:
            job.ack()


def test_as_many_as_wait_are_fed(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Threads that have slow jobs at the same time are as good as a fast one."""
    worker = pull(node, owner)
    begun = threading.Semaphore(0)
    go = threading.Event()

    def work() -> None:
        job = worker.get(10)
        assert job is not None
        with job:
            begun.release()
            go.wait(10)

    threads = [threading.Thread(target=work) for _ in range(30)]
    for thread in threads:
        thread.start()
    sent = 0
    deadline = time.monotonic() + 10
    while sent < 30 and time.monotonic() < deadline:
        if count := min(30, owner.credit) - sent:
            owner.give(*range(count))
            sent += count
        time.sleep(0.001)
    for _ in range(30):
        assert begun.acquire(timeout=10)
    go.set()
    for thread in threads:
        thread.join()


# --- leases ----------------------------------------------------------------------------------------


def test_a_job_that_waited_too_long_is_given_back_unbegun(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, lease=3, credit=3)
    first, _ = owner.give("begun", "same delivery")
    job = take(worker, 1)[0]
    second, _ = owner.give("waits")
    owner.wait_for(lambda: sum(len(fail.jobs) for fail in owner.of(commands.Fail)) == 2)
    fails = owner.of(commands.Fail)
    assert {fail.how for fail in fails} == {"return"}
    assert sorted(job for fail in fails for job in fail.jobs) == [(first, 2, 2), (second, 3, 3)]
    assert owner.credit == 3, "who does not come to it is to get no more"
    assert worker.get(0) is None
    owner.wait_for(lambda: owner.credit == 5)
    job.ack()  # the handler's own business
    owner.wait_for(lambda: owner.done == [(first, 1, 1)])


def test_who_comes_too_late_begins_nothing(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the engine had no turn all that time, because a handler let nobody have one."""
    monkeypatch.setattr(workers.Workers, "_watch", lambda self, pull: None)
    worker = pull(node, owner, lease=4)
    number, seq = owner.give("too late")
    time.sleep(2.5)  # more than half the lease
    owner.give("in time")
    assert take(worker, 1)[0].value == "in time"
    fail = owner.wait_for(lambda: owner.of(commands.Fail))[0]
    assert (fail.how, fail.jobs) == ("return", [(number, seq, seq)])


def test_what_waits_behind_a_job_that_is_extended_is_given_back_as_well(
    node: zmqbus.Node, owner: ScriptedOwner
) -> None:
    worker = pull(node, owner, lease=3, credit=10)
    first, _ = owner.give("a", "b")
    job = take(worker, 1)[0]
    job.extend(60)
    owner.wait_for(lambda: owner.of(commands.Fail))
    assert [(fail.how, fail.jobs) for fail in owner.of(commands.Fail)] == [("return", [(first, 2, 2)])]
    job.ack()


# --- the end ---------------------------------------------------------------------------------------


def test_close_returns_what_was_not_begun_and_waits_for_the_rest(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100)
    owner.give(*range(20))
    jobs = take(worker, 3)
    closing = threading.Thread(target=worker.close, args=(10,))
    closing.start()
    owner.wait_for(
        lambda: sum(last - first + 1 for fail in owner.of(commands.Fail) for _, first, last in fail.jobs) == 17
    )
    assert {fail.how for fail in owner.of(commands.Fail)} == {"return"}
    late, _ = owner.give("on its way")
    owner.wait_for(lambda: any(job == (late, 21, 21) for fail in owner.of(commands.Fail) for job in fail.jobs))
    assert closing.is_alive()
    assert not owner.of(commands.Leave)
    with pytest.raises(zmqbus.NodeClosed, match="the worker is closed"):
        worker.get(0)
    for job in jobs:
        job.ack()
    closing.join(5)
    assert not closing.is_alive()
    owner.wait_for(lambda: owner.of(commands.Leave))
    assert isinstance(owner.said[-1][1].body, commands.Leave), "its last word"
    assert covered(owner.done) == [1, 2, 3]
    assert owner.credit == 100, "nothing more was asked for"
    worker.close()


def test_what_is_not_finished_in_time_has_failed(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.give(1, 2)
    job, other = take(worker, 2)
    other.ack()
    began = time.monotonic()
    worker.close(0.2)
    assert 0.15 < time.monotonic() - began < 5
    fail = owner.wait_for(lambda: owner.of(commands.Fail))[0]
    assert (fail.how, fail.jobs) == ("nack", [(1, 1, 1)])
    assert "closed" in fail.reason
    with node.events() as events:
        job.ack()
        assert wait_for(events, zmqbus.JobRefused)[0].seq == 1
    assert worker.refused == 1


def test_what_is_acknowledged_but_not_yet_said_is_not_failed(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pull(node, owner)
    owner.give(1, 2, 3)
    jobs = take(worker, 3)
    with monkeypatch.context() as patched:
        patched.setattr(worker._hand, "hasten", lambda: None)
        jobs[1].ack()
        worker._hand.give_up("the end")
    assert [job[1:] for _, _, job in worker._hand.failures] == [(1, 1), (3, 3)]
    worker.flush(10)
    assert covered(owner.done) == [2]


def test_what_is_acknowledged_while_a_worker_ends(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100)
    owner.give(*range(40))
    jobs = take(worker, 40)

    def work() -> None:
        for job in jobs:
            time.sleep(0.06)
            job.ack()

    thread = threading.Thread(target=work)
    thread.start()
    worker.close(2.0)  # half a second of that is the owner's, to answer
    thread.join()
    owner.wait_for(lambda: owner.of(commands.Leave))
    failed = set(covered([job for fail in owner.of(commands.Fail) for job in fail.jobs]))
    done = set(covered(owner.done))
    assert failed
    assert failed | done == set(range(1, 41))
    eventually(
        lambda: worker.refused == len(failed - done)
    )  # of the others the owner, in time, says that they are late
    assert len(failed & done) <= 2


def test_a_job_left_in_hand_leaves_a_node_the_time_to_say_goodbye(bus: str, owner: ScriptedOwner) -> None:
    with zmqbus.Node("closing", bus=bus, peers=[owner.inbox], discovery="static") as node:
        node.wait_for_peers(1, timeout=10)
        worker = pull(node, owner)
        owner.give(1)
        job = take(worker, 1)[0]
        began = time.monotonic()
        assert node.close(4.0) == []
        assert 1.5 < time.monotonic() - began < 3.9
        assert not job.settled


def test_close_waits_until_its_last_words_are_heard(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    owner.settles = False
    worker = pull(node, owner)
    owner.give(1, 2)
    jobs = take(worker, 2)
    jobs[0].ack()
    began = time.monotonic()
    thread = threading.Thread(target=worker.close, args=(10,))
    thread.start()
    jobs[1].nack()
    owner.wait_for(lambda: owner.done and owner.of(commands.Fail))
    time.sleep(0.3)
    assert thread.is_alive()
    identity, request, join = owner.joins[-1]
    for _ in range(2):
        owner.answer(identity, commands.Settled(join.id), request)
    thread.join(5)
    assert time.monotonic() - began < 5
    assert worker.refused == 0

    worker = pull(node, owner)
    owner.give(3)
    with node.events() as events:
        take(worker, 1)[0].ack()
        worker.close(0.2)
        assert wait_for(events, zmqbus.JobRefused)[0].seq == 3, "nobody said that it is settled"
    assert worker.refused == 1


def test_close_wakes_all_who_wait(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(list(worker))) for _ in range(3)]
    threads += [threading.Thread(target=lambda: got.append(worker.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: worker._hand._asleep == 6)
    worker.close()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, got)) == ["None"] * 3 + ["[]"] * 3


def test_an_exception_in_the_block_does_not_wait_for_its_job(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Whoever had it in hand is where the exception goes."""
    began = time.monotonic()
    worker = pull(node, owner)
    owner.give(1)
    job = take(worker, 1)[0]
    with pytest.raises(ZeroDivisionError), worker:
        _ = 1 / 0
    assert time.monotonic() - began < 1.5
    assert not job.settled
    assert owner.wait_for(lambda: owner.of(commands.Fail))[0].how == "nack"


def test_a_worker_that_nobody_has_is_closed_but_its_jobs_are_not(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.give("in hand", "not begun")
    job = take(worker, 1)[0]
    del worker
    gc.collect()
    fail = owner.wait_for(lambda: owner.of(commands.Fail))[0]
    assert (fail.how, fail.jobs) == ("return", [(1, 2, 2)])
    assert not owner.of(commands.Leave)
    job.ack()
    owner.wait_for(lambda: owner.done == [(1, 1, 1)])
    owner.wait_for(lambda: owner.of(commands.Leave))
    eventually(lambda: node.statistics()["workers"] == 0)
    assert node.statistics()["jobs_received"] == 2


def test_a_loop_that_is_left_leaves_the_queue(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    def loop() -> None:
        for job in node.pull("jobs"):
            job.ack()
            break

    thread = threading.Thread(target=loop)
    thread.start()
    owner.wait_for(lambda: owner.joins)
    owner.give(1)
    thread.join(10)
    owner.wait_for(lambda: owner.of(commands.Leave))


def test_the_node_closes_its_workers(bus: str, owner: ScriptedOwner) -> None:
    with zmqbus.Node("closing", bus=bus, peers=[owner.inbox], discovery="static") as node:
        node.wait_for_peers(1, timeout=10)
        worker = pull(node, owner)
        owner.give(1, 2)
        job = take(worker, 1)[0]
        job.ack()
    owner.wait_for(lambda: owner.of(commands.Leave))
    assert (owner.done, owner.of(commands.Fail)[0].how) == ([(1, 1, 1)], "return")
    with pytest.raises(zmqbus.NodeClosed):
        worker.get(0)
    with pytest.raises(zmqbus.NodeClosed):
        worker.flush(1)
    worker.close()
    with pytest.raises(zmqbus.NodeClosed):
        node.pull("jobs")


# --- owners that go and come -----------------------------------------------------------------------


def test_an_owner_that_lost_sight_of_the_worker_is_joined_anew(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once. What it had given is its own again: what was not begun here never will be."""
    monkeypatch.setattr(workers, "ROUND", 1000.0)
    worker = pull(node, owner, credit=4)
    owner.give("in hand", "not begun")
    job = take(worker, 1)[0]
    owner.joins.append((b"nobody", 0, owner.joins.pop()[2]))  # it answers by an ERROR "worker"
    with node.events() as events:
        job.ack()
        assert wait_for(events, zmqbus.JobRefused)[0].seq == 1
        assert "1 acknowledged job(s) of it may be done once more" in wait_for(events, zmqbus.Warned)[0].reason
    owner.wait_for(lambda: len(owner.joins) == 2)
    said = [command.body for _, command in owner.said]
    assert isinstance(said[-2], commands.Leave), "should it know the old one after all"
    assert owner.joins[-1][2].credit == 4
    assert worker.get(0) is None
    owner.give("anew")
    job = take(worker, 1)[0]
    assert job.value == "anew"
    job.ack()
    owner.wait_for(lambda: owner.credit == 5)
    assert worker.refused == 1


def test_an_idle_worker_finds_out_that_it_is_not_known(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.joins.append((b"nobody", 0, owner.joins.pop()[2]))
    owner.wait_for(lambda: len(owner.joins) == 2)
    owner.give("a")
    assert take(worker, 1)[0].value == "a"


def test_a_peer_that_forgot_the_node_is_greeted_and_joined(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.forget()
    owner.wait_for(lambda: len(owner.joins) == 2)
    owner.give("anew")
    assert take(worker, 1)[0].value == "anew"


def test_an_owner_that_restarts_is_joined(bus: str) -> None:
    first = ScriptedOwner(bus)
    with zmqbus.Node("w", bus=bus, peers=[first.inbox], discovery="static") as node:
        try:
            node.wait_for_peers(1, timeout=10)
            worker = pull(node, first)
            first.give("lost", "too")
            job = take(worker, 1)[0]
        finally:
            first.close()
        second = ScriptedOwner(bus, port=first.port)
        try:
            second.wait_for(lambda: second.joins, timeout=30)
            assert worker.get(0) is None, "the first one's"
            job.ack()
            second.give("a")
            assert take(worker, 1)[0].value == "a"
            eventually(lambda: worker.refused == 1)
        finally:
            second.close()


def test_a_peer_without_jobs_is_left_alone(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ROUND", 0.05)
    worker = pull(node, owner)
    identity, request, _ = owner.joins[-1]
    with node.events() as events:
        owner.answer(identity, commands.Error("unexpected", "JOIN makes no sense here"), request)
        eventually(lambda: worker._hand.ties[owner.origin].barred)
        said = len(owner.said)
        time.sleep(0.5)
        assert events.get(0) is None
    assert (len(owner.joins), len(owner.said)) == (1, said), "it was asked once"
    assert worker.get(0) is None


def test_a_refusal_is_told_once_and_asked_again(
    node: zmqbus.Node, owner: ScriptedOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ROUND", 0.1)
    worker = pull(node, owner)
    with node.events() as events:
        for _ in range(3):
            count = len(owner.joins)
            identity, request, _ = owner.joins[-1]
            owner.answer(identity, commands.Error("join", "too many workers"), request)
            owner.wait_for(lambda count=count: len(owner.joins) > count)
        assert "too many workers" in wait_for(events, zmqbus.Warned)[0].reason
        assert events.get(0) is None
    owner.give("at last")
    assert take(worker, 1)[0].value == "at last"


# --- threads, processes ----------------------------------------------------------------------------


def test_threads_share_a_worker(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner, credit=100_000)
    got: list[list[int]] = [[] for _ in range(6)]

    def work(mine: list[int], way: int) -> None:
        if way % 2:
            for job in worker:
                mine.append(job.value)
                job.ack()
        else:
            while (job := worker.get()) is not None:
                with job:
                    mine.append(job.value)

    threads = [threading.Thread(target=work, args=(mine, way)) for way, mine in enumerate(got)]
    for thread in threads:
        thread.start()
    total = 0
    for size in [1, 1, 1, 300, 2, 5000, 1, 128, 4000] * 3:
        owner.give(*range(total, total + size))
        total += size
    eventually(lambda: sum(map(len, got)) == total)
    worker.flush(10)
    worker.close()
    for thread in threads:
        thread.join(10)
    assert sorted(value for mine in got for value in mine) == list(range(total))
    seqs = sorted((first, last) for _, first, last in owner.done)
    assert sum(last - first + 1 for first, last in seqs) == total
    assert sum(1 for mine in got if mine) > 1


def test_a_thread_that_sleeps_is_woken_for_what_others_leave(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    """Ten jobs in one batch, ten threads: none waits behind another."""
    worker = pull(node, owner, credit=10)
    together = threading.Barrier(10)

    def work() -> None:
        job = worker.get(10)
        assert job is not None
        together.wait(10)
        job.ack()

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    owner.give(*range(10))
    for thread in threads:
        thread.join(10)
    assert not together.broken
    worker.flush(10)
    assert sum(last - first + 1 for _, first, last in owner.done) == 10


def test_a_forked_child_has_none_of_it(node: zmqbus.Node, owner: ScriptedOwner) -> None:
    worker = pull(node, owner)
    owner.give(1, 2, 3)
    first, second = take(worker, 2)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        errors = []
        for what in (
            first.ack,
            second.nack,
            lambda: worker.get(0),
            lambda: next(iter(worker)),
            lambda: worker.flush(1),
        ):
            try:
                what()
            except zmqbus.ForkedProcess:
                errors.append("forked")
            except BaseException as error:
                errors.append(repr(error))
        worker.close()
        os.write(theirs, " ".join(errors).encode())
        os._exit(0)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.waitpid(child, 0)
    os.close(ours)
    assert said == " ".join(["forked"] * 5)
    first.ack()
    second.ack()
    take(worker, 1)[0].ack()
    worker.flush(10)
    assert sum(last - first + 1 for _, first, last in owner.done) == 3
