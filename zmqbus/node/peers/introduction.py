"""What a node says about itself in HELLO and WELCOME, as the peer that it is to us."""

from __future__ import annotations

from zmqbus.protocol.commands import Hello
from zmqbus.protocol.members.peers import Peer


def introduced(body: Hello, endpoints: list[str], pub: str) -> Peer:
    """`endpoints`: of its inboxes those to dial, the best first, of which there is one at least."""
    return Peer(
        origin=body.origin,
        name=body.name,
        inbox=endpoints[0],
        also=tuple(endpoints[1:]),
        pub=pub,
        epoch=body.epoch,
        role=body.role,
        claims=tuple(body.claims),
        journal=body.journal,
        host=body.host,
        pid=body.pid,
        version=body.release,
    )
