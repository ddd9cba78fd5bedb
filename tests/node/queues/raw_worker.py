"""A worker of plain sockets: what it says and hears are the commands themselves."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import zmq

from zmqbus.protocol import commands
from zmqbus.protocol.commands import Body, Command, decode_command, encode_command
from zmqbus.protocol.frames import ValueDecoder, decode_batches

PATIENCE_MS = 10_000

B = TypeVar("B", bound=Body)


class Got(NamedTuple):
    """A job."""

    delivery: int
    attempt: int
    topic: str
    seq: int
    value: Any
    headers: dict[str, Any] | None


class RawWorker:
    """Connected to one inbox, and introduced."""

    def __init__(self, inbox: str, bus: str) -> None:
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 200)
        self._dealer.connect(inbox)
        self.origin = secrets.randbits(64)
        self.jobs: list[Got] = []
        hello = commands.Hello(
            origin=self.origin, name="raw", bus=bus, epoch=1, inbox=[], pub_port=1, host="x", pid=1, release="0"
        )
        self.say(hello, 1)
        self.hear(commands.Welcome)

    def say(self, body: Body, request: int = 7) -> None:
        self._dealer.send(encode_command(body, request))

    def join(
        self, *patterns: str, credit: int, group: str = "workers", lease_ms: int = 30_000, number: int = 1
    ) -> None:
        self.say(commands.Join(number, list(patterns), group, lease_ms, credit))

    def hear(self, kind: type[B], timeout_ms: int = PATIENCE_MS) -> B:
        """The next of that kind; jobs are collected meanwhile."""
        while True:
            command = self._next(timeout_ms)
            assert command is not None, f"no {kind.__name__} came"
            if type(command.body) is kind:
                return command.body

    def take(self, count: int) -> list[Got]:
        """So many jobs."""
        while len(self.jobs) < count:
            assert self._next(PATIENCE_MS) is not None, f"{len(self.jobs)} of {count} jobs came"
        taken, self.jobs = self.jobs[:count], self.jobs[count:]
        return taken

    def gets_nothing(self, ms: int = 200) -> bool:
        """For so long."""
        self._next(ms)
        return not self.jobs

    def done(self, *jobs: Got, credit: int = 0, number: int = 1) -> commands.Settled:
        self.say(commands.Done(number, [(job.delivery, job.seq, job.seq) for job in jobs], credit))
        return self.hear(commands.Settled)

    def fail(self, *jobs: Got, how: str = "nack", delay_ms: int = -1, reason: str = "", credit: int = 0) -> None:
        ranges = [(job.delivery, job.seq, job.seq) for job in jobs]
        self.say(commands.Fail(1, ranges, how, delay_ms, reason, credit))
        self.hear(commands.Settled)

    def _next(self, timeout_ms: int) -> Command | None:
        if not self._dealer.poll(timeout_ms):
            return None
        command = decode_command(self._dealer.recv())
        if isinstance(command.body, commands.Job):
            for (delivery, attempt), batch in zip(
                command.body.deliveries, decode_batches(command.batches), strict=True
            ):
                values, headers = ValueDecoder().decode(batch)
                for at, value in enumerate(values):
                    own = headers[at] if headers else None
                    self.jobs.append(Got(delivery, attempt, batch.topic.decode(), batch.first + at, value, own))
        return command

    def close(self) -> None:
        self._dealer.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
