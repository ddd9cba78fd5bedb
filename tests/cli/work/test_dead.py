"""`zmqbus dead`: letters are looked at without a trace, pushed again without a loss, and thrown away for good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

import zmqbus
from tests.cli.commands import finish, run
from tests.cli.work.helpers import WAIT, Start, figures, rejected, said
from zmqbus.cli.work.dead import Retrying
from zmqbus.node.peers import serving
from zmqbus.node.work.queues.job import Job
from zmqbus.protocol.queues.letters import ORIGIN, REASON, SEQ

DEAD = "$dead.q.mail"


@pytest.fixture
def shop(bus: str) -> Iterator[zmqbus.Node]:
    """With three dead letters."""
    node = zmqbus.Node("shop", bus=bus)
    for number in range(3):
        node.push("q.mail", {"n": number}, headers={"a": "b"})
    rejected(node, "q.mail", "no\x1b[2J address")
    yield node
    node.close(0)


def names(node: zmqbus.Node) -> list[str]:
    return [f"{node.origin:016x}#{seq}" for seq in (1, 2, 3)]


def letters() -> list[dict[str, Any]]:
    code, out, _ = run("dead", "ls", "q.mail", "--json", *WAIT, others=1)
    assert code == 0
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda one: one["letter"])


def test_looking_leaves_no_trace(shop: zmqbus.Node) -> None:
    found = letters()
    assert [one["letter"] for one in found] == names(shop)
    for number, one in enumerate(found):
        assert (one["queue"], one["attempts"], one["reason"]) == ("q.mail", 1, "no\x1b[2J address")
        assert (one["value"], one["headers"]) == ({"n": number}, {"a": "b"})
    code, out, err = run("dead", "ls", "q.mail", "-n", "2", *WAIT, others=1)
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} < {"letter", *names(shop)}
    assert len(out.splitlines()) == 3
    assert r"no\x1b[2J address" in out
    assert err == "zmqbus: 1 more letter: see them with -n\n"
    code, out, err = run("dead", "show", "q.mail", names(shop)[1], *WAIT, others=1)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(f"{names(shop)[1]}  died 2")
    assert out.splitlines()[1:] == ['  headers  {"a":"b"}', '  value    {"n":1}']
    code, out, err = run("dead", "show", "q.mail", "nobody#7", *WAIT, others=1)
    assert (code, out) == (1, "")
    assert "no nobody#7 among the dead letters of q.mail" in err
    kept = figures(shop, DEAD)
    assert (kept.waiting, kept.in_flight, kept.redelivered, kept.done) == (3, 0, 0, 0)


def test_there_are_none() -> None:
    for args in (("ls",), ("show",), ("retry",), ("purge",), ("purge", "--yes")):
        code, out, err = run("dead", args[0], "q.mail", *args[1:], "--wait", "100ms")
        assert (code, out) == (0, "")
        assert err.startswith("zmqbus: there are no dead letters of q.mail on bus")
    assert run("dead", "ls", "q..mail")[0] == 2


def test_letters_of_one_queue_among_many(shop: zmqbus.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "QUEUES_PER_STATISTICS", 2)
    for number in range(5):
        shop.push(f"bad.{number}", number)
        shop.push(f"z.{number}", number)
    rejected(shop, "bad.>")
    rejected(shop, "z.3")
    assert len(letters()) == 3
    for queue in ("bad.4", "z.3"):
        assert run("dead", "purge", "--yes", queue, *WAIT) == (0, f"1 dead letter of {queue} thrown away\n", "")


def test_what_somebody_else_holds_is_said(shop: zmqbus.Node) -> None:
    with shop.pull(DEAD, credit=2) as worker:
        held = [worker.get(5), worker.get(5)]
        code, out, err = run("dead", "ls", "q.mail", *WAIT, others=1)
        assert code == 0
        assert len(out.splitlines()) == 2
        assert "2 more letters did not come: somebody else looks at them" in err
        for job in held:
            assert job is not None
            job.nack(delay=0)


def test_purging(shop: zmqbus.Node) -> None:
    code, out, err = run("dead", "purge", "q.mail", *WAIT, others=1)
    assert (code, out) == (2, "")
    assert "q.mail has 3 dead letters; nothing was changed; to do it: zmqbus dead purge --yes q.mail" in err
    first, second, third = names(shop)
    done = run("dead", "purge", "--yes", "q.mail", second, *WAIT, others=1)
    assert done == (0, "1 dead letter of q.mail thrown away\n", "")
    assert [one["letter"] for one in letters()] == [first, third]
    done = run("dead", "purge", "--yes", "q.mail", *WAIT, others=1)
    assert done == (0, "2 dead letters of q.mail thrown away\n", "")
    assert letters() == []
    assert figures(shop, DEAD).done == 3


def test_retrying_ends_when_a_worker_is_done(shop: zmqbus.Node, start: Start) -> None:
    retry = start("dead", "retry", "q.mail", "--wait", "2s")
    with shop.pull("q.mail") as worker:
        jobs = [worker.get(30) for _ in range(3)]
        assert retry.poll() is None
        for job in jobs:
            assert job is not None
            assert job.headers == {"a": "b"}
        assert sorted(job.value["n"] for job in jobs if job is not None) == [0, 1, 2]
        assert figures(shop, DEAD).in_flight == 3  # until they are done
        for job in jobs:
            assert job is not None
            job.ack()
        assert finish(retry) == (0, "", "zmqbus: 3 dead letters of q.mail pushed again\n")
    assert figures(shop, DEAD).done == 3


def test_what_fails_again_stays(shop: zmqbus.Node, start: Start) -> None:
    def work() -> None:
        with shop.pull("q.mail") as worker:
            for _ in range(3):
                job = worker.get(30)
                assert job is not None
                if job.value["n"] == 1:
                    job.reject("again")
                else:
                    job.ack()
            worker.flush(5)

    worker = Thread(target=work)
    worker.start()
    code, _, err = finish(start("dead", "retry", "q.mail", "--wait", "2s"))
    worker.join()
    assert code == 1
    assert err.splitlines() == [
        f"zmqbus: {names(shop)[1]} failed again: again",
        "zmqbus: 2 dead letters of q.mail pushed again, 1 failed again and dead letters still",
    ]
    [one] = letters()
    assert (one["letter"], one["reason"]) == (names(shop)[1], "no\x1b[2J address")


def test_retrying_in_vain_loses_nothing(shop: zmqbus.Node) -> None:
    code, out, err = run("dead", "retry", "q.mail", "--timeout", "1s", *WAIT, others=1)
    assert (code, out) == (3, "")
    assert err == "zmqbus: 0 dead letters of q.mail pushed again, 3 not done and dead letters still\n"
    assert [one["letter"] for one in letters()] == names(shop)
    assert figures(shop, DEAD).redelivered == 0


def test_with_a_forwarder(start: Start, bus: str, tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")
    said(start("forwarder", "--journal", journal, "--name", "store"), "inbox tcp://")
    assert run("push", "--durable", "q.mail", *"abc")[0] == 0
    assert run("pull", "q.mail", "--exec", "exit 65", "-n", "3", "-q")[0] == 0
    found = letters()
    assert sorted(one["value"] for one in found) == ["a", "b", "c"]
    code, _, err = run("dead", "retry", "q.mail", found[0]["letter"], *WAIT, others=1)
    assert (code, err) == (0, "zmqbus: 1 dead letter of q.mail pushed again\n")
    assert [one["letter"] for one in letters()] == [one["letter"] for one in found[1:]]
    assert run("pull", "q.mail", "-n", "1", "-q")[1] == f"q.mail  {found[0]['value']}\n"
    assert run("dead", "purge", "--yes", "q.mail", *WAIT, others=1)[0] == 0
    assert letters() == []


def test_what_fails_again_at_a_forwarder_stays(start: Start, tmp_path: Path) -> None:
    said(start("forwarder", "--journal", str(tmp_path / "journal"), "--name", "store"), "inbox tcp://")
    assert run("push", "--durable", "q.mail", *"abcdef")[0] == 0
    assert run("pull", "q.mail", "--exec", "exit 65", "-n", "6", "-q")[0] == 0
    assert len(letters()) == 6
    worker = start("pull", "q.mail", "--exec", "test $(cat) != c || exit 65", "-n", "6", "-q")
    code, _, err = finish(start("dead", "retry", "q.mail", *WAIT))
    assert (code == 0) == ("6 dead letters of q.mail pushed again\n" in err)  # c may fail afterwards
    assert (code == 1) == ("5 dead letters of q.mail pushed again, 1 failed again and dead letters still\n" in err)
    assert code in (0, 1)
    finish(worker)
    assert [one["value"] for one in letters()] == ["c"]


class Came:
    """Letters, for whom they come in this order; None: for a moment none does."""

    def __init__(self, there: int, *letters: Job | None) -> None:
        self.there, self.came, self.over = there, 0, False
        self._left = list(letters)

    def get(self, timeout: float) -> Job | None:
        """The next."""
        self.over = not self._left
        letter = self._left.pop(0) if self._left else None
        self.came += letter is not None
        return letter


class Settling:
    """What is settled in a letter."""

    def __init__(self) -> None:
        self.acked: list[int] = []
        self.clean = False


ME, STORE, CLIENT = 1, 2, 3


def letter(at: int, of: int, seq: int) -> Job:
    """Of the `seq`-th job of a node, given up by another."""
    headers = {ORIGIN: of, SEQ: seq, REASON: "no"}
    return Job(DEAD, seq, seq, at, 0.0, headers, 1, Settling())  # type: ignore[arg-type]


def retrying(given_up: int = 0) -> Retrying:
    """By a node that gives up so many itself."""
    seqs = iter(range(1, 100))
    jobs = SimpleNamespace(push=lambda value, headers: next(seqs), look=lambda: 0, given_up=given_up)
    return Retrying(SimpleNamespace(origin=ME), jobs, ())  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", [ME, STORE])
def test_one_fails_again_and_the_others_are_done(owner: int) -> None:
    old = [letter(STORE, CLIENT, seq) for seq in (1, 2, 3)]
    again = letter(owner, ME, 2)  # of the second that was pushed again
    trying = retrying(given_up=int(owner == ME))
    assert trying.run(Came(3, *old, again, None), until=float("inf"))  # type: ignore[arg-type]
    assert (trying.done, trying.failed) == (2, 1)
    assert [one.settled for one in (*old, again)] == [True, False, True, True]


def test_what_fails_again_after_its_letter_is_gone_keeps_the_new_one() -> None:
    old = [letter(STORE, CLIENT, seq) for seq in (1, 2)]
    again = letter(STORE, ME, 1)
    trying = retrying()
    assert trying.run(Came(2, old[0], None, again, old[1], None), until=float("inf"))  # type: ignore[arg-type]
    assert (trying.done, trying.failed) == (1, 1)
    assert [one.settled for one in (*old, again)] == [True, True, False]


def test_what_this_node_gave_up_is_waited_for() -> None:
    old = [letter(STORE, CLIENT, seq) for seq in (1, 2)]
    again = letter(ME, ME, 2)
    trying = retrying(given_up=1)
    assert trying.run(Came(2, *old, None, again, None), until=float("inf"))  # type: ignore[arg-type]
    assert [one.settled for one in (*old, again)] == [True, False, True]
