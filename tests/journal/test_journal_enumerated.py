"""Crash states, all of them: every fate of each sector and name that was not synced, at every call of a small life.

Where simulation.py draws lots over long lives, nothing is left to chance here: the power is cut after each call, and
of n things that may or may not have reached the disk, all 2^n outcomes are tried (or, where they are too many, so many
drawn with a seed). Then the same during recovery, and during the recovery of that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from random import Random

import pytest
import test_journal_sabotage as sabotages
from checks import add, new_disk, start
from simulated_disk import PowerCut, SimulatedDisk
from simulation import Broken, Publisher, check_cursors, check_log

from zmqbus.errors import JournalCorrupt, JournalError
from zmqbus.journal import Cursor, Journal, journal, positions

STATES_MAX = 1024  # per cut: all of them up to ten things in the balance
SEED = int(os.environ.get("ZMQBUS_SEED", "1"))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 1400)
    monkeypatch.setattr(positions, "CURSOR_FILE_BYTES", 700)


class Fate(Random):
    """Answers each "did this one make it?" by one bit of a number, and counts the questions."""

    def __init__(self, bits: int) -> None:
        super().__init__(SEED)
        self.bits = bits
        self.asked = 0

    def random(self) -> float:
        self.asked += 1
        return 0.0 if self.bits >> (self.asked - 1) & 1 else 0.999

    def choice(self, options):
        return 0.5  # of the chances that a power cut has: none but the bits decide


def fates(disk: SimulatedDisk, most: int, rng: Random) -> Iterator[tuple[int, SimulatedDisk]]:
    """The states in which a power cut can leave a disk, each with the number that brings it about again."""
    count = with_fate(disk, 0)[1].asked
    everything = range(1 << count)
    for bits in everything if len(everything) <= most else (rng.getrandbits(count) for _ in range(most)):
        yield bits, with_fate(disk, bits)[0]


def with_fate(disk: SimulatedDisk, bits: int) -> tuple[SimulatedDisk, Fate]:
    before, disk._rng = disk._rng, (fate := Fate(bits))
    try:
        after = disk.power_cut()
    finally:
        disk._rng = before
    after._rng = Random(bits)  # the salts of files made from here on
    return after, fate


class World:
    """A disk, what was published, and what was promised."""

    def __init__(self) -> None:
        self.disk = new_disk(SEED)
        self.publishers = [Publisher(topic, 7) for topic in (b"logs.a", b"logs.b")]
        self.committed: dict[str, int] = {}
        self.uncertain: dict[str, int] = {}

    def live(self, call: int) -> bool:
        """A short life with everything in it, cut short when call number `call` has been made. True if it was."""
        self.disk.plan[call] = "cut"
        self.disk._rng = AfterCall(SEED)
        try:
            opened = start(self.disk, segment_bytes=1)
            for turn in range(1, 7):
                self.publish(opened, turn)
            opened.close(9)
        except PowerCut:
            return True
        return False

    def publish(self, opened: Journal, turn: int) -> None:
        publisher = self.publishers[turn % 2]
        for size in (300, 0) if turn % 3 else (1100,):  # within a sector, across two, or over three
            first = opened.expected(publisher.topic, 7)
            publisher.batches[first] = 2, b"%d" % first + bytes(range(256)) * 5, None
            count, payload, _ = publisher.batches[first]
            publisher.batches[first] = count, payload[: size + 2], None
            add(opened, publisher.topic, first, payload[: size + 2], count=2)
            opened.write(turn)  # on its own, so that the second may reach the disk without the first
        for stream in opened.commit(turn).acked:
            self.publisher(stream.topic).acked = stream.seq
        if turn % 2:
            self.uncertain["c"] = opened.durable_offset
            opened.commit_cursors({"c": Cursor(opened.durable_offset, b"state" * 10)})
            self.committed["c"] = opened.durable_offset

    def publisher(self, topic: bytes) -> Publisher:
        return next(p for p in self.publishers if p.topic == topic)

    def recover(self, disk: SimulatedDisk) -> Journal:
        """Open what a crash left, and check everything that was promised."""
        try:
            opened = start(disk, segment_bytes=1)
        except JournalCorrupt as error:
            raise Broken(f"a crash was taken for damage: {error}") from error
        check_log(opened, self.publishers, {})
        check_cursors(opened, self.committed, self.uncertain)
        return opened


class AfterCall(Random):
    """Decides that a cut comes after the call and not before it: before it is after the one before."""

    def random(self) -> float:
        return 0.999


def crashed_worlds() -> Iterator[tuple[int, World]]:
    """The power is cut after each call of the life, in turn; but for `open`, which has done nothing yet."""
    world = World()
    assert not world.live(0)
    for call in range(world.disk.calls):
        if (world := World()).live(call + 1):
            yield call + 1, world


def every_fate() -> tuple[int, int, int]:
    """All crash states of the small life. Returns how many: states, cuts, and cuts all states of which were tried."""
    states = cuts = whole = 0
    for call, world in crashed_worlds():
        cuts += 1
        whole += 1 << with_fate(world.disk, 0)[1].asked <= STATES_MAX
        for bits, disk in fates(world.disk, STATES_MAX, Random(SEED)):
            states += 1
            try:
                opened = world.recover(disk)
                add(opened, b"logs.new", 1, b"life goes on")
                opened.commit(1)
                publishers = [*world.publishers, new := Publisher(b"logs.new", 7)]
                new.batches[1], new.acked = (1, b"life goes on", None), 1
                check_log(start(disk.killed(), segment_bytes=1), publishers, {})
            except Exception as error:
                error.add_note(f"seed {SEED}, power cut after call {call}, fate {bits:#b}: {world.disk.trace[-3:]}")
                raise
    return states, cuts, whole


def test_every_fate_at_every_call() -> None:
    states, cuts, whole = every_fate()
    print(f"{states} crash states after {cuts} cuts, {whole} of them in full")
    assert states > 5000
    assert cuts > 60
    assert whole > cuts * 0.8, "most cuts should be enumerated in full"


@pytest.mark.parametrize(
    "sabotage",
    [
        sabotages.ack_before_sync,
        sabotages.no_directory_sync,
        sabotages.segment_header_not_synced,
        sabotages.cursor_not_synced,
        sabotages.durable_to_too_high,
        sabotages.cut_where_nothing_valid_follows,
    ],
)
def test_deliberate_bugs_are_seen(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises((Broken, JournalError)):
        every_fate()


def crash_recovery(world: World, disk: SimulatedDisk, depth: int, rng: Random, most: int, path: str) -> int:
    """Cut the power after each call of a recovery, and of the recovery of what that left, `depth` deep."""
    opened = 0
    call = 1
    while True:
        again, _ = with_fate(disk, (1 << 64) - 1)  # nothing is pending on a disk just powered up: this is a copy
        again.plan[call] = "cut"
        again._rng = AfterCall(SEED)
        try:
            world.recover(again)
        except PowerCut:
            for bits, left in fates(again, most, rng):
                where = f"{path}, then during recovery after call {call}, fate {bits:#b}"
                try:
                    world.recover(left.killed())
                except Exception as error:
                    error.add_note(f"seed {SEED}, {where}")
                    raise
                opened += 1
                if depth > 1 and rng.random() < 0.2:
                    left, _ = with_fate(again, bits)
                    opened += crash_recovery(world, left, depth - 1, rng, 2, where)
        else:
            if again.calls < call:
                return opened
        call += 1


@pytest.mark.parametrize("block", range(4))
def test_recovery_is_cut_short_again_and_again(block: int) -> None:
    rng = Random(SEED + block)
    states = 0
    for call, world in crashed_worlds():
        if call % 4 != block:
            continue
        left = [disk for _, disk in fates(world.disk, 4, rng)]
        states += crash_recovery(world, rng.choice(left), 3, rng, 3, f"after call {call}")
    assert states > 500
    print(f"{states} crash states")
