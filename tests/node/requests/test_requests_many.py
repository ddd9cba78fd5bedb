"""Many requests, many responders, too many of both; and the end of either."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

import zmqbus
from tests.node.conftest import eventually
from tests.node.requests.conftest import Asked
from zmqbus import Node

Pair = tuple[Node, Node]

# --- many ----------------------------------------------------------------------------------------


def test_requests_are_spread_evenly(bus: str, node: Node) -> None:
    with Node("r0", bus=bus) as r0, Node("r1", bus=bus) as r1, Node("r2", bus=bus) as r2:
        for each in (r0, r1, r2):
            each.responder("who")(lambda value, each=each: each.name)
        node.wait_for_responders("who", 3, 10)
        assert Counter(node.request("who") for _ in range(300)) == {"r0": 100, "r1": 100, "r2": 100}


def test_who_is_slow_gets_less(bus: str, node: Node) -> None:
    with Node("slow", bus=bus) as slow, Node("quick", bus=bus) as quick:
        gate = threading.Event()

        @slow.responder("who", concurrency=1)
        def waits(value: object) -> str:
            gate.wait(20)
            return "slow"

        quick.responder("who")(lambda value: "quick")
        node.wait_for_responders("who", 2, 10)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(node.request, "who", timeout=30) for _ in range(100)]
            eventually(lambda: sum(future.done() for future in futures) >= 97)  # of four threads, three wait for slow
            gate.set()
            assert Counter(future.result(20) for future in futures)["quick"] >= 90


def test_many_at_a_time(pair: Pair) -> None:
    a, b = pair
    b.responder("double", concurrency=8)(lambda value: value * 2)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda value: a.request("double", value, timeout=30), range(1000))) == [
            2 * value for value in range(1000)
        ]
    assert a.statistics()["requests_sent"] == 1000
    assert b.statistics()["requests_answered"] == 1000


def test_a_function_runs_as_often_at_a_time_as_it_may(pair: Pair) -> None:
    a, b = pair
    running, most, lock, gate = 0, 0, threading.Lock(), threading.Event()

    @b.responder("busy", concurrency=3)
    def busy(value: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if most == 3:
            gate.set()
        gate.wait(20)
        with lock:
            running -= 1

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(a.request, "busy", timeout=30) for _ in range(40)]:
            assert future.result(30) is None
    assert most == 3


def test_several_threads_may_share_the_requests(pair: Pair) -> None:
    a, b = pair
    with b.respond("who") as requests:

        def serve(name: str) -> int:
            answered = 0
            for request in requests:
                request.reply(name)
                answered += 1
            return answered

        with ThreadPoolExecutor(12) as pool:
            serving = [pool.submit(serve, name) for name in "xyz"]
            answers = list(pool.map(lambda _: a.request("who", timeout=30), range(200)))
            requests.close()
            assert sum(future.result(10) for future in serving) == 200
        assert set(answers) <= set("xyz")


# --- busy ----------------------------------------------------------------------------------------


def test_who_has_too_many_waiting_is_passed_over(bus: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr("zmqbus.node.work.requests.answering.WAITING_MAX", 1)
    with b.respond("jobs") as first:
        asked = Asked(a.request, "jobs", 1)
        eventually(lambda: first.unanswered == 1)
        with pytest.raises(zmqbus.ResponderBusy) as caught:
            a.request("jobs", 2, timeout=60)
        assert (caught.value.service, caught.value.responder) == ("jobs", "b")
        with Node("c", bus=bus) as c, c.respond("jobs") as second:
            a.wait_for_responders("jobs", 2, 10)
            other = Asked(a.request, "jobs", 3)
            eventually(lambda: second.unanswered == 1)
            with pytest.raises(zmqbus.ResponderBusy):
                a.request("jobs", 4, timeout=60)
            request = second.get(10)
            assert request is not None
            request.reply("c")
            assert other.result() == "c"
        request = first.get(10)
        assert request is not None
        assert request.value == 1
        request.reply("b")
        assert asked.result() == "b"


def test_busy_here_is_asked_there(bus: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third node fills b, which a does not know of."""
    a, b = pair
    monkeypatch.setattr("zmqbus.node.work.requests.answering.WAITING_MAX", 1)
    with b.respond("jobs") as full, Node("c", bus=bus) as c, Node("d", bus=bus) as d:
        d.wait_for_responders("jobs", 1, 10)
        asked = Asked(d.request, "jobs")
        eventually(lambda: full.unanswered == 1)
        c.responder("jobs")(lambda value: "c")
        a.wait_for_responders("jobs", 2, 10)
        assert [a.request("jobs", timeout=20) for _ in range(6)] == ["c"] * 6
        request = full.get(10)
        assert request is not None
        request.reply("b")
        assert asked.result() == "b"


def test_what_waits_is_bounded_by_bytes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr("zmqbus.node.work.requests.answering.WAITING_BYTES_MAX", 1000)
    with b.respond("jobs") as requests:
        asked = Asked(a.request, "jobs", bytes(600))
        eventually(lambda: requests.unanswered == 1)
        with pytest.raises(zmqbus.ResponderBusy):
            a.request("jobs", bytes(600))
        request = requests.get(10)
        assert request is not None
        request.reply()
        assert asked.result() is None
        asked = Asked(a.request, "jobs", bytes(600))
        request = requests.get(10)
        assert request is not None
        request.reply()
        assert asked.result() is None


