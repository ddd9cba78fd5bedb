"""On a terminal: tables, colours, live pictures, Ctrl-C and Ctrl-Z; and that it is left as it was.

Stopping is quiet and takes bounded time, however early or often it is asked for, and holds nobody else up.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
from rich.console import Console

import zmqbus
from tests.cli.commands import PATIENCE, Terminal, finish, plain
from zmqbus.cli.messages.render import LastPerTopic, TopicRow, TopicTable
from zmqbus.cli.shell.output import Column, make_table
from zmqbus.cli.shell.stopping import LEAVE_MAX
from zmqbus.protocol.message import Message

SLACK = 2.0  # seconds, on a machine with other work to do
PIPE_FULL = 60_000  # bytes, of the 64 KiB that a pipe holds
SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"
Start = Callable[..., subprocess.Popen[str]]
LONG = [
    ("nodes", "--watch"),
    ("tap",),
    ("tap", "--subjects"),
    ("sub", "t"),
    ("pub", "t", "-"),
    ("pub", "t", "x", "--wait-subscribers", "9"),
    ("pub", "t", "x", "--count", "100", "--rate", "0.01"),
]

# --- tables ------------------------------------------------------------------------------------


def test_topic_table_counts_and_sorts() -> None:
    table = TopicTable()
    assert table.rows(now=0.0) == []
    for topic, size in (("b", 10), ("a", 5), ("c", 1), ("c", 2)):
        table.add(topic, size, now=100.0)
    rows = table.rows(now=104.0)
    assert [(row.topic, row.count, row.bytes) for row in rows] == [("c", 2, 3), ("a", 1, 5), ("b", 1, 10)]
    assert [row.rate for row in rows] == [0.5, 0.25, 0.25]


def test_topic_table_rate_slides() -> None:
    table = TopicTable(window=5.0)
    for i in range(100):  # ten a second, for ten seconds
        table.add("t", 1, now=100.0 + i * 0.1)
    assert table.rows(now=110.0)[0].rate == pytest.approx(10.0, rel=0.05)
    assert table.rows(now=112.5)[0].rate == pytest.approx(5.0, rel=0.15)
    assert table.rows(now=115.5)[0].rate == 0.0
    assert table.rows(now=1e9)[0].rate == 0.0
    table.add("t", 1, now=1e9)
    assert 0 < table.rows(now=1e9)[0].rate <= 0.25
    assert table.rows(now=1e9)[0].count == 101


def test_topic_table_rate_at_its_start_and_with_a_late_topic() -> None:
    table = TopicTable(window=5.0)
    for _ in range(10):
        table.add("early", 1, now=100.0)
    assert table.rows(now=100.0)[0].rate == 20.0  # over half a second at least: one part of the window
    assert table.rows(now=101.0)[0].rate == 10.0
    table.add("late", 1, now=101.0)
    assert table.rows(now=102.0)[1] == TopicRow("late", 1, 1, 0.5)


def test_topic_table_is_bounded_and_says_what_it_dropped() -> None:
    table = TopicTable(topics_max=2)
    for topic in ("a", "b", "c", "a", "d", "c"):
        table.add(topic, 1, now=1.0)
    assert [(row.topic, row.count) for row in table.rows(now=1.0)] == [("a", 2), ("b", 1)]
    assert table.dropped == 3


def test_rows_print_safely() -> None:
    assert TopicRow("t\x1b[31m", 12_345, 2048, 1234.0).cells() == (r"t\x1b[31m", "12,345", "2 KiB", "1.2k/s")


def test_last_per_topic() -> None:
    last = LastPerTopic(topics_max=2)
    messages = [Message(topic, i, i, 1, 0.0) for i, topic in enumerate(["b", "a", "b", "c", "a", "c"])]
    for message in messages:
        last.add(message)
    assert last.messages() == [messages[4], messages[2]]
    assert last.dropped == 2


@pytest.mark.parametrize("width", range(20, 120))
def test_what_is_to_be_copied_is_never_folded(width: int) -> None:
    columns = (Column("name"), Column("id", whole=True, spare=2), Column("inbox", whole=True), Column("role", spare=3))
    row = ["a name of some length", "0123456789abcdef", "tcp://127.0.0.1:33109", "node"]
    console = Console(width=width, file=io.StringIO())
    console.print(make_table(columns, [row], width), crop=False)
    shown = console.file.getvalue()
    assert row[2] in shown
    assert ("id" in shown) == (row[1] in shown) == (width >= 61)
    assert ("role" in shown) == (width >= 68)
    if width >= 42:
        assert all(len(line.rstrip()) <= width for line in shown.splitlines())


# --- what is seen ------------------------------------------------------------------------------


def test_tap_shows_a_live_table(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "--subjects") as tap:
        node.wait_for_subscribers("live.topic", 1, PATIENCE, observers=True)
        tap.until("live.topic", lambda: node.publish("live.topic", "x"))
        tap.interrupt()
        code, shown = tap.end()
    assert code == 130
    assert "> on bus '" in shown
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert "counted in 1 topic; nothing lost" in shown


def test_tap_shows_the_last_message_of_each_topic(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "--last-per-topic", columns=80) as tap:
        node.wait_for_subscribers("t.a", 1, PATIENCE, observers=True)
        for i in range(5):
            node.publish("t.a", f"first {i}")
            node.publish("t.b", {"status": i, "path": "/" + "x" * 60})
        tap.until("first 4")
        tap.until('{"status":4')  # while it is live, each keeps to one line
        tap.interrupt()
        code, shown = tap.end()
    assert code == 130
    final = plain(shown[shown.rindex(SHOW) :])
    assert "t.a" in final
    assert '    status: 4\n    path: "/xxx' in final
    assert final.endswith("zmqbus: 10 messages seen, 10 matched, 2 shown: the last of each topic; nothing lost\n")


def test_tap_spreads_maps_out_in_colour(bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", "-n", "1", columns=120) as tap:
        node.wait_for_subscribers("t", 1, PATIENCE, observers=True)
        node.publish("t", {"status": 500, "path": "/"}, headers={"trace": "7f3a"})
        code, shown = tap.end()
    assert code == 0
    assert "\x1b[33m  status: \x1b[0m500" in shown
    assert '[trace=7f3a]  status: 500  path: "/"\n' in plain(shown)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nodes_never_folds_an_endpoint(columns: int, bus: str) -> None:
    with zmqbus.Node("a-node-with-quite-a-long-name", bus=bus) as node:
        for _ in range(10):
            with Terminal("nodes", "--wait", "500ms", columns=columns) as nodes:
                code, shown = nodes.end()
            if "no other node" not in shown:  # as it is when they have not met in time
                break
    assert code == 0
    assert node.endpoints["inbox"] in plain(shown)
    assert columns < 200 or f"{node.origin:016x}" in plain(shown)
    assert columns < 200 or "release" in plain(shown)
    assert "\x1b[1m" in shown


def test_sub_is_coloured_unless_asked_not_to(bus: str) -> None:
    with zmqbus.Node("keeper", bus=bus) as node:
        node.publish("t", "hi")
        with Terminal("sub", "t", "--history", "1", "-n", "1", NO_COLOR="") as sub:
            assert "\x1b[36mt\x1b[0m  hi" in sub.end()[1]


@pytest.mark.parametrize(
    "args",
    [
        ("sub", "t", "--history", "1", "-n", "1"),
        ("tap", "t", "--for", "300ms"),
        ("nodes", "--wait", "300ms"),
        ("topics", "--wait", "300ms"),
    ],
    ids=lambda args: args[0],
)
def test_no_color_is_respected_everywhere(args: tuple[str, ...], bus: str) -> None:
    with zmqbus.Node("keeper", bus=bus) as node:
        node.publish("t", "hi")
        with Terminal(*args, NO_COLOR="1") as command:
            code, shown = command.end()
    assert code == 0
    assert "\x1b" not in shown


# --- Ctrl-C, early, once and twice; SIGTERM; Ctrl-Z ----------------------------------------------


def named(args: tuple[str, ...]) -> str:
    return " ".join(args)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_is_quiet(number: int, code: int, start: Start, bus: str) -> None:
    with zmqbus.Node("talker", bus=bus) as node:
        sub = start("sub", "talk", "--history", "1")
        node.publish("talk", "hi")
        assert sub.stdout is not None
        assert sub.stdout.readline() == "talk  hi\n"
        sub.send_signal(number)
        got, out, err = finish(sub)
    assert (got, out) == (code, "")
    assert re.fullmatch(r"zmqbus: 1 message received.*; nothing lost\n", err)


def started(command: Terminal, name: str, bus: str) -> None:
    """Wait until it is on the bus."""
    with zmqbus.Node("witness", bus=bus) as node:
        deadline = time.monotonic() + PATIENCE
        while not any(peer.name.startswith(f"{name}-") for peer in node.peers()):
            assert time.monotonic() < deadline
            command.read()


@pytest.mark.parametrize("args", LONG, ids=named)
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_a_second_ctrl_c_does_no_harm(args: tuple[str, ...], pause: float, bus: str) -> None:
    with Terminal(*args) as command:
        started(command, args[0], bus)
        command.interrupt()
        began = time.monotonic()
        time.sleep(pause)
        command.interrupt()
        code, shown = command.end()
        assert time.monotonic() - began < LEAVE_MAX + SLACK
    assert code == 130
    assert not re.search(r"exception|error|warning", shown, re.IGNORECASE)


@pytest.mark.parametrize("after", [0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3])
def test_an_early_ctrl_c_is_quiet(after: float, bus: str) -> None:
    """Python itself takes the first milliseconds; from then on it is ours, whatever is being imported or opened."""
    program = """
