"""Push and pull between nodes: every job is done, by one worker at a time, whatever becomes of workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import zmqbus
from tests.node.conftest import eventually, wait_for

WORKER = """
import json, sys, time, zmqbus
bus, slow, how = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
with zmqbus.Node("worker", bus=bus) as node:
    worker = node.pull("jobs", **how)
    print("ready", flush=True)
    for job in worker:
        with job:
            print(json.dumps([job.value, job.attempt]), flush=True)
            time.sleep(slow)
"""


@contextlib.contextmanager
def working(bus: str, slow: float = 0.0, **how: Any) -> Iterator[tuple[subprocess.Popen[str], list[list[int]]]]:
    """A worker in a process of its own, and (value, attempt) of each job it has begun."""
    begun: list[list[int]] = []
    command = [sys.executable, "-c", WORKER, bus, str(slow), json.dumps(how)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        thread = threading.Thread(target=lambda: begun.extend(map(json.loads, process.stdout or ())))
        thread.start()
        try:
            yield process, begun
        finally:
            process.kill()
            thread.join()


def left(*nodes: zmqbus.Node) -> int:
    """Jobs that are not done."""
    return sum(node._engine.jobs.left for node in nodes)


def take(worker: zmqbus.Worker, count: int, timeout: float = 10) -> list[zmqbus.Job]:
    jobs = [worker.get(timeout) for _ in range(count)]
    assert None not in jobs
    return [job for job in jobs if job is not None]


def test_every_job_is_done_once_by_one_of_many(bus: str) -> None:
    """Owners that work themselves, workers that push; small jobs and large ones, with headers and without."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(zmqbus.Node(f"n{at}", bus=bus)) for at in range(4)]
        done: Counter[tuple[int, Any]] = Counter()
        by: Counter[int] = Counter()
        lock = threading.Lock()

        def work(worker: zmqbus.Worker) -> None:
            for job in worker:
                with job, lock:
                    value = len(job.value) if isinstance(job.value, str) else job.value
                    assert job.headers == ({"n": value} if value % 3 == 0 else None)
                    done[job.origin, value] += 1
                    by[id(worker)] += 1

        workers = [node.pull("jobs.*") for node in nodes for _ in range(2)]
        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for number in range(1, 1001):
            for at, node in enumerate(nodes[:3]):
                value = number if number % 100 else "x" * (number * 50)
                size = len(value) if isinstance(value, str) else value
                headers = {"n": size} if size % 3 == 0 else None
                node.push(f"jobs.{at}", value, headers=headers)
        eventually(lambda: left(*nodes) == 0)
        for worker in workers:
            worker.flush(10)
            worker.close()
        for thread in threads:
            thread.join(10)
    assert len(done) == 3000
    assert set(done.values()) == {1}
    assert sum(node_jobs > 0 for node_jobs in by.values()) > 4


def test_what_was_pushed_before_is_there_and_what_is_pushed_later_comes(
    pair: tuple[zmqbus.Node, zmqbus.Node],
) -> None:
    a, b = pair
    a.push("jobs", "before")
    with b.pull("jobs") as worker:
        assert take(worker, 1)[0].value == "before"
        a.push("jobs", "after")
        assert take(worker, 1)[0].value == "after"
        with zmqbus.Node("c", bus=a._engine.config.bus) as c:
            c.push("jobs", "of one who came later")
            job = take(worker, 1)[0]
            assert (job.value, job.origin) == ("of one who came later", c.origin)
            job.ack()
            worker.flush(10)


def test_a_worker_of_the_node_that_pushes(node: zmqbus.Node) -> None:
    """Nobody else is there."""
    with node.pull("jobs", credit=10) as worker:
        for number in range(100):
            node.push("jobs", number)
        jobs = take(worker, 10)
        assert worker.get(0.1) is None, "its credit holds there, too"
        jobs[0].nack(delay=0)
        jobs[1].reject("no")
        for job in jobs[2:]:
            job.ack()
        again = 0
        for _ in range(91):
            with take(worker, 1)[0] as job:
                again += job.attempt == 2
        assert again == 1
        worker.flush(10)
        assert left(node) == 1, "the dead letter"
    with node.pull("$dead.jobs") as dead:
        job = take(dead, 1)[0]
        assert (job.value, job.headers["$reason"], job.headers["$attempts"]) == (1, "no", 1)
        job.ack()
        dead.flush(10)
    assert left(node) == 0


