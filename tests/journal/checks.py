"""Directed checks of single promises, each a function that raises `Broken`. Used by the tests, and by the sabotage
tests to show that a bug would not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from simulated_disk import SimulatedDisk
from simulation import PATH, Broken, Publisher, Simulation, check_log, read_all

from zmqbus.errors import JournalCorrupt, JournalFailed
from zmqbus.journal import Appended, Cursor, Journal, Reader, Retention, records
from zmqbus.journal.records import encode_record

Stored = tuple[bytes, int, int, bytes]
TOPIC = b"logs.a"


def new_disk(seed: int = 1) -> SimulatedDisk:
    disk = SimulatedDisk(Random(seed))
    disk.mkdir("/data")
    disk.sync_directory("/")
    return disk


def start(disk: SimulatedDisk, segment_bytes: int = 4096, **options) -> Journal:
    return Journal.open(PATH, now_ns=1, storage=disk, segment_bytes=segment_bytes, **options)


def add(journal: Journal, topic: bytes, first: int, payload: bytes, count: int = 1, origin: int = 7) -> None:
    if (got := journal.append(topic, origin, first, count, first, payload)) is not Appended.ACCEPTED:
        raise Broken(f"{topic!r} #{first}: {got}")


def crash_simulations(seeds: range, **options) -> None:
    """Everything simulation.py checks, over many seeds. Says which seed failed: `Simulation(seed).run()` replays."""
    for seed in seeds:
        try:
            Simulation(seed, **options).run()
        except (AssertionError, JournalCorrupt) as error:
            raise Broken(f"seed {seed}: {error}") from error


def acked_after_failed_sync() -> None:
    """After a failed fsync nothing is acknowledged that a power cut can take away."""
    disk = new_disk()
    journal = start(disk)
    add(journal, TOPIC, 1, b"x" * 3900)
    ticket = journal.write(1)
    disk.plan[disk.calls + 1] = "EIO"
    try:
        journal.sync(ticket)
        acked = journal.finish(ticket).acked
    except JournalFailed:
        acked = []
    expect_kept(disk, acked[-1].seq if acked else 0)


def expect_kept(disk: SimulatedDisk, seq: int) -> None:
    for _ in range(8):
        try:
            kept = start(disk.power_cut()).head(TOPIC, 7).durable
        except JournalCorrupt as error:
            raise Broken(f"a power cut was taken for damage: {error}") from error
        if kept < seq:
            raise Broken(f"#{seq} was acknowledged, #{kept} is left")


def recovered_after_failed_sync() -> None:
    """What a restart finds in the page cache only, it puts on disk before it calls it durable."""
    disk = new_disk()
    journal = start(disk)
    add(journal, TOPIC, 1, b"x" * 3900)
    ticket = journal.write(1)
    disk.plan[disk.calls + 1] = "EIO"
    try:
        journal.sync(ticket)
    except JournalFailed:
        disk = disk.killed()
        journal = start(disk)
        expect_kept(disk, journal.head(TOPIC, 7).durable)


def torn_tail_is_cut() -> None:
    """Intact records behind a torn one are never met again once something else has been written before them."""
    disk = new_disk()
    journal = start(disk)
    publishers = [Publisher(TOPIC, 7), Publisher(b"logs.b", 7)]
    for publisher, first in ((publishers[0], 1), (publishers[0], 2), (publishers[1], 1)):
        publisher.batches[first] = 1, b"%d" % first + publisher.topic, None
    add(journal, TOPIC, 1, publishers[0].batches[1][1])
    position = journal._writer.position
    add(journal, TOPIC, 2, publishers[0].batches[2][1])
    journal.write(1)
    name = journal.segments[0].name
    data = bytearray(disk.files(PATH)[name])
    data[position : position + 8] = bytes(8)  # the first of the two records did not reach the disk
    disk = disk.killed()
    disk.put(f"{PATH}/{name}", bytes(data))
    journal = start(disk)
    add(journal, b"logs.b", 1, publishers[1].batches[1][1])
    journal.commit(1)
    check_log(start(disk.killed()), publishers, {})


def torn_tail_is_quarantined() -> None:
    """Not one byte of a torn tail is thrown away."""
    disk = new_disk()
    journal = start(disk)
    add(journal, TOPIC, 1, b"first")
    journal.commit(1)
    end = journal._writer.position
    add(journal, TOPIC, 2, b"torn off")
    journal.write(1)
    name = journal.segments[0].name
    data = bytearray(disk.files(PATH)[name])
    data[end + 1] ^= 1
    tail = bytes(data[end:]).rstrip(b"\0")
    disk = disk.killed()
    disk.put(f"{PATH}/{name}", bytes(data))
    journal = start(disk)
    if journal.head(TOPIC, 7).durable != 1:
        raise Broken("the good record before the torn one is gone")
    kept = disk.files(PATH + "/quarantine") if "quarantine" in disk.list(PATH) else {}
    if list(kept.values()) != [tail] or len(journal.quarantined) != 1:
        raise Broken(f"the torn tail is not in quarantine: {kept}")


def payload_cannot_pose_as_record() -> None:
    """A record of another journal, stored as a payload, has no say in whether a tail is torn or corrupt."""
    disk = new_disk()
    journal = start(disk)
    for salt in (0, 1):  # whatever a bug might seed its checksums with
        forged = encode_record(salt, topic=b"x", base_offset=1, count=1, durable_to=1 << 40, payload=(b"y",))
        aligned = bytes(-(64 + len(TOPIC) + 1) % 8) + forged
        add(journal, TOPIC, 1 + salt, aligned)
    journal.write(1)
    name = journal.segments[0].name
    data = bytearray(disk.files(PATH)[name])
    data[journal.segments[0].header.data_start] ^= 1  # the first record is torn, its payload is not
    disk = disk.killed()
    disk.put(f"{PATH}/{name}", bytes(data))
    try:
        start(disk)
    except JournalCorrupt as error:
        raise Broken(f"a payload was believed: {error}") from error


def build_fixture() -> tuple[SimulatedDisk, list[Stored]]:
    """A small, cleanly closed journal of several segments, and what must be read from it."""
    disk = new_disk()
    journal = start(disk, segment_bytes=1)
    expected: list[Stored] = []
    for n in range(9):
        topic = (b"logs.a", b"logs.b")[n % 2]
        payload = b"message %d" % n
        add(journal, topic, 1 + 2 * (n // 2), payload, count=2)
        expected.append((topic, 7, 1 + 2 * (n // 2), payload))
        journal.commit(n)
    journal.commit_cursors({"one": Cursor(4, b"state")})
    journal.commit_cursors({"two": Cursor(14)})
    journal.close(9)
    if len(journal.segments) < 3:
        raise Broken("the fixture should have three segments")
    return disk.killed(), expected


def read_damaged(disk: SimulatedDisk) -> tuple[list[Stored], JournalCorrupt | None]:
    """All that can be read, and the refusal that ended it."""
    got: list[Stored] = []
    try:
        journal = start(disk, segment_bytes=1)
        for batch in read_all(journal):
            got += [(batch.topic, batch.origin, batch.first_seq, bytes(batch.payload))]
    except JournalCorrupt as error:
        return got, error
    return got, None


def damaged_copy(files: dict[str, bytes], cursors: dict[str, bytes], name: str, data: bytes) -> SimulatedDisk:
    """A disk with the files of a fixture, one of them changed."""
    disk = new_disk()
    for folder in (PATH, PATH + "/cursors"):
        disk.mkdir(folder)
    for path, contents in {**files, **{f"cursors/{n}": c for n, c in cursors.items()}, name: data}.items():
        disk.put(f"{PATH}/{path}", contents)
    return disk


def flips(step: int = 1, first: int = 0) -> None:
    """Flip each bit of every segment: all messages come back, or a refusal names the file and a place before it."""
    disk, expected = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    for name in [name for name in files if name.endswith(".zbj")]:
        for bit in range(first, len(files[name]) * 8, step):
            data = bytearray(files[name])
            data[bit // 8] ^= 1 << bit % 8
            got, refusal = read_damaged(damaged_copy(files, cursors, name, bytes(data)))
            expect_prefix(got, expected, f"{name}, bit {bit}")
            if refusal is None:
                if got != expected:
                    raise Broken(f"{name}, bit {bit}: {len(expected) - len(got)} durable batches vanished silently")
            elif not refusal.path.endswith(name) or refusal.position > bit // 8:
                raise Broken(f"{name}, bit {bit}: the refusal names another place: {refusal}")


def expect_prefix(got: list[Stored], expected: list[Stored], where: str) -> None:
    if got != expected[: len(got)]:
        raise Broken(f"{where}: wrong messages: {got}")


def retention_respects_cursors() -> None:
    disk = new_disk()
    journal = start(disk, retention=Retention(bytes_max=8192, age_max_ns=1))
    add(journal, TOPIC, 1, b"precious")
    journal.commit(1)
    journal.commit_cursors({"slow": Cursor(0)})
    for seq in range(2, 40):
        try:
            add(journal, TOPIC, seq, bytes(500))
        except Exception:
            break
        journal.commit(seq * 1000)
    journal.delete(journal.retire(1 << 60))
    if next(read_all(journal)).offset != 0:
        raise Broken("retention removed what a cursor had not passed")


def readers_see_durable_only() -> None:
    disk = new_disk()
    journal = start(disk)
    reader = Reader(journal)
    add(journal, TOPIC, 1, b"not yet")
    ticket = journal.write(1)
    if reader.read():
        raise Broken("a reader saw what is not on disk")
    journal.sync(ticket)
    if reader.read():
        raise Broken("a reader saw what is not acknowledged")
    journal.finish(ticket)
    if len(reader.read()) != 1:
        raise Broken("a reader does not see what is on disk")


Check = Callable[[], None]
DIRECTED: list[Check] = [
    acked_after_failed_sync,
    recovered_after_failed_sync,
    torn_tail_is_cut,
    torn_tail_is_quarantined,
    payload_cannot_pose_as_record,
    retention_respects_cursors,
    readers_see_durable_only,
]
assert records.FORMAT_VERSION == 1  # a new version needs a fixture of the old one
