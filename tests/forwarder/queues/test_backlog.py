"""What a backlog remembers of itself on disk: after any crash exactly what is not settled is to be done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.forwarder.queues.backlog import EVERYWHERE, MESSAGES_MAX, PATTERNS_BYTES_MAX, SCATTER_BYTES_MAX, Backlog
from zmqbus.forwarder.queues.kept import (
    NAME_BYTES_MAX,
    Kept,
    Run,
    cursor_name,
    decode,
    encode,
    pack_runs,
    pack_tried,
    unpack_runs,
    unpack_tried,
)
from zmqbus.journal import Cursor
from zmqbus.journal.positions import CURSOR_DATA_BYTES_MAX
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.work import ones

PIECE_WORKS, PIECE_MESSAGES = 1821, 65_536  # what a read may add to what may be loaded


def batch(count: int, topic: bytes = b"jobs", time_ns: int = 0, first: int = 1) -> Batch:
    return Batch(topic, QUEUED, count, 7, first, time_ns, (b"x" * count,))


# --- in memory -----------------------------------------------------------------------------------


def test_what_is_settled_moves_the_place_and_what_is_not_holds_it() -> None:
    backlog = Backlog(Kept("jobs"), 10)
    works = [work for offset in (10, 12, 20) for work in backlog.load(offset, batch(2))]
    assert [work.position for work in works] == [10, 12, 20]
    assert (backlog.place(30), backlog.next, backlog.messages) == (10, 22, 6)
    backlog.settled(works[1])
    assert backlog.place(30) == 10
    backlog.settled(works[0])
    assert backlog.place(30) == 20
    backlog.settled(works[2])
    assert backlog.place(30) == 22
    backlog.live = True
    assert backlog.place(30) == 30
    assert (backlog.messages, backlog.bytes, backlog.lines) == (0, 0, {})


def test_what_was_loaded_is_not_loaded_again() -> None:
    backlog = Backlog(Kept("jobs"), 0)
    (work,) = backlog.load(0, batch(2))
    assert backlog.load(0, batch(2)) == []
    backlog.settled(work)
    assert backlog.load(0, batch(2)) == []
    backlog.settled(work)  # once more, by somebody who is late
    assert backlog.messages == 0


def test_unread_is_counted_once_whoever_comes_first() -> None:
    backlog = Backlog(Kept("jobs"), 0)
    backlog.skip(0, batch(3))  # the survey has been here
    backlog.counted_to = 3
    backlog.load(0, batch(3))
    assert backlog.unread == 0
    backlog.load(3, batch(4))  # and here not yet: it will find that this is loaded
    assert backlog.unread == 0
    backlog.counted_to = EVERYWHERE
    backlog.skip(7, batch(5, time_ns=123))
    assert (backlog.unread, backlog.first_unread) == (5, (7, 123))
    backlog.load(7, batch(5, time_ns=123))
    assert (backlog.unread, backlog.first_unread) == (0, None)


def test_a_group_that_begins_within_a_batch_gets_the_rest_of_it() -> None:
    backlog = Backlog(Kept("", "g", ["logs.>"]), 13)
    (work,) = backlog.load(10, batch(8, b"logs.a"))
    assert work.done == 0b111
    again = Backlog(decode(backlog.cursor(100).data), backlog.cursor(100).offset)
    (work,) = again.load(10, batch(8, b"logs.a"))
    assert work.done == 0b111


def test_a_group_does_not_care_for_what_was_before_it() -> None:
    backlog = Backlog(Kept("", "g", ["logs.>"], since_ns=1000), 0)
    assert not backlog.concerns(batch(1, b"logs.a", time_ns=999))
    assert backlog.concerns(batch(1, b"logs.a", time_ns=1000))


def test_lines_tell_apart_groups_of_one_name_that_pull_other_things() -> None:
    one, other = Backlog(Kept("", "g", ["logs.>"]), 0), Backlog(Kept("", "g", ["logs.*"]), 0)
    assert one.line(b"logs.a") != other.line(b"logs.a")
    assert Backlog(Kept("jobs"), 0).line(b"jobs") == (None, "jobs")
    assert len({one.name, other.name, Backlog(Kept("logs.a"), 0).name}) == 3


# --- over a crash --------------------------------------------------------------------------------


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[tuple[int, int, int]]]]:
    """Batches, as (offset, count), and for each life what becomes of messages: (batch, bits, tries)."""
    batches, at = [], 0
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.integers(0, 3))
        count = draw(st.integers(1, 12))
        batches.append((at, count))
        at += count
    step = st.tuples(st.integers(0, len(batches) - 1), st.integers(0, ones(12)), st.integers(0, 4))
    return batches, draw(st.lists(st.lists(step, max_size=8), max_size=5))


@given(lives(), st.data())
def test_after_any_crash_exactly_what_is_not_settled_is_to_be_done(
    given: tuple[list[tuple[int, int]], list[list[tuple[int, int, int]]]], data: st.DataObject
) -> None:
    batches, runs = given
    end = sum(batches[-1])
    settled: dict[int, int] = dict.fromkeys((offset for offset, _ in batches), 0)
    tried: dict[int, int] = {}
    cursor = Cursor(0, encode(Kept("jobs")))
    for steps in [*runs, []]:
        backlog = Backlog(decode(cursor.data), cursor.offset)
        read = data.draw(st.integers(0, len(batches))) if steps else len(batches)
        works = {}
        for offset, count in batches[:read]:
            todo = count - settled[offset].bit_count()
            if offset + count > cursor.offset:
                assert backlog.todo(offset, count) == todo
            loaded = backlog.load(offset, batch(count))
            assert bool(loaded) == bool(todo)
            for work in loaded:
                works[offset] = work
                assert work.done == settled[offset]
                assert work.attempts == {i: tried[offset + i] for i in range(count) if offset + i in tried}
        for number, bits, tries in steps:
            offset, count = batches[number]
            if (work := works.get(offset)) is None:
                continue
            if tries:
                fresh = {i: tries for i in range(count) if bits >> i & 1 and not work.done >> i & 1}
                work.attempts = {**work.attempts, **fresh}
                tried.update((offset + i, n) for i, n in fresh.items())
            else:
                work.done |= bits & ones(count)
                settled[offset] = work.done
                work.attempts = {i: n for i, n in work.attempts.items() if not work.done >> i & 1}
                for i in range(count):
                    if work.done >> i & 1:
                        tried.pop(offset + i, None)
                if work.done == ones(count):
                    backlog.settled(work)
                    del works[offset]
        backlog.live = read == len(batches) and data.draw(st.booleans())
        cursor = backlog.cursor(end)
        unsettled = [offset for offset, count in batches if settled[offset] != ones(count)]
        assert cursor.offset <= min(unsettled, default=end)
        if read == len(batches) and unsettled:
            assert cursor.offset == unsettled[0]


# --- how large it gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [1, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("count", [1, 2, 7, 128, 256, MESSAGES_MAX])
def test_however_it_is_scattered_a_cursor_can_hold_it(count: int, apart: int) -> None:
    """As much as may be loaded, and what a read may add to that; then all is tried in vain, and half of it done."""
    patterns = ["p" * (PATTERNS_BYTES_MAX // 16 - 1)] * 16
    backlog = Backlog(Kept("", "g" * 255, patterns, 2**63), 0)
    offset = more = 0
    while more < min(PIECE_WORKS, PIECE_MESSAGES // count):
        backlog.load(offset, batch(count))
        offset += count + apart
        more += backlog.scatter >= SCATTER_BYTES_MAX or backlog.messages >= MESSAGES_MAX
    works = list(backlog.works.values())
    for number, work in enumerate(works):
        if count == 1 and number % 2:
            backlog.settled(work)
        work.done = sum(1 << index for index in range(0, count, 2)) if count > 1 else 0
        work.attempts = dict.fromkeys(range(1, count, 2), 4) if count > 1 else {0: 4}
    cursor = backlog.cursor(0)
    assert len(cursor.data) <= CURSOR_DATA_BYTES_MAX
    again = Backlog(decode(cursor.data), cursor.offset)
    for work in works:
        loaded = again.load(work.position, batch(count))
        assert [one.done for one in loaded] == ([work.done] if work.position in backlog.works else [])


def test_a_batch_that_is_too_large_to_be_noted_in_part_is_done_as_a_whole() -> None:
    backlog = Backlog(Kept("jobs"), 0)
    (work,) = backlog.load(0, batch(MESSAGES_MAX + 1))
    work.done = ones(1000)
    cursor = backlog.cursor(0)
    assert len(cursor.data) < 100
    (work,) = Backlog(decode(cursor.data), cursor.offset).load(0, batch(MESSAGES_MAX + 1))
    assert not work.done


def test_so_many_jobs_may_wait_for_their_time() -> None:
    """Each in a batch of its own, with jobs between them that are done."""
    backlog = Backlog(Kept("jobs"), 0)
    number = 0
    while backlog.scatter < SCATTER_BYTES_MAX:
        backlog.load(number, batch(1))
        number += 2
    assert number // 2 > 9_000


def test_where_work_goes_on_in_order_a_cursor_is_small() -> None:
    backlog = Backlog(Kept("jobs.resize"), 0)
    for number in range(500):
        (work,) = backlog.load(number * 128, batch(128))
        if 10 <= number < 50 and number % 4:
            work.done = ones(128)
            backlog.settled(work)
    assert len(backlog.cursor(0).data) < 80


# --- bytes ---------------------------------------------------------------------------------------


def test_the_bytes_of_a_queue() -> None:
    """They are on disks: a change is a change of the journal's format."""
    kept = Kept(
        "jobs", reach=9, left=pack_runs(100, [Run(100, 103, 2), Run(104, 106)]), tried=pack_tried(100, [(100, 4)])
    )
    assert encode(kept) == bytes.fromhex("97 a46a6f6273 a0 90 00 09 c405 0007020104 c403 000104")
    assert decode(encode(kept)) == kept


