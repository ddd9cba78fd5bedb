"""What `AsyncNode` promises beyond `Node`: the same face, pipelined, fair to the loop, and safe to cancel."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

import zmqbus
from tests.node.conftest import drain as drain_sync
from tests.node.test_node import VALUES

FACES = [
    (zmqbus.Node, zmqbus.AsyncNode),
    (zmqbus.Subscription, zmqbus.AsyncSubscription),
    (zmqbus.Worker, zmqbus.AsyncWorker),
    (zmqbus.EventStream, zmqbus.AsyncEventStream),
]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run it, on a loop that reports what goes wrong in its corners."""

    async def checked() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        try:
            await asyncio.wait_for(main, 60)
        finally:
            gc.collect()  # exceptions that nobody retrieved are reported when their task goes
            await asyncio.sleep(0)
        assert reports == []

    asyncio.run(checked())


@contextlib.asynccontextmanager
async def two(bus: str, **of_first: Any) -> AsyncIterator[tuple[zmqbus.AsyncNode, zmqbus.AsyncNode]]:
    """Two nodes that know each other."""
    async with (
        zmqbus.AsyncNode("a", bus=bus, discovery="static", **of_first) as a,
        zmqbus.AsyncNode("b", bus=bus, discovery="static", peers=[a.endpoints["inbox"]]) as b,
    ):
        await a.wait_for_peers(1, timeout=10)
        await b.wait_for_peers(1, timeout=10)
        yield a, b


async def drain(subscription: zmqbus.AsyncSubscription, count: int) -> list[zmqbus.Message]:
    """The next `count` messages; fails when they do not come."""
    messages = []
    while len(messages) < count:
        message = await subscription.get(20)
        assert message is not None, f"{len(messages)} of {count} messages came, {subscription!r}"
        messages.append(message)
    return messages


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that nothing tells of."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


class Pulse:
    """Another task of the loop: counts its turns, and measures the longest time between two of them.

    That is what the loop spent at work, or another thread saw go by. On a busy machine both stand still together.
    """

    TICK = 0.005

    def __init__(self) -> None:
        self.turns = 0
        self.longest = 0.0
        self._ticks = 0
        self._ended = threading.Event()
        self._ticking = threading.Thread(target=self._tick)

    async def __aenter__(self) -> Pulse:
        self._ticking.start()
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self._ended.set()
        self._ticking.join()

    def _tick(self) -> None:
        while not self._ended.wait(self.TICK):
            self._ticks += 1

    async def _beat(self) -> None:
        worked, ticks = time.thread_time(), self._ticks
        while True:
            await asyncio.sleep(0)
            self.turns += 1
            at_work = -worked + (worked := time.thread_time())
            gone_by = (-ticks + (ticks := self._ticks)) * self.TICK
            self.longest = max(self.longest, at_work, gone_by)


# --- the same face -------------------------------------------------------------------------------


def public(face: type) -> dict[str, object]:
    return {name: value for name, value in vars(face).items() if not name.startswith("_")}


@pytest.mark.parametrize(("plain", "aio"), FACES, ids=lambda face: face.__name__)
def test_every_public_name_is_there_with_the_same_parameters_and_defaults(plain: type, aio: type) -> None:
    for name, value in public(plain).items():
        assert name in public(aio), f"{aio.__name__} lacks {name}"
        other = public(aio)[name]
        assert isinstance(other, property) == isinstance(value, property)
        if not isinstance(value, property):
            ours, theirs = inspect.signature(other), inspect.signature(value)  # type: ignore[arg-type]
            assert list(ours.parameters.values()) == list(theirs.parameters.values()), name
    if plain is zmqbus.Node:  # the other constructors are not for users
        given = [inspect.signature(face.__init__).parameters for face in (plain, aio)]
        assert [(p.name, p.kind, p.default) for p in given[0].values()] == [
            (p.name, p.kind, p.default) for p in given[1].values()
        ]
    assert hasattr(plain, "__enter__") == hasattr(aio, "__aenter__")
    assert hasattr(plain, "__iter__") == hasattr(aio, "__aiter__")


def test_a_publisher_sends_with_the_same_parameters() -> None:
    ours, theirs = (inspect.signature(face.send) for face in (zmqbus.AsyncPublisher, zmqbus.Publisher))
    assert ours == theirs


