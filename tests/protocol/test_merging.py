"""Several journals made one: nothing twice, nothing skipped, losses exact."""

from __future__ import annotations

import random

import pytest

from zmqbus.protocol.streams import merging
from zmqbus.protocol.streams.merging import Merging
from zmqbus.protocol.streams.stream import Gap

A, B, C = 1, 2, 3
O = 9  # noqa: E741


def feed(one: Merging, journal: int, first: int, end: int, topic: bytes = b"t") -> list[tuple[int, int]]:
    return one.observe(journal, topic, O, first, end)[1]


def lost(one: Merging) -> list[tuple[int, int]]:
    gaps, one.lost = one.lost, []
    assert all((gap.topic, gap.origin) == ("t", O) for gap in gaps)
    return [(gap.first, gap.last) for gap in gaps]


def test_one_journal_in_order() -> None:
    one = Merging()
    one.present([A])
    met, fresh = one.observe(A, b"t", O, 5, 8)
    assert (met.topic, met.next, met.journal, fresh) == ("t", 8, A, [(5, 8)])
    assert feed(one, A, 8, 9) == [(8, 9)]
    assert lost(one) == []


def test_a_jump_within_one_journal_is_lost_at_once() -> None:
    one = Merging()
    one.present([A])
    feed(one, A, 5, 8)
    assert feed(one, A, 10, 12) == [(10, 12)]
    assert one.lost == [Gap("t", O, 8, 9)]


def test_after_a_range_that_is_no_more_a_jump_is_explained() -> None:
    one = Merging()
    one.present([A, B])
    feed(one, A, 1, 5)
    feed(one, B, 3, 5)
    one.excuse(A)
    assert feed(one, A, 9, 10) == [(9, 10)]
    assert lost(one) == []
    one.excuse(B)
    assert feed(one, B, 20, 21) == [(20, 21)]
    assert lost(one) == []
    assert feed(one, A, 12, 13) == [(12, 13)]  # that is explained no more; but B may bring it
    one.caught_up(B)
    assert lost(one) == [(10, 11)]


def test_what_both_have_comes_once() -> None:
    one = Merging()
    one.present([A, B])
    assert feed(one, A, 1, 5) == [(1, 5)]
    assert feed(one, B, 1, 3) == []
    assert feed(one, B, 3, 8) == [(5, 8)]
    assert feed(one, A, 5, 10) == [(8, 10)]
    assert one.duplicates == 2 + 2 + 3
    assert lost(one) == []


def test_what_comes_late_comes() -> None:
    one = Merging()
    one.present([A, B])
    assert feed(one, B, 100, 200) == [(100, 200)]
    assert feed(one, A, 1, 150) == [(1, 100)]
    assert feed(one, A, 150, 210) == [(200, 210)]
    assert lost(one) == []


def test_a_hole_waits_for_the_journal_that_may_fill_it() -> None:
    one = Merging()
    one.present([A, B, C])
    feed(one, A, 1, 5)
    feed(one, B, 1, 2)
    assert feed(one, A, 10, 12) == [(10, 12)]
    assert lost(one) == []
    assert feed(one, B, 2, 8) == [(5, 8)]
    one.caught_up(C)
    assert lost(one) == []
    assert feed(one, B, 9, 12) == [(9, 10)]
    assert lost(one) == [(8, 8)]  # once: both lack it
    assert feed(one, C, 7, 9) == [(8, 9)]  # and yet


def test_a_hole_no_longer_waits_for_a_journal_that_has_gone() -> None:
    one = Merging()
    one.present([A, B])
    feed(one, A, 1, 5)
    feed(one, A, 7, 8)
    assert lost(one) == []
    one.present([A])
    assert lost(one) == [(5, 6)]


def test_holes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "HOLES_MAX", 10)
    one = Merging()
    one.present([A, B])
    for n in range(1, 14):
        feed(one, A, 10 * n, 10 * n + 1)
    assert lost(one) == [(11, 19), (21, 29)]


def test_ranges_and_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SPANS_MAX", 8)
    monkeypatch.setattr(merging, "STREAMS_MAX", 4)
    one = Merging()
    one.present([A])
    for n in range(1, 101):
        met = one.observe(A, b"t", O, 10 * n, 10 * n + 1)[0]
    assert len(met.before) == 8
    for n in range(10):
        feed(one, A, 1, 2, b"t%d" % n)
    assert len(one._streams) == 4


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_any_journals(seed: int) -> None:
    """Three journals with holes of their own, read at any pace: each message once; lost is what nobody had."""
    rng = random.Random(seed)
    one = Merging()
    one.present([A, B, C])
    size = 300
    logs = {}
    for journal in (A, B, C):
        kept = [seq for seq in range(1, size) if rng.random() < 0.9]
        batches: list[list[int]] = []
        for seq in kept:  # consecutive ones, cut anywhere
            if batches and batches[-1][-1] == seq - 1 and rng.random() < 0.8:
                batches[-1].append(seq)
            else:
                batches.append([seq])
        logs[journal] = batches
    delivered: list[int] = []
    reported: list[int] = []
    heads = dict.fromkeys(logs, 0)
    while any(heads[journal] < len(logs[journal]) for journal in logs):
        journal = rng.choice([journal for journal in logs if heads[journal] < len(logs[journal])])
        batch = logs[journal][heads[journal]]
        heads[journal] += 1
        for first, end in feed(one, journal, batch[0], batch[-1] + 1):
            delivered += range(first, end)
        if heads[journal] == len(logs[journal]):
            one.caught_up(journal)
        for first, last in lost(one):
            reported += range(first, last + 1)
    everything = {seq for batches in logs.values() for batch in batches for seq in batch}
    assert sorted(delivered) == sorted(everything)
    assert len(reported) == len(set(reported))
    assert not set(reported) & everything, "it was there, and came"
    between = {seq for seq in range(min(everything), max(everything)) if seq not in everything}
    # Before the second batch of a journal nothing is known to be missing in it.
    certain = {seq for seq in between if all(logs[j][0][0] < seq < logs[j][-1][0] for j in logs)}
    assert certain <= set(reported)