import sys
from zmqbus import cli
known, told = cli.signal.getsignal, []
def tell(number):  # the first thing that main does
    if not told:
        told.append(print(flush=True))
    return known(number)
cli.signal.getsignal = tell
sys.argv[1:] = ["tap"]
cli.main()
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after - 0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, -signal.SIGINT)  # to a shell they are the same
    assert out == ""
    assert re.fullmatch(r"|zmqbus: 0 messages shown; nothing lost\n", err)


def test_the_program_loads_little_before_it_minds_signals() -> None:
    program = "import sys, zmqbus.cli; print({'click', 'msgspec', 'zmq', 'asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "set()\n"


def test_pub_interrupted_while_it_waits_says_what_is_not_confirmed(start: Start, bus: str) -> None:
    with zmqbus.Node("deaf", bus=bus) as node, node.subscribe("t"):  # nobody looks at what it receives
        pub = start("pub", "t", "a", "b", "--wait-subscribers", "1")
        deadline = time.monotonic() + PATIENCE
        while not [one for one in node.topics("t", timeout=0.2) if one.seq == 2]:
            assert time.monotonic() < deadline
        pub.send_signal(signal.SIGINT)
        code, out, err = finish(pub)
    assert (code, out) == (130, "")
    assert err == (
        "zmqbus: published 2 messages on t; interrupted before 1 subscriber had confirmed all of it: "
        "some may be missing there\n"
    )


