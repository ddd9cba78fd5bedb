"""What this node is asked for: services, who takes the requests for them, and telling the peers. On the engine's loop.

A request that was taken ends once: it is answered, or dropped because nobody waits for the answer any more. What was
taken and has not ended is bounded, by number for each responder and by bytes for the node; beyond, the answer is ERROR
`busy`, and the requester tries another node.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Protocol

from zmqbus.errors import SetupError
from zmqbus.net.clock import now
from zmqbus.node.peers.links import Link
from zmqbus.node.peers.registry import Registry
from zmqbus.protocol import commands
from zmqbus.protocol.commands import SERVICES_MAX, Body, Command, Error
from zmqbus.protocol.members.responders import Responders
from zmqbus.protocol.topics import encode_topic

WAITING_MAX = 1000  # requests that one responder has taken and not answered
WAITING_BYTES_MAX = 64 * 1024 * 1024  # of all that were taken and not answered
ANSWERED_MAX = 1024  # nodes of which is known when they were answered last
ARRIVES = 5.0  # seconds after which an answer is thought to have arrived
TELL_AGAIN = 1.0  # seconds after which an unanswered SERVE is repeated
TELL_PATIENCE = 2.0  # seconds for which a new responder waits until all peers know of it
STOPPED = commands.Reply("ResponderClosed", "the responder stopped before it had answered")


class Incoming:
    """A request that somebody waits for. Any thread may end it; the first does."""

    __slots__ = ("_token", "answer", "expires_at", "headers", "origin", "packed", "responder", "service")

    def __init__(
        self,
        service: str,
        packed: bytes,
        headers: bytes,
        origin: int,
        expires_at: float | None,
        answer: Callable[[Body, tuple[bytes, ...]], None],
    ) -> None:
        """`answer`: sends the answer, from any thread. To be called by who has claimed this."""
        self.service = service
        self.packed = packed
        self.headers = headers
        self.origin = origin
        self.expires_at = expires_at
        self.responder: Responder | None = None
        self.answer = answer
        self._token = [None]

    @property
    def is_late(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.expires_at is not None and now() >= self.expires_at

    def claim(self) -> bool:
        """Before it is ended. False: it has been."""
        try:
            self._token.pop()
        except IndexError:
            return False
        return True


class Responder(ABC):
    """Takes the requests for one service, until it is stopped."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.unanswered = 0  # what it has taken

    @abstractmethod
    def take(self, incoming: Incoming) -> None:
        """See to it that this is answered. On the loop."""

    @abstractmethod
    def stop(self) -> list[Incoming]:
        """No more will come. Returns what has not been begun with. On the loop."""

    def abandon(self) -> None:  # noqa: B027 (few have anything to do)
        """What has been begun with is not waited for any longer. On the loop."""


class Peers(Protocol):
    """What is needed of peering."""

    links: dict[int, Link]
    registry: Registry
    who: dict[str, Any]

    def joined(self, origin: int) -> bool:
        """Whether a peer is there and can be asked."""


class Host(Protocol):
    """What is needed of the engine."""

    origin: int

    @property
    def peering(self) -> Peers:
        """The other nodes."""

    def answer(self, identity: bytes, body: Body, request: int, parts: tuple[bytes, ...]) -> bool:
        """Send to whoever asked. Any thread. False: it cannot be reached."""