def test_the_outcome_decides_what_comes_next(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    worker = b.pull("jobs", credit=1)
    a.push("jobs", "x")
    with pytest.raises(ValueError, match="boom"), take(worker, 1)[0]:
        raise ValueError("boom")
    assert worker.get(0.3) is None, "it waits for a second"
    began = time.monotonic()
    job = take(worker, 1)[0]
    assert time.monotonic() - began < 5
    assert job.attempt == 2
    with pytest.raises(KeyboardInterrupt), job:
        raise KeyboardInterrupt
    job = take(worker, 1)[0]
    assert job.attempt == 2, "that one was not counted"
    job.nack(delay=0)
    job = take(worker, 1)[0]
    assert job.attempt == 3
    job.reject("enough")
    with b.pull("$dead.>") as dead:
        letter = take(dead, 1)[0]
        assert letter.topic == "$dead.jobs"
        assert letter.headers is not None
        assert letter.headers["$reason"] == "enough"
        assert letter.headers["$attempts"] == 3
        letter.ack()


def test_a_job_of_the_wrong_type_is_a_dead_letter(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    class Task(msgspec.Struct):
        n: int

    a, b = pair
    with b.pull("jobs", type=Task) as worker:
        for value in ({"n": 1}, {"n": "two"}, {"n": 3}):
            a.push("jobs", value)
        jobs = take(worker, 2)
        assert [job.value for job in jobs] == [Task(1), Task(3)]
        for job in jobs:
            job.ack()
        with b.pull("$dead.jobs") as dead:
            letter = take(dead, 1)[0]
            assert letter.value == {"n": "two"}
            assert letter.headers is not None
            assert "Expected `int`" in letter.headers["$reason"]
            letter.ack()


@pytest.mark.parametrize("credit", [1, None, 1000])
def test_a_worker_that_is_killed_loses_nothing(bus: str, credit: int | None) -> None:
    """What it had in hand is done again, by another: no more than its credit, and each with the next attempt."""
    attempts: Counter[int] = Counter()
    done = set()
    with zmqbus.Node("owner", bus=bus) as owner, zmqbus.Node("b", bus=bus) as other:
        with working(bus, 0.3, credit=credit) as (victim, first):
            owner.wait_for_peers(2, 10)
            owner.push_many("jobs", range(200))
            eventually(lambda: len(first) >= 5)
            worker = other.pull("jobs", credit=10)
            os.kill(victim.pid, signal.SIGKILL)
            while left(owner):
                if (job := worker.get(0.1)) is not None:
                    with job:
                        attempts[job.attempt] += 1
                        done.add(job.value)
        assert {value for value, _ in first} | done == set(range(200))
        assert 1 <= attempts[2] <= (credit or 16)
        assert attempts[1] + attempts[2] == sum(attempts.values())


AT_ONCE = """
import os, sys, zmqbus
with zmqbus.Node("worker", bus=sys.argv[1], discovery="static", peers=[sys.argv[2]]) as node:
    for job in node.pull("jobs", credit=10):
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("turn", range(5))
def test_a_worker_that_dies_as_soon_as_it_has_come_is_noticed(bus: str, turn: int) -> None:
    """Its first job is its end, when hardly anybody knew it."""
    with zmqbus.Node("owner", bus=bus, discovery="static") as owner, zmqbus.Node("w", bus=bus) as node:
        owner.push_many("jobs", range(5))
        died = subprocess.run([sys.executable, "-c", AT_ONCE, bus, owner.endpoints["inbox"]], timeout=60, check=False)
        assert died.returncode == -9
        began = time.monotonic()
        worker = node.pull("jobs")
        with zmqbus.Node("go-between", bus=bus, peers=[owner.endpoints["inbox"]]):
            for job in take(worker, 5):
                job.ack()
            worker.flush(10)
        assert time.monotonic() - began < 10, "not by its lease"


def test_a_stopped_worker_keeps_nothing_and_is_refused(bus: str) -> None:
    """Its lease runs out meanwhile. When it goes on, what it says late is refused, and it goes on working."""
    with zmqbus.Node("owner", bus=bus) as owner, zmqbus.Node("w", bus=bus) as node:
        node.wait_for_peers(1, 10)
        slow = node.pull("jobs", credit=1, lease=0.5)
        owner.push("jobs", "a")
        job = take(slow, 1)[0]
        fast = node.pull("jobs", credit=1)
        again = take(fast, 1)[0]
        assert (again.value, again.attempt) == ("a", 2)
        with node.events() as events:
            job.ack()
            refused = wait_for(events, zmqbus.JobRefused)[0]
        assert refused == zmqbus.JobRefused("jobs", owner.origin, 1, 1)
        assert left(owner) == 1
        again.ack()
        fast.flush(10)
        assert left(owner) == 0
        with pytest.raises(zmqbus.NotSettled):
            slow.flush(10)
        fast.close()
        owner.push("jobs", "b")
        take(slow, 1)[0].ack()
        slow.flush(10)


def test_a_late_acknowledgement_of_the_same_attempt_counts(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    worker = b.pull("jobs", credit=1, lease=0.3)
    a.push("jobs", "x")
    job = take(worker, 1)[0]
    time.sleep(0.6)
    job.ack()
    worker.flush(10)
    assert left(a) == 0
    assert worker.refused == 0


def test_who_needs_longer_says_so(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    worker = b.pull("jobs", credit=1, lease=2)
    a.push("jobs", "x")
    job = take(worker, 1)[0]
    job.extend(60)
    other = b.pull("jobs", credit=1)
    assert other.get(2.5) is None
    job.ack()
    worker.flush(10)


def test_jobs_that_wait_behind_a_long_one_go_to_others_untried(bus: str) -> None:
    """They come back before their lease is over, so that the attempt does not count."""
    with zmqbus.Node("owner", bus=bus) as owner, zmqbus.Node("w", bus=bus) as node:
        node.wait_for_peers(1, 10)
        stuck = node.pull("jobs", credit=10, lease=4)
        owner.push_many("jobs", range(10))
        job = take(stuck, 1)[0]
        other = node.pull("jobs", credit=100)
        job.extend(60)
        jobs = take(other, 9)
        assert {job.value for job in jobs} == set(range(1, 10))
        assert {job.attempt for job in jobs} == {1}
        for each in [job, *jobs]:
            each.ack()


def test_the_work_goes_to_whom_can_do_it(bus: str) -> None:
    """A slow worker beside two fast ones: it holds up nobody. Ideal is what the fast ones alone would take."""
    with zmqbus.Node("owner", bus=bus) as owner, zmqbus.Node("w", bus=bus) as node:
        node.wait_for_peers(1, 10)
        did: Counter[str] = Counter()

        def work(worker: zmqbus.Worker, name: str, seconds: float) -> None:
            for job in worker:
                with job:
                    time.sleep(seconds)
                    did[name] += 1

        speeds = {"slow": 0.1, "fast": 0.001, "fast too": 0.001}
        workers = {name: node.pull("jobs") for name in speeds}
        threads = [threading.Thread(target=work, args=(workers[name], name, s)) for name, s in speeds.items()]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        owner.push_many("jobs", range(2000))
        eventually(lambda: left(owner) == 0, timeout=60)
        took = time.monotonic() - began
        for worker in workers.values():
            worker.close()
        for thread in threads:
            thread.join(10)
        assert did["slow"] <= took / 0.1 + 1
        assert min(did["fast"], did["fast too"]) > 600
        assert workers["slow"].credit <= 8


def test_a_worker_that_leaves_hands_on_at_once(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    a, b = pair
    leaving = b.pull("jobs", credit=100)
    a.push_many("jobs", range(50))
    job = take(leaving, 1)[0]
    staying = b.pull("jobs", credit=100)
    job.ack()
    began = time.monotonic()
    leaving.close()
    assert time.monotonic() - began < 1
    jobs = take(staying, 49)
    assert {job.attempt for job in jobs} == {1}
    for job in jobs:
        job.ack()
    staying.flush(10)
    assert left(a) == 0


def test_an_owner_that_leaves_takes_its_jobs_along(bus: str) -> None:
    with zmqbus.Node("w", bus=bus) as node, node.events() as events:
        worker = node.pull("jobs")
        with zmqbus.Node("owner", bus=bus) as owner:
            owner.push("jobs", 1)
            owner.push("jobs", 2)
            job = take(worker, 1)[0]
            assert [(u.peer, u.unacked) for u in owner.close(0.2)] == [("queue jobs", 2)]
        eventually(lambda: not node.peers())
        assert worker.get(0) is None
        job.ack()
        assert wait_for(events, zmqbus.JobRefused)[0].seq == 1
        with zmqbus.Node("another", bus=bus) as another:
            another.push("jobs", "x")
            with take(worker, 1)[0] as job:
                assert job.value == "x"


def test_groups_share_what_is_published(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as web, zmqbus.Node("w", bus=bus) as node:
        node.wait_for_peers(1, 10)
        one, two = (node.pull("logs.>", group="indexers", credit=10) for _ in range(2))
        archive = node.pull("logs.>", group="archive")
        eventually(lambda: len(web._engine.jobs.figures()) == 0 and len(web._engine.jobs._groups) == 2)
        for number in range(100):
            web.publish("logs.web", number)
        shared: list[list[int]] = [[], []]
        while sum(map(len, shared)) < 100:
            for mine, worker in zip(shared, (one, two), strict=True):
                while (job := worker.get(0.1)) is not None:
                    with job:
                        mine.append(job.value)
        assert sorted(shared[0] + shared[1]) == list(range(100))
        assert all(shared)
        jobs = take(archive, 100)
        assert [job.value for job in jobs] == list(range(100))
        for job in jobs:
            job.ack()


def test_a_queue_in_memory_outlives_its_workers(bus: str) -> None:
    """A storm: workers come, take a few, and go, in good order or not."""
    with zmqbus.Node("owner", bus=bus) as owner:
        owner.push_many("jobs", range(400))
        done: Counter[int] = Counter()
        for turn in range(8):
            with zmqbus.Node(f"w{turn}", bus=bus) as node:
                worker = node.pull("jobs", credit=30)
                for _ in range(50):
                    with take(worker, 1)[0] as job:
                        done[job.value] += 1
                worker.flush(10)
                if turn % 2:
                    worker.close()
        assert left(owner) == 0
        assert done == Counter(range(400))


def test_a_thread_that_is_late_does_not_keep_jobs_from_the_others(pair: tuple[zmqbus.Node, zmqbus.Node]) -> None:
    """It has let a lease run out, and is at it still. Who waits beside it is alive."""
    a, b = pair
    with b.pull("jobs", lease=0.5, credit=4) as worker:
        a.push("jobs", "late")
        late = take(worker, 1)[0]
        eventually(lambda: a._engine.jobs.figures()[0].in_flight == 0)
        a.push("jobs", "other")
        while (job := take(worker, 1, 20)[0]).value != "other":
            assert (job.value, job.attempt) == ("late", 2)
            job.ack()
        job.ack()
        late.ack()


def test_who_waits_for_nothing_gets_nothing_after_a_lease_has_run_out(
    pair: tuple[zmqbus.Node, zmqbus.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hang. So it does not swallow lease after lease."""
    monkeypatch.setattr("zmqbus.node.work.queues.workers.ROUND", 0.1)
    a, b = pair
    with b.pull("jobs", lease=0.5, credit=4) as worker:
        a.push("jobs", "late")
        job = take(worker, 1)[0]
        eventually(lambda: a._engine.jobs.figures()[0].in_flight == 0)
        a.push("jobs", "other")
        time.sleep(1.0)
        figures = a._engine.jobs.figures()[0]
        assert (figures.waiting, figures.in_flight) == (2, 0)
        job.ack()


def test_a_peer_that_has_gone_is_forgotten(bus: str) -> None:
    with zmqbus.Node("worker", bus=bus) as node, node.pull("jobs") as worker:
        for turn in range(3):
            with zmqbus.Node(f"owner-{turn}", bus=bus) as owner:
                owner.push("jobs", turn)
                with take(worker, 1)[0] as job:
                    assert job.value == turn
        eventually(lambda: list(worker._hand.ties) == [node.origin])
