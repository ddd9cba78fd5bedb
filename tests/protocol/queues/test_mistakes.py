"""Whether the model would notice: a dispatcher with any of these mistakes does not survive the storms."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.protocol.queues.pair import storm
from zmqbus.protocol.queues import dispatcher
from zmqbus.protocol.queues.crew import Crew
from zmqbus.protocol.queues.dispatcher import Dispatcher
from zmqbus.protocol.queues.timers import Timers
from zmqbus.protocol.queues.waiting import Waiting


def after(cls: Any, name: str, spoil: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
    """A method with something wrong at its end: `spoil(result, self, *arguments)` returns what it returns."""
    original = getattr(cls, name)

    def spoilt(self: Any, *arguments: Any, **named: Any) -> Any:
        return spoil(original(self, *arguments, **named), self, *arguments)

    return cls, name, spoilt


def instead(cls: Any, name: str, wrong: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
    """A method that does something else: `wrong(original, self, *arguments)`."""
    original = getattr(cls, name)
    return cls, name, lambda self, *arguments, **named: wrong(original, self, *arguments, **named)


def keep_what_was_cut(cut: Any, *_: Any) -> Any:
    _, start, size, run = cut
    if run is not None:
        run.todo |= ((1 << size) - 1) << start
    return cut


def forget_the_expired(_: None, dispatcher: Dispatcher, *__: Any) -> None:
    for member in dispatcher._members.values():
        for number in [number for number, delivery in member.held.items() if not delivery.live]:
            del member.held[number]


def do_not_mind_silence(_: None, dispatcher: Dispatcher, *__: Any) -> None:
    for member in dispatcher._members.values():
        dispatcher._heard(member)


def do_not_mind_company(_: Any, dispatcher: Dispatcher, member: Any, *__: Any) -> Any:
    member.alone = False
    member.crew.place(member)
    return _


def let_go_of_hands(original: Any, dispatcher: Dispatcher, worker: Any, *arguments: Any) -> None:
    if worker in dispatcher._members:
        dispatcher._members[worker].held.clear()
    original(dispatcher, worker, *arguments)


def fresh_first(original: Any, line: Waiting, most: int) -> Any:
    if not line.turns:
        return original(line, most)
    retries, line.retries = line.retries, deque()
    cut = original(line, most)
    line.retries = retries
    return cut


def nobody_idle(original: Any, self: Crew) -> Any:
    self._idle.clear()
    return original(self)


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a retry goes to two workers": after(Waiting, "cut", keep_what_was_cut),
    "a last attempt goes to two workers": after(Waiting, "cut_last", keep_what_was_cut),
    "a late answer is refused": after(Dispatcher, "tick", forget_the_expired),
    "an answer counts however late": instead(
        Dispatcher, "_take_away", lambda original, self, member, delivery, bits: original(self, member, delivery, 0)
    ),
    "a worker that hangs gets more": after(Dispatcher, "tick", do_not_mind_silence),
    "the last attempt gets company": after(Dispatcher, "_deliver", do_not_mind_company),
    "a busy worker gets a last attempt": instead(
        Crew, "choose", lambda original, self: (self._idle.update(self._free), original(self))[1]
    ),
    "nobody gets a last attempt": instead(Crew, "choose", nobody_idle),
    "who was drained stays so": (Crew, "turn", lambda self: next(iter(self._free)).turn if self._free else None),
    "one more than was granted": instead(Waiting, "cut", lambda original, self, most: original(self, most + 1)),
    "what a worker had that is gone is lost": instead(Dispatcher, "leave", let_go_of_hands),
    "a worker that is gone does not count": instead(
        Dispatcher, "leave", lambda original, self, worker, now, reason=None: original(self, worker, now, None)
    ),
    "who returns has failed": (
        Dispatcher,
        "give_back",
        lambda self, *arguments: self.fail(*arguments, delay=0.0, reason=""),
    ),
    "delays are not kept": (Dispatcher, "_delay", lambda self, line, run, due: self._wait(line, run)),
    "delays are forgotten": (Dispatcher, "_delay", lambda self, line, run, due: None),
    "back-off does not grow": (dispatcher, "_back_off", lambda attempt: 1.0),
    "leases run out too early": instead(Timers, "over", lambda original, self, now: original(self, now + 0.5)),
    "nothing runs out": (Timers, "over", lambda self, now: []),
    "what was not sent has used up credit": instead(
        Dispatcher,
        "unsent",
        lambda original, self, delivery, now: self.give_back(
            delivery.worker, delivery.number, delivery.first, delivery.last, now
        ),
    ),
    "the newest first": instead(
        Waiting,
        "add_fresh",
        lambda original, self, work: (original(self, work), self._fresh[work.batch.origin].rotate()),
    ),
    "fresh ones before what has waited": instead(Waiting, "cut", fresh_first),
    "what was begun is withdrawn": after(
        Dispatcher, "_deliver", lambda delivery, *_: (setattr(delivery.work, "touched", False), delivery)[1]
    ),
    "a dead letter is settled twice": (
        Dispatcher,
        "buried",
        lambda self, dead: self._settle(self._lines[dead.work.line], dead.work, 1 << dead.seq - dead.work.batch.first),
    ),
    "death is not final": instead(
        Dispatcher,
        "_die",
        lambda original, self, line, run, reason: (original(self, line, run, reason), self.dead.pop()),
    ),
    "what has failed is not noted": after(Dispatcher, "tick", lambda _, self, *__: self.changed.clear()),
    "an extended lease runs out": (
        Dispatcher,
        "extend",
        lambda self, worker, number, seconds, now: (
            worker in self._members
            and (self._heard(self._members[worker]) or number in self._members[worker].held)
            and self._members[worker].held[number].live
        ),
    ),
}


def many_storms() -> None:
    for seed in range(200):
        storm(Random(seed), 300)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_notices(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises((AssertionError, LookupError)):
        many_storms()
