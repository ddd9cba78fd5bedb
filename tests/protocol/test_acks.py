"""A publisher's account with its forwarders: rule by rule, and against a model that counts on its fingers."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqbus.protocol.streams.acks import Account, Ledger
from zmqbus.protocol.streams.history import ENTRY_BYTES, NOTHING, History, Shelf
from zmqbus.protocol.topics import Matcher

A, B, C = 0xA, 0xB, 0xC  # journals


class Waiting:
    """Somebody who waits, and what it was told."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def done(self, problem: str | None) -> None:
        self.told.append(problem)


class Publisher:
    """A ledger with streams, as an outlet has them."""

    def __init__(self, acks: int = 1, history_bytes: int = 10**6, buffer_bytes: int = 10**6) -> None:
        self.history = History(history_bytes, buffer_bytes)
        self.ledger = Ledger(self.history, acks)
        self.streams: dict[str, Shelf] = {}
        self.sent: dict[str, int] = {}

    def publish(self, topic: str, count: int = 1) -> int:
        """Publish a batch; returns its last seq."""
        if topic not in self.streams:
            self.streams[topic] = Shelf()
            self.sent[topic] = 0
            self.ledger.opened(topic, self.streams[topic])
        first = self.sent[topic] + 1
        self.sent[topic] += count
        self.history.append(self.streams[topic], first, first + count, (b"x" * 20,))
        return self.sent[topic]

    def claim(self, journal: int, *patterns: str) -> None:
        self.ledger.claimed(journal, patterns, self.streams)

    def ack(self, journal: int, *heads: tuple[str, int], full: bool = False) -> None:
        self.ledger.acked(journal, heads, full)

    def account(self, topic: str) -> Account:
        return self.ledger.account(topic, self.streams[topic])

    def wait(self, topic: str, seq: int) -> Waiting:
        waiting = Waiting()
        self.ledger.wait(self.account(topic), seq, waiting)
        return waiting

    def kept_from(self, topic: str) -> int:
        return self.streams[topic].keep_from


# --- claims --------------------------------------------------------------------------------------


def test_nothing_is_kept_that_nobody_claims() -> None:
    out = Publisher()
    out.publish("a.x")
    assert out.kept_from("a.x") == NOTHING
    assert not out.ledger.accounts
    out.claim(A, "b.>")
    assert out.kept_from("a.x") == NOTHING


def test_a_claim_is_for_streams_that_are_there_and_for_those_to_come() -> None:
    out = Publisher()
    out.publish("a.x")
    out.claim(A, "a.*", "b")
    out.publish("a.y")
    out.publish("b")
    out.publish("c")
    assert {topic: shelf.keep_from for topic, shelf in out.streams.items()} == {
        "a.x": 1,
        "a.y": 1,
        "b": 1,
        "c": NOTHING,
    }


def test_what_is_no_longer_claimed_is_no_longer_kept() -> None:
    out = Publisher()
    out.publish("a", 5)
    out.publish("b", 5)
    out.claim(A, ">")
    out.ack(A, ("a", 2), ("b", 2))
    out.claim(A, "b")
    assert (out.kept_from("a"), out.kept_from("b")) == (NOTHING, 3)
    assert out.account("a").claimants == set()
    out.claim(A, "a")  # what it acknowledged before still holds
    assert (out.kept_from("a"), out.kept_from("b")) == (3, NOTHING)


def test_a_stream_that_two_claim_is_kept_until_neither_does() -> None:
    out = Publisher()
    out.publish("a")
    out.claim(A, "a")
    out.claim(B, ">")
    out.claim(A, "x")
    assert out.kept_from("a") == 1
    out.claim(B, "x")
    assert out.kept_from("a") == NOTHING


def test_a_forwarder_that_comes_back_goes_on_where_it_was() -> None:
    """It is known by its journal. What it claims anew changes nothing, nor what it has acknowledged."""
    out = Publisher()
    out.publish("a", 9)
    out.claim(A, "a")
    out.ack(A, ("a", 4))
    waiting = out.wait("a", 9)
    out.claim(A, "a")
    assert (out.account("a").durable, out.kept_from("a"), waiting.told) == (4, 5, [])
    out.ack(A, ("a", 3))  # an echo
    assert (out.account("a").durable, out.kept_from("a")) == (4, 5)
    out.ack(A, ("a", 9))
    assert (out.kept_from("a"), waiting.told) == (10, [None])


