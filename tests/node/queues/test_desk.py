"""Who cannot be sent what it was to have: what it had, and what it did not get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from zmqbus.node.work.queues.desk import Desk
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Body, Command
from zmqbus.protocol.frames import DATA, QUEUED, Batch, encode_frame, encode_values
from zmqbus.protocol.queues.work import Work

QUEUE = "jobs"


def batch(first: int, payload: bytes, count: int = 1) -> Batch:
    frame = encode_frame(QUEUE.encode() + b"\0", DATA, QUEUED, count, 7, first, 0, payload)
    return Batch(QUEUE.encode(), QUEUED, count, 7, first, 0, (frame,))


class Bench:
    """A desk, and what it sends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sent: list[tuple[bytes, Body]] = []
        self.unreachable: set[bytes] = set()
        self.desk = Desk(self, loop, lambda: None)
        self._loop = loop

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(work, *arguments)

    def turn(self) -> None:
        """What is to be done soon is done."""
        self._loop.run_until_complete(asyncio.sleep(0))

    def answer(self, identity: bytes, body: Body, request: int, parts: Sequence[bytes]) -> bool:
        if identity in self.unreachable:
            return False
        self.sent.append((identity, body))
        return True

    def say(self, identity: bytes, body: Body) -> None:
        assert self.desk.serve(identity, identity[0], Command(1, body, []))

    def push(self, *works: Work) -> None:
        for work in works:
            self.desk.dispatcher.add(work, 0.0)
        self.desk.deliver()

    def jobs(self, identity: bytes) -> list[tuple[int, int]]:
        """Number and attempt of each delivery that went there."""
        return [
            one
            for to, body in self.sent
            if to == identity and isinstance(body, commands.Job)
            for one in body.deliveries
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    bench = Bench(loop)
    yield bench
    bench.desk.close()
    loop.close()


def work(seq: int) -> Work:
    return Work(batch(seq, encode_values([seq])), (None, QUEUE), seq)


def test_an_attempt_of_a_worker_that_cannot_be_reached_any_more_counts(bench: Bench) -> None:
    """It may have died of it. What could not be sent to it was not tried."""
    bench.say(b"a", commands.Join(1, [QUEUE], "workers", 30_000, 1))
    bench.push(work(1), work(2), work(3))
    assert bench.jobs(b"a") == [(1, 1)]
    bench.unreachable.add(b"a")
    bench.say(b"a", commands.Done(1, [], 3))
    bench.say(b"b", commands.Join(1, [QUEUE], "workers", 30_000, 10))
    bench.turn()
    attempts = sorted(attempt for _, attempt in bench.jobs(b"b"))
    assert attempts == [1, 1, 2]


def test_what_nobody_can_decode_holds_up_nothing(bench: Bench) -> None:
    """The last of what is to be sent together is part of no batch."""
    bench.say(b"a", commands.Join(1, [QUEUE], "workers", 30_000, 2))
    bad = Work(batch(2, encode_values([2]), count=2), (None, QUEUE), 2)
    bench.push(work(1), bad)
    assert bench.jobs(b"a") == [(1, 1)]
    assert [dead.seq for dead in bench.desk.dispatcher.dead] == [2]


def test_what_nobody_can_decode_takes_no_credit(bench: Bench) -> None:
    bench.say(b"a", commands.Join(1, [QUEUE], "workers", 30_000, 2))
    bench.push(Work(batch(1, b"\xc1", count=3), (None, QUEUE), 1), work(4), work(5), work(6))
    for _ in range(3):
        bench.turn()
    assert sorted(dead.seq for dead in bench.desk.dispatcher.dead) == [1, 2, 3]
    assert len(bench.jobs(b"a")) == 2


def test_the_timer_is_set_on_the_loop_whoever_delivers(bench: Bench) -> None:
    """By the lease of what was delivered first; it is not set anew for each."""
    bench.say(b"a", commands.Join(1, [QUEUE], "workers", 30, 10))
    with ThreadPoolExecutor(1) as other:
        other.submit(bench.push, work(1)).result()
        other.submit(bench.push, work(2)).result()
    assert [attempt for _, attempt in bench.jobs(b"a")] == [1, 1]
    deadline = time.monotonic() + 10
    while len(bench.jobs(b"a")) < 3 and time.monotonic() < deadline:
        bench.say(b"a", commands.Done(1, [], 10))  # it lives
        bench.turn()
        time.sleep(0.001)
    assert bench.jobs(b"a")[2][1] == 2


def test_a_worker_that_nobody_watches_is_missed_when_there_is_no_way_to_it(bench: Bench) -> None:
    bench.say(b"a", commands.Join(1, [QUEUE], "workers", 30_000, 1))
    bench.say(b"b", commands.Join(1, [QUEUE], "workers", 30_000, 1))
    bench.push(work(1))
    assert bench.jobs(b"a") == [(1, 1)]
    bench.unreachable.add(b"a")
    bench.desk.look(lambda origin: True)  # it would have been told
    assert len(bench.desk.workers) == 2
    bench.desk.look(lambda origin: False)
    bench.turn()
    assert list(bench.desk.workers) == [(b"b"[0], 1)]
    assert bench.jobs(b"b") == [(2, 2)]
