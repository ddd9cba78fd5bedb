"""Nodes on several hosts of a LAN, with a bus key: they find each other, lose each other, and find each other again.

Each host is a network namespace, each node a process of its own. What a test publishes is accounted for to the message.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lan.agents import Agent, Agents, account, ranges, wait_exact, wait_until
from tests.netns import Host, Lan
from zmqbus import BusKey

pytestmark = pytest.mark.netns

STRANGER = Path(__file__).with_name("stranger.py")
GONE_S = 6.0  # a dead peer is gone from `peers()` after this; the promise
MDNS_DROPPED = """
table inet hostile {
    chain in { type filter hook input priority 0; iifname "eth0" udp dport 5353 drop; }
    chain out { type filter hook output priority 0; oifname "eth0" udp dport 5353 drop; }
}
"""


def drop_mdns(host: Host) -> None:
    """As on many a Wi-Fi: multicast does not get through."""
    host.run(["nft", MDNS_DROPPED])


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
        open_all(hosts, bus=bus, key=key)
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("flow", node=name, topic=f"from.{name}", rate=200)
        for agent in hosts:
            wait_until(lambda agent=agent: len(agent.report()["streams"]) == 3)

        began_at = time.monotonic()
        lan.hosts[1].link_down()
        lan.hosts[2].link_down()
        time.sleep(8)  # the length of the outage
        lan.hosts[1].link_up()
        wait_until(lambda: "b" in a.peers("a") and "a" in b.peers("b"))
        published = a.ask("flowed", topic="from.a")
        wait_until(lambda: ranges(b.report(), "from.a")[-1][1] >= published)
        assert a.report()["lost"] == b.report()["lost"] == 0
        time.sleep(max(0.0, began_at + 20 - time.monotonic()))
        assert c.peers("c") == set()
        lan.hosts[2].link_up()
        meet(hosts)
        for agent in hosts:
            wait_until(lambda agent=agent: len({topic for topic, _, _ in agent.report()["streams"]}) == 3)

        last = {name: agent.ask("stop_flow", topic=f"from.{name}") for agent, name in zip(hosts, "abc", strict=True)}
        for agent in hosts:
            for name in "abc":
                wait_exact(agent, f"from.{name}", last[name])


def test_a_host_that_changes_its_address_is_reached_again(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b, c = hosts = agents.start_all(lan.hosts)
        open_all(hosts, bus=bus, key=key)
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for agent, name in zip(hosts, "abc", strict=True):
            agent.ask("flow", node=name, topic=f"from.{name}", rate=200)
        for agent in hosts:
            wait_until(lambda agent=agent: len(agent.report()["streams"]) == 3)

        lan.hosts[2].set_address(lan.hosts[2].address, "10.77.0.77")
        changed_at = time.monotonic()

        def inbox_of_c(agent: Agent, name: str) -> bool:
            return any(peer == "c" and "//10.77.0.77:" in inbox for peer, _, inbox in agent.ask("peers", node=name))

        wait_until(lambda: inbox_of_c(a, "a") and inbox_of_c(b, "b") and c.peers("c") == {"a", "b"})
        print(f"known at its new address after {time.monotonic() - changed_at:.1f} s")
        published = {name: agent.ask("flowed", topic=f"from.{name}") for agent, name in zip(hosts, "abc", strict=True)}
        for agent in hosts:
            for name in "abc":
                wait_until(
                    lambda agent=agent, name=name: ranges(agent.report(), f"from.{name}")[-1][1] >= published[name]
                )
        print(f"exchanging messages after {time.monotonic() - changed_at:.1f} s")

        last = {name: agent.ask("stop_flow", topic=f"from.{name}") for agent, name in zip(hosts, "abc", strict=True)}
        for agent in hosts:
            for name in "abc":
                wait_exact(agent, f"from.{name}", last[name])


def test_a_node_that_starts_before_its_network_joins_later(bus: str, key: str) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        a, b = hosts = agents.start_all(lan.hosts)
        lan.hosts[1].run(["ip", "addr", "del", f"{lan.hosts[1].address}/24", "dev", "eth0"])
        lan.hosts[1].link_down()
        a.open("a", bus=bus, key=key)
        b.open("b", bus=bus, key=key)
        b.ask("subscribe", node="b", ear="ear", patterns=["t"])
        lan.hosts[1].run(["ip", "addr", "add", f"{lan.hosts[1].address}/24", "dev", "eth0"])
        assert b.peers("b") == set()
        lan.hosts[1].link_up()
        up_at = time.monotonic()
        meet(hosts)
        print(f"joined {time.monotonic() - up_at:.1f} s after the network came")
        a.ask("wait_for_subscribers", node="a", topic="t", n=1, timeout=10)
        a.ask("publish", node="a", topic="t", count=100)
        wait_exact(b, "t", 100)


@pytest.mark.parametrize("discovery", ["mdns", "static"])
def test_a_node_with_another_key_is_refused_and_both_are_told(
    bus: str, key: str, tmp_path: Path, discovery: str
) -> None:
    BusKey.generate().save(tmp_path / "other.key")
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b, c = agents.start_all(lan.hosts)
        inbox = a.open("a", bus=bus, key=key)["endpoints"]["inbox"]
        b.open("b", bus=bus, key=key)
        c.open("c", bus=bus, key=str(tmp_path / "other.key"), discovery=discovery, peers=[inbox])
        warned = wait_until(lambda: c.events("c", "Warned"))
        assert any("key" in event["reason"] and inbox in event["reason"] for event in warned), warned
        if discovery == "mdns":
            wait_until(lambda: [e for e in a.events("a", "Warned") if "key" in e["reason"]])
        meet([a, b])
        assert a.peers("a") == {"b"}
        assert c.peers("c") == set()
        # Each is told once, not at every attempt.
        assert len(warned) == 1


def test_one_seed_is_enough_for_everyone_to_find_everyone(bus: str, key: str) -> None:
    with Lan(hosts=5) as lan, Agents() as agents:
        hosts = agents.start_all(lan.hosts)
        seed = hosts[0].open("a", bus=bus, key=key, discovery="static")["endpoints"]["inbox"]
        for agent, name in zip(hosts[1:], "bcde", strict=True):
            agent.open(name, bus=bus, key=key, discovery="static", peers=[seed])
        meet(hosts)


def test_a_lan_that_drops_multicast_needs_one_seed(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        for host in lan.hosts:
            drop_mdns(host)
        hosts = agents.start_all(lan.hosts)
        seed = hosts[0].open("a", bus=bus, key=key)["endpoints"]["inbox"]
        for agent, name in zip(hosts[1:], "bc", strict=True):
            agent.open(name, bus=bus, key=key, peers=[seed])
        meet(hosts)
        hosts[2].ask("subscribe", node="c", ear="ear", patterns=["t"])
        hosts[1].ask("publish", node="b", topic="t", count=100)
        wait_exact(hosts[2], "t", 100)


def test_strangers_get_nothing_over_the_wire(bus: str, key: str) -> None:
    """Raw libzmq on another host, with no key, with one of its own, and, to see that it would notice, with ours."""
    bus_key = BusKey.load(key)
    member = [bus_key.server.public.decode(), bus_key.client.public.decode(), bus_key.client.secret.decode()]
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b = agents.start_all(lan.hosts[:2])
        at = a.open("a", bus=bus, key=key)["endpoints"]
        b.open("b", bus=bus, key=key)
        b.ask("subscribe", node="b", ear="ear", patterns=["t"])
        a.ask("wait_for_subscribers", node="a", topic="t", n=1, timeout=20)
        a.ask("flow", node="a", topic="t", rate=500)
        stranger = lan.hosts[2].popen(
            [sys.executable, str(STRANGER), at["pub"], at["inbox"], *member],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert stranger.stdout.readline() == "knocking\n"
        published = a.ask("flowed", topic="t")
        wait_until(lambda: account(b.report(), "t")[-1][1] > published + 1000)  # some 40 attempts of the stranger's
        counts = json.loads(stranger.communicate("enough\n", timeout=20)[0])
        assert counts["SUB with the key"]["frames"] > 100
        assert counts["DEALER with the key"]["frames"] > 0
        del counts["SUB with the key"], counts["DEALER with the key"]
        assert counts == dict.fromkeys(counts, {"frames": 0, "handshakes": 0})
        wait_exact(b, "t", a.ask("stop_flow", topic="t"))
