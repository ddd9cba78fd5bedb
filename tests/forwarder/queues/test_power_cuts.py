"""Power cuts under a forwarder with queues: every job on the disk has a queue that knows of it, and nothing that a
worker was told to be done is to be done again.

The disk is the simulated one, which is harsher than any: what was not synced is there or not, sector by sector and name
by name. At every call that changes something it is copied as a cut would leave it, beside what was promised by then.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from simulated_disk import SimulatedDisk

from tests.forwarder.conftest import SOON
from tests.forwarder.forwarders import running
from tests.forwarder.queues.conftest import begin, worker_of
from tests.node.queues.raw_worker import Got
from zmqbus import Node
from zmqbus.forwarder.queues.backlog import Backlog
from zmqbus.forwarder.queues.kept import decode
from zmqbus.journal import Journal, Reader
from zmqbus.protocol.frames import QUEUED, Batch, decode_batches

JOURNAL = Path("/journal")
SMALL = 1 << 19  # bytes of the journal, so that it has several segments, and copies are small

Key = tuple[str, int]
"""Topic and seq."""


class Cut(NamedTuple):
    """What the disk would have kept of it, and what was confirmed to workers before."""

    disk: SimulatedDisk
    confirmed: frozenset[Key]


class RecordedDisk(SimulatedDisk):
    """Notes, before each call that changes something, what a power cut would leave. For several threads."""

    def __init__(self, rng: Random, confirmed: set[Key]) -> None:
        super().__init__(rng)
        self._lock = threading.RLock()
        self._confirmed = confirmed
        self.cuts: list[Cut] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def locked(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return found(*arguments, **options)

        return locked

    def _enter(self, operation: str, detail: str) -> str | None:
        if operation not in ("open", "list"):
            confirmed = frozenset(self._confirmed)
            self.cuts.append(Cut(self.power_cut(), confirmed))
        return super()._enter(operation, detail)


def work(disk: RecordedDisk, bus: str, rng: Random, confirmed: set[Key]) -> None:
    """Some lives of a forwarder, with workers that do some of what there is."""
    with Node("producer", bus=bus) as node:
        for life in range(2):
            with running(JOURNAL, bus=bus, bytes_max=SMALL) as forwarder, worker_of(forwarder) as worker:
                begin(worker, "jobs.*", "logs.>", credit=25 * (life + 1), offset=0)
                for number in range(12):
                    topic = f"jobs.{'abc'[number % 3]}" if life else "jobs.a"
                    node.push(topic, b"x" * rng.choice((10, 3000)), durable=not number % 3, timeout=SOON)
                    node.publish("logs.a", b"y" * 100, durable=True, timeout=SOON)
                    while worker._dealer.poll(3):
                        worker._next(0)
                    jobs: list[Got] = [job for job in worker.jobs if rng.random() < 0.6]
                    worker.jobs = [job for job in worker.jobs if job not in jobs]
                    if jobs:
                        assert worker.done(*jobs).refused == []
                        confirmed.update((job.topic, job.seq) for job in jobs)


def judge(cut: Cut) -> Counter[str]:
    """Everything that must hold after a cut."""
    journal = Journal.open(str(JOURNAL), now_ns=1, storage=cut.disk, segment_bytes=SMALL // 4)
    try:
        backlogs: dict[str, Backlog] = {}
        groups: list[Backlog] = []
        for name, cursor in journal.cursors.all().items():
            backlog = Backlog(decode(cursor.data), cursor.offset)
            assert backlog.name == name
            if backlog.team is None:
                backlogs[backlog.topic] = backlog
            else:
                groups.append(backlog)
        reader, counts = Reader(journal), Counter[str]()
        assert not reader.dropped
        while not reader.caught_up:
            for stored in reader.read():
                parts = [bytes(part) for part in (stored.frame, stored.external) if part is not None]
                (batch,) = decode_batches(parts)
                counts["messages"] += batch.count
                if batch.flags & QUEUED:
                    assert batch.topic.decode() in backlogs, f"{batch.topic!r} is no queue, and nobody will do its jobs"
                    look_for(cut, backlogs[batch.topic.decode()], stored.offset, batch, counts)
                else:
                    for group in groups:
                        if group.matches(batch.topic.decode()):
                            look_for(cut, group, stored.offset, batch, counts)
        reader.close()
        return counts
    finally:
        journal.close(1)


def look_for(cut: Cut, backlog: Backlog, offset: int, batch: Batch, counts: Counter[str]) -> None:
    """Of what is to be done nothing was confirmed."""
    for one in backlog.load(offset, batch):
        for index in range(batch.count):
            if not one.done >> index & 1:
                key = batch.topic.decode(), batch.first + index
                assert key not in cut.confirmed, f"{key} would be given out again"
                counts["to be done"] += 1


def test_a_power_cut_at_any_call(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    confirmed: set[Key] = set()
    disk = RecordedDisk(Random(seed), confirmed)
    with monkeypatch.context() as patch:
        real = Journal.open.__func__  # type: ignore[attr-defined]
        patch.setattr(
            Journal, "open", classmethod(lambda cls, path, **options: real(cls, path, storage=disk, **options))
        )
        work(disk, bus, Random(seed + 1), confirmed)
    assert len(confirmed) > 10
    first = min(number for number, cut in enumerate(disk.cuts) if "journal" in cut.disk._root.names)
    seen: Counter[str] = Counter()
    for number, cut in enumerate(disk.cuts[first:], first):
        try:
            seen += judge(cut)
        except Exception as error:
            error.add_note(f"cut {number}, seed {seed}: before {disk.trace[number : number + 1]}")
            raise
    assert len(disk.cuts) > 100
    assert seen["to be done"] > 100
