"""What comes in, when something is amiss: a hole that nobody fills, a disk that is full, a journal that is broken."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarders import Running, seqs
from tests.node.conftest import eventually, on_loop
from zmqbus import Node
from zmqbus.errors import JournalFailed, NoSpace
from zmqbus.forwarder.inflow import Inflow
from zmqbus.forwarder.ingest import Ingest
from zmqbus.journal import Journal
from zmqbus.node.engine import Engine
from zmqbus.protocol.frames import Batch


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


class Broken:
    """As much of an `Ingest` as is needed to find the journal broken, again and again."""

    closed = None
    takes = 0

    def take(self, patience_ms: int) -> None:
        self.takes += 1
        raise JournalFailed("write", "segment", 5, "Input/output error")


def test_a_broken_journal_is_the_end_however_much_waits_in_the_socket() -> None:
    """Who is told stops the inflow, which takes what has arrived first, and finds the journal broken once more."""
    loop = asyncio.new_event_loop()
    told: list[BaseException] = []

    def failed(error: BaseException) -> None:
        told.append(error)
        inflow.stop()

    inflow = Inflow(
        cast(Journal, SimpleNamespace(number=7, expected=None)),
        cast(Engine, SimpleNamespace(dispose=lambda ingest: None)),
        [">"],
        loop,
        failed,
    )
    ingest = Broken()
    inflow._ingest = cast(Ingest, ingest)
    inflow._drain()
    assert ingest.takes == 1
    assert len(told) == 1
    assert inflow._ingest is None
    loop.close()


def test_what_a_full_journal_refuses_is_not_taken_for_lost(journal: Path, bus: str, forwarder: Running) -> None:
    """Between the write that finds no room and the sync after it, more arrives."""
    with Node("publisher", bus=bus) as node:
        meet(node, "a")
        store, ingest = forwarder.forwarder._store, forwarder.forwarder._inflow._ingest
        assert store is not None
        assert ingest is not None
        stream = ingest.tracker.streams[b"a", node.origin]
        assert stream is not None
        parts = tuple(node._engine.outlet.publishers["a"].shelf.entries[0][2])

        def find_no_room() -> None:
            stream.next = stream.target = 3  # the second was refused
            store.full = NoSpace(store.storage, "for a test")
            try:
                with pytest.raises(NoSpace):
                    ingest._append(stream, Batch(b"a", 0, 1, node.origin, 3, 0, parts))
            finally:
                store.full = None
                stream.next = stream.target = 2

        on_loop(forwarder, find_no_room)
        assert not ingest.gaps
        node.publish("a", "second", durable=True, timeout=SOON)
        assert seqs(journal, "a", node.origin) == [1, 2]
