"""The log from the command line: `sub --durable`, `sub --start`, `tap --since`, `pub --durable`, in real processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, Terminal, finish, plain, run
from tests.cli.test_forwarder import begin, fill, said
from zmqbus.journal.inspect import View
from zmqbus.node.faces.asking import ask
from zmqbus.protocol import commands

Start = Callable[..., subprocess.Popen[str]]
PIPE_BYTES = 4096


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def store(start: Start, journal: Path) -> subprocess.Popen[str]:
    """A forwarder named so."""
    return begin(start, "--journal", str(journal), "--name", "store")[0]


@pytest.fixture
def writer(bus: str, store: subprocess.Popen[str]) -> Iterator[zmqbus.Node]:
    """A node that knows it."""
    with zmqbus.Node("writer", bus=bus) as node:
        eventually(lambda: any(peer.journal for peer in node.peers()))
        yield node


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def publish(node: zmqbus.Node, values: Any, topic: str = "t") -> None:
    """On disk when this returns."""
    for value in values:
        node.publish(topic, value)
    node.flush(PATIENCE)


def cursor(journal: Path, name: str = "idx") -> int:
    """As it is on disk; -1: there is none."""
    found = View(str(journal)).cursors.get(name)
    return -1 if found is None else found.offset


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """The next lines that it prints."""
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def narrow(start: Start, *args: str) -> subprocess.Popen[str]:
    """A command whose output is a pipe that holds little."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # before there is anything in it
    process = start(*args, stdout=theirs)
    os.close(theirs)
    process.stdout = os.fdopen(ours)
    return process


# --- sub --durable ---------------------------------------------------------------------------------


def test_sub_durable_goes_on_behind_the_last_line(writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, range(30))
    code, out, err = run("sub", "t", "--durable", "idx", "--start", "first", "-n", "7", "-F", "{offset} {value}")
    assert (code, out) == (0, "".join(f"{i} {i}\n" for i in range(7)))
    assert err.splitlines() == [
        "zmqbus: 'idx' begins at offset 0 of store, 30 messages behind",
        "zmqbus: 7 messages received; 'idx' is at offset 7 of store, 23 behind; nothing lost",
    ]
    assert cursor(journal) == 7
    code, out, err = run("sub", "t", "--durable", "idx", "--start", "first", "-n", "1", "--json", "-q")
    [message] = [json.loads(line) for line in out.splitlines()]
    assert next(iter(message)) == "offset"
    assert (code, err, message["offset"], message["value"], message["seq"]) == (0, "", 7, 7, 8)
    assert cursor(journal) == 8
    code, out, err = run("sub", "t", "--durable", "idx", "--for", "1s")
    assert (code, out) == (0, "".join(f"t  {i}\n" for i in range(8, 30)))
    assert err.splitlines() == [
        "zmqbus: 'idx' begins at offset 8 of store, 22 messages behind",
        "zmqbus: caught up with store at offset 30",
        "zmqbus: 22 messages received; 'idx' is at offset 30 of store; nothing lost",
    ]
    assert cursor(journal) == 30
    code, out, err = run("sub", "t", "--durable", "idx", "-n", "1", "--for", "300ms")
    assert (code, out) == (3, "")
    assert "'idx' begins at offset 30 of store, with nothing before it to catch up with" in err


def test_sub_durable_first_begins_at_the_end(start: Start, writer: zmqbus.Node) -> None:
    publish(writer, ["before"])
    sub = start("sub", "t", "--durable", "idx", "-n", "1")
    said(sub, "'idx' begins at offset 1 of store")
    publish(writer, ["after"])
    assert finish(sub)[:2] == (0, "t  after\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sub_durable_asked_to_stop_before_a_slow_reader(
    start: Start, writer: zmqbus.Node, journal: Path, number: signal.Signals
) -> None:
    """It waits to write. The cursor is behind the last line that was written to its end, exactly."""
    publish(writer, (f"{i} {'x' * (i % 50)}" for i in range(2000)))
    sub = narrow(start, "sub", "t", "--durable", "idx", "--start", "first", "-F", "{value}")
    got = lines(sub, 500)
    eventually(lambda: cursor(journal) >= 500)  # it is committed while it goes on
    sub.send_signal(number)
    sub.wait(PATIENCE)
    assert sub.stdout is not None
    got += sub.stdout.readlines()
    whole = [line for line in got if line.endswith("\n")]
    assert whole == [f"{i} {'x' * (i % 50)}\n" for i in range(len(whole))]
    assert 500 < len(whole) < 2000
    code, _, err = finish(sub)
    assert code == 128 + number
    assert re.search(rf"{len(whole)} (messages received|of them shown); 'idx' is at offset {len(whole)} of store", err)
    assert cursor(journal) == len(whole)
    code, out, _ = run("sub", "t", "--durable", "idx", "-n", "1", "-F", "{offset}")
    assert (code, out) == (0, f"{len(whole)}\n")


