"""Requests of one node, both ways: what its engine and its peering have to do with them. On the engine's loop."""

from __future__ import annotations

import asyncio
from typing import Protocol

from zmqbus.errors import WaitTimeout
from zmqbus.node.peers.links import Link
from zmqbus.node.work.requests import answering, asking
from zmqbus.node.work.requests.answering import Answering
from zmqbus.node.work.requests.asking import Asking
from zmqbus.protocol.commands import Command, Hello
from zmqbus.protocol.members.responders import Responders


class Host(asking.Host, answering.Host, Protocol):
    """What is needed of the engine."""


class Exchange:
    """What this node asks, and what it answers."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self.responders = Responders(host.origin)
        self.responders.heard(host.origin, name, ())
        self.answering = Answering(host, loop, self.responders)
        self.asking = Asking(host, loop, self.responders, self.answering)
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

    def serve(self, identity: bytes, origin: int, command: Command) -> bool:
        """A command came in. False: it is not one of ours."""
        return self.answering.serve(identity, origin, command)

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
            "requests_sent": self.asking.asked,
            "requests_answered": self.answering.answered,
            "requests_dropped": self.answering.dropped,
        }
