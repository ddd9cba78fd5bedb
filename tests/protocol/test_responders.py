"""Who responds to what, and whom to ask next."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.protocol.members import responders
from zmqbus.protocol.members.responders import Responders


def anybody(origin: int) -> bool:
    return True


def test_nobody_responds_to_what_nobody_said() -> None:
    known = Responders(9, nullcontext())
    known.heard(1, "one", ["a"])
    assert known.choose("b", anybody) is None
    assert known.of("b") == []


def test_among_equals_who_was_asked_longest_ago() -> None:
    known = Responders(9, nullcontext())
    for origin in (1, 2, 3):
        known.heard(origin, "n", ["a"])
    turns = []
    for _ in range(7):
        origin = known.choose("a", anybody)
        assert origin is not None
        turns.append(origin)
        known.ended(origin)
    assert turns == [1, 2, 3, 1, 2, 3, 1]


def test_who_has_fewest_to_answer_goes_first() -> None:
    known = Responders(9, nullcontext())
    known.heard(1, "n", ["a", "b"])
    assert [known.choose("a", anybody) for _ in range(2)] == [1, 1]
    known.heard(2, "n", ["a", "b"])
    assert [known.choose("b", anybody) for _ in range(3)] == [2, 2, 1]  # whichever service it was for
    assert [known.load(1), known.load(2)] == [3, 2]
    for _ in range(3):
        known.ended(1)
    assert [known.load(1), known.load(2)] == [0, 2]
    assert known.choose("a", anybody) == 1


def test_only_who_can_be_asked() -> None:
    known = Responders(9, nullcontext())
    known.heard(1, "n", ["a"])
    known.heard(2, "n", ["a"])
    assert known.choose("a", lambda origin: origin == 2) == 2
    assert known.choose("a", lambda origin: False) is None


def test_services_are_replaced_and_news_are_told_from_echoes() -> None:
    known = Responders(9, nullcontext())
    assert known.heard(1, "n", ["a", "b"])
    assert not known.heard(1, "n", ["b", "a"])
    assert known.serves(1, ["b", "c"])
    assert (known.of("a"), known.of("b"), known.of("c")) == ([], [1], [1])
    assert known.serves(1, [])
    assert not known.serves(1, [])
    assert known.of("b") == []


def test_names() -> None:
    known = Responders(9, nullcontext())
    known.heard(0xAB, "n", [])
    assert known.name(0xAB) == "n"
    known.forget(0xAB)
    assert known.name(0xAB) == "00000000000000ab"


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responders, "NAMES_MAX", 3)
    known = Responders(9, nullcontext())
    known.heard(9, "me", ["a"])
    for origin in range(1, 6):
        known.heard(origin, "n", ["a"])
    assert known.of("a") == [9, 4, 5]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["heard", "forget", "ask", "end"]), st.integers(1, 4), st.sets(st.sampled_from("abc"))
        )
    )
)
def test_it_agrees_with_the_plain_thing(steps: list[tuple[str, int, set[str]]]) -> None:
    known = Responders(9, nullcontext())
    services: dict[int, set[str]] = {}
    loads = dict.fromkeys(range(1, 5), 0)
    for what, origin, named in steps:
        if what == "heard":
            assert known.heard(origin, "n", named) == (services.get(origin, set()) != named)
            services[origin] = named
        elif what == "forget":
            known.forget(origin)
            services.pop(origin, None)
        elif what == "ask":
            there = {origin for origin, named in services.items() if "a" in named}
            chosen = known.choose("a", anybody)
            assert (chosen is None) == (not there)
            if chosen is not None:
                assert loads[chosen] == min(loads[origin] for origin in there)
                loads[chosen] += 1
        elif loads[origin]:
            known.ended(origin)
            loads[origin] -= 1
        for service in "abc":
            assert set(known.of(service)) == {origin for origin, named in services.items() if service in named}
        assert {origin: known.load(origin) for origin in loads} == loads
