"""Promises of durable messaging, each as a check that takes a moment: forwarders on threads of this process.

    check(place)              # passes; with a deliberate bug switched on (test_sabotage.py) it raises AssertionError

Where a check needs the disk to be slow, or a frame or an answer to get lost, it sees to that itself, and exactly: with
a `Gate` before the disk's sync, at the publisher's socket, or at what is sent back. Nothing is left to chance.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.conftest import SOON, claims, meet, on
from tests.forwarder.forwarders import Running, running, seqs, stored
from tests.node.conftest import cursors, drain, eventually, known_to, publish
from zmqbus import Node, NotDurable
from zmqbus.errors import WaitTimeout
from zmqbus.journal.storage import Disk
from zmqbus.node.storing import committer
from zmqbus.protocol import commands
from zmqbus.protocol.streams import tracking

NEVER = 0.5  # seconds in which nothing that must not happen would fail to


class Place:
    """A bus of its own, and a folder for journals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal"
        self.bus = f"test-{secrets.token_hex(6)}"

    def node(self, **options: Any) -> Node:
        return Node("publisher", bus=self.bus, **options)

    @contextlib.contextmanager
    def both(self, **options: Any) -> Iterator[tuple[Running, Node]]:
        """A forwarder and a publisher which has published the first message on topic "a"."""
        with running(self.journal, bus=self.bus) as forwarder, self.node(**options) as node:
            meet(node, "a")
            yield forwarder, node


class Gate:
    """Before the sync of every disk of this process: closed, nothing gets there; `let_through` says how many may."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.waiting = 0

    def let_through(self, count: int) -> None:
        for _ in range(count):
            self._passes.release()

    def _sync(self, real: Callable[[Disk, int], None], disk: Disk, fd: int) -> None:
        self.waiting += 1
        assert self._passes.acquire(timeout=SOON)
        self.waiting -= 1
        real(disk, fd)

    @classmethod
    @contextlib.contextmanager
    def closed(cls) -> Iterator[Gate]:
        gate = cls()
        real = Disk.fdatasync
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(committer, "QUICK_SYNCS", 1 << 60)  # the forwarder's loop itself must not wait here
            patch.setattr(Disk, "fdatasync", lambda disk, fd: gate._sync(real, disk, fd))
            try:
                yield gate
            finally:
                gate.let_through(1000)


@contextlib.contextmanager
def unheard(node: Node) -> Iterator[None]:
    """What this node publishes meanwhile does not arrive."""
    broadcast = node._engine.outlet.broadcast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broadcast, "send", lambda parts, hurry: None)
        yield


@contextlib.contextmanager
def told_nothing(forwarder: Running) -> Iterator[None]:
    """No acknowledgement of this forwarder arrives meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwarder.forwarder._inflow, "_link", lambda origin: None)
        yield


def ask(node: Node, forwarder: Running, question: commands.Body) -> commands.Body:
    """Send a command, and return the answer."""

    async def asked() -> commands.Body:
        link = node._engine.peering.links[forwarder.forwarder.origin]
        answer = await link.question(question, 5.0)
        assert answer is not None
        return answer.body

    return asyncio.run_coroutine_threadsafe(asked(), node._loop).result(SOON)


# --- acknowledgements ------------------------------------------------------------------------------


def nobody_is_told_before_the_sync(place: Place) -> None:
    with place.both() as (_, node), Gate.closed() as gate:
        with pytest.raises(NotDurable):
            node.publish("a", "x", durable=True, timeout=NEVER)
        with pytest.raises(NotDurable):
            node.flush(timeout=0.1)
        gate.let_through(1000)
        node.flush(timeout=SOON)


def who_waits_is_told_of_its_own_message(place: Place) -> None:
    """And not when one before it is on disk."""
    with place.both() as (forwarder, node), Gate.closed() as gate, ThreadPoolExecutor(2) as threads:
        first = on(threads, node.publish, "a", "x", durable=True, timeout=SOON)
        eventually(lambda: gate.waiting == 1)
        second = on(threads, node.publish, "a", "y", durable=True, timeout=SOON)
        journal = forwarder.forwarder._store
        assert journal is not None
        eventually(lambda: journal.next_offset == 3)  # it came, and its turn is the next
        gate.let_through(1)
        first.result(SOON)
        eventually(lambda: gate.waiting == 1)
        with pytest.raises(TimeoutError):
            second.result(NEVER)
        gate.let_through(1)
        second.result(SOON)


