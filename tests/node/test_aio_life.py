"""Opening and closing `AsyncNode` and what it hands out: at any moment, in any order, leaving nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import zmqbus
from tests.node.test_aio import drain, eventually, run, two
from zmqbus.net.clock import now
from zmqbus.protocol.members.membership import DIAL_S_MIN


def alone(bus: str) -> zmqbus.AsyncNode:
    return zmqbus.AsyncNode("alone", bus=bus, discovery="static")


async def never_registered(monkeypatch: pytest.MonkeyPatch, node: zmqbus.AsyncNode) -> None:
    """From now on a subscription of this node waits for peers that do not answer."""
    monkeypatch.setattr(node._engine.peering.registry, "unregistered", lambda intake: [0])


# --- before and after ----------------------------------------------------------------------------


USES: dict[str, Callable[[zmqbus.AsyncNode], Any]] = {
    "publish": lambda node: node.publish("t", 1),
    "publisher": lambda node: node.publisher("t"),
    "flush": lambda node: node.flush(),
    "subscribe": lambda node: node.subscribe("t").__aenter__(),
    "get": lambda node: node.subscribe("t").get(0),
    "iterate": lambda node: node.subscribe("t").__anext__(),
    "peers": lambda node: node.peers(),
    "wait_for_peers": lambda node: node.wait_for_peers(0),
    "wait_for_subscribers": lambda node: node.wait_for_subscribers("t", 0),
    "topics": lambda node: node.topics(),
    "events": lambda node: node.events(),
    "statistics": lambda node: node.statistics(),
}


async def use(node: zmqbus.AsyncNode, name: str) -> None:
    result = USES[name](node)
    if asyncio.iscoroutine(result):
        await result


@pytest.mark.parametrize("name", USES)
def test_use_before_open_and_after_close_raises_node_closed(bus: str, name: str) -> None:
    async def main() -> None:
        node = alone(bus)
        with pytest.raises(zmqbus.NodeClosed, match="not open"):
            await use(node, name)
        async with node:
            if name != "iterate":  # which waits
                await use(node, name)
            sent = node.publisher("known")
            await sent.send(1)
        with pytest.raises(zmqbus.NodeClosed, match="closed"):
            await use(node, name)
        for late in (sent.send(2), node.publish("known", 2)):
            with pytest.raises(zmqbus.NodeClosed, match="closed"):
                await late

    run(main())


def test_what_a_closed_node_was_can_still_be_read(bus: str) -> None:
    async def main() -> None:
        node = alone(bus)
        assert "not open" in repr(node)
        with pytest.raises(zmqbus.NodeClosed):
            assert node.origin
        async with node:
            origin, endpoints = node.origin, node.endpoints
            assert repr(node).endswith("open>")
        assert (node.name, node.origin, node.endpoints) == ("alone", origin, endpoints)
        assert repr(node).endswith("closed>")

    run(main())


def test_opening_twice_is_once_and_a_closed_node_stays_closed(bus: str) -> None:
    async def main() -> None:
        node = alone(bus)
        assert await node.close() == []
        assert await node.open() is node
        origin = node.origin
        async with node:
            assert node.origin == origin
        assert await node.close() == []
        with pytest.raises(zmqbus.NodeClosed):
            await node.open()

    run(main())


def test_a_node_that_cannot_be_opened_leaves_nothing_and_may_be_tried_again(
    bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        node = alone(bus)
        with monkeypatch.context() as patch:
            patch.setattr(
                "zmqbus.net.sockets.SocketFactory.bind", lambda *_: (_ for _ in ()).throw(zmqbus.SetupError("no"))
            )
            with pytest.raises(zmqbus.SetupError):
                await node.open()
            with pytest.raises(zmqbus.NodeClosed, match="not open"):
                await node.publish("t", 1)
        async with node:
            assert await node.publish("t", 1) == 1

    run(main())


# --- the end of a node ---------------------------------------------------------------------------


def test_closing_the_node_ends_everyone_who_waits(bus: str) -> None:
    async def main() -> None:
        node = await alone(bus).open()
        subscription, events = await node.subscribe("t"), node.events()

        async def iterate(source: Any) -> list[Any]:
            return [item async for item in source]

        waiting = [
            asyncio.create_task(iterate(subscription)),
            asyncio.create_task(subscription.get()),
            asyncio.create_task(subscription.get(50)),
            asyncio.create_task(iterate(events)),
            asyncio.create_task(events.get()),
            asyncio.create_task(node.wait_for_peers(1)),
            asyncio.create_task(node.wait_for_subscribers("t", 9, timeout=50)),
        ]
        await asyncio.sleep(0.01)
        assert await node.close() == []
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert ended[:5] == [[], None, None, [], None]
        assert [type(end) for end in ended[5:]] == [zmqbus.NodeClosed] * 2
        with pytest.raises(zmqbus.NodeClosed):
            await subscription.get(0)
        await subscription.close()

    run(main())


def test_closing_the_node_while_a_subscription_is_pending_leaves_no_report(
    bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with two(bus) as (_, b):
            await never_registered(monkeypatch, b)

            async def wait(opening: Any) -> None:
                await opening

            tasks = [
                asyncio.create_task(wait(b.subscribe("t"))),
                asyncio.create_task(b.subscribe("t").get()),
                asyncio.create_task(b.subscribe("t").get(0)),
                asyncio.create_task(b.subscribe("t").__anext__()),
            ]
            await eventually(lambda: b.statistics()["subscriptions"] == 4)
            tasks[0].cancel()
            await asyncio.sleep(0)
            await b.close()
            ends = [type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)]
            assert ends == [asyncio.CancelledError, zmqbus.NodeClosed, type(None), zmqbus.NodeClosed]

    run(main())


def test_a_cancelled_close_still_closes_everything(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("t"):
            await a.wait_for_subscribers("t", timeout=10)
            await a.publish("t", 1)  # not consumed, so that close waits
            waiting = asyncio.create_task(a.events().get())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await a.close(timeout=50)
            assert await asyncio.wait_for(waiting, 5) is None
            assert a._engine._factory._context.closed

    run(main())


def test_who_is_heard_of_during_a_close_is_not_dialled_after_it(bus: str) -> None:
    """Leaving mDNS takes a moment, in which others come and go."""
    reports: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        async with zmqbus.AsyncNode("a", bus=bus) as node:
            peering = node._engine.peering
            assert peering._discovery is not None
            leave = peering._discovery.close

            async def close() -> None:
                peering._perform(peering._membership.hint(4711, "tcp://127.0.0.1:9", now()))
                await leave()

            peering._discovery.close = close  # type: ignore[method-assign]
        await asyncio.sleep(DIAL_S_MIN * 4)  # nobody answers: it would have been dialled again by now

    run(main())
    assert reports == []


def test_close_names_who_has_not_got_everything_in_time(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("t") as subscription:
            await a.wait_for_subscribers("t", timeout=10)
            await a.publish("t", 1)
            assert [late.peer for late in await a.close(timeout=0.05)] == ["b"]
            assert (await drain(subscription, 1))[0].value == 1

    run(main())


def test_publishers_that_wait_for_a_full_subscriber_end_with_the_node(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("load"):

            async def publish() -> None:
                while True:
                    await a.publish("load", b"x" * 100_000)

            tasks = [asyncio.create_task(publish()) for _ in range(5)]
            await eventually(lambda: a.statistics()["subscriber_stalls"] > 0)
            await a.close(timeout=0)
            ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
            assert [type(end) for end in ends] == [zmqbus.NodeClosed] * 5

    run(main())


FORGOTTEN = """
import asyncio, sys, zmqbus

