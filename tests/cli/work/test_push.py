"""`zmqbus push`: who holds what was pushed, when it ends, and what it says of the rest."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import zmqbus
from tests.cli.commands import finish, run
from tests.cli.work.helpers import Start, said


@pytest.fixture
def node(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("other", bus=bus) as node:
        yield node


def test_without_a_forwarder_it_stays_until_all_is_done(node: zmqbus.Node, start: Start) -> None:
    with node.pull("jobs.mail") as worker:
        push = start("push", "jobs.mail", "one", "two words", "-H", "a=b=c")
        jobs = [worker.get(30), worker.get(30)]
        assert [job.value for job in jobs if job is not None] == ["one", "two words"]
        assert push.poll() is None
        for job in jobs:
            assert job is not None
            assert job.headers == {"a": "b=c"}
            job.ack()
        assert finish(push) == (0, "", "zmqbus: pushed 2 jobs on jobs.mail, all done\n")
        push = start("push", "jobs.mail", "-q", "--json", '{"n": 1}')
        job = worker.get(30)
        assert job is not None
        assert job.value == {"n": 1}
        job.ack()
        assert finish(push) == (0, "", "")


def test_lines_of_standard_input(node: zmqbus.Node, start: Start, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"plain\nl\xff\n")
    with node.pull("q") as worker, open(tmp_path / "lines") as lines:
        push = start("push", "q", stdin=lines)
        for value in ("plain", b"l\xff"):
            job = worker.get(30)
            assert job is not None
            assert job.value == value
            job.ack()
        assert finish(push) == (0, "", "zmqbus: pushed 2 jobs on q, all done\n")


def test_in_vain() -> None:
    began = time.monotonic()
    code, out, err = run("push", "q", "a", "b", "--timeout", "300ms")
    assert (code, out) == (3, "")
    assert err == "zmqbus: pushed 2 jobs on q; 2 not done, and held by nobody from now on\n"
    assert time.monotonic() - began < 10


def test_ctrl_c_says_what_remained(node: zmqbus.Node, start: Start) -> None:
    push = start("push", "q", *"abc")
    assert "waiting for 3 jobs to be done, but nobody pulls q" in said(push, "waiting")
    with node.pull("q", credit=1) as worker:
        job = worker.get(30)
        assert job is not None
        job.ack()
        worker.flush(5)
        push.send_signal(signal.SIGINT)
        code, _, err = finish(push)
    assert code == 130
    assert "pushed 3 jobs on q; 2 not done, and held by nobody" in err


def test_what_workers_give_up_is_told_before_it_is_gone(node: zmqbus.Node, start: Start) -> None:
    push = start("push", "q", "good", "b\x1b[2Jd")
    with node.pull("q") as worker:
        for _ in range(2):
            job = worker.get(30)
            assert job is not None
            if job.value == "good":
                job.ack()
            else:
                job.reject("no\x1b[2J such thing")
        code, out, err = finish(push)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == r"zmqbus: given up after 1 attempt(s): b\x1b[2Jd: no\x1b[2J such thing"
    assert lines[1] == "zmqbus: pushed 2 jobs on q, 1 done, 1 given up by workers, and kept by nobody"


def test_a_delay(node: zmqbus.Node, start: Start) -> None:
    with node.pull("q") as worker:
        push = start("push", "q", "later", "--delay", "1500ms")
        job = worker.get(30)
        assert job is not None
        assert time.time() - job.time >= 1.4
        job.ack()
        assert finish(push)[0] == 0


def test_there_may_be_no_room(start: Start) -> None:
    push = start("push", "q", "x" * 120_000, "--count", "3000", "--timeout", "300ms")
    code, _, err = finish(push)
    assert code == 3
    assert "not done, and held by nobody from now on; there was no room for more" in err
    assert "pushed 3,000" not in err


def test_a_bad_line_is_named_and_those_before_it_are_pushed(node: zmqbus.Node, start: Start) -> None:
    with node.pull("q") as worker:
        push = start("push", "q", "--json", "-", stdin=-1)
        assert push.stdin is not None
        push.stdin.write("[1]\n")
        push.stdin.flush()
        job = worker.get(30)
        assert job is not None
        assert job.value == [1]
        job.ack()
        push.stdin.write("nonsense\n")
        push.stdin.close()
        push.stdin = None
        code, _, err = finish(push)
    assert code == 2
    assert "pushed 1 job on q, 1 done" in err
    assert "line 2 of standard input" in err


# --- with a forwarder ----------------------------------------------------------------------------


def test_durably(node: zmqbus.Node, start: Start, tmp_path: Path) -> None:
    code, _, err = run("push", "--durable", "q", "a", "--timeout", "200ms")
    assert code == 3
    assert "nothing pushed: no forwarder on bus" in err
    forwarder = start("forwarder", "--journal", str(tmp_path / "journal"), "--topics", "q")
    said(forwarder, "inbox tcp://")
    code, _, err = run("push", "--durable", "q", *"abc")
    assert (code, err) == (0, "zmqbus: pushed 3 jobs on q, all on a forwarder's disk\n")
    with node.pull("q") as worker:
        for value in "abc":
            job = worker.get(30)
            assert job is not None
            assert job.value == value
            job.ack()


def test_a_forwarder_that_comes_later_takes_over(start: Start, tmp_path: Path) -> None:
    push = start("push", "q", "a", "b")
    said(push, "waiting for 2 jobs")
    said(start("forwarder", "--journal", str(tmp_path / "journal")), "inbox tcp://")
    code, _, err = finish(push)
    assert (code, err) == (0, "zmqbus: pushed 2 jobs on q, all on a forwarder's disk\n")
    code, out, err = run("pull", "q", "-n", "2")
    assert (code, out) == (0, "q  a\nq  b\n")
