"""Requests that go out, and are answered, on the thread that asks: as all others do, only sooner."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import zmqbus
from tests.node.conftest import eventually
from tests.node.requests.conftest import Asked, Process, out_of_time
from zmqbus import Node
from zmqbus.node.work.requests.lanes import Lanes

Pair = tuple[Node, Node]


def lanes_of(node: Node) -> Lanes:
    return node._engine.requests.lanes


def warmed_up(node: Node, service: str) -> int:
    """Ask until that goes by a lane; how many went by one so far."""
    before = lanes_of(node).asked
    eventually(lambda: (node.request(service, "warm up"), lanes_of(node).asked > before)[1])
    return lanes_of(node).asked


def test_the_first_requests_go_by_the_engine_and_then_all_by_a_lane(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    a.request("echo")
    assert lanes_of(a)._number == {}, "it may have been the only one"
    before = warmed_up(a, "echo")
    assert [a.request("echo", number) for number in range(100)] == list(range(100))
    assert lanes_of(a).asked == before + 100
    assert lanes_of(a)._number == {b.origin: 1}
    assert a.statistics()["requests_sent"] == b.statistics()["requests_answered"]
    assert a._engine.requests.responders.load(b.origin) == 0


def test_what_is_asked_and_answered_is_the_same(pair: Pair) -> None:
    a, b = pair
    with b.respond("jobs") as requests:
        for how in range(20):  # of which the first go by the engine
            asked = Asked(a.request, "jobs", how, headers={"h": how})
            request = requests.get(10)
            assert request is not None
            assert (request.value, request.headers, request.requester, request.origin) == (
                *(how, {"h": how}),
                *("a", a.origin),
            )
            request.fail(KeyError(how)) if how % 2 else request.reply(bytes(how * 100_000))
            outcome = asked.result()
            if how % 2:
                assert isinstance(outcome, zmqbus.RemoteError)
                assert (outcome.type, outcome.text, outcome.responder) == ("KeyError", str(how), "b")
            else:
                assert outcome == bytes(how * 100_000)
    assert lanes_of(a).asked > 0


def test_there_are_few_lanes_and_no_limit_to_requests(pair: Pair) -> None:
    a, b = pair
    b.responder("double", concurrency=8)(lambda value: value * 2)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            assert list(pool.map(lambda value: a.request("double", value, timeout=30), range(200))) == [
                2 * value for value in range(200)
            ]
    assert lanes_of(a)._number[b.origin] <= 4
    assert lanes_of(a).in_use == 0
    assert 0 < lanes_of(a).asked <= 1000


def test_responders_are_asked_in_turn(bus: str, pair: Pair) -> None:
    a, b = pair
    with Node("c", bus=bus) as c:
        for each in (b, c):
            each.responder("who")(lambda value, each=each: each.name)
        a.wait_for_responders("who", 2, 10)
        names = [a.request("who") for _ in range(200)]
        assert names == names[:2] * 100
        assert lanes_of(a).asked > 100


def test_after_a_timeout_the_lane_is_given_up(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    warmed_up(a, "echo")
    with b.respond("slow") as requests:
        before = lanes_of(a).asked
        began = time.monotonic()
        with pytest.raises(zmqbus.RequestTimeout, match=r"within 0\.2 s"):
            a.request("slow", 1, timeout=0.2)
        assert 0.2 <= time.monotonic() - began < 5
        assert lanes_of(a).asked == before + 1
        assert lanes_of(a)._number == {}
        eventually(lambda: out_of_time(b))
        assert requests.get(0.05) is None, "nobody waits for it any more"
        asked = Asked(a.request, "slow", 2, timeout=2)
        request = requests.get(10)
        assert request is not None
        assert isinstance(asked.result(), zmqbus.RequestTimeout)
        request.reply("late")
    for number in range(50):
        assert a.request("echo", number) == number
    assert a._engine.requests.responders.load(b.origin) == 0


def test_a_killed_responder_is_noticed_at_once(node: Node, start: Callable[[str], Process], tmp_path: Path) -> None:
    dead = start("dead")
    node.wait_for_responders("work", 1, 20)
    before = warmed_up(node, "work")
    asked = Asked(node.request, "work", "hang", timeout=60)
    eventually(lambda: "dead hang" in (tmp_path / "done").read_text())
    dead.signal(signal.SIGKILL)
    dead.process.wait()
    outcome = asked.result(2)
    assert isinstance(outcome, zmqbus.ResponderLost)
    assert (outcome.service, outcome.responder) == ("work", "dead")
    assert lanes_of(node).asked == before + 1
    eventually(lambda: nobody_responds(node))  # the engine may hear of it a moment later than the lane
    eventually(lambda: lanes_of(node)._number == {})


def nobody_responds(node: Node) -> bool:
    try:
        node.request("work", "x", timeout=60)
    except zmqbus.ResponderLost:
        return False
    except zmqbus.NoResponders:
        return True
    raise AssertionError("who should have answered?")


def test_who_refuses_is_passed_over(bus: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    b.responder("jobs")(lambda value: "b")
    before = warmed_up(a, "jobs")
    with Node("c", bus=bus) as c:
        c.responder("jobs")(lambda value: "c")
        a.wait_for_responders("jobs", 2, 10)
        monkeypatch.setattr(b._engine.requests.answering, "_responders", {})  # it says that it does not respond to it
        assert [a.request("jobs", timeout=60) for _ in range(6)] == ["c"] * 6
    assert lanes_of(a).asked > before
    eventually(lambda: [peer.name for peer in a.peers()] == ["b"])
    with pytest.raises(zmqbus.NoResponders):
        a.request("jobs", timeout=60)


def test_who_is_busy_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    b.responder("jobs")(lambda value: "b")
    warmed_up(a, "jobs")
    monkeypatch.setattr("zmqbus.node.work.requests.answering.WAITING_MAX", 0)
    with pytest.raises(zmqbus.ResponderBusy):
        a.request("jobs", timeout=60)
    monkeypatch.undo()
    assert a.request("jobs", timeout=60) == "b"


def test_who_does_not_know_us_hears_hello_on_the_link(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    before = warmed_up(a, "echo")
    monkeypatch.setattr(b._engine.peering, "joined", lambda origin: False)
    assert a.request("echo", 1, timeout=60) == 1
    assert lanes_of(a).asked == before + 1


def test_closing_the_node_ends_what_waits_on_a_lane(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    warmed_up(a, "echo")
    with b.respond("slow") as requests:
        asked = Asked(a.request, "slow", timeout=60)
        assert requests.get(10) is not None
        assert lanes_of(a).in_use == 1
        began = time.monotonic()
        a.close()
        assert isinstance(asked.result(), zmqbus.NodeClosed)
        assert time.monotonic() - began < 5
        assert (lanes_of(a).in_use, lanes_of(a)._number) == (0, {})


def test_lanes_end_with_the_link(pair: Pair) -> None:
    a, b = pair
    b.responder("echo")(lambda value: value)
    warmed_up(a, "echo")
    link = a._engine.peering.links[b.origin]

    async def dial_anew() -> None:
        a._engine.peering._dial(link.endpoint)

    a._call(dial_anew())
    assert lanes_of(a)._number == {}
    eventually(lambda: a._engine.peering.links.get(b.origin) not in (None, link))
    warmed_up(a, "echo")
    b.close()
    eventually(lambda: lanes_of(a)._number == {})


@pytest.mark.parametrize("warm", [False, True])
def test_the_last_answer_of_a_node_that_closes_arrives(pair: Pair, warm: bool) -> None:
    """Also a large one: whoever leaves waits until it has."""
    a, b = pair
    if warm:
        b.responder("echo")(lambda value: value)
        warmed_up(a, "echo")
    with b.respond("large") as requests:
        asked = Asked(a.request, "large", timeout=60)
        request = requests.get(10)
        assert request is not None
        request.reply(bytes(50_000_000))
    b.close(10)
    outcome = asked.result()
    assert isinstance(outcome, bytes), outcome
    assert len(outcome) == 50_000_000
