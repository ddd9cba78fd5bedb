"""The ring in which a stream's messages gather, against a plain dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.protocol.streams.ring import BATCH_MESSAGES_MAX, EMPTY, ROOM_MIN, Ring


def store(ring: Ring, seq: int) -> None:
    assert seq <= ring.sent + ring.room, "its user's duty"
    ring.ring[seq & ring.mask] = seq


def take(ring: Ring) -> list[int]:
    """Send all that has no hole before it."""
    first, end = ring.sent + 1, ring.end()
    values = ring.upto(end)
    ring.sent = end - 1
    ring.clear(first, end)
    return values


@given(st.data())
def test_what_is_stored_comes_out_once_and_in_order_whatever_the_order_of_storing(data: st.DataObject) -> None:
    ring, stored, drawn, taken = Ring(), set[int](), 0, list[int]()
    for _ in range(data.draw(st.integers(1, 30))):
        late = [seq for seq in range(ring.sent + 1, drawn + 1) if seq not in stored]
        drawing = list(range(drawn + 1, min(drawn + data.draw(st.integers(0, 12)), ring.sent + ring.room) + 1))
        drawn += len(drawing)
        storing = data.draw(st.lists(st.sampled_from(late + drawing), unique=True)) if late + drawing else []
        for seq in storing:
            store(ring, seq)
            stored.add(seq)
        expected = []
        while ring.sent + 1 + len(expected) in stored:
            expected.append(ring.sent + 1 + len(expected))
        assert ring.end() == ring.sent + 1 + len(expected)
        if data.draw(st.booleans()):
            assert take(ring) == expected
            taken += expected
            if len(stored) == len(taken) == drawn and ring.room < BATCH_MESSAGES_MAX and data.draw(st.booleans()):
                ring.grow()
    assert taken == list(range(1, len(taken) + 1))


@pytest.mark.parametrize("sent", range(4 * ROOM_MIN))
def test_a_full_ring_is_taken_whole_wherever_it_begins(sent: int) -> None:
    ring = Ring()
    ring.sent = sent
    for seq in range(sent + 1, sent + ring.room + 1):
        store(ring, seq)
    assert take(ring) == list(range(sent + 1, sent + ring.room + 1))
    assert all(slot is EMPTY for slot in ring.ring)


def test_it_grows_to_its_bound_in_whole_steps() -> None:
    ring = Ring()
    while ring.room < BATCH_MESSAGES_MAX:
        ring.grow()
    assert ring.room == BATCH_MESSAGES_MAX
    assert len(ring.ring) == ring.mask + 1 == 2 * BATCH_MESSAGES_MAX
