"""Membership with a fake clock: every order of events at random, and whole buses simulated."""

from __future__ import annotations

import copy
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqbus.protocol.members import peers as peers_module
from zmqbus.protocol.members.membership import TICK_S_MIN, Membership
from zmqbus.protocol.members.peers import Dial, Forget, Greet, HangUp, Outputs, Peer, PeerJoined, PeerLeft, State

ME = 1


def peer(origin: int, inbox: str, **more: Any) -> Peer:
    return Peer(origin=origin, inbox=inbox, **more)


# --- every order of events ---------------------------------------------------------------------

ORIGINS = st.sampled_from([ME, *range(10, 16)])
ENDPOINTS = st.sampled_from([f"tcp://{n}:1" for n in range(6)])  # shared: moves, take-overs and lies are common
PEERS = st.builds(
    peer,
    ORIGINS,
    ENDPOINTS,
    also=st.lists(ENDPOINTS, max_size=2).map(tuple),
    name=st.sampled_from(["", "me", "x", "y"]),
    host=st.sampled_from(["", "g", "h"]),
    epoch=st.integers(0, 3),
)
STEPS = st.one_of(
    st.tuples(st.just("hint"), ORIGINS, ENDPOINTS),
    st.tuples(st.just("greeted"), PEERS),
    st.tuples(st.just("welcomed"), PEERS, ENDPOINTS),
    st.tuples(st.sampled_from(["heard", "bye", "refused"]), ORIGINS),
    st.tuples(st.just("tick"), st.sampled_from([0.0, 0.1, 1.0, 2.5, 6.0, 70.0])),
)


def call(m: Membership, step: tuple[Any, ...], now: float) -> Outputs:
    match step:
        case ("hint", origin, endpoint):
            return m.hint(origin, endpoint, now)
        case ("greeted", who):
            return m.greeted(who, now)
        case ("welcomed", who, endpoint):
            return m.welcomed(who, endpoint, now)
        case (method, origin):
            outputs: Outputs = getattr(m, method)(origin, now)
            return outputs
    raise AssertionError(step)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=60), st.lists(ENDPOINTS, max_size=2), st.randoms(use_true_random=False))
def test_in_any_order_of_events_the_rules_hold(
    steps: list[tuple[Any, ...]], seeds: list[str], rng: random.Random
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers_module, "PEERS_MAX", 4)
        patch.setattr(peers_module, "GONE_MAX", 3)
        m = Membership(ME, name="me", seeds=seeds, forget_after=20.0, jitter=rng.random)
        now = 0.0
        joined: set[int] = set()
        dealers: set[str] = set()

        def check(outputs: Outputs) -> None:
            for output in outputs:
                match output:
                    case PeerJoined(who):
                        assert who.origin not in joined, "joined twice"
                        joined.add(who.origin)
                    case PeerLeft(who):
                        joined.remove(who.origin)  # only who had joined can leave
                    case Dial(endpoint):
                        dealers.add(endpoint)
                    case Greet(endpoint):
                        assert endpoint in dealers, "greeted without a link"
                    case HangUp(endpoint):
                        dealers.discard(endpoint)
            entries = m._table.entries
            assert {who.origin for who in m.peers()} == joined
            assert ME not in entries
            assert len(entries) <= 4
            assert len(m._table._gone) <= 3
            places = {place: o for o, entry in entries.items() for place in (entry.link, entry.peer.inbox)}
            assert m._table._at == places, "one origin to an endpoint, and no trace of who is gone"
            assert {entry.link for entry in entries.values()} <= dealers, "everyone known has a link"
            assert dealers <= {entry.link for entry in entries.values()} | {*seeds}, "no link is left behind"

        for step in steps:
            if step[0] == "welcomed" and step[2] not in dealers:
                continue  # nothing can come from where nothing was dialled
            if step[0] != "tick":
                check(call(m, step, now))
                continue
            until = now + step[1]
            while (due := m.next_timer()) is not None and due <= until:
                now = max(now, due)
                check(m.tick(now))
                later = m.next_timer()
                assert later is None or later > now, "tick makes progress"
            eager = copy.deepcopy(m)  # one that looks at everything although its timer is not due …
            eager._next = -inf
            eager._contested.clear()  # names are looked at from time to time, not on time
            assert not eager.tick(max(now, until - TICK_S_MIN)), "… finds nothing that is overdue"
            now = until


