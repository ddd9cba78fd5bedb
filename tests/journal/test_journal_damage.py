"""Damage: cut at every byte, flipped at every bit. An exact prefix or a refusal that names the place, nothing else."""

from __future__ import annotations

import pytest
from checks import (
    build_fixture,
    damaged_copy,
    expect_prefix,
    flips,
    read_damaged,
    start,
)
from simulation import PATH

from zmqbus.errors import JournalCorrupt
from zmqbus.journal import Cursor, Reader, journal
from zmqbus.journal.storage import encode_meta


@pytest.fixture(autouse=True)
def _tiny_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 400)


@pytest.mark.parametrize("first", range(8))
def test_flip_of_every_bit(first: int) -> None:
    flips(step=8, first=first)


def test_truncation_at_every_byte() -> None:
    disk, expected = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    names = [name for name in files if name.endswith(".zbj")]
    for name in names:
        for size in range(len(files[name])):
            got, refusal = read_damaged(damaged_copy(files, cursors, name, files[name][:size]))
            expect_prefix(got, expected, f"{name} cut at {size}")
            if name != names[-1]:
                assert got == expected or refusal is not None, f"{name} cut at {size}: durable batches vanished"
            if refusal is not None:
                assert refusal.path.endswith(name)
                assert refusal.position <= size


def test_flip_of_every_bit_of_the_cursors() -> None:
    disk, _ = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    (name,) = cursors
    states = [{}, {"one": Cursor(4, b"state")}, {"one": Cursor(4, b"state"), "two": Cursor(14)}]
    refused = 0
    for bit in range(len(cursors[name].rstrip(b"\0")) * 8):
        data = bytearray(cursors[name])
        data[bit // 8] ^= 1 << bit % 8
        disk = damaged_copy(files, cursors, f"cursors/{name}", bytes(data))
        try:
            opened = start(disk)
        except JournalCorrupt as error:
            refused += error.path.endswith(f"cursors/{name}")
        else:
            assert opened.cursors.all() in states[1:], "only the last commit can pass for a torn one"
    assert refused > 1000


def test_flip_of_every_bit_of_an_index_changes_nothing() -> None:
    disk, expected = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    name = next(name for name in files if name.endswith(".idx"))
    wanted = [stored for stored in expected if stored[0] == b"logs.a"]
    for bit in range(0, len(files[name]) * 8, 3):
        data = bytearray(files[name])
        data[bit // 8] ^= 1 << bit % 8
        opened = start(damaged_copy(files, cursors, name, bytes(data)))
        reader = Reader(opened, accept=lambda topic: topic == b"logs.a")
        got = []
        while not reader.caught_up:
            got += [(b.topic, b.origin, b.first_seq, bytes(b.payload)) for b in reader.read()]
        assert got == wanted


def test_missing_files() -> None:
    disk, _ = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    names = [name for name in files if name.endswith(".zbj")]
    for name in (names[1], "meta"):
        without = {n: data for n, data in files.items() if n != name}
        got, refusal = read_damaged(damaged_copy(without, cursors, "LOCK", b""))
        assert refusal is not None, name
        expect_prefix(got, build_fixture()[1], name)


def test_last_segment_gone_behind_a_cursor() -> None:
    """Every record may be missing without a trace, but a cursor remembers that there were more."""
    disk, _ = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    names = [name for name in files if name.endswith(".zbj")]
    without = {name: data for name, data in files.items() if name not in names[1:]}
    _, refusal = read_damaged(damaged_copy(without, cursors, "LOCK", b""))
    assert refusal is not None
    assert "cursor 'two'" in str(refusal)


def test_segment_of_another_journal() -> None:
    disk, _ = build_fixture()
    files, cursors = disk.files(PATH), disk.files(PATH + "/cursors")
    _, refusal = read_damaged(damaged_copy(files, cursors, "meta", encode_meta(bytes(16))))
    assert refusal is not None
    assert "another journal" in refusal.reason
