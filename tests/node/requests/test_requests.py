"""Asking and answering between nodes of one process."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

import zmqbus
from tests.node.conftest import eventually
from tests.node.requests.conftest import Asked, out_of_time
from zmqbus import Node

Pair = tuple[Node, Node]


class Point(msgspec.Struct):
    x: int
    y: int = 0


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 5, "text", b"bytes", [1, {"k": b"v"}], bytes(900_000)])
def test_a_value_there_and_back(pair: Pair, value: Any) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    assert a.request("echo", value) == value


def test_a_request_is_described(pair: Pair) -> None:
    a, b = pair
    with b.respond("jobs.x") as requests:
        asked = Asked(a.request, "jobs.x", 1, headers={"trace": "t1"})
        request = requests.get(10)
        assert request is not None
        assert (request.service, request.value, request.headers) == ("jobs.x", 1, {"trace": "t1"})
        assert (request.requester, request.origin) == ("a", a.origin)
        assert request.reply({"done": True})
        assert asked.result() == {"done": True}


def test_an_answer_may_be_large(pair: Pair) -> None:
    a, b = pair
    b.responder("large")(lambda size: bytes(size))
    assert len(a.request("large", 5_000_000, timeout=20)) == 5_000_000


def test_a_request_that_does_not_fit_an_inbox_is_refused_here(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: None)
    assert a.request("echo", bytes(999_990)) is None
    with pytest.raises(zmqbus.MessageTooLarge):
        a.request("echo", bytes(1_000_000))
    with pytest.raises(zmqbus.MessageTooLarge):
        a.request("echo", 1, headers={"h": bytes(1_000_000)})
    with pytest.raises(zmqbus.UnsupportedValue):
        a.request("echo", object())
    with pytest.raises(zmqbus.UnsupportedValue):
        a.request("echo", 1, headers={"h": object()})
    assert a.request("echo", 1) is None


def test_types_on_both_sides(pair: Pair) -> None:
    a, b = pair
    with b.respond("typed", type=Point) as requests:
        asked = Asked(a.request, "typed", {"x": 1}, type=Point)
        request = requests.get(10)
        assert request is not None
        assert request.value == Point(1)
        request.reply(Point(2, 3))
        assert asked.result() == Point(2, 3)
        asked = Asked(a.request, "typed", {"x": 1}, type=list[int])
        request = requests.get(10)
        assert request is not None
        request.reply("no list")
        mismatch = asked.result()
        assert isinstance(mismatch, zmqbus.ReplyMismatch)
        assert isinstance(mismatch, zmqbus.DecodeError)
        assert "what b sent for 'typed' does not fit the asked type: Expected `array`, got `str`" in str(mismatch)
        asked = Asked(a.request, "typed", {"x": "no number"})
        assert requests.get(0.2) is None, "it answers by itself"
        refused = asked.result()
        assert isinstance(refused, zmqbus.RemoteError)
        assert refused.type == "ReplyMismatch"
        assert "what a sent for 'typed'" in refused.text


class Circle(msgspec.Struct):
    r: int


class Picky(msgspec.Struct):
    """None of whose values can be made."""

    x: int = 0

    def __post_init__(self) -> None:
        raise KeyError("x")


def test_a_type_that_nothing_can_be_decoded_into_is_refused(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    both = Point | Circle  # without tags nobody can tell them apart
    for call in (
        lambda: a.request("echo", 1, type=both),
        lambda: a.request_many("echo", 1, type=both),
        lambda: b.respond("typed", type=both),
        lambda: b.responder("typed", type=both),
        lambda: b.responder("typed", type=both, inline=True),
    ):
        with pytest.raises(zmqbus.SetupError, match=r"type=.*Point.*must be tagged.*; use one that msgspec can"):
            call()
    assert b.statistics()["requests_answered"] == 0, "nothing was sent"
    with pytest.raises(zmqbus.NoResponders):
        b.request("typed")


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, None])
def test_a_concurrency_that_is_none_is_refused(node: Node, concurrency: Any) -> None:
    with pytest.raises(zmqbus.SetupError, match=f"concurrency={concurrency}: use a whole number, 1 or more"):
        node.responder("echo", concurrency=concurrency)


def test_a_type_that_raises_is_answered_by_a_failure(pair: Pair) -> None:
    a, b = pair
    b.responder("picky", type=Picky, concurrency=1)(lambda value: value)
    with b.respond("singly", type=Picky) as requests:
        for _ in range(3):  # the thread lives on
            with pytest.raises(zmqbus.RemoteError, match="b answered with KeyError: 'x'"):
                a.request("picky", {}, timeout=20)
        asked = Asked(a.request, "singly", {}, timeout=20)
        assert requests.get(0.2) is None
        assert isinstance(asked.result(), zmqbus.RemoteError)
    assert not b._engine.requests.answering._open


# --- nobody, and oneself -------------------------------------------------------------------------


def test_without_responders_it_fails_at_once(pair: Pair) -> None:
    a, b = pair
    b.responder("other")(lambda value: None)
    began = time.monotonic()
    with pytest.raises(zmqbus.NoResponders) as caught:
        a.request("echo", timeout=60)
    assert time.monotonic() - began < 5
    assert caught.value.service == "echo"
    with pytest.raises(zmqbus.NoResponders):
        a.request_many("echo", timeout=60)
    with pytest.raises(zmqbus.WaitTimeout, match="responder"):
        a.wait_for_responders("echo", timeout=0.01)


def test_a_node_may_answer_itself(node: Node) -> None:
    node.responder("echo")(lambda value: [value])
    assert node.request("echo", 1) == [1]
    assert node.wait_for_responders("echo") == 1
    node.responder("bad")(lambda value: 1 / 0)
    with pytest.raises(zmqbus.RemoteError, match="node answered with ZeroDivisionError: division by zero"):
        node.request("bad")
    with node.respond("loop") as requests:
        asked = Asked(node.request, "loop", 2, headers={"h": 1})
        request = requests.get(10)
        assert request is not None
        assert (request.value, request.headers, request.requester) == (2, {"h": 1}, "node")
        request.reply(3)
        assert asked.result() == 3


def test_as_soon_as_respond_returns_peers_know(pair: Pair) -> None:
    a, b = pair
    for number in range(20):
        with b.respond(f"s{number}"):
            assert a.wait_for_responders(f"s{number}", timeout=0.001) == 1


def test_a_newcomer_knows_who_responds(bus: str, node: Node) -> None:
    node.responder("echo")(lambda value: value)
    with Node("newcomer", bus=bus) as newcomer:
        newcomer.wait_for_peers(1, 10)
        assert newcomer.request("echo", 5) == 5


# --- errors --------------------------------------------------------------------------------------


class Sour(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no such image"), "ValueError", "no such image"),
        (KeyError("k"), "KeyError", "'k'"),
        (OSError(2, "gone", "name\udcff"), "FileNotFoundError", "[Errno 2] gone: 'name\\udcff'"),
        (ValueError("\udcff"), "ValueError", "?"),
        (ValueError("x" * 20_000), "ValueError", "x" * 10_000),
        (Sour(), "Sour", ""),
        (SystemExit(3), "SystemExit", "3"),
    ],
)
@pytest.mark.parametrize("inline", [False, True])
def test_errors_travel_back(pair: Pair, error: BaseException, kind: str, text: str, inline: bool) -> None:
    if inline and not isinstance(error, Exception):
        return  # that ends the engine's thread, as it ends every other
    a, b = pair

    @b.responder("bad", inline=inline)
    def bad(value: object) -> None:
        raise error

    for _ in range(2):
        with pytest.raises(zmqbus.RemoteError) as caught:
            a.request("bad")
        assert (caught.value.type, caught.value.text, caught.value.responder) == (kind, text, "b")
        assert "Traceback" not in str(caught.value)


def test_an_answer_that_cannot_be_sent_is_an_error(pair: Pair) -> None:
    a, b = pair
    b.responder("bad")(lambda value: object())
    with pytest.raises(zmqbus.RemoteError) as caught:
        a.request("bad")
    assert caught.value.type == "UnsupportedValue"
    with b.respond("loop") as requests:
        asked = Asked(a.request, "loop")
        request = requests.get(10)
        assert request is not None
        with pytest.raises(zmqbus.UnsupportedValue):
            request.reply(object())
        assert request.fail("gave up")  # it was not answered by that
        outcome = asked.result()
        assert (outcome.type, outcome.text) == ("Failed", "gave up")


def test_the_first_answer_counts(pair: Pair) -> None:
    a, b = pair
    with b.respond("echo") as requests:
        asked = Asked(a.request, "echo")
        request = requests.get(10)
        assert request is not None
        assert request.reply(1)
        assert not request.reply(2)
        assert not request.fail("late")
        assert asked.result() == 1


def test_what_cannot_be_asked_for(bus: str, node: Node) -> None:
    for timeout in (0, -1, "1", float("inf"), float("nan"), 10**20):
        with pytest.raises(zmqbus.SetupError, match="timeout="):
            node.request("echo", timeout=timeout)  # type: ignore[arg-type]
    for service in ("", "a b", "a.*", "$x"):
        with pytest.raises(zmqbus.TopicError):
            node.respond(service)
    with pytest.raises(zmqbus.SetupError, match="coroutine"):

        @node.responder("echo")
        async def echo(value: object) -> None: ...

    with pytest.raises(zmqbus.NoResponders):
        node.request("echo")


def test_services_are_bounded(node: Node) -> None:
    for number in range(256):
        node.responder(f"s{number}", inline=True)(lambda value: value)
    with pytest.raises(zmqbus.SetupError, match="256 services"):
        node.respond("one.more")
    node.respond("s0").close()
    assert node.request("s255", 1) == 1


# --- time ----------------------------------------------------------------------------------------


def test_a_timeout_says_so_and_late_requests_are_left_out(pair: Pair) -> None:
    a, b = pair
    with b.respond("slow") as requests:
        began = time.monotonic()
        with pytest.raises(zmqbus.RequestTimeout) as caught:
            a.request("slow", "late", timeout=0.2)
        assert 0.2 <= time.monotonic() - began < 5
        assert isinstance(caught.value, TimeoutError)
        eventually(lambda: out_of_time(b))  # its time is counted from when it came
        asked = Asked(a.request, "slow", "good")
        request = requests.get(10)
        assert request is not None
        assert request.value == "good"
        request.reply()
        assert asked.result() is None
    assert b.statistics()["requests_dropped"] == 1


def test_an_answer_after_the_timeout_does_no_harm(pair: Pair) -> None:
    a, b = pair
    with b.respond("slow") as requests:
        asked = Asked(a.request, "slow", 1, timeout=2)
        request = requests.get(10)
        assert request is not None
        assert isinstance(asked.result(), zmqbus.RequestTimeout)
        request.reply("late")
        asked = Asked(a.request, "slow", 2)
        request = requests.get(10)
        assert request is not None
        request.reply("in time")
        assert asked.result() == "in time"


def test_without_a_limit_it_waits(pair: Pair) -> None:
    a, b = pair
    with b.respond("slow") as requests:
        asked = Asked(a.request, "slow", timeout=None)
        request = requests.get(10)
        assert request is not None
        asked.join(1.5)
        assert asked.is_alive()
        request.reply(1)
        assert asked.result() == 1


def test_get_does_not_wait_longer_than_it_is_told(pair: Pair) -> None:
    _, b = pair
    with b.respond("none") as requests:
        assert requests.get(0) is None
        began = time.monotonic()
        assert requests.get(0.1) is None
        assert 0.1 <= time.monotonic() - began < 5
    assert requests.get() is None  # closed
    assert list(requests) == []
