"""What is yet to be said to one owner, and what it answered. Nothing but bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zmqbus.node.work.queues.tie import Fail, Tie
from zmqbus.protocol import commands
from zmqbus.protocol.commands import DELIVERIES_MAX, Body


class Heard:
    """An owner that only listens."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.away = False

    def follow(self, body: Body, on_answer: Callable[..., None]) -> int:
        return 1

    def say(self, body: Body, number: int) -> bool:
        if not self.away:
            self.bodies.append(body)
        return not self.away

    def unfollow(self, number: int) -> None:
        pass


class Given:
    def __init__(self, number: int) -> None:
        self.number, self.attempt, self.topic, self.origin = number, 1, "jobs", 7


def test_what_is_refused_is_known_in_whatever_order_the_answers_come() -> None:
    """A forwarder that buries a job first answers what was said after that."""
    tie = Tie(1, 7, "owner", Heard())
    given = Given(5)
    for at in range(1, 4):
        tie.add([(given, at, at)])
        tie.compose(0)
    tie.fail(Fail("reject", -1, "no"), (5, 9, 9))
    tie.compose(0)
    assert tie.asked == 4
    assert tie.settled([(5, 3, 3)]) == [(given, 3, 3)]
    assert tie.unsettled == 2
    assert tie.settled([(5, 9, 9)]) == [], "that was not acknowledged"
    assert tie.settled([]) == []
    assert tie.unsettled == 1
    assert tie.settled([(5, 2, 2)]) == [(given, 2, 2)]
    assert (tie.answered, tie.unsettled) == (4, 0)
    assert tie.settled([]) == [], "who says more than he was asked"
    assert tie.answered == 4


def test_many_words_are_several_commands_and_credit_goes_with_the_last() -> None:
    heard = Heard()
    tie = Tie(1, 7, "owner", heard)
    tie.add((Given(at), 1, 1) for at in range(DELIVERIES_MAX + 1))
    for at in range(DELIVERIES_MAX + 1):
        tie.fail(Fail("return", -1, ""), (at, 2, 2))
    tie.fail(Fail("nack", 10, "why"), (0, 3, 5))
    assert tie.finished == 2 * DELIVERIES_MAX + 5
    tie.compose(99)
    assert tie.speak()
    assert [type(body) for body in heard.bodies] == [commands.Fail] * 3 + [commands.Done] * 2
    assert [body.credit for body in heard.bodies] == [0, 0, 0, 0, 99]
    assert {len(getattr(body, "jobs", getattr(body, "done", ()))) for body in heard.bodies} == {DELIVERIES_MAX, 1}
    assert (heard.bodies[2].how, heard.bodies[2].delay_ms, heard.bodies[2].reason) == ("nack", 10, "why")


def test_what_could_not_be_said_comes_first_the_next_time() -> None:
    heard = Heard()
    tie = Tie(1, 7, "owner", heard)
    heard.away = True
    tie.add([(Given(1), 1, 1)])
    tie.compose(10)
    assert not tie.speak()
    assert tie.is_behind
    heard.away = False
    tie.add([(Given(1), 2, 2)])
    tie.compose(11)
    assert tie.speak()
    assert not tie.is_behind
    assert [(body.done, body.credit) for body in heard.bodies] == [([(1, 1, 1)], 10), ([(1, 2, 2)], 11)]


def test_an_owner_that_is_gone_owes_an_answer_for_what_was_acknowledged() -> None:
    tie = Tie(1, 7, "owner", Heard())
    given = Given(1)
    tie.add([(given, 1, 4)])
    tie.compose(0)
    tie.add([(given, 6, 6)])
    tie.fail(Fail("nack", -1, ""), (1, 5, 5))
    assert tie.unsettled == 5
    assert tie.abandon() == [(given, 1, 4), (given, 6, 6)]
    assert tie.gone
    assert tie.abandon() == []