def test_sub_durable_asked_to_stop_when_all_is_written(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, range(100))
    sub = start("sub", "t", "--durable", "idx", "--start", "first")
    assert lines(sub, 100)[-1] == "t  99\n"
    sub.send_signal(signal.SIGINT)
    code, out, err = finish(sub)
    assert (code, out) == (130, "")
    assert "100 messages received; 'idx' is at offset 100 of store; nothing lost" in err
    assert cursor(journal) == 100


def test_sub_durable_whose_reader_leaves(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, (f"{i} {'x' * 50}" for i in range(2000)))
    sub = narrow(start, "sub", "t", "--durable", "idx", "--start", "first", "-F", "{value}")
    got = lines(sub, 50)
    assert sub.stdout is not None
    sub.stdout.close()
    assert sub.wait(PATIENCE) == 141
    sub.stdout = None
    assert finish(sub)[0] == 141
    buffered = (PIPE_BYTES + 8192 * 2) // 50  # in the pipe, and what this reader has read ahead
    assert len(got) <= cursor(journal) <= len(got) + buffered
    at = cursor(journal)
    assert run("sub", "t", "--durable", "idx", "-n", "1", "-F", "{offset}")[:2] == (0, f"{at}\n")


def test_sub_durable_over_kill_9(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    """Three lives, the first two killed while they print: every line is there, in order, and none is left out."""
    total = 6000
    publish(writer, range(total))
    printed: set[int] = set()
    following = 0  # what no life has printed yet
    for _ in range(2):
        before = cursor(journal)
        sub = narrow(start, "sub", "t", "--durable", "idx", "--start", "first", "-F", "{offset} {value}")
        got = lines(sub, 1000)
        eventually(lambda before=before: cursor(journal) > max(before, 0))
        sub.kill()
        sub.wait(PATIENCE)
        assert sub.stdout is not None
        got += sub.stdout.readlines()
        offsets = [int(line.split()[0]) for line in got if line.endswith("\n")]
        assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
        assert offsets[0] <= following  # nothing is left out; what was not committed comes again
        following = offsets[-1] + 1
        assert offsets[0] < cursor(journal) <= following
        printed.update(offsets)
    assert following < total
    at = cursor(journal)
    code, out, _ = run("sub", "t", "--durable", "idx", "-n", str(total - at), "-F", "{offset} {value}")
    assert code == 0
    rest = [int(line.split()[0]) for line in out.splitlines()]
    assert rest == list(range(at, total))
    assert printed | set(rest) == set(range(total))
    assert cursor(journal) == total


def test_sub_durable_is_taken_over(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, range(10))
    first = start("sub", "t", "--durable", "idx", "--start", "first")
    assert len(lines(first, 10)) == 10
    eventually(lambda: cursor(journal) >= 9)
    second = start("sub", "t", "--durable", "idx")
    said(second, "'idx' begins at offset")
    code, _, err = finish(first)
    assert code == 5
    received, taken = err.splitlines()[-2:]
    assert received == "zmqbus: 10 messages received; nothing lost"
    assert taken.startswith("zmqbus: another consumer reads as 'idx' now: ")
    publish(writer, ["new"])
    while "new" not in (line := lines(second, 1)[0]):
        assert line
    second.send_signal(signal.SIGINT)
    assert finish(second)[0] == 130
    assert cursor(journal) == 11


def test_sub_durable_outlives_its_forwarder(
    start: Start, store: subprocess.Popen[str], writer: zmqbus.Node, journal: Path
) -> None:
    publish(writer, range(10))
    sub = start("sub", "t", "--durable", "idx", "--start", "first")
    assert len(lines(sub, 10)) == 10
    said(sub, "caught up with store at offset 10")
    store.kill()
    said(sub, "store is away; reading its log goes on when it is back")
    for i in range(10, 20):
        writer.publish("t", i)
    begin(start, "--journal", str(journal), "--name", "store")
    said(sub, "store is back")
    assert lines(sub, 10) == [f"t  {i}\n" for i in range(10, 20)]
    sub.send_signal(signal.SIGINT)
    assert finish(sub)[0] == 130
    assert cursor(journal) == 20


def test_sub_durable_whose_commit_nobody_confirms(
    start: Start, store: subprocess.Popen[str], writer: zmqbus.Node, journal: Path
) -> None:
    publish(writer, range(10))
    sub = start("sub", "t", "--durable", "idx", "--start", "first", "-n", "11")
    assert len(lines(sub, 10)) == 10
    store.kill()
    said(sub, "store is away")
    sub.send_signal(signal.SIGINT)
    code, _, err = finish(sub)
    assert code == 130
    assert "how far it came is not confirmed by its forwarder: the last messages may come again" in err
    begin(start, "--journal", str(journal), "--name", "store")
    at = cursor(journal)
    assert at <= 10
    code, out, _ = run("sub", "t", "--durable", "idx", "-n", str(10 - at), "-F", "{offset}") if at < 10 else (0, "", "")
    assert (code, [int(line) for line in out.split()]) == (0, list(range(at, 10)))


def test_sub_durable_waits_for_a_forwarder(start: Start, bus: str, journal: Path) -> None:
    sub = start("sub", "t", "--durable", "idx", "-n", "1")
    said(sub, "warning: nothing to read yet for t as 'idx': it begins when a forwarder is on the bus")
    begin(start, "--journal", str(journal), "--name", "store")
    said(sub, "'idx' begins at offset 0 of store")
    with zmqbus.Node("writer", bus=bus) as node:
        node.publish("t", "x", durable=True, timeout=PATIENCE)
        assert finish(sub)[:2] == (0, "t  x\n")


def test_sub_durable_says_which_offsets_are_no_more(start: Start, bus: str, journal: Path) -> None:
    begin(start, "--journal", str(journal), "--name", "store", "--max-bytes", "1M", "--on-full", "drop_oldest")
    with zmqbus.Node("writer", bus=bus) as node:
        eventually(lambda: any(peer.journal for peer in node.peers()))
        assert run("sub", "t", "--durable", "idx", "--start", "first", "--for", "10ms", "-q")[0] == 0
        publish(node, (bytes(10_000) for _ in range(500)))
        eventually(lambda: View(str(journal)).segments[0].base_offset > 0)
        code, out, err = run("sub", "t", "--durable", "idx", "--for", "1s", "-q", "-F", "{offset}", "--fail-on-loss")
    offsets = [int(line) for line in out.split()]
    assert offsets == list(range(offsets[0], 500))
    lost = offsets[0]
    assert code == 4
    assert err.splitlines() == [
        f"zmqbus: lost: offsets 0 to {lost - 1} of store are no more ({lost} messages, of any topic)",
        f"zmqbus: {500 - lost} messages received; 'idx' is at offset 500 of store; {lost} messages lost:",
        f"  offsets 0 to {lost - 1} of store ({lost}, of any topic)",
    ]


# --- sub --start -----------------------------------------------------------------------------------


def test_sub_starts_where_it_is_told(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, ["one", "two"])
    middle = datetime.now(UTC)
    publish(writer, ["three", "four"])
    local = middle.astimezone().replace(tzinfo=None)

    def values(where: str, *more: str) -> list[str]:
        code, out, _ = run("sub", "t", "--start", where, "--for", "500ms", "-F", "{value}", *more)
        assert code == 0
        return out.split()

    assert values("first") == values("0") == values("-1h") == ["one", "two", "three", "four"]
    assert values("1") == ["two", "three", "four"]
    assert values(middle.isoformat()) == values(local.isoformat()) == values(f"@{middle.timestamp():.6f}")
    assert values(middle.isoformat()) == ["three", "four"]
    assert values("first", "-n", "3") == ["one", "two", "three"]
    assert values("4") == values("last") == values("now") == []
    sub = start("sub", "t", "--start", "last", "-n", "1")
    said(sub, "begins at offset 4 of store, with nothing before it to catch up with")
    publish(writer, ["five"])
    assert finish(sub)[:2] == (0, "t  five\n")
    code, out, err = run("sub", "t", "--start", "1000")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "zmqbus: cannot read the log of store: offset 1,000 is not there yet: the journal ends at 5"
    ]
    assert View(str(journal)).cursors == {}


