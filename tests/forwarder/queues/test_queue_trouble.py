"""Queues on a disk that fails, is full, or is damaged: nothing is confirmed that is not so, and nothing is silent."""

from __future__ import annotations

import errno
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarder_checks import ask
from tests.forwarder.forwarders import Running, running, stored
from tests.forwarder.queues.conftest import begin, committed, figures, worker_of
from tests.node.conftest import eventually
from tests.node.queues.raw_worker import Got
from zmqbus import Forwarder, Node
from zmqbus.errors import JournalCorrupt, JournalFailed, NoSpace, NotDurable
from zmqbus.forwarder.queues import loading
from zmqbus.journal import Cursor, Journal
from zmqbus.journal.storage import Disk
from zmqbus.protocol import commands

SMALL = 400_000  # bytes of a journal that is soon full


def first(node: Node, queue: str) -> None:
    node.push(queue, "first", durable=True, timeout=SOON)


def test_a_disk_that_fails_confirms_nothing_and_is_the_end(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(node, "jobs.a")
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        (job,) = worker.take(1)

        def fail(disk: Disk, fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Disk, "fdatasync", fail)
            worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq)]))
            with pytest.raises(JournalFailed):
                forwarder.call(forwarder.forwarder.failed())
        assert not worker._dealer.poll(200)


