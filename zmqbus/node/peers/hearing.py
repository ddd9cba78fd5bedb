"""Whom we hear: our SUBs' connections to the PUBs of peers, and their heartbeats. On the engine's loop.

A peer has three: its PUB, its tap for those who only look on, and its trail for those in no hurry. Heartbeats come by
the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from zmqbus.errors import RemoteProtocolError
from zmqbus.net.adapter import FdWatch
from zmqbus.net.sockets import NOBLOCK, Again, Pubs, SocketFactory
from zmqbus.node.peers.links import Link
from zmqbus.node.receiving.feed import Feed, Gate
from zmqbus.node.receiving.intake import Intake
from zmqbus.protocol.frames import HEARTBEAT, HEARTBEAT_PREFIX, parse_header

HEARTBEATS_MAX = 100_000  # unread frames on the control SUB: 4096 peers for 24 s
DRAIN_MAX = 256  # heartbeats taken in a row before other work has its turn


class Hearing:
    """The PUBs of the peers of one node."""

    def __init__(
        self,
        factory: SocketFactory,
        loop: asyncio.AbstractEventLoop,
        intakes: dict[int, Intake],
        on_heartbeat: Callable[[int], None],
        on_garbage: Callable[[RemoteProtocolError], None],
    ) -> None:
        self._intakes = intakes
        self._on_heartbeat = on_heartbeat
        self._on_garbage = on_garbage
        self._pubs: dict[int, Pubs] = {}  # by origin: what our SUBs are connected to
        self._control = factory.sub(HEARTBEATS_MAX)
        self._control.subscribe(HEARTBEAT_PREFIX)
        self._watch = FdWatch(loop, self._control, self._drain)
        self._heartbeats = Feed(factory, loop, self._control, Gate(self._watch.check), lambda: None)

    def lead(self, intake: Intake) -> None:
        """Connect a new subscription to every publisher."""
        for pubs in self._pubs.values():
            intake.feed.connect(pubs[intake.source])

    def attach(self, origin: int, link: Link) -> None:
        """Hear a peer."""
        pubs = link.pubs
        assert pubs is not None
        if self._pubs.get(origin) != pubs:
            self.detach(origin)
            self._pubs[origin] = pubs
            self._heartbeats.connect(pubs["pub"])
            for intake in self._intakes.values():
                intake.feed.connect(pubs[intake.source])

    def detach(self, origin: int) -> None:
        """Hear a peer no longer."""
        pubs = self._pubs.pop(origin, None)
        if pubs is None or pubs in self._pubs.values():
            return
        self._heartbeats.disconnect(pubs["pub"])
        for intake in self._intakes.values():  # to disconnect is to drop what is received and not read
            intake.when_drained(partial(self._disconnect, intake, pubs))

    def reattach(self, only: int | None = None) -> None:
        """A connection may be dead without a word: a SUB never sends, so that TCP has no cause to find it out."""
        for origin, pubs in self._pubs.items():
            if only in (None, origin):
                self._heartbeats.disconnect(pubs["pub"])
                self._heartbeats.connect(pubs["pub"])
                for intake in self._intakes.values():
                    intake.when_drained(partial(self._reconnect, intake, origin, pubs))

    def close(self) -> None:
        """Let go of the heartbeats; subscriptions are their owners' to close."""
        self._watch.close()
        self._heartbeats.close()

    def _disconnect(self, intake: Intake, pubs: Pubs) -> None:
        if pubs not in self._pubs.values():
            intake.feed.disconnect(pubs[intake.source])

    def _reconnect(self, intake: Intake, origin: int, pubs: Pubs) -> None:
        if self._pubs.get(origin) == pubs:
            intake.feed.disconnect(pubs[intake.source])
            intake.feed.connect(pubs[intake.source])

    def _drain(self) -> bool:
        for _ in range(DRAIN_MAX):
            try:
                frame = self._control.recv(NOBLOCK)
            except Again:
                return False
            try:
                _, kind, _, _, origin, _, _ = parse_header(frame)
            except RemoteProtocolError as error:
                self._on_garbage(error)
                continue
            if kind == HEARTBEAT:
                self._on_heartbeat(origin)
        return True