# --- tap --since -----------------------------------------------------------------------------------


def test_tap_since_shows_what_was_and_then_what_comes(start: Start, writer: zmqbus.Node, journal: Path) -> None:
    publish(writer, ["x", "y"], "logs.a")
    publish(writer, ["z"], "other")
    tap = start("tap", "logs.>", "--since", "10m", "-F", "{offset} {node} {value}", "-n", "3")
    assert lines(tap, 2) == ["0 writer x\n", "1 writer y\n"]
    said(tap, "caught up with store at offset 3")
    publish(writer, ["new"], "logs.b")
    code, out, err = finish(tap)
    assert (code, out) == (0, "3 writer new\n")
    assert err.splitlines() == ["zmqbus: 3 messages shown; nothing lost"]
    code, out, err = run("tap", "--since", "-10m", "--json", "--where", "offset > 0 and value != 'z'", "-n", "2")
    assert [(row["offset"], row["value"]) for row in map(json.loads, out.splitlines())] == [(1, "y"), (3, "new")]
    assert "reading the log of store (>): nothing but what is claimed, once it is on disk" in err
    code, out, _ = run("tap", "--since", "10m", "-n", "4", "--subjects", "--json")
    assert {row["topic"]: row["messages"] for row in map(json.loads, out.splitlines())} == {
        "logs.a": 2,
        "other": 1,
        "logs.b": 1,
    }
    code, out, _ = run("tap", "--since", "10m", "-x", "other", "--last-per-topic", "-F", "{value}", "--for", "1s")
    assert (code, out) == (0, "y\nnew\n")
    assert View(str(journal)).cursors == {}
    assert writer.wait_for_subscribers("logs.a", 0, observers=True) == 1  # the forwarder


