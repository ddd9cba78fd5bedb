"""What an idle node costs: hardly any wake-ups, little memory. In a process of its own, which nothing else disturbs.

Nor does mDNS: there it would hear the nodes of other tests come and go. What that costs, `tools/bench idle` measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WAKE_UPS_MAX = 40  # a second, by all of its threads
RSS_MAX = 60  # MiB
WINDOW = 2.0  # seconds

PROGRAMS = {
    "Node": """
with zmqbus.Node("idle", bus=bus, discovery="static") as node, node.subscribe("t.>") as subscription:
    node.publish("t.x", 1)
    assert subscription.get(10).value == 1
    report(time.sleep)
""",
    "AsyncNode": """
import asyncio
async def main():
    async with zmqbus.AsyncNode("idle", bus=bus, discovery="static") as node, node.subscribe("t.>") as subscription:
        await node.publish("t.x", 1)
        assert (await subscription.get(10)).value == 1
        waiting = asyncio.ensure_future(subscription.get())
        before = settled(), time.monotonic()
        await asyncio.sleep(WINDOW)
        print_since(*before)
        waiting.cancel()
asyncio.run(main())
""",
}
PROLOGUE = """
import json, resource, sys, time, zmqbus
bus, WINDOW = sys.argv[1], float(sys.argv[2])

def settled():
    return resource.getrusage(resource.RUSAGE_SELF)

def print_since(before, start):
    after, seconds = settled(), time.monotonic() - start
    rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wake_ups = (after.ru_nvcsw - before.ru_nvcsw) / seconds
    print(json.dumps({"wake_ups": wake_ups, "rss": rss / 1024, "cpu": cpu / seconds}))

def report(sleep):
    before = settled(), time.monotonic()
    sleep(WINDOW)
    print_since(*before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("face", PROGRAMS)
def test_an_idle_node_sleeps_and_is_small(bus: str, face: str) -> None:
    program = [sys.executable, "-c", PROLOGUE + PROGRAMS[face], bus, str(WINDOW)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    used = json.loads(ended.stdout)
    assert used["wake_ups"] < WAKE_UPS_MAX, used
    assert used["rss"] < RSS_MAX, used
    assert used["cpu"] < 0.1, used  # coarse: on a busy machine too
