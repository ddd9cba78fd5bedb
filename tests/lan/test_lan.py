"""Nodes on several hosts of a LAN, with a bus key: they find each other, lose each other, and find each other again.

Each host is a network namespace, each node a process of its own, named "a", "b", "c" … in the order of the hosts.
What a test publishes is accounted for to the message.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lan.agents import Agent, Agents, account, needs_nft, ranges, wait_exact, wait_until
from tests.netns import Lan
from zmqbus import BusKey

pytestmark = pytest.mark.netns

Nodes = dict[str, Agent]

STRANGER = Path(__file__).with_name("stranger.py")
HELD_MAX = 50_000  # of these small messages a history holds far more
GONE_S = 6.0  # a dead peer is gone from `peers()` after this; the promise
MDNS_DROPPED = """
table inet hostile {
    chain in { type filter hook input priority 0; iifname "eth0" udp dport 5353 drop; }
    chain out { type filter hook output priority 0; oifname "eth0" udp dport 5353 drop; }
}
"""


def start(lan: Lan, agents: Agents) -> Nodes:
    """A process on each host; its node is yet to be opened."""
    return dict(zip("abcdefgh", map(agents.start, lan.hosts), strict=False))


def open_all(nodes: Nodes, **options: Any) -> None:
    """Open all at once, and wait until each knows all others."""
    for name, agent in nodes.items():
        agent.tell("open", node=name, options=options)
    for agent in nodes.values():
        agent.answer()
    meet(nodes)


def meet(nodes: Nodes) -> None:
    """Wait until each knows all others."""
    for name, agent in nodes.items():
        agent.ask("wait_for_peers", node=name, n=len(nodes) - 1, timeout=20)
        assert agent.peers(name) == set(nodes) - {name}


def converse(nodes: Nodes, rate: float) -> None:
    """Everybody subscribes to everybody, and publishes from now on; done when all hear all."""
    for name, agent in nodes.items():
        agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
    for name, agent in nodes.items():
        agent.ask("flow", node=name, topic=f"from.{name}", rate=rate)
    for agent in nodes.values():
        wait_until(lambda agent=agent: len(agent.report()["streams"]) == len(nodes))


def up_to_date(nodes: Nodes) -> None:
    """Wait until everybody has heard what everybody had published by the time of the call."""
    published = {name: agent.ask("flowed", topic=f"from.{name}") for name, agent in nodes.items()}
    for agent in nodes.values():
        for name, seq in published.items():
            wait_until(lambda agent=agent, name=name, seq=seq: ranges(agent.report(), f"from.{name}")[-1][1] >= seq)


def conclude(nodes: Nodes) -> None:
    """Let everybody publish some more, and stop: everybody must have received every message of everybody.

    Nothing may be lost: the histories hold all that these tests publish.
    """
    up_to_date(nodes)
    lost = {name: agent.report()["lost"] for name, agent in nodes.items()}
    time.sleep(1)  # some messages of after the trouble, while there is none
    last = {name: agent.ask("stop_flow", topic=f"from.{name}") for name, agent in nodes.items()}
    for agent in nodes.values():
        for name, seq in last.items():
            assert seq <= HELD_MAX
            wait_exact(agent, f"from.{name}", seq)
    assert lost == {name: agent.report()["lost"] for name, agent in nodes.items()} == dict.fromkeys(nodes, 0)


# --- finding each other --------------------------------------------------------------------------


def test_three_hosts_find_each_other_and_exchange_messages(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        nodes = start(lan, agents)
        open_all(nodes, bus=bus, key=key, discovery="mdns")
        for name, agent in nodes.items():
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
        for name, agent in nodes.items():  # `subscribe` has returned: all of it is owed
            assert agent.ask("publish", node=name, topic=f"from.{name}", count=1000) == 1000
        for agent in nodes.values():
            for name in nodes:
                wait_exact(agent, f"from.{name}", 1000)
            assert agent.report()["lost"] == 0


def test_one_seed_is_enough_for_everyone_to_find_everyone(bus: str, key: str) -> None:
    with Lan(hosts=5) as lan, Agents() as agents:
        nodes = start(lan, agents)
        seed = nodes["a"].open("a", bus=bus, key=key, discovery="static")["endpoints"]["inbox"]
        for name in "bcde":
            nodes[name].open(name, bus=bus, key=key, discovery="static", peers=[seed])
        meet(nodes)


@needs_nft
def test_a_lan_that_drops_multicast_needs_one_seed(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        for host in lan.hosts:
            host.run(["nft", MDNS_DROPPED])
        nodes = start(lan, agents)
        seed = nodes["a"].open("a", bus=bus, key=key)["endpoints"]["inbox"]
        for name in "bc":
            nodes[name].open(name, bus=bus, key=key, peers=[seed])
        meet(nodes)
        nodes["c"].ask("subscribe", node="c", ear="ear", patterns=["t"])
        nodes["b"].ask("publish", node="b", topic="t", count=100)
        wait_exact(nodes["c"], "t", 100)


def test_a_node_that_starts_before_its_network_joins_later(bus: str, key: str) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        nodes = start(lan, agents)
        late = lan.hosts[1]
        late.run(["ip", "addr", "del", f"{late.address}/24", "dev", "eth0"])
        late.link_down()
        for name, agent in nodes.items():
            agent.open(name, bus=bus, key=key)
        nodes["b"].ask("subscribe", node="b", ear="ear", patterns=["t"])
        assert nodes["b"].peers("b") == set()
        late.run(["ip", "addr", "add", f"{late.address}/24", "dev", "eth0"])
        late.link_up()
        up_at = time.monotonic()
        meet(nodes)
        print(f"joined {time.monotonic() - up_at:.1f} s after the network came")
        nodes["a"].ask("wait_for_subscribers", node="a", topic="t", n=1, timeout=10)
        nodes["a"].ask("publish", node="a", topic="t", count=100)
        wait_exact(nodes["b"], "t", 100)


# --- losing each other, and finding each other again ---------------------------------------------


def test_a_killed_host_is_gone_in_time_and_its_restart_joins(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        nodes = start(lan, agents)
        open_all(nodes, bus=bus, key=key)
        (old,) = [origin for name, origin, _ in nodes["a"].ask("peers", node="a") if name == "c"]
        nodes["c"].kill()
        killed_at = time.monotonic()
        for name in "ab":
            (left,) = wait_until(lambda name=name: nodes[name].events(name, "PeerLeft"))
            assert (left["peer"], left["origin"]) == ("c", old)
            assert left["at"] - killed_at <= GONE_S
            assert nodes[name].peers(name) == {"a", "b"} - {name}

        nodes["c"] = agents.start(lan.hosts[2])
        new = nodes["c"].open("c", bus=bus, key=key)["origin"]
        assert new != old
        meet(nodes)
        assert [origin for name, origin, _ in nodes["a"].ask("peers", node="a") if name == "c"] == [new]
        nodes["c"].ask("subscribe", node="c", ear="ear", patterns=["t"])
        nodes["a"].ask("publish", node="a", topic="t", count=10)
        wait_exact(nodes["c"], "t", 10)
        assert nodes["a"].events("a", "DuplicateName") == []


def test_outages_of_8_and_20_seconds_heal_without_restart(bus: str, key: str) -> None:
    """At the same time for two hosts: b is cut off for 8 s, c for 20 s; everybody goes on publishing."""
    with Lan(hosts=3) as lan, Agents() as agents:
        nodes = start(lan, agents)
        open_all(nodes, bus=bus, key=key)
        converse(nodes, rate=200)
        began_at = time.monotonic()
        lan.hosts[1].link_down()
        lan.hosts[2].link_down()
        time.sleep(8)  # the length of the outage
        lan.hosts[1].link_up()
        wait_until(lambda: "b" in nodes["a"].peers("a") and "a" in nodes["b"].peers("b"))
        up_to_date({name: nodes[name] for name in "ab"})
        assert nodes["a"].report()["lost"] == nodes["b"].report()["lost"] == 0
        time.sleep(max(0.0, began_at + 20 - time.monotonic()))
        assert nodes["c"].peers("c") == set()
        lan.hosts[2].link_up()
        meet(nodes)
        conclude(nodes)


@pytest.mark.parametrize("discovery", ["both", "static"])
def test_a_host_that_changes_its_address_is_reached_again(bus: str, key: str, discovery: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        nodes = start(lan, agents)
        seed = nodes["a"].open("a", bus=bus, key=key, discovery=discovery)["endpoints"]["inbox"]
        for name in "bc":
            nodes[name].open(name, bus=bus, key=key, discovery=discovery, peers=[seed])
        meet(nodes)
        converse(nodes, rate=200)
        lan.hosts[2].set_address(lan.hosts[2].address, "10.77.0.77")
        changed_at = time.monotonic()

        def inboxes_of_c(name: str) -> list[str]:
            return [inbox for peer, _, inbox in nodes[name].ask("peers", node=name) if peer == "c"]

        inbox = wait_until(
            lambda: (inbox := nodes["c"].ask("endpoints", node="c")["inbox"]).startswith("tcp://10.77.0.77:") and inbox
        )
        wait_until(lambda: inboxes_of_c("a") == inboxes_of_c("b") == [inbox])
        up_to_date(nodes)
        print(f"back at its new address after {time.monotonic() - changed_at:.1f} s")
        meet(nodes)
        conclude(nodes)


# --- strangers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discovery", ["mdns", "static"])
def test_a_node_with_another_key_is_refused_and_both_are_told(
    bus: str, key: str, tmp_path: Path, discovery: str
) -> None:
    other_key = tmp_path / "other.key"
    BusKey.generate().save(other_key)
    with Lan(hosts=3) as lan, Agents() as agents:
        nodes = start(lan, agents)
        a, b, c = nodes.values()
        inbox = a.open("a", bus=bus, key=key)["endpoints"]["inbox"]
        c.open("c", bus=bus, key=str(other_key), discovery=discovery, peers=[inbox])
        (warned,) = wait_until(lambda: c.events("c", "KeyMismatch"))  # one, not one at every attempt
        assert inbox in warned["reason"]
        assert "key" in warned["reason"]
        if discovery == "mdns":
            wait_until(lambda: [event for event in a.events("a", "KeyMismatch") if "key" in event["reason"]])
        b.open("b", bus=bus, key=key)
        meet({"a": a, "b": b})
        assert c.peers("c") == set()
        if discovery == "mdns":
            argv = [sys.executable, "-m", "zmqbus", "--bus", bus, "--key-file", str(other_key), "tap"]
            tap = lan.hosts[1].popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while inbox not in (line := tap.stderr.readline()):  # that of node b may come before
                assert line.startswith("zmqbus: warning: "), line
            assert line.startswith("zmqbus: warning: ")
            assert "key" in line


def test_strangers_get_nothing_over_the_wire(bus: str, key: str) -> None:
    """Raw libzmq on another host, with no key, with one of its own, and, to see that it would notice, with ours."""
    bus_key = BusKey.load(key)
    member = [bus_key.server.public.decode(), bus_key.client.public.decode(), bus_key.client.secret.decode()]
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b = map(agents.start, lan.hosts[:2])
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
        wait_until(lambda: account(b.report(), "t")[-1][1] > published + 1000)  # time for 40 of its attempts
        counts = json.loads(stranger.communicate("enough\n", timeout=20)[0])
        assert counts.pop("SUB with the key")["frames"] > 100
        assert counts.pop("DEALER with the key")["frames"] > 0
        assert {tuple(count.values()) for count in counts.values()} == {(0, 0)}, counts
        wait_exact(b, "t", a.ask("stop_flow", topic="t"))
