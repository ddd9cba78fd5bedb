"""Requests of one node, both ways: what its engine and its peering have to do with them. On the engine's loop."""

from __future__ import annotations

import asyncio
from threading import Lock
from typing import Protocol

from zmqbus.errors import WaitTimeout, ZmqbusError
from zmqbus.net.clock import now
from zmqbus.net.sockets import SocketFactory
from zmqbus.node.peers.links import Link
from zmqbus.node.work.requests import answering, asking
from zmqbus.node.work.requests.answering import Answering
from zmqbus.node.work.requests.asking import Asking
from zmqbus.node.work.requests.lanes import Lanes
from zmqbus.protocol.commands import Command, Hello
from zmqbus.protocol.members.responders import Responders

LEAVE = 1.0  # seconds that threads which have waited need at most to see that they need not
TICK = 0.001


class Host(asking.Host, answering.Host, Protocol):
    """What is needed of the engine."""


class Exchange:
    """What this node asks, and what it answers."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, factory: SocketFactory, name: str) -> None:
        self.responders = Responders(host.origin, Lock())
        self.responders.heard(host.origin, name, ())
        self.answering = Answering(host, loop, self.responders)
        self.asking = Asking(host, loop, self.responders, self.answering)
        self.lanes = Lanes(host, factory, self.responders, self.asking.is_there)
        self._host = host

    # --- peers -----------------------------------------------------------------------------------

    def heard(self, hello: Hello) -> None:
        """Somebody introduced itself."""
        if self.responders.heard(hello.origin, hello.name, hello.services):
            self._host.peering.registry.changed()

    def introduced(self, link: Link) -> None:
        """A peer answered our HELLO."""
        self.answering.introduced(link)

    def forget(self, origin: int) -> None:
        """A peer will not come back, or only anew."""
        self.responders.forget(origin)
        self.lanes.drop(origin)

    def lost(self, origin: int) -> None:
        """The connection to a peer broke."""
        self.asking.lost(origin)
        self.lanes.drop(origin)

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command came in. False: it is not one of ours."""
        return self.answering.serve(identity, origin, command)

    def is_owed(self, origin: int) -> bool:
        """Whether a peer has yet to answer a request of ours."""
        return self.responders.load(origin) > 0

    def owes(self, origin: int) -> bool:
        """Whether it may not have our answer to a request of its own yet."""
        return self.answering.owes(origin)

    # --- questions -------------------------------------------------------------------------------

    def count(self, service: str) -> int:
        """How many nodes respond to a service and can be asked now; this one counts."""
        host = self._host
        return sum(origin == host.origin or host.peering.joined(origin) for origin in self.responders.of(service))

    async def wait_for_responders(self, service: str, n: int, timeout: float | None) -> int:
        """Wait until at least `n` nodes respond to a service."""
        if not await self._host.peering.registry.until(lambda: self.count(service) >= n, timeout):
            raise WaitTimeout(f"responder(s) to {service}", self.count(service), n, timeout or 0.0)
        return self.count(service)

    def counters(self) -> dict[str, int | float]:
        """Since the start."""
        return {
            "requests_sent": self.asking.asked + self.lanes.asked,
            "requests_answered": self.answering.answered,
            "requests_dropped": self.answering.dropped,
        }

    # --- the end ---------------------------------------------------------------------------------

    def close(self, refusal: ZmqbusError) -> None:
        """Nothing can be asked any more; whoever waits for an answer ends."""
        self.asking.close(refusal)
        self.lanes.close(refusal)

    async def leave(self, timeout: float) -> None:
        """After that: answer what has been begun with, and let those who waited go."""
        await self.answering.leave(timeout)
        until = now() + LEAVE
        while self.lanes.in_use and now() < until:
            await asyncio.sleep(TICK)
        self.lanes.let_go()
