"""`zmqbus queues`: what it tells is what there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

import zmqbus
from tests.cli.commands import Terminal, plain, run
from tests.cli.work.helpers import WAIT, Start, figures, rejected, said, until
from zmqbus.node.peers import serving


@pytest.fixture
def shop(bus: str) -> Iterator[zmqbus.Node]:
    node = zmqbus.Node("shop", bus=bus)
    yield node
    node.close(0)


def rows(*args: str, others: int = 1) -> dict[tuple[str, str | None], dict[str, Any]]:
    code, out, _ = run("queues", "--json", *WAIT, *args, others=others)
    assert code == 0
    return {(row["queue"], row["group"]): row for row in map(json.loads, out.splitlines())}


def test_what_there_is(shop: zmqbus.Node, bus: str) -> None:
    for value in range(3):
        shop.push("jobs.bad", value)
    rejected(shop, "jobs.bad")
    for value in range(5):
        shop.push("jobs.mail", value)
    shop.push("jobs.mail", "later", delay=600)
    with zmqbus.Node("press", bus=bus) as press, press.pull("jobs.mail", credit=2) as worker:
        jobs = [worker.get(10), worker.get(10)]
        assert jobs[0] is not None
        jobs[0].nack(delay=0)
        until(lambda: figures(shop, "jobs.mail").redelivered == 1)
        shop.publish("logs.web", "x")
        with press.pull("logs.>", group="indexers") as indexer:
            until(lambda: len(shop._engine.jobs._desk.workers) == 2)
            shop.publish("logs.web", "y")
            assert indexer.get(10) is not None
            found = rows(others=2)
            assert set(rows("jobs.>", others=2)) == {("jobs.bad", None), ("jobs.mail", None)}
        mail, bad, logs = found["jobs.mail", None], found["jobs.bad", None], found["logs.web", "indexers"]
        assert (mail["waiting"], mail["in_flight"], mail["delayed"]) == (3, 2, 1)
        assert (mail["redelivered"], mail["done"], mail["dead"], mail["workers"]) == (1, 0, 0, 1)
        assert (bad["waiting"], bad["dead"], bad["given_up"], bad["workers"]) == (0, 3, 3, 0)
        assert (logs["in_flight"], logs["workers"]) == (1, 1)
        assert 0 < mail["oldest_s"] < 60
        assert bad["oldest_s"] is None
        assert {row["owner"] for row in found.values()} == {"shop"}
        assert {row["origin"] for row in found.values()} == {f"{shop.origin:016x}"}
        code, out, err = run("queues", *WAIT, others=2)
        assert (code, err) == (0, "")
        heading, *lines = out.splitlines()
        assert heading.split() == [
            *("queue", "group", "owner", "waiting", "in", "flight", "delayed", "redelivered", "dead", "workers"),
            *("rate", "oldest"),
        ]
        assert [line.split()[0] for line in lines] == ["jobs.bad", "jobs.mail", "logs.web"]


def test_more_than_one_answer_holds(shop: zmqbus.Node, bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "QUEUES_PER_STATISTICS", 3)
    for number in range(8):
        shop.push(f"jobs.{number}", number)
        shop.push(f"bad.{number}", number)
    rejected(shop, "bad.>")
    with (
        zmqbus.Node("press", bus=bus) as press,
        press.pull("logs.web", group="a", credit=1) as one,
        press.pull("logs.*", group="a", credit=1) as other,  # two entries that are called the same
    ):
        until(lambda: len(shop._engine.jobs._desk.workers) == 2)
        for _ in range(3):
            shop.publish("logs.web", "for each group")
        jobs = [one.get(30), other.get(30)]
        assert all(jobs)
        found = rows()
    assert set(found) == {(f"{kind}.{n}", None) for kind in ("bad", "jobs") for n in range(8)} | {("logs.web", "a")}
    assert [found[f"bad.{n}", None]["dead"] for n in range(8)] == [1] * 8
    logs = found["logs.web", "a"]
    assert (logs["waiting"], logs["in_flight"], logs["workers"]) == (4, 2, 2)


def test_the_rate(shop: zmqbus.Node) -> None:
    stop = Event()

    def work() -> None:
        with shop.pull("q") as worker:
            while not stop.is_set():
                shop.push("q", 1)
                job = worker.get(1)
                assert job is not None
                job.ack()

    busy = Thread(target=work)
    busy.start()
    try:
        assert rows()["q", None]["rate"] > 1
    finally:
        stop.set()
        busy.join()
    until(lambda: figures(shop, "q").in_flight == 0)
    assert rows()["q", None]["rate"] == 0


def test_a_queue_is_its_forwarders(start: Start, bus: str, tmp_path: Path) -> None:
    forwarder = start("forwarder", "--journal", str(tmp_path / "journal"), "--name", "store")
    said(forwarder, "inbox tcp://")
    assert run("push", "--durable", "q", *"abc")[0] == 0
    with zmqbus.Node("press", bus=bus) as press, press.pull("q", credit=1) as worker:
        job = worker.get(30)
        assert job is not None
        [row] = rows(others=2).values()  # and no line for a group of which nothing was ever published
        assert (row["owner"], row["group"], row["waiting"], row["in_flight"], row["workers"]) == (
            "store",
            None,
            2,
            1,
            1,
        )


def test_nothing(shop: zmqbus.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("queues", *WAIT, others=1)
    assert (code, out) == (0, "")
    assert "no such queue is on bus" in err
    monkeypatch.setenv("ZMQBUS_BUS", "nobody-is-here")
    assert run("queues", "--wait", "100ms") == (0, "", "zmqbus: no other node is on bus 'nobody-is-here'\n")
    assert run("queues", "a..b")[0] == 2


def test_going_on(shop: zmqbus.Node, start: Start) -> None:
    shop.push("q", 1)
    watching = start("queues", "--watch", "--json", *WAIT)
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["waiting"] == 1
    shop.push("q", 2)
    while json.loads(watching.stdout.readline())["waiting"] != 2:  # a line for the rate, which is known by now
        pass
    with Terminal("queues", "--watch", *WAIT) as terminal:
        terminal.until("workers")
        shop.push("r", 1)
        terminal.until("\N{BOX DRAWINGS LIGHT HORIZONTAL}")
        until(lambda: terminal.read() and " r " in plain(terminal.shown))
        terminal.interrupt()
        assert terminal.end()[0] == 130
