"""Pull in asyncio: the same, by tasks, on the node's own loop."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

import zmqbus
from tests.node.queues.scripted import owning
from zmqbus.node.work.queues import workers
from zmqbus.protocol import commands


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run it, and fail on what goes wrong in the loop's corners."""
    troubles: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        await asyncio.wait_for(main, 60)

    asyncio.run(watched())
    assert not troubles


@asynccontextmanager
async def two(bus: str) -> AsyncIterator[tuple[zmqbus.AsyncNode, zmqbus.AsyncNode]]:
    async with zmqbus.AsyncNode("a", bus=bus) as a, zmqbus.AsyncNode("b", bus=bus) as b:
        await a.wait_for_peers(1, 10)
        await b.wait_for_peers(1, 10)
        yield a, b


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.002)


def left(*nodes: zmqbus.AsyncNode) -> int:
    return sum(node._engine.jobs.left for node in nodes)


async def take(worker: zmqbus.AsyncWorker, count: int) -> list[zmqbus.Job]:
    jobs = [await worker.get(10) for _ in range(count)]
    assert None not in jobs
    return [job for job in jobs if job is not None]


@pytest.mark.parametrize("form", ["iterate", "enter", "await", "get", "next"])
def test_every_form_of_pulling(bus: str, form: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            for number in range(300):
                await a.push("jobs", number)
            got: list[int] = []

            async def consume() -> None:
                worker = b.pull("jobs")
                if form == "await":
                    worker = await worker
                if form == "enter":
                    async with worker:
                        async for job in worker:
                            async with job:
                                got.append(job.value)
                            if len(got) == 300:
                                return
                elif form in ("get", "next"):
                    while len(got) < 300:
                        job = await (worker.get() if form == "get" else worker.__anext__())
                        assert job is not None
                        with job:
                            got.append(job.value)
                else:
                    async for job in worker:
                        got.append(job.value)
                        job.ack()
                        if len(got) == 300:
                            return

            await consume()
            gc.collect()
            assert got == list(range(300))
            await until(lambda: left(a) == 0)
            await until(lambda: b.statistics()["workers"] == 0)

    run(main())


def test_tasks_share_a_worker_and_none_sleeps_beside_work(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            done: Counter[int] = Counter()
            all_have_one = asyncio.Barrier(50)

            async def work(worker: zmqbus.AsyncWorker) -> None:
                async for job in worker:
                    async with job, asyncio.timeout(20):
                        await all_have_one.wait()
                        done[job.value] += 1

            async with b.pull("jobs") as worker:
                tasks = [asyncio.create_task(work(worker)) for _ in range(50)]
                for number in range(500):
                    await a.push("jobs", number)
                await until(lambda: left(a) == 0)
            await asyncio.gather(*tasks)
            assert done == Counter(range(500))

    run(main())


def test_a_cancelled_task_takes_no_job_with_it(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.pull("jobs", credit=100) as worker:
            got: list[int] = []
            pushed = 0
            for turn in range(200):
                task = asyncio.create_task(worker.get())
                other = asyncio.create_task(worker.get(0.05))
                await asyncio.sleep(0)
                await a.push("jobs", pushed)
                pushed += 1
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                task.cancel()
                for job in await asyncio.gather(task, other, return_exceptions=True):
                    if isinstance(job, zmqbus.Job):
                        got.append(job.value)
                        job.ack()
            while len(got) < pushed:
                with (await take(worker, 1))[0] as job:
                    got.append(job.value)
            assert sorted(got) == list(range(pushed))
            await worker.flush(10)
            assert left(a) == 0

    run(main())


def test_the_outcome_of_a_block(bus: str) -> None:
    async def main() -> None:
        with owning(bus) as owner:
            async with zmqbus.AsyncNode("w", bus=bus, peers=[owner.inbox], discovery="static") as node:
                await node.wait_for_peers(1, 10)
                worker = await node.pull("jobs")
                await until(lambda: owner.joins)
                owner.give(*range(4))
                jobs = await take(worker, 4)
                async with jobs[0]:
                    pass
                with pytest.raises(ValueError, match="boom"):
                    async with jobs[1]:
                        raise ValueError("boom")

                async def hang() -> None:
                    async with jobs[2]:
                        await asyncio.sleep(60)

                task = asyncio.create_task(hang())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                await asyncio.get_running_loop().run_in_executor(None, jobs[3].ack)
                await worker.flush(10)
                assert sorted(seq for _, seq, _ in owner.done) == [1, 4]
                said = {fail.jobs[0][1]: (fail.how, fail.reason) for fail in owner.of(commands.Fail)}
                assert said == {2: ("nack", "ValueError: boom"), 3: ("return", "CancelledError")}
                await worker.close()

    run(main())


def test_an_idle_worker_says_at_once_what_it_has_done(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LATE", 1000.0)

    async def main() -> None:
        async with two(bus) as (a, b), b.pull("jobs") as worker:
            for number in range(100):
                await a.push("jobs", number)
                with (await take(worker, 1))[0]:
                    pass
                await until(lambda: left(a) == 0)
            for number in range(10):
                await a.push("jobs", number)
            for job in await take(worker, 10):
                job.ack()
            assert await worker.get(0) is None
            await until(lambda: left(a) == 0)

    run(main())


def test_close_returns_what_was_not_begun_and_waits_for_the_rest(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            worker = await b.pull("jobs", credit=10)
            for number in range(10):
                await a.push("jobs", number)
            job = (await take(worker, 1))[0]
            waiting = [asyncio.create_task(worker.get()) for _ in range(0)]
            closing = asyncio.create_task(worker.close(10))
            other = await b.pull("jobs", credit=100)
            rest = await take(other, 9)
            assert {job.attempt for job in rest} == {1}
            assert not closing.done()
            with pytest.raises(zmqbus.NodeClosed):
                await worker.get(0)
            job.ack()
            await closing
            for job in rest:
                job.ack()
            await asyncio.gather(*waiting)
            waiting = [asyncio.create_task(other.get()) for _ in range(5)]
            await asyncio.sleep(0.05)
            await other.close()
            assert await asyncio.gather(*waiting) == [None] * 5
            assert left(a) == 0

    run(main())


def test_the_node_closes_its_workers(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            worker = await b.pull("jobs")
            tasks = [asyncio.create_task(worker.get()) for _ in range(3)]
            await asyncio.sleep(0.05)
            await b.close()
            assert await asyncio.gather(*tasks) == [None] * 3
            with pytest.raises(zmqbus.NodeClosed):
                await worker.get(0)
            unopened = b.pull("jobs")
            with pytest.raises(zmqbus.NodeClosed):
                await unopened.get(0)
            del a

    run(main())


@pytest.mark.parametrize("wrong", [{"lease": -1}, {"credit": 0}, {"group": "a b"}, {"start": "x"}, {"queue": "a..b"}])
def test_what_cannot_be_asked_for(bus: str, wrong: dict[str, Any]) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode("a", bus=bus) as node:
            with pytest.raises((zmqbus.SetupError, zmqbus.TopicError)):
                await node.pull(**{"queue": "jobs", **wrong})
            with pytest.raises((zmqbus.SetupError, zmqbus.TopicError)):
                async for _ in node.pull(**{"queue": "jobs", **wrong}):
                    pass

    run(main())


def test_the_loop_has_its_turns_while_there_is_much_to_do(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            await a.push_many("jobs", range(100_000))
            longest, last, done = 0.0, time.thread_time(), 0

            async def beat() -> None:
                nonlocal longest, last
                while True:
                    await asyncio.sleep(0)
                    longest = max(longest, -last + (last := time.thread_time()))

            async with b.pull("jobs") as worker:
                task = asyncio.create_task(beat())
                async for job in worker:
                    job.ack()
                    done += 1
                    if done == 100_000:
                        break
                task.cancel()
                await worker.flush(10)
            assert left(a) == 0
            assert longest < 0.2

    run(main())


def test_a_forked_child_has_none_of_it(bus: str) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode("a", bus=bus) as node, node.pull("jobs") as worker:
            await node.push("jobs", 1)
            job = (await take(worker, 1))[0]
            ours, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    job.ack()
                except zmqbus.ForkedProcess:
                    os.write(theirs, b"forked")
                os._exit(0)
            os.waitpid(child, 0)
            assert os.read(ours, 100) == b"forked"
            os.close(ours)
            os.close(theirs)
            job.ack()
            await worker.flush(10)

    run(main())
