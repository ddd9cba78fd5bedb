"""What becomes of jobs when workers are uneven, many, few, or come and go, and when producers are many or gone at once.

Each with a forwarder, and without one.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

import zmqbus
from tests.forwarder.forwarders import Running, running
from tests.node.conftest import eventually

SOON = 30.0
ROOT = Path(__file__).parents[2]


class Place:
    """A bus on which everybody finds everybody, with a forwarder or without."""

    def __init__(self, stack: ExitStack, forwarder: Running | None, first: zmqbus.Node) -> None:
        self._stack = stack
        self.forwarder = forwarder
        self.first = first
        self.bus = first._engine.config.bus
        self.seed = first.endpoints["inbox"]

    def node(self, name: str) -> zmqbus.Node:
        node = zmqbus.Node(name, bus=self.bus, discovery="static", peers=[self.seed])
        return self._stack.enter_context(node)

    def push(self, node: zmqbus.Node, values: range) -> None:
        """All of it is where it should be when this returns."""
        if self.forwarder is None:
            node.push_many("jobs", values)
            return
        node.push("jobs", values[0], durable=True, timeout=SOON)
        node.push_many("jobs", values[1:])
        node.flush(SOON)

    def child(self, program: str) -> subprocess.CompletedProcess[str]:
        """A process that runs this, and may use `bus` and `seed`."""
        text = f"import os, zmqbus\nbus, seed = {self.bus!r}, {self.seed!r}\n{program}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(params=["none", "forwarder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    bus = f"test-{secrets.token_hex(6)}"
    with ExitStack() as stack:
        first = stack.enter_context(zmqbus.Node("first", bus=bus, discovery="static"))
        forwarder = None
        if request.param == "forwarder":
            forwarder = stack.enter_context(
                running(tmp_path / "journal", bus=bus, discovery="static", peers=[first.endpoints["inbox"]])
            )
            eventually(lambda: bool(first._engine._forwarders))
        yield Place(stack, forwarder, first)


def labour(worker: zmqbus.Worker, over: Callable[[], bool], done: Counter[int], pause: float = 0.0) -> int:
    """Do jobs until it is over. Returns how many."""
    count = 0
    while not over():
        if (job := worker.get(0.05)) is not None:
            time.sleep(pause)
            done[job.value] += 1
            count += 1
            job.ack()
    return count


def test_a_slow_worker_holds_up_nobody(place: Place) -> None:
    """One takes 100 ms for a job, two hardly any time: it has few of them, and each is done once."""
    done: Counter[int] = Counter()
    workers = [place.node(f"worker-{n}").pull("jobs") for n in range(3)]
    with ThreadPoolExecutor(3) as threads:
        futures = [
            threads.submit(labour, worker, lambda: done.total() >= 1000, done, pause)
            for worker, pause in zip(workers, (0.1, 0.0005, 0.0005), strict=True)
        ]
        place.push(place.first, range(1000))
        slow, *fast = [future.result(60) for future in futures]
    assert done == Counter(range(1000))
    assert slow < 200
    assert sum(fast) > 800


def test_with_a_credit_of_one_nothing_lies_ready(place: Place) -> None:
    """Who has one job in hand gets no other: all others go to the next."""
    busy, other = place.node("busy").pull("jobs", credit=1), place.node("other").pull("jobs", credit=1)
    place.push(place.first, range(100))
    job = busy.get(SOON)
    assert job is not None
    rest = []
    while len(rest) < 99:
        following = other.get(SOON)
        assert following is not None
        assert following.attempt == 1
        rest.append(following.value)
        following.ack()
    assert sorted([job.value, *rest]) == list(range(100))
    assert busy.received == 1
    job.ack()
    busy.flush(SOON)


def test_with_a_credit_of_a_thousand_so_many_come_and_no_more(place: Place) -> None:
    worker = place.node("worker").pull("jobs", credit=1000)
    place.push(place.first, range(1100))
    jobs = [job for _ in range(1000) if (job := worker.get(SOON)) is not None]
    assert len(jobs) == 1000
    assert worker.get(0.3) is None
    for job in jobs:
        job.ack()
    jobs += [job for _ in range(100) if (job := worker.get(SOON)) is not None]
    assert sorted(job.value for job in jobs) == list(range(1100))
    for job in jobs[1000:]:
        job.ack()
    worker.flush(SOON)


def test_a_storm_of_workers_that_come_and_go_does_each_job_once(place: Place) -> None:
    """What they return when they leave is no attempt, and what they had begun they finish."""
    done: Counter[int] = Counter()
    attempts: Counter[int] = Counter()
    sessions = Counter[str]()
    turn = threading.Lock()
    nodes = [place.node(f"worker-{n}") for n in range(4)]

    def storm(node: zmqbus.Node, rng: Random) -> None:
        while done.total() < 2000:
            with node.pull("jobs", credit=rng.choice((None, 1, 10, 500))) as worker:
                for _ in range(rng.choice((0, 1, 5, 20, 50))):
                    job = worker.get(0.02)
                    if job is not None:
                        with turn:
                            done[job.value] += 1
                            attempts[job.attempt] += 1
                        job.ack()
            sessions["all"] += 1

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(storm, node, Random(n)) for n, node in enumerate(nodes)]
        place.push(place.first, range(2000))
        for future in futures:
            future.result(60)
    assert done == Counter(range(2000))
    assert attempts == Counter({1: 2000})
    assert sessions["all"] >= 2000 / 50


def test_fifty_producers_are_served_side_by_side(place: Place) -> None:
    """One has pushed 5000 jobs before the others push ten each: theirs do not wait for the end of it."""
    producers = [place.node(f"producer-{n}") for n in range(50)]
    worker = place.node("worker").pull("jobs", credit=1)
    place.push(place.first, range(5000))
    for n, producer in enumerate(producers, 1):
        place.push(producer, range(10_000 * n, 10_000 * n + 10))
    awaited = {10_000 * n + k for n in range(1, len(producers) + 1) for k in range(10)}
    count, seen = 0, Counter[int]()
    while awaited - seen.keys():
        job = worker.get(SOON)
        assert job is not None, f"{len(awaited - seen.keys())} jobs do not come"
        seen[job.value] += 1
        count += 1
        job.ack()
    assert max(seen.values()) == 1
    assert count < 5000
    worker.close()


POISON = """
with zmqbus.Node("victim", bus=bus, discovery="static", peers=[seed]) as node:
    for job in node.pull("jobs", credit=10):
        if job.value == 20:
            os.kill(os.getpid(), 9)
        job.ack()
        if job.value == "end":
            break