def test_more_than_a_link_holds_is_not_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr("zmqbus.node.work.requests.asking.OPEN_MAX", 2)
    with b.respond("jobs") as requests:
        asked = [Asked(a.request, "jobs", timeout=None), Asked(a.request, "jobs", timeout=None)]
        eventually(lambda: requests.unanswered == 2)
        with pytest.raises(zmqbus.ResponderBusy):
            a.request("jobs", timeout=None)
        for _ in asked:
            request = requests.get(10)
            assert request is not None
            request.reply()
        assert [each.result() for each in asked] == [None, None]
    assert a.statistics()["requests_sent"] == 2


# --- asking all ----------------------------------------------------------------------------------


def test_asking_all(bus: str, node: Node) -> None:
    with Node("r0", bus=bus) as r0, Node("r1", bus=bus) as r1, Node("r2", bus=bus) as r2:
        r0.responder("who")(lambda value: value + 1)
        r2.responder("who")(lambda value: 1 / 0)
        node.responder("who")(lambda value: value - 1)
        with r1.respond("who"):  # does not answer
            node.wait_for_responders("who", 4, 10)
            began = time.monotonic()
            replies = {reply.responder: reply for reply in node.request_many("who", 7, timeout=3)}
            assert 2.99 <= time.monotonic() - began < 7.5  # the clock of a loop may be some milliseconds ahead
            assert set(replies) == {"r0", "r2", "node"}
            assert (replies["r0"].value, replies["r0"].origin, replies["r0"].error) == (8, r0.origin, None)
            assert (replies["node"].value, replies["node"].origin) == (6, node.origin)
            error = replies["r2"].error
            assert isinstance(error, zmqbus.RemoteError)
            assert (replies["r2"].value, error.type) == (None, "ZeroDivisionError")
            began = time.monotonic()
            assert len(node.request_many("who", 7, timeout=60, n=2)) == 2
            assert time.monotonic() - began < 10
            (mismatch,) = node.request_many("who", 7, timeout=60, n=1, type=list[int])
            assert isinstance(mismatch.error, zmqbus.ZmqbusError)
        eventually(lambda: len(node._engine.requests.responders.of("who")) == 3)
        began = time.monotonic()
        assert len(node.request_many("who", 7, timeout=60)) == 3  # all there are, so that there is no need to wait
        assert time.monotonic() - began < 10


# --- the end -------------------------------------------------------------------------------------


def test_closing_the_node_ends_what_waits(bus: str, pair: Pair) -> None:
    a, b = pair
    with b.respond("slow"):
        asked = [Asked(a.request, "slow", timeout=timeout) for timeout in (None, 60)]
        eventually(lambda: a.statistics()["requests_sent"] == 2)
        a.close()
        for each in asked:
            assert isinstance(each.result(), zmqbus.NodeClosed)
    with pytest.raises(zmqbus.NodeClosed):
        a.request("slow")
    with pytest.raises(zmqbus.NodeClosed):
        a.respond("slow")


def test_closing_waits_for_what_has_begun(bus: str, pair: Pair) -> None:
    a, b = pair
    began, gate = threading.Event(), threading.Event()

    @b.responder("slow", concurrency=1)
    def slow(value: object) -> object:
        began.set()
        gate.wait(20)
        return value

    running = Asked(a.request, "slow", "begun")
    assert began.wait(10)
    with Node("c", bus=bus) as c:
        waiting = Asked(a.request, "slow", "waits at b")
        eventually(lambda: a.statistics()["requests_sent"] == 2)
        c.responder("slow")(lambda value: "from c")
        a.wait_for_responders("slow", 2, 10)
        closing = threading.Thread(target=b.close, args=(20,))
        closing.start()
        assert waiting.result() == "from c", "nobody had begun with it"
        gate.set()
        assert running.result() == "begun"
        closing.join(20)
        assert not closing.is_alive()


def test_what_is_not_done_when_a_node_has_closed_fails(pair: Pair) -> None:
    a, b = pair
    began, gate = threading.Event(), threading.Event()
    b.responder("slow")(lambda value: (began.set(), gate.wait(20))[1])
    asked = Asked(a.request, "slow", timeout=60)
    assert began.wait(10)
    b.close(timeout=0.2)
    gate.set()
    outcome = asked.result()
    assert isinstance(outcome, zmqbus.RemoteError)
    assert outcome.type == "ResponderClosed"


def test_closing_a_responder(bus: str, pair: Pair) -> None:
    a, b = pair
    requests = b.respond("jobs")
    begun, waiting = Asked(a.request, "jobs", 1), None
    request = requests.get(10)
    assert request is not None
    waiting = Asked(a.request, "jobs", 2)
    eventually(lambda: requests.unanswered == 2)
    requests.close()
    assert not request.reply("late")
    outcome = begun.result()
    assert isinstance(outcome, zmqbus.RemoteError)
    assert outcome.type == "ResponderClosed"
    assert isinstance(waiting.result(), zmqbus.NoResponders), "nobody had begun with it, and there is nobody else"
    eventually(lambda: not a._engine.requests.responders.of("jobs"))
    requests.close()
    b.responder("jobs")(lambda value: value)
    assert a.request("jobs", 3) == 3


def test_two_responders_of_one_node_share(pair: Pair) -> None:
    a, b = pair
    with b.respond("jobs") as one, b.respond("jobs") as two:
        asked = [Asked(a.request, "jobs", number) for number in range(4)]
        eventually(lambda: (one.unanswered, two.unanswered) == (2, 2))
        one.close()
        eventually(lambda: two.unanswered == 4)
        for _ in asked:
            request = two.get(10)
            assert request is not None
            request.reply(request.value)
        assert sorted(each.result() for each in asked) == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child_it_says_so(pair: Pair) -> None:
    a, b = pair
    requests = b.respond("jobs")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                a.request("jobs")
            except zmqbus.ForkedProcess:
                requests.get(1)
        except zmqbus.ForkedProcess:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