def test_without_room_for_a_cursor_who_is_done_waits_and_is_told_then(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(node, "jobs.a")
    events = forwarder.forwarder.events()
    real, refusals = Journal.commit_cursors, [1, 2]

    def commit(journal: Journal, cursors: Any) -> None:
        if refusals:
            refusals.pop()
            raise NoSpace("journal", "for a test")
        real(journal, cursors)

    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        (job,) = worker.take(1)
        monkeypatch.setattr(Journal, "commit_cursors", commit)
        start = time.monotonic()
        assert worker.done(job).refused == []
        assert time.monotonic() >= start + 1.5
    assert sum("cannot be confirmed" in str(event) for event in events._events) == 1
    assert committed(forwarder)["$queue jobs.a"] == 1


class NoRoom:
    """A disk that once has no room for a cursor to be "set", or "forgotten". It says so when it may."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self.asked = Event()
        self.may_say = Event()
        self._real = Journal.commit_cursors

    def commit(self, journal: Journal, cursors: Any) -> None:
        kind = "forgotten" if None in cursors.values() else "set"
        if self._refusal == kind:
            self._refusal = ""
            self.asked.set()
            assert self.may_say.wait(SOON)
            raise NoSpace("journal", "for a test")
        self._real(journal, cursors)

    def of(self, monkeypatch: pytest.MonkeyPatch) -> NoRoom:
        """From now on."""
        monkeypatch.setattr(Journal, "commit_cursors", lambda journal, cursors: self.commit(journal, cursors))
        return self


FORGET = commands.Commit("$queue jobs.a", 0, forget=True)


def test_what_cannot_be_forgotten_for_want_of_room_stays_as_it_was(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(node, "jobs.a")
    for number in range(2, 6):
        node.push("jobs.a", number)
    node.flush(SOON)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=2)
        one, other = worker.take(2)
        worker.fail(one, delay_ms=0)
        worker.done(other)
        worker.say(commands.Leave(1))
    eventually(lambda: figures(forwarder, "jobs.a").workers == 0)
    disk = NoRoom("forgotten").of(monkeypatch)
    disk.may_say.set()
    refusal = ask(node, forwarder, FORGET)
    assert isinstance(refusal, commands.Error)
    assert (refusal.code, "for a test" in refusal.reason) == ("journal", True)
    assert "$queue jobs.a" in committed(forwarder)
    eventually(lambda: figures(forwarder, "jobs.a").waiting == 4)
    node.push("jobs.a", 6)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=10)
        jobs = sorted(worker.take(5), key=lambda job: job.seq)
        assert [(job.value, job.attempt) for job in jobs] == [("first", 2), (3, 1), (4, 1), (5, 1), (6, 1)]
        assert worker.gets_nothing()
        worker.done(*jobs)
        worker.say(commands.Leave(1))
    eventually(lambda: figures(forwarder, "jobs.a").workers == 0)
    assert ask(node, forwarder, FORGET) == FORGET
    assert "$queue jobs.a" not in committed(forwarder)


def test_who_comes_while_a_queue_is_forgotten_in_vain_finds_it_there(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(node, "jobs.a")
    disk = NoRoom("forgotten").of(monkeypatch)
    with ThreadPoolExecutor(1) as threads, worker_of(forwarder) as worker:
        asked = threads.submit(ask, node, forwarder, FORGET)
        assert disk.asked.wait(SOON)
        node.push("jobs.a", "second")  # nobody knows yet whether that is another queue
        inflow = forwarder.forwarder._inflow
        eventually(lambda: inflow._founding is not None)
        worker.join("jobs.a", credit=10)
        disk.may_say.set()
        assert isinstance(asked.result(SOON), commands.Error)
        assert [job.value for job in worker.take(2)] == ["first", "second"]
        assert worker.gets_nothing()


def test_a_group_that_is_forgotten_in_vain_is_joined_as_it_was(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(node, "logs.a")
    forget = commands.Commit("$group workers logs.>", 0, forget=True)
    with worker_of(forwarder) as worker:
        worker.join("logs.>", credit=1)
        eventually(lambda: forget.cursor in committed(forwarder))
        node.publish("logs.a", 1, durable=True, timeout=SOON)
        worker.take(1)
        worker.say(commands.Leave(1))
    eventually(lambda: figures(forwarder, "logs.>", "workers").workers == 0)
    disk = NoRoom("forgotten").of(monkeypatch)
    with ThreadPoolExecutor(1) as threads, worker_of(forwarder) as worker:
        asked = threads.submit(ask, node, forwarder, forget)
        assert disk.asked.wait(SOON)
        worker.join("logs.>", credit=10)
        queues = forwarder.forwarder._queues
        eventually(lambda: bool(queues._founding))
        disk.may_say.set()
        assert isinstance(asked.result(SOON), commands.Error)
        assert [job.value for job in worker.take(1)] == [1]
        node.publish("logs.a", 2, durable=True, timeout=SOON)
        assert [job.value for job in worker.take(1)] == [2]


def test_what_is_forgotten_while_there_is_no_room_stays_so(
    forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(node, "jobs.a")
    with ThreadPoolExecutor(1) as threads, worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        (job,) = worker.take(1)
        disk = NoRoom("set").of(monkeypatch)
        worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq)]))
        worker.say(commands.Leave(1))
        assert disk.asked.wait(SOON)
        eventually(lambda: figures(forwarder, "jobs.a").workers == 0)
        asked = threads.submit(ask, node, forwarder, FORGET)
        eventually(lambda: FORGET.cursor not in forwarder.forwarder._queues._stock.backlogs)
        disk.may_say.set()
        assert asked.result(SOON) == FORGET
        forwarder.call(forwarder.forwarder._queues._scribe.settle())  # it has tried again
        assert FORGET.cursor not in committed(forwarder)


def test_a_full_journal_has_room_again_when_jobs_are_done(journal: Path, bus: str, node: Node) -> None:
    """What was refused meanwhile comes again, and each job is given out once."""
    with running(journal, bus=bus, bytes_max=SMALL) as forwarder, worker_of(forwarder) as worker:
        first(node, "jobs.a")
        worker.join("jobs.a", credit=30)  # some are with it, and some loaded

        def push() -> None:
            while True:
                for _ in range(5):
                    node.push("jobs.a", b"x" * 2000)
                node.push("jobs.a", b"x" * 2000, durable=True, timeout=5)

        with pytest.raises(NotDurable, match="no room"):
            push()
        got: Counter[int] = Counter()
        credit = 30
        sent = node._publishers["jobs.a"].sent

        def is_done() -> bool:
            nonlocal credit
            while worker._dealer.poll(5):
                worker._next(0)
            jobs: list[Got] = worker.jobs
            worker.jobs = []
            got.update(job.seq for job in jobs)
            credit += len(jobs)
            worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq) for job in jobs], credit))
            return len(got) >= sent

        eventually(is_done, 60)
        assert got == Counter(range(1, sent + 1))
        node.flush(SOON)
        eventually(lambda: figures(forwarder, "jobs.a").waiting + figures(forwarder, "jobs.a").in_flight == 0)
        assert figures(forwarder, "jobs.a").redelivered == 0


def test_what_is_dropped_for_new_ones_is_told_of(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus, bytes_max=SMALL, on_full="drop_oldest") as forwarder:
        first(node, "jobs.a")
        events = forwarder.forwarder.events()
        for number in range(400):
            node.push("jobs.a", b"%2000d" % number)
        node.flush(SOON)
        kept = [message.seq for message in stored(journal, "jobs.a")]
        assert 1 < kept[0] < kept[-1] == 401
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=1000)
            jobs = worker.take(len(kept))
            assert [job.seq for job in jobs] == kept
            worker.done(*jobs)
        eventually(lambda: any("jobs.a: offsets 0 to" in str(event) for event in events._events))


def test_a_log_that_cannot_be_read_is_told_of(forwarder: Running, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    first(node, "jobs.a")
    events = forwarder.forwarder.events()

    def read(*_: object) -> None:
        raise JournalCorrupt("segment", 5, "for a test", 0)

    monkeypatch.setattr(loading, "_read", read)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        eventually(lambda: any("$queue jobs.a cannot go on" in str(event) for event in events._events))
        assert worker.gets_nothing()
        node.publish("logs.a", 1, durable=True, timeout=SOON)  # others are well


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("$queue jobs.a", b"junk"),
        ("$group g jobs.a", b"\xc0"),
        ("$queue a", bytes.fromhex("97a3612e2e a0900000c400c400")),
    ],
)
def test_a_cursor_that_makes_no_sense_is_damage(journal: Path, bus: str, name: str, data: bytes) -> None:
    made = Journal.open(str(journal), now_ns=1)
    made.commit_cursors({name: Cursor(0, data)})
    made.close(1)
    forwarder = Running(journal, bus=bus)
    with pytest.raises(JournalCorrupt, match="cursor"):
        forwarder.open()
    forwarder.close()
    Journal.open(str(journal), now_ns=1).close(1)  # it was let go of, and nothing was changed


def test_an_outbox_of_a_queue_is_handed_over(journal: Path, bus: str, tmp_path: Path) -> None:
    """What was pushed while there was no forwarder, by a program that has ended since."""
    with Node("producer", bus=bus, outbox=tmp_path / "outbox") as node:
        for number in range(10):
            node.push("jobs.a", number, durable=True, timeout=SOON)
    with (
        running(journal, bus=bus) as forwarder,
        Node("again", bus=bus, outbox=tmp_path / "outbox"),
        worker_of(forwarder) as worker,
    ):
        worker.join("jobs.a", credit=100)
        jobs = worker.take(10)
        assert [job.value for job in jobs] == list(range(10))
        worker.done(*jobs)
        assert worker.gets_nothing()


def test_a_group_through_a_journal_that_was_full(journal: Path, bus: str, node: Node) -> None:
    """Offsets that were refused are given to others: nobody takes the one for the other."""
    with running(journal, bus=bus, bytes_max=SMALL) as forwarder, worker_of(forwarder) as worker:
        meet(node, "logs.a")
        begin(worker, "logs.>", credit=10_000, offset=0)
        worker.done(*worker.take(1))

        def publish() -> None:
            while True:
                for _ in range(5):
                    node.publish("logs.a", b"x" * 2000)
                node.publish("logs.b", b"y" * 2000, durable=True, timeout=5)

        with pytest.raises(NotDurable, match="no room"):
            publish()
        sent = {topic: node._publishers[topic].sent for topic in ("logs.a", "logs.b")}
        got: Counter[tuple[str, int]] = Counter({("logs.a", 1): 1})

        def is_done() -> bool:
            while worker._dealer.poll(5):
                worker._next(0)
            jobs = worker.jobs
            worker.jobs = []
            got.update((job.topic, job.seq) for job in jobs)
            worker.say(commands.Done(1, [(job.delivery, job.seq, job.seq) for job in jobs]))
            return len(got) >= sum(sent.values())

        eventually(is_done, 60)
        assert got == Counter((topic, seq) for topic, last in sent.items() for seq in range(1, last + 1))


def test_a_forwarder_claims_no_more_than_it_can_say() -> None:
    topics = [f"t.{number}" for number in range(128)]
    assert len(Forwarder("x", topics=topics).claims) == 256
    assert Forwarder("x", topics=["x" * 250]).claims == ["x" * 250]
