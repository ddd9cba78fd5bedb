"""Membership with a fake clock: what one node sees, as scenarios."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf
from typing import Any

import pytest

from zmqbus.protocol.members import peers as peers_module
from zmqbus.protocol.members.membership import (
    ANSWER_S,
    DIAL_S_MAX,
    DIAL_S_MIN,
    EXCHANGE_S,
    HINT_S,
    TICK_S_MIN,
    Membership,
)
from zmqbus.protocol.members.peers import (
    Dial,
    DuplicateName,
    Forget,
    Greet,
    HangUp,
    Output,
    Outputs,
    Peer,
    PeerChanged,
    PeerJoined,
    PeerLeft,
    State,
    timeless,
)

ME, A, B, C = 1, 0xA, 0xB, 0xC


def peer(origin: int, inbox: str | None = None, **more: Any) -> Peer:
    facts = {"name": f"n{origin}", "host": f"h{origin}", "epoch": 100, **more}
    return Peer(origin=origin, inbox=inbox or f"tcp://10.0.0.{origin}:5000", **facts)


def membership(**options: Any) -> Membership:
    return Membership(ME, **{"name": "me", "jitter": lambda: 0.0, **options})


def join(m: Membership, who: Peer, now: float) -> None:
    m.greeted(who, now)
    m.welcomed(who, who.inbox, now)
    assert m.state(who.origin) is State.JOINED


def run(m: Membership, start: float, end: float, beating: tuple[int, ...] = ()) -> list[tuple[float, Output]]:
    """Tick whenever due until `end`, with heartbeats of `beating` every second; what came out, and when."""
    out: list[tuple[float, Output]] = []
    now, beat_at = start, start + 1.0
    while True:
        due = m.next_timer()
        now = max(now, min(inf if due is None else due, beat_at if beating else inf))
        if now > end:
            return out
        if now >= beat_at:
            for origin in beating:
                out += ((now, output) for output in m.heard(origin, now))
            beat_at += 1.0
        out += ((now, output) for output in m.tick(now))


def events(outputs: Outputs) -> list[Any]:
    """The events, with peers reduced to origins."""
    said: list[Any] = []
    for output in outputs:
        if isinstance(output, PeerJoined):
            said.append(("joined", output.peer.origin))
        elif isinstance(output, PeerLeft):
            said.append((output.reason, output.peer.origin))
        elif isinstance(output, (PeerChanged, DuplicateName)):
            said.append(output)
    return said


def dials(timed: list[tuple[float, Output]], endpoint: str | None = None) -> list[float]:
    return [now for now, o in timed if isinstance(o, Dial) and endpoint in (None, o.endpoint)]


# --- joining -----------------------------------------------------------------------------------


def test_a_hint_is_dialled_at_once_and_joined_when_both_have_met() -> None:
    m, a = membership(), peer(A)
    assert m.hint(A, a.inbox, 10.0) == [Dial(a.inbox, A)]
    assert m.state(A) is State.SEEN
    assert m.welcomed(a, a.inbox, 10.1) == []
    assert len(m.joined) == 0
    [joined] = m.greeted(a, 10.2)
    assert joined == PeerJoined(m.peers()[0])
    assert timeless(m.peers()[0]) == a
    assert m.peers()[0].joined_at == m.peers()[0].heard_at == 10.2


def test_who_greets_first_is_dialled_and_told_that_it_was_heard() -> None:
    m, a = membership(), peer(A)
    assert m.greeted(a, 10.0) == [Dial(a.inbox, A)]
    assert events(m.welcomed(a, a.inbox, 10.1)) == [("joined", A)]
    assert m.greeted(a, 10.2) == []  # said again: nothing new
    assert m.welcomed(a, a.inbox, 10.2) == []


def test_a_greeting_is_answered_by_a_dial_unless_one_is_under_way() -> None:
    m, a = membership(), peer(A)
    m.hint(A, a.inbox, 0.0)
    assert m.greeted(a, 0.1) == []
    assert m.greeted(a, 0.3) == [Dial(a.inbox, A)]  # the first came too early: it was not up yet


def test_own_origin_is_nobody() -> None:
    m = membership()
    assert not m.hint(ME, "tcp://x:1", 1.0)
    assert not m.greeted(peer(ME), 1.0)
    assert not m.bye(ME, 1.0)
    assert m.hint(A, "tcp://me:1", 1.0)  # left over from an earlier run of ours
    assert m.welcomed(peer(ME), "tcp://me:1", 1.1) == [HangUp("tcp://me:1"), Forget(A)]
    assert not m.hint(A, "tcp://me:1", 2.0)


def test_a_half_joined_peer_is_asked_for_its_hello_through_the_link_there_is() -> None:
    m, a = membership(), peer(A)
    m.hint(A, a.inbox, 0.0)
    m.welcomed(a, a.inbox, 0.1)
    [(now, asked)] = run(m, 0.1, 6.0)
    assert (now, asked) == (0.1 + DIAL_S_MAX, Greet(a.inbox, A))
    assert m.welcomed(a, a.inbox, 5.2) == []
    assert [o for _, o in run(m, 5.2, 11.0)] == [Greet(a.inbox, A)]
    assert [o for _, o in run(m, 11.0, 15.5)] == [Dial(a.inbox, A)]  # no WELCOME to that one


def test_a_joined_peer_that_had_forgotten_us_is_greeted() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    assert m.greeted(a, ANSWER_S) == []  # may be the answer to our own
    assert m.greeted(a, 2.1) == [Greet(a.inbox, A)]
    assert m.greeted(a, 2.2) == []  # two nodes must not go on answering each other


def test_seeds_are_dialled_for_ever_with_back_off_until_somebody_answers() -> None:
    m, a = membership(seeds=["tcp://seed:1"], jitter=lambda: 0.999999), peer(A)
    assert m.next_timer() == 0.0
    timed = run(m, 0.0, 3600.0)
    assert {o for _, o in timed} == {Dial("tcp://seed:1", None)}
    gaps = [later - now for now, later in pairwise(dials(timed))]
    assert gaps[:5] == pytest.approx([0.5, 1.0, 2.0, 4.0, 5.0], rel=1e-4)
    assert all(DIAL_S_MIN <= gap <= DIAL_S_MAX for gap in gaps)
    assert len(gaps) > 3600 / DIAL_S_MAX - 2

    m.welcomed(a, "tcp://seed:1", 3600.0)  # it advertises another endpoint: the link that works is kept
    assert events(m.greeted(a, 3600.1)) == [("joined", A)]
    assert not dials(run(m, 3601.0, 3700.0, beating=(A,)))
    assert m.bye(A, 3700.0)[1:] == [HangUp("tcp://seed:1"), Forget(A)]
    assert dials(run(m, 3700.0, 3701.0), "tcp://seed:1")[0] == 3700.0


def test_seed_that_is_this_node_is_not_dialled_again() -> None:
    m = membership(seeds=["tcp://seed:1"])
    assert m.tick(5.0) == [Dial("tcp://seed:1", None)]
    assert m.welcomed(peer(ME), "tcp://seed:1", 5.1) == [HangUp("tcp://seed:1")]
    assert run(m, 5.1, 1000.0) == []
    assert m.next_timer() is None


def test_a_seed_is_not_dialled_beside_the_peer_that_is_there() -> None:
    m, a = membership(seeds=["tcp://seed:1"]), peer(A)
    m.hint(A, "tcp://seed:1", 0.0)
    assert {o for _, o in run(m, 0.0, 10.0)} == {Dial("tcp://seed:1", A)}
    m.welcomed(a, "tcp://seed:1", 10.0)
    m.greeted(a, 10.0)
    m.greeted(peer(A, "tcp://new:1"), 11.0)  # it moves away, but is known
    m.welcomed(peer(A, "tcp://new:1"), "tcp://new:1", 11.1)
    assert not dials(run(m, 11.0, 60.0, beating=(A,)))


def test_two_ways_to_one_peer_leave_one_link() -> None:
    m, a = membership(seeds=["tcp://seed:1", "tcp://seed:2"]), peer(A)
    m.hint(A, a.inbox, 0.0)
    m.tick(0.0)
    assert m.welcomed(a, "tcp://seed:1", 0.1) == [HangUp(a.inbox)]  # unproven until then
    assert m.welcomed(a, "tcp://seed:2", 0.1) == [HangUp("tcp://seed:2")]
    assert m.welcomed(a, "tcp://seed:2", 0.2) == [HangUp("tcp://seed:2")]


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999999])
def test_an_unanswered_hint_is_dialled_with_back_off_and_forgotten(jitter: float) -> None:
    m, a = membership(jitter=lambda: jitter), peer(A)
    m.hint(A, a.inbox, 0.0)
    timed = run(m, 0.0, 1000.0)
    times = [0.0, *dials(timed)]
    assert all(DIAL_S_MIN <= later - now <= DIAL_S_MAX + TICK_S_MIN for now, later in pairwise(times))
    assert timed[-2:] == [(HINT_S, HangUp(a.inbox)), (HINT_S, Forget(A))]
    assert m.state(A) is None
    assert m.next_timer() is None


def test_a_repeated_hint_is_dialled_soon_but_cannot_put_off_or_flood() -> None:
    m, a = membership(), peer(A)
    m.hint(A, a.inbox, 0.0)
    run(m, 0.0, 30.0)
    timed: list[tuple[float, Output]] = []
    for step in range(1, 200):
        now = 30.0 + step * 0.01
        assert m.hint(A, a.inbox, now) == []
        timed += [(now, output) for output in m.tick(now)]
    due = dials(timed)
    assert due[0] <= 30.0 + 2 * DIAL_S_MIN  # soon
    assert len(due) <= 4  # then by the usual back-off: what is said again and again is no news


def test_hints_move_an_unproven_link_but_not_a_proven_one() -> None:
    m, a = membership(), peer(A)
    m.hint(A, "tcp://old:1", 0.0)
    assert m.hint(A, a.inbox, 0.1) == []
    assert [o for _, o in run(m, 0.1, 0.4)] == [HangUp("tcp://old:1"), Dial(a.inbox, A)]
    m.welcomed(a, a.inbox, 1.0)
    assert not m.hint(A, "tcp://liar:1", 1.1)
    join(m, a, 1.2)
    assert not m.hint(A, "tcp://liar:1", 1.3)
    assert not m.hint(B, a.inbox, 1.4)  # somebody else is said to be where A answers
    assert m.state(B) is None


def test_each_endpoint_is_tried_in_turn() -> None:
    m = membership()
    m.hint(A, "tcp://one:1", 0.0, also=("tcp://two:1", "tcp://three:1"))
    tried = [o.endpoint for _, o in run(m, 0.0, 30.0) if isinstance(o, Dial)]
    assert tried[:5] == ["tcp://two:1", "tcp://three:1", "tcp://one:1", "tcp://two:1", "tcp://three:1"]
    current = tried[-1]
    a = peer(A, "tcp://one:1", also=("tcp://two:1", "tcp://three:1"))
    assert m.welcomed(a, current, 30.0) == []
    assert events(m.greeted(a, 30.1)) == [("joined", A)]  # no re-dial: the link is one of its own


# --- changing ----------------------------------------------------------------------------------


def test_a_peer_that_moved_is_redialled_until_it_answers_and_stays_joined() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    moved = peer(A, "tcp://new:1", pub="tcp://new:2")
    changed, hang_up, dial = m.greeted(moved, 1.0)
    assert isinstance(changed, PeerChanged)
    assert (timeless(changed.previous), timeless(changed.peer)) == (a, moved)
    assert (hang_up, dial) == (HangUp(a.inbox), Dial("tcp://new:1", A))
    assert len(dials(run(m, 1.0, 4.0, beating=(A,)), "tcp://new:1")) >= 2
    assert m.welcomed(moved, "tcp://new:1", 4.0) == []
    assert not dials(run(m, 4.0, 40.0, beating=(A,)))
    assert len(m.joined) == 1


def test_new_claims_are_told_without_redialling() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    [changed] = m.greeted(peer(A, claims=("logs.>",)), 1.0)
    assert isinstance(changed, PeerChanged)
    assert changed.peer.claims == ("logs.>",)


# --- leaving -----------------------------------------------------------------------------------


def test_a_silent_peer_is_lost_redialled_and_forgotten() -> None:
    m, a = membership(lost_after=5.0, forget_after=300.0), peer(A)
    join(m, a, 0.0)
    assert m.heard(A, 4.0) == ()
    timed = run(m, 4.0, 1000.0)
    left = next(now for now, o in timed if isinstance(o, PeerLeft) and o.reason == "silent")
    assert left == 9.0
    assert dials(timed)[0] == 9.0
    assert len(dials(timed)) > 300 / (DIAL_S_MAX + TICK_S_MIN)
    assert timed[-2:] == [(309.0, HangUp(a.inbox)), (309.0, Forget(A))]
    assert sum(bool(events([o])) for _, o in timed) == 1
    assert m.next_timer() is None


@pytest.mark.parametrize(
    "back",
    [
        lambda m, a, now: m.heard(A, now),
        lambda m, a, now: m.greeted(a, now),
        lambda m, a, now: m.welcomed(a, a.inbox, now),
    ],
    ids=["heard", "greeted", "welcomed"],
)
def test_any_sign_of_life_brings_a_lost_peer_back(back: Callable[[Membership, Peer, float], Outputs]) -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    run(m, 0.0, 60.0)
    assert m.state(A) is State.LOST
    assert m.known_endpoints() == []
    assert events(back(m, a, 60.0)) == [("joined", A)]
    assert m.peers()[0].joined_at == 60.0
    timed = run(m, 60.0, 60.0 + DIAL_S_MAX - 0.1, beating=(A,))
    assert not dials(timed)  # the link made while it was lost gets time to prove itself
    m.welcomed(a, a.inbox, 65.0)
    assert not dials(run(m, 65.0, 100.0, beating=(A,)))


def test_the_link_of_a_peer_that_is_back_is_dialled_anew_if_it_stays_unproven() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    run(m, 0.0, 60.0)
    m.heard(A, 60.0)
    assert dials(run(m, 60.0, 66.0, beating=(A,)))[0] >= 60.0 + DIAL_S_MAX
    assert len(m.joined) == 1


def test_a_lost_peer_that_greets_is_dialled_where_it_says_it_is() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    run(m, 0.0, 60.0)
    m.hint(A, "tcp://liar:1", 60.0)
    assert dials(run(m, 60.0, 60.4), "tcp://liar:1")
    assert m.greeted(a, 60.4)[:2] == [HangUp("tcp://liar:1"), Dial(a.inbox, A)]


@pytest.mark.parametrize("reason", ["bye", "refused"])
def test_parting_is_told_and_stale_hints_are_not_dialled(reason: str) -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    part = m.bye if reason == "bye" else m.refused
    assert [*events(out := part(A, 1.0)), *out[1:]] == [(reason, A), HangUp(a.inbox), Forget(A)]
    assert m.state(A) is State.GONE
    assert not part(A, 1.1)
    assert not m.hint(A, a.inbox, 1.2)
    assert not m.heard(A, 1.2)
    # A HELLO or WELCOME that was still on its way means nothing after bye; a refusal may have been mended.
    assert bool(m.greeted(a, 1.3)) == (reason == "refused")
    assert m.hint(B, "tcp://b:1", 1.3)
    assert not m.bye(C, 1.4)  # never met, but no need to dial what mDNS may still say about it
    assert not m.hint(C, "tcp://c:1", 1.5)


def test_the_gone_are_remembered_for_a_while_only() -> None:
    m, a = membership(forget_after=300.0), peer(A)
    m.bye(A, 0.0)
    assert not m.hint(A, a.inbox, 299.0)
    assert m.hint(A, a.inbox, 300.0)
    m.refused(B, 0.0)
    assert not m.hint(B, "tcp://b:1", HINT_S - 1)
    assert m.hint(B, "tcp://b:1", HINT_S)


# --- restarts and names ------------------------------------------------------------------------

OLD = peer(A, "tcp://w:1", name="web", host="w", epoch=100)


@pytest.mark.parametrize(
    ("new", "silence", "expected"),
    [
        (peer(B, "tcp://w:1", name="web", host="w", epoch=101), 0.1, "restarted"),
        (peer(B, "tcp://w:1", name="other", host="w", epoch=101), 0.1, "restarted"),
        (peer(B, "tcp://w:1", name="web", host="w", epoch=99), 0.1, None),  # an echo of the one before
        (peer(B, "tcp://w:1", name="web", host="w", epoch=99), 2.1, "restarted"),  # its clock was set back
        (peer(B, "tcp://w:1", name="web", host="v", epoch=101), 0.1, None),  # somebody else's address
        (peer(B, "tcp://w:1", name="web", host="v", epoch=101), 2.1, "restarted"),  # … taken over
    ],
)
@pytest.mark.parametrize("first", ["greeted", "welcomed"])
def test_a_new_origin_at_the_same_endpoint(new: Peer, silence: float, expected: str | None, first: str) -> None:
    m = membership()
    join(m, OLD, 0.0)
    out = [*m.greeted(new, silence)] if first == "greeted" else []
    out += m.welcomed(new, "tcp://w:1", silence)
    out += m.greeted(new, silence)
    assert events(out) == ([("restarted", A), ("joined", B)] if expected else [])
    assert len(m.joined) == 1
    # The DEALER through which the new one answered stays open, unless a fresh one was dialled there.
    assert (HangUp("tcp://w:1") in out) == (expected is not None and first == "greeted")
    if expected and first == "greeted":
        assert out.index(HangUp("tcp://w:1")) < out.index(Dial("tcp://w:1", B))


@pytest.mark.parametrize("silence", [2.5, 20.0])  # still joined, or lost already
def test_a_restart_elsewhere_retires_its_silent_predecessor(silence: float) -> None:
    m, new = membership(), peer(B, "tcp://w:2", name="web", host="w", epoch=101)
    join(m, OLD, 0.0)
    run(m, 0.0, silence)
    m.hint(B, new.inbox, silence)
    m.welcomed(new, new.inbox, silence)
    out = m.greeted(new, silence)
    assert events(out) == [("restarted", A), ("joined", B)][silence > 5.0 :]
    assert m.state(A) is State.GONE
    timed = run(m, silence, silence + 100.0, beating=(B,))
    assert not dials(timed)
    assert not events([o for _, o in timed])


def test_a_quick_restart_is_no_duplicate() -> None:
    m, new = membership(), peer(B, "tcp://w:2", name="web", host="w", epoch=101)
    join(m, OLD, 0.0)
    join(m, new, 0.5)  # the old one was killed a moment ago
    timed = [(now, event) for now, o in run(m, 0.5, 20.0, beating=(B,)) for event in events([o])]
    assert [event for _, event in timed] == [("restarted", A)]
    assert 2.0 < timed[0][0] < 3.1


def test_two_live_peers_of_one_name_are_both_kept_and_told_once_until_one_leaves() -> None:
    m, twin = membership(), peer(B, "tcp://w:2", name="web", host="w", epoch=101)
    join(m, OLD, 0.0)
    join(m, twin, 0.5)
    timed = run(m, 0.5, 60.0, beating=(A, B))
    assert [e for _, o in timed for e in events([o])] == [DuplicateName("web", (A, B))]
    assert len(m.joined) == 2
    m.bye(B, 60.0)
    join(m, peer(C, "tcp://v:1", name="web"), 61.0)
    assert [e for _, o in run(m, 61.0, 90.0, beating=(A, C)) for e in events([o])] == [DuplicateName("web", (A, C))]


def test_a_peer_with_our_own_name_is_told() -> None:
    m = membership(name="web")
    join(m, OLD, 0.0)
    assert [e for _, o in run(m, 0.0, 30.0, beating=(A,)) for e in events([o])] == [DuplicateName("web", (ME, A))]


def test_a_joined_peer_that_takes_a_used_name_is_told() -> None:
    m = membership()
    join(m, OLD, 0.0)
    join(m, peer(B), 0.0)
    m.greeted(peer(B, name="web"), 1.0)
    said = [e for _, o in run(m, 1.0, 30.0, beating=(A, B)) for e in events([o])]
    assert said == [DuplicateName("web", (A, B))]


# --- peer exchange and bounds ------------------------------------------------------------------


def test_only_first_hand_knowledge_is_passed_on() -> None:
    m, a, b = membership(), peer(A), peer(B)
    m.hint(C, "tcp://c:1", 0.0)
    m.greeted(a, 0.0)  # it spoke: those who ask next must learn of it
    m.hint(B, b.inbox, 0.0)
    m.welcomed(b, b.inbox, 0.1)
    assert m.known_endpoints() == [(A, a.inbox), (B, b.inbox)]


def test_all_known_endpoints_get_told_in_turn() -> None:
    m = membership()
    for origin in range(10, 20):
        m.greeted(peer(origin), 0.0)
    told = [m.known_endpoints(limit=4) for _ in range(5)]
    assert all(len({*some}) == 4 for some in told)
    assert {origin for some in told[:3] for origin, _ in some} == set(range(10, 20))


def test_somebody_is_asked_again_for_whom_they_know() -> None:
    m, a = membership(), peer(A)
    join(m, a, 0.0)
    asked = [now for now, o in run(m, 0.0, 1000.0, beating=(A,)) if o == Greet(a.inbox, A)]
    assert asked[0] == DIAL_S_MAX
    assert len(asked) == pytest.approx(1000.0 / (EXCHANGE_S / 2), abs=2)


def test_the_table_is_bounded_and_hearsay_pushes_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "PEERS_MAX", 3)
    m = membership()
    for origin in (20, 21, 22):
        m.hint(origin, f"tcp://{origin}:1", origin)
    assert not m.hint(23, "tcp://23:1", 23.0)
    out = m.greeted(peer(A), 24.0)
    assert out[:2] == [HangUp("tcp://20:1"), Forget(20)]  # the oldest hearsay goes
    join(m, peer(A), 24.0)
    join(m, peer(B), 24.0)
    run(m, 24.0, 40.0, beating=(A,))
    assert m.state(B) is State.LOST
    join(m, peer(C), 40.0)
    assert m.state(22) is None
    join(m, peer(30), 40.0)
    assert m.state(B) is None  # then the lost
    assert not m.greeted(peer(31), 40.0)  # all three are joined
    assert (len(m.joined), m.turned_away) == (3, 2)
    assert repr(m) == "<Membership 0000000000000001 <PeerTable seen=0 joined=3 lost=0 gone=0> seeds=0>"


def test_the_memory_of_the_gone_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "GONE_MAX", 3)
    m = membership()
    for origin in range(10, 15):
        m.bye(origin, 0.0)
    assert [m.state(origin) for origin in range(10, 15)] == [None, None, *[State.GONE] * 3]
