"""The log over a network that fails: a reader that is cut off goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.forwarder import forwarders
from tests.lan.agents import Agent, Agents, wait_until
from tests.netns import Lan

FORWARDER = forwarders.__file__


def heard(agent: Agent, ear: str) -> int:
    """How many messages an ear has got."""
    return sum(last - first + 1 for _, _, ranges in agent.report(ear)["streams"] for first, last in ranges)


def test_a_reader_that_is_cut_off_for_long_and_for_short_goes_on_where_it_was(
    bus: str, key: str, tmp_path: Path
) -> None:
    """Once so short that the connections live on, once until everybody has given up the others."""
    with Lan(hosts=2) as lan, Agents() as agents:
        options = json.dumps({"bus": bus, "key": key, "name": "store"})
        argv = [sys.executable, str(FORWARDER), str(tmp_path / "journal"), options]
        store = lan.hosts[0].popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        writer, reader = agents.start(lan.hosts[0]), agents.start(lan.hosts[1])
        writer.open("writer", bus=bus, key=key)
        reader.open("reader", bus=bus, key=key)
        for agent, name in ((writer, "writer"), (reader, "reader")):
            wait_until(lambda agent=agent, name=name: len(agent.peers(name)) == 2)
        for ear, more in (("plain", {"start": "first"}), ("durable", {"durable": "name", "start": "first"})):
            reader.ask("subscribe", node="reader", ear=ear, patterns=["t"], **more)
        writer.ask("flow", node="writer", topic="t", rate=500)
        wait_until(lambda: heard(reader, "durable") > 100)
        for outage in (3, 9):
            lan.hosts[1].link_down()
            time.sleep(outage)  # the length of the outage
            lan.hosts[1].link_up()
            now = writer.ask("flowed", topic="t")
            for ear in ("plain", "durable"):
                wait_until(lambda ear=ear, now=now: heard(reader, ear) > now)
        assert reader.events("reader", "ForwarderDown")
        last = writer.ask("stop_flow", topic="t")
        for ear in ("plain", "durable"):
            wait_until(lambda ear=ear: heard(reader, ear) >= last)
            report = reader.report(ear)
            assert [ranges for _, _, ranges in report["streams"]] == [[[1, last]]], "each once, and in order"
            assert (report["lost"], report["wrong"]) == (0, [])
        assert store.stdin is not None
        store.stdin.close()
        store.wait(30)
        assert store.stdout is not None
        store.stdout.close()
