"""Tracking and repair. First each rule by itself, with a fake clock; then whole lives at random.

A seed that fails is printed: `ZMQBUS_SEED=n pytest tests/protocol/test_tracking.py -k seeds` plays it alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracking_simulation import audit, simulate

from zmqbus.protocol.frames import SEQ_MAX, Batch
from zmqbus.protocol.streams import tracking
from zmqbus.protocol.streams.stream import SETTLED, Fetch, Gap
from zmqbus.protocol.streams.tracking import (
    BATCH_BYTES,
    EARLY_BYTES_MAX,
    FETCH_TIMEOUT,
    FETCH_TRIES,
    FETCHES_MAX,
    PATIENCE,
    SOFT_DELAY,
    Tracker,
)

ORIGIN, OTHER, STORE = 1, 2, 9
TOPIC = b"t.a"


def batch(first: int, last: int | None = None, *, topic: bytes = TOPIC, origin: int = ORIGIN, size: int = 10) -> Batch:
    count = (first if last is None else last) - first + 1
    return Batch(topic, 0, count, origin, first, 0, (b"x" * size,))


class Bench:
    """A tracker of "t.>" with everything that happens at time `now`, and its output as short text."""

    def __init__(self, *, registered: int | None = 1, history: int = 0, held_bytes_max: int = 1 << 20) -> None:
        """`registered`: the next seq of TOPIC in the first HEADS of ORIGIN; None: there have been no HEADS yet."""
        self.now = 100.0
        self.sources: list[int] = [ORIGIN]
        self.held_bytes_max = held_bytes_max
        self.tracker = Tracker(["t.>"], lambda *_: self.sources, history=history, held_bytes_max=held_bytes_max)
        self.asked: list[Fetch] = []
        if registered is not None:
            self.heads(registered)

    def live(self, *ranges: int | tuple[int, int], topic: bytes = TOPIC, origin: int = ORIGIN) -> str:
        """Batches arrive by the socket; returns what became ready."""
        for each in ranges:
            first, last = (each, each) if isinstance(each, int) else each
            self.tracker.observe(batch(first, last, topic=topic, origin=origin), self.now)
        return self.ready()

    def head(self, following: int, *, topic: bytes = TOPIC, origin: int = ORIGIN) -> str:
        self.tracker.observe_head(topic, origin, following, self.now)
        return self.ready()

    def heads(self, *following: int, topic: bytes = TOPIC, origin: int = ORIGIN, more: bool = False) -> str:
        self.tracker.heads(origin, [(topic, seq) for seq in following], more, self.now)
        return self.ready()

    def repairs(self, *, after: float = 0.0, drained: bool = True) -> list[str]:
        """The fetches to send `after` seconds: "origin 4-6"."""
        self.now += after
        fetches = self.tracker.repairs(self.now, drained)
        self.asked += fetches
        audit(self.tracker, self.held_bytes_max)
        return [f"{fetch.source} {fetch.first}-{fetch.last}" for fetch in fetches]

    def answer(self, *ranges: int | tuple[int, int], last: int | None = None) -> str:
        """The oldest question is answered with these batches."""
        asked = self.asked.pop(0)
        batches = [batch(*((each, each) if isinstance(each, int) else each)) for each in ranges]
        return self.answered(asked, batches, last)

    def answered(self, asked: Fetch, batches: Iterable[Batch], last: int | None = None) -> str:
        self.tracker.fetched(asked, asked.last if last is None else last, batches, self.now)
        return self.ready()

    def refuse(self) -> str:
        self.tracker.refused(self.asked.pop(0), self.now)
        return self.ready()

    def ready(self) -> str:
        """What is ready, taken: "4-6 gap 7-9 10"."""
        words = []
        while self.tracker.ready:
            item = self.tracker.ready.popleft()
            if isinstance(item, Gap):
                words.append(f"gap {span(item.first, item.last)}")
                assert item.count == item.last - item.first + 1
            else:
                words.append(span(item[1].first + item[2], item[1].end - 1))
        return " ".join(words)

    @property
    def counters(self) -> tuple[int, int, int]:
        """(repaired, lost, duplicates)"""
        return self.tracker.repaired, self.tracker.lost, self.tracker.duplicates

    @property
    def next(self) -> int:
        stream = self.tracker.streams[TOPIC, ORIGIN]
        assert stream is not None
        return stream.next

    @property
    def settled(self) -> bool:
        stream = self.tracker.streams[TOPIC, ORIGIN]
        return stream is not None and stream.place == SETTLED


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


# --- rule 1: what is owed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "following", "start"), [(0, 1, 1), (0, 7, 7), (3, 7, 4), (6, 7, 1), (100, 7, 1), (3, 1, 1)]
)
def test_a_stream_is_owed_from_its_head(history: int, following: int, start: int) -> None:
    bench = Bench(registered=following, history=history)
    assert bench.next == start
    expected = [f"1 {start}-{following - 1}"] if start < following else []
    assert bench.repairs() == expected


def test_history_that_is_held_no_more_is_no_loss() -> None:
    bench = Bench(registered=10, history=6)
    assert bench.repairs() == ["1 4-9"]
    assert bench.answer((7, 8), 9) == "7-8 9"
    assert bench.counters == (3, 0, 0)
    assert bench.live(10) == "10"


def test_history_and_a_loss_behind_it() -> None:
    bench = Bench(registered=10, history=6)
    assert bench.live((12, 13)) == ""
    assert bench.repairs() == ["1 4-11"]
    assert bench.answer() == "gap 10-11 12-13"
    assert bench.counters == (0, 2, 0)


def test_a_stream_that_begins_later_is_owed_from_1() -> None:
    bench = Bench()
    assert bench.live((3, 4), topic=b"t.new") == ""
    assert bench.repairs() == ["1 1-2"]


@pytest.mark.parametrize("tell", ["head", "heads"])
def test_a_stream_that_begins_later_and_lost_all_is_told_by_its_head(tell: str) -> None:
    bench = Bench()
    getattr(bench, tell)(4, topic=b"t.new")
    bench.repairs()
    assert bench.repairs(after=SOFT_DELAY) == (["1 1-3"] if tell == "heads" else [])
    assert [f"{fetch.first}-{fetch.last}" for fetch in bench.asked] == ["1-3"]


def test_frames_before_the_heads_wait_for_them() -> None:
    bench = Bench(registered=None)
    assert bench.live(5, (6, 7), 8) == ""
    assert bench.live(1, topic=b"t.new") == ""
    assert bench.live(1, origin=OTHER) == ""
    assert bench.heads(7) == "7 8 1"  # owed from 7 on; t.new from 1; the other has not registered
    assert bench.counters == (0, 0, 2)
    assert bench.repairs() == []
    assert bench.heads(origin=OTHER) == "1"


def test_frames_that_came_before_and_are_too_many_are_fetched() -> None:
    bench = Bench(registered=None)
    large = EARLY_BYTES_MAX // 3
    for seq in range(1, 6):
        bench.tracker.observe(batch(seq, size=large), bench.now)
    bench.tracker.observe(batch(6, size=10), bench.now)
    assert bench.heads(1) == "1 2"
    assert bench.repairs() == ["1 3-5"]
    assert bench.answer(3, 4, 5) == "3 4 5 6"


def test_heads_in_pieces() -> None:
    bench = Bench(registered=None)
    assert bench.heads(5, more=True) == ""
    assert not bench.tracker.knows(ORIGIN)
    assert bench.live(5) == "5"  # its piece has come
    assert bench.live(3, topic=b"t.b") == ""  # this one's has not
    assert bench.heads(3, topic=b"t.b") == "3"
    assert bench.tracker.knows(ORIGIN)


def test_heads_of_what_is_not_wanted() -> None:
    bench = Bench()
    bench.heads(9, topic=b"x.y")
    assert bench.live(12, topic=b"x.y") == ""
    assert bench.head(20, topic=b"x.y") == ""
    bench.heads(9, topic=b"t.\xff")  # no topic at all
    bench.live(12, topic=b"t.\xff")
    assert bench.repairs(after=99) == []
    assert bench.counters == (0, 0, 0)


# --- rule 2: in order, duplicate, gap, held ----------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "ready", "fetch", "duplicates"),
    [
        ([1, 2, (3, 5)], "1 2 3-5", [], 0),
        ([1, 1, (1, 1)], "1", [], 2),
        ([(1, 3), (2, 3), (2, 5)], "1-3 4-5", [], 4),
        ([2], "", ["1 1-1"], 0),
        ([(2, 3), 1], "1 2-3", [], 0),
        ([5, 3, 1], "1", ["1 2-2"], 0),
        ([5, 3, 1, 2, 4], "1 2 3 4 5", [], 0),
        ([3, 3, (3, 3), 1, 2], "1 2 3", [], 2),
        ([(3, 4), (3, 6), (1, 2)], "1-2 3-4 5-6", [], 2),  # the longer of two is held as well
        ([(3, 6), (3, 4), (1, 2)], "1-2 3-6", [], 2),
        ([(3, 6), (4, 5), (1, 2)], "1-2 3-6", [], 2),  # within what is held
        ([(4, 6), (3, 9), (1, 2)], "1-2 3-9", [], 3),  # around it
        ([(3, 5), (5, 8), (1, 3)], "1-3 4-5 6-8", [], 2),  # overlaps on both sides
        ([(3, 4), (1, 9)], "1-9", [], 2),
        ([(3, 4), (7, 8), (1, 2)], "1-2 3-4", ["1 5-6"], 0),
        ([SEQ_MAX], "", [f"1 1-{SEQ_MAX - 1}"], 0),
    ],
    ids=str,
)
def test_arrivals(arrivals: list[int | tuple[int, int]], ready: str, fetch: list[str], duplicates: int) -> None:
    bench = Bench()
    assert bench.live(*arrivals) == ready
    assert bench.repairs() == fetch
    assert bench.counters == (0, 0, duplicates)
    assert bench.settled == (not fetch)


def test_a_driver_may_deliver_the_ordinary_case_itself() -> None:
    bench = Bench()
    stream = bench.tracker.streams[TOPIC, ORIGIN]
    assert stream is not None
    assert (stream.place, stream.next) == (SETTLED, 1)
    stream.next = stream.target = 8
    assert bench.live((8, 9), 11) == "8-9"
    assert bench.repairs() == ["1 10-10"]


def test_a_head_reveals_the_loss_of_the_last_messages() -> None:
    bench = Bench()
    assert bench.live(1) == "1"
    bench.head(2)
    assert bench.repairs() == []
    bench.head(1)  # of the past
    assert bench.repairs() == []
    bench.head(4)
    assert bench.repairs() == ["1 2-3"]
    assert bench.answer((2, 3)) == "2-3"
    assert bench.settled
    assert bench.tracker.timer() is None


def test_a_gap_that_fills_itself_needs_no_fetch_and_no_answer() -> None:
    bench = Bench()
    bench.live(3)
    assert bench.repairs() == ["1 1-2"]
    assert bench.live((1, 2)) == "1-2 3"
    assert bench.settled
    assert bench.tracker.timer() is None
    assert bench.answer((1, 2)) == ""  # too late
    assert bench.counters == (0, 0, 0)


def test_when_the_asked_hole_fills_itself_the_next_one_is_asked_for_at_once() -> None:
    bench = Bench()
    bench.live(3, 5)
    assert bench.repairs() == ["1 1-2"]
    assert bench.live(1, 2) == "1 2 3"
    assert bench.repairs() == ["1 4-4"]


def test_a_gap_that_fills_in_part() -> None:
    bench = Bench()
    bench.live(9)
    assert bench.repairs() == ["1 1-8"]
    assert bench.live((1, 2), 5) == "1-2"  # next is 3, and 5 is held: two holes in what was asked
    assert bench.repairs() == []
    assert bench.answer((1, 3), 4, (5, 6), last=6) == "3 4 5 6"
    assert bench.repairs() == ["1 7-8"]
    assert bench.counters == (3, 0, 3)


# --- fetching ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "last", "ready", "then", "counters"),
    [
        ([(4, 6)], 6, "4-6 7", [], (3, 0, 0)),
        ([4, 5, 6], 6, "4 5 6 7", [], (3, 0, 0)),
        ([6, 4, 5], 6, "4 5 6 7", [], (3, 0, 0)),  # in any order
        ([(1, 9)], 6, "4-9", [], (6, 0, 1)),  # beyond either end, and beyond what was known to exist
        ([(4, 5)], 6, "4-5 gap 6 7", [], (2, 1, 0)),
        ([(5, 6)], 6, "gap 4 5-6 7", [], (2, 1, 0)),
        ([5], 6, "gap 4 5 gap 6 7", [], (1, 2, 0)),
        ([], 6, "gap 4-6 7", [], (0, 3, 0)),
        ([4], 4, "4", ["1 5-6"], (1, 0, 0)),  # the rest is to be asked for anew
        ([], 4, "gap 4", ["1 5-6"], (0, 1, 0)),
        ([], 2**64, "gap 4-6 7", [], (0, 3, 0)),  # it cannot speak of what was not asked
        ([(4, 5), (5, 6)], 6, "4-5 6 7", [], (3, 0, 0)),  # overlapping; each counts once
        ([(4, 6), (8, 9)], 6, "4-6 7", [], (3, 0, 0)),  # what nobody asked for
        ([(1, 2), (4, 6)], 6, "4-6 7", [], (3, 0, 0)),
    ],
    ids=str,
)
def test_answers(
    answer: list[int | tuple[int, int]], last: int, ready: str, then: list[str], counters: tuple[int, int, int]
) -> None:
    bench = Bench()
    assert bench.live((1, 3), 7) == "1-3"
    assert bench.repairs() == ["1 4-6"]
    assert bench.answer(*answer, last=last) == ready
    assert bench.repairs() == then
    repaired, lost, _ = counters
    assert bench.counters[:2] == (repaired, lost)
    assert bench.settled == (not then)


def test_batches_of_other_streams_in_an_answer_are_ignored() -> None:
    bench = Bench()
    bench.live(2)
    bench.repairs()
    asked = bench.asked.pop()
    strangers = [batch(1, topic=b"t.b"), batch(1, origin=OTHER)]
    assert bench.answered(asked, strangers) == "gap 1 2"
    assert list(bench.tracker.streams) == [(TOPIC, ORIGIN)]


def test_an_answer_to_an_older_question_counts_only_if_it_was_the_same() -> None:
    bench = Bench()
    bench.live(5)
    bench.repairs()
    first = bench.asked.pop()
    assert bench.repairs(after=FETCH_TIMEOUT) == ["1 1-4"]  # the same again
    assert bench.answered(first, [batch(1)], 1) == "1"
    assert bench.repairs() == ["1 2-4"]
    assert bench.answered(first, [batch(1, 4)]) == ""  # no longer
    assert bench.answer() == ""
    assert bench.answer((2, 4)) == "2-4 5"


@pytest.mark.parametrize("last", [0, 1, 3])
def test_an_answer_that_says_nothing_about_the_question_is_no_answer(last: int) -> None:
    """Else a confused peer would be asked again and again without a pause."""
    bench = Bench()
    assert bench.live((1, 3), 7) == "1-3"
    bench.repairs()
    for _ in range(100):
        if bench.asked:
            bench.answer((1, 2), last=last)
        bench.repairs()
    assert len(bench.asked) == 0
    began = bench.now
    while not bench.settled:
        due = bench.tracker.timer()
        assert due is not None
        bench.repairs(after=due - bench.now)
        if bench.asked:
            bench.answer(last=last)
    assert bench.counters == (0, 3, 0)
    assert PATIENCE <= bench.now - began <= 2 * PATIENCE


def test_timeouts_double_and_then_the_source_has_had_its_chance() -> None:
    bench = Bench()
    bench.live(3)
    asked_at = []
    while not bench.settled:
        if bench.repairs():
            asked_at.append(bench.now - 100)
        due = bench.tracker.timer()
        if due is not None:
            bench.now = due
    assert asked_at == [0, 1, 3, 7]
    assert bench.now - 100 == PATIENCE
    assert bench.ready() == "gap 1-2 3"
    assert bench.counters == (0, 2, 0)


def test_all_holes_go_with_a_source_that_is_given_up() -> None:
    bench = Bench()
    bench.live(3, 6, 9)
    while not bench.settled:
        bench.repairs()
        due = bench.tracker.timer()
        bench.now = due if due is not None else bench.now
    assert bench.now - 100 == PATIENCE
    assert bench.ready() == "gap 1-2 3 gap 4-5 6 gap 7-8 9"


def test_a_refusal_is_not_insisted_upon_at_once() -> None:
    bench = Bench()
    bench.live(3)
    assert bench.repairs() == ["1 1-2"]
    bench.refuse()
    assert bench.repairs() == []
    assert bench.tracker.timer() == bench.now + FETCH_TIMEOUT
    assert bench.repairs(after=FETCH_TIMEOUT / 2) == []
    assert bench.repairs(after=FETCH_TIMEOUT / 2) == ["1 1-2"]
    assert bench.answer((1, 2)) == "1-2 3"


def test_refusals_end_after_patience_too() -> None:
    bench = Bench()
    bench.live(3)
    refusals = 0
    while not bench.settled:
        if bench.repairs():
            ready = bench.refuse()
            refusals += 1
        else:
            bench.now += FETCH_TIMEOUT
    assert refusals == PATIENCE / FETCH_TIMEOUT + 1
    assert ready == "gap 1-2 3"


def test_progress_renews_patience() -> None:
    bench = Bench()
    bench.live(50)
    for seq in range(1, 50):
        assert bench.repairs(after=PATIENCE - FETCH_TIMEOUT) == [f"1 {seq}-49"]
        bench.answer(seq, last=seq)
    assert bench.settled
    assert bench.tracker.lost == 0


def test_so_does_live_data() -> None:
    bench = Bench()
    bench.sources = []
    bench.live(3, 6)
    bench.repairs(after=PATIENCE - 1)
    assert bench.live(1, 2) == "1 2 3"
    bench.repairs(after=PATIENCE - 1)  # 4 and 5 have been next for less
    assert bench.ready() == ""
    bench.repairs(after=1)
    assert bench.ready() == "gap 4-5 6"


def test_a_new_hole_begins_with_a_short_timeout() -> None:
    bench = Bench()
    bench.live(3)
    for timeout in (0, 1, 2):
        bench.repairs(after=timeout)
    bench.sources = []
    bench.repairs(after=PATIENCE)
    bench.repairs(after=PATIENCE)
    assert bench.ready() == "gap 1-2 3"
    bench.sources = [ORIGIN]
    bench.live(5)
    assert bench.repairs() == ["1 4-4"]
    assert bench.tracker.timer() == bench.now + FETCH_TIMEOUT


def test_fetches_in_flight_are_limited_and_the_others_have_their_turn() -> None:
    bench = Bench()
    streams = 3 * FETCHES_MAX
    for n in range(streams):
        bench.live(2, topic=b"t.%d" % n)
    assert len(bench.repairs()) == FETCHES_MAX
    assert bench.repairs() == []
    assert bench.tracker.timer() == bench.now + FETCH_TIMEOUT
    seen = set()
    while bench.asked:
        asked = bench.asked.pop(0)
        seen.add(asked.topic)
        bench.answered(asked, [batch(1, topic=asked.topic)])
        bench.repairs()
        assert len(bench.asked) <= FETCHES_MAX
    assert len(seen) == streams == bench.tracker.repaired


# --- sources -----------------------------------------------------------------------------------


def test_what_the_publisher_lacks_another_source_may_have() -> None:
    bench = Bench()
    bench.sources = [ORIGIN, STORE]
    bench.live(11)
    assert bench.repairs() == ["1 1-10"]
    assert bench.answer((6, 10)) == ""  # it lacks 1 to 5
    assert bench.repairs() == ["9 1-10"]
    assert bench.answer((2, 5), last=5) == "gap 1 2-5"  # 1 is nowhere
    assert bench.repairs() == ["1 6-10"]  # its turn again: it has these
    assert bench.answer((6, 10)) == "6-10 11"
    assert bench.counters[:2] == (9, 1)


def test_what_one_lacks_and_the_other_has_is_not_lost_even_when_nothing_can_be_held() -> None:
    bench = Bench(held_bytes_max=0)
    bench.sources = [ORIGIN, STORE]
    bench.live(11)
    assert bench.repairs() == ["1 1-11"]
    bench.answer((6, 10), 11)
    assert bench.repairs() == ["9 1-11"]
    assert bench.answer() == "gap 1-5"
    assert bench.repairs() == ["1 6-11"]
    assert bench.answer((6, 10), 11) == "6-10 11"
    assert bench.counters == (6, 5, 0)


def test_a_source_that_fails_is_followed_by_the_next() -> None:
    bench = Bench()
    bench.sources = [ORIGIN, STORE]
    bench.live(3)
    sources = []
    for _ in range(200):
        sources += [text.split()[0] for text in bench.repairs()]
        due = bench.tracker.timer()
        if due is None:
            break
        bench.now = due
    assert sources == ["1"] * 4 + ["9"] * 4
    assert bench.ready() == "gap 1-2 3"


def test_a_hole_waits_for_a_source_to_come_back() -> None:
    bench = Bench()
    bench.sources = []
    bench.live(3)
    assert bench.repairs() == []
    assert bench.repairs(after=PATIENCE - 0.1) == []
    bench.sources = [ORIGIN]
    bench.tracker.sources_changed(bench.now)
    assert bench.repairs() == ["1 1-2"]
    bench.repairs(after=FETCH_TIMEOUT)  # a source that has just come back is not given up for one late answer
    assert bench.ready() == ""
    assert bench.answer((1, 2)) == "1-2 3"


def test_a_hole_does_not_wait_for_ever() -> None:
    bench = Bench()
    bench.sources = []
    bench.live(3)
    bench.repairs()
    assert bench.tracker.timer() == 100 + PATIENCE
    assert bench.repairs(after=PATIENCE) == []
    assert bench.ready() == "gap 1-2 3"
    assert bench.tracker.timer() is None


def test_a_soft_hole_that_found_no_source_is_woken_when_one_comes() -> None:
    bench = Bench()
    bench.sources = []
    bench.heads(4)
    assert bench.repairs(after=SOFT_DELAY) == []
    bench.sources = [ORIGIN]
    bench.tracker.sources_changed(bench.now)
    assert bench.repairs() == ["1 1-3"]


def test_while_the_publisher_is_away_what_others_lack_is_not_lost_yet() -> None:
    bench = Bench()
    bench.sources = [STORE]
    bench.live(3)
    assert bench.repairs() == ["9 1-2"]
    assert bench.answer() == ""
    assert bench.repairs() == []
    bench.sources = [ORIGIN, STORE]
    bench.tracker.sources_changed(bench.now)
    assert bench.repairs() == ["1 1-2"]
    assert bench.answer((1, 2)) == "1-2 3"


def test_what_a_publisher_that_is_gone_for_good_had_is_lost_at_once() -> None:
    bench = Bench()
    bench.live(3)
    assert bench.repairs() == ["1 1-2"]
    bench.sources = []
    bench.tracker.origin_gone(ORIGIN, bench.now)
    assert bench.ready() == "gap 1-2 3"
    assert bench.settled
    assert bench.answer((1, 2)) == ""


def test_unless_another_has_it() -> None:
    bench = Bench()
    bench.sources = [ORIGIN, STORE]
    bench.live(3)
    assert bench.repairs() == ["1 1-2"]
    bench.sources = [STORE]
    bench.tracker.origin_gone(ORIGIN, bench.now)
    assert bench.repairs() == ["9 1-2"]
    bench.tracker.origin_gone(ORIGIN, bench.now)  # said twice
    bench.asked.pop(0)
    assert bench.answer((1, 2)) == "1-2 3"


def test_nor_what_may_still_be_in_the_socket() -> None:
    bench = Bench()
    bench.heads(4)
    bench.sources = []
    bench.tracker.origin_gone(ORIGIN, bench.now)
    assert bench.repairs(after=1, drained=False) == []
    assert bench.live(1) == "1"
    assert bench.repairs(after=1, drained=True) == []
    assert bench.ready() == "gap 2-3"


def test_gone_publishers_do_not_touch_the_streams_of_others() -> None:
    bench = Bench()
    bench.heads(1, origin=OTHER)
    bench.live(3, origin=OTHER)
    bench.tracker.origin_gone(ORIGIN, bench.now)
    bench.tracker.forget(ORIGIN)
    assert bench.ready() == ""
    assert bench.tracker.behind(OTHER) == [("t.a", 1, 4)]


# --- rule 4: soft news -------------------------------------------------------------------------


def test_heads_may_be_ahead_of_the_data() -> None:
    bench = Bench()
    bench.heads(4)
    assert bench.repairs() == []
    assert bench.tracker.timer() == bench.now + SOFT_DELAY
    assert bench.live((1, 3)) == "1-3"
    assert bench.repairs(after=1) == []
    assert bench.settled


def test_soft_news_wait_until_the_socket_is_empty() -> None:
    bench = Bench()
    bench.heads(4)
    for _ in range(10):
        assert bench.repairs(after=SOFT_DELAY, drained=False) == []
    assert bench.repairs(after=SOFT_DELAY, drained=True) == ["1 1-3"]


@pytest.mark.parametrize("proof", ["head", "data"])
def test_proof_by_the_data_path_ends_the_waiting(proof: str) -> None:
    bench = Bench()
    bench.heads(4)
    if proof == "head":
        bench.head(4)
    else:
        bench.live(3)
    assert bench.repairs(drained=False)[0].startswith("1 1-")


def test_soft_news_about_a_hole_do_not_delay_it() -> None:
    bench = Bench()
    bench.live(3)
    bench.heads(9)
    assert bench.repairs(drained=False) == ["1 1-2"]
    assert bench.answer((1, 2)) == "1-2 3"
    assert bench.repairs(drained=False) == ["1 4-8"]


# --- rule 5: bounds ----------------------------------------------------------------------------


def test_beyond_the_bound_newer_batches_are_let_go_and_fetched_later() -> None:
    bench = Bench(held_bytes_max=3 * (10 + BATCH_BYTES))
    assert bench.live(*range(2, 10)) == ""
    assert bench.repairs() == ["1 1-1"]
    assert bench.answer(1) == "1 2 3 4"
    assert bench.repairs() == ["1 5-9"]
    assert bench.answer((5, 9)) == "5-9"
    assert bench.counters == (6, 0, 0)
    assert bench.settled


def test_what_is_held_already_takes_no_room_again() -> None:
    bench = Bench(held_bytes_max=3 * (10 + BATCH_BYTES))
    bench.live((2, 5), (2, 5), (3, 4), (2, 5), 6, 7)
    assert bench.live(1) == "1 2-5 6 7"


def test_the_bound_is_for_all_streams_together_and_is_given_back() -> None:
    bench = Bench(held_bytes_max=2 * (10 + BATCH_BYTES))
    for topic in (b"t.1", b"t.2", b"t.3"):
        bench.live(2, topic=topic)
    bench.repairs()
    for topic in (b"t.1", b"t.2", b"t.3"):
        bench.live(1, topic=topic)
    assert bench.tracker.behind(ORIGIN) == [("t.3", 2, 3)]
    bench.live(2, topic=b"t.3")
    bench.live(3, 4, topic=b"t.1")
    bench.live(6, 7, topic=b"t.1")
    audit(bench.tracker, bench.held_bytes_max)
    assert bench.live(5, topic=b"t.1") == "5 6 7"


def test_void_parkings_do_not_pile_up() -> None:
    bench = Bench()
    bench.sources = []
    for seq in range(1, 10_000, 2):
        bench.live(seq + 1)
        bench.repairs()
        bench.live(seq)
    assert len(bench.tracker._parked) <= 102
    assert bench.settled


# --- leaving, forgetting, returning ------------------------------------------------------------


def test_behind_names_what_is_missing() -> None:
    bench = Bench()
    assert bench.tracker.behind(ORIGIN) == []
    bench.heads(4)
    bench.live(2, topic=b"t.b")
    assert sorted(bench.tracker.behind(ORIGIN)) == [("t.a", 1, 4), ("t.b", 1, 3)]
    bench.live((1, 3))
    bench.live(1, topic=b"t.b")
    assert bench.tracker.behind(ORIGIN) == []


def test_forgetting_reports_every_hole() -> None:
    bench = Bench()
    bench.live(3, 6)
    bench.heads(9)
    bench.repairs()
    bench.tracker.forget(ORIGIN)
    assert bench.ready() == "gap 1-2 3 gap 4-5 6 gap 7-8"
    assert bench.counters == (0, 6, 0)
    assert bench.answer((1, 2)) == ""
    assert bench.repairs(after=99) == []
    assert bench.tracker.timer() is None
    assert not bench.tracker.knows(ORIGIN)


def test_a_publisher_that_returns_goes_on_where_it_was() -> None:
    bench = Bench()
    assert bench.live((1, 3)) == "1-3"
    bench.tracker.forget(ORIGIN)
    assert bench.heads(8) == ""
    assert bench.repairs(after=SOFT_DELAY) == ["1 4-7"]
    assert bench.answer((6, 7)) == "gap 4-5 6-7"
    bench.heads(5, topic=b"t.later")  # began while it was away, or since: owed all the same
    assert bench.repairs(after=SOFT_DELAY) == ["1 1-4"]


def test_a_stream_that_began_while_its_publisher_was_away_is_owed_from_1() -> None:
    bench = Bench(history=2)
    bench.tracker.forget(ORIGIN)
    bench.heads(5, topic=b"t.later")
    assert bench.repairs(after=SOFT_DELAY) == ["1 1-4"]
    assert bench.answer() == "gap 1-4" or bench.tracker.lost == 4


def test_a_publisher_that_never_registered_is_new_when_it_returns() -> None:
    bench = Bench(registered=None)
    bench.heads(5, more=True)
    bench.live(1, topic=b"t.early")
    bench.tracker.forget(ORIGIN)
    assert bench.tracker.streams == {}
    assert bench.tracker._early_bytes == 0
    assert bench.heads(9) == ""
    assert bench.next == 9


def test_the_early_frames_of_a_forgotten_publisher_are_no_burden() -> None:
    bench = Bench(registered=None)
    bench.live(1, 2, origin=OTHER)
    bench.live(1)
    bench.tracker.forget(OTHER)
    assert bench.tracker._early_bytes == 10 + BATCH_BYTES
    assert bench.heads() == "1"


def test_of_forgotten_publishers_the_oldest_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FORGOTTEN_STREAMS_MAX", 100)
    bench = Bench(registered=None)
    each = 50
    for origin in (1, 2, 3):
        bench.tracker.heads(origin, [(b"t.%d" % n, 5) for n in range(each - 1)], False, bench.now)
    bench.tracker.forget(1)
    bench.live(9, topic=b"t.0", origin=1)  # a straggler makes a hole in a forgotten stream
    bench.repairs()
    bench.tracker.forget(2)
    assert len(bench.tracker.streams) == 3 * (each - 1)
    bench.tracker.forget(3)
    assert {origin for _, origin in bench.tracker.streams} == {2, 3}
    assert bench.ready() == "gap 5-8 9"
    assert bench.repairs(after=99) == []
    bench.heads(9, topic=b"t.0", origin=1)
    assert bench.tracker.streams[b"t.0", 1].next == 9  # type: ignore[union-attr]


def test_many_short_lived_publishers_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FORGOTTEN_STREAMS_MAX", 100)
    bench = Bench(registered=None)
    for origin in range(1, 1000):
        bench.tracker.heads(origin, [(b"t.a", 5)] if origin % 3 else [], False, bench.now)
        bench.tracker.forget(origin)
    assert len(bench.tracker.streams) < len(bench.tracker._forgotten) <= 100
    for origin in list(bench.tracker._forgotten):
        bench.tracker.heads(origin, [], False, bench.now)
    assert bench.tracker._forgotten_streams == 0


def test_registering_again_after_a_partition_reveals_what_was_missed() -> None:
    bench = Bench()
    assert bench.live((1, 3)) == "1-3"
    bench.heads(6, more=True)
    bench.heads(3, topic=b"t.b")
    assert sorted(bench.repairs(after=SOFT_DELAY)) == ["1 1-2", "1 4-5"]


# --- whole lives at random ---------------------------------------------------------------------

SEED = os.environ.get("ZMQBUS_SEED")


@pytest.mark.parametrize("chunk", range(8))
def test_seeds(chunk: int) -> None:
    seeds = [int(SEED)] if SEED else range(chunk * 250, (chunk + 1) * 250)
    for seed in seeds:
        try:
            simulate(Random(seed), steps=120)
        except Exception as error:
            raise AssertionError(f"ZMQBUS_SEED={seed} breaks it: {error}") from error


@given(st.randoms(use_true_random=False), st.sampled_from([20, 60]))
@settings(max_examples=60)
def test_lives_that_can_be_shrunk(random: Random, steps: int) -> None:
    simulate(random, steps)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("steps", [40, 150, 600])
def test_seeds_at_length(steps: int) -> None:
    first = Random().randrange(2**40)
    print(f"seeds {first} to {first + 9_999}, steps {steps}")
    for seed in range(first, first + 10_000):
        try:
            simulate(Random(seed), steps)
        except Exception as error:
            raise AssertionError(f"seed {seed} with {steps} steps breaks it: {error}") from error


# --- a forwarder's: time alone makes nothing lost ------------------------------------------------


def patient(sources: list[int]) -> Bench:
    """With messages 2 and 3 missing."""
    bench = Bench(registered=None)
    bench.sources = sources
    bench.tracker = Tracker(["t.>"], lambda *_: bench.sources, history=2**62, patient=True)
    bench.heads(1)
    assert bench.live(1, 4) == "1"
    return bench


@pytest.mark.parametrize("returns", [False, True])
def test_what_another_forwarder_lacked_it_may_have_got_meanwhile(returns: bool) -> None:
    """A publisher keeps what it published until somebody has it, and that may be the other one."""
    bench = patient([STORE])
    assert bench.repairs() == ["9 2-3"]
    assert bench.answer(last=3) == ""
    assert bench.repairs(after=1) == []
    if returns:
        bench.sources = [ORIGIN, STORE]
        bench.tracker.sources_changed(bench.now)
        assert bench.repairs() == ["1 2-3"]
        assert bench.answer(last=3) == ""
        assert bench.repairs() == ["9 2-3"]
    else:
        assert bench.repairs(after=PATIENCE) == ["9 2-3"]
    assert bench.answer((2, 3)) == "2-3 4"
    assert bench.counters == (2, 0, 0)


def test_a_patient_tracker_does_not_ask_those_who_have_nothing_without_end() -> None:
    bench = patient([STORE])
    for _ in range(5):
        assert bench.repairs() == ["9 2-3"]
        assert bench.answer(last=3) == ""
        assert bench.repairs() == []
        assert bench.repairs(after=PATIENCE / 2) == []
        bench.now += PATIENCE / 2
    bench.sources = [ORIGIN]
    assert bench.repairs() == ["1 2-3"]
    assert bench.answer(last=3) == "gap 2-3 4"


def test_a_source_that_always_fails_does_not_keep_a_patient_tracker_from_another() -> None:
    """A publisher's outbox that is damaged, say."""
    bench = patient([ORIGIN, STORE])
    asked: list[str] = []
    for _ in range(FETCH_TRIES + 1):
        asked += bench.repairs()
        if asked[-1] == "9 2-3":
            break
        bench.refuse()
        bench.now += FETCH_TIMEOUT
    assert asked == ["1 2-3"] * FETCH_TRIES + ["9 2-3"]
    assert bench.answer((2, 3)) == "2-3 4"