def test_the_bytes_of_a_group() -> None:
    kept = Kept("", "g", ["a", "b.>"], 1)
    assert encode(kept) == bytes.fromhex("97 a0 a167 92 a161 a3622e3e 01 00 c400 c400")
    assert decode(encode(kept)) == kept


@pytest.mark.parametrize("data", [b"", b"\x90\x00", b"\xc0", b"\x91\x01", encode(Kept("a"))[:-1]])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)


RUNS = [Run(5, 8), Run(8, 10), Run(10, 12, 1), Run(12, 13), Run(20, 21), Run(21, 22, 0)]


def test_runs_that_follow_each_other_are_put_together() -> None:
    packed = pack_runs(5, RUNS)
    assert packed == bytes([0, 10, 0, 5, 1, 0, 2, 7, 4])
    assert unpack_runs(5, packed) == [Run(5, 10), Run(10, 12, 1), Run(12, 13), Run(20, 22)]


def test_attempts_that_follow_each_other_are_put_together() -> None:
    tried = {5: 1, 6: 1, 8: 1, 9: 2}
    packed = pack_tried(5, tried.items())
    assert packed == bytes([0, 2, 1, 1, 1, 1, 0, 1, 2])
    assert unpack_tried(5, packed) == tried


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 300), st.integers(0, 2**300)), max_size=20))
def test_runs_survive(given: list[tuple[int, int, int]]) -> None:
    runs, at = [], 7
    for skip, count, done in given:
        runs.append(Run(at + skip + 1, at + skip + 1 + count, done & ones(count)))
        at = runs[-1].end
    packed = pack_runs(7, runs)
    assert unpack_runs(7, packed) == runs
    for cut in range(len(packed)):
        try:
            found = unpack_runs(7, packed[:cut])
        except ValueError:
            continue
        assert found == runs[: len(found)]


@pytest.mark.parametrize("letter", ["x", "ü", "語"])
def test_a_name_that_is_too_long_is_cut_and_still_its_own(letter: str) -> None:
    names = {cursor_name(Kept("", letter * length, ["a"])) for length in range(1, 256)}
    assert len(names) == 255
    assert max(len(name.encode()) for name in names) == NAME_BYTES_MAX
    assert cursor_name(Kept("", "g", ["a", "b"])) == "$group g a b"
    assert cursor_name(Kept("a")) == "$queue a"