def test_who_holds_a_stream_keeps_it_while_nobody_claims_it() -> None:
    out = Publisher()
    out.publish("a", 3)
    account = out.account("a")
    out.ledger.hold(account, 1)
    out.ledger.hold(account, 1)
    assert out.kept_from("a") == 1
    out.ledger.hold(account, -1)
    assert out.kept_from("a") == 1
    out.ack(A, ("a", 2))
    assert out.kept_from("a") == 3
    out.ledger.hold(account, -1)
    assert out.kept_from("a") == NOTHING


# --- acknowledgements ----------------------------------------------------------------------------


def test_an_acknowledgement_is_for_all_before_it_and_never_goes_back() -> None:
    out = Publisher()
    out.publish("a", 9)
    out.claim(A, "a")
    early, late = out.wait("a", 3), out.wait("a", 7)
    out.ack(A, ("a", 6))
    assert (early.told, late.told, out.account("a").durable, out.kept_from("a")) == ([None], [], 6, 7)
    out.ack(A, ("a", 2))  # overtaken on its way
    assert (out.account("a").durable, out.kept_from("a")) == (6, 7)
    out.ack(A, ("a", 6))
    out.ack(A, ("a", 7))
    assert (early.told, late.told) == ([None], [None])


def test_an_acknowledgement_of_what_nobody_claims_or_waits_for_is_no_news() -> None:
    out = Publisher()
    out.publish("a")
    out.ack(A, ("a", 1), ("never", 7))
    assert not out.ledger.accounts


def test_any_journal_may_acknowledge() -> None:
    """Its claims have changed, say, while the message was on its way."""
    out = Publisher()
    out.publish("a")
    out.claim(A, "a")
    waiting = out.wait("a", 1)
    out.ack(B, ("a", 1))
    assert (waiting.told, out.kept_from("a")) == ([None], 2)


def test_with_two_wanted_the_slower_one_counts() -> None:
    out = Publisher(acks=2)
    out.publish("a", 9)
    out.claim(A, "a")
    out.claim(B, "a")
    waiting = out.wait("a", 5)
    out.ack(A, ("a", 9))
    assert (out.account("a").durable, out.kept_from("a"), waiting.told) == (0, 1, [])
    out.ack(A, ("a", 9))  # the same one twice is still one
    assert out.account("a").durable == 0
    out.ack(B, ("a", 4))
    assert (out.account("a").durable, waiting.told) == (4, [])
    out.ack(B, ("a", 5))
    assert (out.account("a").durable, out.kept_from("a"), waiting.told) == (5, 6, [None])


def test_with_two_wanted_any_two_of_three_will_do() -> None:
    out = Publisher(acks=2)
    out.publish("a", 9)
    for journal in (A, B, C):
        out.claim(journal, "a")
    out.ack(A, ("a", 8))
    out.ack(B, ("a", 3))
    assert out.account("a").durable == 3
    out.ack(C, ("a", 6))
    assert out.account("a").durable == 6
    out.ack(B, ("a", 9))
    assert out.account("a").durable == 8


@pytest.mark.parametrize(("acks", "claimants", "enough"), [(1, 0, False), (1, 1, True), (2, 1, False), (2, 2, True)])
def test_whether_enough_forwarders_claim_a_stream(acks: int, claimants: int, enough: bool) -> None:
    out = Publisher(acks)
    out.publish("a")
    for journal in (A, B)[:claimants]:
        out.claim(journal, "a")
    assert out.ledger.suffices(out.account("a")) is enough


# --- waiters -------------------------------------------------------------------------------------


def test_who_comes_late_is_told_at_once() -> None:
    out = Publisher()
    out.publish("a", 3)
    out.claim(A, "a")
    out.ack(A, ("a", 2))
    assert out.wait("a", 2).told == [None]
    assert out.wait("a", 3).told == []


def test_waiters_are_told_in_order_of_their_messages() -> None:
    out = Publisher()
    out.publish("a", 5)
    out.claim(A, "a")
    order: list[int] = []

    class Named(Waiting):
        def __init__(self, seq: int) -> None:
            super().__init__()
            self.seq = seq

        def done(self, problem: str | None) -> None:
            order.append(self.seq)

    for seq in (4, 1, 5, 3, 2):
        out.ledger.wait(out.account("a"), seq, Named(seq))
    out.ack(A, ("a", 4))
    out.ack(A, ("a", 5))
    assert order == [1, 2, 3, 4, 5]


