"""Dead letters through a forwarder: on its disk before the message counts as done, and with the whole value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.forwarder.conftest import SOON, meet
from tests.forwarder.forwarder_checks import Gate
from tests.forwarder.forwarders import Running, running, stored
from tests.forwarder.queues.conftest import committed, figures, places, worker_of
from tests.node.conftest import eventually, on_loop
from tests.node.queues.raw_worker import RawWorker
from zmqbus import Node
from zmqbus.protocol import commands
from zmqbus.protocol.frames import QUEUED, Batch
from zmqbus.protocol.queues.work import Dead, Work


def fail_for_good(worker: RawWorker, times: int = 5) -> None:
    for attempt in range(1, times + 1):
        (job,) = worker.take(1)
        assert job.attempt == attempt
        worker.fail(job, delay_ms=1, reason="it cannot be done")


def test_after_five_attempts_it_is_a_dead_letter_on_disk(forwarder: Running, node: Node) -> None:
    node.push("jobs.a", {"bad": 1}, headers={"own": 2}, durable=True, timeout=SOON)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=100)
        fail_for_good(worker)
        eventually(lambda: places(forwarder)["$queue jobs.a"] == 2)
    (letter,) = stored(forwarder.path, "$dead.jobs.a")
    assert (letter.value, letter.origin) == ({"bad": 1}, forwarder.forwarder.origin)
    told = figures(forwarder, "jobs.a")
    assert (told.waiting, told.dead, told.redelivered) == (0, 1, 4)
    assert figures(forwarder, "$dead.jobs.a").waiting == 1
    with worker_of(forwarder) as worker:
        worker.join("$dead.jobs.a", credit=100)
        for attempt in range(1, 8):  # dead letters are never given up
            (dead,) = worker.take(1)
            assert (dead.value, dead.attempt) == ({"bad": 1}, attempt)
            worker.fail(dead, delay_ms=1)
        (dead,) = worker.take(1)
        assert dead.headers == {
            "own": 2,
            "$reason": "it cannot be done",
            "$attempts": 5,
            "$origin": node.origin,
            "$seq": 1,
            "$queue": "jobs.a",
        }
        worker.done(dead)
    assert figures(forwarder, "$dead.jobs.a").waiting == 0


def test_attempts_are_counted_over_restarts(journal: Path, bus: str, node: Node) -> None:
    for life in range(1, 6):
        with running(journal, bus=bus) as forwarder, worker_of(forwarder) as worker:
            if life == 1:
                node.push("jobs.a", "poison", durable=True, timeout=SOON)
            worker.join("jobs.a", credit=1)
            (job,) = worker.take(1)
            assert job.attempt == life
            worker.fail(job, delay_ms=0, reason="as ever")
    with running(journal, bus=bus) as forwarder:
        assert [message.value for message in stored(journal, "$dead.jobs.a")] == ["poison"]
        eventually(lambda: figures(forwarder, "$dead.jobs.a").waiting == 1)
        assert figures(forwarder, "jobs.a").waiting == 0


LARGE: list[Any] = [b"x" * 200_000, "y" * 200_000, {"z": b"\0" * 20_000}, b"", None, [1, 2.5, {"a": b"\xff"}]]


@pytest.mark.parametrize("headers", [None, {"own": [1, b"2"]}])
def test_any_value_survives(forwarder: Running, node: Node, headers: dict[str, Any] | None) -> None:
    node.push("jobs.a", "first", durable=True, timeout=SOON)
    for value in LARGE:
        node.push("jobs.a", value, headers=headers)
    node.flush(SOON)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=100)
        jobs = worker.take(len(LARGE) + 1)
        worker.done(jobs[0])
        worker.fail(*jobs[1:], how="reject", reason="no")
        worker.join("$dead.>", credit=100, number=2)
        letters = worker.take(len(LARGE))
        assert [letter.value for letter in letters] == LARGE
        for letter in letters:
            assert letter.headers is not None
            assert letter.headers.get("own") == (None if headers is None else [1, b"2"])
            assert (letter.headers["$reason"], letter.headers["$attempts"]) == ("no", 1)


def test_who_rejects_is_told_when_the_letter_is_on_disk(forwarder: Running, node: Node) -> None:
    node.push("jobs.a", 1, durable=True, timeout=SOON)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        (job,) = worker.take(1)
        with Gate.closed() as gate:
            worker.say(commands.Fail(1, [(job.delivery, 1, 1)], "reject"))
            for _ in range(2):  # the queue of dead letters, and the letter
                eventually(lambda: gate.waiting == 1)
                assert not worker._dealer.poll(100)
                assert committed(forwarder)["$queue jobs.a"] == 0
                gate.let_through(1)
                eventually(lambda: gate.waiting == 0 or committed(forwarder)["$queue jobs.a"] == 0)
            gate.let_through(1000)
            worker.hear(commands.Settled)
    assert committed(forwarder)["$queue jobs.a"] >= 1
    assert len(stored(forwarder.path, "$dead.jobs.a")) == 1


def test_what_a_group_gives_up_says_so(forwarder: Running, node: Node) -> None:
    meet(node, "logs.a")
    with worker_of(forwarder) as worker:
        worker.join("logs.>", group="indexers", credit=1)
        eventually(lambda: "$group indexers logs.>" in places(forwarder))
        node.publish("logs.a", "bad")
        worker.fail(*worker.take(1), how="reject", reason="no")
        worker.join("$dead.logs.a", credit=1, number=2)
        (dead,) = worker.take(1)
        assert dead.headers is not None
        assert (dead.value, dead.headers["$group"], dead.headers["$queue"]) == ("bad", "indexers", "logs.a")


def test_a_forwarder_claims_dead_letters_of_what_it_claims(journal: Path, bus: str, node: Node) -> None:
    with running(journal, bus=bus, topics=["jobs.*", "x"]) as forwarder:
        assert forwarder.forwarder.claims == ["jobs.*", "x", "$dead.jobs.*", "$dead.x"]
        node.push("jobs.a", 1, durable=True, timeout=SOON)
        (peer,) = node.peers()
        assert peer.claims == ("jobs.*", "x", "$dead.jobs.*", "$dead.x")
        with worker_of(forwarder) as worker:
            worker.join("jobs.a", credit=1)
            worker.fail(*worker.take(1), how="reject")
        eventually(lambda: len(stored(journal, "$dead.jobs.a")) == 1)


def test_what_cannot_be_decoded_is_a_dead_letter_at_once(forwarder: Running, node: Node) -> None:
    """It was pushed by who does not know better, and nobody can do it; but the bytes are kept."""
    node.push("jobs.a", "good", durable=True, timeout=SOON)
    frame = bytes.fromhex("6a6f62732e6100 01 01 0800 02000000") + (7).to_bytes(8, "little") + b"\1" + bytes(15)
    ingest = forwarder.forwarder._inflow._ingest
    assert ingest is not None

    def take() -> None:
        ingest.heads(7, [(b"jobs.a", 1)], False)
        ingest._take_in([frame + b"\xc1\xc1\xc1"])
        forwarder.forwarder._inflow._look_now()

    on_loop(forwarder, take)
    eventually(lambda: figures(forwarder, "jobs.a").waiting == 3)
    with worker_of(forwarder) as worker:
        worker.join("jobs.a", credit=1)
        worker.done(*worker.take(1), credit=2)  # one at a time, so that the batch has to be cut
        worker.say(commands.Done(1, credit=3))
        worker.join("$dead.jobs.a", credit=2, number=2)
        letters = worker.take(2)
        assert [letter.topic for letter in letters] == ["$dead.jobs.a"] * 2
        assert [letter.value for letter in letters] == [frame[7:] + b"\xc1\xc1\xc1", None]
        worker.done(*letters, number=2)
    eventually(lambda: figures(forwarder, "jobs.a").waiting == 0)


def test_a_letter_that_cannot_be_sent_holds_the_message(forwarder: Running, node: Node) -> None:
    """As when a queue's name is too long for another token before it."""
    node.push("jobs.a", 1, durable=True, timeout=SOON)
    events = forwarder.forwarder.events()
    batch = Batch(b"jobs.b", QUEUED, 1, 7, 1, 0, (bytes.fromhex("6a6f62732e6200") + bytes(32) + b"\x91\x01",))
    dead = Dead(Work(batch, (None, "x" * 250), 0), 1, 5, "no")
    funeral = on_loop(forwarder, lambda: forwarder.forwarder._queues._graves.bury([dead]))
    assert funeral.left == 1
    eventually(lambda: any("has no dead letter, and waits" in str(event) for event in events._events))
