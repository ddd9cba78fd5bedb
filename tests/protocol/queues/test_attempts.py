"""Each rule of the dispatcher by itself, with a fake clock: leases, failures, delays, and how it ends."""

from __future__ import annotations

import pytest

from tests.protocol.queues.bench import MUCH, QUEUE, Bench
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.dispatcher import BACK_OFF_MAX, EXPIRED, GONE, USED_UP
from zmqbus.protocol.queues.work import Team, Work

# --- leases and late answers -------------------------------------------------------------------


def test_a_lease_runs_out_and_the_job_goes_to_another() -> None:
    bench = Bench()
    bench.push(2)
    bench.join("ann", credit=2)
    assert bench.take() == "ann 1-2#1"
    assert bench.timer() == 30
    bench.done("ann", 1)
    bench.join("bob", credit=2)
    assert bench.at(29.9).take() == ""
    assert bench.at(30).take() == "bob 2#2"
    assert bench.counts() == {"in_flight": 1, "redelivered": 1, "done": 1}
    assert bench.timer() == 60


def test_a_late_answer_is_accepted_until_another_has_the_job() -> None:
    bench = Bench()
    work = bench.push(3)
    bench.join("ann", credit=3)
    bench.take()
    bench.at(30)
    assert bench.counts() == {"waiting": 3}
    assert bench.done("ann", 1)
    bench.join("bob", credit=1)
    assert bench.take() == "bob 2#2"
    assert not bench.done("ann", 2)
    assert bench.fail("ann", 3, delay=5.0)
    assert bench.counts() == {"in_flight": 1, "delayed": 1, "redelivered": 1, "done": 1}
    assert work.attempts == {1: 1, 2: 1}
    assert bench.done("bob")


def test_of_an_answer_that_is_late_in_part_the_rest_counts() -> None:
    bench = Bench()
    bench.push(3)
    bench.join("ann", credit=3)
    bench.take()
    bench.at(30).join("bob", credit=2)
    assert bench.take() == "bob 1-2#2"
    assert not bench.done("ann")
    assert bench.counts() == {"in_flight": 2, "redelivered": 2, "done": 1}


@pytest.mark.parametrize("answer", ["done", "fail", "give_back", "reject"])
def test_answers_about_what_is_not_its_own_are_refused(answer: str) -> None:
    bench = Bench()
    bench.push(4)
    bench.join("ann", credit=3)
    bench.take()
    of = bench.last["ann"]
    say = getattr(bench, answer)
    before = bench.figures()
    assert not say("bob", of=of)  # there is no such worker
    bench.join("bob", credit=0)
    assert not say("bob", of=of)
    assert not say("ann", 4, of=of)
    assert not say("ann", 3, 2, of=of)
    assert bench.figures() == before._replace(workers=2)
    assert not say("ann", 3, 4, of=of)  # but 3 is
    assert bench.figures().in_flight == 2
    assert not say("ann", 3, of=of)  # once


def test_a_worker_that_let_a_lease_run_out_gets_nothing_until_it_is_heard_of() -> None:
    bench = Bench()
    bench.push(5)
    bench.join("ann", credit=3)
    bench.take(1)
    bench.join("bob", credit=2)
    bench.take()
    bench.done("bob")
    bench.dispatcher.grant("ann", 100)
    bench.at(30)
    assert bench.take() == ""
    assert bench.counts() == {"waiting": 3, "done": 2}
    assert bench.done("ann", 2)
    assert bench.take() == "ann 1#2, ann 3#2"


@pytest.mark.parametrize("word", ["grant", "join", "extend", "fail"])
def test_any_word_will_do(word: str) -> None:
    bench = Bench()
    bench.push()
    bench.join("ann", credit=2)
    bench.take()
    assert bench.at(30).take() == ""
    match word:
        case "grant":
            bench.dispatcher.grant("ann", 0)
        case "join":
            bench.join("ann", credit=2)
        case "extend":
            assert not bench.dispatcher.extend("ann", bench.last["ann"].number, 30.0, bench.now)
        case "fail":
            assert bench.fail("ann")
    assert bench.take() == "ann 1#2"


def test_an_owner_that_was_stopped_gives_nobody_anothers_job() -> None:
    """All leases have run out meanwhile. The answers lie in its socket, but it looked at its clock first."""
    bench = Bench()
    bench.push()
    bench.push()
    bench.join("ann", "bob")
    assert bench.take() == "ann 1#1, bob 2#1"
    assert bench.at(500).take() == ""
    assert bench.done("ann")
    assert bench.done("bob")
    assert bench.counts() == {"done": 2}


