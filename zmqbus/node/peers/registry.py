"""Who wants what: our subscriptions as registered at peers, theirs as registered here, and leaving in good order.

A subscription is registered when a publisher has answered SUBSCRIBE (or the HELLO that named it) with HEADS: from
then on it is owed every message that fits. Runs on the engine's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from zmqbus.errors import NodeClosed, WaitTimeout
from zmqbus.net.clock import now
from zmqbus.net.sockets import Source
from zmqbus.node.peers.links import Inbox, Link
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.receiving.intake import Intake
from zmqbus.protocol import commands
from zmqbus.protocol.commands import HEADS_PER_COMMAND, SUBSCRIPTIONS_MAX, Command, Error, Subscribed
from zmqbus.protocol.topics import Matcher

ASK_AGAIN = 1.0  # seconds after which an unanswered SUBSCRIBE is repeated
UNCONFIRMED = 30.0  # for so long a repeated SUBSCRIBE is owed from the first: its answer may not have arrived
REMINDED_MAX = 64  # HEADs on the PUB for one repeated SUBSCRIBE; further streams' come when they fall idle
OBSERVERS_GRACE = 0.2  # for a program that publishes and ends: those who look on need a moment to see it
ANSWERS = 0  # in place of the number of a subscription: answers that a leaving peer owes us
LOOK = 0.01  # seconds between looks whether they have come
LEAVE_PATIENCE = 5.0  # a leaving peer is not kept in mind longer than this; it waits less itself


class Requests(Protocol):
    """Requests, ours and theirs."""

    def is_owed(self, origin: int) -> bool:
        """Whether a peer has yet to answer one of ours."""

    def owes(self, origin: int) -> bool:
        """Whether it may not have our answer to one of its own yet."""


class Streams(Protocol):
    """Our own streams, and requests."""

    outlet: Outlet

    @property
    def requests(self) -> Requests:
        """What is asked and answered."""

    def heads(self, patterns: list[str]) -> list[tuple[bytes, int]]:
        """Topic and next seq of those that fit."""


@dataclass(slots=True, eq=False)
class Registration:
    """One subscription of a node, as registered here."""

    patterns: list[str]
    matches: Callable[[str], bool]
    source: Source
    """What it hears of our PUBs."""
    connected: bool
    """Its SUB stands, so that what is published now comes to it without repair; only then it is counted."""
    heads: dict[bytes, int] | None
    """What it was owed from: our streams then. Kept for UNCONFIRMED, because the answer may have been lost."""

    @property
    def observes(self) -> bool:
        """It only looks on: it is neither counted nor waited for."""
        return self.source == "tap"


class Interest:
    """What one node subscribed to."""

    def __init__(self) -> None:
        self.subscriptions: dict[int, Registration] = {}

    def count(self, topic: str, observers: bool) -> int:
        """How many subscriptions a topic fits, of those that do not only observe, or of all."""
        counted = (own for own in self.subscriptions.values() if own.connected and (observers or not own.observes))
        return sum(own.matches(topic) for own in counted)


class Registry:
    """Both directions of SUBSCRIBE, HEADS, UNSUBSCRIBE and BYE.

    Args:
        links: the ways to peers, by origin.
        intakes: our subscriptions, by number. Both are their owners' and only read here.
        members: the joined peers.
        joined: whether a peer is one of them, and can be asked now.
        gone: told when a leaving peer has taken its leave.
    """

    def __init__(
        self,
        origin: int,
        loop: asyncio.AbstractEventLoop,
        streams: Streams,
        links: dict[int, Link],
        intakes: dict[int, Intake],
        members: Callable[[], list[int]],
        joined: Callable[[int], bool],
        gone: Callable[[int], None],
    ) -> None:
        self.inbox: Inbox  # set when the node opens
        self._origin = origin
        self._loop = loop
        self._streams = streams
        self._links = links
        self._intakes = intakes
        self._members = members
        self._joined = joined
        self._gone = gone
        self._interests: dict[int, Interest] = {origin: Interest()}
        self._asked_at: dict[tuple[int, int], float] = {}  # (origin, number): asked, and HEADS not complete
        self._attached: dict[int, set[str]] = {}  # by number: the PUBs that were connected at the last look
        self._leaving: dict[int, tuple[bytes, int, set[int]]] = {}  # BYE: identity, request, intakes to wait for
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    # --- waiting ---------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until a condition on peers, subscribers or registrations holds. False: it did not in time."""
        if condition():
            return True
        future: asyncio.Future[None] = self._loop.create_future()
        entry = (condition, future)
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            return condition()
        finally:
            self._waiters.remove(entry)
        return True

    def changed(self) -> None:
        """Something that `until` may wait for has changed."""
        for condition, future in self._waiters:
            if not future.done() and condition():
                future.set_result(None)

    def close(self) -> None:
        """Nothing will change any more."""
        for _, future in self._waiters:
            if not future.done():
                future.set_exception(NodeClosed("the node was closed while waiting"))

    # --- ours, there -----------------------------------------------------------------------------

    def declare(self, intake: Intake) -> None:
        """Have a new subscription registered everywhere."""
        registration = Registration(intake.patterns, Matcher(intake.patterns).matches, intake.source, True, None)
        self._interests[self._origin].subscriptions[intake.number] = registration
        self._look_for_uses()
        for link in self._links.values():
            self.subscribe(link, intake)
        self.changed()

    def unregistered(self, intake: Intake) -> list[int]:
        """The joined peers that have not answered with all their HEADS, or whose PUB is not connected."""
        return [
            origin
            for origin in self._members()
            if (link := self._links.get(origin)) is None
            or not intake.tracker.knows(origin)
            or not _connected(link, intake)
        ]

    def attached(self, number: int) -> None:
        """A subscription's SUB is connected to one more PUB: ask what it missed while it was not.

        Otherwise only the HEAD of an idle stream would tell, 100 to 200 ms later, and that is what a newcomer would
        wait for its first message.
        """
        intake = self._intakes.get(number)
        if intake is not None:
            present = set(intake.feed.attached)
            fresh = present - self._attached.get(number, set())
            self._attached[number] = present
            for link in self._links.values():
                if (link.pubs or {}).get(intake.source) in fresh:
                    self.subscribe(link, intake)
        self.changed()

    def withdraw(self, number: int) -> None:
        """A subscription is closed."""
        self._attached.pop(number, None)
        self._interests[self._origin].subscriptions.pop(number, None)
        self._look_for_uses()
        for origin, link in self._links.items():
            self._asked_at.pop((origin, number), None)
            link.declared.discard(number)
            link.send(commands.Unsubscribe(number))
        for origin in list(self._leaving):
            self.settled(number, origin)

    def introduced(self, link: Link) -> None:
        """A peer answered our HELLO: HEADS of what that named are on their way; ask for the rest."""
        assert link.origin is not None
        for intake in self._intakes.values():
            if intake.number in link.declared:
                self._asked_at.setdefault((link.origin, intake.number), now())
            else:
                self.subscribe(link, intake)

    def subscribe(self, link: Link, intake: Intake) -> None:
        """Ask one peer; also to hear from it what was missed."""
        assert link.origin is not None
        self._asked_at[link.origin, intake.number] = now()
        if link.send(commands.Subscribe(*_subscription(link, intake))):
            link.declared.add(intake.number)

    def wanted(self, link: Link) -> list[Subscribed]:
        """All our subscriptions, as a HELLO to that peer names them."""
        return [Subscribed(*_subscription(link, intake)) for intake in self._intakes.values()]

    def ask_again(self) -> None:
        """Called every ASK_AGAIN: repeat what a broken connection may have swallowed."""
        due = now() - ASK_AGAIN
        for (origin, number), at in list(self._asked_at.items()):
            link, intake = self._links.get(origin), self._intakes.get(number)
            if intake is None or (link is None and not self._joined(origin)):
                del self._asked_at[origin, number]
            elif link is not None and at <= due and self._joined(origin):
                self.subscribe(link, intake)

    def on_heads(self, origin: int, body: commands.Heads) -> None:
        """HEADS came, asked for or not."""
        intake = self._intakes.get(body.id)
        if intake is not None:
            intake.heads(origin, body.heads, body.more)
            if not body.more:
                self._asked_at.pop((origin, body.id), None)
                self.changed()

    # --- theirs, here ----------------------------------------------------------------------------

    def subscribers(self, topic: str, observers: bool) -> int:
        """Subscriptions here and at the joined peers that a topic fits, not counting or counting `observers`."""
        return sum(
            interest.count(topic, observers)
            for origin, interest in self._interests.items()
            if origin == self._origin or self._joined(origin)
        )

    async def wait_for_subscribers(self, topic: str, n: int, timeout: float | None, observers: bool) -> int:
        """Wait until a topic has at least `n` subscriptions."""
        if not await self.until(lambda: self.subscribers(topic, observers) >= n, timeout):
            raise WaitTimeout(f"subscriber(s) of {topic}", self.subscribers(topic, observers), n, timeout or 0.0)
        return self.subscribers(topic, observers)

    def on_hello(self, identity: bytes, origin: int, request: int, subscriptions: list[Subscribed]) -> None:
        """A HELLO names all that its sender wants."""
        if origin == self._origin:
            return
        before = self._interests.get(origin, Interest())
        self._interests[origin] = Interest()
        for subscribed in subscriptions:
            earlier = before.subscriptions.get(subscribed.id)
            self._register(identity, origin, request, subscribed, earlier)
        self._look_for_uses()

    def on_command(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command came in. False: it is not one of ours."""
        match command.body:
            case commands.Subscribe(id=number) as subscribed:
                interest = self._interests.setdefault(origin, Interest())
                if len(interest.subscriptions) >= SUBSCRIPTIONS_MAX and number not in interest.subscriptions:
                    error = Error("limit", f"at most {SUBSCRIPTIONS_MAX} subscriptions to a node")
                    self.inbox.answer(identity, error, command.request)
                else:
                    earlier = interest.subscriptions.get(number)
                    self._register(identity, origin, command.request, subscribed, earlier)
                    self.changed()
            case commands.Unsubscribe(id=number):
                if origin in self._interests:
                    self._interests[origin].subscriptions.pop(number, None)
                    self._look_for_uses()
            case commands.Heads() as body:
                self.on_heads(origin, body)
            case commands.Bye():
                self._on_bye(identity, origin, command.request)
            case _:
                return False
        return True

    def forget(self, origin: int) -> None:
        """A peer will not come back, or only anew."""
        self._interests.pop(origin, None)
        self._leaving.pop(origin, None)
        self._look_for_uses()

    def _register(
        self,
        identity: bytes,
        origin: int,
        request: int,
        subscribed: Subscribed | commands.Subscribe,
        earlier: Registration | None,
    ) -> None:
        """From here on the subscription is owed all that fits, or from where an earlier request put it."""
        number, patterns = subscribed.id, subscribed.patterns
        source: Source = "tap" if subscribed.observe else "trail" if subscribed.trail else "pub"
        broadcast = self._streams.outlet.broadcast
        broadcast.observed |= source == "tap"
        broadcast.trailed |= source == "trail"
        heads = self._streams.heads(patterns)
        if earlier is not None and earlier.heads is not None and earlier.patterns == patterns:
            earlier.connected = subscribed.connected
            self._interests[origin].subscriptions[number] = earlier
            since = [(topic, earlier.heads.get(topic, 1)) for topic, _ in heads]
            self._remind([now[0] for now, then in zip(heads, since, strict=True) if now != then][:REMINDED_MAX])
            for body in _heads(number, since, more=True):
                if not self.inbox.answer(identity, body, request):
                    return
        else:
            matches = Matcher(patterns).matches
            registration = Registration(patterns, matches, source, subscribed.connected, dict(heads))
            self._interests[origin].subscriptions[number] = registration
            self._remind([])  # its SUB may just have been connected
            self._loop.call_later(UNCONFIRMED, setattr, registration, "heads", None)
        for body in _heads(number, heads):
            if not self.inbox.answer(identity, body, request):
                return  # all or nothing: what lacks a piece would pass for complete. It is asked again

    def _look_for_uses(self) -> None:
        """Which of our PUBs are to be used, beside the first."""
        used = {own.source for interest in self._interests.values() for own in interest.subscriptions.values()}
        broadcast = self._streams.outlet.broadcast
        broadcast.observed, broadcast.trailed = "tap" in used, "trail" in used

    def _remind(self, topics: list[bytes]) -> None:
        """Send the HEADs of these streams of ours, for a subscriber whose SUB may just have been connected."""
        outlet = self._streams.outlet
        with outlet.lock:
            outlet.broadcast.admit()
            for topic in topics:
                if (publisher := outlet.publishers.get(topic.decode())) is not None:
                    publisher.send_head()

    # --- leaving ---------------------------------------------------------------------------------

    def _on_bye(self, identity: bytes, origin: int, request: int) -> None:
        """A peer leaves, and will wait a little for us to have all that it sent."""
        waiting = {number for number, intake in self._intakes.items() if not intake.origin_leaving(origin)}
        if self._streams.requests.is_owed(origin):
            waiting.add(ANSWERS)
            self._loop.call_later(LOOK, self._look_for_answers, origin)
        self._leaving[origin] = (identity, request, waiting)
        if waiting:
            self._loop.call_later(LEAVE_PATIENCE, self._leave, origin, identity, False)
        else:
            self._leave(origin, identity)

    def _look_for_answers(self, origin: int) -> None:
        """It said BYE, and had yet to answer something."""
        if origin in self._leaving:
            if self._streams.requests.is_owed(origin):
                self._loop.call_later(LOOK, self._look_for_answers, origin)
            else:
                self.settled(ANSWERS, origin)

    def settled(self, number: int, origin: int) -> None:
        """One of our subscriptions has all that a leaving peer owed it."""
        if origin in self._leaving:
            identity, _, waiting = self._leaving[origin]
            waiting.discard(number)
            if not waiting:
                self._leave(origin, identity)

    def _leave(self, origin: int, identity: bytes, settled: bool = True) -> None:
        leaving = self._leaving.get(origin)
        if leaving is not None and leaving[0] == identity:
            del self._leaving[origin]
            if settled:
                self.inbox.answer(identity, commands.Bye(), leaving[1])
            self._gone(origin)

    async def leave(self, timeout: float) -> list[int]:
        """Say BYE to every peer; returns those whose subscriptions had not confirmed all within `timeout`."""
        waiting: dict[int, asyncio.Future[bool]] = {}
        looking: list[asyncio.Future[bool]] = []
        for origin, link in self._links.items():
            subscriptions = self._interests.get(origin, Interest()).subscriptions
            for number, registration in subscriptions.items():
                for body in _heads(number, self._streams.heads(registration.patterns)):
                    link.send(body)
            done: asyncio.Future[bool] = self._loop.create_future()
            if link.ask(commands.Bye(), partial(_answered, done), timeout + 1) and self._joined(origin):
                subscribed = not all(registration.observes for registration in subscriptions.values())
                if subscribed or self._streams.requests.owes(origin):
                    waiting[origin] = done
                elif subscriptions:
                    looking.append(done)
        if looking:
            await asyncio.wait(looking, timeout=min(timeout, OBSERVERS_GRACE))
        if waiting:
            await asyncio.wait(waiting.values(), timeout=timeout)
        return [origin for origin, done in waiting.items() if not done.done() or not done.result()]


def _subscription(link: Link, intake: Intake) -> tuple[int, list[str], bool, bool, bool]:
    """As a HELLO or SUBSCRIBE to that peer names it."""
    source = intake.source
    return intake.number, intake.patterns, source == "tap", _connected(link, intake), source == "trail"


def _connected(link: Link, intake: Intake) -> bool:
    """Whether a subscription's SUB is connected to that peer."""
    return (link.pubs or {}).get(intake.source) in intake.feed.attached


def _answered(done: asyncio.Future[bool], command: Command | None) -> None:
    if not done.done():
        done.set_result(command is not None)  # None: it left, or cannot be reached, so that no answer will come


def _heads(number: int, heads: list[tuple[bytes, int]], more: bool = False) -> list[commands.Heads]:
    """As commands of bounded size, of which the last says that it is."""
    return [
        commands.Heads(number, heads[at : at + HEADS_PER_COMMAND], more or at + HEADS_PER_COMMAND < len(heads))
        for at in range(0, max(1, len(heads)), HEADS_PER_COMMAND)
    ]
