"""`zmqbus pull`: a job is done when its line is written, or as the exit code of its process says."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from math import inf
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, finish, run
from tests.cli.work.helpers import Start, figures, said, until
from zmqbus.cli.shell.bus import Bus
from zmqbus.cli.work.running import Runner, Running


@pytest.fixture
def owner(bus: str) -> Iterator[zmqbus.Node]:
    node = zmqbus.Node("owner", bus=bus)
    yield node
    node.close(0)


def waiting_in(process: subprocess.Popen[str]) -> int:
    """Bytes that nobody has read yet of its output."""
    assert process.stdout is not None
    return int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)


def rest(node: zmqbus.Node, queue: str, count: int) -> list[tuple[object, int]]:
    """What another worker gets, and in which attempt."""
    found = []
    with node.pull(queue) as worker:
        while len(found) < count and (job := worker.get(10)) is not None:
            found.append((job.value, job.attempt))
            job.ack()
    return found


# --- printing ------------------------------------------------------------------------------------


def test_jobs_are_printed_and_done(owner: zmqbus.Node) -> None:
    for value in ("one", "two\x1b[2J", "three"):
        owner.push("jobs.mail", value, headers={"a": 1})
    assert run("pull", "jobs.mail", "-n", "2") == (
        0,
        "jobs.mail  one\njobs.mail  two\\x1b[2J\n",
        "zmqbus: 2 jobs printed\n",
    )
    code, out, err = run("pull", "jobs.*", "-n", "1", "--json", "-q")
    row = json.loads(out)
    assert (code, err) == (0, "")
    assert next(iter(row)) == "attempt"
    assert (row["attempt"], row["topic"], row["value"], row["node"]) == (1, "jobs.mail", "three", "owner")
    assert row["headers"] == {"a": 1}
    until(lambda: figures(owner, "jobs.mail").done == 3)
    owner.push("jobs.mail", {"to": "me"})
    assert run("pull", "jobs.mail", "-n", "1", "-q", "-F", "{value.to} {attempt:>3}")[1] == "me   1\n"
    assert run("pull", "jobs.mail", "-n", "1", "--for", "200ms") == (3, "", "zmqbus: 0 jobs printed\n")


def test_what_is_not_written_goes_back(owner: zmqbus.Node, start: Start) -> None:
    values = [f"{number:03}{'x' * 20_000}" for number in range(60)]
    for value in values:
        owner.push("q", value)
    pull = start("pull", "q", "--credit", "50", "-F", "{value}")
    assert pull.stdout is not None
    until(lambda: waiting_in(pull) > 60_000)  # the pipe is full
    pull.send_signal(signal.SIGINT)
    pull.wait(PATIENCE)
    code, out, err = finish(pull)
    assert code == 130
    printed = [line for line in out.splitlines() if len(line) == 20_003]
    left = len(values) - len(printed)
    assert f"{len(printed)} job" in err
    assert "given back" in err
    assert 0 < len(printed) < 10
    again = rest(owner, "q", left)
    assert sorted([*printed, *(str(value) for value, _ in again)]) == values
    assert {attempt for _, attempt in again} == {1}


def test_a_group_shares_what_is_published(owner: zmqbus.Node, start: Start) -> None:
    owner.publish("logs.web", "before")
    pulls = [start("pull", "logs.>", "--group", "indexers", "--credit", "1", "-n", "5") for _ in range(2)]
    with owner.pull("logs.>", group="others") as other:
        until(lambda: len(owner._engine.jobs._desk.workers) == 3)  # that have joined
        for number in range(10):
            owner.publish("logs.web", number)
        shares = "".join(finish(pull)[1] for pull in pulls)
        assert sorted(shares.splitlines()) == [f"logs.web  {number}" for number in range(10)]
        seen = []
        for _ in range(10):
            job = other.get(10)
            assert job is not None
            seen.append(job.value)
            job.ack()
        assert sorted(seen) == list(range(10))  # what waits for long on a busy machine goes back, and comes later


# --- a process for each --------------------------------------------------------------------------


def test_the_exit_code_says_what_becomes_of_a_job(owner: zmqbus.Node) -> None:
    for value in ("good", "data", "late"):
        owner.push("q.a", value)
    script = 'case "$(cat)" in good) exit 0;; data) exit 65;; late) [ "$ZMQBUS_ATTEMPT" = 2 ];; esac'
    code, out, err = run("pull", "q.a", "--exec", script, "-n", "4")
    assert (code, out) == (0, "")
    assert err == "zmqbus: 4 jobs: 2 done, 1 failed, 1 rejected\n"
    found = figures(owner, "q.a")
    assert (found.done, found.dead, found.redelivered) == (2, 1, 1)
    with owner.pull("$dead.q.a") as letters:
        letter = letters.get(10)
        assert letter is not None
        assert letter.headers is not None
        assert (letter.value, letter.headers["$reason"]) == ("data", "the command exited with 65")
        letter.ack()


def test_a_process_that_is_killed_has_failed(owner: zmqbus.Node) -> None:
    owner.push("q", "x")
    code, _, err = run("pull", "q", "--exec", "kill -9 $$", "-n", "1")
    assert (code, err) == (0, "zmqbus: 1 job: 0 done, 1 failed\n")


@pytest.mark.parametrize(
    ("value", "argument", "given"),
    [
        ('it\'s $(id) `id` "x"\n; {}', b'it\'s $(id) `id` "x"\n; {}', b'it\'s $(id) `id` "x"\n; {}\n'),
        ("", b"", b"\n"),
        ("café", "café".encode(), "café\n".encode()),
        (b"\xff\x01", b"\xff\x01", b"\xff\x01"),
        ({"n": [1, 2.5, None]}, b'{"n":[1,2.5,null]}', b'{"n":[1,2.5,null]}\n'),
    ],
)
def test_the_value_comes_whole(
    owner: zmqbus.Node, tmp_path: Path, value: object, argument: bytes, given: bytes
) -> None:
    path = tmp_path / "out"
    owner.push("q", value)
    assert run("pull", "q", "--exec", f"printf %s {{}} > {path}", "-n", "1", "-q") == (0, "", "")
    assert path.read_bytes() == argument
    owner.push("q", value)
    assert run("pull", "q", "--exec", f"cat > {path}", "-n", "1", "-q") == (0, "", "")
    assert path.read_bytes() == given


def test_what_cannot_be_an_argument_is_rejected(owner: zmqbus.Node) -> None:
    for value in ("a\0b", "x" * 300_000):
        owner.push("q", value)
    code, _, err = run("pull", "q", "--exec", "echo {} > /dev/null", "-n", "2")
    assert (code, err) == (0, "zmqbus: 2 jobs: 0 done, 2 rejected\n")
    owner.push("q", "x" * 300_000)
    assert run("pull", "q", "--exec", "wc -c >&2", "-n", "1")[2] == "zmqbus: 1 job: 1 done\n"


def test_the_environment_names_the_job(owner: zmqbus.Node, tmp_path: Path) -> None:
    path = tmp_path / "out"
    seq = owner.push("q.a", "x")
    command = f'echo "$ZMQBUS_TOPIC $ZMQBUS_ATTEMPT $ZMQBUS_ID" >> {path}; [ "$ZMQBUS_ATTEMPT" = 2 ]'
    assert run("pull", "q.>", "--exec", command, "-n", "2", "-q")[0] == 0
    identity = f"{owner.origin:016x}/q.a/{seq}"
    assert path.read_text() == f"q.a 1 {identity}\nq.a 2 {identity}\n"


def test_a_command_that_cannot_be_run_costs_no_attempt(owner: zmqbus.Node, start: Start) -> None:
    owner.push("q", "x")
    code, _, err = finish(start("pull", "q", "--exec", "/nonexistent/command {}"))
    assert code == 1
    assert "zmqbus: 1 job: 0 done, 1 given back" in err
    assert err.endswith("zmqbus: the command cannot be run (exit code 127): /nonexistent/command {}\n")
    assert rest(owner, "q", 1) == [("x", 1)]


def test_the_lease_is_renewed_while_the_process_runs(owner: zmqbus.Node, start: Start) -> None:
    owner.push("q", "x")
    pull = start("pull", "q", "--exec", "sleep 5", "--lease", "3s", "-n", "1")
    until(lambda: (found := figures(owner, "q")) is not None and found.in_flight == 1)
    with owner.pull("q") as other:
        assert finish(pull) == (0, "", "zmqbus: 1 job: 1 done\n")
        found = figures(owner, "q")
        assert (found.done, found.redelivered) == (1, 0)
        assert other.received == 0


class Ended(SimpleQueue[Running]):
    """Of what has ended; notes how long somebody waits for that, and does not see to the leases meanwhile."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Running:
        """The next."""
        assert timeout is not None
        self.waits.append(timeout)
        return super().get(block, timeout)


