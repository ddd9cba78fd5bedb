"""What becomes of a node when processes fork, stop, end without a word, or are ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import zmqbus
from tests.lan.agents import Agents, ranges, wait_exact, wait_until

BOUND_S = 20.0  # far beyond what it should take; a hang is for ever

FORK = """
import multiprocessing, os, sys, zmqbus
bus = sys.argv[1]

def child(results):
    refused = []
    for name, attempt in {
        "publish": lambda: node.publish("t", 0),
        "send": lambda: publisher.send(0),
        "get": lambda: subscription.get(5),
        "peers": lambda: node.peers(),
        "subscribe": lambda: node.subscribe("t"),
        "flush": lambda: node.flush(),
    }.items():
        try:
            attempt()
        except zmqbus.ForkedProcess:
            refused.append(name)
    node.close()  # does nothing, and does not hang
    subscription.close()
    with zmqbus.Node("child", bus=bus) as own:  # a node of its own is what the error says to open
        own.wait_for_subscribers("t", 1, 10)
        own.publish("t", "from the child")
    results.put(refused)
    # and now the interpreter's ordinary end, with all that atexit and the collector do

with zmqbus.Node("parent", bus=bus) as node:
    subscription = node.subscribe("t")
    publisher = node.publisher("t")
    publisher.send("before")
    multiprocessing.set_start_method("fork")
    results = multiprocessing.Queue()
    process = multiprocessing.Process(target=child, args=(results,))
    process.start()
    values = [subscription.get(15).value for _ in range(2)]  # it is read meanwhile: what is missed can be repaired
    print(*results.get(timeout=15), flush=True)
    process.join(15)
    print(process.exitcode, flush=True)
    publisher.send("after")
    print(*sorted([*values, subscription.get(10).value]), sep=", ", flush=True)
"""

ENDINGS = {
    "the end": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise ValueError('on purpose')",
    "the end, while a thread consumes": "s = node.subscribe('x'); start(lambda: list(s))",
    "the end, while a thread publishes": "start(lambda: [node.publish('y', 1) for _ in iter(int, 1)])",
}


def test_a_forked_child_is_refused_at_once_and_ends_and_the_parent_goes_on(bus: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, bus], capture_output=True, text=True, timeout=BOUND_S * 2)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "publish send get peers subscribe flush",
        "0",
        "after, before, from the child",
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_ends_without_close_delivers_and_does_not_hang(bus: str, ending: str) -> None:
    script = f"""
import sys, threading, zmqbus
start = lambda work: threading.Thread(target=work, daemon=True).start()
node = zmqbus.Node("short", bus={bus!r})
node.wait_for_subscribers("t", 1, 10)
for number in range(1, 20_001):
    node.publish("t", number)
{ENDINGS[ending]}
"""
    with zmqbus.Node("reader", bus=bus) as reader, reader.subscribe("t") as subscription:
        program = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stderr=subprocess.PIPE, text=True)
        try:
            received = 0
            while received < 20_000:
                message = subscription.get(BOUND_S)
                assert message is not None, f"{received} of 20000"
                received += 1
                assert message.value == message.seq == received
            _, errors = program.communicate(timeout=BOUND_S)
        finally:
            program.kill()
            program.communicate()
        assert program.returncode == {"sys.exit": 3, "an exception": 1}.get(ending, 0), errors
        assert subscription.lost == 0
        # Nothing else to say; but a thread that still publishes is told.
        last_line = {"an exception": "ValueError: on purpose", "the end, while a thread publishes": "NodeClosed"}
        assert last_line.get(ending, "") in (errors.splitlines() or [""])[-1]
        assert errors == "" or ending in last_line


def test_close_is_bounded_when_a_subscriber_is_stopped(bus: str, agents: Agents) -> None:
    stopped, good = agents.start(), agents.start()
    for agent, name in ((stopped, "stopped"), (good, "good")):
        agent.open(name, bus=bus)
        agent.ask("subscribe", node=name, ear="ear", patterns=["t"])
    node = zmqbus.Node("leaving", bus=bus)
    try:
        node.wait_for_subscribers("t", 2, BOUND_S)
        stopped.signal(signal.SIGSTOP)
        for number in range(1, 5_001):
            node.publish("t", number)
        began_at = time.monotonic()
        undelivered = node.close(timeout=1.0)
        assert time.monotonic() - began_at < 4.0  # the second asked for, and what closing itself takes
    finally:
        node.close()
        stopped.signal(signal.SIGCONT)
    assert [late.peer for late in undelivered] == ["stopped"]
    assert wait_exact(good, "t", 5_000)["lost"] == 0
    wait_exact(stopped, "t", 5_000)  # what it could still receive, and the rest as lost: nobody has it any more


def flood(agents: Agents, bus: str, seconds: float, size: int = 100, **options: int) -> int:
    """Of two subscribers one is stopped for so long, under 20,000 messages a second. Returns how many it lost."""
    publisher, stopped, quick = agents.start(), agents.start(), agents.start()
    publisher.open("publisher", bus=bus, **options)
    for agent, name in ((stopped, "stopped"), (quick, "quick")):
        agent.open(name, bus=bus)
        agent.ask("subscribe", node=name, ear="ear", patterns=["t"])
    publisher.ask("wait_for_subscribers", node="publisher", topic="t", n=2, timeout=20)
    publisher.ask("flow", node="publisher", topic="t", rate=20_000, size=size)
    wait_until(lambda: ranges(stopped.report(), "t") and ranges(quick.report(), "t"))
    stopped_after = publisher.ask("flowed", topic="t")
    stopped.signal(signal.SIGSTOP)
    time.sleep(seconds)  # the length of the stop
    stopped.signal(signal.SIGCONT)
    while_stopped = publisher.ask("flowed", topic="t") - stopped_after
    wait_until(lambda: ranges(stopped.report(), "t")[-1][1] > stopped_after + while_stopped)
    last = publisher.ask("stop_flow", topic="t")
    report = wait_exact(stopped, "t", last)
    untouched = wait_exact(quick, "t", last)
    if not options:
        assert untouched["lost"] == 0
    received = sum(to - since + 1 for since, to in ranges(report, "t"))
    assert received + report["lost"] == last
    print(
        f"{last} sent, {while_stopped} while stopped for {seconds} s; received {received}, of them repaired "
        f"{report['repaired']}, lost {report['lost']} in {len(report['gaps'])} ranges"
    )
    return int(report["lost"])


def test_a_subscriber_stopped_under_load_gets_everything_from_a_large_history(bus: str, agents: Agents) -> None:
    assert flood(agents, bus, 2.0) == 0


def test_a_subscriber_stopped_under_load_knows_what_a_small_history_lost(bus: str, agents: Agents) -> None:
    # 40 MB: more than the queues of both sides (4 MiB each) and what the kernel holds between them.
    assert flood(agents, bus, 2.0, size=1000, history_bytes=100_000) > 0


@pytest.mark.campaign
@pytest.mark.parametrize("seconds", [5.0, 12.0])  # the second is beyond the silence after which a peer counts as lost
def test_a_subscriber_stopped_for_longer_under_load_accounts_for_every_message(
    bus: str, agents: Agents, seconds: float
) -> None:
    assert flood(agents, bus, seconds) == 0
