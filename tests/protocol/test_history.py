"""The publisher's history: bounded by bytes whatever is put in, and its answers those of a naive model."""

from __future__ import annotations

import sys
from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqbus.protocol.streams.history import ENTRY_BYTES, NOTHING, Entry, Fetched, History, Shelf, fetch


def filled(*batches: tuple[int, int]) -> deque[Entry]:
    """A stream's entries: (first, end) each, with parts that name them."""
    history, shelf = History(), Shelf()
    for first, end in batches:
        history.append(shelf, first, end, (f"{first}-{end}".encode(),))
    return shelf.entries


# --- fetch -------------------------------------------------------------------------------------

HELD = filled((5, 8), (8, 9), (9, 20), (20, 21))  # 1 to 4 have left already


@pytest.mark.parametrize(
    ("first", "last", "parts", "until"),
    [
        (5, 20, [b"5-8", b"8-9", b"9-20", b"20-21"], 20),  # all
        (1, 20, [b"5-8", b"8-9", b"9-20", b"20-21"], 20),  # and what is held no more
        (1, 4, [], 4),  # all of it held no more
        (1, 5, [b"5-8"], 5),
        (7, 7, [b"5-8"], 7),  # batches are whole, so they reach beyond both ends
        (7, 9, [b"5-8", b"8-9", b"9-20"], 9),
        (8, 8, [b"8-9"], 8),
        (19, 20, [b"9-20", b"20-21"], 20),
        (20, 2**64 - 1, [b"20-21"], 20),  # the rest was never sent; ask again, and be told so
        (21, 2**64 - 1, [], 2**64 - 1),
    ],
)
def test_fetch(first: int, last: int, parts: list[bytes], until: int) -> None:
    assert fetch(HELD, first, last, 1 << 20) == Fetched(parts, until)


def test_fetch_from_nothing() -> None:
    assert fetch(deque(), 1, 10, 1 << 20) == Fetched([], 10)


def test_fetch_stops_at_its_bytes_but_not_before_the_first_batch() -> None:
    cost = HELD[0][3]
    assert fetch(HELD, 1, 20, 1) == Fetched([b"5-8"], 7)
    assert fetch(HELD, 1, 20, 2 * cost - 1) == Fetched([b"5-8"], 7)
    assert fetch(HELD, 1, 20, 2 * cost) == Fetched([b"5-8", b"8-9"], 8)
    assert fetch(HELD, 8, 20, 1) == Fetched([b"8-9"], 8)


def test_fetch_gives_all_parts_of_a_batch() -> None:
    shelf = Shelf()
    History().append(shelf, 1, 2, (b"frame", b"x" * 100_000))
    assert fetch(shelf.entries, 1, 1, 1) == Fetched([b"frame", b"x" * 100_000], 1)


def test_a_range_that_ends_before_it_begins_holds_nothing() -> None:
    """A peer may send anything."""
    for first in range(1, 25):
        parts, last = fetch(HELD, first, first - 1, 1 << 20)
        assert last <= first
        assert len(parts) <= 1


# --- the ring ----------------------------------------------------------------------------------


def test_the_oldest_leaves_first_whatever_its_stream() -> None:
    history = History(4 * (ENTRY_BYTES + 10))
    a, b = Shelf(), Shelf()
    for n in range(1, 4):
        history.append(a, n, n + 1, (b"a" * 10,))
    history.append(b, 1, 2, (b"b" * 10,))
    assert [entry[0] for entry in a.entries] == [1, 2, 3]
    history.append(b, 2, 3, (b"b" * 10,))
    history.append(b, 3, 4, (b"b" * 10,))
    assert [entry[0] for entry in a.entries] == [3]
    assert [entry[0] for entry in b.entries] == [1, 2, 3]
    assert history.bytes == history.bytes_max


def test_a_batch_larger_than_the_history_is_not_kept_and_takes_all_with_it() -> None:
    history = History(10_000)
    shelf = Shelf()
    history.append(shelf, 1, 2, (b"small",))
    history.append(shelf, 2, 3, (b"x" * 10_000,))
    assert not shelf.entries
    assert history.bytes == 0
    history.append(shelf, 3, 4, (b"small",))
    assert fetch(shelf.entries, 1, 3, 1) == Fetched([b"small"], 3)


def test_no_history() -> None:
    history = History(0)
    shelf = Shelf()
    history.append(shelf, 1, 2, (b"x",))
    assert not shelf.entries
    assert fetch(shelf.entries, 1, 1, 1) == Fetched([], 1)


