"""What `Node.subscribe` returns: live messages, or messages out of the log. Consumed on the caller's own threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Coroutine, Iterator, Sequence
from math import ceil
from types import TracebackType
from typing import Any, Protocol, TypeVar

from zmqbus.errors import ForkedProcess, NodeClosed, SetupError
from zmqbus.net.clock import now
from zmqbus.node.engine import Engine
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.receiving.replay import Position, Replay
from zmqbus.node.receiving.subscribing import subscribe
from zmqbus.protocol.message import Message
from zmqbus.protocol.streams.stream import Gap

T = TypeVar("T")
NO_CURSOR = "there is no cursor to commit: give the subscription a name, subscribe(…, durable='name')"


class Home(Protocol):
    """What is needed of the node."""

    _engine: Engine
    _closed: bool

    @property
    def name(self) -> str:
        """For people."""

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the engine's thread do this, and wait."""

    def _unsubscribe(self, intake: Intake) -> None:
        """Close a live subscription."""


class Subscription:
    """Messages of the topics that fit, live, with gaps repaired. An iterator and a context manager.

    Any thread may consume it; several share its messages. One that nobody refers to any more is closed.
    """

    def __init__(
        self, node: Home, patterns: Sequence[str], value_type: Any, history: int, on_gap: str, observe: bool
    ) -> None:
        self._node = node
        self._intake: Intake = node._call(
            subscribe(node._engine, patterns, value_type=value_type, history=history, on_gap=on_gap, observe=observe)
        )

    def get(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            GapError: messages are lost, and the subscription was made with `on_gap="raise"`.
            DecodeError: this message does not fit `type`; the next call goes on behind it.
            NodeClosed: the subscription was closed before this call.
        """
        for message in self._intake.items:
            return message
        if self._intake.closed is not None:
            raise self._intake.closed
        return self._take(timeout)

    def __iter__(self) -> Iterator[Message]:
        intake = self._intake
        while True:
            yield from intake.items
            message = self._take(None)
            if message is None:
                return
            yield message

    def __next__(self) -> Message:
        message = self.get()
        if message is None:
            raise StopIteration
        return message

    def _take(self, timeout: float | None) -> Message | None:
        """Wait for a message. None: the time is over, or the subscription is closed.

        The less is done here the better: on its way to sleep this thread may keep the processor from the one that
        sends what it is going to wait for.
        """
        intake = self._intake
        until = None if timeout is None else now() + timeout
        patience_ms = -1 if timeout is None else ceil(timeout * 1000)
        while True:
            gate = intake.gate
            if (gate.wanted or not gate.lock.acquire(False)) and not gate.enter(until):
                return None
            try:
                message = intake.take(patience_ms)
            finally:
                gate.lock.release()
            if message is not None:
                return message
            if intake.closed is not None:
                if isinstance(intake.closed, ForkedProcess):
                    raise intake.closed
                return None
            if until is not None:
                left = until - now()
                if left <= 0:
                    return None
                patience_ms = ceil(left * 1000)

    @property
    def lost(self) -> int:
        """Messages that are in no history that could be reached; the ranges are in `gaps`."""
        return self._intake.tracker.lost

    @property
    def repaired(self) -> int:
        """Messages that the live path missed and that were fetched."""
        return self._intake.tracker.repaired

    @property
    def gaps(self) -> list[Gap]:
        """What was lost, exactly; the last 1000 ranges."""
        return list(self._intake.gaps)

    @property
    def patterns(self) -> tuple[str, ...]:
        """What was subscribed to."""
        return tuple(self._intake.patterns)

    @property
    def lag(self) -> int | None:
        """Of a subscription to the log: see `LogSubscription`. What is live has none."""
        return None

    @property
    def positions(self) -> list[Position]:
        """Of a subscription to the log: see `LogSubscription`. What is live has none."""
        return []

    def commit(self, timeout: float | None = None) -> None:
        """Of a durable subscription: see `LogSubscription`.

        Raises:
            SetupError: this is not one.
        """
        raise SetupError(NO_CURSOR)

    def close(self) -> None:
        """Stop receiving. Messages that were received but not consumed are dropped. May be called twice."""
        self._node._unsubscribe(self._intake)

    def __del__(self) -> None:
        intake = getattr(self, "_intake", None)
        if intake is not None and intake.closed is None:  # `for message in node.subscribe(…)`, left by break
            self._node._engine.soon(self._node._engine.dispose, intake)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Subscription {' '.join(self.patterns)} of {self._node.name}: {self._intake.state()}>"


class LogSubscription(Subscription):
    """Messages of the topics that fit, out of the forwarders' logs: from somewhere on, and then what comes.

    With a durable name the forwarders keep a cursor for it, so that it goes on where it left off, and gets everything
    at least once. A message has been dealt with when the next one is asked for; about once a second that is committed.
    `commit()`, `close()` and the end of a `with` block without an exception do so at once, and take the last message
    as dealt with, too; after an exception it is not, and comes again.

    Any thread may consume it; several share its messages, and what one of them is still at work on is not committed.
    One that nobody refers to any more is closed, without its last message.
    """

    def __init__(
        self, node: Home, patterns: Sequence[str], value_type: Any, start: Any, durable: str | None, on_gap: str
    ) -> None:
        self._node = node
        self._local = threading.local()
        replays = node._engine.replays
        self._replay: Replay = node._call(
            replays.subscribe(patterns, value_type=value_type, start=start, durable=durable, on_gap=on_gap)
        )

    def get(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came within `timeout` seconds (0: only what is here), or on `close()`.

        Raises:
            GapError: messages are lost, and the subscription was made with `on_gap="raise"`.
            DecodeError: this message does not fit `type`; the next call goes on behind it.
            SubscriptionTaken: another consumer reads under its name now.
            LogUnavailable: a forwarder cannot give what its log should have. Nothing is skipped.
            NodeClosed: the subscription was closed before this call.
        """
        replay, token = self._replay, self._token()
        if replay.owner is token:
            for message in replay.items:
                return message
        if replay.closed is not None:
            raise replay.closed
        return self._take_from_log(token, timeout)

    def __iter__(self) -> Iterator[Message]:
        replay = self._replay
        while True:
            token = self._token()
            if replay.owner is token:
                yield from replay.items
            message = self._take_from_log(token, None)
            if message is None:
                return
            yield message

    def _token(self) -> object:
        """Stands for the calling thread. Not its ident, which another thread may get when it has ended."""
        try:
            token: object = self._local.token
        except AttributeError:
            token = self._local.token = object()
        return token

    def _take_from_log(self, token: object, timeout: float | None) -> Message | None:
        replay = self._replay
        until = None if timeout is None else now() + timeout
        while True:
            with replay.bell:
                message = replay.take(token)
                if message is not None:
                    return message
                if replay.closed is not None:
                    if isinstance(replay.closed, NodeClosed):
                        return None
                    raise replay.closed
                left = None if until is None else until - now()
                if left is not None and left <= 0:
                    return None
                replay.sleep(left)

    @property
    def lost(self) -> int:
        """Messages known to be lost: those in `gaps`, and the offsets that LogGap events told of."""
        return self._replay.lost

    @property
    def repaired(self) -> int:
        """Nothing is fetched beside the log: 0."""
        return 0

    @property
    def gaps(self) -> list[Gap]:
        """Ranges that streams lack in every log that could be read; the last 1000."""
        return list(self._replay.gaps)

    @property
    def patterns(self) -> tuple[str, ...]:
        """What was subscribed to."""
        return tuple(self._replay.patterns)

    @property
    def lag(self) -> int | None:
        """Offsets, of any topic, from what was handed out to the ends of the logs as last heard, which is seconds ago
        at most; None: no forwarder has told yet."""
        return self._replay.lag

    @property
    def positions(self) -> list[Position]:
        """How far it is in the log of each forwarder that has told where it begins."""
        return self._replay.positions

    def commit(self, timeout: float | None = None) -> None:
        """Return when the forwarders have on disk how far this is: all that was handed out, to this thread with its
        last message, to others without what they are still at work on.

        Raises:
            SetupError: it has no durable name.
            SubscriptionTaken: another consumer reads under its name now.
            WaitTimeout: a forwarder has not confirmed it within `timeout` seconds (None: no limit).
            NodeClosed: the subscription was closed.
        """
        with self._replay.bell:
            self._replay.release(self._token())
        self._node._call(self._node._engine.replays.commit(self._replay, timeout))

    def close(self) -> None:
        """Stop reading, and commit: see `commit`, but at most for 5 s. May be called twice."""
        with self._replay.bell:
            self._replay.release(self._token())
        self._end()

    def _end(self) -> None:
        if not isinstance(self._replay.closed, NodeClosed | ForkedProcess) and not self._node._closed:
            with contextlib.suppress(NodeClosed):
                self._node._call(self._node._engine.replays.close(self._replay))

    def __del__(self) -> None:
        replay = getattr(self, "_replay", None)
        if replay is not None and not isinstance(
            replay.closed, NodeClosed | ForkedProcess
        ):  # `for message in node.subscribe(…)`, left by break
            self._node._engine.soon(self._node._engine.replays.abandon, replay)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def __repr__(self) -> str:
        return f"<LogSubscription {' '.join(self.patterns)} of {self._node.name}: {self._replay.state()}>"
