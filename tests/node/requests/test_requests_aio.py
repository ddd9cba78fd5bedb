"""Asking and answering in asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

import zmqbus
from tests.node.requests.conftest import out_of_time
from zmqbus import AsyncNode, Node


@asynccontextmanager
async def pair(bus: str) -> AsyncIterator[tuple[AsyncNode, AsyncNode]]:
    async with AsyncNode("a", bus=bus) as a, AsyncNode("b", bus=bus) as b:
        await a.wait_for_peers(1, 10)
        await b.wait_for_peers(1, 10)
        yield a, b


async def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_coroutine_function_answers(bus: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            running = most = 0

            @b.responder("double", concurrency=50)
            async def double(value: int) -> int:
                nonlocal running, most
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.001)
                running -= 1
                return value * 2

            await a.wait_for_responders("double", 1, 10)
            assert await double(2) == 4
            answers = await asyncio.gather(*(a.request("double", value, timeout=30) for value in range(500)))
            assert answers == [2 * value for value in range(500)]
            assert 1 < most <= 50

            @b.responder("bad")
            async def bad(value: object) -> None:
                raise ValueError("no")

            await a.wait_for_responders("bad", 1, 10)
            with pytest.raises(zmqbus.RemoteError, match="b answered with ValueError: no"):
                await a.request("bad")

    asyncio.run(main())


def test_a_plain_function_answers(bus: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            b.responder("plain", type=int)(lambda value: value + 1)
            await a.wait_for_responders("plain", 1, 10)
            assert await a.request("plain", 1, type=int) == 2
            with pytest.raises(zmqbus.RemoteError, match="ReplyMismatch"):
                await a.request("plain", "text")
            assert await b.request("plain", 5) == 6, "a node may answer itself"

    asyncio.run(main())


class Point(msgspec.Struct):
    x: int


class Circle(msgspec.Struct):
    r: int


class Picky(msgspec.Struct):
    """None of whose values can be made."""

    x: int = 0

    def __post_init__(self) -> None:
        raise KeyError("x")


def test_what_is_wrong_is_refused_at_once(bus: str) -> None:
    async def main() -> None:
        async with AsyncNode("b", bus=bus) as b:
            b.responder("echo")(lambda value: value)
            both = Point | Circle
            with pytest.raises(zmqbus.SetupError, match="must be tagged"):
                b.respond("typed", type=both)
            with pytest.raises(zmqbus.SetupError, match="must be tagged"):
                b.responder("typed", type=both)
            with pytest.raises(zmqbus.SetupError, match="must be tagged"):
                await b.request("echo", 1, type=both)
            with pytest.raises(zmqbus.SetupError, match="must be tagged"):
                await b.request_many("echo", 1, type=both)
            with pytest.raises(zmqbus.SetupError, match="concurrency=0: use a whole number, 1 or more"):
                b.responder("echo", concurrency=0)
            assert b.statistics()["requests_answered"] == 0, "nothing was sent"

    asyncio.run(main())


def test_a_type_that_raises_is_answered_by_a_failure(bus: str) -> None:
    async def main() -> None:
        async with AsyncNode("b", bus=bus) as b, b.respond("singly", type=Picky) as requests:

            @b.responder("picky", type=Picky)
            async def picky(value: Picky) -> None: ...

            getting = asyncio.create_task(requests.get())
            for service in ("picky", "singly"):
                with pytest.raises(zmqbus.RemoteError, match="b answered with KeyError: 'x'"):
                    await b.request(service, {}, timeout=20)
            assert not b._engine.requests.answering._open
            getting.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["iterated", "entered", "awaited"])
def test_requests_one_by_one(bus: str, how: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            requests = b.respond("jobs")

            async def serve() -> list[Any]:
                seen = []
                async for request in requests:
                    seen.append((request.value, request.headers, request.requester, request.origin, request.service))
                    if request.value == "bad":
                        assert await request.fail(KeyError("k"))
                    else:
                        assert await request.reply(request.value)
                        assert not await request.reply(0)
                return seen

            if how == "entered":
                await requests.__aenter__()
            elif how == "awaited":
                assert await requests is requests
            serving = asyncio.create_task(serve())
            await a.wait_for_responders("jobs", 1, 10)
            assert await a.request("jobs", 7, headers={"h": 1}) == 7
            with pytest.raises(zmqbus.RemoteError, match="KeyError: 'k'"):
                await a.request("jobs", "bad")
            await requests.close()
            assert [seen[:2] for seen in await serving] == [(7, {"h": 1}), ("bad", None)]
            assert await requests.get(1) is None
            await until(lambda: not a._engine.requests.responders.of("jobs"))
            with pytest.raises(zmqbus.NoResponders):
                await a.request("jobs")

    asyncio.run(main())


def test_opening_fails_each_time(bus: str) -> None:
    async def main() -> None:
        async with AsyncNode("b", bus=bus) as b:
            requests = b.respond("white space")
            for _ in range(2):
                with pytest.raises(zmqbus.TopicError):
                    await requests.get(10)

    asyncio.run(main())


def test_who_is_cancelled_while_it_opens_leaves_it_to_the_next(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            requests = b.respond("jobs")
            answering = b._engine.requests.answering
            with monkeypatch.context() as patched:
                patched.setattr(answering, "_tell", lambda link: answering._untold.add(link.origin))
                first = asyncio.create_task(requests.get())
                await until(lambda: bool(answering._untold))  # it waits until the peer knows
                second = asyncio.create_task(requests.get())
                await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            await a.wait_for_responders("jobs", 1, 10)
            for getting in (second, None):  # one after the other: of two who wait any may get it
                asked = asyncio.create_task(a.request("jobs", 3, timeout=20))
                request = await (getting or requests.get())
                assert request is not None, "it is open"
                await request.reply(request.value)
                assert await asked == 3
            await requests.close()
            assert await requests.get() is None

    asyncio.run(main())


def test_time_and_cancelling(bus: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b), b.respond("slow") as requests:
            began = time.monotonic()
            with pytest.raises(zmqbus.RequestTimeout):
                await a.request("slow", 1, timeout=0.1)
            assert 0.1 <= time.monotonic() - began < 5
            await until(lambda: out_of_time(b))
            load = a._engine.requests.responders.load
            waiting = asyncio.create_task(a.request("slow", 2, timeout=None))
            await until(lambda: load(b.origin) == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert load(b.origin) == 0, "it is given up"
            getting = asyncio.create_task(requests.get())
            request = await getting  # the first is late; of the second nobody said that it is not wanted any more
            assert request is not None
            assert request.value == 2
            await request.reply(2)
            assert await requests.get(0.05) is None
            getting = asyncio.create_task(requests.get())
            await asyncio.sleep(0)
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            asked = asyncio.create_task(a.request("slow", 3))
            request = await requests.get(10)  # who waited before took nothing with it
            assert request is not None
            await request.reply(request.value)
            assert await asked == 3

    asyncio.run(main())


def test_closing(bus: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            began, cancelled = asyncio.Event(), []

            @b.responder("slow", concurrency=1)
            async def slow(value: float) -> float:
                began.set()
                try:
                    await asyncio.sleep(value)
                except asyncio.CancelledError:
                    cancelled.append(value)
                    raise
                return value

            await a.wait_for_responders("slow", 1, 10)
            quick = asyncio.create_task(a.request("slow", 0.3))
            await began.wait()
            await b.close(5)
            assert await quick == 0.3
            async with AsyncNode("c", bus=bus) as c:
                c.responder("slow")(slow)
                await a.wait_for_responders("slow", 1, 10)
                never = asyncio.create_task(a.request("slow", 3600.0, timeout=None))
                waits = asyncio.create_task(a.request("slow", 3601.0, timeout=None))
                await until(lambda: len(c._engine.requests.answering._open) == 2)
                await c.close(0.1)
                for task in (never, waits):
                    with pytest.raises(zmqbus.RemoteError, match="ResponderClosed"):
                        await task
                await until(lambda: sorted(cancelled) == [3600.0, 3601.0])
            async with AsyncNode("d", bus=bus) as d, d.respond("slow"):
                await a.wait_for_responders("slow", 1, 10)
                waiting = asyncio.create_task(a.request("slow", 1.0, timeout=None))
                await until(lambda: a._engine.requests.responders.load(d.origin) == 1)
                await a.close()
                with pytest.raises(zmqbus.NodeClosed):
                    await waiting
                with pytest.raises(zmqbus.NodeClosed):
                    await a.request("slow")

    asyncio.run(main())


def test_asking_all(bus: str) -> None:
    async def main() -> None:
        async with pair(bus) as (a, b):
            with pytest.raises(zmqbus.NoResponders):
                await a.request_many("who", timeout=60)
            a.responder("who")(lambda value: "a")
            b.responder("who")(lambda value: 1 / 0)
            await a.wait_for_responders("who", 2, 10)
            replies = {reply.responder: reply for reply in await a.request_many("who", timeout=60)}
            assert replies["a"].value == "a"
            assert isinstance(replies["b"].error, zmqbus.RemoteError)
            assert len(await a.request_many("who", timeout=60, n=1)) == 1

    asyncio.run(main())


def test_both_faces_understand_each_other(bus: str) -> None:
    async def main(node: Node) -> None:
        async with AsyncNode("async", bus=bus) as other:
            await other.wait_for_responders("sync", 1, 10)
            assert await other.request("sync", 1) == ["sync", 1]

            @other.responder("async")
            async def answer(value: object) -> list[object]:
                return ["async", value]

            await asyncio.to_thread(node.wait_for_responders, "async", 1, 10)
            assert await asyncio.to_thread(node.request, "async", 2) == ["async", 2]

    with Node("sync", bus=bus) as node:
        node.responder("sync")(lambda value: ["sync", value])
        asyncio.run(main(node))


def test_a_killed_responder_is_noticed_at_once(bus: str, start: Any, tmp_path: Any) -> None:
    async def main() -> None:
        async with AsyncNode("a", bus=bus) as node:
            dead = start("dead")
            await node.wait_for_responders("work", 1, 20)
            asked = asyncio.create_task(node.request("work", "hang", timeout=None))
            await until(lambda: bool((tmp_path / "done").read_text()))
            began = time.monotonic()
            dead.process.kill()
            with pytest.raises(zmqbus.ResponderLost):
                await asked
            assert time.monotonic() - began < 2

    asyncio.run(main())
