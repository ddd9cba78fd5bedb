"""Ctrl-C, early, once and twice; SIGTERM; Ctrl-Z: quiet, in bounded time, and nobody else is held up."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, Terminal, finish, plain
from zmqbus.cli.shell.stopping import LEAVE_MAX

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
        assert time.monotonic() - began < LEAVE_MAX + 0.5
    assert code == 130
    assert not re.search(r"exception|error|warning", shown, re.IGNORECASE)


@pytest.mark.parametrize("after", [0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3])
def test_an_early_ctrl_c_is_quiet(after: float, bus: str) -> None:
    """Python itself takes the first milliseconds; from then on it is ours, whatever is being imported or opened."""
    command = [
        sys.executable,
        "-c",
        "import sys, zmqbus.cli; print(flush=True); sys.argv[1:] = ['tap']; zmqbus.cli.main()",
    ]
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
        time.sleep(0.3)  # into its wait of five seconds
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
        node.wait_for_subscribers("fast", 1, PATIENCE)
        for i in range(20_000):
            node.publish("fast", i)
        tap.send_signal(signal.SIGTERM)
        began = time.monotonic()
        tap.wait(PATIENCE)
        assert time.monotonic() - began < LEAVE_MAX + 0.5
        code, out, err = finish(tap)
    assert code == 143
    assert re.match(r"zmqbus: [\d,]+ messages seen, [\d,]+ matched", err)
    assert "nothing lost" in err
    assert out


def stopped(process: subprocess.Popen[bytes]) -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@pytest.mark.parametrize("view", [(), ("--last-per-topic",)], ids=named)
def test_ctrl_z_takes_tap_off_the_bus_until_it_goes_on(view: tuple[str, ...], bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node, Terminal("tap", *view) as tap:
        node.wait_for_subscribers("t", 1, PATIENCE)
        tap.until("before", lambda: node.publish("t", "before"))
        tap.process.send_signal(signal.SIGTSTP)
        stopped(tap.process)
        deadline = time.monotonic() + PATIENCE
        while node.peers():  # it said good-bye: nobody waits for it
            assert time.monotonic() < deadline
        node.publish("t", "meanwhile")
        tap.process.send_signal(signal.SIGCONT)
        tap.until("what passed meanwhile is not shown")
        node.wait_for_subscribers("t", 1, PATIENCE)
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
        node.wait_for_subscribers("fast", 1, PATIENCE)
        for i in range(30_000):
            node.publish("fast", i)
        assert node.close(PATIENCE) == []
    select.select([], [], [], 0.3)
    os.kill(tap.pid, signal.SIGTSTP)
    _, status = os.waitpid(tap.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(tap.pid, signal.SIGCONT)
    assert tap.stderr is not None
    assert "what passed meanwhile is not shown" in tap.stderr.readline()
    assert tap.stdout is not None
    values = [int(tap.stdout.readline()) for _ in range(10_000)]
    assert values == list(range(10_000))
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
