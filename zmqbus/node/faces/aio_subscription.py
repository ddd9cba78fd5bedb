"""What `AsyncNode.subscribe` returns: live messages, or messages out of the log. Consumed on the node's own loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from types import TracebackType
from typing import Any, Protocol

from zmqbus.errors import ForkedProcess, NodeClosed, SetupError
from zmqbus.net.clock import now
from zmqbus.node.engine import Engine
from zmqbus.node.faces.subscription import NO_CURSOR
from zmqbus.node.publishing.publisher import TICK
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.receiving.replay import Position, Replay
from zmqbus.node.receiving.subscribing import subscribe
from zmqbus.protocol.message import Message
from zmqbus.protocol.streams.stream import Gap

SHIFT = 0.002  # seconds for which a consumer may take what is there without a turn of the loop


class AsyncHome(Protocol):
    """What is needed of the node."""

    @property
    def _engine(self) -> Engine:
        """Of a node that is open, or has been."""

    @property
    def name(self) -> str:
        """For people."""

    def _at_home(self) -> Engine:
        """Ready, and on the node's own loop."""

    def _home(self) -> asyncio.AbstractEventLoop:
        """The running loop, which is the node's."""


class AsyncSubscription:
    """Messages of the topics that fit, live, with gaps repaired.

        async for message in node.subscribe("logs.>"): ...
        async with node.subscribe("logs.>") as subscription: ...
        subscription = await node.subscribe("logs.>")

    In the last two forms, and from the first message on in the first, every known publisher has registered it.
    """

    def __init__(
        self, node: AsyncHome, patterns: Sequence[str], value_type: Any, history: int, on_gap: str, observe: bool
    ) -> None:
        self._node = node
        self._asked = (patterns, value_type, history, on_gap, observe)
        self._opening: asyncio.Task[Intake] | None = None
        self._intake: Intake | None = None
        self._closed = False
        self._bell = _Bell()
        self._rest_at = 0.0

    async def get(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            GapError: messages are lost, and the subscription was made with `on_gap="raise"`.
            DecodeError: this message does not fit `type`; the next call goes on behind it.
            NodeClosed: the subscription was closed before this call.
        """
        deadline = None if timeout is None else now() + timeout
        intake = self._intake or await self._open(timeout)
        if intake is None:
            return None
        for message in intake.items:
            return message
        if intake.closed is not None:
            raise intake.closed
        return await self._take(intake, deadline)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        intake = self._intake or await self._open()
        if intake is None:
            raise StopAsyncIteration
        for message in intake.items:
            return message
        following = await self._take(intake, None)
        if following is None:
            raise StopAsyncIteration
        return following

    async def _take(self, intake: Intake, deadline: float | None) -> Message | None:
        """Wait for a message. None: the deadline has passed, or the subscription is closed."""
        loop = self._node._home()
        if now() >= self._rest_at:
            await asyncio.sleep(0)
            self._rest_at = now() + SHIFT
        while True:
            message = intake.take(0)  # on the engine's own thread: no gate in between
            if message is not None:
                self._bell.ring()  # there may be more, of which the socket will not tell again
                return message
            if intake.closed is not None:
                if isinstance(intake.closed, ForkedProcess):
                    raise intake.closed
                return None
            if deadline is not None and now() >= deadline:
                return None
            due = intake.timer()
            if deadline is not None and (due is None or deadline < due):
                due = deadline
            future: asyncio.Future[None] = loop.create_future()
            self._bell.waiting.add(future)
            timer = None if due is None else loop.call_later(max(TICK, due - now()), _finish, future)
            try:
                await future
            finally:
                self._bell.waiting.discard(future)
                if timer is not None:
                    timer.cancel()
            self._rest_at = now() + SHIFT

    async def _open(self, timeout: float | None = None) -> Intake | None:
        """Have it registered. None: not within `timeout`, or closed meanwhile. Goes on when its caller is cancelled."""
        if self._closed:
            raise NodeClosed("the subscription is closed")
        if self._opening is None:
            self._opening = self._node._home().create_task(self._register())
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())  # not to be reported
        done, _ = await asyncio.wait([self._opening], timeout=timeout)
        return self._opening.result() if done and not self._closed else None

    async def _register(self) -> Intake:
        patterns, value_type, history, on_gap, observe = self._asked
        intake = await subscribe(
            self._node._at_home(),
            patterns,
            value_type=value_type,
            history=history,
            on_gap=on_gap,
            observe=observe,
            wake=self._bell.ring,
        )
        self._intake = intake
        if intake.closed is None:
            self._bell.watch(intake)
        return intake

    async def _opened(self) -> AsyncSubscription:
        if await self._open() is None:
            raise NodeClosed("the subscription was closed while it was opened")
        return self

    @property
    def lost(self) -> int:
        """Messages that are in no history that could be reached; the ranges are in `gaps`."""
        return self._intake.tracker.lost if self._intake else 0

    @property
    def repaired(self) -> int:
        """Messages that the live path missed and that were fetched."""
        return self._intake.tracker.repaired if self._intake else 0

    @property
    def gaps(self) -> list[Gap]:
        """What was lost, exactly; the last 1000 ranges."""
        return list(self._intake.gaps) if self._intake else []

    @property
    def patterns(self) -> tuple[str, ...]:
        """What was subscribed to."""
        return tuple(self._asked[0])

    @property
    def positions(self) -> list[Position]:
        """See `Subscription.positions`."""
        return []

    @property
    def lag(self) -> int | None:
        """See `Subscription.lag`."""
        return None

    async def commit(self, timeout: float | None = None) -> None:
        """See `Subscription.commit`."""
        raise SetupError(NO_CURSOR)

    async def close(self) -> None:
        """Stop receiving. Messages that were received but not consumed are dropped. May be called twice."""
        self._closed = True
        if self._intake is not None:
            if self._intake.closed is None:
                self._node._home()
                self._node._engine.dispose(self._intake)
        elif self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])

    def __del__(self) -> None:
        if self._intake is not None and self._intake.closed is None:  # `async for …`, left by break
            self._node._engine.soon(self._node._engine.dispose, self._intake)

    def __await__(self) -> Generator[Any, Any, AsyncSubscription]:
        return self._opened().__await__()

    async def __aenter__(self) -> AsyncSubscription:
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = self._intake.state() if self._intake else "not open"
        return f"<AsyncSubscription {' '.join(self.patterns)} of {self._node.name}: {state}>"


class _Bell:
    """Wakes those who wait for messages. The node holds this, and not the subscription, which so can be collected."""

    def __init__(self) -> None:
        self.waiting: set[asyncio.Future[None]] = set()
        self._intake: Intake | None = None
        self._fd = -1

    def watch(self, intake: Intake) -> None:
        """Ring when something arrives."""
        self._intake = intake
        self._fd = intake.fd
        asyncio.get_running_loop().add_reader(self._fd, self._readable)
        intake.before_close = self._unwatch

    def ring(self) -> None:
        """Have them look."""
        for future in self.waiting:
            _finish(future)

    def _readable(self) -> None:
        self.ring()
        if self._intake is not None:
            self._intake.calm()

    def _unwatch(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)


class AsyncLogSubscription(AsyncSubscription):
    """See `LogSubscription`; iterated, entered or awaited as `AsyncSubscription`.

    Tasks that share one each have their own message in hand, if they consume it by `async for`, or by `get` without
    a task in between (`get(timeout)`, not `wait_for(get())`).
    """

    def __init__(
        self, node: AsyncHome, patterns: Sequence[str], value_type: Any, start: Any, durable: str | None, on_gap: str
    ) -> None:
        self._node = node
        self._of_log = (patterns, value_type, start, durable, on_gap)
        self._begun: asyncio.Task[Replay] | None = None
        self._replay: Replay | None = None
        self._closed = False
        self._takers = _Takers()
        self._rest_at = 0.0

    async def get(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            GapError, DecodeError, SubscriptionTaken, LogUnavailable, NodeClosed: see `LogSubscription.get`.
        """
        deadline = None if timeout is None else now() + timeout
        replay = self._replay or await self._open_log(timeout)
        if replay is None:
            return None
        token = asyncio.current_task()
        if replay.owner is token:
            for message in replay.items:
                return message
        if replay.closed is not None:
            raise replay.closed
        self._takers.passing(token)
        return await self._take_from_log(replay, token, deadline)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self._messages()

    async def _messages(self) -> AsyncGenerator[Message, None]:
        """A generator costs a third of a call of `__anext__` for each message."""
        replay = self._replay or await self._open_log()
        token = asyncio.current_task()
        while replay is not None:
            if replay.owner is token:
                for message in replay.items:
                    yield message
            following = await self._take_from_log(replay, token, None)
            if following is None:
                return
            yield following

    async def __anext__(self) -> Message:
        following = await self.get()
        if following is None:
            raise StopAsyncIteration
        return following

    async def _take_from_log(
        self, replay: Replay, token: asyncio.Task[Any] | None, deadline: float | None
    ) -> Message | None:
        loop = self._node._home()
        if now() >= self._rest_at:
            await asyncio.sleep(0)
            self._rest_at = now() + SHIFT
        while True:
            with replay.bell:
                message = replay.take(token)
            if message is not None:
                self._takers.ring()  # there may be more, for another
                return message
            if replay.closed is not None:
                if isinstance(replay.closed, NodeClosed):
                    return None
                raise replay.closed
            if deadline is not None and now() >= deadline:
                return None
            future: asyncio.Future[None] = loop.create_future()
            self._takers.waiting.add(future)
            timer = None if deadline is None else loop.call_later(max(TICK, deadline - now()), _finish, future)
            try:
                await future
            finally:
                self._takers.waiting.discard(future)
                if timer is not None:
                    timer.cancel()
            self._rest_at = now() + SHIFT

    async def _open_log(self, timeout: float | None = None) -> Replay | None:
        """As `_open`."""
        if self._closed:
            raise NodeClosed("the subscription is closed")
        if self._begun is None:
            self._begun = self._node._home().create_task(self._begin())
            self._begun.add_done_callback(lambda task: task.cancelled() or task.exception())  # not to be reported
        done, _ = await asyncio.wait([self._begun], timeout=timeout)
        return self._begun.result() if done and not self._closed else None

    async def _begin(self) -> Replay:
        patterns, value_type, start, durable, on_gap = self._of_log
        takers = self._takers
        self._replay = await self._node._at_home().replays.subscribe(
            patterns,
            value_type=value_type,
            start=start,
            durable=durable,
            on_gap=on_gap,
            wake=takers.ring,
            abandoned=takers.passed,
        )
        return self._replay

    async def _opened(self) -> AsyncLogSubscription:
        if await self._open_log() is None:
            raise NodeClosed("the subscription was closed while it was opened")
        return self

    @property
    def lost(self) -> int:
        """See `LogSubscription.lost`."""
        return self._replay.lost if self._replay else 0

    @property
    def repaired(self) -> int:
        """Nothing is fetched beside the log: 0."""
        return 0

    @property
    def gaps(self) -> list[Gap]:
        """See `LogSubscription.gaps`."""
        return list(self._replay.gaps) if self._replay else []

    @property
    def patterns(self) -> tuple[str, ...]:
        """What was subscribed to."""
        return tuple(self._of_log[0])

    @property
    def lag(self) -> int | None:
        """See `LogSubscription.lag`."""
        return self._replay.lag if self._replay else None

    @property
    def positions(self) -> list[Position]:
        """See `LogSubscription.positions`."""
        return self._replay.positions if self._replay else []

    async def commit(self, timeout: float | None = None) -> None:
        """See `LogSubscription.commit`."""
        replay = self._replay or await self._open_log(timeout)
        if replay is not None:
            self._release(replay)
            await self._node._at_home().replays.commit(replay, timeout)

    async def close(self) -> None:
        """Stop reading, and commit: see `LogSubscription.close`. May be called twice."""
        if self._replay is not None:
            self._release(self._replay)
        await self._end()

    def _release(self, replay: Replay) -> None:
        with replay.bell:
            replay.release(asyncio.current_task())

    async def _end(self) -> None:
        self._closed = True
        if self._replay is not None:
            if not isinstance(self._replay.closed, NodeClosed | ForkedProcess):
                self._node._home()
                await self._node._engine.replays.close(self._replay)
        elif self._begun is not None:
            self._begun.cancel()
            await asyncio.wait([self._begun])

    def __del__(self) -> None:
        replay = getattr(self, "_replay", None)
        if replay is not None and not isinstance(
            replay.closed, NodeClosed | ForkedProcess
        ):  # `async for …`, left by break
            self._node._engine.soon(self._node._engine.replays.abandon, replay)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            await self._end()

    def __repr__(self) -> str:
        state = self._replay.state() if self._replay else "not open"
        return f"<AsyncLogSubscription {' '.join(self.patterns)} of {self._node.name}: {state}>"


class _Takers:
    """The tasks that consume. The node holds this, and not the subscription, which so can be collected."""

    def __init__(self) -> None:
        self.waiting: set[asyncio.Future[None]] = set()
        self._passing: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def ring(self) -> None:
        """Have them look."""
        for future in self.waiting:
            _finish(future)

    def passing(self, task: asyncio.Task[Any] | None) -> None:
        """It may be there for one call of `get` only, as `wait_for` makes one for each."""
        if task is not None:
            self._passing.add(task)

    def passed(self, token: object) -> bool:
        """Whether that was so: then its message went to somebody who will come by another task."""
        return isinstance(token, asyncio.Task) and token.done() and token in self._passing


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