def a_lost_acknowledgement_is_given_again(place: Place) -> None:
    with place.both() as (forwarder, node):
        with told_nothing(forwarder):
            node.publish("a", "x")
            eventually(lambda: seqs(place.journal, "a", node.origin) == [1, 2])
            with pytest.raises(NotDurable):
                node.flush(timeout=0.2)
        node.flush(timeout=2.5)


def as_many_forwarders_as_are_wanted_have_it(place: Place) -> None:
    with (
        running(place.journal, bus=place.bus),
        running(place.path / "other", bus=place.bus, topics=["b"]),
        place.node(acks=2) as node,
    ):
        node.publish("a", "x")
        eventually(lambda: claims(node, "a") == 1)
        with pytest.raises(NotDurable):
            node.publish("a", "y", durable=True, timeout=NEVER)
        eventually(lambda: seqs(place.journal, "a", node.origin) == [1, 2])


# --- what is journaled -----------------------------------------------------------------------------


def a_stream_goes_on_after_a_restart(place: Place) -> None:
    with place.node() as node:
        for _ in range(3):
            with running(place.journal, bus=place.bus):
                for number in range(10):
                    node.publish("a", number)
                eventually(lambda: claims(node, "a") == 1)
                assert node.publish("a", "x", durable=True, timeout=SOON)
        assert seqs(place.journal, "a", node.origin) == list(range(1, 34))


def what_follows_a_hole_waits_for_it(place: Place) -> None:
    with place.both() as (_, node):
        with unheard(node):
            node.publish("a", "lost on the way")
        node.publish("a", "x", durable=True, timeout=SOON)
        assert seqs(place.journal, "a", node.origin) == [1, 2, 3]