def test_a_longer_lease() -> None:
    bench = Bench()
    bench.push()
    bench.join("ann", credit=1)
    bench.take()
    number = bench.last["ann"].number
    assert bench.at(20).dispatcher.extend("ann", number, 60.0, bench.now)
    assert bench.timer() == 80
    bench.join("bob")
    assert bench.at(79).take() == ""
    assert bench.dispatcher.extend("ann", number, 0.5, bench.now)  # from now on: also less
    assert bench.at(79.5).take() == "bob 1#2"
    assert not bench.dispatcher.extend("ann", number, 60.0, bench.now)
    assert not bench.dispatcher.extend("eve", number, 60.0, bench.now)
    assert bench.timer() == 109.5


def test_leases_of_different_lengths() -> None:
    bench = Bench()
    bench.join("ann", credit=1, lease=60)
    bench.join("bob", credit=1, lease=10)
    bench.join("cid", credit=1, lease=30)
    for _ in range(3):
        bench.push()
    bench.take()
    assert bench.timer() == 10
    bench.at(29).join("dot")
    assert bench.take() == "dot 2#2"
    assert bench.at(30).take() == "dot 3#2"
    assert bench.at(60).counts() == {"waiting": 3, "redelivered": 2}


# --- failure, and another attempt --------------------------------------------------------------


def test_a_nack_without_delay_backs_off() -> None:
    bench = Bench(attempts_max=20)
    bench.push()
    bench.join("ann")
    waits = []
    for _ in range(9):
        bench.take()
        bench.fail("ann", delay=None)
        assert bench.counts()["delayed"] == 1
        due = bench.timer()
        assert due is not None
        waits.append(due + 100 - bench.now)
        bench.at(due)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, BACK_OFF_MAX]


def test_a_nack_with_a_delay_of_its_own() -> None:
    bench = Bench()
    bench.push(2)
    bench.join("ann")
    bench.take()
    assert bench.fail("ann", 1, delay=7.0)
    assert bench.fail("ann", 2, delay=0.0)
    assert bench.take() == "ann 2#2"
    assert bench.timer() == 7
    assert bench.at(7).take() == "ann 1#2"


def test_what_failed_goes_before_what_is_fresh() -> None:
    bench = Bench()
    for _ in range(3):
        bench.push(2)
    bench.join("ann", credit=2)
    bench.take()
    bench.fail("ann", 2)
    bench.dispatcher.grant("ann", MUCH)
    assert bench.take() == "ann 2#2, ann 3-4#1, ann 5-6#1"


def test_jobs_that_fail_one_by_one_are_tried_again_together() -> None:
    bench = Bench()
    bench.push(100)
    bench.join("ann")
    bench.take()
    for seq in range(1, 101):
        bench.fail("ann", seq, delay=None if seq % 2 else 0.0)
    bench.done("ann")
    assert bench.take().count("#2") == 50
    bench.fail("ann", delay=None)
    bench.at(2)
    for seq in range(1, 101, 2):
        assert f" {seq}#2" in bench.take(1)


@pytest.mark.parametrize("reason", [GONE, None])
def test_what_a_worker_had_that_left_comes_back(reason: str | None) -> None:
    bench = Bench()
    work = bench.push(3)
    bench.join("ann")
    bench.take()
    bench.done("ann", 2)
    bench.join("bob")
    bench.dispatcher.leave("ann", bench.now, reason)
    assert bench.take() == ("bob 1#2, bob 3#2" if reason else "bob 1#1, bob 3#1")
    assert work.attempts == ({0: 1, 2: 1} if reason else {})
    assert not bench.done("ann")
    bench.dispatcher.leave("ann", bench.now)
    assert bench.figures().workers == 1
    assert bench.timer() == 30


def test_what_was_returned_was_no_attempt() -> None:
    bench = Bench(attempts_max=2)
    work = bench.push(2)
    bench.join("ann")
    for _ in range(10):
        assert bench.take() == "ann 1-2#1"
        assert bench.give_back("ann", 1)
        assert bench.give_back("ann", 2)
    assert work.attempts == {}
    assert bench.counts() == {"waiting": 2}
    assert bench.dispatcher.dead == []