"""


def test_poison_ends_as_a_dead_letter_and_takes_no_neighbour_with_it(place: Place) -> None:
    """It kills whoever takes it. After five attempts nobody is given it any more."""
    place.push(place.first, range(40))
    for _ in range(5):
        assert place.child(POISON).returncode == -9
    place.first.push("jobs", "end")
    assert place.child(POISON).returncode == 0
    undertaker = place.node("undertaker").pull("$dead.>")
    letter = undertaker.get(SOON)
    assert letter is not None
    assert letter.headers is not None
    assert (letter.topic, letter.value, letter.headers["$attempts"]) == ("$dead.jobs", 20, 5)
    letter.ack()
    assert undertaker.get(1.0) is None
    undertaker.flush(SOON)
    if place.forwarder is not None:
        assert place.first.close(SOON) == []
        left = {figures.topic: figures.waiting + figures.in_flight for figures in place.forwarder.forwarder.queues()}
        assert left["jobs"] == left["$dead.jobs"] == 0


@pytest.mark.parametrize("end", ["", "os._exit(0)", "os.kill(os.getpid(), 9)"], ids=["exit", "_exit", "killed"])
def test_a_producer_that_is_gone_at_once(place: Place, end: str) -> None:
    """What it pushed durably is done all the same; without a forwarder it is told that this cannot be, and what it
    pushed is gone with it, as the documentation says."""
    if place.forwarder is not None:
        done = place.child(
            'node = zmqbus.Node("brief", bus=bus, discovery="static", peers=[seed])\n'
            'node.push("jobs", "kept", durable=True, timeout=30)\n' + end
        )
        assert done.stderr == ""
        job = place.node("worker").pull("jobs").get(SOON)
        assert job is not None
        assert (job.value, job.attempt) == ("kept", 1)
        job.ack()
        return
    done = place.child(
        'node = zmqbus.Node("brief", bus=bus, discovery="static", peers=[seed])\n'
        "try:\n"
        '    node.push("jobs", "gone", durable=True, timeout=0.1)\n'
        "except zmqbus.NotDurable:\n"
        '    print("not durable", flush=True)\n' + end
    )
    assert (done.stdout, done.stderr) == ("not durable\n", "")
    assert place.node("worker").pull("jobs").get(0.5) is None


def test_a_producer_that_closes_at_once_waits_for_workers(place: Place) -> None:
    worker = place.node("worker").pull("jobs")
    done: Counter[int] = Counter()
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(labour, worker, lambda: done.total() >= 100, done)
        program = """
node = zmqbus.Node("brief", bus=bus, discovery="static", peers=[seed])
node.wait_for_peers(2, 30)
node.push_many("jobs", range(100))
print(node.close(30))
"""
        assert place.child(program).stdout == "[]\n"
        assert future.result(60) == 100
    assert done == Counter(range(100))