def test_who_is_forgotten_is_told_nothing() -> None:
    out = Publisher()
    out.publish("a", 5)
    out.publish("b", 5)
    out.claim(A, ">")
    gone, stays = Waiting(), Waiting()
    for topic in ("a", "b"):
        for seq in (5, 2, 4, 1):
            out.ledger.wait(out.account(topic), seq, gone)
            out.ledger.wait(out.account(topic), seq, stays)
    out.ledger.forget(gone)
    out.ack(A, ("a", 3), ("b", 5))
    assert (gone.told, stays.told) == ([], [None] * 6)
    out.ack(A, ("a", 5))
    assert stays.told == [None] * 8


def test_who_waits_for_a_claim_that_is_given_up_is_told() -> None:
    """The forwarder came back with other claims: nobody is going to acknowledge this any more."""
    out = Publisher()
    out.publish("a")
    out.publish("b")
    out.claim(A, ">")
    waiting, other = out.wait("a", 1), out.wait("b", 1)
    out.claim(A, "b")
    assert len(waiting.told) == 1
    assert waiting.told[0] is not None
    assert "claims" in waiting.told[0]
    assert other.told == []
    out.claim(A, ">")
    out.ack(A, ("a", 1))
    assert len(waiting.told) == 1


def test_with_two_wanted_one_that_is_left_is_not_enough_to_wait_for() -> None:
    out = Publisher(acks=2)
    out.publish("a", 9)
    out.claim(A, "a")
    waiting = out.wait("a", 5)
    out.claim(A, "a", "b")
    assert waiting.told == []  # a second one may come
    out.claim(B, "a")
    out.ack(B, ("a", 5))
    late = out.wait("a", 6)
    out.claim(B, "b")
    assert waiting.told == []  # it has it, and the other will
    assert len(late.told) == 1
    assert late.told[0] is not None
    assert "claims" in late.told[0]
    out.ack(A, ("a", 5))
    assert waiting.told == [None]


# --- no room -------------------------------------------------------------------------------------


def test_where_nobody_has_room_nobody_waits() -> None:
    out = Publisher()
    out.publish("a")
    out.publish("b")
    out.claim(A, ">")
    out.claim(B, "b")
    a, b = out.wait("a", 1), out.wait("b", 1)
    out.ack(A, full=True)
    assert len(a.told) == 1
    assert a.told[0] is not None
    assert "room" in a.told[0]
    assert b.told == []  # the other may
    late = out.wait("a", 1)
    assert late.told == a.told
    assert out.kept_from("a") == 1  # it is kept for all that
    out.ack(B, full=True)
    assert b.told == a.told
    out.ack(A, ("a", 1), ("b", 1))  # there is room again: who waits from now on waits
    assert (a.told, b.told, late.told) == ([a.told[0]], [a.told[0]], [a.told[0]])  # each was told once
    out.publish("a")
    again = out.wait("a", 2)
    assert again.told == []
    out.ack(A, ("a", 2))
    assert again.told == [None]


def test_the_last_acknowledgement_before_the_end_of_room_counts() -> None:
    out = Publisher()
    out.publish("a", 4)
    out.claim(A, "a")
    had, had_not = out.wait("a", 2), out.wait("a", 3)
    out.ack(A, ("a", 2), full=True)
    assert had.told == [None]
    assert len(had_not.told) == 1
    assert had_not.told[0] is not None


def test_while_nobody_claims_a_stream_a_full_journal_is_no_reason() -> None:
    """Somebody else may be about to claim it."""
    out = Publisher()
    out.publish("a")
    out.claim(A, "b")
    out.ack(A, full=True)
    assert out.wait("a", 1).told == []


def test_a_forwarder_that_comes_is_not_full_before_it_says_so() -> None:
    """It may have been started again, on a larger disk."""
    out = Publisher()
    out.publish("a")
    out.claim(A, "a")
    out.ack(A, full=True)
    out.claim(A, "a")
    waiting = out.wait("a", 1)
    assert waiting.told == []
    out.ack(A, full=True)
    assert len(waiting.told) == 1


def test_with_two_wanted_one_full_journal_is_enough_to_know() -> None:
    out = Publisher(acks=2)
    out.publish("a", 9)
    out.claim(A, "a")
    assert out.wait("a", 9).told == []  # a second one may come
    out.claim(B, "a")
    out.ack(A, ("a", 5), full=True)
    has, lacks = out.wait("a", 5), out.wait("a", 6)
    assert has.told == []  # A has it
    assert len(lacks.told) == 1
    assert lacks.told[0] is not None
    assert "room" in lacks.told[0]
    out.claim(C, "a")
    assert out.wait("a", 6).told == []  # B and C will do
    out.ack(B, ("a", 5))
    assert has.told == [None]