def test_tap_since_shows_all_to_a_slow_reader(start: Start, writer: zmqbus.Node) -> None:
    """More than a live tap keeps for one; and whoever publishes meanwhile is not held up."""
    total = 120_000
    publish(writer, range(total))
    tap = narrow(start, "tap", "t", "--since", "1h", "-F", "{value}", "-n", str(total))
    assert lines(tap, 1) == ["0\n"]
    publish(writer, range(10), "u")
    assert tap.stdout is not None
    assert [int(line) for line in tap.stdout] == list(range(1, total))
    code, _, err = finish(tap)
    assert code == 0
    assert f"{total:,} messages shown; nothing lost" in err


def test_tap_since_goes_on_after_ctrl_z(writer: zmqbus.Node) -> None:
    publish(writer, ["before"])
    with Terminal("tap", "--since", "10m", "-n", "3") as tap:
        tap.until("before")
        tap.until("caught up")
        tap.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(tap.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        publish(writer, ["meanwhile"])
        tap.process.send_signal(signal.SIGCONT)
        tap.until("meanwhile")
        publish(writer, ["after"])
        code, shown = tap.end()
    assert code == 0
    assert "3 messages shown; nothing lost" in plain(shown)


def test_tap_since_without_a_forwarder_is_live(start: Start, bus: str) -> None:
    tap = start("tap", "t", "--since", "10m", "-F", "{value}{offset}", "-n", "1")
    assert said(tap, "no forwarder").endswith(f"is on bus '{bus}', so there is no log to read; this is live\n")
    with zmqbus.Node("writer", bus=bus) as node:
        node.wait_for_subscribers("t", 1, PATIENCE, observers=True)
        node.publish("t", "x")
        assert finish(tap)[:2] == (0, "x\n")


# --- pub --durable ---------------------------------------------------------------------------------


def test_pub_durable_ends_when_all_is_on_disk(start: Start, store: subprocess.Popen[str], journal: Path) -> None:
    code, out, err = run("pub", "t", "a", "b", "--durable", "-H", "k=v")
    assert (code, out) == (0, "")
    assert err == "zmqbus: published 2 messages on t, all on a forwarder's disk\n"
    assert View(str(journal)).durable_offset == 2
    pub = start("pub", "--durable", "t", stdin=subprocess.PIPE)  # more than one window of it
    out, err = pub.communicate("".join(f"line {i}\n" for i in range(50_000)), PATIENCE)
    assert (pub.returncode, err) == (0, "zmqbus: published 50,000 messages on t, all on a forwarder's disk\n")
    assert View(str(journal)).durable_offset == 50_002
    assert run("pub", "t", "x", "--durable", "-q") == (0, "", "")
    store.kill()
    assert View(str(journal)).durable_offset == 50_003


def test_pub_durable_without_a_forwarder(start: Start, bus: str, journal: Path) -> None:
    with zmqbus.Node("reader", bus=bus) as node, node.subscribe("t") as subscription:
        code, out, err = run("pub", "t", "a", "--durable", "--timeout", "500ms")
        assert (code, out) == (3, "")
        nobody = f"zmqbus: nothing published: no forwarder on bus {bus!r} claims t; start one: "
        assert err == f"{nobody}zmqbus forwarder --journal DIR\n"
        begin(start, "--journal", str(journal), "--topics", "u")
        eventually(lambda: any(peer.journal for peer in node.peers()))
        assert run("pub", "t", "a", "--durable", "--timeout", "500ms")[0] == 3
        assert run("pub", "u", "a", "--durable", "--timeout", "30s")[0] == 0
        assert subscription.get(0) is None


def test_pub_durable_whose_forwarder_dies(start: Start, bus: str, store: subprocess.Popen[str], journal: Path) -> None:
    """It counts what is not known to be on disk; and with more patience waits until the forwarder is back."""

    def unacked(pub: subprocess.Popen[str]) -> int | None:
        """As it says itself; None: it does not."""
        [peer] = [peer for peer in probe.peers() if peer.pid == pub.pid] or [None]
        answer = ask(probe, {peer.origin: commands.Stats()}, PATIENCE).get(peer.origin) if peer is not None else None
        if not isinstance(answer, commands.Statistics) or answer.counters["messages_published"] < 3:
            return None
        return int(answer.counters["messages_unacked"])

    def begun() -> subprocess.Popen[str]:
        pub = start("pub", "--durable", "t", "--timeout", patience, stdin=subprocess.PIPE)
        assert pub.stdin is not None
        pub.stdin.write("a\nb\nc\n")
        pub.stdin.flush()
        eventually(lambda: unacked(pub) == 0)
        store.kill()
        store.wait()
        pub.stdin.write("d\ne\n")
        return pub

    with zmqbus.Node("probe", bus=bus) as probe:
        patience = "1s"
        pub = begun()
        _, err = pub.communicate(timeout=PATIENCE)
        assert pub.returncode == 3
        unknown = "2 not known to be on a forwarder's disk: no acknowledgement within 1 s"
        assert err == f"zmqbus: published 5 messages on t; {unknown}\n"
        store, _ = begin(start, "--journal", str(journal), "--name", "store")
        patience = "60s"
        pub = begun()
        assert pub.stdin is not None
        pub.stdin.close()
        said(pub, "waiting for 2 messages to be on a forwarder's disk")
        begin(start, "--journal", str(journal), "--name", "store")
        assert pub.wait(PATIENCE) == 0
        pub.stdin = None
        assert finish(pub)[2] == "zmqbus: published 5 messages on t, all on a forwarder's disk\n"
    assert View(str(journal)).durable_offset == 8


def test_pub_durable_asked_to_stop(start: Start, store: subprocess.Popen[str], journal: Path) -> None:
    pub = start("pub", "--durable", "t", stdin=subprocess.PIPE)
    assert pub.stdin is not None
    pub.stdin.write("a\n")
    pub.stdin.flush()
    eventually(lambda: View(str(journal)).durable_offset == 1)
    pub.send_signal(signal.SIGINT)
    code, _, err = finish(pub)
    assert (code, err) == (130, "zmqbus: published 1 message on t, all on a forwarder's disk\n")


def test_pub_durable_to_a_full_journal(start: Start, bus: str, journal: Path) -> None:
    begin(start, "--journal", str(journal), "--name", "store", "--max-bytes", "1M")
    with zmqbus.Node("writer", bus=bus) as node:
        eventually(lambda: any(peer.journal for peer in node.peers()))
        assert run("sub", "t", "--durable", "idx", "--start", "first", "--for", "10ms", "-q")[0] == 0
        fill(node)
        code, _, err = run("pub", "t", "x", "--durable", "--timeout", "30s")
    assert code == 3
    assert "1 not known to be on a forwarder's disk: the journal has no room" in err
