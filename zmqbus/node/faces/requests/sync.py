"""Requests of a `Node`: asked on the caller's thread, and answered on the consumer's, or on threads of their own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Coroutine, Iterator
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar

from zmqbus.errors import ForkedProcess, NodeClosed, RequestTimeout, SetupError
from zmqbus.net.clock import now
from zmqbus.node.engine import Engine
from zmqbus.node.faces.requests.values import (
    CONCURRENCY,
    TIMEOUT,
    Reply,
    check_concurrency,
    check_timeout,
    check_type,
    failure,
    pack,
    replies,
    success,
    unpack,
    value_of,
)
from zmqbus.node.work.requests.answering import Incoming, Responder
from zmqbus.node.work.requests.asking import Call, Outcome
from zmqbus.protocol.commands import Body

T = TypeVar("T")
Responds = TypeVar("Responds", bound=Callable[..., Any])
LOOK = 1.0  # seconds between looks whether the node is still there, of those who wait for an answer


class Home(Protocol):
    """What is needed of the node."""

    _engine: Engine
    _closed: bool

    @property
    def name(self) -> str:
        """For people."""

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the engine's thread do this, and wait."""


def ask(
    node: Home, service: str, value: object, headers: dict[str, Any] | None, timeout: float | None, value_type: Any
) -> Any:
    """See `Node.request`."""
    engine = node._engine
    if engine.refusal is not None:
        raise engine.refusal
    check_timeout(timeout)
    if value_type is not None:
        check_type(value_type)
    call = engine.requests.lanes.ask(service, *pack(value, headers), timeout)
    if not isinstance(call, Call):
        return value_of(call, value_type, service, engine.requests.responders)
    answered = Lock()
    answered.acquire()
    outcomes: list[Outcome] = []

    def on_end(outcome: Outcome) -> None:
        outcomes.append(outcome)
        answered.release()

    call.on_end = on_end
    engine.soon(engine.requests.asking.begin, call)
    try:
        left = timeout
        while not answered.acquire(timeout=LOOK if left is None else min(LOOK, left)):
            if node._closed:
                raise NodeClosed(f"node {node.name!r} is closed")
            if call.expires_at is not None and (left := call.expires_at - now()) <= 0:
                raise RequestTimeout(service, timeout or 0.0)
    except BaseException:
        engine.soon(engine.requests.asking.give_up, call)
        raise
    return value_of(outcomes[0], value_type, service, engine.requests.responders)


class Request:
    """Somebody waits for the answer to this. Any thread may give it; the first answer counts."""

    __slots__ = ("_engine", "_incoming", "headers", "origin", "requester", "service", "value")

    def __init__(self, engine: Engine, incoming: Incoming, value_type: Any) -> None:
        """
        Raises:
            ReplyMismatch, RemoteProtocolError: see `unpack`.
        """
        self.service = incoming.service
        self.origin = incoming.origin
        responders = engine.requests.responders
        self.requester = responders.name(incoming.origin)
        """The name of the node that asks; `origin` is its number."""
        self.headers: dict[str, Any] | None = None
        if incoming.headers:
            self.headers = unpack(incoming.headers, dict[str, Any], self.service, self.origin, responders)
        self.value = unpack(incoming.packed, value_type, self.service, self.origin, responders)
        self._engine = engine
        self._incoming = incoming

    def reply(self, value: object = None) -> bool:
        """Answer with a value. False: it was answered before, or its responder was closed.

        Raises:
            UnsupportedValue: msgpack has no place for it; it is not answered.
            MessageTooLarge: it is larger than 64 MiB; it is not answered.
        """
        return end(self._engine, self._incoming, *success(value))

    def fail(self, error: BaseException | str) -> bool:
        """Answer that it cannot be done: the requester gets a RemoteError with the type of `error` and what it says."""
        return end(self._engine, self._incoming, failure(error))

    def __repr__(self) -> str:
        return f"<Request for {self.service} from {self.requester}>"


def end(engine: Engine, incoming: Incoming, body: Body | None, parts: tuple[bytes, ...] = ()) -> bool:
    """Answer a request, or drop it, on this thread, which is not the engine's. False: it was ended before."""
    if not incoming.claim():
        return False
    if body is not None:
        incoming.answer(body, parts)
    engine.soon(engine.requests.answering.ended, incoming, body is not None)
    return True


