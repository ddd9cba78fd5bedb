"""Reading the log by `AsyncNode`: what is different there."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.node.test_aio import drain, eventually, run
from zmqbus.forwarder import Forwarder


@asynccontextmanager
async def a_bus(bus: str, journal: Path) -> AsyncIterator[tuple[Forwarder, zmqbus.AsyncNode]]:
    """A forwarder, and a node that knows it."""
    async with (
        Forwarder(journal, name="store", bus=bus, discovery="static") as forwarder,
        zmqbus.AsyncNode("node", bus=bus, discovery="static", peers=[forwarder.endpoints["inbox"]]) as node,
        zmqbus.AsyncNode("writer", bus=bus, discovery="static", peers=[forwarder.endpoints["inbox"]]) as writer,
    ):
        await node.wait_for_peers(2, 10)
        await eventually(lambda: sum(bool(peer.journal) for peer in writer.peers()) == 1)
        for number in range(3000):
            await writer.publish("a", number)
        await writer.flush(20)
        yield forwarder, node


def cursors(forwarder: Forwarder) -> dict[str, int]:
    return {name: offset for name, offset, _ in forwarder.cursors()}


def test_all_its_forms(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (forwarder, node):
            seen = []
            async for message in node.subscribe("a", start="first"):
                seen.append((message.value, message.offset))
                if len(seen) == 3000:
                    break
            assert seen == [(number, number) for number in range(3000)]
            async with node.subscribe("a", durable="name", start=100) as subscription:
                assert (await drain(subscription, 1))[0].value == 100
                assert subscription.lag == 2899
                assert await subscription.get(0) is not None
            assert cursors(forwarder) == {"name": 102}
            subscription = await node.subscribe("a", durable="name")
            assert [message.value for message in await drain(subscription, 5)] == list(range(102, 107))
            await subscription.commit(10)
            assert cursors(forwarder) == {"name": 107}
            assert (subscription.lost, subscription.repaired, subscription.gaps) == (0, 0, [])
            assert "2893 behind" in repr(subscription)
            await subscription.close()
            await subscription.close()
            with pytest.raises(zmqbus.NodeClosed):
                await subscription.get(0)
            with pytest.raises(zmqbus.NodeClosed):
                await subscription.commit()

            async def failing() -> None:
                async with node.subscribe("a", durable="name") as subscription:
                    async for message in subscription:
                        if message.value == 150:
                            raise RuntimeError

            with pytest.raises(RuntimeError):
                await failing()
            assert cursors(forwarder) == {"name": 150}
            assert await (await node.subscribe("a", start="last")).get(0.05) is None
            with pytest.raises(zmqbus.SetupError, match="no cursor to commit"):
                await (await node.subscribe("a", start="first")).commit()
            with pytest.raises(zmqbus.SetupError, match="no cursor to commit"):
                await (await node.subscribe("a")).commit()
            with pytest.raises(zmqbus.SetupError, match="is not understood"):
                await node.subscribe("a", start="soon")
            with pytest.raises(zmqbus.SetupError, match="live messages"):
                node.subscribe("a", start="first", history=1)
            with pytest.raises(zmqbus.LogUnavailable):
                await node.subscribe("a", start=4000)

    run(main())


def test_left_by_break_it_commits_all_but_the_last(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (forwarder, node):
            async for message in node.subscribe("a", durable="name", start="first"):
                if message.value == 700:
                    break
            gc.collect()
            await eventually(lambda: cursors(forwarder) == {"name": 700})
            await eventually(lambda: node.statistics()["subscriptions"] == 0)

    run(main())


def test_cancelling_loses_nothing(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (_, node):
            subscription = node.subscribe("a", durable="name", start="first")
            seen: list[Any] = []

            async def consume() -> None:
                async for message in subscription:
                    assert message.offset == message.value
                    seen.append(message.value)

            rounds = 0
            while len(seen) < 3000:
                task = asyncio.create_task(consume())
                for _ in range(rounds % 7):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                rounds += 1
            waiting = asyncio.create_task(consume())
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            async with zmqbus.AsyncNode("w", bus=bus, discovery="static", peers=[node.endpoints["inbox"]]) as writer:
                await writer.publish("a", 3000, durable=True, timeout=10)
            assert (await drain(subscription, 1))[0].value == 3000
            assert seen == list(range(3000))
            assert rounds > 3

    run(main())


def test_a_task_for_each_message_commits_as_one_task_would(bus: str, tmp_path: Path) -> None:
    """`wait_for` makes a task of what it waits for."""

    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (forwarder, node):
            async with node.subscribe("a", durable="name", start="first") as subscription:
                for number in range(600):
                    message = await asyncio.create_task(subscription.get())
                    assert message is not None
                    assert message.value == number
                await eventually(lambda: cursors(forwarder) == {"name": 599})
                await subscription.commit(10)
                assert cursors(forwarder) == {"name": 600}
                await asyncio.create_task(subscription.get())
            assert cursors(forwarder) == {"name": 601}

    run(main())


def test_tasks_that_share_one_hold_back_what_they_are_at_work_on(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (forwarder, node):
            subscription = await node.subscribe("a", durable="name", start="first")
            resume = asyncio.Event()
            by_slow: list[Any] = []
            by_quick: list[Any] = []

            async def slow() -> None:
                async for message in subscription:
                    by_slow.append(message.value)
                    await resume.wait()

            async def quick() -> None:
                async for message in subscription:
                    assert message.offset == message.value
                    by_quick.append(message.value)

            tasks = [asyncio.create_task(slow()), asyncio.create_task(quick())]
            await eventually(lambda: len(by_quick) == 2999)
            await subscription.commit(10)
            assert cursors(forwarder) == {"name": by_slow[0]}
            resume.set()
            await eventually(lambda: cursors(forwarder) == {"name": 3000})
            await subscription.close()
            await asyncio.gather(*tasks)
            assert sorted(by_slow + by_quick) == list(range(3000))

    run(main())


def test_a_second_consumer_takes_over_from_one_that_waits(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (_, node):
            first = await node.subscribe("a", durable="name", start="first")
            await drain(first, 3000)
            await first.commit(10)
            waiting = asyncio.create_task(first.get())
            await asyncio.sleep(0)
            second = await node.subscribe("a", durable="name")
            with pytest.raises(zmqbus.SubscriptionTaken):
                await waiting
            with pytest.raises(zmqbus.SubscriptionTaken):
                async for _ in first:
                    pass
            assert await second.get(0) is None
            await first.close()
            await second.close()

    run(main())


def test_closing_the_node_ends_the_iteration(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (forwarder, node):
            seen: list[Any] = []

            async def consume() -> None:
                async for message in node.subscribe("a", durable="name", start="first"):
                    assert message.offset == message.value
                    seen.append(message.value)

            task = asyncio.create_task(consume())
            await eventually(lambda: len(seen) == 3000)
            await node.close()
            await asyncio.wait_for(task, 10)
            assert cursors(forwarder) == {"name": 3000}

    run(main())


def test_another_loop_is_refused(bus: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bus(bus, tmp_path / "journal") as (_, node):
            subscription = await node.subscribe("a", start="last")
            with pytest.raises(zmqbus.WrongLoop):
                await asyncio.to_thread(asyncio.run, _get(subscription))

    run(main())


async def _get(subscription: zmqbus.AsyncSubscription) -> Any:
    return await subscription.get(1)
