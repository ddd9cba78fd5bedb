"""The consumer's end of the log by itself: LOGs made by hand, consumers that are mere tokens, no sockets."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import msgspec
import pytest

import zmqbus
from zmqbus.errors import GapError, LogGapError, RemoteProtocolError
from zmqbus.node.receiving.replay import Piece, Replay
from zmqbus.protocol.commands import Log
from zmqbus.protocol.frames import DATA, EXTERNAL, HEAD, HEADERS, RAW, encode_frame
from zmqbus.protocol.starts import Start
from zmqbus.protocol.streams.reading import GRANT_BYTES, Reading

ORIGIN = 5


class Node:
    """Takes notes."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.garbled = 0
        self.granted: list[Reading] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)

    def garbage(self, error: RemoteProtocolError) -> None:
        self.garbled += 1

    def grant(self, reading: Reading) -> None:
        self.granted.append(reading)


class Bench:
    """A replay of one journal or several."""

    def __init__(self, *, journals: int = 1, raises: bool = False, value_type: Any = None) -> None:
        self.node = Node()
        self.gone: set[Hashable] = set()
        self.replay = Replay(
            ["t"],
            self.node,
            value_type=value_type,
            raise_gaps=raises,
            wake=lambda: None,
            abandoned=self.gone.__contains__,
        )
        self.readings = []
        for journal in range(1, journals + 1):
            reading = Reading(1, ["t"], "", Start(0), journal, 0, False)
            reading.name = f"store{journal}"
            reading.read(0.0)
            reading.received(Log(1, journal, 0, 0), 0, 0.0)
            self.readings.append(reading)
        self.replay.readings += self.readings
        self.replay.merging.present(range(1, journals + 1))

    def log(self, *batches: tuple[int, bytes, bytes], journal: int = 1, **more: Any) -> None:
        """A LOG comes: (offset, frame, external) each."""
        reading = self.readings[journal - 1]
        part = b"".join(frame + external for _, frame, external in batches)
        entries = [(offset, len(frame), len(external)) for offset, frame, external in batches]
        following = more.pop("next")
        log = Log(1, journal, following, following, entries, **more)
        floor = reading.received(log, len(part), 0.0)
        self.replay.put(Piece(reading, log, part, floor))

    def take(self, count: int, token: Hashable = "me") -> list[tuple[Any, int, int | None]]:
        """As a face does: the rest of a batch without asking, if the consumer is the owner."""
        found: list[zmqbus.Message] = []
        while len(found) < count:
            message = next(self.replay.items, None) if self.replay.owner is token else None
            if message is None and (message := self.replay.take(token)) is None:
                break
            found.append(message)
        return [(message.value, message.seq, message.offset) for message in found]


def batch(first: int, values: list[Any], topic: bytes = b"t", flags: int = 0, origin: int = ORIGIN) -> bytes:
    return encode_frame(
        topic + b"\0", DATA, flags, len(values), origin, first, 7_000_000_000, msgspec.msgpack.encode(values)
    )


def test_batches_of_several_streams_with_all_flags() -> None:
    bench = Bench()
    with_headers = encode_frame(
        b"t\0", DATA, HEADERS, 2, ORIGIN, 4, 0, msgspec.msgpack.encode([["d", "e"], [{"h": 1}, None]])
    )
    raw = encode_frame(b"t\0", DATA, EXTERNAL | RAW, 1, ORIGIN, 6, 0)
    bench.log(
        (0, batch(1, ["a", "b"]), b""),
        (2, batch(9, [1], b"other", origin=6), b""),
        (3, batch(3, ["c"]), b""),
        (4, with_headers, b""),
        (6, raw, b"xyz"),
        (7, batch(7, ["g"]), b""),
        next=8,
    )
    messages = [bench.replay.take("me") for _ in range(1)]
    messages += list(bench.replay.items)
    assert [(m.topic, m.value, m.seq, m.origin, m.time, m.headers, m.offset) for m in messages if m] == [
        ("t", "a", 1, ORIGIN, 7.0, None, 0),
        ("t", "b", 2, ORIGIN, 7.0, None, 1),
    ]
    assert bench.take(9) == [(1, 9, 2), ("c", 3, 3), ("d", 4, 4), ("e", 5, 5), (b"xyz", 6, 6), ("g", 7, 7)]
    assert (bench.replay.lost, bench.node.garbled, bench.replay.messages) == (0, 0, 8)
    assert bench.readings[0].passed == 8
    assert [event.offset for event in bench.node.events] == [8]


