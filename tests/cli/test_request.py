"""`zmqbus request`: what is printed, where to, and the exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

import zmqbus
from tests.cli.commands import finish, run

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def node(bus: str) -> Iterator[zmqbus.Node]:
    with zmqbus.Node("server", bus=bus) as node:
        node.responder("echo")(lambda value: value)
        yield node


def test_an_answer_is_printed(node: zmqbus.Node) -> None:
    assert run("request", "echo", "hi\x1b[2J") == (0, "hi\\x1b[2J\n", "")
    assert run("request", "echo") == (0, "null\n", "")
    assert run("request", "echo", "--json", '{"$bytes": "AAEC"}') == (0, '{"$bytes":"AAEC"}\n', "")
    assert run("request", "echo", "--json", '{"a": [1, null]}') == (0, '{"a":[1,null]}\n', "")


def test_headers_go_along(node: zmqbus.Node, start: Start) -> None:
    with node.respond("head") as requests:
        process = start("request", "head", "x", "-H", "a=1", "--headers", "b=two=2")
        request = requests.get(30)
        assert request is not None
        assert (request.value, request.headers) == ("x", {"a": "1", "b": "two=2"})
        assert request.requester == f"request-{process.pid}"
        request.reply([request.value])
        assert finish(process) == (0, '["x"]\n', "")


def test_an_error_is_said_and_cannot_steer_the_terminal(node: zmqbus.Node) -> None:
    @node.responder("bad")
    def bad(value: object) -> None:
        raise ValueError("no\x1b[2J\nzmqbus: all is well")

    code, out, err = run("request", "bad")
    assert (code, out) == (1, "")
    assert err == "zmqbus: server answered with ValueError: no\\x1b[2J\\nzmqbus: all is well\n"


def test_nobody_responds(node: zmqbus.Node) -> None:
    began = time.monotonic()
    code, out, err = run("request", "nobody.there", "--wait", "300ms")
    assert (code, out) == (3, "")
    assert "zmqbus: nobody on the bus responds to 'nobody.there' now; to wait until somebody does: --wait 30s\n" in err
    assert time.monotonic() - began < 10


def test_somebody_who_comes_is_waited_for(bus: str, start: Start) -> None:
    process = start("request", "late", "x", "--wait", "60s")
    with zmqbus.Node("late", bus=bus) as late:
        late.wait_for_peers(1, 30)
        late.responder("late")(lambda value: value)
        assert finish(process) == (0, "x\n", "")


def test_no_answer_in_time(node: zmqbus.Node) -> None:
    with node.respond("slow"):
        code, out, err = run("request", "slow", "--timeout", "200ms")
        assert (code, out) == (3, "")
        assert err == "zmqbus: no answer from 'slow' within 0.2 s; whether it was carried out is not known\n"
        assert run("request", "slow", "--all", "--timeout", "200ms", others=1) == (
            *(3, ""),
            "zmqbus: no answer to slow within 0.2 s\n",
        )


@pytest.mark.parametrize("everybody", [False, True])
def test_ctrl_c(node: zmqbus.Node, start: Start, everybody: bool) -> None:
    with node.respond("slow") as requests:
        process = start("request", "slow", "--timeout", "1h", *(["--all"] if everybody else []))
        assert requests.get(30) is not None
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "", "")


def test_a_responder_that_dies(bus: str, start: Start) -> None:
    program = (
        "import os, sys, zmqbus\n"
        f"with zmqbus.Node('dies', bus={bus!r}) as node, node.respond('dies') as requests:\n"
        "    requests.get(60)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    start("-c", program, command=[sys.executable])
    code, out, err = finish(start("request", "dies", "--wait", "60s", "--timeout", "60s"))
    assert (code, out) == (1, "")
    assert err.startswith("zmqbus: lost dies before it answered a request for 'dies'")


def test_all_of_them(bus: str, node: zmqbus.Node) -> None:
    with zmqbus.Node("other", bus=bus) as other:
        other.responder("echo")(lambda value: [value])
        other.responder("bad")(lambda value: {}["k"])
        code, out, err = run("request", "echo", "x", "--all", others=2)
        assert (code, sorted(out.splitlines()), err) == (0, ['other  ["x"]', "server  x"], "")
        code, out, err = run("request", "echo", "--json", "7", "--all", others=2)
        rows = {row["responder"]: row for row in map(json.loads, out.splitlines())}
        assert (code, err) == (0, "")
        assert rows == {
            "server": {"responder": "server", "origin": f"{node.origin:016x}", "value": 7},
            "other": {"responder": "other", "origin": f"{other.origin:016x}", "value": [7]},
        }
        assert run("request", "bad", "--all", others=2) == (1, "", "zmqbus: other answered with KeyError: 'k'\n")
        code, out, err = run("request", "bad", "--all", "--json", others=2)
        assert (code, err) == (1, "")
        assert json.loads(out)["error"] == {"type": "KeyError", "text": "'k'"}
        code, out, err = run("request", "nobody.there", "--all", "--wait", "1s", others=2)
        assert (code, out) == (3, "")
        assert "nobody on the bus responds" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a b"], "bad topic"),
        (["a.*"], "bad topic"),
        (["echo", "--json", "{"], "not a JSON value"),
        (["echo", "-H", "x"], "is not KEY=VALUE"),
        (["echo", "--timeout", "0"], "not between"),
        (["echo", "1", "2"], "unexpected extra argument"),
        ([], "Missing argument 'SERVICE'"),
    ],
)
def test_mistakes(arguments: list[str], told: str) -> None:
    code, out, err = run("request", *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_a_value_that_is_too_large(node: zmqbus.Node) -> None:
    code, _, err = run("request", "echo", "x" * 1_000_001)
    assert code == 2
    assert "the limit is 1,000,000 bytes" in err
