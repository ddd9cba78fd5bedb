"""How many jobs a worker may have: what was asked for, or what it can do in about a tenth of a second."""

from __future__ import annotations

import itertools

import pytest

from zmqbus.node.work.queues.window import MOST, START, Window


def test_what_was_asked_for_is_kept_to() -> None:
    window = Window(7)
    assert not window.dry(0.0, 0)
    assert not window.dry(0.0, 100)
    assert not window.waited(60.0, 0)
    assert window.size == 7


@pytest.mark.parametrize(("size", "owners", "share"), [(10, 0, 10), (10, 1, 10), (10, 3, 3), (10, 10, 1), (10, 50, 1)])
def test_owners_share_it_and_each_has_one_at_least(size: int, owners: int, share: int) -> None:
    assert Window(size).share(owners) == share


def test_it_doubles_while_what_came_is_done_with_quickly() -> None:
    window = Window(None)
    sizes = [window.size]
    while window.dry(0.01, 0):
        sizes.append(window.size)
    assert sizes[0] == START
    assert sizes[-1] == MOST
    assert all(after == 2 * before for before, after in itertools.pairwise(sizes))


def test_it_does_not_when_that_took_long() -> None:
    assert not Window(None).dry(0.06, 0)


def test_whoever_asks_while_all_is_in_hands_is_given_more() -> None:
    """Else who gathers a hundred before they are done, or has a hundred threads, would wait for ever."""
    window = Window(None)
    assert window.dry(60.0, START + 1)
    assert window.size == 2 * START
    window.size = 1
    assert window.dry(60.0, 50)
    assert window.size == 50, "less would bring nothing"
    window.size = 1
    assert window.dry(60.0, 10 * MOST)
    assert window.size == MOST


@pytest.mark.parametrize(
    ("seconds", "busy", "size"), [(0.1, 0, 64), (0.2, 0, 32), (6.4, 0, 1), (99.0, 0, 1), (0.2, 32, 48)]
)
def test_it_shrinks_to_what_need_not_wait_longer_than_a_tenth_of_a_second(seconds: float, busy: int, size: int) -> None:
    window = Window(None)
    window.size = 64
    assert window.waited(seconds, busy) == (size < 64)
    assert window.size == size


def test_large_jobs_are_fewer() -> None:
    window = Window(None)
    window.weigh(100 * 100, 100)
    assert window.most == MOST
    for _ in range(100):
        window.weigh(4 * 1024 * 1024, 4)
    assert 16 <= window.most <= 17
    while window.dry(0.0, 0):
        pass
    assert window.size == window.most
    window.weigh(10**9, 1)
    assert window.size == 1, "one at least"
    fixed = Window(100)
    fixed.weigh(10**9, 1)
    assert fixed.size == 100


def test_it_never_grows_by_waiting() -> None:
    window = Window(None)
    assert not window.waited(1.0, 1000)
    assert window.size == START