def test_sigterm_ends_a_tap_that_nobody_reads(start: Start, bus: str) -> None:
    with zmqbus.Node("fast", bus=bus) as node:
        tap = start("tap", "fast")
        node.wait_for_subscribers("fast", 1, PATIENCE, observers=True)
        for i in range(20_000):
            node.publish("fast", i)
        fill(tap)
        tap.send_signal(signal.SIGTERM)
        began = time.monotonic()
        tap.wait(PATIENCE)
        assert time.monotonic() - began < LEAVE_MAX + SLACK
        code, out, err = finish(tap)
    assert code == 143
    assert re.match(r"zmqbus: [\d,]+ messages seen, [\d,]+ matched", err)
    assert "nothing lost" in err
    assert out


def fill(process: subprocess.Popen[str]) -> None:
    """Wait until it has filled the pipe that nobody reads: with less than its size, where pages are filled in part."""
    assert process.stdout is not None
    held = bytearray(4)
    before, since = 0, time.monotonic()
    deadline = since + PATIENCE
    while (size := int.from_bytes(held, sys.byteorder)) < PIPE_FULL and not (size and time.monotonic() > since + 3):
        assert time.monotonic() < deadline
        fcntl.ioctl(process.stdout, termios.FIONREAD, held)
        if size != before:
            before, since = size, time.monotonic()
        time.sleep(0.02)


