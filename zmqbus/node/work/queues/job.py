"""What a worker is handed: a job, to be settled once. Any thread may settle it."""

from __future__ import annotations

from math import inf
from types import TracebackType
from typing import Any, Protocol

import msgspec

from zmqbus.errors import JobSettled, SetupError

REASON_MAX = 1000  # characters; FAIL takes no more


class Held(Protocol):
    """What a job knows of the delivery that it came in."""

    acked: list[int]
    """Seqs of what was acknowledged and not yet said."""
    clean: bool
    """Nothing is in there."""

    def stir(self) -> None:
        """There is, from now on."""

    def failed(self, seq: int, how: str, delay_ms: int, reason: str) -> None:
        """A job is not done."""

    def extend(self, seconds: float) -> None:
        """It takes longer."""


class Job(msgspec.Struct, gc=False, eq=False):
    """A message that this worker is to deal with, and then to say so: `ack`, `nack` or `reject`, once.

    `with job:` (or `async with`) does: it acknowledges at the end of the block. After an exception there the job is to
    be tried again later, by whoever, and the exception goes on; after one that is no Exception (KeyboardInterrupt,
    CancelledError) at once, as if it had not been begun. A job that was settled within the block stays so.

    A job that nobody refers to any more and that was not settled is taken as failed.
    """

    topic: str
    """Where it was pushed or published."""
    value: Any
    """The decoded value (or an instance of the worker's `type=`)."""
    seq: int
    """Position within its stream: 1, 2, 3 … without holes."""
    origin: int
    """The 64-bit random id that its publisher drew at start."""
    time: float
    """When its batch was sent, by the publisher's clock: seconds since the Unix epoch, UTC."""
    headers: dict[str, Any] | None
    """Headers given to `push` or `publish`, or None."""
    attempt: int
    """How often it was given to a worker, with this time: from 1."""
    _held: Held | None

    @property
    def queue(self) -> str:
        """The topic."""
        return self.topic

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged, or given up."""
        return self._held is None

    def ack(self) -> None:
        """It is done. Does not wait: what was acknowledged shortly after each other is said together. See
        `Worker.flush`.

        Raises:
            JobSettled: it was settled before.
        """
        held = self._held
        if held is None:
            raise JobSettled(self.topic, self.origin, self.seq)
        self._held = None
        held.acked.append(self.seq)
        if held.clean:
            held.stir()

    def nack(self, delay: float | None = None, reason: str = "") -> None:
        """It is not done, and is to be tried again after `delay` seconds; None: 1 s, and each time twice as long, up to
        a minute. After the last attempt it goes to the dead letters, with this `reason`.

        Raises:
            JobSettled: it was settled before.
            SetupError: that is no delay.
        """
        delay_ms = -1 if delay is None else round(_seconds("delay", delay, 0.0) * 1000)
        self._fail("nack", delay_ms, reason)

    def reject(self, reason: str = "") -> None:
        """It can never be done: it goes to the dead letters at once, with this `reason`.

        Raises:
            JobSettled: it was settled before.
        """
        self._fail("reject", -1, reason)

    def extend(self, seconds: float) -> None:
        """It is still being worked on, for at most so many seconds from now on: so long its lease runs. Does not wait.

        Raises:
            JobSettled: it was settled before.
            SetupError: that is no time.
        """
        held = self._held
        if held is None:
            raise JobSettled(self.topic, self.origin, self.seq)
        held.extend(_seconds("seconds", seconds, 0.001))

    def _fail(self, how: str, delay_ms: int, reason: str) -> None:
        held = self._held
        if held is None:
            raise JobSettled(self.topic, self.origin, self.seq)
        self._held = None
        text = str(reason)[:REASON_MAX].encode(errors="replace").decode()  # that of a file name may be no UTF-8
        held.failed(self.seq, how, delay_ms, text)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._held
        if held is None:
            return
        if kind is None:  # as `ack`, which to call costs a third of this
            self._held = None
            held.acked.append(self.seq)
            if held.clean:
                held.stir()
        elif issubclass(kind, Exception):
            try:
                text = str(error)
            except Exception:
                text = ""
            self._fail("nack", -1, f"{kind.__name__}: {text}" if text else kind.__name__)
        else:
            self._fail("return", -1, kind.__name__)

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __repr__(self) -> str:
        state = "settled" if self._held is None else f"attempt {self.attempt}"
        return f"<Job {self.topic} {self.origin:016x}#{self.seq} {state}>"


def _seconds(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < inf:
        raise SetupError(f"{name}={value!r}: use a number of seconds, {least:g} or more")
    return min(float(value), 1e9)
