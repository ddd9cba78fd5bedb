"""A forwarder takes over what waits at its publisher, and nothing is given out by both."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

import zmqbus


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def next_job(worker: zmqbus.AsyncWorker) -> zmqbus.Job:
    job = await worker.get(20)
    assert job is not None, "no job came"
    return job


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_what_waits_is_handed_over_and_what_was_given_out_is_not(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static") as producer:
            seed = [producer.endpoints["inbox"]]
            jobs = producer._engine.jobs
            async with (
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a", credit=10) as worker,
            ):
                for number in range(1000):
                    await producer.push("jobs.a", number)
                held = [await next_job(worker) for _ in range(5)]
                async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed) as forwarder:
                    await until(lambda: jobs.left < 1000)
                    kept = jobs.left
                    assert 5 <= kept <= 10 + 16  # what the worker has, and what was cut of the same batch
                    await until(lambda: forwarder.counters()["journal_messages"] == 1000 - kept)
                    seen = Counter(job.value for job in held)
                    for job in held:
                        job.ack()
                    while seen.total() < 1000:
                        job = await next_job(worker)
                        assert job.attempt == 1
                        seen[job.value] += 1
                        job.ack()
                    await worker.flush(20)
                    assert seen == Counter(range(1000))
                    [figures] = [one for one in forwarder.queues() if not one.group]
                    assert (figures.waiting, figures.in_flight, figures.done) == (0, 0, 1000 - kept)
                    assert jobs.left == 0

                    # From now on it is the forwarder's, which also has the disk.
                    await producer.push("jobs.a", "durable", durable=True, timeout=20)
                    job = await next_job(worker)
                    assert job.value == "durable"
                    job.ack()
                    await worker.flush(20)
                    assert await worker.get(0.3) is None

    run(main())


def test_a_forwarder_that_is_away_is_waited_for(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static") as producer:
            seed = [producer.endpoints["inbox"]]
            async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed):
                await producer.push("jobs.a", 1, durable=True, timeout=20)
            async with (
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a") as worker,
            ):
                await producer.push("jobs.a", 2)
                assert await worker.get(0.5) is None, "it is the forwarder's to give out"
                async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed):
                    values = set()
                    for _ in range(2):
                        job = await next_job(worker)
                        values.add(job.value)
                        job.ack()
                    assert values == {1, 2}
                    await worker.flush(20)

    run(main())


def test_what_the_producer_gives_out_itself_is_not_durable_before_it_is_done(bus: str, tmp_path: Path) -> None:
    """A forwarder acknowledges what follows it. Neither a durable push nor a flush takes that for its own."""

    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static") as producer:
            seed = [producer.endpoints["inbox"]]
            async with (
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a", credit=1) as worker,
            ):
                first = asyncio.create_task(producer.push("jobs.a", 1, durable=True, timeout=60))
                job = await next_job(worker)
                async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed):
                    assert await producer.push("jobs.a", 2, durable=True, timeout=20) == 2
                    assert not first.done()
                    with pytest.raises(zmqbus.NotDurable) as caught:
                        await producer.flush(0.2)
                    assert caught.value.unacked == 1
                    job.ack()
                    assert await asyncio.wait_for(first, 20) == 1
                    await producer.flush(20)
                    (await next_job(worker)).ack()
                    await worker.flush(20)

    run(main())


def test_nothing_is_owed_to_a_forwarder_of_what_was_done_before_it_came(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        producer = await zmqbus.AsyncNode("producer", bus=bus, discovery="static").open()
        seed = [producer.endpoints["inbox"]]
        async with (
            zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
            node.pull("jobs.a", credit=1) as worker,
        ):
            await producer.push("jobs.a", 1)
            (await next_job(worker)).ack()
            await worker.flush(20)
            async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed):
                await until(lambda: producer._engine.jobs._queues["jobs.a"].handed)
                await producer.flush(20)
                assert await producer.close(20) == []

    run(main())


def test_an_outbox_gives_out_nothing_itself(bus: str, tmp_path: Path) -> None:
    """Also what is not durable waits for a forwarder there, and is done once."""

    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static", outbox=tmp_path / "outbox") as producer:
            seed = [producer.endpoints["inbox"]]
            async with (
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a") as worker,
            ):
                await producer.push("jobs.a", "first")
                await node.wait_for_peers(1, 20)
                assert await worker.get(0.3) is None
                await producer.push("jobs.a", "second")
                async with zmqbus.Forwarder(tmp_path / "journal", bus=bus, discovery="static", peers=seed):
                    jobs = [await next_job(worker) for _ in range(2)]
                    assert [(job.value, job.attempt) for job in jobs] == [("first", 1), ("second", 1)]
                    for job in jobs:
                        job.ack()
                    await worker.flush(20)
                    assert await worker.get(0.3) is None

    run(main())


def test_what_a_forwarder_claims_no_longer_is_given_out_by_its_producer(bus: str, tmp_path: Path) -> None:
    """Also what was pushed while that forwarder was away, on a topic that had never been pushed to before."""

    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static") as producer:
            seed = [producer.endpoints["inbox"]]
            where = {"bus": bus, "discovery": "static", "peers": seed}
            async with zmqbus.Forwarder(tmp_path / "journal", **where):  # type: ignore[arg-type]
                await producer.publish("logs.a", 1, durable=True, timeout=20)
            began = time.time()
            for number in range(5):
                await producer.push("jobs.a", number)
            async with (
                zmqbus.Forwarder(tmp_path / "journal", topics=["logs.>"], **where),  # type: ignore[arg-type]
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a") as worker,
            ):
                jobs = [await next_job(worker) for _ in range(5)]
                assert sorted(job.value for job in jobs) == list(range(5))
                assert all(began - 1 <= job.time <= time.time() for job in jobs)
                for job in jobs:
                    job.ack()
                await worker.flush(20)
                assert producer._engine.jobs.left == 0

    run(main())


def test_what_is_pushed_as_a_claim_ends_passes_nobody(
    bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a forwarder that is away has not acknowledged, and not what follows it."""

    async def main() -> None:
        async with zmqbus.AsyncNode("producer", bus=bus, discovery="static") as producer:
            seed = [producer.endpoints["inbox"]]
            where = {"bus": bus, "discovery": "static", "peers": seed}
            async with zmqbus.Forwarder(tmp_path / "journal", **where):  # type: ignore[arg-type]
                await producer.push("jobs.a", 0, durable=True, timeout=20)
            for number in range(1, 4):
                await producer.push("jobs.a", number)
            outlet = producer._engine.outlet
            claimed = outlet.claimed

            def and_push(journal: int, patterns: Sequence[str]) -> None:
                claimed(journal, patterns)
                publisher = outlet.publishers["jobs.a"]
                for number in (4, 5):  # as another thread may, just then
                    publisher.send(number)
                publisher.send_now()

            monkeypatch.setattr(outlet, "claimed", and_push)
            async with (
                zmqbus.Forwarder(tmp_path / "journal", topics=["logs.>"], **where),  # type: ignore[arg-type]
                zmqbus.AsyncNode("worker", bus=bus, discovery="static", peers=seed) as node,
                node.pull("jobs.a") as worker,
            ):
                jobs = [await next_job(worker) for _ in range(5)]
                assert sorted(job.value for job in jobs) == [1, 2, 3, 4, 5]
                monkeypatch.undo()
                for job in jobs:
                    job.ack()
                await worker.flush(20)

    run(main())