def stopped(process: subprocess.Popen[bytes]) -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@pytest.mark.parametrize("view", [(), ("--last-per-topic",)], ids=named)
def test_ctrl_z_takes_tap_off_the_bus_until_it_goes_on(view: tuple[str, ...], bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", *view) as tap:
        node.wait_for_subscribers("t", 1, PATIENCE, observers=True)
        tap.until("before", lambda: node.publish("t", "before"))
        tap.process.send_signal(signal.SIGTSTP)
        stopped(tap.process)
        deadline = time.monotonic() + PATIENCE
        while node.peers():  # it said good-bye: nobody waits for it
            assert time.monotonic() < deadline
        node.publish("t", "meanwhile")
        tap.process.send_signal(signal.SIGCONT)
        tap.until("what passed meanwhile is not shown")
        node.wait_for_subscribers("t", 1, PATIENCE, observers=True)
        tap.until("after", lambda: node.publish("t", "after"))
        tap.interrupt()
        code, shown = tap.end()
    assert code == 130
    assert "meanwhile\n" not in plain(shown)
    assert "nothing lost" in shown


def test_ctrl_z_reaches_a_tap_that_waits_for_its_reader(start: Start, bus: str) -> None:
    """As in `zmqbus tap | less`: not a line is torn, and what was not shown is counted."""
    with zmqbus.Node("fast", bus=bus) as node:
        tap = start("tap", "fast", "-F", "{value}", process_group=0)
        node.wait_for_subscribers("fast", 1, PATIENCE, observers=True)
        for i in range(30_000):
            node.publish("fast", i)
        fill(tap)  # while what it missed can be repaired
        assert node.close(PATIENCE) == []
    os.kill(tap.pid, signal.SIGTSTP)
    _, status = os.waitpid(tap.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(tap.pid, signal.SIGCONT)
    assert tap.stderr is not None
    assert "what passed meanwhile is not shown" in tap.stderr.readline()
    assert tap.stdout is not None
    values = [int(tap.stdout.readline()) for _ in range(100)]
    assert values == list(range(100))
    tap.send_signal(signal.SIGINT)
    shown = values + [int(line) for line in tap.stdout]
    code, _, err = finish(tap)
    assert code == 130
    assert shown == list(range(len(shown)))
    found = re.fullmatch(
        r"zmqbus: 30,000 messages seen, ([\d,]+) matched and shown; ([\d,]+) not shown: .*; nothing lost\n", err
    )
    assert found is not None, err
    assert len(shown) == int(found[1].replace(",", ""))


def test_sub_says_what_its_reader_did_not_take(start: Start, bus: str) -> None:
    with zmqbus.Node("fast", bus=bus) as node:
        sub = start("sub", "fast")
        node.wait_for_subscribers("fast", 1, PATIENCE, observers=True)
        for i in range(30_000):
            node.publish("fast", i)
        fill(sub)
        sub.send_signal(signal.SIGINT)
        sub.wait(PATIENCE)
        code, out, err = finish(sub)
    assert code == 130
    found = re.fullmatch(r"zmqbus: ([\d,]+) messages received, ([\d,]+) of them shown.*; nothing lost\n", err)
    assert found is not None, err
    assert out.count("\n") == int(found[2].replace(",", "")) < int(found[1].replace(",", ""))
