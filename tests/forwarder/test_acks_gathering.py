"""Acknowledgements on their way out: gathered by publisher, the last word only, in commands of bounded size."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from zmqbus.forwarder.acks import Acks
from zmqbus.protocol.commands import BODY_BYTES_MAX, ENVELOPE, HEADS_PER_COMMAND, Ack, decode_command, encode_command

JOURNAL = 7
P, Q = 0x50, 0x51  # publishers


def test_nothing_to_say() -> None:
    acks = Acks(JOURNAL)
    assert list(acks.take()) == []
    assert list(acks.take(full=True)) == []


def test_one_command_for_each_publisher() -> None:
    acks = Acks(JOURNAL)
    acks.add(b"a", P, 3)
    acks.add(b"a", Q, 8)
    acks.add(b"b", P, 1)
    assert list(acks.take()) == [(P, Ack(JOURNAL, P, [(b"a", 3), (b"b", 1)])), (Q, Ack(JOURNAL, Q, [(b"a", 8)]))]


def test_the_last_word_on_a_stream_is_enough() -> None:
    acks = Acks(JOURNAL)
    for seq in (1, 2, 9):
        acks.add(b"a", P, seq)
    assert list(acks.take()) == [(P, Ack(JOURNAL, P, [(b"a", 9)]))]


def test_an_old_question_does_not_take_back_the_last_word() -> None:
    """A HEAD that was under way while later messages were fetched, and committed."""
    acks = Acks(JOURNAL)
    acks.add(b"a", P, 9)
    acks.add(b"a", P, 5)
    assert list(acks.take()) == [(P, Ack(JOURNAL, P, [(b"a", 9)]))]


def test_whether_there_is_anything_to_say() -> None:
    acks = Acks(JOURNAL)
    assert not acks
    acks.add(b"a", P, 1)
    assert acks
    list(acks.take())
    assert not acks


def test_what_was_taken_is_gone() -> None:
    acks = Acks(JOURNAL)
    acks.add(b"a", P, 3)
    assert len(list(acks.take())) == 1
    assert list(acks.take()) == []
    acks.add(b"a", P, 3)  # asked for again: said again
    assert list(acks.take()) == [(P, Ack(JOURNAL, P, [(b"a", 3)]))]


def test_what_is_added_while_it_is_sent_is_for_the_next_time() -> None:
    acks = Acks(JOURNAL)
    acks.add(b"a", P, 3)
    for origin, _ in acks.take():
        acks.add(b"a", origin, 4)
    assert list(acks.take()) == [(P, Ack(JOURNAL, P, [(b"a", 4)]))]


def test_every_command_says_whether_there_is_room() -> None:
    acks = Acks(JOURNAL)
    for number in range(HEADS_PER_COMMAND + 1):
        acks.add(b"%d" % number, P, 1)
    acks.add(b"a", Q, 1)
    assert [ack.full for _, ack in acks.take(full=True)] == [True, True, True]


@given(
    st.lists(st.tuples(st.sampled_from([P, Q]), st.integers(0, 3 * HEADS_PER_COMMAND), st.integers(1, 2**64 - 1))),
    st.sampled_from([1, HEADS_PER_COMMAND - 1, HEADS_PER_COMMAND, 2 * HEADS_PER_COMMAND + 1]),
)
def test_all_of_it_is_said_and_nothing_else(added: list[tuple[int, int, int]], crowd: int) -> None:
    acks = Acks(JOURNAL)
    wanted: dict[int, dict[bytes, int]] = defaultdict(dict)
    for origin, number, seq in [*((P, number, 5) for number in range(crowd)), *added]:
        topic = b"%0255d" % number
        acks.add(topic, origin, seq)
        wanted[origin][topic] = max(seq, wanted[origin].get(topic, 0))
    said: dict[int, dict[bytes, int]] = defaultdict(dict)
    for origin, ack in acks.take():
        assert (ack.journal, ack.origin) == (JOURNAL, origin)
        assert ack.heads
        assert not said[origin].keys() & dict(ack.heads).keys()
        said[origin].update(ack.heads)
        frame = encode_command(ack)
        assert len(frame) - ENVELOPE.size <= BODY_BYTES_MAX
        assert decode_command(frame).body == ack  # no receiver refuses it
    assert said == wanted
