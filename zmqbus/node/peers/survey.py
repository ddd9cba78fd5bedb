"""A question to all peers at once: which streams there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from zmqbus.node.events import TopicInfo
from zmqbus.node.peers.peering import Peering
from zmqbus.node.publishing.outlet import STREAMS_MAX
from zmqbus.protocol import commands
from zmqbus.protocol.members.peers import Peer
from zmqbus.protocol.topics import Matcher

Streams = list[tuple[bytes, int, int]]
"""Topic, last seq and bytes of each."""


async def survey(
    peering: Peering,
    own: list[tuple[str, int, Streams]],
    patterns: Sequence[str],
    timeout: float,
    warn: Callable[[str], None],
) -> list[TopicInfo]:
    """The streams that fit, of every peer, and `own`: name, origin, and streams."""
    matches = Matcher(patterns or (">",)).matches
    peers = peering.peers()
    answers = await asyncio.gather(*(_streams_of(peering, peer, timeout, warn) for peer in peers))
    found = []
    for name, origin, streams in own + [(p.name, p.origin, a) for p, a in zip(peers, answers, strict=True)]:
        for encoded, seq, size in streams:
            if matches(topic := encoded.decode(errors="replace")):
                found.append(TopicInfo(topic, origin, name, seq, size))
    return sorted(found, key=lambda info: (info.topic, info.node, info.origin))


async def _streams_of(peering: Peering, peer: Peer, timeout: float, warn: Callable[[str], None]) -> Streams:
    streams: Streams = []
    while len(streams) <= STREAMS_MAX:
        link = peering.links.get(peer.origin)
        answer = await link.question(commands.Stats(True, len(streams)), timeout) if link else None
        if answer is None or not isinstance(answer.body, commands.Statistics):
            warn(f"{peer.name} did not say within {timeout:g} s what it publishes")
            break
        streams += answer.body.topics
        if not answer.body.more or not answer.body.topics:
            break
    return streams