def test_a_seed_that_its_peer_has_left_is_dialled_again_at_once() -> None:
    """It said HELLO from elsewhere: who is at the old place now?"""
    m = Membership(ME, name="me", seeds=["tcp://1:1"], jitter=lambda: 0.0)
    m.greeted(peer(10, "tcp://1:1", name="n", host="h", epoch=0), 0.0)
    m.tick(0.0)
    m.greeted(peer(10, "tcp://0:1", name="n", host="h", epoch=0), 0.1)
    due = m.next_timer()
    assert due is not None
    assert due <= 0.1
    assert Dial("tcp://1:1", None) in m.tick(0.1)


# --- whole buses -------------------------------------------------------------------------------


@dataclass
class SimulatedNode:
    me: Peer
    membership: Membership
    dealers: dict[str, int] = field(default_factory=dict)  # endpoint → which DEALER: an old one's WELCOME is not read
    heard_of: set[int] = field(default_factory=set)  # whose PUB it is connected to
    told: list[PeerJoined | PeerLeft] = field(default_factory=list)


class SimulatedBus:
    """Nodes that perform what Membership says, over links that delay, lose, and are cut; one heap, one seed."""

    def __init__(self, seed: int, loss: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.loss = loss
        self.now = 0.0
        self.nodes: dict[str, SimulatedNode] = {}  # by endpoint: who is bound there now
        self.cut: set[tuple[str, str]] = set()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def start(self, endpoint: str, seeds: list[str]) -> SimulatedNode:
        self._count += 1
        me = peer(1000 + self._count, endpoint, name=endpoint, host=endpoint, epoch=self._count)
        m = Membership(me.origin, name=me.name, seeds=seeds, forget_after=30.0, jitter=self.random.random)
        node = self.nodes[endpoint] = SimulatedNode(me, m)
        self._beat(node)
        self._perform(node, ())
        return node

    def stop(self, endpoint: str, bye: bool) -> None:
        node = self.nodes.pop(endpoint)
        for other in self.nodes.values():
            if bye and not self._is_cut(node, other):
                self._perform(other, other.membership.bye(node.me.origin, self.now))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = until

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, action))

    def _is_up(self, node: SimulatedNode) -> bool:
        return self.nodes.get(node.me.inbox) is node

    def _is_cut(self, one: SimulatedNode, other: SimulatedNode) -> bool:
        return (one.me.inbox, other.me.inbox) in self.cut

    def _beat(self, node: SimulatedNode) -> None:
        if self._is_up(node):
            for other in self.nodes.values():
                if node.me.origin in other.heard_of and not self._is_cut(node, other):
                    self._perform(other, other.membership.heard(node.me.origin, self.now))
            self._later(1.0, lambda: self._beat(node))

    def _tick(self, node: SimulatedNode) -> None:
        if self._is_up(node) and (due := node.membership.next_timer()) is not None and due <= self.now:
            self._perform(node, node.membership.tick(self.now))

    def _perform(self, node: SimulatedNode, outputs: Outputs) -> None:
        for output in outputs:
            match output:
                case Dial(endpoint):
                    self._count += 1
                    node.dealers[endpoint] = self._count
                    self._hello(node, endpoint)
                case Greet(endpoint):
                    self._hello(node, endpoint)
                case HangUp(endpoint):
                    node.dealers.pop(endpoint, None)
                case Forget(origin):
                    node.heard_of.discard(origin)
                case PeerJoined(who):
                    node.heard_of.add(who.origin)
        node.told += [output for output in outputs if isinstance(output, (PeerJoined, PeerLeft))]
        if (due := node.membership.next_timer()) is not None:
            self._later(max(0.0, due - self.now), lambda: self._tick(node))

    def _hello(self, node: SimulatedNode, endpoint: str) -> None:
        dealer = node.dealers[endpoint]
        known = node.membership.known_endpoints()

        def arrive() -> None:
            other = self.nodes.get(endpoint)
            if other is None or self._is_cut(node, other) or self.random.random() < self.loss:
                return
            self._perform(other, other.membership.greeted(node.me, self.now))
            self._hints(other, known)
            answer = other.membership.known_endpoints()
            self._later(self.random.uniform(0.001, 0.05), lambda: welcome(other, answer))

        def welcome(other: SimulatedNode, answer: list[tuple[int, str]]) -> None:
            alive = self._is_up(node) and node.dealers.get(endpoint) == dealer and not self._is_cut(other, node)
            if alive and self.random.random() >= self.loss:
                self._perform(node, node.membership.welcomed(other.me, endpoint, self.now))
                self._hints(node, answer)

        self._later(self.random.uniform(0.001, 0.05), arrive)

    def _hints(self, node: SimulatedNode, known: list[tuple[int, str]]) -> None:
        for origin, inbox in known:
            self._perform(node, node.membership.hint(origin, inbox, self.now))

    def assert_complete(self) -> None:
        everybody = {node.me.origin for node in self.nodes.values()}
        for node in self.nodes.values():
            joined = {who.origin for who in node.membership.peers()}
            assert joined == everybody - {node.me.origin}, node.membership