async def main():
    node = await zmqbus.AsyncNode("forgotten", bus={bus!r}).open()
    subscription = await node.subscribe("t")
    await node.publish("t", 1)
    print((await subscription.get(10)).value, flush=True)

asyncio.run(main())
"""


def test_a_forgotten_node_is_reported_and_does_not_hang_the_exit(bus: str) -> None:
    program = [sys.executable, "-W", "always", "-c", FORGOTTEN.format(bus=bus)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr
    assert "ResourceWarning: node 'forgotten' was not closed" in ended.stderr


FORKED = """
import asyncio, os, sys, zmqbus

async def main():
    async with zmqbus.AsyncNode("parent", bus={bus!r}, discovery="static") as node, node.subscribe("t") as subscription:
        await node.publish("t", 1)
        child = os.fork()
        if child == 0:
            refused = 0
            for use in (node.publish("t", 2), node.publish("new", 2), subscription.get(1), node.flush()):
                try:
                    use.send(None)
                except zmqbus.ForkedProcess:
                    refused += 1
                use.close()
            os._exit(refused)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print((await subscription.get(10)).value, await node.publish("t", 3), flush=True)

asyncio.run(main())
"""


def test_a_forked_child_is_refused_and_its_parent_goes_on(bus: str) -> None:
    program = [sys.executable, "-W", "error", "-c", FORKED.format(bus=bus)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "4\n1 2\n", "")


# --- the end of a subscription -------------------------------------------------------------------


def test_closing_a_subscription_ends_those_who_wait_for_it(bus: str) -> None:
    async def main() -> None:
        async with alone(bus) as node:
            subscription = await node.subscribe("t")

            async def iterate() -> list[object]:
                return [message.value async for message in subscription]

            tasks = [asyncio.create_task(iterate()), asyncio.create_task(subscription.get())]
            await asyncio.sleep(0.01)
            await subscription.close()
            assert await asyncio.wait_for(asyncio.gather(*tasks), 5) == [[], None]
            with pytest.raises(zmqbus.NodeClosed):
                await subscription.get(0)
            await subscription.close()
            assert node.statistics()["subscriptions"] == 0

    run(main())


def test_a_subscription_closed_before_it_was_opened_stays_closed(bus: str) -> None:
    async def main() -> None:
        async with alone(bus) as node:
            subscription = node.subscribe("t")
            await subscription.close()
            for use_it in (subscription.get, subscription.__anext__, subscription.__aenter__):
                with pytest.raises(zmqbus.NodeClosed):
                    await use_it()
            assert node.statistics()["subscriptions"] == 0

    run(main())


def test_closing_a_pending_subscription_does_not_wait_for_peers(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with two(bus) as (_, b):
            await never_registered(monkeypatch, b)
            subscription = b.subscribe("t")
            tasks = [asyncio.create_task(subscription.get()), asyncio.create_task(subscription.__aenter__())]
            await eventually(lambda: b.statistics()["subscriptions"] == 1)
            await asyncio.wait_for(subscription.close(), 1)
            assert b.statistics()["subscriptions"] == 0
            got, entered = await asyncio.gather(*tasks, return_exceptions=True)
            assert got is None
            assert isinstance(entered, zmqbus.NodeClosed)

    run(main())


def test_get_keeps_its_timeout_also_while_the_subscription_is_pending(
    bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            with monkeypatch.context() as patch:
                await never_registered(patch, b)
                subscription = b.subscribe("t")
                assert await asyncio.wait_for(subscription.get(0), 1) is None
                assert await asyncio.wait_for(subscription.get(0.01), 1) is None
            await a.wait_for_subscribers("t", timeout=10)
            await a.publish("t", 1)
            assert (await drain(subscription, 1))[0].value == 1

    run(main())


def test_a_subscription_left_by_break_is_closed(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            publishing = asyncio.create_task(publish_for_ever(a))
            async for message in b.subscribe("t"):
                assert message.topic == "t"
                break
            del message
            gc.collect()
            await eventually(lambda: b.statistics()["subscriptions"] == 0)
            with pytest.raises(zmqbus.WaitTimeout):
                await eventually_no_subscriber(a)
            publishing.cancel()

    run(main())


async def publish_for_ever(node: zmqbus.AsyncNode) -> None:
    while True:
        await node.publish("t", 1)
        await asyncio.sleep(0.001)


async def eventually_no_subscriber(node: zmqbus.AsyncNode) -> None:
    """Raises WaitTimeout as soon as nobody subscribes to "t"."""
    async with asyncio.timeout(20):
        while True:
            await node.wait_for_subscribers("t", 1, timeout=0.005)
            await asyncio.sleep(0.005)


def test_a_cancelled_subscribe_leaves_nothing_behind(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):

            async def subscribe() -> None:
                await b.subscribe("t")

            for turns in range(30):
                task = asyncio.create_task(subscribe())
                for _ in range(turns % 10):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            del task
            gc.collect()
            await eventually(lambda: b.statistics()["subscriptions"] == 0)
            await eventually(lambda: not a._engine.peering.registry.subscribers("t", True))

    run(main())


@pytest.mark.parametrize("arguments", [((), {}), (("a..b",), {}), (("t",), {"history": -1}), (("t",), {"on_gap": "x"})])
def test_a_subscription_that_cannot_be_opened_says_why_each_time_and_can_be_closed(
    bus: str, arguments: tuple[tuple[str, ...], dict[str, Any]]
) -> None:
    async def main() -> None:
        async with alone(bus) as node:
            subscription = node.subscribe(*arguments[0], **arguments[1])
            for use_it in (subscription.__aenter__, subscription.get, subscription.__anext__):
                with pytest.raises((zmqbus.TopicError, zmqbus.SetupError)):
                    await use_it()
            await subscription.close()
            assert node.statistics()["subscriptions"] == 0

    run(main())


# --- waiting and events --------------------------------------------------------------------------


def test_waiting_is_bounded_and_says_what_was_seen(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            with pytest.raises(zmqbus.WaitTimeout, match=r"waited 0\.01 s for 2 peer") as caught:
                await a.wait_for_peers(2, timeout=0.01)
            assert (caught.value.seen, caught.value.wanted) == (1, 2)
            with pytest.raises(zmqbus.WaitTimeout, match=r"1 subscriber\(s\) of t, saw 0"):
                await a.wait_for_subscribers("t", timeout=0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await a.wait_for_subscribers("t")
            waiting = asyncio.create_task(a.wait_for_subscribers("t", timeout=10))
            async with b.subscribe("t"), b.subscribe("t.x"):
                assert await waiting == 1
            assert [peer.name for peer in a.peers()] == ["b"]

    run(main())


def test_events_tell_of_peers_and_end_with_their_stream(bus: str) -> None:
    async def main() -> None:
        async with alone(bus) as node, node.events() as events:
            assert await events.get(0) is None
            seeds = [node.endpoints["inbox"]]
            async with zmqbus.AsyncNode("second", bus=bus, discovery="static", peers=seeds) as second:
                joined = await events.get(10)
                assert isinstance(joined, zmqbus.PeerJoined)
                assert (joined.peer.origin, joined.peer.pid) == (second.origin, os.getpid())
            async for left in events:
                assert isinstance(left, zmqbus.PeerLeft)
                assert (left.peer.origin, left.reason) == (second.origin, "bye")
                break
            for _ in range(50):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.0005):
                        await events.get()
            waiting = asyncio.create_task(events.get())
            await asyncio.sleep(0)
            events.close()
            assert await waiting is None
            assert [event async for event in events] == []
        with pytest.raises(zmqbus.NodeClosed):
            node.events()

    run(main())


def test_events_that_nobody_reads_are_bounded(bus: str) -> None:
    async def main() -> None:
        async with alone(bus) as node:
            events = node.events()
            for number in range(10_005):
                events.put(zmqbus.Warned(str(number)))
            assert events.dropped == 5
            assert await events.get() == zmqbus.Warned("5")

    run(main())
