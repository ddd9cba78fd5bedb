"""What a node says of itself while not all of its connections stand: who counts as a subscriber, and who hears BYE."""

from __future__ import annotations

import pytest

import zmqbus
from tests.node.test_aio import run, two
from zmqbus.node.peers.links import Link
from zmqbus.node.peers.peering import Peering
from zmqbus.node.receiving.feed import Feed
from zmqbus.protocol.commands import Command


def test_a_subscriber_counts_when_its_sub_is_connected(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Feed.connect
    held: list[tuple[Feed, str]] = []

    async def main() -> None:
        async with two(bus) as (a, b):
            pub = a.endpoints["pub"]

            def late(feed: Feed, endpoint: str) -> None:
                if endpoint == pub:
                    held.append((feed, endpoint))
                else:
                    connect(feed, endpoint)

            monkeypatch.setattr(Feed, "connect", late)
            monkeypatch.setattr("zmqbus.node.engine.REGISTER_TIMEOUT", 0.2)
            async with b.subscribe("t") as subscription:
                with pytest.raises(zmqbus.WaitTimeout):
                    await a.wait_for_subscribers("t", timeout=0.3)
                for feed, endpoint in held:
                    connect(feed, endpoint)
                await a.wait_for_subscribers("t", timeout=10)
                await a.publish("t", 1)
                message = await subscription.get(10)
                assert message is not None
                assert message.value == 1
                assert subscription.repaired == 0

    run(main())


def test_whose_welcome_is_under_way_hears_bye(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    welcomed = Peering._welcomed

    def later(peering: Peering, link: Link, command: Command | None) -> None:
        if peering._membership.name == "hasty" and command is not None:
            link.awaits_welcome = True
            peering._loop.call_later(0.1, welcomed, peering, link, command)
        else:
            welcomed(peering, link, command)

    monkeypatch.setattr(Peering, "_welcomed", later)

    async def main() -> None:
        async with zmqbus.AsyncNode("hasty", bus=bus, discovery="static") as hasty:
            seed = hasty.endpoints["inbox"]
            async with zmqbus.AsyncNode("patient", bus=bus, discovery="static", peers=[seed]) as patient:
                events = patient.events()
                await patient.wait_for_peers(1, timeout=10)
                await hasty.close()
                left = None
                while not isinstance(left, zmqbus.PeerLeft):
                    left = await events.get(10)
                assert left.reason == "bye"

    run(main())
