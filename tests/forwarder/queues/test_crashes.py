"""A forwarder that is killed at any instant: every acknowledged push is handled, and no confirmed one twice."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import Counter, deque
from pathlib import Path
from random import Random

import pytest

from tests.forwarder.conftest import SOON
from tests.forwarder.forwarders import ForwarderProcess
from tests.forwarder.queues.conftest import worker_at
from tests.node.conftest import eventually
from tests.node.queues.raw_worker import Got, RawWorker
from zmqbus import Node
from zmqbus.errors import NotDurable
from zmqbus.protocol import commands

QUEUES = ("jobs.a", "jobs.b")
LOGS = "logs.a"

Job = tuple[str, int, int]
"""Topic, seq and which worker's share."""


class Producer(threading.Thread):
    """Pushes and publishes until it is told to stop; notes what was acknowledged."""

    def __init__(self, node: Node, rng: Random) -> None:
        super().__init__()
        self.node, self.rng = node, rng
        self.over = threading.Event()
        self.acked: set[tuple[str, int]] = set()

    def run(self) -> None:
        while not self.over.is_set():
            queue = self.rng.choice(QUEUES)
            for _ in range(self.rng.choice((0, 1, 20))):
                self.node.push(queue, b"x" * 50)
            self.node.publish(LOGS, b"y" * 50)
            with contextlib.suppress(NotDurable):
                self.acked.add((queue, self.node.push(queue, b"d", durable=True, timeout=0.3)))
            time.sleep(0.002)


class Account:
    """What workers were given, and what was confirmed to them, over all lives of the forwarder."""

    def __init__(self) -> None:
        self.given: Counter[tuple[str, int]] = Counter()
        self.confirmed: set[tuple[str, int]] = set()
        self.failed: Counter[tuple[str, int]] = Counter()
        """Nacks that were confirmed."""

    def take(self, job: Got) -> None:
        key = job.topic, job.seq
        assert key not in self.confirmed, f"{key} was given again after it was confirmed (attempt {job.attempt})"
        assert job.attempt >= min(self.failed[key], 4) + 1, f"{key}: attempt {job.attempt} after {self.failed[key]}"
        self.given[key] += 1


class Worker:
    """One life of a worker, as long as the forwarder's at most."""

    def __init__(self, raw: RawWorker, account: Account, rng: Random, credit: int) -> None:
        self.raw, self.account, self.rng, self.credit = raw, account, rng, credit
        self.said: deque[tuple[bool, list[Got]]] = deque()
        raw.say(commands.Join(1, ["jobs.*", "logs.>"], "g", 30_000, self.credit, 0))

    def turn(self, nacks: bool = True) -> None:
        """Take what is there, and answer some of it."""
        while self.raw._dealer.poll(1):
            command = self.raw._next(0)
            assert command is not None
            assert not isinstance(command.body, commands.Error), command.body
            if isinstance(command.body, commands.Settled):
                assert command.body.refused == []
                done, jobs = self.said.popleft()
                for job in jobs:
                    if done:
                        self.account.confirmed.add((job.topic, job.seq))
                    else:
                        self.account.failed[job.topic, job.seq] += 1
        jobs, self.raw.jobs = self.raw.jobs, []
        for job in jobs:
            self.account.take(job)
        if jobs:
            self.rng.shuffle(jobs)
            cut = len(jobs) // 10 if nacks else 0
            self.credit += len(jobs)
            self.answer(False, jobs[:cut])
            self.answer(True, jobs[cut:])

    def answer(self, done: bool, jobs: list[Got]) -> None:
        if jobs:
            ranges = [(job.delivery, job.seq, job.seq) for job in jobs]
            self.said.append((done, jobs))
            if done:
                self.raw.say(commands.Done(1, ranges, self.credit))
            else:
                self.raw.say(commands.Fail(1, ranges, "nack", 0, "not now", self.credit))


def lives(path: Path, bus: str, seed: int, kills: int) -> tuple[Account, Producer]:
    """Kill it that often, and then let everything come to an end."""
    rng, account = Random(seed), Account()
    with ForwarderProcess(path, bus=bus, name="forwarder") as forwarder, Node("producer", bus=bus) as node:
        for topic in QUEUES:
            node.push(topic, "first", durable=True, timeout=SOON)
        producer = Producer(node, Random(seed + 1))
        producer.start()
        try:
            for _ in range(kills):
                with worker_at(forwarder, bus) as one, worker_at(forwarder, bus) as two:
                    workers = [Worker(raw, account, rng, rng.choice((1, 30, 500))) for raw in (one, two)]
                    until = time.monotonic() + rng.choice((0.05, 0.3, 1.0)) * rng.random()
                    while time.monotonic() < until:
                        for worker in workers:
                            worker.turn()
                    forwarder.kill()
                forwarder.start()
        finally:
            producer.over.set()
            producer.join()
        node.flush(SOON)
        sent = {topic: node._publishers[topic].sent for topic in (*QUEUES, LOGS)}
        with worker_at(forwarder, bus) as raw:
            worker = Worker(raw, account, rng, 1000)

            def is_done() -> bool:
                worker.turn(nacks=False)
                if worker.said:  # what is heard before what is asked for would be lost
                    return False
                raw.say(commands.Stats())
                told = raw.hear(commands.Statistics)
                left = sum(one.waiting + one.in_flight + one.delayed for one in told.queues if "$" not in one.topic)
                return not left and not raw.jobs

            eventually(is_done, 60)
    everything = {(topic, seq) for topic, last in sent.items() for seq in range(1, last + 1)}
    assert everything == set(account.given), "nothing is lost, acknowledged or not: its producer is still there"
    assert producer.acked <= everything
    return account, producer


def test_killed_at_any_instant(journal: Path, bus: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    account, producer = lives(journal, bus, seed, 8)
    assert len(producer.acked) > 20
    assert sum(account.failed.values()) > 10


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("run", range(20))
def test_killed_at_any_instant_again_and_again(journal: Path, bus: str, run: int) -> None:
    """20 runs of 40 kills: some 20 minutes."""
    seed = secrets.randbits(32)
    print("seed", seed)
    lives(journal, bus, seed, 40)
