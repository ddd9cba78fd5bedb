"""Many nodes on one machine, several to a process: they find each other completely, and names do not confuse them."""

from __future__ import annotations

import signal

import pytest

from tests.lan.agents import Agents, account, wait_exact, wait_until


def crowd(agents: Agents, bus: str, nodes: int, processes: int) -> None:
    """So many nodes start at once; each must come to know all others, and hear what every other says."""
    names = [f"n{number}" for number in range(nodes)]
    running = {agents.start(): names[number::processes] for number in range(processes)}
    for agent, group in running.items():
        for name in group:
            agent.tell("open", node=name, options={"bus": bus})
    for agent, group in running.items():
        for _ in group:
            agent.answer(timeout=110)

    def census() -> bool:
        for agent in running:
            agent.tell("census")
        counts = [count for agent in running for count in agent.answer(timeout=110).values()]
        assert max(counts) < nodes
        return min(counts) == nodes - 1

    wait_until(census, timeout=110)
    for agent, group in running.items():
        agent.ask("subscribe", node=group[0], ear="ear", patterns=["from.>"])
    for agent, group in running.items():
        for name in group:
            agent.ask("publish", node=name, topic=f"from.{name}", count=10)
    for agent in running:
        for name in names:
            assert wait_exact(agent, f"from.{name}", 10)["lost"] == 0


def test_30_nodes_on_one_machine_all_find_each_other(agents: Agents, bus: str) -> None:
    crowd(agents, bus, 30, 5)


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_100_nodes_on_one_machine_all_find_each_other(agents: Agents, bus: str) -> None:
    crowd(agents, bus, 100, 10)


def test_ten_messages_published_the_moment_a_node_appears_all_arrive(agents: Agents, bus: str) -> None:
    """Either way round, five times: the publisher is the newcomer, or the subscriber is."""
    a, b = agents.start(), agents.start()
    for turn in range(5):
        b.open("b", bus=f"{bus}.{turn}")
        b.ask("subscribe", node="b", ear="ear", patterns=["t"])  # its HELLO will name this: it is owed from the start
        a.open("a", bus=f"{bus}.{turn}")
        a.ask("greet", node="a", topic="t", count=10)
        assert wait_exact(b, "t", 10)["lost"] == 0
        for agent, name in ((a, "a"), (b, "b")):
            agent.ask("close", node=name)
    for turn in range(5, 10):
        a.open("a", bus=f"{bus}.{turn}")
        a.ask("greet", node="a", topic="t", count=10)
        b.open("b", bus=f"{bus}.{turn}")
        b.ask("subscribe", node="b", ear="ear", patterns=["t"], history=10)  # before it, after it, or in between
        assert wait_exact(b, "t", 10)["lost"] == 0
        for agent, name in ((a, "a"), (b, "b")):
            agent.ask("close", node=name)


def test_ten_messages_published_just_before_a_subscriber_joins_arrive_with_history(agents: Agents, bus: str) -> None:
    a, b = agents.start(), agents.start()
    a.open("a", bus=bus)
    assert a.ask("publish", node="a", topic="t", count=25) == 25
    b.open("b", bus=bus)
    b.ask("subscribe", node="b", ear="early", patterns=["t"], history=10)  # perhaps before it has met the publisher
    b.ask("wait_for_peers", node="b", n=1, timeout=20)
    b.ask("subscribe", node="b", ear="late", patterns=["t"], history=10)
    for ear in ("early", "late"):
        assert wait_exact(b, "t", 25, first=16, ear=ear)["lost"] == 0


def test_two_processes_of_one_name_are_reported_and_both_are_heard(agents: Agents, bus: str) -> None:
    one, two, other = agents.start(), agents.start(), agents.start()
    other.open("other", bus=bus)
    other.ask("subscribe", node="other", ear="ear", patterns=["t"])
    origins = [agent.open("twin", bus=bus)["origin"] for agent in (one, two)]
    for agent, name in ((one, "twin"), (two, "twin"), (other, "other")):
        agent.ask("wait_for_peers", node=name, n=2, timeout=20)
        (told,) = wait_until(lambda agent=agent, name=name: agent.events(name, "DuplicateName"))
        assert told["name"] == "twin"
    for agent, count in ((one, 10), (two, 20)):
        agent.ask("publish", node="twin", topic="t", count=count)
    wait_exact(other, "t", 10, origin=origins[0])
    wait_exact(other, "t", 20, origin=origins[1])


def test_a_name_restarted_at_once_is_a_restart_not_a_duplicate(agents: Agents, bus: str) -> None:
    other = agents.start()
    other.open("other", bus=bus)
    other.ask("subscribe", node="other", ear="ear", patterns=["t"])
    old = agents.start()
    new = agents.start()  # the process waits, so that its node follows at once
    first = old.open("phoenix", bus=bus)["origin"]
    other.ask("wait_for_peers", node="other", n=1, timeout=20)
    old.ask("wait_for_subscribers", node="phoenix", topic="t", n=1, timeout=20)
    old.ask("publish", node="phoenix", topic="t", count=100)
    wait_exact(other, "t", 100, origin=first)
    old.signal(signal.SIGKILL)
    second = new.open("phoenix", bus=bus)["origin"]
    new.ask("wait_for_subscribers", node="phoenix", topic="t", n=1, timeout=20)
    new.ask("publish", node="phoenix", topic="t", count=100)
    wait_exact(other, "t", 100, origin=second)
    (left,) = wait_until(lambda: other.events("other", "PeerLeft"))
    assert (left["origin"], left["reason"]) == (first, "restarted")
    assert [origin for _, origin, _ in other.ask("peers", node="other")] == [second]
    assert other.events("other", "DuplicateName") == []
    assert account(other.report(), "t", first) == [[1, 100]]
