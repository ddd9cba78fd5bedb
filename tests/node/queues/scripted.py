"""An owner of jobs that does what a test tells it: a peer of its own, of plain sockets."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import zmq

from zmqbus.protocol import commands
from zmqbus.protocol.commands import Body, Command, decode_command, encode_command
from zmqbus.protocol.frames import DATA, HEADERS, HEARTBEAT, HEARTBEAT_PREFIX, QUEUED, encode_frame

B = TypeVar("B", bound=Body)


class ScriptedOwner:
    """Speaks for itself where it is about being a peer; keeps for the test what workers say."""

    def __init__(self, bus: str, name: str = "owner", port: int | None = None) -> None:
        self.origin = secrets.randbits(64) or 1
        self.said: list[tuple[bytes, Command]] = []
        """All that is not about being a peer, with the identity of who said it."""
        self.joins: list[tuple[bytes, int, commands.Join]] = []
        self.settles = True
        """DONE and FAIL are answered at once."""
        self.delivery = 0
        self.seq = 0
        self._bus = bus
        self._name = name
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.router_mandatory = True
        self._pub = self._context.socket(zmq.PUB)
        self._pub.linger = 0
        address = "tcp://127.0.0.1"
        self.port = self._router.bind_to_random_port(address) if port is None else port
        if port is not None:
            self._router.bind(f"{address}:{port}")
        self._pub_port = self._pub.bind_to_random_port(address)
        self.inbox = f"{address}:{self.port}"
        self._guests: set[bytes] = set()
        self._dialled: dict[int, zmq.Socket[bytes]] = {}
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- what a test has it do -------------------------------------------------------------------

    def give(
        self,
        *values: Any,
        topic: str = "jobs",
        attempt: int = 1,
        headers: Sequence[dict[str, Any] | None] | None = None,
        join: int = -1,
        raw: bytes | None = None,
    ) -> tuple[int, int]:
        """Send a batch of jobs to whoever JOINed last. Returns the number of the delivery and its first seq."""
        identity, request, body = self.joins[join]
        self.delivery += 1
        first, self.seq = self.seq + 1, self.seq + len(values)
        payload = raw if raw is not None else msgspec.msgpack.encode([values, headers] if headers else values)
        flags = QUEUED | (HEADERS if headers else 0)
        prefix = topic.encode() + b"\0"
        frame = encode_frame(prefix, DATA, flags, len(values), self.origin, first, time.time_ns(), payload)
        self.answer(identity, commands.Job(body.id, [(self.delivery, attempt)]), request, [frame])
        return self.delivery, first

    def answer(self, identity: bytes, body: Body, request: int, parts: Sequence[bytes] = ()) -> None:
        with self._lock, contextlib.suppress(zmq.ZMQError):  # who asked may be gone
            self._router.send_multipart([identity, encode_command(body, request, parts)])

    def forget(self) -> None:
        """It knows no peer any more."""
        with self._lock:
            self._guests.clear()

    # --- what a test learns ----------------------------------------------------------------------

    def of(self, kind: type[B]) -> list[B]:
        """What was said of that kind."""
        return [command.body for _, command in list(self.said) if isinstance(command.body, kind)]

    @property
    def done(self) -> list[tuple[int, int, int]]:
        return [tuple(job) for body in self.of(commands.Done) for job in body.done]

    @property
    def credit(self) -> int:
        """What was granted in all, by the last who JOINed."""
        _, _, join = self.joins[-1]
        later = [b.credit for b in [*self.of(commands.Done), *self.of(commands.Fail)] if b.id == join.id]
        return max([join.credit, *later])

    def wait_for(self, condition: Callable[[], Any], timeout: float = 10.0) -> Any:
        deadline = time.monotonic() + timeout
        while not (result := condition()):
            assert time.monotonic() < deadline, f"it never came true; said: {[c.body for _, c in self.said]}"
            time.sleep(0.001)
        return result

    # --- being a peer ----------------------------------------------------------------------------

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for socket in (self._router, *self._dialled.values()):
            socket.close()
        self._pub.close()
        self._context.term()

    def _run(self) -> None:
        beats = 0
        due = 0.0
        while not self._stopped.is_set():
            if time.monotonic() >= due:
                due = time.monotonic() + 0.5
                beats += 1
                self._pub.send(encode_frame(HEARTBEAT_PREFIX, HEARTBEAT, 0, 0, self.origin, beats, time.time_ns()))
            with self._lock:
                while self._router.poll(0):
                    identity, frame = self._router.recv_multipart()
                    self._hear(identity, decode_command(frame))
            time.sleep(0.0005)  # an owner that others may speak for, in between

    def _hear(self, identity: bytes, command: Command) -> None:
        body = command.body
        if isinstance(body, commands.Hello):
            self._guests.add(identity)
            self.answer(identity, self._introduction(commands.Welcome), command.request)
            self._dial(body)
            for subscribed in body.subscriptions:
                self.answer(identity, commands.Heads(subscribed.id, []), command.request)
        elif identity not in self._guests:
            self.answer(identity, commands.Error("hello", "say HELLO first"), command.request)
        elif isinstance(body, commands.Subscribe):
            self.answer(identity, commands.Heads(body.id, []), command.request)
        elif isinstance(body, commands.Bye):
            self.answer(identity, commands.Bye(), command.request)
        elif not isinstance(body, commands.Unsubscribe):
            self.said.append((identity, command))
            known = any(identity == other and body.id == join.id for other, _, join in self.joins)
            if isinstance(body, commands.Join):
                self.joins.append((identity, command.request, body))
            elif not known and isinstance(body, commands.Done | commands.Fail):
                self.answer(identity, commands.Error("worker", "JOIN first"), command.request)
            elif self.settles and (isinstance(body, commands.Fail) or (isinstance(body, commands.Done) and body.done)):
                self.answer(identity, commands.Settled(body.id), command.request)

    def _dial(self, body: commands.Hello) -> None:
        """Who is to be joined has said HELLO and WELCOME, both."""
        if body.origin not in self._dialled:
            dealer = self._dialled[body.origin] = self._context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.connect(body.inbox[0])
            dealer.send(encode_command(self._introduction(commands.Hello), 1))

    def _introduction(self, kind: type[commands.Hello]) -> commands.Hello:
        return kind(
            origin=self.origin,
            name=self._name,
            bus=self._bus,
            epoch=time.time_ns(),
            inbox=[self.inbox],
            pub_port=self._pub_port,
            host="here",
            pid=1,
            release="test",
        )


@contextmanager
def owning(bus: str, name: str = "owner") -> Iterator[ScriptedOwner]:
    owner = ScriptedOwner(bus, name)
    try:
        yield owner
    finally:
        owner.close()