def test_what_was_returned_late_was_no_attempt_either() -> None:
    bench = Bench()
    work = bench.push(2)
    bench.join("ann", credit=2)
    bench.take()
    bench.at(30)
    assert work.attempts == {0: 1, 1: 1}
    assert bench.give_back("ann", 2)
    assert work.attempts == {0: 1}
    bench.join("bob")
    assert sorted(bench.take().split(", ")) == ["bob 1#2", "bob 2#1"]


def test_what_could_not_be_sent_was_not_taken() -> None:
    bench = Bench()
    work = bench.push(3)
    bench.join("ann", credit=3)
    for _ in range(10):
        assert bench.take() == "ann 1-3#1"
        bench.dispatcher.unsent(bench.last["ann"], bench.now)
    assert bench.counts() == {"waiting": 3}
    assert bench.timer() is None
    assert bench.take() == "ann 1-3#1"
    bench.fail("ann")
    bench.dispatcher.grant("ann", 6)
    bench.take()
    bench.dispatcher.unsent(bench.last["ann"], bench.now)
    assert bench.counts() == {"waiting": 3}
    assert work.attempts == {0: 1, 1: 1, 2: 1}
    assert bench.take() == "ann 1-3#2"
    bench.dispatcher.leave("ann", bench.now)
    bench.dispatcher.unsent(bench.last["ann"], bench.now)  # it came back already
    assert bench.counts() == {"waiting": 3, "redelivered": 3}


# --- delays ------------------------------------------------------------------------------------


def test_a_delayed_job_is_held_until_its_time() -> None:
    bench = Bench()
    bench.join("ann")
    bench.push(delay=60.0)
    bench.push()
    assert bench.take() == "ann 2#1"
    assert bench.counts() == {"in_flight": 1, "delayed": 1}
    bench.done("ann")
    assert bench.timer() == 60
    assert bench.at(59.9).take() == ""
    assert bench.at(60).take() == "ann 1#1"


def test_each_message_of_a_batch_has_its_own_delay() -> None:
    bench = Bench()
    bench.join("ann", lease=60.0)
    work = Work(Batch(b"q", QUEUED, 6, 1, 1, 0, (b"",)), QUEUE, 0)
    bench.dispatcher.add(work, bench.now, {0: 150.0, 2: 120.0, 3: 120.0, 4: 99.0, 5: 150.0})
    assert bench.take() == "ann 2#1, ann 5#1"
    assert bench.at(20).take() == "ann 3-4#1"
    assert bench.at(50).take() == "ann 1#1, ann 6#1"


# --- the last attempt, and dead letters --------------------------------------------------------


def drive_to_the_last(bench: Bench, name: str = "ann") -> None:
    """What is in that worker's hand fails until there is one attempt left."""
    for _ in range(4):
        bench.take()
        bench.fail(name)


def test_after_the_last_attempt_it_is_dead_and_settled_when_buried() -> None:
    bench = Bench()
    work = bench.push()
    bench.join("ann")
    drive_to_the_last(bench)
    assert bench.take() == "ann 1#5"
    assert bench.dispatcher.dead == []
    bench.fail("ann")
    assert bench.dead() == [(1, 5, "no")]
    assert bench.take() == ""
    assert not bench.done("ann")
    assert bench.dispatcher.finished == []
    assert bench.counts() == {"redelivered": 4, "dead": 1}
    (dead,) = bench.dispatcher.dead
    bench.dispatcher.buried(dead)
    bench.dispatcher.buried(dead)
    assert bench.dispatcher.finished == [work]
    assert bench.counts() == {"redelivered": 4, "dead": 1}


@pytest.mark.parametrize(("how", "reason"), [("lease", EXPIRED), ("gone", GONE), ("nack", "no")])
def test_however_the_last_attempt_fails(how: str, reason: str) -> None:
    bench = Bench(attempts_max=1)
    bench.push()
    bench.join("ann")
    assert bench.take() == "ann 1#1"
    match how:
        case "lease":
            bench.at(30)
        case "gone":
            bench.dispatcher.leave("ann", bench.now)
        case "nack":
            bench.fail("ann")
    assert bench.dead() == [(1, 1, reason)]
    assert bench.timer() is None


def test_a_reject_kills_at_once() -> None:
    bench = Bench()
    work = bench.push(4)
    bench.join("ann")
    bench.take()
    assert bench.reject("ann", 2, 3)
    assert bench.dead() == [(2, 1, "bad"), (3, 1, "bad")]
    assert bench.done("ann", 1)
    assert bench.done("ann", 4)
    assert bench.dispatcher.finished == []
    for dead in bench.dispatcher.dead:
        bench.dispatcher.buried(dead)
    assert bench.dispatcher.finished == [work]
    assert bench.counts() == {"done": 2, "dead": 2}