@pytest.mark.parametrize(("lease", "longest"), [(0.1, 0.02), (0.3, 0.06), (30.0, 0.25)])
def test_a_short_lease_is_looked_after_in_time(
    owner: zmqbus.Node, bus: str, tmp_path: Path, lease: float, longest: float
) -> None:
    end = tmp_path / "end"
    owner.push("q", "x")
    with Bus(bus, None, None, ()).join("pull") as (node, watch), node.pull("q", credit=1, lease=30.0) as worker:
        runner = Runner(worker, watch, f"until test -e {end}; do sleep 0.01; done", 1, lease)
        runner._ended = ended = Ended()

        def enough() -> None:
            until(lambda: len(ended.waits) > 2)
            end.touch()

        ending = Thread(target=enough)
        ending.start()
        runner.run(1, inf)
        ending.join()
        runner.end(quiet=True)
    assert 0 < max(ended.waits) <= longest
    assert figures(owner, "q").done == 1


def test_some_run_at_a_time(owner: zmqbus.Node, tmp_path: Path) -> None:
    for number in range(6):
        owner.push("q", number)
    meet = f"cd {tmp_path}; touch $(cat); until [ $(ls | wc -l) -ge 3 ]; do sleep 0.01; done"
    assert run("pull", "q", "--exec", meet, "--jobs", "3", "-n", "6") == (0, "", "zmqbus: 6 jobs: 6 done\n")


