"""What comes in, when something is amiss: a hole that nobody fills, a disk that is full, a journal that is broken."""

from __future__ import annotations

import time
from pathlib import Path

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarders import Running
from tests.node.conftest import eventually, on_loop
from zmqbus import Node


def test_others_need_not_wait_while_a_hole_waits_for_its_publisher(journal: Path, bus: str, forwarder: Running) -> None:
    with Node("publisher", bus=bus) as node:
        meet(node, "a")
        ingest = forwarder.forwarder._inflow._ingest
        assert ingest is not None
        on_loop(forwarder, lambda: ingest.heads(0xDEAD, [(b"x", 5)], False))  # of one who is not there to be asked
        eventually(lambda: on_loop(forwarder, lambda: (ingest.timer() or 0.0) > time.monotonic() + 10))
        start = time.monotonic()
        for number in range(5):
            node.publish("a", number, durable=True, timeout=SOON)
        assert time.monotonic() - start < 5
