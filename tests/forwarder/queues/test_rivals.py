"""Of several forwarders that claim a topic one gives it out."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forwarder.conftest import SOON
from tests.forwarder.forwarders import Running, running
from tests.forwarder.queues.conftest import figures, worker_of
from tests.node.conftest import eventually
from zmqbus import Node
from zmqbus.forwarder.queues.rivals import FORGOTTEN_AFTER, Rivals, overlap
from zmqbus.protocol.members.membership import Membership
from zmqbus.protocol.members.peers import Peer
from zmqbus.protocol.topics import Matcher

# --- patterns ------------------------------------------------------------------------------------

TOKENS = ("a", "b", "$d")
TOPICS = [".".join(tokens) for size in (1, 2, 3) for tokens in product(TOKENS, repeat=size)]


@st.composite
def patterns(draw: st.DrawFn) -> str:
    tokens = draw(st.lists(st.sampled_from(("a", "b", "$d", "*")), min_size=1, max_size=3))
    if draw(st.booleans()):
        tokens[-1] = ">"
    return ".".join(tokens)


@given(patterns(), patterns(), patterns())
def test_patterns_overlap_where_a_topic_fits_them_all(one: str, two: str, three: str) -> None:
    first, second, third = (Matcher([pattern]).matches for pattern in (one, two, three))
    assert overlap(one, two) == any(first(topic) and second(topic) for topic in TOPICS)
    of_three = overlap(one, two) and overlap(two, three) and overlap(one, three)
    assert of_three == any(first(topic) and second(topic) and third(topic) for topic in TOPICS)


# --- who comes first -----------------------------------------------------------------------------


def peer(journal: int, *claims: str, origin: int = 0) -> Peer:
    return Peer(
        origin=origin or journal,
        name=f"f{journal}",
        inbox="tcp://x:1",
        role="forwarder",
        claims=claims,
        journal=journal,
    )


def test_the_lowest_number_of_those_that_claim_it() -> None:
    rivals = Rivals(5, ["jobs.>", "logs.>"])
    assert rivals.over(["jobs.a"]) == ""
    assert not rivals.met(peer(6, ">"))
    assert not rivals.met(peer(0, ">"))
    assert rivals.met(peer(3, "logs.*", "metrics.>"))
    assert rivals.over(["logs.a"]) == "f3"
    assert rivals.over(["logs.>"]) == "f3"
    assert rivals.over([">"]) == "f3"
    assert rivals.over(["jobs.a"]) == ""
    assert rivals.over(["logs.a.b"]) == ""
    assert rivals.over(["metrics.a"]) == "", "that is none of ours"


def test_claims_that_do_not_meet_leave_a_group_that_pulls_both_to_both() -> None:
    rivals = Rivals(5, ["jobs.>"])
    assert rivals.met(peer(3, "logs.>"))
    assert rivals.over([">"]) == ""


def test_who_says_goodbye_is_replaced_at_once_and_who_falls_silent_when_nodes_are_forgotten() -> None:
    assert Membership(1, name="x", jitter=lambda: 0.5).forget_after == FORGOTTEN_AFTER
    rivals = Rivals(5, [">"])
    assert rivals.met(peer(3, ">"))
    assert rivals.left(peer(3, ">"), "bye", 0.0)
    assert rivals.over(["a"]) == ""
    assert rivals.met(peer(3, ">"))
    assert not rivals.left(peer(3, ">"), "silent", 100.0)
    assert not rivals.tick(100.0 + FORGOTTEN_AFTER - 1)
    assert rivals.over(["a"]) == "f3"
    assert rivals.tick(100.0 + FORGOTTEN_AFTER)
    assert rivals.over(["a"]) == ""


def test_who_starts_again_is_the_same() -> None:
    rivals = Rivals(5, [">"])
    assert rivals.met(peer(3, ">", origin=30))
    assert not rivals.left(peer(3, ">", origin=30), "silent", 0.0)
    assert not rivals.met(peer(3, ">", origin=31))
    assert not rivals.left(peer(3, ">", origin=30), "restarted", 1.0), "its old self"
    assert not rivals.tick(1e9)
    assert rivals.over(["a"]) == "f3"
    assert rivals.met(peer(3, "b", origin=31)), "with other claims"
    assert rivals.over(["a"]) == ""


# --- forwarders ----------------------------------------------------------------------------------


def both(tmp_path: Path, bus: str) -> tuple[Running, Running]:
    """Two, not running; the first is the one that gives out."""
    found = []
    for name in "ab":
        with running(tmp_path / name, bus=f"{bus}-{name}", discovery="static") as forwarder:
            found.append((forwarder.forwarder.journal, name))
    first, second = (name for _, name in sorted(found))
    return tuple(Running(tmp_path / name, bus=bus, name=name) for name in (first, second))  # type: ignore[return-value]


def test_one_gives_out_and_the_other_takes_over_when_it_is_gone(tmp_path: Path, bus: str) -> None:
    ours, other = both(tmp_path, bus)
    with Node("producer", bus=bus, acks=2) as node:
        other.open()
        try:
            events = other.forwarder.events()
            ours.open()
            try:
                eventually(lambda: len(node.peers()) == 2)
                node.push("jobs.a", "first", durable=True, timeout=SOON)
                eventually(lambda: any("gives out $queue jobs.a" in str(event) for event in events._events))
                with worker_of(ours) as one, worker_of(other) as two:
                    one.join("jobs.a", credit=10)
                    two.join("jobs.a", credit=10)
                    for number in range(5):
                        node.push("jobs.a", number, durable=True, timeout=SOON)
                    worker_jobs = one.take(6)
                    assert [job.value for job in worker_jobs] == ["first", *range(5)]
                    assert two.gets_nothing()
                    one.done(*worker_jobs[:3])
                    assert figures(other, "jobs.a").waiting == 6
                    one.fail(worker_jobs[3], how="reject")
                    for worker in (one, two):
                        worker.join("$dead.>", credit=1, number=2)
                    assert [job.value for job in one.take(1)] == [2]
                    eventually(lambda: figures(other, "$dead.jobs.a").waiting == 1)
                    assert two.gets_nothing()
                    told = [event for event in events._events if "gives out" in str(event)]
                    ours.close()
                    jobs = two.take(7)  # what the first has done as well: nobody has told this one
                    assert [job.value for job in jobs if job.topic == "jobs.a"] == ["first", *range(5)]
                    assert [job.value for job in jobs if job.topic == "$dead.jobs.a"] == [2]
                    assert len(told) == 3, "once for each queue and the group"
            finally:
                ours.close()
        finally:
            other.close()


def test_who_comes_first_and_comes_late_takes_over(tmp_path: Path, bus: str) -> None:
    """What the other had loaded and given to nobody stays on its disk."""
    ours, other = both(tmp_path, bus)
    with Node("producer", bus=bus) as node:
        other.open()
        try:
            node.push("jobs.a", 0, durable=True, timeout=SOON)
            for number in range(1, 10):
                node.push("jobs.a", number)
            node.flush(SOON)
            with worker_of(other) as worker:
                worker.join("jobs.a", credit=3)
                jobs = worker.take(3)
                ours.open()
                try:
                    eventually(lambda: other.forwarder._queues._stock.backlogs["$queue jobs.a"].rival != "")
                    worker.done(*jobs, credit=100)
                    assert worker.gets_nothing()
                    assert figures(other, "jobs.a").in_flight == 0
                finally:
                    ours.close()
                jobs = worker.take(7)
                assert [job.value for job in jobs] == list(range(3, 10))
                worker.done(*jobs)
                assert worker.gets_nothing()
        finally:
            other.close()


def test_disjoint_claims_share_the_work(tmp_path: Path, bus: str) -> None:
    with (
        running(tmp_path / "a", bus=bus, name="a", topics=["jobs.a"]) as a,
        running(tmp_path / "b", bus=bus, name="b", topics=["jobs.b"]) as b,
        Node("producer", bus=bus) as node,
        worker_of(a) as one,
        worker_of(b) as two,
    ):
        for topic in ("jobs.a", "jobs.b"):
            node.push(topic, topic, durable=True, timeout=SOON)
        for worker, topic in ((one, "jobs.a"), (two, "jobs.b")):
            worker.join("jobs.*", credit=10)
            (job,) = worker.take(1)
            assert job.value == topic
            worker.done(job)


@pytest.mark.parametrize("claims", [["jobs.>"], [">"]])
def test_a_forwarder_has_no_rival_in_itself(tmp_path: Path, bus: str, claims: list[str]) -> None:
    with running(tmp_path / "a", bus=bus, topics=claims) as forwarder, Node("producer", bus=bus) as node:
        node.push("jobs.a", 1, durable=True, timeout=SOON)
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=10)
            assert [job.value for job in worker.take(1)] == [1]
