"""Timers, and the arithmetic of bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.protocol.queues.timers import STEPS, Timers
from zmqbus.protocol.queues.work import indexes, lowest_run, ones


def test_things_are_due_together_and_never_early() -> None:
    timers: Timers[str, str] = Timers()
    assert timers.next() is None
    timers.at(10.0)["a"] = "A"
    timers.at(9.999)["b"] = "B"
    timers.at(9.5)["c"] = "C"
    assert timers.next() == 9.5
    assert timers.over(9.49) == []
    assert timers.over(9.5) == ["C"]
    assert timers.next() == 10.0
    assert timers.over(9.999) == []  # rounded up to the next step
    assert timers.over(10.0) == ["A", "B"]
    assert timers.next() is None


def test_what_is_removed_is_not_due() -> None:
    timers: Timers[int, int] = Timers()
    for number in range(3):
        timers.at(5.0 + number)[number] = number
    timers.remove(5.0, 0)
    assert timers.next() == 6.0
    timers.at(5.0)[7] = 7  # at a time where there was something already
    assert timers.next() == 5.0
    assert sorted(timers.entries()) == [(5.0, 7, 7), (6.0, 1, 1), (7.0, 2, 2)]
    assert timers.over(100.0) == [7, 1, 2]
    assert timers.over(100.0) == []


def test_times_that_nothing_is_due_at_any_more_are_not_kept() -> None:
    timers: Timers[int, int] = Timers()
    timers.at(1.0)[0] = 0
    for number in range(1, 10_000):
        timers.at(number + 1.0)[number] = number
        timers.remove(number + 1.0, number)
        assert len(timers._steps) <= 103
    assert timers.over(1e9) == [0]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), max_size=50), st.floats(0, 1e6))
def test_any_times(entries: list[tuple[float, bool]], now: float) -> None:
    timers: Timers[int, int] = Timers()
    for number, (due, _) in enumerate(entries):
        timers.at(due)[number] = number
    for number, (due, removed) in enumerate(entries):
        if removed:
            timers.remove(due, number)
    kept = {number: due for number, (due, removed) in enumerate(entries) if not removed}
    soonest = timers.next()
    assert (soonest is None) == (not kept)
    if soonest is not None:
        assert min(kept.values()) <= soonest <= min(kept.values()) + 1 / STEPS
    over = timers.over(now)
    assert all(kept[number] <= now for number in over)
    assert {number for number, due in kept.items() if due <= now - 1 / STEPS} <= set(over)
    assert [kept[number] for number in over] == sorted((kept[n] for n in over), key=lambda due: -(-due * STEPS // 1))


@given(st.sets(st.integers(0, 300)))
def test_bits(members: set[int]) -> None:
    bits = sum(1 << member for member in members)
    assert list(indexes(bits)) == sorted(members)
    if members:
        start, count = lowest_run(bits)
        assert start == min(members)
        assert set(range(start, start + count)) <= members
        assert start + count not in members


@pytest.mark.parametrize("count", [0, 1, 64, 1000])
def test_ones(count: int) -> None:
    assert list(indexes(ones(count))) == list(range(count))
