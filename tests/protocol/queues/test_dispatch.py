"""Each rule of the dispatcher by itself, with a fake clock: who gets what, what can be taken back, what it costs."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter

from tests.protocol.queues.bench import MUCH, QUEUE, Bench
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.waiting import CHUNK
from zmqbus.protocol.queues.work import Figures, Team, Work

# --- who gets what -----------------------------------------------------------------------------


def test_a_batch_goes_to_one_worker_and_is_finished_when_all_of_it_is_done() -> None:
    bench = Bench()
    work = bench.push(3)
    assert bench.take() == ""
    bench.join("ann", "bob")
    assert bench.take() == "ann 1-3#1"
    assert bench.take() == ""
    assert bench.done("ann", 2)
    assert bench.dispatcher.finished == []
    assert work.done == 0b010
    assert bench.done("ann", 1)
    assert bench.done("ann", 3)
    assert bench.dispatcher.finished == [work]
    assert bench.counts() == {"done": 3}
    assert bench.timer() is None


def test_what_is_settled_from_the_beginning_is_not_given_out() -> None:
    bench = Bench()
    bench.join("ann")
    some = Work(Batch(b"q", QUEUED, 5, 1, 11, 0, (b"",)), QUEUE, 0, done=0b01001)
    everything = Work(Batch(b"q", QUEUED, 2, 1, 16, 0, (b"",)), QUEUE, 0, done=0b11)
    bench.dispatcher.add(some, bench.now)
    bench.dispatcher.add(everything, bench.now)
    assert bench.dispatcher.finished == [everything]
    assert bench.take() == "ann 12-13#1, ann 15#1"


def test_the_worker_that_waited_longest_is_next() -> None:
    bench = Bench()
    bench.join("ann", "bob", "cid", credit=2)
    for _ in range(5):
        bench.push()
    assert bench.take() == "ann 1#1, bob 2#1, cid 3#1, ann 4#1, bob 5#1"
    bench.done("ann")
    bench.dispatcher.grant("ann", 3)  # able again, behind cid who is still able
    for _ in range(2):
        bench.push()
    assert bench.take() == "cid 6#1, ann 7#1"


def test_credit_of_1() -> None:
    bench = Bench()
    bench.push(4)
    bench.join("ann", "bob", credit=1)
    assert bench.take() == "ann 1#1, bob 2#1"
    bench.done("bob")
    assert bench.take() == ""
    bench.dispatcher.grant("bob", 2)
    assert bench.take() == "bob 3#1"
    bench.dispatcher.grant("bob", 1)  # less than before: it may have been overtaken
    bench.dispatcher.grant("bob", 2)
    assert bench.take() == ""


def test_credit_of_1000_is_used_up_to_the_last() -> None:
    bench = Bench()
    for _ in range(3):
        bench.push(500)
    bench.join("ann", credit=1000)
    bench.take()
    assert bench.counts() == {"waiting": 500, "in_flight": 1000}
    bench.join("bob", credit=1)
    assert bench.take() == "bob 1001#1"


def test_credit_is_for_all_lines_together() -> None:
    bench = Bench()
    bench.join("ann", credit=3, team=Team("g", ("a", "b")))
    bench.push(2, line=(None, "a"))
    bench.push(2, line=(None, "b"))
    assert bench.take() == "ann 1-2#1, ann 1#1"


def test_a_large_batch_is_given_out_in_parts_and_what_is_little_more_than_one_part_whole() -> None:
    bench = Bench()
    bench.push(3 * CHUNK + 2)
    bench.push(2 * CHUNK)
    bench.join("ann", "bob")
    parts = [(delivery.first, delivery.last) for delivery in bench.dispatcher.take(bench.now, MUCH)]
    assert CHUNK == 128
    assert parts == [(1, 128), (129, 256), (257, 386), (387, 642)]


def test_no_more_deliveries_than_asked_for() -> None:
    bench = Bench()
    for _ in range(5):
        bench.push()
    bench.join("ann")
    assert bench.take(2) == "ann 1#1, ann 2#1"
    assert bench.take(2) == "ann 3#1, ann 4#1"
    assert bench.take(2) == "ann 5#1"


def test_fifty_producers_have_their_shares_however_they_push() -> None:
    bench = Bench()
    for origin in range(50):
        size = (1, 16, 128, 1024)[origin % 4]
        for _ in range(1024 // size):
            bench.push(size, origin=origin)
    bench.join("ann", credit=10**6)
    shares: Counter[int] = Counter()
    for rounds in range(1, 5):
        while sum(shares.values()) < 50 * rounds * CHUNK:
            for delivery in bench.dispatcher.take(bench.now, 1):
                shares[delivery.work.batch.origin] += delivery.last - delivery.first + 1
        assert list(shares.values()) == [rounds * CHUNK] * 50


def test_a_producer_that_comes_late_is_served_at_once() -> None:
    bench = Bench()
    for _ in range(1000):
        bench.push(CHUNK)
    bench.join("ann")
    bench.push(2, origin=2)
    assert bench.take(3) == "ann 1-128#1, ann 1-2#1, ann 129-256#1"


# --- teams -------------------------------------------------------------------------------------


def test_lines_of_a_team_are_served_in_turn() -> None:
    bench = Bench()
    bench.join("ann", team=Team("g", ("jobs.>",)))
    for topic in ("jobs.a", "jobs.b", "jobs.c"):
        bench.push(line=(None, topic))
        bench.push(line=(None, topic))
    bench.push(line=(None, "other"))
    topics = [delivery.work.line[1] for delivery in bench.dispatcher.take(bench.now, MUCH)]
    assert topics == ["jobs.a", "jobs.b", "jobs.c", "jobs.a", "jobs.b", "jobs.c"]


def test_what_is_pushed_goes_to_one_worker_of_any_team() -> None:
    bench = Bench()
    bench.join("ann", credit=1, team=Team("g", ("q",)))
    bench.join("bob", credit=1, team=Team("h", (">",)))
    bench.join("cid", credit=1, team=Team("g", ("*", "x.>")))
    bench.join("dot", credit=1, team=Team("g", ("other",)))
    for _ in range(5):
        bench.push()
    assert bench.take() == "ann 1#1, bob 2#1, cid 3#1"
    assert bench.figures().workers == 3


def test_between_teams_too_it_is_the_worker_that_waited_longest() -> None:
    bench = Bench()
    bench.join("ann", "bob", "cid", team=Team("g", ("q",)))
    bench.join("dot", team=Team("h", ("q",)))
    for _ in range(8):
        bench.push()
    assert bench.take() == "ann 1#1, bob 2#1, cid 3#1, dot 4#1, ann 5#1, bob 6#1, cid 7#1, dot 8#1"


def test_what_is_published_goes_to_one_worker_of_each_group() -> None:
    bench = Bench()
    bench.join("ann", "bob", team=Team("g", ("logs.>",)))
    bench.join("cid", team=Team("h", ("logs.>",)))
    for group in ("g", "h", "nobody"):
        bench.push(2, line=(group, "logs.a"))
    assert bench.take() == "ann 1-2#1, cid 1-2#1"
    assert bench.counts(("nobody", "logs.a")) == {"waiting": 2}


def test_jobs_wait_for_a_team_and_outlive_it() -> None:
    bench = Bench()
    bench.push(2)
    bench.join("ann", credit=1)
    assert bench.take() == "ann 1#1"
    bench.done("ann")
    bench.dispatcher.leave("ann", bench.now, None)
    bench.push()
    assert bench.take() == ""
    bench.join("bob")
    assert bench.take() == "bob 2#1, bob 3#1"
    assert bench.figures().workers == 1


def test_to_join_again_continues() -> None:
    bench = Bench()
    bench.push(3)
    bench.join("ann", credit=2)
    assert bench.take() == "ann 1-2#1"
    bench.join("ann", credit=2)
    assert bench.take() == ""
    bench.join("ann", credit=3)
    assert bench.take() == "ann 3#1"
    assert bench.figures().workers == 1


def test_to_join_another_team_is_to_leave_the_first() -> None:
    bench = Bench()
    bench.push(1)
    bench.join("ann", credit=1)
    assert bench.take() == "ann 1#1"
    bench.join("ann", credit=1, team=Team("g", (">",)))
    assert bench.take() == "ann 1#2"
    assert bench.figures().workers == 1


# --- to take back ------------------------------------------------------------------------------


def test_the_untouched_tail_is_taken_back() -> None:
    bench = Bench()
    works = [bench.push(2) for _ in range(5)]
    other = bench.push(2, origin=2)
    bench.join("ann", credit=3)
    bench.dispatcher.take(bench.now, 2)
    assert bench.dispatcher.withdraw(QUEUE, 1, 11) == works[2:]
    assert bench.counts() == {"waiting": 3, "in_flight": 3}
    bench.dispatcher.grant("ann", MUCH)
    assert sorted(bench.take().split(", ")) == ["ann 1-2#1", "ann 4#1"]
    assert other.touched
    assert bench.dispatcher.withdraw(QUEUE, 1, 5) == []
    assert bench.dispatcher.withdraw((None, "nothing"), 1, 1) == []


def test_what_is_delayed_is_untouched_as_well() -> None:
    bench = Bench()
    works = [bench.push(), bench.push(delay=5.0), bench.push(delay=9.0), bench.push()]
    bench.at(5)
    assert bench.dispatcher.withdraw(QUEUE, 1, 5) == works
    assert bench.counts() == {}
    assert bench.timer() is None
    bench.join("ann")
    assert bench.take() == ""


def test_there_is_no_hole_in_what_is_taken_back() -> None:
    """The second is done; whoever got the first from now on would get the second as well."""
    bench = Bench()
    bench.push(delay=5.0)
    bench.push()
    bench.join("ann")
    assert bench.take() == "ann 2#1"
    bench.done("ann")
    assert bench.dispatcher.withdraw(QUEUE, 1, 3) == []
    third = bench.push(delay=5.0)
    assert bench.dispatcher.withdraw(QUEUE, 1, 4) == [third]
    assert bench.at(5).take() == "ann 1#1"


def test_a_line_is_forgotten_with_all_that_was_there() -> None:
    bench = Bench()
    bench.join("ann", credit=3)
    bench.join("bob", credit=0)
    bench.push(3)
    bench.push(delay=9.0)
    bench.push()
    bench.take()
    bench.reject("ann", 3)
    (dead,) = bench.dispatcher.dead
    bench.dispatcher.forget(QUEUE)
    assert bench.dispatcher.figures(bench.now) == []
    assert bench.timer() is None
    assert not bench.done("ann")
    bench.dispatcher.buried(dead)
    bench.dispatcher.forget(QUEUE)
    assert bench.dispatcher.finished == []
    bench.push(2)
    bench.dispatcher.grant("ann", MUCH)
    assert bench.take() == "ann 6-7#1"


# --- figures, and what it costs ----------------------------------------------------------------


def test_figures() -> None:
    bench = Bench()
    bench.join("ann", credit=4)
    first = bench.push(2)
    bench.push(4, delay=1.0)
    bench.push(3)
    assert bench.take() == "ann 1-2#1, ann 7-8#1"
    assert bench.figures() == Figures(
        QUEUE, waiting=1, in_flight=4, delayed=4, redelivered=0, done=0, dead=0, workers=1, oldest=first
    )
    bench.done("ann")
    assert bench.counts() == {"waiting": 1, "in_flight": 2, "delayed": 4, "done": 2}


def test_the_oldest_is_the_first_that_is_not_settled() -> None:
    bench = Bench()
    bench.join("ann")
    works = [bench.push() for _ in range(3)]
    for delivery in bench.dispatcher.take(bench.now, MUCH)[1:]:
        bench.done("ann", of=delivery)
    assert bench.figures().oldest is works[0]
    assert bench.counts() == {"in_flight": 1, "done": 2}


def calls(bench: Bench) -> int:
    """How many calls it takes to give out ten deliveries, and to hear that one is done, one has failed."""
    made = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        out = bench.dispatcher.take(bench.now, 10)
        bench.done("ann", of=out[0])
        bench.fail("ann", of=out[1], delay=None)
        bench.dispatcher.next_timer()
        bench.dispatcher.tick(bench.now)
        bench.push(CHUNK)
    finally:
        sys.setprofile(None)
    assert len(out) == 10
    return made


def test_the_cost_does_not_depend_on_how_much_waits() -> None:
    made = []
    for backlog in (20, 8_000):
        bench = Bench()
        for _ in range(backlog):
            bench.push(CHUNK)
        bench.join("ann", credit=10**6)
        calls(bench)
        made.append(calls(bench))
    assert made[0] == made[1]


def test_a_million_messages_take_no_memory_to_speak_of() -> None:
    bench = Bench()
    batches = [Batch(b"q", QUEUED, 1000, 1, 1 + 1000 * n, 0, (b"",)) for n in range(1000)]
    works = [Work(batch, QUEUE, 0) for batch in batches]
    tracemalloc.start()
    for work in works:
        bench.dispatcher.add(work, bench.now)
    assert tracemalloc.get_traced_memory()[0] < 10**6
    bench.join("ann", credit=2 * 10**6, lease=1.0)
    while bench.take():
        pass
    assert bench.counts()["in_flight"] == 10**6
    bench.at(1)  # all that has gone out comes back
    bench.dispatcher.grant("ann", 0)
    assert bench.take(1) == "ann 1-128#2"
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bench.counts()["waiting"] == 10**6 - 128
    assert size < 100 * 10**6  # what has failed is remembered one by one