def endpoints(n: int) -> list[str]:
    return [f"tcp://{i}:1" for i in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_one_reachable_seed_is_enough_even_where_a_third_of_all_handshakes_is_lost(seed: int) -> None:
    bus = SimulatedBus(seed, loss=0.18)
    for endpoint in endpoints(12):
        bus.start(endpoint, ["tcp://0:1"])  # the same list everywhere: the first node is its own seed
    bus.run(60.0)
    bus.assert_complete()
    assert all(isinstance(event, PeerJoined) for node in bus.nodes.values() for event in node.told)


def test_joining_is_a_matter_of_milliseconds_where_nothing_is_lost() -> None:
    bus = SimulatedBus(1)
    for endpoint in endpoints(12):
        bus.start(endpoint, ["tcp://0:1"])
    bus.run(1.0)
    bus.assert_complete()


def test_once_complete_the_bus_is_quiet() -> None:
    bus = SimulatedBus(1)
    for endpoint in endpoints(5):
        bus.start(endpoint, ["tcp://0:1"])
    bus.run(10.0)
    links = [dict(node.dealers) for node in bus.nodes.values()]
    bus.run(600.0)
    assert [dict(node.dealers) for node in bus.nodes.values()] == links  # nobody dialled again
    assert all(len(node.told) == 4 for node in bus.nodes.values())


def test_who_forgot_each_other_in_a_long_partition_meets_again_through_a_third() -> None:
    bus = SimulatedBus(1)
    first, second, _ = (bus.start(endpoint, ["tcp://2:1"]) for endpoint in endpoints(3))
    bus.run(10.0)
    bus.cut = {("tcp://0:1", "tcp://1:1"), ("tcp://1:1", "tcp://0:1")}
    bus.run(200.0)
    assert first.membership.state(second.me.origin) in (None, State.SEEN)  # forgotten, or heard of again
    bus.cut = set()
    bus.run(200.0)
    bus.assert_complete()


def test_who_was_forgotten_by_one_side_only_is_met_again() -> None:
    """The other side thinks that all is well, until a HELLO comes that answers none of its own."""
    bus = SimulatedBus(1)
    first, second, _ = (bus.start(endpoint, ["tcp://2:1"]) for endpoint in endpoints(3))
    bus.run(10.0)
    bus.cut = {("tcp://1:1", "tcp://0:1")}  # the first hears nothing from the second, which hears all
    bus.run(35.1)
    assert first.membership.state(second.me.origin) is not State.JOINED
    assert second.membership.state(first.me.origin) is State.JOINED
    bus.cut = set()
    bus.run(200.0)
    bus.assert_complete()


ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["kill", "bye", "start"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["cut", "heal"]), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("run"), st.sampled_from([0.01, 0.5, 3.0, 8.0, 60.0])),
)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.lists(ACTIONS, max_size=25))
def test_whatever_happened_all_find_each_other_in_the_end(seed: int, actions: list[tuple[Any, ...]]) -> None:
    bus = SimulatedBus(seed, loss=0.1)
    places = endpoints(4)
    for endpoint in places:
        bus.start(endpoint, ["tcp://0:1"])
    for action in actions:
        match action:
            case ("run", seconds):
                bus.run(seconds)
            case (("cut" | "heal") as what, i, j):
                (bus.cut.add if what == "cut" else bus.cut.discard)((places[i], places[j]))
            case ("start", i) if places[i] not in bus.nodes:
                bus.start(places[i], ["tcp://0:1"])
            case (("kill" | "bye") as what, i) if places[i] in bus.nodes:
                bus.stop(places[i], bye=what == "bye")
    bus.cut = set()
    for endpoint in places:
        if endpoint not in bus.nodes:
            bus.start(endpoint, ["tcp://0:1"])
    bus.run(250.0)
    bus.assert_complete()
    for node in bus.nodes.values():
        assert set(node.dealers) <= {*places} - {node.me.inbox}
