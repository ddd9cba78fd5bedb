"""Damage met by every way of reading: never a wrong message, and a refusal names a file and a place.

test_journal_damage.py damages files and reads all of them from the start. Here the fixture has batches of every shape
(empty, large, with a second frame), readers filter, seek, fetch and look for a time, whole sectors are lost or land
in the wrong place, and files rot under a journal that is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest
import test_journal_sabotage as sabotages
from checks import PATH, add, damaged_copy, new_disk, start
from simulated_disk import SECTOR, SimulatedDisk
from simulation import read_all

from zmqbus.errors import JournalCorrupt, JournalError
from zmqbus.journal import Batch, Cursor, Journal, Reader, fetch, find_time, journal

A, B, C = b"logs.a", b"logs.b", b"metrics.cpu"
Whole = tuple[bytes, int, int, int, int, bytes, bytes | None]


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 700)


def whole(batch: Batch) -> Whole:
    external = None if batch.external is None else bytes(batch.external)
    return batch.topic, batch.origin, batch.first_seq, batch.count, batch.time_ns, bytes(batch.payload), external


def build() -> tuple[SimulatedDisk, list[Whole]]:
    """A closed journal of several segments, and all that is in it, in order."""
    disk = new_disk()
    opened = start(disk, segment_bytes=1)
    rng = Random(1)
    for n in range(14):
        topic, count = (A, B, C)[n % 3], 1 + n % 4
        payload = rng.randbytes((0, 40, 150, 600)[n % 4])
        external = rng.randbytes(70) if n % 5 == 1 else None
        opened.append(topic, 7, opened.expected(topic, 7), count, 100 + n, payload, external)
        if n % 2:
            opened.commit(n)
    opened.commit(20)
    expected = [whole(batch) for batch in read_all(opened)]
    opened.close(20)
    assert len(opened.segments) >= 4
    return disk.killed(), expected


def ways(opened: Journal) -> Iterator[tuple[str, list[Whole]]]:
    """Everything that can be read, in each way there is. A way that is refused yields what it got before."""
    for label, topics in (("all", None), ("filtered", {B}), ("two topics", {A, C})):
        got: list[Whole] = []
        reader = Reader(opened, 0, None if topics is None else topics.__contains__)
        try:
            while not reader.caught_up:
                got += map(whole, reader.read(500))
        except JournalCorrupt as error:
            expect_place(error, PATH)
        finally:
            reader.close()
        yield label, got
    for first, last in ((1, 99), (3, 5)):
        try:
            yield f"fetch {first} to {last}", [whole(batch) for batch in fetch(opened, A, 7, first, last)]
        except JournalCorrupt as error:
            expect_place(error, PATH)
    try:
        offset = find_time(opened, 107)
        reader = Reader(opened, offset)
        yield "by time", [whole(batch) for batch in reader.read(1)]
        reader.close()
    except JournalCorrupt as error:
        expect_place(error, PATH)


def expect_place(error: JournalCorrupt, folder: str, names: tuple[str, ...] = ("",), position: int = 1 << 40) -> None:
    """A refusal names one of these files, and a place in it not after the damage."""
    assert error.path.startswith(folder)
    assert error.path.endswith(names), error
    assert error.position <= position, error


def expect_true(opened: Journal, expected: list[Whole], where: str) -> None:
    """Whatever is read was stored, in its order, without anything left out in between."""
    for label, got in ways(opened):
        assert all(batch in expected for batch in got), f"{where}, {label}: a wrong message"
        topics = {batch[0] for batch in got}
        wanted = [batch for batch in expected if label in ("all", "by time") or batch[0] in topics]
        if got:
            at = wanted.index(got[0])
            assert got == wanted[at : at + len(got)], f"{where}, {label}: a message is missing in between"
            assert at == 0 or label not in ("all", "filtered", "two topics"), f"{where}, {label}: the start is missing"


def segments(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".zbj"))


def judge(files: dict[str, bytes], cursors: dict[str, bytes], name: str, data: bytes, expected: list[Whole]) -> bool:
    """Whether a damaged journal opened; if it did, it must tell the truth."""
    disk = damaged_copy(files, cursors, name, data)
    try:
        opened = start(disk, segment_bytes=1)
    except JournalCorrupt as error:
        expect_place(error, PATH, (name, segments(files)[-1]), len(data))
        return False
    expect_true(opened, expected, name)
    return True


def test_the_undamaged_fixture_reads_in_every_way() -> None:
    disk, expected = build()
    opened = start(disk, segment_bytes=1)
    got = dict(ways(opened))
    assert got["all"] == expected
    assert got["filtered"] == [batch for batch in expected if batch[0] == B]
    assert got["fetch 1 to 99"] == [batch for batch in expected if batch[0] == A]
    assert got["by time"][0][4] == 107
    assert len(got) == 6


def test_one_bit_of_every_byte() -> None:
    """Another one from byte to byte; all eight of them in test_journal_damage.py, read from the start."""
    disk, expected = build()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    opened = total = 0
    for name in segments(files):
        for at in range(len(files[name])):
            data = bytearray(files[name])
            data[at] ^= 1 << (bit := at * 5 % 8)
            total += 1
            try:
                opened += judge(files, cursors, name, bytes(data), expected)
            except AssertionError as error:
                error.add_note(f"{name}, byte {at}, bit {bit}")
                raise
    assert 0 < opened < total


def test_sectors_lost_misplaced_and_from_another_time() -> None:
    """What disks do beyond flipping bits: a sector reads as zeros, as another one, or as random bytes."""
    disk, expected = build()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    names = segments(files)
    rng = Random(2)
    cases = 0
    for name in names:
        data = files[name]
        for at in range(0, len(data), 8):  # records begin at multiples of 8: also damage that keeps to their limits
            end = min(at + SECTOR, len(data))
            other = files[rng.choice(names)]
            start_at = rng.randrange(0, max(len(other) - (end - at), 1), 8)
            for piece in (bytes(end - at), other[start_at : start_at + end - at], rng.randbytes(end - at)):
                if len(piece) == end - at and piece != data[at:end]:
                    judge(files, cursors, name, data[:at] + piece + data[end:], expected)
                    cases += 1
    assert cases > 500


def test_rot_under_an_open_journal() -> None:
    """Bytes that change after the journal was opened: readers raise, and hand out nothing else."""
    disk, expected = build()
    names = segments(disk.files(PATH))
    raised = 0
    for name in names:
        for at in range(0, len(disk.files(PATH)[name]), 7):
            copy = damaged_copy(disk.files(PATH), disk.files(PATH + "/cursors"), "LOCK", b"")
            opened = start(copy, segment_bytes=1)
            inode = copy._folder(PATH).names[name]
            inode.cache[at] ^= 0x10
            expect_true(opened, expected, f"{name}, byte {at}")
            got: list[Whole] = []
            try:
                got += [whole(batch) for batch in read_all(opened)]
            except JournalCorrupt as error:
                raised += 1
                expect_place(error, PATH, (name,), at)
            else:
                assert got == expected, f"{name}, byte {at}: damage was passed over"
    assert raised > 100


def test_writing_goes_on_beside_damage_that_a_reader_meets() -> None:
    """A rotten segment stops whoever reads it; acknowledging and reading elsewhere go on."""
    disk, _ = build()
    name = segments(disk.files(PATH))[1]
    opened = start(disk, segment_bytes=1)
    inode = disk._folder(PATH).names[name]
    inode.cache[opened.segments[1].header.data_start + 70] ^= 1
    with pytest.raises(JournalCorrupt):
        list(read_all(opened))
    add(opened, b"logs.new", 1, b"x")
    assert opened.commit(30).acked[0].seq == 1
    opened.commit_cursors({"c": Cursor(opened.durable_offset)})
    assert [batch.topic for batch in read_all(opened, opened.durable_offset - 1)] == [b"logs.new"]
    reader = Reader(opened, 0)
    assert [batch.offset for batch in reader.read()] != []
    for _ in range(2):  # it is refused again if asked again, and never skipped
        with pytest.raises(JournalCorrupt):
            reader.read()


@pytest.mark.parametrize(
    ("sabotage", "check"),
    [
        (sabotages.payload_crc_unchecked, test_one_bit_of_every_byte),
        (sabotages.crc_unchecked, test_sectors_lost_misplaced_and_from_another_time),
        (sabotages.payload_crc_unchecked, test_rot_under_an_open_journal),
        (sabotages.reader_skips_what_does_not_fit, test_writing_goes_on_beside_damage_that_a_reader_meets),
        (sabotages.index_promises_too_little, test_the_undamaged_fixture_reads_in_every_way),
    ],
    ids=lambda case: case.__name__,
)
def test_deliberate_bugs_are_seen(
    sabotage: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, JournalError, pytest.fail.Exception)):
        check()