def test_only_full_journals_are_left_when_the_other_gives_up_its_claim() -> None:
    out = Publisher()
    out.publish("a")
    out.claim(A, "a")
    out.claim(B, "a")
    out.ack(A, full=True)
    waiting = out.wait("a", 1)
    assert waiting.told == []
    out.claim(B, "b")
    assert len(waiting.told) == 1
    assert waiting.told[0] is not None
    assert "room" in waiting.told[0]


# --- against a model -----------------------------------------------------------------------------

TOPICS = ["a.x", "a.y", "b", "c"]
CLAIMS = [[">"], ["a.*"], ["a.x", "b"], ["b", "c"], ["z"]]


@dataclass
class Model:
    """The rules, said as plainly as can be."""

    acks: int
    claims: dict[int, list[str]] = field(default_factory=dict)
    heads: dict[tuple[str, int], int] = field(default_factory=dict)
    full: set[int] = field(default_factory=set)
    accounts: set[str] = field(default_factory=set)
    waiting: list[tuple[str, int, Waiting]] = field(default_factory=list)
    told: list[tuple[Waiting, bool]] = field(default_factory=list)

    def claimants(self, topic: str) -> set[int]:
        return {journal for journal, patterns in self.claims.items() if Matcher(patterns).matches(topic)}

    def durable(self, topic: str) -> int:
        seqs = sorted((seq for (of, _), seq in self.heads.items() if of == topic), reverse=True)
        return seqs[self.acks - 1] if len(seqs) >= self.acks else 0

    def keep_from(self, topic: str) -> int:
        return self.durable(topic) + 1 if self.claimants(topic) else NOTHING

    def settle(self) -> None:
        """Tell those who have waited long enough: that it is durable, or that it will not be."""
        for entry in list(self.waiting):
            topic, seq, who = entry
            has = {journal for (of, journal), head in self.heads.items() if of == topic and head >= seq}
            could = {journal for journal in (A, B, C) if journal in has or journal in self.claimants(topic)}
            can = {journal for journal in could if journal in has or journal not in self.full}
            if seq <= self.durable(topic):
                self.waiting.remove(entry)
                self.told.append((who, True))
            elif len(can) < self.acks <= len(could):
                self.waiting.remove(entry)
                self.told.append((who, False))


@given(seed=st.integers(0, 2**32), acks=st.sampled_from([1, 1, 2, 3]))
@settings(max_examples=400)
def test_ledger_against_a_naive_model(seed: int, acks: int) -> None:
    random = Random(seed)
    cost = ENTRY_BYTES + 20
    out = Publisher(acks, history_bytes=cost * random.choice([0, 3, 1000]), buffer_bytes=cost * 4)
    model = Model(acks)
    waiters: list[Waiting] = []
    batches: dict[str, list[tuple[int, int]]] = {topic: [] for topic in TOPICS}
    for _ in range(random.randint(1, 60)):
        topic = random.choice(TOPICS)
        journal = random.choice([A, B, C])
        match random.choice(["publish", "publish", "claim", "ack", "ack", "ack", "full", "wait", "wait", "forget"]):
            case "publish":
                last = out.publish(topic, count := random.choice([1, 1, 3]))
                batches[topic].append((last - count + 1, last + 1))
                if model.claimants(topic):
                    model.accounts.add(topic)
            case "claim":
                before = {topic: model.claimants(topic) for topic in TOPICS}
                model.claims[journal] = random.choice(CLAIMS)
                model.full.discard(journal)
                out.claim(journal, *model.claims[journal])
                model.accounts |= {topic for topic in out.streams if model.claimants(topic)}
                for entry in list(model.waiting):
                    has = {of for (at, of), head in model.heads.items() if at == entry[0] and head >= entry[1]}
                    after = model.claimants(entry[0])
                    if journal in before[entry[0]] - after and len(has | after) < acks:  # it gives up its claim
                        model.waiting.remove(entry)
                        model.told.append((entry[2], False))
                model.settle()
            case "ack" | "full" as kind:
                heads = []
                for of in random.sample(TOPICS, random.randint(0, 3)) if kind == "ack" or random.random() < 0.5 else ():
                    heads.append((of, seq := random.randint(0, out.sent.get(of, 0))))
                    if of in model.accounts:
                        model.heads[of, journal] = max(seq, model.heads.get((of, journal), 0))
                if kind == "full":
                    model.settle()  # what is acknowledged in the same breath comes first
                    model.full.add(journal)
                else:
                    model.full.discard(journal)
                out.ack(journal, *heads, full=kind == "full")
                model.settle()
            case "wait" if topic in out.streams:
                waiter = random.choice(waiters) if waiters and random.random() < 0.3 else Waiting()
                waiters.append(waiter)
                seq = random.randint(1, out.sent[topic])
                out.ledger.wait(out.account(topic), seq, waiter)
                model.accounts.add(topic)
                model.waiting.append((topic, seq, waiter))
                model.settle()
            case "forget" if waiters:
                waiter = random.choice(waiters)
                out.ledger.forget(waiter)
                model.waiting = [entry for entry in model.waiting if entry[2] is not waiter]
        assert set(out.ledger.accounts) == model.accounts
        for topic, shelf in out.streams.items():
            assert shelf.keep_from == model.keep_from(topic)
            if topic in model.accounts:
                account = out.ledger.accounts[topic]
                assert account.claimants == model.claimants(topic)
                assert account.durable == model.durable(topic)
                assert len(account.waiting) == sum(entry[0] == topic for entry in model.waiting)
            held = [entry[:2] for entry in shelf.entries]
            assert held == batches[topic][len(batches[topic]) - len(held) :]  # the end of it, without a hole
            assert shelf.pinned <= len(held)
        for waiter in set(waiters):
            told = [good for who, good in model.told if who is waiter]
            assert sorted(problem is None for problem in waiter.told) == sorted(told)
    assert out.history.pinned_bytes == cost * sum(shelf.pinned for shelf in out.streams.values())
    assert out.history.full == (out.history.pinned_bytes > out.history.buffer_bytes_max)