def test_the_bound_is_honest_about_tiny_batches() -> None:
    """What Python takes for a batch beside its bytes is within what it is charged."""
    frame = b"x" * 60
    entry: Entry = (2**40, 2**40 + 1, (frame,), 400)
    spent = sum(map(sys.getsizeof, (entry, *entry[:2], entry[2], entry[3]))) + sys.getsizeof(b"") + 2 * 8
    assert 0.8 * spent < ENTRY_BYTES < 1.4 * spent


# --- what must be kept ---------------------------------------------------------------------------


def test_what_is_not_acknowledged_outlives_its_time() -> None:
    cost = ENTRY_BYTES + 10
    history = History(2 * cost, 2 * cost)
    claimed, plain = Shelf(), Shelf()
    claimed.keep_from = 1
    for n in range(1, 4):
        history.append(claimed, n, n + 1, (b"c" * 10,))
        history.append(plain, n, n + 1, (b"p" * 10,))
    assert [entry[0] for entry in claimed.entries] == [1, 2, 3]
    assert [entry[0] for entry in plain.entries] == [3]
    assert (history.bytes, history.pinned_bytes, history.full) == (2 * cost, 2 * cost, False)
    history.append(claimed, 4, 5, (b"c" * 10,))
    history.append(plain, 4, 5, (b"p" * 10,))
    assert (claimed.pinned, history.full) == (3, True)
    history.release(claimed, 3)  # 1 and 2 are acknowledged
    assert [entry[0] for entry in claimed.entries] == [3, 4]
    assert (history.pinned_bytes, history.full) == (cost, False)
    history.release(claimed, 5)  # all; but 4 is recent, and stays for repairs
    assert [entry[0] for entry in claimed.entries] == [4]
    assert history.pinned_bytes == 0
    history.release(claimed, NOTHING)
    history.append(plain, 5, 6, (b"p" * 10,))
    history.append(plain, 6, 7, (b"p" * 10,))
    assert not claimed.entries
    assert history.bytes == 2 * cost


# --- against a model ---------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), bytes_max=st.sampled_from([0, 300, 2000, 10_000, 10**6]))
@settings(max_examples=150)
def test_history_against_a_naive_model(seed: int, bytes_max: int) -> None:
    random = Random(seed)
    history = History(bytes_max)
    streams = [Shelf(), Shelf(), Shelf()]
    following = [1, 1, 1]
    model: list[tuple[int, int, int, bytes]] = []  # stream, first, end, part; oldest first
    for _ in range(random.randint(1, 60)):
        which = random.randrange(3)
        first, end = following[which], following[which] + random.choice([1, 1, 2, 7])
        part = b"%d/%d" % (which, first) + b"x" * random.choice([0, 50, 500, 3000])
        following[which] = end
        history.append(streams[which], first, end, (part,))
        model.append((which, first, end, part))
        while sum(ENTRY_BYTES + len(part) for *_, part in model) > bytes_max:
            model.pop(0)
    assert history.bytes == sum(ENTRY_BYTES + len(part) for *_, part in model) <= bytes_max
    for which, shelf in enumerate(streams):
        entries = shelf.entries
        mine = [(first, end, part) for owner, first, end, part in model if owner == which]
        assert [(first, end, *parts) for first, end, parts, _ in entries] == mine
        for _ in range(10):
            first = random.randint(1, following[which] + 2)
            last = random.randint(first, following[which] + 5)
            limit = random.choice([1, 400, 1000, 10**6])
            parts, until = fetch(entries, first, last, limit)
            wanted = [batch for batch in mine if batch[1] > first and batch[0] <= last]
            assert parts == [part for *_, part in wanted[: len(parts)]]
            size = sum(ENTRY_BYTES + len(part) for part in parts)
            assert size <= limit or len(parts) == 1
            if len(parts) < len(wanted):  # stopped by its bytes, and not sooner than need be
                assert parts
                assert size + ENTRY_BYTES + len(wanted[len(parts)][2]) > limit
            if parts:
                assert first <= until == min(last, wanted[len(parts) - 1][1] - 1)
            else:
                assert until == last


@given(seed=st.integers(0, 2**32), limit=st.sampled_from([1, 500, 10**6]))
@settings(max_examples=50)
def test_asking_again_for_the_rest_gets_everything_that_is_held(seed: int, limit: int) -> None:
    random = Random(seed)
    shelf = Shelf()
    history = History(random.choice([600, 5000, 10**6]))
    following = 1
    for _ in range(40):
        end = following + random.choice([1, 3])
        history.append(shelf, following, end, (b"%d" % following + b"x" * random.choice([0, 300]),))
        following = end
    held = [part for _, _, (part,), _ in shelf.entries]
    got: list[bytes] = []
    first, last = 1, following - 1
    while first <= last:
        parts, until = fetch(shelf.entries, first, last, limit)
        got += parts
        assert until >= first
        first = until + 1
    assert got == held
