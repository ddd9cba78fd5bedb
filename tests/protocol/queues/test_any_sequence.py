"""Any sequence of what may happen to a dispatcher, against the model.

A storm that fails prints its seed: `ZMQBUS_SEED=n pytest tests/protocol/queues -k storm` plays it alone. Lives of
hypothesis are printed by it.
"""

from __future__ import annotations

import os
import sys
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.protocol.queues.model import LINES, TEAMS, Given
from tests.protocol.queues.pair import Pair, storm
from zmqbus.protocol.queues.work import Line, Team

WORKERS = ["ann", "bob", "cid", "dot"]
NAME = st.sampled_from(WORKERS)
LINE = st.sampled_from([LINES[0]] * 4 + LINES)  # where more meets, more happens
TEAM = st.sampled_from([next(iter(TEAMS))] * 2 + list(TEAMS))
ORIGIN = st.integers(1, 3)
CREDIT = st.sampled_from([0, 1, 1, 2, 5, 1000])
PICK = st.integers(0, 1000)
STEP = 0.25  # seconds; all times are multiples of it, so that no rounding matters
SECONDS = st.integers(1, 200).map(lambda n: n * STEP)
DELAY = st.none() | st.just(0.0) | SECONDS


class Life(RuleBasedStateMachine):
    """One life of a dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(5)

    @initialize(
        attempts_max=st.sampled_from([1, 2, 2, 3, 5]), teams=st.lists(TEAM, min_size=1, max_size=4), credit=CREDIT
    )
    def begin(self, attempts_max: int, teams: list[Team], credit: int) -> None:
        self.pair = Pair(attempts_max)
        for name, team in zip(WORKERS, teams, strict=False):
            self.pair.join(name, team, 30.0, credit)

    # --- work ------------------------------------------------------------------------------------

    @rule(line=LINE, origin=ORIGIN, count=st.sampled_from([1, 1, 2, 3, 8, 40, 300]), take=st.booleans())
    def push(self, line: Line, origin: int, count: int, take: bool) -> None:
        self.pair.push(line, origin, count, 0, {}, {})
        if take:
            self.pair.take_all()

    @rule(
        line=LINE,
        origin=ORIGIN,
        count=st.integers(1, 6),
        done=st.just(0) | st.integers(0, 63),
        attempts=st.dictionaries(st.integers(0, 5), st.integers(1, 6), max_size=3),
        due=st.dictionaries(st.integers(0, 5), st.integers(-4, 80), max_size=6),
    )
    def push_some_of_it(
        self, line: Line, origin: int, count: int, done: int, attempts: dict[int, int], due: dict[int, int]
    ) -> None:
        """As after a restart: some is done, some has failed before, some is to wait."""
        done &= (1 << count) - 1
        attempts = {i: n for i, n in attempts.items() if i < count and not done >> i & 1}
        now = self.pair.model.now
        self.pair.push(line, origin, count, done, attempts, {i: now + n * STEP for i, n in due.items() if i < count})

    @rule(line=LINE, origin=ORIGIN, forget=st.integers(0, 3))
    def take_back(self, line: Line, origin: int, forget: int) -> None:
        if forget == 1:
            self.pair.forget(line)
        else:
            self.pair.withdraw(line, origin)

    # --- workers ---------------------------------------------------------------------------------

    @rule(name=NAME, team=TEAM, lease=st.sampled_from([1.0, 7.5, 30.0]), credit=CREDIT)
    def join(self, name: str, team: Team, lease: float, credit: int) -> None:
        self.pair.join(name, team, lease, credit)

    @rule(name=NAME, counted=st.booleans(), team=TEAM, credit=CREDIT)
    def leave(self, name: str, counted: bool, team: Team, credit: int) -> None:
        """And perhaps come back."""
        self.pair.leave(name, counted)
        if credit:
            self.pair.join(name, team, 30.0, credit)

    @rule(name=NAME, more=st.sampled_from([-1, 0, 1, 1, 3, 500]), take=st.booleans())
    def grant(self, name: str, more: int, take: bool) -> None:
        self.pair.grant(name, more)
        if take:
            self.pair.take_all()

    # --- what they get, and say ------------------------------------------------------------------

    @rule()
    def take_all(self) -> None:
        self.pair.take_all()

    @rule(most=st.integers(1, 5), unsent=st.just(0) | st.integers(0, 31))
    def take_some(self, most: int, unsent: int) -> None:
        for number, delivery in enumerate(self.pair.take(most)):
            if unsent >> number & 1:
                self.pair.unsent(delivery)

    def given(self, pick: int) -> Given:
        """One of what was taken, rather one that is not settled."""
        all_of_them = list(self.pair.model.given.values())
        held = [g for g in all_of_them if any(m.holder == g.delivery.number for m in g.messages)]
        some_of_them = held if held and pick % 4 else all_of_them
        return some_of_them[pick // 4 % len(some_of_them)]

    @precondition(lambda self: self.pair.model.given)
    @rule(
        how=st.sampled_from(["done", "fail", "fail", "give_back", "reject"]),
        pick=PICK,
        low=PICK,
        high=PICK,
        delay=DELAY,
        take=st.booleans(),
    )
    def answer(self, how: str, pick: int, low: int, high: int, delay: float | None, take: bool) -> None:
        """For all of a delivery, or some of it, or more than it; mostly by who has it."""
        given = self.given(pick)
        first, last = given.first, given.last
        if not low % 3:
            first = given.first - 1 + low % (last - first + 3)
        if not high % 3:
            last = given.last + 1 - high % (given.last - given.first + 3)
        name = given.worker if high % 10 else WORKERS[low % 4]
        arguments = (name, given.delivery.number, first, last)
        self.pair.fail(*arguments, delay) if how == "fail" else getattr(self.pair, how)(*arguments)
        if take:
            self.pair.take_all()

    @rule(delay=DELAY, but=st.integers(0, 3), seconds=st.sampled_from([0.0, 1.0, 8.0]))
    def nearly_all_fail(self, delay: float | None, but: int, seconds: float) -> None:
        """And are soon tried again."""
        for number, given in list(self.pair.model.given.items()):
            if number % 4 != but and any(m.holder == number for m in given.messages):
                self.pair.fail(given.worker, number, given.first, given.last, delay)
        self.pair.pass_time(seconds)
        self.pair.take_all()

    @precondition(lambda self: self.pair.model.given)
    @rule(pick=PICK, seconds=SECONDS)
    def extend(self, pick: int, seconds: float) -> None:
        self.pair.extend(self.given(pick), seconds)

    @rule(name=NAME, number=st.integers(1, 1000), first=st.integers(1, 9))
    def talk_nonsense(self, name: str, number: int, first: int) -> None:
        if number not in self.pair.model.given:
            assert not self.pair.done(name, number, first, first)

    # --- time and outcome ------------------------------------------------------------------------

    @rule(seconds=SECONDS | st.just(0.0), take=st.booleans())
    def pass_time(self, seconds: float, take: bool) -> None:
        """So long, or until something is due."""
        due = self.pair.dispatcher.next_timer()
        if not seconds and due is not None:
            seconds = max(0.0, due - self.pair.model.now)
        self.pair.pass_time(seconds)
        if take:
            self.pair.take_all()

    @precondition(lambda self: self.pair.dead)
    @rule(pick=PICK)
    def bury(self, pick: int) -> None:
        self.pair.bury(self.pair.dead[pick % len(self.pair.dead)])

    @invariant()
    def as_the_model_says(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        """Everything comes to an end when workers keep acknowledging."""
        if sys.exc_info()[0] is None:
            self.pair.to_the_end()


THOROUGH = settings(max_examples=150, stateful_step_count=60, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.timeout(600)  # it takes seconds, but when it fails the shortest sequence is worth the wait
def test_any_sequence_of_events() -> None:
    run_state_machine_as_test(Life, settings=THOROUGH)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_many_sequences_of_events() -> None:
    """5,000 lives of up to 200 events; hypothesis prints the one that fails."""
    run_state_machine_as_test(Life, settings=settings(THOROUGH, max_examples=5000, stateful_step_count=200))


def seeds(number: int) -> list[int]:
    """Those to play; one, where the environment names it."""
    return [int(os.environ["ZMQBUS_SEED"])] if "ZMQBUS_SEED" in os.environ else list(range(number))


def play(seed: int) -> None:
    print(f"ZMQBUS_SEED={seed}")
    storm(Random(seed), 300)


@pytest.mark.parametrize("seed", seeds(60))
def test_storms(seed: int) -> None:
    play(seed)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_many_storms() -> None:
    """10,000 of them."""
    for seed in seeds(10_000):
        play(seed)