def begun(engine: Engine, incoming: Incoming, value_type: Any) -> Request | None:
    """To be answered now. None: it has been, because nobody waits for it any more, or it is not as it should be."""
    if incoming.is_late:
        end(engine, incoming, None)
        return None
    try:
        return Request(engine, incoming, value_type)
    except Exception as error:
        end(engine, incoming, failure(error))
        return None


class Requests(Responder):
    """The requests for one service, one by one. An iterator and a context manager; several threads may share it."""

    def __init__(self, node: Home, service: str, value_type: Any) -> None:
        super().__init__(service)
        check_type(value_type)
        self._node = node
        self._type = value_type
        self._queue: SimpleQueue[Incoming | None] = SimpleQueue()
        node._call(node._engine.requests.answering.attach(self))

    def get(self, timeout: float | None = None) -> Request | None:
        """The next request; None when none came within `timeout` seconds (0: only what is here), or it is closed."""
        until = None if timeout is None else now() + timeout
        engine = self._node._engine
        while not isinstance(engine.refusal, ForkedProcess):
            try:
                incoming = self._queue.get(timeout=None if until is None else max(0.0, until - now()))
            except Empty:
                return None
            if incoming is None:
                self._queue.put(None)  # for the next who waits
                return None
            request = begun(engine, incoming, self._type)
            if request is not None:
                return request
        raise engine.refusal

    def __iter__(self) -> Iterator[Request]:
        while (request := self.get()) is not None:
            yield request

    def __next__(self) -> Request:
        request = self.get()
        if request is None:
            raise StopIteration
        return request

    def take(self, incoming: Incoming) -> None:
        self._queue.put(incoming)

    def stop(self) -> list[Incoming]:
        return _emptied(self._queue)

    def close(self) -> None:
        """Respond no longer. What nobody has begun with goes to others; what was begun with and not answered fails."""

        async def detach() -> None:
            self._node._engine.requests.answering.detach(self)

        with contextlib.suppress(NodeClosed, ForkedProcess):
            self._node._call(detach())

    def __enter__(self) -> Requests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Requests for {self.service} to {self._node.name}>"


class Pool(Responder):
    """Has a function answer the requests for a service, on threads that are started when there is work for them."""

    def __init__(
        self, node: Home, service: str, function: Callable[[Any], object], value_type: Any, concurrency: int
    ) -> None:
        super().__init__(service)
        self._engine = node._engine
        self._function = function
        self._type = value_type
        self._concurrency = concurrency
        self._threads = 0
        self._queue: SimpleQueue[Incoming | None] = SimpleQueue()

    def take(self, incoming: Incoming) -> None:
        self._queue.put(incoming)
        if self._threads < min(self.unanswered, self._concurrency):
            self._threads += 1
            Thread(target=self._work, name=f"zmqbus {self.service} {self._threads}", daemon=True).start()

    def stop(self) -> list[Incoming]:
        return _emptied(self._queue)

    def _work(self) -> None:
        while (incoming := self._queue.get()) is not None:
            request = begun(self._engine, incoming, self._type)
            if request is None:
                continue
            try:
                request.reply(self._function(request.value))
            except BaseException as error:  # also SystemExit: it is the request that ends, not the thread
                request.fail(error)
        self._queue.put(None)


class Inline(Responder):
    """Has a function answer the requests for a service on the engine's own thread, at once."""

    def __init__(self, engine: Engine, service: str, function: Callable[[Any], object], value_type: Any) -> None:
        super().__init__(service)
        self._engine = engine
        self._function = function
        self._type = value_type

    def take(self, incoming: Incoming) -> None:
        requests = self._engine.requests
        end = requests.answering.end
        if incoming.is_late:
            end(incoming, None)
            return
        try:
            value = unpack(incoming.packed, self._type, self.service, incoming.origin, requests.responders)
            end(incoming, *success(self._function(value)))
        except Exception as error:
            end(incoming, failure(error))

    def stop(self) -> list[Incoming]:
        return []


def _emptied(queue: SimpleQueue[Incoming | None]) -> list[Incoming]:
    """What is in there, not counting the sign that no more will come, which it holds from now on."""
    left = []
    with contextlib.suppress(Empty):
        while True:
            if (incoming := queue.get_nowait()) is not None:
                left.append(incoming)
    queue.put(None)
    return left


