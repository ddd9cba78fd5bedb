"""Our own requests: whom to ask, what came of it, and who was lost over it. On the engine's loop.

A request is sent once. It goes to another responder only where the first has surely not begun with it: it could not be
sent, or was answered by ERROR. When the connection that it went over is lost, it fails at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Protocol

import msgspec

from zmqbus.errors import (
    NoResponders,
    RemoteError,
    RemoteProtocolError,
    ResponderBusy,
    ResponderLost,
    ZmqbusError,
)
from zmqbus.net.clock import now
from zmqbus.node.peers.links import Link
from zmqbus.node.work.requests.answering import Answering, Incoming, Peers
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command
from zmqbus.protocol.members.responders import Responders

OPEN_MAX = 900  # requests that one responder has to answer: a link holds 1000 commands that are not on their way yet


class Answered(msgspec.Struct, gc=False):
    """What a responder answered."""

    origin: int
    packed: bytes


Outcome = Answered | ZmqbusError


class Call:
    """One request of ours. `on_end` is called once, on the loop, unless it is given up or goes by a lane."""

    __slots__ = (
        *("at", "chosen", "expires_at", "greeted", "has_ended", "headers", "link", "number"),
        *("on_end", "only", "packed", "refusal", "service", "timeout", "tried"),
    )

    def __init__(
        self,
        service: str,
        packed: bytes,
        headers: bytes,
        timeout: float | None,
        on_end: Callable[[Outcome], None] = lambda outcome: None,
        only: int | None = None,
    ) -> None:
        """`timeout`: seconds for which somebody waits. `only`: ask this node, and no other."""
        self.service = service
        self.packed = packed
        self.headers = headers  # packed, empty: none
        self.timeout = timeout
        self.expires_at = None if timeout is None else now() + timeout
        self.on_end = on_end
        self.only = only
        self.chosen: int | None = None  # whom to ask first; it counts as asked already
        self.tried: set[int] = set()  # who has it, or has refused it
        self.refusal: ZmqbusError | None = None  # why nobody has taken it so far
        self.greeted = False  # somebody wanted to hear HELLO first
        self.has_ended = False
        self.at = 0  # whom it was sent to, while that is to answer
        self.link: Link | None = None
        self.number = 0  # of the request on that link

    def refused(self, error: commands.Error, name: str) -> None:
        """Somebody has surely not begun with it."""
        if error.code == "busy":
            self.refusal = ResponderBusy(self.service, name)
        elif error.code not in ("service", "hello"):
            self.refusal = RemoteError(error.code, error.reason, name)

    @property
    def patience_ms(self) -> int:
        """For how long from now on somebody waits for the answer; 0: without limit."""
        return 0 if self.expires_at is None else max(1, ceil((self.expires_at - now()) * 1000))

    @property
    def parts(self) -> tuple[bytes, ...]:
        """What follows the body."""
        return (self.packed, self.headers) if self.headers else (self.packed,)


def outcome_of(command: Command | None, service: str, origin: int, name: str) -> Outcome | commands.Error:
    """What an answer to REQUEST says; None: it is lost. An Error: it was surely not begun with."""
    if command is None:
        return ResponderLost(service, name)
    if type(command.body) is commands.Reply and not command.body.error and len(command.batches) == 1:
        return Answered(origin, command.batches[0])
    match command.body:
        case commands.Reply(error=error, text=text) if error:
            return RemoteError(error, text, name)
        case commands.Error() as refusal:
            return refusal
        case body:
            return RemoteProtocolError(f"{name}: {type(body).__name__.upper()} without one value in answer to REQUEST")


class Host(Protocol):
    """What is needed of the engine."""

    origin: int

    @property
    def peering(self) -> Peers:
        """The other nodes."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop, from any thread."""


