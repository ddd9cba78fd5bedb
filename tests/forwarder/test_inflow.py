"""What comes in, when something is amiss: a hole that nobody fills, a disk that is full, a journal that is broken."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarders import Running, seqs
from tests.node.conftest import eventually, on_loop
from zmqbus import Node
from zmqbus.errors import JournalError, JournalFailed, NoSpace, NotDurable
from zmqbus.forwarder.inflow import Inflow
from zmqbus.forwarder.ingest import Ingest
from zmqbus.journal import Journal
from zmqbus.node.engine import Engine
from zmqbus.node.receiving.intake import CALM
from zmqbus.node.storing.committer import Committer
from zmqbus.protocol.frames import Batch
from zmqbus.protocol.streams.stream import Gap


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


class Refusing:
    """As much of an `Ingest` as is needed to hear from the journal, again and again, that it takes nothing."""

    closed = None
    unknown = None

    def __init__(self, error: JournalError) -> None:
        self.error = error
        self.takes = 0

    def take(self, patience_ms: int) -> None:
        self.takes += 1
        raise self.error


class Bench:
    """An inflow of which nothing is real but itself, stopped by who is told of a failure."""

    def __init__(self, error: JournalError) -> None:
        self.loop = asyncio.new_event_loop()
        self.told: list[BaseException] = []
        self.events: list[object] = []
        self.pumped = 0
        journal = cast(Journal, SimpleNamespace(number=7, expected=None))
        engine = cast(Engine, SimpleNamespace(dispose=lambda ingest: None, emit=self.events.append))
        self.inflow = Inflow(journal, engine, [">"], self.loop, self.failed)
        self.inflow.committer = cast(
            Committer, SimpleNamespace(full=False, check_room=lambda: None, pump=lambda urgent: self.pump())
        )
        self.ingest = Refusing(error)
        self.inflow._ingest = cast(Ingest, self.ingest)

    def failed(self, error: BaseException) -> None:
        self.told.append(error)
        self.inflow.stop()

    def pump(self) -> None:
        self.pumped += 1


def test_a_broken_journal_is_the_end_however_much_waits_in_the_socket() -> None:
    """Who is told stops the inflow, which takes what has arrived first, and finds the journal broken once more."""
    bench = Bench(JournalFailed("write", "segment", 5, "Input/output error"))
    bench.inflow._drain()
    assert bench.ingest.takes == 1
    assert len(bench.told) == 1
    assert bench.inflow._ingest is None
    bench.loop.close()


def test_what_is_behind_a_stream_too_many_is_looked_at() -> None:
    bench = Bench(NoSpace("journal", "it keeps track of 2 streams already"))
    bench.inflow._drain()
    for _ in range(3):
        bench.loop.run_until_complete(asyncio.sleep(0))
    assert bench.ingest.takes >= 3
    assert bench.pumped == bench.ingest.takes  # what was taken before it
    assert len(bench.events) == 1
    assert not bench.told
    bench.loop.close()


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


def test_one_stream_too_many_does_not_stop_the_others(journal: Path, bus: str, forwarder: Running) -> None:
    with Node("publisher", bus=bus) as node:
        meet(node, "a", "b")
        store = forwarder.forwarder._store
        assert store is not None
        store._streams._streams_max = len(store.known)
        for number in range(50):
            node.publish("c", number)
            node.publish("a", number)
        for number in range(5):
            node.publish("c", number)
            node.publish("b", number, durable=True, timeout=SOON)
        with pytest.raises(NotDurable):
            node.publish("c", "in vain", durable=True, timeout=0.2)
        assert seqs(journal, "a", node.origin) == list(range(1, 52))
        assert not seqs(journal, "c", node.origin)


def test_a_publisher_that_is_back_before_it_is_forgotten_is_not_forgotten(
    journal: Path, bus: str, forwarder: Running
) -> None:
    """What is in the socket comes first, and so the forgetting may be late: nobody would ask for HEADS once more."""
    with Node("publisher", bus=bus) as node:
        meet(node, "a")
        ingest = forwarder.forwarder._inflow._ingest
        assert ingest is not None

        def forget_and_meet_again() -> None:
            ingest.forget(node.origin)
            ingest.heads(node.origin, [(b"a", 2)], False)

        on_loop(forwarder, forget_and_meet_again)
        eventually(lambda: on_loop(forwarder, lambda: not ingest._inbox and not ingest._afterwards))
        assert on_loop(forwarder, lambda: ingest.tracker.knows(node.origin))
        node.publish("a", "second", durable=True, timeout=SOON)
        assert seqs(journal, "a", node.origin) == [1, 2]


def test_what_waits_for_an_empty_socket_does_not_wait_for_a_silent_bus(bus: str, forwarder: Running) -> None:
    """A forwarder may never have a tenth of a second without a message; those who are gone are to be let go."""
    with Node("publisher", bus=bus) as node:
        meet(node, "a")
        ingest = forwarder.forwarder._inflow._ingest
        assert ingest is not None
        over, done = threading.Event(), threading.Event()

        def publish() -> None:
            while not over.wait(CALM / 10):
                node.publish("a", "x")

        publisher = threading.Thread(target=publish)
        publisher.start()
        try:
            on_loop(forwarder, lambda: ingest.when_drained(done.set))
            assert done.wait(SOON)
        finally:
            over.set()
            publisher.join()


def test_what_a_publisher_left_is_taken_before_it_is_forgotten(bus: str, forwarder: Running) -> None:
    """What becomes ready in the very moment in which its stream would be dropped."""
    ingest = forwarder.forwarder._inflow._ingest
    assert ingest is not None
    order: list[str] = []

    def drain() -> None:
        ingest._calm_mark, ingest._calm_at = ingest.messages, 0.0
        ingest._afterwards.append(lambda: order.append("forgotten"))
        ingest.tracker.ready.append(Gap("a", 0xDEAD, 1, 2))
        assert ingest._drained()
        order.append("taken")
        assert not ingest.take(0)

    on_loop(forwarder, drain)
    assert order == ["taken", "forgotten"]
    assert list(ingest.gaps) == [Gap("a", 0xDEAD, 1, 2)]


def test_an_inflow_that_cannot_subscribe_is_a_failure() -> None:
    """As when there is room again, but no file descriptor to be had: silence would look like health."""
    bench = Bench(JournalFailed("write", "segment", 5, "Input/output error"))

    async def attach(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    bench.inflow._ingest = None
    bench.inflow._engine.attach = attach  # type: ignore[method-assign, assignment]
    bench.loop.call_soon(bench.inflow.start)
    bench.loop.run_until_complete(asyncio.sleep(0.01))
    assert [str(error) for error in bench.told] == ["[Errno 24] Too many open files"]
    bench.loop.close()
