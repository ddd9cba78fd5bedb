"""Power cuts under a forwarder: what `flush` and `durable=True` had promised is in its journal, once and in order.

The disk, and what a cut of its power is, are those of tests/journal/kernel/power_cut.py. The publisher lives here and
is not cut off: what it knows is what it was told.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest
from history import Acked, Journaled, Line, Recorder, Sent, digest, parse
from history_checker import check
from power_cut import Cut, RecordedDisk, Recording, mounted

from tests.forwarder.forwarders import ForwarderProcess, stored
from zmqbus import Node
from zmqbus.journal import Journal

CUTS = 100
OPERATIONS = 1200  # writes and flushes of the disk
BYTES_MAX = 8 << 20  # of the journal, so that its segments are 2 MiB, and change; less than this is published
TOPICS = ("logs.a", "logs.b", "metrics.cpu")


class Publisher:
    """A node, and a record of what it published and was promised."""

    def __init__(self, node: Node, recorder: Recorder, rng: Random) -> None:
        self.node, self.recorder, self.rng = node, recorder, rng
        self.published = dict.fromkeys(TOPICS, 0)
        self.acked = dict.fromkeys(TOPICS, 0)
        self.bytes = 0

    def publish(self, topic: str, *, durable: bool) -> None:
        self.published[topic] = seq = self.published[topic] + 1
        value = f"{topic} {seq} " + "x" * self.rng.choice((0, 100, 3000, 20_000))
        self.recorder.record(Sent(topic, self.node.origin, seq, digest(value.encode())))
        assert self.node.publish(topic, value, durable=durable, timeout=30 if durable else None) == seq
        if durable:
            self.recorder.record(Acked(topic, self.node.origin, seq))
        self.bytes += len(value)

    def turn(self) -> None:
        """A few at once and a flush, or one that is waited for."""
        if self.rng.random() < 0.3:
            self.publish(self.rng.choice(TOPICS), durable=True)
            return
        for _ in range(self.rng.randint(1, 20)):
            self.publish(self.rng.choice(TOPICS), durable=False)
        self.node.flush(timeout=30)
        now = [topic for topic in TOPICS if self.published[topic] > self.acked[topic]]
        self.recorder.record(
            *(Acked(t, self.node.origin, self.published[t], self.acked[t] + 1) for t in now if self.published[t])
        )
        self.acked = dict(self.published)


def record(folder: Path, bus: str, seed: int) -> tuple[Recording, Path]:
    """Let a forwarder work on a recorded disk, and kill it."""
    history = folder / "publisher.jsonl"
    with RecordedDisk(folder) as disk:
        disk.watch(history)
        with (
            ForwarderProcess(disk.path / "journal", bus=bus, name="f", bytes_max=BYTES_MAX),
            Node("p", bus=bus) as node,
        ):
            publisher = Publisher(node, Recorder(history), Random(seed))
            publisher.publish(TOPICS[0], durable=True)  # returns once the forwarder has been found
            deadline = time.monotonic() + 60
            while len(disk) < OPERATIONS and publisher.bytes < BYTES_MAX * 0.7:
                assert time.monotonic() < deadline
                publisher.turn()
            recording = disk.recording()
    return recording, history


def judge(cut: Cut, folder: Path, history: Path) -> int:
    """Everything that must hold after one cut. Returns how many acks there had been."""
    with mounted(cut.image, folder) as path:
        Journal.open(str(path / "journal"), now_ns=1, segment_bytes=BYTES_MAX // 4).close(1)
        after = [
            Journaled(m.offset, m.topic, m.origin, m.seq, digest(m.value.encode())) for m in stored(path / "journal")
        ]
    lines = parse(cut.promised.get(history, b""), "publisher")
    report = check([*lines, *(Line(event, "journal", event.offset) for event in after)])
    report.raise_if_broken()
    return report.counts["acked"]


@pytest.mark.timeout(300)
def test_power_cuts_under_a_forwarder(tmp_path: Path, bus: str) -> None:
    seed = int(os.environ.get("ZMQBUS_SEED", "1"))
    recording, history = record(tmp_path, bus, seed)
    acks = []
    for cut in recording.cuts(seed, CUTS):
        try:
            acks.append(judge(cut, tmp_path, history))
        except Exception as error:
            (kept := tmp_path / "broken.ext4").write_bytes(cut.image)
            error.add_note(f"{cut.label}; {cut.unflushed} writes were not flushed; see {kept} and {history}")
            raise
    assert len(acks) == CUTS
    assert acks == sorted(acks)
    assert acks[CUTS // 2] > 20, "half of the cuts should come after many promises"