class Asking:
    """All requests of ours that are not answered yet."""

    def __init__(
        self, host: Host, loop: asyncio.AbstractEventLoop, responders: Responders, answering: Answering
    ) -> None:
        self.asked = 0
        self._host = host
        self._loop = loop
        self._responders = responders
        self._answering = answering
        self._open: dict[int, dict[Call, None]] = {}
        self._refusal: ZmqbusError | None = None

    def begin(self, call: Call) -> None:
        """Send it to a responder. Where there is none, or none can take it, that ends it at once."""
        responders = self._responders
        origin, call.chosen = call.chosen, None
        while not call.has_ended and self._refusal is None:
            if origin is None:
                origin = responders.choose(call.service, partial(self._may_be_asked, call))
            if origin is None:
                return self._end(call, call.refusal or NoResponders(call.service))
            if responders.load(origin) > OPEN_MAX:
                call.refusal = ResponderBusy(call.service, responders.name(origin))
            elif self._may_be_asked(call, origin) and self._send(call, origin):
                return None
            call.tried.add(origin)
            responders.ended(origin)
            origin = None
        if origin is not None:
            responders.ended(origin)
        return self._end(call, self._refusal or NoResponders(call.service))

    def give_up(self, call: Call) -> None:
        """Nobody waits for it any more."""
        if not call.has_ended:
            call.has_ended = True
            self._release(call)

    async def gather(
        self, service: str, packed: bytes, headers: bytes, timeout: float, n: int | None
    ) -> list[tuple[int, Outcome]]:
        """Ask everybody who responds to a service now; returns what came within `timeout`, or the first `n`.

        Raises:
            NoResponders: there is nobody.
        """
        origins = [origin for origin in self._responders.of(service) if self.is_there(origin)]
        if not origins:
            raise NoResponders(service)
        wanted = len(origins) if n is None else min(n, len(origins))
        outcomes: list[tuple[int, Outcome]] = []
        enough = asyncio.Event()

        def ended(origin: int, outcome: Outcome) -> None:
            outcomes.append((origin, outcome))
            if len(outcomes) >= wanted:
                enough.set()

        calls = [Call(service, packed, headers, timeout, partial(ended, origin), origin) for origin in origins]
        try:
            for call in calls:
                self.begin(call)
            async with asyncio.timeout(timeout):
                await enough.wait()
        except TimeoutError:
            pass
        finally:
            for call in calls:
                self.give_up(call)
        return outcomes[:wanted]

    def lost(self, origin: int) -> None:
        """The connection to a peer broke: whatever it was asked over it may be done, or not."""
        for call in list(self._open.get(origin, ())):
            self._release(call)
            self._end(call, ResponderLost(call.service, self._responders.name(origin)))

    def close(self, refusal: ZmqbusError) -> None:
        """Nothing can be asked any more; what is open ends."""
        self._refusal = refusal
        for origin in list(self._open):
            for call in list(self._open.get(origin, ())):
                self._release(call)
                self._end(call, refusal)

    # --- to one responder, and back --------------------------------------------------------------

    def is_there(self, origin: int) -> bool:
        """Whether a node can be asked. Any thread."""
        return origin == self._host.origin or self._host.peering.joined(origin)

    def _may_be_asked(self, call: Call, origin: int) -> bool:
        return origin not in call.tried and call.only in (None, origin) and self.is_there(origin)

    def _send(self, call: Call, origin: int) -> bool:
        """False: it could not be, or was refused at once. Then it is not counted as open."""
        if origin == self._host.origin:
            return self._hand_over(call)
        link = self._host.peering.links[origin]
        if not link.is_guarded:
            link.guard()
        request = commands.Request(call.service, call.patience_ms)
        number = link.follow(request, partial(self._heard, call), call.parts)
        if number:
            self._took(call, origin, link, number)
        return bool(number)

    def _hand_over(self, call: Call) -> bool:
        """To a responder of this node: the same, without a connection."""
        own = self._host.origin

        def answer(body: commands.Body, parts: tuple[bytes, ...]) -> None:
            self._host.soon(self._heard, call, Command(0, body, list(parts)))

        incoming = Incoming(call.service, call.packed, call.headers, own, call.expires_at, answer)
        self._took(call, own, None, 0)
        error = self._answering.take(incoming)
        if error is not None:
            del self._open[own][call]
            call.refused(error, self._responders.name(own))
        return error is None

    def _took(self, call: Call, origin: int, link: Link | None, number: int) -> None:
        self.asked += 1
        call.tried.add(origin)
        self._open.setdefault(origin, {})[call] = None
        call.at, call.link, call.number = origin, link, number

    def _heard(self, call: Call, command: Command | None) -> None:
        """The answer, or None: the link was closed."""
        if call.has_ended:
            return
        origin = call.at
        self._release(call)
        name = self._responders.name(origin)
        outcome = outcome_of(command, call.service, origin, name)
        if not isinstance(outcome, commands.Error):
            self._end(call, outcome)
        elif outcome.code == "hello" and not call.greeted:
            call.greeted = True  # by a reconnect. HELLO is said now; the request follows it
            call.tried.discard(origin)
            self._loop.call_soon(self.begin, call)
        else:
            call.refused(outcome, name)
            self.begin(call)

    def _release(self, call: Call) -> None:
        """It is no longer to be answered by whom it was sent to."""
        there = self._open.get(call.at)
        if there is None or call not in there:
            return
        del there[call]
        if not there:
            del self._open[call.at]
        self._responders.ended(call.at)
        if call.link is not None:
            call.link.unfollow(call.number)
            call.link = None

    def _end(self, call: Call, outcome: Outcome) -> None:
        if not call.has_ended:
            call.has_ended = True
            call.on_end(outcome)