@given(seed=st.integers(0, 2**32), history=st.sampled_from([0, 2, 10]))
@settings(max_examples=200)
def test_what_is_claimed_and_not_acknowledged_is_there(seed: int, history: int) -> None:
    """From the claim on: whatever else is published, and however little the history holds."""
    random = Random(seed)
    out = Publisher(history_bytes=history * (ENTRY_BYTES + 20), buffer_bytes=10**9)
    acked = dict.fromkeys(TOPICS, 0)
    out.claim(A, "a.*", "b")
    for _ in range(80):
        topic = random.choice(TOPICS)
        out.publish(topic, random.choice([1, 4]))
        if random.random() < 0.3 and topic != "c":
            acked[topic] = max(acked[topic], random.randint(0, out.sent[topic]))
            out.ack(A, (topic, acked[topic]))
        for of, shelf in out.streams.items():
            if of != "c" and acked[of] < out.sent[of]:
                assert shelf.entries[0][0] <= acked[of] + 1
                assert shelf.entries[-1][1] == out.sent[of] + 1
    for of in ("a.x", "a.y", "b"):
        if of in out.streams:
            out.ack(A, (of, out.sent[of]))
    assert out.history.pinned_bytes == 0


# --- queues that were handed over ------------------------------------------------------------------


def test_what_a_publisher_gives_out_itself_is_durable_when_it_is_done() -> None:
    """Acknowledgements of what follows it say nothing of it, and do not wait for it either."""
    out = Publisher()
    out.publish("q", 6)
    account = out.account("q")
    out.ledger.settled(account, 0)
    early = [out.wait("q", seq) for seq in (1, 2, 3)]
    later = [out.wait("q", seq) for seq in (4, 6)]
    out.claim(A, "q")
    out.ledger.handed(account, 3)
    out.ack(A, ("q", 5))
    assert [waiting.told for waiting in (*early, *later)] == [[], [], [], [None], []]
    assert out.wait("q", 2).told == []
    out.ledger.settled(account, 2)
    assert [waiting.told for waiting in (*early, *later)] == [[None], [None], [], [None], []]
    out.ack(A, ("q", 6))
    assert [waiting.told for waiting in (early[2], later[1])] == [[], [None]]
    out.ledger.settled(account, 3)
    assert early[2].told == [None]
    assert out.wait("q", 3).told == [None]


def test_a_full_journal_is_no_reason_not_to_wait_for_what_the_publisher_gives_out() -> None:
    out = Publisher()
    out.publish("q", 6)
    account = out.account("q")
    out.ledger.settled(account, 0)
    out.claim(A, "q")
    out.ledger.handed(account, 3)
    early, later = out.wait("q", 2), out.wait("q", 5)
    out.ack(A, full=True)
    assert (early.told, len(later.told)) == ([], 1)
    assert out.wait("q", 1).told == []
    out.ledger.settled(account, 3)
    assert early.told == [None]
