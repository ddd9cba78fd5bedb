"""Nodes on several hosts of a LAN, with a bus key: they find each other, lose each other, and find each other again.

Each host is a network namespace, each node a process of its own. What a test publishes is accounted for to the message.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lan.agents import Agent, Agents, account, ranges, wait_exact, wait_until
from tests.netns import Host, Lan
from zmqbus import BusKey

pytestmark = pytest.mark.netns

GONE_S = 6.0  # a dead peer is gone from `peers()` after this; the promise
MDNS_DROPPED = """
table inet hostile {
    chain in { type filter hook input priority 0; udp dport 5353 drop; }
    chain out { type filter hook output priority 0; udp dport 5353 drop; }
}
"""


def drop_mdns(host: Host) -> None:
    """A switch that does not carry multicast; loopback is the host's own."""
    nft(host, MDNS_DROPPED.replace("udp dport", "iifname != lo udp dport", 1).replace("udp", "oifname != lo udp"))


def nft(host: Host, rules: str) -> None:
    """Load firewall rules into a host."""
    host.run(["nft", rules.strip()])


def open_all(agents: list[Agent], **options: Any) -> None:
    """Open node "a" on the first, "b" on the second …, and wait until each knows all others."""
    for agent, name in zip(agents, "abcdefgh", strict=False):
        agent.tell("open", node=name, options=options)
    for agent in agents:
        agent.answer()
    meet(agents)


def meet(agents: list[Agent]) -> None:
    """Wait until each knows all others."""
    for agent, name in zip(agents, "abcdefgh", strict=False):
        agent.ask("wait_for_peers", node=name, n=len(agents) - 1, timeout=20)


def test_three_hosts_find_each_other_and_exchange_messages(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b, c = hosts = agents.start_all(lan.hosts)
        open_all(hosts, bus=bus, key=key, discovery="mdns")
        assert (a.peers("a"), b.peers("b"), c.peers("c")) == ({"b", "c"}, {"a", "c"}, {"a", "b"})
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for agent, name in zip(hosts, "abc", strict=True):  # `subscribe` has returned: all of it is owed
            assert agent.ask("publish", node=name, topic=f"from.{name}", count=1000) == 1000
        for agent in hosts:
            for name in "abc":
                wait_exact(agent, f"from.{name}", 1000)
            assert agent.report()["lost"] == 0


def test_a_killed_host_is_gone_in_time_and_its_restart_joins(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b, c = hosts = agents.start_all(lan.hosts)
        open_all(hosts, bus=bus, key=key)
        first = c.ask("wait_for_peers", node="c", n=2, timeout=5)
        assert first == 2
        old = next(origin for name, origin, _ in a.ask("peers", node="a") if name == "c")
        c.kill()
        killed_at = time.monotonic()
        for agent, name in ((a, "a"), (b, "b")):
            (left,) = wait_until(lambda agent=agent, name=name: agent.events(name, "PeerLeft"))
            assert left["peer"] == "c"
            assert left["origin"] == old
            assert left["at"] - killed_at <= GONE_S
            assert agent.peers(name) == {"a", "b"} - {name}

        again = agents.start(lan.hosts[2])
        origin = again.open("c", bus=bus, key=key)["origin"]
        assert origin != old
        meet([a, b, again])
        assert {origin for name, origin, _ in a.ask("peers", node="a") if name == "c"} == {origin}
        again.ask("subscribe", node="c", ear="ear", patterns=["t"])
        a.ask("publish", node="a", topic="t", count=10)
        wait_exact(again, "t", 10)
        assert not a.events("a", "DuplicateName")


def test_outages_of_8_and_20_seconds_heal_without_restart(bus: str, key: str) -> None:
    """At the same time for two hosts: b is cut off for 8 s, c for 20 s; everybody goes on publishing."""
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b, c = hosts = agents.start_all(lan.hosts)
        T=time.monotonic()
        def mark(x): print(f"{time.monotonic()-T:.2f} {x}")
        open_all(hosts, bus=bus, key=key)
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("flow", node=name, topic=f"from.{name}", rate=200)
        for agent in hosts:
            wait_until(lambda agent=agent: len(agent.report()["streams"]) == 3)
        mark("down")
        begin = time.monotonic()
        lan.hosts[1].link_down()
        lan.hosts[2].link_down()
        time.sleep(8)  # the outage; nothing is waited for
        lan.hosts[1].link_up()
        mark("b up")
        wait_until(lambda: a.peers("a") >= {"b"} and b.peers("b") == {"a"})
        mark("b there")
        last = a.ask("wait_flow_at", topic="from.a")
        wait_until(lambda: ranges(b.report(),"from.a")[-1][1]>=last)
        mark("b has all")
        time.sleep(max(0.0, begin + 20 - time.monotonic()))
        lan.hosts[2].link_up()
        healed_at = time.monotonic()
        mark("c up")
        meet(hosts)
        mark("all there")
        print(f"healed after {time.monotonic() - healed_at:.1f} s")
        last = {name: agent.ask("stop_flow", topic=f"from.{name}") for agent, name in zip(hosts, "abc", strict=True)}
        for agent in hosts:
            for name in "abc":
                report = wait_exact(agent, f"from.{name}", last[name])
                mark(("exact",name))
        assert not [gap for agent in (a, b) for gap in agent.report()["gaps"] if gap[0] != "from.c"]
        print(a.events("a", "PeerLeft"), c.events("c", "PeerLeft"))
