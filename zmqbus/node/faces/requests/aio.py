"""Requests of an `AsyncNode`: asked, and answered, on its loop."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from types import TracebackType
from typing import Any, Protocol

from zmqbus.errors import RequestTimeout
from zmqbus.node.engine import Engine
from zmqbus.node.faces.requests.sync import Inline, Request, Responds
from zmqbus.node.faces.requests.values import (
    TASKS,
    TIMEOUT,
    Reply,
    check_concurrency,
    check_timeout,
    check_type,
    failure,
    pack,
    replies,
    success,
    value_of,
)
from zmqbus.node.work.requests.answering import Incoming, Responder
from zmqbus.node.work.requests.asking import Call, Outcome


class AsyncHome(Protocol):
    """What is needed of the node."""

    @property
    def name(self) -> str:
        """For people."""

    def _at_home(self) -> Engine:
        """Ready, and on the node's own loop."""


async def ask(
    engine: Engine, service: str, value: object, headers: dict[str, Any] | None, timeout: float | None, value_type: Any
) -> Any:
    """See `Node.request`."""
    check_timeout(timeout)
    check_type(value_type)
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def on_end(outcome: Outcome) -> None:
        if not future.done():  # whoever waited may be cancelled just now
            future.set_result(outcome)

    call = Call(service, *pack(value, headers), timeout, on_end)
    asking = engine.requests.asking
    asking.begin(call)
    try:
        async with asyncio.timeout(timeout):
            outcome = await future
    except TimeoutError:
        raise RequestTimeout(service, timeout or 0.0) from None
    finally:
        asking.give_up(call)
    return value_of(outcome, value_type, service, engine.requests.responders)


class AsyncRequest:
    """Somebody waits for the answer to this. See `Request`."""

    __slots__ = ("_engine", "_incoming", "headers", "origin", "requester", "service", "value")

    def __init__(self, engine: Engine, incoming: Incoming, value_type: Any) -> None:
        request = Request(engine, incoming, value_type)
        self.service, self.value, self.headers = request.service, request.value, request.headers
        self.origin, self.requester = request.origin, request.requester
        self._engine = engine
        self._incoming = incoming

    async def reply(self, value: object = None) -> bool:
        """See `Request.reply`. Does not wait."""
        return self._engine.requests.answering.end(self._incoming, *success(value))

    async def fail(self, error: BaseException | str) -> bool:
        """See `Request.fail`. Does not wait."""
        return self._engine.requests.answering.end(self._incoming, failure(error))

    def __repr__(self) -> str:
        return f"<AsyncRequest for {self.service} from {self.requester}>"


def begun(engine: Engine, incoming: Incoming, value_type: Any) -> AsyncRequest | None:
    """See `sync.begun`."""
    answering = engine.requests.answering
    if incoming.is_late:
        answering.end(incoming, None)
        return None
    try:
        return AsyncRequest(engine, incoming, value_type)
    except Exception as error:
        answering.end(incoming, failure(error))
        return None


class AsyncRequests(Responder):
    """The requests for one service, one by one.

        async for request in node.respond("time.now"): ...
        async with node.respond("time.now") as requests: ...
        requests = await node.respond("time.now")

    In the last two forms every peer knows of it then.
    """

    def __init__(self, node: AsyncHome, service: str, value_type: Any) -> None:
        super().__init__(service)
        check_type(value_type)
        self._node = node
        self._type = value_type
        self._attached = False
        self._opening = asyncio.Lock()
        self._queue: asyncio.Queue[Incoming | None] = asyncio.Queue()

    async def open(self) -> AsyncRequests:
        """Begin to respond, if that is not done yet."""
        if not self._attached:
            async with self._opening:  # should the first be cancelled, the next who waits here begins anew
                if not self._attached:
                    await self._attach()
        return self

    async def _attach(self) -> None:
        try:
            await self._node._at_home().requests.answering.attach(self)
        except BaseException:
            self._queue = asyncio.Queue()  # without the sign that no more will come
            raise
        self._attached = True

    async def get(self, timeout: float | None = None) -> AsyncRequest | None:
        """The next request; None when none came within `timeout` seconds, or it is closed."""
        await self.open()
        engine = self._node._at_home()
        try:
            async with asyncio.timeout(timeout):
                while (incoming := await self._queue.get()) is not None:
                    request = begun(engine, incoming, self._type)
                    if request is not None:
                        return request
        except TimeoutError:
            return None
        self._queue.put_nowait(None)  # for the next who waits
        return None

    async def __aiter__(self) -> AsyncIterator[AsyncRequest]:
        while (request := await self.get()) is not None:
            yield request

    def __await__(self) -> Generator[Any, None, AsyncRequests]:
        return self.open().__await__()

    def take(self, incoming: Incoming) -> None:
        self._queue.put_nowait(incoming)

    def stop(self) -> list[Incoming]:
        left = []
        while not self._queue.empty():
            if (incoming := self._queue.get_nowait()) is not None:
                left.append(incoming)
        self._queue.put_nowait(None)
        return left

    async def close(self) -> None:
        """See `Requests.close`."""
        self._node._at_home().requests.answering.detach(self)

    async def __aenter__(self) -> AsyncRequests:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncRequests for {self.service} to {self._node.name}>"