@pytest.mark.parametrize("raises", [False, True])
def test_a_jump_is_told_in_its_place(raises: bool) -> None:
    bench = Bench(raises=raises)
    bench.log((0, batch(1, ["a", "b"]), b""), (2, batch(5, ["e", "f"]), b""), next=4)
    assert bench.take(2) == [("a", 1, 0), ("b", 2, 1)]
    if raises:
        with pytest.raises(GapError) as raised:
            bench.take(1)
        assert (raised.value.topic, raised.value.first, raised.value.last) == ("t", 3, 4)
    assert bench.take(9) == [("e", 5, 2), ("f", 6, 3)]
    assert list(bench.replay.gaps) == [zmqbus.Gap("t", ORIGIN, 3, 4)] == bench.node.events[:1]
    assert bench.replay.lost == 2


@pytest.mark.parametrize("raises", [False, True])
def test_offsets_that_are_no_more_are_told_in_their_place_and_once(raises: bool) -> None:
    bench = Bench(raises=raises)
    bench.log((0, batch(1, ["a"]), b""), (5, batch(6, ["f"]), b""), next=9, dropped=[(1, 4), (6, 8)])
    assert bench.take(1) == [("a", 1, 0)]
    for first, last, behind in ((1, 4, [("f", 6, 5)]), (6, 8, [])):
        if raises:
            with pytest.raises(LogGapError, match=f"offsets {first} to {last} are no more in the journal of store1"):
                bench.take(1)
        assert bench.take(1) == behind
    assert [(e.first, e.last) for e in bench.node.events if isinstance(e, zmqbus.LogGap)] == [(1, 4), (6, 8)]
    assert (bench.replay.lost, list(bench.replay.gaps)) == (7, [])


@pytest.mark.parametrize(
    "frame",
    [b"nonsense", encode_frame(b"t\0", HEAD, 0, 0, ORIGIN, 9, 0), batch(1, [1], b"\xff"), b""],
    ids=["none", "head", "topic", "empty"],
)
def test_what_is_no_batch_is_a_loss_and_not_the_end(frame: bytes) -> None:
    bench = Bench()
    bench.log((0, frame, b""), (1, batch(2, ["b"]), b""), next=2)
    assert bench.take(9) == [("b", 2, 1)]
    assert (bench.node.garbled, bench.replay.lost) == (1, 1)
    assert isinstance(bench.node.events[0], zmqbus.LogGap)


def test_values_that_cannot_be_decoded_are_a_loss_and_not_the_end() -> None:
    bench = Bench()
    torn = batch(2, ["b", "c"])[:-1]
    bench.log((0, batch(1, ["a"]), b""), (1, torn, b""), (3, batch(4, ["d"]), b""), next=4)
    assert bench.take(9) == [("a", 1, 0), ("d", 4, 3)]
    assert (bench.node.garbled, list(bench.replay.gaps)) == (1, [zmqbus.Gap("t", ORIGIN, 2, 3)])


def test_of_two_journals_each_message_comes_once() -> None:
    bench = Bench(journals=2)
    bench.log((100, batch(4, ["d", "e", "f"]), b""), journal=1, next=103)
    bench.log((7, batch(1, ["a", "b", "c", "d"]), b""), (11, batch(5, ["e", "f", "g"]), b""), journal=2, next=14)
    assert bench.take(9) == [
        *[("d", 4, 100), ("e", 5, 101), ("f", 6, 102)],
        *[("a", 1, 7), ("b", 2, 8), ("c", 3, 9), ("g", 7, 13)],
    ]
    assert [reading.passed for reading in bench.readings] == [103, 14]
    bench.log((14, batch(9, ["i"]), b""), journal=2, next=15)
    assert bench.take(9) == [("i", 9, 14)]
    assert bench.replay.lost == 0  # the other may have it
    bench.log((103, batch(9, ["i"]), b""), journal=1, next=104)
    assert bench.take(9) == []
    assert list(bench.replay.gaps) == [zmqbus.Gap("t", ORIGIN, 8, 8)]


def test_what_lies_before_the_start_is_cut_off() -> None:
    bench = Bench()
    reading = bench.readings[0]
    reading.next = 12
    bench.log((10, batch(1, ["a", "b", "c"]), b""), (13, batch(4, ["d"]), b""), next=14)
    assert bench.take(9) == [("c", 3, 12), ("d", 4, 13)]
    assert bench.replay.lost == 0