def test_ctrl_c_waits_for_what_runs(owner: zmqbus.Node, start: Start, tmp_path: Path) -> None:
    for value in "ab":
        owner.push("q", value)
    go = tmp_path / "go"
    pull = start("pull", "q", "--exec", f"echo begun >&2; until [ -e {go} ]; do sleep 0.02; done; echo ended >&2")
    said(pull, "begun")
    pull.send_signal(signal.SIGINT)
    said(pull, "waiting for the end of what runs (1 job)")
    go.touch()
    code, _, err = finish(pull)
    assert (code, err) == (0, "ended\nzmqbus: 1 job: 1 done\n")
    assert rest(owner, "q", 1) == [("b", 1)]


def test_a_second_ctrl_c_ends_what_runs(owner: zmqbus.Node, start: Start, tmp_path: Path) -> None:
    owner.push("q", "x")
    pull = start("pull", "q", "--exec", f"trap 'touch {tmp_path}/ended; exit 1' TERM; echo begun >&2; sleep 60 & wait")
    said(pull, "begun")
    for words in ("waiting for the end of what runs", "1 job: 0 done, 1 given back"):
        pull.send_signal(signal.SIGTERM)
        said(pull, words)
    assert finish(pull)[0] == 143
    until((tmp_path / "ended").exists)
    assert rest(owner, "q", 1) == [("x", 1)]


def test_nothing_is_run_when_nobody_reads_what_it_prints(owner: zmqbus.Node) -> None:
    for number in range(20):
        owner.push("q", number)
    command = f"{sys.executable} -m zmqbus pull q --exec 'echo {{}}; sleep 0.5' | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (141, "0\n")
    again = rest(owner, "q", 19)
    assert [attempt for _, attempt in again].count(1) >= 17  # one may have failed before that was noticed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["q", "--jobs", "2"], "--jobs is of processes: it goes with --exec"),
        (["q", "--exec", "x", "--json"], "with --exec nothing is printed but by the command"),
        (["q", "--json", "-F", "{topic}"], "choose one"),
        (["q..r"], "bad topic"),
        (["q", "--lease", "0"], "is not between"),
        (["q", "--credit", "0"], "--credit"),
        (["q", "--start", "whenever"], "first, last, an offset, or a time"),
        (["q", "--group", ""], "group"),
    ],
)
def test_mistakes(args: list[str], words: str) -> None:
    code, out, err = run("pull", *args)
    assert code in (1, 2)
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


def test_through_a_forwarder_a_group_begins_where_it_is_told(start: Start, bus: str, tmp_path: Path) -> None:
    said(start("forwarder", "--journal", str(tmp_path / "journal")), "inbox tcp://")
    with zmqbus.Node("web", bus=bus) as web:
        for number in range(5):
            web.publish("logs.web", number, durable=True)
    args = ("pull", "logs.>", "--group", "late", "--start", "first")
    assert run(*args, "-n", "3")[1] == "logs.web  0\nlogs.web  1\nlogs.web  2\n"
    assert run(*args, "-n", "2")[1] == "logs.web  3\nlogs.web  4\n"
    assert os.listdir(tmp_path) == ["journal"]
