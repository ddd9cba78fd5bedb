"""Responders that die, stand still, or forget us, while a request is under way: said at once, and never sent twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zmqbus
from tests.node.conftest import eventually
from tests.node.requests.conftest import Asked, Process
from zmqbus import Node
from zmqbus.node.faces.requests.sync import Inline
from zmqbus.node.peers.links import Link
from zmqbus.node.peers.peering import Peering
from zmqbus.protocol import commands

Pair = tuple[Node, Node]
Start = Callable[[str], Process]


def begun(tmp_path: Path) -> list[str]:
    return (tmp_path / "done").read_text().splitlines()


def on_loop(node: Node, work: Callable[[], Any]) -> Any:
    async def done() -> Any:
        return work()

    return node._call(done())


def test_a_killed_responder_is_noticed_at_once_and_the_request_is_done_by_no_other(
    node: Node, start: Start, tmp_path: Path
) -> None:
    first, second = start("first"), start("second")
    node.wait_for_responders("work", 2, 20)
    asked = [Asked(node.request, "work", "hang", timeout=None) for _ in range(2)]
    eventually(lambda: len(begun(tmp_path)) == 2)
    began = time.monotonic()
    first.signal(signal.SIGKILL)
    first.process.wait()
    eventually(lambda: sum(not each.is_alive() for each in asked) == 1, timeout=2)  # its silence would take 5 s
    assert time.monotonic() - began < 2
    (lost,) = [each.outcome for each in asked if not each.is_alive()]
    assert isinstance(lost, zmqbus.ResponderLost)
    assert (lost.service, lost.responder) == ("work", "first")
    assert len(begun(tmp_path)) == 2
    # It is still thought of as a member, but nothing can be sent there: whoever is left is asked, or nobody.
    assert node.request_many("work", "x", timeout=0.1) is not None
    second.signal(signal.SIGKILL)
    second.process.wait()
    assert all(isinstance(each.result(5), zmqbus.ResponderLost) for each in asked)
    began = time.monotonic()
    with pytest.raises(zmqbus.NoResponders):
        node.request("work", "x", timeout=60)
    assert time.monotonic() - began < 2


def test_what_cannot_be_sent_to_the_dead_is_asked_of_the_living(bus: str, node: Node, start: Start) -> None:
    with Node("alive", bus=bus) as alive:
        alive.responder("work")(lambda value: "alive")
        dead = start("dead")
        node.wait_for_responders("work", 2, 20)
        assert {node.request("work") for _ in range(4)} == {"alive", "dead"}
        dead.signal(signal.SIGKILL)
        dead.process.wait()
        eventually(lambda: not on_loop(node, lambda: node._engine.guard(dead.origin)), timeout=2)
        assert [node.request("work", timeout=60) for _ in range(20)] == ["alive"] * 20


def test_a_responder_that_stands_still_is_waited_for(node: Node, start: Start) -> None:
    still = start("still")
    node.wait_for_responders("work", 1, 20)
    still.signal(signal.SIGSTOP)
    try:
        with pytest.raises(zmqbus.RequestTimeout):
            node.request("work", "x", timeout=0.5)
    finally:
        still.signal(signal.SIGCONT)
    assert node.request("work", "y", timeout=20) == "still"


def test_a_responder_that_fell_silent_is_lost(node: Node, start: Start) -> None:
    still = start("still")
    node.wait_for_responders("work", 1, 20)
    still.signal(signal.SIGSTOP)
    try:
        with pytest.raises(zmqbus.ResponderLost):
            node.request("work", "x", timeout=60)
        with pytest.raises(zmqbus.NoResponders):
            node.request("work", "x", timeout=60)
    finally:
        still.signal(signal.SIGCONT)
    node.wait_for_responders("work", 1, 20)
    assert node.request("work", "y", timeout=20) == "still"


def test_many_requests_are_lost_together(node: Node, start: Start, tmp_path: Path) -> None:
    dead = start("dead")
    node.wait_for_responders("work", 1, 20)
    asked = [Asked(node.request, "work", "hang", timeout=60) for _ in range(20)]
    eventually(lambda: len(begun(tmp_path)) == 20)
    dead.signal(signal.SIGKILL)
    dead.process.wait()
    for each in asked:
        assert isinstance(each.result(5), zmqbus.ResponderLost)
    assert on_loop(node, lambda: node._engine.requests.responders.load(dead.origin)) == 0


def test_asking_all_when_one_of_them_dies(bus: str, node: Node, start: Start, tmp_path: Path) -> None:
    with Node("alive", bus=bus) as alive:
        alive.responder("work")(lambda value: "alive")
        dead = start("dead")
        node.wait_for_responders("work", 2, 20)
        asked = Asked(node.request_many, "work", "hang", timeout=60)
        eventually(lambda: len(begun(tmp_path)) == 1)
        dead.signal(signal.SIGKILL)
        dead.process.wait()
        replies = asked.result(5)
        assert {(reply.responder, reply.value, type(reply.error).__name__) for reply in replies} == {
            ("alive", "alive", "NoneType"),
            ("dead", None, "ResponderLost"),
        }


# --- connections ---------------------------------------------------------------------------------


def test_who_hangs_up_does_not_wait_for_the_answer(pair: Pair) -> None:
    """As after a change of address: the answer would go to a connection that is no more."""
    a, b = pair
    with b.respond("work") as requests:
        asked = Asked(a.request, "work", timeout=60)
        request = requests.get(10)
        assert request is not None
        link = a._engine.peering.links[b.origin]
        on_loop(a, lambda: a._engine.peering._dial(link.endpoint))
        assert isinstance(asked.result(5), zmqbus.ResponderLost)
        request.reply()
        eventually(lambda: a._engine.peering.links.get(b.origin) not in (None, link))
        again = Asked(a.request, "work", 2, timeout=60)
        request = requests.get(10)
        assert request is not None
        request.reply(request.value)
        assert again.result() == 2


def test_who_is_forgotten_says_hello_and_is_served(pair: Pair) -> None:
    """As after a reconnect: the request was surely not begun with, so it is sent again."""
    a, b = pair
    b.responder("work")(lambda value: value)
    assert a.request("work", 1) == 1
    on_loop(b, b._engine.peering._guests.clear)
    assert a.request("work", 2, timeout=60) == 2
    assert a.statistics()["requests_sent"] == 3
    assert b.statistics()["requests_answered"] == 2


def test_a_reply_that_makes_no_sense_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    b.responder("work")(lambda value: value)
    answer = b._engine.answer

    def garbled(identity: bytes, body: commands.Body, request: int, parts: Any) -> bool:
        if isinstance(body, commands.Reply):
            parts = ()
        return answer(identity, body, request, parts)

    monkeypatch.setattr(b._engine, "answer", garbled)
    with pytest.raises(zmqbus.RemoteProtocolError, match="b: REPLY without one value"):
        a.request("work")
    monkeypatch.setattr(
        b._engine, "answer", lambda identity, body, request, parts: answer(identity, body, request, [b"\xc1"])
    )
    with pytest.raises(zmqbus.RemoteProtocolError, match="no msgpack"):
        a.request("work")


# --- telling who responds ------------------------------------------------------------------------


def test_peers_are_told_again_when_they_do_not_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    serve, ignored = a._engine.requests.answering.serve, 0

    def deaf(identity: bytes, origin: int, command: commands.Command) -> bool:
        nonlocal ignored
        if isinstance(command.body, commands.Serve) and ignored < 2:
            ignored += 1
            return True
        return serve(identity, origin, command)

    monkeypatch.setattr(a._engine.requests.answering, "serve", deaf)
    monkeypatch.setattr("zmqbus.node.work.requests.answering.TELL_AGAIN", 0.1)
    b.responder("work")(lambda value: value)
    assert ignored == 2
    assert a.request("work", 1) == 1


def test_a_change_between_hello_and_welcome_is_told(bus: str, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELLO named what there was when it was sent, and SERVE goes only to who has answered it."""
    welcomed = Peering._welcomed
    with Node("late", bus=bus) as late:
        answering = late._engine.requests.answering

        def changed_meanwhile(self: Peering, link: Link, command: Any) -> None:
            if self is late._engine.peering and not answering._services:
                answering.add(Inline(late._engine, "work", lambda value: value, None))
            welcomed(self, link, command)

        late.wait_for_peers(1, 10)
        node.wait_for_peers(1, 10)
        monkeypatch.setattr(Peering, "_welcomed", changed_meanwhile)
        link = late._engine.peering.links[node.origin]
        on_loop(late, lambda: late._engine.peering._dial(link.endpoint))
        node.wait_for_responders("work", 1, 10)


def test_who_leaves_is_asked_no_more(bus: str, node: Node) -> None:
    with Node("leaver", bus=bus) as leaver:
        leaver.responder("work")(lambda value: value)
        node.wait_for_responders("work", 1, 10)
    with pytest.raises(zmqbus.NoResponders):
        node.request("work", timeout=60)