def test_credit_is_asked_for_as_it_is_consumed() -> None:
    bench = Bench()
    for number in range(4):
        bench.log((number, batch(number + 1, ["x" * (GRANT_BYTES // 2)]), b""), next=number + 1)
    bench.take(2)
    assert bench.node.granted == []
    bench.take(1)
    assert len(bench.node.granted) == 1
    bench.take(9)
    assert len(bench.node.granted) == 2


def test_news_of_a_reading_that_nobody_consumes_do_not_pile_up() -> None:
    bench = Bench(journals=2)
    for _ in range(100):
        for journal in (1, 2):
            bench.log(journal=journal, next=journal)
    assert len(bench.replay.queue) == 2


# --- what has been dealt with ----------------------------------------------------------------------


def dealt(bench: Bench) -> int:
    return bench.replay.dealt_with(bench.readings[0])


def test_the_message_in_hand_has_not_been_dealt_with() -> None:
    bench = Bench()
    assert dealt(bench) == 0
    bench.log((0, batch(1, ["a", "b", "c"]), b""), (3, batch(4, ["d"]), b""), next=10)
    assert dealt(bench) == 0
    for count in range(4):
        bench.take(1)
        assert dealt(bench) == count
    bench.replay.release("other")
    assert dealt(bench) == 3
    bench.replay.release("me")
    assert dealt(bench) == 4
    bench.replay.release("me")
    assert dealt(bench) == 4
    assert bench.take(1) == []
    assert dealt(bench) == 10  # what was passed over, too


def test_of_consumers_that_share_the_slowest_counts() -> None:
    bench = Bench()
    bench.log((0, batch(1, list(range(10))), b""), next=10)
    bench.take(2, "one")
    assert bench.take(2, "two") == [(2, 3, 2), (3, 4, 3)]
    assert dealt(bench) == 1
    bench.take(1, "one")
    assert dealt(bench) == 3
    bench.replay.release("two")
    assert dealt(bench) == 4
    bench.take(2, "two")
    assert dealt(bench) == 4
    assert bench.take(9, "three") == [(7, 8, 7), (8, 9, 8), (9, 10, 9)]
    assert dealt(bench) == 4
    bench.replay.release("one")
    assert dealt(bench) == 6
    bench.replay.release("two")
    assert dealt(bench) == 10


@pytest.mark.parametrize("value_type", [None, int], ids=["any", "not all fit"])
@pytest.mark.parametrize("committed", [False, True])
def test_the_first_of_several_has_to_ask_from_the_second_on(committed: bool, value_type: Any) -> None:
    bench = Bench(value_type=value_type)
    last = "ten" if value_type else 9
    bench.log((0, batch(1, [*range(9), last]), b""), next=10)
    bench.take(1, "one")
    items = bench.replay.items  # the first consumer is in the middle of these
    if committed:
        bench.replay.release("one")  # what it had is dealt with, and what it takes next is not known of
    assert bench.take(1, "two") == [(1, 2, 1)]
    assert next(items, None) is None
    assert dealt(bench) == committed
    assert bench.take(1, "one") == [(2, 3, 2)]
    assert dealt(bench) == 1
    assert bench.take(1, "two") == [(3, 4, 3)]
    assert dealt(bench) == 2
    bench.replay.release("two")
    assert dealt(bench) == 2
    assert bench.take(1, "one") == [(4, 5, 4)]
    assert dealt(bench) == 4
    assert len(bench.take(4, "two")) == 4
    if value_type:
        with pytest.raises(zmqbus.DecodeError):
            bench.take(1, "two")


def test_what_a_consumer_held_that_was_there_for_one_message_only_is_the_next_ones() -> None:
    bench = Bench()
    bench.log((0, batch(1, list(range(10))), b""), next=10)
    for number in range(3):
        bench.take(1, f"task {number}")
        bench.gone.add(f"task {number}")
        assert dealt(bench) == number
    bench.take(1, "task 3")  # is still there
    bench.take(1, "task 4")
    assert dealt(bench) == 3
    bench.gone |= {"task 3", "task 4"}
    bench.take(1, "task 5")
    assert dealt(bench) == 5


def test_after_a_value_that_does_not_fit_one_can_go_on_and_it_is_dealt_with() -> None:
    bench = Bench(value_type=int)
    bench.log((0, batch(1, [1, "two", 3]), b""), next=3)
    assert bench.take(1) == [(1, 1, 0)]
    with pytest.raises(zmqbus.DecodeError):
        bench.take(1)
    assert dealt(bench) == 1
    assert bench.take(1) == [(3, 3, 2)]
    assert dealt(bench) == 2


def test_after_the_end_nothing_comes_and_what_was_dealt_with_stays_known() -> None:
    bench = Bench()
    bench.log((0, batch(1, list(range(10))), b""), next=10)
    bench.take(3)
    bench.replay.stop(zmqbus.NodeClosed("closed"))
    assert dealt(bench) == 2
    assert bench.take(1) == []
    assert 2 <= dealt(bench) <= 3


def test_a_failure_comes_behind_what_came_before_it() -> None:
    bench = Bench()
    bench.log((0, batch(1, ["a", "b"]), b""), next=2)
    failure = zmqbus.LogUnavailable("store1", "corrupt", "damaged")
    bench.replay.fail(failure)
    assert bench.replay.closed is None
    assert bench.take(9) == [("a", 1, 0), ("b", 2, 1)]
    assert bench.replay.closed is failure
