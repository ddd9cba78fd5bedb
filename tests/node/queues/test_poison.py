"""A message that kills whoever takes it."""

from __future__ import annotations

import subprocess
import sys

import zmqbus
from tests.node.conftest import eventually
from tests.node.queues.raw_worker import RawWorker
from zmqbus.protocol.commands import QueueFigures

WORKER = """
import os, sys, zmqbus
with zmqbus.Node("worker", bus=sys.argv[1], discovery="static", peers=[sys.argv[2]]) as node:
    for job in node.pull("jobs.a", credit=10):
        if job.value == "poison":
            os.kill(os.getpid(), 9)
        if job.value == "end":
            job.ack()
            break
        job.ack()
"""
NEIGHBOURS = 40


def figures(node: zmqbus.Node) -> QueueFigures:
    [found] = [one for one in node._engine.jobs.figures() if one.topic == "jobs.a"]
    return found


def test_poison_ends_as_a_dead_letter_and_takes_no_neighbour_with_it(bus: str) -> None:
    with zmqbus.Node("owner", bus=bus, discovery="static") as node:
        inbox = node.endpoints["inbox"]
        node.push_many("jobs.a", [*range(NEIGHBOURS // 2), "poison", *range(NEIGHBOURS // 2, NEIGHBOURS)])
        for _ in range(5):
            done = subprocess.run([sys.executable, "-c", WORKER, bus, inbox], timeout=60, check=False)
            assert done.returncode == -9
            eventually(lambda: not figures(node).in_flight)  # its end was noticed
        assert figures(node).dead == 1
        node.push("jobs.a", "end")
        subprocess.run([sys.executable, "-c", WORKER, bus, inbox], timeout=60, check=True)
        eventually(lambda: figures(node).done == NEIGHBOURS + 1)
        assert (figures(node).dead, figures(node).waiting) == (1, 0)
        with RawWorker(inbox, bus) as worker:
            worker.join("$dead.jobs.a", credit=100)
            (dead,) = worker.take(1)
            assert dead.value == "poison"
            assert dead.headers is not None
            assert dead.headers["$attempts"] == 5
            worker.done(dead)
            assert worker.gets_nothing()