class Answering:
    """The services of this node."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, responders: Responders) -> None:
        self.answered = self.dropped = 0
        self._host = host
        self._loop = loop
        self._known = responders
        self._responders: dict[str, list[Responder]] = {}
        self._open: dict[Incoming, None] = {}
        self._bytes = 0
        self._answered_at: dict[int, float] = {}  # by who asked, the last at the end
        self._services: list[str] = []  # as peers are told; a new list with each change
        self._untold: set[int] = set()

    # --- services --------------------------------------------------------------------------------

    async def attach(self, responder: Responder) -> None:
        """The same as `add`; done when every peer knows, or after TELL_PATIENCE."""
        self.add(responder)
        peering = self._host.peering
        everybody_knows = lambda: not any(map(peering.joined, self._untold))  # noqa: E731
        try:
            await peering.registry.until(everybody_knows, TELL_PATIENCE)
        except BaseException:
            self.detach(responder)
            raise

    def add(self, responder: Responder) -> None:
        """From now on it takes requests.

        Raises:
            TopicError: the service breaks the grammar of topics.
            SetupError: this node has too many services.
        """
        service = responder.service
        encode_topic(service)
        if service not in self._responders and len(self._responders) >= SERVICES_MAX:
            raise SetupError(f"a node responds to at most {SERVICES_MAX} services: put what varies into the value")
        self._responders.setdefault(service, []).append(responder)
        self._changed()

    def detach(self, responder: Responder) -> None:
        """It takes no more. What it has not begun with goes to others, the rest fails."""
        there = self._responders.get(responder.service, [])
        if responder in there:
            there.remove(responder)
            if not there:
                del self._responders[responder.service]
            self._changed()
            self._stop(responder)
            for incoming in [incoming for incoming in self._open if incoming.responder is responder]:
                self.end(incoming, STOPPED)

    def _stop(self, responder: Responder) -> None:
        for incoming in responder.stop():
            self._let_go(incoming)
            error = self.take(incoming)  # by another responder of this node
            if error is not None and incoming.claim():
                incoming.answer(error, ())

    async def leave(self, timeout: float) -> None:
        """Take no more, and wait for what has been begun with. What is not done then fails."""
        everybody = [responder for there in self._responders.values() for responder in there]
        self._responders.clear()
        if everybody:
            self._changed()
        for responder in everybody:
            self._stop(responder)
        await self._host.peering.registry.until(lambda: not self._open, timeout)
        for incoming in list(self._open):
            self.end(incoming, STOPPED)
        for responder in everybody:
            responder.abandon()

    # --- telling the peers -----------------------------------------------------------------------

    def _changed(self) -> None:
        services = sorted(self._responders)
        if services != self._services:
            peering = self._host.peering
            self._services = peering.who["services"] = services
            self._known.serves(self._host.origin, services)
            for link in list(peering.links.values()):
                self._tell(link)
            peering.registry.changed()

    def introduced(self, link: Link) -> None:
        """A peer answered our HELLO. Meanwhile the services may have changed."""
        if link.services != self._services:
            self._tell(link)

    def _tell(self, link: Link) -> None:
        assert link.origin is not None
        if self._host.peering.links.get(link.origin) is not link:
            self._untold.discard(link.origin)  # whoever has its place has said it in HELLO
            self._host.peering.registry.changed()
            return
        services = link.services = self._services
        self._untold.add(link.origin)
        if not link.ask(commands.Serve(services), partial(self._told, link, services), TELL_AGAIN):
            self._loop.call_later(TELL_AGAIN, self._told, link, services, None)

    def _told(self, link: Link, services: list[str], answer: Command | None) -> None:
        if services is not self._services:
            return  # it is being told of others
        if answer is None:
            self._tell(link)
        else:  # or it wants to hear HELLO first, which names the services as well
            assert link.origin is not None
            self._untold.discard(link.origin)
            self._host.peering.registry.changed()

    # --- requests --------------------------------------------------------------------------------

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command came in. False: it is not one of ours."""
        if not isinstance(command.body, commands.Serve):
            return False
        if self._known.serves(origin, command.body.services):
            self._host.peering.registry.changed()
        self._host.answer(identity, command.body, command.request, ())
        return True

    def requested(self, identity: bytes, origin: int, command: Command) -> None:
        """A REQUEST came in."""
        body: commands.Request = command.body  # type: ignore[assignment]
        say, number, parts = self._host.answer, command.request, command.batches
        if not 1 <= len(parts) <= 2:
            say(identity, Error("protocol", "REQUEST: neither a value, nor value and headers"), number, ())
            return
        expires_at = now() + body.timeout_ms / 1000 if body.timeout_ms else None

        def answer(body: Body, parts: tuple[bytes, ...]) -> None:
            say(identity, body, number, parts)

        headers = parts[1] if len(parts) == 2 else b""
        error = self.take(Incoming(body.service, parts[0], headers, origin, expires_at, answer))
        if error is not None:
            say(identity, error, number, ())

    def take(self, incoming: Incoming) -> Error | None:
        """Hand it to a responder. Otherwise, why not."""
        there = self._responders.get(incoming.service)
        if there is None:
            return Error("service", f"this node does not respond to {incoming.service!r}")
        responder = there[0] if len(there) == 1 else min(there, key=lambda responder: responder.unanswered)
        size = len(incoming.packed) + len(incoming.headers)
        if responder.unanswered >= WAITING_MAX or self._bytes + size > WAITING_BYTES_MAX:
            return Error("busy", f"{responder.unanswered:,} requests wait here already")
        self._open[incoming] = None
        self._bytes += size
        incoming.responder = responder
        responder.unanswered += 1
        responder.take(incoming)
        return None

    def end(self, incoming: Incoming, body: Body | None, parts: tuple[bytes, ...] = ()) -> bool:
        """Answer it; None: drop it. False: it was ended before. On the loop."""
        if not incoming.claim():
            return False
        if body is not None:
            incoming.answer(body, parts)
        self.ended(incoming, body is not None)
        return True

    def ended(self, incoming: Incoming, is_answered: bool) -> None:
        """It was, by who had claimed it."""
        self._let_go(incoming)
        if is_answered:
            self.answered += 1
            self._answered_at.pop(incoming.origin, None)
            self._answered_at[incoming.origin] = now()
            if len(self._answered_at) > ANSWERED_MAX:
                del self._answered_at[next(iter(self._answered_at))]
        else:
            self.dropped += 1

    def owes(self, origin: int) -> bool:
        """Whether our last answer to a node may still be on its way."""
        return now() - self._answered_at.get(origin, -inf) < ARRIVES

    def _let_go(self, incoming: Incoming) -> None:
        del self._open[incoming]
        self._bytes -= len(incoming.packed) + len(incoming.headers)
        if incoming.responder is not None:
            incoming.responder.unanswered -= 1
            incoming.responder = None
        if not self._open:
            self._host.peering.registry.changed()