class Tasks(Responder):
    """Has a coroutine function answer the requests for a service, each in a task of its own."""

    def __init__(
        self, engine: Engine, service: str, function: Callable[[Any], Any], value_type: Any, concurrency: int
    ) -> None:
        super().__init__(service)
        self._engine = engine
        self._function = function
        self._type = value_type
        self._concurrency = concurrency
        self._waiting: deque[Incoming] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, incoming: Incoming) -> None:
        self._waiting.append(incoming)
        self._begin()

    def stop(self) -> list[Incoming]:
        left = list(self._waiting)
        self._waiting.clear()
        return left

    def abandon(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _begin(self) -> None:
        while self._waiting and len(self._tasks) < self._concurrency:
            request = begun(self._engine, self._waiting.popleft(), self._type)
            if request is not None:
                task = asyncio.get_running_loop().create_task(self._answer(request))
                self._tasks.add(task)
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._begin()

    async def _answer(self, request: AsyncRequest) -> None:
        try:
            await request.reply(await self._function(request.value))
        except BaseException as error:
            await request.fail(error)
            if not isinstance(error, Exception):
                raise


class AsyncRequesting:
    """What an `AsyncNode` can ask, and answer."""

    async def request(
        self: AsyncHome,
        service: str,
        value: object = None,
        *,
        timeout: float | None = TIMEOUT,
        headers: dict[str, Any] | None = None,
        type: Any = None,
    ) -> Any:
        """See `Node.request`."""
        return await ask(self._at_home(), service, value, headers, timeout, type)

    async def request_many(
        self: AsyncHome,
        service: str,
        value: object = None,
        *,
        timeout: float = TIMEOUT,
        n: int | None = None,
        headers: dict[str, Any] | None = None,
        type: Any = None,
    ) -> list[Reply]:
        """See `Node.request_many`."""
        check_timeout(timeout)
        check_type(type)
        requests = self._at_home().requests
        outcomes = await requests.asking.gather(service, *pack(value, headers), timeout, n)
        return replies(outcomes, type, service, requests.responders)

    def respond(self: AsyncHome, service: str, *, type: Any = None) -> AsyncRequests:
        """See `Node.respond`; the result can be iterated, entered, or awaited."""
        return AsyncRequests(self, service, type)

    def responder(
        self: AsyncHome, service: str, *, type: Any = None, concurrency: int = TASKS
    ) -> Callable[[Responds], Responds]:
        """See `Node.responder`. A coroutine function runs as a task, of which there are `concurrency` at most;
        a plain function is called on the loop, at once. Peers are told of it meanwhile."""
        check_type(type)
        check_concurrency(concurrency)
        engine = self._at_home()

        def register(function: Responds) -> Responds:
            made: Responder
            if inspect.iscoroutinefunction(function):
                made = Tasks(engine, service, function, type, concurrency)
            else:
                made = Inline(engine, service, function, type)
            engine.requests.answering.add(made)
            return function

        return register

    async def wait_for_responders(self: AsyncHome, service: str, n: int = 1, timeout: float | None = None) -> int:
        """See `Node.wait_for_responders`."""
        return await self._at_home().requests.wait_for_responders(service, n, timeout)