class Requesting:
    """What a `Node` can ask, and answer."""

    def request(
        self: Home,
        service: str,
        value: object = None,
        *,
        timeout: float | None = TIMEOUT,
        headers: dict[str, Any] | None = None,
        type: Any = None,
    ) -> Any:
        """Ask one of the nodes that respond to a service, and return its answer.

        Of those who can be asked: who has fewest of this node's requests to answer, then who was asked longest ago. A
        request is sent once, and to another responder only where the first has surely not begun with it.

        Args:
            service: its name, of the form of a topic.
            timeout: seconds to wait for the answer; None: no limit.
            type: decode the answer into this type, as `subscribe` does.

        Raises:
            NoResponders: nobody responds to it; said at once.
            RemoteError: the responder could not do it, and says why.
            RequestTimeout: no answer came in time.
            ResponderLost: the responder died, or the connection to it broke; said at once.
            ResponderBusy: too many requests wait at all of them.
            ReplyMismatch: the answer does not fit `type`.
            UnsupportedValue: the value, or a header, cannot be carried by msgpack.
            MessageTooLarge: it is, with its headers, larger than 1,000,000 bytes.
            SetupError: the timeout, or `type`, is none; nothing was sent.
            NodeClosed: the node has been closed, or was while this waited.
        """
        return ask(self, service, value, headers, timeout, type)

    def request_many(
        self: Home,
        service: str,
        value: object = None,
        *,
        timeout: float = TIMEOUT,
        n: int | None = None,
        headers: dict[str, Any] | None = None,
        type: Any = None,
    ) -> list[Reply]:
        """Ask all nodes that respond to a service now, and return what they answered, in the order in which it came.

        Returns when all have, or the first `n`, or after `timeout` seconds; who has not answered by then is missing.

        Raises:
            NoResponders: there is nobody. And UnsupportedValue, MessageTooLarge, SetupError, NodeClosed, as `request`.
        """
        check_timeout(timeout)
        check_type(type)
        requests = self._engine.requests
        outcomes = self._call(requests.asking.gather(service, *pack(value, headers), timeout, n))
        return replies(outcomes, type, service, requests.responders)

    def respond(self: Home, service: str, *, type: Any = None) -> Requests:
        """Take the requests for a service, to be answered by `request.reply(value)` or `request.fail(error)`.

        At most 1000 wait; more are sent on to other responders. Those that nobody waits for any more are left out.

        Raises:
            TopicError: the service breaks the grammar of topics.
            SetupError: this node responds to 256 services already, or nothing can be decoded into `type`.
        """
        return Requests(self, service, type)

    def responder(
        self: Home, service: str, *, type: Any = None, concurrency: int = CONCURRENCY, inline: bool = False
    ) -> Callable[[Responds], Responds]:
        """Have a function answer the requests for a service: it gets the value, and what it returns is the answer.

            @node.responder("time.now")
            def now(value): return time.time()

        When it raises, the requester gets a RemoteError with the type of the error and what it says. Until the node is
        closed, which waits for what has been begun with.

        Args:
            concurrency: how many calls there may be at a time, each on a thread.
            inline: call it on the thread that does all other work of this node: the quickest, for what takes
                microseconds. While it runs, nothing else does.

        Raises:
            SetupError: `concurrency` is below 1. And what `respond` raises.
        """
        check_type(type)
        check_concurrency(concurrency)

        def register(function: Responds) -> Responds:
            if inspect.iscoroutinefunction(function):
                raise SetupError(f"{function.__name__} is a coroutine function: only an AsyncNode can run it")
            made: Responder
            if inline:
                made = Inline(self._engine, service, function, type)
            else:
                made = Pool(self, service, function, type, concurrency)
            self._call(self._engine.requests.answering.attach(made))
            return function

        return register

    def wait_for_responders(self: Home, service: str, n: int = 1, timeout: float | None = None) -> int:
        """Wait until at least `n` nodes respond to a service; returns how many. This one counts, if it does.

        Raises:
            WaitTimeout: they were not within `timeout` seconds.
        """
        return self._call(self._engine.requests.wait_for_responders(service, n, timeout))