def test_whatever_may_take_time_is_awaited_and_nothing_else() -> None:
    quick = {"publisher", "subscribe", "pull", "name", "origin", "endpoints", "peers", "events", "statistics"}
    awaited = {name for name, value in public(zmqbus.AsyncNode).items() if inspect.iscoroutinefunction(value)}
    assert awaited == public(zmqbus.AsyncNode).keys() - quick


# --- messages ------------------------------------------------------------------------------------


def test_values_and_headers_round_trip_exactly(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("t.>") as subscription:
            for number, value in enumerate(VALUES, 1):
                headers = {"n": number} if number % 3 == 0 else None
                assert await a.publish("t.x", value, headers=headers) == number
            assert await a.publisher("t.x").send("by publisher", {"h": 1}) == len(VALUES) + 1
            received = await drain(subscription, len(VALUES) + 1)
            for number, (value, message) in enumerate(zip(VALUES, received, strict=False), 1):
                assert message.value == value
                assert type(message.value) is type(value)
                assert (message.topic, message.seq, message.origin) == ("t.x", number, a.origin)
                assert message.headers == ({"n": number} if number % 3 == 0 else None)
            assert (received[-1].value, received[-1].headers) == ("by publisher", {"h": 1})

    run(main())


@pytest.mark.parametrize("value", [object(), 2**64, {"deep": [object()]}], ids=["object", "integer", "deep"])
def test_an_unpackable_value_raises_and_spends_no_seq(bus: str, value: object) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode(bus=bus, discovery="static") as node:
            for publish in (lambda: node.publish("t", value), lambda: node.publisher("t").send(value)):
                with pytest.raises(zmqbus.UnsupportedValue, match=type(value).__name__):
                    await publish()
            with pytest.raises(zmqbus.UnsupportedValue):
                await node.publish("t", 1, headers={1: "x"})  # type: ignore[dict-item]
            assert await node.publish("t", "next") == 1

    run(main())


def test_two_async_nodes_and_a_node_of_one_process_hear_each_other(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            inbox = a.endpoints["inbox"]
            c = await asyncio.to_thread(zmqbus.Node, "c", bus=bus, discovery="static", peers=[inbox])
            try:
                await asyncio.to_thread(c.wait_for_peers, 2, 10)
                await a.wait_for_peers(2, timeout=10)
                await b.wait_for_peers(2, timeout=10)
                ours = [await node.subscribe("all.>") for node in (a, b)]
                theirs = await asyncio.to_thread(c.subscribe, "all.>")
                for node in (a, b):
                    await node.publish(f"all.{node.name}", node.name)
                c.publish("all.c", "c")
                for subscription in ours:
                    assert sorted(m.value for m in await drain(subscription, 3)) == ["a", "b", "c"]
                assert sorted(m.value for m in await asyncio.to_thread(drain_sync, theirs, 3)) == ["a", "b", "c"]
            finally:
                await asyncio.to_thread(c.close)

    run(main())


class Reading(msgspec.Struct):
    sensor: str
    celsius: float


def test_a_typed_subscription_raises_in_place_for_what_does_not_fit(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("r", type=Reading) as subscription:
            for value in (
                Reading("north", 3.5),
                "not a reading",
                {"sensor": "south", "celsius": 4.0},
                5,
                Reading("x", 0),
            ):
                await a.publish("r", value)  # all in one batch
            seen: list[object] = []
            while len(seen) < 5:
                try:
                    async for message in subscription:
                        seen.append(message.value)
                        if len(seen) == 5:
                            break
                except zmqbus.DecodeError as error:
                    seen.append(error.seq)
            assert seen == [Reading("north", 3.5), 2, Reading("south", 4.0), 4, Reading("x", 0)]
            assert subscription.lost == 0

    run(main())


def test_a_task_that_takes_one_of_two_messages_wakes_the_task_that_waits_for_the_other(bus: str) -> None:
    """The socket tells of both but once, and then only him who looks first."""

    async def main() -> None:
        async with zmqbus.AsyncNode(bus=bus, discovery="static") as node, node.subscribe("shared") as subscription:
            for _ in range(20):
                waiting = asyncio.create_task(subscription.get())
                await asyncio.sleep(0.003)
                node._engine.outlet.publisher("shared").send(1)
                node._engine.outlet.publisher("shared").send(2)
                node._engine.outlet.flush_all()  # as at the end of a turn
                first = None
                while first is None:  # not leaving the loop the time to look
                    first = await subscription.get(0)
                second = await asyncio.wait_for(waiting, 10)
                assert second is not None
                assert {first.value, second.value} == {1, 2}

    run(main())


# --- pace ----------------------------------------------------------------------------------------


def test_what_is_published_in_one_turn_leaves_in_batches(bus: str) -> None:
    async def main() -> None:
        async with two(bus) as (a, b), b.subscribe("burst") as subscription:
            before = a.statistics()["frames_sent"]
            for number in range(10_000):
                await a.publish("burst", number)
            await a.flush()
            assert a.statistics()["frames_sent"] - before < 10_000 / 100
            assert [m.value for m in await drain(subscription, 10_000)] == list(range(10_000))
            assert subscription.lost == 0

    run(main())


@pytest.mark.parametrize("topics", [1, 3, 100, 3000])
@pytest.mark.parametrize("ready_made", [False, True], ids=["publish", "publisher"])
def test_a_long_publishing_loop_gives_other_tasks_their_turn(bus: str, topics: int, ready_made: bool) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode(bus=bus, discovery="static") as node, Pulse() as pulse:
            names = [f"t.{number}" for number in range(topics)]
            publishers = [node.publisher(name) for name in names]
            for round_ in range(2):  # the second with all streams grown to their full size
                since, longest, turns = 0, 0, pulse.turns
                for number in range(60_000):
                    if ready_made:
                        await publishers[number % topics].send(b"x")
                    else:
                        await node.publish(names[number % topics], b"x")
                    if pulse.turns != turns:
                        since, turns = 0, pulse.turns
                    since += 1
                    longest = max(longest, since)
                assert longest < 20_000, round_

    run(main())


def test_a_consumer_that_always_finds_a_message_gives_other_tasks_their_turn(bus: str) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode(bus=bus, discovery="static") as node, node.subscribe("much") as subscription:
            for number in range(60):  # that many frames are held for it
                await node.publish("much", number)
                await node.flush()
            await subscription.get()
            async with Pulse() as pulse:
                before = pulse.turns
                for _ in range(59):
                    assert await subscription.get() is not None
                    until = time.monotonic() + 0.002
                    while time.monotonic() < until:
                        pass
                assert pulse.turns - before >= 10

    run(main())


@pytest.mark.parametrize("subscribers", [1, 3])
def test_a_subscriber_that_does_not_read_makes_publishers_wait_but_never_the_loop(bus: str, subscribers: int) -> None:
    async def main() -> None:
        async with two(bus) as (a, b):
            idle = [await b.subscribe("load") for _ in range(subscribers)]
            payload, longest, total = b"x" * 100_000, 0.0, 0
            async with Pulse() as pulse:
                while a.statistics()["subscriber_stalls"] == 0 or longest < 0.1:
                    start = time.monotonic()
                    await a.publish("load", payload)
                    longest = max(longest, time.monotonic() - start)
                    total += 1
                    assert total < 5000, "nobody ever had to wait"
                assert pulse.turns > 20
                assert pulse.longest < 0.3  # the patience is half a second
            assert longest < 1.5
            for subscription in idle:  # and all is repaired
                assert [m.seq for m in await drain(subscription, total)] == list(range(1, total + 1))
                assert subscription.lost == 0

    run(main())


# --- cancelling ----------------------------------------------------------------------------------


async def by_iteration(subscription: zmqbus.AsyncSubscription, seen: list[int]) -> None:
    async for message in subscription:
        seen.append(message.value)  # noqa: PERF401 - a comprehension would lose what it has when it is cancelled


async def by_get(subscription: zmqbus.AsyncSubscription, seen: list[int]) -> None:
    while (message := await subscription.get()) is not None:
        seen.append(message.value)


async def by_timeout(subscription: zmqbus.AsyncSubscription, seen: list[int]) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.0005):
                await by_get(subscription, seen)


@pytest.mark.parametrize("consume", [by_iteration, by_get, by_timeout], ids=lambda consume: consume.__name__)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cancelling_a_consumer_at_any_point_loses_nothing(
    bus: str, seed: int, consume: Callable[[zmqbus.AsyncSubscription, list[int]], Awaitable[None]]
) -> None:
    chance = random.Random(seed)

    async def publish(node: zmqbus.AsyncNode, count: int) -> None:
        sent = 0
        while sent < count:
            for _ in range(min(count - sent, chance.choice((1, 1, 2, 30)))):
                await node.publish("t", sent)
                sent += 1
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    async def main() -> None:
        async with two(bus) as (a, b):
            subscription, seen = b.subscribe("t"), []
            await subscription  # before anything is published
            publishing = asyncio.create_task(publish(a, 5000))
            cancelled = 0
            while cancelled < 300 or not publishing.done():
                task = asyncio.ensure_future(consume(subscription, seen))
                for _ in range(chance.choice((0, 1, 2, 3, 5, 20))):
                    await asyncio.sleep(0)
                if chance.random() < 0.1:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled += 1
            seen += [m.value for m in await drain(subscription, 5000 - len(seen))]
            assert seen == list(range(5000)), f"seed {seed}"
            assert await subscription.get(0) is None

    run(main())


def test_a_timeout_around_get_leaves_the_subscription_usable(bus: str) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode(bus=bus, discovery="static") as node, node.subscribe("t") as subscription:
            for number in range(20):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await subscription.get()
                await node.publish("t", number)
                async with asyncio.timeout(10):
                    message = await subscription.get()
                assert message is not None
                assert message.value == number
            assert await subscription.get(0) is None
            assert await subscription.get(0.002) is None

    run(main())


# --- gaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_gap", ["skip", "raise"])
def test_what_is_lost_is_counted_exactly_and_raised_if_so_asked(bus: str, on_gap: Any) -> None:
    async def main() -> None:
        async with two(bus, history_bytes=0) as (a, b):
            events = b.events()
            subscription = await b.subscribe("load", on_gap=on_gap)
            total = 0
            while a.statistics()["subscriber_stalls"] == 0 or total % 50:  # it does not read
                total = await a.publish("load", b"x" * 100_000)
            for _ in range(300):
                total = await a.publish("load", b"x" * 100_000)
            received: list[int] = []
            raised: list[tuple[int, int]] = []
            while len(received) + subscription.lost < total:
                try:
                    message = await subscription.get(0.1)
                    received += [message.seq] if message is not None else []
                except zmqbus.GapError as error:
                    raised.append((error.first, error.last))
            lost = [seq for gap in subscription.gaps for seq in range(gap.first, gap.last + 1)]
            assert lost
            assert subscription.lost == len(lost)
            assert sorted(received + lost) == list(range(1, total + 1))
            assert received == sorted(received)
            assert raised == ([(gap.first, gap.last) for gap in subscription.gaps] if on_gap == "raise" else [])
            told = [await events.get(5) for _ in subscription.gaps]
            assert told == subscription.gaps

    run(main())


# --- another thread ------------------------------------------------------------------------------


def test_another_loop_is_refused_with_a_word_on_what_to_do(bus: str) -> None:
    async def main() -> None:
        async with zmqbus.AsyncNode("mine", bus=bus, discovery="static") as node:
            subscription = await node.subscribe("t")
            errors: list[BaseException] = []

            async def elsewhere() -> None:
                uses: list[Callable[[], Awaitable[object]]] = [
                    lambda: node.publish("new", 1),
                    node.flush,
                    lambda: node.wait_for_peers(0),
                    lambda: node.wait_for_subscribers("t"),
                    node.topics,
                    node.close,
                    lambda: subscription.get(1),
                    subscription.__anext__,
                    subscription.close,
                    node.subscribe("other").__aenter__,
                ]
                for use in uses:
                    try:
                        await use()
                    except zmqbus.WrongLoop as error:
                        errors.append(error)

            thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
            thread.start()
            await asyncio.to_thread(thread.join, 20)
            assert len(errors) == 10
            assert "'mine' was opened on another event loop" in str(errors[0])
            await node.publish("t", "still works")
            assert (await drain(subscription, 1))[0].value == "still works"

    run(main())
