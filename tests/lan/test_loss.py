"""A LAN that loses packets, and connections that break in mid-stream: all arrives, in order, or is accounted for."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.lan.agents import Agents, needs_nft, ranges, wait_exact, wait_until
from tests.netns import Host, Lan

pytestmark = [pytest.mark.netns, needs_nft]

LOSS = """
table inet loss {
    chain in {
        type filter hook input priority 0
        iifname "eth0" meta l4proto tcp numgen random mod 100 < 5 counter drop
    }
}
"""
RESET = """
table inet reset {
    chain in {
        type filter hook input priority 0
        iifname "eth0" meta l4proto tcp reject with tcp reset
    }
}
"""
KILLS = 6


def break_connections(host: Host) -> None:
    """End every established TCP connection of a host, both ends of it, without closing."""
    killed = subprocess.run(
        ["ip", "netns", "exec", host.namespace, "ss", "--kill", "--tcp", "--no-header", "state", "established"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    if not killed.stdout.strip():  # a kernel without SOCK_DESTROY: answer whatever comes in by RST
        host.run(["nft", RESET])
        time.sleep(0.3)
        host.run(["nft", "delete table inet reset"])


@pytest.mark.parametrize("size", [0, 2000])
def test_five_percent_packet_loss_costs_no_message(bus: str, key: str, size: int) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        a, b = agents.start_all(lan.hosts)
        for agent, name in ((a, "a"), (b, "b")):
            agent.open(name, bus=bus, key=key)
        b.ask("wait_for_peers", node="b", n=1, timeout=20)
        b.ask("subscribe", node="b", ear="ear", patterns=["t"])
        a.ask("wait_for_subscribers", node="a", topic="t", n=1, timeout=20)
        for host in lan.hosts:
            host.run(["nft", LOSS])
        a.ask("flow", node="a", topic="t", rate=3_000, count=9_000, size=size)
        report = wait_exact(b, "t", 9_000)
        assert report["lost"] == 0
        dropped = lan.hosts[1].run(["nft", "list", "ruleset"]).stdout
        assert "counter packets 0 " not in dropped
        assert b.events("b", "PeerLeft") == []


def test_connections_that_break_in_mid_stream_cost_no_message(bus: str, key: str) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        a, b = agents.start_all(lan.hosts)
        for agent, name in ((a, "a"), (b, "b")):
            agent.open(name, bus=bus, key=key)
        for agent, name in ((a, "a"), (b, "b")):
            agent.ask("wait_for_peers", node=name, n=1, timeout=20)
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for agent, name in ((a, "a"), (b, "b")):
            agent.ask("flow", node=name, topic=f"from.{name}", rate=5_000)
        for kill in range(KILLS):
            # Each time when the stream flows again, so that none of the breaks is wasted on a broken connection.
            for agent, other, topic in ((a, b, "from.b"), (b, a, "from.a")):
                published = other.ask("flowed", topic=topic)
                wait_until(
                    lambda agent=agent, topic=topic, at=published: (
                        (received := ranges(agent.report(), topic)) and received[-1][1] > at + 500
                    )
                )
            break_connections(lan.hosts[kill % 2])
        for agent, other, topic in ((a, b, "from.b"), (b, a, "from.a")):
            report = wait_exact(agent, topic, other.ask("stop_flow", topic=topic))
            assert report["lost"] == 0
            assert report["repaired"] > 0