def test_dead_letters_do_not_die() -> None:
    bench = Bench(attempts_max=2)
    line = (None, "$dead.q")
    bench.push(line=line)
    bench.join("ann", team=Team("g", ("$dead.>",)))
    for attempt in range(1, 100):
        assert bench.take() == f"ann 1#{attempt}"
        if attempt % 2:
            bench.fail("ann")
        else:
            bench.reject("ann")
            assert bench.counts(line)["delayed"] == 1
            bench.at((bench.timer() or 0.0) + 1)
    assert bench.dispatcher.dead == []


def test_the_last_attempt_is_made_by_a_worker_that_has_nothing_else_and_gets_nothing_else() -> None:
    bench = Bench()
    bench.push(2)
    bench.join("ann")
    drive_to_the_last(bench)
    bench.push(3)
    assert bench.take() == "ann 1#5"
    bench.join("bob", credit=1)
    assert bench.take() == "bob 2#5"
    assert bench.take() == ""
    bench.done("ann")
    assert bench.take() == "ann 3-5#1"


def one_last_attempt(bench: Bench) -> None:
    """Message 1 of origin 1 waits for it, while all workers have something in hand."""
    work = Work(Batch(b"q", QUEUED, 1, 1, 1, 0, (b"",)), QUEUE, 0, attempts={0: 4})
    bench.dispatcher.add(work, bench.now)
    assert bench.take() == ""


def test_it_waits_until_a_worker_has_nothing_else() -> None:
    bench = Bench()
    bench.push(3, origin=2)
    bench.join("ann")
    assert bench.take() == "ann 1-3#1"
    one_last_attempt(bench)
    for seq in (1, 2):
        bench.done("ann", seq)
        assert bench.take() == ""
    bench.done("ann", 3)
    assert bench.take() == "ann 1#5"


def test_of_busy_workers_one_is_given_nothing_new_so_that_it_can_be_made() -> None:
    bench = Bench()
    bench.join("ann", "bob")
    for _ in range(2):
        bench.push(2, origin=2)
    assert bench.take() == "ann 1-2#1, bob 3-4#1"
    one_last_attempt(bench)
    for _ in range(2):
        bench.push(1, origin=2)
    assert bench.take() == "bob 5#1, bob 6#1"  # ann is next, but spared
    bench.done("ann")
    bench.push(1, origin=2)
    assert bench.take() == "ann 1#5, bob 7#1"


def test_who_is_spared_for_a_last_attempt_that_is_not_made_works_on() -> None:
    bench = Bench()
    bench.join("ann")
    bench.push(2, origin=2)
    bench.take()
    one_last_attempt(bench)
    bench.push(1, origin=2)
    assert bench.take() == ""
    bench.join("bob", team=Team("h", (">",)))  # who can make it at once
    assert bench.take() == "bob 1#5"
    assert bench.take() == "ann 3#1"


def test_who_is_spared_and_falls_silent_or_leaves_is_not_waited_for() -> None:
    for leaves in (False, True):
        bench = Bench()
        bench.join("ann", lease=10.0)
        bench.join("bob")
        for _ in range(2):
            bench.push(2, origin=2)
        assert bench.take() == "ann 1-2#1, bob 3-4#1"
        one_last_attempt(bench)
        if leaves:
            bench.dispatcher.leave("ann", bench.now)
        else:
            bench.at(10)
        assert bench.take() == ""  # now bob is spared
        bench.done("bob")
        assert bench.take() == "bob 1#5"


def test_every_message_alone_where_there_is_one_attempt() -> None:
    bench = Bench(attempts_max=1)
    bench.push(5)
    bench.join("ann", "bob")
    assert bench.take() == "ann 1#1, bob 2#1"
    bench.done("bob")
    bench.fail("ann")
    assert sorted(bench.take().split(", ")) == ["ann 4#1", "bob 3#1"]


def test_what_had_used_up_its_attempts_before_a_restart_is_dead() -> None:
    bench = Bench()
    work = Work(Batch(b"q", QUEUED, 4, 1, 1, 0, (b"",)), QUEUE, 0, 0b0001, {1: 5, 2: 4})
    bench.join("ann")
    bench.dispatcher.add(work, bench.now)
    assert bench.dead() == [(2, 5, USED_UP)]
    assert bench.take() == "ann 3#5"
    bench.done("ann")
    assert bench.take() == "ann 4#1"
    assert work.attempts == {1: 5}