def a_publisher_that_does_not_answer_is_waited_for(place: Place) -> None:
    """For longer than any other subscriber would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "PATIENCE", 0.1)
        patch.setattr(tracking, "FETCH_TIMEOUT", 0.01)
        with place.both() as (_, node):
            with pytest.MonkeyPatch.context() as silence:
                silence.setattr(node._engine._service, "_inbox", Silence())
                with unheard(node):
                    node.publish("a", "lost on the way")
                node.publish("a", "x")
                with pytest.raises(NotDurable):
                    node.flush(timeout=1.5)
                assert seqs(place.journal, "a", node.origin) == [1]
            node.flush(timeout=SOON)
        assert seqs(place.journal, "a", node.origin) == [1, 2, 3]


class Silence:
    """An inbox whose answers do not arrive."""

    def answer(self, *_: object) -> bool:
        return True


def what_is_not_acknowledged_stays_in_the_history(place: Place) -> None:
    with place.node(history_bytes=10_000) as node:
        with running(place.journal, bus=place.bus):
            meet(node, "a")
        for number in range(200):
            node.publish("a", b"%500d" % number)
        with running(place.journal, bus=place.bus):
            with contextlib.suppress(NotDurable):
                node.flush(timeout=5.0)
            assert seqs(place.journal, "a", node.origin) == list(range(1, 202))


# --- the log ---------------------------------------------------------------------------------------


def only_what_is_on_disk_is_read(place: Place) -> None:
    with place.both() as (forwarder, node), Node("reader", bus=place.bus) as reader:
        known_to(reader)
        before = reader.subscribe("a", start="first")
        drain(before, 1)
        journal = forwarder.forwarder._store
        assert journal is not None
        with Gate.closed() as gate:
            node.publish("a", "x")
            eventually(lambda: gate.waiting == 1)
            after = reader.subscribe("a", start="first")
            assert drain(after, 1)[0].seq == 1
            assert after.get(NEVER) is None
            assert before.get(0) is None
            gate.let_through(1)
            assert (drain(before, 1)[0].seq, drain(after, 1)[0].seq) == (2, 2)


def what_a_consumer_has_in_hand_comes_again(place: Place) -> None:
    with place.both() as (forwarder, node), Node("reader", bus=place.bus) as reader:
        publish(node, "a", range(20))
        known_to(reader)

        def stumble() -> None:
            with reader.subscribe("a", durable="name", start="first") as subscription:
                assert [message.seq for message in drain(subscription, 5)] == [1, 2, 3, 4, 5]
                raise KeyError

        with pytest.raises(KeyError):
            stumble()
        assert cursors(forwarder) == {"name": 4}
        assert drain(reader.subscribe("a", durable="name"), 1)[0].seq == 5


def a_commit_is_confirmed_when_it_is_on_disk(place: Place) -> None:
    with place.both(), Node("reader", bus=place.bus) as reader:
        known_to(reader)
        subscription = reader.subscribe("a", durable="name", start="first")
        drain(subscription, 1)
        with Gate.closed() as gate:
            with pytest.raises(WaitTimeout):
                subscription.commit(NEVER)
            gate.let_through(1000)
            subscription.commit(SOON)


def who_has_been_taken_over_commits_nothing(place: Place) -> None:
    """Not even if it has not heard of it yet."""
    with (
        place.both() as (forwarder, node),
        Node("old", bus=place.bus) as old,
        Node("new", bus=place.bus) as new,
    ):
        publish(node, "a", range(20))
        known_to(old, new)
        stale = old.subscribe("a", durable="name", start="first")
        drain(stale, 10)
        number = stale._replay.readings[0].number  # type: ignore[attr-defined]
        fresh = new.subscribe("a", durable="name")
        drain(fresh, 3)
        fresh.commit(SOON)
        assert cursors(forwarder) == {"name": 3}
        answer = ask(old, forwarder, commands.Commit("name", 10, number))
        assert isinstance(answer, commands.Error)
        assert answer.code == "taken"
        assert cursors(forwarder) == {"name": 3}
        fresh.close()


def a_reader_takes_no_commit_back(place: Place) -> None:
    """It may be one that was taken over, did not hear of it because the forwarder was killed, and has read on."""
    with place.both() as (forwarder, node), Node("reader", bus=place.bus) as reader:
        publish(node, "a", range(20))
        known_to(reader)
        subscription = reader.subscribe("a", durable="name", start="first")
        drain(subscription, 10)
        subscription.commit(SOON)
        number = subscription._replay.readings[0].number  # type: ignore[attr-defined]
        late = commands.Commit("name", 3, number)
        assert ask(reader, forwarder, late) == late
        assert cursors(forwarder) == {"name": 10}
        subscription.close()
        back = commands.Commit("name", 3)  # somebody who reads nothing may well do that
        assert ask(reader, forwarder, back) == back
        assert cursors(forwarder) == {"name": 3}


def a_reading_begins_at_its_cursor(place: Place) -> None:
    with place.both() as (forwarder, node), Node("reader", bus=place.bus) as reader:
        publish(node, "a", range(20))
        known_to(reader)
        with reader.subscribe("a", durable="name", start="first") as subscription:
            drain(subscription, 5)
        assert cursors(forwarder) == {"name": 5}
        assert drain(reader.subscribe("a", durable="name", start="first"), 1)[0].offset == 5


# --- the outbox ------------------------------------------------------------------------------------


def the_outbox_keeps_what_is_not_delivered(place: Place) -> None:
    outbox = place.path / "outbox"
    with place.node(outbox=outbox) as node:
        origin = node.origin
        for number in range(10):
            node.publish("a", number, durable=True, timeout=SOON)
    with place.node(outbox=outbox) as node:
        assert node.statistics()["outbox_undelivered"] == 10
        with running(place.journal, bus=place.bus):
            eventually(lambda: seqs(place.journal, "a", origin) == list(range(1, 11)))
            eventually(lambda: node.statistics()["outbox_undelivered"] == 0)


def the_outbox_says_durable_when_it_is(place: Place) -> None:
    with place.node(outbox=place.path / "outbox") as node:
        node.publish("a", "x", durable=True, timeout=SOON)
        with Gate.closed() as gate:
            with pytest.raises(NotDurable):
                node.publish("a", "y", durable=True, timeout=NEVER)
            gate.let_through(1000)
            node.flush(SOON)
        assert len(stored(place.path / "outbox")) == 2


CHECKS: list[Callable[[Place], None]] = [
    nobody_is_told_before_the_sync,
    who_waits_is_told_of_its_own_message,
    a_lost_acknowledgement_is_given_again,
    as_many_forwarders_as_are_wanted_have_it,
    a_stream_goes_on_after_a_restart,
    what_follows_a_hole_waits_for_it,
    a_publisher_that_does_not_answer_is_waited_for,
    what_is_not_acknowledged_stays_in_the_history,
    only_what_is_on_disk_is_read,
    what_a_consumer_has_in_hand_comes_again,
    a_commit_is_confirmed_when_it_is_on_disk,
    who_has_been_taken_over_commits_nothing,
    a_reader_takes_no_commit_back,
    a_reading_begins_at_its_cursor,
    the_outbox_keeps_what_is_not_delivered,
    the_outbox_says_durable_when_it_is,
]
