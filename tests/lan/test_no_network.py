"""Machines without a network, or without loopback: each says so in one line, and does what can still be done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lan.agents import Agent, AgentError, Agents, wait_exact, wait_until
from tests.netns import Host, Lan

pytestmark = pytest.mark.netns

ALONE = "no network: no interface but loopback is up"
NO_LOOPBACK = "loopback is down"


@pytest.fixture
def machine() -> Iterator[Host]:
    """A machine whose cable is not plugged in."""
    with Lan(hosts=1) as lan:
        (host,) = lan.hosts
        host.link_down()
        yield host


def warnings(agent: Agent, name: str) -> list[str]:
    return [event["reason"] for event in agent.events(name, "Warned")]


def loopback(machine: Host, state: str) -> None:
    machine.run(["ip", "link", "set", "lo", state])


def nodes_command(machine: Host, bus: str, *options: str) -> tuple[int, list[str]]:
    """Exit status, and the lines of stderr."""
    argv = [sys.executable, "-m", "zmqbus", "--bus", bus, *options, "nodes"]
    process = machine.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = process.communicate(timeout=30)[1].splitlines()
    return process.returncode, lines


def test_without_loopback_a_node_without_a_key_says_so(machine: Host, bus: str, agents: Agents) -> None:
    loopback(machine, "down")
    status, lines = nodes_command(machine, bus)
    assert status == 0
    (line,) = [line for line in lines if line.startswith("zmqbus: warning: ")]
    assert NO_LOOPBACK in line
    assert "ip link set lo up" in line

    a, b = agents.start(machine), agents.start(machine)
    a.open("a", bus=bus)
    b.open("b", bus=bus)
    loopback(machine, "up")
    for name, agent in (("a", a), ("b", b)):
        agent.ask("wait_for_peers", node=name, n=1, timeout=20)
        assert len([reason for reason in warnings(agent, name) if NO_LOOPBACK in reason]) == 1


@pytest.mark.parametrize("interface", [None, "eth0"])
def test_without_loopback_a_node_with_a_key_does_not_open(
    machine: Host, bus: str, key: str, agents: Agents, interface: str | None
) -> None:
    loopback(machine, "down")
    machine.link_up()
    with pytest.raises(AgentError, match=NO_LOOPBACK) as caught:
        agents.start(machine).open("a", bus=bus, key=key, interface=interface)
    assert caught.value.kind == "SetupError"
    assert "ip link set lo up" in caught.value.text


def test_a_named_interface_that_is_down_is_told(machine: Host, bus: str, key: str, agents: Agents) -> None:
    a = agents.start(machine)
    a.open("a", bus=bus, key=key, interface="eth0")
    assert wait_until(lambda: warnings(a, "a")) == [
        f"no network: {machine.address} is down, so that no other node can be reached until it is up"
    ]


def test_nodes_of_a_machine_without_a_network_meet_and_move_when_one_comes(
    machine: Host, bus: str, key: str, agents: Agents
) -> None:
    nodes = {"a": agents.start(machine), "b": agents.start(machine)}
    for name, agent in nodes.items():
        agent.open(name, bus=bus, key=key)
    for name, agent in nodes.items():
        agent.ask("wait_for_peers", node=name, n=1, timeout=20)
        (warned,) = wait_until(lambda agent=agent, name=name: warnings(agent, name))
        assert warned.startswith(ALONE)
    nodes["b"].ask("subscribe", node="b", ear="ear", patterns=["t"])
    nodes["a"].ask("flow", node="a", topic="t", rate=200)

    def all_at(address: str) -> bool:
        return all(
            [inbox.startswith(f"tcp://{address}:") for _, _, inbox in agent.ask("peers", node=name)] == [True]
            for name, agent in nodes.items()
        )

    assert all_at("127.0.0.1")
    machine.link_up()
    wait_until(lambda: all_at(machine.address))
    machine.link_down()
    wait_until(lambda: all_at("127.0.0.1"))
    wait_exact(nodes["b"], "t", nodes["a"].ask("stop_flow", topic="t"))
    assert nodes["b"].report()["lost"] == 0
    for name, agent in nodes.items():
        assert agent.events(name, "PeerLeft") == []
        assert [reason.startswith(ALONE) for reason in warnings(agent, name)].count(True) == 2  # when there was none


def test_loopback_is_not_believed_of_another_machine(bus: str, key: str) -> None:
    """Two machines, each with nodes that met by loopback, are joined by a network: all find all, at real addresses."""
    with Lan(hosts=2) as lan, Agents() as agents:
        nodes = {}
        for number, host in enumerate(lan.hosts):
            host.link_down()
            for letter in "ab":
                nodes[f"{letter}{number}"] = agents.start(host)
        for name, agent in nodes.items():
            agent.open(name, bus=bus, key=key)
        for name, agent in nodes.items():
            agent.ask("wait_for_peers", node=name, n=1, timeout=20)
            (inbox,) = [inbox for _, _, inbox in agent.ask("peers", node=name)]
            assert inbox.startswith("tcp://127.0.0.1:")
        for host in lan.hosts:
            host.link_up()

        def known(name: str) -> dict[str, str]:
            return {peer: inbox for peer, _, inbox in nodes[name].ask("peers", node=name)}

        homes = {name: lan.hosts[int(name[1])].address for name in nodes}
        for name in nodes:
            others = nodes.keys() - {name}
            wait_until(
                lambda name=name, others=others: (
                    (peers := known(name)).keys() == others
                    and all(peers[other].startswith(f"tcp://{homes[other]}:") for other in others)
                ),
                told=lambda name=name: (name, known(name)),
            )


def test_a_seed_that_is_reached_before_the_new_network_is_noticed(bus: str, key: str) -> None:
    """Both nodes still believe to be offline when one dials the other: neither takes loopback for the other."""
    with Lan(hosts=2) as lan, Agents() as agents:
        a, b = map(agents.start, lan.hosts)
        for host in lan.hosts:
            host.link_down()
        port = a.open("a", bus=bus, key=key, discovery="static")["endpoints"]["inbox"].rpartition(":")[2]
        seed = f"tcp://{lan.hosts[0].address}:{port}"
        b.open("b", bus=bus, key=key, discovery="static", peers=[seed])
        for host in lan.hosts:
            host.link_up()
        for name, agent, host in (("a", a, lan.hosts[1]), ("b", b, lan.hosts[0])):
            agent.ask("wait_for_peers", node=name, n=1, timeout=20)
            wait_until(
                lambda name=name, agent=agent, host=host: (
                    [inbox.startswith(f"tcp://{host.address}:") for _, _, inbox in agent.ask("peers", node=name)]
                    == [True]
                )
            )
