"""One journal's log as one subscription reads it, by plain values."""

from __future__ import annotations

import pytest

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.commands import END, Log, Read
from zmqbus.protocol.starts import Start
from zmqbus.protocol.streams.reading import ASKED, GRANT_BYTES, LOST, OPEN, SILENCE, WINDOW_BYTES, Reading

JOURNAL = 77
BEGUN = 1_000


def reading(start: Start | None = None, cursor: str = "", late: bool = False) -> Reading:
    start = start or Start(0)
    return Reading(1, ["a.>"], cursor, start, JOURNAL, BEGUN, late)


def begun(at: int = 0, cursor: str = "") -> Reading:
    """One that was told where it begins."""
    one = reading(Start(at), cursor)
    one.read(0.0)
    assert one.received(Log(1, JOURNAL, at, at), 0, 0.0) == at
    return one


def log(first: int, following: int, size: int, end: int | None = None) -> Log:
    return Log(1, JOURNAL, following, following if end is None else end, [(first, size, 0)])


def test_it_asks_for_the_start_and_then_for_what_follows() -> None:
    one = reading(Start(40), "name")
    assert one.read(0.0) == Read(1, ["a.>"], WINDOW_BYTES, "name", 0, 40)
    assert one.place == ASKED
    assert one.received(Log(1, JOURNAL, 40, 100), 0, 1.0) == 40
    assert one.place == OPEN
    assert one.received(log(40, 60, 500), 500, 1.0) == 40
    one.lost(2.0)
    assert one.place == LOST
    assert one.read(3.0) == Read(1, ["a.>"], WINDOW_BYTES - 500, "name", 0, 60)


def test_the_end_is_the_end_only_once() -> None:
    one = reading(Start(END))
    assert one.read(0.0).offset == END
    assert one.read(1.0) == Read(1, ["a.>"], WINDOW_BYTES, "", BEGUN, END)
    assert reading(Start(END), late=True).read(0.0).time_ns == BEGUN
    assert reading(Start(END, 5), late=True).read(0.0).time_ns == 5
    assert reading(Start(7), late=True).read(0.0) == Read(1, ["a.>"], WINDOW_BYTES, "", 0, 7)


def test_a_cursor_that_is_behind_brings_nothing_twice() -> None:
    one = begun(10, "name")
    one.received(log(10, 30, 5), 5, 0.0)
    one.read(1.0)
    assert one.received(Log(1, JOURNAL, 12, 50), 0, 1.0) == 30  # what is below is to be dropped
    assert one.received(log(12, 25, 5), 5, 1.0) == 30
    assert one.next == 30
    assert one.received(log(25, 40, 5), 5, 1.0) == 30
    assert one.next == 40


def test_a_cursor_that_somebody_moved_on_is_believed() -> None:
    one = begun(10, "name")
    one.read(1.0)
    one.received(Log(1, JOURNAL, 500, 600), 0, 1.0)
    assert one.next == 500


def test_credit_is_a_window_and_is_granted_in_large_pieces() -> None:
    one = begun()
    part = GRANT_BYTES // 2
    for n in range(4):
        one.received(log(n, n + 1, part), part, 0.0)
    assert one.grant() == 0
    assert one.consumed(log(0, 1, part), part) == (False, False)
    assert one.grant() == 0
    assert one.consumed(log(1, 2, part), part) == (False, True)
    assert one.grant() == 2 * part
    assert one.grant() == 0
    # What is unread counts against the credit of a reading that is asked for anew; what has been read does not.
    one.lost(0.0)
    assert one.grant() == 0
    assert one.read(0.0).credit == WINDOW_BYTES - 2 * part
    assert one.consumed(log(2, 3, part), part) == (False, False)
    assert one.consumed(log(3, 4, part), part) == (True, True)
    assert one.grant() == 2 * part


def test_a_batch_larger_than_the_window_leaves_no_credit_and_is_made_good() -> None:
    one = begun()
    one.received(log(0, 1, 3 * WINDOW_BYTES), 3 * WINDOW_BYTES, 0.0)
    assert one.read(0.0).credit == 0
    one.received(Log(1, JOURNAL, 1, 1), 0, 0.0)
    one.consumed(log(0, 1, 3 * WINDOW_BYTES), 3 * WINDOW_BYTES)
    assert one.grant() == WINDOW_BYTES


def test_caught_up_is_told_once_and_again_after_a_window() -> None:
    one = begun()

    def pass_on(first: int, following: int, size: int, end: int) -> bool:
        """A LOG comes and is consumed."""
        answer = log(first, following, size, end)
        one.received(answer, size, 0.0)
        return one.consumed(answer, size)[0]

    assert not pass_on(0, 5, 10, end=9)
    assert pass_on(5, 9, 10, end=9)
    assert not any(pass_on(n, n + 1, 10, end=n + 1) for n in range(9, 40))
    assert not pass_on(40, 50, WINDOW_BYTES + 1, end=60)
    assert pass_on(50, 60, 1, end=60)
    assert not pass_on(60, 61, 1, end=61)
    assert one.passed == 61


def test_the_end_is_the_one_that_was_last_heard_of() -> None:
    one = begun()
    first, second = log(0, 5, 10, end=5), log(5, 8, 10, end=8)
    one.received(first, 10, 0.0)
    one.received(second, 10, 0.0)
    assert one.consumed(first, 10)[0] is False
    assert one.consumed(second, 10)[0] is True


def test_silence_is_noticed() -> None:
    one = begun()
    assert not one.silent(SILENCE - 0.01)
    assert one.silent(SILENCE)
    assert not one.silent(SILENCE + 0.01)  # it was asked just now
    one.received(Log(1, JOURNAL, 0, 0), 0, 3.0)
    assert not one.silent(3.0 + SILENCE - 0.01)
    one.lost(5.0)
    assert not one.silent(5.1)
    assert one.silent(5.0 + SILENCE)


@pytest.mark.parametrize(
    ("answer", "size", "why"),
    [
        (Log(1, JOURNAL + 1, 0, 0), 0, "of journal"),
        (log(0, 1, 10), 9, "not what it says"),
        (log(0, 1, 10), 10, "before it is known where"),
    ],
)
def test_what_cannot_be_right(answer: Log, size: int, why: str) -> None:
    one = reading()
    one.read(0.0)
    with pytest.raises(RemoteProtocolError, match=why):
        one.received(answer, size, 0.0)
