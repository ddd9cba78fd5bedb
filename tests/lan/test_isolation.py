"""No key, no network: without a bus key nothing leaves by a real interface, and nothing comes in by one."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.lan.agents import AgentError, Agents, needs_nft, wait_exact, wait_until
from tests.netns import Host, Lan

pytestmark = [pytest.mark.netns, needs_nft]

COUNTERS = """
table inet watch {
    counter everything { }
    counter mdns { }
    counter multicast { }
    counter streams { }
    chain out {
        type filter hook output priority 0
        oifname "eth0" counter name everything
        oifname "eth0" udp dport 5353 counter name mdns
        oifname "eth0" ip daddr 224.0.0.0/4 counter name multicast
        oifname "eth0" meta l4proto tcp counter name streams
    }
}
"""
DIAL = """
import errno, socket, sys
for port in sys.argv[2:]:
    with socket.socket() as s:
        s.settimeout(5)
        print(errno.errorcode.get(s.connect_ex((sys.argv[1], int(port))), "connected"))
"""


def counted(host: Host) -> dict[str, int]:
    """Packets that left by eth0, by kind."""
    listed: dict[str, Any] = json.loads(host.run(["nft", "-j", "list", "counters"]).stdout)
    counters = [entry["counter"] for entry in listed["nftables"] if "counter" in entry]
    return {counter["name"]: counter["packets"] for counter in counters}


def test_nothing_leaves_and_nothing_comes_in_without_a_key(bus: str, key: str) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        here, there = lan.hosts
        here.run(["ip", "route", "add", "default", "via", there.address])
        here.run(["nft", COUNTERS])
        silent = dict.fromkeys(("everything", "mdns", "multicast", "streams"), 0)
        sent_before = here.sent_packets()

        a, b, stranger = agents.start(here), agents.start(here), agents.start(there)
        opened = {name: agent.open(name, bus=bus) for agent, name in ((a, "a"), (b, "b"), (stranger, "c"))}
        for agent, name, other in ((a, "a", "b"), (b, "b", "a")):
            agent.ask("wait_for_peers", node=name, n=1, timeout=20)
            agent.ask("subscribe", node=name, ear="ear", patterns=["from.>"])
            assert agent.peers(name) == {other}
        a.ask("flow", node="a", topic="from.a", rate=2000, count=8000)  # 4 s: heartbeats, all packets of announcing
        b.ask("publish", node="b", topic="from.b", count=1000)
        wait_exact(b, "from.a", 8000)
        wait_exact(a, "from.b", 1000)
        ports = [endpoint.rsplit(":", 1)[1] for name in "ab" for endpoint in opened[name]["endpoints"].values()]
        dialled = there.run([sys.executable, "-c", DIAL, here.address, *ports]).stdout.split()
        assert dialled == ["ECONNREFUSED"] * 4
        assert (a.peers("a"), b.peers("b"), stranger.peers("c")) == ({"b"}, {"a"}, set())
        for agent, name in ((a, "a"), (b, "b")):
            assert agent.events(name, "Warned") == []
            agent.ask("close", node=name)  # says goodbye
        # The four refusals are the kernel's, and so is the ARP that sent_packets counts beside them.
        assert counted(here) == silent | {"everything": 4, "streams": 4}
        assert here.sent_packets() - sent_before <= 4 + 2

        a.open("keyed", bus=bus, key=key)  # so much for the counters
        wait_until(lambda: counted(here)["mdns"] >= 3)


@pytest.mark.parametrize(
    "options",
    [
        {"interface": "10.77.0.1"},
        {"interface": "eth0"},
        {"peers": ["tcp://10.77.0.2:5555"]},
        {"peers": ["tcp://10.77.0.2:5555"], "discovery": "static"},
        {"peers": ["tcp://other.example:5555"]},
    ],
)
def test_leaving_the_machine_without_a_key_is_refused_in_one_line(bus: str, options: dict[str, Any]) -> None:
    with Lan(hosts=1) as lan, Agents() as agents:
        (host,) = lan.hosts
        host.run(["nft", COUNTERS])
        agent = agents.start(host)
        with pytest.raises(
            AgentError, match=r"without a bus key zmqbus stays on this machine: .*keygen.*key="
        ) as refused:
            agent.open("a", bus=bus, **options)
        assert refused.value.kind == "SetupError"
        assert "\n" not in refused.value.text
        assert set(counted(host).values()) == {0}
